//! `acl print`: the rights of a role on Kafka, as `kafka-acls.sh` commands.

use clap::Subcommand;
use kafold::kafka::rights::{Right, Role};
use kafold::rights::Role as RoleName;
use serde_json::json;

use crate::admin::Context;
use crate::commands::grants::role_parser;
use crate::error::Error;
use crate::options::LogUrl;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum AclCommand {
    /// Prints a kafka-acls.sh command for each right of a role on the log; contacts no server.
    ///
    /// The role works under exactly these rights when everything else is denied. Optional rights
    /// are printed as comments. For brokers with a required login, add --command-config FILE.
    Print(PrintArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PrintArgs {
    /// The role of the process.
    #[arg(long, value_parser = role_parser())]
    role: RoleName,
    /// The principal to grant the rights to; by default User:kafold_ROLE.
    ///
    /// A login by password has the principal User:NAME. A client certificate has its subject as the
    /// principal, such as User:CN=orders,O=Example.
    #[arg(long, value_name = "PRINCIPAL", value_parser = principal)]
    principal: Option<String>,
}

/// Maps a role of the command line to the role on Kafka.
pub(crate) fn on_kafka(role: RoleName) -> Role {
    match role {
        RoleName::Service => Role::Service,
        RoleName::Worker => Role::Worker,
        RoleName::Reader => Role::Reader,
        RoleName::Doctor => Role::Doctor,
        RoleName::Admin => Role::Admin,
    }
}

fn principal(text: &str) -> Result<String, String> {
    let is_typed = text.split_once(':').is_some_and(|(kind, name)| {
        !kind.is_empty() && !name.is_empty() && !text.chars().any(char::is_control)
    });
    if is_typed { Ok(text.into()) } else { Err("write TYPE:NAME, such as User:orders".into()) }
}

pub(crate) fn run(context: &mut Context, command: AclCommand) -> Result<(), Error> {
    let AclCommand::Print(PrintArgs { role, principal }) = command;
    let LogUrl::Kafka(log) = context.options.log()? else {
        return Err(Error::usage(
            "a log in a file has no rights on Kafka: give --log kafka://HOST:PORT[,HOST:PORT]/NAME",
        ));
    };
    let role = on_kafka(role);
    let principal = principal.unwrap_or_else(|| format!("User:kafold_{}", role.name()));
    let rights = role.rights(&log);
    let command = |right: &Right| right.command(&log.brokers, &principal);
    if context.out.json {
        let right = |right: &Right| json!({ "right": right.to_string(), "without": right.without, "command": command(right) });
        let rights: Vec<_> = rights.iter().map(right).collect();
        return context
            .out
            .document(&json!({ "role": role.name(), "principal": principal, "rights": rights }));
    }
    for right in &rights {
        match right.without {
            None => context.out.line(&command(right))?,
            Some(without) => {
                context.out.line(&format!("# optional; without it {without}:"))?;
                context.out.line(&format!("# {}", command(right)))?;
            }
        }
    }
    Ok(())
}

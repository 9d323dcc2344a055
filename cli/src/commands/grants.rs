//! `grants print`: the SQL rights of each role, as lines for `psql`.

use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kafold::rights::{self, Role};

use crate::admin::Context;
use crate::error::Error;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum GrantsCommand {
    /// Prints the lines of SQL that give a login on PostgreSQL the rights of a role; contacts no server.
    ///
    /// Run those of `admin` as a superuser, `migrate` as the login they are for, then the others as
    /// that login. It owns the toolkit's tables; a service owns the read models that it makes.
    Print {
        /// What the login is for.
        #[arg(long, value_parser = role_parser())]
        role: Role,
        /// The login. Default: kafold_ROLE.
        #[arg(long, value_name = "NAME")]
        to: Option<String>,
        /// The login of the service, whose read models others read.
        #[arg(long, value_name = "NAME", default_value = "kafold_service")]
        service: String,
    },
}

/// Reads the name of a role.
pub(crate) fn role_parser() -> impl TypedValueParser<Value = Role> {
    let named = |name: String| Role::ALL.into_iter().find(|role| role.name() == name);
    PossibleValuesParser::new(Role::ALL.map(Role::name))
        .map(move |name| named(name).expect("one of the possible values"))
}

pub(crate) fn run(context: &mut Context, command: GrantsCommand) -> Result<(), Error> {
    let GrantsCommand::Print { role, to, service } = command;
    let login = to.unwrap_or_else(|| role.default_login());
    let lines = rights::grants(role, &login, &service);
    if context.out.json {
        return context.out.document(&serde_json::json!({ "login": login, "grants": lines }));
    }
    lines.iter().try_for_each(|line| context.out.line(line))
}

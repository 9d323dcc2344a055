//! `grants print`: the SQL rights of each role, as lines for `psql`.

use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kafold::rights::{self, Role};

use crate::admin::Context;
use crate::error::Error;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum GrantsCommand {
    /// Prints the SQL lines which grant the rights of a role to a login on PostgreSQL; contacts no
    /// server.
    ///
    /// Run the lines of `admin` and every line ON SCHEMA as a superuser or the schema's owner, then
    /// `migrate` as the admin login, then all other lines as the admin login. The admin login owns the
    /// toolkit's tables. A service or worker owns the read models which it makes, and grants the other
    /// logins the use of them.
    Print {
        /// The purpose of the login.
        #[arg(long, value_parser = role_parser())]
        role: Role,
        /// The login. Default: kafold_ROLE.
        #[arg(long, value_name = "NAME")]
        to: Option<String>,
    },
}

/// Parses the name of a role.
pub(crate) fn role_parser() -> impl TypedValueParser<Value = Role> {
    let named = |name: String| Role::ALL.into_iter().find(|role| role.name() == name);
    PossibleValuesParser::new(Role::ALL.map(Role::name))
        .map(move |name| named(name).expect("one of the possible values"))
}

pub(crate) fn run(context: &mut Context, command: GrantsCommand) -> Result<(), Error> {
    let GrantsCommand::Print { role, to } = command;
    let login = to.unwrap_or_else(|| role.default_login());
    let lines = rights::grants(role, &login);
    if context.out.json {
        return context.out.document(&serde_json::json!({ "login": login, "grants": lines }));
    }
    lines.iter().try_for_each(|line| context.out.line(line))
}

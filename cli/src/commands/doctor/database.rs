//! The database: reachable, current, with room.

use kafold::Database;
use kafold::rights::Role;

use super::Checks;
use crate::admin::Context;
use crate::error::Error;
use crate::tables::{self, Server};

/// Connections that one process takes at most; as many must be free for one that is to start.
const CONNECTIONS_WANTED: i64 = 10;
/// Least remaining validity of a certificate, in days, without a warning.
const CERTIFICATE_DAYS_MIN: i64 = 30;

/// The database, if one is named and can be used.
pub(super) async fn check(context: &Context, checks: &mut Checks) -> Option<Database> {
    let database = match context.options.maybe_database().await {
        Ok(Some(database)) => database,
        Ok(None) => {
            checks.warning(
                "database",
                "none is named, so index and projections are not looked at",
                "add --database postgres://… or --database sqlite://FILE",
            );
            return None;
        }
        Err(error) => {
            checks.failed("database", &error);
            return None;
        }
    };
    if let Err(error) = check_server(context, &database, checks).await {
        checks.failed("database", &error);
        return None;
    }
    Some(database)
}

async fn check_server(
    context: &Context,
    database: &Database,
    checks: &mut Checks,
) -> Result<(), Error> {
    let schema = tables::migrations(database).await?.last().map_or(0, |(version, _)| *version);
    let url = database.url();
    let asked = context.clock.now();
    let Some(server) = tables::server(database).await? else {
        checks.ok("database", format!("{url}: SQLite, schema {schema}"));
        return Ok(());
    };
    let answered = context.clock.now();
    checks.ok("database", format!("{url}: PostgreSQL {}, schema {schema}", server.version));
    // It was asked for some time between the two.
    let middle = asked + (answered - asked) / 2;
    let ahead = (server.now - middle).num_milliseconds();
    checks.clock("database: clock", "the database's clock", ahead);
    check_connections(&server, checks);
    check_transport(context, database, checks).await?;
    for role in Role::ALL {
        let login = role.default_login();
        if tables::has_login(database, &login).await? {
            check_rights(database, role, Some(&login), checks).await?;
        }
    }
    match server.synchronous_commit.as_str() {
        "off" => checks.warning(
            "database: durability",
            "synchronous_commit=off: a crash of the server takes back what readers have seen; it is \
             folded again from the log",
            "set synchronous_commit=on for the role or the database",
        ),
        other => checks.ok("database: durability", format!("synchronous_commit={other}")),
    }
    Ok(())
}

fn check_connections(server: &Server, checks: &mut Checks) {
    let Server { connections, connections_max, .. } = server;
    let free = connections_max - connections;
    let found = format!("{free} of {connections_max} are free");
    match free < CONNECTIONS_WANTED {
        true => checks.warning(
            "database: connections",
            format!("{found}; a process takes up to {CONNECTIONS_WANTED}"),
            "raise max_connections, or put fewer processes on this server",
        ),
        false => checks.ok("database: connections", found),
    }
}

/// Reports the transport security of the session, and the remaining validity of the server's
/// certificate.
async fn check_transport(
    context: &Context,
    database: &Database,
    checks: &mut Checks,
) -> Result<(), Error> {
    const NAME: &str = "database: transport";
    let Database::Postgres(postgres) = database else { return Ok(()) };
    let Some(protocol) = tables::session_tls(postgres).await? else {
        checks.ok(NAME, "clear text, on this machine or as the URL allows");
        return Ok(());
    };
    let Some(shown) = postgres.server_tls().await? else {
        checks.ok(NAME, protocol);
        return Ok(());
    };
    let left_s = i64::try_from(shown.not_after).unwrap_or(i64::MAX);
    let days = left_s.saturating_sub(context.clock.now().timestamp()).div_euclid(86_400);
    let found = format!(
        "{protocol}, certificate of {}, signed by {}, {days} days left",
        shown.subject, shown.issuer
    );
    match days {
        ..0 => checks.problem(NAME, found, "renew the server's certificate: it has expired"),
        0..CERTIFICATE_DAYS_MIN => checks.warning(NAME, found, "renew the server's certificate"),
        _ => checks.ok(NAME, found),
    }
    Ok(())
}

/// Reports the missing SQL rights of a role, for the login of the database's URL or for another
/// login.
pub(super) async fn check_rights(
    database: &Database,
    role: Role,
    login: Option<&str>,
    checks: &mut Checks,
) -> Result<(), Error> {
    const NAME: &str = "database: rights";
    let Database::Postgres(postgres) = database else { return Ok(()) };
    let missing = postgres.missing_rights(role, login).await?;
    let login = login.unwrap_or("the login");
    let role = role.name();
    match missing.is_empty() {
        true => checks.ok(NAME, format!("{login} has all of the role {role}")),
        false => checks.problem(
            NAME,
            format!("{login} lacks rights of the role {role}"),
            format!("run {}", missing.join(" ")),
        ),
    }
    Ok(())
}

//! The database: reachable, current, with room.

use kafold::Database;

use super::Checks;
use crate::admin::Context;
use crate::error::Error;
use crate::tables::{self, Server};

/// Connections that one process takes at most; as many must be free for one that is to start.
const CONNECTIONS_WANTED: i64 = 10;

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

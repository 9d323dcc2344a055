//! The abilities of a PostgreSQL server that kafold rests on, checked when a database is opened: its
//! version, the encoding of the database, and connections that last for a session. And the identity of
//! the database.

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{Connection, PgConnection, Row};

use crate::error::{DatabaseError, POOLER_REMEDY};
use crate::postgres::opening_failed;

/// Oldest supported major version of PostgreSQL.
pub const POSTGRES_VERSION_MIN: i32 = 14;

/// Rejects a server that is too old, a database that does not store every text, and a connection
/// pooler which gives each transaction another session. Returns the identity of the database.
pub(crate) async fn check(
    shown: &str,
    options: &PgConnectOptions,
    connection: &mut PgConnection,
) -> Result<String, DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let sql = "SELECT current_setting('server_version'), current_setting('server_version_num'), \
               current_setting('server_encoding'), datname::text, \
               concat_ws('.', oid, current_schema()) \
               FROM pg_database WHERE datname = current_database()";
    let row = simple(connection, sql).await.map_err(failed)?;
    let text = |index: usize| row.try_get::<String, _>(index).map_err(failed);
    let number: i32 = text(1)?.parse().unwrap_or_default();
    if number / 10_000 < POSTGRES_VERSION_MIN {
        return Err(DatabaseError::refused(
            format!("{shown}: the server is PostgreSQL {}", text(0)?),
            format!("use PostgreSQL {POSTGRES_VERSION_MIN} or later"),
        ));
    }
    let (encoding, database) = (text(2)?, text(3)?);
    if encoding != "UTF8" {
        return Err(DatabaseError::refused(
            format!(
                "{shown}: the database has the encoding {encoding}, which cannot store every text"
            ),
            format!(
                "create it with: CREATE DATABASE {database} ENCODING 'UTF8' TEMPLATE template0"
            ),
        ));
    }
    refuse_shared_sessions(shown, options, connection).await?;
    Ok(format!("{}.{}", system(connection).await, text(4)?))
}

/// Rejects a connection pooler which gives each transaction another session.
pub(crate) async fn refuse_shared_sessions(
    shown: &str,
    options: &PgConnectOptions,
    connection: &mut PgConnection,
) -> Result<(), DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    match shares_sessions(options, connection).await.map_err(failed)? {
        false => Ok(()),
        true => Err(DatabaseError::refused(
            format!("{shown} is a connection pooler that gives each transaction another session"),
            POOLER_REMEDY,
        )),
    }
}

/// Rejects a standby server, and a database or a login whose transactions only read.
pub(crate) async fn refuse_read_only(
    shown: &str,
    connection: &mut PgConnection,
) -> Result<(), DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let sql = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', \
               current_database()::text";
    let row = simple(connection, sql).await.map_err(failed)?;
    let is = |index: usize| row.try_get::<bool, _>(index).map_err(failed);
    if is(0)? {
        return Err(DatabaseError::refused(
            format!("{shown} is a standby server, which cannot be written to"),
            "name the primary server in the URL, or promote this one",
        ));
    }
    if is(1)? {
        let database: String = row.try_get(2).map_err(failed)?;
        return Err(DatabaseError::refused(
            format!("{shown} is read-only: default_transaction_read_only is on"),
            format!(
                "turn it off where it was set, as with ALTER DATABASE {database} RESET \
                 default_transaction_read_only, or ALTER ROLE, or postgresql.conf"
            ),
        ));
    }
    Ok(())
}

/// Returns the system identifier of the server, which standby servers share; nothing if the login may
/// not read it, as where a provider runs the server.
async fn system(connection: &mut PgConnection) -> String {
    let row = simple(connection, "SELECT system_identifier::text FROM pg_control_system()").await;
    row.and_then(|row| row.try_get(0)).unwrap_or_else(|error| {
        tracing::debug!(%error, "the system identifier of the server is not known");
        String::new()
    })
}

/// Returns whether a pooler gives this connection another session from one transaction to the next.
/// PgBouncer does so unless its `pool_mode` is `session`.
async fn shares_sessions(
    options: &PgConnectOptions,
    connection: &mut PgConnection,
) -> Result<bool, sqlx::Error> {
    let mut second = PgConnection::connect_with(options).await?;
    let before = session(connection).await?;
    simple(&mut second, "BEGIN; SELECT pg_backend_pid()::text").await?;
    // The transaction holds its session, so a pooler gives this connection another one.
    let during = session(connection).await?;
    second.close().await?;
    Ok(before != during)
}

async fn session(connection: &mut PgConnection) -> Result<String, sqlx::Error> {
    simple(connection, "SELECT pg_backend_pid()::text").await?.try_get(0)
}

/// Runs statements without preparing them, which a pooler might do in another session, and returns
/// the last row.
async fn simple(connection: &mut PgConnection, sql: &'static str) -> Result<PgRow, sqlx::Error> {
    let mut rows = sqlx::raw_sql(sql).fetch_all(connection).await?;
    rows.pop().ok_or(sqlx::Error::RowNotFound)
}

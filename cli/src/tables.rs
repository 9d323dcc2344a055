//! What a database says of itself: its migrations, its server. Only read here.

use chrono::{DateTime, Utc};
use kafold::Database;
use kafold::PostgresDatabase;
use kafold::projections::sqlx;

/// The migrations that were applied: number and name, in order.
pub(crate) async fn migrations(database: &Database) -> Result<Vec<(i64, String)>, sqlx::Error> {
    let sql = "SELECT version, description FROM kafold_migrations WHERE success ORDER BY version";
    match database {
        Database::Postgres(database) => sqlx::query_as(sql).fetch_all(database.pool()).await,
        Database::Sqlite(database) => sqlx::query_as(sql).fetch_all(database.readers()).await,
    }
}

/// What a PostgreSQL server says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) version: String,
    pub(crate) now: DateTime<Utc>,
    pub(crate) connections: i64,
    pub(crate) connections_max: i64,
    /// As set for the role or the database.
    pub(crate) synchronous_commit: String,
}

/// `None` for SQLite, which is no server.
pub(crate) async fn server(database: &Database) -> Result<Option<Server>, sqlx::Error> {
    let Database::Postgres(database) = database else { return Ok(None) };
    type Row = (String, DateTime<Utc>, i64, i64, String);
    let sql = "SELECT current_setting('server_version'), clock_timestamp(), \
                 (SELECT sum(numbackends)::int8 FROM pg_stat_database), \
                 current_setting('max_connections')::int8 \
                   - current_setting('superuser_reserved_connections')::int8, \
                 current_setting('synchronous_commit')";
    let (version, now, connections, connections_max, synchronous_commit): Row =
        sqlx::query_as(sql).fetch_one(database.pool()).await?;
    Ok(Some(Server { version, now, connections, connections_max, synchronous_commit }))
}

/// Returns the TLS version of a session with the server; `None` in clear text.
pub(crate) async fn session_tls(
    database: &PostgresDatabase,
) -> Result<Option<String>, sqlx::Error> {
    let sql = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl";
    sqlx::query_scalar(sql).fetch_optional(database.pool()).await
}

/// Returns `true` for a login with this name and SELECT on a table of the toolkit. PostgreSQL
/// shares logins between all databases of a server.
pub(crate) async fn has_login(database: &Database, login: &str) -> Result<bool, sqlx::Error> {
    let Database::Postgres(database) = database else { return Ok(false) };
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_roles r JOIN pg_class c \
                 ON c.relkind = 'r' AND c.relname LIKE 'kafold\\_%' AND pg_table_is_visible(c.oid) \
               WHERE r.rolname = $1 AND has_table_privilege(r.oid, c.oid, 'SELECT'))";
    sqlx::query_scalar(sql).bind(login).fetch_one(database.pool()).await
}

//! A PostgreSQL database: a pool with its limits.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};

use crate::audit;
use crate::database::Mode;
use crate::error::{DatabaseError, is_transient, is_unknown_host};
use crate::schema::{self, Applied, Standing};
use crate::url;

/// Most connections of one process to one database.
pub const CONNECTIONS_MAX: u32 = 10;
/// How long opening and a wait for a free connection may take; then the database is unavailable.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection must have been idle to be tried before it is used. One that broke sooner fails
/// what it is used for, as one does that breaks during it: as transient.
const TRIED_AFTER_IDLE: Duration = Duration::from_secs(1);
/// How long one statement may run; then it fails as transient. Above any batch written here.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a statement may wait for a lock; then it fails as transient.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a transaction may do nothing: a process that was frozen in the middle of one must let its
/// successor go on, and well before [`LOCK_TIMEOUT`]. No transaction of ours waits for anything else.
pub const IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Names the advisory lock that is held while tables are made: two processes at once are safe.
const MIGRATION_LOCK: i64 = 0x6b61_666f_6c64; // "kafold"

/// A pool of connections to a PostgreSQL database whose tables are current. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PostgresDatabase {
    pool: PgPool,
    url: Arc<str>,
}

impl PostgresDatabase {
    /// The connections.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The URL without password.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub(crate) async fn open(url: &str, mode: Mode) -> Result<Self, DatabaseError> {
        let shown = url::shown(url);
        let options = options(url, &shown)?;
        let opening = prepare(&shown, &options, mode);
        match tokio::time::timeout(ACQUIRE_TIMEOUT, opening).await {
            Ok(prepared) => prepared?,
            Err(_) => {
                let cause = sqlx::Error::PoolTimedOut;
                return Err(DatabaseError::Unavailable { url: shown, cause });
            }
        }
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // A round trip each time, while the connection is in use all the time.
            .test_before_acquire(false)
            .before_acquire(|connection, about| {
                Box::pin(async move {
                    if about.idle_for >= TRIED_AFTER_IDLE {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(options);
        Ok(Self { pool, url: shown.into() })
    }

    pub(crate) async fn close(self) {
        self.pool.close().await;
    }
}

fn options(url: &str, shown: &str) -> Result<PgConnectOptions, DatabaseError> {
    let options = PgConnectOptions::from_str(url).map_err(|error| {
        DatabaseError::refused(
            format!("{shown} is not a database URL: {error}"),
            "give postgres://USER:PASSWORD@HOST:PORT/DATABASE, with special characters as %XX",
        )
    })?;
    let millis = |timeout: Duration| timeout.as_millis().to_string();
    Ok(options.options([
        ("statement_timeout", millis(STATEMENT_TIMEOUT)),
        ("lock_timeout", millis(LOCK_TIMEOUT)),
        ("idle_in_transaction_session_timeout", millis(IDLE_IN_TRANSACTION_TIMEOUT)),
    ]))
}

/// Connects once, so that what is wrong shows as itself and not as a pool's timeout, and sees to
/// the tables.
async fn prepare(shown: &str, options: &PgConnectOptions, mode: Mode) -> Result<(), DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let mut connection = PgConnection::connect_with(options).await.map_err(failed)?;
    match mode {
        Mode::Check => match standing(shown, &mut connection).await? {
            Standing::Current => {}
            Standing::Behind { found, known } => {
                return Err(DatabaseError::NotMigrated { url: shown.to_owned(), found, known });
            }
        },
        Mode::Migrate => migrate(shown, &mut connection).await?,
    }
    connection.close().await.map_err(failed)
}

async fn migrate(shown: &str, connection: &mut PgConnection) -> Result<(), DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let mut transaction = connection.begin().await.map_err(failed)?;
    let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(MIGRATION_LOCK);
    lock.execute(&mut *transaction).await.map_err(failed)?;
    if let Standing::Behind { found, known } = standing(shown, &mut transaction).await? {
        tracing::info!(database = shown, found, known, "making the tables current");
        // `Migrator::run` is the same, but its future cannot be sent to another thread.
        let made = schema::postgres().run_direct(None, &mut *transaction, false).await;
        made.map_err(|error| DatabaseError::of_migration(error, failed, shown))?;
        audit::chain_postgres(&mut transaction).await.map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

async fn standing(shown: &str, connection: &mut PgConnection) -> Result<Standing, DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let there = sqlx::query_scalar("SELECT to_regclass('kafold_migrations') IS NOT NULL");
    let there: bool = there.fetch_one(&mut *connection).await.map_err(failed)?;
    let applied: Vec<Applied> = match there {
        true => sqlx::query_as("SELECT version, checksum FROM kafold_migrations WHERE success")
            .fetch_all(connection)
            .await
            .map_err(failed)?,
        false => Vec::new(),
    };
    schema::standing(shown, &schema::postgres(), &applied)
}

/// Tells a server that is down from a URL or rights that are wrong.
fn opening_failed(shown: &str, error: sqlx::Error) -> DatabaseError {
    let refused = |remedy: &str| DatabaseError::refused(format!("{shown}: {error}"), remedy);
    if let sqlx::Error::Io(cause) = &error
        && is_unknown_host(cause)
    {
        return refused("check the host name in the URL");
    }
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    match code.as_ref() {
        "28P01" | "28000" => {
            refused("check user and password in the URL, and the server's pg_hba.conf")
        }
        "3D000" => refused("create the database, or name another one in the URL"),
        "42501" => refused(
            "give the role the right: GRANT CREATE, USAGE ON SCHEMA public TO the role, \
             and ownership of tables named kafold_",
        ),
        "3F000" => refused("create the schema that the role's search_path names"),
        "25006" => refused("name the primary in the URL: this server is read-only"),
        _ if is_transient(&error) => {
            DatabaseError::Unavailable { url: shown.to_owned(), cause: error }
        }
        _ => refused("check the URL and the server's log"),
    }
}

//! A PostgreSQL database: a pool with its limits.

use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use kafold_core::Clock;
use kafold_core::clock::SystemClock;
use kafold_core::secret::shown_path;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tokio::time::timeout;

use crate::audit;
use crate::certificate::{self, ServerTls};
use crate::database::Mode;
use crate::error::{DatabaseError, is_transient, refusal};
use crate::rights::{self, Role};
use crate::schema::{self, Applied, Standing};
use crate::server;
use crate::transport::{self, Decided, SslMode};
use crate::url::PostgresUrl;

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

/// Interval of the probes of a watched database. Each probe opens a new connection outside the
/// pool.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// Interval at which the log repeats the complaint of a watched database.
pub const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// Most rights named in one complaint.
const COMPLAINT_RIGHTS_MAX: usize = 8;

/// A pool of connections to a PostgreSQL database whose tables are current. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PostgresDatabase {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    url: PostgresUrl,
    identity: String,
    renewal: Arc<Renewal>,
    watch: Mutex<Watch>,
}

/// Has older connections closed at their next use. Behind a pooler that has changed its mode for a
/// while they would go on with statements of other sessions.
#[derive(Debug, Default)]
struct Renewal {
    /// Connections opened before are closed.
    at: Mutex<Option<Instant>>,
}

impl Renewal {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn renew(&self) {
        *self.lock() = Some(SystemClock.instant());
    }

    fn is_due(&self, age: Duration) -> bool {
        let at = *self.lock();
        at.is_some_and(|at| age > SystemClock.instant().saturating_duration_since(at))
    }
}

/// The role and the results of the probes of a database.
#[derive(Debug, Default)]
struct Watch {
    /// The role with the probed rights; `None` before the database is watched.
    role: Option<Role>,
    complaint: Option<String>,
    complained_at: Option<Instant>,
}

impl PostgresDatabase {
    /// The connections.
    pub fn pool(&self) -> &PgPool {
        &self.inner.pool
    }

    /// The URL without password.
    pub fn url(&self) -> &str {
        &self.inner.url.shown
    }

    /// The server's system identifier, the OID of the database, and the schema.
    pub(crate) fn identity(&self) -> &str {
        &self.inner.identity
    }

    pub(crate) async fn open(url: PostgresUrl, mode: Mode) -> Result<Self, DatabaseError> {
        let (options, warnings) = options(&url)?;
        let identity = within(&url.shown, prepare(&url.shown, &options, mode)).await?;
        for warning in warnings {
            tracing::warn!(database = url.shown, "{warning}");
        }
        let renewal = Arc::new(Renewal::default());
        let renewed = Arc::clone(&renewal);
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // A round trip each time, while the connection is in use all the time.
            .test_before_acquire(false)
            .after_connect(|connection, _| Box::pin(settle(connection)))
            .before_acquire(move |connection, about| {
                let is_old = renewed.is_due(about.age);
                Box::pin(async move {
                    if is_old {
                        return Ok(false);
                    }
                    if about.idle_for >= TRIED_AFTER_IDLE {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(options);
        Ok(Self {
            inner: Arc::new(Inner { pool, url, identity, renewal, watch: Mutex::default() }),
        })
    }

    /// Rejects a login without all rights of the role, and [watches](Self::watch) the database.
    pub(crate) async fn require(&self, role: Role) -> Result<(), DatabaseError> {
        self.inner.probe(role).await?;
        self.watch(role);
        Ok(())
    }

    /// Probes the database every [`PROBE_INTERVAL`] until all handles are dropped or one handle is
    /// closed. Each probe opens a new connection, and so notices a changed password, certificate or
    /// right while old connections still work. Of several roles the probes use the role with the
    /// most rights.
    pub(crate) fn watch(&self, role: Role) {
        let before = {
            let mut watch = self.inner.watch();
            let before = watch.role;
            watch.role = before.max(Some(role));
            before
        };
        if before.is_none() {
            tokio::spawn(keep_watch(Arc::downgrade(&self.inner)));
        }
    }

    /// Returns the complaint of the latest probe: the cause of a refused connection, or the missing
    /// rights.
    pub(crate) fn complaint(&self) -> Option<String> {
        self.inner.watch().complaint.clone()
    }

    /// Returns the missing rights of a role as SQL lines, for the login of this database's URL or
    /// for another login.
    pub async fn missing_rights(
        &self,
        role: Role,
        login: Option<&str>,
    ) -> Result<Vec<String>, sqlx::Error> {
        let mut connection = self.pool().acquire().await?;
        rights::missing(&mut connection, role, login).await
    }

    /// Returns the TLS version and the certificate of the server. Returns `None` when the server
    /// offers no TLS or is reached over a Unix socket.
    pub async fn server_tls(&self) -> Result<Option<ServerTls>, sqlx::Error> {
        let options = self.pool().connect_options();
        if is_socket(&options) {
            return Ok(None);
        }
        let (host, port) = (options.get_host().to_owned(), options.get_port());
        let looked = tokio::task::spawn_blocking(move || certificate::look(&host, port)).await;
        looked.map_err(|_| sqlx::Error::WorkerCrashed)?.map_err(sqlx::Error::Io)
    }

    pub(crate) async fn close(self) {
        self.inner.pool.close().await;
    }
}

impl Inner {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects like a start does, reads the secret again, and checks the rights of the role.
    async fn probe(&self, role: Role) -> Result<(), DatabaseError> {
        let shown = &self.url.shown;
        let (options, _) = options(&self.url)?;
        let failed = |error| opening_failed(shown, error);
        let probing = async {
            let mut connection = PgConnection::connect_with(&options).await.map_err(failed)?;
            server::refuse_shared_sessions(shown, &options, &mut connection).await?;
            if role >= Role::Worker {
                server::refuse_read_only(shown, &mut connection).await?;
            }
            let missing = rights::missing(&mut connection, role, None).await.map_err(failed)?;
            connection.close().await.map_err(failed)?;
            Ok(missing)
        };
        let missing = within(shown, probing).await?;
        // The pool makes new connections with the secret and the certificates of this successful
        // probe.
        self.pool.set_connect_options(options);
        if missing.is_empty() {
            return Ok(());
        }
        let more = missing.len().saturating_sub(COMPLAINT_RIGHTS_MAX);
        let mut lines = missing[..missing.len() - more].join(" ");
        if more > 0 {
            lines += &format!(" and {more} more");
        }
        let role = role.name();
        Err(DatabaseError::refused(
            format!("{shown}: the login lacks rights of the role {role}"),
            format!("run {lines}"),
        ))
    }

    /// Stores the result of a probe and logs a complaint, at most once per [`COMPLAINT_INTERVAL`]
    /// unless the complaint changed.
    fn found(&self, probed: Result<(), DatabaseError>, now: Instant) {
        let mut watch = self.watch();
        match probed {
            Ok(()) => {
                if watch.complaint.take().is_some() {
                    self.renewal.renew();
                    tracing::info!(database = self.url.shown, "the database refuses no more");
                }
                watch.complained_at = None;
            }
            // Users of the pool notice an unavailable database and wait. An earlier refusal may
            // still hold.
            Err(DatabaseError::Unavailable { .. }) => {}
            Err(refused) => {
                let refused = refused.to_string();
                let is_due = watch
                    .complained_at
                    .is_none_or(|at| now.saturating_duration_since(at) >= COMPLAINT_INTERVAL);
                if is_due || watch.complaint.as_ref() != Some(&refused) {
                    tracing::error!("the database refuses: {refused}");
                    watch.complained_at = Some(now);
                }
                watch.complaint = Some(refused);
            }
        }
    }
}

async fn keep_watch(database: Weak<Inner>) {
    let clock = SystemClock;
    loop {
        clock.sleep(PROBE_INTERVAL).await;
        let Some(database) = database.upgrade().filter(|inner| !inner.pool.is_closed()) else {
            return;
        };
        let role = database.watch().role;
        if let Some(role) = role {
            database.found(database.probe(role).await, clock.instant());
        }
    }
}

/// Bounds the duration of a start or a probe: a server without an answer is unavailable.
async fn within<T>(
    shown: &str,
    opening: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    timeout(ACQUIRE_TIMEOUT, opening).await.unwrap_or_else(|_| {
        let silent = format!(
            "no answer within {ACQUIRE_TIMEOUT:?}; see that a PostgreSQL server listens at this host and \
             port"
        );
        let cause = std::io::Error::new(std::io::ErrorKind::TimedOut, silent).into();
        Err(DatabaseError::Unavailable { url: shown.to_owned(), cause })
    })
}

/// Returns the connection options with the current secret, and the warnings to log.
fn options(url: &PostgresUrl) -> Result<(PgConnectOptions, Vec<String>), DatabaseError> {
    let shown = &url.shown;
    let parsed = PgConnectOptions::from_str(&url.driver).map_err(|error| {
        DatabaseError::refused(
            format!("{shown} is not a database URL: {error}"),
            "give postgres://USER@HOST:PORT/DATABASE?password=@FILE, with special characters as %XX",
        )
    })?;
    // Poolers refuse this startup parameter. Since PostgreSQL 12 the default shows every digit.
    let mut options = parsed.extra_float_digits(None);
    let mut warnings = Vec::new();
    if let Some(source) = &url.password {
        let secret = source.read(url.allowed.readable_secret);
        let refused = |error| DatabaseError::refused(format!("{shown}: no password"), error);
        options = options.password(secret.map_err(|error| refused(error.to_string()))?.expose());
        if source.is_exposed_file() {
            warnings.push(
                "allow_unsafe=readable_secret: other users can read or write the password's file"
                    .to_owned(),
            );
        }
    }
    if url.has_literal_password {
        warnings.push(
            "the password stands in the URL, where process lists and shell histories may have it; \
             give ?password=@FILE or ?password=$NAME"
                .to_owned(),
        );
    }
    for (name, file) in &url.files {
        check_file(shown, name, file)?;
    }
    let is_local = is_socket(&options) || transport::is_loopback(options.get_host());
    let has_authorities = url.files.iter().any(|(name, _)| *name == "sslrootcert")
        || std::env::var_os("PGSSLROOTCERT").is_some();
    let asked = url.ssl_mode.or_else(|| of_environment(options.get_ssl_mode()));
    let mode = match transport::decide(asked, is_local, has_authorities, url.allowed) {
        // PostgreSQL has no TLS on a Unix socket, and its own clients request none.
        _ if is_socket(&options) => PgSslMode::Disable,
        Decided::Safe(mode) => mode.into(),
        Decided::Unsafe(mode, warning) => {
            warnings.push(warning.to_owned());
            mode.into()
        }
        Decided::Refused(why, remedy) => {
            return Err(DatabaseError::refused(format!("{shown} {why}"), remedy));
        }
    };
    Ok((options.ssl_mode(mode), warnings))
}

fn is_socket(options: &PgConnectOptions) -> bool {
    options.get_socket().is_some() || options.get_host().starts_with('/')
}

/// Rejects an unreadable file, which the driver treats like an unreachable server, and a file without
/// a certificate or key, whose content the driver ignores.
fn check_file(url: &str, name: &str, file: &Path) -> Result<(), DatabaseError> {
    let shown = shown_path(file);
    let content = std::fs::read(file).map_err(|error| {
        DatabaseError::refused(
            format!("{url}: the file {shown} of {name} cannot be read: {error}"),
            "name a file that this user can read",
        )
    })?;
    let (mark, what) = match name {
        "sslkey" => ("PRIVATE KEY-----", "private key"),
        _ => ("CERTIFICATE-----", "certificate"),
    };
    if String::from_utf8_lossy(&content).contains(mark) {
        return Ok(());
    }
    Err(DatabaseError::refused(
        format!("{url}: the file {shown} of {name} holds no {what}"),
        "name a PEM file",
    ))
}

/// Maps PGSSLMODE; the driver reports `Prefer` when the variable is unset.
fn of_environment(mode: PgSslMode) -> Option<SslMode> {
    match mode {
        PgSslMode::Disable => Some(SslMode::Disable),
        PgSslMode::Allow | PgSslMode::Prefer => None,
        PgSslMode::Require => Some(SslMode::Require),
        PgSslMode::VerifyCa => Some(SslMode::VerifyCa),
        PgSslMode::VerifyFull => Some(SslMode::VerifyFull),
    }
}

/// Connects once, so that what is wrong shows as itself and not as a pool's timeout, and sees to
/// the tables. Returns the identity of the database.
async fn prepare(
    shown: &str,
    options: &PgConnectOptions,
    mode: Mode,
) -> Result<String, DatabaseError> {
    let failed = |error| opening_failed(shown, error);
    let mut connection = PgConnection::connect_with(options).await.map_err(failed)?;
    let identity = server::check(shown, options, &mut connection).await?;
    settle(&mut connection).await.map_err(failed)?;
    match mode {
        Mode::Check => match standing(shown, &mut connection).await? {
            Standing::Current => {}
            Standing::Behind { found, known } => {
                return Err(DatabaseError::NotMigrated { url: shown.to_owned(), found, known });
            }
        },
        Mode::Migrate => {
            server::refuse_read_only(shown, &mut connection).await?;
            migrate(shown, &mut connection).await?;
        }
    }
    connection.close().await.map_err(failed)?;
    Ok(identity)
}

/// Sets the limits of a new session, and the isolation level for which all statements are written. As
/// startup parameters a pooler would refuse them.
async fn settle(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let settings = format!(
        "SET statement_timeout = {}; SET lock_timeout = {}; \
         SET idle_in_transaction_session_timeout = {}; \
         SET default_transaction_isolation = 'read committed'",
        STATEMENT_TIMEOUT.as_millis(),
        LOCK_TIMEOUT.as_millis(),
        IDLE_IN_TRANSACTION_TIMEOUT.as_millis(),
    );
    sqlx::raw_sql(AssertSqlSafe(settings)).execute(connection).await.map(drop)
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
    if let Some(line) = rights::hidden_tables(connection).await.map_err(failed)? {
        let what = format!("{shown}: the login has no right to see whether the tables are current");
        return Err(DatabaseError::refused(what, format!("run {line}")));
    }
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
pub(crate) fn opening_failed(shown: &str, error: sqlx::Error) -> DatabaseError {
    if let Some(refusal) = refusal(&error) {
        return DatabaseError::refused(format!("{shown}: {}", refusal.what), refusal.remedy);
    }
    let refused = |remedy: &str| DatabaseError::refused(format!("{shown}: {error}"), remedy);
    let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    match code.as_ref() {
        "25006" => refused("name the primary in the URL: this server is read-only"),
        _ if is_transient(&error) => {
            DatabaseError::Unavailable { url: shown.to_owned(), cause: error }
        }
        _ => refused("check the URL and the server's log"),
    }
}

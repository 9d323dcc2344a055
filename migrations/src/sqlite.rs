//! A SQLite file: readers, and one writer a file and process.

use std::collections::HashMap;
use std::future::ready;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use kafold_core::projecting;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
    SqliteTransactionManager,
};
use sqlx::{Connection, Executor, SqlSafeStr, Sqlite, SqliteConnection, SqlitePool};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use crate::audit;
use crate::database::Mode;
use crate::error::{DatabaseError, SqliteCode, is_transient};
use crate::schema::{self, Applied, Standing};

/// Most connections of one process that read one file.
pub const READERS_MAX: u32 = 4;
/// How long a statement waits for another process that holds the file; then it fails as transient.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages of the WAL from which on a commit moves them into the file: 16 MiB. Pages that many commits change are
/// then moved once for all of them; SQLite's own default is 1000 pages.
const WAL_PAGES: &str = "4000";
/// Memory for pages of the file that the writing connection keeps, in negative KiB: 16 MiB. SQLite's own
/// default is 2 MiB.
const WRITER_CACHE: &str = "-16384";
/// How long a write waits for its turn within this process; then it fails as transient.
pub const WRITE_TURN_TIMEOUT: Duration = Duration::from_secs(10);

/// A SQLite file whose tables are current. Cheap to clone.
///
/// All handles on one file in a process share its connections: several readers and one writer, whose
/// turns are given in the order of asking, so that a busy projection does not starve the log. WAL,
/// `synchronous=FULL`: what is committed survives a power loss.
#[derive(Debug, Clone)]
pub struct SqliteDatabase {
    file: Arc<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    url: String,
    identity: String,
    readers: SqlitePool,
    writer: Arc<Writer>,
    changes: watch::Sender<u64>,
}

impl SqliteDatabase {
    /// Begins a transaction that may write, when those that asked before are through.
    pub async fn write(&self) -> Result<WriteTransaction, sqlx::Error> {
        let mut turn = self.turn().await?;
        // Deferred, it would fail at once when it turns to writing beside another process.
        let begin = "BEGIN IMMEDIATE".into_sql_str();
        SqliteTransactionManager::begin(&mut turn, Some(begin)).await?;
        Ok(WriteTransaction(turn))
    }

    /// The connection that writes, in no transaction, when those that asked before are through: for
    /// statements that begin and end one themselves.
    pub async fn turn(&self) -> Result<WriteTurn, sqlx::Error> {
        self.file.writer.turn().await
    }

    /// Connections that read; they refuse to write. One transaction on one connection sees one state
    /// of the file.
    pub fn readers(&self) -> &SqlitePool {
        &self.file.readers
    }

    /// The file, as an absolute path without links.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The URL.
    pub fn url(&self) -> &str {
        &self.file.url
    }

    /// The file's own random number and its inode: a copy of the file is another database.
    pub(crate) fn identity(&self) -> &str {
        &self.file.identity
    }

    /// Tells all handles on this file in this process that something was committed.
    pub fn notify_changed(&self) {
        self.file.changes.send_modify(|count| *count += 1);
    }

    /// Counts the calls of [`SqliteDatabase::notify_changed`]: await its next value to be woken.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.file.changes.subscribe()
    }

    pub(crate) async fn open_file(file: &Path, mode: Mode) -> Result<Self, DatabaseError> {
        let url = format!("sqlite://{}", file.display());
        check_place(&url, file, mode)?;
        let mut identity = prepare(&url, file, mode).await?;
        let unavailable =
            |error| DatabaseError::Unavailable { url: url.clone(), cause: sqlx::Error::Io(error) };
        let path = file.canonicalize().map_err(unavailable)?;
        #[cfg(unix)]
        {
            let data = path.metadata().map_err(unavailable)?;
            identity += &format!(".{}", std::os::unix::fs::MetadataExt::ino(&data));
        }
        Ok(Self { file: shared(path, url, identity) })
    }

    /// Leaves the file whole without SQLite's log beside it, and closes the connections when this is
    /// the last handle on the file in this process.
    pub(crate) async fn close(self) {
        let (writer, url) = (self.file.writer.clone(), self.file.url.clone());
        // Of handles that are closed at once exactly one is the last.
        if let Some(file) = Arc::into_inner(self.file) {
            // SQLite moves its log into the file when the last connection closes, but not when the
            // last two close at once, as readers may: the one writer goes last.
            file.readers.close().await;
            file.writer.close().await;
            return;
        }
        let moved = async {
            let mut turn = writer.turn().await?;
            turn.execute("PRAGMA wal_checkpoint(PASSIVE)").await?;
            turn.end();
            Ok(())
        };
        match moved.await {
            // Closed by the last handle meanwhile.
            Ok(()) | Err(sqlx::Error::PoolClosed) => {}
            Err(error) => {
                tracing::warn!(%error, database = url, "the newest commits are in its -wal still: copy both");
            }
        }
    }
}

/// A transaction that may write, begun with `BEGIN IMMEDIATE`: it is the only one in the file.
/// Commit it; dropped, it rolls back.
#[derive(Debug)]
pub struct WriteTransaction(WriteTurn);

impl WriteTransaction {
    /// Makes it last. After an error nobody knows whether it does.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        let Self(mut turn) = self;
        SqliteTransactionManager::commit(&mut turn).await?;
        turn.end();
        Ok(())
    }

    /// Ends it with nothing changed.
    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        let Self(mut turn) = self;
        SqliteTransactionManager::rollback(&mut turn).await?;
        turn.end();
        Ok(())
    }
}

impl Deref for WriteTransaction {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.0
    }
}

impl DerefMut for WriteTransaction {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.0
    }
}

/// The connection that writes, and whose turn it is.
#[derive(Debug)]
struct Writer {
    /// Has one connection.
    pool: SqlitePool,
    turns: Arc<Semaphore>,
    /// It, between two turns: the pool would have a task of its own try it each time.
    kept: Mutex<Option<PoolConnection<Sqlite>>>,
    /// The projection that had the last turn, for messages.
    last: Mutex<Option<Arc<str>>>,
}

/// Whoever has it has the connection that writes. [End](WriteTurn::end) it; dropped, it closes the
/// connection, which rolls back.
#[derive(Debug)]
pub struct WriteTurn {
    connection: PoolConnection<Sqlite>,
    writer: Arc<Writer>,
    permit: OwnedSemaphorePermit,
}

impl Writer {
    fn new(pool: SqlitePoolOptions, options: SqliteConnectOptions) -> Arc<Self> {
        // What comes back to the pool may be in a transaction, of which the driver may not know, or
        // which SQLite itself has ended, as it does when the disk is full: none is used again.
        let pool = pool.max_connections(1).after_release(|_, _| Box::pin(ready(Ok(false))));
        Arc::new(Self {
            pool: pool.connect_lazy_with(options),
            turns: Arc::new(Semaphore::new(1)),
            kept: Mutex::default(),
            last: Mutex::default(),
        })
    }

    /// In the order of asking.
    async fn turn(self: &Arc<Self>) -> Result<WriteTurn, sqlx::Error> {
        let turn = async {
            let permit = Arc::clone(&self.turns).acquire_owned().await;
            let permit = permit.map_err(|_| sqlx::Error::PoolClosed)?;
            let kept = self.kept().take();
            let connection = match kept {
                Some(connection) => connection,
                // One that was dropped may still be closing.
                None => self.pool.acquire().await?,
            };
            *self.last() = projecting::current();
            Ok(WriteTurn { connection, writer: Arc::clone(self), permit })
        };
        timeout(WRITE_TURN_TIMEOUT, turn).await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    fn last(&self) -> MutexGuard<'_, Option<Arc<str>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error of a wait for a turn, with the name of the projection that still has its own.
    fn timed_out(&self) -> sqlx::Error {
        match &*self.last() {
            Some(projection) => sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!(
                    "projection {projection} has kept the file's only writer for {WRITE_TURN_TIMEOUT:?}"
                ),
            )),
            None => sqlx::Error::PoolTimedOut,
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<PoolConnection<Sqlite>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Behind those that have asked before.
    async fn close(self: &Arc<Self>) {
        let last = self.turn().await;
        self.turns.close();
        // One whose turn goes on for too long sees that it is closed, and keeps nothing.
        drop(self.kept().take());
        if let Ok(WriteTurn { connection, .. }) = last
            && let Err(error) = connection.close().await
        {
            tracing::debug!(%error, "closing the connection that writes");
        }
        self.pool.close().await;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Given back to the pool, it would need a runtime, which may be gone.
        drop(self.kept().take().map(PoolConnection::leak));
    }
}

impl WriteTurn {
    /// Keeps the connection, which must be in no transaction, for the next one.
    pub fn end(self) {
        let Self { connection, writer, permit } = self;
        let mut kept = writer.kept();
        if !writer.turns.is_closed() {
            *kept = Some(connection);
        }
        drop(kept);
        drop(permit);
    }
}

impl Deref for WriteTurn {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for WriteTurn {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

/// The connections to a file, shared by all its handles.
fn shared(path: PathBuf, url: String, identity: String) -> Arc<OpenFile> {
    static OPEN: LazyLock<Mutex<HashMap<PathBuf, Weak<OpenFile>>>> = LazyLock::new(Mutex::default);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|_, file| file.strong_count() > 0);
    if let Some(file) = open.get(&path).and_then(Weak::upgrade) {
        return file;
    }
    warn_if_exposed(&path, &url);
    let file = Arc::new(OpenFile::new(path.clone(), url, identity));
    open.insert(path, Arc::downgrade(&file));
    file
}

/// Creates a new file with access for the owner alone. SQLite gives the `-wal` and `-shm` files the
/// same mode.
///
/// An error is ignored: SQLite opens the file next and reports the error itself.
fn create_private(file: &Path) {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    drop(options.open(file));
}

/// Warns of a database file open to other users, such as a file of an earlier version: events hold
/// personal data.
fn warn_if_exposed(path: &Path, url: &str) {
    #[cfg(unix)]
    if let Ok(data) = path.metadata()
        && std::os::unix::fs::PermissionsExt::mode(&data.permissions()) & 0o007 != 0
    {
        let shown = path.display();
        tracing::warn!(
            database = url,
            "other users can read or write {shown}; run chmod o-rwx {shown}*"
        );
    }
}

impl OpenFile {
    fn new(path: PathBuf, url: String, identity: String) -> Self {
        let options = connect_options(&path);
        // Connections are kept for good: opening one costs more than all it holds.
        let pool = || {
            SqlitePoolOptions::new()
                .idle_timeout(None)
                .max_lifetime(None)
                .test_before_acquire(false)
                .acquire_timeout(WRITE_TURN_TIMEOUT)
        };
        let writing = options
            .clone()
            .journal_mode(SqliteJournalMode::Wal)
            .pragma("wal_autocheckpoint", WAL_PAGES)
            .pragma("cache_size", WRITER_CACHE);
        let writer = Writer::new(pool(), writing);
        let readers = pool()
            .max_connections(READERS_MAX)
            .connect_lazy_with(options.pragma("query_only", "ON"));
        Self { path, url, identity, readers, writer, changes: watch::Sender::new(0) }
    }
}

fn connect_options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
}

/// Refuses what SQLite would only call "unable to open database file".
fn check_place(url: &str, file: &Path, mode: Mode) -> Result<(), DatabaseError> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(DatabaseError::refused(
            format!("{url}: {} is not a folder", folder.display()),
            "create it (folders are never created here), or name another file",
        ));
    }
    if file.is_dir() {
        return Err(DatabaseError::refused(
            format!("{url}: {} is a folder", file.display()),
            "name a file in it",
        ));
    }
    if mode == Mode::Check && !file.exists() {
        return Err(DatabaseError::refused(
            format!("{url}: there is no file {}", file.display()),
            "start the service once, or run its `migrate`, or name the file that it uses",
        ));
    }
    Ok(())
}

/// Sees to the tables over a connection of its own. Returns the random number of the file.
async fn prepare(url: &str, file: &Path, mode: Mode) -> Result<String, DatabaseError> {
    let failed = |error| opening_failed(url, file, error);
    if mode == Mode::Migrate {
        create_private(file);
    }
    let options = connect_options(file).create_if_missing(mode == Mode::Migrate);
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(failed)?;
    let encoding: String =
        sqlx::query_scalar("PRAGMA encoding").fetch_one(&mut connection).await.map_err(failed)?;
    if encoding != "UTF-8" {
        return Err(DatabaseError::refused(
            format!("{url} is a SQLite database in {encoding}, where text sorts in another order"),
            "name another file; it is created when it does not exist",
        ));
    }
    // A look before anything is written, so that a file of someone else's stays untouched.
    match (standing(url, file, &mut connection).await?, mode) {
        (Standing::Current, _) => {}
        (Standing::Behind { found, known }, Mode::Check) => {
            return Err(DatabaseError::NotMigrated { url: url.to_owned(), found, known });
        }
        (Standing::Behind { .. }, Mode::Migrate) => migrate(url, file, &mut connection).await?,
    }
    let number = sqlx::query_scalar("SELECT log_id FROM kafold_log");
    // The stores report a lost row by name.
    let number: Option<String> = number.fetch_optional(&mut connection).await.map_err(failed)?;
    connection.close().await.map_err(failed)?;
    Ok(number.unwrap_or_default())
}

async fn migrate(
    url: &str,
    file: &Path,
    connection: &mut SqliteConnection,
) -> Result<(), DatabaseError> {
    let failed = |error| opening_failed(url, file, error);
    sqlx::query("PRAGMA journal_mode = WAL").execute(&mut *connection).await.map_err(failed)?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    // Again, now that nobody else can be doing the same.
    if let Standing::Behind { found, known } = standing(url, file, &mut transaction).await? {
        tracing::info!(database = url, found, known, "making the tables current");
        // `Migrator::run` is the same, but its future cannot be sent to another thread.
        let made = schema::sqlite().run_direct(None, &mut *transaction, false).await;
        made.map_err(|error| DatabaseError::of_migration(error, failed, url))?;
        audit::chain_sqlite(&mut transaction).await.map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

async fn standing(
    url: &str,
    file: &Path,
    connection: &mut SqliteConnection,
) -> Result<Standing, DatabaseError> {
    let failed = |error| opening_failed(url, file, error);
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
            .fetch_all(&mut *connection)
            .await
            .map_err(failed)?;
    let ours = tables.iter().any(|name| name == schema::TABLE);
    if let (false, Some(other)) = (ours, tables.first()) {
        return Err(DatabaseError::refused(
            format!(
                "{url} is a SQLite database of something else: it has a table {other:?} and none of kafold's"
            ),
            "name another file; it is created when it does not exist",
        ));
    }
    let applied: Vec<Applied> = match ours {
        true => sqlx::query_as("SELECT version, checksum FROM kafold_migrations WHERE success")
            .fetch_all(connection)
            .await
            .map_err(failed)?,
        false => Vec::new(),
    };
    schema::standing(url, &schema::sqlite(), &applied)
}

/// Tells a file that is busy from one that cannot be used.
fn opening_failed(url: &str, file: &Path, error: sqlx::Error) -> DatabaseError {
    let refused = |remedy: &str| DatabaseError::refused(format!("{url}: {error}"), remedy);
    match SqliteCode::of_error(&error) {
        Some(SqliteCode::NOTADB) => refused("name another file: this one is not a SQLite database"),
        Some(SqliteCode::CORRUPT) => refused("restore the file from a copy: it is damaged"),
        Some(SqliteCode::CANTOPEN | SqliteCode::READONLY | SqliteCode::PERM) => refused(&format!(
            "make {} and its folder writable for this user, or name another file",
            file.display()
        )),
        _ if is_transient(&error) => {
            DatabaseError::Unavailable { url: url.to_owned(), cause: error }
        }
        _ => refused("check the file"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_that_takes_too_long_names_the_projection_that_writes() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let opened = SqliteDatabase::open_file(&folder.path().join("a.db"), Mode::Migrate).await;
        let database = opened.expect("a new file");
        let writer = &database.file.writer;
        let sales = Arc::from("sales");
        let turn = projecting::on_behalf_of(&sales, database.write()).await.expect("a turn");
        let waited = writer.timed_out();
        assert!(is_transient(&waited), "{waited}");
        assert!(waited.to_string().contains("projection sales has kept"), "{waited}");
        turn.rollback().await.expect("rolls back");
        let turn = database.write().await.expect("a turn");
        assert!(matches!(writer.timed_out(), sqlx::Error::PoolTimedOut));
        turn.rollback().await.expect("rolls back");
    }
}

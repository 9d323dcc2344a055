//! What a SQLite database promises: tables made once, one writer a file, errors that name the remedy.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kafold_migrations::sqlx::{self, Connection};
use kafold_migrations::{Database, DatabaseError, Mode, SqliteDatabase, is_transient};
use tempfile::TempDir;

fn folder() -> TempDir {
    TempDir::new().expect("a temporary folder")
}

fn url(file: &Path) -> String {
    format!("sqlite://{}", file.display())
}

async fn open(file: &Path) -> SqliteDatabase {
    match Database::open(&url(file), Mode::Migrate).await.expect("opens") {
        Database::Sqlite(database) => database,
        Database::Postgres(_) => unreachable!("a SQLite URL"),
    }
}

async fn refusal(file: &Path, mode: Mode) -> String {
    let error = Database::open(&url(file), mode).await.expect_err("refused");
    assert!(matches!(error, DatabaseError::Refused { .. }), "{error:?}");
    error.to_string()
}

async fn log_id(database: &SqliteDatabase) -> String {
    let id = sqlx::query_scalar("SELECT log_id FROM kafold_log");
    id.fetch_one(database.readers()).await.expect("one log")
}

#[tokio::test]
async fn migrating_twice_changes_nothing() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let first = log_id(&open(&file).await).await;
    assert_eq!(first.len(), 32);
    assert_eq!(log_id(&open(&file).await).await, first);
    Database::open(&url(&file), Mode::Check).await.expect("current");
}

#[tokio::test]
async fn every_table_of_the_design_is_there() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'kafold%' ORDER BY name",
    )
    .fetch_all(database.readers())
    .await
    .expect("reads");
    let expected = [
        "audit",
        "audit_head",
        "checkpoint",
        "event",
        "late_event",
        "log",
        "migrations",
        "node",
        "parked_event",
        "partition",
        "partition_digest",
        "projection",
        "projection_category",
        "skipped_event",
        "snapshot",
        "stream",
        "unlocked",
    ];
    assert_eq!(names, expected.map(|name| format!("kafold_{name}")));
}

/// Two processes that make the same file at once: this test runs itself as those processes.
#[tokio::test]
async fn processes_that_migrate_at_once_make_one_set_of_tables() {
    if let Ok(file) = std::env::var("KAFOLD_TEST_MIGRATE_FILE") {
        // A process that comes between another's first two steps may be told to try again.
        while let Err(error) = Database::open(&url(Path::new(&file)), Mode::Migrate).await {
            assert!(matches!(error, DatabaseError::Unavailable { .. }), "{error}");
        }
        return;
    }
    let folder = folder();
    let file = folder.path().join("a.db");
    let program = std::env::current_exe().expect("this program");
    let start = || {
        Command::new(&program)
            .args(["--exact", "processes_that_migrate_at_once_make_one_set_of_tables"])
            .env("KAFOLD_TEST_MIGRATE_FILE", &file)
            // Its own summary is not one of this run.
            .stdout(Stdio::null())
            .spawn()
            .expect("starts")
    };
    let mut children: Vec<_> = (0..4).map(|_| start()).collect();
    for child in &mut children {
        assert!(child.wait().expect("ends").success());
    }
    let database = open(&file).await;
    let applied: i64 = sqlx::query_scalar("SELECT count(*) FROM kafold_migrations")
        .fetch_one(database.readers())
        .await
        .expect("reads");
    assert_eq!(applied, 22);
}

#[tokio::test]
async fn a_file_in_another_encoding_is_refused() {
    let folder = folder();
    let file = folder.path().join("utf16.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.expect("connects");
    for sql in ["PRAGMA encoding = 'UTF-16le'", "CREATE TABLE t (a TEXT)", "DROP TABLE t"] {
        sqlx::query(sql).execute(&mut connection).await.expect("executes");
    }
    connection.close().await.expect("closes");
    let url = format!("sqlite://{}", file.display());
    let error = Database::open(&url, Mode::Migrate).await.expect_err("refused");
    assert!(error.to_string().contains("in UTF-16le, where text sorts"), "{error}");
}

#[tokio::test]
async fn a_newer_schema_is_refused_by_name() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let database = open(&file).await;
    let mut write = database.write().await.expect("a turn");
    sqlx::query("INSERT INTO kafold_migrations VALUES (9999, 'later', 0, TRUE, x'00', 0)")
        .execute(&mut *write)
        .await
        .expect("writes");
    write.commit().await.expect("commits");
    for mode in [Mode::Check, Mode::Migrate] {
        let error = Database::open(&url(&file), mode).await.expect_err("newer");
        assert!(
            matches!(error, DatabaseError::NewerSchema { found: 9999, known: 22, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("a.db"), "{error}");
    }
}

#[tokio::test]
async fn a_changed_migration_is_refused() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let mut write = open(&file).await.write().await.expect("a turn");
    sqlx::query("UPDATE kafold_migrations SET checksum = x'00' WHERE version = 3")
        .execute(&mut *write)
        .await
        .expect("writes");
    write.commit().await.expect("commits");
    assert!(refusal(&file, Mode::Migrate).await.contains("migration 3"));
}

#[tokio::test]
async fn checking_creates_nothing() {
    let folder = folder();
    let file = folder.path().join("a.db");
    assert!(refusal(&file, Mode::Check).await.contains("there is no file"));
    assert!(!file.exists());
    std::fs::write(&file, "").expect("an empty file");
    let error = Database::open(&url(&file), Mode::Check).await.expect_err("no tables");
    assert!(matches!(error, DatabaseError::NotMigrated { found: 0, known: 22, .. }), "{error}");
    assert_eq!(std::fs::metadata(&file).expect("there").len(), 0);
}

#[tokio::test]
async fn places_where_no_database_can_be_are_refused_with_the_remedy() {
    let folder = folder();
    let missing = folder.path().join("missing").join("a.db");
    let refused = refusal(&missing, Mode::Migrate).await;
    assert!(refused.contains("folders are never created"), "{refused}");
    assert!(!folder.path().join("missing").exists());

    assert!(refusal(folder.path(), Mode::Migrate).await.contains("is a folder"));

    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "these are notes, and more than a header's worth of them".repeat(20))
        .expect("writes");
    assert!(refusal(&text, Mode::Migrate).await.contains("not a SQLite database"));
    assert!(refusal(&text.join("a.db"), Mode::Migrate).await.contains("is not a folder"));
}

#[tokio::test]
async fn a_database_of_something_else_is_refused_and_left_as_it_is() {
    let folder = folder();
    let file = folder.path().join("bookmarks.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    let mut other = sqlx::SqliteConnection::connect_with(&options).await.expect("connects");
    sqlx::query("CREATE TABLE bookmark (url TEXT)").execute(&mut other).await.expect("creates");
    other.close().await.expect("closes");
    let before = std::fs::read(&file).expect("reads");
    let refused = refusal(&file, Mode::Migrate).await;
    assert!(refused.contains("bookmarks.db") && refused.contains("\"bookmark\""), "{refused}");
    assert_eq!(std::fs::read(&file).expect("reads"), before);
}

#[tokio::test]
async fn handles_on_one_file_take_turns_in_the_order_of_asking() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let (one, two) = (open(&file).await, open(&folder.path().join(".").join("a.db")).await);
    let turn = one.write().await.expect("a turn");
    let order = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..8 {
        let (database, order) = (if number % 2 == 0 { &one } else { &two }.clone(), order.clone());
        waiting.spawn(async move {
            let turn = database.write().await.expect("a turn");
            order.lock().expect("not poisoned").push(number);
            turn.commit().await.expect("commits");
        });
        // On one thread, a spawned task asks for its turn as soon as this one yields.
        tokio::task::yield_now().await;
    }
    assert_eq!(*order.lock().expect("not poisoned"), [0; 0], "nobody before the first ends");
    drop(turn);
    while waiting.join_next().await.is_some() {}
    assert_eq!(*order.lock().expect("not poisoned"), [0, 1, 2, 3, 4, 5, 6, 7]);
}

/// Writes something that can be counted.
const ACT: &str = "INSERT INTO kafold_audit (at, actor, action) VALUES (1, 'a', 'pause')";

async fn acts(database: &SqliteDatabase) -> i64 {
    let acts = sqlx::query_scalar("SELECT count(*) FROM kafold_audit");
    acts.fetch_one(database.readers()).await.expect("reads")
}

#[tokio::test]
async fn a_dropped_write_leaves_nothing_and_the_next_one_works() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    for _ in 0..3 {
        let mut write = database.write().await.expect("a turn");
        sqlx::query(ACT).execute(&mut *write).await.expect("writes");
        drop(write);
    }
    // Ended behind the driver's back, as SQLite does itself when the disk is full.
    let mut write = database.write().await.expect("a turn");
    sqlx::query("ROLLBACK").execute(&mut *write).await.expect("ends");
    drop(write);
    // Begun behind its back.
    let mut turn = database.turn().await.expect("a turn");
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *turn).await.expect("begins");
    sqlx::query(ACT).execute(&mut *turn).await.expect("writes");
    drop(turn);
    let mut write = database.write().await.expect("a turn");
    sqlx::query(ACT).execute(&mut *write).await.expect("writes");
    write.commit().await.expect("commits");
    assert_eq!(acts(&database).await, 1);
}

#[tokio::test]
async fn a_transaction_within_a_write_is_a_savepoint() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    let mut write = database.write().await.expect("a turn");
    sqlx::query(ACT).execute(&mut *write).await.expect("writes");
    let mut inner = write.begin().await.expect("a savepoint");
    sqlx::query(ACT).execute(&mut *inner).await.expect("writes");
    inner.rollback().await.expect("back to it");
    write.commit().await.expect("commits");
    assert_eq!(acts(&database).await, 1);
}

#[tokio::test]
async fn a_write_that_is_cancelled_while_it_waits_blocks_nobody() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    let turn = database.write().await.expect("a turn");
    let waited = tokio::time::timeout(Duration::from_millis(20), database.write()).await;
    assert!(waited.is_err(), "the turn is taken");
    drop(turn);
    database.write().await.expect("a turn").commit().await.expect("commits");
}

/// A program's last handle may go with its statics, or behind its runtime.
#[test]
fn the_last_handle_is_dropped_without_a_runtime() {
    let folder = folder();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let database = runtime.block_on(async {
        let database = open(&folder.path().join("a.db")).await;
        database.write().await.expect("a turn").commit().await.expect("commits");
        database
    });
    drop(runtime);
    drop(database);
}

#[tokio::test]
async fn readers_cannot_write() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    let error = sqlx::query("DELETE FROM kafold_audit").execute(database.readers()).await;
    let error = error.expect_err("read only");
    assert!(error.to_string().contains("readonly"), "{error}");
}

#[tokio::test]
async fn a_lock_of_another_process_is_transient_and_a_bad_statement_is_not() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let database = open(&file).await;
    let turn = database.write().await.expect("a turn");
    // A connection of no handle stands for another process.
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(&file)
        .busy_timeout(Duration::from_millis(10));
    let mut other = sqlx::SqliteConnection::connect_with(&options).await.expect("connects");
    let busy = sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.expect_err("locked");
    assert!(is_transient(&busy), "{busy}");
    let bad = sqlx::query("SELECT nothing FROM nowhere").execute(&mut other).await;
    assert!(!is_transient(&bad.expect_err("no such table")));
    drop(turn);
}

#[tokio::test]
async fn a_change_wakes_every_handle_on_the_file() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let (one, two) = (open(&file).await, open(&file).await);
    let mut changes = two.changes();
    one.notify_changed();
    changes.changed().await.expect("told");
}

#[tokio::test]
async fn what_is_committed_is_synced() {
    let folder = folder();
    let database = open(&folder.path().join("a.db")).await;
    let mut write = database.write().await.expect("a turn");
    let synchronous: i64 =
        sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *write).await.expect("reads");
    let journal: String =
        sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *write).await.expect("reads");
    assert_eq!((synchronous, journal.as_str()), (2, "wal"), "FULL, in WAL");
}

#[tokio::test]
async fn a_closed_handle_leaves_the_others_open() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let (one, two) = (open(&file).await, open(&file).await);
    let mut write = one.write().await.expect("a turn");
    sqlx::query("UPDATE kafold_log SET log_id = 'b'").execute(&mut *write).await.expect("writes");
    write.commit().await.expect("commits");
    Database::Sqlite(one).close().await;
    let copy = folder.path().join("copy.db");
    std::fs::copy(&file, &copy).expect("copies");
    assert_eq!(log_id(&open(&copy).await).await, "b", "a copy of the file has it");

    two.write().await.expect("a turn").commit().await.expect("commits");
    Database::Sqlite(two).close().await;
    assert!(!folder.path().join("a.db-wal").exists(), "the last one tidies up");
}

/// Whoever copies the file of a stopped service has all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_file_is_whole_without_its_log() {
    let folder = folder();
    for round in 0..100 {
        let file = folder.path().join(format!("{round}.db"));
        let database = open(&file).await;
        let mut write = database.write().await.expect("a turn");
        sqlx::query("UPDATE kafold_log SET log_id = log_id")
            .execute(&mut *write)
            .await
            .expect("writes");
        write.commit().await.expect("commits");
        let mut readers = Vec::new();
        for _ in 0..database.readers().options().get_max_connections() {
            let mut reader = database.readers().acquire().await.expect("a reader");
            sqlx::query("SELECT * FROM kafold_log").fetch_one(&mut *reader).await.expect("reads");
            readers.push(reader);
        }
        // Connections that are on their way back close all at once.
        drop(readers);
        Database::Sqlite(database).close().await;
        assert!(!folder.path().join(format!("{round}.db-wal")).exists(), "round {round}");
    }
}

/// Everything here must be usable from a spawned task.
#[tokio::test]
async fn opening_and_writing_can_be_spawned() {
    let folder = folder();
    let file = folder.path().join("a.db");
    let task = tokio::spawn(async move {
        let database = open(&file).await;
        database.write().await.expect("a turn").rollback().await.expect("rolls back");
    });
    task.await.expect("no panic");
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("private.db");
    let database = open(&file).await;
    let mut writing = database.write().await.expect("its turn");
    let sql = "UPDATE kafold_migrations SET execution_time = 1";
    sqlx::query(sql).execute(&mut *writing).await.expect("writes");
    writing.commit().await.expect("commits");
    for name in ["private.db", "private.db-wal", "private.db-shm"] {
        let data = folder.path().join(name).metadata().expect("it is there");
        assert_eq!(data.permissions().mode() & 0o777, 0o600, "{name}");
    }
}

//! What a PostgreSQL database promises, on a real one: `KAFOLD_TEST_POSTGRES` is its URL.

mod pooler;
mod tls;

use std::path::Path;
use std::process::Command;

use kafold_migrations::sqlx::{self, AssertSqlSafe, Connection, PgConnection};
use kafold_migrations::{Database, DatabaseError, Mode, PostgresDatabase, begin, is_transient};

/// The URL of the server to test on, or nothing when there is none.
fn server(test: &str) -> Option<String> {
    let url = std::env::var("KAFOLD_TEST_POSTGRES").ok();
    let required = std::env::var("KAFOLD_TEST_REQUIRE_ALL").is_ok_and(|value| value == "1");
    assert!(url.is_some() || !required, "{test}: KAFOLD_TEST_POSTGRES is not set");
    if url.is_none() {
        eprintln!("skipped {test}: KAFOLD_TEST_POSTGRES is not set");
    }
    url
}

/// Runs a script of dev/ on the server of this name. Returns the last line of its output.
fn dev(script: &str, name: &str, arguments: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dev").join(script);
    let output = Command::new(path).args(arguments).args(["--name", name]).output();
    let output = output.expect("the script runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "dev/{script} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned()
}

/// A new empty database of this test's own; gone with the server's data, or made anew.
async fn new_database(server: &str, test: &str) -> String {
    let name = format!("migrations_{test}");
    let mut connection = PgConnection::connect(server).await.expect("connects");
    for statement in
        [format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"), format!("CREATE DATABASE {name}")]
    {
        sqlx::query(AssertSqlSafe(statement)).execute(&mut connection).await.expect("executes");
    }
    let (place, _) = server.rsplit_once('/').expect("a URL with a database");
    format!("{place}/{name}")
}

async fn execute(url: &str, statement: &'static str) {
    let mut connection = PgConnection::connect(url).await.expect("connects");
    sqlx::raw_sql(statement).execute(&mut connection).await.expect("executes");
}

async fn open(url: &str) -> PostgresDatabase {
    match Database::open(url, Mode::Migrate).await.expect("opens") {
        Database::Postgres(database) => database,
        Database::Sqlite(_) => unreachable!("a PostgreSQL URL"),
    }
}

async fn refusal(url: &str) -> String {
    let error = Database::open(url, Mode::Migrate).await.expect_err("refused");
    assert!(matches!(error, DatabaseError::Refused { .. }), "{error:?}");
    assert!(!error.to_string().contains("secret"), "{error}");
    error.to_string()
}

#[tokio::test]
async fn migrating_twice_and_at_once_makes_one_set_of_tables() {
    let Some(server) = server("migrating_twice_and_at_once_makes_one_set_of_tables") else {
        return;
    };
    let url = new_database(&server, "at_once").await;
    let (one, two, three) = tokio::join!(open(&url), open(&url), open(&url));
    open(&url).await;
    Database::open(&url, Mode::Check).await.expect("current");
    let names: Vec<String> = sqlx::query_scalar(
        "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1",
    )
    .fetch_all(one.pool())
    .await
    .expect("reads");
    let expected = [
        "audit",
        "audit_head",
        "checkpoint",
        "event",
        "late_event",
        "migrations",
        "node",
        "parked_event",
        "partition",
        "partition_digest",
        "projection",
        "projection_category",
        "skipped_event",
        "snapshot",
    ];
    assert_eq!(names, expected.map(|name| format!("kafold_{name}")));
    drop((two, three));
}

#[tokio::test]
async fn checking_creates_nothing_and_a_newer_schema_is_refused_by_name() {
    let Some(server) = server("checking_creates_nothing_and_a_newer_schema_is_refused_by_name")
    else {
        return;
    };
    let url = new_database(&server, "checking").await;
    let error = Database::open(&url, Mode::Check).await.expect_err("no tables");
    assert!(matches!(error, DatabaseError::NotMigrated { found: 0, known: 21, .. }), "{error}");

    let database = open(&url).await;
    sqlx::query("INSERT INTO kafold_migrations VALUES (9999, 'later', now(), TRUE, '\\x00', 0)")
        .execute(database.pool())
        .await
        .expect("writes");
    for mode in [Mode::Check, Mode::Migrate] {
        let error = Database::open(&url, mode).await.expect_err("newer");
        assert!(
            matches!(error, DatabaseError::NewerSchema { found: 9999, known: 21, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("migrations_checking"), "{error}");
    }
}

#[tokio::test]
async fn a_failed_migration_leaves_nothing_behind() {
    let Some(server) = server("a_failed_migration_leaves_nothing_behind") else { return };
    let url = new_database(&server, "half").await;
    execute(&url, "CREATE TABLE kafold_checkpoint (someone_elses TEXT)").await;
    let refused = refusal(&url).await;
    assert!(refused.contains("kafold_checkpoint"), "{refused}");
    // The lock is free again, and the tables before the one that failed are not there.
    execute(&url, "DROP TABLE kafold_checkpoint").await;
    open(&url).await;
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_to_grant() {
    let Some(server) = server("a_role_without_rights_is_told_which_to_grant") else { return };
    let url = new_database(&server, "rights").await;
    execute(&url, "REVOKE CREATE ON SCHEMA public FROM pg_database_owner, PUBLIC").await;
    let refused = refusal(&url).await;
    assert!(refused.contains("permission denied") && refused.contains("GRANT CREATE"), "{refused}");
}

#[tokio::test]
async fn wrong_urls_are_refused_with_the_remedy_and_without_the_password() {
    let Some(server) = server("wrong_urls_are_refused_with_the_remedy_and_without_the_password")
    else {
        return;
    };
    let (_, place) = server.rsplit_once('@').expect("a URL with a login");
    let (host, _) = place.split_once('/').expect("a URL with a database");
    let check = async |url: String, expected: &str| {
        let refused = refusal(&url).await;
        assert!(refused.contains(expected), "{refused}");
    };
    check(format!("postgres://nobody:secret@{place}"), "check user and password").await;
    check(server.replace(place, &format!("{host}/no_such_database")), "create the database").await;
    check("postgres://u:secret@no-such-host.invalid/d".into(), "check the host name").await;
    check("postgres://u:secret@host:notaport/d".into(), "is not a database URL").await;
}

#[tokio::test]
async fn a_server_that_is_down_is_unavailable() {
    // Nothing listens on port 1 of this machine.
    let error = Database::open("postgres://u:secret@127.0.0.1:1/d", Mode::Migrate).await;
    let error = error.expect_err("nobody there");
    assert!(matches!(error, DatabaseError::Unavailable { .. }), "{error:?}");
    assert!(error.to_string().contains("postgres://u@127.0.0.1:1/d"), "{error}");
}

/// A statement outside of a transaction is there for others as soon as it is acknowledged, also on a connection that
/// was returned to the pool while the answer to its BEGIN was awaited.
#[tokio::test]
async fn a_cancelled_begin_leaves_no_transaction_open() {
    let Some(server) = server("a_cancelled_begin_leaves_no_transaction_open") else { return };
    let url = new_database(&server, "cancelled_begin").await;
    let database = open(&url).await;
    let pool = database.pool();
    execute(&url, "CREATE TABLE written (n INTEGER)").await;
    let mut other = PgConnection::connect(&url).await.expect("connects");
    for polls in 1..=50 {
        let polled = async {
            for _ in 0..polls {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            begun = begin(pool, "BEGIN") => drop(begun.expect("a transaction")),
            () = polled => {}
        }
        sqlx::query("INSERT INTO written VALUES (1)").execute(pool).await.expect("acknowledged");
        let count = sqlx::query_scalar("SELECT COUNT(*) FROM written");
        let count: i64 = count.fetch_one(&mut other).await.expect("readable");
        assert_eq!(count, polls, "after {polls} polls");
    }
}

#[tokio::test]
async fn a_connection_that_the_server_ends_is_transient_and_replaced() {
    let Some(server) = server("a_connection_that_the_server_ends_is_transient_and_replaced") else {
        return;
    };
    let database = open(&new_database(&server, "ended").await).await;
    let ended =
        sqlx::query("SELECT pg_terminate_backend(pg_backend_pid())").execute(database.pool()).await;
    let ended = ended.expect_err("its own end");
    assert!(is_transient(&ended), "{ended}");
    sqlx::query("SELECT 1").execute(database.pool()).await.expect("a new connection");
    let bad = sqlx::query("SELECT nothing FROM nowhere").execute(database.pool()).await;
    assert!(!is_transient(&bad.expect_err("no such table")));
}

#[tokio::test]
async fn statements_and_locks_are_bounded() {
    let Some(server) = server("statements_and_locks_are_bounded") else { return };
    let database = open(&new_database(&server, "bounded").await).await;
    let settings: Vec<String> = sqlx::query_scalar(
        "SELECT setting FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout', \
         'idle_in_transaction_session_timeout') ORDER BY name",
    )
    .fetch_all(database.pool())
    .await
    .expect("reads");
    assert_eq!(settings, ["5000", "10000", "60000"]);
}

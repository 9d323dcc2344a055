//! Databases behind PgBouncer, read-only databases, and databases that cannot store every text.

use kafold_migrations::rights::Role;
use kafold_migrations::sqlx::postgres::PgConnectOptions;
use kafold_migrations::sqlx::{self, Connection, PgConnection};
use kafold_migrations::{Database, Mode, refusal};

use super::tls::eventually;
use super::{dev, execute, new_database, open, refusal as refused, server};

/// A pooler of `dev/pgbouncer`, removed at the end of the test.
struct Pooler {
    name: String,
    address: String,
}

impl Pooler {
    fn up() -> Self {
        let name = format!("migrations-pooler-{}", std::process::id());
        let mut pooler = Self { name, address: String::new() };
        let postgres = std::env::var("KAFOLD_TEST_POSTGRES_NAME").expect("set by dev/test");
        let url = pooler.dev(&["up", "--postgres", &postgres]);
        pooler.address = url.strip_suffix("/kafold").expect("a URL").to_owned();
        pooler
    }

    /// Runs `dev/pgbouncer`. Returns the last line of its output.
    fn dev(&self, arguments: &[&str]) -> String {
        dev("pgbouncer", &self.name, arguments)
    }

    /// Returns the URL of a database behind the pooler, once the pooler has the mode.
    async fn in_mode(&self, mode: &str, direct: &str) -> String {
        self.dev(&["mode", "--mode", mode]);
        let name = direct.rsplit_once('/').expect("a URL with a database").1;
        let admin = connection_to(&format!("{}/pgbouncer", self.address));
        eventually("the mode", async || {
            let mut console = PgConnection::connect_with(&admin).await.expect("the console");
            let rows = sqlx::raw_sql("SHOW CONFIG").fetch_all(&mut console).await;
            let is_mode = |row: &sqlx::postgres::PgRow| {
                let text = |index| sqlx::Row::get::<String, usize>(row, index);
                text(0) == "pool_mode" && text(1) == mode
            };
            rows.expect("the settings").iter().any(is_mode)
        })
        .await;
        format!("{}/{name}", self.address)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.dev(&["down"]);
    }
}

/// Returns options that a pooler accepts.
fn connection_to(url: &str) -> PgConnectOptions {
    url.parse::<PgConnectOptions>().expect("a URL").extra_float_digits(None)
}

#[tokio::test]
async fn a_pooler_is_refused_unless_it_keeps_sessions() {
    let Some(server) = server("a_pooler_is_refused_unless_it_keeps_sessions") else { return };
    let direct = new_database(&server, "pooled").await;
    let pooler = Pooler::up();
    for (mode, said) in [
        ("transaction", "gives each transaction another session; name the server itself"),
        ("statement", "statement pooling mode; name the server itself"),
    ] {
        let url = pooler.in_mode(mode, &direct).await;
        // The pool may have one session or several.
        for _ in 0..3 {
            let reason = refused(&url).await;
            assert!(reason.contains(said), "{mode}: {reason}");
        }
    }
    let url = pooler.in_mode("session", &direct).await;
    let database = open(&url).await;
    let (timeout, isolation): (String, String) = sqlx::query_as(
        "SELECT current_setting('idle_in_transaction_session_timeout'), \
         current_setting('transaction_isolation')",
    )
    .fetch_one(database.pool())
    .await
    .expect("settings");
    assert_eq!((&*timeout, &*isolation), ("5s", "read committed"));

    let lost = refused(&format!("{}/there_is_none", pooler.address)).await;
    assert!(lost.contains("\"there_is_none\" does not exist; name a database"), "{lost}");

    // Changed while connections are open: named, and not a fault of any statement.
    let url = pooler.in_mode("transaction", &direct).await;
    let mut found = None;
    for _ in 0..50 {
        let options = connection_to(&url);
        let mut one = PgConnection::connect_with(&options).await;
        let mut two = PgConnection::connect_with(&options).await;
        for connection in [&mut one, &mut two] {
            let connection = connection.as_mut().expect("connects");
            if let Err(error) = sqlx::query("SELECT 1").execute(connection).await {
                found = Some(refusal(&error).expect("a refusal"));
            }
        }
        if found.is_some() {
            break;
        }
    }
    let found = found.expect("statements of one connection meet those of another");
    assert!(found.remedy.contains("pool_mode=session"), "{found:?}");

    // A running process names it, and goes on with new connections when it is mended.
    let watched = Database::Postgres(database.clone());
    watched.watch(Role::Service);
    let words = "gives each transaction another session";
    let is_named = async || watched.complaint().is_some_and(|complaint| complaint.contains(words));
    eventually("it is named", is_named).await;
    pooler.in_mode("session", &direct).await;
    eventually("it is mended", async || watched.complaint().is_none()).await;
    let pid = "SELECT pg_backend_pid()";
    for _ in 0..20 {
        let asked: Result<i32, _> = sqlx::query_scalar(pid).fetch_one(database.pool()).await;
        asked.expect("the statements of a session are its own");
    }
}

#[tokio::test]
async fn a_database_that_cannot_store_every_text_is_refused() {
    let Some(server) = server("a_database_that_cannot_store_every_text_is_refused") else { return };
    let place = server.rsplit_once('/').expect("a URL with a database").0;
    for (name, create) in [
        (
            "latin1",
            "CREATE DATABASE migrations_latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
        ),
        (
            "sql_ascii",
            "CREATE DATABASE migrations_sql_ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0",
        ),
    ] {
        execute(&server, create).await;
        let reason = refused(&format!("{place}/migrations_{name}")).await;
        let encoding = format!("has the encoding {}", name.to_uppercase());
        assert!(reason.contains(&encoding) && reason.contains("ENCODING 'UTF8'"), "{reason}");
    }
    execute(&server, "DROP DATABASE migrations_latin1").await;
    execute(&server, "DROP DATABASE migrations_sql_ascii").await;
}

#[tokio::test]
async fn a_read_only_database_is_refused_at_the_start_and_named_while_running() {
    let Some(server) =
        server("a_read_only_database_is_refused_at_the_start_and_named_while_running")
    else {
        return;
    };
    let url = new_database(&server, "read_only").await;
    let running = open(&url).await;
    let watched = Database::Postgres(running);
    watched.watch(Role::Service);
    let set = "ALTER DATABASE migrations_read_only SET default_transaction_read_only = on";
    execute(&server, set).await;
    let reason = refused(&url).await;
    let remedy = "ALTER DATABASE migrations_read_only RESET default_transaction_read_only";
    assert!(reason.contains("is read-only") && reason.contains(remedy), "{reason}");
    let is_named = async || watched.complaint().is_some_and(|complaint| complaint.contains(remedy));
    eventually("it is named", is_named).await;
    // A tool that only reads goes on.
    drop(Database::open(&url, Mode::Check).await.expect("can be read"));
    execute(&server, remedy).await;
    eventually("it is mended", async || watched.complaint().is_none()).await;
    drop(open(&url).await);
}

/// The isolation level of a role or a database does not reach the statements, which lock and then
/// read what the former holder of the lock committed.
#[tokio::test]
async fn the_isolation_level_is_the_one_that_statements_are_written_for() {
    let Some(server) = server("the_isolation_level_is_the_one_that_statements_are_written_for")
    else {
        return;
    };
    let url = new_database(&server, "isolation").await;
    execute(
        &url,
        "ALTER DATABASE migrations_isolation SET default_transaction_isolation = 'serializable'",
    )
    .await;
    let database = open(&url).await;
    let level = sqlx::query_scalar("SHOW transaction_isolation").fetch_one(database.pool()).await;
    let level: String = level.expect("a setting");
    assert_eq!(level, "read committed");
    drop(Database::open(&url, Mode::Check).await.expect("current"));
}

//! What the tests of this crate share: a database each, a small domain, and sources that misbehave.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod domain;
pub(crate) mod source;

use std::time::Duration;

use kafold_core::clock::RandomIds;
use kafold_core::mutant::{self, Mutant};
use kafold_core::testing::eventually;
use kafold_core::{Clock, IdGenerator};
use kafold_migrations::{Database, Mode};
use kafold_projections::sqlx::{self, AssertSqlSafe, Connection, PgConnection};
use kafold_projections::{ProjectionState, Projections};
use tempfile::TempDir;

/// A database of one test's own.
pub(crate) struct TestDatabase {
    pub(crate) database: Database,
    pub(crate) url: String,
    /// The server's URL and the database's name there, to drop it.
    server: Option<(String, String)>,
    _folder: Option<TempDir>,
}

impl TestDatabase {
    pub(crate) async fn sqlite() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let url = format!("sqlite://{}", folder.path().join("test.db").display());
        let database = Database::open(&url, Mode::Migrate).await.expect("a new file");
        Self { database, url, server: None, _folder: Some(folder) }
    }

    /// `None` when there is no server to test on.
    pub(crate) async fn postgres() -> Option<Self> {
        let server = server()?;
        Some(Self::on(&server).await)
    }

    pub(crate) async fn on(server: &str) -> Self {
        let name = format!("kafold_projections_{}", RandomIds.event_id().simple());
        admin(server, &format!("CREATE DATABASE {name}")).await;
        let (base, _) = server.rsplit_once('/').expect("a URL with a database");
        let url = format!("{base}/{name}");
        let database = Database::open(&url, Mode::Migrate).await.expect("a new database");
        let server = Some((server.to_owned(), name));
        Self { database, url, server, _folder: None }
    }

    /// Another handle, as another process has it.
    pub(crate) async fn again(&self) -> Database {
        Database::open(&self.url, Mode::Check).await.expect("it is there")
    }

    /// Runs a statement that answers nothing.
    pub(crate) async fn run(&self, sql: &'static str) {
        match &self.database {
            Database::Postgres(database) => {
                sqlx::query(sql).execute(database.pool()).await.map(drop).expect(sql);
            }
            Database::Sqlite(database) => {
                let mut tx = database.write().await.expect("the gate");
                sqlx::query(sql).execute(&mut *tx).await.expect(sql);
                tx.commit().await.expect("a commit");
            }
        }
    }

    /// Runs a query that answers one integer.
    pub(crate) async fn number(&self, sql: &'static str) -> i64 {
        match &self.database {
            Database::Postgres(database) => {
                sqlx::query_scalar(sql).fetch_one(database.pool()).await.expect(sql)
            }
            Database::Sqlite(database) => {
                sqlx::query_scalar(sql).fetch_one(database.readers()).await.expect(sql)
            }
        }
    }

    pub(crate) async fn remove(self) {
        self.database.close().await;
        if let Some((server, name)) = self.server {
            let drop = format!("DROP DATABASE {name} WITH (FORCE)");
            // The server's own vacuum may be in it for a moment, and cannot be forced out.
            eventually("it is dropped", async || try_admin(&server, &drop).await.is_ok()).await;
        }
    }
}

async fn admin(server: &str, sql: &str) {
    try_admin(server, sql).await.expect("the server answers, and the user has the rights");
}

async fn try_admin(server: &str, sql: &str) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect(server).await?;
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await?;
    connection.close().await
}

/// The PostgreSQL server to test on; says so once when there is none.
#[expect(clippy::print_stdout, reason = "the one line that tells what was skipped")]
pub(crate) fn server() -> Option<String> {
    static SAID: std::sync::Once = std::sync::Once::new();
    let server = std::env::var("KAFOLD_TEST_POSTGRES").ok();
    if server.is_none() {
        let all = std::env::var("KAFOLD_TEST_REQUIRE_ALL").is_ok_and(|all| all == "1");
        assert!(!all, "KAFOLD_TEST_REQUIRE_ALL is set and KAFOLD_TEST_POSTGRES is not");
        SAID.call_once(|| println!("skipped on PostgreSQL: KAFOLD_TEST_POSTGRES is not set"));
    }
    server
}

/// One test a claim and database.
#[macro_export]
macro_rules! on_both {
    ($($claim:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() {
                let database = super::common::TestDatabase::sqlite().await;
                super::$claim(&database).await;
                database.remove().await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $claim() {
                let Some(database) = super::common::TestDatabase::postgres().await else { return };
                super::$claim(&database).await;
                database.remove().await;
            })*
        }
    };
}

/// One test a deliberate bug: the claim must not hold while it is switched on.
#[macro_export]
macro_rules! killed_by {
    ($($mutant:ident: $claim:ident on $database:ident),* $(,)?) => {
        mod mutants {
            $(#[test]
            #[allow(non_snake_case, reason = "named after the bug")]
            fn $mutant() {
                let test = async || {
                    let database = super::common::TestDatabase::$database().await;
                    let Some(database) = Option::from(database) else { return false };
                    super::$claim(&database).await;
                    true
                };
                let mutant = kafold_core::mutant::Mutant::$mutant;
                super::common::assert_killed(mutant, stringify!($claim), test);
            })*
        }
    };
}

/// In a thread of its own, in which the bug is switched on.
pub(crate) fn assert_killed<T>(
    mutant: Mutant,
    claim: &str,
    test: impl FnOnce() -> T + Send + 'static,
) where
    T: Future<Output = bool>,
{
    use std::io::Write;
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        mutant::with(Some(mutant), || runtime.expect("a runtime").block_on(test()))
    });
    match thread.join() {
        // Nothing to test on.
        Ok(false) => {}
        Ok(true) => panic!("{mutant:?} is not found by {claim}"),
        // To the stream itself: what a passing test prints is not shown.
        Err(_) => writeln!(std::io::stderr(), "{mutant:?} killed by {claim}").expect("it is open"),
    }
}

/// Waits until the first projection of a worker stops. Returns the reason.
pub(crate) async fn stopped(projections: &Projections) -> String {
    let reason = || match &projections.status()[0].state {
        ProjectionState::Stopped(reason) => Some(reason.clone()),
        _ => None,
    };
    eventually("it stops", async || reason().is_some()).await;
    reason().expect("it has stopped")
}

/// Lets other tasks run for so long: for tests that interrupt at a random moment.
pub(crate) async fn a_while(duration: Duration) {
    kafold_core::clock::SystemClock.sleep(duration).await;
}

/// Numbers that look random and are the same in every run of a seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `sides`.
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

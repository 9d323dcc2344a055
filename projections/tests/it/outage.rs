//! A database that goes away: nothing is lost, nothing is skipped, and the worker says what it waits
//! for. On a PostgreSQL of this test's own.

use crate::common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::domain::{CustomerTotals, Ledger, Orders};
use common::{Dice, TestDatabase, a_while, server};
use kafold_core::store::{Health, ReadError};
use kafold_core::testing::eventually;
use kafold_migrations::rights::{self, Role};
use kafold_migrations::{Database, Mode};
use kafold_projections::{
    By, Control, ProjectionConfig, ProjectionStatus, ProjectionWorker, Projections, Query,
    ReadModel,
    sqlx::{self, AssertSqlSafe},
};

const WAIT: Duration = Duration::from_secs(60);

/// A server of `dev/postgres`, removed when the test is over.
struct OwnServer {
    name: String,
}

impl OwnServer {
    fn up() -> (Self, String) {
        let server = Self { name: format!("projections-outage-{}", std::process::id()) };
        let url = server.dev("up", &[]);
        (server, url)
    }

    /// Runs `dev/postgres`; answers the last line of its output.
    fn dev(&self, command: &str, flags: &[&str]) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dev/postgres");
        let mut run = Command::new(script);
        run.args([command, "--name", &self.name]).args(flags);
        let output = run.output().expect("dev/postgres runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "dev/postgres {command}: {errors}");
        String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned()
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        self.dev("down", &[]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_restarts_loses_and_skips_nothing() {
    if server().is_none() {
        return;
    }
    let (own, url) = tokio::task::spawn_blocking(OwnServer::up).await.expect("it is up");
    let database = TestDatabase::on(&url).await;
    let orders = Arc::new(Orders::new(6));
    let config = ProjectionConfig {
        retry_delay_max: Duration::from_millis(300),
        rebuild_batch_events_max: 1_000,
        ..ProjectionConfig::default()
    };
    let projections =
        ProjectionWorker::new(Arc::new(orders.store.clone()), database.database.clone())
            .config(config)
            .with::<CustomerTotals>()
            .with_projection(Ledger::default())
            .spawn();
    // Goes on as long as the outages do: an idle projection does not notice one.
    let enough = Arc::new(AtomicBool::new(false));
    let appending = {
        let (orders, enough, mut dice) = (orders.clone(), enough.clone(), Dice::new(11));
        tokio::spawn(async move {
            while !enough.load(Ordering::Relaxed) {
                orders.append_random(&mut dice).await;
                a_while(Duration::from_micros(dice.roll(4_000))).await;
            }
        })
    };
    for kill in [true, false, true] {
        a_while(Duration::from_millis(400)).await;
        let flags: &[&str] = if kill { &["--kill"] } else { &[] };
        own.dev("stop", flags);
        eventually("it says what it waits for", async || {
            let Health::NotReady(why) = projections.health() else { return false };
            why.iter().any(|why| why.contains("the database is unavailable"))
        })
        .await;
        let query = Query::<CustomerTotals>::new(database.database.clone());
        let read = query.get(&"c1".to_owned()).await;
        assert!(matches!(read, Err(ReadError::Unavailable { .. })), "{read:?}");
        own.dev("start", &[]);
    }
    enough.store(true, Ordering::Relaxed);
    appending.await.expect("memory takes everything");
    for name in [CustomerTotals::NAME, "ledger"] {
        orders.applied(&projections, name, WAIT).await;
    }
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let counted = database.number("SELECT COUNT(*) FROM ledger").await;
    assert_eq!(counted as usize, orders.count());
    assert_eq!(projections.health(), Health::Ready);
    // Another process's waits hear of progress again, too.
    let other = ProjectionWorker::new(Arc::new(orders.store.clone()), database.again().await);
    let written = orders.place("after", "c1", 1).await;
    other.spawn().wait_for_position(CustomerTotals::NAME, written, WAIT).await.expect("applied");
    crash_during_a_rebuild(&own, &database, &orders, &projections).await;
    projections.shutdown().await;
    database.database.close().await;
    tokio::task::spawn_blocking(move || drop(own)).await.expect("it is down");
}

/// Passes everything on between clients and a server, until it is to lose the answer of a commit, and
/// with it the connection.
struct LossyProxy {
    address: SocketAddr,
    is_to_lose: Arc<AtomicBool>,
}

impl LossyProxy {
    fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let is_to_lose = Arc::new(AtomicBool::new(false));
        let loses = Arc::clone(&is_to_lose);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a connection");
                let server = TcpStream::connect(&server).expect("the server answers");
                let ways = [(&client, &server, None), (&server, &client, Some(&loses))];
                for (from, to, loses) in ways {
                    let from = from.try_clone().expect("a handle");
                    let to = to.try_clone().expect("a handle");
                    let loses = loses.cloned();
                    std::thread::spawn(move || pass_on(from, to, loses.as_deref()));
                }
            }
        });
        Self { address, is_to_lose }
    }

    fn lose_the_answer_of_a_commit(&self) {
        self.is_to_lose.store(true, Ordering::SeqCst);
    }

    fn has_lost_it(&self) -> bool {
        !self.is_to_lose.load(Ordering::SeqCst)
    }
}

/// Until either end is gone.
fn pass_on(mut from: TcpStream, mut to: TcpStream, loses: Option<&AtomicBool>) {
    let mut buffer = [0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        // The server's tag for it.
        let is_commit = bytes.windows(7).any(|bytes| bytes == b"COMMIT\0");
        let is_lost = is_commit && loses.is_some_and(|loses| loses.swap(false, Ordering::SeqCst));
        if is_lost || to.write_all(bytes).is_err() {
            break;
        }
    }
    // Either may be gone already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_lost_is_not_waited_for() {
    let Some(server) = server() else { return };
    let (user, rest) = server.split_once('@').expect("a URL with a user");
    let (address, name) = rest.split_once('/').expect("a URL with a database");
    let proxy = LossyProxy::to(address.to_owned());
    let database = TestDatabase::on(&format!("{user}@{}/{name}", proxy.address)).await;
    let orders = Arc::new(Orders::new(1));
    let projections =
        ProjectionWorker::new(Arc::new(orders.store.clone()), database.database.clone())
            .with::<CustomerTotals>()
            .spawn();
    orders.place("before", "c1", 1).await;
    orders.applied(&projections, CustomerTotals::NAME, WAIT).await;
    eventually("it is ready", async || projections.health() == Health::Ready).await;
    proxy.lose_the_answer_of_a_commit();
    let lost = orders.place("lost", "c1", 1).await;
    eventually("the answer is lost", async || proxy.has_lost_it()).await;
    // Nothing else comes that could be applied.
    orders.applied(&projections, CustomerTotals::NAME, WAIT).await;
    eventually("it is ready again", async || projections.health() == Health::Ready).await;
    assert_eq!(projections.status()[0].has_applied(lost), Some(true), "{:?}", projections.status());
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    projections.shutdown().await;
    database.remove().await;
}

/// Most of its transactions do not wait for the disk, so that the server forgets some each time.
async fn crash_during_a_rebuild(
    own: &OwnServer,
    database: &TestDatabase,
    orders: &Orders,
    projections: &Projections,
) {
    orders.place_many(200).await;
    orders.applied(projections, CustomerTotals::NAME, WAIT).await;
    let by = By { actor: "me", reason: Some("a test") };
    let control = Control::new(database.database.clone());
    let next = control.rebuild(CustomerTotals::NAME, false, by).await.expect("asked");
    let status = || {
        let mut all = projections.status().into_iter();
        all.find(|status| status.name == CustomerTotals::NAME).expect("it is run here")
    };
    let mut seen = 0;
    let mut crashes = 0;
    while crashes < 3 && status().generation != next {
        let done = |next: &ProjectionStatus| next.partitions.values().map(|p| p.next.0).sum();
        eventually("it is further", async || {
            let done: u64 = status().next.as_deref().map_or(0, done);
            status().generation == next || done > seen + 5_000
        })
        .await;
        seen = status().next.as_deref().map_or(seen, done);
        own.dev("stop", &["--kill"]);
        own.dev("start", &[]);
        crashes += 1;
    }
    assert!(crashes > 1, "it was through before the second crash");
    eventually("it is switched to", async || status().generation == next).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

/// Runs a statement as the owner of the tables.
async fn as_owner(database: &TestDatabase, sql: String) {
    let Database::Postgres(postgres) = &database.database else { unreachable!("on PostgreSQL") };
    let ran = sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(postgres.pool()).await;
    ran.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_taken_away_is_waited_for_by_name_and_parks_nothing() {
    let Some(database) = TestDatabase::postgres().await else { return };
    let login = format!("kafold_worker_{}", std::process::id());
    as_owner(&database, format!("CREATE ROLE {login} LOGIN PASSWORD 'kafold'")).await;
    as_owner(&database, "REVOKE ALL ON SCHEMA public FROM PUBLIC".to_owned()).await;
    for line in rights::grants(Role::Worker, &login) {
        if line.starts_with("GRANT") {
            as_owner(&database, line).await;
        }
    }
    let url = database.url.replace("kafold:kafold@", &format!("{login}:kafold@"));
    let limited = Database::open(&url, Mode::Migrate).await.expect("the tables are current");
    let orders = Arc::new(Orders::new(2));
    let projections = ProjectionWorker::new(Arc::new(orders.store.clone()), limited.clone())
        .with::<CustomerTotals>()
        .with_projection(Ledger::default())
        .spawn();
    orders.place("one", "c1", 1).await;
    orders.applied(&projections, CustomerTotals::NAME, WAIT).await;

    let line = format!("GRANT UPDATE ON kafold_checkpoint TO {login};");
    as_owner(&database, line.replace("GRANT", "REVOKE").replace(" TO ", " FROM ")).await;
    orders.place("two", "c1", 2).await;
    eventually("the missing right is named", async || {
        let Health::NotReady(why) = projections.health() else { return false };
        let has = |words: &str| why.iter().any(|why| why.contains(words));
        has(&line)
            && has("waits: the database refuses: permission denied for table kafold_checkpoint")
    })
    .await;
    as_owner(&database, line).await;
    orders.applied(&projections, CustomerTotals::NAME, WAIT).await;
    orders.applied(&projections, "ledger", WAIT).await;
    eventually("it is ready again", async || projections.health() == Health::Ready).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);

    // A rebuild needs no further rights.
    let by = By { actor: "me", reason: Some("a test") };
    let control = Control::new(database.database.clone());
    let next = control.rebuild(CustomerTotals::NAME, false, by).await.expect("asked");
    eventually("it is switched to", async || {
        projections.status().iter().any(|status| status.generation == next)
    })
    .await;
    assert_eq!(projections.health(), Health::Ready);
    projections.shutdown().await;
    limited.close().await;
    as_owner(&database, format!("GRANT {login} TO kafold")).await;
    as_owner(&database, format!("DROP OWNED BY {login}")).await;
    as_owner(&database, format!("DROP ROLE {login}")).await;
    database.remove().await;
}

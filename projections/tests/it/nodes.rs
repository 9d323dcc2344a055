//! The reports of nodes in the database.

use crate::common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use common::TestDatabase;
use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::store::Health;
use kafold_core::testing::eventually;
use kafold_core::{Clock, IdGenerator};
use kafold_projections::{NodeReport, NodeReporter};

on_both!(
    a_node_reports_its_health_until_it_ends,
    a_killed_node_is_named_and_then_forgotten,
    a_report_has_a_limit,
);

/// The machine's clock, with short sleeps: a node reports all the time.
struct QuickClock;

#[async_trait]
impl Clock for QuickClock {
    fn now(&self) -> chrono::DateTime<chrono::Utc> {
        SystemClock.now()
    }

    fn instant(&self) -> Instant {
        SystemClock.instant()
    }

    async fn sleep(&self, duration: Duration) {
        SystemClock.sleep(duration / 500).await;
    }
}

fn node(
    database: &TestDatabase,
    name: &str,
    health: impl Fn() -> Health + Send + 'static,
) -> NodeReporter {
    let id = RandomIds.event_id();
    NodeReporter::spawn(database.database.clone(), id, name.into(), Arc::new(QuickClock), health)
}

async fn reports(database: &TestDatabase) -> Vec<NodeReport> {
    NodeReport::all(&database.database).await.expect("the reports")
}

async fn a_node_reports_its_health_until_it_ends(database: &TestDatabase) {
    let is_ready = Arc::new(AtomicBool::new(true));
    let health = {
        let is_ready = Arc::clone(&is_ready);
        move || match is_ready.load(Ordering::SeqCst) {
            true => Health::Ready,
            false => Health::NotReady(vec!["the clock is \"ahead\"".into(), "two".into()]),
        }
    };
    let first = node(database, "a", health);
    let second = node(database, "b", || Health::Ready);
    eventually("both have reported", async || reports(database).await.len() == 2).await;
    let ready = &reports(database).await[0];
    assert_eq!((ready.name.as_str(), ready.unready_seconds), ("a", None));
    assert_eq!((ready.complaint(), ready.silence()), (None, None));

    is_ready.store(false, Ordering::SeqCst);
    let unready = async || reports(database).await.swap_remove(0);
    eventually("it is not ready", async || unready().await.unready_seconds.is_some()).await;
    assert_eq!(unready().await.reasons, ["the clock is \"ahead\"", "two"]);
    assert_eq!(unready().await.complaint(), None, "a start takes some seconds");
    database.run("UPDATE kafold_node SET unready_at = unready_at - 100 WHERE name = 'a'").await;
    let complaint = unready().await.complaint().expect("longer than a start takes");
    assert!(complaint.starts_with("node a has not been ready for 1"), "{complaint}");
    assert!(complaint.ends_with("s: the clock is \"ahead\"; two"), "{complaint}");

    is_ready.store(true, Ordering::SeqCst);
    eventually("it is ready again", async || unready().await.unready_seconds.is_none()).await;
    first.close().await;
    // `close` waits for the deletion, but only for 4 ms of this clock.
    let names = async || reports(database).await.into_iter().map(|node| node.name);
    eventually("a closed node ends", async || names().await.eq(["b"])).await;
    drop(second);
    eventually("a dropped node ends too", async || reports(database).await.is_empty()).await;
}

async fn a_killed_node_is_named_and_then_forgotten(database: &TestDatabase) {
    database
        .run(
            "INSERT INTO kafold_node (id, name, seen_at, unready_at, reasons) \
             VALUES ('x', 'killed', 0, 0, '[\"why\"]')",
        )
        .await;
    let killed = reports(database).await.swap_remove(0);
    assert_eq!(killed.complaint(), None, "its last complaint is old");
    let silence = killed.silence().expect("it is silent");
    assert!(silence.starts_with("node killed has not reported for "), "{silence}");
    let node = node(database, "a", || Health::Ready);
    eventually("a day later it is forgotten", async || {
        reports(database).await.iter().all(|node| node.name == "a")
    })
    .await;
    node.close().await;
}

async fn a_report_has_a_limit(database: &TestDatabase) {
    let node = node(database, "a", || Health::NotReady(vec!["é".repeat(600); 30]));
    eventually("it has reported", async || reports(database).await.len() == 1).await;
    let report = reports(database).await.swap_remove(0);
    assert_eq!(report.reasons, vec!["é".repeat(500); 20]);
    node.close().await;
}

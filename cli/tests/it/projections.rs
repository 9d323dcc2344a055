//! What operators do to projections, with the program from outside while a worker runs.

use crate::support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kafold::projections::sqlx::{Connection, SqliteConnection, query};
use kafold::projections::{ProjectionConfig, ProjectionWorker, Projections, ReadModel};
use kafold::{Database, DomainEvent, Log, Mode, Recorded, Row};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use support::{append, open, run, wait_for};
use tempfile::TempDir;

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
enum OrderEvent {
    #[event("order.changed")]
    Changed { step: i64 },
}

/// The sum of an order's steps.
#[derive(Debug, Clone, PartialEq, Row)]
struct Sum {
    #[row(stream)]
    order_id: String,
    sum: i64,
}

/// Whether the fold fails at step 13.
static IS_BROKEN: AtomicBool = AtomicBool::new(true);

impl ReadModel for Sum {
    const NAME: &'static str = "sums";
    type Event = OrderEvent;

    fn fold(order_id: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let OrderEvent::Changed { step } = event.event;
        assert!(step != 13 || !IS_BROKEN.load(Ordering::SeqCst), "thirteen brings bad luck");
        let sum = row.map_or(0, |row| row.sum) + step;
        Some(Self { order_id: order_id.clone(), sum })
    }
}

struct Service {
    folder: TempDir,
    log: Log,
    _projections: Projections,
}

impl Service {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let url = format!("sqlite://{}", folder.path().join("a.db").display());
        let log = open(&url, None).await;
        let database = Database::open(&url, Mode::Migrate).await.expect("the file");
        let config = ProjectionConfig {
            retry_delay: Duration::from_millis(1),
            control_poll_interval: Duration::from_millis(20),
            ..ProjectionConfig::default()
        };
        let worker = ProjectionWorker::new(log.source(), database).config(config).with::<Sum>();
        Self { folder, log, _projections: worker.spawn() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    async fn step(&self, order: &str, step: i64) {
        append(&self.log.store(), order, &format!("{{\"step\":{step}}}")).await;
    }

    /// Stores the report of a node which has not been ready for a minute.
    async fn node_with_an_old_complaint(&self) {
        let file = self.path().join("a.db");
        let mut connection =
            SqliteConnection::connect(&file.display().to_string()).await.expect("the file");
        let sql = "INSERT INTO kafold_node (id, name, seen_at, unready_at, reasons) \
                   SELECT 'x', 'n1', unixepoch(), unixepoch() - 60, '[\"the clock is ahead\"]'";
        query(sql).execute(&mut connection).await.expect("stored");
    }

    fn says(&self, args: &[&str]) -> support::Ended {
        run(self.path(), &[args, &["--log", "sqlite://a.db"]].concat())
    }

    fn projection(&self) -> Value {
        self.says(&["projections", "list", "--json"]).json()[0].clone()
    }

    fn wait_until(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || Some(self.projection()).filter(&is))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_parks_retries_rebuilds_and_verifies() {
    let service = Service::start().await;
    for step in [1, 13, 100] {
        service.step("order-1", step).await;
    }
    service.step("order-2", 5).await;
    let parked = service
        .wait_until("it is parked", |seen| seen["parked_events"] == 2 && seen["lag_records"] == 0);
    assert_eq!((&parked["state"], &parked["generation"]), (&"running".into(), &1.into()));

    let listed = service.says(&["parked", "list"]).ok();
    assert!(listed.contains("order-1") && listed.contains("thirteen brings bad luck"), "{listed}");
    let shown = service.says(&["parked", "show", "order-1", "--json"]).json();
    assert_eq!(shown[0]["payload"]["step"], 13, "{shown}");
    assert_eq!(shown[1]["error"], Value::Null, "only behind it: {shown}");
    service.says(&["parked", "show", "order-2"]).only_says(1, &["nothing is parked"]);
    service.says(&["parked", "retry", "order-9"]).only_says(1, &["order-9", "parked list"]);
    service.says(&["parked", "skip", "order-1"]).only_says(2, &["--reason"]);
    service.says(&["parked", "prune", "--older-than", "1"]).only_says(2, &["--reason"]);
    let young = service.says(&["parked", "prune", "--older-than", "1", "--reason", "old"]).ok();
    assert_eq!(young, "0 events to be left out\n");
    service.says(&["doctor"]).says(0, &[]);

    IS_BROKEN.store(false, Ordering::SeqCst);
    service.says(&["parked", "retry", "--all", "--reason", "mended"]).ok();
    service.wait_until("it is parked no more", |seen| seen["parked_events"] == 0);
    assert_eq!(service.says(&["parked", "list"]).ok(), "nothing is parked\n");

    let paused = service.says(&["projections", "pause", "sums"]).ok();
    assert_eq!(paused, "sums: paused\n");
    service.step("order-2", 6).await;
    assert_eq!(service.projection()["state"], "paused");
    service.says(&["projections", "rebuild", "sums"]).ok();
    let seen = service.projection();
    assert_eq!((&seen["state"], &seen["paused"]), (&"rebuilding".into(), &true.into()));
    service.says(&["projections", "rebuild", "sums"]).only_says(1, &["generation 2", "abort"]);
    service.says(&["projections", "resume", "sums"]).ok();
    service
        .wait_until("it is switched", |seen| seen["state"] == "running" && seen["generation"] == 2);
    let again = service.says(&["projections", "rebuild", "--all", "--wait"]).ok();
    assert!(again.ends_with("sums: switched to generation 3\n"), "{again}");
    service.says(&["projections", "abort", "sums"]).only_says(1, &["not being rebuilt"]);
    service.says(&["projections", "pause", "nope"]).only_says(1, &["nope", "sums"]);
    service.says(&["projections", "skip", "sums", "0:1"]).only_says(2, &["--reason"]);
    service
        .says(&["projections", "skip", "sums", "0:1", "--reason", "x"])
        .only_says(1, &["0:1", "passed"]);
    service.says(&["projections", "skip", "sums", "1", "--reason", "x"]).only_says(2, &["3:1042"]);

    let verified = service.says(&["verify", "--json"]).json();
    assert_eq!(verified["events"], 5);
    assert_eq!(verified["not_verified"][0], "sums", "the program has no code of the domain");
    let audit = service.says(&["audit", "list", "--json"]).json();
    let acts: Vec<_> = audit.as_array().expect("acts").iter().map(|act| &act["action"]).collect();
    for act in ["retry", "pause", "rebuild", "resume", "switch"] {
        assert!(acts.contains(&&act.into()), "{act} is not in {audit}");
    }
    service.says(&["audit", "prune", "--older-than", "1"]).only_says(2, &["--reason"]);
    let prune = service.says(&["audit", "prune", "--older-than", "1", "--reason", "old"]);
    assert_eq!(prune.ok(), "0 acts removed\n");

    assert_eq!(service.says(&["clock", "list"]).ok(), "there is no windowed model\n");
    service.says(&["late", "summary", "sums"]).only_says(1, &["no windowed model sums", "none"]);
    service
        .says(&["clock", "advance", "sums", "--to", "2020-01-01T00:00:00Z"])
        .only_says(1, &["no windowed model has the timeline \"sums\""]);
    service.says(&["clock", "advance", "sums", "--to", "noon"]).only_says(2, &["--to", "noon"]);

    service.node_with_an_old_complaint().await;
    let complaint = "node n1 has not been ready for";
    service.says(&["status"]).says(1, &[complaint, "the clock is ahead"]);
    let status = service.says(&["status", "--json"]);
    status.says(1, &[complaint]);
    let status: Value = serde_json::from_str(&status.stdout).expect("JSON beside the failure");
    assert_eq!(status["nodes"][0]["reasons"][0], "the clock is ahead", "{status}");
    let doctor = service.says(&["doctor"]);
    doctor.says(1, &["1 problem"]);
    assert!(doctor.stdout.contains(complaint), "{doctor:?}");

    let top = service.says(&["top", "--json", "--looks", "1"]).ok();
    let top: Value = serde_json::from_str(&top).expect("one line of JSON");
    assert_eq!(top["projections"][0]["projection"]["generation"], 3, "{top}");
    service.says(&["top"]).only_says(2, &["terminal", "--json"]);
}

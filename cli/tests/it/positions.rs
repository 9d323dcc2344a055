//! `positions reset` as a separate program, after a log was recreated.

use crate::support;

use std::path::Path;
use std::time::Duration;

use kafold::projections::{ProjectionConfig, ProjectionWorker, Projections, Query, ReadModel};
use kafold::{Database, DomainEvent, Log, LogOptions, Mode, Recorded, Row};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use support::{Ended, append, create_database, open, run, servers, unique_name, wait_for};
use tempfile::TempDir;

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
enum OrderEvent {
    #[event("order.changed")]
    Changed { step: i64 },
}

/// The sum of an order's steps.
#[derive(Debug, Clone, PartialEq, Row)]
struct Sum {
    #[row(key)]
    order_id: String,
    sum: i64,
}

impl ReadModel for Sum {
    const NAME: &'static str = "sums";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        vec![event.stream.id().to_owned()]
    }

    fn fold(order_id: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let OrderEvent::Changed { step } = event.event;
        let sum = row.map_or(0, |row| row.sum) + step;
        Some(Self { order_id: order_id.clone(), sum })
    }
}

/// A log and a separate database.
struct Stack {
    folder: TempDir,
    log: String,
    database: String,
}

/// A service on the log and the database.
struct Service {
    log: Log,
    database: Database,
    projections: Projections,
}

impl Stack {
    fn says(&self, args: &[&str]) -> Ended {
        let both = ["--log", &self.log, "--database", &self.database];
        run(self.folder.path(), &[args, &both].concat())
    }

    /// Resets after the brokers report no user of the log.
    fn reset(&self) -> Value {
        let args = ["positions", "reset", "--reason", "a test", "--yes", "--json"];
        let done = wait_for("nobody is up", || {
            let ended = self.says(&args);
            (!ended.stderr.contains("in use by")).then_some(ended)
        });
        done.json()
    }

    async fn serve(&self, index: bool) -> Service {
        let log = open(&self.log, index.then_some(&*self.database)).await;
        let database = Database::open(&self.database, Mode::Migrate).await.expect("the database");
        let config = ProjectionConfig {
            control_poll_interval: Duration::from_millis(20),
            ..ProjectionConfig::default()
        };
        let worker = ProjectionWorker::new(log.source(), database.clone());
        let projections = worker.config(config).with::<Sum>().spawn();
        Service { log, database, projections }
    }

    /// Returns the reason for which the log does not open with the database's positions.
    async fn refusal(&self) -> String {
        let database = Database::open(&self.database, Mode::Migrate).await.expect("the database");
        let opened = LogOptions::new(&self.log).index(&database).open().await;
        database.close().await;
        let error = opened.expect_err("it is another log");
        chain(&error)
    }

    fn audit(&self) -> Vec<Value> {
        let acts = self.says(&["audit", "list", "--json"]).json();
        acts.as_array().expect("acts").iter().map(|act| act["action"].clone()).collect()
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl Service {
    async fn step(&self, order: &str, step: i64) {
        append(&self.log.store(), order, &format!("{{\"step\":{step}}}")).await;
    }

    /// Waits for these rows.
    async fn shows(&self, wanted: &[(&str, i64)]) {
        let wanted: Vec<_> =
            wanted.iter().map(|(id, sum)| Sum { order_id: (*id).to_owned(), sum: *sum }).collect();
        let query = Query::<Sum>::new(self.database.clone());
        let what = format!("the rows are {wanted:?}");
        eventually(&what, async || query.all(10).await.is_ok_and(|rows| rows == wanted)).await;
    }

    async fn stop(self) {
        self.log.close().await;
        self.projections.shutdown().await;
        drop(self.projections);
        self.database.close().await;
    }
}

async fn eventually(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let clock = kafold::clock::SystemClock;
    let deadline = kafold::Clock::instant(&clock) + support::PATIENCE;
    while !is().await {
        assert!(kafold::Clock::instant(&clock) < deadline, "gave up waiting: {what}");
        kafold::Clock::sleep(&clock, Duration::from_millis(10)).await;
    }
}

async fn delete_topic(brokers: &str, topic: &str) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a client");
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    let deleted = admin.delete_topics(&[topic], &options).await.expect("an answer");
    deleted.into_iter().for_each(|deleted| drop(deleted.expect("deleted")));
}

async fn a_recreated_topic_is_begun_anew_with(database: String, folder: TempDir, brokers: &str) {
    let name = unique_name();
    let log = format!("kafka://{brokers}/{name}?partitions=2&replication=1");
    let stack = Stack { folder, log, database };
    let service = stack.serve(true).await;
    for (order, step) in [("order-1", 1), ("order-2", 5), ("order-1", 10), ("order-3", 7)] {
        service.step(order, step).await;
    }
    service.shows(&[("1", 11), ("2", 5), ("3", 7)]).await;
    let reset = ["positions", "reset", "--reason", "a test", "--yes"];
    stack.says(&reset).only_says(1, &["in use by", "node ", &format!("group {name}.reader.sums")]);
    service.stop().await;

    delete_topic(brokers, &format!("{name}.events")).await;
    wait_for("the topic is made anew", || {
        let made = stack.says(&["topic", "create"]);
        (made.code == Some(0) && made.stdout.contains(&format!("{name}.events created")))
            .then_some(())
    });
    let refusal = stack.refusal().await;
    assert!(refusal.contains("was recreated"), "{refusal}");
    assert!(refusal.contains("`kafold positions reset --reason TEXT`"), "{refusal}");

    stack.says(&["positions", "reset", "--yes"]).only_says(2, &["--reason"]);
    stack.says(&reset[..4]).only_says(2, &["--yes"]);
    let done = stack.reset();
    assert_eq!(done["index_events"], 4, "{done}");
    assert_eq!(done["checkpoints"], 2, "{done}");
    let rebuild = json!([{"name": "sums", "generation": 2, "paused": false}]);
    assert_eq!(done["rebuilds"], rebuild, "{done}");
    let listed = stack.says(&["projections", "list", "--json"]).json();
    assert_eq!(listed[0]["state"], "rebuilding", "{listed}");
    assert_eq!(stack.audit()[..2], [json!("reset_positions"), json!("rebuild")]);

    let service = stack.serve(true).await;
    service.shows(&[]).await;
    for (order, step) in [("order-1", 3), ("order-4", 4), ("order-1", 30)] {
        service.step(order, step).await;
    }
    service.shows(&[("1", 33), ("4", 4)]).await;
    service.stop().await;
    let listed = stack.says(&["projections", "list", "--json"]).json();
    assert_eq!((&listed[0]["state"], &listed[0]["generation"]), (&json!("running"), &json!(2)));
    let verified = stack.says(&["verify", "--json"]).json();
    assert_eq!((&verified["events"], &verified["indexed_events"]), (&json!(3), &json!(3)));
    stack.says(&["audit", "verify"]).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_topic_is_begun_anew_on_postgres() {
    let Some((brokers, postgres)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let database = create_database(&postgres).await;
    a_recreated_topic_is_begun_anew_with(database, folder, &brokers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_topic_is_begun_anew_on_sqlite() {
    let Some((brokers, _)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let database = format!("sqlite://{}", folder.path().join("index.db").display());
    a_recreated_topic_is_begun_anew_with(database, folder, &brokers).await;
}

/// Creates a stack with a log in one file and read models in another file.
fn files() -> Stack {
    let folder = TempDir::new().expect("a folder");
    let url = |name: &str| format!("sqlite://{}", folder.path().join(name).display());
    let (log, database) = (url("log.db"), url("models.db"));
    Stack { folder, log, database }
}

fn remove(file: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        drop(std::fs::remove_file(format!("{}{suffix}", file.display())));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_file_is_begun_anew_and_its_events_are_kept() {
    let stack = files();
    let service = stack.serve(false).await;
    service.step("order-1", 1).await;
    service.step("order-1", 2).await;
    service.shows(&[("1", 3)]).await;
    let reset = ["positions", "reset", "--reason", "a test", "--yes"];
    stack.says(&reset).only_says(1, &["open in another process", "log.db"]);
    service.stop().await;

    remove(&stack.folder.path().join("log.db"));
    let service = stack.serve(false).await;
    service.step("order-2", 5).await;
    let stopped = |service: &Service| {
        let status = service.projections.status().remove(0);
        Some(status.state.to_string()).filter(|state| state.starts_with("stopped"))
    };
    let state = wait_for("it has stopped", || stopped(&service));
    assert!(state.contains("recreated") && state.contains("kafold positions reset"), "{state}");
    service.stop().await;

    let done = stack.says(&reset).ok();
    assert!(done.contains("the file is the log itself"), "{done}");
    assert!(done.contains("sums: to be built anew as generation 2"), "{done}");
    let service = stack.serve(false).await;
    service.shows(&[("2", 5)]).await;
    service.stop().await;

    // With log and read models in one file the reset also keeps the events.
    let same = Stack { database: stack.log.clone(), ..stack };
    let service = same.serve(false).await;
    service.shows(&[("2", 5)]).await;
    service.stop().await;
    let done = same.says(&["positions", "reset", "--reason", "x", "--yes", "--json"]).json();
    assert_eq!((&done["index_events"], &done["checkpoints"]), (&Value::Null, &json!(1)));
    let verified = same.says(&["verify", "--json"]).json();
    assert_eq!(verified["events"], 1, "the log is whole: {verified}");
    let service = same.serve(false).await;
    service.step("order-2", 6).await;
    service.shows(&[("2", 11)]).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_a_log_is_never_cleared_as_an_index() {
    let Some((brokers, _)) = servers() else { return };
    let stack = files();
    let service = stack.serve(false).await;
    service.step("order-1", 1).await;
    service.stop().await;
    let kafka = format!("kafka://{brokers}/{}", unique_name());
    let wrong = Stack { database: stack.log.clone(), log: kafka, folder: stack.folder };
    let reset = ["positions", "reset", "--reason", "a test", "--yes"];
    wrong.says(&reset).only_says(1, &["it may be a log of its own"]);
    let file = Stack { log: wrong.database.clone(), ..wrong };
    assert_eq!(file.says(&["verify", "--json"]).json()["events"], 1);
}

//! The built program as its users meet it, and logs for it to look at.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use kafold::clock::{RandomIds, SystemClock};
use kafold::projections::sqlx::{AssertSqlSafe, Connection, PgConnection, query};
use kafold::store::Health;
use kafold::{
    Clock, CommandId, Commit, Database, EventStore, ExpectedVersion, IdGenerator, Log, LogOptions,
    Metadata, Mode, NewEvent, StreamId, Version,
};
use serde_json::Value;

/// Longest wait for anything here; reached only when something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `probe` answers something; panics with `what` when it never does.
#[expect(clippy::disallowed_methods, reason = "the one place that waits for another process")]
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "gave up waiting: {what}");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// How long `work` took.
#[expect(clippy::disallowed_methods, reason = "the one stopwatch of these tests")]
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let result = work();
    (result, begun.elapsed())
}

/// The program with these arguments, without any setting of the environment.
pub(crate) fn kafold(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kafold"));
    command.current_dir(folder).args(args).stdin(Stdio::null());
    for name in ["KAFOLD_LOG", "KAFOLD_DATABASE", "RUST_LOG"] {
        command.env_remove(name);
    }
    command
}

/// How the program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs the program to its end.
pub(crate) fn run(folder: &Path, args: &[&str]) -> Ended {
    ended(kafold(folder, args).output().expect("the program starts"))
}

pub(crate) fn ended(output: Output) -> Ended {
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let ended = Ended {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    };
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    ended
}

impl Ended {
    /// All is well, and nothing is said on standard error.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    /// The same, and the output is one JSON document.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// It ended with this code and a sentence on standard error that has all of the words.
    #[track_caller]
    pub(crate) fn says(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {self:?}");
        }
    }

    /// [`Ended::says`], with nothing on standard output.
    #[track_caller]
    pub(crate) fn only_says(&self, code: i32, words: &[&str]) {
        self.says(code, words);
        assert!(self.stderr.starts_with("kafold: "), "{self:?}");
        assert_eq!(self.stdout, "");
    }
}

/// Ends the process when the test is over.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Running {
    pub(crate) fn interrupt(&self) {
        let pid = self.0.id().to_string();
        let sent = Command::new("kill").args(["-INT", &pid]).status().expect("kill starts");
        assert!(sent.success(), "the program is gone");
    }
}

/// A name that no other test of any run has; PostgreSQL's and Kafka's rules fit it.
pub(crate) fn unique_name() -> String {
    format!("cli_test_{:016x}", RandomIds.random())
}

/// An event that nobody's code has to read.
pub(crate) fn event(event_type: &str, payload: &str) -> NewEvent {
    NewEvent {
        event_type: event_type.into(),
        payload: payload.as_bytes().into(),
        metadata: Metadata {
            event_id: RandomIds.event_id(),
            recorded_at: SystemClock.now(),
            correlation_id: Some("a request".into()),
            causation_id: None,
            trace_parent: None,
        },
    }
}

/// Appends one event; answers its version.
pub(crate) async fn append(store: &Arc<dyn EventStore>, stream: &str, payload: &str) -> Version {
    let type_name = format!("{}.changed.v1", stream.split('-').next().expect("a category"));
    append_event(store, stream, event(&type_name, payload)).await
}

/// Appends this event. Returns its version.
pub(crate) async fn append_event(
    store: &Arc<dyn EventStore>,
    stream: &str,
    event: NewEvent,
) -> Version {
    let stream: StreamId = stream.parse().expect("a stream");
    let commit = Commit::new(CommandId(RandomIds.event_id()), vec![event]);
    let commit = commit.expect("one event");
    let appended = store.append(&stream, ExpectedVersion::Any, commit).await;
    appended.unwrap_or_else(|error| panic!("{stream}: {error}")).version
}

/// A log of three streams: order-1 with three events, order-2 with one, customer-1 with one.
pub(crate) async fn fill(url: &str, database: Option<&str>) {
    let log = open(url, database).await;
    let store = log.store();
    for (stream, payload) in [
        ("order-1", r#"{"step":1}"#),
        ("order-2", r#"{"step":1,"big":12345678901234567890123}"#),
        ("order-1", r#"{"step":2}"#),
        ("customer-1", r#"{"name":"Ann"}"#),
        ("order-1", r#"{"step":3}"#),
    ] {
        append(&store, stream, payload).await;
    }
    log.close().await;
}

/// The log as a service has it, ready.
pub(crate) async fn open(url: &str, database: Option<&str>) -> Log {
    let mut options = LogOptions::new(url);
    if let Some(url) = database {
        let database = Database::open(url, Mode::Migrate).await.expect("the database");
        options = options.index(&database);
    }
    let log = options.open().await.expect("the log");
    let deadline = SystemClock.instant() + PATIENCE;
    while log.health() != Health::Ready {
        assert!(SystemClock.instant() < deadline, "the log is not ready: {:?}", log.health());
        SystemClock.sleep(POLL_INTERVAL).await;
    }
    log
}

/// Kafka and PostgreSQL, when both are there.
pub(crate) fn servers() -> Option<(String, String)> {
    static TOLD: Once = Once::new();
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let found = variable("KAFOLD_TEST_KAFKA").zip(variable("KAFOLD_TEST_POSTGRES"));
    if found.is_none() {
        let all = variable("KAFOLD_TEST_REQUIRE_ALL").is_some();
        assert!(!all, "KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers");
        TOLD.call_once(|| {
            // To the stream itself: what a passing test prints is not shown.
            let said = writeln!(
                std::io::stderr(),
                "skipped on Kafka and PostgreSQL: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no \
                 servers (dev/test starts them)"
            );
            said.expect("standard error is open");
        });
    }
    found
}

/// A database of the test's own.
pub(crate) async fn create_database(server: &str) -> String {
    let name = unique_name();
    let mut connection = PgConnection::connect(server).await.expect("connect to PostgreSQL");
    let statement = AssertSqlSafe(format!("CREATE DATABASE {name}"));
    query(statement).execute(&mut connection).await.expect("create a database");
    let (server, _) = server.rsplit_once('/').expect("the URL names a database");
    format!("{server}/{name}")
}

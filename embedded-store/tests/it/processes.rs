//! Several processes on one file, and one that is killed. A test runs this very program again, told
//! by the environment to be the other process.

use crate::common;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use kafold_core::store::SourceMessage;
use kafold_core::testing::{commit_of, exact, new_command, read_all, versions};
use kafold_core::{
    AppendError, EventSource, EventStore, ExpectedVersion, Partition, RecordedEvent, StreamId,
};

use common::{LogFolder, database, source_on, store_on};

const FILE: &str = "KAFOLD_TEST_FILE";
const COUNT: &str = "KAFOLD_TEST_COUNT";
const STREAMS: usize = 5;
/// How long another process may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn shared_streams() -> Vec<StreamId> {
    (0..STREAMS).map(|n| format!("shared-{n}").parse().expect("a stream id")).collect()
}

/// The other process; not a test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_process() {
    let (Ok(file), Ok(count)) = (std::env::var(FILE), std::env::var(COUNT)) else { return };
    append_and_print(Path::new(&file), count.parse().expect("a number")).await;
}

/// Appends commits of two events from eight callers; prints the id of each once acknowledged.
async fn append_and_print(file: &Path, count: usize) {
    let store = store_on(&database(file).await).await;
    let streams = shared_streams();
    let callers = (0..8).map(|caller| {
        let (store, streams) = (&store, &streams);
        async move {
            for n in 0..count {
                let (stream, id) = (&streams[(caller + n) % STREAMS], new_command());
                let appended = store.append(stream, ExpectedVersion::Any, commit_of(id, 2));
                let appended = appended.await.expect("any version will do");
                let mut out = std::io::stdout().lock();
                writeln!(out, "\nappended {id} {}", appended.version).expect("prints");
                out.flush().expect("prints");
            }
        }
    });
    join_all(callers).await;
}

fn start(file: &Path, count: usize) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "processes::other_process", "--nocapture"])
        .env(FILE, file)
        .env(COUNT, count.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts")
}

/// The command ids that the process says were acknowledged, as it says them.
fn acknowledged(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let output = BufReader::new(child.stdout.take().expect("piped"));
    // A line that was cut short by the kill was not said.
    let said = |line: String| {
        let mut words = line.split(' ').map(str::to_owned);
        (words.next()? == "appended").then_some(())?;
        let (id, _version) = (words.next()?, words.next()?);
        Some(id)
    };
    output.lines().map_while(Result::ok).filter_map(said)
}

/// Everything in the log, read as a stranger would, checked to be whole.
async fn whole_log(folder: &LogFolder) -> Vec<RecordedEvent> {
    let database = database(&folder.file()).await;
    let store = store_on(&database).await;
    let mut all = Vec::new();
    for stream in shared_streams() {
        let events = read_all(&store, &stream).await;
        assert_eq!(versions(&events), (1..=events.len() as u64).collect::<Vec<_>>());
        assert_eq!(events.len() % 2, 0, "commits are whole");
        all.extend(events);
    }
    all.sort_by_key(|event| event.position);
    let offsets: Vec<_> = all.iter().map(|event| event.position.offset.0).collect();
    assert_eq!(offsets, (0..all.len() as u64).collect::<Vec<_>>(), "offsets are gapless");
    for pair in all.chunks(2) {
        assert_eq!(pair[0].command_id, pair[1].command_id, "commits are not interleaved");
    }
    all
}

fn commands(events: &[RecordedEvent]) -> HashSet<String> {
    events.iter().map(|event| event.command_id.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_on_one_file_lose_and_double_nothing() {
    const COUNT: usize = 25;
    let folder = LogFolder::new();
    database(&folder.file()).await;
    let mut children = [start(&folder.file(), COUNT), start(&folder.file(), COUNT)];
    let acknowledged: Vec<_> = children.iter_mut().flat_map(acknowledged).collect();
    for child in &mut children {
        assert!(child.wait().expect("ends").success());
    }
    assert_eq!(acknowledged.len(), 2 * 8 * COUNT);
    let log = whole_log(&folder).await;
    assert_eq!(log.len(), 2 * acknowledged.len());
    assert_eq!(commands(&log), acknowledged.into_iter().collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_processes_that_expect_one_version_one_succeeds() {
    const ROUNDS: u64 = 40;
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let store = store_on(&database).await;
    // The other process moves the streams all the time; this one appends at exact versions.
    let mut child = start(&folder.file(), 30);
    let stream = &shared_streams()[0];
    let (mut mine, mut version) = (HashSet::new(), 0);
    while (mine.len() as u64) < ROUNDS {
        let id = new_command();
        match store.append(stream, exact(version), commit_of(id, 2)).await {
            Ok(appended) => {
                assert_eq!(appended.version.0, version + 2);
                mine.insert(id.to_string());
                version = appended.version.0;
            }
            Err(AppendError::Conflict { actual, .. }) => version = actual.0,
            Err(other) => panic!("{other:?}"),
        }
    }
    let theirs: HashSet<_> = acknowledged(&mut child).collect();
    assert!(child.wait().expect("ends").success());
    let log = commands(&whole_log(&folder).await);
    assert_eq!(log, mine.union(&theirs).cloned().collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_process_acknowledged_is_there() {
    let folder = LogFolder::new();
    database(&folder.file()).await;
    for acknowledged_before_kill in [1, 100, 300] {
        let before = commands(&whole_log(&folder).await);
        let mut child = start(&folder.file(), usize::MAX);
        let mut said = acknowledged(&mut child);
        let mut acknowledged: HashSet<_> = said.by_ref().take(acknowledged_before_kill).collect();
        child.kill().expect("is running");
        // What it said until it died counts as well.
        acknowledged.extend(said);
        child.wait().expect("ends");
        assert!(acknowledged.len() >= acknowledged_before_kill);
        let log = commands(&whole_log(&folder).await);
        let lost: Vec<_> = before.union(&acknowledged).filter(|id| !log.contains(*id)).collect();
        assert!(lost.is_empty(), "lost {lost:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_commits_of_another_process() {
    let folder = LogFolder::new();
    let source = source_on(&database(&folder.file()).await).await;
    let mut reader = source.subscribe("reader", None, 10).await.expect("subscribes");
    reader.next().await.expect("is assigned");
    reader.start(Partition(0), None).await.expect("starts");
    let mut child = start(&folder.file(), 5);
    let mut seen = Vec::new();
    while seen.len() < 2 * 8 * 5 {
        let message = tokio::time::timeout(PATIENCE, reader.next()).await.expect("in time");
        let SourceMessage::Batch(batch) = message.expect("reads") else { continue };
        seen.extend(batch.events);
    }
    assert_eq!(commands(&seen), acknowledged(&mut child).collect());
    assert!(child.wait().expect("ends").success());
}

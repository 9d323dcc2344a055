//! Random damage to the tables of a log and its index: no stream gets a version twice or a gap, no
//! answer changes, and every reported damage names the table and the remedy.

mod tables;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use fastrand::Rng;
use futures_util::TryStreamExt;
use futures_util::future::join_all;
use kafold::clock::{RandomIds, SystemClock};
use kafold::mutant::{self, Mutant};
use kafold::projections::SqlIndex;
use kafold::store::Health;
use kafold::testing::{commit, eventually, exact};
use kafold::{
    AppendError, Clock, CommandId, Database, EventStore, ExpectedVersion, IdGenerator, Log,
    LogOptions, Mode, ReadError, StreamId, Version, embedded, open_log,
};
use tables::Tables;

/// Seeds of the campaign on a log in a SQLite file.
const EMBEDDED_SEEDS: u64 = 10_000;
/// Seeds of the campaign on a log on Kafka with its index in PostgreSQL.
const KAFKA_SEEDS: u64 = 200;
/// Logs damaged by these seeds, side by side.
const KAFKA_LOGS: u64 = 8;
/// Deadline of a partition for being ready or reporting a reason.
const PATIENCE: Duration = Duration::from_secs(30);
const REMEDY: &str = "kafold index rebuild";

/// The acknowledged commands: the command of each version.
#[derive(Clone, Default)]
struct Truth {
    streams: BTreeMap<StreamId, Vec<CommandId>>,
    /// The damage done to the tables, for messages.
    damage: String,
    /// A store that is not ready may be reading its log again, and has the beginning of a stream.
    reads_again: bool,
}

fn stream(nth: usize) -> StreamId {
    StreamId::new("order", &nth.to_string()).expect("valid")
}

impl Truth {
    fn commands(&self, stream: &StreamId) -> &[CommandId] {
        self.streams.get(stream).map_or(&[], Vec::as_slice)
    }

    async fn append(
        &mut self,
        store: &dyn EventStore,
        stream: &StreamId,
        expected: ExpectedVersion,
    ) -> Result<(), AppendError> {
        let commit = commit(1);
        let command_id = commit.command_id();
        let appended = store.append(stream, expected, commit).await?;
        let known = self.streams.entry(stream.clone()).or_default();
        let next = known.len() as u64 + 1;
        assert_eq!(
            appended.version,
            Version(next),
            "{stream} has a version twice, or a gap; {}",
            self.damage
        );
        known.push(command_id);
        Ok(())
    }

    /// Compares a readable stream with the acknowledged commands.
    async fn check(&self, store: &dyn EventStore, stream: &StreamId) -> Result<Version, ReadError> {
        let may_be_short = self.reads_again && store.health() != Health::Ready;
        let events: Vec<_> = store.read(stream, Version::EMPTY).try_collect().await?;
        let found: Vec<_> = events.iter().map(|event| event.command_id).collect();
        if may_be_short && self.commands(stream).starts_with(&found) {
            return Ok(Version(found.len() as u64));
        }
        assert_eq!(
            found,
            self.commands(stream),
            "the answer for {stream} has changed; {}",
            self.damage
        );
        Ok(Version(found.len() as u64))
    }
}

/// Fills a log with a few events in two parts. Returns the state of the tables between the parts
/// too.
async fn fill(store: &dyn EventStore, database: &Database, random: &mut Rng) -> (Truth, Tables) {
    let mut truth = Truth::default();
    for _ in 0..6 {
        append_somewhere(&mut truth, store, random).await;
    }
    let older = Tables::read(database).await;
    for _ in 0..6 {
        append_somewhere(&mut truth, store, random).await;
    }
    (truth, older)
}

async fn append_somewhere(truth: &mut Truth, store: &dyn EventStore, random: &mut Rng) {
    let stream = stream(random.usize(0..4));
    let version = truth.commands(&stream).len() as u64;
    truth.append(store, &stream, exact(version)).await.expect("nothing is damaged yet");
}

/// Appends to every stream with one of the three expected versions. Returns the reasons for refused
/// appends.
async fn probe(truth: &mut Truth, store: &dyn EventStore, random: &mut Rng) -> Vec<String> {
    let mut refusals = Vec::new();
    for nth in 0..5 {
        let stream = stream(nth);
        let expected = match random.u32(0..3) {
            0 => ExpectedVersion::Any,
            1 => ExpectedVersion::NoStream,
            _ => match truth.check(store, &stream).await {
                Ok(version) => exact(version.0),
                Err(error) => {
                    refusals.push(words(&error));
                    continue;
                }
            },
        };
        match truth.append(store, &stream, expected).await {
            Ok(()) => {}
            // `NoStream` conflicts with an existing stream.
            Err(AppendError::Conflict { .. }) if expected == ExpectedVersion::NoStream => {}
            Err(error) => refusals.push(words(&error)),
        }
    }
    refusals
}

fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn reasons(store: &dyn EventStore) -> Vec<String> {
    match store.health() {
        Health::Ready => Vec::new(),
        Health::NotReady(reasons) => reasons,
    }
}

fn is_told(reasons: &[String]) -> bool {
    reasons.iter().any(|reason| reason.contains("kafold_") && reason.contains(REMEDY))
}

/// Creates a folder in memory where possible: no test here relies on the disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::tempdir_in(folder).expect("a folder")
}

/// Damages one file once.
async fn damage_a_file(template: &Path, seed: u64) {
    let folder = folder();
    let file = folder.path().join("log.db");
    std::fs::copy(template, &file).expect("copied");
    let url = format!("sqlite://{}", file.display());
    let mut random = Rng::with_seed(seed);
    let log = open_log(&url).await.expect("opens");
    let database = log.database().expect("its own file").clone();
    let (mut truth, older) = fill(&*log.store(), &database, &mut random).await;
    let before = Tables::read(&database).await;
    let mut damaged = before.clone();
    let what = damaged.damage(&mut random, &older);
    // With only older rows the file equals a log restored from a copy, which no check detects.
    let is_older_log = damaged.log() == older.log();
    let is_running = random.bool();
    if (is_older_log && !is_running) || !damaged.write(&database, &before).await {
        return log.close().await;
    }
    let context = format!("seed {seed}, running: {is_running}: {what}");
    truth.damage.clone_from(&context);
    let log = match is_running {
        true => log,
        false => {
            log.close().await;
            match open_log(&url).await {
                Ok(log) => log,
                Err(error) => {
                    let told = words(&error);
                    assert!(told.contains("kafold_"), "{context}: {told}");
                    return;
                }
            }
        }
    };
    let probing = async { probe(&mut truth, &*log.store(), &mut random).await };
    let refusals = probing.await;
    if !refusals.is_empty() {
        assert!(is_told(&refusals), "{context}: {refusals:?}");
        assert!(is_told(&reasons(&*log.store())), "{context}: the store is ready");
    }
    log.close().await;
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Creates a file with all tables and without events: creating a new file takes longer than a seed.
fn template(folder: &Path) -> std::path::PathBuf {
    let file = folder.join("template.db");
    runtime().block_on(async {
        let url = format!("sqlite://{}", file.display());
        Database::open(&url, Mode::Migrate).await.expect("opens").close().await;
    });
    file
}

/// Runs the seeds in two threads, half of the seeds each.
#[test]
fn a_damaged_file_gets_no_version_twice_and_is_told_by_name() {
    let folder = folder();
    let template = template(folder.path());
    std::thread::scope(|scope| {
        for half in 0..2 {
            let template = &template;
            scope.spawn(move || {
                for seed in (half..EMBEDDED_SEEDS).step_by(2) {
                    runtime().block_on(damage_a_file(template, seed));
                }
            });
        }
    });
}

#[test]
fn a_store_that_believes_its_tables_is_found() {
    let folder = folder();
    let template = template(folder.path());
    let found = std::panic::catch_unwind(|| {
        mutant::with(Some(Mutant::IndexBelieved), || {
            (0..300).for_each(|seed| runtime().block_on(damage_a_file(&template, seed)));
        });
    });
    assert!(found.is_err(), "IndexBelieved is not found");
}

#[tokio::test]
async fn the_heads_of_a_file_are_made_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}", folder.path().join("log.db").display());
    let log = open_log(&url).await.expect("opens");
    let database = log.database().expect("its own file").clone();
    let (mut truth, _) = fill(&*log.store(), &database, &mut Rng::with_seed(1)).await;
    let before = Tables::read(&database).await;
    let Database::Sqlite(file) = &database else { unreachable!("the URL names SQLite") };
    let mut damaged = before.clone();
    damaged.clear("kafold_stream");
    assert!(damaged.write(&database, &before).await);
    let (known, _) = truth.streams.first_key_value().expect("something was appended");
    let refused = truth.check(&*log.store(), known).await.expect_err("its head is gone");
    assert!(words(&refused).contains("kafold_stream"), "{refused}");
    assert_eq!(embedded::rebuild_heads(file).await.expect("the events are whole"), 12);
    assert!(Tables::read(&database).await == before, "the heads are what they were");
    eventually("the store has noticed", async || log.health() == Health::Ready).await;
    truth.append(&*log.store(), &stream(9), ExpectedVersion::NoStream).await.expect("is new");
    log.close().await;
}

/// Opens the log on Kafka with its index in PostgreSQL.
async fn open_kafka(url: &str, database: &Database) -> Log {
    LogOptions::new(url).index(database).open().await.expect("opens")
}

async fn ready_or_told(store: &dyn EventStore) -> Vec<String> {
    let clock = SystemClock;
    let deadline = clock.instant() + PATIENCE;
    loop {
        let reasons = reasons(store);
        if reasons.is_empty() || is_told(&reasons) {
            return reasons;
        }
        assert!(clock.instant() < deadline, "neither ready nor told: {reasons:?}");
        clock.sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until every stream is complete and the store is ready, and rebuilds an index reported as
/// damaged. Returns `true` after a report.
async fn mend(truth: &Truth, store: &dyn EventStore, database: &Database, context: &str) -> bool {
    let clock = SystemClock;
    let mut deadline = clock.instant() + PATIENCE;
    let mut was_told = false;
    loop {
        let mut refusals = reasons(store);
        let is_told_of = |partition| {
            let told = format!("partition {partition}: its index");
            refusals.iter().any(|reason| reason.starts_with(&told))
        };
        let told = [0, 1].map(is_told_of);
        for nth in 0..5 {
            let read = truth.check(store, &stream(nth)).await;
            refusals.extend(read.err().map(|error| words(&error)));
        }
        for (partition, is_told) in told.into_iter().enumerate() {
            let waits = format!("the index of partition {partition} is not checked yet");
            let waits = refusals.iter().any(|refusal| refusal.contains(&waits));
            assert!(!(is_told && waits), "{context}: reads wait for a damaged index: {refusals:?}");
        }
        if refusals.is_empty() {
            return was_told;
        }
        if is_told(&refusals) && !was_told {
            (was_told, deadline) = (true, clock.instant() + PATIENCE);
            SqlIndex::new(database.clone()).clear(None).await.expect("cleared");
        }
        assert!(clock.instant() < deadline, "{context}: neither whole nor told: {refusals:?}");
        clock.sleep(Duration::from_millis(20)).await;
    }
}

/// Returns the URLs of Kafka and PostgreSQL, if both are set.
fn servers() -> Option<(String, String)> {
    let servers =
        std::env::var("KAFOLD_TEST_KAFKA").ok().zip(std::env::var("KAFOLD_TEST_POSTGRES").ok());
    if servers.is_none() {
        assert!(std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none(), "servers are missing");
        eprintln!("skipped: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers");
    }
    servers
}

/// A stream with its head in another bucket and without events looks like a new stream.
async fn hidden_stream_is_told(url: &str, database: Option<Database>) {
    let open = async || match &database {
        Some(database) => LogOptions::new(url).index(database).open().await,
        None => open_log(url).await,
    };
    let log = open().await.expect("opens");
    eventually("it is ready", async || log.health() == Health::Ready).await;
    let tables = database.clone().or_else(|| log.database().cloned()).expect("a database");
    let (mut truth, _) = fill(&*log.store(), &tables, &mut Rng::with_seed(1)).await;
    // The index is fed behind the write.
    eventually("the index has all events", async || {
        Tables::read(&tables).await.rows("kafold_event") == 12
    })
    .await;
    let before = Tables::read(&tables).await;
    let mut damaged = before.clone();
    let hidden: StreamId = damaged.hide_stream().parse().expect("a stream");
    if database.is_some() {
        log.close().await;
        assert!(damaged.write(&tables, &before).await);
    } else {
        assert!(damaged.write(&tables, &before).await);
        log.close().await;
    }
    let log = match open().await {
        Ok(log) => log,
        Err(error) => return assert!(is_told(&[words(&error)]), "{}", words(&error)),
    };
    ready_or_told(&*log.store()).await;
    let refused = truth.append(&*log.store(), &hidden, ExpectedVersion::NoStream).await;
    let refused = words(&refused.expect_err("the stream exists"));
    assert!(is_told(std::slice::from_ref(&refused)), "{refused}");
    if let Some(database) = &database {
        mend(&truth, &*log.store(), database, "a hidden stream").await;
    }
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_head_is_in_another_bucket_is_no_new_stream() {
    let folder = folder();
    let file = folder.path().join("log.db");
    hidden_stream_is_told(&format!("sqlite://{}", file.display()), None).await;
    let Some((brokers, postgres)) = servers() else { return };
    let name = format!("damage{}", RandomIds.event_id().simple());
    let url = format!("kafka://{brokers}/{name}?partitions=1&replication=1");
    let database = database_of_its_own(&postgres, &name).await;
    hidden_stream_is_told(&url, Some(database)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_gets_no_version_twice_and_is_told_by_name_or_heals() {
    let Some((brokers, postgres)) = servers() else { return };
    // A seed mostly waits, so several logs run side by side.
    let logs = (0..KAFKA_LOGS).map(|nth| damage_a_log(&brokers, &postgres, nth));
    let told: u64 = join_all(logs).await.into_iter().sum();
    println!("{KAFKA_SEEDS} seeds, {told} of them told");
    assert!(told > KAFKA_SEEDS / 10, "{told} of {KAFKA_SEEDS} were told");
}

/// Damages the index of one log repeatedly. Returns the number of reports.
async fn damage_a_log(brokers: &str, postgres: &str, nth: u64) -> u64 {
    let name = format!("damage{}", RandomIds.event_id().simple());
    let url = format!("kafka://{brokers}/{name}?partitions=2&replication=1");
    let database = database_of_its_own(postgres, &name).await;
    let mut log = open_kafka(&url, &database).await;
    let mut random = Rng::with_seed(nth);
    eventually("it is ready", async || log.health() == Health::Ready).await;
    let (mut truth, mut older) = fill(&*log.store(), &database, &mut random).await;
    truth.reads_again = true;
    let mut told = 0;
    for seed in 0..KAFKA_SEEDS / KAFKA_LOGS {
        let before = Tables::read(&database).await;
        let mut damaged = before.clone();
        let what = damaged.damage(&mut random, &older);
        older = before.clone();
        // A stop and a start take seconds.
        let is_running = seed % 8 != 0;
        let context = format!("log {nth}, seed {seed}, running: {is_running}: {what}");
        truth.damage.clone_from(&context);
        if !is_running {
            log.clone().close().await;
        }
        let is_damaged = damaged.write(&database, &before).await;
        if !is_running {
            log = match LogOptions::new(&url).index(&database).open().await {
                Ok(log) => log,
                Err(error) => {
                    let refused = words(&error);
                    assert!(is_told(std::slice::from_ref(&refused)), "{context}: {refused}");
                    told += 1;
                    SqlIndex::new(database.clone()).clear(None).await.expect("cleared");
                    open_kafka(&url, &database).await
                }
            };
        }
        let store = log.store();
        ready_or_told(&*store).await;
        if is_damaged {
            probe(&mut truth, &*store, &mut random).await;
        }
        told += u64::from(mend(&truth, &*store, &database, &context).await);
        append_somewhere(&mut truth, &*store, &mut random).await;
    }
    log.close().await;
    told
}

pub(crate) async fn database_of_its_own(server: &str, name: &str) -> Database {
    use kafold::projections::sqlx::{self, AssertSqlSafe, Connection, PgConnection};
    let mut admin = PgConnection::connect(server).await.expect("the server answers");
    let create = format!("CREATE DATABASE {name}");
    sqlx::query(AssertSqlSafe(create)).execute(&mut admin).await.expect("created");
    let (place, _) = server.rsplit_once('/').expect("a URL");
    Database::open(&format!("{place}/{name}"), Mode::Migrate).await.expect("opens")
}

//! What happens when the file cannot be written, or is not the one it was.

use crate::common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::future::{join, join_all};
use kafold_core::clock::SystemClock;
use kafold_core::store::{Append, Cursor, Health, SourceMessage, Subscription, Ticket};
use kafold_core::testing::{
    commit, commit_of, eventually, exact, new_command, new_stream, read_all, read_gapless, submit,
};
use kafold_core::{
    AppendError, Clock, EventSource, EventStore, ExpectedVersion, Partition, ReadError,
};
use kafold_embedded_store::{EmbeddedConfig, EmbeddedSource, EmbeddedStore};
use kafold_migrations::{Database, SqliteDatabase};
use sqlx::{Connection, SqliteConnection};

use common::{LogFolder, database, source_on, store_on};

/// Runs statements on the writer's connection.
async fn execute(database: &SqliteDatabase, statements: &'static str) {
    let mut write = database.write().await.expect("a turn");
    sqlx::raw_sql(statements).execute(&mut *write).await.expect("executes");
    write.commit().await.expect("commits");
}

fn assert_unavailable<T: std::fmt::Debug>(outcome: &Result<T, AppendError>, why: &str) {
    match outcome {
        Err(error @ AppendError::Unavailable { .. }) => {
            assert!(error.to_string().contains(why), "{error}");
        }
        other => panic!("expected Unavailable, found {other:?}"),
    }
}

async fn is_ready(store: &EmbeddedStore) -> bool {
    store.health() == Health::Ready
}

#[tokio::test]
async fn a_full_disk_is_unavailable_and_the_store_goes_on_when_there_is_room() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream) = (store_on(&database).await, new_stream());
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    // SQLite refuses to grow the file beyond this as it does when the disk is full.
    execute(&database, "PRAGMA max_page_count = 1").await;
    let big = commit(2_000);
    let refused = store.append(&stream, exact(1), big.clone()).await;
    assert_unavailable(&refused, "the disk of the database file is full");
    assert!(matches!(store.health(), Health::NotReady(why) if why[0].contains("full")));
    read_gapless(&store, &stream, 1).await;

    execute(&database, "PRAGMA max_page_count = 1000000").await;
    eventually("the store notices by itself", async || is_ready(&store).await).await;
    let appended = store.append(&stream, exact(1), big).await.expect("there is room");
    assert!(!appended.duplicate, "nothing of the refused attempt was written");
    read_gapless(&store, &stream, 2_001).await;
}

#[tokio::test]
async fn a_commit_that_fails_is_settled_by_reading() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream, id) = (store_on(&database).await, new_stream(), new_command());
    // A deferred constraint is checked by COMMIT and by nothing before.
    execute(
        &database,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY);
         CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
         CREATE TRIGGER fail_commit AFTER INSERT ON kafold_event
         BEGIN INSERT INTO child VALUES (1); END;",
    )
    .await;
    let (_, first) = submit(&store, &stream, exact(0), commit_of(id, 2), None);
    let (_, conflict) = submit(&store, &stream, exact(0), commit(1), None);
    assert_unavailable(&first.await, "FOREIGN KEY");
    // It conflicted with events that never came to be.
    let conflict = conflict.await;
    assert!(matches!(conflict, Err(AppendError::NotAppended { .. })), "{conflict:?}");
    read_gapless(&store, &stream, 0).await;

    execute(&database, "DROP TRIGGER fail_commit").await;
    let again = store.append(&stream, exact(0), commit_of(id, 2)).await.expect("is new");
    assert!(!again.duplicate);
}

#[tokio::test]
async fn a_failed_commit_that_cannot_be_settled_is_unknown_until_sent_again() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream, id) = (store_on(&database).await, new_stream(), new_command());
    execute(
        &database,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY);
         CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
         CREATE TRIGGER fail_commit AFTER INSERT ON kafold_event
         BEGIN INSERT INTO child VALUES (1); END;
         CREATE TRIGGER fail_proof BEFORE UPDATE ON kafold_log
         BEGIN SELECT RAISE(ABORT, 'no proof'); END;",
    )
    .await;
    let unknown = store.append(&stream, exact(0), commit_of(id, 2)).await;
    match unknown {
        Err(AppendError::OutcomeUnknown { command_id }) => assert_eq!(command_id, id),
        other => panic!("expected OutcomeUnknown, found {other:?}"),
    }
    assert!(!is_ready(&store).await);
    execute(&database, "DROP TRIGGER fail_commit; DROP TRIGGER fail_proof").await;
    eventually("the store notices by itself", async || is_ready(&store).await).await;
    let again = store.append(&stream, exact(0), commit_of(id, 2)).await.expect("settles");
    assert_eq!(again.version.0, 2);
    read_gapless(&store, &stream, 2).await;
}

#[tokio::test]
async fn a_conflict_does_not_fail_its_group_and_a_group_is_one_commit() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let store = store_on(&database).await;
    let streams: Vec<_> = (0..50).map(|_| new_stream()).collect();
    let changes = database.changes();
    // While another has the turn, submissions gather.
    let turn = database.write().await.expect("a turn");
    let outcomes: Vec<_> = streams
        .iter()
        .zip(0..)
        .map(|(stream, n)| submit(&store, stream, exact(n % 2), commit(1), None).1)
        .collect();
    turn.commit().await.expect("commits");
    for (outcome, n) in join_all(outcomes).await.into_iter().zip(0..) {
        assert_eq!(outcome.is_ok(), n % 2 == 0, "{n}: {outcome:?}");
    }
    assert!(*changes.borrow() <= 2, "at most a first one alone and the others together");
}

#[tokio::test]
async fn many_callers_share_transactions() {
    const CALLERS: u64 = 64;
    const APPENDS: u64 = 20;
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, changes) = (store_on(&database).await, database.changes());
    let callers = (0..CALLERS).map(|_| async {
        let stream = new_stream();
        for version in 0..APPENDS {
            store.append(&stream, exact(version), commit(1)).await.expect("nobody else writes");
        }
    });
    join_all(callers).await;
    let transactions = *changes.borrow();
    assert!(transactions <= CALLERS * APPENDS / 8, "{transactions} transactions");
}

#[tokio::test]
async fn a_deadline_that_passes_while_the_file_is_locked_writes_nothing() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream) = (store_on(&database).await, new_stream());
    let turn = database.write().await.expect("a turn");
    let late = store.submit(Append {
        stream: stream.clone(),
        expected: exact(0),
        commit: commit(1),
        ticket: Ticket::next(),
        after: None,
        deadline: Some(SystemClock.instant() + Duration::from_millis(30)),
    });
    assert_unavailable(&late.await, "deadline passed");
    drop(turn);
    // The one behind it is served, so its turn has come.
    store.append(&stream, exact(0), commit(1)).await.expect("nothing was written");
    read_gapless(&store, &stream, 1).await;
}

#[tokio::test]
async fn a_lock_that_another_process_keeps_is_named() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream) = (store_on(&database).await, new_stream());
    // A connection of no handle stands for another process.
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.file());
    let mut other = SqliteConnection::connect_with(&options).await.expect("connects");
    sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.expect("locks");
    let refused = store.append(&stream, exact(0), commit(1)).await;
    assert_unavailable(&refused, "another process holds the database file");
    assert!(read_all(&store, &stream).await.is_empty(), "reading goes on");
    sqlx::query("ROLLBACK").execute(&mut other).await.expect("unlocks");
    store.append(&stream, exact(0), commit(1)).await.expect("is free");
    assert!(is_ready(&store).await);
}

#[tokio::test]
async fn a_full_queue_is_unavailable_at_once() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let config = EmbeddedConfig { queue_submissions_max: 4, ..EmbeddedConfig::default() };
    let store = EmbeddedStore::open(database.clone(), config, Arc::new(SystemClock)).await;
    let (store, stream) = (store.expect("opens"), new_stream());
    let turn = database.write().await.expect("a turn");
    let outcomes: Vec<_> =
        (0..20).map(|_| submit(&store, &stream, ExpectedVersion::Any, commit(1), None).1).collect();
    drop(turn);
    let outcomes = join_all(outcomes).await;
    let appended = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(appended, 4);
    for refused in outcomes.iter().filter(|outcome| outcome.is_err()) {
        assert_unavailable(refused, "too many submissions");
    }
    read_gapless(&store, &stream, 4).await;
}

#[tokio::test]
async fn a_closed_store_settles_what_was_submitted_and_takes_no_more() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream) = (store_on(&database).await, new_stream());
    let outcomes: Vec<_> =
        (0..20).map(|_| submit(&store, &stream, ExpectedVersion::Any, commit(1), None).1).collect();
    store.close().await;
    for outcome in join_all(outcomes).await {
        outcome.expect("settled");
    }
    assert_unavailable(&store.append(&stream, exact(20), commit(1)).await, "closed");
    store.close().await;
    read_gapless(&store, &stream, 20).await;
}

#[tokio::test]
async fn a_file_that_indexes_another_log_is_refused() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    execute(&database, "INSERT INTO kafold_partition VALUES (0, 17, '{}', 0, 0, 0, 0)").await;
    let clock = Arc::new(SystemClock);
    let store = EmbeddedStore::open(database.clone(), EmbeddedConfig::default(), clock.clone());
    let refused = store.await.err().expect("refused");
    assert!(refused.to_string().contains("index of another log"), "{refused}");
    let refused = EmbeddedSource::open(database, clock).await.err().expect("refused");
    assert!(matches!(refused, ReadError::Diverged { .. }), "{refused}");
}

/// A reader of its own that has been assigned the partition.
async fn assigned(source: &EmbeddedSource) -> Box<dyn Subscription> {
    let mut reader = source.subscribe("reader", None, 100).await.expect("subscribes");
    let message = reader.next().await.expect("is assigned");
    assert_eq!(message, SourceMessage::Assigned(vec![Partition(0)]));
    reader
}

/// The cursor behind everything that is in the log.
async fn cursor_at_end(source: &EmbeddedSource) -> Cursor {
    let mut reader = assigned(source).await;
    reader.start(Partition(0), None).await.expect("starts");
    let SourceMessage::Batch(batch) = reader.next().await.expect("reads") else {
        panic!("nothing else can be told")
    };
    assert_eq!(batch.next.next, batch.end);
    batch.next
}

async fn refusal_of(folder: &LogFolder, cursor: Cursor) -> String {
    let source = source_on(&database(&folder.file()).await).await;
    let started = assigned(&source).await.start(Partition(0), Some(cursor)).await;
    let refusal = started.expect_err("refused");
    assert!(matches!(refusal, ReadError::Diverged { .. }), "{refusal}");
    refusal.to_string()
}

/// Appends as many events, closes the file, and answers the cursor behind them.
async fn write_and_close(folder: &LogFolder, events: u64) -> Cursor {
    let database = database(&folder.file()).await;
    let store = store_on(&database).await;
    store.append(&new_stream(), exact(0), commit(events)).await.expect("is new");
    store.close().await;
    let cursor = cursor_at_end(&source_on(&database).await).await;
    drop(store);
    Database::Sqlite(database).close().await;
    cursor
}

#[tokio::test]
async fn a_recreated_or_older_file_is_noticed_and_named() {
    let folder = LogFolder::new();
    let copy = folder.path().join("copy.db");
    write_and_close(&folder, 3).await;
    std::fs::copy(folder.file(), &copy).expect("copies");
    let cursor = write_and_close(&folder, 2).await;

    std::fs::copy(&copy, folder.file()).expect("restores");
    let refusal = refusal_of(&folder, cursor.clone()).await;
    assert!(refusal.contains("stands at 5, the log ends at 3"), "{refusal}");

    // It has grown beyond the cursor since, with other events.
    write_and_close(&folder, 9).await;
    let refusal = refusal_of(&folder, cursor.clone()).await;
    assert!(refusal.contains("at offset 4"), "{refusal}");

    for file in std::fs::read_dir(folder.path()).expect("lists") {
        std::fs::remove_file(file.expect("a file").path()).expect("removes");
    }
    write_and_close(&folder, 9).await;
    let refusal = refusal_of(&folder, cursor).await;
    assert!(refusal.contains("recreated"), "{refusal}");
}

#[tokio::test]
async fn a_deleted_event_halts_the_reader_by_name() {
    let folder = LogFolder::new();
    write_and_close(&folder, 5).await;
    let database = database(&folder.file()).await;
    let delete =
        r#"DROP TRIGGER kafold_event_kept_delete; DELETE FROM kafold_event WHERE "offset" = 3"#;
    execute(&database, delete).await;
    let mut reader = assigned(&source_on(&database).await).await;
    reader.start(Partition(0), None).await.expect("starts");
    let refusal = reader.next().await.expect_err("a hole").to_string();
    assert!(refusal.contains("the event at 3 is missing"), "{refusal}");
}

/// A clock whose waits never end: whoever relies on polling waits for ever.
struct NeverWakes;

#[async_trait]
impl Clock for NeverWakes {
    fn now(&self) -> DateTime<Utc> {
        SystemClock.now()
    }

    fn instant(&self) -> Instant {
        SystemClock.instant()
    }

    async fn sleep(&self, _: Duration) {
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn a_commit_of_this_process_wakes_a_waiting_reader_without_polling() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let (store, stream) = (store_on(&database).await, new_stream());
    let source = EmbeddedSource::open(database, Arc::new(NeverWakes)).await.expect("opens");
    let mut reader = assigned(&source).await;
    reader.start(Partition(0), None).await.expect("starts");
    for version in 0..20 {
        let reading = tokio::time::timeout(Duration::from_secs(10), reader.next());
        let writing = store.append(&stream, exact(version), commit(1));
        // The reader is asked first, so it is waiting when the commit comes.
        let (read, written) = join(reading, writing).await;
        written.expect("nobody else writes");
        let read = read.expect("is woken").expect("reads");
        assert!(matches!(read, SourceMessage::Batch(batch) if batch.events.len() == 1));
    }
}

#[tokio::test]
async fn one_reader_of_a_name_has_the_partition_and_the_next_one_after_it() {
    let folder = LogFolder::new();
    let database = database(&folder.file()).await;
    let source = source_on(&database).await;
    let first = assigned(&source).await;
    let mut second = source.subscribe("reader", None, 100).await.expect("subscribes");
    let waited = tokio::time::timeout(Duration::from_millis(20), second.next()).await;
    assert!(waited.is_err(), "the first has it");
    source
        .subscribe("other", None, 100)
        .await
        .expect("subscribes")
        .next()
        .await
        .expect("is assigned");
    drop(first);
    let told = second.next().await.expect("is assigned");
    assert_eq!(told, SourceMessage::Assigned(vec![Partition(0)]));
}

//! The stream index and the snapshots, on both databases.

use crate::common;

use std::sync::Arc;

use chrono::DateTime;
use common::{Dice, TestDatabase};
use kafold_core::clock::RandomIds;
use kafold_core::digest::BucketDigests;
use kafold_core::index::{Advanced, IndexBatch, IndexLoad, SavedDigests};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::testing::advance;
use kafold_core::{
    CommandId, IdGenerator, Metadata, Offset, Partition, Position, RecordedEvent, Snapshot,
    SnapshotStore, StreamId, StreamIndex, Version,
};
use kafold_projections::{SqlIndex, SqlSnapshots};

on_both!(
    what_was_indexed_is_loaded_to_the_byte,
    a_batch_beyond_the_position_is_behind_and_writes_nothing,
    a_batch_that_is_there_already_changes_nothing,
    another_event_at_the_same_version_is_diverged,
    another_event_at_the_same_offset_is_diverged,
    position_and_state_move_together_and_only_forward,
    batches_that_come_together_do_not_keep_each_other_back,
    feeders_of_many_partitions_do_not_wait_for_each_other,
    two_feeders_at_once_do_no_harm,
    a_load_and_its_position_are_of_one_snapshot,
    many_loads_answer_in_their_order,
    a_command_is_found_with_the_position,
    large_batches_are_indexed,
    saved_digests_are_kept_until_the_index_is_cleared_and_none_if_changed,
    a_stream_is_appended_to_whoever_wrote_it,
    a_newer_snapshot_replaces_an_older_one,
);

const PARTITION: Partition = Partition(3);

killed_by!(
    IndexPlainMaximum: a_batch_beyond_the_position_is_behind_and_writes_nothing on sqlite,
);

fn stream(id: &str) -> StreamId {
    StreamId::new("order", id).expect("valid")
}

fn event(id: &str, version: u64, offset: u64) -> RecordedEvent {
    let full = version.is_multiple_of(2);
    let text = |text: &str| full.then(|| text.to_owned());
    RecordedEvent {
        stream: stream(id),
        version: Version(version),
        position: Position { partition: PARTITION, offset: Offset(offset) },
        command_id: CommandId(RandomIds.event_id()),
        event_type: "order.placed.v1".into(),
        payload: format!("{{\"n\" : {version},  \"ü\":null}}\u{0}").into_bytes().into(),
        metadata: Metadata {
            event_id: RandomIds.event_id(),
            recorded_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("valid"),
            correlation_id: text("c \"1\""),
            causation_id: None,
            trace_parent: text("00-1-2-3"),
        },
    }
}

fn cursor(next: u64) -> Cursor {
    Cursor { next: Offset(next), state: format!("state {next}") }
}

fn batch(from: u64, to: u64, events: &[RecordedEvent]) -> IndexBatch {
    IndexBatch { partition: PARTITION, from: Offset(from), to: cursor(to), events: events.to_vec() }
}

fn load(id: &str, after: u64) -> IndexLoad {
    IndexLoad { partition: PARTITION, stream: stream(id), after: Version(after) }
}

fn index(database: &TestDatabase) -> SqlIndex {
    SqlIndex::new(database.database.clone())
}

async fn moved(index: &SqlIndex, batch: IndexBatch) {
    assert_eq!(advance(index, batch).await.expect("it fits"), Advanced::Moved);
}

async fn diverged(index: &SqlIndex, batch: IndexBatch) {
    is_diverged(advance(index, batch).await);
}

fn is_diverged(answer: Result<Advanced, ReadError>) {
    let Err(ReadError::Diverged { cause, .. }) = answer else { panic!("{answer:?}") };
    assert!(cause.to_string().contains("kafold index rebuild --partition"), "{cause}");
}

async fn what_was_indexed_is_loaded_to_the_byte(database: &TestDatabase) {
    let index = index(database);
    let events: Vec<_> = (1..=5).map(|n| event("a", n, n * 2)).collect();
    moved(&index, batch(0, 11, &events)).await;
    let read = index.load(&[load("a", 0)], 10).await.remove(0).expect("readable");
    assert_eq!((read.position, read.more), (Offset(11), false));
    assert_eq!(read.events, events);
    let read = index.load(&[load("a", 2)], 2).await.remove(0).expect("readable");
    assert_eq!((&read.events[..], read.more), (&events[2..4], true));
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(11))]);
}

async fn a_batch_beyond_the_position_is_behind_and_writes_nothing(database: &TestDatabase) {
    let index = index(database);
    let answer = advance(&index, batch(5, 9, &[event("a", 1, 5)])).await.expect("an answer");
    assert_eq!(answer, Advanced::Behind(None));
    moved(&index, batch(0, 3, &[])).await;
    let answer = advance(&index, batch(5, 9, &[event("a", 1, 5)])).await.expect("an answer");
    assert_eq!(answer, Advanced::Behind(Some(cursor(3))));
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_event").await, 0);
    assert_eq!(database.number("SELECT next_offset FROM kafold_partition").await, 3);
}

async fn a_batch_that_is_there_already_changes_nothing(database: &TestDatabase) {
    let index = index(database);
    let events = [event("a", 1, 0), event("a", 2, 1), event("b", 1, 2)];
    moved(&index, batch(0, 3, &events)).await;
    moved(&index, batch(0, 3, &events)).await;
    moved(&index, batch(0, 2, &events[..2])).await;
    // Partly there: the rest is added.
    let more = [events[2].clone(), event("b", 2, 3)];
    moved(&index, batch(2, 4, &more)).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_event").await, 4);
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(4))]);
}

async fn another_event_at_the_same_version_is_diverged(database: &TestDatabase) {
    let index = index(database);
    let first = event("a", 1, 0);
    moved(&index, batch(0, 1, std::slice::from_ref(&first))).await;
    diverged(&index, batch(1, 3, &[event("b", 1, 1), event("a", 1, 2)])).await;
    // Same place, another event: another log.
    diverged(&index, batch(0, 3, &[event("a", 1, 0)])).await;
    // Among many, which PostgreSQL takes by COPY.
    let mut many: Vec<_> = (1..200).map(|n| event("b", n, n)).collect();
    many.push(event("a", 1, 200));
    diverged(&index, batch(1, 201, &many)).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_event").await, 1);
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(1))]);
    many.pop();
    moved(&index, batch(1, 200, &many)).await;
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(200))]);
}

async fn another_event_at_the_same_offset_is_diverged(database: &TestDatabase) {
    let index = index(database);
    moved(&index, batch(0, 1, &[event("a", 1, 0)])).await;
    // SQLite rejects a second event at an offset; PostgreSQL has no such B-tree, and the heads show
    // the difference.
    if advance(&index, batch(0, 2, &[event("b", 1, 0)])).await.is_ok() {
        let heads = index.heads(PARTITION).await.expect("readable");
        let told = heads
            .check(PARTITION, index.heads_table())
            .expect_err("one event more than its place says");
        assert!(told.to_string().contains("kafold_event"), "{told}");
    }
}

async fn position_and_state_move_together_and_only_forward(database: &TestDatabase) {
    let index = index(database);
    moved(&index, batch(0, 10, &[event("a", 1, 0)])).await;
    let mut late = batch(0, 4, &[]);
    late.to.state = "of a late feeder".to_owned();
    moved(&index, late).await;
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(10))]);
    let mut equal = batch(4, 10, &[]);
    equal.to.state = "of another one at the same place".to_owned();
    moved(&index, equal).await;
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(10))]);
}

/// A batch of so many events in a stream of its own, from the partition's beginning on.
fn batch_of(partition: u32, events: u64) -> IndexBatch {
    let partition = Partition(partition);
    let events = (1..=events).map(|n| {
        let event = event(&format!("p{partition}"), n, n);
        RecordedEvent { position: Position { partition, ..event.position }, ..event }
    });
    let events: Vec<_> = events.collect();
    let to = cursor(events.len() as u64 + 1);
    IndexBatch { partition, from: Offset(0), to, events }
}

async fn batches_that_come_together_do_not_keep_each_other_back(database: &TestDatabase) {
    let index = index(database);
    // Few and many: PostgreSQL takes them differently.
    for (nth, events) in [2, 60].into_iter().enumerate() {
        let of = |partition| partition + 10 * nth as u32;
        let known = batch_of(of(1), events);
        let begun = [known.clone(), batch_of(of(3), 0), batch_of(of(4), 0)];
        for begun in begun {
            moved(&index, IndexBatch { events: Vec::new(), to: cursor(1), ..begun }).await;
        }
        let next = |batch: IndexBatch| IndexBatch { from: Offset(1), ..batch };
        // One whose place is new, one that the index is behind of, one that fits, and one twice.
        let (new, fits) = (batch_of(of(2), events), next(known));
        let behind = IndexBatch { from: Offset(2), ..batch_of(of(3), events) };
        let together = vec![new.clone(), behind, fits.clone(), fits.clone()];
        let answers = index.advance(together).await;
        let answers: Vec<_> = answers.into_iter().map(|answer| answer.expect("none")).collect();
        let behind = Advanced::Behind(Some(cursor(1)));
        assert_eq!(answers, [Advanced::Moved, behind, Advanced::Moved, Advanced::Moved]);
        // One that contradicts.
        let again = |batch: &IndexBatch| {
            let from = batch.to.next;
            IndexBatch { from, to: cursor(from.0 + 1), ..batch.clone() }
        };
        let mut other = again(&fits);
        other.events[0].metadata.event_id = RandomIds.event_id();
        let mut answers = index.advance(vec![next(batch_of(of(4), events)), other]).await;
        is_diverged(answers.remove(1));
        assert_eq!(answers.remove(0).expect("fits"), Advanced::Moved);
        for partition in [of(1), of(2), of(4)] {
            let (partition, stream) = (Partition(partition), stream(&format!("p{partition}")));
            let load = IndexLoad { partition, stream, after: Version(0) };
            let read = index.load(&[load], 100).await.remove(0).expect("readable");
            assert_eq!((read.position.0, read.events.len() as u64), (events + 1, events));
        }
        let cursors = index.cursors().await.expect("readable");
        assert!(cursors.contains(&(Partition(of(3)), cursor(1))), "{cursors:?}");
    }
    assert!(index.advance(Vec::new()).await.is_empty());
}

async fn feeders_of_many_partitions_do_not_wait_for_each_other(database: &TestDatabase) {
    let feeders = (0..4).map(|seed| {
        let (index, mut dice) = (index(database), Dice::new(seed));
        tokio::spawn(async move {
            for round in 0..40 {
                let mut batches: Vec<_> = (0..6).map(|partition| batch_of(partition, 0)).collect();
                for batch in &mut batches {
                    (batch.from, batch.to) = (Offset(round), cursor(round + 1));
                }
                let cut = dice.roll(6) as usize;
                batches.rotate_left(cut);
                if dice.roll(2) == 0 {
                    batches.reverse();
                }
                for answer in index.advance(batches).await {
                    assert_eq!(answer.expect("no error"), Advanced::Moved);
                }
            }
        })
    });
    for feeder in feeders.collect::<Vec<_>>() {
        feeder.await.expect("no panic");
    }
    let cursors = index(database).cursors().await.expect("readable");
    assert_eq!(cursors.len(), 6);
    assert!(cursors.iter().all(|(_, at)| *at == cursor(40)), "{cursors:?}");
}

/// A log of 300 events in 10 streams, and batches over it that begin and end anywhere.
fn log() -> Vec<RecordedEvent> {
    (0..300).map(|n| event(&format!("s{}", n % 10), n / 10 + 1, n)).collect()
}

async fn two_feeders_at_once_do_no_harm(database: &TestDatabase) {
    let log = Arc::new(log());
    let feeders = (1..=3).map(|seed| {
        let (index, log, mut dice) = (index(database), log.clone(), Dice::new(seed));
        tokio::spawn(async move {
            let mut from = 0;
            while from < 300 {
                // Few and many: PostgreSQL takes them differently.
                let to = (from + 1 + dice.roll(90)).min(300);
                let events = &log[from as usize..to as usize];
                let advanced = advance(&index, batch(from, to, events)).await.expect("no error");
                if advanced == Advanced::Moved {
                    let cursors = index.cursors().await.expect("readable");
                    assert!(cursors[0].1.next >= Offset(to), "the index moved back");
                }
                from = match advanced {
                    // Now and then it goes back, as a late feeder does.
                    Advanced::Moved if dice.roll(4) == 0 => from.saturating_sub(dice.roll(30)),
                    Advanced::Moved => to,
                    Advanced::Behind(cursor) => cursor.map_or(0, |cursor| cursor.next.0),
                };
            }
        })
    });
    for feeder in feeders.collect::<Vec<_>>() {
        feeder.await.expect("no panic");
    }
    let index = index(database);
    assert_eq!(index.cursors().await.expect("readable"), [(PARTITION, cursor(300))]);
    for nth in 0..10 {
        let read = index.load(&[load(&format!("s{nth}"), 0)], 100).await.remove(0);
        let read = read.expect("readable");
        let wanted: Vec<_> = log.iter().skip(nth).step_by(10).cloned().collect();
        assert_eq!(read.events, wanted);
    }
}

async fn a_load_and_its_position_are_of_one_snapshot(database: &TestDatabase) {
    let writer = index(database);
    let feeding = tokio::spawn(async move {
        for n in 0..300 {
            moved(&writer, batch(n, n + 1, &[event("a", n + 1, n)])).await;
        }
    });
    let reader = index(database);
    loop {
        let reads = reader.load(&[load("a", 0), load("b", 0)], 1_000).await.into_iter();
        let reads: Vec<_> = reads.map(|read| read.expect("readable")).collect();
        // One event an offset: the position tells how many events there must be, no more, no less.
        assert_eq!(reads[0].events.len() as u64, reads[0].position.0);
        assert_eq!(reads[0].position, reads[1].position);
        if reads[0].position == Offset(300) {
            break;
        }
    }
    feeding.await.expect("no panic");
}

async fn many_loads_answer_in_their_order(database: &TestDatabase) {
    let index = index(database);
    moved(&index, batch(0, 300, &log())).await;
    let mut requests: Vec<_> = (0..10).rev().map(|n| load(&format!("s{n}"), n * 3)).collect();
    requests.push(load("unknown", 0));
    requests.push(IndexLoad { partition: Partition(9), ..load("s1", 29) });
    let reads = index.load(&requests, 20).await.into_iter();
    let reads: Vec<_> = reads.map(|read| read.expect("readable")).collect();
    assert_eq!(reads.len(), requests.len());
    for (request, read) in requests.iter().zip(&reads).take(10) {
        let versions: Vec<_> = read.events.iter().map(|event| event.version.0).collect();
        let wanted: Vec<_> = (request.after.0 + 1..=30).take(20).collect();
        assert_eq!(versions, wanted);
        assert!(read.events.iter().all(|event| event.stream == request.stream));
        assert_eq!((read.position, read.more), (Offset(300), 30 - request.after.0 > 20));
    }
    assert!(reads[10].events.is_empty());
    assert_eq!(reads[11].position, Offset(0));
    assert!(index.load(&[], 5).await.is_empty());
}

async fn a_command_is_found_with_the_position(database: &TestDatabase) {
    let index = index(database);
    let (first, mut second) = (event("a", 1, 4), event("a", 2, 5));
    second.command_id = first.command_id;
    moved(&index, batch(0, 7, &[first.clone(), second])).await;
    let find = async |id: &str, command| {
        index.find_command(PARTITION, &stream(id), command).await.expect("readable")
    };
    let (position, appended) = find("a", first.command_id).await;
    let appended = appended.expect("it is there");
    assert_eq!(position, Offset(7));
    assert_eq!((appended.version, appended.position.offset), (Version(2), Offset(5)));
    assert_eq!(find("b", first.command_id).await, (Offset(7), None));
    assert_eq!(find("a", CommandId(RandomIds.event_id())).await, (Offset(7), None));
}

async fn large_batches_are_indexed(database: &TestDatabase) {
    let index = index(database);
    let events: Vec<_> = (1..=7_003).map(|n| event("a", n, n)).collect();
    moved(&index, batch(0, 8_000, &events)).await;
    moved(&index, batch(0, 8_000, &events)).await;
    let read = index.load(&[load("a", 0)], 10_000).await.remove(0).expect("readable");
    assert!(read.events == events);
}

async fn saved_digests_are_kept_until_the_index_is_cleared_and_none_if_changed(
    database: &TestDatabase,
) {
    let index = index(database);
    moved(&index, batch(0, 3, &[event("a", 1, 1)])).await;
    let saved = async || index.saved_digests(PARTITION).await.expect("readable");
    assert_eq!(saved().await, None);
    let mut digests = BucketDigests::default();
    index.save_digests(PARTITION, &cursor(2), &digests).await.expect("writable");
    digests.toggle(&event("a", 1, 1));
    index.save_digests(PARTITION, &cursor(3), &digests).await.expect("writable");
    let expected = SavedDigests { at: cursor(3), digests, events: 1 };
    assert_eq!(saved().await.as_ref(), Some(&expected));
    for change in [
        "UPDATE kafold_partition_digest SET next_offset = 2",
        "UPDATE kafold_partition_digest SET fold_state = ''",
        "UPDATE kafold_partition_digest SET checksum = 0",
        "UPDATE kafold_partition_digest SET digests = substr(digests, 2)",
    ] {
        database.run(change).await;
        assert_eq!(saved().await, None, "{change}");
        index.save_digests(PARTITION, &cursor(3), &expected.digests).await.expect("writable");
    }
    assert!(saved().await.is_some());
    index.clear(Some(PARTITION)).await.expect("cleared");
    moved(&index, batch(0, 3, &[event("a", 1, 1)])).await;
    assert_eq!(saved().await, None);
}

/// The digest of a stream comes from the process's memory or from the table.
async fn a_stream_is_appended_to_whoever_wrote_it(database: &TestDatabase) {
    let (one, two) = (index(database), index(database));
    let log: Vec<_> = (0..200).map(|n| event("a", n + 1, n)).collect();
    // Few and many, by one and by the other.
    for (nth, (from, to)) in
        [(0, 3), (3, 5), (5, 105), (105, 106), (106, 199)].into_iter().enumerate()
    {
        let index = if nth % 2 == 0 { &one } else { &two };
        moved(index, batch(from, to, &log[from as usize..to as usize])).await;
    }
    moved(&one, batch(199, 200, &log[199..])).await;
    let heads = one.heads(PARTITION).await.expect("readable");
    heads.check(PARTITION, one.heads_table()).expect("they agree");
    assert_eq!(
        (heads.found.events, heads.buckets.total()),
        (200, {
            let mut buckets = BucketDigests::default();
            log.iter().for_each(|event| buckets.toggle(event));
            buckets.total()
        })
    );
    let counts = one.count().await.expect("readable");
    assert_eq!(counts.len(), 1);
    counts[0].check().expect("rows and heads agree");
}

async fn a_newer_snapshot_replaces_an_older_one(database: &TestDatabase) {
    let snapshots = SqlSnapshots::new(database.database.clone());
    let snapshot = |version, schema: &str| Snapshot {
        stream: stream("a"),
        version: Version(version),
        schema: schema.to_owned(),
        state: format!("{{\"v\":{version}}}").into_bytes(),
        recent_commands: vec![(
            CommandId(RandomIds.event_id()),
            Version(version),
            Position { partition: PARTITION, offset: Offset(9) },
        )],
    };
    assert_eq!(snapshots.load(&stream("a")).await.expect("readable"), None);
    let saved = snapshot(5, "s1");
    snapshots.save(&saved).await.expect("writable");
    snapshots.save(&snapshot(4, "s1")).await.expect("writable");
    assert_eq!(snapshots.load(&stream("a")).await.expect("readable"), Some(saved));
    let other = snapshot(3, "s2");
    snapshots.save(&other).await.expect("writable");
    assert_eq!(snapshots.load(&stream("a")).await.expect("readable"), Some(other));
}

//! What readers of the whole log get.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::join;

use super::{StoreUnderTest, commit, exact, new_stream, read_all, versions};
use crate::clock::{IdGenerator, RandomIds};
use crate::event::RecordedEvent;
use crate::ids::{Offset, Partition, StreamId};
use crate::store::{
    Batch, Cursor, EventSource, EventStore, ReadError, SourceMessage, Subscription,
};

/// How long a source may take to deliver what is in the log.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long nothing may come for it to count as silence.
const SILENCE: Duration = Duration::from_millis(300);
/// Resuming is tried at no more cursors than this, so that the claim is quick on a long log.
const CURSORS_MAX: usize = 8;

/// A subscription under a name of its own that starts whatever it is assigned.
struct Reader {
    subscription: Box<dyn Subscription>,
    /// Where to start a partition; from the beginning when absent.
    cursors: HashMap<Partition, Cursor>,
    batches: Vec<Batch>,
}

impl Reader {
    async fn new(source: &dyn EventSource, batch_events_max: usize) -> Self {
        let name = format!("contract-{}", RandomIds.event_id());
        let subscription =
            source.subscribe(&name, None, batch_events_max).await.expect("subscribed");
        Self { subscription, cursors: HashMap::new(), batches: Vec::new() }
    }

    /// Waits for the next message and takes it.
    async fn step(&mut self) {
        let message = tokio::time::timeout(DELIVERY_TIMEOUT, self.subscription.next()).await;
        let message = message.expect("the source delivers in time");
        self.take(message.expect("the source can be read")).await;
    }

    async fn take(&mut self, message: SourceMessage) {
        match message {
            SourceMessage::Assigned(partitions) => {
                for partition in partitions {
                    let from = self.cursors.get(&partition).cloned();
                    self.subscription.start(partition, from).await.expect("the cursor is good");
                }
            }
            SourceMessage::Batch(batch) => self.batches.push(batch),
            SourceMessage::Revoked(partitions) => panic!("nobody else reads: {partitions:?}"),
        }
    }

    /// Reads until as many events of the streams as wanted have come.
    async fn read_until(&mut self, streams: &[StreamId], count: usize) -> Vec<RecordedEvent> {
        while self.events_of(streams).len() < count {
            self.step().await;
        }
        self.events_of(streams)
    }

    fn events_of(&self, streams: &[StreamId]) -> Vec<RecordedEvent> {
        let events = self.batches.iter().flat_map(|batch| &batch.events);
        events.filter(|event| streams.contains(&event.stream)).cloned().collect()
    }
}

/// Ten streams, each with commits of 1, 3 and 5 events.
async fn write_streams(store: &dyn EventStore) -> Vec<StreamId> {
    let streams: Vec<_> = (0..10).map(|_| new_stream()).collect();
    for (version, count) in [(0, 1), (1, 3), (4, 5)] {
        for stream in &streams {
            store.append(stream, exact(version), commit(count)).await.expect("nobody else writes");
        }
    }
    streams
}

const EVENTS_A_STREAM: usize = 9;

/// What the source delivers is what the streams hold, field by field; offsets rise in a partition.
pub async fn every_event_is_delivered_once_in_order_of_its_partition(
    harness: &mut dyn StoreUnderTest,
) {
    let store = harness.store();
    let streams = write_streams(&*store).await;
    let mut reader = Reader::new(&*harness.source(), 1_000).await;
    let delivered = reader.read_until(&streams, streams.len() * EVENTS_A_STREAM).await;
    for stream in &streams {
        let of_stream: Vec<_> =
            delivered.iter().filter(|event| event.stream == *stream).cloned().collect();
        assert_eq!(of_stream, read_all(&*store, stream).await);
    }
    let mut ends: BTreeMap<Partition, Offset> = BTreeMap::new();
    for event in reader.batches.iter().flat_map(|batch| &batch.events) {
        let previous = ends.insert(event.position.partition, event.position.offset);
        assert!(previous < Some(event.position.offset), "offsets rise");
    }
}

/// Each batch begins where the one before ended; a commit is split neither by the limit nor
/// otherwise, and only a commit larger than the limit exceeds it.
pub async fn batches_follow_one_another_and_hold_whole_commits_within_their_limit(
    harness: &mut dyn StoreUnderTest,
) {
    const LIMIT: usize = 4;
    let streams = write_streams(&*harness.store()).await;
    let mut reader = Reader::new(&*harness.source(), LIMIT).await;
    reader.read_until(&streams, streams.len() * EVENTS_A_STREAM).await;
    let mut next: HashMap<Partition, Offset> = HashMap::new();
    let mut commands = HashSet::new();
    for batch in &reader.batches {
        let from = next.insert(batch.partition, batch.next.next).unwrap_or(Offset(0));
        assert_eq!(batch.from, from, "batches leave nothing out");
        assert!(batch.next.next <= batch.end, "the end is not before what was read");
        let in_batch: HashSet<_> =
            batch.events.iter().map(|event| (event.stream.clone(), event.command_id)).collect();
        let one_commit = in_batch.len() == 1;
        assert!(batch.events.len() <= LIMIT || one_commit, "{} events", batch.events.len());
        for event in &batch.events {
            assert_eq!(event.position.partition, batch.partition);
            let range = batch.from..batch.next.next;
            assert!(range.contains(&event.position.offset), "{} in {range:?}", event.position);
        }
        for commit in in_batch {
            assert!(commands.insert(commit.clone()), "commit {commit:?} is in two batches");
        }
    }
}

/// A partition started at a batch's end goes on exactly there, with the same events as before.
pub async fn reading_resumes_at_every_cursor_without_gap_or_repetition(
    harness: &mut dyn StoreUnderTest,
) {
    let streams = write_streams(&*harness.store()).await;
    let total = streams.len() * EVENTS_A_STREAM;
    let mut reader = Reader::new(&*harness.source(), 3).await;
    let all = reader.read_until(&streams, total).await;
    let batches = reader.batches.clone();
    let partition = all[0].position.partition;
    let cursors: Vec<_> = batches
        .iter()
        .filter(|batch| batch.partition == partition)
        .map(|batch| batch.next.clone())
        .collect();
    let every = cursors.len().div_ceil(CURSORS_MAX);
    for cursor in cursors.into_iter().step_by(every) {
        let expected: Vec<_> = all
            .iter()
            .filter(|event| event.position.partition == partition)
            .filter(|event| event.position.offset >= cursor.next)
            .cloned()
            .collect();
        reader.batches.clear();
        let from = cursor.next;
        reader.subscription.start(partition, Some(cursor)).await.expect("the cursor is good");
        let resumed = reader.read_until(&streams, expected.len()).await;
        assert_eq!(resumed, expected);
        if let Some(first) = reader.batches.iter().find(|batch| batch.partition == partition) {
            assert_eq!(first.from, from);
        }
    }
}

/// A partition that was stopped delivers nothing until it is started again, and the others go on.
pub async fn a_stopped_partition_is_silent_until_it_is_started(harness: &mut dyn StoreUnderTest) {
    let streams = write_streams(&*harness.store()).await;
    let total = streams.len() * EVENTS_A_STREAM;
    let mut reader = Reader::new(&*harness.source(), 2).await;
    while reader.batches.is_empty() {
        reader.step().await;
    }
    let stopped = reader.batches[0].clone();
    reader.subscription.stop(stopped.partition);
    let of_it = |reader: &Reader| {
        reader.batches.iter().filter(|batch| batch.partition == stopped.partition).count()
    };
    let others: Vec<_> = {
        let mut all = Reader::new(&*harness.source(), 100).await;
        let events = all.read_until(&streams, total).await;
        events.into_iter().filter(|e| e.position.partition != stopped.partition).collect()
    };
    let seen = |reader: &Reader| {
        let events = reader.events_of(&streams);
        events.iter().filter(|e| e.position.partition != stopped.partition).count()
    };
    while seen(&reader) < others.len() {
        reader.step().await;
    }
    let silent = tokio::time::timeout(SILENCE, reader.subscription.next()).await;
    if let Ok(message) = silent {
        reader.take(message.expect("the source can be read")).await;
    }
    assert_eq!(of_it(&reader), 1, "nothing more of the stopped partition");
    let from = Some(stopped.next.clone());
    reader.subscription.start(stopped.partition, from).await.expect("the cursor is good");
    let all = reader.read_until(&streams, total).await;
    let offsets: HashSet<_> = all.iter().map(|event| event.position).collect();
    assert_eq!((all.len(), offsets.len()), (total, total), "each event once");
}

/// What is appended while a reader waits comes to it, in order.
pub async fn a_subscription_tails_new_events(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let streams = [stream.clone()];
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    let mut reader = Reader::new(&*harness.source(), 100).await;
    reader.read_until(&streams, 1).await;
    for version in 1..10 {
        // The reader is asked first, so it is waiting when the append comes.
        let reading = reader.read_until(&streams, version as usize + 1);
        let writing = store.append(&stream, exact(version), commit(1));
        let (seen, written) = join(reading, writing).await;
        written.expect("is next");
        assert_eq!(versions(&seen), (1..=version + 1).collect::<Vec<_>>());
    }
}

/// Before each message a call of `next` is polled once and dropped: everything still comes, once.
pub async fn a_dropped_call_of_next_loses_nothing(harness: &mut dyn StoreUnderTest) {
    let store = harness.store();
    let streams = write_streams(&*store).await;
    let mut reader = Reader::new(&*harness.source(), 2).await;
    let total = streams.len() * EVENTS_A_STREAM;
    while reader.events_of(&streams).len() < total {
        let polled = {
            let mut next = reader.subscription.next();
            poll_fn(|context| Poll::Ready(next.as_mut().poll(context))).await
        };
        match polled {
            Poll::Pending => reader.step().await,
            // An answer that is there at once is not dropped: it is the caller's.
            Poll::Ready(message) => reader.take(message.expect("the source can be read")).await,
        }
    }
    for stream in &streams {
        let seen = reader.events_of(std::slice::from_ref(stream));
        assert_eq!(versions(&seen), (1..=EVENTS_A_STREAM as u64).collect::<Vec<_>>());
    }
}

/// By `start`, or by `next` where the log has to be asked first; never by reading something else.
pub async fn a_cursor_of_another_log_is_refused(harness: &mut dyn StoreUnderTest) {
    write_streams(&*harness.store()).await;
    let foreign = harness.cursor_of_another_log().await;
    let mut reader = Reader::new(&*harness.source(), 100).await;
    let first = tokio::time::timeout(DELIVERY_TIMEOUT, reader.subscription.next()).await;
    let first = first.expect("the source assigns in time").expect("the source can be read");
    let SourceMessage::Assigned(partitions) = first else { panic!("unexpected {first:?}") };
    assert!(partitions.contains(&Partition(0)), "nobody else reads");
    let started = reader.subscription.start(Partition(0), Some(foreign)).await;
    let refusal = match started {
        Err(refusal) => refusal,
        Ok(()) => tokio::time::timeout(DELIVERY_TIMEOUT, reader.subscription.next())
            .await
            .expect("the source answers in time")
            .expect_err("the cursor is of another log"),
    };
    assert!(matches!(refusal, ReadError::Diverged { .. }), "{refusal:?}");
}

/// A reader that was stopped and its store's process too: it goes on where it was.
pub async fn cursors_are_good_after_reopening(harness: &mut dyn StoreUnderTest) {
    let (stream, streams) = {
        let stream = new_stream();
        (stream.clone(), [stream])
    };
    harness.store().append(&stream, exact(0), commit(3)).await.expect("is new");
    let mut reader = Reader::new(&*harness.source(), 100).await;
    reader.read_until(&streams, 3).await;
    let cursors: HashMap<_, _> =
        reader.batches.iter().map(|batch| (batch.partition, batch.next.clone())).collect();
    drop(reader);
    if !harness.reopen().await {
        return;
    }
    harness.store().append(&stream, exact(3), commit(2)).await.expect("is at 3");
    let mut reader = Reader::new(&*harness.source(), 100).await;
    reader.cursors = cursors;
    let seen = reader.read_until(&streams, 2).await;
    assert_eq!(versions(&seen), [4, 5]);
}

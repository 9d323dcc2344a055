//! The tail: proven events of one partition that are not yet in the index.
//!
//! A stream is index rows plus tail. Copy the tail first ([`Tail::view`]), query the index second,
//! then [`TailView::merge`]: in that order nothing can fall between the two.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kafold_core::digest::{Bucket, BucketDigests, Digest};
use kafold_core::index::{IndexBatch, IndexHeads};
use kafold_core::store::Appended;
use kafold_core::{CommandId, Offset, Partition, RecordedEvent, StreamId, Version};

use crate::fold::Checkpoint;
use crate::writer::Proven;

/// Proven events of one partition from the index's position on.
#[derive(Debug)]
pub struct Tail {
    partition: Partition,
    /// An index that stands below this has lost what the tail no longer holds.
    start: Checkpoint,
    next: Checkpoint,
    /// The digests of the events below `start`; `None` before they are known.
    digests: Option<BucketDigests>,
    /// The position of the digests which were saved last, if any are.
    saved: Option<Offset>,
    commits: VecDeque<Proven>,
    streams: HashMap<StreamId, VecDeque<Arc<RecordedEvent>>>,
    events: usize,
    bytes: usize,
    /// With so many events whoever feeds the index wants to know of more.
    wake_at: usize,
}

/// What the tail holds of one stream at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailView {
    /// An index read below this position is not complete.
    pub start: Offset,
    /// The stream's events in the tail, in order.
    pub events: Vec<Arc<RecordedEvent>>,
}

/// The result of a comparison of the index's heads with the tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadsFound {
    /// The heads are complete and unchanged.
    Whole,
    /// The heads differ from the heads written.
    DamagedHeads,
    /// The partition's declared totals differ from the totals written.
    DamagedTotals,
    /// The index's position is outside the tail: below its start or above its end.
    Elsewhere,
}

/// What the index says does not go together with the tail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// The index was deleted or restored, or a lagging replica answered.
    #[error(
        "the index of partition {partition} stands at {position}, but it held everything below {start} before: it was deleted, restored from a copy, or answered by a replica that lags; it is fed again from the log"
    )]
    IndexBehind {
        /// The partition.
        partition: Partition,
        /// Where the index says it stands.
        position: Offset,
        /// Where the tail begins.
        start: Offset,
    },
    /// A version is missing or has two events.
    #[error("version {found} of {stream} follows version {after}")]
    NotGapless {
        /// The partition.
        partition: Partition,
        /// The stream.
        stream: StreamId,
        /// The version before.
        after: Version,
        /// The version that came.
        found: Version,
    },
}

impl Tail {
    /// Creates the empty tail of an index that stands at `from` or above.
    pub fn new(partition: Partition, from: Checkpoint) -> Self {
        Self {
            partition,
            saved: None,
            start: from.clone(),
            next: from,
            digests: None,
            commits: VecDeque::new(),
            streams: HashMap::new(),
            events: 0,
            bytes: 0,
            wake_at: 0,
        }
    }

    /// Creates the empty tail at the position of saved digests.
    pub fn with_digests(partition: Partition, from: Checkpoint, digests: BucketDigests) -> Self {
        Self { digests: Some(digests), saved: Some(from.next), ..Self::new(partition, from) }
    }

    /// Adds what is proven, in the order of the log. Whether who feeds the index wants to know.
    pub fn push(&mut self, proven: Proven) -> bool {
        self.next = proven.next.clone();
        if proven.events.is_empty() {
            return self.events >= self.wake_at;
        }
        self.events += proven.events.len();
        self.bytes += bytes_of(&proven.events);
        for event in &proven.events {
            self.streams.entry(event.stream.clone()).or_default().push_back(Arc::clone(event));
        }
        self.commits.push_back(proven);
        self.events >= self.wake_at
    }

    /// Who feeds the index waits until the tail has so many events.
    pub fn wake_at(&mut self, events: usize) {
        self.wake_at = events;
    }

    /// Drops the commits that an index at `position` has. Returns `true` if there were any.
    pub fn drop_below(&mut self, position: Offset) -> bool {
        let before = self.commits.len();
        while let Some(first) = self.commits.front()
            && first.next.next <= position
        {
            self.start = first.next.clone();
            self.events -= first.events.len();
            self.bytes -= bytes_of(&first.events);
            for event in &first.events {
                if let Some(digests) = &mut self.digests {
                    digests.toggle(event);
                }
                if let Some(events) = self.streams.get_mut(&event.stream) {
                    events.pop_front();
                    if events.is_empty() {
                        self.streams.remove(&event.stream);
                    }
                }
            }
            self.commits.pop_front();
        }
        self.commits.len() < before
    }

    /// The next batch for an index that stands at `from`: whole commits of together at most
    /// `events_max` events, but always one. `None` when the index has everything proven.
    pub fn batch(&self, from: Offset, events_max: usize) -> Option<IndexBatch> {
        let skipped = self.commits.partition_point(|commit| commit.next.next <= from);
        let mut events = Vec::new();
        let mut taken = skipped;
        for commit in self.commits.range(skipped..) {
            if !events.is_empty() && events.len() + commit.events.len() > events_max {
                break;
            }
            events.extend(commit.events.iter().map(|event| RecordedEvent::clone(event)));
            taken += 1;
        }
        // Behind the last commit the log may have advanced without events.
        let whole = taken == self.commits.len();
        let to = if whole { &self.next } else { &self.commits[taken - 1].next };
        let partition = self.partition;
        (to.next > from).then(|| IndexBatch { partition, from, to: to.to_cursor(), events })
    }

    /// What the tail holds of a stream above version `after`. Copy it before the index is asked.
    pub fn view(&self, stream: &StreamId, after: Version) -> TailView {
        let events = self.streams.get(stream).map_or(Vec::new(), |events| {
            let known = events.partition_point(|event| event.version <= after);
            events.range(known..).cloned().collect()
        });
        TailView { start: self.start(), events }
    }

    /// What a command of the stream came to, if it is in the tail.
    pub fn find_command(&self, stream: &StreamId, command_id: CommandId) -> Option<Appended> {
        let events = self.streams.get(stream)?;
        let last = events.iter().rev().find(|event| event.command_id == command_id)?;
        Some(Appended { version: last.version, position: last.position, duplicate: true })
    }

    /// Compares the index's heads with the tail. On the first call for which the heads match the
    /// index's declared totals, the tail stores the digests as known.
    pub fn check_heads(&mut self, heads: &IndexHeads) -> HeadsFound {
        let position = heads.position;
        if position < self.start() || position > self.next.next {
            return HeadsFound::Elsewhere;
        }
        let mut buckets = heads.buckets.clone();
        self.events_below(position).for_each(|event| buckets.toggle(event));
        match &self.digests {
            Some(known) if *known != buckets => HeadsFound::DamagedHeads,
            Some(_) if heads.declared != heads.found => HeadsFound::DamagedTotals,
            None if heads.declared != heads.found => HeadsFound::DamagedHeads,
            _ => {
                self.digests = Some(buckets);
                HeadsFound::Whole
            }
        }
    }

    /// Returns the expected digest of a bucket of an index at `position`. Returns `None` before the
    /// heads are verified, or for a position outside the tail.
    pub fn bucket_at(&self, position: Offset, bucket: Bucket) -> Option<Digest> {
        if position < self.start() || position > self.next.next {
            return None;
        }
        let mut digest = self.digests.as_ref()?.get(bucket);
        for event in self.events_below(position) {
            if Bucket::of(&event.stream) == bucket {
                digest ^= Digest::of(event);
            }
        }
        Some(digest)
    }

    /// Returns `true` if the index's heads have been verified since this process took the
    /// partition.
    pub fn knows_heads(&self) -> bool {
        self.digests.is_some()
    }

    /// Returns the tail's events below `position`.
    fn events_below(&self, position: Offset) -> impl Iterator<Item = &Arc<RecordedEvent>> {
        let commits = self.commits.iter().take_while(move |commit| commit.next.next <= position);
        commits.flat_map(|commit| &commit.events)
    }

    /// Everything below is proven and in the index or here.
    pub fn next(&self) -> &Checkpoint {
        &self.next
    }

    /// An index that stands below this has lost what the tail no longer holds.
    pub fn start(&self) -> Offset {
        self.start.next
    }

    /// Returns the digests of the events below the start, if the start is at least `offsets` above
    /// the digests which were saved last. The caller saves the digests.
    pub fn digests_to_save(&mut self, offsets: u64) -> Option<(Checkpoint, BucketDigests)> {
        let start = self.start();
        let is_due = self.saved.is_none_or(|saved| start.0 - saved.0 >= offsets.max(1));
        let digests = self.digests.as_ref().filter(|_| is_due)?.clone();
        self.saved = Some(start);
        Some((self.start.clone(), digests))
    }

    /// How many events it holds.
    pub fn events(&self) -> usize {
        self.events
    }

    /// How many bytes of payload it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl TailView {
    /// The stream above version `after`: rows that the index had at `position`, then the tail.
    /// `rows` are all there are above `after`, not cut by a limit.
    pub fn merge(
        &self,
        partition: Partition,
        after: Version,
        position: Offset,
        rows: impl IntoIterator<Item = RecordedEvent>,
    ) -> Result<Vec<Arc<RecordedEvent>>, MergeError> {
        if position < self.start {
            return Err(MergeError::IndexBehind { partition, position, start: self.start });
        }
        let mut merged: Vec<Arc<RecordedEvent>> = Vec::new();
        let mut version = after;
        let rows = rows.into_iter().map(Arc::new);
        for event in rows.chain(self.events.iter().cloned()) {
            if event.version <= version {
                // In both: the index was fed between the copy and the query.
                continue;
            }
            if event.version != version.plus(1) {
                let stream = event.stream.clone();
                return Err(MergeError::NotGapless {
                    partition,
                    stream,
                    after: version,
                    found: event.version,
                });
            }
            version = event.version;
            merged.push(event);
        }
        Ok(merged)
    }
}

fn bytes_of(events: &[Arc<RecordedEvent>]) -> usize {
    events.iter().map(|event| event.payload.len()).sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use kafold_core::{Metadata, Position};
    use uuid::Uuid;

    use super::*;

    pub(crate) fn event(id: &str, version: u64, offset: u64, command: u128) -> Arc<RecordedEvent> {
        Arc::new(RecordedEvent {
            stream: id.parse().expect("a stream id"),
            version: Version(version),
            position: Position { partition: Partition(0), offset: Offset(offset) },
            command_id: CommandId(Uuid::from_u128(command)),
            event_type: "t.v1".into(),
            payload: Arc::from(*b"{}"),
            metadata: Metadata {
                event_id: Uuid::nil(),
                recorded_at: chrono::DateTime::UNIX_EPOCH,
                correlation_id: None,
                causation_id: None,
                trace_parent: None,
            },
        })
    }

    fn proven(events: Vec<Arc<RecordedEvent>>, next: u64) -> Proven {
        Proven { events, next: Checkpoint { next: Offset(next), ..Checkpoint::default() } }
    }

    /// Two streams: `a-1` with versions 1 to 3 in commits at 1–2 and 4, `b-1` with one at 3.
    fn tail() -> Tail {
        let mut tail = Tail::new(Partition(0), Checkpoint::default());
        tail.push(proven(vec![event("a-1", 1, 1, 1), event("a-1", 2, 2, 1)], 3));
        tail.push(proven(vec![event("b-1", 1, 3, 2)], 4));
        tail.push(proven(vec![event("a-1", 3, 4, 3)], 5));
        tail.push(proven(Vec::new(), 7));
        tail
    }

    fn stream(id: &str) -> StreamId {
        id.parse().expect("a stream id")
    }

    fn versions(events: &[Arc<RecordedEvent>]) -> Vec<u64> {
        events.iter().map(|event| event.version.0).collect()
    }

    #[test]
    fn a_batch_holds_whole_commits_up_to_the_limit() {
        let batch = |from, max| {
            let batch = tail().batch(Offset(from), max)?;
            Some((batch.to.next.0, batch.events.len()))
        };
        assert_eq!(batch(0, 1), Some((3, 2)), "a commit is never split");
        assert_eq!(batch(0, 3), Some((4, 3)));
        assert_eq!(batch(3, 10), Some((7, 2)), "and the log's end without events");
        assert_eq!(batch(5, 10), Some((7, 0)));
        assert_eq!(batch(7, 10), None);
    }

    #[test]
    fn it_says_when_there_is_as_much_as_is_waited_for() {
        let mut tail = Tail::new(Partition(0), Checkpoint::default());
        assert!(tail.push(proven(Vec::new(), 1)), "anything is waited for at first");
        tail.wake_at(2);
        assert!(!tail.push(proven(vec![event("a-1", 1, 1, 1)], 2)));
        assert!(!tail.push(proven(Vec::new(), 3)), "the log alone has advanced");
        assert!(tail.push(proven(vec![event("a-1", 2, 3, 2)], 4)));
        assert!(tail.push(proven(vec![event("a-1", 3, 4, 3)], 5)), "as long as there is as much");
    }

    #[test]
    fn what_the_index_has_is_forgotten_and_nothing_else() {
        let mut tail = tail();
        tail.drop_below(Offset(2));
        assert_eq!((tail.events(), tail.start()), (4, Offset(0)), "a commit goes whole");
        tail.drop_below(Offset(4));
        assert_eq!((tail.events(), tail.bytes(), tail.start()), (1, 2, Offset(4)));
        assert_eq!(versions(&tail.view(&stream("a-1"), Version(0)).events), [3]);
        assert!(tail.view(&stream("b-1"), Version(0)).events.is_empty());
        tail.drop_below(Offset(7));
        assert_eq!((tail.events(), tail.bytes(), tail.next().next), (0, 0, Offset(7)));
    }

    #[test]
    fn digests_are_saved_at_the_start_once_and_are_those_of_the_events_below() {
        let mut tail = tail();
        tail.drop_below(Offset(3));
        assert!(tail.digests_to_save(1).is_none(), "not known");
        let from = Checkpoint::default();
        let mut tail = Tail { digests: Some(BucketDigests::default()), ..self::tail() };
        assert!(tail.digests_to_save(9).is_some(), "none are saved");
        assert!(tail.digests_to_save(0).is_none(), "nothing is dropped since");
        assert!(tail.drop_below(Offset(3)) && !tail.drop_below(Offset(3)));
        assert!(tail.digests_to_save(4).is_none(), "three offsets are too few");
        let (at, digests) = tail.digests_to_save(3).expect("due");
        assert_eq!(
            (at.next, digests.total()),
            (Offset(3), tail.digests.clone().expect("known").total())
        );
        assert!(tail.digests_to_save(1).is_none(), "is saved");
        tail.drop_below(Offset(7));
        // A second tail begins at the saved digests and ends with equal digests.
        let mut next =
            Tail::with_digests(Partition(0), Checkpoint { next: at.next, ..from }, digests);
        next.push(proven(vec![event("b-1", 1, 3, 2)], 4));
        next.push(proven(vec![event("a-1", 3, 4, 3)], 5));
        next.drop_below(Offset(5));
        assert_eq!(next.digests, tail.digests);
    }

    #[test]
    fn a_command_is_found_by_its_last_event() {
        let found = tail().find_command(&stream("a-1"), CommandId(Uuid::from_u128(1)));
        let found = found.expect("in the tail");
        assert_eq!((found.version, found.position.offset), (Version(2), Offset(2)));
        assert!(found.duplicate);
        let in_other = tail().find_command(&stream("b-1"), CommandId(Uuid::from_u128(1)));
        assert_eq!(in_other, None);
    }

    #[test]
    fn rows_and_tail_are_merged_by_version() {
        let mut tail = tail();
        tail.drop_below(Offset(3));
        let view = tail.view(&stream("a-1"), Version(0));
        let row = |version, offset| RecordedEvent::clone(&event("a-1", version, offset, 1));
        let merge = |position, rows: Vec<RecordedEvent>| {
            view.merge(Partition(0), Version(0), Offset(position), rows)
        };
        let fed_meanwhile = vec![row(1, 1), row(2, 2), row(3, 4)];
        for rows in [vec![row(1, 1), row(2, 2)], fed_meanwhile] {
            assert_eq!(merge(3, rows).map(|events| versions(&events)), Ok(vec![1, 2, 3]));
        }
        assert!(matches!(merge(3, vec![row(1, 1)]), Err(MergeError::NotGapless { .. })));
    }

    #[test]
    fn an_index_that_lost_what_the_tail_forgot_is_refused() {
        let mut tail = tail();
        tail.drop_below(Offset(3));
        let view = tail.view(&stream("a-1"), Version(0));
        let refused = view.merge(Partition(0), Version(0), Offset(2), Vec::new());
        assert!(matches!(refused, Err(MergeError::IndexBehind { .. })), "{refused:?}");
    }
}

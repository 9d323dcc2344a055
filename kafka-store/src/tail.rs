//! The tail: proven events of one partition that are not yet in the index.
//!
//! A stream is index rows plus tail. Copy the tail first ([`Tail::view`]), query the index second,
//! then [`TailView::merge`]: in that order nothing can fall between the two.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kafold_core::index::IndexBatch;
use kafold_core::store::Appended;
use kafold_core::{CommandId, Offset, Partition, RecordedEvent, StreamId, Version};

use crate::fold::Checkpoint;
use crate::writer::Proven;

/// Proven events of one partition from the index's position on.
#[derive(Debug)]
pub struct Tail {
    partition: Partition,
    /// An index that stands below this has lost what the tail no longer holds.
    start: Offset,
    next: Checkpoint,
    commits: VecDeque<Proven>,
    streams: HashMap<StreamId, VecDeque<Arc<RecordedEvent>>>,
    events: usize,
    bytes: usize,
}

/// What the tail holds of one stream at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailView {
    /// An index read below this position is not complete.
    pub start: Offset,
    /// The stream's events in the tail, in order.
    pub events: Vec<Arc<RecordedEvent>>,
}

/// What the index says does not go together with the tail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// The index was deleted or restored, or a lagging replica answered.
    #[error(
        "the index of partition {partition} stands at {position}, but it held everything below {start} before: it was deleted, restored from a copy, or answered by a replica that lags; rebuild it"
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
    #[error(
        "stream {stream}: version {found} follows version {after} in index and log together; rebuild the index"
    )]
    NotGapless {
        /// The stream.
        stream: StreamId,
        /// The version before.
        after: Version,
        /// The version that came.
        found: Version,
    },
}

impl Tail {
    /// The empty tail of an index that stands at `from`.
    pub fn new(partition: Partition, from: Checkpoint) -> Self {
        Self {
            partition,
            start: from.next,
            next: from,
            commits: VecDeque::new(),
            streams: HashMap::new(),
            events: 0,
            bytes: 0,
        }
    }

    /// Adds what is proven, in the order of the log.
    pub fn push(&mut self, proven: Proven) {
        self.next = proven.next.clone();
        if proven.events.is_empty() {
            return;
        }
        self.events += proven.events.len();
        self.bytes += bytes_of(&proven.events);
        for event in &proven.events {
            self.streams.entry(event.stream.clone()).or_default().push_back(Arc::clone(event));
        }
        self.commits.push_back(proven);
    }

    /// Forgets the commits that an index at `position` has.
    pub fn drop_below(&mut self, position: Offset) {
        while let Some(first) = self.commits.front()
            && first.next.next <= position
        {
            self.start = first.next.next;
            self.events -= first.events.len();
            self.bytes -= bytes_of(&first.events);
            for event in &first.events {
                if let Some(events) = self.streams.get_mut(&event.stream) {
                    events.pop_front();
                    if events.is_empty() {
                        self.streams.remove(&event.stream);
                    }
                }
            }
            self.commits.pop_front();
        }
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
        TailView { start: self.start, events }
    }

    /// What a command of the stream came to, if it is in the tail.
    pub fn find_command(&self, stream: &StreamId, command_id: CommandId) -> Option<Appended> {
        let events = self.streams.get(stream)?;
        let last = events.iter().rev().find(|event| event.command_id == command_id)?;
        Some(Appended { version: last.version, position: last.position, duplicate: true })
    }

    /// Everything below is proven and in the index or here.
    pub fn next(&self) -> &Checkpoint {
        &self.next
    }

    /// An index that stands below this has lost what the tail no longer holds.
    pub fn start(&self) -> Offset {
        self.start
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

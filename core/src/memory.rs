//! The exact in-memory store: whoever writes another store reads this one first.
//!
//! [`MemoryStore`] keeps every promise of [`EventStore`] and of
//! [`EventSource`](crate::EventSource) by doing everything under one lock, so an append is settled
//! the moment it is submitted. Nothing outlives the process and nothing is bounded: the log is the
//! memory. [`MemoryIndex`] and [`MemorySnapshots`] are the other two seams, for a process without a
//! database and for tests.

mod index;
mod source;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, future, stream};

pub use self::index::{MemoryIndex, MemorySnapshots};

use self::source::Readers;
use crate::clock::{IdGenerator, RandomIds};
use crate::event::{Commit, RecordedEvent};
use crate::ids::{CommandId, ExpectedVersion, Offset, Partition, Position, StreamId, Version};
use crate::store::{
    Append, AppendError, Appended, EventStore, Health, Outcome, ReadError, Ticket, View,
};

/// How a [`MemoryStore`] is laid out.
#[derive(Debug, Clone)]
pub struct MemoryConfig {
    /// Tells this log from every other: a cursor of another one is refused.
    pub log_id: String,
    /// How many partitions the streams are spread over, at least 1. Default 1.
    pub partitions: u32,
    /// Longest payload in bytes; a longer one is [`AppendError::TooLarge`]. Default 1 MiB.
    pub event_bytes_max: usize,
}

impl Default for MemoryConfig {
    /// One partition and a random log id.
    fn default() -> Self {
        Self { log_id: RandomIds.event_id().to_string(), partitions: 1, event_bytes_max: 1 << 20 }
    }
}

/// An event store and event source in memory. Cheap to clone; clones are the same log.
#[derive(Clone, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    config: MemoryConfig,
    log: Mutex<Log>,
}

/// Everything the lock guards.
#[derive(Default)]
struct Log {
    /// Every event by partition and offset; a partition without events may be absent.
    events: HashMap<Partition, Vec<RecordedEvent>>,
    streams: HashMap<StreamId, Stream>,
    readers: Readers,
}

/// What one stream has come to.
#[derive(Default)]
struct Stream {
    /// Where the event of version n is: its offset, at index n − 1.
    offsets: Vec<Offset>,
    commands: HashMap<CommandId, Appended>,
    /// The submission that appended the last commit: what the next one may be `after`.
    last_ticket: Option<Ticket>,
}

impl Stream {
    fn version(&self) -> Version {
        Version(self.offsets.len() as u64)
    }
}

impl MemoryStore {
    /// An empty log.
    pub fn new(config: MemoryConfig) -> Self {
        Self { shared: Arc::new(Shared { config, log: Mutex::default() }) }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // Nothing under this lock panics half way, so what a panicking thread left is whole.
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the partition of a stream: FNV-1a of its name over the partition count, the same in every process.
    pub fn partition_of(&self, stream: &StreamId) -> Partition {
        let hash = stream.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        // The remainder is below a u32.
        Partition((hash % u64::from(self.shared.config.partitions.max(1))) as u32)
    }

    fn append_now(&self, append: Append) -> Result<Appended, AppendError> {
        let partition = self.partition_of(&append.stream);
        let mut log = self.log();
        if let Some(first) = log.find_command(&append.stream, append.commit.command_id()) {
            return Ok(Appended { duplicate: true, ..first });
        }
        log.check_after(&append.stream, append.after)?;
        log.check_version(&append.stream, append.expected)?;
        check_sizes(&append.commit, self.shared.config.event_bytes_max)?;
        let appended = log.record(partition, append);
        log.readers.wake();
        Ok(appended)
    }

    fn confirm_now(&self, view: &View) -> Result<(), AppendError> {
        let log = self.log();
        log.check_after(&view.stream, view.after)?;
        log.check_version(&view.stream, ExpectedVersion::Exact(view.version))
    }
}

impl Log {
    fn version(&self, stream: &StreamId) -> Version {
        self.streams.get(stream).map_or(Version::EMPTY, Stream::version)
    }

    fn find_command(&self, stream: &StreamId, command_id: CommandId) -> Option<Appended> {
        self.streams.get(stream)?.commands.get(&command_id).copied()
    }

    /// Whatever was submitted is settled, so a commit may build on submission `after` only if that
    /// one appended the last commit of the stream.
    fn check_after(&self, stream: &StreamId, after: Option<Ticket>) -> Result<(), AppendError> {
        let last = self.streams.get(stream).and_then(|stream| stream.last_ticket);
        if after.is_none() || after == last {
            return Ok(());
        }
        let reason =
            format!("the submission that stream {stream} was to be behind is not its last");
        Err(AppendError::NotAppended { reason })
    }

    fn check_version(
        &self,
        stream: &StreamId,
        expected: ExpectedVersion,
    ) -> Result<(), AppendError> {
        let actual = self.version(stream);
        if expected.admits(actual) {
            return Ok(());
        }
        Err(AppendError::Conflict { stream: stream.clone(), expected, actual })
    }

    fn record(&mut self, partition: Partition, append: Append) -> Appended {
        let Append { stream: id, commit, ticket, .. } = append;
        let command_id = commit.command_id();
        let events = self.events.entry(partition).or_default();
        let stream = self.streams.entry(id.clone()).or_default();
        for event in commit.events() {
            let offset = Offset(events.len() as u64);
            stream.offsets.push(offset);
            events.push(RecordedEvent {
                stream: id.clone(),
                version: stream.version(),
                position: Position { partition, offset },
                command_id,
                event_type: Arc::clone(&event.event_type),
                payload: Arc::clone(&event.payload),
                metadata: event.metadata.clone(),
            });
        }
        let offset = *stream.offsets.last().expect("a commit has at least one event");
        let position = Position { partition, offset };
        let appended = Appended { version: stream.version(), position, duplicate: false };
        stream.commands.insert(command_id, appended);
        stream.last_ticket = Some(ticket);
        appended
    }
}

fn check_sizes(commit: &Commit, limit: usize) -> Result<(), AppendError> {
    let size = commit.events().iter().map(|event| event.payload.len()).max().unwrap_or(0);
    if size > limit { Err(AppendError::TooLarge { size, limit }) } else { Ok(()) }
}

#[async_trait]
impl EventStore for MemoryStore {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        future::ready(self.append_now(append)).boxed()
    }

    fn confirm(&self, view: View) -> Outcome<()> {
        future::ready(self.confirm_now(&view)).boxed()
    }

    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        let partition = self.partition_of(stream);
        let log = self.log();
        let offsets = log.streams.get(stream).map_or(&[][..], |stream| &stream.offsets);
        let skipped = usize::try_from(after.0).unwrap_or(usize::MAX).min(offsets.len());
        let events: Vec<_> = offsets[skipped..]
            .iter()
            .map(|offset| Ok(log.events[&partition][offset.0 as usize].clone()))
            .collect();
        stream::iter(events).boxed()
    }

    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        Ok(self.log().find_command(stream, command_id))
    }

    fn health(&self) -> Health {
        Health::Ready
    }
}

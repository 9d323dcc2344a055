//! The seams: [`EventStore`] writes and reads streams, [`EventSource`] reads everything.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::event::{Commit, RecordedEvent};
use crate::ids::{CommandId, ExpectedVersion, Offset, Partition, Position, StreamId, Version};

/// Where what failed came from: codes of brokers and databases stay in this chain.
pub type Cause = Arc<dyn Error + Send + Sync>;

/// Identifies one submission to a store of this process, so that a later one can build on it
/// before its outcome is known. Never reused within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

impl Ticket {
    /// A ticket that no submission of this process has had.
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// One conditional append.
#[derive(Debug, Clone)]
pub struct Append {
    /// Where the events go.
    pub stream: StreamId,
    /// What the stream's version must be.
    pub expected: ExpectedVersion,
    /// The events.
    pub commit: Commit,
    /// Names this submission for those that build on it.
    pub ticket: Ticket,
    /// The submission whose events were the last ones in the state that this commit was decided on,
    /// when its outcome was not yet known. The commit is appended only directly behind that one;
    /// when that one fails, or was a duplicate, this one answers [`AppendError::NotAppended`] or
    /// [`AppendError::Conflict`].
    pub after: Option<Ticket>,
    /// When the caller stops waiting: then the answer is [`AppendError::OutcomeUnknown`] if
    /// anything of the attempt may still reach the log.
    pub deadline: Option<Instant>,
}

/// What a decision saw, for [`EventStore::confirm`].
#[derive(Debug, Clone)]
pub struct View {
    /// The stream.
    pub stream: StreamId,
    /// Its version in the state that was decided on.
    pub version: Version,
    /// As [`Append::after`]: set when the state included events whose outcome is not known yet.
    pub after: Option<Ticket>,
    /// When the caller stops waiting: then the answer is [`AppendError::Unavailable`].
    pub deadline: Option<Instant>,
}

/// A commit is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The version of the commit's last event.
    pub version: Version,
    /// Where its last event is.
    pub position: Position,
    /// Whether the command had been applied before; then version and position are the first ones.
    pub duplicate: bool,
}

/// The answer to a submission. Dropping it abandons the answer, not the append.
pub type Outcome<T> = BoxFuture<'static, Result<T, AppendError>>;

/// Who may write a partition.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    /// The node's name.
    pub name: String,
    /// Where other nodes reach it, if it said so.
    pub address: String,
    /// When that node started.
    pub started_at: DateTime<Utc>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, address, started_at } = self;
        let at = if address.is_empty() { "" } else { " at " };
        let started_at = started_at.to_rfc3339_opts(SecondsFormat::Millis, true);
        write!(f, "{name}{at}{address} (started {started_at})")
    }
}

/// Why nothing was appended, or nothing is known; each variant asks for another act.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// Another commit was first: load and decide again.
    #[error("stream {stream} is at version {actual}, expected {expected}")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// What the append demanded.
        expected: ExpectedVersion,
        /// What the stream has.
        actual: Version,
    },
    /// Another process owns the partition: send the command there, as a handler with
    /// [`forwarding`](crate::CommandHandler::forwarding) does.
    #[error(
        "partition {partition} is owned by {}, and this handler does not forward commands",
        owner.as_ref().map_or("another node".into(), Owner::to_string)
    )]
    NotOwner {
        /// The partition of the stream.
        partition: Partition,
        /// Who claimed it, as far as known.
        owner: Option<Owner>,
    },
    /// It certainly did not happen and never will: retry at will.
    #[error("not appended: {reason}")]
    NotAppended {
        /// What prevented it.
        reason: String,
    },
    /// It may or may not have happened, or happen yet: send the same command id again.
    #[error("the outcome of command {command_id} is unknown: send the same command id again")]
    OutcomeUnknown {
        /// The command.
        command_id: CommandId,
    },
    /// The store cannot take it now; nothing of it has left this process.
    #[error("unavailable, retry in {retry_after:?}: {cause}")]
    Unavailable {
        /// When to try again.
        retry_after: Duration,
        /// What it waits for.
        #[source]
        cause: Cause,
    },
    /// An event is larger than the log takes: make it smaller.
    #[error("a record of {size} bytes is over the limit of {limit} bytes")]
    TooLarge {
        /// Bytes of the largest event, with its headers.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
}

impl AppendError {
    /// [`AppendError::Unavailable`] for the given cause.
    pub fn unavailable(
        retry_after: Duration,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Unavailable { retry_after, cause: cause.into().into() }
    }

    /// What metrics and spans call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => "conflict",
            Self::NotOwner { .. } => "not_owner",
            Self::NotAppended { .. } => "not_appended",
            Self::OutcomeUnknown { .. } => "unknown",
            Self::Unavailable { .. } => "unavailable",
            Self::TooLarge { .. } => "too_large",
        }
    }
}

/// The reason for which a stream or the log cannot be read. `Debug` writes the sentence of `Display`, so that a `main` which returns the
/// error prints it.
#[derive(Clone, thiserror::Error)]
pub enum ReadError {
    /// The store cannot answer now: try again.
    #[error("unavailable, retry in {retry_after:?}: {cause}")]
    Unavailable {
        /// When to try again.
        retry_after: Duration,
        /// What it waits for.
        #[source]
        cause: Cause,
    },
    /// What is stored contradicts itself or is not what this process wrote: an operator must look.
    #[error("{what}: {cause}")]
    Diverged {
        /// What is affected, such as a partition or a table.
        what: String,
        /// The contradiction.
        #[source]
        cause: Cause,
    },
}

impl fmt::Debug for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl ReadError {
    /// [`ReadError::Unavailable`] for the given cause.
    pub fn unavailable(
        retry_after: Duration,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Unavailable { retry_after, cause: cause.into().into() }
    }

    /// [`ReadError::Diverged`] for the given cause.
    pub fn diverged(
        what: impl Into<String>,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Diverged { what: what.into(), cause: cause.into().into() }
    }
}

/// Whether a store takes commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Everywhere.
    Ready,
    /// Not, or not everywhere, and why, in one sentence an entry.
    NotReady(Vec<String>),
}

impl Health {
    /// Returns `Ready` if both are; otherwise all reasons, each once: two parts may name the same database.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Ready, health) | (health, Self::Ready) => health,
            (Self::NotReady(mut reasons), Self::NotReady(more)) => {
                for reason in more {
                    if !reasons.contains(&reason) {
                        reasons.push(reason);
                    }
                }
                Self::NotReady(reasons)
            }
        }
    }
}

/// Writes and reads streams.
///
/// Promises of every implementation, held by the contract suite in [`crate::testing`]: an
/// acknowledged append is never lost; of appends that expect the same version at most one succeeds;
/// a commit is visible whole or not at all; a command id is applied at most once in its stream; an
/// outcome is never guessed.
#[async_trait]
pub trait EventStore: Send + Sync + 'static {
    /// Hands a commit over, in the order of the calls; the future is its outcome.
    ///
    /// The command id is checked first: a command that is in the stream already answers with its
    /// first version and position and `duplicate`, whatever the expected version; one that is
    /// pending shares that outcome.
    fn submit(&self, append: Append) -> Outcome<Appended>;

    /// Answers `Ok` when the view is still the newest of its stream at a moment after this call:
    /// only then may a rejection or a linearizable read be answered. Else as an append would:
    /// [`AppendError::Conflict`] when the stream has moved, [`AppendError::NotAppended`] when it
    /// must be decided again.
    fn confirm(&self, view: View) -> Outcome<()>;

    /// The events of a stream above version `after`, in order, and none that is not in the log for
    /// good. On a node that does not own the stream this may lag behind, never contradict.
    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>>;

    /// What a command of the stream came to, if it is in the stream.
    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError>;

    /// Whether commands are taken now.
    fn health(&self) -> Health;

    /// [`EventStore::submit`] of a commit that depends on no pending one, without a deadline.
    async fn append(
        &self,
        stream: &StreamId,
        expected: ExpectedVersion,
        commit: Commit,
    ) -> Result<Appended, AppendError> {
        let (ticket, after, deadline) = (Ticket::next(), None, None);
        self.submit(Append { stream: stream.clone(), expected, commit, ticket, after, deadline })
            .await
    }
}

/// A place in one partition to read on from: everything below `next` has been seen.
///
/// `state` is the source's own: what it needs to go on exactly there and to notice that the log is
/// not the same any more. Stored beside `next` and handed back unread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// The first offset not yet seen.
    pub next: Offset,
    /// The source's state there, as text.
    pub state: String,
}

/// Events of one partition, in log order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The partition.
    pub partition: Partition,
    /// Where the batch begins: the `next` of the one before.
    pub from: Offset,
    /// Whole commits only. May be empty when the log advanced without events.
    pub events: Vec<RecordedEvent>,
    /// Where to go on after this batch.
    pub next: Cursor,
    /// The end of the partition when the batch was read, as far as known: `end − next` is the lag.
    pub end: Offset,
}

/// What a reader is to Kafka, for the spans of what it reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// The topic that it reads.
    pub topic: String,
    /// The consumer group through which readers of one name share the partitions, if they do.
    pub group: Option<String>,
}

/// What a [`Subscription`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceMessage {
    /// These partitions are this reader's from now on; each waits for [`Subscription::start`].
    Assigned(Vec<Partition>),
    /// The next events of a started partition.
    Batch(Batch),
    /// These partitions are no longer this reader's.
    Revoked(Vec<Partition>),
}

/// Reads everything, in the order of the log within each partition.
#[async_trait]
pub trait EventSource: Send + Sync + 'static {
    /// Begins to read under a name; readers of one name with one database share the partitions. A
    /// batch holds at most `batch_events_max` events, except that a commit is never split.
    ///
    /// `database` is the identity of the database with the reader's state and position.
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError>;

    /// Returns the number of partitions of the log.
    fn partitions(&self) -> u32;

    /// Returns the partition of the events of a stream.
    fn partition_of(&self, stream: &StreamId) -> Partition;

    /// Returns the end of a partition, which is where the next record will be.
    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError>;
}

/// One reader's place in an [`EventSource`].
#[async_trait]
pub trait Subscription: Send {
    /// Waits for the next message. Cancel-safe: a dropped call loses nothing. After an
    /// [`ReadError::Unavailable`] it may be called again and goes on where it was.
    async fn next(&mut self) -> Result<SourceMessage, ReadError>;

    /// Delivers an assigned partition from `from`, or from the beginning of the log. Starting a
    /// partition again moves it there. A cursor that does not fit the log is
    /// [`ReadError::Diverged`].
    async fn start(&mut self, partition: Partition, from: Option<Cursor>) -> Result<(), ReadError>;

    /// Delivers no more of a partition until it is started again; it stays this reader's.
    fn stop(&mut self, partition: Partition);

    /// Whether readers of one name share the partitions, so that each is always some reader's.
    fn is_shared(&self) -> bool {
        false
    }

    /// What it is to Kafka; `None` where the log is elsewhere.
    fn consumer(&self) -> Option<Consumer> {
        None
    }
}

//! The seam [`StreamIndex`]: events by stream and version.

use async_trait::async_trait;

use crate::event::RecordedEvent;
use crate::ids::{CommandId, Offset, Partition, StreamId, Version};
use crate::store::{Appended, Cursor, ReadError};

/// Events by stream and version: a faithful copy of a prefix of each partition of the log.
///
/// Everything written here is a true statement about a prefix of the log and only moves forward, so
/// a late or second writer does no harm. It can be deleted at any time: it is fed again from the
/// log.
#[async_trait]
pub trait StreamIndex: Send + Sync + 'static {
    /// Where each partition of the index stands. A partition that is absent stands at 0.
    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError>;

    /// Adds the events of each batch's partition in `[from, to.next)` and moves the partition's cursor
    /// to `to`, whole or not at all; an equal event that is there already is ignored, a different one
    /// at the same stream and version is [`ReadError::Diverged`]. The cursor never moves backward.
    ///
    /// An answer for each batch, in their order: what one of them meets does not keep the others back.
    /// They may share a transaction, since many small ones cost more than what they write.
    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>>;

    /// Up to `limit` events of each request's stream above its version, in order, with the position
    /// of the partition's cursor in the same snapshot. Answers are in the order of the requests:
    /// many loads cost one round trip.
    async fn load(&self, requests: &[IndexLoad], limit: usize)
    -> Result<Vec<IndexRead>, ReadError>;

    /// What the command came to if it is in the index, with the position of the partition's cursor
    /// in the same snapshot.
    async fn find_command(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<(Offset, Option<Appended>), ReadError>;
}

/// Events for the index: all accepted ones of one partition between two offsets.
#[derive(Debug, Clone)]
pub struct IndexBatch {
    /// The partition.
    pub partition: Partition,
    /// The first offset the batch speaks of.
    pub from: Offset,
    /// Where the index stands after it; no commit is open there.
    pub to: Cursor,
    /// The accepted events in between, in log order.
    pub events: Vec<RecordedEvent>,
}

/// What became of an [`IndexBatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advanced {
    /// The index stands at the batch's end or beyond.
    Moved,
    /// The index stands below the batch's begin and nothing was written: feed it again from there.
    Behind(Option<Cursor>),
}

/// One stream to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexLoad {
    /// The stream's partition.
    pub partition: Partition,
    /// The stream.
    pub stream: StreamId,
    /// Events above this version are wanted.
    pub after: Version,
}

/// What the index knows of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexRead {
    /// The position of the partition's cursor: the answer is complete up to here.
    pub position: Offset,
    /// The events, in order of version, at most the limit.
    pub events: Vec<RecordedEvent>,
    /// Whether the limit cut the answer: there are more events below `position`.
    pub more: bool,
}

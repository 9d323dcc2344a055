//! The seam [`StreamIndex`]: events by stream and version.

use std::fmt::Display;

use async_trait::async_trait;

use crate::digest::{BucketDigests, Digest};
use crate::event::RecordedEvent;
use crate::ids::{CommandId, Offset, Partition, StreamId, Version};
use crate::store::{Appended, Cursor, ReadError};

/// Events by stream and version: a faithful copy of a prefix of each partition of the log.
///
/// Everything written here is a true statement about a prefix of the log and only moves forward, so
/// a late or second writer does no harm. An index can be deleted at any time and is fed again from
/// the log.
///
/// An index is verified before use, since other programs can change its tables. Beside the events
/// an index keeps a head for each stream, and for each partition the number and the [`Digest`] of
/// its events. A reader which decides on an index compares the three ([`IndexRead::bucket`],
/// [`StreamIndex::heads`]).
#[async_trait]
pub trait StreamIndex: Send + Sync + 'static {
    /// Returns the identity of the database with the index; `None` for an index of this process
    /// alone. All nodes of a log share one database.
    fn database(&self) -> Option<&str> {
        None
    }

    /// Where each partition of the index stands. A partition that is absent stands at 0.
    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError>;

    /// Returns the position of one partition; `None` for a partition that is absent. A damaged position of
    /// another partition changes nothing.
    async fn cursor(&self, partition: Partition) -> Result<Option<Cursor>, ReadError> {
        let mut cursors = self.cursors().await?.into_iter();
        Ok(cursors.find_map(|(of, cursor)| (of == partition).then_some(cursor)))
    }

    /// Adds the events of each batch's partition in `[from, to.next)` and moves the partition's cursor
    /// to `to`, whole or not at all; an equal event that is there already is ignored, a different one
    /// at the same stream and version is [`ReadError::Diverged`]. The cursor never moves backward.
    ///
    /// An answer for each batch, in their order: what one of them meets does not keep the others back.
    /// They may share a transaction, since many small ones cost more than what they write.
    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>>;

    /// Returns up to `limit` events of each request's stream above the request's version, in order,
    /// with the position of the partition's cursor in the same snapshot. Answers follow the order
    /// of the requests: many loads cost one round trip. Unreadable rows of one stream fail only the
    /// answer for the stream.
    async fn load(&self, requests: &[IndexLoad], limit: usize)
    -> Vec<Result<IndexRead, ReadError>>;

    /// Returns the name of the table with the heads of streams, for messages.
    fn heads_table(&self) -> &'static str {
        "kafold_event"
    }

    /// Returns the sums over the heads of all streams of a partition, with the partition's cursor
    /// in the same snapshot.
    async fn heads(&self, partition: Partition) -> Result<IndexHeads, ReadError>;

    /// Returns the digests that were last saved for a partition, if there are any. An index that no
    /// other program can change has none.
    async fn saved_digests(&self, partition: Partition) -> Result<Option<SavedDigests>, ReadError> {
        let _ = partition;
        Ok(None)
    }

    /// Saves the digests of the events below `at`, for the next owner of the partition.
    async fn save_digests(
        &self,
        partition: Partition,
        at: &Cursor,
        digests: &BucketDigests,
    ) -> Result<(), ReadError> {
        let _ = (partition, at, digests);
        Ok(())
    }

    /// Returns for each partition the number and digest of the rows of events, and the totals of
    /// the partition's heads in the same snapshot. Reads every row.
    async fn count(&self) -> Result<Vec<IndexCount>, ReadError>;

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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexRead {
    /// The position of the partition's cursor: the answer is complete up to here.
    pub position: Offset,
    /// The events, in order of version, at most the limit.
    pub events: Vec<RecordedEvent>,
    /// Whether the limit cut the answer: there are more events below `position`.
    pub more: bool,
    /// The stream's head; `None` for a stream without events.
    pub head: Option<IndexHead>,
    /// The digest of the heads of all streams in the stream's [`Bucket`](crate::digest::Bucket).
    pub bucket: Digest,
}

/// The head of a stream in the index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexHead {
    /// The version of the stream's last event.
    pub version: Version,
    /// The digest of all events of the stream.
    pub digest: Digest,
}

/// The sums over the heads of a partition's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexHeads {
    /// The position of the partition's cursor.
    pub position: Offset,
    /// The number of events declared by the partition's cursor, and the XOR of their digests and of the hashes of their
    /// streams: a head in the wrong bucket changes the sum.
    pub declared: IndexTotal,
    /// The same, summed over the heads.
    pub found: IndexTotal,
    /// The digests of the heads.
    pub buckets: BucketDigests,
}

/// Digests of a partition's buckets, saved by an owner of the partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedDigests {
    /// The position below which the events lie.
    pub at: Cursor,
    /// The digests.
    pub digests: BucketDigests,
    /// The number of events of the partition in the index.
    pub events: u64,
}

/// A number of events and their digest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexTotal {
    /// The number of events.
    pub events: u64,
    /// The digest of the events.
    pub digest: Digest,
}

/// The totals of a partition's rows of events and of the partition's heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexCount {
    /// The partition.
    pub partition: Partition,
    /// The totals of the rows of events.
    pub rows: IndexTotal,
    /// The totals of the heads.
    pub heads: IndexTotal,
}

/// Returns [`ReadError::Diverged`] for a difference between the index and the log: `what` differs
/// in `table`. The error's sentence includes the remedy.
pub fn damaged(partition: Partition, table: &str, what: impl Display) -> ReadError {
    let cause = format!(
        "table {table} is damaged: {what}; feed it again from the log: kafold index rebuild --partition {partition}"
    );
    ReadError::diverged(format!("the stream index of partition {partition}"), cause)
}

impl IndexHeads {
    /// Rejects heads in `table` with sums other than the totals declared by the partition's cursor.
    pub fn check(&self, partition: Partition, table: &str) -> Result<(), ReadError> {
        let Self { declared, found, position, .. } = self;
        if declared == found {
            return Ok(());
        }
        let what = match declared.events == found.events {
            true => format!("its digest below offset {position} is not that of kafold_partition"),
            false => format!(
                "it has {} events below offset {position}, and kafold_partition {}",
                found.events, declared.events
            ),
        };
        Err(damaged(partition, table, what))
    }
}

impl IndexCount {
    /// Rejects rows of events with totals other than the totals of the heads.
    pub fn check(&self) -> Result<(), ReadError> {
        let Self { partition, rows, heads } = self;
        if rows == heads {
            return Ok(());
        }
        let what = match rows.events == heads.events {
            true => "its digest is not that of the heads of its streams".to_owned(),
            false => format!(
                "it has {} events, and the heads of its streams {}",
                rows.events, heads.events
            ),
        };
        Err(damaged(*partition, "kafold_event", what))
    }
}

impl IndexTotal {
    /// Adds events.
    pub fn add(&mut self, events: u64, digest: Digest) {
        // A damaged table may hold any number, so the addition wraps.
        self.events = self.events.wrapping_add(events);
        self.digest ^= digest;
    }
}

//! [`SqlIndex`]: events by stream and version, in the tables `kafold_event` and `kafold_partition`.
//!
//! Other programs can change the tables. So every row of an event carries the digest of its
//! content, and every row of a partition carries the checksum of its position. On PostgreSQL the
//! head of a stream is the row of its last event, which carries the digest of the stream. On SQLite,
//! whose `kafold_event` is the embedded store's log too, a trigger updates a table of heads,
//! `kafold_stream`, in the statement which adds events.
//!
//! Fed by the owner of a partition with accepted events only. Whatever is written is a true
//! statement about a prefix of the log and moves only forward, so two feeders at once do no harm.
//! The embedded store's log *is* `kafold_event`: there is no index beside it.

mod known;
mod postgres;
mod sqlite;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kafold_core::clock::SystemClock;
use kafold_core::digest::{BucketDigests, Digest, stream_hash};
use kafold_core::index::{
    Advanced, IndexBatch, IndexCount, IndexHead, IndexHeads, IndexLoad, IndexRead, IndexTotal,
    SavedDigests, damaged,
};
use kafold_core::store::{Appended, Cursor, ReadError};
use kafold_core::{
    Clock, CommandId, Metadata, Offset, Partition, Position, RecordedEvent, StreamId, StreamIndex,
    Version,
};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::known::KnownDigests;
use crate::sql::reading;
use crate::transaction::unavailable;

/// What [`ReadError::Unavailable`] of a database suggests as the wait.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The [`StreamIndex`] in PostgreSQL or SQLite. Cheap to clone.
#[derive(Clone)]
pub struct SqlIndex {
    database: Database,
    clock: Arc<dyn Clock>,
    known: Arc<KnownDigests>,
}

impl SqlIndex {
    /// The index in this database.
    pub fn new(database: Database) -> Self {
        Self { database, clock: Arc::new(SystemClock), known: Arc::default() }
    }

    /// Returns the index's events at the streams and versions of these events, in their order. A
    /// row which is unreadable or has changed since its insert is an error.
    pub async fn find(
        &self,
        events: &[RecordedEvent],
    ) -> Result<Vec<Option<Result<RecordedEvent, ReadError>>>, ReadError> {
        let found = match &self.database {
            Database::Postgres(database) => postgres::find(database.pool(), events).await,
            Database::Sqlite(database) => sqlite::find(database.readers(), events).await,
        };
        found.map_err(RowError::into)
    }

    /// Empties the index of one partition or of all partitions, in one transaction. The partition's
    /// owner or `kafold index rebuild` feeds the index again from the log. Needs the rights of the
    /// tables' owner.
    pub async fn clear(&self, partition: Option<Partition>) -> Result<(), ReadError> {
        let cleared = match &self.database {
            Database::Postgres(database) => postgres::clear(database.pool(), partition).await,
            Database::Sqlite(database) => sqlite::clear(database, partition).await,
        };
        cleared.map_err(read_error)
    }
}

#[async_trait]
impl StreamIndex for SqlIndex {
    fn database(&self) -> Option<&str> {
        Some(self.database.identity())
    }

    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
        let sql = "SELECT partition, next_offset, fold_state, checksum FROM kafold_partition";
        let rows: Result<Vec<(i32, i64, String, i64)>, _> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await);
        let rows = rows.map_err(read_error)?;
        let cursor = |(partition, next, state, checksum)| {
            let partition = partition_of(partition)?;
            Ok((partition, cursor(partition, next, state, checksum)?))
        };
        rows.into_iter().map(cursor).collect()
    }

    async fn cursor(&self, partition: Partition) -> Result<Option<Cursor>, ReadError> {
        let sql = "SELECT next_offset, fold_state, checksum FROM kafold_partition \
                   WHERE partition = $1";
        let row: Result<Option<(i64, String, i64)>, _> = reading!(&self.database, pool => {
            sqlx::query_as(sql).bind(partition_int(partition)).fetch_optional(pool).await
        });
        let row = row.map_err(read_error)?;
        row.map(|(next, state, checksum)| cursor(partition, next, state, checksum)).transpose()
    }

    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
        let now = self.clock.now();
        match &self.database {
            Database::Postgres(database) => {
                postgres::advance(database.pool(), &self.known, &batches, now).await
            }
            Database::Sqlite(database) => sqlite::advance(database, &batches, now).await,
        }
    }

    async fn load(
        &self,
        requests: &[IndexLoad],
        limit: usize,
    ) -> Vec<Result<IndexRead, ReadError>> {
        if requests.is_empty() {
            return Vec::new();
        }
        let loaded = match &self.database {
            Database::Postgres(database) => postgres::load(database.pool(), requests, limit).await,
            Database::Sqlite(database) => sqlite::load(database.readers(), requests, limit).await,
        };
        let failed = |error: ReadError| requests.iter().map(|_| Err(error.clone())).collect();
        loaded.map_err(RowError::into).unwrap_or_else(failed)
    }

    fn heads_table(&self) -> &'static str {
        match &self.database {
            Database::Postgres(_) => "kafold_event",
            Database::Sqlite(_) => "kafold_stream",
        }
    }

    async fn heads(&self, partition: Partition) -> Result<IndexHeads, ReadError> {
        let heads = match &self.database {
            Database::Postgres(database) => postgres::heads(database.pool(), partition).await,
            Database::Sqlite(database) => sqlite::heads(database.readers(), partition).await,
        };
        let heads = heads.map_err(ReadError::from)?;
        self.known.compared(partition, heads.declared == heads.found);
        Ok(heads)
    }

    async fn saved_digests(&self, partition: Partition) -> Result<Option<SavedDigests>, ReadError> {
        let sql = "SELECT d.next_offset, d.fold_state, d.digests, d.checksum, p.events \
                   FROM kafold_partition_digest d JOIN kafold_partition p USING (partition) \
                   WHERE partition = $1";
        type Saved = (i64, String, Vec<u8>, i64, i64);
        let row: Result<Option<Saved>, _> = reading!(&self.database, pool => {
            sqlx::query_as(sql).bind(partition_int(partition)).fetch_optional(pool).await
        });
        let Some((next, state, digests, checksum, events)) = row.map_err(read_error)? else {
            return Ok(None);
        };
        let saved = saved_checksum(partition, next, &state, &digests) == checksum;
        let digests = BucketDigests::from_bytes(&digests).filter(|_| saved);
        let at = u64::try_from(next).map(|next| Cursor { next: Offset(next), state });
        let events = events as u64;
        Ok(digests.zip(at.ok()).map(|(digests, at)| SavedDigests { at, digests, events }))
    }

    async fn save_digests(
        &self,
        partition: Partition,
        at: &Cursor,
        digests: &BucketDigests,
    ) -> Result<(), ReadError> {
        let sql = "INSERT INTO kafold_partition_digest \
                     (partition, next_offset, fold_state, digests, checksum) \
                   VALUES ($1, $2, $3, $4, $5) ON CONFLICT (partition) DO UPDATE \
                   SET next_offset = excluded.next_offset, fold_state = excluded.fold_state, \
                     digests = excluded.digests, checksum = excluded.checksum";
        let (next, digests) = (bigint(at.next.0), digests.to_bytes());
        let checksum = saved_checksum(partition, next, &at.state, &digests);
        macro_rules! saving {
            ($executor:expr) => {
                sqlx::query(sql)
                    .bind(partition_int(partition))
                    .bind(next)
                    .bind(&*at.state)
                    .bind(digests)
                    .bind(checksum)
                    .execute($executor)
                    .await
                    .map(drop)
            };
        }
        let saved = match &self.database {
            Database::Postgres(database) => saving!(database.pool()),
            Database::Sqlite(database) => {
                async {
                    let mut tx = database.write().await?;
                    saving!(&mut *tx)?;
                    tx.commit().await
                }
                .await
            }
        };
        saved.map_err(read_error)
    }

    async fn count(&self) -> Result<Vec<IndexCount>, ReadError> {
        let counts = match &self.database {
            Database::Postgres(database) => postgres::count(database.pool()).await,
            Database::Sqlite(database) => sqlite::count(database.readers()).await,
        };
        counts.map_err(RowError::into)
    }

    async fn find_command(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<(Offset, Option<Appended>), ReadError> {
        let sql = match &self.database {
            Database::Postgres(_) => postgres::FIND_COMMAND,
            Database::Sqlite(_) => sqlite::FIND_COMMAND,
        };
        type Found = (Option<i64>, Option<i64>, Option<i32>, Option<i64>);
        let row: Result<Found, sqlx::Error> = reading!(&self.database, pool => {
            let query = sqlx::query_as(sql).bind(partition_int(partition));
            let query = query.bind(stream.category()).bind(stream.id()).bind(command_id.0);
            query.fetch_one(pool).await
        });
        let (next, version, at, offset) = row.map_err(read_error)?;
        let position = place(partition, next.unwrap_or(0))?;
        let (Some(version), Some(at), Some(offset)) = (version, at, offset) else {
            return Ok((position, None));
        };
        let at = Position { partition: partition_of(at)?, offset: offset_of(offset)? };
        let version = Version(unsigned(version, "version")?);
        Ok((position, Some(Appended { version, position: at, duplicate: true })))
    }
}

/// What may go wrong while rows of events are read and written.
pub(crate) enum RowError {
    Database(sqlx::Error),
    Read(ReadError),
}

impl From<sqlx::Error> for RowError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<ReadError> for RowError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<RowError> for ReadError {
    fn from(error: RowError) -> Self {
        match error {
            RowError::Database(error) => read_error(error),
            RowError::Read(error) => error,
        }
    }
}

/// Converts an error of the database: an unreachable or refusing database is unavailable; no wait
/// repairs any other error.
pub(crate) fn read_error(error: sqlx::Error) -> ReadError {
    match unavailable(&error) {
        Some(reason) => ReadError::unavailable(RETRY_AFTER, reason),
        None => ReadError::diverged("the database's tables", error),
    }
}

/// An event as a row, as it was read.
#[derive(sqlx::FromRow)]
pub(crate) struct EventRow {
    category: String,
    stream_id: String,
    version: i64,
    partition: i32,
    offset: i64,
    event_id: Uuid,
    event_type: String,
    recorded_at: Time,
    command_id: Uuid,
    metadata: Option<String>,
    payload: Vec<u8>,
}

/// An event as a row of the index, with the digest of the event at its insert.
#[derive(sqlx::FromRow)]
struct IndexedRow {
    #[sqlx(flatten)]
    row: EventRow,
    digest: i64,
}

impl IndexedRow {
    /// Returns the event, or an error for a row which has changed since its insert.
    fn event(self) -> Result<RecordedEvent, ReadError> {
        let (partition, offset) = (self.row.partition, self.row.offset);
        let changed = |why: &dyn std::fmt::Display| {
            let partition = Partition(u32::try_from(partition).unwrap_or_default());
            damaged(partition, "kafold_event", format!("its row at offset {offset} {why}"))
        };
        let event =
            self.row.event().map_err(|error| changed(&format!("cannot be read: {error}")))?;
        if Digest::of(&event).0 as i64 != self.digest {
            return Err(changed(&"has changed since it was written"));
        }
        Ok(event)
    }
}

impl EventRow {
    pub(crate) fn event(self) -> Result<RecordedEvent, ReadError> {
        let stream = StreamId::new(&self.category, &self.stream_id);
        let stream = stream.map_err(|error| diverged("kafold_event", error))?;
        let more = More::from_text(self.metadata.as_deref())?;
        Ok(RecordedEvent {
            stream,
            version: Version(unsigned(self.version, "version")?),
            position: Position {
                partition: partition_of(self.partition)?,
                offset: offset_of(self.offset)?,
            },
            command_id: CommandId(self.command_id),
            event_type: self.event_type.into(),
            payload: self.payload.into(),
            metadata: Metadata {
                event_id: self.event_id,
                recorded_at: self.recorded_at.0,
                correlation_id: more.correlation_id,
                causation_id: more.causation_id,
                trace_parent: more.trace_parent,
            },
        })
    }
}

/// The metadata that most events lack, as JSON in one column.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct More {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    correlation_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    causation_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace_parent: Option<String>,
}

impl More {
    pub(crate) fn text_of(metadata: &Metadata) -> Option<String> {
        let Metadata { correlation_id, causation_id, trace_parent, .. } = metadata.clone();
        let more = Self { correlation_id, causation_id, trace_parent };
        let is_empty = more.correlation_id.is_none()
            && more.causation_id.is_none()
            && more.trace_parent.is_none();
        let text = || serde_json::to_string(&more).expect("three texts are JSON");
        (!is_empty).then(text)
    }

    fn from_text(text: Option<&str>) -> Result<Self, ReadError> {
        let parsed = text.map(serde_json::from_str).transpose();
        Ok(parsed.map_err(|error| diverged("kafold_event.metadata", error))?.unwrap_or_default())
    }
}

/// Events that lay where others were to go, as
/// `(category, stream id, version) → (partition, offset, event id, digest)`: each event of the
/// batch must be stored unchanged.
type Stored = HashMap<(String, String, i64), (i32, i64, Uuid, i64)>;

/// Whether what could not be inserted is there already; else the log and the index contradict.
fn check_stored(batch: &IndexBatch, stored: &Stored) -> Result<(), ReadError> {
    for event in &batch.events {
        let RecordedEvent { stream, version, position, metadata, .. } = event;
        let key = (stream.category().to_owned(), stream.id().to_owned(), bigint(version.0));
        let (partition, digest) = (partition_int(position.partition), Digest::of(event).0 as i64);
        let wanted = (partition, bigint(position.offset.0), metadata.event_id, digest);
        let found = stored.get(&key);
        if found == Some(&wanted) {
            continue;
        }
        let found = found.map_or("nothing".to_owned(), |found| {
            format!("event {} at {}:{} or other content", found.2, found.0, found.1)
        });
        let what = format!(
            "version {version} of {stream} is event {} at {position} in the log, and here {found}",
            metadata.event_id
        );
        return Err(damaged(batch.partition, "kafold_event", what));
    }
    Ok(())
}

/// An answer from at most one row more than the limit.
fn cut(mut read: IndexRead, limit: usize) -> IndexRead {
    read.more = read.events.len() > limit;
    read.events.truncate(limit);
    read
}

/// Returns a stored position, or an error for a row which has changed since the index wrote the
/// row.
fn cursor(
    partition: Partition,
    next: i64,
    state: String,
    stored: i64,
) -> Result<Cursor, ReadError> {
    if checksum(partition, next, &state) != stored {
        let what = format!("its row, offset {next}, has changed since it was written");
        return Err(damaged(partition, "kafold_partition", what));
    }
    Ok(Cursor { next: place(partition, next)?, state })
}

/// Returns the offset of a stored position.
fn place(partition: Partition, next: i64) -> Result<Offset, ReadError> {
    let invalid = |_| damaged(partition, "kafold_partition", format!("its row says offset {next}"));
    u64::try_from(next).map(Offset).map_err(invalid)
}

/// Returns the checksum of a stored position.
fn checksum(partition: Partition, next: i64, state: &str) -> i64 {
    let place = [&partition.0.to_le_bytes()[..], &next.to_le_bytes(), state.as_bytes()];
    Digest::of_parts(place).0 as i64
}

/// Returns the checksum of saved digests.
fn saved_checksum(partition: Partition, next: i64, state: &str, digests: &[u8]) -> i64 {
    let of_place = checksum(partition, next, state);
    Digest::of_parts([&of_place.to_le_bytes()[..], digests]).0 as i64
}

/// Returns the totals that events at or above offset `from` add to a partition, from the events and
/// their digests. The digest includes the hash of each new stream, so a head in the wrong bucket is
/// detected.
fn added<'e>(
    events: impl IntoIterator<Item = (&'e RecordedEvent, Digest)>,
    from: Offset,
) -> IndexTotal {
    let mut added = IndexTotal::default();
    for (event, digest) in events {
        if event.position.offset >= from {
            let hash = if event.version == Version(1) { stream_hash(&event.stream) } else { 0 };
            added.add(1, Digest(digest.0 ^ hash as u64));
        }
    }
    added
}

/// Rejects a head with the hash of the stream and a name with another hash: the head was renamed,
/// and the stream's own head is missing. Two streams with colliding hashes are no damage.
fn check_other_head(
    table: &str,
    request: &IndexLoad,
    other: Option<(String, String)>,
) -> Result<(), ReadError> {
    let Some((category, id)) = other else { return Ok(()) };
    let hash = StreamId::new(&category, &id).map(|other| stream_hash(&other));
    if hash.is_ok_and(|hash| hash == stream_hash(&request.stream)) {
        return Ok(());
    }
    let what = format!("the head of {} stands under another name", request.stream);
    Err(damaged(request.partition, table, what))
}

fn total(events: i64, digest: i64) -> IndexTotal {
    IndexTotal { events: events as u64, digest: Digest(digest as u64) }
}

fn head(version: Option<i64>, digest: Option<i64>) -> Option<IndexHead> {
    // A negative version matches no event, so the comparison reports the damage.
    let version = Version(version? as u64);
    Some(IndexHead { version, digest: Digest(digest? as u64) })
}

fn offset_of(value: i64) -> Result<Offset, ReadError> {
    unsigned(value, "offset").map(Offset)
}

fn partition_of(value: i32) -> Result<Partition, ReadError> {
    let partition = u32::try_from(value);
    partition.map(Partition).map_err(|_| diverged("kafold_event", format!("partition {value}")))
}

fn unsigned(value: i64, what: &str) -> Result<u64, ReadError> {
    u64::try_from(value).map_err(|_| diverged("kafold_event", format!("{what} {value}")))
}

/// A log has far fewer than 2³¹ partitions.
fn partition_int(partition: Partition) -> i32 {
    i32::try_from(partition.0).unwrap_or(i32::MAX)
}

/// Versions and offsets are 63 bits.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn diverged(what: &str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ReadError {
    ReadError::diverged(what, cause)
}

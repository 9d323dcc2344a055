//! [`SqlIndex`]: events by stream and version, in the tables `kafold_event` and `kafold_partition`.
//!
//! Fed by the owner of a partition with accepted events only. Whatever is written is a true
//! statement about a prefix of the log and moves only forward, so two feeders at once do no harm.
//! The embedded store's log *is* `kafold_event`: there is no index beside it.

mod postgres;
mod sqlite;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kafold_core::clock::SystemClock;
use kafold_core::index::{Advanced, IndexBatch, IndexLoad, IndexRead};
use kafold_core::store::{Appended, Cursor, ReadError};
use kafold_core::{
    Clock, CommandId, Metadata, Offset, Partition, Position, RecordedEvent, StreamId, StreamIndex,
    Version,
};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::sql::reading;
use crate::transaction::unavailable;

/// What [`ReadError::Unavailable`] of a database suggests as the wait.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The [`StreamIndex`] in PostgreSQL or SQLite. Cheap to clone.
#[derive(Clone)]
pub struct SqlIndex {
    database: Database,
    clock: Arc<dyn Clock>,
}

impl SqlIndex {
    /// The index in this database.
    pub fn new(database: Database) -> Self {
        Self { database, clock: Arc::new(SystemClock) }
    }

    /// The events of a partition from an offset on and below another, in the order of the log; at most
    /// `limit`.
    pub async fn events(
        &self,
        partition: Partition,
        range: std::ops::Range<Offset>,
        limit: u32,
    ) -> Result<Vec<RecordedEvent>, ReadError> {
        let sql = "SELECT category, stream_id, version, partition, \"offset\", event_id, \
                     event_type, recorded_at, command_id, metadata, payload FROM kafold_event \
                   WHERE partition = $1 AND \"offset\" >= $2 AND \"offset\" < $3 \
                   ORDER BY \"offset\" LIMIT $4";
        let rows: Result<Vec<EventRow>, _> = reading!(&self.database, pool => {
            let query = sqlx::query_as(sql).bind(partition_int(partition));
            let query = query.bind(bigint(range.start.0)).bind(bigint(range.end.0));
            query.bind(i64::from(limit)).fetch_all(pool).await
        });
        rows.map_err(read_error)?.into_iter().map(EventRow::event).collect()
    }
}

#[async_trait]
impl StreamIndex for SqlIndex {
    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
        let sql = "SELECT partition, next_offset, fold_state FROM kafold_partition";
        let rows: Result<Vec<(i32, i64, String)>, _> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await);
        let rows = rows.map_err(read_error)?;
        rows.into_iter()
            .map(|(partition, next, state)| Ok((partition_of(partition)?, cursor(next, state)?)))
            .collect()
    }

    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
        let now = self.clock.now();
        match &self.database {
            Database::Postgres(database) => postgres::advance(database.pool(), &batches, now).await,
            Database::Sqlite(database) => sqlite::advance(database, &batches, now).await,
        }
    }

    async fn load(
        &self,
        requests: &[IndexLoad],
        limit: usize,
    ) -> Result<Vec<IndexRead>, ReadError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let loaded = match &self.database {
            Database::Postgres(database) => postgres::load(database.pool(), requests, limit).await,
            Database::Sqlite(database) => sqlite::load(database.readers(), requests, limit).await,
        };
        loaded.map_err(RowError::into)
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
        let position = offset_of(next.unwrap_or(0))?;
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

/// A database that is away, or refuses until somebody mends something, is unavailable; anything else it
/// says will not go away by waiting.
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

/// Events that lay where others were to go, as `(category, stream id, version) → (partition, offset,
/// event id)`: each event of the batch must be there to the letter of its identity.
type Stored = HashMap<(String, String, i64), (i32, i64, Uuid)>;

/// Whether what could not be inserted is there already; else the log and the index contradict.
fn check_stored(batch: &IndexBatch, stored: &Stored) -> Result<(), ReadError> {
    for event in &batch.events {
        let RecordedEvent { stream, version, position, metadata, .. } = event;
        let key = (stream.category().to_owned(), stream.id().to_owned(), bigint(version.0));
        let partition = partition_int(position.partition);
        let wanted = (partition, bigint(position.offset.0), metadata.event_id);
        let found = stored.get(&key);
        if found == Some(&wanted) {
            continue;
        }
        let found = found.map_or("nothing, and its place is taken".to_owned(), |found| {
            format!("event {} at {}:{}", found.2, found.0, found.1)
        });
        let reason = format!(
            "IndexDiverged: version {version} of {stream} is event {} at {position} in the log, \
             and in the index {found}; the index is of another log: delete kafold_event and \
             kafold_partition, or use another database",
            metadata.event_id
        );
        return Err(diverged("the stream index", reason));
    }
    Ok(())
}

/// An answer from at most one row more than the limit.
fn cut(position: Offset, mut events: Vec<RecordedEvent>, limit: usize) -> IndexRead {
    let more = events.len() > limit;
    events.truncate(limit);
    IndexRead { position, events, more }
}

fn cursor(next: i64, state: String) -> Result<Cursor, ReadError> {
    Ok(Cursor { next: offset_of(next)?, state })
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

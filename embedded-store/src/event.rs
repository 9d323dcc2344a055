//! The table `kafold_event`, which is the log: all queries of it.

use kafold_core::{
    Appended, CommandId, Metadata, NewEvent, Offset, Partition, Position, ReadError, RecordedEvent,
    StreamId, Version,
};
use kafold_migrations::micros;
use serde::{Deserialize, Serialize};
use sqlx::error::BoxDynError;
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, FromRow, SqliteConnection, SqliteExecutor};
use uuid::Uuid;

use crate::error::not_read;

/// The one partition of the log.
pub(crate) const PARTITION: Partition = Partition(0);

/// An event with its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlacedEvent<'a> {
    pub(crate) stream: &'a StreamId,
    pub(crate) version: Version,
    pub(crate) offset: Offset,
    pub(crate) command_id: CommandId,
    pub(crate) event: &'a NewEvent,
}

/// What the file says about one stream and command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) version: Version,
    pub(crate) first: Option<Appended>,
}

/// A stream to ask about, and a command of it if there is one to find.
pub(crate) type Question<'a> = (&'a StreamId, Option<CommandId>);

/// The answers come as one row: a row of their own each would cost more than finding them. A command is
/// looked up by its id: the planner would rather read the whole stream.
const BEGIN: &str = r#"
BEGIN IMMEDIATE;
SELECT
    (SELECT coalesce(max("offset") + 1, 0) FROM kafold_event WHERE partition = 0),
    json_group_array(json_array(
        asked.key,
        (SELECT max(version) FROM kafold_event
         WHERE category = asked.value ->> 0 AND stream_id = asked.value ->> 1),
        (SELECT max(version) FROM kafold_event INDEXED BY kafold_event_command
         WHERE category = asked.value ->> 0 AND stream_id = asked.value ->> 1
           AND command_id = unhex(asked.value ->> 2))
    ))
FROM json_each(?) AS asked
"#;

/// The same about one stream and command, which come alone while the store is idle: in half of the time.
const BEGIN_ONE: &str = r#"
BEGIN IMMEDIATE;
SELECT
    (SELECT coalesce(max("offset") + 1, 0) FROM kafold_event WHERE partition = 0),
    (SELECT max(version) FROM kafold_event WHERE category = ? AND stream_id = ?),
    (SELECT max(version) FROM kafold_event INDEXED BY kafold_event_command
     WHERE category = ? AND stream_id = ? AND command_id = ?)
"#;

/// Begins a transaction; then the end of the log, and what the file says about each of the streams and
/// commands, in their order: one query for all, and one more for each command that is there already.
pub(crate) async fn begin(
    connection: &mut SqliteConnection,
    questions: &[Question<'_>],
) -> Result<(Offset, Vec<Known>), sqlx::Error> {
    let (end, answers) = match questions {
        [question] => begin_one(connection, question).await?,
        _ => begin_many(connection, questions).await?,
    };
    let mut known = vec![Known { version: Version::EMPTY, first: None }; questions.len()];
    for (index, version, found) in answers {
        known[index].version = Version(version.unwrap_or(0));
        if let (Some(_), (stream, Some(command_id))) = (found, questions[index]) {
            known[index].first = find_command(&mut *connection, stream, command_id).await?;
        }
    }
    Ok((Offset(unsigned(end)), known))
}

/// The end of the log, and of each question its place, the version of its stream and the last one of its
/// command.
type Answers = (i64, Vec<(usize, Option<u64>, Option<u64>)>);

async fn begin_one(
    connection: &mut SqliteConnection,
    (stream, command): &Question<'_>,
) -> Result<Answers, sqlx::Error> {
    let query = sqlx::query_as(BEGIN_ONE).bind(stream.category()).bind(stream.id());
    let query = query.bind(stream.category()).bind(stream.id());
    let query = query.bind(command.map(|command| command.0));
    let (end, version, found) = query.fetch_one(connection).await?;
    Ok((end, vec![(0, version, found)]))
}

async fn begin_many(
    connection: &mut SqliteConnection,
    questions: &[Question<'_>],
) -> Result<Answers, sqlx::Error> {
    let asked: Vec<_> = questions
        .iter()
        .map(|(stream, command)| {
            let command = command.map(|command| command.0.simple().to_string());
            (stream.category(), stream.id(), command)
        })
        .collect();
    let asked = serde_json::to_string(&asked).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let query = sqlx::query_as(BEGIN).bind(asked);
    let (end, answers): (i64, String) = query.fetch_one(connection).await?;
    let answers = serde_json::from_str(&answers);
    Ok((end, answers.map_err(|error| sqlx::Error::Decode(error.into()))?))
}

/// The end of the log: the offset of the next event.
pub(crate) async fn end(executor: impl SqliteExecutor<'_>) -> Result<Offset, sqlx::Error> {
    let query = r#"SELECT coalesce(max("offset") + 1, 0) FROM kafold_event WHERE partition = 0"#;
    sqlx::query_scalar(query).fetch_one(executor).await.map(|end| Offset(unsigned(end)))
}

/// What a command of the stream came to.
pub(crate) async fn find_command(
    executor: impl SqliteExecutor<'_>,
    stream: &StreamId,
    command_id: CommandId,
) -> Result<Option<Appended>, sqlx::Error> {
    let query = r#"SELECT max(version), max("offset") FROM kafold_event
                   INDEXED BY kafold_event_command
                   WHERE category = ? AND stream_id = ? AND command_id = ?"#;
    let query = sqlx::query_as(query).bind(stream.category()).bind(stream.id());
    let (version, offset): (Option<i64>, Option<i64>) =
        query.bind(command_id.0).fetch_one(executor).await?;
    Ok(version.zip(offset).map(appended))
}

/// The id of the event at an offset, if there is one.
pub(crate) async fn event_id_at(
    executor: impl SqliteExecutor<'_>,
    offset: Offset,
) -> Result<Option<Uuid>, sqlx::Error> {
    let query = r#"SELECT event_id FROM kafold_event WHERE partition = 0 AND "offset" = ?"#;
    sqlx::query_scalar(query).bind(signed(offset.0)).fetch_optional(executor).await
}

/// Ends a transaction in which nothing was written.
pub(crate) async fn rollback(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::query("ROLLBACK").execute(connection).await.map(|_| ())
}

/// Adds the events and commits; after an error nobody knows which of the two failed.
///
/// By statements of 64, 8 and 1 rows, which stay prepared; what is left of 64 or 8 is bound as NULL
/// and passed over, because a few statements cost more than many values. SQLite runs on a thread of
/// its own: the way there costs as much as an insert, so the last one takes the COMMIT along.
pub(crate) async fn insert_and_commit(
    connection: &mut SqliteConnection,
    mut events: &[PlacedEvent<'_>],
) -> Result<(), sqlx::Error> {
    while !events.is_empty() {
        let (statement, rows) = match events.len() {
            1 => (LAST_1, 1),
            2..=8 => (LAST_8, 8),
            9..=64 => (LAST_64, 64),
            _ => (INSERT_64, 64),
        };
        let (batch, rest) = events.split_at(rows.min(events.len()));
        let mut values = SqliteArguments::default();
        values.reserve(rows * COLUMNS, 0);
        for placed in batch {
            bind(&mut values, placed).map_err(sqlx::Error::Encode)?;
        }
        for _ in batch.len() * COLUMNS..rows * COLUMNS {
            values.add(None::<i64>).map_err(sqlx::Error::Encode)?;
        }
        sqlx::query_with(statement, values).execute(&mut *connection).await?;
        events = rest;
    }
    Ok(())
}

const COLUMNS: usize = 10;

fn bind(values: &mut SqliteArguments, placed: &PlacedEvent<'_>) -> Result<(), BoxDynError> {
    let PlacedEvent { stream, event, .. } = placed;
    values.add(stream.category())?;
    values.add(stream.id())?;
    values.add(signed(placed.version.0))?;
    values.add(signed(placed.offset.0))?;
    values.add(event.metadata.event_id)?;
    values.add(&*event.event_type)?;
    values.add(micros::to_micros(event.metadata.recorded_at))?;
    values.add(placed.command_id.0)?;
    values.add(metadata_text(&event.metadata)?)?;
    values.add(&*event.payload)
}

macro_rules! row {
    () => {
        "(?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?)"
    };
}
macro_rules! rows_8 {
    ($row:expr) => {
        concat!($row, ",", $row, ",", $row, ",", $row, ",", $row, ",", $row, ",", $row, ",", $row)
    };
}
macro_rules! any_of {
    ($rows:expr) => {
        concat!("SELECT * FROM (VALUES ", $rows, ") WHERE column1 IS NOT NULL")
    };
}
macro_rules! insert {
    ($rows:expr, $then:literal) => {
        concat!(
            "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
             event_type, recorded_at, command_id, metadata, payload) ",
            $rows,
            $then
        )
    };
}
const LAST_1: &str = insert!(concat!("VALUES ", row!()), "; COMMIT");
const LAST_8: &str = insert!(any_of!(rows_8!(row!())), "; COMMIT");
const LAST_64: &str = insert!(any_of!(rows_8!(rows_8!(row!()))), "; COMMIT");
const INSERT_64: &str = insert!(any_of!(rows_8!(rows_8!(row!()))), "");

/// One row, as it is read.
#[derive(FromRow)]
pub(crate) struct EventRow {
    category: String,
    stream_id: String,
    version: i64,
    partition: u32,
    offset: i64,
    event_id: Uuid,
    event_type: String,
    recorded_at: i64,
    command_id: Uuid,
    metadata: Option<String>,
    payload: Vec<u8>,
}

/// Up to `limit` events of a stream above a version.
pub(crate) async fn read_stream(
    executor: impl SqliteExecutor<'_>,
    stream: &StreamId,
    after: Version,
    limit: i64,
) -> Result<Vec<RecordedEvent>, ReadError> {
    let query = r#"SELECT category, stream_id, version, partition, "offset", event_id, event_type,
                          recorded_at, command_id, metadata, payload
                   FROM kafold_event WHERE category = ? AND stream_id = ? AND version > ?
                   ORDER BY version LIMIT ?"#;
    let query = sqlx::query_as(query).bind(stream.category()).bind(stream.id());
    let rows = query.bind(signed(after.0)).bind(limit).fetch_all(executor).await;
    rows.map_err(not_read)?.into_iter().map(EventRow::recorded).collect()
}

/// Up to `limit` events of the log from an offset on.
pub(crate) async fn read_log(
    executor: impl SqliteExecutor<'_>,
    from: Offset,
    limit: i64,
) -> Result<Vec<RecordedEvent>, ReadError> {
    let query = r#"SELECT category, stream_id, version, partition, "offset", event_id, event_type,
                          recorded_at, command_id, metadata, payload
                   FROM kafold_event WHERE partition = 0 AND "offset" >= ?
                   ORDER BY "offset" LIMIT ?"#;
    let query = sqlx::query_as(query).bind(signed(from.0)).bind(limit);
    let rows = query.fetch_all(executor).await;
    rows.map_err(not_read)?.into_iter().map(EventRow::recorded).collect()
}

impl EventRow {
    fn recorded(self) -> Result<RecordedEvent, ReadError> {
        let place = format!("event at {}:{}", self.partition, self.offset);
        let malformed = |what: String| ReadError::diverged(place.clone(), what);
        let stream = StreamId::new(&self.category, &self.stream_id);
        let recorded_at = micros::from_micros(self.recorded_at);
        let origin: Origin<String> = match &self.metadata {
            Some(text) => serde_json::from_str(text).map_err(|e| malformed(e.to_string()))?,
            None => Origin { correlation_id: None, causation_id: None, trace_parent: None },
        };
        Ok(RecordedEvent {
            stream: stream.map_err(|error| malformed(error.to_string()))?,
            version: Version(unsigned(self.version)),
            position: Position {
                partition: Partition(self.partition),
                offset: Offset(unsigned(self.offset)),
            },
            command_id: CommandId(self.command_id),
            event_type: self.event_type.into(),
            payload: self.payload.into(),
            metadata: Metadata {
                event_id: self.event_id,
                recorded_at: recorded_at.ok_or_else(|| malformed("no such date".into()))?,
                correlation_id: origin.correlation_id,
                causation_id: origin.causation_id,
                trace_parent: origin.trace_parent,
            },
        })
    }
}

/// The column `metadata`: what most events do not have.
#[derive(Serialize, Deserialize)]
struct Origin<T> {
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causation_id: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_parent: Option<T>,
}

fn metadata_text(metadata: &Metadata) -> Result<Option<String>, serde_json::Error> {
    let origin = Origin {
        correlation_id: metadata.correlation_id.as_deref(),
        causation_id: metadata.causation_id.as_deref(),
        trace_parent: metadata.trace_parent.as_deref(),
    };
    let Origin { correlation_id: None, causation_id: None, trace_parent: None } = origin else {
        return serde_json::to_string(&origin).map(Some);
    };
    Ok(None)
}

/// What an event counts for the limits: everything in it that its author chose.
pub(crate) fn event_bytes(stream: &StreamId, event: &NewEvent) -> usize {
    let metadata = &event.metadata;
    let texts = [&metadata.correlation_id, &metadata.causation_id, &metadata.trace_parent];
    let texts: usize = texts.into_iter().flatten().map(|text| text.len()).sum();
    stream.as_str().len() + event.event_type.len() + event.payload.len() + texts
}

fn appended((version, offset): (i64, i64)) -> Appended {
    let position = Position { partition: PARTITION, offset: Offset(unsigned(offset)) };
    Appended { version: Version(unsigned(version)), position, duplicate: false }
}

/// SQLite's integers have a sign. No log reaches 2^63 events; beyond it nothing is ever found.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Versions and offsets in the file are never negative.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

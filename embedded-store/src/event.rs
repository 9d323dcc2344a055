//! The table `kafold_event`, which is the log: all queries of it.

use std::collections::HashMap;

use futures_util::TryStreamExt;
use kafold_core::digest::{Bucket, BucketDigests, Digest, stream_hash};
use kafold_core::index::{IndexHead, IndexTotal};
use kafold_core::{
    Appended, CommandId, Metadata, NewEvent, Offset, Partition, Position, ReadError, RecordedEvent,
    StreamId, Version,
};
use kafold_migrations::{SqliteDatabase, micros};
use serde::{Deserialize, Serialize};
use sqlx::error::BoxDynError;
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, FromRow, SqliteConnection, SqliteExecutor};
use uuid::Uuid;

use crate::config::READ_PAGE_EVENTS;
use crate::error::not_read;
use crate::guard::NO_LOG_ROW;

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
    /// The hash of the stream.
    pub(crate) hash: i64,
    pub(crate) digest: Digest,
}

impl<'a> PlacedEvent<'a> {
    pub(crate) fn new(
        stream: &'a StreamId,
        version: Version,
        offset: Offset,
        command_id: CommandId,
        event: &'a NewEvent,
    ) -> Self {
        let digest = Digest::of(&RecordedEvent {
            stream: stream.clone(),
            version,
            position: Position { partition: PARTITION, offset },
            command_id,
            event_type: event.event_type.clone(),
            payload: event.payload.clone(),
            metadata: event.metadata.clone(),
        });
        Self { stream, version, offset, command_id, event, hash: stream_hash(stream), digest }
    }
}

/// A stream and a command, as the file has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    /// The version of the stream's last event.
    pub(crate) version: Version,
    /// `None` for a stream whose last commit this process remembers.
    pub(crate) head: Option<KnownHead>,
    pub(crate) first: Option<Appended>,
}

/// The head of a stream, as the file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(from = "HeadAnswer")]
pub(crate) struct KnownHead {
    pub(crate) version: Version,
    /// Number of heads with the stream's hash, under any name.
    pub(crate) same_hash: u64,
    /// The digest of the heads in the stream's bucket.
    pub(crate) bucket: Digest,
}

/// A query about a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) stream: &'a StreamId,
    /// A command of the stream to find.
    pub(crate) command: Option<CommandId>,
    /// The version of this process's latest commit to the stream, if remembered. Without a
    /// remembered version the stream's head and bucket are compared.
    pub(crate) last: Option<Version>,
}

/// The answers come as one row: a row of their own each would cost more than finding them. The parts of a
/// question are taken out of the JSON once. A command is looked up by its id: the planner would rather read
/// the whole stream.
const BEGIN: &str = r#"
BEGIN IMMEDIATE;
WITH asked AS MATERIALIZED (
    SELECT value ->> 0 AS category, value ->> 1 AS id, unhex(value ->> 2) AS command,
        value ->> 3 AS hash, value ->> 4 AS lowest, value ->> 5 AS highest
    FROM json_each(?))
SELECT
    (SELECT coalesce(max("offset") + 1, 0) FROM kafold_event WHERE partition = 0),
    (SELECT next_offset FROM kafold_log),
    json_group_array(json_array(
        (SELECT max(version) FROM kafold_event WHERE category = asked.category AND stream_id = asked.id),
        (SELECT max(version) FROM kafold_event INDEXED BY kafold_event_command
         WHERE category = asked.category AND stream_id = asked.id AND command_id = asked.command),
        CASE WHEN asked.hash IS NOT NULL THEN json_array(
            (SELECT version FROM kafold_stream
             WHERE partition = 0 AND hash = asked.hash
               AND category = asked.category AND stream_id = asked.id),
            (SELECT count(*) FROM kafold_stream WHERE partition = 0 AND hash = asked.hash),
            (SELECT json_group_array(digest) FROM kafold_stream
             WHERE partition = 0 AND hash BETWEEN asked.lowest AND asked.highest)) END
    ))
FROM asked
"#;

/// The same about one stream and command, which come alone while the store is idle: in half of the time.
const BEGIN_ONE: &str = r#"
BEGIN IMMEDIATE;
SELECT
    (SELECT coalesce(max("offset") + 1, 0) FROM kafold_event WHERE partition = 0),
    (SELECT next_offset FROM kafold_log),
    (SELECT max(version) FROM kafold_event WHERE category = ?1 AND stream_id = ?2),
    (SELECT max(version) FROM kafold_event INDEXED BY kafold_event_command
     WHERE category = ?1 AND stream_id = ?2 AND command_id = ?3)
"#;

/// The answers at the beginning of a transaction.
pub(crate) struct Begun {
    /// The end of the log in `kafold_event`.
    pub(crate) end: Offset,
    /// The end of the log in `kafold_log`; `None` without a row.
    pub(crate) declared_end: Option<Offset>,
    /// The answers to the questions, in their order.
    pub(crate) known: Vec<Known>,
}

/// Begins a transaction. Queries all streams and commands in one statement, and each command
/// already stored in another statement.
pub(crate) async fn begin(
    connection: &mut SqliteConnection,
    questions: &[Question<'_>],
) -> Result<Begun, sqlx::Error> {
    let (end, declared_end, answers) = match questions {
        [question] => begin_one(connection, question).await?,
        _ => begin_many(connection, questions).await?,
    };
    let mut known = Vec::with_capacity(questions.len());
    for (question, answer) in questions.iter().zip(answers) {
        let Answer(version, found, head) = answer;
        let first = match (found, question.command) {
            (Some(_), Some(command)) => {
                find_command(&mut *connection, question.stream, command).await?
            }
            _ => None,
        };
        known.push(Known { version: Version(version.unwrap_or(0)), head, first });
    }
    let end = Offset(unsigned(end));
    let declared_end = declared_end.map(|next| Offset(next as u64));
    Ok(Begun { end, declared_end, known })
}

/// The version of a stream, the last version of the command, and the head, unless the stream's last commit
/// is remembered.
#[derive(Deserialize)]
struct Answer(Option<u64>, Option<u64>, Option<KnownHead>);

/// The version of the stream's head, the number of heads with the stream's hash, and the digests of the
/// bucket.
#[derive(Deserialize)]
struct HeadAnswer(Option<i64>, u64, Vec<i64>);

impl From<HeadAnswer> for KnownHead {
    fn from(HeadAnswer(version, same_hash, bucket): HeadAnswer) -> Self {
        // A negative version matches no event, so the comparison reports the damage.
        let version = Version(version.unwrap_or(0) as u64);
        Self { version, same_hash, bucket: xor(bucket) }
    }
}

/// The end of the log in `kafold_event` and in `kafold_log`, and an answer for each question.
type Answers = (i64, Option<i64>, Vec<Answer>);

async fn begin_one(
    connection: &mut SqliteConnection,
    question: &Question<'_>,
) -> Result<Answers, sqlx::Error> {
    let query = sqlx::query_as(BEGIN_ONE).bind(question.stream.category());
    let query = query.bind(question.stream.id()).bind(question.command.map(|command| command.0));
    let found: (i64, Option<i64>, Option<u64>, Option<u64>) =
        query.fetch_one(&mut *connection).await?;
    let (end, declared, version, found) = found;
    let head = match question.last {
        Some(_) => None,
        None => Some(head(connection, question.stream).await?),
    };
    Ok((end, declared, vec![Answer(version, found, head)]))
}

async fn begin_many(
    connection: &mut SqliteConnection,
    questions: &[Question<'_>],
) -> Result<Answers, sqlx::Error> {
    let asked: Vec<_> = questions
        .iter()
        .map(|question| {
            let command = question.command.map(|command| command.0.simple().to_string());
            let stream = question.stream;
            let head = question.last.is_none().then(|| {
                let hash = stream_hash(stream);
                (hash, Bucket::of_hash(hash).hashes())
            });
            let (hash, bucket) = head.unzip();
            let (lowest, highest) = bucket.unzip();
            (stream.category(), stream.id(), command, hash, lowest, highest)
        })
        .collect();
    let asked = serde_json::to_string(&asked).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let query = sqlx::query_as(BEGIN).bind(asked);
    let (end, declared, answers): (i64, Option<i64>, String) = query.fetch_one(connection).await?;
    let answers = serde_json::from_str(&answers);
    Ok((end, declared, answers.map_err(|error| sqlx::Error::Decode(error.into()))?))
}

/// Returns the head of a stream and the digest of its bucket.
pub(crate) async fn head(
    connection: &mut SqliteConnection,
    stream: &StreamId,
) -> Result<KnownHead, sqlx::Error> {
    let sql = "SELECT (SELECT version FROM kafold_stream \
                       WHERE partition = 0 AND hash = ?3 AND category = ?1 AND stream_id = ?2), \
                 (SELECT count(*) FROM kafold_stream WHERE partition = 0 AND hash = ?3), \
                 (SELECT json_group_array(digest) FROM kafold_stream \
                  WHERE partition = 0 AND hash BETWEEN ?4 AND ?5)";
    let hash = stream_hash(stream);
    let (lowest, highest) = Bucket::of_hash(hash).hashes();
    let query = sqlx::query_as(sql).bind(stream.category()).bind(stream.id());
    let query = query.bind(hash).bind(lowest).bind(highest);
    let (version, same_hash, bucket): (Option<i64>, u64, String) =
        query.fetch_one(connection).await?;
    Ok(HeadAnswer(version, same_hash, digests(&bucket)?).into())
}

/// Returns `true` if the name of every head with the stream's hash also has this hash: the hashes
/// collide. A renamed head returns `false`.
pub(crate) async fn heads_collide(
    executor: impl SqliteExecutor<'_>,
    stream: &StreamId,
) -> Result<bool, sqlx::Error> {
    let hash = stream_hash(stream);
    let sql = "SELECT category, stream_id FROM kafold_stream WHERE partition = 0 AND hash = ?";
    let heads: Vec<(String, String)> = sqlx::query_as(sql).bind(hash).fetch_all(executor).await?;
    let has_hash = |(category, id): &(String, String)| {
        StreamId::new(category, id).is_ok_and(|other| stream_hash(&other) == hash)
    };
    Ok(heads.iter().all(has_hash))
}

/// Parses the digests in a JSON array.
fn digests(json: &str) -> Result<Vec<i64>, sqlx::Error> {
    serde_json::from_str(json).map_err(|error| sqlx::Error::Decode(error.into()))
}

fn xor(digests: Vec<i64>) -> Digest {
    let mut xor = Digest::default();
    digests.into_iter().for_each(|digest| xor ^= Digest(digest as u64));
    xor
}

/// Returns the end and the digest of the log in `kafold_log`.
pub(crate) async fn declared(
    executor: impl SqliteExecutor<'_>,
) -> Result<Option<IndexTotal>, sqlx::Error> {
    let row = sqlx::query_as("SELECT next_offset, digest FROM kafold_log");
    let row: Option<(i64, i64)> = row.fetch_optional(executor).await?;
    let total = |(next, digest)| IndexTotal { events: next as u64, digest: Digest(digest as u64) };
    Ok(row.map(total))
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

const COLUMNS: usize = 12;

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
    values.add(&*event.payload)?;
    values.add(placed.hash)?;
    values.add(placed.digest.0 as i64)
}

macro_rules! row {
    () => {
        "(?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
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
             event_type, recorded_at, command_id, metadata, payload, hash, digest) ",
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
    digest: i64,
}

/// A page of a stream's events, with the facts about the whole stream in the same snapshot.
pub(crate) struct StreamPage {
    /// The events, in order.
    pub(crate) events: Vec<RecordedEvent>,
    /// `true` if more events follow.
    pub(crate) more: bool,
    /// The end of the log in `kafold_log`.
    pub(crate) end: Offset,
    /// The stream's head.
    pub(crate) head: Option<IndexHead>,
    /// Number of heads with the stream's hash, under any name.
    pub(crate) same_hash: u64,
    /// The digest of the heads in the stream's bucket.
    pub(crate) bucket: Digest,
}

/// A row of a page: the facts about the stream, and an event if any.
#[derive(FromRow)]
struct PageRow {
    end: i64,
    head_version: Option<i64>,
    head_digest: Option<i64>,
    same_hash: u64,
    bucket: String,
    version: Option<i64>,
}

/// Returns the events of a stream above a version, [`READ_PAGE_EVENTS`] at most. Runs one
/// statement, and so one snapshot.
pub(crate) async fn read_page(
    executor: impl SqliteExecutor<'_>,
    stream: &StreamId,
    after: Version,
) -> Result<StreamPage, ReadError> {
    let sql = r#"
        WITH of_stream AS MATERIALIZED (
            SELECT l.next_offset AS end, s.version AS head_version, s.digest AS head_digest,
                (SELECT count(*) FROM kafold_stream
                 WHERE partition = 0 AND hash = ?4) AS same_hash,
                (SELECT json_group_array(digest) FROM kafold_stream
                 WHERE partition = 0 AND hash BETWEEN ?5 AND ?6) AS bucket
            FROM kafold_log l
            LEFT JOIN kafold_stream s
                ON s.partition = 0 AND s.hash = ?4 AND s.category = ?1 AND s.stream_id = ?2)
        SELECT o.end, o.head_version, o.head_digest, o.same_hash, o.bucket, e.category, e.stream_id, e.version,
            e.partition, e."offset", e.event_id, e.event_type, e.recorded_at, e.command_id, e.metadata,
            e.payload, e.digest
        FROM of_stream o
        LEFT JOIN (SELECT * FROM kafold_event
                   WHERE category = ?1 AND stream_id = ?2 AND version > ?3
                   ORDER BY version LIMIT ?7 + 0) e
        ORDER BY e.version"#;
    // A bare `LIMIT ?7` would have SQLite parse the statement again at each use, to see the value.
    let hash = stream_hash(stream);
    let (lowest, highest) = Bucket::of_hash(hash).hashes();
    let query = sqlx::query(sql).bind(stream.category()).bind(stream.id()).bind(signed(after.0));
    let query = query.bind(hash).bind(lowest).bind(highest).bind(READ_PAGE_EVENTS);
    let rows = query.fetch_all(executor).await.map_err(not_read)?;
    let Some(first) = rows.first() else {
        return Err(ReadError::diverged("the log in the file", NO_LOG_ROW));
    };
    let of_stream = PageRow::from_row(first).map_err(not_read)?;
    let head = of_stream.head_version.zip(of_stream.head_digest);
    let head = head.map(|(version, digest)| IndexHead {
        version: Version(version as u64),
        digest: Digest(digest as u64),
    });
    let mut events = Vec::new();
    if of_stream.version.is_some() {
        for row in &rows {
            events.push(EventRow::from_row(row).map_err(not_read)?.recorded()?);
        }
    }
    let more = events.len() as i64 == READ_PAGE_EVENTS;
    let bucket = xor(digests(&of_stream.bucket).map_err(not_read)?);
    Ok(StreamPage {
        events,
        more,
        end: Offset(of_stream.end as u64),
        head,
        same_hash: of_stream.same_hash,
        bucket,
    })
}

/// Returns the sums over the heads of all streams, in total and by bucket.
pub(crate) async fn heads(
    connection: &mut SqliteConnection,
) -> Result<(IndexTotal, BucketDigests), sqlx::Error> {
    let (mut total, mut buckets) = (IndexTotal::default(), BucketDigests::default());
    let sql = "SELECT hash, category, stream_id, version, digest FROM kafold_stream \
               WHERE partition = 0";
    let mut rows = sqlx::query_as(sql).fetch(connection);
    while let Some((hash, category, id, version, digest)) = rows.try_next().await? {
        let (category, id): (String, String) = (category, id);
        let (hash, version, digest): (i64, i64, i64) = (hash, version, digest);
        let of_name = StreamId::new(&category, &id).map_or(!hash, |stream| stream_hash(&stream));
        // A hash of another stream changes the total, so a head in the wrong bucket is detected.
        total.add(version as u64, Digest((digest ^ hash ^ of_name) as u64));
        buckets.add(Bucket::of_hash(hash), Digest(digest as u64));
    }
    Ok((total, buckets))
}

/// Replaces the heads of all streams and the totals of the log.
pub(crate) async fn replace_heads(
    connection: &mut SqliteConnection,
    heads: &HashMap<StreamId, IndexHead>,
    total: &IndexTotal,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO kafold_unlocked VALUES (1)").execute(&mut *connection).await?;
    sqlx::query("DELETE FROM kafold_stream").execute(&mut *connection).await?;
    for (stream, head) in heads {
        let sql = "INSERT INTO kafold_stream \
                     (partition, hash, category, stream_id, version, digest) \
                   VALUES (0, ?, ?, ?, ?, ?)";
        let query = sqlx::query(sql).bind(stream_hash(stream)).bind(stream.category());
        let query = query.bind(stream.id()).bind(signed(head.version.0));
        query.bind(head.digest.0 as i64).execute(&mut *connection).await?;
    }
    // A log without its row gets a new id, so its readers report a foreign position.
    let sql = "INSERT INTO kafold_log (singleton, log_id, created_at, next_offset, digest) \
               VALUES (1, lower(hex(randomblob(16))), unixepoch() * 1000000, ?, ?) \
               ON CONFLICT (singleton) DO UPDATE \
               SET next_offset = excluded.next_offset, digest = excluded.digest";
    let query = sqlx::query(sql).bind(signed(total.events)).bind(total.digest.0 as i64);
    query.execute(&mut *connection).await?;
    sqlx::query("DELETE FROM kafold_unlocked").execute(&mut *connection).await.map(drop)
}

/// Fills in the digests of events written by a version without digests, once.
pub(crate) async fn fill_in_digests(database: &SqliteDatabase) -> Result<(), sqlx::Error> {
    let missing = "SELECT EXISTS (SELECT 1 FROM kafold_log WHERE next_offset < 0)";
    if !sqlx::query_scalar::<_, bool>(missing).fetch_one(database.readers()).await? {
        return Ok(());
    }
    let mut tx = database.write().await?;
    // Another process may have filled in the digests meanwhile.
    if !sqlx::query_scalar::<_, bool>(missing).fetch_one(&mut *tx).await? {
        return tx.rollback().await;
    }
    let (mut next, mut total) = (Offset(0), Digest::default());
    loop {
        let page = read_rows(&mut *tx, next, READ_PAGE_EVENTS).await?;
        if page.is_empty() {
            break;
        }
        for row in page {
            let event = row.unchecked().map_err(|error| sqlx::Error::Decode(error.into()))?;
            let (hash, digest) = (stream_hash(&event.stream), Digest::of(&event));
            let sql = r#"UPDATE kafold_event SET hash = ?, digest = ?
                         WHERE partition = 0 AND "offset" = ?"#;
            let query = sqlx::query(sql).bind(hash).bind(digest.0 as i64);
            query.bind(signed(event.position.offset.0)).execute(&mut *tx).await?;
            let sql = "INSERT INTO kafold_stream \
                         (partition, hash, category, stream_id, version, digest) \
                       VALUES (0, ?, ?, ?, ?, ?) \
                       ON CONFLICT (partition, hash, category, stream_id) DO UPDATE \
                       SET version = excluded.version, \
                         digest = (digest | excluded.digest) - (digest & excluded.digest)";
            let query = sqlx::query(sql).bind(hash).bind(event.stream.category());
            let query = query.bind(event.stream.id()).bind(signed(event.version.0));
            query.bind(digest.0 as i64).execute(&mut *tx).await?;
            total ^= digest;
            next = event.position.offset.plus(1);
        }
    }
    let query = sqlx::query("UPDATE kafold_log SET next_offset = ?, digest = ?");
    query.bind(signed(next.0)).bind(total.0 as i64).execute(&mut *tx).await?;
    tx.commit().await?;
    tracing::info!(events = next.0, "the log in the file has got its digests");
    Ok(())
}

/// Up to `limit` events of the log from an offset on.
pub(crate) async fn read_log(
    executor: impl SqliteExecutor<'_>,
    from: Offset,
    limit: i64,
) -> Result<Vec<RecordedEvent>, ReadError> {
    let rows = read_rows(executor, from, limit).await.map_err(not_read)?;
    rows.into_iter().map(EventRow::recorded).collect()
}

async fn read_rows(
    executor: impl SqliteExecutor<'_>,
    from: Offset,
    limit: i64,
) -> Result<Vec<EventRow>, sqlx::Error> {
    // At a bare `LIMIT ?` SQLite parses the statement again at each use, to see the value.
    let query = r#"SELECT category, stream_id, version, partition, "offset", event_id, event_type,
                          recorded_at, command_id, metadata, payload, digest
                   FROM kafold_event WHERE partition = 0 AND "offset" >= ?
                   ORDER BY "offset" LIMIT ? + 0"#;
    sqlx::query_as(query).bind(signed(from.0)).bind(limit).fetch_all(executor).await
}

impl EventRow {
    /// Returns the event, or an error for a row which has changed since its insert.
    fn recorded(self) -> Result<RecordedEvent, ReadError> {
        let (place, digest) = (format!("event at {}:{}", self.partition, self.offset), self.digest);
        let event = self.unchecked()?;
        match Digest::of(&event).0 as i64 == digest {
            true => Ok(event),
            false => Err(ReadError::diverged(place, "its row has changed since it was written")),
        }
    }

    fn unchecked(self) -> Result<RecordedEvent, ReadError> {
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

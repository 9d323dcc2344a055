//! The tables `kafold_parked_event` and `kafold_skipped_event`: events that failed for good, those of
//! their streams that came later, and events that an operator has left out.
//!
//! The worker that holds a partition is the only one that parks and un-parks its streams, under the
//! lock of the partition's checkpoint; operators only ask.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use kafold_core::{CommandId, Offset, Partition, Position, RecordedEvent, StreamId};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;

use crate::checkpoint::{bigint, int};
use crate::handler::Target;
use crate::index::{EventRow, More, RowError};
use crate::sql::{either, reading};
use crate::transaction::Transaction;

/// Sets an event aside; `error` says what happened when it is the one at fault.
pub(crate) async fn insert(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    event: &RecordedEvent,
    error: Option<(&str, u32)>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "INSERT INTO kafold_parked_event \
                 (projection, generation, partition, \"offset\", category, stream_id, version, \
                  event_id, event_type, recorded_at, command_id, metadata, payload, error, \
                  attempts, retry, parked_at) \
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)";
    either!(tx, connection => {
        let query = sqlx::query(sql)
            .bind(target.name)
            .bind(target.generation.int())
            .bind(int(event.position.partition))
            .bind(bigint(event.position.offset))
            .bind(event.stream.category())
            .bind(event.stream.id())
            .bind(i64::try_from(event.version.0).unwrap_or(i64::MAX))
            .bind(event.metadata.event_id)
            .bind(&*event.event_type)
            .bind(Time(event.metadata.recorded_at))
            .bind(event.command_id.0)
            .bind(More::text_of(&event.metadata))
            .bind(&*event.payload)
            .bind(error.map(|(text, _)| text))
            .bind(error.map_or(0, |(_, attempts)| i64::from(attempts)))
            .bind(false)
            .bind(Time(now));
        query.execute(&mut **connection).await.map(drop)
    })
}

/// How many streams of a generation are parked.
pub(crate) async fn count_streams(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
) -> Result<i64, sqlx::Error> {
    let sql = "SELECT COUNT(*) FROM (SELECT DISTINCT category, stream_id FROM kafold_parked_event \
                 WHERE projection = $1 AND generation = $2) streams";
    either!(tx, connection => {
        let query = sqlx::query_scalar(sql).bind(target.name).bind(target.generation.int());
        query.fetch_one(&mut **connection).await
    })
}

/// The parked streams of a generation, with their events' count.
pub(crate) async fn streams(
    database: &Database,
    target: Target<'_>,
) -> Result<Vec<(Partition, StreamId, u64)>, sqlx::Error> {
    let sql = "SELECT partition, category, stream_id, COUNT(*) FROM kafold_parked_event \
               WHERE projection = $1 AND generation = $2 GROUP BY partition, category, stream_id";
    let rows: Vec<(i32, String, String, i64)> = reading!(database, pool => {
        let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
        query.fetch_all(pool).await?
    });
    rows.into_iter()
        .map(|(partition, category, id, count)| {
            Ok((Partition(partition.unsigned_abs()), stream(&category, &id)?, count.unsigned_abs()))
        })
        .collect()
}

/// A parked event, and what operators ask of it.
#[derive(Debug)]
pub(crate) struct ParkedEvent {
    pub(crate) event: RecordedEvent,
    pub(crate) retry: bool,
    /// Whether its commit is to be left out.
    pub(crate) skipped: bool,
}

/// The first events of a parked stream, in their order.
pub(crate) async fn head(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    stream: &StreamId,
    limit: usize,
) -> Result<Vec<ParkedEvent>, RowError> {
    let sql = "SELECT p.category, p.stream_id, p.version, p.partition, p.\"offset\", p.event_id, \
                 p.event_type, p.recorded_at, p.command_id, p.metadata, p.payload, p.retry, \
                 p.command_id IN (SELECT o.command_id FROM kafold_parked_event o \
                   JOIN kafold_skipped_event s USING (projection, generation, partition, \"offset\") \
                   WHERE o.projection = $1 AND o.generation = $2 AND o.category = $3 \
                     AND o.stream_id = $4) AS skipped \
               FROM kafold_parked_event p \
               WHERE p.projection = $1 AND p.generation = $2 AND p.category = $3 \
                 AND p.stream_id = $4 \
               ORDER BY p.version LIMIT $5";
    let rows: Vec<ParkedRow> = either!(tx, connection => {
        let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
        let query = query.bind(stream.category()).bind(stream.id());
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        query.bind(limit).fetch_all(&mut **connection).await?
    });
    rows.into_iter()
        .map(|ParkedRow { event, retry, skipped }| {
            Ok(ParkedEvent { event: event.event()?, retry, skipped })
        })
        .collect()
}

#[derive(sqlx::FromRow)]
struct ParkedRow {
    #[sqlx(flatten)]
    event: EventRow,
    retry: bool,
    skipped: bool,
}

/// Leaves out the commits of which an event is skipped, and tells which they are: commits take effect
/// whole or not at all.
pub(crate) fn leave_out(
    events: &mut Vec<RecordedEvent>,
    is_skipped: impl Fn(Position) -> bool,
) -> HashSet<(StreamId, CommandId)> {
    let commit = |event: &RecordedEvent| (event.stream.clone(), event.command_id);
    let skipped: HashSet<_> =
        events.iter().filter(|event| is_skipped(event.position)).map(commit).collect();
    if !skipped.is_empty() {
        events.retain(|event| !skipped.contains(&commit(event)));
    }
    skipped
}

/// Takes the events of a stream up to an offset out of the table: they are applied or left out.
pub(crate) async fn delete(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    stream: &StreamId,
    last: Offset,
) -> Result<(), sqlx::Error> {
    let sql = "DELETE FROM kafold_parked_event WHERE projection = $1 AND generation = $2 \
               AND category = $3 AND stream_id = $4 AND \"offset\" <= $5";
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(target.name).bind(target.generation.int());
        let query = query.bind(stream.category()).bind(stream.id()).bind(bigint(last));
        query.execute(&mut **connection).await.map(drop)
    })
}

/// Writes down that an event failed again, the first one when it is not known which, and takes the
/// request to retry its stream back.
pub(crate) async fn failed_again(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    stream: &StreamId,
    at: Option<Offset>,
    error: &str,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_parked_event SET error = $6, attempts = attempts + 1 \
               WHERE projection = $1 AND generation = $2 AND category = $3 AND stream_id = $4 \
                 AND \"offset\" = COALESCE($5, (SELECT MIN(f.\"offset\") FROM kafold_parked_event f \
                   WHERE f.projection = $1 AND f.generation = $2 AND f.category = $3 \
                     AND f.stream_id = $4))";
    let done = "UPDATE kafold_parked_event SET retry = $5 \
                WHERE projection = $1 AND generation = $2 AND category = $3 AND stream_id = $4";
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(target.name).bind(target.generation.int());
        let query = query.bind(stream.category()).bind(stream.id());
        query.bind(at.map(bigint)).bind(error).execute(&mut **connection).await?;
        let query = sqlx::query(done).bind(target.name).bind(target.generation.int());
        let query = query.bind(stream.category()).bind(stream.id()).bind(false);
        query.execute(&mut **connection).await.map(drop)
    })
}

pub(crate) fn stream(category: &str, id: &str) -> Result<StreamId, sqlx::Error> {
    StreamId::new(category, id).map_err(|error| sqlx::Error::Decode(error.into()))
}

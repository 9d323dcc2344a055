//! The statements of the index on SQLite.

use chrono::{DateTime, Utc};
use kafold_core::index::{Advanced, IndexBatch, IndexLoad, IndexRead};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::{Offset, RecordedEvent};
use kafold_migrations::{SqlText, SqliteDatabase, micros};
use sqlx::{FromRow, SqliteConnection, SqlitePool};
use uuid::Uuid;

use super::{
    EventRow, More, RowError, Stored, bigint, check_stored, cursor, cut, offset_of, partition_int,
};
use crate::table::list_places;

/// One statement, so that the position is of the same snapshot as the answer. By command: the planner
/// would rather read the whole stream.
pub(super) const FIND_COMMAND: &str = "SELECT p.next_offset, e.version, e.partition, e.\"offset\" \
     FROM (SELECT 1 AS one) o \
     LEFT JOIN kafold_partition p ON p.partition = $1 \
     LEFT JOIN kafold_event e INDEXED BY kafold_event_command ON e.category = $2 AND e.stream_id = $3 AND e.command_id = $4 \
     ORDER BY e.version DESC LIMIT 1";
const COLUMNS: usize = 11;
/// Events in one statement: 11 values each, of 32 766 that SQLite takes.
const EVENTS_MAX: usize = 500;

/// Each batch in a transaction of its own: there is no round trip to save.
pub(super) async fn advance(
    database: &SqliteDatabase,
    batches: &[IndexBatch],
    now: DateTime<Utc>,
) -> Vec<Result<Advanced, ReadError>> {
    let mut answers = Vec::with_capacity(batches.len());
    for batch in batches {
        answers.push(advance_one(database, batch, now).await.map_err(RowError::into));
    }
    answers
}

async fn advance_one(
    database: &SqliteDatabase,
    batch: &IndexBatch,
    now: DateTime<Utc>,
) -> Result<Advanced, RowError> {
    // The only transaction in the file that writes: nothing else needs a lock.
    let mut tx = database.write().await?;
    let Some(position) = position(&mut tx, batch, now).await? else {
        tx.rollback().await?;
        return Ok(Advanced::Behind(None));
    };
    if position.next < batch.from && !mutant::active(Mutant::IndexPlainMaximum) {
        tx.rollback().await?;
        return Ok(Advanced::Behind(Some(position)));
    }
    let mut inserted = 0;
    for chunk in batch.events.chunks(EVENTS_MAX) {
        inserted += insert(&mut tx, chunk).await?;
    }
    if inserted < batch.events.len() as u64 {
        check_stored(batch, &stored(&mut tx, &batch.events).await?)?;
    }
    if batch.to.next > position.next {
        let sql = "UPDATE kafold_partition SET next_offset = $2, fold_state = $3, updated_at = $4 \
                   WHERE partition = $1";
        let query = sqlx::query(sql).bind(partition_int(batch.partition));
        let query = query.bind(bigint(batch.to.next.0)).bind(&batch.to.state);
        query.bind(micros::to_micros(now)).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(Advanced::Moved)
}

/// Where the partition stands. A missing row is made for a batch from 0 only; for any other there
/// is none.
async fn position(
    connection: &mut SqliteConnection,
    batch: &IndexBatch,
    now: DateTime<Utc>,
) -> Result<Option<Cursor>, RowError> {
    let partition = partition_int(batch.partition);
    if batch.from == Offset(0) {
        let sql = "INSERT INTO kafold_partition (partition, next_offset, fold_state, updated_at) \
                   VALUES ($1, 0, '', $2) ON CONFLICT DO NOTHING";
        let query = sqlx::query(sql).bind(partition).bind(micros::to_micros(now));
        query.execute(&mut *connection).await?;
    }
    let sql = "SELECT next_offset, fold_state FROM kafold_partition WHERE partition = $1";
    let query = sqlx::query_as(sql).bind(partition);
    let row: Option<(i64, String)> = query.fetch_optional(connection).await?;
    Ok(row.map(|(next, state)| cursor(next, state)).transpose()?)
}

/// Answers how many events were not there yet.
async fn insert(
    connection: &mut SqliteConnection,
    events: &[RecordedEvent],
) -> Result<u64, sqlx::Error> {
    let mut sql = SqlText::new(
        "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
         event_type, recorded_at, command_id, metadata, payload) VALUES ",
    );
    sql.list(", ", 0..events.len(), |sql, _| {
        sql.text("(");
        list_places(sql, COLUMNS).text(")");
    });
    sql.text(" ON CONFLICT DO NOTHING");
    let often = events.len() == 1 || events.len() == EVENTS_MAX;
    let mut query = sqlx::query(sql.finish()).persistent(often);
    for event in events {
        query = query
            .bind(event.stream.category())
            .bind(event.stream.id())
            .bind(bigint(event.version.0))
            .bind(partition_int(event.position.partition))
            .bind(bigint(event.position.offset.0))
            .bind(event.metadata.event_id)
            .bind(&*event.event_type)
            .bind(micros::to_micros(event.metadata.recorded_at))
            .bind(event.command_id.0)
            .bind(More::text_of(&event.metadata))
            .bind(&*event.payload);
    }
    Ok(query.execute(connection).await?.rows_affected())
}

/// What lies at the streams and versions of these events.
async fn stored(
    connection: &mut SqliteConnection,
    events: &[RecordedEvent],
) -> Result<Stored, sqlx::Error> {
    let sql = "SELECT partition, \"offset\", event_id FROM kafold_event \
               WHERE category = $1 AND stream_id = $2 AND version = $3";
    let mut stored = Stored::new();
    for event in events {
        let (category, id, version) =
            (event.stream.category(), event.stream.id(), bigint(event.version.0));
        let query = sqlx::query_as(sql).bind(category).bind(id).bind(version);
        let row: Option<(i32, i64, Uuid)> = query.fetch_optional(&mut *connection).await?;
        if let Some(found) = row {
            stored.insert((category.to_owned(), id.to_owned(), version), found);
        }
    }
    Ok(stored)
}

/// All requests in one transaction, which is one snapshot; there is no round trip to save.
pub(super) async fn load(
    readers: &SqlitePool,
    requests: &[IndexLoad],
    limit: usize,
) -> Result<Vec<IndexRead>, RowError> {
    let position_sql = "SELECT next_offset FROM kafold_partition WHERE partition = $1";
    let events_sql = "SELECT category, stream_id, version, partition, \"offset\", event_id, \
                        event_type, recorded_at, command_id, metadata, payload \
                      FROM kafold_event \
                      WHERE category = $1 AND stream_id = $2 AND version > $3 \
                      ORDER BY version LIMIT $4";
    let mut tx = readers.begin().await?;
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let query = sqlx::query_scalar(position_sql).bind(partition_int(request.partition));
        let position: Option<i64> = query.fetch_optional(&mut *tx).await?;
        // One more than wanted tells whether there are more.
        let query = sqlx::query(events_sql)
            .bind(request.stream.category())
            .bind(request.stream.id())
            .bind(bigint(request.after.0))
            .bind(bigint(limit as u64).saturating_add(1));
        let mut events = Vec::new();
        for row in &query.fetch_all(&mut *tx).await? {
            events.push(EventRow::from_row(row)?.event()?);
        }
        answers.push(cut(offset_of(position.unwrap_or(0))?, events, limit));
    }
    tx.commit().await?;
    Ok(answers)
}

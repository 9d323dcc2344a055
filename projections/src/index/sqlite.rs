//! The statements of the index on SQLite.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use kafold_core::digest::{Bucket, Digest, stream_hash};
use kafold_core::index::{
    Advanced, IndexBatch, IndexCount, IndexHeads, IndexLoad, IndexRead, IndexTotal,
};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::{Offset, Partition, RecordedEvent};
use kafold_migrations::{SqlText, SqliteDatabase, begin, micros};
use sqlx::{FromRow, SqliteConnection, SqlitePool};
use uuid::Uuid;

use super::{
    IndexedRow, More, RowError, Stored, added, bigint, check_other_head, check_stored, checksum,
    cursor, cut, head, partition_int, partition_of, place, total,
};
use crate::table::list_places;

/// One statement, so that the position is of the same snapshot as the answer. By command: the planner
/// would rather read the whole stream.
pub(super) const FIND_COMMAND: &str = "SELECT p.next_offset, e.version, e.partition, e.\"offset\" \
     FROM (SELECT 1 AS one) o \
     LEFT JOIN kafold_partition p ON p.partition = $1 \
     LEFT JOIN kafold_event e INDEXED BY kafold_event_command ON e.category = $2 AND e.stream_id = $3 AND e.command_id = $4 \
     ORDER BY e.version DESC LIMIT 1";
const COLUMNS: usize = 13;
/// Most events in one statement: 13 values each, and SQLite's limit is 32 766 values.
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
        // (a | b) - (a & b) is a XOR b.
        let sql = "UPDATE kafold_partition SET next_offset = $2, fold_state = $3, updated_at = $4, \
                     events = events + $5, digest = (digest | $6) - (digest & $6), checksum = $7 \
                   WHERE partition = $1";
        let next = bigint(batch.to.next.0);
        let events = batch.events.iter().map(|event| (event, Digest::of(event)));
        let added = added(events, position.next);
        let query = sqlx::query(sql).bind(partition_int(batch.partition));
        let query = query.bind(next).bind(&batch.to.state).bind(micros::to_micros(now));
        let query = query.bind(bigint(added.events)).bind(added.digest.0 as i64);
        let query = query.bind(checksum(batch.partition, next, &batch.to.state));
        query.execute(&mut *tx).await?;
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
        let sql = "INSERT INTO kafold_partition (partition, next_offset, fold_state, updated_at, \
                     checksum) VALUES ($1, 0, '', $2, $3) ON CONFLICT DO NOTHING";
        let query = sqlx::query(sql).bind(partition).bind(micros::to_micros(now));
        query.bind(checksum(batch.partition, 0, "")).execute(&mut *connection).await?;
    }
    let sql = "SELECT next_offset, fold_state, checksum FROM kafold_partition WHERE partition = $1";
    let query = sqlx::query_as(sql).bind(partition);
    let row: Option<(i64, String, i64)> = query.fetch_optional(connection).await?;
    let cursor = |(next, state, stored)| cursor(batch.partition, next, state, stored);
    Ok(row.map(cursor).transpose()?)
}

/// Answers how many events were not there yet.
async fn insert(
    connection: &mut SqliteConnection,
    events: &[RecordedEvent],
) -> Result<u64, sqlx::Error> {
    let mut sql = SqlText::new(
        "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
         event_type, recorded_at, command_id, metadata, payload, hash, digest) VALUES ",
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
            .bind(&*event.payload)
            .bind(stream_hash(&event.stream))
            .bind(Digest::of(event).0 as i64);
    }
    Ok(query.execute(connection).await?.rows_affected())
}

/// What lies at the streams and versions of these events.
async fn stored(
    connection: &mut SqliteConnection,
    events: &[RecordedEvent],
) -> Result<Stored, sqlx::Error> {
    let sql = "SELECT partition, \"offset\", event_id, digest FROM kafold_event \
               WHERE category = $1 AND stream_id = $2 AND version = $3";
    let mut stored = Stored::new();
    for event in events {
        let (category, id, version) =
            (event.stream.category(), event.stream.id(), bigint(event.version.0));
        let query = sqlx::query_as(sql).bind(category).bind(id).bind(version);
        let row: Option<(i32, i64, Uuid, i64)> = query.fetch_optional(&mut *connection).await?;
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
) -> Result<Vec<Result<IndexRead, ReadError>>, RowError> {
    let position_sql = "SELECT next_offset FROM kafold_partition WHERE partition = $1";
    let head_sql = "SELECT category, stream_id, version, digest FROM kafold_stream \
                    WHERE partition = $1 AND hash = $2";
    let bucket_sql = "SELECT digest FROM kafold_stream \
                      WHERE partition = $1 AND hash BETWEEN $2 AND $3";
    // At a bare `LIMIT $4` SQLite parses the statement again at each use, to see the value.
    let events_sql = "SELECT category, stream_id, version, partition, \"offset\", event_id, \
                        event_type, recorded_at, command_id, metadata, payload, digest \
                      FROM kafold_event \
                      WHERE category = $1 AND stream_id = $2 AND version > $3 \
                      ORDER BY version LIMIT $4 + 0";
    let mut tx = begin(readers, "BEGIN").await?;
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let partition = partition_int(request.partition);
        let (category, id) = (request.stream.category(), request.stream.id());
        let query = sqlx::query_scalar(position_sql).bind(partition);
        let position: Option<i64> = query.fetch_optional(&mut *tx).await?;
        let hash = stream_hash(&request.stream);
        let query = sqlx::query_as(head_sql).bind(partition).bind(hash);
        let heads: Vec<(String, String, i64, i64)> = query.fetch_all(&mut *tx).await?;
        let (own, others): (Vec<_>, Vec<_>) = heads
            .into_iter()
            .partition(|(of, stream_id, ..)| (&**of, &**stream_id) == (category, id));
        let mut others = others.into_iter().map(|(category, stream_id, ..)| (category, stream_id));
        let checked =
            others.try_for_each(|other| check_other_head("kafold_stream", request, Some(other)));
        let (lowest, highest) = Bucket::of_hash(hash).hashes();
        let query = sqlx::query_scalar(bucket_sql).bind(partition).bind(lowest).bind(highest);
        let mut bucket = Digest::default();
        for digest in query.fetch_all(&mut *tx).await? {
            let digest: i64 = digest;
            bucket ^= Digest(digest as u64);
        }
        // One more than wanted tells whether there are more.
        let query = sqlx::query(events_sql)
            .bind(category)
            .bind(id)
            .bind(bigint(request.after.0))
            .bind(bigint(limit as u64).saturating_add(1));
        let rows = query.fetch_all(&mut *tx).await?;
        let events = rows.iter().map(|row| Ok(IndexedRow::from_row(row)?.event()));
        let events: Result<Result<Vec<_>, _>, sqlx::Error> = events.collect();
        let position = place(request.partition, position.unwrap_or(0));
        let head =
            own.first().and_then(|(.., version, digest)| head(Some(*version), Some(*digest)));
        let read = events?.and_then(|events| {
            let read = IndexRead { position: position?, events, more: false, head, bucket };
            Ok(cut(read, limit))
        });
        answers.push(checked.and(read));
    }
    tx.commit().await?;
    Ok(answers)
}

/// Reads in one transaction, and so in one snapshot.
pub(super) async fn heads(
    readers: &SqlitePool,
    partition: Partition,
) -> Result<IndexHeads, RowError> {
    let mut tx = begin(readers, "BEGIN").await?;
    let sql = "SELECT next_offset, events, digest FROM kafold_partition WHERE partition = $1";
    let query = sqlx::query_as(sql).bind(partition_int(partition));
    let found: Option<(i64, i64, i64)> = query.fetch_optional(&mut *tx).await?;
    let (next, events, digest) = found.unwrap_or_default();
    let (position, declared) = (place(partition, next)?, total(events, digest));
    let mut heads = IndexHeads { position, declared, ..IndexHeads::default() };
    let sql = "SELECT hash, version, digest FROM kafold_stream WHERE partition = $1";
    let mut rows = sqlx::query_as(sql).bind(partition_int(partition)).fetch(&mut *tx);
    while let Some((hash, version, digest)) = rows.try_next().await? {
        let of_stream = total(version, digest);
        heads.found.add(of_stream.events, Digest(of_stream.digest.0 ^ hash as u64));
        heads.buckets.add(Bucket::of_hash(hash), of_stream.digest);
    }
    drop(rows);
    tx.commit().await?;
    Ok(heads)
}

/// Reads in one transaction, and so in one snapshot.
pub(super) async fn count(readers: &SqlitePool) -> Result<Vec<IndexCount>, RowError> {
    let mut totals: BTreeMap<i32, (IndexTotal, IndexTotal)> = BTreeMap::new();
    let mut tx = begin(readers, "BEGIN").await?;
    let sql = "SELECT partition, digest FROM kafold_event";
    let mut rows = sqlx::query_as(sql).fetch(&mut *tx);
    while let Some((partition, digest)) = rows.try_next().await? {
        let digest: i64 = digest;
        totals.entry(partition).or_default().0.add(1, Digest(digest as u64));
    }
    drop(rows);
    let sql = "SELECT partition, version, digest FROM kafold_stream";
    let mut rows = sqlx::query_as(sql).fetch(&mut *tx);
    while let Some((partition, version, digest)) = rows.try_next().await? {
        let of_stream = total(version, digest);
        totals.entry(partition).or_default().1.add(of_stream.events, of_stream.digest);
    }
    drop(rows);
    tx.commit().await?;
    let counts = totals.into_iter().map(|(partition, (rows, heads))| {
        Ok(IndexCount { partition: partition_of(partition)?, rows, heads })
    });
    counts.collect()
}

/// Returns the rows at the streams and versions of the events.
pub(super) async fn find(
    readers: &SqlitePool,
    events: &[RecordedEvent],
) -> Result<Vec<Option<Result<RecordedEvent, ReadError>>>, RowError> {
    let sql = "SELECT * FROM kafold_event WHERE category = $1 AND stream_id = $2 AND version = $3";
    let mut tx = begin(readers, "BEGIN").await?;
    let mut found = Vec::with_capacity(events.len());
    for event in events {
        let query = sqlx::query(sql).bind(event.stream.category()).bind(event.stream.id());
        let row = query.bind(bigint(event.version.0)).fetch_optional(&mut *tx).await?;
        let row = row.map(|row| Ok::<_, sqlx::Error>(IndexedRow::from_row(&row)?.event()));
        found.push(row.transpose()?);
    }
    tx.commit().await?;
    Ok(found)
}

/// Deletes in one transaction, with the row which disarms the triggers.
pub(super) async fn clear(
    database: &SqliteDatabase,
    partition: Option<Partition>,
) -> Result<(), sqlx::Error> {
    let mut tx = database.write().await?;
    sqlx::query("INSERT INTO kafold_unlocked VALUES (1)").execute(&mut *tx).await?;
    for sql in [
        "DELETE FROM kafold_partition_digest WHERE $1 IS NULL OR partition = $1",
        "DELETE FROM kafold_partition WHERE $1 IS NULL OR partition = $1",
        "DELETE FROM kafold_event WHERE $1 IS NULL OR partition = $1",
        "DELETE FROM kafold_stream WHERE $1 IS NULL OR partition = $1",
    ] {
        sqlx::query(sql).bind(partition.map(partition_int)).execute(&mut *tx).await?;
    }
    sqlx::query("DELETE FROM kafold_unlocked").execute(&mut *tx).await?;
    tx.commit().await
}

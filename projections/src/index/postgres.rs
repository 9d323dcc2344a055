//! The statements of the index on PostgreSQL.

use chrono::{DateTime, Utc};
use kafold_core::digest::{Bucket, Digest, stream_hash};
use kafold_core::index::{Advanced, IndexBatch, IndexCount, IndexHeads, IndexLoad, IndexRead};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::{Offset, Partition, RecordedEvent};
use sqlx::postgres::{PgArguments, PgExecutor};
use sqlx::query::Query;
use sqlx::{FromRow, PgConnection, PgPool, Postgres, Row};

use crate::copy::CopyRows;

use super::{
    IndexedRow, More, RowError, Stored, added, bigint, check_other_head, check_stored, checksum,
    cursor, cut, head, partition_int, partition_of, place, read_error, total,
};

type PgQuery<'q> = Query<'q, Postgres, PgArguments>;

/// One statement, so that the position is of the same snapshot as the answer. Commands come first on
/// their own: without statistics the planner would rather read the whole stream.
pub(super) const FIND_COMMAND: &str = "WITH c AS MATERIALIZED (SELECT category, stream_id, version, \
       partition, \"offset\" FROM kafold_event WHERE command_id = $4) \
     SELECT p.next_offset, c.version, c.partition, c.\"offset\" \
     FROM (SELECT 1 AS one) o \
     LEFT JOIN kafold_partition p ON p.partition = $1 \
     LEFT JOIN c ON c.category = $2 AND c.stream_id = $3 \
     ORDER BY c.version DESC LIMIT 1";
/// Events from which on a batch goes by COPY: for fewer its round trips cost more than it gives.
const COPY_EVENTS_MIN: usize = 50;

/// Almost always the index stands exactly where the batches begin and has none of them. What is not so
/// is looked at closely, one batch at a time.
pub(super) async fn advance(
    pool: &PgPool,
    batches: &[IndexBatch],
    now: DateTime<Utc>,
) -> Vec<Result<Advanced, ReadError>> {
    let numbered = batches.iter().zip(1..);
    let events =
        numbered.flat_map(|(batch, nth)| batch.events.iter().map(move |event| (nth, event)));
    let events: Vec<_> = events.collect();
    let appended = match events.len() {
        COPY_EVENTS_MIN.. => append_by_copy(pool, batches, &events, now).await,
        _ => append(pool, batches, &events, now).await,
    };
    let moved = match appended {
        Ok(moved) => moved,
        Err(error) if is_taken(&error) => Vec::new(),
        Err(error) => {
            let error = read_error(error);
            return batches.iter().map(|_| Err(error.clone())).collect();
        }
    };
    let mut answers = Vec::with_capacity(batches.len());
    for (batch, nth) in batches.iter().zip(1..) {
        answers.push(match moved.contains(&nth) {
            true => Ok(Advanced::Moved),
            false => advance_checked(pool, batch, now).await.map_err(RowError::into),
        });
    }
    answers
}

fn is_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.is_unique_violation())
}

/// Moves the partitions that stand at the beginning of their batches to the end of them, and adds those
/// of the events that belong to these; batches are numbered from 1, and those numbers are answered. The
/// index stands elsewhere than where the others begin.
///
/// Partitions are locked in their order, so that two who do this do not wait for each other. The
/// transaction does not wait until it is on disk: a server that crashes may forget the last of them,
/// rows and places together, and the owner feeds it again.
async fn append(
    database: impl PgExecutor<'_>,
    batches: &[IndexBatch],
    events: &[(i64, &RecordedEvent)],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let sql = "WITH locked AS MATERIALIZED (SELECT partition FROM kafold_partition \
                 WHERE partition = ANY($1) ORDER BY partition FOR UPDATE), \
               moved AS (UPDATE kafold_partition p \
                 SET next_offset = b.next, fold_state = b.state, updated_at = $5, \
                   events = p.events + b.events, digest = p.digest # b.digest, \
                   checksum = b.checksum \
                 FROM locked JOIN UNNEST($1::int4[], $2::int8[], $3::int8[], $4::text[], \
                     $6::int8[], $7::int8[], $8::int8[]) WITH ORDINALITY \
                   AS b (partition, start, next, state, events, digest, checksum, nth) \
                   USING (partition) \
                 WHERE p.partition = locked.partition AND p.next_offset = b.start \
                   AND b.start < b.next \
                 RETURNING b.nth), \
               appended AS (INSERT INTO kafold_event (category, stream_id, version, partition, \
                   \"offset\", event_id, event_type, recorded_at, command_id, metadata, payload, \
                   hash, digest) \
                 SELECT category, stream_id, version, partition, \"offset\", event_id, event_type, \
                   recorded_at, command_id, metadata, payload, hash, digest \
                 FROM UNNEST($9::int8[], $10::text[], $11::text[], $12::int8[], $13::int4[], \
                   $14::int8[], $15::uuid[], $16::text[], $17::timestamptz[], $18::uuid[], \
                   $19::text[], $20::bytea[], $21::int8[], $22::int8[]) \
                   AS e (nth, category, stream_id, version, partition, \"offset\", event_id, \
                     event_type, recorded_at, command_id, metadata, payload, hash, digest) \
                 WHERE nth IN (SELECT nth FROM moved)) \
               SELECT nth, set_config('synchronous_commit', 'off', true) FROM moved";
    let totals = column(batches, |batch| added(batch, batch.from));
    let query = sqlx::query(sql)
        .bind(column(batches, |batch| partition_int(batch.partition)))
        .bind(column(batches, |batch| bigint(batch.from.0)))
        .bind(column(batches, |batch| bigint(batch.to.next.0)))
        .bind(column(batches, |batch| &*batch.to.state))
        .bind(now)
        .bind(column(&totals, |total| bigint(total.events)))
        .bind(column(&totals, |total| total.digest.0 as i64))
        .bind(column(batches, checksum_of))
        .bind(column(events, |(nth, _)| *nth));
    let rows = with_events(query, events, |(_, event)| event).fetch_all(database).await?;
    rows.iter().map(|row| row.try_get("nth")).collect()
}

/// As [`append`], for many events.
async fn append_by_copy(
    pool: &PgPool,
    batches: &[IndexBatch],
    events: &[(i64, &RecordedEvent)],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut tx = pool.begin().await?;
    let moved = append(&mut *tx, batches, &[], now).await?;
    let sql = "COPY kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
               event_type, recorded_at, command_id, metadata, payload, hash, digest) \
               FROM STDIN WITH (FORMAT binary)";
    let mut copy = CopyRows::begin(&mut tx, sql, 13).await?;
    for (_, event) in events.iter().filter(|(nth, _)| moved.contains(nth)) {
        copy.row().await?;
        copy.field(event.stream.category())?;
        copy.field(event.stream.id())?;
        copy.field(bigint(event.version.0))?;
        copy.field(partition_int(event.position.partition))?;
        copy.field(bigint(event.position.offset.0))?;
        copy.field(event.metadata.event_id)?;
        copy.field(&*event.event_type)?;
        copy.field(event.metadata.recorded_at)?;
        copy.field(event.command_id.0)?;
        copy.field(More::text_of(&event.metadata))?;
        copy.field(&*event.payload)?;
        copy.field(stream_hash(&event.stream))?;
        copy.field(Digest::of(event).0 as i64)?;
    }
    copy.finish().await?;
    tx.commit().await?;
    Ok(moved)
}

/// Whatever the index has and wherever it stands.
async fn advance_checked(
    pool: &PgPool,
    batch: &IndexBatch,
    now: DateTime<Utc>,
) -> Result<Advanced, RowError> {
    let mut tx = pool.begin().await?;
    let Some(position) = locked_position(&mut tx, batch, now).await? else {
        tx.rollback().await?;
        return Ok(Advanced::Behind(None));
    };
    if position.next < batch.from && !mutant::active(Mutant::IndexPlainMaximum) {
        tx.rollback().await?;
        return Ok(Advanced::Behind(Some(position)));
    }
    if insert(&mut tx, &batch.events).await? < batch.events.len() as u64 {
        check_stored(batch, &stored(&mut tx, &batch.events).await?)?;
    }
    if batch.to.next > position.next {
        let sql = "UPDATE kafold_partition SET next_offset = $2, fold_state = $3, updated_at = $4, \
                     events = events + $5, digest = digest # $6, checksum = $7 \
                   WHERE partition = $1";
        let added = added(batch, position.next);
        let query = sqlx::query(sql).bind(partition_int(batch.partition));
        let query = query.bind(bigint(batch.to.next.0)).bind(&batch.to.state).bind(now);
        let query = query.bind(bigint(added.events)).bind(added.digest.0 as i64);
        let query = query.bind(checksum_of(batch));
        query.execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(Advanced::Moved)
}

/// Where the partition stands, its row locked until the end of the transaction. A missing row is
/// made for a batch from 0 only; for any other there is none.
async fn locked_position(
    connection: &mut PgConnection,
    batch: &IndexBatch,
    now: DateTime<Utc>,
) -> Result<Option<Cursor>, RowError> {
    let partition = partition_int(batch.partition);
    if batch.from == Offset(0) {
        let sql = "INSERT INTO kafold_partition \
                     (partition, next_offset, fold_state, updated_at, events, digest, checksum) \
                   VALUES ($1, 0, '', $2, 0, 0, $3) ON CONFLICT DO NOTHING";
        let query = sqlx::query(sql).bind(partition).bind(now);
        query.bind(checksum(batch.partition, 0, "")).execute(&mut *connection).await?;
    }
    let sql = "SELECT next_offset, fold_state, checksum FROM kafold_partition \
               WHERE partition = $1 FOR UPDATE";
    let query = sqlx::query_as(sql).bind(partition);
    let row: Option<(i64, String, i64)> = query.fetch_optional(connection).await?;
    let cursor = |(next, state, stored)| cursor(batch.partition, next, state, stored);
    Ok(row.map(cursor).transpose()?)
}

/// Answers how many events were not there yet.
async fn insert(
    connection: &mut PgConnection,
    events: &[RecordedEvent],
) -> Result<u64, sqlx::Error> {
    if events.is_empty() {
        return Ok(0);
    }
    let sql = "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", \
                 event_id, event_type, recorded_at, command_id, metadata, payload, hash, digest) \
               SELECT * FROM UNNEST($1::text[], $2::text[], $3::int8[], $4::int4[], $5::int8[], \
                 $6::uuid[], $7::text[], $8::timestamptz[], $9::uuid[], $10::text[], $11::bytea[], \
                 $12::int8[], $13::int8[]) \
               ON CONFLICT DO NOTHING";
    let query = with_events(sqlx::query(sql), events, |event| event);
    Ok(query.execute(connection).await?.rows_affected())
}

/// Binds an array for each column of `kafold_event`, in their order.
fn with_events<'q, T>(
    query: PgQuery<'q>,
    items: &'q [T],
    event: impl Fn(&'q T) -> &'q RecordedEvent,
) -> PgQuery<'q> {
    query
        .bind(column(items, |item| event(item).stream.category()))
        .bind(column(items, |item| event(item).stream.id()))
        .bind(column(items, |item| bigint(event(item).version.0)))
        .bind(column(items, |item| partition_int(event(item).position.partition)))
        .bind(column(items, |item| bigint(event(item).position.offset.0)))
        .bind(column(items, |item| event(item).metadata.event_id))
        .bind(column(items, |item| &*event(item).event_type))
        .bind(column(items, |item| event(item).metadata.recorded_at))
        .bind(column(items, |item| event(item).command_id.0))
        .bind(column(items, |item| More::text_of(&event(item).metadata)))
        .bind(column(items, |item| &*event(item).payload))
        .bind(column(items, |item| stream_hash(&event(item).stream)))
        .bind(column(items, |item| Digest::of(event(item)).0 as i64))
}

fn checksum_of(batch: &IndexBatch) -> i64 {
    checksum(batch.partition, bigint(batch.to.next.0), &batch.to.state)
}

/// What lies at the streams and versions of these events.
async fn stored(
    connection: &mut PgConnection,
    events: &[RecordedEvent],
) -> Result<Stored, sqlx::Error> {
    let sql = "SELECT e.category, e.stream_id, e.version, e.partition, e.\"offset\", e.event_id, \
                 e.digest \
               FROM UNNEST($1::text[], $2::text[], $3::int8[]) AS u (category, stream_id, version) \
               JOIN kafold_event e USING (category, stream_id, version)";
    let query = sqlx::query(sql)
        .bind(column(events, |event| event.stream.category()))
        .bind(column(events, |event| event.stream.id()))
        .bind(column(events, |event| bigint(event.version.0)));
    let rows = query.fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            let key = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            Ok((key, (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?, row.try_get(6)?)))
        })
        .collect()
}

/// Runs all requests in one statement, and so in one snapshot. Looks up each head by key, because
/// the planner may underestimate the table of heads and read the whole table.
pub(super) async fn load(
    pool: &PgPool,
    requests: &[IndexLoad],
    limit: usize,
) -> Result<Vec<Result<IndexRead, ReadError>>, RowError> {
    let sql = "SELECT r.nth, COALESCE(p.next_offset, 0) AS next_offset, h.version AS head_version, \
                 h.digest AS head_digest, COALESCE(b.digest, 0) AS bucket, \
                 o.category AS other_category, o.stream_id AS other_id, e.category, e.stream_id, \
                 e.version, e.partition, e.\"offset\", e.event_id, e.event_type, e.recorded_at, \
                 e.command_id, e.metadata, e.payload, e.digest \
               FROM UNNEST($1::int4[], $2::text[], $3::text[], $4::int8[], $6::int8[], $7::int8[], \
                   $8::int8[]) WITH ORDINALITY \
                 AS r (partition, category, stream_id, after, hash, lowest, highest, nth) \
               LEFT JOIN kafold_partition p ON p.partition = r.partition \
               LEFT JOIN LATERAL (SELECT version, digest FROM kafold_stream s \
                 WHERE s.partition = r.partition AND s.hash = r.hash \
                   AND s.category = r.category AND s.stream_id = r.stream_id LIMIT 1) h ON true \
               LEFT JOIN LATERAL (SELECT category, stream_id FROM kafold_stream s \
                 WHERE s.partition = r.partition AND s.hash = r.hash \
                   AND (s.category <> r.category OR s.stream_id <> r.stream_id) LIMIT 1) o ON true \
               LEFT JOIN LATERAL (SELECT bit_xor(digest) AS digest FROM kafold_stream s \
                 WHERE s.partition = r.partition AND s.hash BETWEEN r.lowest AND r.highest) b ON true \
               LEFT JOIN LATERAL (SELECT * FROM kafold_event e \
                 WHERE e.category = r.category AND e.stream_id = r.stream_id \
                   AND e.version > r.after \
                 ORDER BY e.version LIMIT $5) e ON true \
               ORDER BY r.nth, e.version";
    let hashes = column(requests, |request| stream_hash(&request.stream));
    let bounds = column(&hashes, |hash| Bucket::of_hash(*hash).hashes());
    // One more than wanted tells whether there are more.
    let query = sqlx::query(sql)
        .bind(column(requests, |request| partition_int(request.partition)))
        .bind(column(requests, |request| request.stream.category()))
        .bind(column(requests, |request| request.stream.id()))
        .bind(column(requests, |request| bigint(request.after.0)))
        .bind(bigint(limit as u64).saturating_add(1))
        .bind(&hashes)
        .bind(column(&bounds, |(lowest, _)| *lowest))
        .bind(column(&bounds, |(_, highest)| *highest));
    let mut found: Vec<Result<IndexRead, ReadError>> =
        requests.iter().map(|_| Ok(IndexRead::default())).collect();
    for row in &query.fetch_all(pool).await? {
        let nth: i64 = row.try_get("nth")?;
        let index = usize::try_from(nth - 1).unwrap_or(usize::MAX);
        let answer = found.get_mut(index).expect("rows are numbered by the requests");
        let Ok(read) = answer else { continue };
        match place(requests[index].partition, row.try_get("next_offset")?) {
            Ok(position) => read.position = position,
            Err(error) => {
                *answer = Err(error);
                continue;
            }
        }
        read.head = head(row.try_get("head_version")?, row.try_get("head_digest")?);
        read.bucket = Digest(row.try_get::<i64, _>("bucket")? as u64);
        let other: Option<String> = row.try_get("other_category")?;
        let other = other.zip(row.try_get("other_id")?);
        if let Err(error) = check_other_head(&requests[index], other) {
            *answer = Err(error);
            continue;
        }
        if row.try_get::<Option<i64>, _>("version")?.is_some() {
            match IndexedRow::from_row(row)?.event() {
                Ok(event) => read.events.push(event),
                Err(error) => *answer = Err(error),
            }
        }
    }
    Ok(found.into_iter().map(|answer| answer.map(|read| cut(read, limit))).collect())
}

/// Runs one statement, and so one snapshot. The sum saturates, so an invalid version in a head
/// cannot overflow the sum.
pub(super) async fn heads(pool: &PgPool, partition: Partition) -> Result<IndexHeads, RowError> {
    let sql = "SELECT p.next_offset, p.events, p.digest, s.bucket, s.events, s.digest, \
                 s.hashes \
               FROM (SELECT 1) o \
               LEFT JOIN kafold_partition p ON p.partition = $1 \
               LEFT JOIN (SELECT hash >> 52 AS bucket, \
                   LEAST(sum(version), 9223372036854775807)::int8 AS events, \
                   bit_xor(digest) AS digest, bit_xor(hash) AS hashes \
                 FROM kafold_stream WHERE partition = $1 GROUP BY 1) s ON true";
    let mut heads = IndexHeads::default();
    for row in &sqlx::query(sql).bind(partition_int(partition)).fetch_all(pool).await? {
        heads.position = place(partition, row.try_get::<Option<i64>, _>(0)?.unwrap_or(0))?;
        let declared = (row.try_get::<Option<i64>, _>(1)?, row.try_get::<Option<i64>, _>(2)?);
        heads.declared = total(declared.0.unwrap_or(0), declared.1.unwrap_or(0));
        let Some(bucket) = row.try_get::<Option<i64>, _>(3)? else { continue };
        let of_bucket = total(row.try_get(4)?, row.try_get(5)?);
        let hashes: i64 = row.try_get(6)?;
        heads.found.add(of_bucket.events, Digest(of_bucket.digest.0 ^ hashes as u64));
        heads.buckets.add(Bucket::of_hash(bucket << 52), of_bucket.digest);
    }
    Ok(heads)
}

/// Runs one statement, and so one snapshot.
pub(super) async fn count(pool: &PgPool) -> Result<Vec<IndexCount>, RowError> {
    let sql = "SELECT partition, e.events, e.digest, s.events, s.digest \
               FROM (SELECT partition, count(*) AS events, bit_xor(digest) AS digest \
                 FROM kafold_event GROUP BY partition) e \
               FULL JOIN (SELECT partition, \
                   LEAST(sum(version), 9223372036854775807)::int8 AS events, \
                   bit_xor(digest) AS digest \
                 FROM kafold_stream GROUP BY partition) s USING (partition)";
    let mut counts = Vec::new();
    for row in &sqlx::query(sql).fetch_all(pool).await? {
        let number =
            |index| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(index)?.unwrap_or(0));
        counts.push(IndexCount {
            partition: partition_of(row.try_get(0)?)?,
            rows: total(number(1)?, number(2)?),
            heads: total(number(3)?, number(4)?),
        });
    }
    Ok(counts)
}

/// Returns the rows at the streams and versions of the events.
pub(super) async fn find(
    pool: &PgPool,
    events: &[RecordedEvent],
) -> Result<Vec<Option<Result<RecordedEvent, ReadError>>>, RowError> {
    let sql = "SELECT u.nth, e.* \
               FROM UNNEST($1::text[], $2::text[], $3::int8[]) WITH ORDINALITY \
                 AS u (category, stream_id, version, nth) \
               JOIN LATERAL (SELECT * FROM kafold_event e WHERE e.category = u.category \
                 AND e.stream_id = u.stream_id AND e.version = u.version LIMIT 1) e ON true";
    let query = sqlx::query(sql)
        .bind(column(events, |event| event.stream.category()))
        .bind(column(events, |event| event.stream.id()))
        .bind(column(events, |event| bigint(event.version.0)));
    let mut found: Vec<_> = events.iter().map(|_| None).collect();
    for row in &query.fetch_all(pool).await? {
        let nth: i64 = row.try_get("nth")?;
        let index = usize::try_from(nth - 1).unwrap_or(usize::MAX);
        let place = found.get_mut(index).expect("rows are numbered by the events");
        *place = Some(IndexedRow::from_row(row)?.event());
    }
    Ok(found)
}

/// Deletes in one transaction, with the setting which disarms the triggers.
pub(super) async fn clear(pool: &PgPool, partition: Option<Partition>) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    sqlx::query("SET LOCAL kafold.index_rebuild = 'on'").execute(&mut *tx).await?;
    match partition {
        None => {
            let sql = "TRUNCATE kafold_partition, kafold_event, kafold_stream";
            sqlx::query(sql).execute(&mut *tx).await?;
        }
        Some(partition) => {
            // Deletes the position first: a feeder of the partition waits for this row.
            for sql in [
                "DELETE FROM kafold_partition WHERE partition = $1",
                "DELETE FROM kafold_event WHERE partition = $1",
                "DELETE FROM kafold_stream WHERE partition = $1",
            ] {
                sqlx::query(sql).bind(partition_int(partition)).execute(&mut *tx).await?;
            }
        }
    }
    tx.commit().await
}

fn column<'a, T, U>(items: &'a [T], value: impl Fn(&'a T) -> U) -> Vec<U> {
    items.iter().map(value).collect()
}

//! The statements of the index on PostgreSQL.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use chrono::{DateTime, Utc};
use kafold_core::digest::{BUCKET_SHIFT, Bucket, Digest, stream_hash};
use kafold_core::index::{
    Advanced, IndexBatch, IndexCount, IndexHeads, IndexLoad, IndexRead, IndexTotal, damaged,
};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::{Offset, Partition, RecordedEvent, StreamId, Version};
use kafold_migrations::begin;
use sqlx::postgres::{PgArguments, PgExecutor};
use sqlx::query::{Query, QueryAs};
use sqlx::{FromRow, PgConnection, PgPool, Postgres, Row};
use uuid::Uuid;

use crate::copy::CopyRows;

use super::known::KnownDigests;
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

/// An event as a row to insert.
struct NewRow<'e> {
    event: &'e RecordedEvent,
    digest: Digest,
    /// The digest of the stream's events up to this one.
    stream_digest: Digest,
}

/// A batch as rows to insert. Batches are numbered from 1.
struct NumberedBatch<'b> {
    nth: i64,
    batch: &'b IndexBatch,
    rows: Vec<NewRow<'b>>,
}

impl NumberedBatch<'_> {
    /// Returns the totals that the rows add to a partition at position `from`.
    fn added(&self, from: Offset) -> IndexTotal {
        added(self.rows.iter().map(|row| (row.event, row.digest)), from)
    }
}

/// Adds all batches in one transaction when the index stands at their beginnings and has none of
/// their events, which is almost always so. Adds any other batch in a transaction of its own.
pub(super) async fn advance(
    pool: &PgPool,
    known: &KnownDigests,
    batches: &[IndexBatch],
    now: DateTime<Utc>,
) -> Vec<Result<Advanced, ReadError>> {
    let appended = append_all(pool, known, batches, now).await;
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
            false => advance_checked(pool, known, batch, now).await.map_err(RowError::into),
        });
    }
    answers
}

fn is_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.is_unique_violation())
}

/// Appends the batches whose streams are complete up to the batch. Returns the numbers of the
/// batches which moved their partitions.
async fn append_all(
    pool: &PgPool,
    known: &KnownDigests,
    batches: &[IndexBatch],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut tips = tips(pool, known, batches).await?;
    let mut numbered = Vec::with_capacity(batches.len());
    for (batch, nth) in batches.iter().zip(1..) {
        if let Ok(rows) = rows_of(batch, &mut tips) {
            numbered.push(NumberedBatch { nth, batch, rows });
        }
    }
    let events = numbered.iter().map(|batch| batch.rows.len()).sum();
    let moved = match events {
        COPY_EVENTS_MIN.. => append_by_copy(pool, &numbered, now).await?,
        _ => append(pool, &numbered, &rows_with_batch(&numbered), now).await?,
    };
    known.put(tips.into_iter().map(|(stream, tip)| (stream, tip.version, tip.digest)));
    Ok(moved)
}

/// The last event of a stream: its version, and the digest of the stream up to it.
#[derive(Clone, Copy, Default)]
struct Tip {
    version: Version,
    digest: Digest,
}

/// Returns the tip of each stream before the first event of the stream in the batches. A stream
/// without that event in the index has none.
async fn tips<'b>(
    database: impl PgExecutor<'_>,
    known: &KnownDigests,
    batches: &'b [IndexBatch],
) -> Result<HashMap<&'b StreamId, Tip>, sqlx::Error> {
    let mut tips = HashMap::new();
    let mut wanted = Vec::new();
    for event in batches.iter().flat_map(|batch| &batch.events) {
        let Entry::Vacant(entry) = tips.entry(&event.stream) else { continue };
        let version = Version(event.version.0.saturating_sub(1));
        let digest = match version {
            Version::EMPTY => Some(Digest::default()),
            _ => known.get(&event.stream, version),
        };
        if digest.is_none() {
            wanted.push(event);
        }
        entry.insert(digest.map(|digest| Tip { version, digest }));
    }
    if !wanted.is_empty() {
        let sql = "SELECT u.nth, e.stream_digest \
                   FROM UNNEST($1::int4[], $2::int8[], $3::text[], $4::text[], $5::int8[]) \
                     WITH ORDINALITY AS u (partition, hash, category, stream_id, version, nth) \
                   JOIN LATERAL (SELECT stream_digest FROM kafold_event e \
                     WHERE e.partition = u.partition AND e.hash = u.hash \
                       AND e.category = u.category AND e.stream_id = u.stream_id \
                       AND e.version = u.version - 1 LIMIT 1) e ON true";
        let found: Vec<(i64, i64)> =
            with_keys(sqlx::query_as(sql), &wanted).fetch_all(database).await?;
        for (nth, digest) in found {
            let event = wanted[usize::try_from(nth - 1).unwrap_or(usize::MAX)];
            let version = Version(event.version.0.saturating_sub(1));
            tips.insert(&event.stream, Some(Tip { version, digest: Digest(digest as u64) }));
        }
    }
    Ok(tips.into_iter().filter_map(|(stream, tip)| Some((stream, tip?))).collect())
}

/// Returns the rows of a batch's events, or the first event which does not follow the stream's tip.
/// Moves the tips to the last events.
fn rows_of<'b>(
    batch: &'b IndexBatch,
    tips: &mut HashMap<&'b StreamId, Tip>,
) -> Result<Vec<NewRow<'b>>, &'b RecordedEvent> {
    let row = |event: &'b RecordedEvent| {
        let tip = tips.get_mut(&event.stream).filter(|tip| tip.version.plus(1) == event.version);
        let tip = tip.ok_or(event)?;
        let digest = Digest::of(event);
        tip.version = event.version;
        tip.digest ^= digest;
        Ok(NewRow { event, digest, stream_digest: tip.digest })
    };
    batch.events.iter().map(row).collect()
}

fn rows_with_batch<'n, 'b>(batches: &'n [NumberedBatch<'b>]) -> Vec<(i64, &'n NewRow<'b>)> {
    let rows = |batch: &'n NumberedBatch<'b>| batch.rows.iter().map(|row| (batch.nth, row));
    batches.iter().flat_map(rows).collect()
}

/// Moves the partitions that stand at the beginning of their batches to the end of them, and adds those
/// of the rows that belong to these. Returns the numbers of these batches. The index stands elsewhere
/// than where the others begin.
///
/// Partitions are locked in their order, so that two who do this do not wait for each other. The
/// transaction does not wait until it is on disk: a server that crashes may forget the last of them,
/// rows and places together, and the owner feeds it again.
async fn append(
    database: impl PgExecutor<'_>,
    batches: &[NumberedBatch<'_>],
    rows: &[(i64, &NewRow<'_>)],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let sql = "WITH locked AS MATERIALIZED (SELECT partition FROM kafold_partition \
                 WHERE partition = ANY($1) ORDER BY partition FOR UPDATE), \
               moved AS (UPDATE kafold_partition p \
                 SET next_offset = b.next, fold_state = b.state, updated_at = $5, \
                   events = p.events + b.events, digest = p.digest # b.digest, \
                   checksum = b.checksum \
                 FROM locked JOIN UNNEST($1::int4[], $2::int8[], $3::int8[], $4::text[], \
                     $6::int8[], $7::int8[], $8::int8[], $9::int8[]) \
                   AS b (partition, start, next, state, events, digest, checksum, nth) \
                   USING (partition) \
                 WHERE p.partition = locked.partition AND p.next_offset = b.start \
                   AND b.start < b.next \
                 RETURNING b.nth), \
               appended AS (INSERT INTO kafold_event (category, stream_id, version, partition, \
                   \"offset\", event_id, event_type, recorded_at, command_id, metadata, payload, \
                   hash, digest, stream_digest) \
                 SELECT category, stream_id, version, partition, \"offset\", event_id, event_type, \
                   recorded_at, command_id, metadata, payload, hash, digest, stream_digest \
                 FROM UNNEST($10::int8[], $11::text[], $12::text[], $13::int8[], $14::int4[], \
                   $15::int8[], $16::uuid[], $17::text[], $18::timestamptz[], $19::uuid[], \
                   $20::text[], $21::bytea[], $22::int8[], $23::int8[], $24::int8[]) \
                   AS e (nth, category, stream_id, version, partition, \"offset\", event_id, \
                     event_type, recorded_at, command_id, metadata, payload, hash, digest, \
                     stream_digest) \
                 WHERE nth IN (SELECT nth FROM moved)) \
               SELECT nth, set_config('synchronous_commit', 'off', true) FROM moved";
    let totals = column(batches, |numbered| numbered.added(numbered.batch.from));
    let query = sqlx::query(sql)
        .bind(column(batches, |numbered| partition_int(numbered.batch.partition)))
        .bind(column(batches, |numbered| bigint(numbered.batch.from.0)))
        .bind(column(batches, |numbered| bigint(numbered.batch.to.next.0)))
        .bind(column(batches, |numbered| &*numbered.batch.to.state))
        .bind(now)
        .bind(column(&totals, |total| bigint(total.events)))
        .bind(column(&totals, |total| total.digest.0 as i64))
        .bind(column(batches, |numbered| checksum_of(numbered.batch)))
        .bind(column(batches, |numbered| numbered.nth))
        .bind(column(rows, |(nth, _)| *nth));
    let moved = with_rows(query, rows, |(_, row)| row).fetch_all(database).await?;
    moved.iter().map(|row| row.try_get("nth")).collect()
}

/// As [`append`], for many events.
async fn append_by_copy(
    pool: &PgPool,
    batches: &[NumberedBatch<'_>],
    now: DateTime<Utc>,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut tx = begin(pool, "BEGIN").await?;
    let moved = append(&mut *tx, batches, &[], now).await?;
    let sql = "COPY kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
               event_type, recorded_at, command_id, metadata, payload, hash, digest, stream_digest) \
               FROM STDIN WITH (FORMAT binary)";
    let mut copy = CopyRows::begin(&mut tx, sql, 14).await?;
    let moved_batches = batches.iter().filter(|batch| moved.contains(&batch.nth));
    for NewRow { event, digest, stream_digest } in moved_batches.flat_map(|batch| &batch.rows) {
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
        copy.field(digest.0 as i64)?;
        copy.field(stream_digest.0 as i64)?;
    }
    copy.finish().await?;
    tx.commit().await?;
    Ok(moved)
}

/// Adds a batch at any position of the index. Events already in the index are compared.
async fn advance_checked(
    pool: &PgPool,
    known: &KnownDigests,
    batch: &IndexBatch,
    now: DateTime<Utc>,
) -> Result<Advanced, RowError> {
    let mut tx = begin(pool, "BEGIN").await?;
    let Some(position) = locked_position(&mut tx, batch, now).await? else {
        tx.rollback().await?;
        return Ok(Advanced::Behind(None));
    };
    if position.next < batch.from && !mutant::active(Mutant::IndexPlainMaximum) {
        tx.rollback().await?;
        return Ok(Advanced::Behind(Some(position)));
    }
    let mut tips = tips(&mut *tx, known, std::slice::from_ref(batch)).await?;
    let rows = rows_of(batch, &mut tips).map_err(|event| {
        let RecordedEvent { stream, version, .. } = event;
        let what = format!("the event before version {version} of {stream} is missing");
        damaged(batch.partition, "kafold_event", what)
    })?;
    let numbered = NumberedBatch { nth: 1, batch, rows };
    if insert(&mut tx, &numbered.rows).await? < batch.events.len() as u64 {
        check_stored(batch, &stored(&mut tx, &batch.events).await?)?;
    }
    if batch.to.next > position.next {
        let sql = "UPDATE kafold_partition SET next_offset = $2, fold_state = $3, updated_at = $4, \
                     events = events + $5, digest = digest # $6, checksum = $7 \
                   WHERE partition = $1";
        let added = numbered.added(position.next);
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

/// Returns the number of rows which were not there yet.
async fn insert(connection: &mut PgConnection, rows: &[NewRow<'_>]) -> Result<u64, sqlx::Error> {
    if rows.is_empty() {
        return Ok(0);
    }
    let sql = "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", \
                 event_id, event_type, recorded_at, command_id, metadata, payload, hash, digest, \
                 stream_digest) \
               SELECT * FROM UNNEST($1::text[], $2::text[], $3::int8[], $4::int4[], $5::int8[], \
                 $6::uuid[], $7::text[], $8::timestamptz[], $9::uuid[], $10::text[], $11::bytea[], \
                 $12::int8[], $13::int8[], $14::int8[]) \
               ON CONFLICT DO NOTHING";
    let query = with_rows(sqlx::query(sql), rows, |row| row);
    Ok(query.execute(connection).await?.rows_affected())
}

/// Binds an array for each column of `kafold_event`, in their order.
fn with_rows<'q, 'e: 'q, T>(
    query: PgQuery<'q>,
    items: &'q [T],
    row: impl Fn(&'q T) -> &'q NewRow<'e>,
) -> PgQuery<'q> {
    query
        .bind(column(items, |item| row(item).event.stream.category()))
        .bind(column(items, |item| row(item).event.stream.id()))
        .bind(column(items, |item| bigint(row(item).event.version.0)))
        .bind(column(items, |item| partition_int(row(item).event.position.partition)))
        .bind(column(items, |item| bigint(row(item).event.position.offset.0)))
        .bind(column(items, |item| row(item).event.metadata.event_id))
        .bind(column(items, |item| &*row(item).event.event_type))
        .bind(column(items, |item| row(item).event.metadata.recorded_at))
        .bind(column(items, |item| row(item).event.command_id.0))
        .bind(column(items, |item| More::text_of(&row(item).event.metadata)))
        .bind(column(items, |item| &*row(item).event.payload))
        .bind(column(items, |item| stream_hash(&row(item).event.stream)))
        .bind(column(items, |item| row(item).digest.0 as i64))
        .bind(column(items, |item| row(item).stream_digest.0 as i64))
}

/// Binds an array for each column of the primary key, in their order.
fn with_keys<'q, O>(
    query: QueryAs<'q, Postgres, O, PgArguments>,
    events: &'q [&RecordedEvent],
) -> QueryAs<'q, Postgres, O, PgArguments> {
    query
        .bind(column(events, |event| partition_int(event.position.partition)))
        .bind(column(events, |event| stream_hash(&event.stream)))
        .bind(column(events, |event| event.stream.category()))
        .bind(column(events, |event| event.stream.id()))
        .bind(column(events, |event| bigint(event.version.0)))
}

fn checksum_of(batch: &IndexBatch) -> i64 {
    checksum(batch.partition, bigint(batch.to.next.0), &batch.to.state)
}

/// Returns what is stored at the streams and versions of these events.
async fn stored(
    connection: &mut PgConnection,
    events: &[RecordedEvent],
) -> Result<Stored, sqlx::Error> {
    let sql = "SELECT e.category, e.stream_id, e.version, e.partition, e.\"offset\", e.event_id, \
                 e.digest \
               FROM UNNEST($1::int4[], $2::int8[], $3::text[], $4::text[], $5::int8[]) \
                 AS u (partition, hash, category, stream_id, version) \
               JOIN kafold_event e USING (partition, hash, category, stream_id, version)";
    type Row = (String, String, i64, i32, i64, Uuid, i64);
    let rows: Vec<Row> = with_keys(sqlx::query_as(sql), &column(events, |event| event))
        .fetch_all(connection)
        .await?;
    let stored =
        rows.into_iter().map(|(category, id, version, partition, offset, event, digest)| {
            ((category, id, version), (partition, offset, event, digest))
        });
    Ok(stored.collect())
}

/// Runs all requests in one statement, and so in one snapshot.
///
/// The heads of the bucket are found by a loose index scan, from the highest stream to the lowest:
/// the time depends on the number of streams, not of events.
pub(super) async fn load(
    pool: &PgPool,
    requests: &[IndexLoad],
    limit: usize,
) -> Result<Vec<Result<IndexRead, ReadError>>, RowError> {
    let sql = "SELECT r.nth, COALESCE(p.next_offset, 0) AS next_offset, \
                 b.head_version, b.head_digest, COALESCE(b.digest, 0) AS bucket, \
                 b.other_category, b.other_id, e.category, e.stream_id, e.version, e.partition, \
                 e.\"offset\", e.event_id, e.event_type, e.recorded_at, e.command_id, e.metadata, \
                 e.payload, e.digest \
               FROM UNNEST($1::int4[], $2::text[], $3::text[], $4::int8[], $6::int8[], $7::int8[], \
                   $8::int8[]) WITH ORDINALITY \
                 AS r (partition, category, stream_id, after, hash, lowest, highest, nth) \
               LEFT JOIN kafold_partition p ON p.partition = r.partition \
               CROSS JOIN LATERAL (WITH RECURSIVE head AS ( \
                   (SELECT hash, category, stream_id, version, stream_digest FROM kafold_event e \
                     WHERE e.partition = r.partition AND e.hash BETWEEN r.lowest AND r.highest \
                     ORDER BY e.partition DESC, e.hash DESC, e.category DESC, e.stream_id DESC, \
                       e.version DESC LIMIT 1) \
                   UNION ALL SELECT e.* FROM head h \
                   CROSS JOIN LATERAL (SELECT hash, category, stream_id, version, stream_digest \
                     FROM kafold_event e WHERE e.partition = r.partition AND e.hash >= r.lowest \
                       AND (e.hash, e.category, e.stream_id) < (h.hash, h.category, h.stream_id) \
                     ORDER BY e.partition DESC, e.hash DESC, e.category DESC, e.stream_id DESC, \
                       e.version DESC LIMIT 1) e) \
                 SELECT bit_xor(stream_digest) AS digest, \
                   max(version) FILTER (WHERE is_own) AS head_version, \
                   bit_xor(stream_digest) FILTER (WHERE is_own) AS head_digest, \
                   (array_agg(category) FILTER (WHERE is_other))[1] AS other_category, \
                   (array_agg(stream_id) FILTER (WHERE is_other))[1] AS other_id \
                 FROM (SELECT *, \
                     hash = r.hash AND category = r.category AND stream_id = r.stream_id AS is_own, \
                     hash = r.hash AND (category <> r.category OR stream_id <> r.stream_id) \
                       AS is_other \
                   FROM head) h) b \
               LEFT JOIN LATERAL (SELECT * FROM kafold_event e \
                 WHERE e.partition = r.partition AND e.hash = r.hash \
                   AND e.category = r.category AND e.stream_id = r.stream_id \
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
        if let Err(error) = check_other_head("kafold_event", &requests[index], other) {
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
               LEFT JOIN (SELECT hash >> $2 AS bucket, \
                   LEAST(sum(version), 9223372036854775807)::int8 AS events, \
                   bit_xor(stream_digest) AS digest, bit_xor(hash) AS hashes \
                 FROM (SELECT DISTINCT ON (hash, category, stream_id) hash, version, stream_digest \
                   FROM kafold_event WHERE partition = $1 \
                   ORDER BY hash DESC, category DESC, stream_id DESC, version DESC) h \
                 GROUP BY 1) s ON true";
    let mut heads = IndexHeads::default();
    let query = sqlx::query(sql).bind(partition_int(partition)).bind(BUCKET_SHIFT as i32);
    for row in &query.fetch_all(pool).await? {
        heads.position = place(partition, row.try_get::<Option<i64>, _>(0)?.unwrap_or(0))?;
        let declared = (row.try_get::<Option<i64>, _>(1)?, row.try_get::<Option<i64>, _>(2)?);
        heads.declared = total(declared.0.unwrap_or(0), declared.1.unwrap_or(0));
        let Some(bucket) = row.try_get::<Option<i64>, _>(3)? else { continue };
        let of_bucket = total(row.try_get(4)?, row.try_get(5)?);
        let hashes: i64 = row.try_get(6)?;
        heads.found.add(of_bucket.events, Digest(of_bucket.digest.0 ^ hashes as u64));
        heads.buckets.add(Bucket::of_hash(bucket << BUCKET_SHIFT), of_bucket.digest);
    }
    Ok(heads)
}

/// Runs one statement, and so one snapshot.
pub(super) async fn count(pool: &PgPool) -> Result<Vec<IndexCount>, RowError> {
    let sql = "SELECT partition, e.events, e.digest, s.events, s.digest \
               FROM (SELECT partition, count(*) AS events, bit_xor(digest) AS digest \
                 FROM kafold_event GROUP BY partition) e \
               JOIN (SELECT partition, \
                   LEAST(sum(version), 9223372036854775807)::int8 AS events, \
                   bit_xor(stream_digest) AS digest \
                 FROM (SELECT DISTINCT ON (partition, hash, category, stream_id) partition, version, \
                     stream_digest FROM kafold_event \
                   ORDER BY partition DESC, hash DESC, category DESC, stream_id DESC, version DESC) \
                   h GROUP BY partition) s USING (partition)";
    let rows: Vec<(i32, i64, i64, i64, i64)> = sqlx::query_as(sql).fetch_all(pool).await?;
    let counts = rows.into_iter().map(|(partition, events, digest, head_events, head_digest)| {
        Ok(IndexCount {
            partition: partition_of(partition)?,
            rows: total(events, digest),
            heads: total(head_events, head_digest),
        })
    });
    counts.collect()
}

/// Returns the rows at the streams and versions of the events.
pub(super) async fn find(
    pool: &PgPool,
    events: &[RecordedEvent],
) -> Result<Vec<Option<Result<RecordedEvent, ReadError>>>, RowError> {
    let sql = "SELECT u.nth, e.* \
               FROM UNNEST($1::int4[], $2::int8[], $3::text[], $4::text[], $5::int8[]) \
                 WITH ORDINALITY AS u (partition, hash, category, stream_id, version, nth) \
               JOIN LATERAL (SELECT * FROM kafold_event e WHERE e.partition = u.partition \
                 AND e.hash = u.hash AND e.category = u.category AND e.stream_id = u.stream_id \
                 AND e.version = u.version LIMIT 1) e ON true";
    let mut found: Vec<_> = events.iter().map(|_| None).collect();
    let keys = column(events, |event| event);
    let rows: Vec<FoundRow> = with_keys(sqlx::query_as(sql), &keys).fetch_all(pool).await?;
    for FoundRow { nth, row } in rows {
        let index = usize::try_from(nth - 1).unwrap_or(usize::MAX);
        let place = found.get_mut(index).expect("rows are numbered by the events");
        *place = Some(row.event());
    }
    Ok(found)
}

/// A row of [`find`], with the number of the event from 1 on.
#[derive(FromRow)]
struct FoundRow {
    nth: i64,
    #[sqlx(flatten)]
    row: IndexedRow,
}

/// Deletes in one transaction, with the setting which disarms the triggers.
pub(super) async fn clear(pool: &PgPool, partition: Option<Partition>) -> Result<(), sqlx::Error> {
    let mut tx = begin(pool, "BEGIN").await?;
    sqlx::query("SET LOCAL kafold.index_rebuild = 'on'").execute(&mut *tx).await?;
    match partition {
        None => {
            let sql = "TRUNCATE kafold_partition, kafold_partition_digest, kafold_event";
            sqlx::query(sql).execute(&mut *tx).await?;
        }
        Some(partition) => {
            // Deletes the position first: a feeder of the partition waits for this row.
            for sql in [
                "DELETE FROM kafold_partition WHERE partition = $1",
                "DELETE FROM kafold_partition_digest WHERE partition = $1",
                "DELETE FROM kafold_event WHERE partition = $1",
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

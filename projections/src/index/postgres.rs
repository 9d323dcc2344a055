//! The statements of the index on PostgreSQL.

use chrono::{DateTime, Utc};
use kafold_core::index::{Advanced, IndexBatch, IndexLoad, IndexRead};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cursor, ReadError};
use kafold_core::{Offset, RecordedEvent};
use sqlx::postgres::{PgArguments, PgExecutor};
use sqlx::query::Query;
use sqlx::{FromRow, PgConnection, PgPool, Postgres, Row};

use crate::copy::CopyRows;

use super::{
    EventRow, More, RowError, Stored, bigint, check_stored, cursor, cut, offset_of, partition_int,
    read_error,
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
                 SET next_offset = b.next, fold_state = b.state, updated_at = $5 \
                 FROM locked JOIN UNNEST($1::int4[], $2::int8[], $3::int8[], $4::text[]) \
                   WITH ORDINALITY AS b (partition, start, next, state, nth) USING (partition) \
                 WHERE p.partition = locked.partition AND p.next_offset = b.start \
                   AND b.start < b.next \
                 RETURNING b.nth), \
               appended AS (INSERT INTO kafold_event (category, stream_id, version, partition, \
                   \"offset\", event_id, event_type, recorded_at, command_id, metadata, payload) \
                 SELECT category, stream_id, version, partition, \"offset\", event_id, event_type, \
                   recorded_at, command_id, metadata, payload \
                 FROM UNNEST($6::int8[], $7::text[], $8::text[], $9::int8[], $10::int4[], \
                   $11::int8[], $12::uuid[], $13::text[], $14::timestamptz[], $15::uuid[], \
                   $16::text[], $17::bytea[]) \
                   AS e (nth, category, stream_id, version, partition, \"offset\", event_id, \
                     event_type, recorded_at, command_id, metadata, payload) \
                 WHERE nth IN (SELECT nth FROM moved)) \
               SELECT nth, set_config('synchronous_commit', 'off', true) FROM moved";
    let query = sqlx::query(sql)
        .bind(column(batches, |batch| partition_int(batch.partition)))
        .bind(column(batches, |batch| bigint(batch.from.0)))
        .bind(column(batches, |batch| bigint(batch.to.next.0)))
        .bind(column(batches, |batch| &*batch.to.state))
        .bind(now)
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
               event_type, recorded_at, command_id, metadata, payload) \
               FROM STDIN WITH (FORMAT binary)";
    let mut copy = CopyRows::begin(&mut tx, sql, 11).await?;
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
        let sql = "UPDATE kafold_partition SET next_offset = $2, fold_state = $3, updated_at = $4 \
                   WHERE partition = $1";
        let query = sqlx::query(sql).bind(partition_int(batch.partition));
        let query = query.bind(bigint(batch.to.next.0)).bind(&batch.to.state).bind(now);
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
        let sql = "INSERT INTO kafold_partition (partition, next_offset, fold_state, updated_at) \
                   VALUES ($1, 0, '', $2) ON CONFLICT DO NOTHING";
        sqlx::query(sql).bind(partition).bind(now).execute(&mut *connection).await?;
    }
    let sql = "SELECT next_offset, fold_state FROM kafold_partition \
               WHERE partition = $1 FOR UPDATE";
    let query = sqlx::query_as(sql).bind(partition);
    let row: Option<(i64, String)> = query.fetch_optional(connection).await?;
    Ok(row.map(|(next, state)| cursor(next, state)).transpose()?)
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
                 event_id, event_type, recorded_at, command_id, metadata, payload) \
               SELECT * FROM UNNEST($1::text[], $2::text[], $3::int8[], $4::int4[], $5::int8[], \
                 $6::uuid[], $7::text[], $8::timestamptz[], $9::uuid[], $10::text[], $11::bytea[]) \
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
}

/// What lies at the streams and versions of these events.
async fn stored(
    connection: &mut PgConnection,
    events: &[RecordedEvent],
) -> Result<Stored, sqlx::Error> {
    let sql = "SELECT e.category, e.stream_id, e.version, e.partition, e.\"offset\", e.event_id \
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
            Ok((key, (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?)))
        })
        .collect()
}

/// All requests in one statement, which is one snapshot.
pub(super) async fn load(
    pool: &PgPool,
    requests: &[IndexLoad],
    limit: usize,
) -> Result<Vec<IndexRead>, RowError> {
    let sql = "SELECT r.nth, COALESCE(p.next_offset, 0) AS next_offset, e.category, e.stream_id, \
                 e.version, e.partition, e.\"offset\", e.event_id, e.event_type, e.recorded_at, \
                 e.command_id, e.metadata, e.payload \
               FROM UNNEST($1::int4[], $2::text[], $3::text[], $4::int8[]) WITH ORDINALITY \
                 AS r (partition, category, stream_id, after, nth) \
               LEFT JOIN kafold_partition p ON p.partition = r.partition \
               LEFT JOIN LATERAL (SELECT * FROM kafold_event e \
                 WHERE e.category = r.category AND e.stream_id = r.stream_id \
                   AND e.version > r.after \
                 ORDER BY e.version LIMIT $5) e ON true \
               ORDER BY r.nth, e.version";
    // One more than wanted tells whether there are more.
    let query = sqlx::query(sql)
        .bind(column(requests, |request| partition_int(request.partition)))
        .bind(column(requests, |request| request.stream.category()))
        .bind(column(requests, |request| request.stream.id()))
        .bind(column(requests, |request| bigint(request.after.0)))
        .bind(bigint(limit as u64).saturating_add(1));
    let mut found: Vec<(Offset, Vec<RecordedEvent>)> =
        requests.iter().map(|_| (Offset(0), Vec::new())).collect();
    for row in &query.fetch_all(pool).await? {
        let nth: i64 = row.try_get("nth")?;
        let index = usize::try_from(nth - 1).unwrap_or(usize::MAX);
        let (position, events) = found.get_mut(index).expect("rows are numbered by the requests");
        *position = offset_of(row.try_get("next_offset")?)?;
        if row.try_get::<Option<i64>, _>("version")?.is_some() {
            events.push(EventRow::from_row(row)?.event()?);
        }
    }
    Ok(found.into_iter().map(|(position, events)| cut(position, events, limit)).collect())
}

fn column<'a, T, U>(items: &'a [T], value: impl Fn(&'a T) -> U) -> Vec<U> {
    items.iter().map(value).collect()
}

//! The table `kafold_checkpoint`: where each projection stands in each partition.
//!
//! A checkpoint moves by compare-and-set on the offset it stood at and on the fence, in the
//! transaction that writes the rows. Whoever takes a partition raises the fence first; from then on
//! every transaction of the former holder fails.

use chrono::{DateTime, Utc};
use kafold_core::store::Cursor;
use kafold_core::{Offset, Partition};
use kafold_migrations::{Database, SqlText, micros};
use sqlx::{PgConnection, SqliteConnection};

use crate::handler::Target;
use crate::registry;
use crate::sql::{either, reading};
use crate::table::list_places;
use crate::transaction::{OpenTransaction, Transaction};

/// Where PostgreSQL tells other processes of progress, as `NAME/PARTITION/NEXT`.
pub(crate) const CHANNEL: &str = "kafold_checkpoint";

/// Values of one [`Step`] in a statement on SQLite.
const STEP_VALUES: usize = 7;

/// Where a partition stands, and the right to move it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) partition: Partition,
    pub(crate) next: Offset,
    /// The source's state there; empty when nothing was ever applied.
    pub(crate) state: String,
    pub(crate) fence: i64,
}

impl Place {
    /// Where the source goes on; `None` is the beginning of the log.
    pub(crate) fn cursor(&self) -> Option<Cursor> {
        let started = !self.state.is_empty() || self.next > Offset(0);
        started.then(|| Cursor { next: self.next, state: self.state.clone() })
    }
}

/// One partition's step from where it stood.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) partition: Partition,
    pub(crate) from: Offset,
    pub(crate) fence: i64,
    pub(crate) to: Cursor,
    pub(crate) end: Offset,
    pub(crate) last_event_at: Option<DateTime<Utc>>,
}

type PlaceRow = (i32, i64, String, i64);

/// Raises the fences of the partitions and tells where they stand. `None`: the generation is neither
/// live nor being built; a switch or an abort comes before or after this as a whole.
pub(crate) async fn take(
    database: &Database,
    target: Target<'_>,
    partitions: &[Partition],
    now: DateTime<Utc>,
) -> Result<Option<Vec<Place>>, sqlx::Error> {
    let mut sorted: Vec<i32> = partitions.iter().map(|p| int(*p)).collect();
    // In one order everywhere, so that two takers wait for each other instead of for ever.
    sorted.sort_unstable();
    let mut tx = OpenTransaction::begin(database).await?;
    if !registry::is_wanted(&mut tx.lend(), target).await? {
        tx.rollback().await?;
        return Ok(None);
    }
    let rows = match tx.lend() {
        Transaction::Postgres(connection) => {
            take_postgres(connection, target, &sorted, now).await?
        }
        Transaction::Sqlite(connection) => take_sqlite(connection, target, &sorted, now).await?,
    };
    tx.commit().await?;
    Ok(Some(rows.into_iter().map(place).collect()))
}

async fn take_postgres(
    connection: &mut PgConnection,
    target: Target<'_>,
    partitions: &[i32],
    now: DateTime<Utc>,
) -> Result<Vec<PlaceRow>, sqlx::Error> {
    let sql = "INSERT INTO kafold_checkpoint AS c \
                 (projection, generation, partition, next_offset, fold_state, fence, updated_at) \
               SELECT $1, $2, p, 0, '', 1, $4 FROM UNNEST($3::int4[]) AS p \
               ON CONFLICT (projection, generation, partition) \
               DO UPDATE SET fence = c.fence + 1, updated_at = $4 \
               RETURNING partition, next_offset, fold_state, fence";
    let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
    query.bind(partitions).bind(now).fetch_all(connection).await
}

async fn take_sqlite(
    connection: &mut SqliteConnection,
    target: Target<'_>,
    partitions: &[i32],
    now: DateTime<Utc>,
) -> Result<Vec<PlaceRow>, sqlx::Error> {
    let sql = "INSERT INTO kafold_checkpoint \
                 (projection, generation, partition, next_offset, fold_state, fence, updated_at) \
               SELECT $1, $2, value, 0, '', 1, $4 FROM json_each($3) WHERE true \
               ON CONFLICT (projection, generation, partition) \
               DO UPDATE SET fence = fence + 1, updated_at = $4 \
               RETURNING partition, next_offset, fold_state, fence";
    let partitions =
        serde_json::to_string(partitions).map_err(|e| sqlx::Error::Encode(e.into()))?;
    let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
    query.bind(partitions).bind(micros::to_micros(now)).fetch_all(connection).await
}

/// Moves the checkpoints, each from where it stood under its fence. `false`: at least one was not
/// there any more, and the transaction must be rolled back. If it is to be told, listeners of [`CHANNEL`]
/// hear where the projection stands when the transaction commits.
pub(crate) async fn advance(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    steps: &[Step],
    is_told: bool,
    now: DateTime<Utc>,
) -> Result<bool, sqlx::Error> {
    let moved = match tx {
        Transaction::Postgres(connection) => {
            advance_postgres(connection, target, steps, is_told, now).await?
        }
        Transaction::Sqlite(connection) => advance_sqlite(connection, target, steps, now).await?,
    };
    Ok(moved == steps.len() as u64)
}

/// Locks a partition's checkpoint until the end of the transaction. `false`: another worker has taken
/// the partition.
pub(crate) async fn hold(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    place: &Place,
) -> Result<bool, sqlx::Error> {
    // Nobody else writes while a transaction on SQLite is open; on PostgreSQL an update locks.
    let sql = "UPDATE kafold_checkpoint SET fence = fence \
               WHERE projection = $1 AND generation = $2 AND partition = $3 AND fence = $4";
    let (partition, fence) = (int(place.partition), place.fence);
    let held = either!(tx, connection => {
        let query = sqlx::query(sql).bind(target.name).bind(target.generation.int());
        let query = query.bind(partition).bind(fence).execute(&mut **connection).await?;
        query.rows_affected()
    });
    Ok(held == 1)
}

async fn advance_postgres(
    connection: &mut PgConnection,
    target: Target<'_>,
    steps: &[Step],
    is_told: bool,
    now: DateTime<Utc>,
) -> Result<u64, sqlx::Error> {
    let sql = "UPDATE kafold_checkpoint c \
               SET next_offset = s.next, fold_state = s.state, end_offset = s.log_end, \
                   last_event_at = COALESCE(s.event_at, c.last_event_at), updated_at = $10 \
               FROM UNNEST($3::int4[], $4::int8[], $5::int8[], $6::int8[], $7::text[], \
                           $8::int8[], $9::timestamptz[]) \
                 AS s (partition, base, fence, next, state, log_end, event_at) \
               WHERE c.projection = $1 AND c.generation = $2 AND c.partition = s.partition \
                 AND c.next_offset = s.base AND c.fence = s.fence \
               RETURNING CASE WHEN $11 THEN \
                 pg_notify($12, c.projection || '/' || c.partition || '/' || c.next_offset)::text END";
    let column = |value: fn(&Step) -> i64| steps.iter().map(value).collect::<Vec<i64>>();
    let query = sqlx::query(sql)
        .bind(target.name)
        .bind(target.generation.int())
        .bind(steps.iter().map(|step| int(step.partition)).collect::<Vec<_>>())
        .bind(column(|step| bigint(step.from)))
        .bind(column(|step| step.fence))
        .bind(column(|step| bigint(step.to.next)))
        .bind(steps.iter().map(|step| step.to.state.as_str()).collect::<Vec<_>>())
        .bind(column(|step| bigint(step.end)))
        .bind(steps.iter().map(|step| step.last_event_at).collect::<Vec<_>>())
        .bind(now)
        .bind(is_told)
        .bind(CHANNEL);
    Ok(query.execute(connection).await?.rows_affected())
}

async fn advance_sqlite(
    connection: &mut SqliteConnection,
    target: Target<'_>,
    steps: &[Step],
    now: DateTime<Utc>,
) -> Result<u64, sqlx::Error> {
    let mut sql =
        SqlText::new("WITH s (partition, base, fence, next, state, log_end, event_at) AS (VALUES ");
    sql.list(", ", 0..steps.len(), |sql, _| {
        sql.text("(");
        list_places(sql, STEP_VALUES).text(")");
    });
    sql.text(
        ") UPDATE kafold_checkpoint AS c \
         SET next_offset = s.next, fold_state = s.state, end_offset = s.log_end, \
             last_event_at = COALESCE(s.event_at, c.last_event_at), updated_at = ? \
         FROM s \
         WHERE c.projection = ? AND c.generation = ? AND c.partition = s.partition \
           AND c.next_offset = s.base AND c.fence = s.fence",
    );
    let mut query = sqlx::query(sql.finish());
    for step in steps {
        query = query
            .bind(int(step.partition))
            .bind(bigint(step.from))
            .bind(step.fence)
            .bind(bigint(step.to.next))
            .bind(step.to.state.as_str())
            .bind(bigint(step.end))
            .bind(step.last_event_at.map(micros::to_micros));
    }
    let query = query.bind(micros::to_micros(now)).bind(target.name).bind(target.generation.int());
    Ok(query.execute(connection).await?.rows_affected())
}

/// Where all partitions of the projection stand now, whoever holds them.
pub(crate) async fn places(
    database: &Database,
    target: Target<'_>,
) -> Result<Vec<Place>, sqlx::Error> {
    let sql = "SELECT partition, next_offset, fold_state, fence FROM kafold_checkpoint \
               WHERE projection = $1 AND generation = $2 ORDER BY partition";
    let (name, generation) = (target.name, target.generation.int());
    let rows: Vec<PlaceRow> = reading!(database, pool => {
        sqlx::query_as(sql).bind(name).bind(generation).fetch_all(pool).await?
    });
    Ok(rows.into_iter().map(place).collect())
}

fn place((partition, next, state, fence): PlaceRow) -> Place {
    // Both were written from unsigned numbers below.
    let partition = Partition(u32::try_from(partition).unwrap_or_default());
    Place { partition, next: Offset(u64::try_from(next).unwrap_or_default()), state, fence }
}

/// A log has far fewer than 2³¹ partitions.
pub(crate) fn int(partition: Partition) -> i32 {
    i32::try_from(partition.0).unwrap_or(i32::MAX)
}

/// Offsets of every log are 63 bits.
pub(crate) fn bigint(offset: Offset) -> i64 {
    i64::try_from(offset.0).unwrap_or(i64::MAX)
}

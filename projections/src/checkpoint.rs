//! The table `kafold_checkpoint`: where each projection stands in each partition.
//!
//! A checkpoint moves by compare-and-set on the offset it stood at and on the fence, in the
//! transaction that writes the rows. Whoever takes a partition raises the fence first; from then on
//! every transaction of the former holder fails.

use chrono::{DateTime, Utc};
use kafold_core::store::Cursor;
use kafold_core::window::EventClock;
use kafold_core::{Offset, Partition};
use kafold_migrations::micros::Time;
use kafold_migrations::{Database, SqlText, micros};
use sqlx::{PgConnection, SqliteConnection};

use crate::clock_step::{ClockStep, ClockSteps, EventCounts, PartitionClock};
use crate::handler::Target;
use crate::registry;
use crate::sql::{either, reading};
use crate::table::list_tuples;
use crate::transaction::{OpenTransaction, Transaction};

/// Where PostgreSQL tells other processes of progress, as `NAME/PARTITION/NEXT`.
pub(crate) const CHANNEL: &str = "kafold_checkpoint";

/// Values of one [`Step`] in a statement on SQLite.
const STEP_VALUES: usize = 7;
/// Values of the [`ClockStep`] of a step.
const CLOCK_VALUES: usize = 9;

/// Where a partition stands, and the right to move it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) partition: Partition,
    pub(crate) next: Offset,
    /// The source's state there; empty when nothing was ever applied.
    pub(crate) state: String,
    pub(crate) fence: i64,
    /// For a windowed model.
    pub(crate) clock: PartitionClock,
}

impl Checkpoint {
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
    /// For a windowed model.
    pub(crate) clock: Option<ClockStep>,
}

type CheckpointRow = (i32, i64, String, i64, Option<Time>, i64);

/// Raises the fences of the partitions and tells where they stand. `None`: the generation is neither
/// live nor being built; a switch or an abort comes before or after this as a whole.
pub(crate) async fn take(
    database: &Database,
    target: Target<'_>,
    partitions: &[Partition],
    now: DateTime<Utc>,
) -> Result<Option<Vec<Checkpoint>>, sqlx::Error> {
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
) -> Result<Vec<CheckpointRow>, sqlx::Error> {
    let sql = "INSERT INTO kafold_checkpoint AS c \
                 (projection, generation, partition, next_offset, fold_state, fence, updated_at) \
               SELECT $1, $2, p, 0, '', 1, $4 FROM UNNEST($3::int4[]) AS p \
               ON CONFLICT (projection, generation, partition) \
               DO UPDATE SET fence = c.fence + 1, updated_at = $4 \
               RETURNING partition, next_offset, fold_state, fence, clock, late_rows";
    let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
    query.bind(partitions).bind(now).fetch_all(connection).await
}

async fn take_sqlite(
    connection: &mut SqliteConnection,
    target: Target<'_>,
    partitions: &[i32],
    now: DateTime<Utc>,
) -> Result<Vec<CheckpointRow>, sqlx::Error> {
    let sql = "INSERT INTO kafold_checkpoint \
                 (projection, generation, partition, next_offset, fold_state, fence, updated_at) \
               SELECT $1, $2, value, 0, '', 1, $4 FROM json_each($3) WHERE true \
               ON CONFLICT (projection, generation, partition) \
               DO UPDATE SET fence = fence + 1, updated_at = $4 \
               RETURNING partition, next_offset, fold_state, fence, clock, late_rows";
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
    place: &Checkpoint,
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

/// Adds the events of a windowed model that are applied outside of the order of their partition.
pub(crate) async fn count(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    steps: &ClockSteps,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_checkpoint SET in_windows = in_windows + $4, late = late + $5, \
                 late_windows = late_windows + $6, future = future + $7, keyless = keyless + $8, \
                 late_rows = late_rows + $9 \
               WHERE projection = $1 AND generation = $2 AND partition = $3";
    for (partition, step) in steps {
        either!(tx, connection => {
            let query = sqlx::query(sql).bind(target.name).bind(target.generation.int());
            let query = query.bind(int(*partition));
            let query = COUNTS.iter().fold(query, |query, count| query.bind(count(&step.counts)));
            query.execute(&mut **connection).await?;
        });
    }
    Ok(())
}

async fn advance_postgres(
    connection: &mut PgConnection,
    target: Target<'_>,
    steps: &[Step],
    is_told: bool,
    now: DateTime<Utc>,
) -> Result<u64, sqlx::Error> {
    let clocks: Vec<_> = steps.iter().filter_map(|step| step.clock).collect();
    let (set, arrays, names) = if clocks.is_empty() { ("", "", "") } else { POSTGRES_CLOCKS };
    let mut sql = SqlText::new(
        "UPDATE kafold_checkpoint c \
         SET next_offset = s.next, fold_state = s.state, end_offset = s.log_end, \
             last_event_at = COALESCE(s.event_at, c.last_event_at), updated_at = $10",
    );
    sql.text(set);
    sql.text(
        " FROM UNNEST($3::int4[], $4::int8[], $5::int8[], $6::int8[], $7::text[], \
                      $8::int8[], $9::timestamptz[]",
    );
    sql.text(arrays).text(") AS s (partition, base, fence, next, state, log_end, event_at");
    sql.text(names);
    sql.text(
        ") WHERE c.projection = $1 AND c.generation = $2 AND c.partition = s.partition \
           AND c.next_offset = s.base AND c.fence = s.fence \
         RETURNING CASE WHEN $11 THEN \
           pg_notify($12, c.projection || '/' || c.partition || '/' || c.next_offset)::text END",
    );
    let column = |value: fn(&Step) -> i64| steps.iter().map(value).collect::<Vec<i64>>();
    let mut query = sqlx::query(sql.finish())
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
    if !clocks.is_empty() {
        let times = |time: fn(&ClockStep) -> Option<DateTime<Utc>>| {
            clocks.iter().map(time).collect::<Vec<_>>()
        };
        query = query
            .bind(times(|step| step.clock.time()))
            .bind(times(|step| step.newest.map(|newest| newest.at)))
            .bind(times(|step| step.newest.map(|newest| newest.recorded_at)));
        for count in COUNTS {
            query = query.bind(clocks.iter().map(|step| count(&step.counts)).collect::<Vec<_>>());
        }
    }
    Ok(query.execute(connection).await?.rows_affected())
}

/// The parts of the statement that moves checkpoints with the clocks of a windowed model.
const POSTGRES_CLOCKS: (&str, &str, &str) = (
    SET_CLOCKS,
    ", $13::timestamptz[], $14::timestamptz[], $15::timestamptz[], $16::int8[], $17::int8[], \
      $18::int8[], $19::int8[], $20::int8[], $21::int8[]",
    CLOCK_NAMES,
);
const CLOCK_NAMES: &str = ", clock, newest_at, newest_recorded_at, in_windows, late, late_windows, \
                            future, keyless, late_rows";
/// The newest event is the one recorded last.
const SET_CLOCKS: &str = ", clock = s.clock, in_windows = c.in_windows + s.in_windows, \
    late = c.late + s.late, late_windows = c.late_windows + s.late_windows, \
    future = c.future + s.future, keyless = c.keyless + s.keyless, \
    late_rows = c.late_rows + s.late_rows, \
    newest_at = CASE WHEN s.newest_recorded_at >= COALESCE(c.newest_recorded_at, s.newest_recorded_at) \
                     THEN s.newest_at ELSE c.newest_at END, \
    newest_recorded_at = \
      CASE WHEN s.newest_recorded_at >= COALESCE(c.newest_recorded_at, s.newest_recorded_at) \
           THEN s.newest_recorded_at ELSE c.newest_recorded_at END";
/// The counts, in the order of [`CLOCK_NAMES`].
const COUNTS: [fn(&EventCounts) -> i64; 6] = [
    |counts| counts.in_windows,
    |counts| counts.late,
    |counts| counts.late_windows,
    |counts| counts.future,
    |counts| counts.keyless,
    |counts| counts.late_rows,
];

async fn advance_sqlite(
    connection: &mut SqliteConnection,
    target: Target<'_>,
    steps: &[Step],
    now: DateTime<Utc>,
) -> Result<u64, sqlx::Error> {
    let has_clocks = steps.iter().any(|step| step.clock.is_some());
    let (set, names, width) = match has_clocks {
        true => (SET_CLOCKS, CLOCK_NAMES, STEP_VALUES + CLOCK_VALUES),
        false => ("", "", STEP_VALUES),
    };
    let mut sql = SqlText::new("WITH s (partition, base, fence, next, state, log_end, event_at");
    sql.text(names).text(") AS (VALUES ");
    list_tuples(&mut sql, steps.len(), width);
    sql.text(
        ") UPDATE kafold_checkpoint AS c \
         SET next_offset = s.next, fold_state = s.state, end_offset = s.log_end, \
             last_event_at = COALESCE(s.event_at, c.last_event_at), updated_at = ?",
    );
    sql.text(set);
    sql.text(
        " FROM s \
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
        if let Some(clock) = &step.clock {
            query = query
                .bind(clock.clock.time().map(Time))
                .bind(clock.newest.map(|newest| Time(newest.at)))
                .bind(clock.newest.map(|newest| Time(newest.recorded_at)));
            for count in COUNTS {
                query = query.bind(count(&clock.counts));
            }
        }
    }
    let query = query.bind(micros::to_micros(now)).bind(target.name).bind(target.generation.int());
    Ok(query.execute(connection).await?.rows_affected())
}

/// Where all partitions of the projection stand now, whoever holds them.
pub(crate) async fn places(
    database: &Database,
    target: Target<'_>,
) -> Result<Vec<Checkpoint>, sqlx::Error> {
    let sql = "SELECT partition, next_offset, fold_state, fence, clock, late_rows FROM kafold_checkpoint \
               WHERE projection = $1 AND generation = $2 ORDER BY partition";
    let (name, generation) = (target.name, target.generation.int());
    let rows: Vec<CheckpointRow> = reading!(database, pool => {
        sqlx::query_as(sql).bind(name).bind(generation).fetch_all(pool).await?
    });
    Ok(rows.into_iter().map(place).collect())
}

fn place((partition, next, state, fence, clock, late_rows): CheckpointRow) -> Checkpoint {
    // The numbers were written from unsigned ones below.
    let partition = Partition(u32::try_from(partition).unwrap_or_default());
    let next = Offset(u64::try_from(next).unwrap_or_default());
    let clock = EventClock::at(clock.map(Into::into));
    let clock = PartitionClock { clock, late_rows: late_rows.unsigned_abs() };
    Checkpoint { partition, next, state, fence, clock }
}

/// A log has far fewer than 2³¹ partitions.
pub(crate) fn int(partition: Partition) -> i32 {
    i32::try_from(partition.0).unwrap_or(i32::MAX)
}

/// Offsets of every log are 63 bits.
pub(crate) fn bigint(offset: Offset) -> i64 {
    i64::try_from(offset.0).unwrap_or(i64::MAX)
}

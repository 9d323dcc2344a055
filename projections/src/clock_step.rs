//! The clock of a partition for a windowed model, and the counts of its events, which are stored with the checkpoint.

use std::collections::BTreeMap;

use kafold_core::Partition;
use kafold_core::window::{EventClock, NewestEvent};
use kafold_migrations::Database;

use crate::sql::{either, reading};
use crate::transaction::Transaction;

/// The stored state of a partition that decides which events are late.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PartitionClock {
    pub(crate) clock: EventClock,
    /// Number of rows that the partition has in the table of late events, or would have without their limit.
    pub(crate) late_rows: u64,
}

/// Returns the clock of a partition. `None` for events that are applied outside of the order of their partition, as
/// those of a parked stream: all of them are in time.
pub(crate) type ClockOf<'c> = &'c (dyn Fn(Partition) -> Option<PartitionClock> + Sync);

/// The steps of a round, by partition.
pub(crate) type ClockSteps = BTreeMap<Partition, ClockStep>;

/// The events of a partition in a round: the clock after them, and their number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ClockStep {
    pub(crate) clock: EventClock,
    pub(crate) newest: Option<NewestEvent>,
    pub(crate) counts: EventCounts,
}

/// Numbers of events of a windowed model. Each event of the model is in exactly one of `in_windows`, `late`, `future` and
/// `keyless`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, sqlx::FromRow)]
pub struct EventCounts {
    /// Events in at least one of their windows.
    pub in_windows: i64,
    /// Events that were late for all of their windows.
    pub late: i64,
    /// Windows for which events were late, over all events.
    pub late_windows: i64,
    /// Events stamped too far after their own recording.
    pub future: i64,
    /// Events in time that touch no row.
    pub keyless: i64,
    /// Events with a row in the table of late events, or without one because of the limit of rows: those late for a
    /// window, and those from the future.
    pub late_rows: i64,
}

impl EventCounts {
    /// Returns the counts of the live generation of a model, over all partitions.
    pub(crate) async fn of(database: &Database, name: &str) -> Result<Self, sqlx::Error> {
        reading!(database, pool => sqlx::query_as(SUM).bind(name).fetch_one(pool).await)
    }

    /// As [`of`](Self::of), in a transaction.
    pub(crate) async fn of_live(tx: &mut Transaction<'_>, name: &str) -> Result<Self, sqlx::Error> {
        either!(tx, connection => {
            sqlx::query_as(SUM).bind(name).fetch_one(&mut **connection).await
        })
    }

    /// Returns the number of all events.
    pub fn events(&self) -> i64 {
        self.in_windows + self.late + self.future + self.keyless
    }
}

impl std::ops::AddAssign for EventCounts {
    fn add_assign(&mut self, other: Self) {
        self.in_windows += other.in_windows;
        self.late += other.late;
        self.late_windows += other.late_windows;
        self.future += other.future;
        self.keyless += other.keyless;
        self.late_rows += other.late_rows;
    }
}

/// A sum of BIGINT is NUMERIC on PostgreSQL.
const SUM: &str = "SELECT CAST(COALESCE(SUM(in_windows), 0) AS BIGINT) AS in_windows, \
                     CAST(COALESCE(SUM(late), 0) AS BIGINT) AS late, \
                     CAST(COALESCE(SUM(late_windows), 0) AS BIGINT) AS late_windows, \
                     CAST(COALESCE(SUM(future), 0) AS BIGINT) AS future, \
                     CAST(COALESCE(SUM(keyless), 0) AS BIGINT) AS keyless, \
                     CAST(COALESCE(SUM(late_rows), 0) AS BIGINT) AS late_rows \
                   FROM kafold_checkpoint c JOIN kafold_projection p \
                     ON p.name = c.projection AND p.live_generation = c.generation \
                   WHERE p.name = $1";

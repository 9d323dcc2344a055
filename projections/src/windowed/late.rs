//! The table `kafold_late_event`: events that were late for a window, and events from the future.

use kafold_core::row::{Column, ColumnKind, ColumnRole, Value};
use kafold_core::window::{EventClock, Timestamp};
use kafold_core::{Position, StreamId, Version};

use chrono::TimeDelta;

use crate::checkpoint::{bigint, int};
use crate::handler::Target;
use crate::table::Table;
use crate::transaction::Transaction;

/// Most rows of a partition of a generation. Beyond them only the counts go on.
pub(crate) const ROWS_MAX: u64 = 100_000;

const TABLE: &str = "kafold_late_event";

/// The columns, in the order of [`LateEvent::into_values`].
const COLUMNS: &[Column] = &[
    column("projection", ColumnKind::Text, ColumnRole::Key),
    column("generation", ColumnKind::Integer, ColumnRole::Key),
    column("partition", ColumnKind::Integer, ColumnRole::Key),
    column("offset", ColumnKind::Integer, ColumnRole::Key),
    column("kind", ColumnKind::Text, ColumnRole::Plain),
    column("category", ColumnKind::Text, ColumnRole::Plain),
    column("stream_id", ColumnKind::Text, ColumnRole::Plain),
    column("version", ColumnKind::Integer, ColumnRole::Plain),
    column("at", ColumnKind::Timestamp, ColumnRole::Plain),
    nullable("clock", ColumnKind::Timestamp),
    column("windows", ColumnKind::Integer, ColumnRole::Plain),
    nullable("grace_us", ColumnKind::Integer),
];

const fn column(name: &'static str, kind: ColumnKind, role: ColumnRole) -> Column {
    Column { name, kind, nullable: false, role, merge: None }
}

const fn nullable(name: &'static str, kind: ColumnKind) -> Column {
    Column { name, kind, nullable: true, role: ColumnRole::Plain, merge: None }
}

/// The reason for a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The event is late for at least one of its windows.
    Late,
    /// The event is stamped too far after its own recording.
    Future,
}

/// A row of the table.
#[derive(Debug)]
pub(super) struct LateEvent<'w> {
    pub(super) kind: Kind,
    pub(super) stream: &'w StreamId,
    pub(super) version: Version,
    pub(super) position: Position,
    pub(super) at: Timestamp,
    /// The clock of the partition before the event.
    pub(super) clock: EventClock,
    /// Number of windows for which the event is late.
    pub(super) windows: u32,
    /// The least grace with which the event is in time for a window, if it is late for all.
    pub(super) grace: Option<TimeDelta>,
}

impl LateEvent<'_> {
    fn values(&self, target: Target<'_>) -> Vec<Value> {
        let kind = match self.kind {
            Kind::Late => "late",
            Kind::Future => "future",
        };
        let Position { partition, offset } = self.position;
        vec![
            Value::Text(target.name.to_owned()),
            Value::Integer(target.generation.int().into()),
            Value::Integer(int(partition).into()),
            Value::Integer(bigint(offset)),
            Value::Text(kind.to_owned()),
            Value::Text(self.stream.category().to_owned()),
            Value::Text(self.stream.id().to_owned()),
            Value::Integer(i64::try_from(self.version.0).unwrap_or(i64::MAX)),
            Value::Timestamp(self.at),
            self.clock.time().map_or(Value::Null, Value::Timestamp),
            Value::Integer(self.windows.into()),
            self.grace
                .and_then(|grace| grace.num_microseconds())
                .map_or(Value::Null, Value::Integer),
        ]
    }
}

/// Inserts the late events of a round, in its transaction.
pub(super) async fn insert(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
    events: &[LateEvent<'_>],
) -> Result<(), sqlx::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let table = Table::of_kafold(TABLE, COLUMNS);
    let mut inserts = table.inserts(tx, events.len()).await?;
    for event in events {
        inserts.add(event.values(target)).await?;
    }
    let rows = inserts.finish().await?;
    table.upsert(tx, rows).await
}

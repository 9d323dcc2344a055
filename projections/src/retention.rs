//! Rows of windows that are not kept any more.

use kafold_core::window::{EventClock, Timestamp, Window};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;

use crate::definition::Definition;
use crate::generation::Generation;
use crate::sql::reading;
use crate::table::Table;
use crate::transaction::OpenTransaction;

/// Most rows in one transaction.
const ROWS_MAX: u64 = 10_000;

/// Returns the windows of the live generation of a windowed model, and the least clock of all partitions. The clock has
/// no time while a partition has none.
pub(crate) async fn least_clock(
    database: &Database,
    name: &str,
) -> Result<Option<(Window, EventClock)>, sqlx::Error> {
    let sql = "SELECT p.live_window, p.partitions, COUNT(c.clock), MIN(c.clock) \
               FROM kafold_projection p LEFT JOIN kafold_checkpoint c \
                 ON c.projection = p.name AND c.generation = p.live_generation \
               WHERE p.name = $1 GROUP BY p.name, p.live_window, p.partitions";
    type ClockRow = (Option<String>, Option<i32>, i64, Option<Time>);
    let row: Option<ClockRow> = reading!(database, pool => {
        sqlx::query_as(sql).bind(name).fetch_optional(pool).await?
    });
    let Some((Some(window), Some(partitions), with_clock, least)) = row else { return Ok(None) };
    let window =
        serde_json::from_str(&window).map_err(|error| sqlx::Error::Decode(error.into()))?;
    let least = least.filter(|_| with_clock >= i64::from(partitions));
    Ok(Some((window, EventClock::at(least.map(Into::into)))))
}

/// Deletes the rows of the live generation that are not kept any more. Returns the number of rows.
pub(crate) async fn expire(
    database: &Database,
    definition: &Definition,
    live: Generation,
) -> Result<u64, sqlx::Error> {
    let Some((window, least)) = least_clock(database, &definition.name).await? else {
        return Ok(0);
    };
    let Some(before) = window.expired_before(least) else { return Ok(0) };
    let Some(table) = Table::new(definition, live) else { return Ok(0) };
    let mut deleted = 0;
    loop {
        let mut open = OpenTransaction::begin(database).await?;
        let count = table.expire(&mut open.lend(), before, ROWS_MAX).await?;
        open.commit().await?;
        deleted += count;
        if count < ROWS_MAX {
            return Ok(deleted);
        }
    }
}

/// Returns the moment before which the rows of windows have ended that are not kept with these clocks, one a partition.
pub(crate) fn expired_before(
    definition: &Definition,
    clocks: impl IntoIterator<Item = EventClock>,
) -> Option<Timestamp> {
    definition.window?.expired_before(kafold_core::window::least_clock(clocks))
}

//! What operators ask of projections, as the tables say: looked up for all projections of a worker at
//! once, a few times a second.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kafold_core::{Offset, Partition, Position, StreamId};
use kafold_migrations::Database;
use tokio::sync::watch;

use crate::generation::Generation;
use crate::parked;
use crate::registry::{self, State};
use crate::sql::reading;
use crate::worker::Context;

/// Requests to retry that are looked up at a time; the others come when these are done.
const RETRIES_MAX: i64 = 1_000;

/// What is asked of one projection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) live: Generation,
    /// The generation to build.
    pub(crate) next: Option<Generation>,
    /// `true` after a reset of positions: the live generation starts again as the next generation.
    pub(crate) is_reset: bool,
    /// By which definition, once somebody has begun.
    pub(crate) next_fingerprint: Option<String>,
    /// Why the rebuild does not go on, as it is written down.
    pub(crate) next_reason: Option<String>,
    pub(crate) is_paused: bool,
    /// `true` if the stored state says that the projection has stopped.
    pub(crate) is_stopped: bool,
    /// Counts the requests to go on.
    pub(crate) resumptions: i64,
    /// Parked streams to try again.
    pub(crate) retries: Vec<(Generation, Partition, StreamId)>,
    /// Events ahead that are to be left out with their commits.
    pub(crate) skips: BTreeSet<(Generation, Position)>,
}

/// What is asked of every projection, by name.
pub(crate) type AllDesired = Arc<HashMap<String, Desired>>;

/// Interval at which a worker stores the time in `seen_at` of its projections.
const SEEN_INTERVAL: Duration = Duration::from_secs(15);
/// The same while a projection is not registered yet, or the database is away.
const SEEN_RETRY: Duration = Duration::from_secs(1);

/// Looks it up, again and again, until nobody is interested any more. Stores that this worker runs the
/// projections of these names.
pub(crate) async fn poll(context: Context, names: Vec<String>, told: watch::Sender<AllDesired>) {
    let Context { database, config, clock, look, .. } = context;
    let mut seen_due = clock.instant();
    while !told.is_closed() {
        let now = clock.instant();
        if seen_due <= now {
            let seen = registry::seen(&database, &names).await;
            if let Err(error) = &seen {
                tracing::debug!(%error, "cannot store that projections run");
            }
            seen_due = now + if matches!(seen, Ok(true)) { SEEN_INTERVAL } else { SEEN_RETRY };
        }
        match all(&database).await {
            Ok(all) => {
                told.send_if_modified(|before| {
                    let is_new = **before != all;
                    if is_new {
                        *before = Arc::new(all);
                    }
                    is_new
                });
            }
            // What was asked before holds until the database is back; projections say that it is away.
            Err(error) => tracing::debug!(%error, "cannot look up what operators ask"),
        }
        tokio::select! {
            () = clock.sleep(config.control_poll_interval) => {}
            () = look.notified() => {}
            () = told.closed() => {}
        }
    }
}

#[derive(sqlx::FromRow)]
struct AskedRow {
    name: String,
    live_generation: i32,
    fingerprint: String,
    next_generation: Option<i32>,
    next_fingerprint: Option<String>,
    next_reason: Option<String>,
    desired_state: String,
    actual_state: String,
    resumptions: i64,
    /// Of any projection, as is the next.
    has_retries: bool,
    has_skips: bool,
}

async fn all(database: &Database) -> Result<HashMap<String, Desired>, sqlx::Error> {
    // Most of the time this is all there is to ask.
    let sql = "SELECT name, live_generation, fingerprint, next_generation, next_fingerprint, \
                 next_reason, desired_state, actual_state, resumptions, \
                 EXISTS (SELECT 1 FROM kafold_parked_event WHERE retry) AS has_retries, \
                 EXISTS (SELECT 1 FROM kafold_skipped_event) AS has_skips \
               FROM kafold_projection";
    let rows: Vec<AskedRow> =
        reading!(database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
    let has_retries = rows.first().is_some_and(|row| row.has_retries);
    let has_skips = rows.first().is_some_and(|row| row.has_skips);
    let mut all: HashMap<_, _> = rows.into_iter().map(desired).collect();
    if has_retries {
        add_retries(database, &mut all).await?;
    }
    if has_skips {
        add_skips(database, &mut all).await?;
    }
    Ok(all)
}

async fn add_retries(
    database: &Database,
    all: &mut HashMap<String, Desired>,
) -> Result<(), sqlx::Error> {
    let sql = "SELECT DISTINCT projection, generation, partition, category, stream_id \
               FROM kafold_parked_event WHERE retry \
               ORDER BY projection, generation, partition, category, stream_id LIMIT $1";
    let rows: Vec<(String, i32, i32, String, String)> = reading!(database, pool => {
        sqlx::query_as(sql).bind(RETRIES_MAX).fetch_all(pool).await?
    });
    for (name, generation, partition, category, id) in rows {
        let stream = parked::stream(&category, &id)?;
        let retry = (Generation::of(generation), Partition(partition.unsigned_abs()), stream);
        all.entry(name).and_modify(|desired| desired.retries.push(retry));
    }
    Ok(())
}

async fn add_skips(
    database: &Database,
    all: &mut HashMap<String, Desired>,
) -> Result<(), sqlx::Error> {
    let sql = "SELECT s.projection, s.generation, s.partition, s.\"offset\" \
               FROM kafold_skipped_event s \
               JOIN kafold_checkpoint c ON c.projection = s.projection \
                 AND c.generation = s.generation AND c.partition = s.partition \
               WHERE s.\"offset\" >= c.next_offset";
    let rows: Vec<(String, i32, i32, i64)> =
        reading!(database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
    for (name, generation, partition, offset) in rows {
        let partition = Partition(partition.unsigned_abs());
        let position = Position { partition, offset: Offset(offset.unsigned_abs()) };
        let skip = (Generation::of(generation), position);
        all.entry(name).and_modify(|desired| desired.skips.extend([skip]));
    }
    Ok(())
}

fn desired(row: AskedRow) -> (String, Desired) {
    let desired = Desired {
        live: Generation::of(row.live_generation),
        next: row.next_generation.map(Generation::of),
        is_reset: registry::is_reset(&row.fingerprint),
        next_fingerprint: row.next_fingerprint,
        next_reason: row.next_reason,
        is_paused: row.desired_state == State::Paused.text(),
        is_stopped: row.actual_state == State::Stopped.text(),
        resumptions: row.resumptions,
        retries: Vec::new(),
        skips: BTreeSet::new(),
    };
    (row.name, desired)
}

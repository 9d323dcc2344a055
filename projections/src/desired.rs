//! What operators ask of projections, as the tables say: looked up for all projections of a worker at
//! once, a few times a second.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kafold_core::{Offset, Partition, Position, StreamId};
use kafold_migrations::Database;
use tokio::sync::watch;

use crate::generation::Generation;
use crate::parked;
use crate::registry::State;
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
    /// By which definition, once somebody has begun.
    pub(crate) next_fingerprint: Option<String>,
    /// Why the rebuild does not go on, as it is written down.
    pub(crate) next_reason: Option<String>,
    pub(crate) is_paused: bool,
    /// Counts the requests to go on.
    pub(crate) resumptions: i64,
    /// Parked streams to try again.
    pub(crate) retries: Vec<(Generation, Partition, StreamId)>,
    /// Events ahead that are to be left out with their commits.
    pub(crate) skips: BTreeSet<(Generation, Position)>,
}

/// What is asked of every projection, by name.
pub(crate) type AllDesired = Arc<HashMap<String, Desired>>;

/// Looks it up, again and again, until nobody is interested any more.
pub(crate) async fn poll(context: Context, told: watch::Sender<AllDesired>) {
    let Context { database, config, clock, look, .. } = context;
    while !told.is_closed() {
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

type Row = (String, i32, Option<i32>, Option<String>, Option<String>, String, i64);

async fn all(database: &Database) -> Result<HashMap<String, Desired>, sqlx::Error> {
    let sql = "SELECT name, live_generation, next_generation, next_fingerprint, next_reason, \
                 desired_state, resumptions FROM kafold_projection";
    let rows: Vec<Row> = reading!(database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
    let mut all: HashMap<_, _> = rows.into_iter().map(desired).collect();
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
    Ok(all)
}

fn desired(row: Row) -> (String, Desired) {
    let (name, live, next, next_fingerprint, next_reason, state, resumptions) = row;
    let desired = Desired {
        live: Generation::of(live),
        next: next.map(Generation::of),
        next_fingerprint,
        next_reason,
        is_paused: state == State::Paused.text(),
        resumptions,
        retries: Vec::new(),
        skips: BTreeSet::new(),
    };
    (name, desired)
}

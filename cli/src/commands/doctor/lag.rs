//! How far stream index and projections are behind the log, and whether they are of this log.

use kafold::{Database, ReadError};

use super::{Checks, Seen};
use crate::admin::Context;
use crate::error::{Error, chain};
use crate::log::Log;
use crate::output::count;
use crate::overview::{self, PartitionView, ProjectionView};

/// Above it the owner of a partition takes no more commands: events wait in its memory for the index.
const INDEX_LAG_MAX: u64 = 20_000;
/// A projection that is farther behind, in records and in seconds, is worth a look.
const PROJECTION_LAG_RECORDS_MAX: u64 = 1_000;
const PROJECTION_LAG_SECONDS_MAX: f64 = 60.0;

pub(super) async fn check(
    context: &Context,
    seen: Option<&Seen>,
    database: &Database,
    checks: &mut Checks,
) {
    if let Some(seen) = seen
        && let Err(error) = check_index(seen, database, checks).await
    {
        checks.failed("index", &error);
    }
    let partitions = seen.map(|seen| seen.partitions.as_slice());
    match overview::projections(database, partitions, context.clock.now()).await {
        Ok(projections) => {
            projections.iter().for_each(|view| check_projection(view, seen, checks));
        }
        Err(error) => checks.failed("projections", &error),
    }
}

async fn check_index(seen: &Seen, database: &Database, checks: &mut Checks) -> Result<(), Error> {
    // A log in a file is its own index.
    let Log::Kafka(log) = &seen.log else { return Ok(()) };
    let cursors = overview::index(database).await?;
    for (partition, cursor) in &cursors {
        match log.check(*partition, Some(cursor)).await {
            Ok(()) => {}
            Err(error @ ReadError::Unavailable { .. }) => return Err(error.into()),
            Err(error) => {
                let remedy = "give log and database that belong together";
                checks.problem(
                    "index",
                    format!("it is not of this log: {}", chain(&error)),
                    remedy,
                );
                return Ok(());
            }
        }
    }
    let behind = |seen: &PartitionView| {
        let next = cursors.get(&seen.partition).map_or(0, |cursor| cursor.next.0);
        seen.end.0.saturating_sub(next)
    };
    let lag = seen.partitions.iter().map(behind).sum();
    let found = format!("{} behind the log", count(lag, "record"));
    match lag > INDEX_LAG_MAX {
        true => {
            checks.warning("index", found, "start the service: the owner of a partition feeds it");
        }
        false => checks.ok("index", found),
    }
    Ok(())
}

fn check_projection(view: &ProjectionView, seen: Option<&Seen>, checks: &mut Checks) {
    const NAME: &str = "projections";
    let name = &view.row.name;
    let reason = view.row.reason.as_deref().map_or(String::new(), |reason| format!(": {reason}"));
    if view.parked_events > 0 {
        let (events, streams) =
            (count(view.parked_events, "event"), count(view.parked_streams, "stream"));
        let remedy = "see why, then let them be retried or skipped";
        checks.warning(NAME, format!("{name} has parked {events} of {streams}"), remedy);
    }
    if let Some(place) = view.checkpoints.iter().find(|place| {
        let end = seen.and_then(|seen| {
            seen.partitions.iter().find(|found| found.partition == place.partition)
        });
        end.is_some_and(|found| place.next > found.end)
    }) {
        let (partition, next) = (place.partition, place.next);
        let found = format!("{name} stands at {partition}:{next}, behind the end of the log");
        return checks.problem(NAME, found, "give log and database that belong together");
    }
    let lag = format!("{} ({:.0} s)", count(view.lag_records, "record"), view.lag_seconds);
    match view.row.state.as_str() {
        "stopped" => {
            let remedy = "correct what it says, then start the service again";
            checks.problem(NAME, format!("{name} has stopped{reason}"), remedy);
        }
        "paused" => {
            let remedy = "resume it when it is to go on";
            checks.warning(NAME, format!("{name} is paused, {lag} behind{reason}"), remedy);
        }
        state
            if view.lag_records > PROJECTION_LAG_RECORDS_MAX
                && view.lag_seconds > PROJECTION_LAG_SECONDS_MAX =>
        {
            let remedy = "see that the service runs, and what its log says";
            checks.warning(NAME, format!("{name} is {state}, {lag} behind{reason}"), remedy);
        }
        state => checks.ok(NAME, format!("{name} is {state}, {lag} behind{reason}")),
    }
}

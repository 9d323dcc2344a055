//! How far stream index and projections are behind the log, and whether they are of this log.

use kafold::projections::{NodeReport, Overview, OverviewState};
use kafold::{Database, ReadError};

use super::{Checks, Seen};
use crate::error::{Error, chain};
use crate::log::Log;
use crate::output::count;
use crate::overview::{self, PartitionView};

/// Above it the owner of a partition takes no more commands: events wait in its memory for the index.
const INDEX_LAG_MAX: u64 = 20_000;
/// A projection that is farther behind, in records and in seconds, is worth a look.
const PROJECTION_LAG_RECORDS_MAX: u64 = 1_000;
const PROJECTION_LAG_SECONDS_MAX: f64 = 60.0;

pub(super) async fn check(seen: Option<&Seen>, database: &Database, checks: &mut Checks) {
    if let Some(seen) = seen
        && let Err(error) = check_index(seen, database, checks).await
    {
        checks.failed("index", &error);
    }
    let partitions = seen.map(|seen| seen.partitions.as_slice());
    match overview::projections(database, partitions).await {
        Ok(projections) => {
            projections.iter().for_each(|view| check_projection(view, seen, checks));
        }
        Err(error) => checks.failed("projections", &error),
    }
    match NodeReport::all(database).await {
        Ok(nodes) => check_nodes(&nodes, checks),
        Err(error) => checks.failed("nodes", &error.into()),
    }
}

fn check_nodes(nodes: &[NodeReport], checks: &mut Checks) {
    const NAME: &str = "nodes";
    let before = checks.0.len();
    for node in nodes {
        if let Some(complaint) = node.complaint() {
            checks.problem(NAME, complaint, "mend the cause: the node goes on by itself");
        } else if let Some(silence) = node.silence() {
            let remedy = "see whether the process runs, and what its log says; a report is forgotten after a day";
            checks.warning(NAME, silence, remedy);
        }
    }
    if checks.0.len() == before && !nodes.is_empty() {
        checks.ok(NAME, format!("{} without a complaint", count(nodes.len() as u64, "node")));
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
    if cursors.is_empty() {
        checks.ok("index", "there is none in this database: no service has fed it");
        return Ok(());
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

fn remedy(name: &str) -> String {
    format!(
        "mend the cause, then `projections resume {name}`; `projections rebuild {name}` makes tables \
         that are gone or changed again"
    )
}

fn check_projection(view: &Overview, seen: Option<&Seen>, checks: &mut Checks) {
    const NAME: &str = "projections";
    let name = &view.name;
    let reason = overview::reason(view).map_or(String::new(), |reason| format!(": {reason}"));
    if let Some(parked) = overview::parked(view) {
        let remedy = "see why with `parked list`, then `parked retry` or `parked skip`";
        checks.warning(NAME, format!("{name} has parked {parked}"), remedy);
    }
    if let Some(place) = view.partitions.iter().find(|place| {
        let end = seen.and_then(|seen| {
            seen.partitions.iter().find(|found| found.partition.0 == place.partition)
        });
        end.is_some_and(|found| place.next > found.end.0)
    }) {
        let (partition, next) = (place.partition, place.next);
        let found = format!("{name} stands at {partition}:{next}, behind the end of the log");
        return checks.problem(NAME, found, "give log and database that belong together");
    }
    if let Some(seconds) = view.unattended_seconds {
        let found = format!("no worker has run {name} for {seconds} s");
        return checks.problem(NAME, found, Overview::unattended_remedy(name));
    }
    let lag = overview::lag(view);
    let is_far = view.lag_records > PROJECTION_LAG_RECORDS_MAX
        && view.lag_seconds > PROJECTION_LAG_SECONDS_MAX;
    match view.state {
        OverviewState::Stopped => {
            let remedy = remedy(name);
            checks.problem(NAME, format!("{name} has stopped{reason}"), remedy);
        }
        OverviewState::Paused => {
            let remedy = format!("`projections resume {name}` when it is to go on");
            checks.warning(NAME, format!("{name} is paused, {lag} behind"), remedy);
        }
        OverviewState::Rebuilding if !reason.is_empty() => {
            let remedy = remedy(name);
            checks.warning(NAME, format!("the rebuild of {name} waits{reason}"), remedy);
        }
        OverviewState::Running | OverviewState::Rebuilding if is_far => {
            let remedy = "see that the service runs, and what its log says";
            checks.warning(NAME, format!("{name} is {lag} behind"), remedy);
        }
        OverviewState::Rebuilding => {
            checks.ok(NAME, format!("{name} is being rebuilt, {lag} behind"));
        }
        OverviewState::Running => checks.ok(NAME, format!("{name} is running, {lag} behind")),
    }
}

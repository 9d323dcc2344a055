//! Log, stream index and projections side by side: who stands where.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use kafold::projections::{Control, Overview, SqlIndex};
use kafold::store::{Cursor, Owner};
use kafold::{Database, Offset, Partition, StreamIndex};

use crate::error::Error;
use crate::log::{Log, ask_all};
use crate::output::count;

/// A partition of the log.
#[derive(Debug, Clone)]
pub(crate) struct PartitionView {
    pub(crate) partition: Partition,
    pub(crate) start: Offset,
    pub(crate) end: Offset,
    /// The epoch of its newest claim, and whose it is.
    pub(crate) claim: Option<(u32, Owner)>,
    pub(crate) newest_event_at: Option<DateTime<Utc>>,
}

/// All partitions of the log.
pub(crate) async fn partitions(log: &Log) -> Result<Vec<PartitionView>, Error> {
    let all = (0..log.partitions()).map(Partition);
    Ok(ask_all(all, |partition| log.look(partition)).await?)
}

/// Where the stream index stands in each partition, if there is an index in this database.
pub(crate) async fn index(database: &Database) -> Result<BTreeMap<Partition, Cursor>, Error> {
    Ok(SqlIndex::new(database.clone()).cursors().await?.into_iter().collect())
}

/// All projections. Their lag is against the ends of the log, or, without it, against the ends that
/// their workers last saw.
pub(crate) async fn projections(
    database: &Database,
    log: Option<&[PartitionView]>,
) -> Result<Vec<Overview>, Error> {
    let end = |seen: &PartitionView| (seen.partition, seen.end);
    let ends: Vec<_> = log.into_iter().flatten().map(end).collect();
    Ok(Control::new(database.clone()).list(&ends).await?)
}

/// How far a projection is behind, in words.
pub(crate) fn lag(seen: &Overview) -> String {
    format!("{} ({:.0} s)", count(seen.lag_records, "record"), seen.lag_seconds)
}

/// What a projection has set aside, in words, if anything.
pub(crate) fn parked(seen: &Overview) -> Option<String> {
    let (events, streams) = (seen.parked_events.unsigned_abs(), seen.parked_streams.unsigned_abs());
    (events > 0).then(|| format!("{} of {}", count(events, "event"), count(streams, "stream")))
}

/// Why a projection, or its rebuild, does not go on.
pub(crate) fn reason(seen: &Overview) -> Option<&str> {
    let rebuild = seen.rebuild.as_ref().and_then(|rebuild| rebuild.reason.as_deref());
    seen.reason.as_deref().or(rebuild)
}

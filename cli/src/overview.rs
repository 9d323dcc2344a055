//! Log, stream index and projections side by side: who stands where.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use kafold::projections::SqlIndex;
use kafold::store::{Cursor, Owner};
use kafold::{Database, Offset, Partition, StreamIndex};

use crate::error::Error;
use crate::log::{Log, ask_all};
use crate::tables::{self, Checkpoint, Projection};

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

/// A projection, whoever runs it.
#[derive(Debug, Clone)]
pub(crate) struct ProjectionView {
    pub(crate) row: Projection,
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) lag_records: u64,
    /// How old the last applied event is in the partition that is farthest behind in time.
    pub(crate) lag_seconds: f64,
    pub(crate) parked_events: u64,
    pub(crate) parked_streams: u64,
}

/// All projections. Their lag is against the ends of the log, or, without it, against the ends that
/// their workers last saw.
pub(crate) async fn projections(
    database: &Database,
    log: Option<&[PartitionView]>,
    now: DateTime<Utc>,
) -> Result<Vec<ProjectionView>, Error> {
    let rows = tables::projections(database).await?;
    let mut checkpoints: BTreeMap<String, Vec<Checkpoint>> = BTreeMap::new();
    for checkpoint in tables::checkpoints(database).await? {
        checkpoints.entry(checkpoint.projection.clone()).or_default().push(checkpoint);
    }
    let parked: BTreeMap<_, _> = tables::parked(database)
        .await?
        .into_iter()
        .map(|(name, events, streams)| (name, (events.unsigned_abs(), streams.unsigned_abs())))
        .collect();
    let view = |row: Projection| {
        let checkpoints = checkpoints.remove(&row.name).unwrap_or_default();
        let (lag_records, lag_seconds) = lag(&checkpoints, log, now);
        let (parked_events, parked_streams) = parked.get(&row.name).copied().unwrap_or_default();
        ProjectionView { row, checkpoints, lag_records, lag_seconds, parked_events, parked_streams }
    };
    Ok(rows.into_iter().map(view).collect())
}

fn lag(
    checkpoints: &[Checkpoint],
    log: Option<&[PartitionView]>,
    now: DateTime<Utc>,
) -> (u64, f64) {
    let end_of = |checkpoint: &Checkpoint| match log {
        Some(log) => {
            log.iter().find(|seen| seen.partition == checkpoint.partition).map(|seen| seen.end)
        }
        None => checkpoint.end,
    };
    let (mut records, mut seconds) = (0, 0.0f64);
    for checkpoint in checkpoints {
        let end = end_of(checkpoint).unwrap_or(checkpoint.next);
        let behind = end.0.saturating_sub(checkpoint.next.0);
        records += behind;
        let age = checkpoint.last_event_at.filter(|_| behind > 0).map(|at| now - at);
        seconds = seconds.max(age.map_or(0.0, |age| age.as_seconds_f64()));
    }
    // Partitions that no worker has taken yet.
    let is_taken =
        |seen: &&PartitionView| checkpoints.iter().any(|c| c.partition == seen.partition);
    let untaken = log.into_iter().flatten().filter(|seen| !is_taken(seen));
    (records + untaken.map(|seen| seen.end.0).sum::<u64>(), seconds)
}

//! `index`: rebuilds the stream index from the log.

use std::sync::Arc;

use clap::Subcommand;
use futures_util::TryStreamExt;
use kafold::index::{Advanced, IndexBatch};
use kafold::projections::SqlIndex;
use kafold::{Database, Offset, Partition, StreamIndex};
use serde::Serialize;

use crate::admin::Context;
use crate::error::Error;
use crate::log::Log;
use crate::output::count;
use crate::progress::Progress;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum IndexCommand {
    /// Empties the stream index and feeds the index again from the log.
    ///
    /// A service may run meanwhile: commands on streams outside its memory are answered "not ready"
    /// until their partition is fed again. After an interruption run the command again; a running
    /// service then feeds the rest itself. In a log in a file the events are the log, and the heads
    /// of the streams are rebuilt. Needs the rights of the tables' owner.
    Rebuild {
        /// Only this partition.
        #[arg(long, value_name = "P")]
        partition: Option<u32>,
    },
}

/// The number of rebuilt partitions and events.
#[derive(Default, Serialize)]
struct Report {
    partitions: u32,
    events: u64,
}

pub(crate) async fn rebuild(context: &mut Context, partition: Option<u32>) -> Result<(), Error> {
    let url = context.options.log()?;
    let database = context.options.database().await?;
    let log = Log::open(&url, &context.clock).await?;
    let partitions = log.partitions();
    if let Some(partition) = partition.filter(|partition| *partition >= partitions) {
        return Err(Error::usage(format!(
            "--partition {partition}: the log has partitions 0 to {}",
            partitions.saturating_sub(1)
        )));
    }
    let report = match (&log, &database) {
        (Log::Embedded { .. }, Database::Sqlite(file)) => {
            let events = kafold::embedded::rebuild_heads(file).await?;
            Report { partitions: 1, events }
        }
        _ => feed(&log, &database, partition.map(Partition)).await?,
    };
    if context.out.json {
        return context.out.document(&report);
    }
    let Report { partitions, events } = report;
    let (partitions, events) = (count(partitions.into(), "partition"), count(events, "event"));
    context.out.line(&format!("the stream index of {partitions} was made again from {events}"))
}

async fn feed(
    log: &Log,
    database: &Database,
    partition: Option<Partition>,
) -> Result<Report, Error> {
    let index = Arc::new(SqlIndex::new(database.clone()));
    index.clear(partition).await?;
    let all = (0..log.partitions()).map(Partition);
    let wanted: Vec<_> = all.filter(|of| partition.is_none_or(|wanted| wanted == *of)).collect();
    let mut ends = Vec::with_capacity(wanted.len());
    for partition in wanted {
        ends.push((partition, log.ends(partition).await?.1));
    }
    let progress = Progress::new(ends.iter().map(|(_, end)| end.0).sum(), "the log");
    let mut report = Report::default();
    for (partition, end) in ends {
        report.events += feed_partition(log, &*index, partition, end, &progress).await?;
        report.partitions += 1;
        index.heads(partition).await?.check(partition, index.heads_table())?;
    }
    Ok(report)
}

/// Feeds the events below `end` into the index. Returns their number. A service may feed the
/// partition at the same time.
async fn feed_partition(
    log: &Log,
    index: &dyn StreamIndex,
    partition: Partition,
    end: Offset,
    progress: &Progress,
) -> Result<u64, Error> {
    let mut events = 0;
    let mut from = Offset(0);
    let mut batches = log.replay(partition, None, end);
    while let Some(batch) = batches.try_next().await? {
        let to = batch.next.next;
        events += batch.events.len() as u64;
        progress.advance(to.0.saturating_sub(from.0));
        let batch = IndexBatch { partition, from, to: batch.next, events: batch.events };
        let advanced = index.advance(vec![batch]).await.pop();
        match advanced.unwrap_or(Ok(Advanced::Behind(None)))? {
            Advanced::Moved => from = to,
            Advanced::Behind(_) => {
                return Err(Error::failed(format!(
                    "the index of partition {partition} was emptied again meanwhile; run it once more"
                )));
            }
        }
    }
    Ok(events)
}

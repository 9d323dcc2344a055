//! `types list` and `stream list`: the contents of a log, from its events.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use clap::Subcommand;
use futures_util::TryStreamExt;
use kafold::{Offset, Partition, RecordedEvent, StreamId, Version};
use serde::Serialize;

use super::events::{Place, ends_of, places, starts_since};
use crate::admin::Context;
use crate::error::Error;
use crate::event::time;
use crate::log::Log;
use crate::options::time_of;
use crate::output::{count, thousands};
use crate::progress::Progress;

/// Most types in one list.
const TYPES_MAX: usize = 100_000;
/// Most streams that are counted; a stream takes some 200 bytes.
const STREAMS_MAX: usize = 5_000_000;
/// Streams that are printed unless more are asked for.
const LAST_DEFAULT: usize = 1_000;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TypesCommand {
    /// Lists the types of events, with their numbers and times. Reads the log.
    List(TypesArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TypesArgs {
    /// Only types of this category.
    #[arg(long, value_name = "CATEGORY")]
    category: Option<String>,
    /// Only events recorded since then: 10m (s, m, h, d: so long ago), or 2024-10-04T12:30:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StreamsArgs {
    /// Only streams of this category.
    #[arg(long, value_name = "CATEGORY")]
    category: Option<String>,
    /// Only streams with an event since then: 10m (s, m, h, d: so long ago), or 2024-10-04T12:30:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Prints the streams with the newest events, at most this number.
    #[arg(long, value_name = "N", default_value_t = LAST_DEFAULT)]
    last: usize,
}

/// The events of one type.
#[derive(Serialize)]
struct TypeReport {
    category: String,
    #[serde(rename = "type")]
    event_type: String,
    events: u64,
    first_recorded_at: DateTime<Utc>,
    last_recorded_at: DateTime<Utc>,
}

#[derive(Serialize)]
struct TypesReport {
    types: Vec<TypeReport>,
}

/// The newest event of a stream.
#[derive(Serialize)]
struct StreamReport {
    stream: StreamId,
    version: Version,
    last_type: String,
    last_recorded_at: DateTime<Utc>,
}

#[derive(Serialize)]
struct StreamsReport {
    /// The number of streams, also of those that are not listed.
    total: u64,
    streams: Vec<StreamReport>,
}

pub(crate) async fn types(context: &mut Context, args: TypesArgs) -> Result<(), Error> {
    let mut found: BTreeMap<(String, String), TypeReport> = BTreeMap::new();
    scan(context, args.category.as_deref(), args.since.as_deref(), |event| {
        let category = event.stream.category();
        let key = (category.to_owned(), event.event_type.to_string());
        let at = event.metadata.recorded_at;
        if found.len() >= TYPES_MAX && !found.contains_key(&key) {
            return Err(too_many(TYPES_MAX, "types"));
        }
        let report = found.entry(key).or_insert_with_key(|(category, event_type)| TypeReport {
            category: category.clone(),
            event_type: event_type.clone(),
            events: 0,
            first_recorded_at: at,
            last_recorded_at: at,
        });
        report.events += 1;
        report.first_recorded_at = report.first_recorded_at.min(at);
        report.last_recorded_at = report.last_recorded_at.max(at);
        Ok(())
    })
    .await?;
    let types: Vec<_> = found.into_values().collect();
    if context.out.json {
        return context.out.document(&TypesReport { types });
    }
    let row = |found: &TypeReport| {
        [
            found.category.clone(),
            found.event_type.clone(),
            thousands(found.events),
            time(found.first_recorded_at),
            time(found.last_recorded_at),
        ]
    };
    let rows: Vec<_> = types.iter().map(row).collect();
    context.out.table(["CATEGORY", "TYPE", "EVENTS", "FIRST", "LAST"], &rows)
}

pub(crate) async fn streams(context: &mut Context, args: StreamsArgs) -> Result<(), Error> {
    let mut found: HashMap<StreamId, StreamReport> = HashMap::new();
    scan(context, args.category.as_deref(), args.since.as_deref(), |event| {
        if found.len() >= STREAMS_MAX && !found.contains_key(&event.stream) {
            return Err(too_many(STREAMS_MAX, "streams"));
        }
        // Events of one stream come in their order.
        let report = StreamReport {
            stream: event.stream.clone(),
            version: event.version,
            last_type: event.event_type.to_string(),
            last_recorded_at: event.metadata.recorded_at,
        };
        found.insert(event.stream.clone(), report);
        Ok(())
    })
    .await?;
    let total = found.len() as u64;
    let mut streams: Vec<_> = found.into_values().collect();
    streams.sort_unstable_by(|one, other| {
        let newest_first = other.last_recorded_at.cmp(&one.last_recorded_at);
        newest_first.then_with(|| one.stream.cmp(&other.stream))
    });
    streams.truncate(args.last);
    if context.out.json {
        return context.out.document(&StreamsReport { total, streams });
    }
    let row = |found: &StreamReport| {
        [
            found.stream.to_string(),
            found.version.to_string(),
            found.last_type.clone(),
            time(found.last_recorded_at),
        ]
    };
    let rows: Vec<_> = streams.iter().map(row).collect();
    context.out.table(["STREAM", "VERSION", "LAST TYPE", "LAST EVENT"], &rows)?;
    let all = count(total, "stream");
    match (streams.len() as u64) < total {
        true => context.out.line(&format!("{all}; --last {total} lists all")),
        false => context.out.line(&all),
    }
}

fn too_many(most: usize, what: &str) -> Error {
    let most = thousands(most as u64);
    Error::failed(format!("there are more than {most} {what}: give --category or --since"))
}

/// Reads all events of a category that were recorded since a time, partition by partition.
async fn scan(
    context: &Context,
    category: Option<&str>,
    since: Option<&str>,
    mut each: impl FnMut(&RecordedEvent) -> Result<(), Error>,
) -> Result<(), Error> {
    let since = since.map(|text| time_of("--since", text, context.clock.now())).transpose()?;
    let log = Log::open(&context.options.log()?, &context.clock).await?;
    let ends = ends_of(&log, (0..log.partitions()).map(Partition)).await?;
    let starts = match since {
        Some(since) => starts_since(&log, &ends, since).await?,
        None => ends.keys().map(|partition| (*partition, Offset(0))).collect(),
    };
    let places = places(&log, &starts).await?;
    let begin = |(_, from): &Place| from.as_ref().map_or(0, |from| from.next.0);
    let total = places.iter().map(|place| ends[&place.0].0.saturating_sub(begin(place))).sum();
    let progress = Progress::new(total, "the log");
    for place in places {
        let mut next = begin(&place);
        let (partition, from) = place;
        let mut batches = log.replay(partition, from, ends[&partition]);
        while let Some(batch) = batches.try_next().await? {
            for event in &batch.events {
                let is_wanted = category.is_none_or(|wanted| event.stream.category() == wanted)
                    && since.is_none_or(|since| event.metadata.recorded_at >= since);
                if is_wanted {
                    each(event)?;
                }
            }
            progress.advance(batch.next.next.0.saturating_sub(next));
            next = batch.next.next.0;
        }
    }
    Ok(())
}

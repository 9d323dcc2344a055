//! `events tail`: events of all streams, as they are and as they come.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use clap::Subcommand;
use futures_util::TryStreamExt;
use kafold::store::{Batch, Cursor, SourceMessage};
use kafold::{Offset, Partition, Position, ReadError, RecordedEvent, StreamId};

use crate::admin::Context;
use crate::error::Error;
use crate::event::{EventJson, NAMES, line, value};
use crate::log::{Log, ask_all};
use crate::options::time_of;
use crate::output::{Output, count};
use crate::predicate::Predicate;
use crate::progress::Progress;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum EventsCommand {
    /// Prints events, one a line: position, time, stream, version, type, payload.
    ///
    /// Without a start (--from, --from-beginning, --since) and without --until it waits for new ones,
    /// until Ctrl-C. With a start it ends where the log ends now, unless --follow says otherwise. The
    /// order is that of each partition. It joins no consumer group and commits nothing.
    Tail(TailArgs),
}

#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TailArgs {
    /// Only events of streams of this category.
    #[arg(long, value_name = "CATEGORY")]
    category: Option<String>,
    /// Only events of this type: order.placed, or order.placed.v1 to the letter.
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// Only events of this stream, such as order-17.
    #[arg(long, value_name = "ID")]
    stream: Option<String>,
    /// Only events with this correlation id.
    #[arg(long, value_name = "ID")]
    correlation: Option<String>,
    /// Only events for which this holds, such as 'data.customer == "c1" && data.amount_cents > 500'.
    ///
    /// A path begins with data (the payload), type, stream, category, id, version, recorded_at,
    /// correlation_id or causation_id and goes on with .name or [0]. It is compared by ==, !=, <, <=, >, >=
    /// with a text in double quotes, a number, true, false or null; a path alone holds if the value is there
    /// and is not false. Conditions are joined by &&, ||, ! and parentheses.
    #[arg(long = "where", value_name = "PREDICATE")]
    predicate: Option<String>,
    /// Begins at this position, such as 3:1042, and reads that partition only.
    #[arg(long, value_name = "PARTITION:OFFSET", conflicts_with_all = ["from_beginning", "since"])]
    from: Option<String>,
    /// Begins at the beginning of the log.
    #[arg(long)]
    from_beginning: bool,
    /// Begins with the events recorded at this time: 10m (s, m, h, d: so long ago), or
    /// 2024-10-04T12:30:00Z.
    #[arg(long, value_name = "TIME", conflicts_with = "from_beginning")]
    since: Option<String>,
    /// Only events recorded before this time, written like that of --since.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Goes on with new events as they come.
    #[arg(long, short)]
    follow: bool,
    /// Ends after so many events.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum LogCommand {
    /// Prints all events as lines of JSON, for backups, other programs and fixtures of tests.
    ///
    /// `scenario().given_fixture(include_str!("order-17.jsonl"))` reads the lines of one stream. The order is
    /// that of each partition.
    Export(ExportArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ExportArgs {
    /// Only events of streams of this category.
    #[arg(long, value_name = "CATEGORY")]
    category: Option<String>,
    /// Only events of this stream, such as order-17.
    #[arg(long, value_name = "ID")]
    stream: Option<String>,
    /// Only events recorded since then: 10m (s, m, h, d: so long ago), or 2024-10-04T12:30:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only events recorded before this time, written like that of --since.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

pub(crate) async fn export(context: &mut Context, args: ExportArgs) -> Result<(), Error> {
    let ExportArgs { category, stream, since, until } = args;
    let from_beginning = since.is_none();
    context.out.json = true;
    let all = TailArgs { category, stream, since, until, from_beginning, ..TailArgs::default() };
    tail(context, all).await
}

/// Which events are wanted, and how many more.
struct Wanted {
    category: Option<String>,
    event_type: Option<String>,
    stream: Option<StreamId>,
    correlation: Option<String>,
    predicate: Option<Predicate>,
    from: Option<Position>,
    since: Option<DateTime<Utc>>,
    until: Option<DateTime<Utc>>,
    /// Where printing begins in the partitions that are read.
    starts: BTreeMap<Partition, Offset>,
    left: Option<u64>,
}

impl Wanted {
    fn of(args: &TailArgs, now: DateTime<Utc>) -> Result<Self, Error> {
        let time = |option: &str, text: &Option<String>| {
            text.as_deref().map(|text| time_of(option, text, now)).transpose()
        };
        let predicate = args.predicate.as_deref().map(|text| {
            Predicate::parse(text, &NAMES)
                .map_err(|mistake| Error::usage(format!("--where {text:?}, {mistake}")))
        });
        let stream = args.stream.as_deref().map(|text| {
            text.parse().map_err(|error| {
                Error::usage(format!("--stream {text:?}: {error}; write it as order-17"))
            })
        });
        let from = args
            .from
            .as_deref()
            .map(|text| text.parse().map_err(|error| Error::usage(format!("--from {error}"))));
        let (since, until) = (time("--since", &args.since)?, time("--until", &args.until)?);
        if since.zip(until).is_some_and(|(since, until)| since >= until) {
            return Err(Error::usage(
                "--until must be after --since: 10m is ten minutes before now, so --since is the longer one",
            ));
        }
        Ok(Self {
            category: args.category.clone(),
            event_type: args.event_type.clone(),
            stream: stream.transpose()?,
            correlation: args.correlation.clone(),
            predicate: predicate.transpose()?,
            from: from.transpose()?,
            since,
            until,
            starts: BTreeMap::new(),
            left: args.limit,
        })
    }

    fn includes(&self, event: &RecordedEvent) -> bool {
        let is_type = |wanted: &String| {
            let name = event.event_type.rsplit_once(".v").map(|(name, _)| name);
            *event.event_type == **wanted || name == Some(wanted)
        };
        self.category.as_ref().is_none_or(|wanted| event.stream.category() == wanted)
            && self.event_type.as_ref().is_none_or(is_type)
            && self.stream.as_ref().is_none_or(|wanted| event.stream == *wanted)
            && self.starts.get(&event.position.partition) <= Some(&event.position.offset)
            && self.since.is_none_or(|since| event.metadata.recorded_at >= since)
            && self.until.is_none_or(|until| event.metadata.recorded_at < until)
            && self
                .correlation
                .as_ref()
                .is_none_or(|wanted| event.metadata.correlation_id.as_ref() == Some(wanted))
            && self.predicate.as_ref().is_none_or(|predicate| predicate.holds(&value(event)))
    }

    fn is_enough(&self) -> bool {
        self.left == Some(0)
    }

    /// Prints those of the events that are wanted.
    fn print(&mut self, out: &mut Output, events: &[RecordedEvent]) -> Result<(), Error> {
        for event in events {
            if self.is_enough() {
                break;
            }
            if !self.includes(event) {
                continue;
            }
            self.left = self.left.map(|left| left - 1);
            match out.json {
                true => out.json_line(&EventJson::of(event))?,
                false => out.line(&line(event))?,
            }
        }
        out.flush()
    }
}

pub(crate) async fn tail(context: &mut Context, args: TailArgs) -> Result<(), Error> {
    let mut wanted = Wanted::of(&args, context.clock.now())?;
    let url = context.options.log()?;
    let log = Log::open(&url, &context.clock).await?;
    let ends = ends(&log, &wanted).await?;
    let has_start = args.from_beginning
        || wanted.from.is_some()
        || wanted.since.is_some()
        || wanted.until.is_some();
    wanted.starts = match (wanted.from, wanted.since) {
        (Some(Position { partition, offset }), _) => [(partition, offset)].into(),
        (_, Some(since)) => starts_since(&log, &ends, since).await?,
        _ if has_start => ends.keys().map(|p| (*p, Offset(0))).collect(),
        _ => ends.clone(),
    };
    if wanted.is_enough() {
        return Ok(());
    }
    let places = places(&log, &wanted.starts).await?;
    match has_start && !args.follow {
        true => to_the_end(context, &log, places, &ends, &mut wanted).await,
        false => follow(context, &log, places, &mut wanted).await,
    }
}

/// Returns where the events recorded since then begin.
pub(super) async fn starts_since(
    log: &Log,
    ends: &BTreeMap<Partition, Offset>,
    since: DateTime<Utc>,
) -> Result<BTreeMap<Partition, Offset>, Error> {
    let start = |partition| async move {
        Ok::<_, ReadError>((partition, log.since(partition, since).await?))
    };
    Ok(ask_all(ends.keys().copied(), start).await?.into_iter().collect())
}

/// The ends of the partitions in which there may be events that are wanted.
async fn ends(log: &Log, wanted: &Wanted) -> Result<BTreeMap<Partition, Offset>, Error> {
    let mut read: Vec<_> = (0..log.partitions()).map(Partition).collect();
    if let Some(stream) = &wanted.stream {
        read = vec![log.partition_of(stream)];
    }
    if let Some(from) = wanted.from {
        check_partition(from, &read, log.partitions())?;
        read = vec![from.partition];
    }
    let ends = ends_of(log, read).await?;
    match wanted.from {
        Some(from) if from.offset > ends[&from.partition] => {
            let (partition, end) = (from.partition, ends[&from.partition]);
            Err(Error::failed(format!(
                "--from {from} is behind the end of the log: partition {partition} ends at {end}"
            )))
        }
        _ => Ok(ends),
    }
}

/// Returns the ends of these partitions.
pub(super) async fn ends_of(
    log: &Log,
    partitions: impl IntoIterator<Item = Partition>,
) -> Result<BTreeMap<Partition, Offset>, Error> {
    let end = |partition| async move {
        let (_, end) = log.ends(partition).await?;
        Ok::<_, ReadError>((partition, end))
    };
    Ok(ask_all(partitions, end).await?.into_iter().collect())
}

fn check_partition(from: Position, possible: &[Partition], all: u32) -> Result<(), Error> {
    if from.partition.0 >= all {
        return Err(Error::failed(format!(
            "--from {from}: the log has {}, counted from 0",
            count(all.into(), "partition")
        )));
    }
    match possible {
        [only] if *only != from.partition => {
            Err(Error::failed(format!("--from {from}: the stream is in partition {only}")))
        }
        _ => Ok(()),
    }
}

pub(super) type Place = (Partition, Option<Cursor>);

/// Where reading begins so that nothing from the starts on is missed.
pub(super) async fn places(
    log: &Log,
    starts: &BTreeMap<Partition, Offset>,
) -> Result<Vec<Place>, Error> {
    let place = |partition| async move {
        let cursor = match starts[&partition] {
            Offset(0) => None,
            start => log.cursor_before(partition, start).await?,
        };
        Ok::<_, ReadError>((partition, cursor))
    };
    Ok(ask_all(starts.keys().copied(), place).await?)
}

/// Prints what there is, partition by partition.
async fn to_the_end(
    context: &mut Context,
    log: &Log,
    places: Vec<Place>,
    ends: &BTreeMap<Partition, Offset>,
    wanted: &mut Wanted,
) -> Result<(), Error> {
    for (partition, from) in places {
        let mut batches = log.replay(partition, from, ends[&partition]);
        while let Some(batch) = batches.try_next().await? {
            wanted.print(&mut context.out, &batch.events)?;
            if wanted.is_enough() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Prints what comes, until it is enough. While the log does not answer it waits for it.
async fn follow(
    context: &mut Context,
    log: &Log,
    places: Vec<Place>,
    wanted: &mut Wanted,
) -> Result<(), Error> {
    // Where nothing near the start proves what counts, the partition is read from its beginning.
    let mut behind: BTreeMap<Partition, u64> = places
        .iter()
        .map(|(partition, from)| {
            let next = from.as_ref().map_or(Offset(0), |from| from.next);
            (*partition, wanted.starts[partition].0.saturating_sub(next.0))
        })
        .collect();
    let total: u64 = behind.values().sum();
    let mut progress = (total > 0).then(|| Progress::new(total, "to the start"));
    let mut subscription = log.follow(places).await?;
    while !wanted.is_enough() {
        let batch = match subscription.next().await {
            Ok(SourceMessage::Batch(batch)) => batch,
            Ok(SourceMessage::Assigned(_) | SourceMessage::Revoked(_)) => continue,
            Err(ReadError::Unavailable { retry_after, .. }) => {
                context.clock.sleep(retry_after).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let Batch { partition, events, next, from, .. } = batch;
        let left = behind.entry(partition).or_default();
        let read = (next.next.0.saturating_sub(from.0)).min(*left);
        *left -= read;
        if let Some(progress) = &progress {
            progress.advance(read);
        }
        if behind.values().all(|left| *left == 0) {
            progress = None;
        }
        wanted.print(&mut context.out, &events)?;
    }
    Ok(())
}

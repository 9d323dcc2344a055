//! `parked`: streams that are set aside because an event of theirs failed.

use clap::Subcommand;
use kafold::StreamId;
use serde_json::json;

use crate::admin::Context;
use crate::commands::projections::{Who, control};
use crate::error::Error;
use crate::event::time;
use crate::output::{count, or_dash};

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ParkedCommand {
    /// Shows the streams that are set aside, and why.
    List(ListArgs),
    /// Shows the events of one stream that are set aside.
    Show(ShowArgs),
    /// Has streams tried again from the event at fault on, all their events in order.
    Retry(RetryArgs),
    /// Leaves out for good the commit at fault of a stream, and has the rest of the stream tried again.
    Skip(SkipArgs),
    /// Leaves out for good all that was parked so long ago, and has the rest of those streams tried again.
    Prune(PruneArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ListArgs {
    /// Only of this projection.
    #[arg(long, value_name = "NAME")]
    projection: Option<String>,
    /// At most so many.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ShowArgs {
    /// The stream, such as order-17.
    stream: String,
    /// Only of this projection.
    #[arg(long, value_name = "NAME")]
    projection: Option<String>,
    /// At most so many events of each projection.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RetryArgs {
    /// The stream, such as order-17.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    stream: Option<String>,
    /// Every stream that is set aside.
    #[arg(long)]
    all: bool,
    /// Only of this projection.
    #[arg(long, value_name = "NAME")]
    projection: Option<String>,
    #[command(flatten)]
    who: Who,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SkipArgs {
    /// The stream, such as order-17.
    stream: String,
    /// Only of this projection.
    #[arg(long, value_name = "NAME")]
    projection: Option<String>,
    #[command(flatten)]
    who: Who,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PruneArgs {
    /// How many days an event stays parked.
    #[arg(long, value_name = "DAYS")]
    older_than: u32,
    #[command(flatten)]
    who: Who,
}

pub(crate) async fn run(context: &mut Context, command: ParkedCommand) -> Result<(), Error> {
    match command {
        ParkedCommand::List(args) => list(context, args).await,
        ParkedCommand::Show(args) => show(context, args).await,
        ParkedCommand::Retry(args) => retry(context, args).await,
        ParkedCommand::Skip(args) => skip(context, args).await,
        ParkedCommand::Prune(args) => prune(context, args).await,
    }
}

fn stream(text: &str) -> Result<StreamId, Error> {
    text.parse().map_err(|error| Error::usage(format!("{text:?}: {error}; write it as order-17")))
}

async fn list(context: &mut Context, args: ListArgs) -> Result<(), Error> {
    let control = control(context).await?;
    let parked = control.parked(args.projection.as_deref(), args.limit).await?;
    if context.out.json {
        return context.out.document(&parked);
    }
    if parked.is_empty() {
        return context.out.line("nothing is parked");
    }
    let row = |stream: &kafold::projections::ParkedStream| {
        let asked = if stream.retry { ", to be retried" } else { "" };
        [
            format!("{} (generation {})", stream.projection, stream.generation),
            stream.stream.clone(),
            count(stream.events.unsigned_abs(), "event"),
            format!("{} at {}", stream.version, stream.position),
            time(stream.parked_at),
            format!("{} times{asked}", stream.attempts),
            or_dash(stream.error.clone()),
        ]
    };
    let rows: Vec<_> = parked.iter().map(row).collect();
    let header = ["PROJECTION", "STREAM", "PARKED", "FROM VERSION", "SINCE", "TRIED", "ERROR"];
    context.out.table(header, &rows)
}

async fn show(context: &mut Context, args: ShowArgs) -> Result<(), Error> {
    let stream = stream(&args.stream)?;
    let control = control(context).await?;
    let events = control.parked_events(args.projection.as_deref(), &stream, args.limit).await?;
    if events.is_empty() {
        return Err(Error::failed(format!(
            "nothing is parked of stream {stream}; `parked list` tells what is"
        )));
    }
    if context.out.json {
        return context.out.document(&events);
    }
    for event in &events {
        let (projection, generation) = (&event.projection, event.generation);
        context.out.line(&format!(
            "{projection} (generation {generation})  version {} at {}  {}  {}",
            event.version,
            event.position,
            event.event_type,
            time(event.recorded_at)
        ))?;
        let error = match &event.error {
            Some(error) => {
                format!("  failed {} times: {}", event.attempts, error.replace('\n', "\n  "))
            }
            None => "  waits behind an earlier event of its stream".to_owned(),
        };
        context.out.line(&error)?;
        context.out.line(&format!("  {}", event.payload.0))?;
    }
    Ok(())
}

async fn retry(context: &mut Context, args: RetryArgs) -> Result<(), Error> {
    let stream = args.stream.as_deref().map(stream).transpose()?;
    let control = control(context).await?;
    let streams = control.retry(args.projection.as_deref(), stream.as_ref(), args.who.by()).await?;
    match context.out.json {
        true => context.out.document(&json!({ "streams": streams })),
        false if streams == 0 => context.out.line("nothing is parked"),
        false => {
            let streams = count(streams, "parked stream");
            context.out.line(&format!("{streams} to be retried; `parked list` tells what is left"))
        }
    }
}

async fn skip(context: &mut Context, args: SkipArgs) -> Result<(), Error> {
    let stream = stream(&args.stream)?;
    let (by, projection) = (args.who.by_reason("to skip an event")?, args.projection.as_deref());
    let skipped = control(context).await?.skip_parked(projection, &stream, by).await?;
    match context.out.json {
        true => context.out.document(&json!({ "projections": skipped })),
        false => {
            let skipped = count(skipped, "projection");
            context.out.line(&format!(
                "{stream}: its first parked commit is skipped in {skipped}, the rest is retried"
            ))
        }
    }
}

async fn prune(context: &mut Context, args: PruneArgs) -> Result<(), Error> {
    let by = args.who.by_reason("to skip an event")?;
    let before = context.clock.now() - chrono::TimeDelta::days(args.older_than.into());
    let skipped = control(context).await?.skip_parked_before(before, by).await?;
    match context.out.json {
        true => context.out.document(&json!({ "events": skipped })),
        false => context.out.line(&format!("{} to be left out", count(skipped, "event"))),
    }
}

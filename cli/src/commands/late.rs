//! `late`: the late events of windowed models.

use clap::Subcommand;
use kafold::projections::{Control, LateEvent, LateGroup};

use crate::admin::Context;
use crate::commands::projections::control;
use crate::error::Error;
use crate::options::time_of;
use crate::output::{count, or_dash};

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum LateCommand {
    /// Shows each late event: its stream, its time and the clock of its partition.
    List(ListArgs),
    /// Shows how many events were late, and the grace that would have taken in 50, 90, 99 and 100 % of them.
    ///
    /// To take them in, raise the grace of the model and start the service: the rows are rebuilt beside the live ones.
    Summary(SummaryArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ListArgs {
    /// The name of the windowed model.
    name: String,
    /// Only of this stream, such as search-ada.
    #[arg(long, value_name = "STREAM")]
    stream: Option<String>,
    /// Only events with a time from then on: 10m (s, m, h, d: so long ago), or 2024-10-04T12:30:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Most events.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SummaryArgs {
    /// The name of the windowed model.
    name: String,
}

pub(crate) async fn run(context: &mut Context, command: LateCommand) -> Result<(), Error> {
    let control = control(context).await?;
    match command {
        LateCommand::List(args) => list(context, &control, args).await,
        LateCommand::Summary(args) => summary(context, &control, &args.name).await,
    }
}

/// Rejects a name that no windowed model has.
async fn check(control: &Control, name: &str) -> Result<(), Error> {
    let models = control.clocks().await?;
    if models.iter().any(|model| model.name == name) {
        return Ok(());
    }
    let names: Vec<_> = models.iter().map(|model| model.name.as_str()).collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(Error::failed(format!("there is no windowed model {name}; there are: {known}")))
}

async fn list(context: &mut Context, control: &Control, args: ListArgs) -> Result<(), Error> {
    let since = args.since.as_deref().map(|text| time_of("--since", text, context.clock.now()));
    let since = since.transpose()?;
    let stream = args.stream.as_deref().map(|text| {
        text.parse().map_err(|error| {
            Error::usage(format!("--stream {text:?}: {error}; write it as order-17"))
        })
    });
    let stream = stream.transpose()?;
    check(control, &args.name).await?;
    let events = control.late_events(&args.name, stream.as_ref(), since, args.limit).await?;
    if context.out.json {
        return context.out.document(&events);
    }
    if events.is_empty() {
        return context.out.line("no event was late");
    }
    let row = |event: &LateEvent| {
        let grace = event.grace_s.map(|micros| format!("{:.6} s", micros as f64 / 1e6));
        [
            event.position.clone(),
            event.stream.clone(),
            event.version.to_string(),
            event.kind.clone(),
            event.at.clone(),
            or_dash(event.clock.clone()),
            event.windows.to_string(),
            or_dash(grace),
        ]
    };
    let rows: Vec<_> = events.iter().map(row).collect();
    let header = ["POSITION", "STREAM", "VERSION", "KIND", "TIME", "CLOCK", "WINDOWS", "GRACE"];
    context.out.table(header, &rows)
}

async fn summary(context: &mut Context, control: &Control, name: &str) -> Result<(), Error> {
    check(control, name).await?;
    let summary = control.late_summary(name).await?;
    if context.out.json {
        return context.out.document(&summary);
    }
    let events = |number: i64| count(number.unsigned_abs(), "event");
    let windows = count(summary.late_windows.unsigned_abs(), "window");
    context.out.line(&format!(
        "{name}: {} late for all windows, {windows} missed, {} from the future",
        events(summary.late),
        events(summary.future)
    ))?;
    let grace = summary.grace_s;
    if let (Some(p50), Some(p90), Some(p99), Some(p100)) =
        (grace.p50, grace.p90, grace.p99, grace.p100)
    {
        context.out.line(&format!(
            "a grace of {p50} s takes in 50 % of the late events, {p90} s 90 %, {p99} s 99 %, {p100} s all"
        ))?;
    }
    if summary.unlisted > 0 {
        context.out.line(&format!(
            "{} are not listed: a partition keeps 100,000",
            events(summary.unlisted)
        ))?;
    }
    for (header, groups) in [("HOUR", &summary.by_hour), ("STREAM", &summary.by_stream)] {
        if groups.is_empty() {
            continue;
        }
        let row = |group: &LateGroup| {
            [group.name.clone(), group.late.to_string(), group.future.to_string()]
        };
        let rows: Vec<_> = groups.iter().map(row).collect();
        context.out.line("")?;
        context.out.table([header, "LATE", "FUTURE"], &rows)?;
    }
    Ok(())
}

//! `clock`: the event time of windowed models.

use std::time::Duration;

use clap::Subcommand;
use kafold::projections::{Control, ModelClock};
use serde_json::json;

use crate::admin::Context;
use crate::commands::projections::{Who, control};
use crate::error::Error;
use crate::event::time;
use crate::options::time_of;
use crate::output::or_dash;

/// Longest wait for a process of the service to append the clock events.
const ADVANCED_WITHIN: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ClockCommand {
    /// Shows the clock of each windowed model, what is final, and the numbers of its events.
    List,
    /// Moves the clock of a timeline forward in all partitions: no event before that time is to come.
    ///
    /// For the end of an import. A running process of the service that takes commands appends the clock events; the command
    /// waits for them. Events that come later with an earlier time may be late.
    Advance(AdvanceArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct AdvanceArgs {
    /// The timeline: the name of a windowed model, unless the model names another.
    timeline: String,
    /// The time: 2024-10-04T12:30:00Z, or 10m (s, m, h, d: so long ago).
    #[arg(long, value_name = "TIME")]
    to: String,
    #[command(flatten)]
    who: Who,
}

pub(crate) async fn run(context: &mut Context, command: ClockCommand) -> Result<(), Error> {
    let control = control(context).await?;
    match command {
        ClockCommand::List => list(context, &control).await,
        ClockCommand::Advance(args) => advance(context, &control, args).await,
    }
}

async fn list(context: &mut Context, control: &Control) -> Result<(), Error> {
    let models = control.clocks().await?;
    if context.out.json {
        return context.out.document(&models);
    }
    if models.is_empty() {
        return context.out.line("there is no windowed model");
    }
    let row = |model: &ModelClock| {
        let held = match model.without_clock {
            0 => or_dash(model.clock.map(time)),
            partitions => format!("none in {partitions} partitions"),
        };
        [
            model.name.clone(),
            model.timeline.clone(),
            model.windows.clone(),
            held,
            or_dash(model.closed_through.map(time)),
            model.counts.in_windows.to_string(),
            model.counts.late.to_string(),
            model.counts.future.to_string(),
        ]
    };
    let rows: Vec<_> = models.iter().map(row).collect();
    let header =
        ["MODEL", "TIMELINE", "WINDOWS", "CLOCK", "FINAL BEFORE", "IN WINDOWS", "LATE", "FUTURE"];
    context.out.table(header, &rows)
}

async fn advance(context: &mut Context, control: &Control, args: AdvanceArgs) -> Result<(), Error> {
    let AdvanceArgs { timeline, to, who } = args;
    let to = time_of("--to", &to, context.clock.now())?;
    let models = control.advance_clock(&timeline, to, who.by()).await?;
    let deadline = context.clock.instant() + ADVANCED_WITHIN;
    loop {
        let clocks = control.clocks().await?;
        let behind = |model: &&ModelClock| {
            models.contains(&model.name) && model.clock.is_none_or(|clock| clock < to)
        };
        let Some(model) = clocks.iter().find(behind) else { break };
        if context.clock.instant() > deadline {
            return Err(Error::failed(format!(
                "the clock of {} is not at {} after {} s: the request is kept, and is done when a process of the service \
                 runs that has the model and takes commands; see `clock list` and `status`",
                model.name,
                time(to),
                ADVANCED_WITHIN.as_secs()
            )));
        }
        context.clock.sleep(POLL_INTERVAL).await;
    }
    match context.out.json {
        true => context.out.document(&json!({ "timeline": timeline, "to": to, "models": models })),
        false => context.out.line(&format!("{timeline}: advanced to {}", time(to))),
    }
}

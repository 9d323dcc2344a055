//! `positions`: the remedy for a log which was truncated, recreated or replaced by an older copy.

use std::io::{BufRead, IsTerminal, Write};

use clap::Subcommand;
use kafold::projections::{Control, EventTable, PositionsReset};
use kafold::{Database, Mode};

use crate::admin::Context;
use crate::commands::projections::Who;
use crate::error::Error;
use crate::log::operator;
use crate::options::LogUrl;
use crate::output::count;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum PositionsCommand {
    /// Clears stream index, positions, checkpoints and snapshots, and has every read model rebuilt.
    ///
    /// For a log other than the log of the stored positions. The service rebuilds everything from
    /// the beginning of the log at its start; the log itself is not changed. Refused while a
    /// process uses the log: stop all nodes first. Takes a reason.
    Reset(ResetArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ResetArgs {
    /// Skips the question for a confirmation.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    who: Who,
}

pub(crate) async fn run(context: &mut Context, command: PositionsCommand) -> Result<(), Error> {
    match command {
        PositionsCommand::Reset(args) => reset(context, &args).await,
    }
}

async fn reset(context: &mut Context, args: &ResetArgs) -> Result<(), Error> {
    let by = args.who.by_reason("to reset positions")?;
    let log = context.options.log()?;
    let database = context.options.database().await?;
    let control = Control::new(database.clone());
    let events = match &log {
        LogUrl::Sqlite(file) => {
            let log = Database::open(file, Mode::Check).await?;
            refuse_in_use(&log).await?;
            EventTable::Log
        }
        LogUrl::Kafka(_) => {
            refuse_present(context, &log).await?;
            EventTable::Index
        }
    };
    refuse_in_use(&database).await?;
    if !args.yes {
        confirm(&log, &database, events)?;
    }
    let done = control.reset_positions(events, by).await?;
    match context.out.json {
        true => context.out.document(&done),
        false => print(context, &done),
    }
}

/// Rejects a reset while nodes or projection workers are up, as reported by the brokers.
async fn refuse_present(context: &Context, log: &LogUrl) -> Result<(), Error> {
    let presence = operator(log, &context.clock).await?.presence().await?;
    let nodes = presence.nodes.iter().map(|node| format!("node {}", node.owner));
    let members = |(group, members): &(String, usize)| {
        format!("{} of group {group}", count(*members as u64, "member"))
    };
    let up: Vec<_> = nodes.chain(presence.groups.iter().map(members)).collect();
    match up.is_empty() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "the log is in use by {}: stop every node and worker first; one that was killed counts as \
             down after some 10 s",
            up.join(", ")
        ))),
    }
}

async fn refuse_in_use(database: &Database) -> Result<(), Error> {
    match Control::new(database.clone()).is_in_use().await? {
        false => Ok(()),
        true => Err(Error::failed(format!(
            "{} is open in another process: stop the service, and whatever looks at it, first",
            database.url()
        ))),
    }
}

/// Requests a confirmation on the terminal; without a terminal `--yes` is required.
fn confirm(log: &LogUrl, database: &Database, events: EventTable) -> Result<(), Error> {
    let index = match events {
        EventTable::Index => "stream index, places, ",
        EventTable::Log => "",
    };
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("positions are not reset without a confirmation: add --yes"));
    }
    let mut stderr = std::io::stderr();
    write!(
        stderr,
        "This clears {index}checkpoints and snapshots in {} and has every read model built anew from \
         the beginning of {}.\nType yes to go on: ",
        database.url(),
        log.shown()
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(Error::failed("nothing was changed")),
    }
}

fn print(context: &mut Context, done: &PositionsReset) -> Result<(), Error> {
    let PositionsReset { index_events, checkpoints, snapshots, parked_events, .. } = done;
    let index = match index_events {
        Some(events) => format!("the stream index ({})", count(*events, "event")),
        None => "no event, since the file is the log itself".to_owned(),
    };
    let out = &mut context.out;
    out.line(&format!(
        "cleared: {index}, {}, {}, {}",
        count(*checkpoints, "checkpoint"),
        count(*snapshots, "snapshot"),
        count(*parked_events, "parked or skipped event")
    ))?;
    for rebuild in &done.rebuilds {
        let paused = if rebuild.paused { "; it is paused, resume it" } else { "" };
        out.line(&format!(
            "{}: to be built anew as generation {}{paused}",
            rebuild.name, rebuild.generation
        ))?;
    }
    for name in &done.not_rebuildable {
        out.line(&format!(
            "{name}: names no tables and cannot be built anew: run it under a new name, and drop what \
             it wrote"
        ))?;
    }
    out.line(match index_events {
        Some(_) => {
            "start the service: it feeds the index and builds the read models from the beginning of \
             the log; `projections list` tells how far they are"
        }
        None => {
            "start the service: it builds the read models from the beginning of the log; `projections \
             list` tells how far they are"
        }
    })
}

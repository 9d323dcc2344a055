//! `projections`: how they stand, and what operators ask of them.

use std::convert::Infallible;
use std::sync::LazyLock;
use std::time::Duration;

use clap::Subcommand;
use kafold::projections::{By, Control, Overview, OverviewState};
use kafold::{Offset, Partition, Position};
use serde_json::json;

use crate::admin::Context;
use crate::error::Error;
use crate::log::{Log, ask_all};
use crate::output::{Output, or_dash};
use crate::overview;
use crate::progress::Progress;

/// How long it is waited for a worker to do what was asked, before that is said.
const OBEYED_WITHIN: Duration = Duration::from_secs(3);
/// Between two looks at what workers do.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ProjectionsCommand {
    /// Shows every projection: state, generation, lag, what is parked, how far a rebuild is.
    List,
    /// Has projections apply nothing more until they are resumed, wherever they run.
    Pause(Which),
    /// Has projections go on that are paused or have stopped.
    Resume(Which),
    /// Has projections built anew beside the live rows, and switched to when they have caught up.
    ///
    /// Workers do it while they go on with the live rows; queries see either the old rows or the new
    /// ones. A rebuild that is interrupted goes on where it was.
    Rebuild(RebuildArgs),
    /// Gives up a rebuild; the live rows stay as they are.
    Abort(Which),
    /// Removes a projection that no program has any more, with its tables; takes --reason.
    ///
    /// Refused while a worker runs it.
    Remove(RemoveArgs),
    /// Leaves out the commit of the event at a position, where a projection has stopped or will come to.
    ///
    /// What is parked is skipped with `parked skip`.
    Skip(SkipArgs),
}

/// Projections by name.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Which {
    /// Names of projections.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// Every projection of the database.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    who: Who,
}

/// Who acts, and why; kept in the table kafold_audit.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Who {
    /// Why, for the record.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// The actor for the record, stored as a claim beside the user of the operating system.
    #[arg(long, value_name = "NAME", value_parser = claimed)]
    actor: Option<String>,
}

impl Who {
    pub(crate) fn by(&self) -> By<'_> {
        let actor = self.actor.as_deref().unwrap_or(&OS_USER);
        By { actor, reason: self.reason.as_deref() }
    }

    /// For what is not done without a reason.
    pub(crate) fn by_reason(&self, act: &str) -> Result<By<'_>, Error> {
        match self.reason.as_deref().map(str::trim) {
            Some(reason) if !reason.is_empty() => Ok(self.by()),
            _ => Err(Error::usage(format!("{act} takes a reason: add --reason TEXT"))),
        }
    }
}

/// The user of this process according to the operating system, not the environment.
static OS_USER: LazyLock<String> = LazyLock::new(|| {
    let name = uzers::get_current_username();
    let name = name.map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| format!("uid {}", uzers::get_current_uid()))
});

/// Returns the claim of `--actor` beside the user of the operating system.
fn claimed(name: &str) -> Result<String, Infallible> {
    Ok(format!("{} (claimed: {name})", *OS_USER))
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RebuildArgs {
    #[command(flatten)]
    which: Which,
    /// Switches even if streams of the new rows are parked; may be said later, too.
    #[arg(long)]
    with_parked: bool,
    /// Waits until all are switched, with a progress bar.
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RemoveArgs {
    /// The projection.
    name: String,
    #[command(flatten)]
    who: Who,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SkipArgs {
    /// The projection.
    name: String,
    /// The position of any event of the commit, such as 3:1042.
    #[arg(value_name = "PARTITION:OFFSET")]
    position: String,
    #[command(flatten)]
    who: Who,
}

pub(crate) async fn run(context: &mut Context, command: ProjectionsCommand) -> Result<(), Error> {
    match command {
        ProjectionsCommand::List => list(context).await,
        ProjectionsCommand::Pause(which) => {
            let control = control(context).await?;
            for name in names(&control, &which).await? {
                control.pause(&name, which.who.by()).await?;
                settle(context, &control, &name, "paused").await?;
            }
            Ok(())
        }
        ProjectionsCommand::Resume(which) => {
            let control = control(context).await?;
            for name in names(&control, &which).await? {
                control.resume(&name, which.who.by()).await?;
                settle(context, &control, &name, "running").await?;
            }
            Ok(())
        }
        ProjectionsCommand::Rebuild(args) => rebuild(context, args).await,
        ProjectionsCommand::Remove(RemoveArgs { name, who }) => {
            let by = who.by_reason("removing a projection")?;
            control(context).await?.remove(&name, by).await?;
            tell(context, &name, "removed", &format!("{name}: removed with its tables"))
        }
        ProjectionsCommand::Abort(which) => {
            let control = control(context).await?;
            for name in names(&control, &which).await? {
                let generation = control.abort(&name, which.who.by()).await?;
                let text = format!("{name}: the rebuild as generation {generation} is given up");
                tell(context, &name, "aborted", &text)?;
            }
            Ok(())
        }
        ProjectionsCommand::Skip(args) => {
            let position: Position = args
                .position
                .parse()
                .map_err(|error| Error::usage(format!("{error}; write it as 3:1042")))?;
            let by = args.who.by_reason("to skip an event")?;
            control(context).await?.skip(&args.name, position, by).await?;
            let text = format!("{}: the commit at {position} is skipped", args.name);
            tell(context, &args.name, "skipped", &text)
        }
    }
}

pub(crate) async fn control(context: &Context) -> Result<Control, Error> {
    Ok(Control::new(context.options.database().await?))
}

async fn names(control: &Control, which: &Which) -> Result<Vec<String>, Error> {
    match which.all {
        true => Ok(control.list(&[]).await?.into_iter().map(|seen| seen.name).collect()),
        false => Ok(which.names.clone()),
    }
}

/// Says what was done, in words or in JSON, a line each.
pub(crate) fn tell(context: &mut Context, name: &str, done: &str, text: &str) -> Result<(), Error> {
    match context.out.json {
        true => context.out.json_line(&json!({ "name": name, "done": done })),
        false => context.out.line(text),
    }
}

/// Waits a little for a worker to obey, and says what became of it.
async fn settle(
    context: &mut Context,
    control: &Control,
    name: &str,
    done: &str,
) -> Result<(), Error> {
    let deadline = context.clock.instant() + OBEYED_WITHIN;
    while context.clock.instant() < deadline {
        let all = control.list(&[]).await?;
        if all.iter().find(|seen| seen.name == name).is_none_or(|seen| seen.obeyed) {
            return tell(context, name, done, &format!("{name}: {done}"));
        }
        context.clock.sleep(POLL_INTERVAL).await;
    }
    let text = format!(
        "{name}: {done} as soon as a worker looks; none has within {} s, so none may be running",
        OBEYED_WITHIN.as_secs()
    );
    tell(context, name, done, &text)
}

async fn list(context: &mut Context) -> Result<(), Error> {
    let ends = ends(context).await?;
    let all = control(context).await?.list(&ends).await?;
    match context.out.json {
        true => context.out.document(&all),
        false => print(&mut context.out, &all),
    }
}

/// The ends of the log's partitions, if a log on Kafka is named; a file is read by its workers in no
/// time.
async fn ends(context: &Context) -> Result<Vec<(Partition, Offset)>, Error> {
    let Some(url) = context.options.maybe_log()? else { return Ok(Vec::new()) };
    let log = Log::open(&url, &context.clock).await?;
    let end = |partition| {
        let log = log.clone();
        async move { Ok::<_, Error>((partition, log.ends(partition).await?.1)) }
    };
    ask_all((0..log.partitions()).map(Partition), end).await
}

pub(crate) fn print(out: &mut Output, all: &[Overview]) -> Result<(), Error> {
    if all.is_empty() {
        return out.line("no projection has been started with this database");
    }
    let rows: Vec<_> = all.iter().map(row).collect();
    out.table(["PROJECTION", "STATE", "GENERATION", "LAG", "PARKED", "REASON"], &rows)
}

fn row(seen: &Overview) -> [String; 6] {
    let state = match (seen.state, seen.paused) {
        (OverviewState::Rebuilding, true) => "rebuilding, paused",
        (OverviewState::Rebuilding, false) => "rebuilding",
        (OverviewState::Running, _) => "running",
        (OverviewState::Paused, _) => "paused",
        (OverviewState::Stopped, _) => "stopped",
    };
    let generation = match &seen.rebuild {
        Some(rebuild) => {
            let left = rebuild.seconds_left.map(|seconds| format!(", {seconds:.0} s left"));
            let (next, percent) = (rebuild.generation, rebuild.percent());
            format!(
                "{}, building {next}: {percent:.0} %{}",
                seen.generation,
                left.unwrap_or_default()
            )
        }
        None => seen.generation.to_string(),
    };
    let parked = overview::parked(seen);
    let reason = overview::reason(seen).map(str::to_owned);
    let lag = overview::lag(seen);
    [seen.name.clone(), state.to_owned(), generation, lag, or_dash(parked), or_dash(reason)]
}

async fn rebuild(context: &mut Context, args: RebuildArgs) -> Result<(), Error> {
    let control = control(context).await?;
    let names = names(&control, &args.which).await?;
    for name in &names {
        let generation = control.rebuild(name, args.with_parked, args.which.who.by()).await?;
        let text = format!("{name}: to be rebuilt as generation {generation}");
        tell(context, name, "requested", &text)?;
    }
    context.out.flush()?;
    match args.wait {
        true => wait(context, &control, &names).await,
        false => Ok(()),
    }
}

/// Waits until no rebuild of these is under way.
async fn wait(context: &mut Context, control: &Control, names: &[String]) -> Result<(), Error> {
    let progress = Progress::new(0, "for the rebuild");
    let mut left: Vec<String> = names.to_vec();
    while !left.is_empty() {
        context.clock.sleep(POLL_INTERVAL).await;
        let all = control.list(&[]).await?;
        let (mut done, mut total) = (0, 0);
        for seen in all.iter().filter(|seen| left.contains(&seen.name)) {
            let Some(rebuild) = &seen.rebuild else { continue };
            if let Some(reason) = &rebuild.reason {
                return Err(Error::failed(format!(
                    "{}: the rebuild does not go on: {reason}",
                    seen.name
                )));
            }
            done += rebuild.records_done;
            total += rebuild.records_done + rebuild.records_left;
        }
        progress.at(done, total);
        for seen in all.iter().filter(|seen| seen.rebuild.is_none()) {
            if let Some(nth) = left.iter().position(|name| *name == seen.name) {
                let name = left.remove(nth);
                let text = format!("{name}: switched to generation {}", seen.generation);
                tell(context, &name, "switched", &text)?;
                context.out.flush()?;
            }
        }
    }
    Ok(())
}

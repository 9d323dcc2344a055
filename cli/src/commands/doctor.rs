//! `doctor`: everything that a service needs, each with what to do about it.

mod database;
mod index;
mod kafka;
mod lag;
mod rights;

use std::fmt;

use ::kafold::rights::Role;
use serde::Serialize;

use crate::admin::Context;
use crate::commands::grants::role_parser;
use crate::error::Error;
use crate::log::Log;
use crate::options::LogUrl;
use crate::output::{Output, count};
use crate::overview::{self, PartitionView};

/// Clocks that differ by more make times in events and deadlines of forwarded commands misleading.
const CLOCK_DIFFERENCE_MAX_MS: i64 = 1_000;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Probes each right of this role instead, as the user of the URLs; changes nothing.
    #[arg(long = "as", value_parser = role_parser())]
    role: Option<Role>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warning,
    Problem,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
struct Check {
    name: &'static str,
    level: Level,
    /// What was found, in a sentence.
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// What was found out so far.
#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn ok(&mut self, name: &'static str, found: impl Into<String>) {
        self.0.push(Check { name, level: Level::Ok, found: found.into(), remedy: None });
    }

    fn warning(&mut self, name: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.push(Level::Warning, name, found.into(), remedy.into());
    }

    fn problem(&mut self, name: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.push(Level::Problem, name, found.into(), remedy.into());
    }

    /// Adds a check. Omits a remedy already contained in the finding.
    fn push(&mut self, level: Level, name: &'static str, found: String, remedy: String) {
        let remedy = Some(remedy).filter(|remedy| !found.contains(remedy.as_str()));
        self.0.push(Check { name, level, found, remedy });
    }

    /// An error, which tells its own remedy.
    fn failed(&mut self, name: &'static str, error: &Error) {
        let (Error::Usage(found) | Error::Failed(found)) = error else { return };
        self.0.push(Check { name, level: Level::Problem, found: found.clone(), remedy: None });
    }

    /// How far a clock is ahead of this machine's.
    fn clock(&mut self, name: &'static str, whose: &str, ahead_ms: i64) {
        let found = format!("{whose} is {} ms {}", ahead_ms.abs(), ahead_or_behind(ahead_ms));
        match ahead_ms.abs() > CLOCK_DIFFERENCE_MAX_MS {
            true => self.warning(name, found, "let one time server set both clocks"),
            false => self.ok(name, found),
        }
    }

    fn count(&self, level: Level) -> u64 {
        self.0.iter().filter(|check| check.level == level).count() as u64
    }

    /// Returns each remedy once, with all its checks, in the order of the first check.
    fn remedies(&self) -> Vec<(&str, Vec<&Check>)> {
        let mut remedies: Vec<(&str, Vec<&Check>)> = Vec::new();
        for check in &self.0 {
            let Some(remedy) = check.remedy.as_deref() else { continue };
            match remedies.iter_mut().find(|(known, _)| *known == remedy) {
                Some((_, checks)) => checks.push(check),
                None => remedies.push((remedy, vec![check])),
            }
        }
        remedies
    }

    fn print(&self, out: &mut Output) -> Result<(), Error> {
        let row =
            |check: &Check| [check.level.to_string(), check.name.to_owned(), check.found.clone()];
        out.table(["", "CHECK", "FOUND"], &self.0.iter().map(row).collect::<Vec<_>>())?;
        for (remedy, checks) in self.remedies() {
            out.line("")?;
            for check in checks {
                out.line(&format!("{}: {}", check.name, check.found))?;
            }
            out.line(&format!("  {remedy}"))?;
        }
        Ok(())
    }
}

fn ahead_or_behind(ahead_ms: i64) -> &'static str {
    if ahead_ms < 0 { "behind this machine" } else { "ahead of this machine" }
}

pub(crate) async fn run(context: &mut Context, args: DoctorArgs) -> Result<(), Error> {
    context.options.check_any()?;
    let url = context.options.maybe_log()?;
    let mut checks = Checks::default();
    checks.ok("program", versions());
    match args.role {
        Some(role) => check_rights(context, url.as_ref(), role, &mut checks).await,
        None => check_all(context, url.as_ref(), &mut checks).await,
    }
    let problems = checks.count(Level::Problem);
    match context.out.json {
        true => context.out.document(&serde_json::json!({
            "healthy": problems == 0,
            "warnings": checks.count(Level::Warning),
            "checks": checks.0,
        }))?,
        false => checks.print(&mut context.out)?,
    }
    match problems {
        0 => Ok(()),
        _ => Err(Error::failed(format!(
            "{} in {}; see what to do about each",
            count(problems, "problem"),
            count(checks.0.len() as u64, "check")
        ))),
    }
}

async fn check_all(context: &Context, url: Option<&LogUrl>, checks: &mut Checks) {
    let log = match url {
        Some(url) => log(context, url, checks).await,
        None => None,
    };
    let database = database::check(context, checks).await;
    if let (Some(url @ LogUrl::Kafka(_)), Some(_)) = (url, &log) {
        // Workers may write a database of their own, without a stream index.
        let has_index = match &database {
            Some(database) => overview::index(database).await.is_ok_and(|index| !index.is_empty()),
            None => false,
        };
        let with_index = database.as_ref().filter(|_| has_index);
        kafka::check_groups(context, url, with_index, checks).await;
    }
    if let Some(database) = &database {
        index::check(log.as_ref(), database, checks).await;
        lag::check(log.as_ref(), database, checks).await;
    }
}

async fn check_rights(context: &Context, url: Option<&LogUrl>, role: Role, checks: &mut Checks) {
    if let Some(url) = url {
        rights::check_kafka(context, url, role, checks).await;
    }
    let checked = async {
        let Some(database) = context.options.maybe_database().await? else { return Ok(()) };
        database::check_rights(&database, role, None, checks).await
    };
    if let Err(error) = checked.await {
        checks.failed("database: rights", &error);
    }
}

fn versions() -> String {
    format!(
        "kafold {}, wire format {}, librdkafka {}",
        env!("CARGO_PKG_VERSION"),
        ::kafold::kafka::wire::FORMAT,
        ::kafold::kafka::operate::client_version()
    )
}

/// The log and what its partitions show, if it can be read.
struct Seen {
    log: Log,
    partitions: Vec<PartitionView>,
}

async fn log(context: &Context, url: &LogUrl, checks: &mut Checks) -> Option<Seen> {
    if let LogUrl::Kafka(_) = url
        && !kafka::check(context, url, checks).await
    {
        return None;
    }
    let opened = match Log::open(url, &context.clock).await {
        Ok(log) => log,
        Err(error) => {
            checks.failed("log", &error);
            return None;
        }
    };
    let partitions = match overview::partitions(&opened).await {
        Ok(partitions) => partitions,
        Err(error) => {
            checks.failed("log: read", &error);
            return None;
        }
    };
    let records = partitions.iter().map(|seen| seen.end.0 - seen.start.0).sum();
    let partition_count = count(partitions.len() as u64, "partition");
    checks.ok("log: read", format!("{} in {partition_count}", count(records, "record")));
    let newest = partitions.iter().filter_map(|seen| seen.newest_event_at).max();
    if let Some(newest) = newest {
        // A record of the past tells nothing of its writer's clock; one of the future does.
        let ahead = (newest - context.clock.now()).num_milliseconds().max(0);
        checks.clock("log: clock", "the newest event", ahead);
    }
    Some(Seen { log: opened, partitions })
}

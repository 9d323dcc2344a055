//! `status`: log, stream index and projections on one screen.

use std::collections::BTreeMap;
use std::fmt;

use kafold::kafka::operate::TopicReport;
use kafold::projections::{NodeReport, Overview, OverviewState};
use kafold::{Offset, Partition, ReadError};
use serde::Serialize;
use serde_json::{Value, json};

use crate::admin::Context;
use crate::commands::projections;
use crate::error::{Error, chain};
use crate::event::time;
use crate::log::{Log, operator};
use crate::options::LogUrl;
use crate::output::{Output, count, or_dash, thousands};
use crate::overview::{self, PartitionView};

/// All that was found out; what could not be is absent.
#[derive(Default)]
struct Status {
    log: Option<LogStatus>,
    database: Option<DatabaseStatus>,
    /// Sentences about members of the log's consumer groups that are no part of the service.
    strangers: Vec<String>,
    /// Sentences about topics that take smaller records than Kafka's default.
    limits: Vec<String>,
}

struct LogStatus {
    url: LogUrl,
    partitions: Vec<PartitionView>,
    /// Partitions of the topic that the log does not use.
    added: Vec<Partition>,
    /// The reason for which services refuse the log.
    refusal: Option<String>,
}

struct DatabaseStatus {
    url: String,
    identity: String,
    /// Where the stream index stands; `None` for a log in a file, and for a database of workers alone.
    index: Option<BTreeMap<Partition, Offset>>,
    projections: Vec<Overview>,
    nodes: Vec<NodeReport>,
}

pub(crate) async fn run(context: &mut Context) -> Result<(), Error> {
    context.options.check_any()?;
    let mut status = Status::default();
    let log = log(context, &mut status).await;
    let database = database(context, &mut status).await;
    brokers(context, &mut status).await;
    if !status.ahead().is_empty() {
        // A running service may have advanced the database since the first read of the log.
        self::log(context, &mut status).await?;
    }
    match context.out.json {
        true => context.out.document(&status.json())?,
        false => status.print(&mut context.out)?,
    }
    log.and(database)?;
    let problems: Vec<_> = status.problems().chain(status.stopped()).collect();
    match status.ahead().as_slice() {
        [] if problems.is_empty() => Ok(()),
        [] => Err(Error::failed(problems.join("; "))),
        ahead => {
            let places: Vec<_> = ahead.iter().map(ToString::to_string).collect();
            Err(Error::failed(format!(
                "the database is ahead of its log: {}. Give those that belong together, or, if the log lost its \
                 end or was replaced, begin anew with `kafold positions reset --reason …`",
                places.join("; ")
            )))
        }
    }
}

fn row(node: &NodeReport) -> [String; 3] {
    let state = match node.unready_seconds {
        _ if node.is_silent() => "silent".to_owned(),
        None => "ready".to_owned(),
        Some(seconds) => format!("not ready for {seconds} s: {}", node.reasons.join("; ")),
    };
    [node.name.clone(), format!("{} s ago", node.seen_seconds), state]
}

/// A stored position beyond the end of the log.
#[derive(Debug, Serialize)]
struct Ahead<'s> {
    /// `the index`, or a projection's name.
    what: &'s str,
    partition: Partition,
    next: Offset,
    end: Offset,
}

impl fmt::Display for Ahead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, partition, next, end } = self;
        write!(f, "{what} stands at {partition}:{next}, the log ends at {partition}:{end}")
    }
}

async fn log(context: &Context, status: &mut Status) -> Result<(), Error> {
    let Some(url) = context.options.maybe_log()? else { return Ok(()) };
    let log = Log::open(&url, &context.clock).await?;
    let partitions = overview::partitions(&log).await?;
    let (mut added, mut refusal) = (Vec::new(), None);
    if let Log::Kafka(readable) = &log {
        added.extend(readable.added_partitions());
        match readable.check(Partition(0), None).await {
            Ok(()) => {}
            Err(ReadError::Diverged { cause, .. }) => refusal = Some(chain(&*cause)),
            Err(error) => return Err(error.into()),
        }
    }
    status.log = Some(LogStatus { url, partitions, added, refusal });
    Ok(())
}

/// Asks the brokers of a log on Kafka that is there for members of its groups and settings of its topics.
async fn brokers(context: &Context, status: &mut Status) {
    let Some(url @ LogUrl::Kafka(_)) = status.log.as_ref().map(|log| &log.url) else { return };
    // Workers may write a database of their own, without a stream index.
    let with_index = status.database.as_ref().filter(|database| database.index.is_some());
    let identity = with_index.map(|database| database.identity.as_str());
    let told = |error: Error| vec![error.reason().to_owned()];
    (status.strangers, status.limits) = match operator(url, &context.clock).await {
        Ok(operator) => {
            let strangers = operator.strangers(identity).await;
            // `topic check` and `doctor` report why settings cannot be read.
            let limits =
                operator.check_topics().await.map_or_else(|_| Vec::new(), |all| limits(&all));
            (strangers.unwrap_or_else(|error| told(error.into())), limits)
        }
        Err(error) => (told(error), Vec::new()),
    };
}

/// Returns a sentence for each topic that takes smaller records than Kafka's default.
fn limits(reports: &[TopicReport]) -> Vec<String> {
    let sentences = reports.iter().flat_map(|report| {
        let settings = report.settings.iter().filter(|one| one.setting == "max.message.bytes");
        settings.filter_map(|setting| {
            let why = &setting.finding.as_ref()?.why;
            Some(format!("{}: {}={}: {why}", report.topic, setting.setting, setting.value))
        })
    });
    sentences.collect()
}

async fn database(context: &Context, status: &mut Status) -> Result<(), Error> {
    let Some(database) = context.options.maybe_database().await? else { return Ok(()) };
    let ends = status.log.as_ref().map(|log| log.partitions.as_slice());
    let projections = overview::projections(&database, ends).await?;
    let nodes = NodeReport::all(&database).await?;
    let index = match context.options.maybe_log()? {
        Some(LogUrl::Sqlite(_)) => None,
        Some(LogUrl::Kafka(_)) | None => {
            let cursors = overview::index(&database).await?;
            let places = cursors.into_iter().map(|(partition, at)| (partition, at.next));
            Some(places.collect()).filter(|places: &BTreeMap<_, _>| !places.is_empty())
        }
    };
    let (url, identity) = (database.url().to_owned(), database.identity().to_owned());
    status.database = Some(DatabaseStatus { url, identity, index, projections, nodes });
    Ok(())
}

impl LogStatus {
    fn kind(&self) -> &'static str {
        match self.url {
            LogUrl::Sqlite(_) => "embedded",
            LogUrl::Kafka(_) => "kafka",
        }
    }

    fn records(&self) -> u64 {
        self.partitions.iter().map(|seen| seen.end.0 - seen.start.0).sum()
    }

    fn json(&self) -> Value {
        let partition = |seen: &PartitionView| {
            let (epoch, owner) = seen.claim.clone().unzip();
            json!({
                "partition": seen.partition, "start": seen.start, "end": seen.end, "epoch": epoch,
                "owner": owner, "newest_event_at": seen.newest_event_at.map(time),
            })
        };
        let partitions: Vec<_> = self.partitions.iter().map(partition).collect();
        let (url, kind, records) = (self.url.shown(), self.kind(), self.records());
        json!({
            "url": url, "kind": kind, "records": records, "partitions": partitions,
            "added_partitions": self.added,
        })
    }
}

impl Status {
    fn json(&self) -> Value {
        let database = self.database.as_ref();
        let projections = database.map(|database| &database.projections);
        let index = database.and_then(|database| database.index.as_ref()).map(|index| {
            let places = index.iter().map(|(partition, next)| (partition.to_string(), next));
            let next: BTreeMap<_, _> = places.collect();
            json!({ "next": next, "lag_records": self.index_lag(index) })
        });
        json!({
            "log": self.log.as_ref().map(LogStatus::json),
            "database": database.map(|database| &database.url),
            "index": index,
            "projections": projections,
            "nodes": database.map(|database| &database.nodes),
            "ahead": self.ahead(),
            "problems": self.problems().collect::<Vec<_>>(),
            "warnings": self.warnings().collect::<Vec<_>>(),
        })
    }

    /// Returns one sentence for each problem of the log and of its nodes.
    fn problems(&self) -> impl Iterator<Item = String> {
        let refusal = self.log.iter().filter_map(|log| log.refusal.clone());
        let unready = self.nodes().filter_map(NodeReport::complaint);
        refusal.chain(self.strangers.iter().cloned()).chain(unready)
    }

    /// Returns one sentence for each fact that may become a problem.
    fn warnings(&self) -> impl Iterator<Item = String> {
        self.limits.iter().cloned().chain(self.nodes().filter_map(NodeReport::silence))
    }

    fn nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.database.iter().flat_map(|database| &database.nodes)
    }

    /// Returns one sentence for each projection that has stopped.
    fn stopped(&self) -> impl Iterator<Item = String> {
        let projections = self.database.iter().flat_map(|database| &database.projections);
        let stopped = projections.filter(|seen| matches!(seen.state, OverviewState::Stopped));
        stopped.map(|seen| {
            let reason = seen.reason.as_deref().unwrap_or("see the log of its worker");
            format!("projection {} has stopped: {reason}", seen.name)
        })
    }

    /// Returns the database's positions beyond the end of the log; none without both.
    fn ahead(&self) -> Vec<Ahead<'_>> {
        let (Some(log), Some(database)) = (&self.log, &self.database) else { return Vec::new() };
        let index = database.index.iter().flatten();
        let index = index.map(|(partition, next)| ("the index", *partition, *next));
        let projections = database.projections.iter().flat_map(|seen| {
            let places = seen.partitions.iter();
            places.map(|place| (seen.name.as_str(), Partition(place.partition), Offset(place.next)))
        });
        let ends: BTreeMap<_, _> =
            log.partitions.iter().map(|seen| (seen.partition, seen.end)).collect();
        let is_ahead = |(what, partition, next): (_, Partition, Offset)| {
            let end = *ends.get(&partition)?;
            (next > end).then_some(Ahead { what, partition, next, end })
        };
        index.chain(projections).filter_map(is_ahead).collect()
    }

    /// Records that the index has not seen; unknown without the log.
    fn index_lag(&self, index: &BTreeMap<Partition, Offset>) -> Option<u64> {
        let log = self.log.as_ref()?;
        let behind = |seen: &PartitionView| {
            let next = index.get(&seen.partition).map_or(0, |next| next.0);
            seen.end.0.saturating_sub(next)
        };
        Some(log.partitions.iter().map(behind).sum())
    }

    fn print(&self, out: &mut Output) -> Result<(), Error> {
        if let Some(log) = &self.log {
            let partitions = count(log.partitions.len() as u64, "partition");
            let records = count(log.records(), "record");
            out.line(&format!("log       {}: {partitions}, {records}", log.url.shown()))?;
            if !log.added.is_empty() {
                let added = count(log.added.len() as u64, "partition");
                out.line(&format!(
                    "warning   {added} added to the topic: the log does not use them"
                ))?;
            }
        }
        for problem in self.problems().chain(self.warnings()) {
            out.line(&format!("warning   {problem}"))?;
        }
        let Some(database) = &self.database else {
            self.print_owners(out)?;
            return Ok(());
        };
        out.line(&format!("database  {}", database.url))?;
        if let Some(index) = &database.index
            && let Some(lag) = self.index_lag(index)
        {
            out.line(&format!("index     {} behind the log", count(lag, "record")))?;
        }
        self.print_owners(out)?;
        if !database.nodes.is_empty() {
            let rows: Vec<_> = database.nodes.iter().map(row).collect();
            out.line("")?;
            out.table(["NODE", "REPORTED", "STATE"], &rows)?;
        }
        out.line("")?;
        projections::print(out, &database.projections)
    }

    /// Who claimed how much of a log on Kafka last.
    fn print_owners(&self, out: &mut Output) -> Result<(), Error> {
        let Some(log) = self.log.as_ref().filter(|log| log.kind() == "kafka") else {
            return Ok(());
        };
        let mut owners: BTreeMap<String, Vec<&PartitionView>> = BTreeMap::new();
        for seen in &log.partitions {
            let owner = seen.claim.as_ref().map(|(_, owner)| owner.to_string());
            owners.entry(or_dash(owner)).or_default().push(seen);
        }
        let row = |(owner, owned): (&String, &Vec<&PartitionView>)| {
            let records = owned.iter().map(|seen| seen.end.0 - seen.start.0).sum();
            let newest = owned.iter().filter_map(|seen| seen.newest_event_at).max();
            let partitions = thousands(owned.len() as u64);
            [owner.clone(), partitions, thousands(records), or_dash(newest.map(time))]
        };
        let rows: Vec<_> = owners.iter().map(row).collect();
        out.line("")?;
        out.table(["CLAIMED BY", "PARTITIONS", "RECORDS", "NEWEST EVENT"], &rows)
    }
}

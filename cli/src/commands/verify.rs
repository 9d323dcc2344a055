//! `verify`: folds the log again and compares what was made from it.

use std::collections::{BTreeMap, HashMap};

use futures_util::TryStreamExt;
use kafold::projections::{
    Control, CountsComparison, EventCounts, SqlIndex, Verification, VerifyError,
};
use kafold::{
    Database, Offset, Partition, ReadError, RecordedEvent, StreamId, StreamIndex, Version,
};
use serde::Serialize;

use crate::admin::Context;
use crate::error::Error;
use crate::log::Log;
use crate::output::{Output, count};
use crate::overview::{self, PartitionView};
use crate::progress::Progress;

/// Differences that are told of the log and of the index.
const SHOWN_MAX: usize = 10;
/// The result of a verification that found differences.
const DIFFERS: &str = "what was made from the log is not what the log says";
/// The name of the stream index among what is behind the log.
const INDEX: &str = "stream index";

/// What was compared, and what differs.
#[derive(Default, Serialize)]
struct Report {
    /// Events of the log, with its streams' versions one after the other.
    events: u64,
    streams: u64,
    /// Contradictions within the log.
    log_differences: Vec<String>,
    /// Events that the stream index was compared with; a log in a file is its own index.
    indexed_events: Option<u64>,
    index_differences: Vec<String>,
    projections: Vec<Verification>,
    /// Reasons for which projections could not be folded again or compared, by name.
    failed: BTreeMap<String, String>,
    /// Projections that only the service's own program can fold again.
    not_verified: Vec<String>,
    /// Projections that name no tables to compare.
    without_tables: Vec<String>,
    /// Records of the log that the stream index or a projection has not read, by name and partition.
    behind: BTreeMap<String, BTreeMap<u32, u64>>,
}

impl Report {
    fn is_clean(&self) -> bool {
        self.failed.is_empty() && !self.differs_anywhere()
    }

    fn differs_anywhere(&self) -> bool {
        !self.log_differences.is_empty()
            || !self.index_differences.is_empty()
            || !self.projections.iter().all(Verification::is_equal)
    }
}

pub(crate) async fn run(context: &mut Context) -> Result<(), Error> {
    let url = context.options.log()?;
    let database = context.options.maybe_database().await?;
    let log = Log::open(&url, &context.clock).await?;
    let mut report = Report::default();
    verify_log(&log, database.as_ref(), &mut report).await?;
    if let Some(database) = &database {
        verify_projections(context, &log, database, &mut report).await?;
    }
    match context.out.json {
        true => context.out.document(&report)?,
        false => print(&mut context.out, &report)?,
    }
    match report.is_clean() {
        true => Ok(()),
        false if report.failed.is_empty() => Err(Error::failed(DIFFERS)),
        false => {
            let failed: Vec<_> = report.failed.keys().map(String::as_str).collect();
            let (count, names) = (count(failed.len() as u64, "projection"), failed.join(", "));
            let also =
                if report.differs_anywhere() { format!("; {DIFFERS}") } else { String::new() };
            Err(Error::failed(format!("{count} could not be verified: {names}{also}")))
        }
    }
}

/// Reads the whole log: every stream's versions follow one another, and the index has what the log
/// has.
async fn verify_log(
    log: &Log,
    database: Option<&Database>,
    report: &mut Report,
) -> Result<(), Error> {
    let mut indexed = Index::open(log, database).await?;
    let mut versions: HashMap<StreamId, Version> = HashMap::new();
    let views = overview::partitions(log).await?;
    let progress = Progress::new(views.iter().map(|seen| seen.end.0).sum(), "the log");
    if let Some(indexed) = &indexed {
        let behind = views.iter().map(|view| (view.partition.0, indexed.lag(view)));
        report.add_behind(INDEX, behind);
    }
    for view in views {
        let mut batches = log.replay(view.partition, None, view.end);
        while let Some(batch) = batches.try_next().await? {
            progress.advance(batch.next.next.0.saturating_sub(batch.from.0));
            for event in &batch.events {
                report.events += 1;
                let version = versions.entry(event.stream.clone()).or_default();
                if event.version != version.plus(1) && report.log_differences.len() < SHOWN_MAX {
                    report.log_differences.push(format!(
                        "version {} of {} at {} follows version {version}",
                        event.version, event.stream, event.position
                    ));
                }
                *version = event.version;
            }
            if let Some(indexed) = &mut indexed {
                indexed.compare(&batch.events, report).await?;
            }
        }
    }
    if let Some(indexed) = &indexed {
        indexed.end(report).await?;
    }
    if let Log::Embedded { database: Database::Sqlite(file), .. } = log
        && let Err(error) = kafold::embedded::check_heads(file).await
    {
        match error {
            ReadError::Diverged { .. } => report.log_differences.push(crate::error::chain(&error)),
            ReadError::Unavailable { .. } => return Err(error.into()),
        }
    }
    report.streams = versions.len() as u64;
    Ok(())
}

/// The stream index, read beside the log.
struct Index {
    index: SqlIndex,
    /// How far it is, by partition.
    next: HashMap<Partition, Offset>,
    /// Number of the log's events below `next`, by partition.
    events: HashMap<Partition, u64>,
}

impl Index {
    async fn open(log: &Log, database: Option<&Database>) -> Result<Option<Self>, Error> {
        let (Log::Kafka(_), Some(database)) = (log, database) else { return Ok(None) };
        let cursors = overview::index(database).await?;
        let next = cursors.into_iter().map(|(partition, cursor)| (partition, cursor.next));
        let index = SqlIndex::new(database.clone());
        Ok(Some(Self { index, next: next.collect(), events: HashMap::new() }))
    }

    /// Returns the number of records of a partition that the index has not read.
    fn lag(&self, view: &PartitionView) -> u64 {
        let next = self.next.get(&view.partition).copied().unwrap_or_default();
        view.end.0.saturating_sub(next.0)
    }

    async fn compare(
        &mut self,
        events: &[RecordedEvent],
        report: &mut Report,
    ) -> Result<(), Error> {
        let Some(first) = events.first() else { return Ok(()) };
        let end = self.next.get(&first.position.partition).copied().unwrap_or_default();
        let events: Vec<_> =
            events.iter().filter(|event| event.position.offset < end).cloned().collect();
        *self.events.entry(first.position.partition).or_default() += events.len() as u64;
        *report.indexed_events.get_or_insert_default() += events.len() as u64;
        for (event, found) in events.iter().zip(self.index.find(&events).await?) {
            match found {
                Some(Ok(found)) if found == *event => {}
                Some(Ok(found)) => report.differs(format!(
                    "the log has {}, the index has {}",
                    show(event),
                    show(&found)
                )),
                Some(Err(error)) => report.differs(crate::error::chain(&error)),
                None => report.differs(format!("the index lacks event {}", show(event))),
            }
        }
        Ok(())
    }

    /// Reports events of the index missing from the log, and contradictions between the index's
    /// tables.
    async fn end(&self, report: &mut Report) -> Result<(), Error> {
        for count in self.index.count().await? {
            let (found, partition) = (count.rows.events, count.partition);
            let events = self.events.get(&partition).copied().unwrap_or_default();
            // A running service advances the index meanwhile; events missing from the index are
            // reported above.
            let has_stood = self.index.cursors().await?.into_iter().any(|(of, cursor)| {
                of == partition && Some(&cursor.next) == self.next.get(&partition)
            });
            if found > events && has_stood {
                report.differs(format!(
                    "the index has {found} events of partition {partition}, the log {events}"
                ));
            }
            if let Err(error) = count.check() {
                report.differs(crate::error::chain(&error));
            }
            let heads = self.index.heads(partition).await?;
            if let Err(error) = heads.check(partition, self.index.heads_table()) {
                report.differs(crate::error::chain(&error));
            }
        }
        Ok(())
    }
}

impl Report {
    fn add_behind(&mut self, name: &str, behind: impl Iterator<Item = (u32, u64)>) {
        let behind: BTreeMap<_, _> = behind.filter(|(_, records)| *records > 0).collect();
        if !behind.is_empty() {
            self.behind.insert(name.to_owned(), behind);
        }
    }

    fn differs(&mut self, difference: String) {
        if self.index_differences.len() < SHOWN_MAX {
            self.index_differences.push(difference);
        }
    }
}

fn show(event: &RecordedEvent) -> String {
    let RecordedEvent { position, stream, version, event_type, metadata, .. } = event;
    format!("{} at {position} ({event_type}, version {version} of {stream})", metadata.event_id)
}

async fn verify_projections(
    context: &Context,
    log: &Log,
    database: &Database,
    report: &mut Report,
) -> Result<(), Error> {
    let views = overview::partitions(log).await?;
    let ends: Vec<_> = views.iter().map(|view| (view.partition, view.end)).collect();
    let known = Control::new(database.clone()).list(&ends).await?;
    for seen in &known {
        let behind = seen.partitions.iter().map(|place| (place.partition, place.lag_records()));
        report.add_behind(&seen.name, behind);
    }
    let mut known: Vec<_> = known.into_iter().map(|seen| seen.name).collect();
    if let Some(worker) = context.domain.worker {
        let worker = worker(log.source(), database.clone());
        for name in worker.names().into_iter().filter(|name| known.contains(name)) {
            let progress = Progress::new(0, &name);
            let tell = |at: kafold::projections::VerifyProgress| progress.at(at.done, at.total);
            match worker.verify(&name, &tell).await {
                Ok(verified) => report.projections.push(verified),
                Err(VerifyError::NoTables(name)) => report.without_tables.push(name),
                // A dropped table, or a handler that fails: the others are verified all the same.
                Err(error @ (VerifyError::Handler { .. } | VerifyError::Database(_))) => {
                    report.failed.insert(name, crate::error::chain(&error));
                }
                Err(error) => return Err(error.into()),
            }
        }
        known.retain(|name| !worker.names().contains(name));
    }
    report.not_verified = known;
    Ok(())
}

fn print(out: &mut Output, report: &Report) -> Result<(), Error> {
    let (events, streams) = (count(report.events, "event"), count(report.streams, "stream"));
    let verdict = |differences: &[String]| match differences.len() {
        0 => "no difference".to_owned(),
        _ => format!("DIFFERENCES\n  {}", differences.join("\n  ")),
    };
    out.line(&format!("log: {events} of {streams}, {}", verdict(&report.log_differences)))?;
    if let Some(indexed) = report.indexed_events {
        let indexed = count(indexed, "event");
        out.line(&format!("stream index: {indexed}, {}", verdict(&report.index_differences)))?;
    }
    for projection in &report.projections {
        let Verification { projection: name, generation, events, left_out, rows, .. } = projection;
        let left_out = match left_out {
            0 => String::new(),
            left_out => format!(", {} parked or skipped", count(*left_out, "event")),
        };
        let (events, rows) = (count(*events, "event"), count(rows.unsigned_abs(), "row"));
        let mut shown = Vec::new();
        for table in &projection.differences {
            let (name, unexpected, missing) = (&table.table, table.unexpected, table.missing);
            shown.push(format!(
                "{name}: {unexpected} rows that the log does not give, {missing} missing"
            ));
            shown.extend(table.first_unexpected.iter().map(|row| format!("- {row}")));
            shown.extend(table.first_missing.iter().map(|row| format!("+ {row}")));
        }
        if let Some(counts) = projection.counts.filter(|_| !projection.is_equal()) {
            let of = |counts: EventCounts| {
                let EventCounts { in_windows, late, future, keyless, .. } = counts;
                format!(
                    "{in_windows} in windows, {late} late, {future} future, {keyless} without a key"
                )
            };
            let CountsComparison { stored, folded } = counts;
            shown.push(format!("events: {}; by the log: {}", of(stored), of(folded)));
        }
        out.line(&format!(
            "{name} (generation {generation}): {rows} of {events}{left_out}, {}",
            verdict(&shown)
        ))?;
    }
    for (name, reason) in &report.failed {
        out.line(&format!("{name}: NOT VERIFIED: {reason}"))?;
    }
    for (name, behind) in &report.behind {
        let partitions: Vec<_> =
            behind.iter().map(|(partition, records)| format!("{partition}: {records}")).collect();
        let all = count(behind.values().sum(), "record");
        out.line(&format!("{name} is {all} behind the log (partition {})", partitions.join(", ")))?;
    }
    if !report.without_tables.is_empty() {
        let names = report.without_tables.join(", ");
        out.line(&format!("not verified: {names}; a projection that names its `tables` is"))?;
    }
    if !report.not_verified.is_empty() {
        out.line(&format!(
            "not verified: {}; only the service's own `admin verify` has the code to fold them again",
            report.not_verified.join(", ")
        ))?;
    }
    Ok(())
}

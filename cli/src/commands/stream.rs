//! `stream show`: one stream, and its states where the domain's code is there.

use std::collections::VecDeque;
use std::num::NonZeroU64;

use clap::Subcommand;
use futures_util::TryStreamExt;
use kafold::index::IndexLoad;
use kafold::projections::SqlIndex;
use kafold::store::Cursor;
use kafold::{Database, Offset, Partition, RecordedEvent, StreamId, StreamIndex, Version};
use serde::Serialize;

use crate::admin::Context;
use crate::commands::lists::StreamsArgs;
use crate::diff::diff;
use crate::domain::State;
use crate::error::{Error, chain};
use crate::event::{EventJson, block};
use crate::log::Log;
use crate::output::count;
use crate::progress::Progress;

/// Events that one question to the index answers.
const PAGE_EVENTS_MAX: usize = 1_000;
/// Events that are printed unless more are asked for.
const LAST_DEFAULT: usize = 1_000;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum StreamCommand {
    /// Prints the events of a stream, and in a service's own program its state.
    ///
    /// A log on Kafka has no order by stream: with --database they come from the stream index and the
    /// end of the log behind it, without it the stream's whole partition is read.
    Show(ShowArgs),
    /// Lists the streams, those with the newest events first. Reads the log.
    List(StreamsArgs),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ShowArgs {
    /// The stream, such as order-17; only what is behind the first '-' with --category.
    id: String,
    /// The category of the stream, when ID is without it.
    #[arg(long, value_name = "CATEGORY")]
    category: Option<String>,
    /// Up to this version: the state as it was then, and what the next event changes.
    #[arg(long, value_name = "VERSION")]
    at: Option<NonZeroU64>,
    /// At most so many of the newest events; the state is of all of them.
    #[arg(long, value_name = "N", default_value_t = LAST_DEFAULT)]
    last: usize,
}

impl ShowArgs {
    fn stream(&self) -> Result<StreamId, Error> {
        let id = match &self.category {
            Some(category) => StreamId::new(category, &self.id),
            None => self.id.parse(),
        };
        id.map_err(|error| {
            Error::usage(format!(
                "{:?} is not a stream: {error}; write CATEGORY-ID, such as order-17",
                self.id
            ))
        })
    }
}

#[derive(Serialize)]
struct Report<'r> {
    stream: &'r StreamId,
    /// The version that is shown.
    version: Version,
    /// The version of its last event.
    last_version: Version,
    events: Vec<EventJson<'r>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Next<'r>>,
}

#[derive(Serialize)]
struct Next<'r> {
    event: EventJson<'r>,
    changes: &'r [String],
}

pub(crate) async fn show(context: &mut Context, args: ShowArgs) -> Result<(), Error> {
    let stream = args.stream()?;
    let url = context.options.log()?;
    let log = Log::open(&url, &context.clock).await?;
    let database = context.options.maybe_database().await?;
    let initial = context.domain.initial(stream.category());
    let mut shown = Shown::new(&args, initial);
    read(&log, database, &stream, &mut shown).await?;
    shown.check(&stream, &url.shown())?;
    match context.out.json {
        true => print_json(context, &stream, &shown)?,
        false => print_text(context, &stream, &shown)?,
    }
    match shown.undecoded {
        None => Ok(()),
        Some(reason) => Err(Error::failed(format!("the state of {stream} is not known: {reason}"))),
    }
}

/// What is kept of a stream while it is read.
struct Shown {
    at: Option<Version>,
    last_max: usize,
    events: VecDeque<RecordedEvent>,
    left_out: u64,
    last_version: Version,
    state: Option<Box<dyn State>>,
    /// The state at the version, and what the next event changes.
    text: Option<String>,
    next: Option<(RecordedEvent, Vec<String>)>,
    /// Why the domain's code cannot read the stream.
    undecoded: Option<String>,
}

impl Shown {
    fn new(args: &ShowArgs, state: Option<Box<dyn State>>) -> Self {
        Self {
            at: args.at.map(|at| Version(at.get())),
            last_max: args.last,
            events: VecDeque::new(),
            left_out: 0,
            last_version: Version::EMPTY,
            state,
            text: None,
            next: None,
            undecoded: None,
        }
    }

    /// Takes the next event of the stream.
    fn take(&mut self, event: RecordedEvent) {
        self.last_version = event.version;
        let is_shown = self.at.is_none_or(|at| event.version <= at);
        let is_next = self.at.is_some_and(|at| event.version == at.plus(1));
        if !is_shown && !is_next {
            return;
        }
        let before = match (&self.state, is_next) {
            (Some(state), true) => Some(state.show()),
            _ => None,
        };
        self.apply(&event);
        if is_shown {
            self.events.push_back(event);
            if self.events.len() > self.last_max {
                self.events.pop_front();
                self.left_out += 1;
            }
        } else {
            let after = self.state.as_ref().map(|state| state.show());
            let changes = before.as_deref().zip(after.as_deref());
            let changes = changes.map(|(before, after)| diff(before, after));
            self.text = before;
            self.next = Some((event, changes.unwrap_or_default()));
        }
    }

    fn apply(&mut self, event: &RecordedEvent) {
        let Some(state) = &mut self.state else { return };
        if let Err(error) = state.apply(event) {
            let reason = format!("version {}: {}", event.version, chain(&error));
            self.undecoded.get_or_insert(reason);
            self.state = None;
        }
    }

    /// Ends the reading.
    fn check(&mut self, stream: &StreamId, log: &str) -> Result<(), Error> {
        let last = self.last_version;
        if last == Version::EMPTY {
            return Err(Error::failed(format!(
                "there is no stream {stream} in {log}: check its id, category and the log"
            )));
        }
        if let Some(at) = self.at.filter(|at| *at > last) {
            let events = count(last.0, "event");
            return Err(Error::failed(format!(
                "stream {stream} has {events}, its last version is {last}: there is no version {at}"
            )));
        }
        if self.next.is_none() {
            self.text = self.state.as_ref().map(|state| state.show());
        }
        Ok(())
    }

    fn version(&self) -> Version {
        self.at.unwrap_or(self.last_version)
    }
}

/// Hands over the stream's events, in order: from SQL where they are there, from the log where not.
async fn read(
    log: &Log,
    database: Option<Database>,
    stream: &StreamId,
    shown: &mut Shown,
) -> Result<(), Error> {
    let partition = log.partition_of(stream);
    let mut from = None;
    if let Some(database) = log.database() {
        load(&SqlIndex::new(database.clone()), partition, stream, shown).await?;
        return Ok(());
    }
    if let Some(database) = database {
        let index = SqlIndex::new(database);
        // Before the events: what is read behind it is known by its version.
        let cursors = index.cursors().await?;
        from = cursors.into_iter().find(|(found, _)| *found == partition).map(|(_, at)| at);
        if from.is_some() {
            load(&index, partition, stream, shown).await?;
        }
    }
    replay(log, partition, from, stream, shown).await
}

async fn load(
    index: &SqlIndex,
    partition: Partition,
    stream: &StreamId,
    shown: &mut Shown,
) -> Result<(), Error> {
    loop {
        let after = shown.last_version;
        let wanted = IndexLoad { partition, stream: stream.clone(), after };
        let Some(read) = index.load(&[wanted], PAGE_EVENTS_MAX).await.pop() else { return Ok(()) };
        let read = read?;
        read.events.into_iter().for_each(|event| shown.take(event));
        if !read.more {
            return Ok(());
        }
    }
}

async fn replay(
    log: &Log,
    partition: Partition,
    from: Option<Cursor>,
    stream: &StreamId,
    shown: &mut Shown,
) -> Result<(), Error> {
    let (_, end) = log.ends(partition).await?;
    let next = from.as_ref().map_or(Offset(0), |cursor| cursor.next);
    let progress = Progress::new(end.0.saturating_sub(next.0), &format!("partition {partition}"));
    let mut batches = log.replay(partition, from, end);
    while let Some(batch) = batches.try_next().await? {
        progress.advance(batch.next.next.0.saturating_sub(batch.from.0));
        let wanted =
            |event: &RecordedEvent| event.stream == *stream && event.version > shown.last_version;
        let events: Vec<_> = batch.events.into_iter().filter(wanted).collect();
        events.into_iter().for_each(|event| shown.take(event));
    }
    Ok(())
}

fn print_json(context: &mut Context, stream: &StreamId, shown: &Shown) -> Result<(), Error> {
    let next = shown.next.as_ref();
    context.out.document(&Report {
        stream,
        version: shown.version(),
        last_version: shown.last_version,
        events: shown.events.iter().map(EventJson::of).collect(),
        state: shown.text.as_deref(),
        next: next.map(|(event, changes)| Next { event: EventJson::of(event), changes }),
    })
}

fn print_text(context: &mut Context, stream: &StreamId, shown: &Shown) -> Result<(), Error> {
    let out = &mut context.out;
    let of = match shown.at {
        Some(at) => format!("version {at} of {}", shown.last_version),
        None => count(shown.last_version.0, "event"),
    };
    out.line(&format!("{stream}: {of}\n"))?;
    if shown.left_out > 0 {
        let left_out = count(shown.left_out, "earlier event");
        out.line(&format!("{left_out} left out: --last N shows more\n"))?;
    }
    for event in &shown.events {
        out.line(&block(event))?;
    }
    if let Some(state) = &shown.text {
        out.line(&format!("state at version {}:\n{state}", shown.version()))?;
    }
    if let Some((event, changes)) = &shown.next {
        let RecordedEvent { version, event_type, .. } = event;
        out.line(&format!("\nversion {version}, {event_type}, comes next:"))?;
        for line in changes {
            out.line(&format!("  {line}"))?;
        }
    }
    Ok(())
}

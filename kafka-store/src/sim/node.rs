//! One incarnation of a process: the real writer and tail, and the part of the driver around them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use kafold_core::index::IndexBatch;
use kafold_core::store::{Appended, Owner};
use kafold_core::{
    CommandHandler, CommandId, Filter, Offset, ReadError, RecordedEvent, StreamId, Version,
};

use super::handlers::{self, Count, SharedInbox, SimClock};
use super::index::Index;
use super::random::Random;
use super::reference::{PARTITION, Violation};
use crate::fold::Checkpoint;
use crate::tail::{MergeError, Tail, TailView};
use crate::wire::ClaimId;
use crate::writer::{CommandOutcome, PartitionWriter, StreamHead, WriterConfig, WriterLimits};

pub(super) struct Node {
    pub(super) incarnation: usize,
    pub(super) writer: PartitionWriter,
    pub(super) tail: Tail,
    /// The read asked for: from where, until when it may wait.
    pub(super) read: Option<(Offset, Instant)>,
    pub(super) lookups: Vec<Lookup>,
    /// The batch that is on its way to the index.
    pub(super) feed: Option<IndexBatch>,
    pub(super) index_at: Offset,
    /// Fresh producers made so far.
    pub(super) producer: u32,
    pub(super) producer_due: bool,
    pub(super) paused_until: u64,
    pub(super) owned: u32,
    /// Told to give the partition up, and done with it.
    pub(super) releasing: bool,
    pub(super) was_superseded: bool,
    pub(super) released: bool,
    /// The claim under which it owns, and the highest commands mark it was told of or told.
    pub(super) hold: Option<ClaimId>,
    pub(super) mark: Offset,
    pub(super) mark_wanted: Offset,
    pub(super) mark_settled: Offset,
    /// Seqs of barriers, to tell what proved a confirm.
    pub(super) barriers: BTreeSet<(u32, u64)>,
    /// Its command handler, and what that wishes for.
    pub(super) handler: CommandHandler<Count>,
    pub(super) inbox: SharedInbox,
}

/// A load or look-up: the tail is copied first, the index is asked later.
pub(super) struct Lookup {
    pub(super) stream: StreamId,
    pub(super) command_id: Option<CommandId>,
    pub(super) tail: Option<(TailView, Option<Appended>)>,
}

/// What a finished [`Lookup`] says.
pub(super) enum Looked {
    Head(Result<StreamHead, ReadError>),
    Command(CommandId, Result<Option<Appended>, ReadError>),
}

/// Recent commands that a load tells, so that look-ups are needed.
const HEAD_COMMANDS_MAX: usize = 3;

pub(super) fn limits() -> WriterLimits {
    WriterLimits {
        record_bytes_max: 2_000,
        requests_max: 30,
        request_bytes_max: 20_000,
        unindexed_events_max: 60,
        streams_max: 2,
        recent_commands_max: 3,
        // That of one stream, of the one used last.
        older_commands_bytes_max: 400,
        loads_max: 2,
        refused_commands_max: 8,
        barrier_interval: Duration::from_millis(5),
        claim_backoff: Duration::from_millis(4),
        claim_backoff_max: Duration::from_millis(64),
        yield_backoff: Duration::from_millis(8),
        yield_backoff_max: Duration::from_millis(64),
        report_timeout: Duration::from_millis(400),
        quiet_time: Duration::from_millis(5),
        read_wait: Duration::from_millis(20),
        read_retry: Duration::from_millis(3),
    }
}

impl Node {
    pub(super) fn new(
        incarnation: usize,
        started_at: DateTime<Utc>,
        from: Checkpoint,
        seed: u64,
        clock: &SimClock,
    ) -> Self {
        let mut random = Random(seed);
        let inbox = SharedInbox::default();
        let handler = handlers::handler(&inbox, clock, random.next());
        let config = WriterConfig {
            partition: PARTITION,
            partitions: 1,
            owner: Owner {
                name: format!("node-{incarnation}"),
                address: String::new(),
                started_at,
            },
            log: "sim".into(),
            limits: limits(),
        };
        Self {
            incarnation,
            writer: PartitionWriter::new(config, Box::new(move || random.next())),
            index_at: from.next,
            tail: Tail::new(PARTITION, from),
            read: None,
            lookups: Vec::new(),
            feed: None,
            producer: 0,
            producer_due: false,
            paused_until: 0,
            owned: 0,
            was_superseded: false,
            releasing: false,
            released: false,
            hold: None,
            mark: Offset(0),
            mark_wanted: Offset(0),
            mark_settled: Offset(0),
            barriers: BTreeSet::new(),
            handler,
            inbox,
        }
    }

    /// The partition is assigned once more, to the same process and its producers. What was asked for
    /// before is not answered.
    pub(super) fn begin_again(&mut self, from: Checkpoint) {
        self.writer.renew();
        self.index_at = from.next;
        self.tail = Tail::new(PARTITION, from);
        self.read = None;
        self.lookups.clear();
        self.feed = None;
        (self.releasing, self.released) = (false, false);
        self.hold = None;
    }

    /// What a caller of this node reads of a stream.
    pub(super) fn read_stream(
        &self,
        index: &Index,
        stream: &StreamId,
    ) -> Result<Vec<RecordedEvent>, MergeError> {
        let view = self.tail.view(stream, Version::EMPTY);
        merge(&view, index, stream)
    }

    pub(super) fn look(
        &self,
        lookup: &Lookup,
        index: &Index,
        random: &mut Random,
    ) -> Result<Looked, Violation> {
        let Some((view, in_tail)) = &lookup.tail else {
            return Err("a look-up ends before the tail was copied".into());
        };
        let merged = match merge(view, index, &lookup.stream) {
            Ok(events) if random.chance(90) => Ok(events),
            Ok(_) => Err(ReadError::unavailable(Duration::ZERO, "the database is away")),
            Err(error @ MergeError::IndexBehind { .. }) => Err(ReadError::diverged("index", error)),
            Err(error @ MergeError::NotGapless { .. }) => return Err(error.to_string()),
        };
        Ok(match lookup.command_id {
            None => Looked::Head(merged.map(|events| head(&events))),
            Some(command_id) => {
                let found = merged.map(|events| in_tail.or(outcome_of(&events, command_id)));
                Looked::Command(command_id, found)
            }
        })
    }
}

/// What a command of these events came to.
pub(super) fn outcome_of(events: &[RecordedEvent], command_id: CommandId) -> Option<Appended> {
    let last = events.iter().rev().find(|event| event.command_id == command_id)?;
    Some(Appended { version: last.version, position: last.position, duplicate: true })
}

fn merge(
    view: &TailView,
    index: &Index,
    stream: &StreamId,
) -> Result<Vec<RecordedEvent>, MergeError> {
    let merged = view.merge(PARTITION, Version::EMPTY, index.position(), index.events(stream))?;
    Ok(merged.iter().map(|event| RecordedEvent::clone(event)).collect())
}

fn head(events: &[RecordedEvent]) -> StreamHead {
    let mut recent: Vec<CommandOutcome> = Vec::new();
    for event in events {
        let (command_id, version, position) = (event.command_id, event.version, event.position);
        let outcome = CommandOutcome { command_id, version, position };
        match recent.last_mut() {
            Some(last) if last.command_id == command_id => *last = outcome,
            _ => recent.push(outcome),
        }
    }
    let cut = recent.len().saturating_sub(HEAD_COMMANDS_MAX);
    let newest = recent.split_off(cut);
    let version = events.last().map_or(Version::EMPTY, |last| last.version);
    // Of some longer streams they are not known.
    let is_known = cut == 0 || version.0.is_multiple_of(2);
    let older = is_known.then(|| {
        let mut older = Filter::default();
        recent.iter().for_each(|outcome| older.add(&outcome.command_id));
        older
    });
    StreamHead { version, recent: newest, older }
}

//! The state machine of the single writer of one partition, without IO, clock or randomness.
//!
//! [`PartitionWriter::handle`] takes what happened and says what is to be done. The way of a
//! partition: read from the index's position to the end, claim, read until the own claim is
//! accepted, then decide and produce. A record is proven when its own report carries exactly the one
//! offset it must have; anything else is doubt, which a new claim settles. Who finds another's claim
//! accepted steps down, and claims again only after a wait that doubles and while he is to own the
//! partition: a writer lives from the moment it is assigned until it is released.
//!
//! - `messages`: inputs, outputs, limits;
//! - `flight`: what is produced under the current claim and not proven;
//! - `streams`: versions and recent commands by stream, and who waits;
//! - `claim`: taking the partition over, losing it, and doubt;
//! - `admit`: what is taken, and what is refused before anything is produced;
//! - `lookup`: loads of streams and look-ups of commands;
//! - `decide`: from a submission to its records, a conflict, or a wait;
//! - `settle`: from an accepted record to answers.

mod admit;
mod claim;
mod decide;
mod flight;
#[cfg(test)]
mod fork;
mod lookup;
mod messages;
mod settle;
mod streams;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Cause, Owner};
use kafold_core::{CommandId, Offset, StreamId};
use lru::LruCache;

use crate::fold::{Checkpoint, CommitReader, Read};
use crate::wire::{ClaimId, LogRecord, Stamp};

use flight::{Flight, Judgement};
use settle::{PendingCommit, PendingConfirm};
use streams::Streams;

pub use messages::{
    CommandOutcome, Input, Output, Proven, ReportFailure, RequestId, Status, StreamHead,
    WriterConfig, WriterLimits,
};

/// Draws nonces and jitter: in a service from the operating system's entropy.
pub type Entropy = Box<dyn FnMut() -> u64 + Send>;

/// The single writer of one partition.
pub struct PartitionWriter {
    config: WriterConfig,
    entropy: Entropy,
    reader: CommitReader,
    phase: Phase,
    /// Whether it has gone for the partition since it was assigned, or last lost it: another's claim
    /// from before that is history.
    has_claimed: bool,
    claim_attempts: u32,
    /// Times that the partition was lost to another process, and since when it is owned.
    yields: u32,
    owned_at: Option<Instant>,
    claim_not_before: Option<Instant>,
    /// A producer is in place that is not known to be broken.
    producer_ready: bool,
    /// A read is under way.
    reading: bool,
    read_not_before: Option<Instant>,
    /// What the last [`Output::Proven`] told.
    told: Offset,
    /// What [`Output::Owned`] or the last [`Output::CommandsSettled`] told.
    told_mark: Offset,
    streams: Streams,
    /// Streams whose first in the queue may be decided now.
    ready: Vec<StreamId>,
    /// Commits without a definite outcome, in the order of their records, all of one claim.
    pending: VecDeque<PendingCommit>,
    /// Decisions that wait for a record behind them, in the order of the records they wait for.
    confirms: VecDeque<PendingConfirm>,
    /// Visible commits that the index does not have: the offset behind each, and its events.
    unindexed: VecDeque<(Offset, usize)>,
    unindexed_events: usize,
    refused: LruCache<CommandId, String>,
    /// Requests without an answer, and the bytes of their commits.
    requests: usize,
    request_bytes: usize,
    /// No deadline lies before it.
    earliest_deadline: Option<Instant>,
    /// The deadline of what was asked now and is not looked at yet.
    asked_deadline: Option<Instant>,
    releasing: bool,
    /// The offset that the claim's report told, for [`Mutant::BaseFromReport`] alone.
    reported_base: Option<Offset>,
}

#[derive(Clone)]
enum Phase {
    New,
    /// As new, and the position to begin at is damaged.
    Unplaced(Cause),
    CatchingUp {
        caught_up: bool,
    },
    Claiming {
        claim: ClaimId,
        since: Instant,
    },
    Owning(Flight),
    /// Another claimed it: until then it is not claimed back.
    Superseded {
        by: Owner,
        until: Instant,
    },
    Halted(Cause),
    Released,
}

/// One call of [`PartitionWriter::handle`].
struct Turn<'a> {
    now: Instant,
    out: &'a mut Vec<Output>,
}

impl Turn<'_> {
    fn say(&mut self, output: Output) {
        self.out.push(output);
    }
}

impl PartitionWriter {
    /// A writer that waits for [`Input::Start`].
    pub fn new(config: WriterConfig, entropy: Entropy) -> Self {
        let partition = config.partition;
        let limits = &config.limits;
        let refused_max =
            NonZeroUsize::new(limits.refused_commands_max).unwrap_or(NonZeroUsize::MIN);
        Self {
            streams: Streams::new(limits.streams_max, limits.older_commands_bytes_max),
            refused: LruCache::new(refused_max),
            config,
            entropy,
            reader: CommitReader::new(partition, Checkpoint::default()),
            phase: Phase::New,
            has_claimed: false,
            claim_attempts: 0,
            yields: 0,
            owned_at: None,
            claim_not_before: None,
            producer_ready: true,
            reading: false,
            read_not_before: None,
            told: Offset(0),
            told_mark: Offset(0),
            ready: Vec::new(),
            pending: VecDeque::new(),
            confirms: VecDeque::new(),
            unindexed: VecDeque::new(),
            unindexed_events: 0,
            requests: 0,
            request_bytes: 0,
            earliest_deadline: None,
            asked_deadline: None,
            releasing: false,
            reported_base: None,
        }
    }

    /// Makes it new, for the next time that the partition is assigned.
    pub fn renew(&mut self) {
        let entropy = std::mem::replace(&mut self.entropy, Box::new(|| 0));
        *self = Self::new(self.config.clone(), entropy);
    }

    /// Sets the greatest size of a record from now on.
    pub fn limit_records(&mut self, bytes: usize) {
        self.config.limits.record_bytes_max = bytes;
    }

    /// Takes what happened at `now` and adds what is to be done, in order.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) {
        let turn = &mut Turn { now, out };
        match input {
            Input::Start(from) => self.start(from),
            Input::Records { records, end } => self.take_records(records, end, turn),
            Input::ReadFailed => self.read_failed(turn),
            Input::Submit { request, append } => self.submit(request, append, turn),
            Input::Confirm { request, view } => self.confirm(request, view, turn),
            Input::Loaded { stream, head } => self.loaded(stream, head, turn),
            Input::Found { stream, command_id, found } => {
                self.found(stream, command_id, found, turn);
            }
            Input::Report { claim, seq, result } => self.take_report(claim, seq, result, turn),
            Input::ProducerReady => self.producer_ready(turn),
            Input::Indexed(position) => self.indexed(position),
            Input::Tick => {}
            Input::Unplaced(cause) => self.unplaced(cause, turn),
            Input::Halt(cause) => self.halt(cause, turn),
            Input::CommandsMark { claim, mark, wanted } => self.commands_mark(claim, mark, wanted),
            Input::Release => self.release(turn),
            Input::Abandon => self.abandon(turn),
        }
        self.go_on(turn);
    }

    /// When [`Input::Tick`] is due at the latest.
    pub fn next_wake(&self) -> Option<Instant> {
        let limits = &self.config.limits;
        let (phase, read) = match &self.phase {
            Phase::CatchingUp { caught_up } => {
                let claim = self.claim_not_before.filter(|_| *caught_up && self.producer_ready);
                (claim, self.read_not_before)
            }
            Phase::Claiming { since, .. } => {
                (Some(*since + limits.report_timeout), self.read_not_before)
            }
            Phase::Owning(flight) => {
                let barrier = self
                    .barrier_wanted(flight)
                    .then(|| flight.barrier_due(limits.barrier_interval))
                    .flatten();
                let report = flight.waiting_since().map(|since| since + limits.report_timeout);
                let quiet = flight.quiet_since().map(|since| since + limits.quiet_time);
                (
                    earlier(barrier, report),
                    quiet.max(self.read_not_before.filter(|_| quiet.is_some())),
                )
            }
            Phase::Superseded { until, .. } => (Some(*until), None),
            Phase::New | Phase::Unplaced(_) | Phase::Halted(_) | Phase::Released => (None, None),
        };
        earlier(earlier(phase, read.filter(|_| !self.reading)), self.earliest_deadline)
    }

    /// Whether commands are taken.
    pub fn status(&self) -> Status {
        match &self.phase {
            Phase::New | Phase::Unplaced(_) | Phase::CatchingUp { .. } => Status::CatchingUp,
            Phase::Claiming { .. } => Status::Claiming,
            Phase::Owning(_) => Status::Owning,
            Phase::Superseded { by, .. } => Status::Superseded(by.clone()),
            Phase::Halted(cause) => Status::Halted(Arc::clone(cause)),
            Phase::Released => Status::Released,
        }
    }

    /// Whether commands are decided now.
    pub fn is_owning(&self) -> bool {
        matches!(self.phase, Phase::Owning(_))
    }

    /// What is due whatever happened.
    fn go_on(&mut self, turn: &mut Turn<'_>) {
        self.expire(turn);
        // That looked only at those who were there before.
        let asked = self.asked_deadline.take();
        self.note_deadline(asked);
        self.notice_missing_report(turn);
        self.come_back_if_due(turn);
        self.claim_if_due(turn);
        self.decide_ready(turn);
        self.barrier_if_due(turn);
        self.read_if_due(turn);
        self.released_if_settled(turn);
    }

    fn start(&mut self, from: Checkpoint) {
        if matches!(self.phase, Phase::New | Phase::Unplaced(_)) {
            self.told = from.next;
            self.reader = CommitReader::new(self.config.partition, from);
            self.phase = Phase::CatchingUp { caught_up: false };
        }
    }

    fn unplaced(&mut self, cause: Cause, turn: &mut Turn<'_>) {
        if matches!(self.phase, Phase::New | Phase::Unplaced(_)) {
            self.phase = Phase::Unplaced(cause);
            self.answer_waiting(turn);
        }
    }

    // --- reading -------------------------------------------------------------------------------

    fn take_records(&mut self, records: Vec<LogRecord>, end: Offset, turn: &mut Turn<'_>) {
        self.reading = false;
        if !self.reads() {
            return;
        }
        let none = records.is_empty();
        for record in records {
            // Proven by its report before it was read.
            if record.offset < self.reader.fold().next() {
                continue;
            }
            if !self.take_record(record, turn) {
                return;
            }
        }
        self.tell_progress(turn);
        if let Phase::CatchingUp { caught_up } = &mut self.phase {
            *caught_up = self.reader.fold().next() >= end;
            if none && !*caught_up {
                self.read_not_before = Some(turn.now + self.config.limits.read_retry);
            }
        }
    }

    /// Folds the next record; false when nothing more is to be read.
    fn take_record(&mut self, record: LogRecord, turn: &mut Turn<'_>) -> bool {
        let void_copy = mutant::active(Mutant::NotAppendedOnVoid).then(|| record.clone());
        match self.reader.read(record) {
            Ok(Read::Claim(id, claim)) => self.claim_accepted(id, &claim, turn),
            Ok(Read::Commit(commit)) => {
                self.was_read(&commit.stamp, turn);
                self.commit_visible(commit, turn);
            }
            Ok(Read::Open(stamp) | Read::Barrier(stamp)) => self.was_read(&stamp, turn),
            Ok(Read::Void(reason)) => {
                if let Some(record) = void_copy {
                    self.answer_void_copy(&record, turn);
                }
                let reason = format!("a void record ({}) stands in between", reason.name());
                self.doubt(reason, turn);
            }
            Err(diverged) => self.halt(Arc::new(diverged), turn),
        }
        self.reads()
    }

    /// A record was accepted by our own reading, which proves it as well as its report would.
    fn was_read(&mut self, stamp: &Stamp, turn: &mut Turn<'_>) {
        if let Phase::Owning(flight) = &mut self.phase
            && flight.claim == stamp.claim
        {
            flight.was_read(stamp.seq, turn.now);
            self.answer_confirms(turn);
            self.tell_mark(turn);
        }
    }

    /// Tells that the log says which forwarded commands are settled, when it says so of more.
    fn tell_mark(&mut self, turn: &mut Turn<'_>) {
        let mark = self.reader.fold().state().commands_mark;
        if mark > self.told_mark {
            self.told_mark = mark;
            turn.say(Output::CommandsSettled(mark));
        }
    }

    fn commands_mark(&mut self, claim: ClaimId, mark: Offset, wanted: bool) {
        if let Phase::Owning(flight) = &mut self.phase
            && flight.claim == claim
        {
            flight.mark_commands(mark, wanted);
        }
    }

    fn read_failed(&mut self, turn: &Turn<'_>) {
        self.reading = false;
        self.read_not_before = Some(turn.now + self.config.limits.read_retry);
    }

    fn reads(&self) -> bool {
        matches!(self.phase, Phase::CatchingUp { .. } | Phase::Claiming { .. } | Phase::Owning(_))
    }

    fn read_if_due(&mut self, turn: &mut Turn<'_>) {
        let limits = &self.config.limits;
        let due = |at: Option<Instant>| at.is_none_or(|at| at <= turn.now);
        let wait = match &self.phase {
            Phase::CatchingUp { caught_up: false } => Duration::ZERO,
            Phase::CatchingUp { caught_up: true } | Phase::Claiming { .. } => limits.read_wait,
            Phase::Owning(flight) => match flight.quiet_since() {
                Some(since) if since + limits.quiet_time <= turn.now => limits.read_wait,
                _ => return,
            },
            Phase::New
            | Phase::Unplaced(_)
            | Phase::Superseded { .. }
            | Phase::Halted(_)
            | Phase::Released => return,
        };
        if !self.reading && due(self.read_not_before) {
            self.reading = true;
            self.read_not_before = None;
            turn.say(Output::Read { from: self.reader.fold().next(), wait });
        }
    }

    /// Tells how far the fold is, when it went on without a commit.
    fn tell_progress(&mut self, turn: &mut Turn<'_>) {
        let next = self.reader.fold().checkpoint();
        if next.next > self.told {
            self.told = next.next;
            turn.say(Output::Proven(Proven { events: Vec::new(), next }));
        }
    }

    // --- reports -------------------------------------------------------------------------------

    fn take_report(
        &mut self,
        claim: ClaimId,
        seq: u64,
        result: Result<Option<Offset>, ReportFailure>,
        turn: &mut Turn<'_>,
    ) {
        match &mut self.phase {
            Phase::Claiming { claim: current, .. } if *current == claim && seq == 0 => match result
            {
                Ok(offset) => self.reported_base = offset,
                Err(failure) => self.report_failed(failure, turn),
            },
            Phase::Owning(flight)
                if flight.claim == claim && seq == 0 && mutant::active(Mutant::BaseFromReport) =>
            {
                flight.move_base(result.ok().flatten());
            }
            Phase::Owning(flight) if flight.claim == claim && seq > 0 => match result {
                Ok(offset) => match flight.report(seq, offset) {
                    Judgement::Good => self.take_proven(turn),
                    Judgement::Known => {}
                    Judgement::Doubt(reason) => self.doubt(reason, turn),
                },
                Err(failure) => {
                    self.note_failure(claim, seq, &failure, turn);
                    self.report_failed(failure, turn);
                }
            },
            // Of a claim that is over: its commits are settled by reading.
            _ => {
                if let Err(failure) = result {
                    self.note_failure(claim, seq, &failure, turn);
                }
            }
        }
    }

    fn report_failed(&mut self, failure: ReportFailure, turn: &mut Turn<'_>) {
        if failure.fatal && self.producer_ready {
            self.producer_ready = false;
            turn.say(Output::FreshProducer);
        }
        self.doubt(failure.reason, turn);
        if matches!(self.phase, Phase::Claiming { .. }) {
            self.retreat(turn);
        }
    }

    /// Folds what reports have proven, exactly as if it had been read.
    fn take_proven(&mut self, turn: &mut Turn<'_>) {
        while let Phase::Owning(flight) = &mut self.phase {
            let Some(record) = flight.next_reported(turn.now) else { break };
            self.claim_attempts = 0;
            match self.reader.read(record) {
                Ok(Read::Commit(commit)) => self.commit_visible(commit, turn),
                Ok(_) => {}
                Err(diverged) => return self.halt(Arc::new(diverged), turn),
            }
            self.answer_confirms(turn);
            self.tell_mark(turn);
        }
        self.tell_progress(turn);
    }

    /// Fresh or replaced: what the old producer had is lost from sight, so its claim is over.
    fn producer_ready(&mut self, turn: &mut Turn<'_>) {
        self.producer_ready = true;
        self.doubt("the producer was replaced".into(), turn);
        if matches!(self.phase, Phase::Claiming { .. }) {
            self.retreat(turn);
        }
    }

    fn notice_missing_report(&mut self, turn: &mut Turn<'_>) {
        if mutant::active(Mutant::ReportAwaitedForEver) {
            return;
        }
        let timeout = self.config.limits.report_timeout;
        match &self.phase {
            Phase::Claiming { since, .. } if *since + timeout <= turn.now => self.retreat(turn),
            Phase::Owning(flight)
                if flight.waiting_since().is_some_and(|since| since + timeout <= turn.now) =>
            {
                self.doubt(format!("a record has no report after {timeout:?}"), turn);
            }
            _ => {}
        }
    }

    // --- the end -------------------------------------------------------------------------------

    fn halt(&mut self, cause: Cause, turn: &mut Turn<'_>) {
        if matches!(self.phase, Phase::Halted(_) | Phase::Released) {
            return;
        }
        self.phase = Phase::Halted(Arc::clone(&cause));
        turn.say(Output::Halted(cause));
        self.answer_everybody(turn);
    }

    fn release(&mut self, turn: &mut Turn<'_>) {
        self.releasing = true;
        self.answer_waiting(turn);
        self.fail_confirms(turn);
    }

    fn abandon(&mut self, turn: &mut Turn<'_>) {
        self.releasing = true;
        self.answer_everybody(turn);
    }

    fn released_if_settled(&mut self, turn: &mut Turn<'_>) {
        if self.releasing && self.pending.is_empty() && !matches!(self.phase, Phase::Released) {
            self.phase = Phase::Released;
            turn.say(Output::Released);
        }
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// A sentence as the cause of an error.
trait IntoCause {
    fn into_cause(self) -> Cause;
}

impl<T: Into<Box<dyn std::error::Error + Send + Sync>>> IntoCause for T {
    fn into_cause(self) -> Cause {
        self.into().into()
    }
}

#[cfg(test)]
mod tests;

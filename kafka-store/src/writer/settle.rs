//! From an accepted record to answers.

use std::time::{Duration, Instant};

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Appended;
use kafold_core::{AppendError, CommandId, ExpectedVersion, Offset, StreamId, Version};

use super::messages::{Output, Proven, ReportFailure, RequestId};
use super::streams::{Ask, Waiting};
use super::{Flight, PartitionWriter, Phase, Turn};
use crate::fold::ReadCommit;
use crate::wire::{Body, ClaimId, Content, LogRecord, Record};

/// Deadlines that pass within this time are answered together: looking for them costs a walk over
/// all who wait.
const DEADLINE_GRAIN: Duration = Duration::from_millis(10);

/// A commit that was produced and has no definite outcome. It outlives its callers' deadlines.
#[derive(Debug, Clone)]
pub(super) struct PendingCommit {
    pub(super) claim: ClaimId,
    pub(super) last_seq: u64,
    pub(super) stream: StreamId,
    pub(super) command_id: CommandId,
    pub(super) bytes: usize,
    /// Those who still wait; maybe none.
    pub(super) waiters: Vec<Waiter>,
    /// The broker refused one of its records for good.
    pub(super) refused: Option<String>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Waiter {
    pub(super) request: RequestId,
    pub(super) deadline: Option<Instant>,
    /// A retry, attached to the first one's outcome.
    pub(super) duplicate: bool,
}

/// A decision that holds if a record behind it is proven under the same claim.
#[derive(Debug, Clone)]
pub(super) struct PendingConfirm {
    pub(super) waiter: Waiter,
    pub(super) question: Question,
    pub(super) stream: StreamId,
    /// The stream's version behind the record `behind`.
    pub(super) actual: Version,
    /// The last seq that was produced when the question was asked.
    pub(super) behind: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Question {
    /// Is the stream still at this version?
    View(Version),
    /// The first append in the stream's queue expects more than we have: is that a conflict?
    Conflict,
}

impl PartitionWriter {
    /// A commit became visible: whoever waits for it is answered, if it is ours.
    pub(super) fn commit_visible(&mut self, commit: ReadCommit, turn: &mut Turn<'_>) {
        let Some(last) = commit.events.last() else { return };
        let appended =
            Appended { version: last.version, position: last.position, duplicate: false };
        let id = last.stream.clone();
        let first = commit.events[0].position.offset;
        let pending = self.pending.front().is_some_and(|pending| {
            pending.claim == commit.stamp.claim && pending.last_seq == commit.stamp.seq
        });
        let pending = if pending { self.pending.pop_front() } else { None };
        let recent_max = self.config.limits.recent_commands_max;
        let learned = self.streams.learn(&id, |stream| {
            if pending.is_some() {
                stream.pending.pop_front();
            } else {
                stream.last = None;
            }
            stream.push(&commit.events, recent_max)?;
            Ok(!stream.waiting.is_empty())
        });
        match learned {
            Some(Err(broken)) => return self.halt_at(first, id, &broken, turn),
            Some(Ok(true)) => self.ready.push(id),
            Some(Ok(false)) | None => {}
        }
        let next = self.reader.fold().checkpoint();
        self.told = next.next;
        self.unindexed.push_back((next.next, commit.events.len()));
        self.unindexed_events += commit.events.len();
        turn.say(Output::Proven(Proven { events: commit.events, next }));
        if let Some(pending) = pending {
            self.request_bytes -= pending.bytes;
            for waiter in pending.waiters {
                let result = Ok(Appended { duplicate: waiter.duplicate, ..appended });
                self.answer_append(waiter.request, 0, result, turn);
            }
        }
    }

    /// The claim of everything pending is over, and no copy was accepted: it never will be.
    pub(super) fn fail_pending(&mut self, turn: &mut Turn<'_>) {
        for pending in std::mem::take(&mut self.pending) {
            if let Some(stream) = self.streams.get_mut(&pending.stream) {
                stream.pending.pop_front();
                if !mutant::active(Mutant::PendingOutlivesClaim) {
                    stream.last = None;
                }
            }
            self.ready.push(pending.stream.clone());
            self.request_bytes -= pending.bytes;
            let reason = match pending.refused {
                Some(refused) => {
                    self.refused.put(pending.command_id, refused.clone());
                    format!("the broker refused it: {refused}")
                }
                None => "its writer lost the partition before it reached the log".into(),
            };
            for waiter in pending.waiters {
                let result = Err(AppendError::NotAppended { reason: reason.clone() });
                self.answer_append(waiter.request, 0, result, turn);
            }
        }
    }

    pub(super) fn attach(&mut self, last_seq: u64, waiter: Waiter) {
        let place = self.pending.partition_point(|pending| pending.last_seq < last_seq);
        if let Some(pending) = self.pending.get_mut(place) {
            pending.waiters.push(waiter);
        }
    }

    /// Remembers what the broker refuses for good, so that it is not proposed again.
    pub(super) fn note_failure(
        &mut self,
        claim: ClaimId,
        seq: u64,
        failure: &ReportFailure,
        turn: &mut Turn<'_>,
    ) {
        let place = self.pending.partition_point(|pending| pending.last_seq < seq);
        let Some(pending) = self.pending.get_mut(place).filter(|found| found.claim == claim) else {
            return;
        };
        if failure.refused {
            pending.refused = Some(failure.reason.clone());
        }
        if mutant::active(Mutant::NotAppendedOnFailure) {
            self.answer_pending_at(place, turn);
        }
    }

    /// For [`Mutant::NotAppendedOnVoid`].
    pub(super) fn answer_void_copy(&mut self, record: &LogRecord, turn: &mut Turn<'_>) {
        if let Content::Ours(Record { stamp, body: Body::Event(_) }) = &record.content {
            let place = self.pending.partition_point(|pending| pending.last_seq < stamp.seq);
            if self.pending.get(place).is_some_and(|found| found.claim == stamp.claim) {
                self.answer_pending_at(place, turn);
            }
        }
    }

    fn answer_pending_at(&mut self, place: usize, turn: &mut Turn<'_>) {
        for waiter in std::mem::take(&mut self.pending[place].waiters) {
            let result = Err(AppendError::NotAppended { reason: "a mutant's guess".into() });
            self.answer_append(waiter.request, 0, result, turn);
        }
    }

    // --- confirms ------------------------------------------------------------------------------

    /// Whether no record that is in flight will answer the last confirm, or say of forwarded commands
    /// what somebody waits for.
    pub(super) fn barrier_wanted(&self, flight: &Flight) -> bool {
        flight.mark_is_due()
            || self.confirms.back().is_some_and(|last| last.behind >= flight.last_seq())
    }

    pub(super) fn barrier_if_due(&mut self, turn: &mut Turn<'_>) {
        let Phase::Owning(flight) = &self.phase else { return };
        if !self.barrier_wanted(flight) {
            return;
        }
        let interval = self.config.limits.barrier_interval;
        let Phase::Owning(flight) = &mut self.phase else { return };
        if let Some(record) = flight.push_barrier(interval, turn.now) {
            turn.say(Output::Produce(record));
        }
    }

    /// Answers those behind whose decision a record is proven.
    pub(super) fn answer_confirms(&mut self, turn: &mut Turn<'_>) {
        let Phase::Owning(flight) = &self.phase else { return };
        let early = u64::from(mutant::active(Mutant::ConfirmByEarlierRecord));
        let proven = flight.proven() + early;
        while let Some(first) = self.confirms.front()
            && first.behind < proven
        {
            let Some(PendingConfirm { waiter, question, stream, actual, .. }) =
                self.confirms.pop_front()
            else {
                return;
            };
            let request = waiter.request;
            match question {
                Question::View(version) if version == actual => {
                    self.answer_confirm(request, Ok(()), turn);
                }
                Question::View(version) => {
                    let expected = ExpectedVersion::Exact(version);
                    let conflict = AppendError::Conflict { stream, expected, actual };
                    self.answer_confirm(request, Err(conflict), turn);
                }
                Question::Conflict => self.conflict_confirmed(request, stream, actual, turn),
            }
        }
    }

    /// No decision outlives its claim.
    pub(super) fn fail_confirms(&mut self, turn: &mut Turn<'_>) {
        for confirm in std::mem::take(&mut self.confirms) {
            let error = self.refusal().unwrap_or_else(|| AppendError::NotAppended {
                reason: "the partition's ownership came into doubt: decide again".into(),
            });
            self.answer_question(&confirm, error, turn);
        }
    }

    fn answer_question(
        &mut self,
        confirm: &PendingConfirm,
        error: AppendError,
        turn: &mut Turn<'_>,
    ) {
        match confirm.question {
            Question::View(_) => self.answer_confirm(confirm.waiter.request, Err(error), turn),
            // Nothing was answered or produced: it is decided anew under the next claim.
            Question::Conflict => self.stop_asking(&confirm.stream),
        }
    }

    fn stop_asking(&mut self, id: &StreamId) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.asking = false;
            self.ready.push(id.clone());
        }
    }

    /// We are not stale: the append expects a version that the stream does not have.
    fn conflict_confirmed(
        &mut self,
        request: RequestId,
        id: StreamId,
        actual: Version,
        turn: &mut Turn<'_>,
    ) {
        self.stop_asking(&id);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        // Its deadline may have taken it away meanwhile.
        let Some(first) = stream.waiting.pop_front_if(|first| first.request == request) else {
            return;
        };
        if let Ask::Append(append) = first.ask {
            let expected = append.expected;
            let conflict = AppendError::Conflict { stream: id, expected, actual };
            self.answer_append(request, first.bytes, Err(conflict), turn);
        }
    }

    // --- answers -------------------------------------------------------------------------------

    /// `bytes` are those that were still counted for the request itself.
    pub(super) fn answer_append(
        &mut self,
        request: RequestId,
        bytes: usize,
        result: Result<Appended, AppendError>,
        turn: &mut Turn<'_>,
    ) {
        self.requests -= 1;
        self.request_bytes -= bytes;
        turn.say(Output::Appended { request, result });
    }

    pub(super) fn answer_confirm(
        &mut self,
        request: RequestId,
        result: Result<(), AppendError>,
        turn: &mut Turn<'_>,
    ) {
        self.requests -= 1;
        turn.say(Output::Confirmed { request, result });
    }

    pub(super) fn answer_waiting_one(
        &mut self,
        waiting: Waiting,
        error: &AppendError,
        turn: &mut Turn<'_>,
    ) {
        let Waiting { request, ask, bytes, .. } = waiting;
        match ask {
            Ask::Append(_) => self.answer_append(request, bytes, Err(error.clone()), turn),
            Ask::Confirm(_) => self.answer_confirm(request, Err(error.clone()), turn),
        }
    }

    /// Those of whom nothing was produced, when the writer takes nothing any more.
    pub(super) fn answer_waiting(&mut self, turn: &mut Turn<'_>) {
        let Some(refusal) = self.refusal() else { return };
        self.list_ready();
        for waiting in self.streams.take_waiting() {
            self.answer_waiting_one(waiting, &refusal, turn);
        }
    }

    /// Everybody, when the writer goes on no more. What is still pending then is unknown.
    pub(super) fn answer_everybody(&mut self, turn: &mut Turn<'_>) {
        self.answer_waiting(turn);
        self.fail_confirms(turn);
        for pending in std::mem::take(&mut self.pending) {
            self.request_bytes -= pending.bytes;
            for waiter in pending.waiters {
                let command_id = pending.command_id;
                let result = Err(AppendError::OutcomeUnknown { command_id });
                self.answer_append(waiter.request, 0, result, turn);
            }
        }
    }

    /// Answers those whose deadline has passed; what was produced goes on without them.
    pub(super) fn expire(&mut self, turn: &mut Turn<'_>) {
        if self.earliest_deadline.is_none_or(|earliest| earliest > turn.now) {
            return;
        }
        self.earliest_deadline = None;
        let now = turn.now;
        let over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let mut unknown = Vec::new();
        for pending in &mut self.pending {
            let command_id = pending.command_id;
            let expired = pending.waiters.extract_if(.., |waiter| over(waiter.deadline));
            unknown.extend(expired.map(|waiter| (waiter.request, command_id)));
        }
        for (request, command_id) in unknown {
            let result = Err(AppendError::OutcomeUnknown { command_id });
            self.answer_append(request, 0, result, turn);
        }
        let (expired, confirms) = std::mem::take(&mut self.confirms)
            .into_iter()
            .partition::<Vec<_>, _>(|confirm| over(confirm.waiter.deadline));
        self.confirms = confirms.into();
        for confirm in expired {
            let error = self.expired();
            self.answer_question(&confirm, error, turn);
        }
        for id in self.streams.waiting.clone() {
            self.expire_waiting(&id, turn);
        }
        self.earliest_deadline = self.next_deadline().map(|next| next.max(now + DEADLINE_GRAIN));
    }

    fn expire_waiting(&mut self, id: &StreamId, turn: &mut Turn<'_>) {
        let Some(mut stream) = self.streams.take(id) else { return };
        let waiting = std::mem::take(&mut stream.waiting);
        for waiting in waiting {
            if waiting.deadline.is_none_or(|deadline| deadline > turn.now) {
                stream.waiting.push_back(waiting);
                continue;
            }
            // What is known of the command goes before its deadline.
            let command = match &waiting.ask {
                Ask::Append(append) => Some(append.commit.command_id()),
                Ask::Confirm(_) => None,
            };
            let found = command.and_then(|id| stream.known().and_then(|known| known.find(id)));
            let is_pending = |id| stream.pending.iter().any(|(pending, _)| *pending == id);
            let result = match (found, command) {
                (Some(found), _) => Ok(Appended {
                    version: found.version,
                    position: found.position,
                    duplicate: true,
                }),
                (None, Some(command_id)) if is_pending(command_id) => {
                    Err(AppendError::OutcomeUnknown { command_id })
                }
                (None, _) => Err(self.expired()),
            };
            match (command, result) {
                (Some(_), result) => {
                    self.answer_append(waiting.request, waiting.bytes, result, turn);
                }
                (None, result) => {
                    self.answer_confirm(waiting.request, result.map(|_| ()), turn);
                }
            }
        }
        self.streams.put(id, stream);
        self.ready.push(id.clone());
    }

    fn next_deadline(&mut self) -> Option<Instant> {
        let mut earliest = None;
        for waiter in self.pending.iter().flat_map(|pending| &pending.waiters) {
            earliest = super::earlier(earliest, waiter.deadline);
        }
        for confirm in &self.confirms {
            earliest = super::earlier(earliest, confirm.waiter.deadline);
        }
        for id in &self.streams.waiting {
            let waiting = self.streams.peek(id).into_iter().flat_map(|stream| &stream.waiting);
            earliest = waiting.fold(earliest, |so_far, one| super::earlier(so_far, one.deadline));
        }
        earliest
    }

    // --- the index -----------------------------------------------------------------------------

    pub(super) fn indexed(&mut self, position: Offset) {
        while let Some((end, events)) = self.unindexed.front()
            && *end <= position
        {
            self.unindexed_events -= events;
            self.unindexed.pop_front();
        }
    }
}

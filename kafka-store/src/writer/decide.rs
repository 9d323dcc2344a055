//! From a submission to its records, an answer, or a wait.

use std::sync::Arc;

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Append, Appended, View};
use kafold_core::{AppendError, CommandId, ExpectedVersion, RecordedEvent, StreamId, Version};

use super::messages::{Output, RequestId};
use super::settle::{PendingCommit, PendingConfirm, Question, Waiter};
use super::streams::{Ask, Knowledge, Stream, Waiting};
use super::{PartitionWriter, Phase, Turn};
use crate::wire::{Body, EventBody, stored_time};

impl PartitionWriter {
    /// Decides what can be decided, stream by stream, in the order of the calls within each.
    pub(super) fn decide_ready(&mut self, turn: &mut Turn<'_>) {
        while let Some(id) = self.next_ready() {
            if !matches!(self.phase, Phase::Owning(_)) {
                // All that wait become ready with the next claim.
                self.ready.push(id);
                return self.list_ready();
            }
            let Some(mut stream) = self.streams.take(&id) else { continue };
            while let Some(first) = stream.waiting.pop_front() {
                if let Some(blocked) = self.decide(&id, &mut stream, first, turn) {
                    stream.waiting.push_front(blocked);
                    break;
                }
            }
            self.streams.put(&id, stream);
        }
    }

    /// Nothing is decided now: whoever waits is found among those who wait.
    pub(super) fn list_ready(&mut self) {
        for id in std::mem::take(&mut self.ready) {
            self.streams.list(&id);
        }
    }

    /// A stream to look at: where something changed, or whose turn it is to look up.
    fn next_ready(&mut self) -> Option<StreamId> {
        if let Some(id) = self.ready.pop() {
            return Some(id);
        }
        if self.streams.lookups >= self.config.limits.loads_max {
            return None;
        }
        let id = self.streams.lookup_queue.pop_front()?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.queued = false;
        }
        Some(id)
    }

    /// Decides the first in a stream's queue, or hands it back if it must wait.
    fn decide(
        &mut self,
        id: &StreamId,
        stream: &mut Stream,
        first: Waiting,
        turn: &mut Turn<'_>,
    ) -> Option<Waiting> {
        let version = match &stream.knowledge {
            Knowledge::Known(_) if stream.asking => return Some(first),
            Knowledge::Known(known) => known.version,
            Knowledge::Loading(_) => return Some(first),
            Knowledge::Unknown => {
                if self.take_lookup(id, stream) {
                    stream.knowledge = Knowledge::Loading(Vec::new());
                    turn.say(Output::Load { stream: id.clone() });
                }
                return Some(first);
            }
        };
        let Waiting { request, ask, deadline, bytes } = first;
        match ask {
            Ask::Confirm(view) => {
                if let Some(result) = self.decide_confirm(request, &view, stream, version, turn) {
                    self.answer_confirm(request, result, turn);
                }
                None
            }
            Ask::Append(append) => {
                let decision = self.decide_append(id, &append, stream, version, turn);
                let duplicate = matches!(decision, Decision::Attach(_));
                let waiter = Waiter { request, deadline, duplicate };
                match decision {
                    Decision::Wait => {
                        return Some(Waiting {
                            request,
                            ask: Ask::Append(append),
                            deadline,
                            bytes,
                        });
                    }
                    Decision::ConflictOnceConfirmed => {
                        stream.asking = true;
                        let waiter = Waiter { deadline: None, ..waiter };
                        self.ask_log(waiter, Question::Conflict, id, version);
                        return Some(Waiting {
                            request,
                            ask: Ask::Append(append),
                            deadline,
                            bytes,
                        });
                    }
                    Decision::Answer(result) => self.answer_append(request, bytes, result, turn),
                    Decision::Attach(last_seq) => {
                        self.request_bytes -= bytes;
                        self.attach(last_seq, waiter);
                    }
                    Decision::Produce => self.produce(stream, &append, waiter, bytes, turn),
                }
                None
            }
        }
    }

    fn decide_append(
        &mut self,
        id: &StreamId,
        append: &Append,
        stream: &mut Stream,
        version: Version,
        turn: &mut Turn<'_>,
    ) -> Decision {
        if let Some(decision) = self.deduplicate(id, append.commit.command_id(), stream, turn) {
            return decision;
        }
        if append.deadline.is_some_and(|deadline| deadline <= turn.now) {
            return Decision::Answer(Err(self.expired()));
        }
        if let Some(reason) = self.refused.get(&append.commit.command_id()) {
            let reason = format!("the broker refused this command's records before: {reason}");
            return Decision::Answer(Err(AppendError::NotAppended { reason }));
        }
        let expected = append.expected.version();
        let conflict = |actual| {
            let (stream, expected) = (append.stream.clone(), append.expected);
            Decision::Answer(Err(AppendError::Conflict { stream, expected, actual }))
        };
        if expected.is_some_and(|expected| expected < version) {
            return conflict(version);
        }
        if let Some(after) = append.after {
            // Only directly behind the commit whose events the decision saw.
            return match stream.last {
                Some((last, end)) if last == after && append.expected.admits(end) => {
                    Decision::Produce
                }
                _ => Decision::Answer(Err(not_behind())),
            };
        }
        match expected {
            None => Decision::Produce,
            // The pending commits may fail: only then does the version stand.
            Some(expected) if !stream.pending.is_empty() => {
                if mutant::active(Mutant::ConflictFromPending) {
                    return if expected < stream.pending_version {
                        conflict(stream.pending_version)
                    } else {
                        Decision::Wait
                    };
                }
                Decision::Wait
            }
            // We may be the stale one.
            Some(expected) if expected > version => {
                if mutant::active(Mutant::ConflictUnconfirmed) {
                    return conflict(version);
                }
                Decision::ConflictOnceConfirmed
            }
            Some(_) => Decision::Produce,
        }
    }

    /// Whether the command is in the stream already: before deadline and decision.
    fn deduplicate(
        &mut self,
        id: &StreamId,
        command_id: CommandId,
        stream: &mut Stream,
        turn: &mut Turn<'_>,
    ) -> Option<Decision> {
        if mutant::active(Mutant::DedupeOff) {
            return None;
        }
        let known = stream.known()?;
        let excluded = known.excludes(command_id);
        if let Some(found) = known.find(command_id) {
            let (version, position) = (found.version, found.position);
            return Some(Decision::Answer(Ok(Appended { version, position, duplicate: true })));
        }
        if let Some((_, seq)) = stream.pending.iter().find(|(command, _)| *command == command_id) {
            return Some(Decision::Attach(*seq));
        }
        if excluded || stream.not_found == Some(command_id) {
            return None;
        }
        if stream.finding.is_none() && self.take_lookup(id, stream) {
            stream.finding = Some(command_id);
            turn.say(Output::Find { stream: id.clone(), command_id });
        }
        Some(Decision::Wait)
    }

    /// The answer to a confirm, or `None` when a record behind it will give it.
    fn decide_confirm(
        &mut self,
        request: RequestId,
        view: &View,
        stream: &Stream,
        version: Version,
        turn: &Turn<'_>,
    ) -> Option<Result<(), AppendError>> {
        if view.deadline.is_some_and(|deadline| deadline <= turn.now) {
            return Some(Err(self.expired()));
        }
        if view.version < version {
            let expected = ExpectedVersion::Exact(view.version);
            let stream = view.stream.clone();
            return Some(Err(AppendError::Conflict { stream, expected, actual: version }));
        }
        if view.after.is_some_and(|after| stream.last != Some((after, view.version))) {
            return Some(Err(not_behind()));
        }
        if mutant::active(Mutant::ConfirmWithoutBarrier) {
            return Some(Ok(()));
        }
        let behind_pending =
            if stream.pending.is_empty() { version } else { stream.pending_version };
        let waiter = Waiter { request, deadline: view.deadline, duplicate: false };
        self.ask_log(waiter, Question::View(view.version), &view.stream, behind_pending);
        None
    }

    /// Waits for the first proven record behind all that are produced now: then the stream was at
    /// `actual` after this call, or its claim is over.
    fn ask_log(&mut self, waiter: Waiter, question: Question, stream: &StreamId, actual: Version) {
        let Phase::Owning(flight) = &self.phase else { return };
        let behind = flight.last_seq();
        let stream = stream.clone();
        self.confirms.push_back(PendingConfirm { waiter, question, stream, actual, behind });
    }

    fn produce(
        &mut self,
        stream: &mut Stream,
        append: &Append,
        waiter: Waiter,
        bytes: usize,
        turn: &mut Turn<'_>,
    ) {
        let Phase::Owning(flight) = &mut self.phase else { return };
        let partition = self.config.partition;
        let before = if stream.pending.is_empty() {
            stream.known().map_or(Version::EMPTY, |known| known.version)
        } else {
            stream.pending_version
        };
        let commit = &append.commit;
        let command_id = commit.command_id();
        // A commit has at most u16::MAX events.
        let count = commit.events().len() as u16;
        for (index, event) in (0..count).zip(commit.events()) {
            let mut metadata = event.metadata.clone();
            metadata.recorded_at = stored_time(metadata.recorded_at);
            let event = Arc::new(RecordedEvent {
                stream: append.stream.clone(),
                version: before.plus(u64::from(index) + 1),
                position: kafold_core::Position { partition, offset: flight.next_offset() },
                command_id,
                event_type: Arc::clone(&event.event_type),
                payload: Arc::clone(&event.payload),
                metadata,
            });
            let body = Body::Event(EventBody { index, count, event });
            turn.say(Output::Produce(flight.push(body, turn.now)));
        }
        let end = before.plus(u64::from(count));
        let last_seq = flight.last_seq();
        stream.pending.push_back((command_id, last_seq));
        stream.pending_version = end;
        stream.last = Some((append.ticket, end));
        let claim = flight.claim;
        let mut waiters = vec![waiter];
        if mutant::active(Mutant::AckOnEnqueue) {
            let position = kafold_core::Position {
                partition,
                offset: kafold_core::Offset(flight.next_offset().0 - 1),
            };
            waiters.clear();
            let result = Ok(Appended { version: end, position, duplicate: false });
            self.answer_append(waiter.request, 0, result, turn);
        }
        self.pending.push_back(PendingCommit {
            claim,
            last_seq,
            stream: append.stream.clone(),
            command_id,
            bytes,
            waiters,
            refused: None,
        });
    }
}

/// What becomes of the first append in a stream's queue.
enum Decision {
    /// It stays the first until something changes.
    Wait,
    Answer(Result<Appended, AppendError>),
    /// It shares the outcome of the pending commit with this last seq.
    Attach(u64),
    Produce,
    /// A conflict if we still own the partition.
    ConflictOnceConfirmed,
}

fn not_behind() -> AppendError {
    let reason = "the commit it was built on was not appended as the last one of its stream";
    AppendError::NotAppended { reason: reason.into() }
}

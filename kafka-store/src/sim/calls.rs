//! The callers of a simulated history, and the check of every answer they get.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use kafold_core::store::{Append, Appended, Ticket, View};
use kafold_core::{
    AppendError, CommandId, Commit, ExpectedVersion, Metadata, NewEvent, RecordedEvent, StreamId,
    Version,
};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::coverage::State;
use super::reference::{Reference, Violation, is_conflict};
use super::world::{Cause, World};
use crate::wire::{Body, Record};
use crate::writer::{Input, RequestId};

/// Calls in flight at most.
const CALLS_MAX: usize = 12;
pub(super) const STREAMS: u64 = 3;

#[derive(Default)]
pub(super) struct Calls {
    open: BTreeMap<RequestId, Call>,
    requests: u64,
    commands: Vec<(CommandId, StreamId)>,
    /// The events that were produced, which tells the attempts of one command apart.
    produced: BTreeSet<Uuid>,
    /// Answers that say: what this node produced of this command until then is not in the log.
    denied: Vec<(usize, CommandId, u64)>,
    /// The last submission of each node: to build on, while its outcome is not known.
    last: BTreeMap<usize, (StreamId, Ticket, Version)>,
}

struct Call {
    incarnation: usize,
    stream: StreamId,
    /// The stream's version when the call began.
    version_before: Version,
    ask: Ask,
    /// The handler that waits for the answer, if one does.
    tell: Option<Tell>,
}

enum Tell {
    Appended(oneshot::Sender<Result<Appended, AppendError>>),
    Confirmed(oneshot::Sender<Result<(), AppendError>>),
}

enum Ask {
    Append {
        command_id: CommandId,
        first_event: Uuid,
        built_on: Option<Ticket>,
        expected: ExpectedVersion,
        deadline: Option<Instant>,
    },
    Confirm {
        version: Version,
    },
}

impl Calls {
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    pub(super) fn know(&mut self, command_id: CommandId, stream: &StreamId) {
        self.commands.push((command_id, stream.clone()));
    }

    pub(super) fn open_of(&self, incarnation: usize) -> usize {
        self.open.values().filter(|call| call.incarnation == incarnation).count()
    }

    /// The node crashed: its callers know nothing.
    pub(super) fn abandon(&mut self, incarnation: usize) {
        self.open.retain(|_, call| call.incarnation != incarnation);
    }

    pub(super) fn produced(&mut self, record: &Record) {
        if let Body::Event(body) = &record.body {
            self.produced.insert(body.event.metadata.event_id);
        }
    }

    /// What was answered as not appended stays out of the log for ever.
    pub(super) fn check_denied(&self, truth: &Reference) -> Result<(), Violation> {
        for (by, command_id, until) in &self.denied {
            if let Some(accepted) = truth.commits.get(command_id)
                && accepted.by == *by
                && accepted.produced_at <= *until
            {
                return Err(format!(
                    "command {command_id} of node {by} is in the log at {} though that was denied",
                    accepted.offset
                ));
            }
        }
        Ok(())
    }
}

impl World {
    /// Somebody wants something of some node.
    pub(super) fn call(&mut self) -> Result<(), Violation> {
        if self.calls.open.len() >= CALLS_MAX {
            return Ok(());
        }
        let Some(at) = self.pick(|_| true) else { return Ok(()) };
        match self.random.below(14) {
            10.. => {
                self.call_handler(at);
                Ok(())
            }
            0..=2 => self.call_confirm(at),
            3 => self.call_chain(at),
            4 => self.call_again(at),
            _ => {
                let stream = self.any_stream();
                let command_id = CommandId(Uuid::from_u128(self.random.next().into()));
                self.calls.commands.push((command_id, stream.clone()));
                self.call_append(at, stream, command_id)
            }
        }
    }

    fn any_stream(&mut self) -> StreamId {
        let name = self.random.below(STREAMS).to_string();
        StreamId::new("s", &name).expect("valid")
    }

    /// What a handler does: read, decide, append.
    fn call_append(
        &mut self,
        at: usize,
        stream: StreamId,
        command_id: CommandId,
    ) -> Result<(), Violation> {
        let Some(version) = self.read(at, &stream)? else { return Ok(()) };
        let expected = match self.random.below(10) {
            0 | 1 => ExpectedVersion::Any,
            2 => ExpectedVersion::Exact(version.plus(1 + self.random.below(2))),
            3 => ExpectedVersion::Exact(Version(version.0.saturating_sub(1))),
            _ => ExpectedVersion::Exact(version),
        };
        let count = 1 + self.random.below(3);
        let ticket = Ticket::next();
        let end = expected.version().unwrap_or(version).plus(count);
        let incarnation = self.nodes[at].incarnation;
        self.calls.last.insert(incarnation, (stream.clone(), ticket, end));
        self.submit(at, stream, expected, command_id, count, (ticket, None))
    }

    /// Another append or confirm on the state behind the last submission.
    fn call_chain(&mut self, at: usize) -> Result<(), Violation> {
        let incarnation = self.nodes[at].incarnation;
        let Some((stream, after, version)) = self.calls.last.get(&incarnation).cloned() else {
            return Ok(());
        };
        if self.random.chance(40) {
            return self.confirm(at, stream, version, Some(after));
        }
        let command_id = CommandId(Uuid::from_u128(self.random.next().into()));
        self.calls.commands.push((command_id, stream.clone()));
        let (ticket, count) = (Ticket::next(), 1 + self.random.below(2));
        self.calls.last.insert(incarnation, (stream.clone(), ticket, version.plus(count)));
        let expected = ExpectedVersion::Exact(version);
        self.submit(at, stream, expected, command_id, count, (ticket, Some(after)))
    }

    /// One of the last commands of the stream.
    pub(super) fn any_command_of(&mut self, stream: &StreamId) -> Option<CommandId> {
        let of = self.calls.commands.iter().rev().filter(|(_, known)| known == stream).take(6);
        let recent: Vec<_> = of.map(|(command_id, _)| *command_id).collect();
        (!recent.is_empty()).then(|| recent[self.random.index(recent.len())])
    }

    /// A command is sent again, whatever became of it.
    fn call_again(&mut self, at: usize) -> Result<(), Violation> {
        if self.calls.commands.is_empty() {
            return Ok(());
        }
        let recent = self.calls.commands.len().min(12);
        let place = self.calls.commands.len() - 1 - self.random.index(recent);
        let (command_id, stream) = self.calls.commands[place].clone();
        self.call_append(at, stream, command_id)
    }

    fn call_confirm(&mut self, at: usize) -> Result<(), Violation> {
        let stream = self.any_stream();
        let Some(version) = self.read(at, &stream)? else { return Ok(()) };
        self.confirm(at, stream, version, None)
    }

    /// A stream's version as a caller of the node sees it.
    fn read(&mut self, at: usize, stream: &StreamId) -> Result<Option<Version>, Violation> {
        let events = self.read_events(at, stream)?;
        Ok(events.map(|events| Version(events.len() as u64)))
    }

    /// A stream as a caller of the node sees it, which must be true of the log.
    pub(super) fn read_events(
        &mut self,
        at: usize,
        stream: &StreamId,
    ) -> Result<Option<Vec<RecordedEvent>>, Violation> {
        let Ok(events) = self.nodes[at].read_stream(&self.index, stream) else { return Ok(None) };
        let truth = self.truth.streams.get(stream).map_or(&[][..], Vec::as_slice);
        let is_prefix = events.len() <= truth.len()
            && events.iter().zip(truth).all(|(read, accepted)| *read == **accepted);
        if !is_prefix {
            return Err(format!("{stream} reads as {events:?}, the log has {truth:?}"));
        }
        Ok(Some(events))
    }

    fn submit(
        &mut self,
        at: usize,
        stream: StreamId,
        expected: ExpectedVersion,
        command_id: CommandId,
        count: u64,
        (ticket, after): (Ticket, Option<Ticket>),
    ) -> Result<(), Violation> {
        let deadline = self.any_deadline();
        let events: Vec<_> = (0..count).map(|index| new_event(index, &mut self.random)).collect();
        let first_event = events[0].metadata.event_id;
        let commit = Commit::new(command_id, events).expect("1 to 3 events");
        let append = Append { stream: stream.clone(), expected, commit, ticket, after, deadline };
        let request = self.open(
            at,
            stream,
            Ask::Append { command_id, first_event, built_on: after, expected, deadline },
            None,
        );
        self.give(at, Input::Submit { request, append })
    }

    /// What a handler has decided.
    pub(super) fn submit_of_handler(
        &mut self,
        at: usize,
        append: Append,
        tell: oneshot::Sender<Result<Appended, AppendError>>,
    ) -> Result<(), Violation> {
        let ask = Ask::Append {
            command_id: append.commit.command_id(),
            first_event: append.commit.events()[0].metadata.event_id,
            built_on: append.after,
            expected: append.expected,
            deadline: append.deadline,
        };
        let request = self.open(at, append.stream.clone(), ask, Some(Tell::Appended(tell)));
        self.give(at, Input::Submit { request, append })
    }

    /// What a handler wants to know before it refuses.
    pub(super) fn confirm_of_handler(
        &mut self,
        at: usize,
        view: View,
        tell: oneshot::Sender<Result<(), AppendError>>,
    ) -> Result<(), Violation> {
        let ask = Ask::Confirm { version: view.version };
        let request = self.open(at, view.stream.clone(), ask, Some(Tell::Confirmed(tell)));
        self.give(at, Input::Confirm { request, view })
    }

    fn confirm(
        &mut self,
        at: usize,
        stream: StreamId,
        version: Version,
        after: Option<Ticket>,
    ) -> Result<(), Violation> {
        let deadline = self.any_deadline();
        let view = View { stream: stream.clone(), version, after, deadline };
        let request = self.open(at, stream, Ask::Confirm { version }, None);
        self.give(at, Input::Confirm { request, view })
    }

    pub(super) fn any_deadline(&mut self) -> Option<Instant> {
        let soon = self.random.chance(30);
        let wait = Duration::from_micros(self.random.below(60_000));
        soon.then(|| self.now + wait)
    }

    fn open(&mut self, at: usize, stream: StreamId, ask: Ask, tell: Option<Tell>) -> RequestId {
        let request = RequestId(self.calls.requests);
        self.calls.requests += 1;
        let version_before = self.truth.version(&stream);
        let incarnation = self.nodes[at].incarnation;
        let call = Call { incarnation, stream, version_before, ask, tell };
        self.calls.open.insert(request, call);
        request
    }

    // --- answers -------------------------------------------------------------------------------

    pub(super) fn appended(
        &mut self,
        at: usize,
        request: RequestId,
        result: Result<Appended, AppendError>,
        cause: Cause,
    ) -> Result<(), Violation> {
        let Some(call) = self.calls.open.remove(&request) else {
            return Err(format!("{request:?} was answered twice"));
        };
        if let Some(Tell::Appended(tell)) = call.tell {
            // Its caller may be gone.
            drop(tell.send(result.clone()));
        }
        let Ask::Append { command_id, first_event, built_on, expected, deadline } = call.ask else {
            return Err(format!("{request:?} was a confirm"));
        };
        let by = call.incarnation;
        let version = self.truth.version(&call.stream);
        match result {
            Ok(appended) => {
                self.count_appended(&appended, cause);
                if built_on.is_some() && !appended.duplicate {
                    self.coverage.saw(State::BuiltOnPending);
                }
                let accepted = self.truth.commits.get(&command_id).ok_or_else(|| {
                    format!("command {command_id} was acknowledged and is not in the log")
                })?;
                let told = (appended.version, appended.position.offset);
                if told != (accepted.version, accepted.offset) || accepted.stream != call.stream {
                    return Err(format!("command {command_id} is {accepted:?}, told {appended:?}"));
                }
                match self.read(at, &call.stream)? {
                    Some(read) if read < appended.version => {
                        Err(format!("{appended:?} was acknowledged and is not read back"))
                    }
                    _ => Ok(()),
                }
            }
            Err(AppendError::Conflict { actual, .. }) => {
                self.calls.denied.push((by, command_id, self.order));
                let Some(wanted) = expected.version() else {
                    return Err("an append without demand conflicted".into());
                };
                let at_once = wanted < actual;
                self.coverage.saw(if at_once {
                    State::ConflictAtOnce
                } else {
                    State::ConflictConfirmed
                });
                let before = call.version_before;
                if !is_conflict(wanted, actual, before, version) {
                    return Err(format!(
                        "conflict: expected {expected}, told {actual}, was {before} to {version}"
                    ));
                }
                self.calls.check_denied(&self.truth)
            }
            Err(AppendError::NotAppended { reason }) => {
                if reason.contains("lost the partition") {
                    self.coverage.saw(State::DoubtSettledAsNotAppended);
                }
                self.calls.denied.push((by, command_id, self.order));
                self.calls.check_denied(&self.truth)
            }
            Err(AppendError::OutcomeUnknown { .. }) => {
                self.coverage.saw(State::UnknownOutcome);
                match deadline {
                    Some(deadline) if deadline <= self.now => Ok(()),
                    // The one way to be given up without being settled.
                    _ if cause == Cause::Abandon => Ok(()),
                    _ => Err(format!("{request:?} is unknown before its deadline")),
                }
            }
            Err(
                AppendError::Unavailable { .. }
                | AppendError::NotOwner { .. }
                | AppendError::TooLarge { .. },
            ) => {
                if deadline.is_some_and(|deadline| deadline <= self.now) {
                    self.coverage.saw(State::Expired);
                }
                if self.calls.produced.contains(&first_event) {
                    return Err(format!("{request:?} was refused though it was produced"));
                }
                Ok(())
            }
        }
    }

    fn count_appended(&mut self, appended: &Appended, cause: Cause) {
        match (appended.duplicate, cause) {
            (true, Cause::Report(..) | Cause::Records) => {
                self.coverage.saw(State::DuplicateAttached);
            }
            (true, _) => self.coverage.saw(State::DuplicateFound),
            (false, Cause::Records) => self.coverage.saw(State::DoubtSettledAsAccepted),
            (false, _) => {}
        }
    }

    pub(super) fn confirmed(
        &mut self,
        at: usize,
        request: RequestId,
        result: Result<(), AppendError>,
        cause: Cause,
    ) -> Result<(), Violation> {
        let Some(call) = self.calls.open.remove(&request) else {
            return Err(format!("{request:?} was answered twice"));
        };
        if let Some(Tell::Confirmed(tell)) = call.tell {
            drop(tell.send(result.clone()));
        }
        let Ask::Confirm { version: seen } = call.ask else {
            return Err(format!("{request:?} was an append"));
        };
        let (before, after) = (call.version_before, self.truth.version(&call.stream));
        match result {
            Ok(()) => {
                if let Cause::Report(claim, seq) = cause {
                    let barrier = self.nodes[at].barriers.contains(&(claim.epoch.0, seq));
                    let state =
                        if barrier { State::ConfirmByBarrier } else { State::ConfirmByCommit };
                    self.coverage.saw(state);
                }
                if before <= seen && seen <= after {
                    return Ok(());
                }
                Err(format!("view {seen} of {} confirmed, was {before} to {after}", call.stream))
            }
            Err(AppendError::Conflict { actual, .. }) => {
                if is_conflict(seen, actual, before, after) {
                    return Ok(());
                }
                Err(format!("view {seen} conflicts with {actual}, was {before} to {after}"))
            }
            Err(AppendError::NotAppended { .. }) => {
                self.coverage.saw(State::ConfirmFailedByDoubt);
                Ok(())
            }
            Err(AppendError::Unavailable { .. } | AppendError::NotOwner { .. }) => Ok(()),
            Err(other) => Err(format!("a confirm was answered {other}")),
        }
    }
}

fn new_event(index: u64, random: &mut super::random::Random) -> NewEvent {
    NewEvent {
        event_type: "s.happened.v1".into(),
        payload: Arc::from(format!("{{\"index\":{index}}}").into_bytes()),
        metadata: Metadata {
            event_id: Uuid::from_u128(random.next().into()),
            recorded_at: DateTime::UNIX_EPOCH,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        },
    }
}

//! What the writers are given, and what becomes of what they say.

use std::rc::Rc;
use std::sync::Arc;

use chrono::DateTime;
use kafold_core::store::{Append, View};
use kafold_core::{Commit, ExpectedVersion, Metadata, NewEvent, Offset, StreamId, Version};

use super::bounds::Demand;
use super::calls;
use super::node::Node;
use super::words::words;
use super::world::World;
use crate::sim::reference::Violation;
use crate::wire::Body;
use crate::writer::{Input, Output, RequestId};

impl World {
    pub(super) fn submit(
        &mut self,
        at: usize,
        demand: Demand,
        events: u8,
        command: Option<u8>,
    ) -> Result<(), Violation> {
        self.left.commits -= 1;
        let (seen, last) = (self.demanded(at, demand), self.node(at).last);
        let expected = match demand {
            Demand::Any => ExpectedVersion::Any,
            Demand::Seen | Demand::Newest | Demand::Behind => ExpectedVersion::Exact(seen),
        };
        let after = last.filter(|_| demand == Demand::Behind).map(|(last, _)| calls::ticket(last));
        let before = self.version();
        let attempt = self.calls.submit(at, command, events, expected, before);
        let command_id = calls::command_id(self.calls.attempts[usize::from(attempt)].command);
        let events: Vec<_> = (0..events).map(|index| new_event(attempt, index)).collect();
        let end = seen.plus(events.len() as u64);
        let commit = Commit::new(command_id, events).expect("1 or 2 events");
        let append = Append {
            stream: stream(),
            expected,
            commit,
            ticket: calls::ticket(attempt),
            after,
            deadline: None,
        };
        let request = RequestId(attempt.into());
        self.give(at, Input::Submit { request, append }, Some((attempt, end)))
    }

    pub(super) fn confirm(&mut self, at: usize, demand: Demand) -> Result<(), Violation> {
        self.left.confirms -= 1;
        let (version, last) = (self.demanded(at, demand), self.node(at).last);
        let after = last.filter(|_| demand == Demand::Behind).map(|(last, _)| calls::ticket(last));
        let request = self.calls.confirm(at, version, self.version());
        let view = View { stream: stream(), version, after, deadline: None };
        self.give(at, Input::Confirm { request, view }, None)
    }

    fn demanded(&self, at: usize, demand: Demand) -> Version {
        let node = self.node(at);
        match demand {
            Demand::Any | Demand::Seen => node.version(),
            Demand::Newest => self.version(),
            Demand::Behind => node.last.map_or(Version::EMPTY, |(_, end)| end),
        }
    }

    fn node(&self, at: usize) -> &Node {
        self.seats[at].node.as_ref().expect("only a writer that runs does anything")
    }

    // --- the writers ---------------------------------------------------------------------------

    pub(super) fn give(
        &mut self,
        at: usize,
        input: Input,
        submitted: Option<(u8, Version)>,
    ) -> Result<(), Violation> {
        let mut node = self.node(at).fork();
        node.last = submitted.or(node.last);
        match input {
            Input::Records { .. } => node.read = None,
            Input::Tick => node.wait(),
            _ => {}
        }
        self.seats[at].touched = true;
        let mut inputs = vec![input];
        let mut outputs = Vec::new();
        while let Some(input) = inputs.pop() {
            node.handle(input, &mut outputs);
            for output in outputs.drain(..) {
                inputs.extend(self.obey(at, &mut node, output)?);
            }
        }
        node.settle();
        self.seats[at].node = Some(Rc::new(node));
        self.drop_idle_reports(at);
        Ok(())
    }

    /// A report that changes nothing, now or later, need not come in all orders with the rest: one
    /// about the claim itself, or under a claim that is over.
    pub(super) fn drop_idle_reports(&mut self, at: usize) {
        while let Some(report) = self.seats[at].reports.front()
            && let Some(node) = &self.seats[at].node
            && (report.seq == 0 || node.claim != Some(report.claim))
        {
            let mut after = node.fork();
            let mut out = Vec::new();
            after.handle(report.input(), &mut out);
            after.settle();
            if !out.is_empty() || after.fingerprint() != node.fingerprint() {
                return;
            }
            self.seats[at].reports.pop_front();
        }
    }

    /// Does what a writer says; a load is answered at once.
    fn obey(
        &mut self,
        at: usize,
        node: &mut Node,
        output: Output,
    ) -> Result<Option<Input>, Violation> {
        self.note(|| format!("    writer {at}: {}", words(&output)));
        match output {
            Output::Produce(record) => {
                if let Body::Claim(_) = record.body {
                    node.claims += 1;
                    node.claim = Some(record.stamp.claim);
                    self.left.claims -= 1;
                }
                self.calls.produced(&record);
                self.seats[at].queue.push_back(Rc::new(record));
            }
            Output::Read { from, .. } => node.read = Some(from),
            Output::Load { stream } => {
                return Ok(Some(Input::Loaded { stream, head: Ok(node.head()) }));
            }
            Output::Proven(proven) => {
                for event in proven.events {
                    if self.truth.events.get(node.proven.len()) != Some(&event) {
                        let (version, at) = (event.version, event.position.offset);
                        return Err(format!(
                            "version {version} is told as proven at {at}, where it is not"
                        ));
                    }
                    node.proven.push(event);
                }
            }
            Output::Appended { request, result } => {
                self.calls.appended(request, &result, node.version(), &self.truth)?;
            }
            Output::Confirmed { request, result } => {
                self.calls.confirmed(request, &result, &self.truth)?;
            }
            Output::Halted(cause) => return Err(format!("writer {at} halts: {cause}")),
            Output::Owned { .. } | Output::Doubt(_) | Output::Superseded(_) => {}
            Output::Find { .. }
            | Output::FreshProducer
            | Output::CommandsSettled(_)
            | Output::Released => return Err(format!("writer {at} says {output:?} unasked")),
        }
        Ok(None)
    }

    pub(super) fn read(&mut self, at: usize, all: bool) -> Result<(), Violation> {
        let node = self.node(at);
        let Some(from) = node.read else { return Ok(()) };
        let limit = if all { usize::MAX } else { 1 };
        let records = self.truth.log.iter().skip(from.0 as usize).take(limit).cloned().collect();
        // A writer claims at the end of the log: without claims left it does not come there.
        let end = if self.left.claims > 0 { self.truth.end() } else { Offset(u64::MAX) };
        self.give(at, Input::Records { records, end }, None)
    }

    pub(super) fn report(&mut self, at: usize) -> Result<(), Violation> {
        match self.seats[at].reports.pop_front() {
            Some(report) => self.give(at, report.input(), None),
            None => Ok(()),
        }
    }
}

fn stream() -> StreamId {
    StreamId::new("s", "1").expect("valid")
}

fn new_event(attempt: u8, index: u8) -> NewEvent {
    NewEvent {
        event_type: "s.happened.v1".into(),
        payload: Arc::from(b"{}".as_slice()),
        metadata: Metadata {
            event_id: calls::event_id(attempt, index),
            recorded_at: DateTime::UNIX_EPOCH,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        },
    }
}

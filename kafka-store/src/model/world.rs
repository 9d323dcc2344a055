//! One state of the model, and the step to the next one.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use chrono::DateTime;
use kafold_core::store::{Append, View};
use kafold_core::{Commit, ExpectedVersion, Metadata, NewEvent, Offset, StreamId, Version};

use super::action::Action;
use super::bounds::{Bounds, Delivery, Demand, Left};
use super::calls::{self, Calls, hash_record};
use super::node::Node;
use super::readers::Readers;
use crate::sim::coverage::Coverage;
use crate::sim::reference::{Produced, Reference, Violation};
use crate::wire::{Body, ClaimId, Record};
use crate::writer::{Input, Output, ReportFailure, Status};

/// Copies share what no step has changed.
#[derive(Clone)]
pub(super) struct World {
    pub(super) bounds: Rc<Bounds>,
    now: Instant,
    pub(super) left: Left,
    pub(super) truth: Rc<Reference>,
    /// What there is to know of the log.
    log: u64,
    readers: Rc<Readers>,
    pub(super) seats: Vec<Seat>,
    /// Records that may still arrive though nobody counts on them, sorted.
    pub(super) late: Vec<Rc<Record>>,
    pub(super) calls: Calls,
    /// What happened in words, if it is to be told.
    pub(super) notes: Option<Vec<String>>,
}

/// A writer's place, and its way to the broker and back.
#[derive(Clone)]
pub(super) struct Seat {
    /// `None` once it has crashed.
    pub(super) node: Option<Rc<Node>>,
    /// Whether anything has happened to it.
    pub(super) touched: bool,
    pub(super) queue: VecDeque<Rc<Record>>,
    pub(super) reports: VecDeque<Report>,
}

#[derive(Clone, Hash)]
pub(super) struct Report {
    claim: ClaimId,
    seq: u64,
    told: Told,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Told {
    Success(Option<Offset>),
    Failure,
}

impl Report {
    fn input(&self) -> Input {
        let Self { claim, seq, told } = *self;
        let failure = || ReportFailure { fatal: false, refused: false, reason: String::new() };
        let result = match told {
            Told::Success(offset) => Ok(offset),
            Told::Failure => Err(failure()),
        };
        Input::Report { claim, seq, result }
    }
}

impl World {
    /// An empty log, and writers that have read nothing.
    pub(super) fn new(bounds: Bounds, now: Instant) -> Self {
        let seat = |place| Seat {
            node: Some(Rc::new(Node::start(place, now))),
            touched: false,
            queue: VecDeque::new(),
            reports: VecDeque::new(),
        };
        Self {
            now,
            left: bounds.left,
            truth: Rc::default(),
            log: 0,
            readers: Rc::new(Readers::new()),
            seats: (0..bounds.writers).map(seat).collect(),
            late: Vec::new(),
            calls: Calls::default(),
            notes: None,
            bounds: Rc::new(bounds),
        }
    }

    /// The state behind one more step, or the promise that the step breaks.
    pub(super) fn after(&self, action: Action) -> Result<Self, Violation> {
        let mut next = self.clone();
        next.act(action)?;
        next.retire();
        Ok(next)
    }

    /// Two states with one fingerprint go on alike.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.left, self.log).hash(&mut hasher);
        for seat in &self.seats {
            seat.node.as_ref().map(|node| node.fingerprint()).hash(&mut hasher);
            (seat.touched, &seat.reports, seat.queue.len()).hash(&mut hasher);
            seat.queue.iter().for_each(|record| hash_record(record, &mut hasher));
        }
        self.late.iter().for_each(|record| hash_record(record, &mut hasher));
        self.calls.hash(&mut hasher);
        hasher.finish()
    }

    /// The stream's true version.
    pub(super) fn version(&self) -> Version {
        calls::version(&self.truth)
    }

    pub(super) fn act(&mut self, action: Action) -> Result<(), Violation> {
        self.note(|| action.to_string());
        match action {
            Action::Submit { at, demand, events, command } => {
                self.submit(at, demand, events, command)
            }
            Action::Confirm { at, demand } => self.confirm(at, demand),
            Action::Deliver { at, how } => self.deliver(at, how),
            Action::Arrive { late } => {
                let record = self.late.remove(late);
                self.append(&record).map(|_| ())
            }
            Action::Report { at } => self.report(at),
            Action::Read { at, all } => self.read(at, all),
            Action::Crash { at } => {
                self.crash(at);
                Ok(())
            }
        }
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(notes) = &mut self.notes {
            notes.push(line());
        }
    }

    // --- calls ---------------------------------------------------------------------------------

    fn submit(
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
        let request = crate::writer::RequestId(attempt.into());
        self.give(at, Input::Submit { request, append }, Some((attempt, end)))
    }

    fn confirm(&mut self, at: usize, demand: Demand) -> Result<(), Violation> {
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

    fn give(
        &mut self,
        at: usize,
        input: Input,
        submitted: Option<(u8, Version)>,
    ) -> Result<(), Violation> {
        let mut node = self.node(at).fork();
        node.last = submitted.or(node.last);
        if let Input::Records { .. } = input {
            node.read = None;
        }
        self.seats[at].touched = true;
        let mut inputs = vec![input];
        let mut outputs = Vec::new();
        while let Some(input) = inputs.pop() {
            node.writer.handle(self.now, input, &mut outputs);
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
    fn drop_idle_reports(&mut self, at: usize) {
        while let Some(report) = self.seats[at].reports.front()
            && let Some(node) = &self.seats[at].node
            && (report.seq == 0 || node.claim != Some(report.claim))
        {
            let mut after = node.fork();
            let mut out = Vec::new();
            after.writer.handle(self.now, report.input(), &mut out);
            after.settle();
            if !out.is_empty() || after.fingerprint() != node.fingerprint() {
                return;
            }
            self.seats[at].reports.pop_front();
        }
    }

    /// Whoever can be asked nothing more, and can answer nothing more, is as good as gone; what it
    /// has produced is not.
    fn retire(&mut self) {
        if self.left.claims > 0 {
            return;
        }
        let calls_left = self.left.commits > 0 || self.left.confirms > 0;
        for at in 0..self.seats.len() {
            let Some(node) = &self.seats[at].node else { continue };
            let is_asked = calls_left && (node.owns() || self.bounds.asked_early);
            let will_own = matches!(node.writer.status(), Status::Claiming);
            if !is_asked && !(calls_left && will_own) && !self.calls.is_waiting(at) {
                self.seats[at].node = None;
                self.seats[at].reports.clear();
            }
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
                        return Err(format!("{event:?} is told as proven and is not in the log"));
                    }
                    node.proven.push(event);
                }
            }
            Output::Appended { request, result } => {
                self.calls.appended(request, result, node.version(), &self.truth)?;
            }
            Output::Confirmed { request, result } => {
                self.calls.confirmed(request, result, &self.truth)?;
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

    fn read(&mut self, at: usize, all: bool) -> Result<(), Violation> {
        let node = self.node(at);
        let Some(from) = node.read else { return Ok(()) };
        let limit = if all { usize::MAX } else { 1 };
        let records = self.truth.log.iter().skip(from.0 as usize).take(limit).cloned().collect();
        // A writer claims at the end of the log: without claims left it does not come there.
        let end = if self.left.claims > 0 { self.truth.end() } else { Offset(u64::MAX) };
        self.give(at, Input::Records { records, end }, None)
    }

    fn report(&mut self, at: usize) -> Result<(), Violation> {
        match self.seats[at].reports.pop_front() {
            Some(report) => self.give(at, report.input(), None),
            None => Ok(()),
        }
    }

    fn crash(&mut self, at: usize) {
        self.left.crashes -= 1;
        self.calls.abandon(at);
        let seat = &mut self.seats[at];
        seat.node = None;
        seat.reports.clear();
        for record in std::mem::take(&mut seat.queue) {
            self.may_arrive(record);
        }
    }

    // --- the log -------------------------------------------------------------------------------

    fn deliver(&mut self, at: usize, how: Delivery) -> Result<(), Violation> {
        self.left.faults -= u8::from(how != Delivery::Fine);
        let Some(record) = self.seats[at].queue.pop_front() else { return Ok(()) };
        let told = match how {
            Delivery::Fine => Some(Told::Success(Some(self.append(&record)?))),
            Delivery::SaidToFail => self.append(&record).map(|_| Some(Told::Failure))?,
            Delivery::NoOffset => self.append(&record).map(|_| Some(Told::Success(None)))?,
            Delivery::Late => {
                self.may_arrive(Rc::clone(&record));
                Some(Told::Failure)
            }
            Delivery::LateUnreported => {
                self.may_arrive(Rc::clone(&record));
                None
            }
            Delivery::CopiedLate => {
                self.may_arrive(Rc::clone(&record));
                Some(Told::Success(Some(self.append(&record)?)))
            }
            Delivery::SentTwice => {
                self.append(&record)?;
                self.seats[at].queue.push_front(Rc::clone(&record));
                None
            }
        };
        let (claim, seq) = (record.stamp.claim, record.stamp.seq);
        if self.seats[at].node.is_some() {
            self.seats[at].reports.extend(told.map(|told| Report { claim, seq, told }));
            self.drop_idle_reports(at);
        }
        Ok(())
    }

    fn may_arrive(&mut self, record: Rc<Record>) {
        let key = |record: &Record| {
            (record.stamp.claim.epoch, record.stamp.claim.nonce.0, record.stamp.seq)
        };
        let place = self.late.partition_point(|other| key(other) < key(&record));
        self.late.insert(place, record);
    }

    fn append(&mut self, record: &Rc<Record>) -> Result<Offset, Violation> {
        let truth = Rc::make_mut(&mut self.truth);
        let (head, events) = (truth.head(), truth.events.len());
        let record = Record::clone(record);
        let produced = Produced { record: record.clone(), by: 0, order: 0 };
        let offset = truth.append(produced, &mut Coverage::default())?;
        let counts = truth.head() != head;
        Rc::make_mut(&mut self.readers).take_last(&self.truth)?;
        if self.truth.events.len() > events
            && let Some(last) = self.truth.events.last()
        {
            self.calls.accepted(last)?;
        }
        self.remember(&record, counts);
        self.note(|| {
            let is = if counts { "accepted" } else { "void" };
            format!("    the log at {offset}: {}, {is}", record_in_words(&record))
        });
        Ok(offset)
    }

    /// Void records of an older claim are all alike.
    fn remember(&mut self, record: &Record, counts: bool) {
        let mut hasher = DefaultHasher::new();
        (self.log, counts).hash(&mut hasher);
        if counts || Some(record.stamp.claim) == self.truth.head().0 {
            hash_record(record, &mut hasher);
        }
        self.log = hasher.finish();
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

fn record_in_words(record: &Record) -> String {
    let (epoch, nonce, seq) =
        (record.stamp.claim.epoch.0, record.stamp.claim.nonce.0, record.stamp.seq);
    match &record.body {
        Body::Claim(_) => format!("claim {epoch}/{nonce}"),
        Body::Barrier => format!("barrier {epoch}/{nonce}/{seq}"),
        Body::Event(body) => format!(
            "event {epoch}/{nonce}/{seq}, {} of {}, version {}",
            body.index + 1,
            body.count,
            body.event.version
        ),
    }
}

fn words(output: &Output) -> String {
    match output {
        Output::Produce(record) => format!("produces {}", record_in_words(record)),
        Output::Proven(proven) => {
            format!("knows {} more events, all below {}", proven.events.len(), proven.next.next)
        }
        Output::Appended { request, result } => format!("answers {request:?}: {result:?}"),
        other => format!("{other:?}"),
    }
}

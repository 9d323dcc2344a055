//! One state of the model, and the step to the next one.

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::time::Instant;

use kafold_core::Version;

use super::action::Action;
use super::bounds::{Bounds, Left};
use super::calls::{self, Calls, hash_record};
use super::log::Report;
use super::mixer::Mixer;
use super::node::Node;
use super::readers::Readers;
use crate::sim::reference::{Reference, Violation};
use crate::wire::Record;
use crate::writer::{Input, Status};

/// Copies share what no step has changed.
#[derive(Clone)]
pub(super) struct World {
    pub(super) bounds: Rc<Bounds>,
    pub(super) left: Left,
    pub(super) truth: Rc<Reference>,
    /// What there is to know of the log.
    pub(super) log: u64,
    pub(super) readers: Rc<Readers>,
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
        next.step(action)?;
        Ok(next)
    }

    pub(super) fn step(&mut self, action: Action) -> Result<(), Violation> {
        self.act(action)?;
        self.retire();
        Ok(())
    }

    /// Two states with one fingerprint go on alike.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = Mixer::default();
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

    fn act(&mut self, action: Action) -> Result<(), Violation> {
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
            Action::Wait { at } => self.give(at, Input::Tick, None),
            Action::Crash { at } => {
                self.crash(at);
                Ok(())
            }
        }
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(notes) = &mut self.notes {
            notes.push(line());
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

    /// Whoever can be asked nothing more, and can answer nothing more, is as good as gone; what it
    /// has produced is not.
    fn retire(&mut self) {
        if self.left.claims > 0 {
            return;
        }
        let calls_left = self.left.commits > 0 || self.left.confirms > 0;
        for at in 0..self.seats.len() {
            let Some(node) = &self.seats[at].node else { continue };
            let may_own = matches!(node.writer.status(), Status::Claiming | Status::Owning);
            let is_asked = calls_left && (may_own || self.bounds.asked_early);
            if !is_asked && !self.calls.is_waiting(at) {
                self.seats[at].node = None;
                self.seats[at].reports.clear();
            }
        }
    }
}

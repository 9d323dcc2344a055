//! The way from a producer to the log, and what goes wrong on it.

use std::hash::{Hash, Hasher};
use std::rc::Rc;

use kafold_core::Offset;

use super::bounds::Delivery;
use super::calls::hash_record;
use super::mixer::Mixer;
use super::words::record_in_words;
use super::world::World;
use crate::sim::coverage::Coverage;
use crate::sim::reference::{Produced, Violation};
use crate::wire::{ClaimId, Record};
use crate::writer::{Input, ReportFailure};

#[derive(Clone, Hash)]
pub(super) struct Report {
    pub(super) claim: ClaimId,
    pub(super) seq: u64,
    told: Told,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Told {
    Success(Option<Offset>),
    Failure,
}

impl Report {
    pub(super) fn input(&self) -> Input {
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
    pub(super) fn deliver(&mut self, at: usize, how: Delivery) -> Result<(), Violation> {
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

    pub(super) fn may_arrive(&mut self, record: Rc<Record>) {
        let key = |record: &Record| {
            (record.stamp.claim.epoch, record.stamp.claim.nonce.0, record.stamp.seq)
        };
        let place = self.late.partition_point(|other| key(other) < key(&record));
        self.late.insert(place, record);
    }

    pub(super) fn append(&mut self, record: &Rc<Record>) -> Result<Offset, Violation> {
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
        let mut hasher = Mixer::default();
        (self.log, counts).hash(&mut hasher);
        if counts || Some(record.stamp.claim) == self.truth.head().0 {
            hash_record(record, &mut hasher);
        }
        self.log = hasher.finish();
    }
}

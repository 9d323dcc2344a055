//! What an owner has produced under its claim and not yet seen proven.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use kafold_core::Offset;
use kafold_core::mutant::{self, Mutant};

use crate::wire::{Body, ClaimId, Content, LogRecord, Record, Stamp};

/// The records of one claim, from the first unproven one on.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    pub(super) claim: ClaimId,
    /// Where our own reading accepted the claim: record s must be at `base + s`.
    base: Offset,
    next_seq: u64,
    /// The records `1..=proven` are proven.
    proven: u64,
    unproven: VecDeque<InFlight>,
    /// When something was last produced or proven.
    pub(super) active_at: Instant,
    barrier_seq: u64,
    barrier_at: Option<Instant>,
    /// What the next record says of forwarded commands, what the last one said, and what somebody
    /// waits for.
    commands_mark: Offset,
    mark_produced: Offset,
    mark_wanted: Offset,
}

#[derive(Debug, Clone)]
struct InFlight {
    record: Record,
    /// Its own report is a success with exactly the offset it must have.
    reported: bool,
}

/// What a report means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    /// Its record is proven as soon as those before it are.
    Good,
    /// Its record is proven already.
    Known,
    /// The claim cannot go on.
    Doubt(String),
}

impl Flight {
    /// `commands_mark` is the highest of the accepted records.
    pub(super) fn new(claim: ClaimId, base: Offset, commands_mark: Offset, now: Instant) -> Self {
        Self {
            claim,
            base,
            next_seq: 1,
            proven: 0,
            unproven: VecDeque::new(),
            active_at: now,
            barrier_seq: 0,
            barrier_at: None,
            commands_mark,
            mark_produced: commands_mark,
            mark_wanted: commands_mark,
        }
    }

    /// All forwarded commands below are settled; `wanted` if somebody waits until the log says so.
    pub(super) fn mark_commands(&mut self, mark: Offset, wanted: bool) {
        self.commands_mark = self.commands_mark.max(mark);
        if wanted {
            self.mark_wanted = self.mark_wanted.max(mark);
        }
    }

    /// Whether nothing that is in flight or proven says what somebody waits for.
    pub(super) fn mark_is_due(&self) -> bool {
        self.mark_wanted > self.mark_produced
    }

    /// For [`Mutant::BaseFromReport`].
    pub(super) fn move_base(&mut self, reported: Option<Offset>) {
        self.base = reported.unwrap_or(self.base);
    }

    /// Where the next record will be if nobody else writes.
    pub(super) fn next_offset(&self) -> Offset {
        self.base.plus(self.next_seq)
    }

    /// The last seq that was given to a record; 0 before the first.
    pub(super) fn last_seq(&self) -> u64 {
        self.next_seq - 1
    }

    pub(super) fn proven(&self) -> u64 {
        self.proven
    }

    /// Gives the next seq to a record that is produced now.
    pub(super) fn push(&mut self, body: Body, now: Instant) -> Record {
        let commands_mark = self.commands_mark;
        let stamp = Stamp { claim: self.claim, seq: self.next_seq, commands_mark };
        let record = Record { stamp, body };
        self.mark_produced = commands_mark;
        if self.unproven.is_empty() {
            self.active_at = now;
        }
        self.next_seq += 1;
        self.unproven.push_back(InFlight { record: record.clone(), reported: false });
        record
    }

    /// A barrier, unless one is in flight or it is too early.
    pub(super) fn push_barrier(&mut self, interval: Duration, now: Instant) -> Option<Record> {
        if self.barrier_due(interval)? > now {
            return None;
        }
        self.barrier_at = Some(now);
        self.barrier_seq = self.next_seq;
        Some(self.push(Body::Barrier, now))
    }

    /// When the next barrier may be produced; `None` while one is in flight.
    pub(super) fn barrier_due(&self, interval: Duration) -> Option<Instant> {
        if self.barrier_seq > self.proven {
            return None;
        }
        Some(self.barrier_at.map_or(self.active_at, |at| at + interval))
    }

    /// Takes a report about record `seq`: nothing but the one offset it must have is believed.
    pub(super) fn report(&mut self, seq: u64, offset: Option<Offset>) -> Judgement {
        if seq <= self.proven {
            return Judgement::Known;
        }
        if mutant::active(Mutant::AckOnConsecutiveOffsets) && seq == 1 {
            self.base = offset.map_or(self.base, |offset| Offset(offset.0.saturating_sub(1)));
        }
        let place = (seq - self.proven - 1) as usize;
        let expected = self.base.plus(seq);
        let believed = mutant::active(Mutant::AckOnAnyReport)
            || (mutant::active(Mutant::AckOnUnknownOffset) && offset.is_none());
        if offset != Some(expected) && !believed {
            let told = offset.map_or("no offset".into(), |offset| format!("offset {offset}"));
            return Judgement::Doubt(format!(
                "record {seq} was reported with {told} instead of {expected}"
            ));
        }
        if mutant::active(Mutant::AckWithoutPredecessor) {
            self.unproven.iter_mut().take(place).for_each(|before| before.reported = true);
        }
        match self.unproven.get_mut(place) {
            Some(found) => {
                found.reported = true;
                Judgement::Good
            }
            None => Judgement::Doubt(format!("record {seq} was reported but never produced")),
        }
    }

    /// The next record that reports have proven, as the log holds it.
    pub(super) fn next_reported(&mut self, now: Instant) -> Option<LogRecord> {
        if !self.unproven.front()?.reported {
            return None;
        }
        let record = self.unproven.pop_front()?.record;
        self.proven += 1;
        self.active_at = now;
        Some(LogRecord { offset: self.base.plus(self.proven), content: Content::Ours(record) })
    }

    /// Our own reading has accepted record `seq`.
    pub(super) fn was_read(&mut self, seq: u64, now: Instant) {
        while self.proven < seq && self.unproven.pop_front().is_some() {
            self.proven += 1;
            self.active_at = now;
        }
    }

    /// Since when nothing is in flight.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        self.unproven.is_empty().then_some(self.active_at)
    }

    /// Since when what is in flight waits for a report.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        (!self.unproven.is_empty()).then_some(self.active_at)
    }

    /// For the model check: feeds all that decides what will be proven.
    #[cfg(test)]
    pub(super) fn fingerprint(&self, into: &mut impl std::hash::Hasher) {
        use std::hash::Hash;

        let barrier_in_flight = self.barrier_seq.max(self.proven);
        (self.claim, self.base, self.next_seq, self.proven, barrier_in_flight).hash(into);
        for InFlight { record, reported } in &self.unproven {
            let event = match &record.body {
                Body::Event(body) => Some(body.event.metadata.event_id),
                Body::Claim(_) | Body::Barrier => None,
            };
            (event, reported).hash(into);
        }
    }
}

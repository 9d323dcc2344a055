//! Taking the partition over, losing it, and doubt.

use std::time::{Duration, Instant};

use kafold_core::Offset;
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Owner;

use super::flight::Flight;
use super::messages::Output;
use super::{IntoCause, PartitionWriter, Phase, Turn};
use crate::identity::IdentityError;
use crate::wire::{Body, Claim, ClaimId, Epoch, Nonce, Record, Stamp, stored_time};

impl PartitionWriter {
    pub(super) fn claim_if_due(&mut self, turn: &mut Turn<'_>) {
        let due = self.claim_not_before.is_none_or(|at| at <= turn.now);
        let settled = self.releasing && self.pending.is_empty();
        if !matches!(self.phase, Phase::CatchingUp { caught_up: true })
            || !due
            || settled
            || !self.producer_ready
        {
            return;
        }
        if mutant::active(Mutant::NotAppendedWithoutClaim) {
            self.fail_pending(turn);
        }
        let state = self.reader.fold().state();
        let Some(epoch) = state.claim.epoch.0.checked_add(1).map(Epoch) else {
            return self
                .halt("all epochs are used up: copy the log into a new topic".into_cause(), turn);
        };
        let commands_mark = state.commands_mark;
        let id = ClaimId { epoch, nonce: Nonce((self.entropy)()) };
        let body = Body::Claim(self.claim());
        let stamp = Stamp { claim: id, seq: 0, commands_mark };
        self.reported_base = None;
        self.has_claimed = true;
        self.phase = Phase::Claiming { claim: id, since: turn.now };
        turn.say(Output::Produce(Record { stamp, body }));
        if mutant::active(Mutant::NoReadBeforeProducing) {
            self.own(id, self.reader.fold().next(), turn);
        }
    }

    /// What our claims say.
    fn claim(&self) -> Claim {
        let owner = &self.config.owner;
        Claim {
            owner: owner.name.clone(),
            address: owner.address.clone(),
            partitions: self.config.partitions,
            started_at: stored_time(owner.started_at),
        }
    }

    /// A claim was accepted: every older one is over, and what was pending is definite.
    pub(super) fn claim_accepted(&mut self, id: ClaimId, claim: &Claim, turn: &mut Turn<'_>) {
        let ours = match &self.phase {
            Phase::Claiming { claim, .. } if is_ours(*claim, id) => Some(*claim),
            _ => None,
        };
        self.fail_pending(turn);
        if let Some(begun) = self.reader.fold().state().log
            && begun.partitions != self.config.partitions
        {
            // Streams would be looked for in other partitions than they are in.
            let repartitioned = IdentityError::Repartitioned {
                topic: self.config.log.clone(),
                partition: self.config.partition,
                expected: begun.partitions,
                found: self.config.partitions,
            };
            return self.halt(repartitioned.into_cause(), turn);
        }
        if let Some(ours) = ours {
            let read = Offset(self.reader.fold().next().0 - 1);
            let base = match self.reported_base {
                Some(reported) if mutant::active(Mutant::BaseFromReport) => reported,
                _ => read,
            };
            return self.own(ours, base, turn);
        }
        if !self.has_claimed {
            return;
        }
        if *claim != self.claim() {
            return self.supersede(claim.owner(), turn);
        }
        // A late one of our own: nothing keeps us from claiming again.
        match &self.phase {
            Phase::Claiming { .. } => self.retreat(turn),
            _ => self.doubt("an older claim of this process was accepted".into(), turn),
        }
    }

    pub(super) fn own(&mut self, id: ClaimId, base: Offset, turn: &mut Turn<'_>) {
        let commands_mark = self.reader.fold().state().commands_mark;
        self.phase = Phase::Owning(Flight::new(id, base, commands_mark, turn.now));
        self.owned_at = Some(turn.now);
        self.told_mark = commands_mark;
        self.ready.extend(self.streams.waiting.iter().cloned());
        turn.say(Output::Owned { claim: id, commands_mark });
    }

    /// Another process has the partition. Whether it is right to have it is not ours to judge: ours is
    /// to let it work, and to ask for the partition again only while nobody takes it from us.
    pub(super) fn supersede(&mut self, by: Owner, turn: &mut Turn<'_>) {
        let limits = &self.config.limits;
        let settled_in = |at: Instant| turn.now >= at + limits.yield_backoff_max;
        if self.owned_at.take().is_some_and(settled_in) {
            self.yields = 0;
        }
        let (base, most) = (limits.yield_backoff, limits.yield_backoff_max);
        let until = turn.now + self.jittered(base, most, self.yields);
        self.yields = self.yields.saturating_add(1);
        self.has_claimed = false;
        self.reading = false;
        self.phase = Phase::Superseded { by: by.clone(), until };
        turn.say(Output::Superseded(by));
        self.answer_everybody(turn);
    }

    /// Reads on after the wait, to claim at the end of the log.
    pub(super) fn come_back_if_due(&mut self, turn: &Turn<'_>) {
        if let Phase::Superseded { until, .. } = &self.phase
            && *until <= turn.now
            && !self.releasing
        {
            self.claim_not_before = None;
            self.phase = Phase::CatchingUp { caught_up: false };
        }
    }

    /// The claim cannot go on: nothing is acknowledged by reports any more. Reading on and a new
    /// claim settle what is pending.
    pub(super) fn doubt(&mut self, reason: String, turn: &mut Turn<'_>) {
        if !matches!(self.phase, Phase::Owning(_)) {
            return;
        }
        turn.say(Output::Doubt(reason));
        if mutant::active(Mutant::ConfirmAcrossClaim) {
            self.confirms.iter_mut().for_each(|confirm| confirm.behind = 0);
        } else {
            self.fail_confirms(turn);
        }
        self.retreat(turn);
    }

    /// Back to reading; the next claim comes after a jittered wait that doubles.
    pub(super) fn retreat(&mut self, turn: &Turn<'_>) {
        let limits = &self.config.limits;
        let (base, most) = (limits.claim_backoff, limits.claim_backoff_max);
        let wait = self.jittered(base, most, self.claim_attempts);
        self.claim_attempts = self.claim_attempts.saturating_add(1);
        self.claim_not_before = Some(turn.now + wait);
        self.phase = Phase::CatchingUp { caught_up: false };
        // A read that waits for a record at the end of the log would say nothing: ask anew.
        self.reading = false;
    }

    /// The wait doubled so often, half of it random.
    fn jittered(&mut self, base: Duration, most: Duration, doublings: u32) -> Duration {
        let half = base.saturating_mul(1 << doublings.min(20)).min(most) / 2;
        let spread = (half.as_micros() as u64).saturating_add(1);
        half + Duration::from_micros((self.entropy)() % spread)
    }
}

/// By its nonce: a claim of our epoch may be another's.
fn is_ours(ours: ClaimId, accepted: ClaimId) -> bool {
    if mutant::active(Mutant::OwnedByEpoch) {
        return ours.epoch == accepted.epoch;
    }
    ours == accepted
}

//! Taking the partition over, losing it, and doubt.

use std::time::Duration;

use chrono::TimeDelta;
use kafold_core::Offset;
use kafold_core::store::Owner;

use super::flight::Flight;
use super::messages::Output;
use super::{IntoCause, PartitionWriter, Phase, Turn};
use crate::identity::IdentityError;
use crate::mutant::{self, Mutant};
use crate::wire::{Body, Claim, ClaimId, Epoch, Nonce, Record, Stamp, stored_time};

/// How far behind the newest start in the log a claimant with a slow clock places its own.
const TIE_BREAK_MICROS: u64 = 100_000;

impl PartitionWriter {
    pub(super) fn claim_if_due(&mut self, turn: &mut Turn<'_>) {
        let due = self.claim_not_before.is_none_or(|at| at <= turn.now);
        let settled = self.stopping && self.pending.is_empty();
        if !matches!(self.phase, Phase::CatchingUp { caught_up: true })
            || !due
            || settled
            || !self.producer_ready
        {
            return;
        }
        let state = self.reader.fold().state();
        let Some(epoch) = state.claim.epoch.0.checked_add(1).map(Epoch) else {
            return self
                .halt("all epochs are used up: copy the log into a new topic".into_cause(), turn);
        };
        let commands_mark = state.commands_mark;
        let id = ClaimId { epoch, nonce: Nonce((self.entropy)()) };
        let body = Body::Claim(self.claim().clone());
        let stamp = Stamp { claim: id, seq: 0, commands_mark };
        self.reported_base = None;
        self.phase = Phase::Claiming { claim: id, since: turn.now };
        turn.say(Output::Produce(Record { stamp, body }));
        if mutant::active(Mutant::NoReadBeforeProducing) {
            self.own(id, self.reader.fold().next(), turn);
        }
    }

    /// What our claims say. The newest start wins, so ours must lie behind those in the log when
    /// we came, even where their clocks are ahead of ours.
    pub(super) fn claim(&mut self) -> &Claim {
        let (config, entropy) = (&self.config, &mut self.entropy);
        let newest = self.reader.fold().state().newest_start;
        self.claim.get_or_insert_with(|| {
            // Two that come to the same moment must not tie.
            let ahead = TimeDelta::microseconds(1 + (entropy() % TIE_BREAK_MICROS) as i64);
            let own = stored_time(config.owner.started_at);
            let behind = newest.map(|start| start.checked_add_signed(ahead).unwrap_or(start));
            Claim {
                owner: config.owner.name.clone(),
                address: config.owner.address.clone(),
                partitions: config.partitions,
                started_at: behind.map_or(own, |behind| own.max(behind)),
            }
        })
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
        let rank = |claim: &Claim| (claim.started_at, claim.owner.clone(), claim.address.clone());
        if self.claim.as_ref().is_some_and(|own| rank(claim) > rank(own)) {
            return self.supersede(claim.owner(), turn);
        }
        // An older start's, or a late one of our own: nothing keeps us from claiming again.
        match &self.phase {
            Phase::Claiming { .. } => self.retreat(turn),
            _ => self.doubt(format!("an older claim by {} was accepted", claim.owner()), turn),
        }
    }

    pub(super) fn own(&mut self, id: ClaimId, base: Offset, turn: &mut Turn<'_>) {
        self.phase = Phase::Owning(Flight::new(id, base, turn.now));
        self.ready.extend(self.streams.waiting.iter().cloned());
        turn.say(Output::Owned(id));
    }

    pub(super) fn supersede(&mut self, owner: Owner, turn: &mut Turn<'_>) {
        self.phase = Phase::Superseded(owner.clone());
        turn.say(Output::Superseded(owner));
        self.answer_everybody(turn);
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
        let doubled = limits.claim_backoff.saturating_mul(1 << self.claim_attempts.min(20));
        let half = doubled.min(limits.claim_backoff_max) / 2;
        let spread = (half.as_micros() as u64).saturating_add(1);
        let jitter = Duration::from_micros((self.entropy)() % spread);
        self.claim_attempts = self.claim_attempts.saturating_add(1);
        self.claim_not_before = Some(turn.now + half + jitter);
        self.phase = Phase::CatchingUp { caught_up: false };
        // A read that waits for a record at the end of the log would say nothing: ask anew.
        self.reading = false;
    }
}

/// By its nonce: a claim of our epoch may be another's.
fn is_ours(ours: ClaimId, accepted: ClaimId) -> bool {
    if mutant::active(Mutant::OwnedByEpoch) {
        return ours.epoch == accepted.epoch;
    }
    ours == accepted
}

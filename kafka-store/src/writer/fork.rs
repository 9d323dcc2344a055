//! For the model check alone: a writer's copy, and what tells two writers apart.
//!
//! Both name every field, so that whoever adds one decides what it means to them.

use std::hash::{Hash, Hasher};

use kafold_core::mutant::{self, Mutant};

use super::settle::{PendingCommit, PendingConfirm, Question, Waiter};
use super::streams::{Ask, Knowledge, Stream, Waiting};
use super::{CommitReader, Entropy, PartitionWriter, Phase};

impl PartitionWriter {
    /// A copy of it that draws from its own entropy.
    pub(crate) fn fork(&self, entropy: Entropy) -> Self {
        Self {
            config: self.config.clone(),
            entropy,
            reader: self.reader.clone(),
            phase: self.phase.clone(),
            has_claimed: self.has_claimed,
            claim_attempts: self.claim_attempts,
            yields: self.yields,
            owned_at: self.owned_at,
            claim_not_before: self.claim_not_before,
            producer_ready: self.producer_ready,
            reading: self.reading,
            read_not_before: self.read_not_before,
            told: self.told,
            told_mark: self.told_mark,
            streams: self.streams.clone(),
            ready: self.ready.clone(),
            pending: self.pending.clone(),
            confirms: self.confirms.clone(),
            unindexed: self.unindexed.clone(),
            unindexed_events: self.unindexed_events,
            refused: self.refused.clone(),
            requests: self.requests,
            request_bytes: self.request_bytes,
            earliest_deadline: self.earliest_deadline,
            asked_deadline: self.asked_deadline,
            releasing: self.releasing,
            reported_base: self.reported_base,
        }
    }

    /// Feeds all that decides what the writer will ever say, where time stands still, no limit is
    /// reached and no forwarded command is settled.
    pub(crate) fn fingerprint(&self, into: &mut impl Hasher) {
        let Self {
            config: _,
            entropy: _,
            reader,
            phase,
            has_claimed,
            claim_attempts: _,
            yields: _,
            owned_at: _,
            claim_not_before: _,
            producer_ready,
            reading,
            read_not_before: _,
            told: _,
            told_mark: _,
            streams,
            ready,
            pending,
            confirms,
            unindexed: _,
            unindexed_events: _,
            refused,
            requests: _,
            request_bytes: _,
            earliest_deadline: _,
            asked_deadline: _,
            releasing,
            reported_base,
        } = self;
        hash_reader(reader, into);
        hash_phase(phase, into);
        (has_claimed, producer_ready, reading, releasing).hash(into);
        mutant::active(Mutant::BaseFromReport).then_some(reported_base).hash(into);
        (ready, refused.len()).hash(into);
        let mut entries: Vec<_> = streams.all().collect();
        entries.sort_by_key(|(id, _)| *id);
        for (id, stream) in entries {
            id.hash(into);
            hash_stream(stream, into);
        }
        pending.len().hash(into);
        pending.iter().for_each(|commit| hash_pending(commit, into));
        confirms.len().hash(into);
        confirms.iter().for_each(|confirm| hash_confirm(confirm, into));
    }
}

/// The events of a commit that is open follow from where the reader stands in the log.
fn hash_reader(reader: &CommitReader, into: &mut impl Hasher) {
    let fold = reader.fold();
    let state = fold.state();
    (fold.next(), fold.is_open(), state.claim, state.next_seq).hash(into);
    state.anchor.map(|anchor| (anchor.offset, anchor.claim, anchor.seq)).hash(into);
}

fn hash_phase(phase: &Phase, into: &mut impl Hasher) {
    std::mem::discriminant(phase).hash(into);
    match phase {
        Phase::CatchingUp { caught_up } => caught_up.hash(into),
        Phase::Claiming { claim, since: _ } => claim.hash(into),
        Phase::Owning(flight) => flight.fingerprint(into),
        Phase::New
        | Phase::Unplaced(_)
        | Phase::Superseded { .. }
        | Phase::Halted(_)
        | Phase::Released => {}
    }
}

/// The commands of a stream that is known follow from its version and the log.
fn hash_stream(stream: &Stream, into: &mut impl Hasher) {
    let Stream {
        knowledge,
        waiting,
        pending,
        pending_version,
        last,
        finding,
        not_found,
        queued,
        asking,
        listed: _,
    } = stream;
    match knowledge {
        Knowledge::Unknown => 0.hash(into),
        Knowledge::Loading(since) => (1, since.len()).hash(into),
        Knowledge::Known(known) => (2, known.version, known.older.is_some()).hash(into),
    }
    waiting.len().hash(into);
    waiting.iter().for_each(|waiting| hash_waiting(waiting, into));
    (pending, last, finding, not_found, queued, asking).hash(into);
    // It means nothing while nothing is pending.
    (!pending.is_empty()).then_some(pending_version).hash(into);
}

/// What a request asks follows from its name.
fn hash_waiting(waiting: &Waiting, into: &mut impl Hasher) {
    let Waiting { request, ask, deadline: _, bytes: _ } = waiting;
    (request, matches!(ask, Ask::Confirm(_))).hash(into);
}

fn hash_pending(commit: &PendingCommit, into: &mut impl Hasher) {
    let PendingCommit { claim, last_seq, stream, command_id, bytes: _, waiters, refused } = commit;
    (claim, last_seq, stream, command_id, refused, waiters.len()).hash(into);
    waiters.iter().for_each(|waiter| hash_waiter(waiter, into));
}

fn hash_confirm(confirm: &PendingConfirm, into: &mut impl Hasher) {
    let PendingConfirm { waiter, question, stream, actual, behind } = confirm;
    hash_waiter(waiter, into);
    match question {
        Question::View(version) => (0, version.0).hash(into),
        Question::Conflict => 1.hash(into),
    }
    (stream, actual, behind).hash(into);
}

fn hash_waiter(waiter: &Waiter, into: &mut impl Hasher) {
    let Waiter { request, deadline: _, duplicate } = waiter;
    (request, duplicate).hash(into);
}

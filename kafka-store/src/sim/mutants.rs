//! Every deliberate bug must be found: by random histories, or by a named scenario.

use kafold_core::Offset;
use kafold_core::mutant::{self, Mutant};

use super::reference::{PARTITION, Violation};
use super::{play, say};
use crate::fold::{Checkpoint, Fold};
use crate::wire::{Content, LogRecord, Malformed};

/// Histories that are tried before a mutant counts as not found.
const SEEDS_MAX: u64 = 10_000;

/// Those that random histories find.
const FOUND_BY_CHANCE: [Mutant; 23] = [
    Mutant::AckOnEnqueue,
    Mutant::AckOnAnyReport,
    Mutant::AckOnConsecutiveOffsets,
    Mutant::AckOnUnknownOffset,
    Mutant::BaseFromReport,
    Mutant::OwnedByEpoch,
    Mutant::NoReadBeforeProducing,
    Mutant::FoldAcceptsHole,
    Mutant::FoldAcceptsEqualEpoch,
    Mutant::FoldKeepsCommitOpen,
    Mutant::NotAppendedOnFailure,
    Mutant::NotAppendedOnVoid,
    Mutant::ConflictFromPending,
    Mutant::ConflictUnconfirmed,
    Mutant::ConfirmWithoutBarrier,
    Mutant::ConfirmByEarlierRecord,
    Mutant::ConfirmAcrossClaim,
    Mutant::IndexPlainMaximum,
    Mutant::CheckpointInsideCommit,
    Mutant::CheckpointWithoutState,
    Mutant::DedupeOff,
    Mutant::OlderForgotten,
    Mutant::PendingStateInCache,
];

/// No random history has a malformed record: no writer makes one.
fn a_malformed_record_halts() -> Result<(), Violation> {
    let mut fold = Fold::new(PARTITION, Checkpoint::default());
    let content = Content::Malformed(Malformed::UnknownKind(9));
    match fold.apply(&LogRecord { offset: Offset(0), content }) {
        Err(_) => Ok(()),
        Ok(verdict) => Err(format!("a malformed record is {verdict:?}")),
    }
}

#[test]
fn every_mutant_is_killed() {
    let mut alive = Vec::new();
    for bug in FOUND_BY_CHANCE {
        let killed = (0..SEEDS_MAX).find_map(|seed| {
            let violation = mutant::with(Some(bug), || play(seed).0).err()?;
            Some((seed, violation))
        });
        match killed {
            Some((seed, violation)) => {
                let violation: String = violation.chars().take(90).collect();
                say(&format!("{bug:?} killed by the simulation, seed {seed}: {violation}"));
            }
            None => alive.push(bug),
        }
    }
    assert_eq!(a_malformed_record_halts(), Ok(()));
    match mutant::with(Some(Mutant::SkipMalformed), a_malformed_record_halts) {
        Ok(()) => alive.push(Mutant::SkipMalformed),
        Err(violation) => {
            let bug = Mutant::SkipMalformed;
            say(&format!("{bug:?} killed by a_malformed_record_halts: {violation}"));
        }
    }
    assert!(alive.is_empty(), "not found in {SEEDS_MAX} histories: {alive:?}");
}

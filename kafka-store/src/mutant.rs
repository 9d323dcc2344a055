//! Deliberate bugs that the simulation and the model must find: each switch breaks one rule of the protocol.
//!
//! Outside tests [`active`] is constant false and costs nothing.

/// One broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// An append is acknowledged as soon as it is handed to the producer.
    AckOnEnqueue,
    /// A report proves the records before its own as well.
    AckWithoutPredecessor,
    /// Any successful report proves its record.
    AckOnAnyReport,
    /// A record is proven when its offset follows the one before.
    AckOnConsecutiveOffsets,
    /// A successful report without an offset proves its record.
    AckOnUnknownOffset,
    /// `base` is what the claim's own report says.
    BaseFromReport,
    /// Our claim is recognised by its epoch.
    OwnedByEpoch,
    /// Records are produced right behind the claim, unread.
    NoReadBeforeProducing,
    /// The fold accepts a record whose predecessor is missing.
    FoldAcceptsHole,
    /// The fold accepts a second copy of a record.
    FoldAcceptsDuplicate,
    /// The fold accepts a second claim of the current epoch.
    FoldAcceptsEqualEpoch,
    /// A claim leaves an open commit open.
    FoldKeepsCommitOpen,
    /// A report that never comes is waited for without an end.
    ReportAwaitedForEver,
    /// A failed report is answered `NotAppended`.
    NotAppendedOnFailure,
    /// A void copy is answered `NotAppended`.
    NotAppendedOnVoid,
    /// What was read to the end and not found is answered `NotAppended`, before any new claim.
    NotAppendedWithoutClaim,
    /// What builds on a pending commit is taken though that commit has failed.
    PendingOutlivesClaim,
    /// A pending commit conflicts.
    ConflictFromPending,
    /// A stale view conflicts without confirm.
    ConflictUnconfirmed,
    /// A confirm is answered without any record.
    ConfirmWithoutBarrier,
    /// A record produced before the decision confirms it.
    ConfirmByEarlierRecord,
    /// A confirm outlives its claim.
    ConfirmAcrossClaim,
    /// The index takes any batch and its position is the maximum seen.
    #[cfg(test)]
    IndexPlainMaximum,
    /// A checkpoint may lie inside a commit.
    CheckpointInsideCommit,
    /// A checkpoint is an offset without the fold's state.
    #[cfg(test)]
    CheckpointWithoutState,
    /// A command is never looked for.
    DedupeOff,
    /// A malformed record is skipped.
    SkipMalformed,
}

/// Whether the bug is switched on in this thread.
#[cfg(not(test))]
pub(crate) const fn active(_: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(crate) use switch::{active, with};

#[cfg(test)]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    pub(crate) fn active(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }

    /// Runs `test` with the bug switched on.
    pub(crate) fn with<T>(mutant: Option<Mutant>, test: impl FnOnce() -> T) -> T {
        struct Restore(Option<Mutant>);
        impl Drop for Restore {
            fn drop(&mut self) {
                ACTIVE.set(self.0);
            }
        }
        let _restore = Restore(ACTIVE.replace(mutant));
        test()
    }
}

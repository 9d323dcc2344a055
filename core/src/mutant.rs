//! Deliberate bugs that a named test must find: each switch breaks one rule that a promise rests on.
//!
//! Without the feature `testing` [`active`] is constant false and costs nothing.

/// One broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
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
    IndexPlainMaximum,
    /// Index rows are used without a comparison with the heads.
    IndexBelieved,
    /// A checkpoint may lie inside a commit.
    CheckpointInsideCommit,
    /// A checkpoint is an offset without the fold's state.
    CheckpointWithoutState,
    /// A command is never looked for.
    DedupeOff,
    /// A command that is older than the recent ones counts as one that never was.
    OlderForgotten,
    /// A malformed record is skipped.
    SkipMalformed,
    /// A command handler's state keeps the events of a commit that was not appended.
    PendingStateInCache,
    /// A stored position is taken for true whatever the log is now.
    AutoReset,
    /// A projection's checkpoint is committed before its rows.
    CheckpointOutsideTransaction,
    /// A projection goes on though another worker has taken its partition.
    NoFence,
    /// Rows that partitions share are folded without a lock.
    SharedRowsUnlocked,
    /// A projection leaves out an event that it cannot read.
    SkipUnreadable,
    /// An event is late by the least clock of all partitions, not by the clock of its own.
    LateByLeastClock,
    /// An event is late by the clock at the end of its batch.
    ClockOfTheBatch,
    /// A partition without anything to read holds up no window.
    IdleByTheWall,
    /// A partition without any event holds up no window.
    VirginExcluded,
    /// An event from the future moves the clock to its own time.
    FutureUnclamped,
    /// An event from the future moves the clock to its recording.
    FutureMovesTheClock,
    /// A clock event of another timeline moves the clock.
    AnyTimeline,
    /// A live log whose partitions are all quiet gets no clock events.
    NoWallClock,
    /// Timers are handed on at the end of a batch.
    TimersAtTheEnd,
    /// An event between two sessions joins one of them alone.
    SessionOneNeighbour,
    /// A session is closed one gap too early.
    SessionClosedAGapEarly,
    /// Lateness for sessions follows from the end of the joined session.
    SessionLateByState,
    /// No clock event is appended.
    NeverAdvance,
}

/// Whether the bug is switched on in this thread.
#[cfg(not(feature = "testing"))]
#[inline]
pub const fn active(_: Mutant) -> bool {
    false
}

#[cfg(feature = "testing")]
pub use switch::{active, with};

#[cfg(feature = "testing")]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether the bug is switched on in this thread.
    pub fn active(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }

    /// Runs `test` in this thread with the bug switched on.
    pub fn with<T>(mutant: Option<Mutant>, test: impl FnOnce() -> T) -> T {
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

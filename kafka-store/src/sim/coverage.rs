//! Which interesting states the seeds reached: a simulation that never meets them proves nothing.

use std::collections::BTreeMap;

/// A state worth meeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Gap,
    DuplicateCopy,
    ReClaim,
    LostClaimRace,
    VoidEvent,
    UnknownOutcome,
    PartialCommitVoided,
    DoubtSettledAsAccepted,
    DoubtSettledAsNotAppended,
    ConfirmByBarrier,
    ConfirmByCommit,
    ConfirmFailedByDoubt,
    Superseded,
    DuplicateAttached,
    DuplicateFound,
    LookedUpBeyondTheWindow,
    BuiltOnPending,
    ConflictAtOnce,
    ConflictConfirmed,
    IndexFedTwice,
    IndexRolledBack,
    LoadRefused,
    FreshProducer,
    ReaderRestartedInsideCommit,
    LowLogEnd,
    Expired,
    TakenBack,
    Released,
    Abandoned,
    AssignedAgain,
    CommandsSettledByBarrier,
    CommandsSettledByCommit,
    Handled,
    HandledDuplicate,
    HandledUnknown,
    Rejected,
    HandlerConflict,
    LeaderMoved,
    Truncated,
    TruncatedSentAgain,
}

impl State {
    pub(crate) const ALL: [Self; 40] = [
        Self::Gap,
        Self::DuplicateCopy,
        Self::ReClaim,
        Self::LostClaimRace,
        Self::VoidEvent,
        Self::UnknownOutcome,
        Self::PartialCommitVoided,
        Self::DoubtSettledAsAccepted,
        Self::DoubtSettledAsNotAppended,
        Self::ConfirmByBarrier,
        Self::ConfirmByCommit,
        Self::ConfirmFailedByDoubt,
        Self::Superseded,
        Self::DuplicateAttached,
        Self::DuplicateFound,
        Self::LookedUpBeyondTheWindow,
        Self::BuiltOnPending,
        Self::ConflictAtOnce,
        Self::ConflictConfirmed,
        Self::IndexFedTwice,
        Self::IndexRolledBack,
        Self::LoadRefused,
        Self::FreshProducer,
        Self::ReaderRestartedInsideCommit,
        Self::LowLogEnd,
        Self::Expired,
        Self::TakenBack,
        Self::Released,
        Self::Abandoned,
        Self::AssignedAgain,
        Self::CommandsSettledByBarrier,
        Self::CommandsSettledByCommit,
        Self::Handled,
        Self::HandledDuplicate,
        Self::HandledUnknown,
        Self::Rejected,
        Self::HandlerConflict,
        Self::LeaderMoved,
        Self::Truncated,
        Self::TruncatedSentAgain,
    ];
}

/// How often each state was met.
#[derive(Debug, Default)]
pub(crate) struct Coverage(pub(crate) BTreeMap<State, u64>);

impl Coverage {
    pub(crate) fn saw(&mut self, state: State) {
        *self.0.entry(state).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: Self) {
        for (state, times) in other.0 {
            *self.0.entry(state).or_default() += times;
        }
    }
}

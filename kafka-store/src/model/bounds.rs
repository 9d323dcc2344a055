//! How far the model goes: what may happen, and how often.

/// The bounds of one exploration. What is exhausted does not happen any more.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    pub(super) writers: usize,
    pub(super) left: Left,
    /// What submissions and confirms rest on.
    pub(super) demands: &'static [Demand],
    /// How many events a commit may have.
    pub(super) events: &'static [u8],
    /// A command may be sent again, to any writer.
    pub(super) retries: bool,
    /// Writers are asked before they own, too.
    pub(super) asked_early: bool,
    /// How a delivery may go wrong.
    pub(super) faults: &'static [Delivery],
}

/// How often things may still happen.
#[derive(Debug, Clone, Copy, Hash)]
pub(super) struct Left {
    pub(super) claims: u8,
    /// Submissions, retries among them.
    pub(super) commits: u8,
    pub(super) confirms: u8,
    pub(super) faults: u8,
    pub(super) crashes: u8,
}

/// What a caller takes for the stream's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Demand {
    /// It does not matter.
    Any,
    /// What the writer knows.
    Seen,
    /// What the log has, and the writer may not know: read from another node.
    Newest,
    /// What the writer's last submission comes to, on which this one builds.
    Behind,
}

/// What becomes of a record on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It is in the log, and reported there.
    Fine,
    /// It is in the log, and reported as failed.
    SaidToFail,
    /// It is in the log, and reported without an offset.
    NoOffset,
    /// It is reported as failed, and may still arrive: if it never does, it was lost.
    Late,
    /// As before, without any report.
    LateUnreported,
    /// It is in the log, and reported there; a copy may still arrive.
    CopiedLate,
    /// It is in the log, and sent once more before anything is reported.
    SentTwice,
}

impl Delivery {
    /// Whether it is another than the others when it happens to a claim: where that is reported to
    /// be is of no interest, and one that comes late without a report just takes its time.
    pub(super) fn concerns_claims(self) -> bool {
        !matches!(self, Self::NoOffset | Self::LateUnreported)
    }

    pub(super) const ALL_FAULTS: &'static [Self] = &[
        Self::SaidToFail,
        Self::NoOffset,
        Self::Late,
        Self::LateUnreported,
        Self::CopiedLate,
        Self::SentTwice,
    ];
}

//! The state machine of the single writer of one partition, without IO, clock or randomness.

mod messages;

use std::time::Instant;

pub use messages::{
    CommandOutcome, Input, Output, Proven, ReportFailure, RequestId, Status, StreamHead,
    WriterConfig, WriterLimits,
};

/// Draws nonces and jitter: in a service from the operating system's entropy.
pub type Entropy = Box<dyn FnMut() -> u64 + Send>;

/// The single writer of one partition.
pub struct PartitionWriter {
    config: WriterConfig,
    entropy: Entropy,
}

impl PartitionWriter {
    /// A writer that waits for [`Input::Start`].
    pub fn new(config: WriterConfig, entropy: Entropy) -> Self {
        Self { config, entropy }
    }

    /// Takes what happened at `now` and adds what is to be done.
    pub fn handle(&mut self, _now: Instant, _input: Input, _out: &mut Vec<Output>) {
        let _ = (&self.config, &mut self.entropy);
    }

    /// When [`Input::Tick`] is due at the latest.
    pub fn next_wake(&self) -> Option<Instant> {
        None
    }

    /// Whether commands are taken.
    pub fn status(&self) -> Status {
        Status::CatchingUp
    }
}

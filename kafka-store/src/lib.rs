//! The event store of kafold on partitioned Kafka topics.
//!
//! The log itself arbitrates who may write: a writer claims a partition by a record in it, stamps
//! what it writes, and every reader voids what a superseded writer left. The heart is pure, without
//! IO, clock or randomness, so that a simulation runs the very same code:
//!
//! - [`wire`]: records as bytes, the one module of the wire format;
//! - [`fold`]: what every reader runs, accepting or voiding each record;
//! - [`partitioner`]: which partition a stream lives in;
//! - [`identity`]: whether this is still the log that a stored position came from;
//! - [`writer`]: the state machine of the single writer of one partition;
//! - [`tail`]: proven events that are not yet in the index.

pub mod fold;
pub mod identity;
mod mutant;
pub mod partitioner;
pub mod tail;
pub mod wire;
pub mod writer;

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
//!
//! Around it is what touches brokers and databases. [`KafkaStore`] opens a log named by a
//! [`KafkaConfig`] and is an [`EventStore`](kafold_core::EventStore); [`KafkaSource`] is the
//! [`EventSource`](kafold_core::EventSource) of the same log:
//!
//! - [`config`]: the log's URL and the limits; [`transport`]: TLS and login; [`secret`]: passwords that are never shown; [`error`]: why it cannot be opened;
//! - `topic`: topics are created safe, unsafe ones are refused by name; `judge`: what is unsafe, and why;
//!   `refusal`: errors that do not pass by themselves, with cause and remedy;
//!   `handshake`: finds out why no connection comes about;
//! - `driver`: the thread that joins all writers to one `producer`; `reader`: the thread that reads
//!   the log for them;
//! - `membership`: a place in a consumer group; `ownership`: takes over what the group assigns and hands
//!   over what it revokes;
//! - `forward`: commands between the nodes;
//! - `indexer`: feeds the index behind the write, `gatherer`: for all partitions together; `loader`:
//!   streams from index and tail;
//! - [`store`], [`source`]: the two seams;
//! - [`rights`]: what each kind of process must be allowed; `prober` tries it without changing
//!   anything, `guard` again and again while a process runs;
//! - [`operate`]: a log as its operator looks at it, without being a part of the service.

mod client;
pub mod config;
#[cfg(test)]
mod corpus;
mod driver;
pub mod error;
pub mod fold;
mod forward;
mod gatherer;
mod guard;
mod handshake;
pub mod identity;
mod indexer;
mod inspect;
mod judge;
mod loader;
mod membership;
#[cfg(test)]
mod model;
pub mod operate;
mod ownership;
mod partition;
pub mod partitioner;
mod prober;
mod producer;
mod reader;
mod refusal;
pub mod rights;
pub mod secret;
#[cfg(test)]
mod sim;
pub mod source;
pub mod store;
pub mod tail;
mod topic;
pub mod transport;
mod verifier;
pub mod wire;
pub mod writer;

pub use config::{Assignment, KafkaConfig, Limits};
pub use error::{ConfigError, OpenError};
pub use operate::Operator;
pub use source::KafkaSource;
pub use store::KafkaStore;

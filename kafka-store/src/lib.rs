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
//! - [`config`]: the log's URL and the limits; [`transport`]: TLS and login; [`secret`]: passwords,
//!   never shown; [`error`]: the reasons for a failed opening;
//! - `topic`: creates topics with safe settings and rejects unsafe topics by name; `judge`: the
//!   unsafe settings, with reasons; `refusal`: permanent errors, with cause and remedy;
//!   `handshake`: the cause of a failed connection;
//! - `driver`: the thread which joins all writers to one `producer`; `reader`: the thread which
//!   reads the log for the writers;
//! - `membership`: a member of a consumer group; `ownership`: takes over assigned partitions and
//!   hands over revoked partitions;
//! - `forward`: commands between the nodes;
//! - `indexer`: feeds the index behind the write, `gatherer`: joins the batches of all partitions;
//!   `loader`: streams from index and tail; `verifier`: compares the index with the digests in
//!   memory;
//! - [`store`], [`source`]: the two seams;
//! - [`rights`]: the rights of each role; `prober` probes rights without side effects, `guard`
//!   probes periodically while a process runs;
//! - [`operate`]: the operator's view of a log, outside of the service.

mod aside;
mod client;
pub mod config;
#[cfg(test)]
mod corpus;
mod driver;
pub mod error;
pub mod fold;
mod forward;
mod gatherer;
mod group;
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

//! The command handler, on the in-memory store and on one that answers as a script says.

mod answers;
mod cache;
mod domain;
mod duplicates;
mod forwarding;
mod pipelining;
mod scripted;
mod snapshots;
#[cfg(feature = "opentelemetry")]
mod trace;
pub(crate) mod wire;

//! Commands between the nodes of one service (protocol, section 6).
//!
//! A command for a stream that another node owns is produced to the commands topic, in the stream's
//! partition; the owner reads it there, handles it and answers on the replies topic.
//!
//! - `wire`: the bytes of commands, replies and announcements;
//! - `outbox`: sends them; `bus`: the calls of this node that wait for replies;
//! - `inbox`: handles the commands of the partitions that this node owns;
//! - `mark`: what the log says of how far they are;
//! - `settlement`: which commands are settled, and which answers wait for the log to say so;
//! - `nodes`: which nodes there are.

mod bus;
mod inbox;
mod mark;
pub(crate) mod nodes;
mod outbox;
mod settlement;
pub(crate) mod wire;

pub(crate) use bus::Bus;
pub(crate) use inbox::Inboxes;
pub(crate) use outbox::{Outbox, RecordLimits};

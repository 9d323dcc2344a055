//! Limits of a handler, and what a caller may say beside its command.

use std::time::{Duration, Instant};

use crate::ids::{CommandId, ExpectedVersion};

/// The limits of a [`CommandHandler`](super::CommandHandler).
#[derive(Debug, Clone)]
pub struct HandlerConfig {
    /// How often a command is decided before its last conflict is answered, and, where there are
    /// other nodes, how often in all it is sent while its outcome is unknown. Default 16.
    pub attempts_max: u32,
    /// The pause before the second retry, doubled for each one after; the first comes at once.
    /// Default 5 ms.
    pub backoff_base: Duration,
    /// The longest pause. Default 500 ms.
    pub backoff_max: Duration,
    /// How long a command may take, unless it brings a deadline. Default 10 s.
    pub deadline: Duration,
    /// How long a command that is only sent may wait for the owner of its stream, unless it brings a
    /// deadline; after it the owner drops the command and logs that. It must be below the time for
    /// which the log keeps commands. Default 1 hour.
    pub send_deadline: Duration,
    /// Streams kept in the cache; beyond it the one not used for longest is loaded again when it
    /// is needed. Default 10 000.
    pub hot_states_max: usize,
    /// Commands remembered a stream; for an older one the store is asked. Default 128.
    pub recent_commands_max: usize,
    /// Commands of one stream submitted and not yet settled; beyond it further ones wait. Default
    /// 256.
    pub pending_max: usize,
    /// Events after which a stream is saved again as a snapshot, where there are snapshots. Default
    /// 100.
    pub snapshot_every: u64,
}

impl Default for HandlerConfig {
    fn default() -> Self {
        Self {
            attempts_max: 16,
            backoff_base: Duration::from_millis(5),
            backoff_max: Duration::from_millis(500),
            deadline: Duration::from_secs(10),
            send_deadline: Duration::from_secs(60 * 60),
            hot_states_max: 10_000,
            recent_commands_max: 128,
            pending_max: 256,
            snapshot_every: 100,
        }
    }
}

/// The options of a command. The default has none. A [`CommandId`] converts to a request with that id
/// and no other option.
#[derive(Debug, Clone)]
pub struct Request {
    /// The id under which the command is applied at most once, such as an HTTP `Idempotency-Key`. A
    /// repeated call with the same id returns the result of the first one, whatever its command is. By
    /// default each call has an id of its own.
    pub command_id: Option<CommandId>,
    /// The version that the stream must have, such as an HTTP `If-Match`.
    pub expected: ExpectedVersion,
    /// Recorded with every event: joins what one request from outside set off.
    pub correlation_id: Option<String>,
    /// Recorded with every event: the event or command that led to this one.
    pub causation_id: Option<String>,
    /// Recorded with every event: W3C trace context, as in the header `traceparent`. Where traces are
    /// recorded, that of the command's own span takes its place; see [`trace`](crate::trace).
    pub trace_parent: Option<String>,
    /// When the caller stops waiting; by default after [`HandlerConfig::deadline`]. Of a command
    /// that is only sent: when it is not to be handled any more; by default after
    /// [`HandlerConfig::send_deadline`].
    pub deadline: Option<Instant>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            command_id: None,
            expected: ExpectedVersion::Any,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
            deadline: None,
        }
    }
}

impl From<CommandId> for Request {
    fn from(command_id: CommandId) -> Self {
        Self { command_id: Some(command_id), ..Self::default() }
    }
}

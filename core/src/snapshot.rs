//! Saved states of long streams.

use async_trait::async_trait;

use crate::ids::{CommandId, Position, StreamId, Version};
use crate::store::ReadError;

/// A saved state: what folding the stream up to `version` gave.
///
/// It can be deleted at any time without changing any answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The stream.
    pub stream: StreamId,
    /// The version the state stands at.
    pub version: Version,
    /// Tells whether today's code can read the state; one that differs is ignored.
    pub schema: String,
    /// The state, JSON.
    pub state: Vec<u8>,
    /// The stream's most recent commands, oldest first, and what they came to.
    pub recent_commands: Vec<(CommandId, Version, Position)>,
}

/// Keeps the newest snapshot of each stream.
#[async_trait]
pub trait SnapshotStore: Send + Sync + 'static {
    /// The newest snapshot, whatever its schema.
    async fn load(&self, stream: &StreamId) -> Result<Option<Snapshot>, ReadError>;

    /// Keeps it, unless a newer one of the same schema is there.
    async fn save(&self, snapshot: &Snapshot) -> Result<(), ReadError>;
}

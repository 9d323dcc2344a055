//! Saved states of long streams.

use std::fmt;

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec;
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

/// The schema of a state that can be saved, for [`Aggregate::SNAPSHOT`](crate::Aggregate::SNAPSHOT):
///
/// ```
/// # use kafold_core::{Aggregate, DomainEvent, snapshot::SnapshotSchema};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
/// # enum Counted { #[event("counter.counted")] Counted }
/// #[derive(Clone, Default, Serialize, Deserialize)]
/// struct Counter(u64);
///
/// impl Aggregate for Counter {
///     const CATEGORY: &'static str = "counter";
///     const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("counter.1"));
/// #   type Command = ();
/// #   type Event = Counted;
/// #   type Error = std::convert::Infallible;
/// #   fn decide(&self, _: &()) -> Result<Vec<Counted>, Self::Error> { Ok(vec![Counted::Counted]) }
/// #   fn evolve(&mut self, _: &Counted) { self.0 += 1 }
///     // …
/// }
/// ```
pub struct SnapshotSchema<A> {
    pub(crate) name: &'static str,
    pub(crate) encode: fn(&A) -> serde_json::Result<Vec<u8>>,
    pub(crate) decode: fn(&[u8]) -> serde_json::Result<A>,
}

impl<A> Clone for SnapshotSchema<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for SnapshotSchema<A> {}

impl<A> fmt::Debug for SnapshotSchema<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SnapshotSchema").field(&self.name).finish()
    }
}

impl<A: Serialize + DeserializeOwned> SnapshotSchema<A> {
    /// Returns the schema of this name. The name stands for the shape and the meaning of the state:
    /// change the name with every change of the fields or of `evolve`. Saved states of another schema are
    /// ignored.
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            encode: |state| codec::to_json(state),
            decode: |json| serde_json::from_slice(json),
        }
    }
}

/// Keeps the newest snapshot of each stream.
#[async_trait]
pub trait SnapshotStore: Send + Sync + 'static {
    /// The newest snapshot, whatever its schema.
    async fn load(&self, stream: &StreamId) -> Result<Option<Snapshot>, ReadError>;

    /// Keeps it, unless a newer one of the same schema is there.
    async fn save(&self, snapshot: &Snapshot) -> Result<(), ReadError>;
}

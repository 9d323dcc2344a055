//! Domain events, and events before and after the append.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::codec::{Codec, Upcasters};
use crate::ids::{CommandId, Position, StreamId, Version};

/// The stable name and version of one kind of event, shown `order.placed.v1`.
///
/// The shown form is what a record carries as `ce_type`; it never changes once written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EventType {
    /// What happened, such as `order.placed`.
    pub name: &'static str,
    /// Counts the shapes this event has had, from 1.
    pub version: u32,
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.v{}", self.name, self.version)
    }
}

/// Facts of one aggregate: an enum whose variants have stable names.
///
/// Derive it: `#[derive(DomainEvent)]` with `#[event("order.placed", version = 1)]` on every
/// variant, and `#[event(category = "order")]` on the enum. A payload holds the fields of the variant
/// alone, as JSON; the type name tells the variant.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a domain event",
    note = "derive it: #[derive(DomainEvent, Serialize, Deserialize, Clone, Debug)] on an enum"
)]
pub trait DomainEvent:
    Serialize + DeserializeOwned + Clone + fmt::Debug + Send + Sync + 'static
{
    /// The category of the streams that have these events: `#[event(category = "order")]` on the enum.
    ///
    /// A read model passes by events of other categories. In this category it stops at an event type
    /// that the enum neither has nor ignores, since a newer program wrote it. Without a category a
    /// read model learns it from the log, and stops where an event type occurs in two categories.
    const CATEGORY: Option<&'static str> = None;

    /// Names of events which the enum leaves out on purpose: `#[event(ignore("order.noted"))]`.
    const IGNORED: &'static [&'static str] = &[];

    /// The type of every variant, in the order of declaration. Two equal names do not compile.
    const TYPES: &'static [EventType];

    /// Which of [`DomainEvent::TYPES`] this event is.
    fn type_index(&self) -> usize;

    /// The stable name and version of this event.
    fn event_type(&self) -> EventType {
        Self::TYPES[self.type_index()]
    }

    /// Returns `true` if both events are equal by `PartialEq`, and always without `PartialEq`. The codec
    /// compares a decided event with the event that is read from its JSON. Serialized forms alone do
    /// not tell the variants of an untagged enum apart.
    #[doc(hidden)]
    fn is_same(&self, _: &Self) -> bool {
        true
    }

    /// How payloads of older versions become payloads of the current one.
    fn upcasters() -> Upcasters {
        Upcasters::none()
    }

    /// The enum's codec, made once: [`Codec::of`] in a `static OnceLock`.
    fn codec() -> &'static Codec;
}

/// What is known about an event beside what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Identifies the event everywhere; a UUIDv7.
    pub event_id: Uuid,
    /// When the writer recorded it, with microseconds; of no meaning for the order of events.
    pub recorded_at: DateTime<Utc>,
    /// Joins everything that one request from outside set off.
    pub correlation_id: Option<String>,
    /// The event or command that led to this one.
    pub causation_id: Option<String>,
    /// W3C trace context, as in the header `traceparent`.
    pub trace_parent: Option<String>,
}

/// An event that is to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// The shown form of its [`EventType`].
    pub event_type: Arc<str>,
    /// JSON.
    pub payload: Arc<[u8]>,
    /// Its identity and origin.
    pub metadata: Metadata,
}

/// Most events one command may decide: the record header counts them in 16 bits.
pub const COMMIT_EVENTS_MAX: usize = u16::MAX as usize;

/// The events of one command: they become visible whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    command_id: CommandId,
    events: Vec<NewEvent>,
}

/// Events that cannot be one commit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a commit has 1 to {COMMIT_EVENTS_MAX} events, this one has {0}: split the command")]
pub struct InvalidCommit(usize);

impl Commit {
    /// The events that `command_id` decided, 1 to [`COMMIT_EVENTS_MAX`] of them.
    pub fn new(command_id: CommandId, events: Vec<NewEvent>) -> Result<Self, InvalidCommit> {
        if events.is_empty() || events.len() > COMMIT_EVENTS_MAX {
            return Err(InvalidCommit(events.len()));
        }
        Ok(Self { command_id, events })
    }

    /// The command that decided them.
    pub fn command_id(&self) -> CommandId {
        self.command_id
    }

    /// The events, never empty.
    pub fn events(&self) -> &[NewEvent] {
        &self.events
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.events.len() as u64
    }
}

/// An event as the log holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    /// The stream it belongs to.
    pub stream: StreamId,
    /// Its number in the stream, from 1.
    pub version: Version,
    /// Its place in the log.
    pub position: Position,
    /// The command that decided it.
    pub command_id: CommandId,
    /// The shown form of its [`EventType`].
    pub event_type: Arc<str>,
    /// JSON.
    pub payload: Arc<[u8]>,
    /// Its identity and origin.
    pub metadata: Metadata,
}

impl RecordedEvent {
    /// Returns the recorded event with its decoded payload.
    pub fn with<E>(&self, event: E) -> Recorded<E> {
        Recorded {
            event,
            stream: self.stream.clone(),
            version: self.version,
            position: self.position,
            command_id: self.command_id,
            metadata: self.metadata.clone(),
        }
    }
}

/// A recorded event with its payload decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded<E> {
    /// What happened.
    pub event: E,
    /// The stream it happened to.
    pub stream: StreamId,
    /// Its number in the stream, from 1.
    pub version: Version,
    /// Its place in the log.
    pub position: Position,
    /// The command that decided it.
    pub command_id: CommandId,
    /// Its identity and origin.
    pub metadata: Metadata,
}

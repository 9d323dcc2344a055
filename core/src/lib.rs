//! The domain model and the seams of kafold.
//!
//! Pure: no IO, no database, no broker; with default features not even a runtime. A domain is an
//! [`Aggregate`] whose [`DomainEvent`]s are its truth; a [`CommandHandler`] loads, decides and
//! appends; an [`EventStore`] keeps what was decided and an [`EventSource`] hands everything to
//! those who read.
//!
//! - [`ids`]: streams, versions, positions, commands, as types that cannot be swapped;
//! - [`event`]: domain events, and events before and after the append;
//! - [`event_set`]: the events that a read model reads, of one aggregate or of several;
//! - [`aggregate`]: the consistency boundary;
//! - [`handler`]: the command handler with the one retry loop;
//! - [`forward`]: the seam [`CommandBus`] between the nodes of one service;
//! - [`store`]: the seams [`EventStore`] and [`EventSource`], their errors;
//! - [`index`]: the seam [`StreamIndex`] to events by stream and version;
//! - [`snapshot`]: saved states of long streams;
//! - [`codec`]: JSON payloads and upcasters;
//! - [`digest`]: digests which detect a missing or changed event in a copy of events;
//! - [`filter`]: what was never there;
//! - [`row`]: a read model's row as named columns;
//! - [`memory`]: the exact in-memory store and index: whoever writes another reads them first;
//! - [`projecting`]: the projection on whose behalf a task runs;
//! - [`trace`]: trace context on its way through commands, events and readers;
//! - [`scenario`]: given, when, then for the tests of a domain;
//! - [`secret`]: passwords and keys named in a URL by file or variable;
//! - [`timeline`]: clock events, which move event time on without other events;
//! - [`window`]: windows of event time, and which events are late;
//! - [`clock`]: the only way here to time and randomness.

// The derives write `::kafold_core::…`, also in this crate's own tests.
#[allow(unused_extern_crates, reason = "used where this crate derives, which is not everywhere")]
extern crate self as kafold_core;

pub mod aggregate;
pub mod clock;
pub mod codec;
pub mod digest;
pub mod event;
pub mod event_set;
pub mod filter;
pub mod forward;
pub mod handler;
pub mod ids;
pub mod index;
pub mod memory;
#[doc(hidden)]
pub mod mutant;
pub mod projecting;
pub mod row;
pub mod scenario;
pub mod secret;
pub mod snapshot;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod timeline;
pub mod trace;
pub mod window;

pub use aggregate::Aggregate;
pub use clock::{Clock, IdGenerator};
pub use event::{Commit, DomainEvent, EventType, Metadata, NewEvent, Recorded, RecordedEvent};
pub use event_set::EventSet;
pub use filter::Filter;
pub use forward::{CommandBus, CommandExecutor, ForwardedCommand, Reply};
pub use handler::{CommandHandler, HandleError, Handled};
pub use ids::{CommandId, ExpectedVersion, Offset, Partition, Position, StreamId, Version};
pub use index::StreamIndex;
pub use kafold_core_macros::{DomainEvent, EventSet, Row};
pub use memory::MemoryStore;
pub use row::Row;
pub use snapshot::{Snapshot, SnapshotSchema, SnapshotStore};
pub use store::{AppendError, Appended, EventSource, EventStore, ReadError};
pub use uuid::Uuid;

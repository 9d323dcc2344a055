//! What the worker runs: read models and projections behind one seam.

use std::any::Any;
use std::collections::HashSet;
use std::fmt;

use async_trait::async_trait;
use kafold_core::codec::CodecError;
use kafold_core::{Partition, Position, RecordedEvent, StreamId, Version};

use crate::clock_step::{ClockOf, ClockSteps};
use crate::definition::Definition;
use crate::generation::Generation;
use crate::projection::{Part, ProjectionBatch};
use crate::transaction::Transaction;

/// A read model or a projection.
#[async_trait]
pub(crate) trait Handler: Send + Sync + 'static {
    fn definition(&self) -> &Definition;

    /// Makes the tables of a generation, if they are not there. Runs at every start.
    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), ApplyError>;

    /// Decodes a batch before its turn comes, on the reader's task. By default there is nothing to do.
    fn decode_ahead(&self, part: &Part) {
        let _ = part;
    }

    /// Prepares a round before the transaction is open. `clock_of` returns the clocks at the beginning of the
    /// round, for windowed models.
    fn prepare<'w>(
        &'w self,
        round: &'w ProjectionBatch,
        clock_of: ClockOf<'_>,
    ) -> Result<Box<dyn Work + 'w>, Fault>;

    /// What its work will remember of rows between transactions, at first nothing; `None` if it
    /// remembers nothing at all. Of the partitions `from_start` there are no rows yet.
    fn memory(&self, from_start: HashSet<Partition>, rows_max: usize) -> Option<Memory> {
        let _ = (from_start, rows_max);
        None
    }
}

/// What a handler remembers of rows; see [`Handler::memory`].
pub(crate) type Memory = Box<dyn Any + Send + Sync>;

/// One prepared round. May be applied again after a rollback.
#[async_trait]
pub(crate) trait Work: Send + Sync {
    /// Writes what it does to the rows into the memory as well: whoever does not see the transaction
    /// commit must drop that.
    async fn apply(
        &self,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<(), ApplyError>;

    /// Returns the clocks after the round and the counts of its events, for windowed models.
    fn clock_steps(&self) -> Option<&ClockSteps> {
        None
    }
}

/// Which build of the tables a batch goes into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'t> {
    pub(crate) name: &'t str,
    pub(crate) generation: Generation,
}

/// Why a batch was not applied.
#[derive(Debug)]
pub(crate) enum ApplyError {
    /// The database said so; whether it is the event's fault depends on what it said.
    Database(sqlx::Error),
    /// The handler's or the event's fault.
    Fault(Fault),
}

impl From<sqlx::Error> for ApplyError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<Fault> for ApplyError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A failure that trying again elsewhere or later is not expected to cure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The event, when the handler is known to have been at it.
    pub(crate) at: Option<Position>,
    pub(crate) reason: String,
    /// Whether it is of this event, so that setting its stream aside lets the others go on.
    pub(crate) parks: bool,
}

impl Fault {
    pub(crate) fn at(event: &RecordedEvent, reason: impl fmt::Display) -> Self {
        let RecordedEvent { position, event_type, stream, version, .. } = event;
        Self::of(*position, event_type, *version, stream, reason)
    }

    /// The fault of an event with this position, type, version and stream.
    pub(crate) fn of(
        position: Position,
        event_type: impl fmt::Display,
        version: Version,
        stream: &StreamId,
        reason: impl fmt::Display,
    ) -> Self {
        let event = format!("event {position} ({event_type}, version {version} of {stream})");
        Self { at: Some(position), ..Self::somewhere(format!("{event}: {reason}")) }
    }

    /// An event that the program cannot decode. An event of a newer program does not park its stream:
    /// the projection stops, and a worker of the newer program takes its partitions over.
    pub(crate) fn unreadable(event: &RecordedEvent, error: &CodecError) -> Self {
        let is_newer =
            matches!(error, CodecError::UnknownType { .. } | CodecError::NewerVersion { .. });
        Self { parks: !is_newer, ..Self::at(event, error) }
    }

    pub(crate) fn somewhere(reason: impl fmt::Display) -> Self {
        Self { at: None, reason: storable(reason.to_string()), parks: true }
    }

    /// One that every event would meet.
    pub(crate) fn of_all(reason: impl fmt::Display) -> Self {
        Self { parks: false, ..Self::somewhere(reason) }
    }
}

/// Escapes the character NUL, which an error may quote from a payload and PostgreSQL does not store.
fn storable(reason: String) -> String {
    if reason.contains('\0') { reason.replace('\0', "\\0") } else { reason }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    storable(format!("panicked: {}", text.unwrap_or("(no message)")))
}

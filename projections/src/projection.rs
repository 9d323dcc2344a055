//! [`Projection`]: events to rows by hand.

use std::any::Any;
use std::error::Error;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use futures_util::FutureExt;
use kafold_core::codec::CodecError;
use kafold_core::event_set::{EventSet, ReadEvent};
use kafold_core::store::Batch;
use kafold_core::{Recorded, RecordedEvent, projecting};

use crate::clock_step::ClockOf;
use crate::definition::Definition;
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Memory, Target, Work, panic_text};
use crate::transaction::{Transaction, WrongDatabase};

/// Whatever went wrong in a handler: any error converts with `?`.
pub type HandlerError = Box<dyn Error + Send + Sync>;

/// Events to rows by hand: a batch and the open transaction of the chosen database.
///
/// What it writes in the transaction commits together with the checkpoint, so every event takes
/// effect exactly once; what it does outside of the transaction may happen again. A command to a
/// [`CommandHandler`](kafold_core::CommandHandler) is refused, since on SQLite it would wait for this
/// very transaction: write down what is to be sent, and send it from another task. A batch that
/// failed is applied again, whole or in smaller parts. An [`sqlx::Error`] that speaks of the
/// database (no connection, a deadlock) is retried for ever, one that speaks of the statement (no such
/// table) stops the projection; any other error, and a panic, is a failure of the event, tried
/// [`fault_attempts_max`](crate::ProjectionConfig::fault_attempts_max) times before
/// [`fault_policy`](crate::ProjectionConfig::fault_policy) decides.
#[async_trait]
pub trait Projection: Send + Sync + 'static {
    /// Its name in checkpoints, status and commands: `[a-z][a-z0-9_]*`, at most 50 characters.
    fn name(&self) -> &str;

    /// Raise it when the same events now become other rows: the worker then refuses to go on with
    /// the rows of the old version until they are rebuilt. Default 1.
    fn version(&self) -> u32 {
        1
    }

    /// The tables it writes, by the plain names under which queries read them; each is named like a
    /// projection. Default: none of the worker's concern, and then the projection cannot be rebuilt.
    fn tables(&self) -> &[&str] {
        &[]
    }

    /// Makes its tables in this generation, named [`Generation::table`], if they are not there. Runs
    /// at every start, in a transaction; the worker makes the views of the plain names. Default:
    /// nothing.
    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        let _ = (generation, tx);
        Ok(())
    }

    /// Writes what the events say, into the tables of this generation.
    async fn apply(
        &self,
        batch: &ProjectionBatch,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError>;
}

/// Events of one or several partitions; within a partition in log order and whole commits.
#[derive(Debug, Clone, Default)]
pub struct ProjectionBatch {
    parts: Vec<Part>,
}

/// One batch of the source, and what its handler has made of it.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    batch: Batch,
    decoded: OnceLock<Arc<dyn Any + Send + Sync>>,
}

impl Part {
    /// What the handler makes of it, which needs nothing but the batch: made once, by the reader while
    /// the transaction before is under way, or when it is needed.
    pub(crate) fn decoded<T: Any + Send + Sync>(&self, decode: impl FnOnce(&Batch) -> T) -> &T {
        let decoded = self.decoded.get_or_init(|| Arc::new(decode(&self.batch)));
        decoded.downcast_ref().expect("a batch is for one handler")
    }

    pub(crate) fn batch(&self) -> &Batch {
        &self.batch
    }

    /// To change it.
    pub(crate) fn batch_mut(&mut self) -> &mut Batch {
        self.decoded.take();
        &mut self.batch
    }
}

impl From<Batch> for Part {
    fn from(batch: Batch) -> Self {
        Self { batch, decoded: OnceLock::new() }
    }
}

impl ProjectionBatch {
    /// Every event, whatever aggregate it belongs to.
    pub fn events(&self) -> impl Iterator<Item = &RecordedEvent> {
        self.batches().flat_map(|batch| &batch.events)
    }

    /// How many events there are.
    pub fn count(&self) -> usize {
        self.batches().map(|batch| batch.events.len()).sum()
    }

    /// Returns the events of `E`, decoded. Events of other categories, and those that `E` ignores, are
    /// left out. An event of `E`'s categories that `E` cannot read is an error: it has an unknown type
    /// or a newer version, or it is malformed. An `E` without
    /// [`CATEGORY`](kafold_core::DomainEvent::CATEGORY) leaves out unknown types of every category.
    pub fn decode<E: EventSet>(&self) -> Result<Vec<Recorded<E>>, UnreadableEvent> {
        let read = |event| match decode(event) {
            Ok(ReadEvent::Event(event)) => Some(Ok(event)),
            Ok(ReadEvent::PassedBy | ReadEvent::Unknown) => None,
            Err(unreadable) => Some(Err(unreadable)),
        };
        self.events().filter_map(read).collect()
    }

    pub(crate) fn batches(&self) -> impl ExactSizeIterator<Item = &Batch> {
        self.parts.iter().map(Part::batch)
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Keeps the first `count` batches and answers the others.
    pub(crate) fn split_off(&mut self, count: usize) -> Self {
        Self { parts: self.parts.split_off(count) }
    }

    pub(crate) fn parts_mut(&mut self) -> &mut Vec<Part> {
        &mut self.parts
    }
}

/// An event that its own enum cannot read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event {}: {error}", event.position)]
pub struct UnreadableEvent {
    /// The event.
    pub event: Box<RecordedEvent>,
    /// Why.
    #[source]
    pub error: CodecError,
}

/// Decodes an event of the set.
pub(crate) fn decode<E: EventSet>(
    event: &RecordedEvent,
) -> Result<ReadEvent<Recorded<E>>, UnreadableEvent> {
    let read = E::read(event).map(|read| read.map(|decoded| event.with(decoded)));
    read.map_err(|error| UnreadableEvent { event: Box::new(event.clone()), error })
}

/// A [`Projection`] as the worker runs it.
pub(crate) struct ProjectionHandler<P> {
    projection: P,
    name: Arc<str>,
    definition: Definition,
}

impl<P: Projection> ProjectionHandler<P> {
    pub(crate) fn new(projection: P) -> Self {
        let (name, version) = (projection.name(), projection.version());
        let definition = Definition::of_projection(name, version, projection.tables());
        let name = Arc::from(projection.name());
        Self { projection, name, definition }
    }
}

#[async_trait]
impl<P: Projection> Handler for ProjectionHandler<P> {
    fn definition(&self) -> &Definition {
        &self.definition
    }

    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), ApplyError> {
        let setup = self.projection.setup(generation, tx);
        caught(projecting::on_behalf_of(&self.name, setup)).await
    }

    fn prepare<'w>(
        &'w self,
        round: &'w ProjectionBatch,
        _: ClockOf<'_>,
    ) -> Result<Box<dyn Work + 'w>, Fault> {
        Ok(Box::new(ProjectionWork { handler: self, batch: round }))
    }
}

struct ProjectionWork<'w, P> {
    handler: &'w ProjectionHandler<P>,
    batch: &'w ProjectionBatch,
}

#[async_trait]
impl<P: Projection> Work for ProjectionWork<'_, P> {
    async fn apply(
        &self,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        _memory: Option<&mut Memory>,
    ) -> Result<(), ApplyError> {
        let ProjectionHandler { projection, name, .. } = self.handler;
        let apply = projection.apply(self.batch, target.generation, tx);
        caught(projecting::on_behalf_of(name, apply)).await
    }
}

async fn caught(run: impl Future<Output = Result<(), HandlerError>>) -> Result<(), ApplyError> {
    // What a panic leaves half done is in the transaction, which is rolled back.
    match AssertUnwindSafe(run).catch_unwind().await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(told(error)),
        Err(panic) => Err(Fault::somewhere(panic_text(&*panic)).into()),
    }
}

fn told(error: HandlerError) -> ApplyError {
    let error = match error.downcast::<sqlx::Error>() {
        Ok(database) => return ApplyError::Database(*database),
        Err(other) => other,
    };
    let error = match error.downcast::<UnreadableEvent>() {
        Ok(unreadable) => return Fault::unreadable(&unreadable.event, &unreadable.error).into(),
        Err(other) => other,
    };
    match error.is::<WrongDatabase>() {
        true => Fault::of_all(error).into(),
        false => Fault::somewhere(error).into(),
    }
}

//! [`ReadModel`]: a row that is folded by key.

use std::collections::HashSet;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};

use async_trait::async_trait;
use kafold_core::event_set::{EventSet, ReadEvent};
use kafold_core::mutant::{self, Mutant};
use kafold_core::row::Row;
use kafold_core::store::Batch;
use kafold_core::{Partition, Recorded, RecordedEvent};

use crate::categories::{Sightings, StoredCategories};
use crate::clock_step::ClockOf;
use crate::definition::Definition;
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Memory, Target, Work, panic_text};
use crate::memory::RowMemory;
use crate::projection::{Part, ProjectionBatch, decode};
use crate::rows::{self, Fold, FoldedRow, RoundRows, Touch};
use crate::table::Table;
use crate::transaction::Transaction;

/// A row that is folded by key from the events of one aggregate or of several. The table of the rows is made from the
/// row, and its name is that of the model.
///
/// Pure, like an aggregate: the same events give the same rows on either database, in batches of any
/// size. A fold gets its row as the database gives it back: timestamps have microseconds
/// ([`ColumnValue::normalize`](kafold_core::row::ColumnValue::normalize)). A row that the database cannot hold is a fault of its event, which names
/// column and value: a number that is not finite, the character NUL in a text, a text too long for
/// its index ([`INDEXED_TEXT_BYTES_MAX`](kafold_core::row::INDEXED_TEXT_BYTES_MAX)). Refuse such values where
/// the command is decided. Integers have 64 bits with sign: bound amounts and counts such that no sum
/// passes `i64::MAX` (9.2 · 10¹⁸), and add with `checked_add` or `saturating_add`. A panic in a fold
/// is a fault of its event, too. [`projection_test`](crate::projection_test) tests a fold without a database.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a read model",
    label = "not a read model",
    note = "a read model is its row: `#[derive(Clone, PartialEq, Row)]` on the struct, then `impl ReadModel` for it"
)]
pub trait ReadModel: Row {
    /// The name of the model and of its view: `[a-z][a-z0-9_]*`, at most 50 characters. The view is in the
    /// default schema, on the table `NAME__g1`.
    const NAME: &'static str;

    /// Raise it when `keys` or `fold` now make other rows of the same events: the worker then refuses
    /// to go on with the old rows until they are rebuilt. Changed columns are noticed by themselves.
    const VERSION: u32 = 1;

    /// `true` if events of several partitions may touch one row, as those of the sales of a day do. Such rows
    /// are written under a lock, and their fold must not depend on the order between partitions. Rows
    /// with a key of `#[row(stream)]` are not shared: one worker writes each of them and remembers it
    /// ([`remembered_rows_max`](crate::ProjectionConfig::remembered_rows_max)). Pause the projection before
    /// you change such a row by hand. Set `false` for another key only if each row belongs to one stream, as
    /// one with the id of an event does.
    const SHARED: bool = Self::STREAM_KEY.is_none();

    /// The events that the model reads, of one [category](kafold_core::DomainEvent::CATEGORY) or of several
    /// ([`EventSet`]). Events of other categories pass the model by. An unknown event type of a category stops the
    /// model, because a newer program wrote the event, unless the enum
    /// [ignores](kafold_core::DomainEvent::IGNORED) the type.
    type Event: EventSet;

    /// Returns the keys of the rows that the event touches: none, one or several. A row with a key of
    /// `#[row(stream)]` belongs to the stream of the event, and its model has no use for this function. Another
    /// model without this function does not compile:
    ///
    /// ```compile_fail
    /// # use kafold_core::{DomainEvent, Recorded, Row};
    /// # use kafold_projections::ReadModel;
    /// # use serde::{Deserialize, Serialize};
    /// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
    /// # enum AccountEvent { #[event("account.opened")] Opened }
    /// #[derive(Clone, PartialEq, Row)]
    /// struct Account {
    ///     #[row(key)] // compiles with #[row(stream)]
    ///     id: String,
    /// }
    ///
    /// impl ReadModel for Account {
    ///     const NAME: &'static str = "accounts";
    ///     type Event = AccountEvent;
    ///
    ///     fn fold(id: &String, _: Option<Self>, _: &Recorded<AccountEvent>) -> Option<Self> {
    ///         Some(Self { id: id.clone() })
    ///     }
    /// }
    /// # let keys: fn(&Recorded<AccountEvent>) -> Vec<String> = Account::keys;
    /// # assert!(keys as usize != 0);
    /// ```
    fn keys(event: &Recorded<Self::Event>) -> Vec<Self::Key> {
        let key = const {
            match Self::STREAM_KEY {
                Some(key) => key,
                None => {
                    panic!("a read model needs `keys`, unless the key of its row is #[row(stream)]")
                }
            }
        };
        vec![key(event.stream.id())]
    }

    /// Returns the row after the event; `None` when there is none any more. The returned row has the key
    /// `key`. `row` is the row before the event; `None` when there is none.
    fn fold(key: &Self::Key, row: Option<Self>, event: &Recorded<Self::Event>) -> Option<Self>;
}

type Key<M> = <M as Row>::Key;

/// The fold of a [`ReadModel`].
pub(crate) struct ModelFold<M>(PhantomData<M>);

impl<M: ReadModel> Fold for ModelFold<M> {
    type Row = M;
    type Event = M::Event;

    fn fold(key: &Key<M>, row: Option<M>, event: &Recorded<M::Event>) -> Option<M> {
        M::fold(key, row, event)
    }
}

/// A [`ReadModel`] as the worker runs it.
pub(crate) struct ModelHandler<M> {
    definition: Definition,
    categories: StoredCategories,
    model: PhantomData<fn() -> M>,
}

impl<M: ReadModel> ModelHandler<M> {
    pub(crate) fn new() -> Self {
        Self {
            definition: Definition::of_model::<M>(),
            categories: StoredCategories::default(),
            model: PhantomData,
        }
    }
}

#[async_trait]
impl<M: ReadModel> Handler for ModelHandler<M> {
    fn definition(&self) -> &Definition {
        &self.definition
    }

    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), ApplyError> {
        Ok(table(&self.definition, generation).create(tx).await?)
    }

    fn decode_ahead(&self, part: &Part) {
        part.decoded(touched::<M>);
    }

    fn prepare<'w>(
        &'w self,
        round: &'w ProjectionBatch,
        _: ClockOf<'_>,
    ) -> Result<Box<dyn Work + 'w>, Fault> {
        Ok(Box::new(ModelWork::<M>::new(self, round)?))
    }

    fn memory(&self, from_start: HashSet<Partition>, rows_max: usize) -> Option<Memory> {
        let rows_max = NonZeroUsize::new(rows_max).filter(|_| !M::SHARED)?;
        Some(Box::new(RowMemory::<M>::new(from_start, rows_max)))
    }
}

/// A round of one model, decoded.
struct ModelWork<'w, M: ReadModel> {
    model: &'w ModelHandler<M>,
    /// The first event of each category in each batch, for an enum that declares no category.
    sightings: Vec<(&'w RecordedEvent, bool)>,
    rows: RoundRows<'w, ModelFold<M>, &'w Key<M>>,
}

/// A decoded batch.
struct DecodedBatch<M: ReadModel> {
    events: Vec<Touched<M>>,
    sightings: Sightings,
}

/// An event and the rows it touches, each once.
struct Touched<M: ReadModel> {
    event: Recorded<M::Event>,
    keys: Vec<Key<M>>,
}

impl<M: ReadModel> Touched<M> {
    fn touches(&self) -> impl Iterator<Item = Touch<'_, ModelFold<M>, &Key<M>>> {
        self.keys.iter().map(|key| (key, &self.event))
    }
}

impl<'w, M: ReadModel> ModelWork<'w, M> {
    fn new(model: &'w ModelHandler<M>, round: &'w ProjectionBatch) -> Result<Self, Fault> {
        let mut touches = Vec::with_capacity(round.count());
        let mut sightings = Vec::new();
        for part in round.parts() {
            let decoded = part.decoded(touched::<M>).as_ref().map_err(Fault::clone)?;
            touches.extend(decoded.events.iter().flat_map(Touched::touches));
            sightings.extend(decoded.sightings.events(part.batch()));
        }
        Ok(Self { model, sightings, rows: RoundRows::new(touches) })
    }
}

/// Folds a batch without a database. Returns each touched row with its key, as the database gives it back.
pub(crate) fn fold_batch<M: ReadModel>(
    batch: &Batch,
    before: impl Fn(&M::Key) -> Option<M>,
) -> Result<Vec<FoldedRow<ModelFold<M>>>, Fault> {
    let decoded = touched::<M>(batch)?;
    let touches = decoded.events.iter().flat_map(Touched::touches).collect();
    RoundRows::<ModelFold<M>, _>::new(touches).folded(before)
}

/// Decodes the events of a batch, up to the first that cannot be read.
fn touched<M: ReadModel>(batch: &Batch) -> Result<DecodedBatch<M>, Fault> {
    let events = Vec::with_capacity(batch.events.len());
    let mut decoded = DecodedBatch { events, sightings: Sightings::default() };
    for (place, recorded) in batch.events.iter().enumerate() {
        // A panic leaves nothing behind: an event is added whole, as the last thing done.
        let read = catch_unwind(AssertUnwindSafe(|| touch(batch, place, &mut decoded)));
        let read = read.unwrap_or_else(|panic| Err(Fault::at(recorded, panic_text(&*panic))));
        match read {
            Err(_) if mutant::active(Mutant::SkipUnreadable) => {}
            read => read?,
        }
    }
    Ok(decoded)
}

/// Adds the event at a place of the batch, if it touches a row.
fn touch<M: ReadModel>(
    batch: &Batch,
    place: usize,
    into: &mut DecodedBatch<M>,
) -> Result<(), Fault> {
    let recorded = &batch.events[place];
    let read = decode::<M::Event>(recorded);
    let read = read.map_err(|unreadable| Fault::unreadable(recorded, &unreadable.error))?;
    if M::Event::LEARNS_CATEGORY && !matches!(read, ReadEvent::PassedBy) {
        into.sightings.add(batch, place, matches!(read, ReadEvent::Event(_)));
    }
    let ReadEvent::Event(event) = read else { return Ok(()) };
    let keys = match M::STREAM_KEY {
        Some(key) => vec![key(event.stream.id())],
        None => M::keys(&event),
    };
    let keys = keys.into_iter().map(rows::stored_key::<M>);
    let mut keys: Vec<_> =
        keys.collect::<Result<_, _>>().map_err(|invalid| Fault::at(recorded, invalid))?;
    keys.sort_unstable();
    keys.dedup();
    if !keys.is_empty() {
        into.events.push(Touched { event, keys });
    }
    Ok(())
}

#[async_trait]
impl<M: ReadModel> Work for ModelWork<'_, M> {
    async fn apply(
        &self,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<(), ApplyError> {
        if !self.sightings.is_empty() {
            self.model.categories.store::<M::Event>(target, tx, &self.sightings).await?;
        }
        if self.rows.is_empty() {
            return Ok(());
        }
        let memory = memory.and_then(|memory| memory.downcast_mut::<RowMemory<M>>());
        let table = table(&self.model.definition, target.generation);
        if M::SHARED && !mutant::active(Mutant::SharedRowsUnlocked) {
            rows::lock(target, tx).await?;
        }
        self.rows.apply(&table, target, tx, memory).await
    }
}

fn table(definition: &Definition, generation: Generation) -> Table {
    Table::new(definition, generation).expect("a read model has columns")
}

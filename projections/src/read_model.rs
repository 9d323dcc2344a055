//! [`ReadModel`]: rows folded by key.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};

use async_trait::async_trait;
use kafold_core::mutant::{self, Mutant};
use kafold_core::row::{ColumnRole, ColumnValue, InvalidValue, Row, Value};
use kafold_core::store::Batch;
use kafold_core::{DomainEvent, Partition, Recorded, RecordedEvent};

use crate::categories::{Sightings, StoredCategories};
use crate::definition::Definition;
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Memory, Target, Work, panic_text};
use crate::memory::RowMemory;
use crate::projection::{Part, ProjectionBatch, decode, ignores};
use crate::table::Table;
use crate::transaction::Transaction;

/// Rows folded by key from the events of one aggregate; the table is made from the row.
///
/// Pure, like an aggregate: the same events give the same rows on either database, in batches of any
/// size. A fold gets its row as the database gives it back: timestamps have microseconds
/// ([`ColumnValue::normalize`]). A row that the database cannot hold is a fault of its event, which names
/// column and value: a number that is not finite, the character NUL in a text, a text too long for
/// its index ([`INDEXED_TEXT_BYTES_MAX`](kafold_core::row::INDEXED_TEXT_BYTES_MAX)). Refuse such values where
/// the command is decided. Integers have 64 bits with sign: bound amounts and counts such that no sum
/// passes `i64::MAX` (9.2 · 10¹⁸), and add with `checked_add` or `saturating_add`. A panic in a fold
/// is a fault of its event, too.
pub trait ReadModel: Send + Sync + 'static {
    /// Its name and that of its view: `[a-z][a-z0-9_]*`, at most 50 characters. The view is in the
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
    const SHARED: bool = <Self::Row as Row>::STREAM_KEY.is_none();

    /// The events of one [category](DomainEvent::CATEGORY) that the model reads. Events of other categories
    /// pass the model by. An unknown event type of the category stops the model, because a newer program
    /// wrote the event, unless the enum [ignores](DomainEvent::IGNORED) the type.
    type Event: DomainEvent;

    /// The row.
    type Row: Row;

    /// Returns the keys of the rows that the event touches: none, one or several. A model whose row has a
    /// key of `#[row(stream)]` has the row of the event's stream, and no use for this function. Another
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
    /// struct Accounts;
    ///
    /// impl ReadModel for Accounts {
    ///     const NAME: &'static str = "accounts";
    ///     type Event = AccountEvent;
    ///     type Row = Account;
    ///
    ///     fn fold(
    ///         id: &String,
    ///         _: Option<Account>,
    ///         _: &Recorded<AccountEvent>,
    ///     ) -> Option<Account> {
    ///         Some(Account { id: id.clone() })
    ///     }
    /// }
    /// # let keys: fn(&Recorded<AccountEvent>) -> Vec<String> = Accounts::keys;
    /// # assert!(keys as usize != 0);
    /// ```
    fn keys(event: &Recorded<Self::Event>) -> Vec<<Self::Row as Row>::Key> {
        let key = const {
            match <Self::Row as Row>::STREAM_KEY {
                Some(key) => key,
                None => {
                    panic!("a read model needs `keys`, unless the key of its row is #[row(stream)]")
                }
            }
        };
        vec![key(event.stream.id())]
    }

    /// The row after the event; `None` when there is none any more. The returned row has the key
    /// that was asked for.
    fn fold(
        key: &<Self::Row as Row>::Key,
        row: Option<Self::Row>,
        event: &Recorded<Self::Event>,
    ) -> Option<Self::Row>;
}

type Key<M> = <<M as ReadModel>::Row as Row>::Key;

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

    fn prepare<'w>(&'w self, round: &'w ProjectionBatch) -> Result<Box<dyn Work + 'w>, Fault> {
        Ok(Box::new(ModelWork::<M>::new(self, round)?))
    }

    fn memory(&self, from_start: HashSet<Partition>, rows_max: usize) -> Option<Memory> {
        let rows_max = NonZeroUsize::new(rows_max).filter(|_| !M::SHARED)?;
        Some(Box::new(RowMemory::<M::Row>::new(from_start, rows_max)))
    }
}

/// A round of one model, decoded.
struct ModelWork<'w, M: ReadModel> {
    model: &'w ModelHandler<M>,
    /// The first event of each category in each batch, for an enum that declares no category.
    sightings: Vec<(&'w RecordedEvent, bool)>,
    /// By key, and those of one key in the order of the log.
    touches: Vec<Touch<'w, M>>,
}

/// An event, and one row that it touches.
type Touch<'w, M> = (&'w Key<M>, &'w Recorded<<M as ReadModel>::Event>);

/// Some of a round's rows, each with its place among them, in their order.
type Placed<T> = Vec<(usize, T)>;

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

/// What a round does to one row.
enum Change<R: Row> {
    Insert(Vec<Value>, R),
    Update(Vec<Value>, R),
    Delete(R::Key),
    Nothing,
}

impl<'w, M: ReadModel> ModelWork<'w, M> {
    fn new(model: &'w ModelHandler<M>, round: &'w ProjectionBatch) -> Result<Self, Fault> {
        let mut touches = Vec::with_capacity(round.count());
        let mut sightings = Vec::new();
        for part in round.parts() {
            let decoded = part.decoded(touched::<M>).as_ref().map_err(Fault::clone)?;
            for Touched { event, keys } in &decoded.events {
                touches.extend(keys.iter().map(|key| (key, event)));
            }
            sightings.extend(decoded.sightings.events(part.batch()));
        }
        touches.sort_by_key(|(key, _)| *key);
        Ok(Self { model, sightings, touches })
    }

    /// What touches one row, row by row.
    fn rows(&self) -> impl Iterator<Item = &[Touch<'w, M>]> {
        self.touches.chunk_by(|(one, _), (other, _)| one == other)
    }

    /// The rows that are there now: what is not remembered is read.
    async fn load(
        &self,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut RowMemory<M::Row>>,
    ) -> Result<Placed<M::Row>, ApplyError> {
        let (mut there, unknown) = self.recall(memory);
        if unknown.is_empty() {
            return Ok(there);
        }
        let keys = unknown.iter().map(|(_, key)| (*key).clone().into_value()).collect();
        let mut loaded = HashMap::with_capacity(unknown.len());
        for values in table.load(tx, keys).await? {
            let row = M::Row::from_values(values);
            let row = row.map_err(|bad| Fault::somewhere(format!("{}: {bad}", target.name)))?;
            loaded.insert(row.key(), row);
        }
        there.extend(unknown.into_iter().filter_map(|(nth, key)| Some((nth, loaded.remove(key)?))));
        there.sort_unstable_by_key(|(nth, _)| *nth);
        Ok(there)
    }

    /// The rows that are remembered to be there, and the keys of those of which nothing is known.
    fn recall(&self, memory: Option<&mut RowMemory<M::Row>>) -> (Placed<M::Row>, Placed<&Key<M>>) {
        let keys = self.rows().map(|touches| touches[0]).enumerate();
        let Some(memory) = memory else {
            return (Vec::new(), keys.map(|(nth, (key, _))| (nth, key)).collect());
        };
        let (mut there, mut unknown) = (Vec::new(), Vec::new());
        for (nth, (key, event)) in keys {
            match memory.recall(event.position.partition, key) {
                Some(row) => there.extend(row.map(|row| (nth, row))),
                None => unknown.push((nth, key)),
            }
        }
        (there, unknown)
    }

    /// Folds the rows, of which those are there, and writes them.
    async fn write(
        &self,
        table: &Table,
        tx: &mut Transaction<'_>,
        there: Placed<M::Row>,
        mut memory: Option<&mut RowMemory<M::Row>>,
    ) -> Result<(), ApplyError> {
        let new = self.rows().count() - there.len();
        let mut inserts = table.inserts(tx, new).await?;
        let (mut updates, mut deletes) = (Vec::new(), Vec::new());
        let mut there = there.into_iter().peekable();
        for (nth, touches) in self.rows().enumerate() {
            let before = there.next_if(|(place, _)| *place == nth).map(|(_, row)| row);
            let change = match fold::<M>(touches, before) {
                Ok(change) => change,
                Err(fault) => {
                    inserts.abort().await?;
                    return Err(fault.into());
                }
            };
            let memory = memory.as_deref_mut();
            match change {
                Change::Insert(values, row) => {
                    if let Some(memory) = memory {
                        memory.inserted(row);
                    }
                    inserts.add(values).await?;
                }
                Change::Update(values, row) => {
                    if let Some(memory) = memory {
                        memory.updated(row);
                    }
                    updates.push(values);
                }
                Change::Delete(key) => {
                    if let Some(memory) = memory {
                        memory.deleted(&key);
                    }
                    deletes.push(key.into_value());
                }
                Change::Nothing => {}
            }
        }
        let mut rows = inserts.finish().await?;
        rows.extend(updates);
        table.upsert(tx, rows).await?;
        Ok(table.delete(tx, deletes).await?)
    }
}

/// Folds the events of one row. After each event the row is as the database gives it back, so that the
/// result depends neither on the size of batches nor on the memory of rows.
fn fold<M: ReadModel>(
    touches: &[Touch<'_, M>],
    before: Option<M::Row>,
) -> Result<Change<M::Row>, Fault> {
    let mut row = before.clone();
    for (key, event) in touches {
        // The row is gone after a panic, and with it the whole round.
        let folded = catch_unwind(AssertUnwindSafe(|| M::fold(key, row.take(), event)));
        row = folded.map_err(|panic| fault_at(event, panic_text(&*panic)))?;
        if let Some(folded) = row.take() {
            let normalized = folded.normalize().map_err(|invalid| fault_at(event, invalid))?;
            if normalized.key() != **key {
                return Err(fault_at(event, "fold gave a row of another key"));
            }
            row = Some(normalized);
        }
    }
    let values = |row: &M::Row| {
        let (_, event) = touches[touches.len() - 1];
        row.clone().into_values().map_err(|invalid| fault_at(event, invalid))
    };
    Ok(match (before, row) {
        (None, Some(row)) => Change::Insert(values(&row)?, row),
        (Some(before), Some(row)) if before != row => Change::Update(values(&row)?, row),
        (Some(before), None) => Change::Delete(before.key()),
        _ => Change::Nothing,
    })
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
    let decoded = decode::<M::Event>(recorded);
    let decoded = decoded.map_err(|unreadable| Fault::unreadable(recorded, &unreadable.error))?;
    if M::Event::CATEGORY.is_none() && !ignores::<M::Event>(recorded) {
        into.sightings.add(batch, place, decoded.is_some());
    }
    let Some(event) = decoded else { return Ok(()) };
    let keys = match <M::Row as Row>::STREAM_KEY {
        Some(key) => vec![key(event.stream.id())],
        None => M::keys(&event),
    };
    let keys = keys.into_iter().map(stored_key::<M::Row>);
    let mut keys: Vec<_> =
        keys.collect::<Result<_, _>>().map_err(|invalid| Fault::at(recorded, invalid))?;
    keys.sort_unstable();
    keys.dedup();
    if !keys.is_empty() {
        into.events.push(Touched { event, keys });
    }
    Ok(())
}

/// Returns the key as the database gives it back.
fn stored_key<R: Row>(key: R::Key) -> Result<R::Key, InvalidValue> {
    key.normalize().map_err(|reason| {
        let column = R::COLUMNS.iter().find(|column| column.role == ColumnRole::Key);
        InvalidValue { column: column.map_or("key", |column| column.name), reason }
    })
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
        if self.touches.is_empty() {
            return Ok(());
        }
        let mut memory = memory.and_then(|memory| memory.downcast_mut::<RowMemory<M::Row>>());
        let table = table(&self.model.definition, target.generation);
        if M::SHARED && !mutant::active(Mutant::SharedRowsUnlocked) {
            lock(target, tx).await?;
        }
        let there = self.load(&table, target, tx, memory.as_deref_mut()).await?;
        self.write(&table, tx, there, memory).await
    }
}

fn table(definition: &Definition, generation: Generation) -> Table {
    Table::new(definition, generation).expect("a read model has columns")
}

/// One worker at a time loads and writes the rows of one generation. Must come before the load in a
/// statement of its own, so that the load sees what the former holder committed. SQLite's
/// transactions are one at a time anyway.
async fn lock(target: Target<'_>, tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(()) };
    let name = format!("kafold/{}/{}", target.name, target.generation);
    let lock = sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))").bind(name);
    lock.execute(&mut **connection).await.map(drop)
}

fn fault_at<E: DomainEvent>(event: &Recorded<E>, reason: impl fmt::Display) -> Fault {
    let Recorded { event, position, stream, version, .. } = event;
    Fault::of(*position, event.event_type(), *version, stream, reason)
}

//! [`ReadModel`]: rows folded by key.

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use async_trait::async_trait;
use kafold_core::mutant::{self, Mutant};
use kafold_core::row::{ColumnValue, Row, Value};
use kafold_core::{DomainEvent, Position, Recorded};

use crate::definition::Definition;
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Target, Work, panic_text};
use crate::projection::{ProjectionBatch, decode};
use crate::table::Table;
use crate::transaction::Transaction;

/// Rows folded by key from the events of one aggregate; the table is made from the row.
///
/// Pure, like an aggregate: the same events give the same rows on either database, in batches of any
/// size. Numbers are 64 bits with sign in the database, so bound amounts and counts where the
/// command is decided such that no sum passes `i64::MAX` (9.2 · 10¹⁸; a sum of a million millions of
/// 9 million each still fits), and add with `checked_add` or `saturating_add`: a sum never wraps, and
/// a panic in a fold stops the model. Texts may not hold the character NUL, which PostgreSQL takes
/// nowhere: refuse it where the command is decided, too.
pub trait ReadModel: Send + Sync + 'static {
    /// Its name and that of its view: `[a-z][a-z0-9_]*`, at most 50 characters. The view is in the
    /// default schema, on the table `NAME__g1`.
    const NAME: &'static str;

    /// Raise it when `keys` or `fold` now make other rows of the same events: the worker then refuses
    /// to go on with the old rows until they are rebuilt. Changed columns are noticed by themselves.
    const VERSION: u32 = 1;

    /// Whether one row may be touched by events of several partitions, as the sales of a day are.
    /// Such rows are written under a lock, and their fold must not depend on the order between
    /// partitions. A model whose key is the stream's own id, or follows from it alone, sets `false`.
    const SHARED: bool = true;

    /// The events it reads. Events of other aggregates pass it by.
    type Event: DomainEvent;

    /// The row.
    type Row: Row;

    /// The rows that the event touches: none, one or several.
    fn keys(event: &Recorded<Self::Event>) -> Vec<<Self::Row as Row>::Key>;

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
    model: PhantomData<fn() -> M>,
}

impl<M: ReadModel> ModelHandler<M> {
    pub(crate) fn new() -> Self {
        Self { definition: Definition::of_model::<M>(), model: PhantomData }
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

    fn prepare<'w>(&'w self, batch: &'w ProjectionBatch) -> Result<Box<dyn Work + 'w>, Fault> {
        Ok(Box::new(ModelWork::<M>::new(&self.definition, batch)?))
    }
}

/// A batch of one model, decoded.
struct ModelWork<'w, M: ReadModel> {
    definition: &'w Definition,
    events: Vec<Touched<M>>,
}

/// An event and the rows it touches.
struct Touched<M: ReadModel> {
    event: Recorded<M::Event>,
    keys: BTreeSet<Key<M>>,
}

/// What a batch does to the table.
#[derive(Debug, PartialEq)]
struct Changes<R: Row> {
    inserts: Vec<R>,
    updates: Vec<R>,
    deletes: Vec<R::Key>,
}

impl<'w, M: ReadModel> ModelWork<'w, M> {
    fn new(definition: &'w Definition, batch: &ProjectionBatch) -> Result<Self, Fault> {
        let mut events = Vec::new();
        for recorded in batch.events() {
            let decoded = decode::<M::Event>(recorded);
            if decoded.is_err() && mutant::active(Mutant::SkipUnreadable) {
                continue;
            }
            let decoded = decoded.map_err(|unreadable| Fault::at(recorded, unreadable.error))?;
            let Some(event) = decoded else { continue };
            // A panic leaves nothing behind: `keys` has only a shared borrow.
            let keys = catch_unwind(AssertUnwindSafe(|| M::keys(&event)));
            let keys = keys.map_err(|panic| Fault::at(recorded, panic_text(&*panic)))?;
            if !keys.is_empty() {
                events.push(Touched { event, keys: keys.into_iter().collect() });
            }
        }
        Ok(Self { definition, events })
    }

    fn keys(&self) -> Vec<Value> {
        let all: BTreeSet<_> = self.events.iter().flat_map(|touched| &touched.keys).collect();
        all.into_iter().map(|key| key.clone().into_value()).collect()
    }
}

#[async_trait]
impl<M: ReadModel> Work for ModelWork<'_, M> {
    async fn apply(&self, target: Target<'_>, tx: &mut Transaction<'_>) -> Result<(), ApplyError> {
        if self.events.is_empty() {
            return Ok(());
        }
        let table = table(self.definition, target.generation);
        if M::SHARED && !mutant::active(Mutant::SharedRowsUnlocked) {
            lock(target, tx).await?;
        }
        let mut loaded = BTreeMap::new();
        for values in table.load(tx, self.keys()).await? {
            let row = M::Row::from_values(values);
            let row = row.map_err(|bad| Fault::somewhere(format!("{}: {bad}", target.name)))?;
            loaded.insert(row.key(), row);
        }
        let Changes { inserts, updates, deletes } = fold::<M>(&self.events, &loaded)?;
        let values = |rows: Vec<M::Row>| rows.into_iter().map(Row::into_values).collect();
        table.write(tx, values(inserts), values(updates)).await?;
        let deletes = deletes.into_iter().map(ColumnValue::into_value).collect();
        Ok(table.delete(tx, deletes).await?)
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

fn fold<M: ReadModel>(
    events: &[Touched<M>],
    loaded: &BTreeMap<Key<M>, M::Row>,
) -> Result<Changes<M::Row>, Fault> {
    let mut rows: BTreeMap<&Key<M>, Option<M::Row>> = BTreeMap::new();
    for Touched { event, keys } in events {
        for key in keys {
            let row = rows.entry(key).or_insert_with(|| loaded.get(key).cloned());
            let before = row.take();
            // The row is gone after a panic, and with it the whole batch.
            let folded = catch_unwind(AssertUnwindSafe(|| M::fold(key, before, event)));
            *row = folded.map_err(|panic| fault_at(event, &panic_text(&*panic)))?;
            if row.as_ref().is_some_and(|row| row.key() != *key) {
                return Err(fault_at(event, "fold gave a row of another key"));
            }
        }
    }
    let mut changes = Changes { inserts: Vec::new(), updates: Vec::new(), deletes: Vec::new() };
    for (key, row) in rows {
        match (loaded.get(key), row) {
            (None, Some(row)) => changes.inserts.push(row),
            (Some(before), Some(row)) if *before != row => changes.updates.push(row),
            (Some(_), None) => changes.deletes.push(key.clone()),
            _ => {}
        }
    }
    Ok(changes)
}

fn fault_at<E: DomainEvent>(event: &Recorded<E>, reason: &str) -> Fault {
    let Recorded { event, position, stream, version, .. } = event;
    let event_type = event.event_type();
    let at: Option<Position> = Some(*position);
    Fault {
        at,
        reason: format!("event {position} ({event_type}, version {version} of {stream}): {reason}"),
        parks: true,
    }
}

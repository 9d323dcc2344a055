//! The rows that a round of events touches: loaded or recalled, folded, and written.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kafold_core::Recorded;
use kafold_core::event_set::EventSet;
use kafold_core::row::{ColumnRole, InvalidValue, Row, RowKey, Value};

use crate::handler::{ApplyError, Fault, Target, panic_text};
use crate::memory::RowMemory;
use crate::table::{Keys, Table};
use crate::transaction::Transaction;

/// The fold of events into rows.
pub(crate) trait Fold: Send + Sync + 'static {
    type Row: Row;
    type Event: EventSet;

    /// Returns the row after the event; `None` when there is none any more.
    fn fold(
        key: &Key<Self>,
        row: Option<Self::Row>,
        event: &Recorded<Self::Event>,
    ) -> Option<Self::Row>;
}

pub(crate) type Key<F> = <<F as Fold>::Row as Row>::Key;

/// A row after a round, with its key; `None` if there is none any more.
pub(crate) type FoldedRow<F> = (Key<F>, Option<<F as Fold>::Row>);

/// A touched row: its key, owned or borrowed, and the event.
pub(crate) type Touch<'w, F, K> = (K, &'w Recorded<<F as Fold>::Event>);

/// Some of a round's rows, each with its place among them, in their order.
type Placed<T> = Vec<(usize, T)>;

/// The rows that a round touches.
pub(crate) struct RoundRows<'w, F: Fold, K> {
    /// By key, and those of one key in the order of the log.
    touches: Vec<Touch<'w, F, K>>,
}

/// The change of one row by a round.
enum Change<R> {
    Insert(R),
    Update(R),
    Delete,
    Nothing,
}

impl<'w, F: Fold, K: Borrow<Key<F>> + Send + Sync> RoundRows<'w, F, K> {
    /// `touches` are in the order of the log in each partition.
    pub(crate) fn new(mut touches: Vec<Touch<'w, F, K>>) -> Self {
        touches.sort_by(|(one, _), (other, _)| one.borrow().cmp(other.borrow()));
        Self { touches }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.touches.is_empty()
    }

    /// Loads the rows, folds the events into them, and writes them.
    pub(crate) async fn apply(
        &self,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        mut memory: Option<&mut RowMemory<F::Row>>,
    ) -> Result<(), ApplyError> {
        let there = self.load(table, target, tx, memory.as_deref_mut()).await?;
        self.write(table, tx, there, memory).await
    }

    /// Folds the events without a database. Returns each touched row with its key, as the database returns the row.
    pub(crate) fn folded(
        &self,
        before: impl Fn(&Key<F>) -> Option<F::Row>,
    ) -> Result<Vec<FoldedRow<F>>, Fault> {
        let mut rows = Vec::new();
        for touches in self.rows() {
            let key: &Key<F> = touches[0].0.borrow();
            let before = before(key);
            let row = match fold::<F, K>(touches, before.clone())? {
                Change::Insert(row) | Change::Update(row) => {
                    let values = values::<F, K>(touches, row)?;
                    Some(F::Row::from_values(values).map_err(Fault::somewhere)?)
                }
                Change::Delete => None,
                Change::Nothing => before,
            };
            rows.push((key.clone(), row));
        }
        Ok(rows)
    }

    /// Returns the touches of each row, row by row.
    fn rows(&self) -> impl Iterator<Item = &[Touch<'w, F, K>]> {
        self.touches.chunk_by(|(one, _), (other, _)| one.borrow() == other.borrow())
    }

    /// The rows that are there now: what is not remembered is read.
    async fn load(
        &self,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut RowMemory<F::Row>>,
    ) -> Result<Placed<F::Row>, ApplyError> {
        let (mut there, unknown) = self.recall(memory);
        if unknown.is_empty() {
            return Ok(there);
        }
        let keys = Keys::of(unknown.iter().map(|(_, key)| (*key).clone()));
        let mut loaded = HashMap::with_capacity(unknown.len());
        for values in table.load(tx, keys).await? {
            let row = F::Row::from_values(values);
            let row = row.map_err(|bad| Fault::somewhere(format!("{}: {bad}", target.name)))?;
            loaded.insert(row.key(), row);
        }
        there.extend(unknown.into_iter().filter_map(|(nth, key)| Some((nth, loaded.remove(key)?))));
        there.sort_unstable_by_key(|(nth, _)| *nth);
        Ok(there)
    }

    /// The rows that are remembered to be there, and the keys of those of which nothing is known.
    fn recall(&self, memory: Option<&mut RowMemory<F::Row>>) -> (Placed<F::Row>, Placed<&Key<F>>) {
        let keys = self.rows().map(|touches| (touches[0].0.borrow(), touches[0].1)).enumerate();
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
        there: Placed<F::Row>,
        mut memory: Option<&mut RowMemory<F::Row>>,
    ) -> Result<(), ApplyError> {
        let new = self.rows().count() - there.len();
        let mut inserts = table.inserts(tx, new).await?;
        let (mut updates, mut deletes) = (Vec::new(), Keys::none::<Key<F>>());
        let mut there = there.into_iter().peekable();
        for (nth, touches) in self.rows().enumerate() {
            let before = there.next_if(|(place, _)| *place == nth).map(|(_, row)| row);
            let memory = memory.as_deref_mut();
            let folded = fold::<F, K>(touches, before).and_then(|change| {
                written::<F, K>(change, touches, memory, &mut updates, &mut deletes)
            });
            match folded {
                Ok(None) => {}
                Ok(Some(new)) => inserts.add(new).await?,
                Err(fault) => {
                    inserts.abort().await?;
                    return Err(fault.into());
                }
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
fn fold<F: Fold, K: Borrow<Key<F>>>(
    touches: &[Touch<'_, F, K>],
    before: Option<F::Row>,
) -> Result<Change<F::Row>, Fault> {
    let mut row = before.clone();
    for (key, event) in touches {
        row = fold_one::<F>(key.borrow(), row.take(), event)?;
    }
    Ok(match (before, row) {
        (None, Some(row)) => Change::Insert(row),
        (Some(before), Some(row)) if before != row => Change::Update(row),
        (Some(_), None) => Change::Delete,
        _ => Change::Nothing,
    })
}

/// Returns the row after one event, as the database returns the row.
pub(crate) fn fold_one<F: Fold>(
    key: &Key<F>,
    row: Option<F::Row>,
    event: &Recorded<F::Event>,
) -> Result<Option<F::Row>, Fault> {
    // The row is gone after a panic, and with it the whole round.
    let folded = catch_unwind(AssertUnwindSafe(|| F::fold(key, row, event)));
    let Some(row) = folded.map_err(|panic| fault_at(event, panic_text(&*panic)))? else {
        return Ok(None);
    };
    let row = row.normalize().map_err(|invalid| fault_at(event, invalid))?;
    if row.key() != *key {
        return Err(fault_at(event, "fold gave a row of another key"));
    }
    Ok(Some(row))
}

/// Takes the change of a row over into the memory, and adds an update or a deletion to those of the round. Returns
/// the values of a new row.
fn written<F: Fold, K: Borrow<Key<F>>>(
    change: Change<F::Row>,
    touches: &[Touch<'_, F, K>],
    memory: Option<&mut RowMemory<F::Row>>,
    updates: &mut Vec<Vec<Value>>,
    deletes: &mut Keys,
) -> Result<Option<Vec<Value>>, Fault> {
    let key = touches[0].0.borrow();
    match change {
        Change::Insert(row) => {
            if let Some(memory) = memory {
                memory.inserted(key, &row);
            }
            return values::<F, K>(touches, row).map(Some);
        }
        Change::Update(row) => {
            if let Some(memory) = memory {
                memory.updated(key, &row);
            }
            updates.push(values::<F, K>(touches, row)?);
        }
        Change::Delete => {
            if let Some(memory) = memory {
                memory.deleted(key);
            }
            deletes.push(key.clone());
        }
        Change::Nothing => {}
    }
    Ok(None)
}

/// Returns the values of a folded row. A value that cannot be written is a fault of the row's last event.
fn values<F: Fold, K>(touches: &[Touch<'_, F, K>], row: F::Row) -> Result<Vec<Value>, Fault> {
    let (_, event) = touches[touches.len() - 1];
    row.into_values().map_err(|invalid| fault_at(event, invalid))
}

/// Returns the key as the database gives it back.
pub(crate) fn stored_key<R: Row>(key: R::Key) -> Result<R::Key, InvalidValue> {
    key.normalized().map_err(|(place, reason)| {
        let mut columns = R::COLUMNS.iter().filter(|column| column.role == ColumnRole::Key);
        InvalidValue { column: columns.nth(place).map_or("key", |column| column.name), reason }
    })
}

/// One worker at a time loads and writes the rows of one generation. Must come before the load in a
/// statement of its own, so that the load sees what the former holder committed. SQLite's
/// transactions are one at a time anyway.
pub(crate) async fn lock(target: Target<'_>, tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(()) };
    let name = format!("kafold/{}/{}", target.name, target.generation);
    let lock = sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))").bind(name);
    lock.execute(&mut **connection).await.map(drop)
}

pub(crate) fn fault_at<E: EventSet>(event: &Recorded<E>, reason: impl fmt::Display) -> Fault {
    let Recorded { event, position, stream, version, .. } = event;
    Fault::of(*position, event.stored_type(), *version, stream, reason)
}

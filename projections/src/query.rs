//! [`Query`]: typed reads of a read model by its key and its declared columns.
//!
//! Anything else is the author's own SQL on the view, whose columns are the row's.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use kafold_core::row::{Condition, KeyPrefix, RowKey};
use kafold_core::store::ReadError;
use kafold_core::{Handled, Offset, Partition};
use kafold_migrations::Database;

use crate::config::ProjectionConfig;
use crate::definition::Definition;
use crate::generation::Generation;
use crate::index::read_error;
use crate::read_model::ReadModel;
use crate::sql::reading;
use crate::table::Table;
use crate::view::{Selection, ViewReader};
use crate::wait::Waiter;

/// Reads a read model's live generation. Cheap to clone.
pub struct Query<M> {
    view: ViewReader,
    model: PhantomData<fn() -> M>,
}

impl<M> Clone for Query<M> {
    fn clone(&self) -> Self {
        Self { view: self.view.clone(), model: PhantomData }
    }
}

/// Up to where an answer is complete, by partition: everything below these offsets is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freshness(pub Vec<(Partition, Offset)>);

impl Freshness {
    /// Up to where the rows of a projection are complete now, whoever writes them. Taken before a query,
    /// it tells of the query's answer.
    pub async fn of(database: &Database, projection: &str) -> Result<Self, ReadError> {
        let sql = "SELECT c.partition, c.next_offset FROM kafold_checkpoint c \
                   JOIN kafold_projection p \
                     ON p.name = c.projection AND p.live_generation = c.generation \
                   WHERE p.name = $1 ORDER BY c.partition";
        let rows: Result<Vec<(i32, i64)>, _> = reading!(database, pool => {
            sqlx::query_as(sql).bind(projection).fetch_all(pool).await
        });
        let pair = |(partition, next): (i32, i64)| {
            let next = u64::try_from(next).unwrap_or_default();
            (Partition(partition.unsigned_abs()), Offset(next))
        };
        Ok(Self(rows.map_err(read_error)?.into_iter().map(pair).collect()))
    }
}

impl fmt::Display for Freshness {
    /// `0:17 1:3`, one pair a partition.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (partition, next)) in self.0.iter().enumerate() {
            let space = if nth == 0 { "" } else { " " };
            write!(f, "{space}{partition}:{next}")?;
        }
        Ok(())
    }
}

impl<M: ReadModel> Query<M> {
    /// Reads the model in this database.
    pub fn new(database: Database) -> Self {
        Self::of(ViewReader::new(M::NAME, database, &ProjectionConfig::default()))
    }

    /// Sets the limits of [`after`](Self::after) for a process without projections of its own.
    #[must_use]
    pub fn config(self, config: &ProjectionConfig) -> Self {
        Self::of(self.view.config(config))
    }

    pub(crate) fn with_waiter(database: Database, waiter: Arc<Waiter>) -> Self {
        Self::of(ViewReader::with_waiter(M::NAME, database, waiter))
    }

    fn of(view: ViewReader) -> Self {
        Self { view, model: PhantomData }
    }

    /// Returns the same query with answers that have one's own write. Such a query waits for the read
    /// model, at most [`wait_timeout`](ProjectionConfig::wait_timeout), and then returns
    /// [`ReadError::Unavailable`].
    #[must_use]
    pub fn after(&self, handled: &Handled) -> Self {
        Self::of(self.view.after(handled.position))
    }

    /// Returns the row of this key. A stored row that the model cannot read is
    /// [`ReadError::Diverged`].
    pub async fn get<K>(&self, key: &K) -> Result<Option<M>, ReadError>
    where
        K: ToOwned<Owned = M::Key> + Sync + ?Sized,
    {
        let table = table::<M>();
        // No row has a key that no column holds.
        let Ok(key) = key.to_owned().normalized() else { return Ok(None) };
        let mut values = vec![Vec::with_capacity(1); M::Key::COLUMNS];
        key.append_to(&mut values);
        let by = table.key().zip(values.into_iter().flatten()).collect();
        self.view.one(&table, by).await
    }

    /// Returns the rows that meet a condition on the key of one column or on a column with `#[row(index)]`, such as
    /// `CustomerOrder::customer.eq("c1")`, in the order of the key; at most `limit`. A stored row that the
    /// model cannot read is left out, with a warning in the log.
    pub async fn find(&self, condition: Condition<M>, limit: usize) -> Result<Vec<M>, ReadError> {
        let table = table::<M>();
        let Some(value) = condition.value else { return Ok(Vec::new()) };
        let column = (condition.column, table.name(condition.column));
        self.readable(&table, Selection { by: vec![(column, value)], greatest: None, limit }).await
    }

    /// Returns the rows whose key of several columns begins with these values, such as `prefix((day,), 100)` for a key
    /// `(day, user)`, in the order of the key; at most `limit`. A stored row that the model cannot read is left out,
    /// with a warning in the log.
    pub async fn prefix(
        &self,
        prefix: impl KeyPrefix<M::Key>,
        limit: usize,
    ) -> Result<Vec<M>, ReadError> {
        let table = table::<M>();
        // No row has a key that no column holds.
        let Some(values) = prefix.into_values() else { return Ok(Vec::new()) };
        let by = table.key().zip(values).collect();
        self.readable(&table, Selection { by, greatest: None, limit }).await
    }

    /// Returns the first `limit` rows in the order of the key. A stored row that the model cannot read
    /// is left out, with a warning in the log.
    pub async fn all(&self, limit: usize) -> Result<Vec<M>, ReadError> {
        self.readable(&table::<M>(), Selection { limit, ..Selection::default() }).await
    }

    /// Up to where the model is complete now. Taken before a query, it tells of the query's answer.
    pub async fn freshness(&self) -> Result<Freshness, ReadError> {
        Freshness::of(&self.view.database, M::NAME).await
    }

    async fn readable(&self, table: &Table, selection: Selection<'_>) -> Result<Vec<M>, ReadError> {
        self.view.readable(table, &Definition::of_model::<M>(), selection).await
    }
}

fn table<M: ReadModel>() -> Table {
    // Queries read the view: the generation of the table does not matter.
    Table::new(&Definition::of_model::<M>(), Generation::FIRST).expect("a read model has columns")
}

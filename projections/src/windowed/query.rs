//! [`WindowQuery`]: typed reads of a windowed model.

use std::marker::PhantomData;
use std::sync::Arc;

use kafold_core::Handled;
use kafold_core::row::{ColumnValue, IndexedColumn, RowKey, Value};
use kafold_core::store::ReadError;
use kafold_core::window::{Span, Timestamp};
use kafold_migrations::{Database, Identifier, SqlText};

use super::row::{END, START, WindowKey};
use super::{WindowRow, Windowed};
use crate::clock_step::EventCounts;
use crate::config::ProjectionConfig;
use crate::definition::Definition;
use crate::index::read_error;
use crate::query::Freshness;
use crate::retention;
use crate::table::Table;
use crate::value::{from_postgres, from_sqlite};
use crate::view::{Identified, Selection, ViewReader};
use crate::wait::Waiter;

/// Reads a windowed model's live generation. Cheap to clone.
pub struct WindowQuery<M> {
    view: ViewReader,
    model: PhantomData<fn() -> M>,
}

impl<M> Clone for WindowQuery<M> {
    fn clone(&self) -> Self {
        Self { view: self.view.clone(), model: PhantomData }
    }
}

/// A row, and its window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InWindow<M> {
    /// The window. The span of a session is that of its events: `end` is the time of the last one.
    pub span: Span,
    /// `true` for a row that never changes again.
    pub is_final: bool,
    /// The row.
    pub row: M,
}

/// A window with at least one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOrFinal {
    /// The window.
    pub span: Span,
    /// `true` for a window whose rows never change again.
    pub is_final: bool,
}

impl<M: Windowed> WindowQuery<M> {
    /// Reads the model in this database.
    pub fn new(database: Database) -> Self {
        Self::of(ViewReader::new(M::NAME, database, &ProjectionConfig::default()))
    }

    pub(crate) fn with_waiter(database: Database, waiter: Arc<Waiter>) -> Self {
        Self::of(ViewReader::with_waiter(M::NAME, database, waiter))
    }

    fn of(view: ViewReader) -> Self {
        Self { view, model: PhantomData }
    }

    /// Sets the limits of [`after`](Self::after) for a process without projections of its own.
    #[must_use]
    pub fn config(self, config: &ProjectionConfig) -> Self {
        Self::of(self.view.config(config))
    }

    /// Returns the same query with answers that have one's own write, as
    /// [`Query::after`](crate::Query::after) does.
    #[must_use]
    pub fn after(&self, handled: &Handled) -> Self {
        Self::of(self.view.after(handled.position))
    }

    /// Returns the row of a key in the window, or the session, that begins at `start`.
    pub async fn get<K>(&self, start: Timestamp, key: &K) -> Result<Option<InWindow<M>>, ReadError>
    where
        K: ToOwned<Owned = M::Key> + Sync + ?Sized,
    {
        let table = table::<M>();
        let Ok(key) = key.to_owned().normalized() else { return Ok(None) };
        let by = conditions::<M>(&table, start, key);
        let closed = self.closed_through().await?;
        Ok(self.view.one(&table, by).await?.map(|row| in_window(row, closed)))
    }

    /// Returns the rows of the window that begins at `start`, in the order of the key; at most `limit`.
    pub async fn window(
        &self,
        start: Timestamp,
        limit: usize,
    ) -> Result<Vec<InWindow<M>>, ReadError> {
        let table = table::<M>();
        let by = vec![((&START, table.name(&START)), Value::Timestamp(start))];
        self.readable(&table, Selection { by, greatest: None, limit }).await
    }

    /// Returns the rows of the window that begins at `start` with the greatest values in a column, greatest first, and
    /// rows with the same value in the order of the key; at most `limit`.
    pub async fn top<V: ColumnValue>(
        &self,
        start: Timestamp,
        column: IndexedColumn<M, V>,
        limit: usize,
    ) -> Result<Vec<InWindow<M>>, ReadError> {
        let table = table::<M>();
        let by = vec![((&START, table.name(&START)), Value::Timestamp(start))];
        let greatest = Some(table.name(column.column()));
        self.readable(&table, Selection { by, greatest, limit }).await
    }

    /// Returns the rows of a key, in the order of the windows; at most `limit`. The sessions of a key are found by the
    /// primary key; the rows of other windows are searched through.
    pub async fn of_key<K>(&self, key: &K, limit: usize) -> Result<Vec<InWindow<M>>, ReadError>
    where
        K: ToOwned<Owned = M::Key> + Sync + ?Sized,
    {
        let table = table::<M>();
        let Ok(key) = key.to_owned().normalized() else { return Ok(Vec::new()) };
        let mut by = conditions::<M>(&table, Timestamp::UNIX_EPOCH, key);
        by.retain(|((column, _), _)| column.name != START.name);
        self.readable(&table, Selection { by, greatest: None, limit }).await
    }

    /// Returns all rows, in the order of the windows, and of the keys for sessions; at most `limit`.
    pub async fn all(&self, limit: usize) -> Result<Vec<InWindow<M>>, ReadError> {
        self.readable(&table::<M>(), Selection { limit, ..Selection::default() }).await
    }

    /// Returns the windows with rows, the newest first; at most `limit`.
    pub async fn windows(&self, limit: usize) -> Result<Vec<OpenOrFinal>, ReadError> {
        self.view.wait().await?;
        let closed = self.closed_through().await?;
        let view = Identifier::new(M::NAME).expect("the definition was checked");
        let mut sql = SqlText::new("SELECT DISTINCT window_start, window_end FROM ");
        let sql = sql.name(&view).text(" ORDER BY window_start DESC LIMIT $1").finish();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let spans: Result<Vec<_>, sqlx::Error> = match &self.view.database {
            Database::Postgres(database) => {
                let rows = sqlx::query(sql).bind(limit).fetch_all(database.pool()).await;
                rows.and_then(|rows| {
                    let value = |row, nth, column| from_postgres(row, nth, column);
                    rows.iter()
                        .map(|row| Ok([value(row, 0, &START)?, value(row, 1, &END)?]))
                        .collect()
                })
            }
            Database::Sqlite(database) => {
                let rows = sqlx::query(sql).bind(limit).fetch_all(database.readers()).await;
                rows.and_then(|rows| {
                    let value = |row, nth, column| from_sqlite(row, nth, column);
                    rows.iter()
                        .map(|row| Ok([value(row, 0, &START)?, value(row, 1, &END)?]))
                        .collect()
                })
            }
        };
        let spans = spans.map_err(|error| self.view.read_error(error))?;
        let span = |[start, end]: [Value; 2]| {
            let time = |value| Timestamp::from_value(value);
            let span = Span { start: time(start)?, end: time(end)? };
            Ok(OpenOrFinal { span, is_final: is_final::<M>(span, closed) })
        };
        let spans: Result<Vec<_>, String> = spans.into_iter().map(span).collect();
        spans.map_err(|reason| ReadError::diverged(M::NAME, reason))
    }

    /// Returns the moment up to which the rows are final: windows that end at the moment or before it never change again,
    /// nor do sessions whose last event is before it. `None` while a partition has no event of the model.
    ///
    /// Taken before a query, it tells of the query's answer.
    pub async fn closed_through(&self) -> Result<Option<Timestamp>, ReadError> {
        let least = retention::least_clock(&self.view.database, M::NAME).await;
        let least = least.map_err(read_error)?;
        Ok(least.and_then(|(window, least)| window.closed_through(least)))
    }

    /// Returns the numbers of events that the model has read.
    pub async fn counts(&self) -> Result<EventCounts, ReadError> {
        EventCounts::of(&self.view.database, M::NAME).await.map_err(read_error)
    }

    /// Up to where the model is complete now. Taken before a query, it tells of the query's answer.
    pub async fn freshness(&self) -> Result<Freshness, ReadError> {
        Freshness::of(&self.view.database, M::NAME).await
    }

    async fn readable(
        &self,
        table: &Table,
        selection: Selection<'_>,
    ) -> Result<Vec<InWindow<M>>, ReadError> {
        // Before the rows: what is closed now does not change until they are read.
        self.view.wait().await?;
        let closed = self.closed_through().await?;
        let definition = Definition::of_windows::<M>(&M::WINDOW);
        let rows = self.view.readable(table, &definition, selection).await?;
        Ok(rows.into_iter().map(|row| in_window(row, closed)).collect())
    }
}

fn in_window<M: Windowed>(row: WindowRow<M>, closed: Option<Timestamp>) -> InWindow<M> {
    let WindowRow { span, row, .. } = row;
    InWindow { span, is_final: is_final::<M>(span, closed), row }
}

fn is_final<M: Windowed>(span: Span, closed: Option<Timestamp>) -> bool {
    closed.is_some_and(|closed| match M::WINDOW.is_session() {
        true => span.end < closed,
        false => span.end <= closed,
    })
}

/// Returns the conditions on the columns of the key.
fn conditions<M: Windowed>(
    table: &Table,
    start: Timestamp,
    key: M::Key,
) -> Vec<(Identified<'_>, Value)> {
    let key = WindowKey::<M>::new(start, key, kafold_core::Partition(0));
    let mut values = vec![Vec::with_capacity(1); WindowKey::<M>::COLUMNS];
    key.append_to(&mut values);
    table.key().zip(values.into_iter().flatten()).collect()
}

fn table<M: Windowed>() -> Table {
    // Queries read the view, which has no column of the partition.
    Table::of_view(M::NAME, WindowRow::<M>::VIEW_COLUMNS)
}

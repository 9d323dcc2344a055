//! [`Query`]: typed reads of a read model by its key and its declared columns.
//!
//! Anything else is the author's own SQL on the view, whose columns are the row's.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use kafold_core::clock::SystemClock;
use kafold_core::row::{Column, ColumnRole, ColumnValue, Condition, Row, Value};
use kafold_core::store::ReadError;
use kafold_core::{Handled, Offset, Partition, Position};
use kafold_migrations::{Database, Identifier, is_transient};
use sqlx::postgres::PgArguments;
use sqlx::sqlite::SqliteArguments;

use crate::config::ProjectionConfig;
use crate::definition::Definition;
use crate::generation::Generation;
use crate::index::{RETRY_AFTER, read_error};
use crate::read_model::ReadModel;
use crate::registry;
use crate::sql::reading;
use crate::table::Table;
use crate::value::{add_one, add_value};
use crate::wait::Waiter;

/// Reads a read model's live generation. Cheap to clone.
pub struct Query<M> {
    database: Database,
    waiter: Arc<Waiter>,
    /// The position that an answer must have.
    after: Option<Position>,
    model: PhantomData<fn() -> M>,
}

impl<M> Clone for Query<M> {
    fn clone(&self) -> Self {
        let (database, waiter) = (self.database.clone(), Arc::clone(&self.waiter));
        Self { database, waiter, after: self.after, model: PhantomData }
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
        let config = ProjectionConfig::default();
        let waiter = Waiter::new(database.clone(), Arc::new(SystemClock), &config, Vec::new());
        Self::with_waiter(database, Arc::new(waiter))
    }

    /// Sets the limits of [`after`](Self::after) for a process without projections of its own.
    #[must_use]
    pub fn config(self, config: &ProjectionConfig) -> Self {
        let (database, clock) = (self.database.clone(), Arc::new(SystemClock));
        let waiter = Waiter::new(database, clock, config, Vec::new());
        Self { waiter: Arc::new(waiter), ..self }
    }

    pub(crate) fn with_waiter(database: Database, waiter: Arc<Waiter>) -> Self {
        Self { database, waiter, after: None, model: PhantomData }
    }

    /// Returns the same query with answers that have one's own write. Such a query waits for the read
    /// model, at most [`wait_timeout`](ProjectionConfig::wait_timeout), and then returns
    /// [`ReadError::Unavailable`].
    #[must_use]
    pub fn after(&self, handled: &Handled) -> Self {
        Self { after: handled.position, ..self.clone() }
    }

    /// Returns the row of this key. A stored row that the model cannot read is
    /// [`ReadError::Diverged`].
    pub async fn get<K>(&self, key: &K) -> Result<Option<M::Row>, ReadError>
    where
        K: ToOwned<Owned = <M::Row as Row>::Key> + Sync + ?Sized,
    {
        let table = table::<M>()?;
        // No row has a key that no column holds.
        let Ok(key) = key.to_owned().normalize() else { return Ok(None) };
        let mut rows = self.select(&table, Some((&table.key(), key.into_value())), 1).await?;
        let row = rows.pop().map(read::<M::Row>).transpose();
        row.map_err(|reason| ReadError::diverged(M::NAME, reason))
    }

    /// Returns the rows that meet a condition on the key or on a column with `#[row(index)]`, such as
    /// `CustomerOrder::customer.eq("c1")`, in the order of the key; at most `limit`. A stored row that the
    /// model cannot read is left out, with a warning in the log.
    pub async fn find(
        &self,
        condition: Condition<M::Row>,
        limit: usize,
    ) -> Result<Vec<M::Row>, ReadError> {
        let table = table::<M>()?;
        let Some(value) = condition.value else { return Ok(Vec::new()) };
        let column = (condition.column, table.name(condition.column));
        self.readable(&table, Some((&column, value)), limit).await
    }

    /// Returns the first `limit` rows in the order of the key. A stored row that the model cannot read
    /// is left out, with a warning in the log.
    pub async fn all(&self, limit: usize) -> Result<Vec<M::Row>, ReadError> {
        self.readable(&table::<M>()?, None, limit).await
    }

    /// Up to where the model is complete now. Taken before a query, it tells of the query's answer.
    pub async fn freshness(&self) -> Result<Freshness, ReadError> {
        Freshness::of(&self.database, M::NAME).await
    }

    /// Selects rows and leaves out those that the model cannot read. Rows of another definition of the
    /// model are an error, so that a list is never empty for that reason.
    async fn readable(
        &self,
        table: &Table,
        by: Option<(&Identified<'_>, Value)>,
        limit: usize,
    ) -> Result<Vec<M::Row>, ReadError> {
        let selected = self.select(table, by, limit).await?;
        let (mut rows, mut unreadable) = (Vec::with_capacity(selected.len()), None);
        for row in selected {
            match read::<M::Row>(row) {
                Ok(row) => rows.push(row),
                Err(reason) => {
                    tracing::warn!(projection = M::NAME, reason, "a stored row is unreadable");
                    unreadable = Some(reason);
                }
            }
        }
        match unreadable {
            Some(reason) if self.is_of_another_definition().await? => {
                Err(ReadError::diverged(M::NAME, other_definition::<M>(&reason)))
            }
            _ => Ok(rows),
        }
    }

    /// Returns whether another definition of the model built the live rows.
    async fn is_of_another_definition(&self) -> Result<bool, ReadError> {
        let definition = Definition::of_model::<M>();
        let built = registry::built_by(&self.database, M::NAME).await.map_err(read_error)?;
        Ok(built.is_some_and(|built| built != definition.fingerprint))
    }

    async fn select(
        &self,
        table: &Table,
        by: Option<(&Identified<'_>, Value)>,
        limit: usize,
    ) -> Result<Vec<Selected>, ReadError> {
        self.waiter
            .wait_for(M::NAME, self.after)
            .await
            .map_err(|error| ReadError::unavailable(RETRY_AFTER, error))?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let found = match self.fetch(table, by.clone(), limit).await {
            // The view was switched to another generation under a prepared statement.
            Err(error) if is_stale_plan(&error) => self.fetch(table, by, limit).await,
            found => found,
        };
        found.map_err(|error| match () {
            () if is_missing(&error) => {
                ReadError::unavailable(RETRY_AFTER, format!("{} is not built yet", M::NAME))
            }
            () if is_missing_column(&error) => {
                ReadError::diverged(M::NAME, other_definition::<M>(&error))
            }
            () => read_error(error),
        })
    }

    async fn fetch(
        &self,
        table: &Table,
        by: Option<(&Identified<'_>, Value)>,
        limit: i64,
    ) -> Result<Vec<Selected>, sqlx::Error> {
        let on_postgres = matches!(self.database, Database::Postgres(_));
        let mut sql = table.select_from_view(on_postgres);
        if let Some(((_, name), _)) = &by {
            sql.text(" WHERE ").name(name).text(" = ").placeholder(1);
        }
        let (_, key) = table.key();
        let place = if by.is_some() { 2 } else { 1 };
        sql.text(" ORDER BY ").name(key).text(" LIMIT ").placeholder(place);
        match &self.database {
            Database::Postgres(database) => {
                let mut arguments = PgArguments::default();
                if let Some(((column, _), value)) = by {
                    add_one(&mut arguments, column, value)?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.pool()).await?;
                Ok(rows.iter().map(|row| table.postgres_values(row)).collect())
            }
            Database::Sqlite(database) => {
                let mut arguments = SqliteArguments::default();
                if let Some((_, value)) = by {
                    add_value(&mut arguments, value)?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.readers()).await?;
                Ok(rows.iter().map(|row| table.sqlite_values(row)).collect())
            }
        }
    }
}

/// The values of a selected row, unless a column has another type than the model's.
type Selected = Result<Vec<Value>, sqlx::Error>;

fn read<R: Row>(selected: Selected) -> Result<R, String> {
    let values = selected.map_err(|error| error.to_string())?;
    let key = R::COLUMNS.iter().position(|column| column.role == ColumnRole::Key);
    let key = key.and_then(|place| values.get(place)).map(Value::to_string);
    R::from_values(values)
        .map_err(|invalid| format!("the row of key {}: {invalid}", key.unwrap_or_default()))
}

fn other_definition<M: ReadModel>(reason: &impl fmt::Display) -> String {
    format!(
        "its rows are those of another definition of the model ({reason}); build them anew with \
         `kafold projections rebuild {}`",
        M::NAME
    )
}

/// A column and its name in SQL.
type Identified<'t> = (&'static Column, &'t Identifier);

fn table<M: ReadModel>() -> Result<Table, ReadError> {
    let definition = Definition::of_model::<M>();
    definition.check().map_err(|mistake| ReadError::diverged(M::NAME, mistake))?;
    // Queries read the view: the generation of the table does not matter.
    Ok(Table::new(&definition, Generation::FIRST).expect("a read model has columns"))
}

fn is_stale_plan(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code == "0A000") && is_transient(error)
}

fn is_missing_column(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    error.code().is_some_and(|code| code == "42703") || error.message().contains("no such column")
}

/// Whether the view is not there: its worker has not registered the model yet.
fn is_missing(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    error.code().is_some_and(|code| code == "42P01") || error.message().contains("no such table")
}

//! [`Query`]: typed reads of a read model by its key and its declared columns.
//!
//! Anything else is the author's own SQL on the view, whose columns are the row's.

use std::fmt;
use std::marker::PhantomData;

use kafold_core::row::{Column, ColumnValue, Row, Value};
use kafold_core::store::ReadError;
use kafold_core::{Offset, Partition};
use kafold_migrations::{Database, SqlText, is_transient};
use sqlx::postgres::PgArguments;
use sqlx::sqlite::SqliteArguments;

use crate::definition::Definition;
use crate::index::read_error;
use crate::read_model::ReadModel;
use crate::table::Table;
use crate::value::{add_array, add_value};

/// Reads a read model's live generation. Cheap to clone.
pub struct Query<M> {
    database: Database,
    model: PhantomData<fn() -> M>,
}

impl<M> Clone for Query<M> {
    fn clone(&self) -> Self {
        Self { database: self.database.clone(), model: PhantomData }
    }
}

/// Up to where an answer is complete, by partition: everything below these offsets is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freshness(pub Vec<(Partition, Offset)>);

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
        Self { database, model: PhantomData }
    }

    /// The row of this key.
    pub async fn get(&self, key: &<M::Row as Row>::Key) -> Result<Option<M::Row>, ReadError> {
        let table = table::<M>()?;
        let (column, _) = table.key();
        let mut rows =
            self.select(&table, Some((column.name, key.clone().into_value())), 1).await?;
        Ok(rows.pop())
    }

    /// Rows with this value in a column declared with `#[row(index)]`, or in the key, in the order
    /// of the key; at most `limit`. Another column is [`ReadError::Diverged`].
    pub async fn find(
        &self,
        column: &str,
        value: impl ColumnValue,
        limit: usize,
    ) -> Result<Vec<M::Row>, ReadError> {
        self.select(&table::<M>()?, Some((column, value.into_value())), limit).await
    }

    /// The first `limit` rows in the order of the key.
    pub async fn all(&self, limit: usize) -> Result<Vec<M::Row>, ReadError> {
        self.select(&table::<M>()?, None, limit).await
    }

    /// Up to where the model is complete now. Taken before a query, it tells of the query's answer.
    pub async fn freshness(&self) -> Result<Freshness, ReadError> {
        let sql = "SELECT c.partition, c.next_offset FROM kafold_checkpoint c \
                   JOIN kafold_projection p \
                     ON p.name = c.projection AND p.live_generation = c.generation \
                   WHERE p.name = $1 ORDER BY c.partition";
        let rows: Result<Vec<(i32, i64)>, _> = match &self.database {
            Database::Postgres(database) => {
                sqlx::query_as(sql).bind(M::NAME).fetch_all(database.pool()).await
            }
            Database::Sqlite(database) => {
                sqlx::query_as(sql).bind(M::NAME).fetch_all(database.readers()).await
            }
        };
        let pair = |(partition, next): (i32, i64)| {
            let next = u64::try_from(next).unwrap_or_default();
            (Partition(partition.unsigned_abs()), Offset(next))
        };
        Ok(Freshness(rows.map_err(read_error)?.into_iter().map(pair).collect()))
    }

    async fn select(
        &self,
        table: &Table,
        by: Option<(&str, Value)>,
        limit: usize,
    ) -> Result<Vec<M::Row>, ReadError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let found = match self.fetch(table, by.clone(), limit).await {
            // The view was switched to another generation under a prepared statement.
            Err(Failed::Database(error)) if is_stale_plan(&error) => {
                self.fetch(table, by, limit).await
            }
            found => found,
        };
        let rows = found.map_err(|failed| match failed {
            Failed::Database(error) => read_error(error),
            Failed::Read(error) => error,
        })?;
        let row = |values| M::Row::from_values(values).map_err(|e| ReadError::diverged(M::NAME, e));
        rows.into_iter().map(row).collect()
    }

    async fn fetch(
        &self,
        table: &Table,
        by: Option<(&str, Value)>,
        limit: i64,
    ) -> Result<Vec<Vec<Value>>, Failed> {
        let on_postgres = matches!(self.database, Database::Postgres(_));
        let mut sql = table.select_from_view(on_postgres);
        let by = match by {
            Some((name, value)) => {
                Some((condition::<M>(table, name, &mut sql, on_postgres)?, value))
            }
            None => None,
        };
        let (_, key) = table.key();
        let place = if by.is_some() { 2 } else { 1 };
        sql.text(" ORDER BY ").name(key).text(" LIMIT ").placeholder(place);
        match &self.database {
            Database::Postgres(database) => {
                let mut arguments = PgArguments::default();
                if let Some((column, value)) = by {
                    add_array(&mut arguments, column, vec![value])?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.pool()).await?;
                Ok(rows.iter().map(|row| table.postgres_values(row)).collect::<Result<_, _>>()?)
            }
            Database::Sqlite(database) => {
                let mut arguments = SqliteArguments::default();
                if let Some((_, value)) = by {
                    add_value(&mut arguments, value)?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.readers()).await?;
                Ok(rows.iter().map(|row| table.sqlite_values(row)).collect::<Result<_, _>>()?)
            }
        }
    }
}

enum Failed {
    Database(sqlx::Error),
    Read(ReadError),
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Adds the condition on the column of this name. On PostgreSQL the value is bound as an array of
/// one, as keys are.
fn condition<M: ReadModel>(
    table: &Table,
    name: &str,
    sql: &mut SqlText,
    on_postgres: bool,
) -> Result<&'static Column, Failed> {
    let Some((column, name)) = table.searchable(name) else {
        let reason = format!("rows cannot be found by {name}: mark its field #[row(index)]");
        return Err(Failed::Read(ReadError::diverged(M::NAME, reason)));
    };
    sql.text(" WHERE ").name(name);
    match on_postgres {
        true => sql.text(" = ANY(").placeholder(1).text(")"),
        false => sql.text(" = ").placeholder(1),
    };
    Ok(column)
}

fn table<M: ReadModel>() -> Result<Table, ReadError> {
    let definition = Definition::of_model::<M>();
    definition.check().map_err(|mistake| ReadError::diverged(M::NAME, mistake))?;
    // Queries read the view: the generation of the table does not matter.
    Ok(Table::new(&definition, 1).expect("a read model has columns"))
}

fn is_stale_plan(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code == "0A000") && is_transient(error)
}

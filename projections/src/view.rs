//! Reads of the view of a read model.

use std::fmt;
use std::sync::Arc;

use kafold_core::Position;
use kafold_core::clock::SystemClock;
use kafold_core::row::{Column, ColumnRole, Row, Value};
use kafold_core::store::ReadError;
use kafold_migrations::{Database, Identifier, is_transient};
use sqlx::postgres::PgArguments;
use sqlx::sqlite::SqliteArguments;

use crate::config::ProjectionConfig;
use crate::definition::Definition;
use crate::index::{RETRY_AFTER, read_error};
use crate::registry;
use crate::table::Table;
use crate::value::{add_one, add_value};
use crate::wait::Waiter;

/// Reads the view of one read model.
#[derive(Clone)]
pub(crate) struct ViewReader {
    pub(crate) name: &'static str,
    pub(crate) database: Database,
    waiter: Arc<Waiter>,
    /// The position that an answer must have.
    after: Option<Position>,
}

/// A column and its name in SQL.
pub(crate) type Identified<'t> = (&'static Column, &'t Identifier);

/// The rows to read.
#[derive(Clone, Default)]
pub(crate) struct Selection<'t> {
    /// Columns and the values that they must have.
    pub(crate) by: Vec<(Identified<'t>, Value)>,
    /// A column by which the greatest come first, before the order of the key.
    pub(crate) greatest: Option<&'t Identifier>,
    pub(crate) limit: usize,
}

/// The values of a selected row, unless a column has another type than the model's.
type Selected = Result<Vec<Value>, sqlx::Error>;

impl ViewReader {
    pub(crate) fn new(name: &'static str, database: Database, config: &ProjectionConfig) -> Self {
        let waiter = Waiter::new(database.clone(), Arc::new(SystemClock), config, Vec::new());
        Self::with_waiter(name, database, Arc::new(waiter))
    }

    pub(crate) fn with_waiter(name: &'static str, database: Database, waiter: Arc<Waiter>) -> Self {
        Self { name, database, waiter, after: None }
    }

    /// Sets the limits of waiting.
    pub(crate) fn config(self, config: &ProjectionConfig) -> Self {
        Self { after: self.after, ..Self::new(self.name, self.database, config) }
    }

    /// Returns a reader whose answers have this position.
    pub(crate) fn after(&self, after: Option<Position>) -> Self {
        Self { after, ..self.clone() }
    }

    /// Waits for the position that an answer must have.
    pub(crate) async fn wait(&self) -> Result<(), ReadError> {
        let waited = self.waiter.wait_for(self.name, self.after).await;
        waited.map_err(|error| ReadError::unavailable(RETRY_AFTER, error))
    }

    /// Returns one row. A stored row that the model cannot read is [`ReadError::Diverged`].
    pub(crate) async fn one<R: Row>(
        &self,
        table: &Table,
        by: Vec<(Identified<'_>, Value)>,
    ) -> Result<Option<R>, ReadError> {
        let selection = Selection { by, greatest: None, limit: 1 };
        let mut rows = self.select(table, selection).await?;
        let row = rows.pop().map(read::<R>).transpose();
        row.map_err(|reason| ReadError::diverged(self.name, reason))
    }

    /// Selects rows and leaves out those that the model cannot read. Rows of another definition of the
    /// model are an error, so that a list is never empty for that reason.
    pub(crate) async fn readable<R: Row>(
        &self,
        table: &Table,
        definition: &Definition,
        selection: Selection<'_>,
    ) -> Result<Vec<R>, ReadError> {
        let selected = self.select(table, selection).await?;
        let (mut rows, mut unreadable) = (Vec::with_capacity(selected.len()), None);
        for row in selected {
            match read::<R>(row) {
                Ok(row) => rows.push(row),
                Err(reason) => {
                    tracing::warn!(projection = self.name, reason, "a stored row is unreadable");
                    unreadable = Some(reason);
                }
            }
        }
        match unreadable {
            Some(reason) if self.is_of_another_definition(definition).await? => {
                Err(ReadError::diverged(self.name, self.other_definition(&reason)))
            }
            _ => Ok(rows),
        }
    }

    /// Returns whether another definition of the model built the live rows.
    async fn is_of_another_definition(&self, definition: &Definition) -> Result<bool, ReadError> {
        let built = registry::built_by(&self.database, self.name).await.map_err(read_error)?;
        Ok(built.is_some_and(|built| built != definition.fingerprint))
    }

    async fn select(
        &self,
        table: &Table,
        selection: Selection<'_>,
    ) -> Result<Vec<Selected>, ReadError> {
        self.wait().await?;
        let found = match self.fetch(table, selection.clone()).await {
            // The view was switched to another generation under a prepared statement.
            Err(error) if is_stale_plan(&error) => self.fetch(table, selection).await,
            found => found,
        };
        found.map_err(|error| self.read_error(error))
    }

    /// Returns the error of a failed read.
    pub(crate) fn read_error(&self, error: sqlx::Error) -> ReadError {
        match () {
            () if is_missing(&error) => {
                let reason = format!(
                    "{} is not built yet; a process builds it that adds it to its projections, by `with`, and \
                     calls `spawn`",
                    self.name
                );
                ReadError::unavailable(RETRY_AFTER, reason)
            }
            () if is_missing_column(&error) => {
                ReadError::diverged(self.name, self.other_definition(&error))
            }
            () => read_error(error),
        }
    }

    fn other_definition(&self, reason: &impl fmt::Display) -> String {
        format!(
            "its rows are those of another definition of the model ({reason}); build them anew with \
             `kafold projections rebuild {}`",
            self.name
        )
    }

    async fn fetch(
        &self,
        table: &Table,
        Selection { by, greatest, limit }: Selection<'_>,
    ) -> Result<Vec<Selected>, sqlx::Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let on_postgres = matches!(self.database, Database::Postgres(_));
        let mut sql = table.select_from_view(on_postgres);
        sql.text(if by.is_empty() { "" } else { " WHERE " });
        sql.list(" AND ", by.iter().enumerate(), |sql, (nth, ((_, name), _))| {
            sql.name(name).text(" = ").placeholder(nth + 1);
        });
        sql.text(" ORDER BY ");
        if let Some(greatest) = greatest {
            sql.name(greatest).text(" DESC, ");
        }
        table.list_key(&mut sql).text(" LIMIT ").placeholder(by.len() + 1);
        match &self.database {
            Database::Postgres(database) => {
                let mut arguments = PgArguments::default();
                for ((column, _), value) in by {
                    add_one(&mut arguments, column, value)?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.pool()).await?;
                Ok(rows.iter().map(|row| table.postgres_values(row)).collect())
            }
            Database::Sqlite(database) => {
                let mut arguments = SqliteArguments::default();
                for (_, value) in by {
                    add_value(&mut arguments, value)?;
                }
                let query = sqlx::query_with(sql.finish(), arguments).bind(limit);
                let rows = query.fetch_all(database.readers()).await?;
                Ok(rows.iter().map(|row| table.sqlite_values(row)).collect())
            }
        }
    }
}

fn read<R: Row>(selected: Selected) -> Result<R, String> {
    let values = selected.map_err(|error| error.to_string())?;
    let columns = R::COLUMNS.iter().zip(&values);
    let key = columns.filter(|(column, _)| column.role == ColumnRole::Key);
    let key: Vec<_> = key.map(|(_, value)| value.to_string()).collect();
    R::from_values(values)
        .map_err(|invalid| format!("the row of key {}: {invalid}", key.join(", ")))
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

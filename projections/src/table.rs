//! The table of a read model in one generation. The statements are made once from the row's columns.

use kafold_core::row::{Column, ColumnKind, ColumnRole, Value};
use kafold_migrations::{Identifier, SqlText};
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{PgConnection, SqlStr, SqliteConnection};

use crate::copy::CopyRows;
use crate::definition::Definition;
use crate::generation::{self, Generation};
use crate::transaction::Transaction;
use crate::value::{add_array, add_value, copy_field, from_postgres, from_sqlite};

/// Most rows in one statement on SQLite; with many columns its limit on bound values comes first.
const SQLITE_ROWS_MAX: usize = 500;
/// SQLite takes no more bound values in a statement.
const SQLITE_VALUES_MAX: usize = 32_766;

/// New rows from which on PostgreSQL takes them by COPY: for fewer its two round trips cost more than
/// it gives.
const COPY_ROWS_MIN: usize = 500;

/// One generation's table.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) view: Identifier,
    pub(crate) table: Identifier,
    columns: &'static [Column],
    names: Vec<Identifier>,
    key: usize,
    postgres: PostgresStatements,
}

#[derive(Debug, Clone)]
struct PostgresStatements {
    load: SqlStr,
    copy: SqlStr,
    upsert: SqlStr,
    delete: SqlStr,
}

impl Table {
    /// The table of a definition that has passed its check; `None` for one without columns.
    pub(crate) fn new(definition: &Definition, generation: Generation) -> Option<Self> {
        let columns = definition.columns?;
        let valid = |text: &str| Identifier::new(text).expect("the definition was checked");
        let names: Vec<_> = columns.iter().map(|column| valid(column.name)).collect();
        let key = columns.iter().position(|column| column.role == ColumnRole::Key);
        let key = key.expect("the definition was checked");
        let table = generation.table(&definition.name);
        let postgres = PostgresStatements::new(&table, columns, &names, key);
        Some(Self { view: valid(&definition.name), table, columns, names, key, postgres })
    }

    /// Makes table and indexes, if they are not there.
    pub(crate) async fn create(&self, tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
        let on_postgres = matches!(tx, Transaction::Postgres(_));
        generation::run(tx, self.create_table(on_postgres)).await?;
        for statement in self.create_indexes() {
            generation::run(tx, statement).await?;
        }
        Ok(())
    }

    fn create_table(&self, on_postgres: bool) -> SqlStr {
        let mut sql = SqlText::new("CREATE TABLE IF NOT EXISTS ");
        sql.name(&self.table).text(" (");
        sql.list(", ", self.columns.iter().zip(&self.names), |sql, (column, name)| {
            let kind = column.kind;
            sql.name(name).text(" ");
            sql.text(if on_postgres { postgres_type(kind) } else { sqlite_type(kind) });
            sql.text(if column.nullable { "" } else { " NOT NULL" });
            sql.text(if column.role == ColumnRole::Key { " PRIMARY KEY" } else { "" });
        });
        sql.text(if on_postgres { ")" } else { ") STRICT, WITHOUT ROWID" });
        sql.finish()
    }

    fn create_indexes(&self) -> impl Iterator<Item = SqlStr> {
        // Numbered, not named after the column: PostgreSQL would cut the longer name.
        let indexed = self.columns.iter().zip(&self.names).enumerate();
        indexed.filter(|(_, (column, _))| column.role == ColumnRole::Index).map(
            |(nth, (_, name))| {
                let index = Identifier::new(&format!("{}_i{nth}", self.table.as_str()));
                let mut sql = SqlText::new("CREATE INDEX IF NOT EXISTS ");
                sql.name(&index.expect("a name of at most 50 bytes leaves room")).text(" ON ");
                sql.name(&self.table).text(" (").name(name).text(", ");
                sql.name(&self.names[self.key]).text(")").finish()
            },
        )
    }

    /// The rows of these keys that are there, in no order.
    pub(crate) async fn load(
        &self,
        tx: &mut Transaction<'_>,
        keys: Vec<Value>,
    ) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        match tx {
            Transaction::Postgres(connection) => {
                let mut arguments = PgArguments::default();
                add_array(&mut arguments, &self.columns[self.key], keys)?;
                let query = sqlx::query_with(self.postgres.load.clone(), arguments);
                let rows = query.fetch_all(&mut **connection).await?;
                rows.iter().map(|row| self.postgres_values(row)).collect()
            }
            Transaction::Sqlite(connection) => self.load_sqlite(connection, keys).await,
        }
    }

    /// Takes about so many rows that are not there yet; on PostgreSQL many, as a worker that is behind
    /// has them, go by COPY while the next ones are made.
    pub(crate) async fn inserts<'t>(
        &'t self,
        tx: &'t mut Transaction<'_>,
        about: usize,
    ) -> Result<Inserts<'t>, sqlx::Error> {
        match tx {
            Transaction::Postgres(connection) if about >= COPY_ROWS_MIN => {
                let width = i16::try_from(self.columns.len()).expect("the definition was checked");
                let sql = self.postgres.copy.as_str();
                let copy = CopyRows::begin(connection, sql, width).await?;
                Ok(Inserts::Copy(copy, self.columns))
            }
            _ => Ok(Inserts::Kept(Vec::with_capacity(about))),
        }
    }

    /// Inserts the rows that are not there and replaces those that are, in as few statements as can
    /// be.
    pub(crate) async fn upsert(
        &self,
        tx: &mut Transaction<'_>,
        rows: Vec<Vec<Value>>,
    ) -> Result<(), sqlx::Error> {
        if rows.is_empty() {
            return Ok(());
        }
        match tx {
            Transaction::Postgres(connection) => self.upsert_postgres(connection, rows).await,
            Transaction::Sqlite(connection) => self.upsert_sqlite(connection, rows).await,
        }
    }

    /// Deletes the rows of these keys, in one statement where it can be.
    pub(crate) async fn delete(
        &self,
        tx: &mut Transaction<'_>,
        keys: Vec<Value>,
    ) -> Result<(), sqlx::Error> {
        if keys.is_empty() {
            return Ok(());
        }
        match tx {
            Transaction::Postgres(connection) => {
                let mut arguments = PgArguments::default();
                add_array(&mut arguments, &self.columns[self.key], keys)?;
                let query = sqlx::query_with(self.postgres.delete.clone(), arguments);
                query.execute(&mut **connection).await.map(drop)
            }
            Transaction::Sqlite(connection) => self.delete_sqlite(connection, keys).await,
        }
    }

    /// `SELECT` of all columns `FROM` the view, for queries; JSON as text.
    pub(crate) fn select_from_view(&self, on_postgres: bool) -> SqlText {
        select(&self.view, self.columns, &self.names, on_postgres)
    }

    /// The key column and its name.
    pub(crate) fn key(&self) -> (&'static Column, &Identifier) {
        (&self.columns[self.key], &self.names[self.key])
    }

    /// Returns the name of a column of this table.
    pub(crate) fn name(&self, column: &Column) -> &Identifier {
        let place = self.columns.iter().position(|known| known.name == column.name);
        &self.names[place.expect("a condition is of the table's row")]
    }

    /// All values of a selected row.
    pub(crate) fn postgres_values(&self, row: &PgRow) -> Result<Vec<Value>, sqlx::Error> {
        let columns = self.columns.iter().enumerate();
        columns.map(|(index, column)| from_postgres(row, index, column)).collect()
    }

    /// All values of a selected row.
    pub(crate) fn sqlite_values(&self, row: &SqliteRow) -> Result<Vec<Value>, sqlx::Error> {
        let columns = self.columns.iter().enumerate();
        columns.map(|(index, column)| from_sqlite(row, index, column)).collect()
    }

    async fn upsert_postgres(
        &self,
        connection: &mut PgConnection,
        rows: Vec<Vec<Value>>,
    ) -> Result<(), sqlx::Error> {
        let mut by_column: Vec<Vec<Value>> =
            self.columns.iter().map(|_| Vec::with_capacity(rows.len())).collect();
        for row in rows {
            by_column.iter_mut().zip(row).for_each(|(column, value)| column.push(value));
        }
        let mut arguments = PgArguments::default();
        for (column, values) in self.columns.iter().zip(by_column) {
            add_array(&mut arguments, column, values)?;
        }
        let query = sqlx::query_with(self.postgres.upsert.clone(), arguments);
        query.execute(connection).await.map(drop)
    }

    async fn load_sqlite(
        &self,
        connection: &mut SqliteConnection,
        keys: Vec<Value>,
    ) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        let mut loaded = Vec::with_capacity(keys.len());
        for chunk in chunks(keys, SQLITE_ROWS_MAX) {
            let mut sql = select(&self.table, self.columns, &self.names, false);
            let query = self.with_keys(&mut sql, chunk)?;
            let rows = query.fetch_all(&mut *connection).await?;
            for row in &rows {
                loaded.push(self.sqlite_values(row)?);
            }
        }
        Ok(loaded)
    }

    async fn delete_sqlite(
        &self,
        connection: &mut SqliteConnection,
        keys: Vec<Value>,
    ) -> Result<(), sqlx::Error> {
        for chunk in chunks(keys, SQLITE_ROWS_MAX) {
            let mut sql = SqlText::new("DELETE FROM ");
            let query = self.with_keys(sql.name(&self.table), chunk)?;
            query.execute(&mut *connection).await?;
        }
        Ok(())
    }

    /// The statement with `WHERE key IN (…)` behind it. Not kept prepared when it is one of many
    /// that differ only in the number of keys.
    fn with_keys(
        &self,
        sql: &mut SqlText,
        keys: Vec<Value>,
    ) -> Result<sqlx::query::Query<'static, sqlx::Sqlite, SqliteArguments>, sqlx::Error> {
        let often = keys.len() == 1 || keys.len() == SQLITE_ROWS_MAX;
        sql.text(" WHERE ").name(&self.names[self.key]).text(" IN (");
        list_places(sql, keys.len()).text(")");
        let mut arguments = SqliteArguments::default();
        for key in keys {
            add_value(&mut arguments, key)?;
        }
        Ok(sqlx::query_with(sql.finish(), arguments).persistent(often))
    }

    async fn upsert_sqlite(
        &self,
        connection: &mut SqliteConnection,
        rows: Vec<Vec<Value>>,
    ) -> Result<(), sqlx::Error> {
        let width = self.columns.len();
        let rows_max = SQLITE_ROWS_MAX.min(SQLITE_VALUES_MAX / width).max(1);
        for chunk in chunks(rows, rows_max) {
            let often = chunk.len() == 1 || chunk.len() == rows_max;
            let mut sql = SqlText::new("INSERT INTO ");
            sql.name(&self.table).text(" (");
            list_names(&mut sql, &self.names).text(") VALUES ");
            sql.list(", ", 0..chunk.len(), |sql, _| {
                sql.text("(");
                list_places(sql, width).text(")");
            });
            on_conflict(&mut sql, &self.names, self.key);
            let mut arguments = SqliteArguments::default();
            for value in chunk.into_iter().flatten() {
                add_value(&mut arguments, value)?;
            }
            let query = sqlx::query_with(sql.finish(), arguments).persistent(often);
            query.execute(&mut *connection).await?;
        }
        Ok(())
    }
}

/// Rows on their way into a table that has none of them. They are there when it is finished.
pub(crate) enum Inserts<'t> {
    Copy(CopyRows<'t>, &'static [Column]),
    /// Too few for COPY, or there is none.
    Kept(Vec<Vec<Value>>),
}

impl Inserts<'_> {
    pub(crate) async fn add(&mut self, row: Vec<Value>) -> Result<(), sqlx::Error> {
        match self {
            Self::Kept(rows) => rows.push(row),
            Self::Copy(copy, columns) => {
                copy.row().await?;
                for (column, value) in columns.iter().zip(row) {
                    copy_field(copy, column, value)?;
                }
            }
        }
        Ok(())
    }

    /// Answers the rows that are still to be written.
    pub(crate) async fn finish(self) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        match self {
            Self::Kept(rows) => Ok(rows),
            Self::Copy(copy, _) => copy.finish().await.map(|()| Vec::new()),
        }
    }

    /// Gives them up; the transaction can only be rolled back.
    pub(crate) async fn abort(self) -> Result<(), sqlx::Error> {
        match self {
            Self::Kept(_) => Ok(()),
            Self::Copy(copy, _) => copy.abort().await,
        }
    }
}

impl PostgresStatements {
    fn new(table: &Identifier, columns: &[Column], names: &[Identifier], key: usize) -> Self {
        let key_in_array = |sql: &mut SqlText| {
            sql.text(" WHERE ").name(&names[key]).text(" = ANY(").placeholder(1).text(")").finish()
        };
        let mut upsert = SqlText::new("INSERT INTO ");
        list_names(upsert.name(table).text(" ("), names);
        upsert.text(") SELECT ");
        upsert.list(", ", columns.iter().zip(names), |sql, (column, name)| {
            sql.name(name).text(if column.kind == ColumnKind::Json { "::jsonb" } else { "" });
        });
        upsert.text(" FROM UNNEST(");
        upsert.list(", ", columns.iter().enumerate(), |sql, (index, column)| {
            sql.placeholder(index + 1).text("::").text(array_type(column.kind));
        });
        list_names(upsert.text(") AS u ("), names).text(")");
        on_conflict(&mut upsert, names, key);
        let mut copy = SqlText::new("COPY ");
        list_names(copy.name(table).text(" ("), names);
        copy.text(") FROM STDIN WITH (FORMAT binary)");
        Self {
            load: key_in_array(&mut select(table, columns, names, true)),
            copy: copy.finish(),
            upsert: upsert.finish(),
            delete: key_in_array(SqlText::new("DELETE FROM ").name(table)),
        }
    }
}

/// Adds the names with commas between them.
fn list_names<'s>(sql: &'s mut SqlText, names: &[Identifier]) -> &'s mut SqlText {
    sql.list(", ", names, |sql, name| {
        sql.name(name);
    })
}

/// Adds the places of so many bound values on SQLite, with commas between them. They have no numbers:
/// to SQLite `$1` is a name, which sqlx looks up in the list of all names, for each value.
pub(crate) fn list_places(sql: &mut SqlText, count: usize) -> &mut SqlText {
    sql.list(", ", 0..count, |sql, _| {
        sql.text("?");
    })
}

fn select(
    from: &Identifier,
    columns: &[Column],
    names: &[Identifier],
    on_postgres: bool,
) -> SqlText {
    let mut sql = SqlText::new("SELECT ");
    sql.list(", ", columns.iter().zip(names), |sql, (column, name)| {
        let as_text = on_postgres && column.kind == ColumnKind::Json;
        // SQLite reads the name of a missing column as a text, unless a table's name is before it.
        sql.name(from).text(".").name(name).text(if as_text { "::text" } else { "" });
    });
    sql.text(" FROM ").name(from);
    sql
}

/// Replaces every column but the key.
fn on_conflict(sql: &mut SqlText, names: &[Identifier], key: usize) {
    sql.text(" ON CONFLICT (").name(&names[key]).text(") DO ");
    if names.len() == 1 {
        sql.text("NOTHING");
        return;
    }
    let others = names.iter().enumerate().filter(|(index, _)| *index != key);
    sql.text("UPDATE SET ");
    sql.list(", ", others, |sql, (_, name)| {
        sql.name(name).text(" = excluded.").name(name);
    });
}

/// Collation C, so that text sorts the same on both databases.
fn postgres_type(kind: ColumnKind) -> &'static str {
    match kind {
        ColumnKind::Boolean => "BOOLEAN",
        ColumnKind::Integer => "BIGINT",
        ColumnKind::Real => "DOUBLE PRECISION",
        ColumnKind::Text => "TEXT COLLATE \"C\"",
        ColumnKind::Date => "DATE",
        ColumnKind::Timestamp => "TIMESTAMPTZ",
        ColumnKind::Uuid => "UUID",
        ColumnKind::Json => "JSONB",
    }
}

/// What the arrays of [`add_array`] are.
fn array_type(kind: ColumnKind) -> &'static str {
    match kind {
        ColumnKind::Boolean => "bool[]",
        ColumnKind::Integer => "int8[]",
        ColumnKind::Real => "float8[]",
        ColumnKind::Text | ColumnKind::Json => "text[]",
        ColumnKind::Date => "date[]",
        ColumnKind::Timestamp => "timestamptz[]",
        ColumnKind::Uuid => "uuid[]",
    }
}

fn sqlite_type(kind: ColumnKind) -> &'static str {
    match kind {
        ColumnKind::Boolean | ColumnKind::Integer => "INTEGER",
        ColumnKind::Real => "REAL",
        ColumnKind::Text
        | ColumnKind::Date
        | ColumnKind::Timestamp
        | ColumnKind::Uuid
        | ColumnKind::Json => "TEXT",
    }
}

fn chunks<T>(mut items: Vec<T>, most: usize) -> impl Iterator<Item = Vec<T>> {
    std::iter::from_fn(move || {
        let rest = items.split_off(most.min(items.len()));
        let chunk = std::mem::replace(&mut items, rest);
        (!chunk.is_empty()).then_some(chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_everything_once_and_in_order() {
        let sizes = |count: usize| chunks((0..count).collect(), 3).collect::<Vec<Vec<_>>>();
        assert!(sizes(0).is_empty());
        assert_eq!(sizes(3), [vec![0, 1, 2]]);
        assert_eq!(sizes(7), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }
}

//! The table of a read model in one generation. The statements are made once from the row's columns.

use chrono::SecondsFormat;
use kafold_core::row::{Column, ColumnKind, ColumnRole, RowKey, Value};
use kafold_core::window::Timestamp;
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
    /// The places of the key columns, in their order.
    keys: Vec<usize>,
    postgres: PostgresStatements,
}

/// Keys of rows: a list of values for each key column.
#[derive(Debug)]
pub(crate) struct Keys {
    columns: Vec<Vec<Value>>,
}

impl Keys {
    pub(crate) fn none<K: RowKey>() -> Self {
        Self { columns: vec![Vec::new(); K::COLUMNS] }
    }

    pub(crate) fn of<K: RowKey>(keys: impl ExactSizeIterator<Item = K>) -> Self {
        let mut all =
            Self { columns: (0..K::COLUMNS).map(|_| Vec::with_capacity(keys.len())).collect() };
        keys.for_each(|key| all.push(key));
        all
    }

    pub(crate) fn push<K: RowKey>(&mut self, key: K) {
        key.append_to(&mut self.columns);
    }

    fn count(&self) -> usize {
        self.columns.first().map_or(0, Vec::len)
    }

    /// Splits off the first keys, at most `most`.
    fn split_first(&mut self, most: usize) -> Self {
        let first = |column: &mut Vec<Value>| {
            let rest = column.split_off(most.min(column.len()));
            std::mem::replace(column, rest)
        };
        Self { columns: self.columns.iter_mut().map(first).collect() }
    }

    /// Returns the values key by key.
    fn into_values(self) -> impl Iterator<Item = Value> {
        let count = self.count();
        let mut columns: Vec<_> = self.columns.into_iter().map(Vec::into_iter).collect();
        let width = columns.len();
        (0..count * width).filter_map(move |nth| columns[nth % width].next())
    }
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
        let view = Identifier::new(&definition.name).expect("the definition was checked");
        Some(Self::of_columns(view, generation.table(&definition.name), columns))
    }

    /// A table of kafold, with these columns. Only for its rows: the table is made by a migration.
    pub(crate) fn of_kafold(name: &str, columns: &'static [Column]) -> Self {
        let table = Identifier::new(name).expect("a name of kafold");
        Self::of_columns(table.clone(), table, columns)
    }

    /// A view, to read its rows.
    pub(crate) fn of_view(name: &str, columns: &'static [Column]) -> Self {
        Self::of_kafold(name, columns)
    }

    fn of_columns(view: Identifier, table: Identifier, columns: &'static [Column]) -> Self {
        let valid = |text: &str| Identifier::new(text).expect("the definition was checked");
        let names: Vec<_> = columns.iter().map(|column| valid(column.name)).collect();
        let places = columns.iter().enumerate();
        let keys = places.filter(|(_, column)| column.role == ColumnRole::Key);
        let keys: Vec<_> = keys.map(|(place, _)| place).collect();
        let postgres = PostgresStatements::new(&table, columns, &names, &keys);
        Self { view, table, columns, names, keys, postgres }
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
        });
        list_key(sql.text(", PRIMARY KEY ("), &self.names, &self.keys);
        sql.text(if on_postgres { "))" } else { ")) STRICT, WITHOUT ROWID" });
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
                list_key(&mut sql, &self.names, &self.keys).text(")").finish()
            },
        )
    }

    /// The rows of these keys that are there, in no order.
    pub(crate) async fn load(
        &self,
        tx: &mut Transaction<'_>,
        keys: Keys,
    ) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        match tx {
            Transaction::Postgres(connection) => {
                let arguments = self.postgres_keys(keys)?;
                let query = sqlx::query_with(self.postgres.load.clone(), arguments);
                let rows = query.fetch_all(&mut **connection).await?;
                rows.iter().map(|row| self.postgres_values(row)).collect()
            }
            Transaction::Sqlite(connection) => self.load_sqlite(connection, keys).await,
        }
    }

    /// Returns the rows of sessions that overlap a span, of keys without their last column, the start of the session.
    pub(crate) async fn load_sessions(
        &self,
        tx: &mut Transaction<'_>,
        mut keys: Keys,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        let places = &self.keys[..self.keys.len() - 1];
        let (end, start) = (Identifier::new("window_end"), Identifier::new("window_start"));
        let (end, start) = (end.expect("a name"), start.expect("a name"));
        let mut rows = Vec::new();
        match tx {
            Transaction::Postgres(connection) => {
                let mut sql = select(&self.table, self.columns, &self.names, true);
                where_keys(&mut sql, self.columns, &self.names, places);
                sql.text(" AND ").name(&end).text(" >= ").placeholder(places.len() + 1);
                sql.text(" AND ").name(&start).text(" <= ").placeholder(places.len() + 2);
                let query = sqlx::query_with(sql.finish(), self.postgres_keys(keys)?);
                for row in &query.bind(from).bind(to).fetch_all(&mut **connection).await? {
                    rows.push(self.postgres_values(row)?);
                }
            }
            Transaction::Sqlite(connection) => {
                while keys.count() > 0 {
                    let mut sql = select(&self.table, self.columns, &self.names, false);
                    let first = keys.split_first(SQLITE_ROWS_MAX);
                    list_key(sql.text(" WHERE ("), &self.names, places);
                    let arguments = key_arguments(&mut sql, first, places.len())?;
                    sql.text(" AND ").name(&end).text(" >= ?");
                    sql.text(" AND ").name(&start).text(" <= ?");
                    let mut query = sqlx::query_with(sql.finish(), arguments).persistent(false);
                    for time in [from, to] {
                        query = query.bind(time.to_rfc3339_opts(SecondsFormat::Micros, true));
                    }
                    for row in &query.fetch_all(&mut **connection).await? {
                        rows.push(self.sqlite_values(row)?);
                    }
                }
            }
        }
        Ok(rows)
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
        keys: Keys,
    ) -> Result<(), sqlx::Error> {
        if keys.count() == 0 {
            return Ok(());
        }
        match tx {
            Transaction::Postgres(connection) => {
                let arguments = self.postgres_keys(keys)?;
                let query = sqlx::query_with(self.postgres.delete.clone(), arguments);
                query.execute(&mut **connection).await.map(drop)
            }
            Transaction::Sqlite(connection) => self.delete_sqlite(connection, keys).await,
        }
    }

    /// Deletes rows of windows that ended before a moment, at most `limit`. Returns the number of rows.
    pub(crate) async fn expire(
        &self,
        tx: &mut Transaction<'_>,
        before: Timestamp,
        limit: u64,
    ) -> Result<u64, sqlx::Error> {
        let end = Identifier::new("window_end").expect("a name");
        let mut sql = SqlText::new("DELETE FROM ");
        self.list_key(sql.name(&self.table).text(" WHERE (")).text(") IN (SELECT ");
        self.list_key(&mut sql).text(" FROM ").name(&self.table).text(" WHERE ").name(&end);
        sql.text(" < $1 LIMIT ").number(limit);
        match tx {
            Transaction::Postgres(connection) => {
                // Another worker deletes the rows that are locked.
                let sql = sql.text(" FOR UPDATE SKIP LOCKED)").finish();
                Ok(sqlx::query(sql).bind(before).execute(&mut **connection).await?.rows_affected())
            }
            Transaction::Sqlite(connection) => {
                let before = before.to_rfc3339_opts(SecondsFormat::Micros, true);
                let query = sqlx::query(sql.text(")").finish()).bind(before);
                Ok(query.execute(&mut **connection).await?.rows_affected())
            }
        }
    }

    /// Returns the statement for the least end of a window above `$1`, or from `$1` on.
    pub(crate) fn first_end(&self, is_inclusive: bool) -> SqlStr {
        let end = Identifier::new("window_end").expect("a name");
        let mut sql = SqlText::new("SELECT MIN(");
        sql.name(&end).text(") FROM ").name(&self.table).text(" WHERE ").name(&end);
        sql.text(if is_inclusive { " >= $1" } else { " > $1" }).finish()
    }

    /// `SELECT` of all columns `FROM` the view, for queries; JSON as text.
    pub(crate) fn select_from_view(&self, on_postgres: bool) -> SqlText {
        select(&self.view, self.columns, &self.names, on_postgres)
    }

    /// Returns the key columns and their names, in the order of the key.
    pub(crate) fn key(&self) -> impl Iterator<Item = (&'static Column, &Identifier)> {
        self.keys.iter().map(|place| (&self.columns[*place], &self.names[*place]))
    }

    /// Adds the names of the key columns.
    pub(crate) fn list_key<'s>(&self, sql: &'s mut SqlText) -> &'s mut SqlText {
        list_key(sql, &self.names, &self.keys)
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

    /// Returns the arrays of the statements by key.
    fn postgres_keys(&self, keys: Keys) -> Result<PgArguments, sqlx::Error> {
        let mut arguments = PgArguments::default();
        for ((column, _), values) in self.key().zip(keys.columns) {
            add_array(&mut arguments, column, values)?;
        }
        Ok(arguments)
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
        mut keys: Keys,
    ) -> Result<Vec<Vec<Value>>, sqlx::Error> {
        let mut loaded = Vec::with_capacity(keys.count());
        while keys.count() > 0 {
            let mut sql = select(&self.table, self.columns, &self.names, false);
            let query = self.with_keys(&mut sql, keys.split_first(SQLITE_ROWS_MAX))?;
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
        mut keys: Keys,
    ) -> Result<(), sqlx::Error> {
        while keys.count() > 0 {
            let (mut sql, first) =
                (SqlText::new("DELETE FROM "), keys.split_first(SQLITE_ROWS_MAX));
            let query = self.with_keys(sql.name(&self.table), first)?;
            query.execute(&mut *connection).await?;
        }
        Ok(())
    }

    /// Adds the condition on these keys to the statement. A statement that differs from many others only in the
    /// number of keys is not kept prepared.
    fn with_keys(
        &self,
        sql: &mut SqlText,
        keys: Keys,
    ) -> Result<sqlx::query::Query<'static, sqlx::Sqlite, SqliteArguments>, sqlx::Error> {
        let often = [1, SQLITE_ROWS_MAX].contains(&keys.count());
        self.list_key(sql.text(" WHERE ("));
        let arguments = key_arguments(sql, keys, self.keys.len())?;
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
            list_tuples(&mut sql, chunk.len(), width);
            on_conflict(&mut sql, &self.names, &self.keys);
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
    fn new(table: &Identifier, columns: &[Column], names: &[Identifier], keys: &[usize]) -> Self {
        let of_keys = |sql: &mut SqlText| where_keys(sql, columns, names, keys).finish();
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
        on_conflict(&mut upsert, names, keys);
        let mut copy = SqlText::new("COPY ");
        list_names(copy.name(table).text(" ("), names);
        copy.text(") FROM STDIN WITH (FORMAT binary)");
        Self {
            load: of_keys(&mut select(table, columns, names, true)),
            copy: copy.finish(),
            upsert: upsert.finish(),
            delete: of_keys(SqlText::new("DELETE FROM ").name(table)),
        }
    }
}

/// Adds the names with commas between them.
fn list_names<'s>(sql: &'s mut SqlText, names: &[Identifier]) -> &'s mut SqlText {
    sql.list(", ", names, |sql, name| {
        sql.name(name);
    })
}

/// Adds the names of the key columns with commas between them.
fn list_key<'s>(sql: &'s mut SqlText, names: &[Identifier], keys: &[usize]) -> &'s mut SqlText {
    sql.list(", ", keys, |sql, key| {
        sql.name(&names[*key]);
    })
}

/// Adds the condition on keys on PostgreSQL, whose values are one array a column.
fn where_keys<'s>(
    sql: &'s mut SqlText,
    columns: &[Column],
    names: &[Identifier],
    keys: &[usize],
) -> &'s mut SqlText {
    if let [key] = keys {
        let sql = sql.text(" WHERE ").name(&names[*key]).text(" = ANY(");
        return sql.placeholder(1).text(")");
    }
    list_key(sql.text(" WHERE ("), names, keys).text(") IN (SELECT * FROM UNNEST(");
    sql.list(", ", keys.iter().enumerate(), |sql, (nth, key)| {
        sql.placeholder(nth + 1).text("::").text(array_type(columns[*key].kind));
    });
    sql.text("))")
}

/// Adds the end of the condition on keys on SQLite, behind the names of the key columns. Returns its values.
fn key_arguments(
    sql: &mut SqlText,
    keys: Keys,
    width: usize,
) -> Result<SqliteArguments, sqlx::Error> {
    if width == 1 {
        list_places(sql.text(") IN ("), keys.count()).text(")");
    } else {
        list_tuples(sql.text(") IN (VALUES "), keys.count(), width).text(")");
    }
    let mut arguments = SqliteArguments::default();
    for value in keys.into_values() {
        add_value(&mut arguments, value)?;
    }
    Ok(arguments)
}

/// Adds tuples of bound values on SQLite, with commas between them.
pub(crate) fn list_tuples(sql: &mut SqlText, count: usize, width: usize) -> &mut SqlText {
    sql.list(", ", 0..count, |sql, _| {
        list_places(sql.text("("), width).text(")");
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
fn on_conflict(sql: &mut SqlText, names: &[Identifier], keys: &[usize]) {
    list_key(sql.text(" ON CONFLICT ("), names, keys).text(") DO ");
    if names.len() == keys.len() {
        sql.text("NOTHING");
        return;
    }
    let others = names.iter().enumerate().filter(|(place, _)| !keys.contains(place));
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

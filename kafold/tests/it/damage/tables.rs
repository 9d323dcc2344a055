//! Tables of kafold as SQL literals, for changes by a test without the triggers.

use std::collections::BTreeMap;

use fastrand::Rng;
use kafold::Database;
use kafold::projections::sqlx::{self, AssertSqlSafe, Connection, Row};

/// Rows of a table: a literal for each column.
pub(crate) type Rows = Vec<Vec<String>>;

/// A copy of the tables at one moment.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Tables(BTreeMap<&'static str, Rows>);

/// The tables behind decisions, with the number of leading columns in the key of a row.
const KEYS: &[(&str, usize)] = &[
    ("kafold_event", 3),
    ("kafold_stream", 4),
    ("kafold_partition", 1),
    ("kafold_partition_digest", 1),
    ("kafold_snapshot", 2),
    ("kafold_log", 1),
];

/// The column `hash` of `kafold_event` on PostgreSQL.
const HASH: usize = 11;

impl Tables {
    pub(crate) async fn read(database: &Database) -> Self {
        let mut tables = BTreeMap::new();
        for (table, _) in KEYS {
            let columns = columns(database, table).await;
            if !columns.is_empty() {
                tables.insert(*table, rows(database, table, &columns).await);
            }
        }
        Self(tables)
    }

    /// Returns the tables with data of streams.
    pub(crate) fn log(&self) -> [Option<&Rows>; 3] {
        ["kafold_event", "kafold_stream", "kafold_log"].map(|table| self.0.get(table))
    }

    /// Returns the number of rows of a table.
    pub(crate) fn rows(&self, table: &str) -> usize {
        self.0.get(table).map_or(0, Vec::len)
    }

    pub(crate) fn clear(&mut self, table: &str) {
        self.0.get_mut(table).expect("a table").clear();
    }

    /// Hides a stream: on SQLite moves the first head to another bucket and deletes the events of
    /// its stream, on PostgreSQL moves the events to another bucket. Returns the stream's name.
    pub(crate) fn hide_stream(&mut self) -> String {
        let moved = |hash: &mut String| {
            let old: i64 = hash.trim_matches('\'').parse().expect("a number");
            *hash = (old ^ (1 << 60)).to_string();
        };
        let name = if let Some(heads) = self.0.get_mut("kafold_stream") {
            moved(&mut heads[0][1]);
            let name = heads[0][2..4].to_vec();
            self.0.get_mut("kafold_event").expect("a table").retain(|row| row[..2] != name);
            name
        } else {
            let events = self.0.get_mut("kafold_event").expect("a table");
            let name = events[0][..2].to_vec();
            let of_stream = events.iter_mut().filter(|row| row[..2] == name);
            of_stream.for_each(|row| moved(&mut row[HASH]));
            name
        };
        name.join("-").replace('\'', "")
    }

    /// Changes tables at random; `older` is an earlier state of the tables. Returns a description
    /// of the changes.
    pub(crate) fn damage(&mut self, random: &mut Rng, older: &Self) -> String {
        let names: Vec<_> = self.0.keys().copied().collect();
        let mut done = Vec::new();
        for _ in 0..random.u32(1..=3) {
            let table = *random.choice(&names).expect("there are tables");
            let rows = self.0.get_mut(table).expect("named from its keys");
            let old = &older.0[table];
            let key = KEYS.iter().find(|(name, _)| *name == table).map_or(1, |(_, key)| *key);
            let act = match random.u32(0..6) {
                0 => {
                    rows.retain(|_| random.bool());
                    "rows deleted"
                }
                1 => {
                    rows.clear();
                    "truncated"
                }
                2 | 3 => {
                    change_cell(rows, random);
                    "a cell changed"
                }
                4 => {
                    rows.clone_from(old);
                    "replaced by its older copy"
                }
                _ => {
                    let is_old = |row: &Vec<String>| old.iter().find(|o| o[..key] == row[..key]);
                    let kept = std::mem::take(rows).into_iter();
                    let older_rows = kept.filter_map(|row| match random.bool() {
                        true => is_old(&row).cloned(),
                        false => Some(row),
                    });
                    *rows = older_rows.collect();
                    "rows replaced by older copies"
                }
            };
            done.push(format!("{table}: {act}"));
        }
        done.join(", ")
    }

    /// Writes the tables without the triggers. Returns `false` if the database rejects the
    /// statements: a value no column can hold is no possible damage.
    pub(crate) async fn write(&self, database: &Database, before: &Self) -> bool {
        let changed = self.0.iter().filter(|(table, rows)| before.0.get(*table) != Some(rows));
        let mut statements = Vec::new();
        for (table, rows) in changed {
            statements.push(format!("DELETE FROM {table}"));
            let columns = columns(database, table).await.join("\", \"");
            for row in rows {
                let values = row.join(", ");
                statements.push(format!("INSERT INTO {table} (\"{columns}\") VALUES ({values})"));
            }
        }
        run(database, &statements).await.is_ok()
    }
}

fn change_cell(rows: &mut Rows, random: &mut Rng) {
    let Some(other) = random.choice(rows.clone()) else { return };
    let nth = random.usize(0..rows.len());
    let column = random.usize(0..other.len());
    let value = match random.u32(0..4) {
        0 => other[column].clone(),
        1 => random.i64(-1..20).to_string(),
        2 => format!("'{}'", random.u32(..)),
        _ => random.i64(..).to_string(),
    };
    rows[nth][column] = value;
}

async fn columns(database: &Database, table: &str) -> Vec<String> {
    match database {
        Database::Sqlite(file) => {
            let sql = format!("SELECT name FROM pragma_table_info('{table}')");
            let rows = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(file.readers()).await;
            rows.expect("the columns")
        }
        Database::Postgres(server) => {
            let sql = format!(
                "SELECT column_name::text FROM information_schema.columns \
                 WHERE table_name = '{table}' ORDER BY ordinal_position"
            );
            let rows = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(server.pool()).await;
            rows.expect("the columns")
        }
    }
}

async fn rows(database: &Database, table: &str, columns: &[String]) -> Rows {
    match database {
        Database::Sqlite(file) => {
            let columns: Vec<_> = columns.iter().map(|name| format!("quote(\"{name}\")")).collect();
            let sql = format!("SELECT {} FROM {table}", columns.join(", "));
            let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(file.readers()).await;
            let rows = rows.expect("the rows");
            rows.iter().map(|row| (0..row.len()).map(|nth| row.get(nth)).collect()).collect()
        }
        Database::Postgres(server) => {
            let columns: Vec<_> =
                columns.iter().map(|name| format!("quote_nullable(\"{name}\"::text)")).collect();
            let sql = format!("SELECT {} FROM {table}", columns.join(", "));
            let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(server.pool()).await;
            let rows = rows.expect("the rows");
            rows.iter().map(|row| (0..row.len()).map(|nth| row.get(nth)).collect()).collect()
        }
    }
}

/// Runs statements in one transaction without the triggers of the tables.
async fn run(database: &Database, statements: &[String]) -> Result<(), sqlx::Error> {
    match database {
        Database::Sqlite(file) => {
            let mut tx = file.write().await?;
            let triggers: Vec<(String, String)> =
                sqlx::query_as("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
                    .fetch_all(&mut *tx)
                    .await?;
            for (name, _) in &triggers {
                let drop = format!("DROP TRIGGER {name}");
                sqlx::query(AssertSqlSafe(drop)).execute(&mut *tx).await?;
            }
            for statement in statements {
                sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *tx).await?;
            }
            for (_, sql) in triggers {
                sqlx::query(AssertSqlSafe(sql)).execute(&mut *tx).await?;
            }
            tx.commit().await
        }
        Database::Postgres(server) => {
            let mut connection = server.pool().acquire().await?;
            let mut tx = connection.begin().await?;
            let only_sqlite = ["kafold_log", "kafold_stream"];
            for (table, _) in KEYS.iter().filter(|(table, _)| !only_sqlite.contains(table)) {
                let off = format!("ALTER TABLE {table} DISABLE TRIGGER USER");
                sqlx::query(AssertSqlSafe(off)).execute(&mut *tx).await?;
            }
            for statement in statements {
                sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *tx).await?;
            }
            let only_sqlite = ["kafold_log", "kafold_stream"];
            for (table, _) in KEYS.iter().filter(|(table, _)| !only_sqlite.contains(table)) {
                let on = format!("ALTER TABLE {table} ENABLE TRIGGER USER");
                sqlx::query(AssertSqlSafe(on)).execute(&mut *tx).await?;
            }
            tx.commit().await
        }
    }
}

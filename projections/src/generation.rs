//! [`Generation`]: the builds of a projection's tables, and the views that queries see.
//!
//! A table `NAME` is a view of that name on the table of the live generation, `NAME__g3`. A rebuild
//! fills the tables of the next generation; the switch points the views at them.

use std::fmt;

use kafold_core::row::{Column, MergeRole};
use kafold_migrations::{Identifier, SqlText};
use sqlx::postgres::PgDatabaseError;
use sqlx::{Executor, SqlStr};

use crate::definition::Definition;
use crate::sql::either;
use crate::transaction::Transaction;
use crate::windowed;

/// SQLSTATE `dependent_objects_still_exist` of PostgreSQL.
const DEPENDENT_OBJECTS: &str = "2BP01";

/// One build of a projection's tables, counted from 1. No number is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The tables of a verification; no generation that is ever live.
    pub(crate) const VERIFIED: Self = Self(0);

    /// The one a projection begins with.
    pub const FIRST: Self = Self(1);

    /// What a table is called in this generation: `sales_by_sku` is `sales_by_sku__g1`.
    ///
    /// # Panics
    ///
    /// If `table` is not a name that [`Projection::tables`](crate::Projection::tables) may give.
    pub fn table(self, table: &str) -> Identifier {
        Identifier::new(&format!("{table}__g{self}")).expect("a table's name: [a-z][a-z0-9_]*")
    }

    /// As the tables hold it.
    pub(crate) fn int(self) -> i32 {
        i32::try_from(self.0).unwrap_or(i32::MAX)
    }

    pub(crate) fn of(int: i32) -> Self {
        Self(int.unsigned_abs())
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The rights of every other login on `kafold_checkpoint`, granted on a table in quotes.
const SHARE: &str = "; other record; BEGIN \
     FOR other IN SELECT a.grantee::regrole AS login, \
         string_agg(DISTINCT a.privilege_type, ', ') AS rights \
       FROM pg_class own, pg_class c, aclexplode(c.relacl) a \
       WHERE own.oid = to_regclass(made) AND pg_has_role(own.relowner, 'USAGE') \
         AND c.oid = to_regclass('kafold_checkpoint') AND a.grantee <> 0 \
         AND a.grantee::regrole::text <> quote_ident(current_user) \
       GROUP BY 1 \
     LOOP EXECUTE format('GRANT %s ON %I TO %s', other.rights, made, other.login); END LOOP; \
     END $$";

/// Grants every other login with rights on the checkpoints the same rights on a generation's tables
/// and views: a service and a worker with separate logins share the read models of both.
pub(crate) async fn share(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    generation: Generation,
) -> Result<(), sqlx::Error> {
    if matches!(tx, Transaction::Sqlite(_)) {
        return Ok(());
    }
    for table in definition.tables() {
        for made in [&generation.table(table.as_str()), &table] {
            let mut sql = SqlText::new("DO $$ DECLARE made text := ");
            run(tx, sql.quoted(made).text(SHARE).finish()).await?;
        }
    }
    Ok(())
}

/// Returns the owner of a table or view, or `None` if the current login has the owner's rights. On a
/// foreign table a login may change rows, but may neither create an index nor drop the table.
pub(crate) async fn foreign_owner(
    tx: &mut Transaction<'_>,
    table: &Identifier,
) -> Result<Option<String>, sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(None) };
    let sql = "SELECT relowner::regrole::text FROM pg_class \
               WHERE oid = to_regclass($1) AND NOT pg_has_role(relowner, 'USAGE')";
    sqlx::query_scalar(sql).bind(table.as_str()).fetch_optional(&mut **connection).await
}

/// Makes the views of a new projection.
pub(crate) async fn create_views(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    generation: Generation,
) -> Result<(), sqlx::Error> {
    for table in definition.tables() {
        run(tx, create_view("CREATE VIEW ", definition, &table, generation)).await?;
    }
    Ok(())
}

/// Points the views at another generation. On PostgreSQL a view whose columns stay is replaced, which
/// keeps the rights on it; other views on it must be made anew by whoever made them.
pub(crate) async fn switch_views(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    generation: Generation,
    same_columns: bool,
) -> Result<(), sqlx::Error> {
    let replaces = same_columns && matches!(tx, Transaction::Postgres(_));
    for table in definition.tables() {
        if replaces {
            run(tx, create_view("CREATE OR REPLACE VIEW ", definition, &table, generation)).await?;
        } else {
            run(tx, SqlText::new("DROP VIEW IF EXISTS ").name(&table).finish()).await?;
            run(tx, create_view("CREATE VIEW ", definition, &table, generation)).await?;
        }
    }
    Ok(())
}

pub(crate) async fn drop_views(
    tx: &mut Transaction<'_>,
    definition: &Definition,
) -> Result<(), sqlx::Error> {
    for table in definition.tables() {
        run(tx, SqlText::new("DROP VIEW IF EXISTS ").name(&table).finish()).await?;
    }
    Ok(())
}

/// Returns the objects for which PostgreSQL refuses to drop a view or a table, such as "view report depends
/// on view balances"; `None` for all other errors.
pub(crate) fn dependents(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    let shown = || error.detail().unwrap_or(error.message()).replace('\n', ", ");
    (error.code() == DEPENDENT_OBJECTS).then(shown)
}

/// Drops the tables of all generations but these.
pub(crate) async fn drop_tables(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    keep: &[Generation],
) -> Result<(), sqlx::Error> {
    for table in definition.tables() {
        for generation in generations(tx, &table).await? {
            if !keep.contains(&generation) {
                let stale = generation.table(table.as_str());
                run(tx, SqlText::new("DROP TABLE IF EXISTS ").name(&stale).finish()).await?;
            }
        }
    }
    Ok(())
}

/// Whether a table or view of this name is found without naming a schema.
pub(crate) async fn exists(tx: &mut Transaction<'_>, name: &str) -> Result<bool, sqlx::Error> {
    match tx {
        Transaction::Postgres(connection) => {
            let query = sqlx::query_scalar("SELECT to_regclass(quote_ident($1)) IS NOT NULL");
            query.bind(name).fetch_one(&mut **connection).await
        }
        Transaction::Sqlite(connection) => {
            // SQLite's names know no case.
            let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = $1 COLLATE NOCASE)";
            sqlx::query_scalar(sql).bind(name).fetch_one(&mut **connection).await
        }
    }
}

pub(crate) async fn run(tx: &mut Transaction<'_>, statement: SqlStr) -> Result<(), sqlx::Error> {
    let query = sqlx::raw_sql(statement);
    either!(tx, connection => connection.execute(query).await.map(drop))
}

fn create_view(
    how: &'static str,
    definition: &Definition,
    view: &Identifier,
    generation: Generation,
) -> SqlStr {
    let table = generation.table(view.as_str());
    let mut sql = SqlText::new(how);
    sql.name(view).text(" AS SELECT ");
    let columns = definition.columns.filter(|_| definition.is_spread);
    let Some(columns) = columns else { return sql.text("* FROM ").name(&table).finish() };
    // The rows of all partitions, without the column of the partition.
    let name = |column: &Column| Identifier::new(column.name).expect("the definition was checked");
    let merged = columns.iter().filter(|column| column.name != windowed::PARTITION);
    sql.list(", ", merged.clone(), |sql, column| {
        let name = name(column);
        match column.merge {
            None => sql.name(&name),
            // PostgreSQL's sum of integers is NUMERIC.
            Some(MergeRole::Sum) => {
                sql.text("CAST(SUM(").name(&name).text(") AS BIGINT) AS ").name(&name)
            }
            Some(MergeRole::Min) => sql.text("MIN(").name(&name).text(") AS ").name(&name),
            Some(MergeRole::Max) => sql.text("MAX(").name(&name).text(") AS ").name(&name),
        };
    });
    sql.text(" FROM ").name(&table).text(" GROUP BY ");
    sql.list(", ", merged.filter(|column| column.merge.is_none()), |sql, column| {
        sql.name(&name(column));
    });
    sql.finish()
}

/// Returns the generations with a table, except foreign tables.
async fn generations(
    tx: &mut Transaction<'_>,
    table: &Identifier,
) -> Result<Vec<Generation>, sqlx::Error> {
    let prefix = format!("{}__g", table.as_str());
    let names: Vec<String> = match tx {
        Transaction::Postgres(connection) => {
            let sql = "SELECT c.relname::text FROM pg_class c \
                       WHERE c.relkind = 'r' AND starts_with(c.relname, $1) \
                         AND pg_table_is_visible(c.oid) AND pg_has_role(c.relowner, 'USAGE')";
            sqlx::query_scalar(sql).bind(&prefix).fetch_all(&mut **connection).await?
        }
        Transaction::Sqlite(connection) => {
            let sql = "SELECT name FROM sqlite_schema \
                       WHERE type = 'table' AND substr(name, 1, length($1)) = $1";
            sqlx::query_scalar(sql).bind(&prefix).fetch_all(&mut **connection).await?
        }
    };
    let number = |name: &String| name.strip_prefix(&prefix)?.parse().ok().map(Generation);
    // Generation 0 is a verification's.
    Ok(names.iter().filter_map(number).filter(|generation| generation.0 > 0).collect())
}

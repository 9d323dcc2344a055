//! One statement on either database. Both take `$1`, and [`Time`](kafold_migrations::micros::Time)
//! stands for either's times; only the driver's types differ.

use kafold_migrations::SqlText;
use sqlx::SqlStr;

use crate::transaction::Transaction;

/// `either!(tx, connection => …)`: the same expression for each kind of [`Transaction`](crate::Transaction).
macro_rules! either {
    ($tx:expr, $connection:ident => $run:expr) => {
        match $tx {
            $crate::transaction::Transaction::Postgres($connection) => $run,
            $crate::transaction::Transaction::Sqlite($connection) => $run,
        }
    };
}

/// `reading!(database, pool => …)`: the same expression for the connections that read.
macro_rules! reading {
    ($database:expr, $pool:ident => $run:expr) => {
        match $database {
            kafold_migrations::Database::Postgres(database) => {
                let $pool = database.pool();
                $run
            }
            kafold_migrations::Database::Sqlite(database) => {
                let $pool = database.readers();
                $run
            }
        }
    };
}

pub(crate) use {either, reading};

/// A statement with the database's clock in it, in seconds since 1970.
pub(crate) fn with_clock(is_postgres: bool, before: &'static str, after: &'static str) -> SqlStr {
    let now = match is_postgres {
        true => "EXTRACT(EPOCH FROM clock_timestamp())::bigint",
        false => "unixepoch()",
    };
    SqlText::new(before).text(now).text(after).finish()
}

/// A query that locks the rows it finds; on SQLite nobody else writes while a transaction is open.
pub(crate) fn locking(tx: &Transaction<'_>, select: &'static str, lock: &'static str) -> SqlStr {
    let is_postgres = matches!(tx, Transaction::Postgres(_));
    SqlText::new(select).text(if is_postgres { lock } else { "" }).finish()
}

//! One statement on either database. Both take `$1`, and [`Time`](kafold_migrations::micros::Time)
//! stands for either's times; only the driver's types differ.

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

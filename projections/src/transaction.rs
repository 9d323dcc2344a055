//! The open transaction of the chosen database, as a [`Projection`](crate::Projection) gets it.

use kafold_migrations::{Database, WriteTransaction, begin, is_transient, refusal};
use sqlx::{PgConnection, Postgres, SqliteConnection};

/// An open transaction on one of the two databases.
///
/// The worker commits it together with the checkpoint, or rolls it back; a projection only runs
/// statements in it, with sqlx's own functions.
#[derive(Debug)]
pub enum Transaction<'t> {
    /// On PostgreSQL.
    Postgres(&'t mut PgConnection),
    /// On SQLite.
    Sqlite(&'t mut SqliteConnection),
}

/// A projection ran on a database that it was not written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this projection needs {needed}, the database is {found}")]
pub struct WrongDatabase {
    /// What it was written for.
    pub needed: &'static str,
    /// What it runs on.
    pub found: &'static str,
}

impl Transaction<'_> {
    /// The connection, for statements of PostgreSQL only.
    pub fn postgres(&mut self) -> Result<&mut PgConnection, WrongDatabase> {
        match self {
            Self::Postgres(connection) => Ok(connection),
            Self::Sqlite(_) => Err(WrongDatabase { needed: "PostgreSQL", found: "SQLite" }),
        }
    }

    /// The connection, for statements of SQLite only.
    pub fn sqlite(&mut self) -> Result<&mut SqliteConnection, WrongDatabase> {
        match self {
            Self::Sqlite(connection) => Ok(connection),
            Self::Postgres(_) => Err(WrongDatabase { needed: "SQLite", found: "PostgreSQL" }),
        }
    }
}

/// A transaction that this crate opened and commits.
pub(crate) enum OpenTransaction {
    Postgres(sqlx::Transaction<'static, Postgres>),
    Sqlite(WriteTransaction),
}

impl OpenTransaction {
    /// On SQLite it waits for its turn among the writers of the file.
    pub(crate) async fn begin(database: &Database) -> Result<Self, sqlx::Error> {
        Ok(match database {
            Database::Postgres(database) => Self::Postgres(begin(database.pool(), "BEGIN").await?),
            Database::Sqlite(database) => Self::Sqlite(database.write().await?),
        })
    }

    /// One whose commit PostgreSQL does not wait for the disk with: a server that crashes may have
    /// forgotten it, with all that was committed after it, unless a later commit did wait.
    pub(crate) async fn begin_forgettable(database: &Database) -> Result<Self, sqlx::Error> {
        let Database::Postgres(database) = database else { return Self::begin(database).await };
        let sql = "BEGIN; SET LOCAL synchronous_commit = off";
        Ok(Self::Postgres(begin(database.pool(), sql).await?))
    }

    pub(crate) fn lend(&mut self) -> Transaction<'_> {
        match self {
            Self::Postgres(transaction) => Transaction::Postgres(transaction),
            Self::Sqlite(transaction) => Transaction::Sqlite(transaction),
        }
    }

    pub(crate) async fn commit(self) -> Result<(), sqlx::Error> {
        match self {
            Self::Postgres(transaction) => transaction.commit().await,
            Self::Sqlite(transaction) => transaction.commit().await,
        }
    }

    pub(crate) async fn rollback(self) -> Result<(), sqlx::Error> {
        match self {
            Self::Postgres(transaction) => transaction.rollback().await,
            Self::Sqlite(transaction) => transaction.rollback().await,
        }
    }
}

/// Returns the reason for an error caused by the database and not by the statement or its values;
/// otherwise `None`. The caller retries: an outage ends without help, and an operator may repair a
/// right or a password at any time.
pub(crate) fn unavailable(error: &sqlx::Error) -> Option<String> {
    if let Some(refusal) = refusal(error) {
        return Some(format!("the database refuses: {refusal}"));
    }
    // A server that dies between two messages shows as a breach of the protocol.
    let is_away = is_transient(error) || matches!(error, sqlx::Error::Protocol(_));
    is_away.then(|| format!("the database is unavailable: {error}"))
}

/// Whether the database refuses the values of these events, so that others may go through; else it
/// is the statement that it refuses, whatever the values are.
pub(crate) fn is_of_values(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Encode(_)
        | sqlx::Error::Decode(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::RowNotFound => true,
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            match error.try_downcast_ref::<sqlx::sqlite::SqliteError>() {
                // The low byte is the primary code: TOOBIG, CONSTRAINT, MISMATCH.
                Some(_) => {
                    code.parse().is_ok_and(|code: i32| [18, 19, 20].contains(&(code & 0xff)))
                }
                // Cardinality, data, constraints, views' checks, limits of a row, what a trigger raises.
                None => ["21", "22", "23", "44", "54", "P0"].iter().any(|c| code.starts_with(c)),
            }
        }
        _ => false,
    }
}

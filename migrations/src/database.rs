//! One handle for either kind of database.

use crate::error::DatabaseError;
use crate::postgres::PostgresDatabase;
use crate::sqlite::SqliteDatabase;
use crate::url::{self, Target};

/// What opening may do to the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Creates and updates the toolkit's tables, and SQLite's file. For `serve` and `migrate` only;
    /// safe when several processes do it at once.
    Migrate,
    /// Demands that the tables are there and current.
    Check,
}

/// A database whose tables are those that this program knows. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Database {
    /// A PostgreSQL database.
    Postgres(PostgresDatabase),
    /// A SQLite file.
    Sqlite(SqliteDatabase),
}

impl Database {
    /// Opens `sqlite://FILE` (relative to the working directory; `sqlite:///abs/path` is absolute)
    /// or `postgres://…`.
    ///
    /// Connects once and waits for nothing: after [`DatabaseError::Unavailable`] the caller waits
    /// and tries again; every other error is for good. Folders are never created.
    pub async fn open(url: &str, mode: Mode) -> Result<Self, DatabaseError> {
        match url::parse(url)? {
            Target::Postgres => Ok(Self::Postgres(PostgresDatabase::open(url, mode).await?)),
            Target::Sqlite(file) => Ok(Self::Sqlite(SqliteDatabase::open_file(&file, mode).await?)),
        }
    }

    /// The URL without password, for people.
    pub fn url(&self) -> &str {
        match self {
            Self::Postgres(database) => database.url(),
            Self::Sqlite(database) => database.url(),
        }
    }

    /// Waits for what is under way and closes the connections. On SQLite other handles on the same
    /// file stay open; what was committed is then in the file itself, not in the log beside it
    /// (unless somebody is just reading an older state).
    pub async fn close(self) {
        match self {
            Self::Postgres(database) => database.close().await,
            Self::Sqlite(database) => database.close().await,
        }
    }
}

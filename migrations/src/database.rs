//! One handle for either kind of database.

use crate::error::DatabaseError;
use crate::postgres::PostgresDatabase;
use crate::rights::Role;
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
    /// or `postgres://USER@HOST:PORT/DATABASE?password=@FILE`.
    ///
    /// A password is `@FILE`, `$NAME` of an environment variable, or literal. Files and variables
    /// are read again for each probe of a [watched](Self::watch) database. A session to another
    /// machine is encrypted and the server is verified;
    /// `allow_unsafe=clear_text,unverified_tls,readable_secret` names exceptions, and a warning is
    /// logged for each exception in use.
    ///
    /// Connects once and waits for nothing: after [`DatabaseError::Unavailable`] the caller waits
    /// and tries again; every other error is for good. Folders are never created.
    pub async fn open(url: &str, mode: Mode) -> Result<Self, DatabaseError> {
        match url::parse(url)? {
            Target::Postgres(url) => Ok(Self::Postgres(PostgresDatabase::open(url, mode).await?)),
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

    /// Returns a text that equals another one only if both handles are on the same database. On
    /// PostgreSQL also the schema counts; a promoted standby server is the same database.
    pub fn identity(&self) -> &str {
        match self {
            Self::Postgres(database) => database.identity(),
            Self::Sqlite(database) => database.identity(),
        }
    }

    /// Rejects a PostgreSQL login without all rights of the role, and names the missing GRANT
    /// lines. Watches the database afterwards.
    pub async fn require(&self, role: Role) -> Result<(), DatabaseError> {
        match self {
            Self::Postgres(database) => database.require(role).await,
            Self::Sqlite(_) => Ok(()),
        }
    }

    /// Watches a PostgreSQL database on behalf of the role.
    ///
    /// A new connection every 5 s notices a changed password, certificate or right.
    /// [`Database::complaint`] returns the result, and the log repeats the complaint once a minute.
    /// Must be called within a tokio runtime.
    pub fn watch(&self, role: Role) {
        match self {
            Self::Postgres(database) => database.watch(role),
            Self::Sqlite(_) => {}
        }
    }

    /// Returns the reason for which a watched database refuses this process, with the remedy;
    /// `None` after a probe has succeeded again.
    pub fn complaint(&self) -> Option<String> {
        match self {
            Self::Postgres(database) => database.complaint(),
            Self::Sqlite(_) => None,
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

//! What is worth waiting for, and what is refused for good.

use std::io;

use sqlx::error::DatabaseError as _;
use sqlx::migrate::MigrateError;

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It does not answer now: wait and try again.
    #[error("{url} is unavailable: {cause}")]
    Unavailable {
        /// The URL without password.
        url: String,
        /// What the database or the system said.
        #[source]
        cause: sqlx::Error,
    },
    /// It will not work until someone changes something.
    #[error("{what}; {remedy}")]
    Refused {
        /// What is wrong, with the URL without password.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// A newer version of kafold has been here.
    #[error(
        "the tables in {url} are of schema {found}, this program knows only {known}: \
         use the newer kafold version that made them"
    )]
    NewerSchema {
        /// The URL without password.
        url: String,
        /// Highest migration in the database.
        found: i64,
        /// Highest migration of this program.
        known: i64,
    },
    /// The toolkit's tables are not there, or older than this program needs.
    #[error(
        "{url} has no current kafold tables (schema {found}, needed {known}): \
         start the service once, or run its `migrate`"
    )]
    NotMigrated {
        /// The URL without password.
        url: String,
        /// Highest migration in the database, 0 if none.
        found: i64,
        /// Highest migration of this program.
        known: i64,
    },
}

impl DatabaseError {
    pub(crate) fn refused(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), remedy: remedy.into() }
    }

    /// The error of a migration, as that of the statement beneath where there is one.
    pub(crate) fn of_migration(
        error: MigrateError,
        of: impl FnOnce(sqlx::Error) -> Self,
        url: &str,
    ) -> Self {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => of(error),
            other => Self::refused(format!("{url}: {other}"), "use another database"),
        }
    }
}

/// Whether the same work may succeed later without anyone changing it: the connection is lost, the
/// server stops, starts or is full, a lock was not to be had, another transaction was in the way, or
/// a prepared statement is older than the view it reads.
///
/// An error that is not transient is the fault of the statement or of its values.
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => {
            if let Some(error) = error.try_downcast_ref::<sqlx::sqlite::SqliteError>() {
                return SqliteCode::of(error).is_transient();
            }
            let code = error.code().unwrap_or_default();
            is_transient_postgres(&code, error.message())
        }
        _ => false,
    }
}

fn is_transient_postgres(code: &str, message: &str) -> bool {
    match code {
        // Shutting down, crashed, starting up, the database was dropped or the session idle too long.
        "57P01" | "57P02" | "57P03" | "57P05" => true,
        // Serialization failure, deadlock, no lock in time, cancelled by a timeout, read-only after a
        // failover until the pool has connected to the primary again.
        "40001" | "40P01" | "55P03" | "57014" | "25006" | "25P03" => true,
        // A view was replaced under a prepared statement: the driver prepares it anew.
        "0A000" => message.contains("cached plan"),
        // Connections; resources (disk full, too many connections); the server's own IO.
        _ => ["08", "53", "58"].iter().any(|class| code.starts_with(class)),
    }
}

/// SQLite's primary result codes that are told apart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SqliteCode(i32);

impl SqliteCode {
    pub(crate) const PERM: Self = Self(3);
    pub(crate) const BUSY: Self = Self(5);
    pub(crate) const LOCKED: Self = Self(6);
    pub(crate) const NOMEM: Self = Self(7);
    pub(crate) const READONLY: Self = Self(8);
    pub(crate) const IOERR: Self = Self(10);
    pub(crate) const CORRUPT: Self = Self(11);
    pub(crate) const FULL: Self = Self(13);
    pub(crate) const CANTOPEN: Self = Self(14);
    pub(crate) const PROTOCOL: Self = Self(15);
    pub(crate) const NOTADB: Self = Self(26);

    pub(crate) fn of(error: &sqlx::sqlite::SqliteError) -> Self {
        // The driver hands the extended code out as text; its low byte is the primary one.
        let extended = error.code().and_then(|code| code.parse::<i32>().ok());
        Self(extended.map_or(0, |code| code & 0xff))
    }

    /// The code of an error that SQLite gave, if it did.
    pub(crate) fn of_error(error: &sqlx::Error) -> Option<Self> {
        let error = error.as_database_error()?;
        error.try_downcast_ref::<sqlx::sqlite::SqliteError>().map(Self::of)
    }

    /// Locks, and what an operator sets right without touching the program: space, rights, the disk.
    fn is_transient(self) -> bool {
        [
            Self::BUSY,
            Self::LOCKED,
            Self::NOMEM,
            Self::READONLY,
            Self::IOERR,
            Self::FULL,
            Self::CANTOPEN,
            Self::PROTOCOL,
        ]
        .contains(&self)
    }
}

/// Whether a host name could not be resolved. The system gives it no error kind of its own.
pub(crate) fn is_unknown_host(error: &io::Error) -> bool {
    error.to_string().contains("failed to lookup address information")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_gets_over_is_transient_and_bad_statements_are_not() {
        for code in ["57P01", "57P03", "53300", "40001", "40P01", "08006", "55P03", "53100"] {
            assert!(is_transient_postgres(code, ""), "{code}");
        }
        for code in ["23505", "42601", "42P01", "22003", "0A000", "42501"] {
            assert!(!is_transient_postgres(code, ""), "{code}");
        }
        assert!(is_transient_postgres("0A000", "cached plan must not change result type"));
    }
}

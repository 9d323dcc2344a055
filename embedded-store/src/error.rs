//! What SQLite's errors mean to a caller.

use std::fmt;

use kafold_core::{AppendError, ReadError};
use kafold_migrations::is_transient;

use crate::config::RETRY_AFTER;

/// Nothing was written: locked, full, read-only, or damaged, as the cause says.
pub(crate) fn nothing_written(error: sqlx::Error) -> AppendError {
    AppendError::unavailable(RETRY_AFTER, explained(error))
}

/// A read failed: worth another try, or for an operator to look at.
pub(crate) fn not_read(error: sqlx::Error) -> ReadError {
    match is_transient(&error) {
        true => ReadError::unavailable(RETRY_AFTER, explained(error)),
        false => ReadError::diverged("table kafold_event", error),
    }
}

/// Whether a failed COMMIT has certainly left nothing in the file that could come back: SQLite gave
/// up before it had written the last frame of the transaction to the log file. After any other error
/// the frames may be whole, and only their `fsync` has failed.
pub(crate) fn is_certainly_not_committed(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(BUSY | LOCKED | READONLY | FULL | CANTOPEN))
}

const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const READONLY: i32 = 8;
const FULL: i32 = 13;
const CANTOPEN: i32 = 14;

fn primary_code(error: &sqlx::Error) -> Option<i32> {
    // The driver hands the extended code out as text; its low byte is the primary one.
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(code & 0xff)
}

/// An error of SQLite with the remedy in front, where one is known.
#[derive(Debug)]
struct Explained {
    remedy: &'static str,
    error: sqlx::Error,
}

fn explained(error: sqlx::Error) -> Explained {
    let remedy = match primary_code(&error) {
        Some(BUSY | LOCKED) => "another process holds the database file",
        Some(FULL) => "the disk of the database file is full",
        Some(READONLY | CANTOPEN) => "the database file or its folder is not writable",
        _ if matches!(error, sqlx::Error::PoolTimedOut) => {
            "other work on the database file takes too long"
        }
        _ => "the database file cannot be used",
    };
    Explained { remedy, error }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.remedy, self.error)
    }
}

impl std::error::Error for Explained {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

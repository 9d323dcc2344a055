//! Times as SQLite's tables hold them: whole microseconds since 1970-01-01 in UTC.

use sqlx::types::chrono::{DateTime, Utc};

/// The time as microseconds since 1970.
pub fn to_micros(time: DateTime<Utc>) -> i64 {
    time.timestamp_micros()
}

/// The time that many microseconds after 1970; `None` beyond what a calendar date can be.
pub fn from_micros(micros: i64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros)
}

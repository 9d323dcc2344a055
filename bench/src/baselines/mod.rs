//! What somebody would write by hand instead, as carefully as ours: the same bytes, headers,
//! partitions and settings of the client.

pub mod consumer;
pub mod copy;
pub mod producer;
pub mod replay;
pub mod server;
pub mod service;
pub mod sqlite_log;
pub mod upsert;

use std::path::Path;

use kafold::projections::sqlx::ConnectOptions;
use kafold::projections::sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous,
};

use crate::Failure;

/// A new SQLite file, as durable as ours.
async fn sqlite(file: &Path) -> Result<SqliteConnection, Failure> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    Ok(options.connect().await?)
}

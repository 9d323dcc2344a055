//! An event log in a SQLite file, written by hand: a transaction an append, as durable as ours.

use std::path::Path;

use kafold::Clock;
use kafold::clock::SystemClock;
use kafold::projections::sqlx::sqlite::SqliteConnection;
use kafold::projections::sqlx::{self, Connection};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::Failure;

/// The log; callers wait for each other, as SQLite has them do.
pub struct SqliteLog {
    connection: Mutex<SqliteConnection>,
}

impl SqliteLog {
    /// A new file.
    pub async fn create(file: &Path) -> Result<Self, Failure> {
        let mut connection = super::sqlite(file).await?;
        let table = "CREATE TABLE event (stream TEXT NOT NULL, version INTEGER NOT NULL, \
                     command_id BLOB NOT NULL, event_id BLOB NOT NULL, type TEXT NOT NULL, \
                     recorded_at INTEGER NOT NULL, payload BLOB NOT NULL, \
                     PRIMARY KEY (stream, version))";
        sqlx::query(table).execute(&mut connection).await?;
        let index = "CREATE INDEX event_command ON event (stream, command_id)";
        sqlx::query(index).execute(&mut connection).await?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// Appends one event to a stream whose version must be this, unless the command is there already.
    /// Whether that was so.
    pub async fn append(
        &self,
        stream: &str,
        version: i64,
        command_id: Uuid,
        payload: &[u8],
    ) -> Result<bool, Failure> {
        let mut connection = self.connection.lock().await;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        let known = "SELECT count(*) FROM event WHERE stream = $1 AND command_id = $2";
        let known: i64 =
            sqlx::query_scalar(known).bind(stream).bind(command_id).fetch_one(&mut *tx).await?;
        let at = "SELECT coalesce(max(version), 0) FROM event WHERE stream = $1";
        let at: i64 = sqlx::query_scalar(at).bind(stream).fetch_one(&mut *tx).await?;
        if known > 0 || at != version {
            tx.rollback().await?;
            return Ok(false);
        }
        let insert = "INSERT INTO event VALUES ($1, $2, $3, $3, $4, $5, $6)";
        sqlx::query(insert)
            .bind(stream)
            .bind(version + 1)
            .bind(command_id)
            .bind("account.deposited.v1")
            .bind(SystemClock.now().timestamp_micros())
            .bind(payload)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// How many events there are.
    pub async fn count(&self) -> Result<i64, Failure> {
        let mut connection = self.connection.lock().await;
        Ok(sqlx::query_scalar("SELECT count(*) FROM event").fetch_one(&mut *connection).await?)
    }
}

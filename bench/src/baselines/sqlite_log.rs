//! An event log in a SQLite file, written by hand: a transaction an append, as durable as ours.

use std::path::Path;

use kafold::clock::SystemClock;
use kafold::projections::sqlx::sqlite::SqliteConnection;
use kafold::projections::sqlx::{self, Connection};
use kafold::{Clock, Database, Mode};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::Failure;

/// The log; callers wait for each other, as SQLite has them do.
pub struct SqliteLog {
    connection: Mutex<SqliteConnection>,
    statements: Statements,
}

/// The statements on one table, with the same values.
struct Statements {
    known: &'static str,
    version: &'static str,
    insert: &'static str,
    count: &'static str,
}

const LEAST: Statements = Statements {
    known: "SELECT count(*) FROM event WHERE stream = $1 AND command_id = $2",
    version: "SELECT coalesce(max(version), 0) FROM event WHERE stream = $1",
    insert: "INSERT INTO event VALUES ($1, $2, $3, $3, $4, $5, $6)",
    count: "SELECT count(*) FROM event",
};

const OURS: Statements = Statements {
    known: "SELECT count(*) FROM kafold_event INDEXED BY kafold_event_command \
            WHERE category = 'account' AND stream_id = $1 AND command_id = $2",
    version: "SELECT coalesce(max(version), 0) FROM kafold_event \
              WHERE category = 'account' AND stream_id = $1",
    insert: "INSERT INTO kafold_event (category, stream_id, version, partition, \"offset\", event_id, \
               event_type, recorded_at, command_id, payload) \
             SELECT 'account', $1, $2, 0, \
               (SELECT coalesce(max(\"offset\") + 1, 0) FROM kafold_event WHERE partition = 0), \
               $3, $4, $5, $3, $6",
    count: "SELECT count(*) FROM kafold_event",
};

impl SqliteLog {
    /// A new file with as few indexes as the promises need.
    pub async fn create(file: &Path) -> Result<Self, Failure> {
        let mut connection = super::sqlite(file).await?;
        let table = "CREATE TABLE event (stream TEXT NOT NULL, version INTEGER NOT NULL, \
                     command_id BLOB NOT NULL, event_id BLOB NOT NULL, type TEXT NOT NULL, \
                     recorded_at INTEGER NOT NULL, payload BLOB NOT NULL, \
                     PRIMARY KEY (stream, version))";
        sqlx::query(table).execute(&mut connection).await?;
        let index = "CREATE INDEX event_command ON event (stream, command_id)";
        sqlx::query(index).execute(&mut connection).await?;
        Ok(Self { connection: Mutex::new(connection), statements: LEAST })
    }

    /// A new file with kafold's table, in which events have an order and a place as well.
    pub async fn with_our_table(file: &Path) -> Result<Self, Failure> {
        let url = format!("sqlite://{}", file.display());
        Database::open(&url, Mode::Migrate).await?.close().await;
        let connection = super::sqlite(file).await?;
        Ok(Self { connection: Mutex::new(connection), statements: OURS })
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
        let Statements { known, version: newest, insert, .. } = self.statements;
        let mut connection = self.connection.lock().await;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        let known: i64 =
            sqlx::query_scalar(known).bind(stream).bind(command_id).fetch_one(&mut *tx).await?;
        let at: i64 = sqlx::query_scalar(newest).bind(stream).fetch_one(&mut *tx).await?;
        if known > 0 || at != version {
            tx.rollback().await?;
            return Ok(false);
        }
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
        Ok(sqlx::query_scalar(self.statements.count).fetch_one(&mut *connection).await?)
    }
}

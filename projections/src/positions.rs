//! Resets all stored positions of a log: the remedy for a log which was truncated, recreated or
//! replaced by an older copy.
//!
//! Rows do not name the log they were made from, so the reset discards all rows: the stream index
//! is fed again, and every read model is rebuilt from the beginning of the log.

use std::time::Duration;

use kafold_core::store::ReadError;
use kafold_migrations::{Database, SqliteDatabase};
use serde::Serialize;
use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteLockingMode};
use sqlx::{ConnectOptions, Connection, Executor};

use crate::audit::{self, Act};
use crate::control::{By, Control, ControlError};
use crate::index::read_error;
use crate::registry;
use crate::sql::either;
use crate::transaction::{OpenTransaction, Transaction};

/// The time within which another process may close a SQLite file before the file counts as in use.
const IN_USE_PATIENCE: Duration = Duration::from_secs(1);

/// The use of the table `kafold_event` in a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventTable {
    /// The stream index of a log on Kafka.
    Index,
    /// A log in a SQLite file, or nothing.
    Log,
}

/// The outcome of a reset of positions.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PositionsReset {
    /// Number of events removed from the stream index; `None` if the table is the log and was kept.
    pub index_events: Option<u64>,
    /// Number of removed checkpoints of projections, including rebuilds under way.
    pub checkpoints: u64,
    /// Number of removed snapshots of streams.
    pub snapshots: u64,
    /// Number of removed parked and skipped events: their positions are invalid, too.
    pub parked_events: u64,
    /// The projections to rebuild, each with the generation which replaces its rows.
    pub rebuilds: Vec<ResetProjection>,
    /// Projections without named tables: each needs a new name.
    pub not_rebuildable: Vec<String>,
}

/// A projection to rebuild.
#[derive(Debug, Clone, Serialize)]
pub struct ResetProjection {
    /// The projection's name.
    pub name: String,
    /// The generation to build.
    pub generation: u32,
    /// `true` for a paused projection, which builds nothing before it is resumed.
    pub paused: bool,
}

impl Control {
    /// Clears the stream index and all positions, checkpoints and snapshots, and marks every
    /// projection for a rebuild, in one transaction with the rows of `kafold_audit`. Rejects an
    /// empty reason.
    ///
    /// No process may use the log or the database meanwhile. A worker started afterwards shows
    /// empty rows first and then the rows applied from the beginning of the log; old rows are never
    /// shown as rows of this log. A log in `kafold_event` is never cleared: [`EventTable::Index`]
    /// is rejected for a SQLite file with events and without a position of an index.
    pub async fn reset_positions(
        &self,
        events: EventTable,
        by: By<'_>,
    ) -> Result<PositionsReset, ControlError> {
        let reason = by.reason_for("to reset positions")?;
        let now = self.clock.now();
        let mut open = OpenTransaction::begin(&self.database).await?;
        let tx = &mut open.lend();
        registry::lock(tx).await?;
        if let Transaction::Postgres(connection) = tx {
            // The index may be large; the operator waits for the statement.
            connection.execute("SET LOCAL statement_timeout = 0").await?;
            connection.execute("SET LOCAL kafold.index_rebuild = 'on'").await?;
        }
        let mut done = PositionsReset::default();
        if events == EventTable::Index {
            if holds_log(tx).await? {
                open.rollback().await?;
                return Err(ControlError::Refused(format!(
                    "{} has events and no place of a stream index beside them: it may be a log of its \
                     own, which is never cleared; name another database",
                    self.database.url()
                )));
            }
            done.index_events = Some(clear_index(tx).await?);
        }
        done.checkpoints = execute(tx, "DELETE FROM kafold_checkpoint").await?;
        done.snapshots = execute(tx, "DELETE FROM kafold_snapshot").await?;
        done.parked_events = execute(tx, "DELETE FROM kafold_parked_event").await?
            + execute(tx, "DELETE FROM kafold_skipped_event").await?;
        for found in registry::find_all(tx).await? {
            match registry::reset(tx, &found, now).await? {
                Some(generation) => done.rebuilds.push(ResetProjection {
                    name: found.name.clone(),
                    generation: generation.0,
                    paused: found.is_paused(),
                }),
                None => done.not_rebuildable.push(found.name.clone()),
            }
        }
        for ResetProjection { name, generation, .. } in &done.rebuilds {
            let act = Act { actor: by.actor, action: "rebuild" };
            let details = json!({ "generation": generation, "reason": reason });
            audit::add(tx, act, Some(name), details, now).await?;
        }
        let act = Act { actor: by.actor, action: "reset_positions" };
        let details = json!({
            "index_events": done.index_events, "checkpoints": done.checkpoints,
            "snapshots": done.snapshots, "parked_events": done.parked_events,
            "not_rebuildable": done.not_rebuildable, "reason": reason,
        });
        audit::add(tx, act, None, details, now).await?;
        open.commit().await?;
        Ok(done)
    }

    /// Returns `true` if another process, or another handle of this process, has the SQLite file
    /// open. Always returns `false` for PostgreSQL, which offers no such check.
    pub async fn is_in_use(&self) -> Result<bool, ReadError> {
        match &self.database {
            Database::Postgres(_) => Ok(false),
            Database::Sqlite(database) => file_in_use(database).await.map_err(read_error),
        }
    }
}

/// An exclusive connection is refused while any other connection is open.
async fn file_in_use(database: &SqliteDatabase) -> Result<bool, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(database.path())
        .locking_mode(SqliteLockingMode::Exclusive)
        .busy_timeout(IN_USE_PATIENCE);
    let asked = async {
        let mut connection = options.connect().await?;
        connection.execute("BEGIN IMMEDIATE; ROLLBACK").await?;
        connection.close().await
    };
    match asked.await {
        Ok(()) => Ok(false),
        Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code == "5") => {
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Returns `true` if `kafold_event` may be a log: the table has events, and no index has a
/// position.
async fn holds_log(tx: &mut Transaction<'_>) -> Result<bool, sqlx::Error> {
    let Transaction::Sqlite(connection) = tx else { return Ok(false) };
    let sql = "SELECT EXISTS (SELECT 1 FROM kafold_event) \
                 AND NOT EXISTS (SELECT 1 FROM kafold_partition)";
    sqlx::query_scalar(sql).fetch_one(&mut **connection).await
}

/// Returns the number of deleted events.
async fn clear_index(tx: &mut Transaction<'_>) -> Result<u64, sqlx::Error> {
    let is_sqlite = matches!(tx, Transaction::Sqlite(_));
    if is_sqlite {
        // PostgreSQL uses a setting of the transaction instead.
        execute(tx, "INSERT INTO kafold_unlocked VALUES (1)").await?;
    }
    let events = execute(tx, "DELETE FROM kafold_event").await?;
    execute(tx, "DELETE FROM kafold_partition").await?;
    execute(tx, "DELETE FROM kafold_partition_digest").await?;
    if is_sqlite {
        execute(tx, "DELETE FROM kafold_stream").await?;
        execute(tx, "DELETE FROM kafold_unlocked").await?;
    }
    Ok(events)
}

/// Runs a statement. Returns the number of affected rows.
async fn execute(tx: &mut Transaction<'_>, sql: &'static str) -> Result<u64, sqlx::Error> {
    either!(tx, connection => {
        Ok(sqlx::query(sql).execute(&mut **connection).await?.rows_affected())
    })
}

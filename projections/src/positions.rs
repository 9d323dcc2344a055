//! Resetting everything that stores positions of a log: the remedy when a log is not the one any more
//! that it was (truncated, recreated, an older copy).
//!
//! Rows do not tell which log they were made from, so everything is made again: the stream index is fed and every read model is built from the beginning of the log.

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

/// The time within which another process may close a SQLite file before it counts as in use.
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
    /// Events that were removed from the stream index; `None` where it is the log itself, and kept.
    pub index_events: Option<u64>,
    /// Checkpoints of projections that were removed, those of rebuilds under way included.
    pub checkpoints: u64,
    /// Snapshots of streams that were removed.
    pub snapshots: u64,
    /// Parked and skipped events that were removed: their positions are gone, too.
    pub parked_events: u64,
    /// The projections that are built anew, with the generation that takes the place of their rows.
    pub rebuilds: Vec<ResetProjection>,
    /// Projections that name no tables: each must be run under a new name.
    pub not_rebuildable: Vec<String>,
}

/// A projection that is built anew.
#[derive(Debug, Clone, Serialize)]
pub struct ResetProjection {
    /// Its name.
    pub name: String,
    /// The generation that is built.
    pub generation: u32,
    /// Whether it is paused, and builds nothing until it is resumed.
    pub paused: bool,
}

impl Control {
    /// Clears the stream index, all places, checkpoints and snapshots, and marks every projection to be
    /// built anew, in one transaction with its acts on record. Takes a reason.
    ///
    /// Nobody may use the log or the database meanwhile. A worker that starts afterwards shows empty rows
    /// first, and then what it has applied so far from the beginning of the log: rows of before are never
    /// shown as those of this log. A `kafold_event` that is a log is never touched: a SQLite file that has
    /// events and no place of an index beside them is refused as [`EventTable::Index`].
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
            // The index may be large; whoever asked waits for it.
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

    /// Whether another process, or another handle of this one, has the SQLite file open. Always `false` for
    /// PostgreSQL, of which this cannot be told.
    pub async fn is_in_use(&self) -> Result<bool, ReadError> {
        match &self.database {
            Database::Postgres(_) => Ok(false),
            Database::Sqlite(database) => file_in_use(database).await.map_err(read_error),
        }
    }
}

/// A connection that wants the file for itself is refused while any other one is open.
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

/// Whether `kafold_event` may be a log: it has events, and no index keeps a place beside them.
async fn holds_log(tx: &mut Transaction<'_>) -> Result<bool, sqlx::Error> {
    let Transaction::Sqlite(connection) = tx else { return Ok(false) };
    let sql = "SELECT EXISTS (SELECT 1 FROM kafold_event) \
                 AND NOT EXISTS (SELECT 1 FROM kafold_partition)";
    sqlx::query_scalar(sql).fetch_one(&mut **connection).await
}

/// Returns how many events it had.
async fn clear_index(tx: &mut Transaction<'_>) -> Result<u64, sqlx::Error> {
    let is_sqlite = matches!(tx, Transaction::Sqlite(_));
    if is_sqlite {
        // PostgreSQL has a setting of the transaction for it.
        execute(tx, "INSERT INTO kafold_unlocked VALUES (1)").await?;
    }
    let events = execute(tx, "DELETE FROM kafold_event").await?;
    execute(tx, "DELETE FROM kafold_stream").await?;
    execute(tx, "DELETE FROM kafold_partition").await?;
    if is_sqlite {
        execute(tx, "DELETE FROM kafold_unlocked").await?;
    }
    Ok(events)
}

/// Runs a statement and returns how many rows it touched.
async fn execute(tx: &mut Transaction<'_>, sql: &'static str) -> Result<u64, sqlx::Error> {
    either!(tx, connection => {
        Ok(sqlx::query(sql).execute(&mut **connection).await?.rows_affected())
    })
}

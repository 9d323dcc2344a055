//! [`SqlSnapshots`]: saved states of long streams, in the table `kafold_snapshot`.

use std::sync::Arc;

use async_trait::async_trait;
use kafold_core::clock::SystemClock;
use kafold_core::digest::Digest;
use kafold_core::store::ReadError;
use kafold_core::{Clock, CommandId, Position, Snapshot, SnapshotStore, StreamId, Version};
use kafold_migrations::{Database, micros};

use crate::index::read_error;

/// The newest snapshot of each stream in PostgreSQL or SQLite. Cheap to clone.
#[derive(Clone)]
pub struct SqlSnapshots {
    database: Database,
    clock: Arc<dyn Clock>,
}

impl SqlSnapshots {
    /// The snapshots in this database.
    pub fn new(database: Database) -> Self {
        Self { database, clock: Arc::new(SystemClock) }
    }
}

/// `version`, `schema`, `state`, `recent_commands`, `checksum`.
type SnapshotRow = (i64, String, Vec<u8>, String, i64);

/// Returns the checksum of a row. A snapshot changed since its save is ignored.
fn checksum(stream: &StreamId, version: i64, schema: &str, state: &[u8], commands: &str) -> i64 {
    let (stream, schema) = (stream.as_str().as_bytes(), schema.as_bytes());
    let parts = [stream, &version.to_le_bytes(), schema, state, commands.as_bytes()];
    Digest::of_parts(parts).0 as i64
}

#[async_trait]
impl SnapshotStore for SqlSnapshots {
    async fn load(&self, stream: &StreamId) -> Result<Option<Snapshot>, ReadError> {
        let sql = "SELECT version, schema, state, recent_commands, checksum FROM kafold_snapshot \
                   WHERE category = $1 AND stream_id = $2";
        let row: Result<Option<SnapshotRow>, _> = match &self.database {
            Database::Postgres(database) => {
                let query = sqlx::query_as(sql).bind(stream.category()).bind(stream.id());
                query.fetch_optional(database.pool()).await
            }
            Database::Sqlite(database) => {
                let query = sqlx::query_as(sql).bind(stream.category()).bind(stream.id());
                query.fetch_optional(database.readers()).await
            }
        };
        let Some((version, schema, state, commands, stored)) = row.map_err(read_error)? else {
            return Ok(None);
        };
        if checksum(stream, version, &schema, &state, &commands) != stored {
            tracing::warn!(%stream, "a snapshot in kafold_snapshot was changed and is ignored");
            return Ok(None);
        }
        let parsed = serde_json::from_str::<Vec<(CommandId, Version, Position)>>(&commands);
        // One that cannot be read is as good as none: the stream itself tells everything.
        let (Ok(recent_commands), Ok(version)) = (parsed, u64::try_from(version)) else {
            tracing::warn!(%stream, "a snapshot cannot be read and is ignored");
            return Ok(None);
        };
        let (stream, version) = (stream.clone(), Version(version));
        Ok(Some(Snapshot { stream, version, schema, state, recent_commands }))
    }

    async fn save(&self, snapshot: &Snapshot) -> Result<(), ReadError> {
        let sql = "INSERT INTO kafold_snapshot AS s \
                     (category, stream_id, version, schema, state, recent_commands, saved_at, \
                      checksum) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8) \
                   ON CONFLICT (category, stream_id) DO UPDATE \
                   SET version = excluded.version, schema = excluded.schema, \
                       state = excluded.state, recent_commands = excluded.recent_commands, \
                       saved_at = excluded.saved_at, checksum = excluded.checksum \
                   WHERE s.schema <> excluded.schema OR s.version < excluded.version";
        let Snapshot { stream, version, schema, state, recent_commands } = snapshot;
        let version = i64::try_from(version.0).unwrap_or(i64::MAX);
        let commands = serde_json::to_string(recent_commands);
        let commands = commands.map_err(|error| ReadError::diverged("recent commands", error))?;
        let checksum = checksum(stream, version, schema, state, &commands);
        let now = self.clock.now();
        let saved = match &self.database {
            Database::Postgres(database) => {
                let query = sqlx::query(sql).bind(stream.category()).bind(stream.id());
                let query = query.bind(version).bind(schema).bind(state).bind(commands).bind(now);
                let query = query.bind(checksum);
                query.execute(database.pool()).await.map(drop)
            }
            Database::Sqlite(database) => {
                let query = sqlx::query(sql).bind(stream.category()).bind(stream.id());
                let query = query.bind(version).bind(schema).bind(state).bind(commands);
                let query = query.bind(micros::to_micros(now)).bind(checksum);
                match database.write().await {
                    Ok(mut tx) => match query.execute(&mut *tx).await {
                        Ok(_) => tx.commit().await,
                        Err(error) => Err(error),
                    },
                    Err(error) => Err(error),
                }
            }
        };
        saved.map_err(read_error)
    }
}

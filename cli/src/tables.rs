//! What the toolkit's tables say of index and projections. Only read here.

use chrono::{DateTime, Utc};
use kafold::Database;
use kafold::projections::sqlx::{self, FromRow};
use kafold::{Offset, Partition};
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;

/// One statement in the words of both databases.
#[derive(Clone, Copy)]
struct Sql {
    postgres: &'static str,
    sqlite: &'static str,
}

impl Sql {
    const fn both(sql: &'static str) -> Self {
        Self { postgres: sql, sqlite: sql }
    }

    async fn rows<T>(self, database: &Database) -> Result<Vec<T>, sqlx::Error>
    where
        T: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin,
    {
        match database {
            Database::Postgres(database) => {
                sqlx::query_as(self.postgres).fetch_all(database.pool()).await
            }
            Database::Sqlite(database) => {
                sqlx::query_as(self.sqlite).fetch_all(database.readers()).await
            }
        }
    }
}

/// The migrations that were applied: number and name, in order.
pub(crate) async fn migrations(database: &Database) -> Result<Vec<(i64, String)>, sqlx::Error> {
    let sql = "SELECT version, description FROM kafold_migrations WHERE success ORDER BY version";
    Sql::both(sql).rows(database).await
}

/// A projection and how it fares.
#[derive(Debug, Clone)]
pub(crate) struct Projection {
    pub(crate) name: String,
    /// The generation that queries see.
    pub(crate) generation: i32,
    /// The one that is being built beside it.
    pub(crate) next_generation: Option<i32>,
    /// `running` or `paused`: what an operator wants.
    pub(crate) desired_state: String,
    /// `running`, `paused`, `rebuilding` or `stopped`.
    pub(crate) state: String,
    pub(crate) reason: Option<String>,
}

/// All projections, by name.
pub(crate) async fn projections(database: &Database) -> Result<Vec<Projection>, sqlx::Error> {
    type Row = (String, i32, Option<i32>, String, String, Option<String>);
    let sql = "SELECT name, live_generation, next_generation, desired_state, actual_state, \
                 actual_state_reason FROM kafold_projection ORDER BY name";
    let rows: Vec<Row> = Sql::both(sql).rows(database).await?;
    let projection = |(name, generation, next_generation, desired_state, state, reason)| {
        Projection { name, generation, next_generation, desired_state, state, reason }
    };
    Ok(rows.into_iter().map(projection).collect())
}

/// Where a projection stands in a partition.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    pub(crate) projection: String,
    pub(crate) partition: Partition,
    /// Everything below it is applied.
    pub(crate) next: Offset,
    /// The end of the partition as its worker last saw it.
    pub(crate) end: Option<Offset>,
    /// When the last applied event was recorded.
    pub(crate) last_event_at: Option<DateTime<Utc>>,
}

/// The checkpoints of the live generations.
pub(crate) async fn checkpoints(database: &Database) -> Result<Vec<Checkpoint>, sqlx::Error> {
    type Row = (String, i32, i64, Option<i64>, Option<i64>);
    macro_rules! select {
        ($micros:literal) => {
            concat!(
                "SELECT c.projection, c.partition, c.next_offset, c.end_offset, ",
                $micros,
                " FROM kafold_checkpoint c JOIN kafold_projection p \
                 ON p.name = c.projection AND p.live_generation = c.generation \
                 ORDER BY c.projection, c.partition"
            )
        };
    }
    let sql = Sql {
        postgres: select!("(extract(epoch FROM c.last_event_at) * 1000000)::int8"),
        sqlite: select!("c.last_event_at"),
    };
    let rows: Vec<Row> = sql.rows(database).await?;
    let checkpoint = |(projection, partition, next, end, last_event_at): Row| Checkpoint {
        projection,
        partition: Partition(partition.unsigned_abs()),
        next: Offset(next.unsigned_abs()),
        end: end.map(|end| Offset(end.unsigned_abs())),
        last_event_at: last_event_at.and_then(DateTime::from_timestamp_micros),
    };
    Ok(rows.into_iter().map(checkpoint).collect())
}

/// How many events are parked of how many streams, a projection.
pub(crate) async fn parked(database: &Database) -> Result<Vec<(String, i64, i64)>, sqlx::Error> {
    let sql = "SELECT k.projection, count(*), \
                 count(DISTINCT k.category || '-' || k.stream_id) \
               FROM kafold_parked_event k JOIN kafold_projection p \
               ON p.name = k.projection AND p.live_generation = k.generation \
               GROUP BY k.projection ORDER BY k.projection";
    Sql::both(sql).rows(database).await
}

/// What a PostgreSQL server says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) version: String,
    pub(crate) now: DateTime<Utc>,
    pub(crate) connections: i64,
    pub(crate) connections_max: i64,
    /// As set for the role or the database.
    pub(crate) synchronous_commit: String,
}

/// `None` for SQLite, which is no server.
pub(crate) async fn server(database: &Database) -> Result<Option<Server>, sqlx::Error> {
    let Database::Postgres(database) = database else { return Ok(None) };
    type Row = (String, DateTime<Utc>, i64, i64, String);
    let sql = "SELECT current_setting('server_version'), clock_timestamp(), \
                 (SELECT sum(numbackends)::int8 FROM pg_stat_database), \
                 current_setting('max_connections')::int8 \
                   - current_setting('superuser_reserved_connections')::int8, \
                 current_setting('synchronous_commit')";
    let (version, now, connections, connections_max, synchronous_commit): Row =
        sqlx::query_as(sql).fetch_one(database.pool()).await?;
    Ok(Some(Server { version, now, connections, connections_max, synchronous_commit }))
}

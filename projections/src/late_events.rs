//! The late events of a windowed model, for operators: which they are, and the grace that would take them in.

use chrono::{DateTime, Utc};
use kafold_core::StreamId;
use kafold_core::store::ReadError;
use kafold_migrations::{Database, SqlText};
use serde::{Serialize, Serializer};
use sqlx::SqlStr;

use crate::clock_step::EventCounts;
use crate::control::Control;
use crate::index::read_error;
use crate::sql::reading;

/// Most hours in a summary, the newest ones.
const HOURS_MAX: u64 = 168;
/// Most streams in a summary, those with the most late events.
const STREAMS_MAX: u64 = 20;

/// An event that was late for a window of the live generation, or one from the future.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct LateEvent {
    /// The stream of the event.
    pub stream: String,
    /// Its version in the stream.
    pub version: i64,
    /// Its place in the log, such as `3:1042`.
    pub position: String,
    /// `late`, or `future` for an event that is stamped too far after its own recording.
    pub kind: String,
    /// The time of the event, RFC 3339 in UTC.
    pub at: String,
    /// The clock of its partition before the event; `None` while the partition had none.
    pub clock: Option<String>,
    /// Number of windows for which the event was late.
    pub windows: i64,
    /// The least grace, in seconds, with which the event is in time for a window, if it was late for all.
    #[sqlx(rename = "grace_us")]
    #[serde(serialize_with = "seconds")]
    pub grace_s: Option<i64>,
}

fn seconds<S: Serializer>(micros: &Option<i64>, serializer: S) -> Result<S::Ok, S::Error> {
    micros.map(|micros| micros as f64 / 1e6).serialize(serializer)
}

/// The late events of a windowed model, added up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LateSummary {
    /// Events that were late for all of their windows.
    pub late: i64,
    /// Windows for which events were late, over all events.
    pub late_windows: i64,
    /// Events stamped too far after their own recording.
    pub future: i64,
    /// The grace that would have taken in 50, 90, 99 and 100 % of the late events.
    pub grace_s: GraceSeconds,
    /// Listed events by the hour of their time, the newest 168 hours.
    pub by_hour: Vec<LateGroup>,
    /// Listed events by stream, the 20 with the most.
    pub by_stream: Vec<LateGroup>,
    /// Events that have no row in the list, because a partition has more than 100,000. They are in the first three numbers
    /// only.
    pub unlisted: i64,
}

/// Whole seconds, rounded up; `None` without late events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GraceSeconds {
    /// Takes in half of the late events.
    pub p50: Option<i64>,
    /// Takes in nine of ten.
    pub p90: Option<i64>,
    /// Takes in 99 of 100.
    pub p99: Option<i64>,
    /// Takes in all of them.
    pub p100: Option<i64>,
}

/// The listed events of an hour or a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct LateGroup {
    /// The stream, or the begin of the hour, RFC 3339 in UTC.
    pub name: String,
    /// Events that were late for at least one window.
    pub late: i64,
    /// Events from the future.
    pub future: i64,
}

/// The listed events of the live generation of the model `$1`.
const LISTED: &str = " FROM kafold_late_event l JOIN kafold_projection p \
                        ON p.name = l.projection AND p.live_generation = l.generation \
                      WHERE p.name = $1";
/// A column of a late event as text, RFC 3339 in UTC with microseconds. SQLite has such a text in the column.
const POSTGRES_TIME: (&str, &str) =
    ("to_char(l.", " AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
const SQLITE_TIME: (&str, &str) = ("l.", "");
const KINDS: &str = "CAST(SUM(CASE WHEN l.kind = 'late' THEN 1 ELSE 0 END) AS BIGINT) AS late, \
                     CAST(SUM(CASE WHEN l.kind = 'future' THEN 1 ELSE 0 END) AS BIGINT) AS future";

impl Control {
    /// Returns the listed late events of a windowed model in the order of the log, at most `limit`: of one stream or of all, and
    /// with a time of the event from `since` on.
    pub async fn late_events(
        &self,
        name: &str,
        stream: Option<&StreamId>,
        since: Option<DateTime<Utc>>,
        limit: u32,
    ) -> Result<Vec<LateEvent>, ReadError> {
        let (before, after) = self.time();
        let mut sql = SqlText::new(
            "SELECT l.category || '-' || l.stream_id AS stream, l.version, \
               CAST(l.partition AS TEXT) || ':' || CAST(l.\"offset\" AS TEXT) AS position, l.kind, ",
        );
        sql.text(before).text("at").text(after).text(" AS at, ");
        sql.text(before).text("clock").text(after).text(" AS clock, l.windows, l.grace_us");
        sql.text(LISTED).text(" AND l.category = COALESCE($2, l.category)");
        sql.text(" AND l.stream_id = COALESCE($3, l.stream_id) AND ");
        sql.text(before).text("at").text(after).text(" >= COALESCE($4, '')");
        sql.text(" ORDER BY l.partition, l.\"offset\" LIMIT $5");
        let (sql, since) = (sql.finish(), since.map(text));
        reading!(&self.database, pool => {
            let query = sqlx::query_as(sql).bind(name);
            let query = query.bind(stream.map(StreamId::category)).bind(stream.map(StreamId::id));
            query.bind(since).bind(i64::from(limit)).fetch_all(pool).await
        })
        .map_err(read_error)
    }

    /// Returns the late events of a windowed model, added up.
    pub async fn late_summary(&self, name: &str) -> Result<LateSummary, ReadError> {
        self.summary(name).await.map_err(read_error)
    }

    async fn summary(&self, name: &str) -> Result<LateSummary, sqlx::Error> {
        let counts = EventCounts::of(&self.database, name).await?;
        let listed = self.number(name, "SELECT COUNT(*)", "").await?.unwrap_or_default();
        let graced = self.number(name, "SELECT COUNT(*)", " AND l.grace_us IS NOT NULL").await?;
        let grace_s = match graced.unwrap_or_default() {
            0 => GraceSeconds::default(),
            graced => GraceSeconds {
                p50: self.grace(name, graced, 50).await?,
                p90: self.grace(name, graced, 90).await?,
                p99: self.grace(name, graced, 99).await?,
                p100: self.grace(name, graced, 100).await?,
            },
        };
        let (before, after) = self.time();
        let mut hour = SqlText::new("SELECT SUBSTR(");
        hour.text(before).text("at").text(after).text(", 1, 13) || ':00:00Z' AS name, ");
        hour.text(KINDS).text(LISTED).text(" GROUP BY 1 ORDER BY 1 DESC LIMIT ").number(HOURS_MAX);
        let mut stream = SqlText::new("SELECT l.category || '-' || l.stream_id AS name, ");
        stream.text(KINDS).text(LISTED).text(" GROUP BY 1 ORDER BY COUNT(*) DESC, 1 LIMIT ");
        stream.number(STREAMS_MAX);
        Ok(LateSummary {
            late: counts.late,
            late_windows: counts.late_windows,
            future: counts.future,
            grace_s,
            by_hour: self.groups(name, hour.finish()).await?,
            by_stream: self.groups(name, stream.finish()).await?,
            unlisted: counts.late_rows - listed,
        })
    }

    /// Returns the least number of whole seconds that takes in so many per cent of the late events.
    async fn grace(
        &self,
        name: &str,
        events: i64,
        percent: i64,
    ) -> Result<Option<i64>, sqlx::Error> {
        let nth = (events * percent + 99) / 100 - 1;
        let mut sql = SqlText::new("SELECT l.grace_us");
        sql.text(LISTED).text(" AND l.grace_us IS NOT NULL ORDER BY l.grace_us LIMIT 1 OFFSET ");
        let sql = sql.number(nth.unsigned_abs()).finish();
        let micros: Option<i64> = reading!(&self.database, pool => {
            sqlx::query_scalar(sql).bind(name).fetch_optional(pool).await?
        });
        Ok(micros.map(|micros| (micros + 999_999) / 1_000_000))
    }

    async fn number(
        &self,
        name: &str,
        select: &'static str,
        condition: &'static str,
    ) -> Result<Option<i64>, sqlx::Error> {
        let sql = SqlText::new(select).text(LISTED).text(condition).finish();
        Ok(reading!(&self.database, pool => {
            sqlx::query_scalar(sql).bind(name).fetch_optional(pool).await?
        }))
    }

    async fn groups(&self, name: &str, sql: SqlStr) -> Result<Vec<LateGroup>, sqlx::Error> {
        Ok(reading!(&self.database, pool => {
            sqlx::query_as(sql).bind(name).fetch_all(pool).await?
        }))
    }

    fn time(&self) -> (&'static str, &'static str) {
        match self.database {
            Database::Postgres(_) => POSTGRES_TIME,
            Database::Sqlite(_) => SQLITE_TIME,
        }
    }
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)
}

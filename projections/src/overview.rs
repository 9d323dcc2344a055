//! How projections stand, as the tables say, for operators and their programs.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use kafold_core::store::ReadError;
use kafold_core::{Offset, Partition, StreamId};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;
use serde::Serialize;

use crate::control::Control;
use crate::index::read_error;
use crate::registry::State;
use crate::sql::{reading, with_clock};

/// What a projection does, from the outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OverviewState {
    /// It applies events as they come, where a worker runs.
    Running,
    /// An operator has paused it.
    Paused,
    /// Its next generation is wanted: from the request to the switch.
    Rebuilding,
    /// It cannot go on until somebody acts.
    Stopped,
}

/// How a projection stands.
#[derive(Debug, Clone, Serialize)]
pub struct Overview {
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: OverviewState,
    /// Why it has stopped, one sentence.
    pub reason: Option<String>,
    /// Seconds since the last report of a worker. `None` for a projection that has stopped, and for one that a worker
    /// runs.
    pub unattended_seconds: Option<i64>,
    /// Whether an operator has paused it, its rebuild included.
    pub paused: bool,
    /// Whether a worker has done so: what was asked for a moment ago is done within a second.
    pub obeyed: bool,
    /// The build of its tables that queries see.
    pub generation: u32,
    /// Records of the log that are not applied, as far as the end is known.
    pub lag_records: u64,
    /// How old the last applied event is, where there are more to come.
    pub lag_seconds: f64,
    /// Streams that are set aside, and their events.
    pub parked_streams: i64,
    /// Events that are set aside.
    pub parked_events: i64,
    /// The rebuild under way.
    pub rebuild: Option<Rebuild>,
    /// Where it stands, by partition.
    pub partitions: Vec<PartitionOverview>,
}

/// How far a rebuild is.
#[derive(Debug, Clone, Serialize)]
pub struct Rebuild {
    /// The generation that is being built.
    pub generation: u32,
    /// When it was asked for.
    pub requested_at: DateTime<Utc>,
    /// Whether a worker has begun.
    pub begun: bool,
    /// Why it waits or has stopped, one sentence.
    pub reason: Option<String>,
    /// Records that are applied.
    pub records_done: u64,
    /// Records that are left, as far as the end is known.
    pub records_left: u64,
    /// Records a second since it was asked for.
    pub records_per_second: f64,
    /// Seconds that the rest takes at that rate, when there is one.
    pub seconds_left: Option<f64>,
    /// Streams of it that are set aside.
    pub parked_streams: i64,
    /// Where it stands, by partition.
    pub partitions: Vec<PartitionOverview>,
}

/// Where a generation stands in one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PartitionOverview {
    /// The partition.
    pub partition: u32,
    /// Everything below is applied.
    pub next: u64,
    /// The end of the partition as last seen.
    pub end: u64,
    /// When the last applied event was recorded.
    pub last_event_at: Option<DateTime<Utc>>,
    /// When the worker last wrote it down; `None` when none has taken the partition yet.
    pub updated_at: Option<DateTime<Utc>>,
}

/// A stream that is set aside.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct ParkedStream {
    /// By which projection.
    pub projection: String,
    /// In which of its generations.
    #[sqlx(try_from = "i32")]
    pub generation: u32,
    /// The stream.
    pub stream: String,
    /// The version of the first event that is set aside.
    pub version: i64,
    /// Where it is in the log.
    pub position: String,
    /// How many events are set aside.
    pub events: i64,
    /// What happened at the event at fault.
    pub error: Option<String>,
    /// How often it was tried.
    pub attempts: i32,
    /// Whether it is to be tried again, which a worker has not done yet.
    pub retry: bool,
    /// Since when.
    #[sqlx(try_from = "Time")]
    pub parked_at: DateTime<Utc>,
}

/// An event that is set aside.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct ParkedEventOverview {
    /// By which projection.
    pub projection: String,
    /// In which of its generations.
    #[sqlx(try_from = "i32")]
    pub generation: u32,
    /// The event's version in its stream.
    pub version: i64,
    /// Where it is in the log.
    pub position: String,
    /// Its type.
    pub event_type: String,
    /// When it was recorded.
    #[sqlx(try_from = "Time")]
    pub recorded_at: DateTime<Utc>,
    /// What happened to it; `None` when it is only behind one that failed.
    pub error: Option<String>,
    /// How often it was tried.
    pub attempts: i32,
    /// What it says.
    #[sqlx(try_from = "Vec<u8>")]
    pub payload: Payload,
}

/// A payload: JSON as it is, anything else as text.
#[derive(Debug, Clone, Serialize)]
pub struct Payload(pub serde_json::Value);

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        let text = || String::from_utf8_lossy(&bytes).into_owned().into();
        Self(serde_json::from_slice(&bytes).unwrap_or_else(|_| text()))
    }
}

/// An act that is on record.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct AuditEntry {
    /// The row's number.
    pub id: i64,
    /// When.
    #[sqlx(try_from = "Time")]
    pub at: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// What.
    pub action: String,
    /// To which projection.
    pub projection: Option<String>,
    /// More about it as JSON, why above all.
    pub details: Option<String>,
}

#[derive(sqlx::FromRow)]
struct ProjectionRow {
    name: String,
    live_generation: i32,
    next_generation: Option<i32>,
    next_fingerprint: Option<String>,
    next_requested_at: Option<Time>,
    next_reason: Option<String>,
    desired_state: String,
    actual_state: String,
    actual_state_reason: Option<String>,
    unseen_seconds: Option<i64>,
}

/// A projection that no worker has reported for longer stands still. A worker reports four times a
/// minute.
pub(crate) const UNSEEN_SECONDS_MAX: i64 = 45;

#[derive(sqlx::FromRow)]
struct PlaceRow {
    projection: String,
    generation: i32,
    partition: i32,
    next_offset: i64,
    end_offset: Option<i64>,
    last_event_at: Option<Time>,
    updated_at: Time,
}

/// By projection and generation.
type By<T> = BTreeMap<(String, i32), T>;

impl Control {
    /// Every projection, by name. `ends` are the ends of the log's partitions, if they were asked for:
    /// what the tables say of them is as old as the last thing a worker applied.
    pub async fn list(&self, ends: &[(Partition, Offset)]) -> Result<Vec<Overview>, ReadError> {
        self.overviews(ends).await.map_err(read_error)
    }

    async fn overviews(&self, ends: &[(Partition, Offset)]) -> Result<Vec<Overview>, sqlx::Error> {
        let sql = with_clock(
            matches!(self.database, Database::Postgres(_)),
            "SELECT name, live_generation, next_generation, next_fingerprint, next_requested_at, \
               next_reason, desired_state, actual_state, actual_state_reason, ",
            " - seen_at AS unseen_seconds FROM kafold_projection ORDER BY name",
        );
        let rows: Vec<ProjectionRow> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        let sql = "SELECT projection, generation, partition, next_offset, end_offset, \
                     last_event_at, updated_at FROM kafold_checkpoint ORDER BY partition";
        let found: Vec<PlaceRow> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        let mut places: By<Vec<PartitionOverview>> = By::new();
        for row in found {
            let key = (row.projection.clone(), row.generation);
            places.entry(key).or_default().push(PartitionOverview::of(&row, ends));
        }
        let sql = "SELECT projection, generation, COUNT(*), \
                     COUNT(DISTINCT category || '-' || stream_id) \
                   FROM kafold_parked_event GROUP BY projection, generation";
        let counted: Vec<(String, i32, i64, i64)> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        let parked: By<(i64, i64)> = counted
            .into_iter()
            .map(|(name, generation, events, streams)| ((name, generation), (streams, events)))
            .collect();
        // Partitions that no worker has taken yet.
        for row in &rows {
            let taken = places.entry((row.name.clone(), row.live_generation)).or_default();
            for (partition, end) in ends {
                if taken.iter().all(|place| place.partition != partition.0) {
                    taken.push(PartitionOverview::untaken(*partition, *end));
                }
            }
        }
        let now = self.clock.now();
        Ok(rows.into_iter().map(|row| Overview::of(row, &mut places, &parked, now)).collect())
    }

    /// Streams that are set aside, of one projection or of all, at most `limit`.
    pub async fn parked(
        &self,
        name: Option<&str>,
        limit: u32,
    ) -> Result<Vec<ParkedStream>, ReadError> {
        let sql = "SELECT projection, generation, category || '-' || stream_id AS stream, \
                     MIN(version) AS version, \
                     CAST(partition AS TEXT) || ':' || CAST(MIN(\"offset\") AS TEXT) AS position, \
                     COUNT(*) AS events, MAX(error) AS error, MAX(attempts) AS attempts, \
                     MAX(CASE WHEN retry THEN 1 ELSE 0 END) = 1 AS retry, \
                     MIN(parked_at) AS parked_at \
                   FROM kafold_parked_event WHERE projection = COALESCE($1, projection) \
                   GROUP BY projection, generation, partition, category, stream_id \
                   ORDER BY projection, generation, MIN(parked_at), category, stream_id LIMIT $2";
        reading!(&self.database, pool => {
            sqlx::query_as(sql).bind(name).bind(i64::from(limit)).fetch_all(pool).await
        })
        .map_err(read_error)
    }

    /// The first events of a stream that are set aside, at most `limit` in each projection.
    pub async fn parked_events(
        &self,
        name: Option<&str>,
        stream: &StreamId,
        limit: u32,
    ) -> Result<Vec<ParkedEventOverview>, ReadError> {
        let sql = "SELECT projection, generation, version, \
                     CAST(partition AS TEXT) || ':' || CAST(\"offset\" AS TEXT) AS position, \
                     event_type, recorded_at, error, attempts, payload \
                   FROM kafold_parked_event WHERE projection = COALESCE($1, projection) \
                     AND category = $2 AND stream_id = $3 \
                   ORDER BY projection, generation, version LIMIT $4";
        reading!(&self.database, pool => {
            let query = sqlx::query_as(sql).bind(name).bind(stream.category()).bind(stream.id());
            query.bind(i64::from(limit)).fetch_all(pool).await
        })
        .map_err(read_error)
    }

    /// The newest acts on record, newest first.
    pub async fn audit(
        &self,
        name: Option<&str>,
        limit: u32,
    ) -> Result<Vec<AuditEntry>, ReadError> {
        let sql = "SELECT id, at, actor, action, projection, details FROM kafold_audit \
                   WHERE $1 IS NULL OR projection = $1 ORDER BY id DESC LIMIT $2";
        reading!(&self.database, pool => {
            sqlx::query_as(sql).bind(name).bind(i64::from(limit)).fetch_all(pool).await
        })
        .map_err(read_error)
    }
}

impl Overview {
    /// Returns the remedy for a projection of this name which no worker runs.
    pub fn unattended_remedy(name: &str) -> String {
        format!(
            "start a program that has this projection, or see why its worker cannot write to the database; if no \
             program has the projection any more, run `kafold projections remove {name} --reason TEXT`"
        )
    }

    fn of(
        row: ProjectionRow,
        places: &mut By<Vec<PartitionOverview>>,
        parked: &By<(i64, i64)>,
        now: DateTime<Utc>,
    ) -> Self {
        let live = (row.name.clone(), row.live_generation);
        let partitions = places.remove(&live).unwrap_or_default();
        let (parked_streams, parked_events) = parked.get(&live).copied().unwrap_or_default();
        let lag = partitions.iter().map(|place| place.lag_seconds(now)).fold(0.0, f64::max);
        let paused = row.desired_state == State::Paused.text();
        let has_stopped = row.actual_state == State::Stopped.text();
        let unattended_seconds =
            row.unseen_seconds.filter(|seconds| *seconds > UNSEEN_SECONDS_MAX && !has_stopped);
        let unattended = unattended_seconds.map(|seconds| {
            format!("no worker has run it for {seconds} s: {}", Self::unattended_remedy(&row.name))
        });
        Self {
            state: match () {
                () if row.next_generation.is_some() => OverviewState::Rebuilding,
                () if has_stopped => OverviewState::Stopped,
                () if paused => OverviewState::Paused,
                () if unattended.is_some() => OverviewState::Stopped,
                () => OverviewState::Running,
            },
            reason: row.actual_state_reason.clone().or(unattended),
            unattended_seconds,
            paused,
            obeyed: row.desired_state == row.actual_state,
            generation: row.live_generation.unsigned_abs(),
            lag_records: partitions.iter().map(PartitionOverview::lag_records).sum(),
            lag_seconds: lag,
            parked_streams,
            parked_events,
            rebuild: Rebuild::of(&row, places, parked, now),
            partitions,
            name: row.name,
        }
    }
}

impl Rebuild {
    /// How much of the log is applied, of 100.
    pub fn percent(&self) -> f64 {
        let all = self.records_done + self.records_left;
        if all == 0 { 0.0 } else { 100.0 * self.records_done as f64 / all as f64 }
    }

    fn of(
        row: &ProjectionRow,
        places: &mut By<Vec<PartitionOverview>>,
        parked: &By<(i64, i64)>,
        now: DateTime<Utc>,
    ) -> Option<Self> {
        let generation = row.next_generation?;
        let key = (row.name.clone(), generation);
        let partitions = places.remove(&key).unwrap_or_default();
        let records_done: u64 = partitions.iter().map(|place| place.next).sum();
        let records_left: u64 = partitions.iter().map(PartitionOverview::lag_records).sum();
        let requested_at = row.next_requested_at.map_or(now, |at| at.0);
        let seconds = (now - requested_at).as_seconds_f64().max(0.001);
        let records_per_second = records_done as f64 / seconds;
        Some(Self {
            generation: generation.unsigned_abs(),
            requested_at,
            begun: row.next_fingerprint.is_some(),
            reason: row.next_reason.clone(),
            records_done,
            records_left,
            records_per_second,
            seconds_left: (records_done > 0).then(|| records_left as f64 / records_per_second),
            parked_streams: parked.get(&key).map_or(0, |(streams, _)| *streams),
            partitions,
        })
    }
}

impl PartitionOverview {
    fn of(row: &PlaceRow, ends: &[(Partition, Offset)]) -> Self {
        let partition = row.partition.unsigned_abs();
        let next = row.next_offset.unsigned_abs();
        let asked = ends.iter().find(|(p, _)| p.0 == partition).map(|(_, end)| end.0);
        let end = asked.or(row.end_offset.map(i64::unsigned_abs)).unwrap_or(next).max(next);
        let last_event_at = row.last_event_at.map(|at| at.0);
        Self { partition, next, end, last_event_at, updated_at: Some(row.updated_at.0) }
    }

    fn untaken(partition: Partition, end: Offset) -> Self {
        let (partition, end) = (partition.0, end.0);
        Self { partition, next: 0, end, last_event_at: None, updated_at: None }
    }

    /// Records that are not applied.
    pub fn lag_records(&self) -> u64 {
        self.end - self.next
    }

    /// How old the last applied event is while there are more to come.
    pub fn lag_seconds(&self, now: DateTime<Utc>) -> f64 {
        let behind = self.last_event_at.filter(|_| self.lag_records() > 0);
        behind.map_or(0.0, |at| (now - at).as_seconds_f64().max(0.0))
    }
}

//! The event time of windowed models, for operators: how far it is, and requests to move it forward.

use chrono::{DateTime, Utc};
use kafold_core::store::ReadError;
use kafold_core::window::{EventClock, Timestamp, Window};
use kafold_migrations::micros::Time;
use serde::Serialize;
use serde_json::json;

use crate::audit::{self, Act};
use crate::clock_step::EventCounts;
use crate::control::{By, Control, ControlError, list};
use crate::index::read_error;
use crate::sql::{either, reading};
use crate::transaction::OpenTransaction;

/// The event time of a windowed model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelClock {
    /// The name of the model.
    pub name: String,
    /// The name of its time in clock events.
    pub timeline: String,
    /// The windows in words.
    pub windows: String,
    /// The least clock of all partitions; `None` while a partition has none.
    pub clock: Option<DateTime<Utc>>,
    /// The greatest clock of a partition.
    pub newest_clock: Option<DateTime<Utc>>,
    /// The moment up to which windows are closed.
    pub closed_through: Option<DateTime<Utc>>,
    /// Partitions that have had no event of the model and no clock event: they hold all windows open.
    pub without_clock: i64,
    /// The time to which an operator wants the clock moved, if it is not there yet.
    pub advance_to: Option<DateTime<Utc>>,
    /// The numbers of events.
    pub counts: EventCounts,
}

#[derive(sqlx::FromRow)]
struct ClockRow {
    name: String,
    live_timeline: Option<String>,
    live_window: String,
    partitions: Option<i32>,
    advance_to: Option<Time>,
    with_clock: i64,
    least: Option<Time>,
    greatest: Option<Time>,
}

impl Control {
    /// Returns the event time of each windowed model, by name.
    pub async fn clocks(&self) -> Result<Vec<ModelClock>, ReadError> {
        self.model_clocks().await.map_err(read_error)
    }

    async fn model_clocks(&self) -> Result<Vec<ModelClock>, sqlx::Error> {
        let sql = "SELECT p.name, p.live_timeline, p.live_window, p.partitions, p.advance_to, \
                     COUNT(c.clock) AS with_clock, MIN(c.clock) AS least, MAX(c.clock) AS greatest \
                   FROM kafold_projection p LEFT JOIN kafold_checkpoint c \
                     ON c.projection = p.name AND c.generation = p.live_generation \
                   WHERE p.live_window IS NOT NULL \
                   GROUP BY p.name, p.live_timeline, p.live_window, p.partitions, p.advance_to \
                   ORDER BY p.name";
        let rows: Vec<ClockRow> =
            reading!(&self.database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        let mut clocks = Vec::with_capacity(rows.len());
        for row in rows {
            let window: Window = serde_json::from_str(&row.live_window)
                .map_err(|error| sqlx::Error::Decode(error.into()))?;
            let without_clock = i64::from(row.partitions.unwrap_or(1)) - row.with_clock;
            let least = row.least.map(Timestamp::from).filter(|_| without_clock <= 0);
            let advance_to = row.advance_to.map(Timestamp::from);
            clocks.push(ModelClock {
                counts: EventCounts::of(&self.database, &row.name).await?,
                timeline: row.live_timeline.unwrap_or_else(|| row.name.clone()),
                name: row.name,
                windows: window.to_string(),
                clock: least,
                newest_clock: row.greatest.map(Timestamp::from),
                closed_through: window.closed_through(EventClock::at(least)),
                without_clock,
                advance_to: advance_to.filter(|to| least.is_none_or(|least| least < *to)),
            });
        }
        Ok(clocks)
    }

    /// Asks for the clock of a timeline to be moved forward in all partitions: no event of the timeline before this time is
    /// to come. A process of the service that takes commands appends the clock events within a second or two. Returns the
    /// names of the models with this timeline.
    pub async fn advance_clock(
        &self,
        timeline: &str,
        to: DateTime<Utc>,
        by: By<'_>,
    ) -> Result<Vec<String>, ControlError> {
        let now = self.clock.now();
        if to > now {
            return Err(ControlError::Refused(format!(
                "{to} is after the present: a clock is moved to a time that has passed"
            )));
        }
        let mut open = OpenTransaction::begin(&self.database).await?;
        let sql = "UPDATE kafold_projection SET advance_to = $2 \
                   WHERE live_timeline = $1 RETURNING name";
        let models: Vec<String> = either!(&mut open.lend(), connection => {
            let query = sqlx::query_scalar(sql).bind(timeline).bind(Time(to));
            query.fetch_all(&mut **connection).await?
        });
        if models.is_empty() {
            open.rollback().await?;
            let mut known: Vec<_> =
                self.model_clocks().await?.into_iter().map(|model| model.timeline).collect();
            known.dedup();
            return Err(ControlError::Refused(format!(
                "no windowed model has the timeline {timeline:?}; timelines are: {}",
                list(&known)
            )));
        }
        let act = Act { actor: by.actor, action: "advance_clock" };
        let details = json!({ "timeline": timeline, "to": to, "reason": by.reason });
        audit::add(&mut open.lend(), act, None, details, now).await?;
        open.commit().await?;
        Ok(models)
    }
}

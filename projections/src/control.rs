//! [`Control`]: what operators ask of projections.
//!
//! Every act is one transaction, checked against how things stand and entered in `kafold_audit`.
//! Workers look at the tables a few times a second and obey wherever they run; nothing here waits for
//! them. Whatever two operators do at once, one comes after the other.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use kafold_core::clock::SystemClock;
use kafold_core::{Clock, Position, StreamId};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;
use serde_json::{Value, json};

use crate::audit::{self, Act};
use crate::checkpoint::{bigint, int};
use crate::generation::{self, Generation};
use crate::overview::UNSEEN_SECONDS_MAX;
use crate::registry::{self, Found, State};
use crate::sql::{either, reading};
use crate::transaction::OpenTransaction;

/// Who asks, and why.
#[derive(Debug, Clone, Copy)]
pub struct By<'a> {
    /// A person or a program, as written to the record.
    pub actor: &'a str,
    /// Why.
    pub reason: Option<&'a str>,
}

impl<'a> By<'a> {
    /// Returns the reason, or rejects an act without a reason.
    pub(crate) fn reason_for(&self, act: &str) -> Result<&'a str, ControlError> {
        let reason = self.reason.filter(|reason| !reason.trim().is_empty());
        reason.ok_or_else(|| ControlError::Refused(format!("{act} takes a reason")))
    }
}

/// Why an act was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The database knows no such projection.
    #[error("there is no projection {name}; there are: {}", list(known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// It does not fit how things stand; the sentence says what to do.
    #[error("{0}")]
    Refused(String),
    /// The database failed.
    #[error("the database cannot be asked: {0}")]
    Database(#[from] sqlx::Error),
}

pub(crate) fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// What operators ask of the projections in a database. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    pub(crate) database: Database,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Control {
    /// Of the projections in this database.
    pub fn new(database: Database) -> Self {
        Self { database, clock: Arc::new(SystemClock) }
    }

    /// Has the projection apply nothing more, its rebuild included, until it is resumed. `false`: it
    /// was paused already.
    pub async fn pause(&self, name: &str, by: By<'_>) -> Result<bool, ControlError> {
        let sql = "UPDATE kafold_projection SET desired_state = 'paused', updated_at = $2 \
                   WHERE name = $1";
        let mut act = self.begin(name).await?;
        if act.found.is_paused() {
            return act.nothing().await;
        }
        act.run(sql).await?;
        act.done("pause", by, json!({})).await
    }

    /// Has the projection go on, if it is paused or has stopped. `false`: it was neither, but is
    /// told to go on all the same.
    pub async fn resume(&self, name: &str, by: By<'_>) -> Result<bool, ControlError> {
        let mut act = self.begin(name).await?;
        let found = &act.found;
        let is_needed = found.is_paused()
            || found.actual_state != State::Running.text()
            || found.next_reason.is_some();
        act.resume().await?;
        act.done("resume", by, json!({})).await?;
        Ok(is_needed)
    }

    /// Has the next generation built beside the live one, and switched to when it has caught up.
    /// `with_parked`: even if streams of it are parked by then; may also be said of a rebuild that is
    /// under way.
    pub async fn rebuild(
        &self,
        name: &str,
        with_parked: bool,
        by: By<'_>,
    ) -> Result<Generation, ControlError> {
        let mut act = self.begin(name).await?;
        let now = act.now;
        if let (Some(next), true) = (act.found.next(), with_parked) {
            act.run(
                "UPDATE kafold_projection SET next_takes_parked = (1 = 1), \
                   updated_at = $2 WHERE name = $1",
            )
            .await?;
            act.done("rebuild", by, json!({ "generation": next.0, "with_parked": true })).await?;
            return Ok(next);
        }
        if let Some(next) = act.found.next() {
            let since = act.found.next_requested_at.map(|at| at.0.to_rfc3339());
            return act
                .refuse(format!(
                    "projection {name} is being rebuilt as generation {next} since {}; to begin \
                     again, `kafold projections abort {name}` first",
                    since.unwrap_or_default()
                ))
                .await;
        }
        if let Some(reason) = act.found.refuses_rebuild() {
            return act.refuse(reason).await;
        }
        let next = Generation::of(act.found.last_generation.saturating_add(1));
        let sql = "UPDATE kafold_projection \
                   SET next_generation = $2, last_generation = $2, next_fingerprint = NULL, \
                     next_requested_at = $3, next_takes_parked = $4, next_reason = NULL, \
                     resumptions = resumptions + $5, updated_at = $3 WHERE name = $1";
        // After a reset of positions the live runner performs the rebuild, and so must be resumed.
        let resumed = i64::from(act.found.is_reset());
        either!(act.open.lend(), connection => {
            let query = sqlx::query(sql).bind(name).bind(next.int()).bind(Time(now));
            query.bind(with_parked).bind(resumed).execute(connection).await.map(drop)?;
        });
        act.done("rebuild", by, json!({ "generation": next.0, "with_parked": with_parked }))
            .await?;
        Ok(next)
    }

    /// Gives up the rebuild under way; workers drop its tables. The live generation is untouched.
    pub async fn abort(&self, name: &str, by: By<'_>) -> Result<Generation, ControlError> {
        let mut act = self.begin(name).await?;
        let Some(next) = act.found.next() else {
            return act.refuse(format!("projection {name} is not being rebuilt")).await;
        };
        act.run(
            "UPDATE kafold_projection \
             SET next_generation = NULL, next_fingerprint = NULL, next_requested_at = NULL, \
               next_reason = NULL, updated_at = $2 WHERE name = $1",
        )
        .await?;
        let live = act.found.live();
        registry::forget(&mut act.open.lend(), name, live).await?;
        act.done("abort", by, json!({ "generation": next.0 })).await?;
        Ok(next)
    }

    /// Removes a projection that no program has any more, with its tables, views and checkpoints. The act
    /// takes a reason. Refused while a worker runs the projection.
    pub async fn remove(&self, name: &str, by: By<'_>) -> Result<(), ControlError> {
        by.reason_for("removing a projection")?;
        let mut act = self.begin(name).await?;
        let seen = registry::unseen_seconds(&mut act.open.lend(), name).await?;
        if let Some(seconds) = seen.filter(|seconds| *seconds <= UNSEEN_SECONDS_MAX) {
            let reason = format!(
                "a worker ran projection {name} {seconds} s ago: stop all programs that have it, and \
                 wait for {UNSEEN_SECONDS_MAX} s"
            );
            return act.refuse(reason).await;
        }
        let definition = act.found.definition();
        for table in definition.tables() {
            if let Some(owner) = generation::foreign_owner(&mut act.open.lend(), &table).await? {
                let table = table.as_str();
                let reason =
                    format!("{table} belongs to the role {owner}: remove it with that login");
                return act.refuse(reason).await;
            }
        }
        let removed = registry::remove(&mut act.open.lend(), &definition).await;
        if let Some(dependents) = removed.as_ref().err().and_then(generation::dependents) {
            let reason = format!("{dependents}: drop the dependent objects first");
            return act.refuse(reason).await;
        }
        removed?;
        act.done("remove", by, json!({ "tables": definition.tables })).await?;
        Ok(())
    }

    /// Has the commit of the event at this position left out, by the live generation and by the one
    /// being built, as far as they have not come to it; and has the projection go on if it has
    /// stopped there. What is parked is skipped with [`Control::skip_parked`].
    pub async fn skip(&self, name: &str, at: Position, by: By<'_>) -> Result<(), ControlError> {
        let reason = by.reason_for("to skip an event")?;
        let mut act = self.begin(name).await?;
        let now = act.now;
        let sql = "INSERT INTO kafold_skipped_event \
                     (projection, generation, partition, \"offset\", actor, reason, skipped_at) \
                   SELECT projection, generation, partition, $3, $4, $5, $6 FROM kafold_checkpoint \
                   WHERE projection = $1 AND partition = $2 AND next_offset <= $3 \
                     AND generation IN ($7, $8) \
                   ON CONFLICT DO NOTHING";
        let live = act.found.live().int();
        let next = act.found.next().map_or(live, Generation::int);
        let skipped = either!(act.open.lend(), connection => {
            let query = sqlx::query(sql).bind(name).bind(int(at.partition));
            let query = query.bind(bigint(at.offset)).bind(by.actor).bind(reason).bind(Time(now));
            query.bind(live).bind(next).execute(connection).await?.rows_affected()
        });
        if skipped == 0 {
            return act
                .refuse(format!(
                    "projection {name} has nothing to skip at {at}: it has passed it, or it has no \
                     such partition, or it is to be skipped already; a parked event is skipped with \
                     `kafold parked skip STREAM`"
                ))
                .await;
        }
        act.resume().await?;
        act.done("skip", by, json!({ "position": at.to_string() })).await?;
        Ok(())
    }

    /// Has parked streams tried again: one, or all, of one projection or of all. Answers how many.
    pub async fn retry(
        &self,
        name: Option<&str>,
        stream: Option<&StreamId>,
        by: By<'_>,
    ) -> Result<u64, ControlError> {
        let names = self.one_or_all(name).await?;
        let mut count = 0;
        for name in &names {
            let mut act = self.begin(name).await?;
            let streams = act.ask_retry(stream).await?;
            if streams > 0 {
                let stream = stream.map(ToString::to_string);
                act.done("retry", by, json!({ "stream": stream, "streams": streams })).await?;
            } else {
                act.open.rollback().await?;
            }
            count += streams;
        }
        match (stream, count) {
            (Some(stream), 0) => Err(not_parked(stream, name)),
            _ => Ok(count),
        }
    }

    /// Has the first parked commit of a stream, which is the one at fault, left out for good, and the
    /// rest of the stream tried again. Answers in how many projections.
    pub async fn skip_parked(
        &self,
        name: Option<&str>,
        stream: &StreamId,
        by: By<'_>,
    ) -> Result<u64, ControlError> {
        let reason = by.reason_for("to skip an event")?;
        let names = self.one_or_all(name).await?;
        let mut count = 0;
        for name in &names {
            let mut act = self.begin(name).await?;
            if act.ask_retry(Some(stream)).await? == 0 {
                act.open.rollback().await?;
                continue;
            }
            act.skip_first(stream, by.actor, reason).await?;
            act.done("skip", by, json!({ "stream": stream.to_string() })).await?;
            count += 1;
        }
        if count == 0 { Err(not_parked(stream, name)) } else { Ok(count) }
    }

    /// Has what was parked before a time left out for good, in every projection, and the rest of those
    /// streams tried again. Answers how many events.
    pub async fn skip_parked_before(
        &self,
        before: DateTime<Utc>,
        by: By<'_>,
    ) -> Result<u64, ControlError> {
        let reason = by.reason_for("to skip an event")?;
        let mut count = 0;
        for name in &self.names().await? {
            let mut act = self.begin(name).await?;
            let events = act.skip_before(before, by.actor, reason).await?;
            if events == 0 {
                act.open.rollback().await?;
                continue;
            }
            act.done("skip", by, json!({ "parked_before": before, "events": events })).await?;
            count += events;
        }
        Ok(count)
    }

    async fn one_or_all(&self, name: Option<&str>) -> Result<Vec<String>, sqlx::Error> {
        match name {
            Some(name) => Ok(vec![name.to_owned()]),
            None => self.names().await,
        }
    }

    async fn names(&self) -> Result<Vec<String>, sqlx::Error> {
        let sql = "SELECT name FROM kafold_projection ORDER BY name";
        reading!(&self.database, pool => sqlx::query_scalar(sql).fetch_all(pool).await)
    }

    async fn begin(&self, name: &str) -> Result<Acting, ControlError> {
        let mut open = OpenTransaction::begin(&self.database).await?;
        let found = registry::find(&mut open.lend(), name).await?;
        let Some(found) = found else {
            open.rollback().await?;
            return Err(ControlError::Unknown {
                name: name.to_owned(),
                known: self.names().await?,
            });
        };
        Ok(Acting { open, found, now: self.clock.now() })
    }
}

fn not_parked(stream: &StreamId, name: Option<&str>) -> ControlError {
    let of = name.map(|name| format!(" of projection {name}")).unwrap_or_default();
    ControlError::Refused(format!(
        "nothing{of} is parked of stream {stream}; `kafold parked list` tells what is"
    ))
}

/// One act in its transaction; the projection's row is locked.
struct Acting {
    open: OpenTransaction,
    found: Found,
    now: DateTime<Utc>,
}

impl Acting {
    /// A statement on the projection's row, of name and time.
    async fn run(&mut self, sql: &'static str) -> Result<(), sqlx::Error> {
        let (name, now) = (&self.found.name, Time(self.now));
        either!(self.open.lend(), connection => {
            sqlx::query(sql).bind(name).bind(now).execute(connection).await.map(drop)
        })
    }

    async fn resume(&mut self) -> Result<(), sqlx::Error> {
        self.run(
            "UPDATE kafold_projection \
             SET desired_state = 'running', resumptions = resumptions + 1, next_reason = NULL, \
               actual_state = CASE actual_state WHEN 'stopped' THEN 'running' \
                 ELSE actual_state END, \
               actual_state_reason = NULL, updated_at = $2 WHERE name = $1",
        )
        .await
    }

    /// Answers how many streams.
    async fn ask_retry(&mut self, stream: Option<&StreamId>) -> Result<u64, sqlx::Error> {
        let name = &self.found.name;
        let (category, id) = stream.map(|stream| (stream.category(), stream.id())).unzip();
        let count = "SELECT COUNT(*) FROM (SELECT DISTINCT generation, category, stream_id \
                       FROM kafold_parked_event WHERE projection = $1 \
                         AND category = COALESCE($2, category) \
                         AND stream_id = COALESCE($3, stream_id)) streams";
        let ask = "UPDATE kafold_parked_event SET retry = $4 WHERE projection = $1 \
                     AND category = COALESCE($2, category) AND stream_id = COALESCE($3, stream_id)";
        let streams: i64 = either!(self.open.lend(), connection => {
            let query = sqlx::query(ask).bind(name).bind(category).bind(id).bind(true);
            query.execute(&mut *connection).await?;
            let query = sqlx::query_scalar(count).bind(name).bind(category).bind(id);
            query.fetch_one(connection).await?
        });
        Ok(streams.unsigned_abs())
    }

    async fn skip_first(
        &mut self,
        stream: &StreamId,
        actor: &str,
        reason: &str,
    ) -> Result<(), sqlx::Error> {
        let (name, now) = (&self.found.name, self.now);
        let sql = "INSERT INTO kafold_skipped_event \
                     (projection, generation, partition, \"offset\", actor, reason, skipped_at) \
                   SELECT projection, generation, partition, MIN(\"offset\"), $4, $5, $6 \
                   FROM kafold_parked_event \
                   WHERE projection = $1 AND category = $2 AND stream_id = $3 \
                   GROUP BY projection, generation, partition \
                   ON CONFLICT DO NOTHING";
        either!(self.open.lend(), connection => {
            let query = sqlx::query(sql).bind(name).bind(stream.category()).bind(stream.id());
            let query = query.bind(actor).bind(reason).bind(Time(now));
            query.execute(connection).await.map(drop)
        })
    }

    /// Answers how many events.
    async fn skip_before(
        &mut self,
        before: DateTime<Utc>,
        actor: &str,
        reason: &str,
    ) -> Result<u64, sqlx::Error> {
        let (name, now) = (&self.found.name, self.now);
        let skip = "INSERT INTO kafold_skipped_event \
                      (projection, generation, partition, \"offset\", actor, reason, skipped_at) \
                    SELECT projection, generation, partition, \"offset\", $3, $4, $5 \
                    FROM kafold_parked_event WHERE projection = $1 AND parked_at < $2 \
                    ON CONFLICT DO NOTHING";
        let ask = "UPDATE kafold_parked_event SET retry = $3 \
                   WHERE projection = $1 AND (category, stream_id) IN \
                     (SELECT category, stream_id FROM kafold_parked_event \
                      WHERE projection = $1 AND parked_at < $2)";
        either!(self.open.lend(), connection => {
            let query = sqlx::query(skip).bind(name).bind(Time(before)).bind(actor);
            let query = query.bind(reason).bind(Time(now));
            let skipped = query.execute(&mut *connection).await?.rows_affected();
            let query = sqlx::query(ask).bind(name).bind(Time(before)).bind(true);
            query.execute(connection).await.map(|_| skipped)
        })
    }

    async fn nothing(self) -> Result<bool, ControlError> {
        self.open.rollback().await?;
        Ok(false)
    }

    async fn refuse<T>(self, reason: String) -> Result<T, ControlError> {
        self.open.rollback().await?;
        Err(ControlError::Refused(reason))
    }

    /// Enters the act and commits it.
    async fn done(mut self, action: &str, by: By<'_>, more: Value) -> Result<bool, ControlError> {
        let mut details = more;
        if let (Some(reason), Some(details)) = (by.reason, details.as_object_mut()) {
            details.insert("reason".to_owned(), reason.into());
        }
        let act = Act { actor: by.actor, action };
        audit::add(&mut self.open.lend(), act, Some(&self.found.name), details, self.now).await?;
        self.open.commit().await?;
        Ok(true)
    }
}

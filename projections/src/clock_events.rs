//! Appends [clock events](kafold_core::timeline): a partition without events does not hold the windows of the others open.
//!
//! One task a windowed model looks once a second for a window that is due. A partition is quiet if it is read to its
//! end and has had no event of the model for the idle time; how the time of a clock event follows from the quiet partitions is
//! [`window::clock_events`]. Every process that takes commands looks, and all of them derive the same command id from
//! timeline, partition and due time, so that one clock event is appended.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat};
use kafold_core::handler::HandleError;
use kafold_core::timeline::{self, NoRule, Timeline, TimelineCommand};
use kafold_core::window::{self, EventClock, NewestEvent, PartitionTime, Timestamp, Window};
use kafold_core::{CommandHandler, CommandId, Offset, Partition, ReadError, StreamId};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;
use tokio::sync::watch;
use uuid::Uuid;

use crate::definition::Definition;
use crate::generation::Generation;
use crate::sql::reading;
use crate::table::Table;
use crate::worker::Context;

/// Interval of the looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A partition is quiet after so long without an event, while the newest event of the model is live.
const IDLE: Duration = Duration::from_secs(5);
/// As [`IDLE`], while old events are replayed: a kill or a change of owners in the middle of an import advances nothing.
const IDLE_IN_REPLAY: Duration = Duration::from_secs(60);
/// Longest age of the knowledge that a partition is read to its end.
const END_AGE_MAX: Duration = Duration::from_secs(5);
/// The namespace of the command ids of clock events.
const NAMESPACE: Uuid = Uuid::from_u128(0x6b61_666f_6c64_8c10_9c6b_2d65_7665_6e74);

/// Before all windows, and a time that PostgreSQL has.
const BEGINNING: Timestamp = DateTime::from_timestamp(-60_000_000_000, 0).expect("in range");

/// Appends the clock events of one model.
pub(crate) struct ClockEvents {
    context: Context,
    handler: CommandHandler<Timeline>,
    definition: Definition,
    window: Window,
    timeline: &'static str,
    quiet: QuietPartitions,
    streams: HashMap<Partition, StreamId>,
}

/// The failure of a look.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the log: {0}")]
    Log(#[from] ReadError),
    #[error("the clock event of partition {partition}: {error}")]
    Append { partition: Partition, error: HandleError<NoRule> },
    #[error("the name of the timeline: {0}")]
    Timeline(#[from] kafold_core::ids::InvalidStreamId),
}

impl ClockEvents {
    /// Returns `None` for a projection that has no windows.
    pub(crate) fn of(
        definition: &Definition,
        context: Context,
        handler: CommandHandler<Timeline>,
    ) -> Option<Self> {
        let (window, timeline) = (definition.window?, definition.timeline?);
        let definition = definition.clone();
        let (quiet, streams) = (QuietPartitions::default(), HashMap::new());
        Some(Self { context, handler, definition, window, timeline, quiet, streams })
    }

    /// Looks again and again, until the projections are shut down.
    pub(crate) async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let clock = self.context.clock.clone();
        let looks = async {
            loop {
                clock.sleep(LOOK_INTERVAL).await;
                if let Err(error) = self.look().await {
                    // The next look tries again, and health names a log or a database that is away.
                    tracing::debug!(model = self.definition.name, %error, "no clock event");
                }
            }
        };
        tokio::select! {
            _ = shutdown.wait_for(|asked| *asked) => {}
            () = looks => {}
        }
    }

    async fn look(&mut self) -> Result<(), LookError> {
        let Context { source, database, clock, .. } = self.context.clone();
        let (now, wall) = (clock.instant(), clock.now());
        let Some(live) = LiveModel::read(&database, &self.definition, source.partitions()).await?
        else {
            self.quiet.forget();
            return Ok(());
        };
        if let Some(to) = live.advance_to {
            self.advance_all(&live, to).await?;
        }
        let due = live.due(&database, &self.definition, &self.window).await?;
        let (Some(newest), Some(due)) = (live.newest, due) else {
            self.quiet.forget();
            return Ok(());
        };
        let is_live = newest.recorded_at - newest.at <= self.window.grace();
        let idle = if is_live { IDLE } else { IDLE_IN_REPLAY };
        self.quiet.observe(&live.partitions, now);

        // The log is asked for its ends only if a clock event may follow.
        let may_be_quiet = self.times(&live, |quiet, nth| quiet.is_idle(nth, now, idle));
        let wanted = window::clock_events(&self.window, &may_be_quiet, newest, Some(due), wall);
        if wanted.is_none() {
            return Ok(());
        }
        for (nth, partition) in (0..).map(Partition).take(live.partitions.len()).enumerate() {
            if self.quiet.wants_end(nth, now, idle) {
                let end = source.end_of(partition).await?;
                self.quiet.asked(nth, end, now);
            }
        }
        let times = self.times(&live, |quiet, nth| quiet.is_quiet(nth, now, idle));
        let events = window::clock_events(&self.window, &times, newest, Some(due), wall);
        let Some((behind, to)) = events else { return Ok(()) };
        for nth in behind {
            self.append(Partition(nth as u32), to, due).await?;
        }
        Ok(())
    }

    /// Moves the clocks that are before a time to the time, for an operator.
    async fn advance_all(&mut self, live: &LiveModel, to: Timestamp) -> Result<(), LookError> {
        for (partition, read) in (0..).map(Partition).zip(&live.partitions) {
            if read.and_then(|read| read.clock.time()).is_none_or(|clock| clock < to) {
                self.append(partition, to, to).await?;
            }
        }
        Ok(())
    }

    fn times(
        &self,
        live: &LiveModel,
        is_quiet: impl Fn(&QuietPartitions, usize) -> bool,
    ) -> Vec<PartitionTime> {
        let time = |(nth, read): (usize, &Option<PartitionRead>)| PartitionTime {
            clock: read.as_ref().map_or(EventClock::default(), |read| read.clock),
            is_quiet: is_quiet(&self.quiet, nth),
        };
        live.partitions.iter().enumerate().map(time).collect()
    }

    async fn append(
        &mut self,
        partition: Partition,
        to: Timestamp,
        due: Timestamp,
    ) -> Result<(), LookError> {
        let source = &self.context.source;
        let stream = match self.streams.entry(partition) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(unknown) => {
                let of = |stream: &StreamId| source.partition_of(stream);
                unknown.insert(timeline::stream(self.timeline, partition, of)?)
            }
        };
        // All processes derive the same id, so that one clock event is appended.
        let name = format!("{}/{partition}/{}", self.timeline, due.timestamp_micros());
        let id = CommandId::derived(NAMESPACE, name.as_bytes());
        let advance = TimelineCommand::Advance { to };
        let handled = self.handler.handle_with(stream.id(), &advance, id).await;
        let handled = handled.map_err(|error| LookError::Append { partition, error })?;
        if handled.events > 0 {
            metrics::counter!("kafold_clock_events_total", "timeline" => self.timeline)
                .increment(1);
            tracing::debug!(timeline = self.timeline, %partition, %to, "appended a clock event");
        }
        Ok(())
    }
}

/// How far the live generation of a model has read, as the database says.
struct LiveModel {
    generation: Generation,
    /// `None` for a partition that no worker has taken yet.
    partitions: Vec<Option<PartitionRead>>,
    newest: Option<NewestEvent>,
    /// The time to which an operator wants all clocks moved.
    advance_to: Option<Timestamp>,
}

#[derive(sqlx::FromRow)]
struct LiveRow {
    live_generation: i32,
    advance_to: Option<Time>,
    partition: i32,
    next_offset: i64,
    clock: Option<Time>,
    newest_at: Option<Time>,
    newest_recorded_at: Option<Time>,
    events: i64,
}

/// How far a partition is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PartitionRead {
    next: Offset,
    clock: EventClock,
    /// Number of events of the model.
    events: i64,
}

impl LiveModel {
    /// Returns `None` if the live rows are of another definition, such as that of a newer program.
    async fn read(
        database: &Database,
        definition: &Definition,
        partitions: u32,
    ) -> Result<Option<Self>, sqlx::Error> {
        let sql = "SELECT p.live_generation, p.advance_to, c.partition, c.next_offset, c.clock, \
                     c.newest_at, c.newest_recorded_at, \
                     c.in_windows + c.late + c.future + c.keyless AS events \
                   FROM kafold_checkpoint c JOIN kafold_projection p \
                     ON p.name = c.projection AND p.live_generation = c.generation \
                   WHERE p.name = $1 AND p.fingerprint = $2";
        let rows: Vec<LiveRow> = reading!(database, pool => {
            let query = sqlx::query_as(sql).bind(&definition.name).bind(&definition.fingerprint);
            query.fetch_all(pool).await?
        });
        let Some(first) = rows.first() else { return Ok(None) };
        let mut live = Self {
            generation: Generation::of(first.live_generation),
            partitions: vec![None; partitions as usize],
            newest: None,
            advance_to: first.advance_to.map(Into::into),
        };
        for row in rows {
            let read = PartitionRead {
                next: Offset(row.next_offset.unsigned_abs()),
                clock: EventClock::at(row.clock.map(Into::into)),
                events: row.events,
            };
            if let Some(place) = live.partitions.get_mut(row.partition.unsigned_abs() as usize) {
                *place = Some(read);
            }
            let newest = row.newest_recorded_at.zip(row.newest_at);
            let newest = newest.map(|(recorded_at, at)| NewestEvent {
                recorded_at: recorded_at.into(),
                at: at.into(),
            });
            live.newest = live.newest.max(newest);
        }
        Ok(Some(live))
    }

    /// Returns the least clock with which the next window is closed; `None` while none is open.
    async fn due(
        &self,
        database: &Database,
        definition: &Definition,
        window: &Window,
    ) -> Result<Option<Timestamp>, sqlx::Error> {
        let Some(table) = Table::new(definition, self.generation) else { return Ok(None) };
        let clocks =
            self.partitions.iter().map(|read| read.map_or(EventClock::default(), |r| r.clock));
        let least = window::least_clock(clocks);
        // Windows that end there are closed; sessions with their last event there are not.
        let through = window.closed_through(least).unwrap_or(BEGINNING);
        let sql = table.first_end(window.is_session());
        let end = match database {
            Database::Postgres(database) => {
                let query = sqlx::query_scalar::<_, Option<Timestamp>>(sql).bind(through);
                query.fetch_one(database.pool()).await?
            }
            Database::Sqlite(database) => {
                let through = through.to_rfc3339_opts(SecondsFormat::Micros, true);
                let query = sqlx::query_scalar::<_, Option<String>>(sql).bind(through);
                let end = query.fetch_one(database.readers()).await?;
                let parsed = end.map(|end| end.parse()).transpose();
                parsed.map_err(|error| sqlx::Error::Decode(Box::new(error)))?
            }
        };
        Ok(end.map(|end| window.closes_at(end)))
    }
}

/// Which partitions are quiet: read to their end, and without an event of the model for the idle time. The idle time
/// counts from the moment at which a window was first seen open. Without IO.
#[derive(Debug, Default)]
struct QuietPartitions(Vec<Seen>);

/// The observations of a partition.
#[derive(Debug, Clone, Copy)]
struct Seen {
    read: Option<PartitionRead>,
    /// When the number of events was first seen.
    since: Instant,
    /// The end of the partition, and when the log was asked for it.
    asked: Option<(Offset, Instant)>,
    /// The time of the newest request to the log for an end that is read by now.
    read_to_end_of: Option<Instant>,
}

impl QuietPartitions {
    /// Nothing is open any more: the idle time begins anew with the next window.
    fn forget(&mut self) {
        self.0.clear();
    }

    fn observe(&mut self, partitions: &[Option<PartitionRead>], now: Instant) {
        let new = Seen { read: None, since: now, asked: None, read_to_end_of: None };
        self.0.resize(partitions.len(), new);
        for (seen, read) in self.0.iter_mut().zip(partitions) {
            let events = |read: &Option<PartitionRead>| read.map(|read| read.events);
            if events(&seen.read) != events(read) {
                *seen = Seen { since: now, ..new };
            }
            seen.read = *read;
            let is_read = |(end, _): &mut (Offset, _)| read.is_some_and(|read| read.next >= *end);
            if let Some((_, at)) = seen.asked.take_if(is_read) {
                seen.read_to_end_of = Some(at);
            }
        }
    }

    /// Returns `true` for a partition without an event for the idle time.
    fn is_idle(&self, nth: usize, now: Instant, idle: Duration) -> bool {
        let seen = &self.0[nth];
        seen.read.is_some() && now.saturating_duration_since(seen.since) >= idle
    }

    /// Returns `true` for an idle partition whose end is to be asked for.
    fn wants_end(&self, nth: usize, now: Instant, idle: Duration) -> bool {
        self.is_idle(nth, now, idle) && self.0[nth].asked.is_none()
    }

    fn asked(&mut self, nth: usize, end: Offset, now: Instant) {
        self.0[nth].asked = Some((end, now));
    }

    fn is_quiet(&self, nth: usize, now: Instant, idle: Duration) -> bool {
        let seen = &self.0[nth];
        self.is_idle(nth, now, idle)
            && seen.read_to_end_of.is_some_and(|at| {
                at.saturating_duration_since(seen.since) >= idle
                    && now.saturating_duration_since(at) <= END_AGE_MAX
            })
    }
}

#[cfg(test)]
mod tests {
    use kafold_core::Clock;
    use kafold_core::clock::SystemClock;

    use super::*;

    /// One partition, second by second.
    struct OnePartition {
        quiet: QuietPartitions,
        begin: Instant,
    }

    impl OnePartition {
        fn new() -> Self {
            Self { quiet: QuietPartitions::default(), begin: SystemClock.instant() }
        }

        /// Looks at a second, as [`ClockEvents::look`] does. Returns whether the partition is quiet.
        fn look(&mut self, second: u64, next: u64, events: i64, end: u64) -> bool {
            let now = self.begin + Duration::from_secs(second);
            let read = PartitionRead { next: Offset(next), clock: EventClock::default(), events };
            self.quiet.observe(&[Some(read)], now);
            if self.quiet.wants_end(0, now, IDLE) {
                self.quiet.asked(0, Offset(end), now);
            }
            self.quiet.is_quiet(0, now, IDLE)
        }
    }

    #[test]
    fn a_partition_is_quiet_when_it_is_read_to_an_end_after_the_idle_time() {
        let mut partition = OnePartition::new();
        for second in 0..=5 {
            assert!(!partition.look(second, 10, 3, 10), "{second}");
        }
        assert!(partition.look(6, 10, 3, 10), "the end of second 5 is read");
        assert!(!partition.look(7, 11, 4, 11), "an event");
        assert!(!partition.look(12, 11, 4, 11));
        assert!(partition.look(13, 11, 4, 11));
    }

    #[test]
    fn a_partition_with_unread_records_is_not_quiet() {
        let mut partition = OnePartition::new();
        for second in 0..60 {
            assert!(!partition.look(second, 10, 3, 12), "{second}");
        }
        assert!(!partition.look(60, 12, 3, 12), "it was asked for its end long ago");
        // Records of others are no events of the model. From now on the worker does not go on.
        assert!(
            (61..=65).all(|second| partition.look(second, 12, 3, 20)),
            "what is known is young"
        );
        assert!((66..90).all(|second| !partition.look(second, 12, 3, 20)));
    }

    #[test]
    fn a_partition_that_no_worker_has_taken_is_not_quiet() {
        let mut quiet = QuietPartitions::default();
        let begin = SystemClock.instant();
        for second in 0..60 {
            let now = begin + Duration::from_secs(second);
            quiet.observe(&[None], now);
            assert!(!quiet.wants_end(0, now, IDLE) && !quiet.is_quiet(0, now, IDLE));
        }
    }
}

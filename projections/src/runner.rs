//! The loop of one generation of a projection.
//!
//! Subscribe, take partitions under a raised fence, apply rounds of batches, each in one transaction
//! with its checkpoints. What fails is sorted by whose fault it is: the database's and the source's
//! are waited for, for ever; an event's is narrowed to its commit, tried a few times, and then its
//! stream is parked, or this projection alone stops. Between rounds it does what operators ask.

mod control;
mod parking;
mod rounds;

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kafold_core::clock::backoff;
use kafold_core::store::{Consumer, ReadError};
use kafold_core::{Offset, Partition, Position};
use kafold_migrations::Database;
use tokio::sync::watch;

use self::parking::Parked;
use crate::checkpoint::{self, Checkpoint};
use crate::desired::{AllDesired, Desired};
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Memory, Target, panic_text};
use crate::parked;
use crate::reader::{Message, Reader, RoundLimit};
use crate::registry;
use crate::status::{PartitionStatus, ProjectionState, SharedStatus};
use crate::transaction::{is_of_values, unavailable};
use crate::worker::Context;

/// Events in one batch of the source; rounds are made of several. Small enough on SQLite that a
/// round can be kept within its time.
const SOURCE_BATCH_EVENTS: usize = 500;
const SOURCE_BATCH_EVENTS_SQLITE: usize = 100;
/// How long a source that could not be read must not complain before it counts as back.
const SOURCE_CALM: Duration = Duration::from_secs(3);

/// Why the loop, or a part of it, came to an end.
enum Ended {
    /// It was asked to.
    Shutdown,
    /// A new subscription is needed.
    Again,
    /// Its generation is neither live nor wanted.
    Retired,
    /// It cannot go on.
    Stopped(String),
}

/// What a runner ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was asked to.
    Shutdown,
    /// This generation is neither live nor wanted.
    Retired(Generation),
    /// It cannot go on, for the sentence's reason.
    Stopped(String),
    /// A defect outside of the author's functions, such as a driver that panics at an answer it does not know.
    Panicked(String),
}

/// What a runner's generation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Queries see its rows.
    Live,
    /// It is being built, to become the live one.
    Next,
}

/// Why a round is not committed.
enum Failed {
    Unavailable(String),
    Fault(Fault),
    /// A checkpoint is not where it was left.
    Superseded,
}

impl Failed {
    /// What spans call it.
    fn name(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Fault(_) => "fault",
            Self::Superseded => "superseded",
        }
    }
}

/// One generation of a projection at work.
pub(crate) struct Runner {
    handler: Arc<dyn Handler>,
    context: Context,
    status: SharedStatus,
    shutdown: watch::Receiver<bool>,
    all_desired: watch::Receiver<AllDesired>,
    role: Role,
    generation: Generation,
    places: HashMap<Partition, Checkpoint>,
    /// Of the rows of these partitions; valid as long as every transaction that touches them commits.
    memory: Option<Memory>,
    /// What is set aside of each held partition.
    parked: HashMap<Partition, Parked>,
    /// The event that is being parked, and why.
    parking: Option<(Position, String)>,
    /// What operators ask, as far as it was looked at.
    desired: Option<Desired>,
    /// Whether something is asked that was not looked at, or partitions came since.
    is_asked: bool,
    is_paused: bool,
    /// Most events in a round, between one batch of the source and the configured limit.
    events_max: usize,
    /// After a failure the source is read a commit at a time up to these offsets, so that everything
    /// before the event at fault is applied.
    careful_until: HashMap<Partition, Offset>,
    /// Whether it has waited for something since it last had nothing to do.
    has_waited: bool,
    /// Whether the status says that the source cannot be read.
    source_complained: bool,
    /// Whether a group says who reads which partition.
    is_shared: bool,
    /// What it is to Kafka.
    consumer: Option<Consumer>,
    /// When to subscribe anew, after partitions were lost that the group has not taken away.
    retake_at: Option<Instant>,
}

/// Where a runner hears what is asked of it.
pub(crate) struct Orders {
    pub(crate) shutdown: watch::Receiver<bool>,
    pub(crate) desired: watch::Receiver<AllDesired>,
}

impl Runner {
    /// A runner of the live generation, whichever that is.
    pub(crate) fn live(
        handler: Arc<dyn Handler>,
        context: Context,
        status: SharedStatus,
        orders: Orders,
    ) -> Self {
        Self::new(handler, context, status, orders, (Role::Live, Generation(0)))
    }

    /// A runner that builds this generation.
    pub(crate) fn next(
        handler: Arc<dyn Handler>,
        context: Context,
        status: SharedStatus,
        orders: Orders,
        generation: Generation,
    ) -> Self {
        Self::new(handler, context, status, orders, (Role::Next, generation))
    }

    fn new(
        handler: Arc<dyn Handler>,
        context: Context,
        status: SharedStatus,
        orders: Orders,
        (role, generation): (Role, Generation),
    ) -> Self {
        Self {
            handler,
            context,
            status,
            shutdown: orders.shutdown,
            all_desired: orders.desired,
            role,
            generation,
            places: HashMap::new(),
            memory: None,
            parked: HashMap::new(),
            parking: None,
            desired: None,
            is_asked: true,
            is_paused: false,
            events_max: 1,
            careful_until: HashMap::new(),
            has_waited: false,
            source_complained: false,
            is_shared: false,
            consumer: None,
            retake_at: None,
        }
    }

    /// Runs until it is shut down, retired or has to stop.
    pub(crate) async fn run(mut self) -> Outcome {
        let served = AssertUnwindSafe(self.serve()).catch_unwind().await;
        // Whatever a panic left is given up with the runner; the database has whole transactions.
        let (state, outcome) = match served {
            Err(panic) => {
                let reason = panic_text(&*panic);
                tracing::error!(projection = self.status.name(), reason, "a projection ended");
                (ProjectionState::Stopped(reason.clone()), Outcome::Panicked(reason))
            }
            Ok(Ended::Stopped(reason)) => {
                let generation = self.generation.0;
                tracing::error!(projection = self.status.name(), generation, reason, "stopped");
                (ProjectionState::Stopped(reason.clone()), Outcome::Stopped(reason))
            }
            Ok(Ended::Retired) => (ProjectionState::Down, Outcome::Retired(self.generation)),
            Ok(Ended::Shutdown | Ended::Again) => (ProjectionState::Down, Outcome::Shutdown),
        };
        self.status.change(|status| {
            if let ProjectionState::Stopped(reason) = &state {
                status.last_error = Some(reason.clone());
            }
            status.state = state;
            status.partitions.clear();
        });
        outcome
    }

    async fn serve(&mut self) -> Ended {
        let begun = match self.role {
            Role::Live => self.register().await,
            Role::Next => self.begin_build().await,
        };
        let heard = match begun {
            Ok(()) => self.hear().await,
            Err(ended) => Err(ended),
        };
        if let Err(ended) = heard {
            return ended;
        }
        loop {
            match self.session().await {
                Ok(never) => match never {},
                Err(Ended::Again) => self.release_all(),
                Err(ended) => return ended,
            }
        }
    }

    async fn register(&mut self) -> Result<(), Ended> {
        let Context { database, clock, source, .. } = self.context.clone();
        let handler = self.handler.clone();
        let partitions = source.partitions();
        let register = || registry::register(&database, &*handler, partitions, clock.now());
        self.generation = self.until_done(register).await?;
        self.status.registered(self.generation);
        Ok(())
    }

    async fn begin_build(&mut self) -> Result<(), Ended> {
        let (database, handler) = (self.context.database.clone(), self.handler.clone());
        let generation = self.generation;
        let begin = || registry::begin_build(&database, &*handler, generation);
        match self.until_done(begin).await? {
            true => Ok(()),
            false => Err(Ended::Retired),
        }
    }

    /// Does it, again while the database is away.
    async fn until_done<T, F>(&mut self, run: impl Fn() -> F) -> Result<T, Ended>
    where
        F: Future<Output = Result<T, ApplyError>>,
    {
        let mut attempt = 0;
        loop {
            let error = match until_asked(&mut self.shutdown, run()).await? {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            match sorted(error) {
                Failed::Unavailable(reason) => {
                    attempt += 1;
                    self.wait_because(attempt, &reason).await?;
                }
                Failed::Fault(fault) => return Err(Ended::Stopped(fault.reason)),
                Failed::Superseded => {}
            }
        }
    }

    /// One subscription from its beginning to its end.
    async fn session(&mut self) -> Result<Infallible, Ended> {
        let mut reader = self.subscribe().await?;
        loop {
            self.obey(&mut reader).await?;
            // Nothing may come that says so: a commit was done, and only its answer lost.
            if self.has_waited && !self.places.is_empty() {
                self.has_waited = false;
                self.goes_on();
            }
            match self.receive(&mut reader).await? {
                None => {}
                Some(Message::Assigned(partitions)) => self.take(&partitions, &mut reader).await?,
                Some(Message::Revoked(partitions)) => self.release(&partitions),
                Some(Message::Round(round)) => self.work_off(round).await?,
                Some(Message::Closed) => {
                    self.wait_because(1, "the subscription has ended").await?;
                    return Err(Ended::Again);
                }
            }
        }
    }

    async fn subscribe(&mut self) -> Result<Reader, Ended> {
        let source_max = match self.context.database {
            _ if !self.careful_until.is_empty() => 1,
            Database::Postgres(_) => SOURCE_BATCH_EVENTS,
            Database::Sqlite(_) => SOURCE_BATCH_EVENTS_SQLITE,
        };
        let round_events_max = self.configured_events_max();
        let batch_events_max = source_max.min(round_events_max);
        self.events_max = batch_events_max;
        let mut attempt = 0;
        loop {
            // A generation has readers of its own: the next one begins where the log begins.
            let name = match self.generation {
                Generation::FIRST => self.status.name().to_owned(),
                generation => generation.table(self.status.name()).as_str().to_owned(),
            };
            let Context { source, database, .. } = &self.context;
            let subscribing = source.subscribe(&name, Some(database.identity()), batch_events_max);
            match until_asked(&mut self.shutdown, subscribing).await? {
                Ok(subscription) => {
                    self.is_shared = subscription.is_shared();
                    self.consumer = subscription.consumer();
                    self.retake_at = None;
                    let Context { config, clock, .. } = &self.context;
                    // What the next round may take.
                    let ahead = (round_events_max / batch_events_max, config.batch_bytes_max);
                    let (handler, clock) = (self.handler.clone(), clock.clone());
                    return Ok(Reader::new(subscription, handler, ahead, clock));
                }
                Err(error) => {
                    attempt += 1;
                    self.wait_for_source(attempt, &error).await?;
                }
            }
        }
    }

    /// The next message; nothing when something is asked, or the source has something to say.
    async fn receive(&mut self, reader: &mut Reader) -> Result<Option<Message>, Ended> {
        let limit = RoundLimit {
            events_max: self.events_max,
            bytes_max: self.context.config.batch_bytes_max,
            idle: self.context.config.idle_checkpoint_interval,
        };
        let calm = self.context.clock.sleep(SOURCE_CALM);
        let now = self.context.clock.instant();
        let retake = self.retake_at.map(|at| at.saturating_duration_since(now));
        let retake = self.context.clock.sleep(retake.unwrap_or_default());
        let message = tokio::select! {
            biased;
            _ = self.shutdown.wait_for(|asked| *asked) => return Err(Ended::Shutdown),
            Ok(()) = self.all_desired.changed() => {
                self.is_asked = true;
                return Ok(None);
            }
            message = reader.next(limit) => message.map(Some),
            () = retake, if self.retake_at.is_some() => return Err(Ended::Again),
            () = calm, if self.source_complained => Ok(None),
        };
        match message {
            Ok(message) => {
                if std::mem::take(&mut self.source_complained) {
                    self.goes_on();
                }
                Ok(message)
            }
            Err(ReadError::Unavailable { cause, .. }) => {
                self.source_complained = true;
                self.status.waiting(&format!("the log is unavailable: {cause}"));
                Ok(None)
            }
            Err(diverged) => Err(Ended::Stopped(diverged.to_string())),
        }
    }

    /// Makes the partitions this worker's own, and lets the source go on where SQL says.
    async fn take(&mut self, partitions: &[Partition], reader: &mut Reader) -> Result<(), Ended> {
        let Context { database, clock, .. } = self.context.clone();
        let name = self.status.name().to_owned();
        let target = Target { name: &name, generation: self.generation };
        self.check_log(target, partitions, reader).await?;
        let take = async || {
            let places = checkpoint::take(&database, target, partitions, clock.now()).await?;
            Ok((places, parked::streams(&database, target).await?))
        };
        let (Some(places), parked) = self.until_done(take).await? else {
            return Err(Ended::Retired);
        };
        self.parked.extend(partitions.iter().map(|partition| (*partition, Parked::default())));
        for (partition, stream, events) in parked {
            if let Some(parked) = self.parked.get_mut(&partition) {
                parked.add(stream, events);
            }
        }
        self.show_parked();
        self.is_asked = true;
        // Others may have changed the rows of these partitions since they were held last.
        let from_start = places.iter().filter(|place| place.cursor().is_none());
        let from_start = from_start.map(|place| place.partition).collect();
        let rows_max = self.context.config.remembered_rows_max;
        self.memory = self.handler.memory(from_start, rows_max);
        for place in places {
            let partition = place.partition;
            if !self.is_paused {
                self.start(reader, &place).await?;
            }
            self.status.change(|status| {
                let (next, end) = (place.next, place.next);
                let taken = PartitionStatus { next, end, last_event_at: None };
                status.partitions.insert(partition, taken);
                status.superseded.remove(&partition);
            });
            self.places.insert(partition, place);
        }
        self.goes_on();
        Ok(())
    }

    /// Lets the source refuse the position of another log before the fences are raised: a worker with a
    /// wrong log must not take partitions from the workers with the right one. One position is enough.
    async fn check_log(
        &mut self,
        target: Target<'_>,
        partitions: &[Partition],
        reader: &mut Reader,
    ) -> Result<(), Ended> {
        let database = self.context.database.clone();
        let stored = async || Ok(checkpoint::places(&database, target).await?);
        let stored = self.until_done(stored).await?;
        let known =
            |place: &Checkpoint| partitions.contains(&place.partition) && place.cursor().is_some();
        if let Some(place) = stored.into_iter().find(known) {
            self.start(reader, &place).await?;
            reader.stop(vec![place.partition]).await;
        }
        Ok(())
    }

    /// The status of a worker that neither waits nor has stopped.
    fn goes_on(&self) {
        match self.is_paused {
            true => self.status.change(|status| status.state = ProjectionState::Paused),
            false => self.status.running(),
        }
    }

    async fn start(&mut self, reader: &Reader, place: &Checkpoint) -> Result<(), Ended> {
        let mut attempt = 0;
        loop {
            let starting = reader.start(place.partition, place.cursor());
            match until_asked(&mut self.shutdown, starting).await? {
                Ok(()) => return Ok(()),
                Err(error) => {
                    attempt += 1;
                    self.wait_for_source(attempt, &error).await?;
                }
            }
        }
    }

    fn release(&mut self, partitions: &[Partition]) {
        self.forget(partitions);
        self.status.change(|status| {
            status.partitions.retain(|partition, _| !partitions.contains(partition));
            status.superseded.retain(|partition| !partitions.contains(partition));
            if status.superseded.is_empty() {
                self.retake_at = None;
            }
        });
    }

    fn forget(&mut self, partitions: &[Partition]) {
        self.places.retain(|partition, _| !partitions.contains(partition));
        self.parked.retain(|partition, _| !partitions.contains(partition));
        self.show_parked();
    }

    fn release_all(&mut self) {
        self.places.clear();
        // Shown until it is known of the partitions that come next.
        self.parked.clear();
        self.status.change(|status| {
            status.partitions.clear();
            status.superseded.clear();
        });
    }

    async fn wait_for_source(&mut self, attempt: u32, error: &ReadError) -> Result<(), Ended> {
        match error {
            ReadError::Unavailable { cause, .. } => {
                self.wait_because(attempt, &format!("the log is unavailable: {cause}")).await
            }
            ReadError::Diverged { .. } => Err(Ended::Stopped(error.to_string())),
        }
    }

    /// Says so in the status, and waits longer each time.
    async fn wait_because(&mut self, attempt: u32, reason: &str) -> Result<(), Ended> {
        self.has_waited = true;
        self.status.waiting(reason);
        self.status.measure_lag(self.context.clock.now());
        self.pause(attempt).await
    }

    async fn pause(&mut self, attempt: u32) -> Result<(), Ended> {
        let Context { config, clock, ids, .. } = &self.context;
        let delay = backoff(&**ids, attempt, config.retry_delay, config.retry_delay_max);
        until_asked(&mut self.shutdown, clock.sleep(delay)).await
    }

    fn configured_events_max(&self) -> usize {
        let config = &self.context.config;
        let most = match self.context.database {
            Database::Postgres(_) if self.role == Role::Next => config.rebuild_batch_events_max,
            Database::Postgres(_) => config.batch_events_max,
            Database::Sqlite(_) => config.sqlite_batch_events_max,
        };
        most.max(1)
    }
}

/// Runs until it is done or a shutdown is asked for; then it is dropped where it stands, which rolls
/// back what is open.
async fn until_asked<T>(
    shutdown: &mut watch::Receiver<bool>,
    run: impl Future<Output = T>,
) -> Result<T, Ended> {
    tokio::select! {
        biased;
        _ = shutdown.wait_for(|asked| *asked) => Err(Ended::Shutdown),
        done = run => Ok(done),
    }
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        match unavailable(&error) {
            Some(reason) => Self::Unavailable(reason),
            None if is_of_values(&error) => Self::Fault(Fault::somewhere(error)),
            None => Self::Fault(Fault::of_all(error)),
        }
    }
}

fn sorted(error: ApplyError) -> Failed {
    match error {
        ApplyError::Database(error) => error.into(),
        ApplyError::Fault(fault) => Failed::Fault(fault),
    }
}

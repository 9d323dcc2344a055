//! The loop of one projection.
//!
//! Subscribe, take partitions under a raised fence, apply rounds of batches, each in one transaction
//! with its checkpoints. What fails is sorted by whose fault it is: the database's and the source's
//! are waited for, for ever; an event's is narrowed to its commit, tried a few times, and then stops
//! this projection alone.

mod rounds;

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kafold_core::clock::backoff;
use kafold_core::store::ReadError;
use kafold_core::{Offset, Partition};
use kafold_migrations::Database;
use tokio::sync::watch;

use crate::checkpoint::{self, Place};
use crate::handler::{ApplyError, Fault, Handler, Target, panic_text};
use crate::reader::{Message, Reader, RoundLimit};
use crate::registry::{self, State};
use crate::status::{PartitionStatus, ProjectionState, SharedStatus};
use crate::transaction::is_unavailable;
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
    /// It cannot go on.
    Stopped(String),
}

/// Why a round is not committed.
enum Failed {
    Unavailable(String),
    Fault(Fault),
    /// A checkpoint is not where it was left.
    Superseded,
}

/// One projection at work.
pub(crate) struct Runner {
    handler: Arc<dyn Handler>,
    context: Context,
    status: SharedStatus,
    shutdown: watch::Receiver<bool>,
    generation: u32,
    places: HashMap<Partition, Place>,
    /// Most events in a round, between one batch of the source and the configured limit.
    events_max: usize,
    /// After a failure the source is read a commit at a time up to these offsets, so that everything
    /// before the event at fault is applied.
    careful_until: HashMap<Partition, Offset>,
    /// Whether the status says that the source cannot be read.
    source_complained: bool,
    /// Whether a group says who reads which partition.
    is_shared: bool,
    /// When to subscribe anew, after partitions were lost that the group has not taken away.
    retake_at: Option<Instant>,
}

impl Runner {
    pub(crate) fn new(
        handler: Arc<dyn Handler>,
        context: Context,
        status: SharedStatus,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        Self {
            handler,
            context,
            status,
            shutdown,
            generation: 0,
            places: HashMap::new(),
            events_max: 1,
            careful_until: HashMap::new(),
            source_complained: false,
            is_shared: false,
            retake_at: None,
        }
    }

    /// Runs until it is shut down or has to stop.
    pub(crate) async fn run(mut self) {
        let served = AssertUnwindSafe(self.serve()).catch_unwind().await;
        // Whatever a panic left is given up with the runner; the database has whole transactions.
        let ended = served.unwrap_or_else(|panic| Ended::Stopped(panic_text(&*panic)));
        match ended {
            Ended::Stopped(reason) => self.stop(reason).await,
            Ended::Shutdown | Ended::Again => {
                self.status.change(|status| {
                    status.state = ProjectionState::Down;
                    status.partitions.clear();
                });
            }
        }
    }

    async fn serve(&mut self) -> Ended {
        if let Err(ended) = self.register().await {
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

    async fn stop(mut self, reason: String) {
        tracing::error!(projection = self.status.name(), reason, "projection has stopped");
        self.status.change(|status| {
            status.state = ProjectionState::Stopped(reason.clone());
            status.last_error = Some(reason.clone());
            status.partitions.clear();
        });
        if self.generation == 0 {
            // Not registered: what the database says is of another worker.
            return;
        }
        let mut attempt = 0;
        let name = self.handler.definition().name.clone();
        loop {
            let Context { database, clock, .. } = &self.context;
            let now = clock.now();
            let written =
                registry::set_state(database, &name, State::Stopped, Some(&reason), now).await;
            let Err(error) = written else { return };
            tracing::warn!(projection = name, %error, "cannot write down that it has stopped");
            attempt += 1;
            if self.pause(attempt).await.is_err() {
                return;
            }
        }
    }

    async fn register(&mut self) -> Result<(), Ended> {
        let mut attempt = 0;
        loop {
            let Context { database, clock, .. } = &self.context;
            let (handler, now) = (&*self.handler, clock.now());
            let registered = registry::register(database, handler, now);
            let error = match until_asked(&mut self.shutdown, registered).await? {
                Ok(generation) => {
                    self.generation = generation;
                    self.status.change(|status| status.generation = generation);
                    return Ok(());
                }
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
            match self.receive(&mut reader).await? {
                Message::Assigned(partitions) => self.take(&partitions, &reader).await?,
                Message::Revoked(partitions) => self.release(&partitions),
                Message::Round(round) => self.work_off(round).await?,
                Message::Closed => {
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
        let batch_events_max = source_max.min(self.configured_events_max());
        self.events_max = match self.context.database {
            Database::Postgres(_) => self.configured_events_max(),
            Database::Sqlite(_) => batch_events_max,
        };
        let mut attempt = 0;
        loop {
            let name = self.status.name().to_owned();
            let subscribing = self.context.source.subscribe(&name, batch_events_max);
            match until_asked(&mut self.shutdown, subscribing).await? {
                Ok(subscription) => {
                    self.is_shared = subscription.is_shared();
                    self.retake_at = None;
                    return Ok(Reader::new(subscription, self.context.clock.clone()));
                }
                Err(error) => {
                    attempt += 1;
                    self.wait_for_source(attempt, &error).await?;
                }
            }
        }
    }

    async fn receive(&mut self, reader: &mut Reader) -> Result<Message, Ended> {
        let limit = RoundLimit {
            events_max: self.events_max,
            bytes_max: self.context.config.batch_bytes_max,
            idle: self.context.config.idle_checkpoint_interval,
        };
        loop {
            let calm = self.context.clock.sleep(SOURCE_CALM);
            let now = self.context.clock.instant();
            let retake = self.retake_at.map(|at| at.saturating_duration_since(now));
            let retake = self.context.clock.sleep(retake.unwrap_or_default());
            let message = tokio::select! {
                biased;
                _ = self.shutdown.wait_for(|asked| *asked) => return Err(Ended::Shutdown),
                message = reader.next(limit) => message,
                () = retake, if self.retake_at.is_some() => return Err(Ended::Again),
                () = calm, if self.source_complained => {
                    self.source_complained = false;
                    self.status.running();
                    continue;
                }
            };
            match message {
                Ok(message) => {
                    if std::mem::take(&mut self.source_complained) {
                        self.status.running();
                    }
                    return Ok(message);
                }
                Err(ReadError::Unavailable { cause, .. }) => {
                    self.source_complained = true;
                    self.status.waiting(&format!("the log is unavailable: {cause}"));
                }
                Err(diverged) => return Err(Ended::Stopped(diverged.to_string())),
            }
        }
    }

    /// Makes the partitions this worker's own, and lets the source go on where SQL says.
    async fn take(&mut self, partitions: &[Partition], reader: &Reader) -> Result<(), Ended> {
        let mut attempt = 0;
        let places = loop {
            let Context { database, clock, .. } = &self.context;
            let target = Target { name: self.status.name(), generation: self.generation };
            let taking = checkpoint::take(database, target, partitions, clock.now());
            match until_asked(&mut self.shutdown, taking).await? {
                Ok(places) => break places,
                Err(error) if is_unavailable(&error) => {
                    attempt += 1;
                    self.wait_because(attempt, &unavailable(&error)).await?;
                }
                Err(error) => return Err(Ended::Stopped(error.to_string())),
            }
        };
        for place in places {
            let partition = place.partition;
            self.start(reader, &place).await?;
            self.status.change(|status| {
                let (next, end) = (place.next, place.next);
                let taken = PartitionStatus { next, end, last_event_at: None };
                status.partitions.insert(partition, taken);
                status.superseded.remove(&partition);
            });
            self.places.insert(partition, place);
        }
        self.status.running();
        Ok(())
    }

    async fn start(&mut self, reader: &Reader, place: &Place) -> Result<(), Ended> {
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
        self.places.retain(|partition, _| !partitions.contains(partition));
        self.status.change(|status| {
            status.partitions.retain(|partition, _| !partitions.contains(partition));
            status.superseded.retain(|partition| !partitions.contains(partition));
            if status.superseded.is_empty() {
                self.retake_at = None;
            }
        });
    }

    fn release_all(&mut self) {
        self.places.clear();
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
        match is_unavailable(&error) {
            true => Self::Unavailable(unavailable(&error)),
            false => Self::Fault(Fault::somewhere(error)),
        }
    }
}

fn sorted(error: ApplyError) -> Failed {
    match error {
        ApplyError::Database(error) => error.into(),
        ApplyError::Fault(fault) => Failed::Fault(fault),
    }
}

fn unavailable(error: &sqlx::Error) -> String {
    format!("the database is unavailable: {error}")
}

//! The loop of one projection.
//!
//! Subscribe, take partitions under a raised fence, apply rounds of batches, each in one transaction
//! with its checkpoints. What fails is sorted by whose fault it is: the database's and the source's
//! are waited for, for ever; an event's is narrowed to its commit, tried a few times, and then stops
//! this projection alone.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use kafold_core::clock::backoff;
use kafold_core::store::{Batch, ReadError};
use kafold_core::{Offset, Partition};
use kafold_migrations::Database;
use tokio::sync::watch;

use crate::checkpoint::{self, Place, Step};
use crate::handler::{ApplyError, Fault, Handler, Target, panic_text};
use crate::projection::ProjectionBatch;
use crate::reader::{Message, Reader, RoundLimit};
use crate::registry::{self, State};
use crate::status::{PartitionStatus, ProjectionState, SharedStatus};
use crate::transaction::{OpenTransaction, is_unavailable};
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
            let message = tokio::select! {
                biased;
                _ = self.shutdown.wait_for(|asked| *asked) => return Err(Ended::Shutdown),
                message = reader.next(limit) => message,
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
        });
    }

    fn release_all(&mut self) {
        self.places.clear();
        self.status.change(|status| status.partitions.clear());
    }

    /// Applies a round, in halves when it fails, down to the batch at fault.
    async fn work_off(&mut self, round: ProjectionBatch) -> Result<(), Ended> {
        let mut todo = vec![round];
        while let Some(mut round) = todo.pop() {
            let Some(fault) = self.apply(&mut round).await? else { continue };
            tracing::warn!(projection = self.status.name(), fault.reason, "a batch failed");
            let count = round.batches().len();
            if count > 1 {
                let tail = round.split_off(count / 2);
                todo.extend([tail, round]);
            } else {
                self.narrow(round, fault).await?;
            }
        }
        self.leave_care()
    }

    /// One batch of the source fails. If it holds more than one commit it is read again a commit at
    /// a time; one commit is tried again a few times.
    async fn narrow(&mut self, mut round: ProjectionBatch, fault: Fault) -> Result<(), Ended> {
        let Some(batch) = round.batches().first() else { return Ok(()) };
        if !is_one_commit(batch) && self.careful_until.is_empty() {
            self.careful_until.insert(batch.partition, batch.next.next);
            return Err(Ended::Again);
        }
        let mut reason = fault.reason;
        if fault.at.is_none() {
            reason = format!("{}: {reason}", show_commit(batch));
        }
        for attempt in 1..self.context.config.fault_attempts_max {
            self.wait_because(attempt, &reason).await?;
            match self.apply(&mut round).await? {
                Some(fault) => tracing::debug!(fault.reason, attempt, "failed again"),
                None => return Ok(()),
            }
        }
        Err(Ended::Stopped(reason))
    }

    /// Back to large batches once what failed is behind.
    fn leave_care(&mut self) -> Result<(), Ended> {
        if self.careful_until.is_empty() {
            return Ok(());
        }
        let places = &self.places;
        self.careful_until.retain(|partition, until| {
            places.get(partition).is_some_and(|place| place.next < *until)
        });
        if self.careful_until.is_empty() { Err(Ended::Again) } else { Ok(()) }
    }

    /// Applies the round, waiting out what is the database's fault. Answers the fault if it is not.
    async fn apply(&mut self, round: &mut ProjectionBatch) -> Result<Option<Fault>, Ended> {
        let mut attempt = 0;
        loop {
            self.prune(round)?;
            if round.batches().is_empty() {
                return Ok(None);
            }
            match self.transact(round).await {
                Ok(()) => return Ok(None),
                Err(Failed::Fault(fault)) => return Ok(Some(fault)),
                Err(Failed::Superseded) => self.reconcile(&mut attempt).await?,
                Err(Failed::Unavailable(reason)) => {
                    attempt += 1;
                    self.wait_because(attempt, &reason).await?;
                    // The answer of a commit may have been lost: what is there decides.
                    self.reconcile(&mut attempt).await?;
                }
            }
        }
    }

    /// Leaves out what is not this worker's any more, and what is applied already.
    fn prune(&self, round: &mut ProjectionBatch) -> Result<(), Ended> {
        let mut expected: HashMap<Partition, Offset> = HashMap::new();
        let mut gap = None;
        round.batches_mut().retain(|batch| {
            let Some(place) = self.places.get(&batch.partition) else { return false };
            let at = expected.entry(batch.partition).or_insert(place.next);
            if batch.next.next <= *at {
                return false;
            }
            // The beginning of a log may be above 0.
            let begins = place.cursor().is_none() && *at == place.next;
            if batch.from != *at && !(begins && batch.from > *at) {
                gap = Some((batch.partition, *at, batch.from));
            }
            *at = batch.next.next;
            true
        });
        let Some((partition, at, from)) = gap else { return Ok(()) };
        Err(Ended::Stopped(format!(
            "the source went on at {partition}:{from} where {partition}:{at} was next"
        )))
    }

    async fn transact(&mut self, round: &ProjectionBatch) -> Result<(), Failed> {
        let Context { clock, config, .. } = &self.context;
        let (clock, timeout) = (clock.clone(), config.transaction_timeout);
        let begun = clock.instant();
        let (steps, held) = tokio::select! {
            biased;
            done = self.commit(round) => done?,
            () = clock.sleep(timeout) => {
                let reason = format!("a transaction was not through within {timeout:?}");
                return Err(Failed::Unavailable(reason));
            }
        };
        let took = clock.instant().saturating_duration_since(begun);
        self.advanced(steps);
        self.status.measure(round.count(), took, clock.now());
        self.adapt(held);
        Ok(())
    }

    /// The transaction. Answers how long it was open.
    async fn commit(&self, round: &ProjectionBatch) -> Result<(Vec<Step>, Duration), Failed> {
        let Context { database, clock, .. } = &self.context;
        let target = Target { name: self.status.name(), generation: self.generation };
        let has_events = round.count() > 0;
        let work = match has_events {
            true => Some(self.handler.prepare(round).map_err(Failed::Fault)?),
            false => None,
        };
        let steps = self.steps(round);
        let mut open = OpenTransaction::begin(database).await?;
        let begun = clock.instant();
        let tx = &mut open.lend();
        // First, so that a worker that takes the partition now waits for this transaction.
        if !checkpoint::advance(tx, target, &steps, clock.now()).await? {
            open.rollback().await?;
            return Err(Failed::Superseded);
        }
        if let Some(work) = work {
            work.apply(target, tx).await.map_err(sorted)?;
            checkpoint::announce(tx, target, &steps).await?;
        }
        open.commit().await?;
        Ok((steps, clock.instant().saturating_duration_since(begun)))
    }

    /// One step a partition, over all its batches.
    fn steps(&self, round: &ProjectionBatch) -> Vec<Step> {
        let mut steps: BTreeMap<Partition, Step> = BTreeMap::new();
        for batch in round.batches() {
            let Some(place) = self.places.get(&batch.partition) else { continue };
            let step = steps.entry(batch.partition).or_insert_with(|| Step {
                partition: batch.partition,
                from: place.next,
                fence: place.fence,
                to: batch.next.clone(),
                end: batch.end,
                last_event_at: None,
            });
            step.to = batch.next.clone();
            step.end = step.end.max(batch.end);
            let last = batch.events.last().map(|event| event.metadata.recorded_at);
            step.last_event_at = last.or(step.last_event_at);
        }
        steps.into_values().collect()
    }

    fn advanced(&mut self, steps: Vec<Step>) {
        self.status.change(|status| {
            status.state = ProjectionState::Running;
            for step in &steps {
                let partition = status.partitions.entry(step.partition).or_default();
                partition.next = step.to.next;
                partition.end = step.end.max(step.to.next);
                partition.last_event_at = step.last_event_at.or(partition.last_event_at);
            }
        });
        for step in steps {
            if let Some(place) = self.places.get_mut(&step.partition) {
                place.next = step.to.next;
                place.state = step.to.state;
            }
        }
    }

    /// Keeps transactions on SQLite within their time: the log's writer waits for them.
    fn adapt(&mut self, held: Duration) {
        if matches!(self.context.database, Database::Postgres(_)) {
            return;
        }
        let limit = self.context.config.sqlite_transaction_max;
        if held > limit {
            self.events_max = (self.events_max / 2).max(1);
        } else if held < limit / 2 {
            self.events_max = (self.events_max * 2).min(self.configured_events_max());
        }
    }

    /// Learns from the database what became of the partitions: one under another fence is lost, one
    /// that moved has moved.
    async fn reconcile(&mut self, attempt: &mut u32) -> Result<(), Ended> {
        let found = loop {
            let target = Target { name: self.status.name(), generation: self.generation };
            let looking = checkpoint::places(&self.context.database, target);
            match until_asked(&mut self.shutdown, looking).await? {
                Ok(found) => break found,
                Err(error) if is_unavailable(&error) => {
                    *attempt += 1;
                    self.wait_because(*attempt, &unavailable(&error)).await?;
                }
                Err(error) => return Err(Ended::Stopped(error.to_string())),
            }
        };
        let found: HashMap<_, _> =
            found.into_iter().map(|place| (place.partition, place)).collect();
        let mut lost = Vec::new();
        for place in self.places.values_mut() {
            match found.get(&place.partition) {
                Some(now) if now.fence == place.fence => place.clone_from(now),
                _ => lost.push(place.partition),
            }
        }
        if lost.is_empty() {
            return Ok(());
        }
        tracing::warn!(projection = self.status.name(), ?lost, "another worker took partitions");
        self.places.retain(|partition, _| !lost.contains(partition));
        self.status.change(|status| {
            status.state = ProjectionState::Running;
            status.partitions.retain(|partition, _| !lost.contains(partition));
            status.superseded.extend(lost);
        });
        Ok(())
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

fn is_one_commit(batch: &Batch) -> bool {
    let commit = |event: &kafold_core::RecordedEvent| (event.stream.clone(), event.command_id);
    let mut commits = batch.events.iter().map(commit);
    let Some(first) = commits.next() else { return true };
    commits.all(|commit| commit == first)
}

fn show_commit(batch: &Batch) -> String {
    match (batch.events.first(), batch.events.last()) {
        (Some(first), Some(last)) => format!(
            "commit {} to {} (versions {} to {} of {})",
            first.position, last.position, first.version, last.version, first.stream
        ),
        _ => format!("partition {} at {}", batch.partition, batch.from),
    }
}

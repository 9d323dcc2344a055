//! Rounds of batches into the database: the transaction, and what follows when it fails.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Batch;
use kafold_core::{Offset, Partition, RecordedEvent, projecting, trace};
use kafold_migrations::Database;
use tracing::{Instrument, Span};

use super::{Ended, Failed, Role, Runner, sorted};
use crate::checkpoint::{self, Step};
use crate::clock_step::{ClockStep, ClockSteps};
use crate::config::FaultPolicy;
use crate::handler::{Fault, Memory, Target, Work};
use crate::projection::ProjectionBatch;
use crate::status::ProjectionState;
use crate::supervisor::ATTEMPT_LAG_MAX;
use crate::transaction::OpenTransaction;
use crate::worker::Context;

/// How many times longer transactions on SQLite may take where the log is on Kafka.
const LOG_ELSEWHERE: u32 = 10;
/// Which part of their timeout transactions on PostgreSQL may take.
const TIMEOUT_SHARE: u32 = 8;

impl Runner {
    /// Applies a round, in halves when it fails, down to the batch at fault.
    pub(super) async fn work_off(&mut self, round: ProjectionBatch) -> Result<(), Ended> {
        let mut todo = vec![round];
        while let Some(mut round) = todo.pop() {
            let Some(fault) = self.apply(&mut round).await? else {
                // Freed by another thread, while this one is at the next round.
                drop(tokio::spawn(async move { drop(round) }));
                continue;
            };
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
        let Some(batch) = round.batches().next() else { return Ok(()) };
        if !is_one_commit(batch) && self.careful_until.is_empty() {
            self.careful_until.insert(batch.partition, batch.next.next);
            return Err(Ended::Again);
        }
        let mut reason = fault.reason.clone();
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
        match self.context.config.fault_policy {
            FaultPolicy::Park if fault.parks => self.park(round, fault.at, reason).await,
            _ => Err(Ended::Stopped(reason)),
        }
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
    pub(super) async fn apply(
        &mut self,
        round: &mut ProjectionBatch,
    ) -> Result<Option<Fault>, Ended> {
        let mut attempt = 0;
        let mut aside = Vec::new();
        loop {
            self.prune(round)?;
            if round.parts().is_empty() {
                return Ok(None);
            }
            self.set_aside(round, &mut aside)?;
            let span = self.span_of(round);
            let transacted = self.transact(round, &aside).instrument(span.clone()).await;
            if let Err(failed) = &transacted {
                trace::failed(&span, failed.name());
            }
            match transacted {
                Ok(()) => return Ok(None),
                Err(Failed::Fault(fault)) => return Ok(Some(fault)),
                Err(Failed::Superseded) => self.reconcile().await?,
                Err(Failed::Unavailable(reason)) => {
                    attempt += 1;
                    self.wait_because(attempt, &reason).await?;
                    // The answer of a commit may have been lost: what is there decides.
                    self.reconcile().await?;
                }
            }
        }
    }

    /// The span of one attempt to apply the round, linked to what led to its events. Advances of the log
    /// without events are not worth one.
    fn span_of(&self, round: &ProjectionBatch) -> Span {
        use tracing::field::Empty;
        if round.count() == 0 {
            return Span::none();
        }
        let projection = self.status.name();
        let consumer = self.consumer.as_ref();
        let kafka = consumer.map(|_| "kafka");
        let operation = consumer.map(|_| "process");
        let span = tracing::info_span!(
            parent: None,
            "process",
            otel.name = format!("process {}", consumer.map_or(projection, |it| &it.topic)),
            otel.kind = "consumer",
            messaging.system = kafka,
            messaging.operation.name = operation,
            messaging.operation.type = operation,
            messaging.destination.name = consumer.map(|it| it.topic.as_str()),
            messaging.consumer.group.name = consumer.and_then(|it| it.group.as_deref()),
            messaging.batch.message_count = round.count() as i64,
            projection,
            generation = i64::from(self.generation.0),
            error.type = Empty,
            otel.status_code = Empty,
        );
        let origins = round.events().filter_map(|event| event.metadata.trace_parent.as_deref());
        trace::link(&span, origins);
        span
    }

    /// Leaves out what is not this worker's any more, and what is applied already.
    fn prune(&self, round: &mut ProjectionBatch) -> Result<(), Ended> {
        let mut expected: HashMap<Partition, Offset> = HashMap::new();
        let mut gap = None;
        round.parts_mut().retain(|part| {
            let batch = part.batch();
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

    async fn transact(
        &mut self,
        round: &ProjectionBatch,
        aside: &[RecordedEvent],
    ) -> Result<(), Failed> {
        let Context { clock, config, .. } = &self.context;
        let (clock, timeout) = (clock.clone(), config.transaction_timeout);
        let begun = clock.instant();
        let name = Arc::from(self.status.name());
        // Only what is committed is remembered.
        let rows_max = config.remembered_rows_max;
        let memory = self.memory.take();
        let mut memory = memory.or_else(|| self.handler.memory(HashSet::new(), rows_max));
        let (steps, held) = tokio::select! {
            biased;
            done = projecting::on_behalf_of(&name, self.commit(round, aside, memory.as_mut())) => done?,
            () = clock.sleep(timeout) => {
                let reason = format!("a transaction was not through within {timeout:?}");
                return Err(Failed::Unavailable(reason));
            }
        };
        let took = clock.instant().saturating_duration_since(begun);
        self.memory = memory;
        self.have_parked(aside);
        self.advanced(steps);
        self.status.measure(round.count(), took, clock.now());
        self.adapt(held);
        Ok(())
    }

    /// The transaction. Answers how long it was open.
    async fn commit(
        &self,
        round: &ProjectionBatch,
        aside: &[RecordedEvent],
        memory: Option<&mut Memory>,
    ) -> Result<(Vec<Step>, Duration), Failed> {
        let Context { database, clock, .. } = &self.context;
        let target = self.target();
        let has_events = round.count() > 0;
        let places = &self.places;
        let clock_of = |partition| places.get(&partition).map(|place| place.clock);
        let work = match has_events {
            true => Some(self.handler.prepare(round, &clock_of).map_err(Failed::Fault)?),
            false => None,
        };
        let clocks = work.as_deref().and_then(Work::clock_steps);
        let steps = self.steps(round, clocks);
        let mut open = match self.is_forgettable(&steps) {
            true => OpenTransaction::begin_forgettable(database).await?,
            false => OpenTransaction::begin(database).await?,
        };
        let begun = clock.instant();
        // What the next generation has applied, queries do not see.
        let is_told = self.role == Role::Live && (has_events || !aside.is_empty());
        // First, so that a worker that takes the partition now waits for this transaction.
        let tx = &mut open.lend();
        let moved = checkpoint::advance(tx, target, &steps, is_told, clock.now()).await?;
        if !moved && !mutant::active(Mutant::NoFence) {
            open.rollback().await?;
            return Err(Failed::Superseded);
        }
        if mutant::active(Mutant::CheckpointOutsideTransaction) {
            open.commit().await?;
            open = OpenTransaction::begin(database).await?;
        }
        let tx = &mut open.lend();
        if let Some(work) = work {
            work.apply(target, tx, memory).await.map_err(sorted)?;
        }
        self.insert_parked(tx, aside).await?;
        open.commit().await?;
        Ok((steps, clock.instant().saturating_duration_since(begun)))
    }

    /// Whether a crash of the database may take these steps back: nobody reads the rows of a generation
    /// that is too far behind to be switched to, and the switch waits for the disk with all of them.
    fn is_forgettable(&self, steps: &[Step]) -> bool {
        let left = steps.iter().map(|step| step.end.0.saturating_sub(step.to.next.0)).sum::<u64>();
        self.role == Role::Next && left > ATTEMPT_LAG_MAX
    }

    /// One step a partition, over all its batches.
    fn steps(&self, round: &ProjectionBatch, clocks: Option<&ClockSteps>) -> Vec<Step> {
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
                clock: clocks.map(|clocks| {
                    let unchanged = ClockStep { clock: place.clock.clock, ..ClockStep::default() };
                    clocks.get(&batch.partition).copied().unwrap_or(unchanged)
                }),
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
                if let Some(step) = step.clock {
                    place.clock.clock = step.clock;
                    place.clock.late_rows += step.counts.late_rows.unsigned_abs();
                }
            }
        }
    }

    /// Keeps transactions within their time: rounds shrink when one took longer, and grow while there is
    /// room.
    fn adapt(&mut self, held: Duration) {
        let limit = self.transaction_max();
        if held > limit {
            self.events_max = (self.events_max / 2).max(1);
        } else if held < limit / 2 {
            self.events_max = (self.events_max * 2).min(self.configured_events_max());
        }
    }

    /// On SQLite the log's writer waits for transactions, if the log is in the file, else other
    /// projections only. On PostgreSQL nobody does, but a round that times out would do so again.
    fn transaction_max(&self) -> Duration {
        let config = &self.context.config;
        match (&self.context.database, &self.consumer) {
            (Database::Postgres(_), _) => config.transaction_timeout / TIMEOUT_SHARE,
            (Database::Sqlite(_), None) => config.sqlite_transaction_max,
            (Database::Sqlite(_), Some(_)) => config.sqlite_transaction_max * LOG_ELSEWHERE,
        }
    }

    /// Learns from the database what became of the partitions: one under another fence is lost, one
    /// that moved has moved. One that went back, in a crash or to a replica that had not heard of the
    /// last commits, is read again from there.
    pub(super) async fn reconcile(&mut self) -> Result<(), Ended> {
        let (database, name) = (self.context.database.clone(), self.status.name().to_owned());
        let target = Target { name: &name, generation: self.generation };
        let found =
            self.until_done(async || Ok(checkpoint::places(&database, target).await?)).await?;
        let found: HashMap<_, _> =
            found.into_iter().map(|place| (place.partition, place)).collect();
        if self.places.keys().any(|partition| !found.contains_key(partition)) {
            // No worker takes a checkpoint away, but a switch or an abort takes all of them.
            return Err(Ended::Retired);
        }
        let (mut lost, mut back) = (Vec::new(), Vec::new());
        for place in self.places.values_mut() {
            match found.get(&place.partition) {
                Some(now) if now.fence == place.fence => {
                    if now.next < place.next {
                        back.push(place.partition);
                    }
                    place.clone_from(now);
                }
                _ => lost.push(place.partition),
            }
        }
        if !back.is_empty() {
            tracing::warn!(projection = self.status.name(), ?back, "the database forgot commits");
            return Err(Ended::Again);
        }
        self.status.change(|status| {
            for place in self.places.values() {
                if let Some(partition) = status.partitions.get_mut(&place.partition) {
                    partition.next = place.next;
                    partition.end = partition.end.max(place.next);
                }
            }
        });
        if lost.is_empty() {
            return Ok(());
        }
        tracing::warn!(projection = self.status.name(), ?lost, "another worker took partitions");
        self.forget(&lost);
        if self.is_shared {
            let delay = self.context.config.retake_delay;
            self.retake_at = Some(self.context.clock.instant() + delay);
        }
        self.status.change(|status| {
            status.state = ProjectionState::Running;
            status.partitions.retain(|partition, _| !lost.contains(partition));
            status.superseded.extend(lost);
        });
        Ok(())
    }
}

fn is_one_commit(batch: &Batch) -> bool {
    let commit = |event: &RecordedEvent| (event.stream.clone(), event.command_id);
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

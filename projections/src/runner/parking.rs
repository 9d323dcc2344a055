//! Setting aside what fails: the stream of the event at fault, with all that follows in it, until an
//! operator has it retried or skipped.
//!
//! The parked rows are written in the transaction that moves the checkpoint past them, and taken away
//! in the transaction that applies them, under the checkpoint's lock: no event is ever both or
//! neither. While a stream has a parked event, its later events are parked behind it.

use std::collections::HashMap;

use kafold_core::store::{Batch, Cursor};
use kafold_core::{Offset, Partition, Position, RecordedEvent, StreamId};

use super::{Ended, Failed, Runner, sorted, until_asked};
use crate::checkpoint;
use crate::handler::{Fault, Target};
use crate::index::RowError;
use crate::parked::{self, ParkedEvent};
use crate::projection::{Part, ProjectionBatch};
use crate::transaction::{OpenTransaction, Transaction};

/// Events of a parked stream that are applied in one transaction, unless one commit has more.
const RETRY_EVENTS_MAX: usize = 1_000;

/// What is set aside of one partition.
#[derive(Debug, Default)]
pub(super) struct Parked {
    /// The streams, with how many events of each.
    streams: HashMap<StreamId, u64>,
    events: u64,
}

impl Parked {
    pub(super) fn add(&mut self, stream: StreamId, events: u64) {
        *self.streams.entry(stream).or_default() += events;
        self.events += events;
    }

    /// So many events of the stream are parked no more.
    fn take(&mut self, stream: &StreamId, events: u64) {
        let Some(left) = self.streams.get_mut(stream) else { return };
        let taken = events.min(*left);
        *left -= taken;
        self.events -= taken;
    }

    /// Nothing of the stream is parked any more.
    fn remove(&mut self, stream: &StreamId) {
        self.events -= self.streams.remove(stream).unwrap_or_default();
    }
}

/// How far a retry has come.
enum Retried {
    /// All of the stream is applied.
    Whole,
    /// So many events of it are applied, and there are more.
    Part(u64),
    /// Nobody asks for it any more.
    Unasked,
}

impl Runner {
    pub(super) fn target(&self) -> Target<'_> {
        Target { name: self.status.name(), generation: self.generation }
    }

    /// Parks the stream of one commit that fails for good.
    pub(super) async fn park(
        &mut self,
        mut round: ProjectionBatch,
        at: Option<Position>,
        reason: String,
    ) -> Result<(), Ended> {
        let Some(first) = round.events().next() else { return Err(Ended::Stopped(reason)) };
        let (stream, partition) = (first.stream.clone(), first.position.partition);
        let at = at.unwrap_or(first.position);
        let limit = self.context.config.parked_streams_max;
        // Another worker has taken the partition, and finds out for itself.
        let Some(parked) = self.parked.get_mut(&partition) else { return Ok(()) };
        if parked.streams.len() >= limit {
            return Err(Ended::Stopped(format!(
                "{limit} streams of partition {partition} are parked, and no more may be \
                 (parked_streams_max): mend what fails, have them retried with `kafold parked retry`, \
                 then `kafold projections resume {}`; last, {reason}",
                self.status.name()
            )));
        }
        tracing::error!(projection = self.status.name(), %stream, reason, "stream is parked");
        parked.add(stream, 0);
        self.parking = Some((at, reason));
        let applied = self.apply(&mut round).await;
        self.parking = None;
        match applied? {
            None => Ok(()),
            // What is set aside touches no handler.
            Some(fault) => Err(Ended::Stopped(fault.reason)),
        }
    }

    /// Moves out of the round what belongs to parked streams, and drops what is to be skipped.
    pub(super) fn set_aside(
        &self,
        round: &mut ProjectionBatch,
        aside: &mut Vec<RecordedEvent>,
    ) -> Result<(), Ended> {
        // What an earlier attempt has moved, and has been applied since or is another's now.
        aside.retain(|event| {
            let place = self.places.get(&event.position.partition);
            place.is_some_and(|place| event.position.offset >= place.next)
        });
        for part in round.parts_mut() {
            self.skip(part);
            let Some(parked) = self.parked.get(&part.batch().partition) else { continue };
            if !parked.streams.is_empty() {
                let events = &mut part.batch_mut().events;
                aside.extend(events.extract_if(.., |e| parked.streams.contains_key(&e.stream)));
            }
        }
        if aside.is_empty() {
            return Ok(());
        }
        let limit = self.context.config.parked_events_max;
        for (partition, parked) in &self.parked {
            let more = aside.iter().filter(|event| event.position.partition == *partition).count();
            if more > 0 && parked.events + more as u64 > limit {
                return Err(Ended::Stopped(format!(
                    "{} events of partition {partition} are parked, and no more than {limit} may be \
                     (parked_events_max): have them retried or skipped with `kafold parked`, then \
                     `kafold projections resume {}`",
                    parked.events,
                    self.status.name()
                )));
            }
        }
        Ok(())
    }

    /// Leaves out the commits of which an operator skips an event.
    fn skip(&self, part: &mut Part) {
        let Some(desired) = self.desired.as_ref().filter(|desired| !desired.skips.is_empty())
        else {
            return;
        };
        let is_skipped = |at| desired.skips.contains(&(self.generation, at));
        let skipped = parked::leave_out(&mut part.batch_mut().events, is_skipped);
        if !skipped.is_empty() {
            tracing::warn!(projection = self.status.name(), ?skipped, "commits are skipped");
        }
    }

    pub(super) async fn insert_parked(
        &self,
        tx: &mut Transaction<'_>,
        aside: &[RecordedEvent],
    ) -> Result<(), sqlx::Error> {
        let Self { context, parking, .. } = self;
        let attempts = context.config.fault_attempts_max;
        for event in aside {
            let error = parking.as_ref().filter(|(at, _)| *at == event.position);
            let error = error.map(|(_, reason)| (reason.as_str(), attempts));
            parked::insert(tx, self.target(), event, error, context.clock.now()).await?;
        }
        Ok(())
    }

    /// Counts what is parked now.
    pub(super) fn have_parked(&mut self, aside: &[RecordedEvent]) {
        for event in aside {
            if let Some(parked) = self.parked.get_mut(&event.position.partition) {
                parked.add(event.stream.clone(), 1);
            }
        }
        if !aside.is_empty() {
            self.show_parked();
        }
    }

    pub(super) fn show_parked(&self) {
        let streams = self.parked.values().map(|parked| parked.streams.len()).sum();
        let events = self.parked.values().map(|parked| parked.events).sum();
        self.status.change(|status| {
            (status.parked_streams, status.parked_events) = (streams, events);
        });
    }

    /// Applies a parked stream from its first event on, as an operator asks: all of it, or up to an
    /// event that fails again.
    pub(super) async fn retry(
        &mut self,
        partition: Partition,
        stream: &StreamId,
    ) -> Result<(), Ended> {
        let (mut attempt, mut events_max, mut is_begun) = (0, RETRY_EVENTS_MAX, false);
        // Its rows change beside what rounds remember.
        self.memory = None;
        while self.places.contains_key(&partition) {
            let retrying = self.retry_part(partition, stream, events_max, is_begun);
            match until_asked(&mut self.shutdown.clone(), retrying).await? {
                Ok(Retried::Part(events)) => {
                    self.unpark(partition, |parked| parked.take(stream, events));
                    is_begun = true;
                }
                Ok(Retried::Whole) => {
                    self.unpark(partition, |parked| parked.remove(stream));
                    tracing::info!(projection = self.status.name(), %stream, "parked no more");
                    return Ok(());
                }
                Ok(Retried::Unasked) => return Ok(()),
                Err(Failed::Superseded) => self.reconcile().await?,
                Err(Failed::Unavailable(reason)) => {
                    attempt += 1;
                    self.wait_because(attempt, &reason).await?;
                }
                // What comes before the event at fault is applied first.
                Err(Failed::Fault(_)) if events_max > 1 => events_max = 1,
                Err(Failed::Fault(fault)) => {
                    return self.retry_failed(partition, stream, fault).await;
                }
            }
        }
        Ok(())
    }

    /// One transaction of a retry; what was asked for at its beginning is done to the end.
    async fn retry_part(
        &self,
        partition: Partition,
        stream: &StreamId,
        events_max: usize,
        is_begun: bool,
    ) -> Result<Retried, Failed> {
        let Some(place) = self.places.get(&partition) else { return Err(Failed::Superseded) };
        let mut open = OpenTransaction::begin(&self.context.database).await?;
        let tx = &mut open.lend();
        if !checkpoint::hold(tx, self.target(), place).await? {
            open.rollback().await?;
            return Err(Failed::Superseded);
        }
        let head = self.head(tx, stream, events_max).await?;
        let Some((first, last)) = head.events.first().zip(head.events.last()) else {
            // Applied before, by a transaction whose outcome was not known.
            open.rollback().await?;
            return Ok(Retried::Whole);
        };
        if !first.retry && !is_begun {
            open.rollback().await?;
            return Ok(Retried::Unasked);
        }
        let (last, count) = (last.event.position.offset, head.events.len() as u64);
        let batch = batch_of(partition, head.events);
        if batch.count() > 0 {
            // The clock at the place of a parked event is not known: all of them are in time.
            let work = self.handler.prepare(&batch, &|_| None).map_err(Failed::Fault)?;
            work.apply(self.target(), tx, None).await.map_err(sorted)?;
            if let Some(steps) = work.clock_steps() {
                checkpoint::count(tx, self.target(), steps).await?;
            }
        }
        parked::delete(tx, self.target(), stream, last).await?;
        open.commit().await?;
        Ok(if head.is_whole { Retried::Whole } else { Retried::Part(count) })
    }

    /// The first whole commits of a parked stream: as many as are within the limit, or one.
    async fn head(
        &self,
        tx: &mut Transaction<'_>,
        stream: &StreamId,
        events_max: usize,
    ) -> Result<Head, Failed> {
        let mut limit = events_max.max(2);
        loop {
            let mut events = parked::head(tx, self.target(), stream, limit).await?;
            let is_all = events.len() < limit;
            let ends: Vec<usize> = ends_of_commits(&events, is_all).collect();
            let within = ends.iter().rev().find(|end| **end <= events_max);
            let Some(end) = within.or(ends.first()).copied() else {
                if is_all {
                    return Ok(Head { events, is_whole: true });
                }
                limit *= 2;
                continue;
            };
            let is_whole = is_all && end == events.len();
            events.truncate(end);
            return Ok(Head { events, is_whole });
        }
    }

    fn unpark(&mut self, partition: Partition, change: impl FnOnce(&mut Parked)) {
        self.parked.get_mut(&partition).map(change);
        self.show_parked();
    }

    /// Writes down that a parked event has failed again.
    async fn retry_failed(
        &mut self,
        partition: Partition,
        stream: &StreamId,
        fault: Fault,
    ) -> Result<(), Ended> {
        tracing::warn!(projection = self.status.name(), %stream, fault.reason, "still parked");
        let Some(place) = self.places.get(&partition).cloned() else { return Ok(()) };
        let (database, name) = (self.context.database.clone(), self.status.name().to_owned());
        let target = Target { name: &name, generation: self.generation };
        let at = fault.at.map(|at| at.offset);
        let write = async || {
            let mut open = OpenTransaction::begin(&database).await?;
            let tx = &mut open.lend();
            // Who has taken the partition meanwhile tries for itself.
            if checkpoint::hold(tx, target, &place).await? {
                parked::failed_again(tx, target, stream, at, &fault.reason).await?;
            }
            Ok(open.commit().await?)
        };
        self.until_done(write).await
    }
}

/// The beginning of a parked stream.
struct Head {
    events: Vec<ParkedEvent>,
    /// Whether there is no more of the stream.
    is_whole: bool,
}

/// Behind how many events a commit ends; the last one's end is only known when all are there.
fn ends_of_commits(events: &[ParkedEvent], is_all: bool) -> impl DoubleEndedIterator<Item = usize> {
    (1..=events.len()).filter(move |end| match events.get(*end) {
        Some(next) => next.event.command_id != events[end - 1].event.command_id,
        None => is_all,
    })
}

/// Events as a handler gets them; no checkpoint is made of it.
fn batch_of(partition: Partition, events: Vec<ParkedEvent>) -> ProjectionBatch {
    let kept = events.into_iter().filter(|parked| !parked.skipped).map(|parked| parked.event);
    let events: Vec<RecordedEvent> = kept.collect();
    let from = events.first().map_or(Offset(0), |event| event.position.offset);
    let next = Cursor { next: from, state: String::new() };
    let mut batch = ProjectionBatch::default();
    batch.parts_mut().push(Batch { partition, from, events, next, end: from }.into());
    batch
}

impl From<RowError> for Failed {
    fn from(error: RowError) -> Self {
        match error {
            RowError::Database(error) => error.into(),
            RowError::Read(error) => Self::Fault(Fault::of_all(error)),
        }
    }
}

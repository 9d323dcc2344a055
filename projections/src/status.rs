//! How a projection fares, as its worker sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold_core::{Offset, Partition, Position};
use metrics::{counter, gauge, histogram};
use tokio::sync::watch;

use crate::generation::Generation;

/// How a projection fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectionStatus {
    /// Its name.
    pub name: String,
    /// The build of its tables that it writes; 0 before it is registered.
    pub generation: Generation,
    /// What it does.
    pub state: ProjectionState,
    /// The last failure, also when it is over.
    pub last_error: Option<String>,
    /// The partitions that this worker holds.
    pub partitions: BTreeMap<Partition, PartitionStatus>,
    /// Partitions that another worker has taken since; this one does not take them back by itself.
    pub superseded: BTreeSet<Partition>,
    /// Streams in these partitions that are set aside, because an event of theirs failed.
    pub parked_streams: usize,
    /// The events of those streams that wait to be retried or skipped.
    pub parked_events: u64,
    /// The next generation, while it is being built.
    pub next: Option<Box<ProjectionStatus>>,
}

/// What a projection does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProjectionState {
    /// It is being registered, or waits for its first partition.
    Starting,
    /// It applies events as they come.
    Running,
    /// An operator has paused it.
    Paused,
    /// It waits, for the sentence's reason, and goes on by itself.
    Waiting(String),
    /// It has stopped, for the sentence's reason, until an operator resumes it or it is started again.
    Stopped(String),
    /// The worker was shut down.
    Down,
}

impl fmt::Display for ProjectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Waiting(reason) => write!(f, "waiting: {reason}"),
            Self::Stopped(reason) => write!(f, "stopped: {reason}"),
            Self::Down => f.write_str("shut down"),
        }
    }
}

/// Where a projection stands in one partition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PartitionStatus {
    /// Everything below it is applied.
    pub next: Offset,
    /// The end of the partition as last seen.
    pub end: Offset,
    /// When the last applied event was recorded.
    pub last_event_at: Option<DateTime<Utc>>,
}

impl PartitionStatus {
    /// Records of the log that are not applied yet.
    pub fn lag_records(&self) -> u64 {
        self.end.0.saturating_sub(self.next.0)
    }

    /// How old the last applied event is while there are more to come, which is at least the age of
    /// the next one; zero when there are none.
    pub fn lag(&self, now: DateTime<Utc>) -> Duration {
        let behind = self.lag_records() > 0;
        let age = self.last_event_at.filter(|_| behind).map(|at| now - at);
        age.and_then(|age| age.to_std().ok()).unwrap_or_default()
    }
}

impl ProjectionStatus {
    fn new(name: &str, generation: Generation) -> Self {
        Self {
            name: name.to_owned(),
            generation,
            state: ProjectionState::Starting,
            last_error: None,
            partitions: BTreeMap::new(),
            superseded: BTreeSet::new(),
            parked_streams: 0,
            parked_events: 0,
            next: None,
        }
    }

    fn of(&self, generation: Generation) -> Option<&Self> {
        let next = self.next.as_deref();
        [Some(self), next].into_iter().flatten().find(|status| status.generation == generation)
    }

    fn of_mut(&mut self, generation: Generation) -> Option<&mut Self> {
        match self.generation == generation {
            true => Some(self),
            false => self.next.as_deref_mut().filter(|next| next.generation == generation),
        }
    }

    /// Records of the log that are not applied yet, in the partitions that this worker holds.
    pub fn lag_records(&self) -> u64 {
        self.partitions.values().map(PartitionStatus::lag_records).sum()
    }

    /// Whether everything up to and including the position is applied; `None` when this worker does
    /// not hold the partition.
    pub fn has_applied(&self, position: Position) -> Option<bool> {
        let status = self.partitions.get(&position.partition)?;
        Some(status.next > position.offset)
    }

    /// What keeps it from being ready, one sentence an entry.
    pub fn complaints(&self) -> Vec<String> {
        let name = &self.name;
        let mut complaints = Vec::new();
        match &self.state {
            ProjectionState::Waiting(reason) => {
                complaints.push(format!("projection {name} waits: {reason}"));
            }
            ProjectionState::Stopped(reason) => {
                complaints.push(format!("projection {name} has stopped: {reason}"));
            }
            ProjectionState::Starting => complaints.push(format!("projection {name} is starting")),
            ProjectionState::Running | ProjectionState::Paused | ProjectionState::Down => {}
        }
        if !self.superseded.is_empty() {
            let partitions: Vec<_> = self.superseded.iter().map(ToString::to_string).collect();
            let partitions = partitions.join(", ");
            complaints.push(format!(
                "projection {name}: another worker has taken partitions {partitions}; restart this \
                 one to take them back"
            ));
        }
        complaints
    }
}

/// The generation of a worker that has not registered yet.
const UNREGISTERED: Generation = Generation(0);

/// The status of a projection, as the worker of one generation changes it and everyone watches it.
/// What the worker of a generation that is neither live nor next has to tell is nobody's concern.
#[derive(Clone)]
pub(crate) struct SharedStatus {
    name: Arc<str>,
    generation: Generation,
    sender: Arc<watch::Sender<ProjectionStatus>>,
}

impl SharedStatus {
    pub(crate) fn new(name: &str) -> Self {
        let sender = watch::Sender::new(ProjectionStatus::new(name, UNREGISTERED));
        Self { name: name.into(), generation: UNREGISTERED, sender: Arc::new(sender) }
    }

    /// For a worker of the live generation that is about to start.
    pub(crate) fn starting(&self) -> Self {
        self.sender.send_modify(|status| {
            let next = status.next.take();
            *status = ProjectionStatus::new(&self.name, UNREGISTERED);
            status.next = next;
        });
        Self { generation: UNREGISTERED, ..self.clone() }
    }

    /// For a worker of the next generation that is about to start.
    pub(crate) fn building(&self, generation: Generation) -> Self {
        let next = ProjectionStatus::new(&self.name, generation);
        self.sender.send_modify(|status| status.next = Some(Box::new(next)));
        Self { generation, ..self.clone() }
    }

    /// The live generation is known.
    pub(crate) fn registered(&mut self, generation: Generation) {
        self.change(|status| status.generation = generation);
        self.generation = generation;
    }

    /// The next generation has become the live one.
    pub(crate) fn promoted(&self) {
        self.sender.send_modify(|status| {
            if status.next.as_ref().is_some_and(|next| next.generation == self.generation) {
                *status = *status.next.take().expect("it was just there");
            }
        });
    }

    /// The next generation is given up.
    pub(crate) fn abandoned(&self, generation: Generation) {
        self.sender.send_modify(|status| drop(status.next.take_if(|n| n.generation == generation)));
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn now(&self) -> ProjectionStatus {
        self.sender.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<ProjectionStatus> {
        self.sender.subscribe()
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut ProjectionStatus)) {
        self.sender.send_if_modified(|status| {
            let own = status.of_mut(self.generation);
            own.map(change).is_some()
        });
    }

    pub(crate) fn running(&self) {
        self.sender.send_if_modified(|status| {
            let Some(status) = status.of_mut(self.generation) else { return false };
            let was = std::mem::replace(&mut status.state, ProjectionState::Running);
            if matches!(was, ProjectionState::Waiting(_)) {
                tracing::info!(projection = &*self.name, "projection goes on");
            }
            was != ProjectionState::Running
        });
    }

    pub(crate) fn waiting(&self, reason: &str) {
        counter!("kafold_projection_retries_total", "projection" => self.name.clone()).increment(1);
        // An outage is told once, however often it is tried again.
        let waits = ProjectionState::Waiting(reason.to_owned());
        if self.sender.borrow().of(self.generation).is_none_or(|status| status.state == waits) {
            tracing::debug!(projection = &*self.name, reason, "projection still waits");
            return;
        }
        tracing::warn!(projection = &*self.name, reason, "projection waits");
        self.change(|status| {
            status.state = waits;
            status.last_error = Some(reason.to_owned());
        });
    }

    /// Tells the metrics of a batch that is committed, and the lag behind it.
    pub(crate) fn measure(&self, events: usize, took: Duration, now: DateTime<Utc>) {
        let name = || self.name.clone();
        if self.sender.borrow().generation != self.generation {
            counter!("kafold_projection_rebuilt_events_total", "projection" => name())
                .increment(events as u64);
            return self.measure_lag(now);
        }
        counter!("kafold_projection_events_total", "projection" => name()).increment(events as u64);
        histogram!("kafold_projection_batch_events", "projection" => name()).record(events as f64);
        let seconds = histogram!("kafold_projection_batch_seconds", "projection" => name());
        seconds.record(took.as_secs_f64());
        self.measure_lag(now);
    }

    /// Tells the metrics of the lag of all partitions this worker holds.
    pub(crate) fn measure_lag(&self, now: DateTime<Utc>) {
        let (status, name) = (self.sender.borrow(), || self.name.clone());
        let longest = status.partitions.values().map(|partition| partition.lag(now)).max();
        let records = status.lag_records() as f64;
        gauge!("kafold_projection_lag_records", "projection" => name()).set(records);
        let seconds = longest.unwrap_or_default().as_secs_f64();
        gauge!("kafold_projection_lag_seconds", "projection" => name()).set(seconds);
        let streams = status.parked_streams as f64;
        gauge!("kafold_projection_parked_streams", "projection" => name()).set(streams);
        let events = status.parked_events as f64;
        gauge!("kafold_projection_parked_events", "projection" => name()).set(events);
        let stopped = matches!(status.state, ProjectionState::Stopped(_));
        gauge!("kafold_projection_stopped", "projection" => name()).set(f64::from(stopped));
        let left = status.next.as_ref().map_or(0, |next| next.lag_records()) as f64;
        gauge!("kafold_projection_rebuild_lag_records", "projection" => name()).set(left);
    }
}

//! How a projection fares, as its worker sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold_core::{Offset, Partition, Position};
use metrics::{counter, gauge, histogram};
use tokio::sync::watch;

/// How a projection fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectionStatus {
    /// Its name.
    pub name: String,
    /// The build of its tables that it writes; 0 before it is registered.
    pub generation: u32,
    /// What it does.
    pub state: ProjectionState,
    /// The last failure, also when it is over.
    pub last_error: Option<String>,
    /// The partitions that this worker holds.
    pub partitions: BTreeMap<Partition, PartitionStatus>,
    /// Partitions that another worker has taken since; this one does not take them back by itself.
    pub superseded: BTreeSet<Partition>,
}

/// What a projection does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProjectionState {
    /// It is being registered, or waits for its first partition.
    Starting,
    /// It applies events as they come.
    Running,
    /// It waits, for the sentence's reason, and goes on by itself.
    Waiting(String),
    /// It has stopped, for the sentence's reason, until it is started again.
    Stopped(String),
    /// The worker was shut down.
    Down,
}

impl fmt::Display for ProjectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Running => f.write_str("running"),
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
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            generation: 0,
            state: ProjectionState::Starting,
            last_error: None,
            partitions: BTreeMap::new(),
            superseded: BTreeSet::new(),
        }
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
            ProjectionState::Running | ProjectionState::Down => {}
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

/// The status as its worker changes it and everyone else watches it.
#[derive(Clone)]
pub(crate) struct SharedStatus {
    name: Arc<str>,
    sender: Arc<watch::Sender<ProjectionStatus>>,
}

impl SharedStatus {
    pub(crate) fn new(name: &str) -> Self {
        let sender = watch::Sender::new(ProjectionStatus::new(name));
        Self { name: name.into(), sender: Arc::new(sender) }
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
        self.sender.send_modify(change);
    }

    pub(crate) fn running(&self) {
        self.sender.send_if_modified(|status| {
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
        if self.sender.borrow().state == ProjectionState::Waiting(reason.to_owned()) {
            tracing::debug!(projection = &*self.name, reason, "projection still waits");
            return;
        }
        tracing::warn!(projection = &*self.name, reason, "projection waits");
        self.change(|status| {
            status.state = ProjectionState::Waiting(reason.to_owned());
            status.last_error = Some(reason.to_owned());
        });
    }

    /// Tells the metrics of a batch that is committed, and the lag behind it.
    pub(crate) fn measure(&self, events: usize, took: Duration, now: DateTime<Utc>) {
        let label = || ("projection", self.name.clone());
        let (name, value) = label();
        counter!("kafold_projection_events_total", name => value).increment(events as u64);
        let (name, value) = label();
        histogram!("kafold_projection_batch_events", name => value).record(events as f64);
        let (name, value) = label();
        histogram!("kafold_projection_batch_seconds", name => value).record(took.as_secs_f64());
        self.measure_lag(now);
    }

    /// Tells the metrics of the lag of all partitions this worker holds.
    pub(crate) fn measure_lag(&self, now: DateTime<Utc>) {
        let status = self.sender.borrow();
        let records: u64 = status.partitions.values().map(PartitionStatus::lag_records).sum();
        let longest = status.partitions.values().map(|partition| partition.lag(now)).max();
        let name = || self.name.clone();
        gauge!("kafold_projection_lag_records", "projection" => name()).set(records as f64);
        let seconds = longest.unwrap_or_default().as_secs_f64();
        gauge!("kafold_projection_lag_seconds", "projection" => name()).set(seconds);
    }
}

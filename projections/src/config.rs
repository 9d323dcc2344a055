//! The limits of projection workers, all with names and defaults.

use std::time::Duration;

/// What becomes of an event that fails for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultPolicy {
    /// The event and all later ones of its stream are set aside, until an operator has them retried or
    /// skipped; other streams go on.
    Park,
    /// The projection stops, until it is told to go on or started again.
    Stop,
}

/// Limits of a [`ProjectionWorker`](crate::ProjectionWorker).
#[derive(Debug, Clone)]
pub struct ProjectionConfig {
    /// Most events in one transaction on PostgreSQL, except that a commit is never split. Reached
    /// only by a worker that is behind: an idle one applies each event as it comes. Batches begin with
    /// 500, grow while transactions are short, and shrink when one took longer than an
    /// eighth of [`transaction_timeout`](Self::transaction_timeout). Default 5 000.
    pub batch_events_max: usize,
    /// The same on SQLite, where a transaction holds up the log's own writer. Default 1 000.
    pub sqlite_batch_events_max: usize,
    /// How long one transaction on SQLite may hold the write gate: batches shrink when one took
    /// longer, and grow again when there is room. Ten times that where the log is on Kafka, so that only
    /// other projections wait. Default 20 ms.
    pub sqlite_transaction_max: Duration,
    /// Payload bytes after which a batch is closed, however few its events, and about as many are read
    /// ahead meanwhile. Default 16 MiB.
    pub batch_bytes_max: usize,
    /// Rows of one [`ReadModel`](crate::ReadModel) that are kept in memory, of those that events change
    /// again and again, so that they need not be read for it; only of models that are not
    /// [`SHARED`](crate::ReadModel::SHARED). Default 100 000.
    pub remembered_rows_max: usize,
    /// How long a transaction may take at most before its connection is given up as dead and the
    /// batch tried again. Default 60 s.
    pub transaction_timeout: Duration,
    /// How often an event whose handler fails is tried before [`fault_policy`](Self::fault_policy)
    /// decides. Default 5.
    pub fault_attempts_max: u32,
    /// What becomes of an event that fails for good. Default: its stream is parked.
    pub fault_policy: FaultPolicy,
    /// Most streams of one partition that are parked: a projection that fails everywhere stops, and
    /// says so, instead of setting the whole log aside. Default 1 000.
    pub parked_streams_max: usize,
    /// Most events of one partition that are parked; then the projection stops until some are retried
    /// or skipped. Default 100 000.
    pub parked_events_max: u64,
    /// How often it is looked up what operators ask, in one short statement. Default 100 ms.
    pub control_poll_interval: Duration,
    /// Most events in one transaction of a rebuild on PostgreSQL, and about as many are read ahead
    /// meanwhile. Default 50 000.
    pub rebuild_batch_events_max: usize,
    /// The first wait after a failure; it doubles, with jitter. Default 100 ms.
    pub retry_delay: Duration,
    /// The longest wait after a failure. Waits for a database go on for ever. Default 5 s.
    pub retry_delay_max: Duration,
    /// How long an advance of the log without events may wait to be written down. Default 1 s.
    pub idle_checkpoint_interval: Duration,
    /// How often `wait_for` looks into the database for another process's progress. Default 50 ms.
    pub wait_poll_interval: Duration,
    /// Longest wait of [`wait_for`](crate::Projections::wait_for) and of a query
    /// [`after`](crate::Query::after) one's own write. Default 10 s.
    pub wait_timeout: Duration,
    /// When a worker takes back a partition that another one took though their group gives it to this
    /// one: the group needs the time to tell the other. Default 10 s.
    pub retake_delay: Duration,
    /// How long [`Projections::shutdown`](crate::Projections::shutdown) waits for transactions under
    /// way before it abandons them, which loses nothing. Default 10 s.
    pub shutdown_timeout: Duration,
}

impl Default for ProjectionConfig {
    fn default() -> Self {
        Self {
            batch_events_max: 5_000,
            sqlite_batch_events_max: 1_000,
            sqlite_transaction_max: Duration::from_millis(20),
            batch_bytes_max: 16 << 20,
            remembered_rows_max: 100_000,
            transaction_timeout: Duration::from_secs(60),
            fault_attempts_max: 5,
            fault_policy: FaultPolicy::Park,
            parked_streams_max: 1_000,
            parked_events_max: 100_000,
            control_poll_interval: Duration::from_millis(100),
            rebuild_batch_events_max: 50_000,
            retry_delay: Duration::from_millis(100),
            retry_delay_max: Duration::from_secs(5),
            idle_checkpoint_interval: Duration::from_secs(1),
            wait_poll_interval: Duration::from_millis(50),
            wait_timeout: Duration::from_secs(10),
            retake_delay: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(10),
        }
    }
}

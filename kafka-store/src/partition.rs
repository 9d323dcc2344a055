//! What the threads and tasks of one process share about a partition.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kafold_core::{Offset, Partition};
use rdkafka::error::KafkaError;
use tokio::sync::Notify;

use crate::fold::Checkpoint;
use crate::tail::Tail;
use crate::writer::Status;

/// One partition, as everybody but its writer sees it.
pub(crate) struct Shared {
    pub(crate) partition: Partition,
    tail: Mutex<Tail>,
    standing: Mutex<Standing>,
    /// The tail has grown, or the writer began.
    pub(crate) advanced: Notify,
}

/// How far the writer of a partition is.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    pub(crate) status: Status,
    /// Where it last read on from.
    pub(crate) read: Offset,
    /// The end of the log, as far as it knew then.
    pub(crate) end: Offset,
    /// What the partition waits for before its writer can begin.
    pub(crate) waiting: Option<String>,
    /// Whether the index has contradicted the log.
    pub(crate) index: Option<String>,
}

impl Shared {
    pub(crate) fn new(partition: Partition) -> Self {
        Self {
            partition,
            tail: Mutex::new(Tail::new(partition, Checkpoint::default())),
            standing: Mutex::new(Standing {
                status: Status::CatchingUp,
                read: Offset(0),
                end: Offset(0),
                waiting: Some("its place in the log is being looked up".into()),
                index: None,
            }),
            advanced: Notify::new(),
        }
    }

    pub(crate) fn tail(&self) -> MutexGuard<'_, Tail> {
        // No call panics half way through a change.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the partition takes no commands, in one sentence.
    pub(crate) fn reason(&self) -> Option<String> {
        let partition = self.partition;
        let standing = self.standing();
        if let Some(reason) = &standing.index {
            return Some(format!("partition {partition}: {reason}"));
        }
        let why = match (&standing.status, &standing.waiting) {
            (Status::Owning, _) => return None,
            (Status::Superseded(owner), _) => format!("superseded by {owner}"),
            (Status::Halted(cause), _) => format!("halted: {cause}"),
            (Status::Stopped, _) => "stopped".into(),
            (_, Some(waiting)) => waiting.clone(),
            (Status::CatchingUp, None) => {
                format!("replaying, at offset {} of {}", standing.read, standing.end)
            }
            (Status::Claiming, None) => "its claim is on its way into the log".into(),
        };
        Some(format!("partition {partition}: {why}"))
    }
}

/// Whether the store can reach any broker, as far as known, and whether it still runs.
#[derive(Default)]
pub(crate) struct Reach {
    down: AtomicBool,
    why: Mutex<String>,
    closed: AtomicBool,
    /// A client has lost all connections: somebody should look whether that lasts.
    pub(crate) suspected: Notify,
}

impl Reach {
    /// Why nothing can be written, if so.
    pub(crate) fn down(&self) -> Option<String> {
        if self.closed.load(Ordering::Acquire) {
            return Some("the store is closed".into());
        }
        let down = self.down.load(Ordering::Acquire);
        let why = || self.why.lock().unwrap_or_else(PoisonError::into_inner).clone();
        down.then(|| format!("no kafka broker can be reached: {}", why()))
    }

    pub(crate) fn lost(&self, why: &KafkaError) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = why.to_string();
        if !self.down.swap(true, Ordering::AcqRel) {
            tracing::warn!(%why, "no kafka broker can be reached");
        }
    }

    pub(crate) fn found(&self) {
        if self.down.load(Ordering::Acquire) && self.down.swap(false, Ordering::AcqRel) {
            tracing::info!("kafka can be reached again");
        }
    }

    /// The driver has ended, for whatever reason: nothing is taken any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

//! What the threads and tasks of one process share about a partition.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use kafold_core::{Offset, Partition, ReadError, StreamId};
use rdkafka::error::KafkaError;
use tokio::sync::{Notify, watch};

use crate::fold::Checkpoint;
use crate::guard::shown;
use crate::tail::Tail;
use crate::wire::{ClaimId, Epoch};
use crate::writer::Status;

/// One partition, as everybody but its writer sees it.
pub(crate) struct Shared {
    pub(crate) partition: Partition,
    tail: Mutex<Tail>,
    standing: Mutex<Standing>,
    /// The tail has as much as is waited for, or what it has is not to wait any longer.
    pub(crate) advanced: Notify,
    /// Whether this process is to own it. A hint for routing: the writer has the last word.
    assigned: AtomicBool,
    /// What is in the tail is to be handed over now, without waiting for more.
    pub(crate) handing_over: AtomicBool,
    /// The index stands below what the tail has forgotten: it is to be looked at.
    pub(crate) index_lost: AtomicBool,
    /// Notifies after a check of the index's heads, whole or damaged.
    pub(crate) checked: Notify,
    /// The claim under which this process owns the partition, for those who handle its commands.
    pub(crate) hold: watch::Sender<Option<Hold>>,
}

/// The claim under which this process owns a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) claim: ClaimId,
    /// Where the commands that may not be settled began when the claim was accepted.
    pub(crate) resume: Offset,
    /// The log says that all commands below it are settled.
    pub(crate) settled: Offset,
}

/// How this process came to own a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TakeOver {
    pub(crate) epoch: Epoch,
    pub(crate) since: DateTime<Utc>,
    /// From being assigned to the first accepted claim.
    pub(crate) took: Duration,
}

/// A difference between the tables of the index and the log. The reason is a sentence with the
/// table and the remedy.
#[derive(Debug, Clone)]
pub(crate) struct Damage {
    pub(crate) reason: String,
    pub(crate) found_in: DamageSite,
}

/// The place of the damage, which is also the place to check for a repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DamageSite {
    /// The heads of all streams.
    Heads,
    /// The number of rows of events.
    Rows,
    /// The rows of one stream.
    Stream(StreamId),
    /// The rows below those that are being written.
    Feed,
}

impl DamageSite {
    fn is_same_kind(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
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
    /// The reason for which the index takes no events, unless it is damage.
    pub(crate) index: Option<String>,
    /// The differences between the tables of the index and the log: at most one per kind of
    /// [`DamageSite`], the first found first.
    damages: Vec<Damage>,
    /// Why forwarded commands are not handled.
    pub(crate) commands: Option<String>,
    /// The newest failure while the writer does not own the partition.
    pub(crate) trouble: Option<String>,
    /// The time since which the writer has not owned the partition.
    pub(crate) since: Option<DateTime<Utc>>,
    pub(crate) assigned_at: Option<Instant>,
    pub(crate) take_over: Option<TakeOver>,
}

impl Shared {
    pub(crate) fn new(partition: Partition) -> Self {
        Self {
            partition,
            tail: Mutex::new(Tail::new(partition, Checkpoint::default())),
            standing: Mutex::new(Standing::new(None)),
            advanced: Notify::new(),
            assigned: AtomicBool::new(false),
            handing_over: AtomicBool::new(false),
            index_lost: AtomicBool::new(false),
            checked: Notify::new(),
            hold: watch::Sender::new(None),
        }
    }

    /// The partition is to be ours: everything about it begins anew.
    pub(crate) fn assign(&self, now: Instant, at: DateTime<Utc>) {
        *self.standing() = Standing { since: Some(at), ..Standing::new(Some(now)) };
        self.handing_over.store(false, Ordering::Release);
        self.assigned.store(true, Ordering::Release);
    }

    /// It is not to be ours any more; what is under way may still be settled.
    pub(crate) fn unassign(&self) {
        self.assigned.store(false, Ordering::Release);
    }

    pub(crate) fn is_assigned(&self) -> bool {
        self.assigned.load(Ordering::Acquire)
    }

    /// Whether commands of the partition are best decided here.
    pub(crate) fn is_local(&self) -> bool {
        self.is_assigned() && !matches!(self.standing().status, Status::Superseded(_))
    }

    /// Nothing of it is held here any more.
    pub(crate) fn forget(&self) {
        *self.standing() = Standing::new(None);
        *self.tail() = Tail::new(self.partition, Checkpoint::default());
    }

    pub(crate) fn tail(&self) -> MutexGuard<'_, Tail> {
        // No call panics half way through a change.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores damage of the index until the damage is repaired. Wakes the loads which wait for a
    /// check.
    pub(crate) fn damaged(&self, found_in: DamageSite, error: &ReadError) {
        let reason = match error {
            // The partition's health names the partition in the same words.
            ReadError::Diverged { cause, .. } => format!("its index: {cause}"),
            other => other.to_string(),
        };
        let mut standing = self.standing();
        let known =
            standing.damages.iter_mut().find(|known| known.found_in.is_same_kind(&found_in));
        if known.as_ref().is_none_or(|known| known.reason != reason) {
            tracing::error!(partition = %self.partition, reason, "the index is damaged");
            let damage = Damage { reason, found_in };
            match known {
                Some(known) => *known = damage,
                None => standing.damages.push(damage),
            }
        }
        drop(standing);
        self.checked.notify_waiters();
    }

    /// Marks the index's place as lost and wakes the indexer.
    pub(crate) fn lose_index(&self) {
        self.index_lost.store(true, Ordering::Release);
        self.advanced.notify_one();
    }

    /// Marks the partition's start offset, and so the start of the tail, as known.
    pub(crate) fn placed(&self) {
        self.standing().waiting = None;
        self.checked.notify_waiters();
    }

    /// Waits until the partition's start offset is known.
    pub(crate) async fn wait_for_place(&self) {
        loop {
            let mut checked = pin!(self.checked.notified());
            checked.as_mut().enable();
            if self.standing().waiting.is_none() {
                return;
            }
            checked.await;
        }
    }

    /// Returns the first known difference between the tables of the index and the log.
    pub(crate) fn first_damage(&self) -> Option<Damage> {
        self.standing().damages.first().cloned()
    }

    /// Returns the stream with damaged rows, if one is known.
    pub(crate) fn damaged_stream(&self) -> Option<StreamId> {
        self.standing().damages.iter().find_map(|damage| match &damage.found_in {
            DamageSite::Stream(stream) => Some(stream.clone()),
            _ => None,
        })
    }

    /// Returns `true` if damage at this place is known.
    pub(crate) fn is_damaged_in(&self, site: &DamageSite) -> bool {
        self.standing().damages.iter().any(|damage| damage.found_in == *site)
    }

    /// Clears damage found at this place.
    pub(crate) fn mended(&self, site: &DamageSite) {
        let mut standing = self.standing();
        let before = standing.damages.len();
        standing.damages.retain(|damage| damage.found_in != *site);
        if before > 0 && standing.damages.is_empty() {
            tracing::info!(partition = %self.partition, "the index is whole again");
        }
    }

    /// Why the partition takes no commands, in one sentence.
    pub(crate) fn reason(&self) -> Option<String> {
        let partition = self.partition;
        let standing = self.standing();
        if !self.is_assigned() {
            return None;
        }
        let damage = standing.damages.first().map(|damage| &damage.reason);
        if let Some(reason) = damage.or(standing.index.as_ref()).or(standing.commands.as_ref()) {
            return Some(format!("partition {partition}: {reason}"));
        }
        let mut why = match (&standing.status, &standing.waiting) {
            (Status::Owning, _) => return None,
            (Status::Superseded(owner), _) => format!("superseded by {owner}"),
            (Status::Halted(cause), _) => format!("halted: {cause}"),
            (Status::Released, _) => "being handed over".into(),
            (_, Some(waiting)) => waiting.clone(),
            (Status::CatchingUp, None) => {
                format!("replaying, at offset {} of {}", standing.read, standing.end)
            }
            (Status::Claiming, None) => "its claim is on its way into the log".into(),
        };
        if let Some(since) = standing.since {
            why = format!("{why}, since {}", shown(since));
        }
        if let Some(trouble) = &standing.trouble {
            why = format!("{why}; its newest failure: {trouble}");
        }
        Some(format!("partition {partition}: {why}"))
    }
}

impl Standing {
    fn new(assigned_at: Option<Instant>) -> Self {
        Self {
            status: Status::CatchingUp,
            read: Offset(0),
            end: Offset(0),
            waiting: Some("its place in the log is being looked up".into()),
            index: None,
            damages: Vec::new(),
            commands: None,
            trouble: None,
            since: None,
            assigned_at,
            take_over: None,
        }
    }
}

/// Whether the store can reach any broker, as far as known, and whether it still runs.
#[derive(Default)]
pub(crate) struct Reach {
    down: AtomicBool,
    why: Mutex<String>,
    stopping: AtomicBool,
    closed: AtomicBool,
    /// A partition was taken or lost.
    pub(crate) ownership_changed: Notify,
    /// A client has lost all connections: somebody should look whether that lasts.
    pub(crate) suspected: Notify,
}

impl Reach {
    /// Why nothing can be written, if so.
    pub(crate) fn down(&self) -> Option<String> {
        if self.closed.load(Ordering::Acquire) {
            return Some("the store is closed".into());
        }
        if self.stopping.load(Ordering::Acquire) {
            return Some("the store is stopping".into());
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

    /// A graceful stop has handed everything over: nothing is taken any more.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// The driver has ended, for whatever reason: nothing is taken any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

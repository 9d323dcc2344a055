//! Which partitions this process is to own: follows the group, takes over what is assigned and hands
//! over what is revoked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use kafold_core::clock::within;
use kafold_core::{Clock, Partition};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::driver::{Driver, Message, Tenure};
use crate::forward::Inboxes;
use crate::indexer::Indexer;
use crate::membership::Rebalance;
use crate::partition::Shared;
use crate::verifier::Verifier;
use crate::writer::Status;

/// How often it is looked whether somebody has claimed what is held without the group's word.
const HELD_POLL: Duration = Duration::from_millis(100);
/// How often a hand-over looks whether the index has everything.
const DRAIN_POLL: Duration = Duration::from_millis(2);

/// Takes partitions over and hands them over.
pub(crate) struct Ownership {
    pub(crate) partitions: Vec<Arc<Shared>>,
    pub(crate) driver: Driver,
    pub(crate) indexer: Arc<Indexer>,
    pub(crate) inboxes: Arc<Inboxes>,
    pub(crate) verifier: Arc<Verifier>,
    pub(crate) clock: Arc<dyn Clock>,
    /// How long a hand-over may take before what is pending is given up.
    pub(crate) patience: Duration,
    tenures: AtomicU64,
    /// The tasks of each partition that is ours.
    tasks: Mutex<Vec<Vec<AbortHandle>>>,
}

impl Ownership {
    pub(crate) fn new(
        partitions: Vec<Arc<Shared>>,
        driver: Driver,
        indexer: Arc<Indexer>,
        inboxes: Arc<Inboxes>,
        verifier: Arc<Verifier>,
        clock: Arc<dyn Clock>,
        patience: Duration,
    ) -> Self {
        let tasks = Mutex::new(partitions.iter().map(|_| Vec::new()).collect());
        let tenures = AtomicU64::new(0);
        Self { partitions, driver, indexer, inboxes, verifier, clock, patience, tenures, tasks }
    }

    /// Does what the group says, until it says no more.
    pub(crate) async fn follow(
        self: Arc<Self>,
        mut rebalances: mpsc::UnboundedReceiver<Rebalance>,
    ) {
        // Held without the group's word: as long as it cannot be heard and nobody else claims them, they
        // are best served here.
        let mut held: Vec<Partition> = Vec::new();
        loop {
            let rebalance = tokio::select! {
                rebalance = rebalances.recv() => rebalance,
                () = self.clock.sleep(HELD_POLL), if !held.is_empty() => {
                    let claimed = held.extract_if(.., |partition| self.is_superseded(*partition));
                    let claimed: Vec<_> = claimed.collect();
                    self.hand_over(&claimed).await;
                    continue;
                }
            };
            let Some(rebalance) = rebalance else { return };
            match rebalance {
                Rebalance::Lost(partitions) => {
                    tracing::warn!(?partitions, "the group cannot be heard");
                    held.extend(partitions);
                }
                Rebalance::Assigned(partitions) => {
                    tracing::info!(?partitions, "assigned by the group");
                    held.retain(|partition| !partitions.contains(partition));
                    self.hand_over(&std::mem::take(&mut held)).await;
                    partitions.into_iter().for_each(|partition| self.take(partition));
                    self.driver.tell(Message::Joined);
                }
                Rebalance::Revoked { partitions, settled } => {
                    tracing::info!(?partitions, "revoked by the group");
                    self.hand_over(&partitions).await;
                    // Who lost the partition meanwhile waits no more.
                    let _ = settled.send(());
                }
            }
        }
    }

    fn is_superseded(&self, partition: Partition) -> bool {
        let shared = self.partitions.get(partition.0 as usize);
        shared.is_some_and(|shared| matches!(shared.standing().status, Status::Superseded(_)))
    }

    /// Every partition, whatever the group says.
    pub(crate) fn take_all(&self) {
        self.partitions.iter().for_each(|shared| self.take(shared.partition));
        self.driver.tell(Message::Joined);
    }

    /// Gives up every partition, within the patience.
    pub(crate) async fn hand_over_all(&self) {
        let all: Vec<_> = self.partitions.iter().map(|shared| shared.partition).collect();
        self.hand_over(&all).await;
    }

    fn take(&self, partition: Partition) {
        let Some(shared) = self.partitions.get(partition.0 as usize) else { return };
        if shared.is_assigned() {
            return;
        }
        let tenure = Tenure(self.tenures.fetch_add(1, Ordering::Relaxed) + 1);
        shared.assign(self.clock.instant(), self.clock.now());
        self.inboxes.open(partition);
        self.driver.tell(Message::Assign(partition, tenure));
        let feeding = tokio::spawn(Arc::clone(&self.indexer).run(Arc::clone(shared), tenure));
        let handling = tokio::spawn(Arc::clone(&self.inboxes).run(Arc::clone(shared), tenure));
        let verifying = tokio::spawn(Arc::clone(&self.verifier).watch_heads(Arc::clone(shared)));
        let tasks = [feeding, handling, verifying].map(|task| task.abort_handle()).to_vec();
        self.tasks()[partition.0 as usize] = tasks;
    }

    /// Settles what is pending and hands the index what it lacks; what is left after the patience is
    /// for the next owner to find in the log.
    pub(crate) async fn hand_over(&self, partitions: &[Partition]) {
        let deadline = self.clock.instant() + self.patience;
        let held = partitions.iter().filter_map(|p| self.partitions.get(p.0 as usize));
        let held = held.filter(|shared| shared.is_assigned());
        join_all(held.map(|shared| self.hand_over_one(shared, deadline))).await;
    }

    async fn hand_over_one(&self, shared: &Shared, deadline: Instant) {
        let partition = shared.partition;
        // New commands go to the next owner, and wait there.
        shared.unassign();
        let left = || deadline.saturating_duration_since(self.clock.instant());
        let settled = within(&*self.clock, left(), self.inboxes.drain(partition, shared)).await;
        let settled = settled.is_some();
        let (released, waiting) = oneshot::channel();
        self.driver.tell(Message::Release(partition, released));
        let released = within(&*self.clock, left(), waiting).await.is_some();
        self.driver.tell(Message::Abandon(partition));
        shared.handing_over.store(true, Ordering::Release);
        shared.advanced.notify_one();
        let mut indexed = shared.tail().events() == 0;
        while !indexed && !left().is_zero() {
            self.clock.sleep(DRAIN_POLL).await;
            indexed = shared.tail().events() == 0;
        }
        within(&*self.clock, left(), self.indexer.save_digests(shared, 1)).await;
        for task in std::mem::take(&mut self.tasks()[partition.0 as usize]) {
            task.abort();
        }
        shared.forget();
        tracing::info!(%partition, settled = settled && released, indexed, "partition handed over");
    }

    fn tasks(&self) -> std::sync::MutexGuard<'_, Vec<Vec<AbortHandle>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every task, however far it is.
    pub(crate) fn abort(&self) {
        self.tasks().iter_mut().flat_map(std::mem::take).for_each(|task| task.abort());
    }
}

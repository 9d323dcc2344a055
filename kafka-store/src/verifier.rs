//! Compares the tables of the stream index with each other and with the digests in this process's
//! memory. The first comparison follows the take-over of a partition. Loads wait for its result when no
//! digests were saved; later comparisons repeat.
//!
//! The database adds up the heads of a partition. The [`Tail`](crate::tail::Tail) has the digests,
//! which no other program can change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use kafold_core::clock::within;
use kafold_core::index::{IndexCount, IndexHeads, damaged};
use kafold_core::{Clock, Offset, ReadError, StreamIndex, Version};
use tokio::sync::{Notify, Semaphore};

use crate::loader::Loader;
use crate::partition::{DamageSite, Shared};
use crate::tail::HeadsFound;
use crate::writer::Status;

/// Least wait between two comparisons of the heads of one partition.
const HEADS_INTERVAL_MIN: Duration = Duration::from_secs(10);
/// Most partitions whose heads are added up at the same time.
const HEADS_QUERIES_MAX: usize = 4;
/// Least wait between two counts of all rows.
const ROWS_INTERVAL_MIN: Duration = Duration::from_secs(60);
/// Factor from a comparison's duration to the least wait before the next: comparisons use at most a
/// hundredth of a connection.
const INTERVAL_FACTOR: u32 = 100;
/// Least wait before another comparison of an index at an unexpected position, and the factor from
/// the comparison's duration to the wait.
const RETRY_WAIT: Duration = Duration::from_millis(20);
const RETRY_FACTOR: u32 = 10;
/// Wait before the rows are counted.
const ROWS_DELAY: Duration = Duration::from_millis(500);
/// Wait before a damaged index is looked at again.
const DAMAGED_WAIT: Duration = Duration::from_secs(2);
/// Longest time for which an index's position may exceed the end of the log read by this process. A
/// longer time counts as damage.
const AHEAD_PATIENCE: Duration = Duration::from_secs(10);

/// Compares the index of the partitions of one process.
pub(crate) struct Verifier {
    index: Arc<dyn StreamIndex>,
    loader: Arc<Loader>,
    partitions: Vec<Arc<Shared>>,
    clock: Arc<dyn Clock>,
    turns: Semaphore,
    /// Notified when partitions are taken.
    rows_due: Notify,
}

/// The state kept between two comparisons of heads with a mismatch.
#[derive(Default)]
struct Suspicion {
    /// The heads were whole once since this process took the partition.
    was_whole: bool,
    /// The index's position may have moved back without its heads. The heads must add up from this
    /// offset on.
    add_up_from: Option<Offset>,
    /// The time since which the index's position has exceeded the end of the log.
    ahead_since: Option<Instant>,
}

impl Verifier {
    /// Creates a verifier.
    pub(crate) fn new(
        index: Arc<dyn StreamIndex>,
        loader: Arc<Loader>,
        partitions: Vec<Arc<Shared>>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        let turns = Semaphore::new(HEADS_QUERIES_MAX);
        Arc::new(Self { index, loader, partitions, clock, turns, rows_due: Notify::new() })
    }

    /// Compares the heads of a partition while this process owns the partition. The caller ends the
    /// task by aborting.
    pub(crate) async fn watch_heads(self: Arc<Self>, shared: Arc<Shared>) {
        shared.wait_for_place().await;
        let mut suspicion = Suspicion::default();
        loop {
            // Loads need connections to the database, too. The semaphore is never closed.
            let turn = self.turns.acquire().await;
            let begun = self.clock.instant();
            let heads = self.index.heads(shared.partition).await;
            drop(turn);
            let taken = self.clock.instant().saturating_duration_since(begun);
            let wait = match heads {
                Ok(heads) => match self.judge(&shared, &heads, &mut suspicion) {
                    true => HEADS_INTERVAL_MIN.max(taken * INTERVAL_FACTOR),
                    false => RETRY_WAIT.max(taken * RETRY_FACTOR),
                },
                Err(error @ ReadError::Diverged { .. }) => {
                    shared.damaged(DamageSite::Heads, &error);
                    DAMAGED_WAIT
                }
                Err(ReadError::Unavailable { retry_after, .. }) => retry_after,
            };
            self.look_at_damaged_stream(&shared).await;
            let is_damaged = shared.first_damage().is_some();
            self.clock.sleep(if is_damaged { DAMAGED_WAIT } else { wait }).await;
        }
    }

    /// Judges the sums of the database. Returns `false` if the comparison must be repeated soon.
    fn judge(&self, shared: &Shared, heads: &IndexHeads, suspicion: &mut Suspicion) -> bool {
        let (found, start, end) = {
            let mut tail = shared.tail();
            (tail.check_heads(heads), tail.start(), tail.next().next)
        };
        let (partition, position) = (shared.partition, heads.position);
        let is_owning = matches!(shared.standing().status, Status::Owning);
        let error = match found {
            HeadsFound::Whole => {
                if !suspicion.was_whole {
                    self.rows_due.notify_one();
                }
                *suspicion = Suspicion { was_whole: true, ..Suspicion::default() };
                shared.mended(&DamageSite::Heads);
                shared.checked.notify_waiters();
                return true;
            }
            HeadsFound::Elsewhere if position < start => {
                shared.lose_index();
                return false;
            }
            // Another owner has fed the index, and this process has yet to read the log up to the
            // position.
            HeadsFound::Elsewhere if position <= end || !is_owning => return false,
            HeadsFound::Elsewhere => {
                let now = self.clock.instant();
                let since = *suspicion.ahead_since.get_or_insert(now);
                if now.saturating_duration_since(since) < AHEAD_PATIENCE {
                    return false;
                }
                let what = format!("its place is offset {position}, and the log ends at {end}");
                damaged(partition, "kafold_partition", what)
            }
            // An older copy of `kafold_partition` beside newer heads: the heads add up again after
            // the log has been fed again from the older position.
            HeadsFound::DamagedHeads if !suspicion.was_whole && !is_owning => return false,
            HeadsFound::DamagedHeads
                if !suspicion.was_whole && position < *suspicion.add_up_from.get_or_insert(end) =>
            {
                return false;
            }
            HeadsFound::DamagedHeads => {
                let table = self.index.heads_table();
                let what = format!("it is not what was written below offset {position}");
                let differs = || damaged(partition, table, what);
                heads.check(partition, table).err().unwrap_or_else(differs)
            }
            HeadsFound::DamagedTotals => {
                let what = format!("it is not what was written below offset {position}");
                damaged(partition, "kafold_partition", what)
            }
        };
        shared.damaged(DamageSite::Heads, &error);
        false
    }

    /// Reads the stream with the damaged rows again.
    async fn look_at_damaged_stream(&self, shared: &Shared) {
        let Some(stream) = shared.damaged_stream() else { return };
        let read = self.loader.read(shared.partition, &stream, Version::EMPTY);
        if read.try_for_each(|_| std::future::ready(Ok(()))).await.is_ok() {
            shared.mended(&DamageSite::Stream(stream));
        }
    }

    /// Counts the rows of all partitions after a take-over and then periodically. Reports only own
    /// partitions; other owners report theirs.
    pub(crate) async fn watch_rows(self: Arc<Self>) {
        let mut interval = Duration::MAX;
        loop {
            within(&*self.clock, interval, self.rows_due.notified()).await;
            // Partitions are taken several at a time.
            self.clock.sleep(ROWS_DELAY).await;
            let begun = self.clock.instant();
            match self.index.count().await {
                Ok(counts) => counts.iter().for_each(|count| self.judge_rows(count)),
                Err(error) => tracing::warn!(%error, "the rows of the index cannot be counted"),
            }
            let taken = self.clock.instant().saturating_duration_since(begun);
            interval = match self
                .partitions
                .iter()
                .any(|shared| shared.is_damaged_in(&DamageSite::Rows))
            {
                true => DAMAGED_WAIT.max(taken * RETRY_FACTOR),
                false => ROWS_INTERVAL_MIN.max(taken * INTERVAL_FACTOR),
            };
        }
    }

    fn judge_rows(&self, count: &IndexCount) {
        let shared = self.partitions.get(count.partition.0 as usize);
        let Some(shared) = shared.filter(|shared| shared.is_assigned()) else { return };
        match count.check() {
            Ok(()) => shared.mended(&DamageSite::Rows),
            Err(error) => shared.damaged(DamageSite::Rows, &error),
        }
    }
}

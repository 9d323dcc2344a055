//! Writes what the partitions have for the index: batches that come together go together.

use std::sync::Arc;
use std::time::Duration;

use kafold_core::index::{Advanced, IndexBatch};
use kafold_core::{Clock, ReadError, StreamIndex};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::config::Limits;

/// How long the first batch waits for those of other partitions whose time has come as well.
const GATHER_WAIT: Duration = Duration::from_millis(1);
/// Batches that wait, of a partition one; those of more partitions wait outside.
const WAITING_MAX: usize = 1_024;
/// When a caller may try again who finds the store closed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Takes batches. It ends with the task that [`Gatherer::new`] answers.
pub(crate) struct Gatherer {
    requests: mpsc::Sender<Request>,
}

struct Request {
    batch: IndexBatch,
    answer: oneshot::Sender<Result<Advanced, ReadError>>,
}

impl Gatherer {
    /// The gatherer, and the task that does its work.
    pub(crate) fn new(
        index: Arc<dyn StreamIndex>,
        clock: Arc<dyn Clock>,
        limits: &Limits,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (requests, inbox) = mpsc::channel(WAITING_MAX);
        let events_max = limits.index_batch_events_max;
        let writes_max = limits.index_writes_max.max(1);
        (Self { requests }, gather(index, clock, inbox, events_max, writes_max))
    }

    /// What became of the batch. Who stops waiting may find it in the index nevertheless.
    pub(crate) async fn advance(&self, batch: IndexBatch) -> Result<Advanced, ReadError> {
        let closed = || ReadError::unavailable(RETRY_AFTER, "the store is closed");
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request { batch, answer }).await.map_err(|_| closed())?;
        answered.await.unwrap_or_else(|_| Err(closed()))
    }
}

async fn gather(
    index: Arc<dyn StreamIndex>,
    clock: Arc<dyn Clock>,
    mut inbox: mpsc::Receiver<Request>,
    events_max: usize,
    writes_max: usize,
) {
    let under_way = Arc::new(Semaphore::new(writes_max));
    loop {
        // Never closed.
        let Ok(permit) = Arc::clone(&under_way).acquire_owned().await else { return };
        let Some(first) = inbox.recv().await else { return };
        clock.sleep(GATHER_WAIT).await;
        let mut events = first.batch.events.len();
        let mut gathered = vec![first];
        while events < events_max
            && let Ok(next) = inbox.try_recv()
        {
            events += next.batch.events.len();
            gathered.push(next);
        }
        let index = Arc::clone(&index);
        tokio::spawn(async move {
            let (batches, answers): (Vec<_>, Vec<_>) =
                gathered.into_iter().map(|request| (request.batch, request.answer)).unzip();
            let advanced = index.advance(batches).await;
            drop(permit);
            for (answer, advanced) in answers.into_iter().zip(advanced) {
                // Who asked may be gone.
                let _ = answer.send(advanced);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use futures_util::future::join_all;
    use kafold_core::clock::SystemClock;
    use kafold_core::index::{IndexCount, IndexHeads, IndexLoad, IndexRead};
    use kafold_core::store::{Appended, Cursor};
    use kafold_core::testing::eventually;
    use kafold_core::{CommandId, Offset, Partition, RecordedEvent, StreamId};

    use super::*;
    use crate::fold::Checkpoint;
    use crate::tail::tests::event;

    /// An index that holds writes back until it is told, and tells which there were. Partition 3 of it
    /// is of another log, partition 4 behind.
    struct HeldIndex {
        writes: Mutex<Vec<Vec<u32>>>,
        under_way: AtomicUsize,
        under_way_most: AtomicUsize,
        released: Semaphore,
    }

    #[async_trait]
    impl StreamIndex for HeldIndex {
        async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
            Ok(Vec::new())
        }

        async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
            let partitions = batches.iter().map(|batch| batch.partition.0).collect();
            self.writes.lock().expect("no panic").push(partitions);
            let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
            self.under_way_most.fetch_max(under_way, Ordering::SeqCst);
            self.released.acquire().await.expect("never closed").forget();
            self.under_way.fetch_sub(1, Ordering::SeqCst);
            let answer = |batch: IndexBatch| match batch.partition.0 {
                3 => Err(ReadError::diverged("the index", "the test says so")),
                4 => Ok(Advanced::Behind(None)),
                _ => Ok(Advanced::Moved),
            };
            batches.into_iter().map(answer).collect()
        }

        async fn load(&self, _: &[IndexLoad], _: usize) -> Vec<Result<IndexRead, ReadError>> {
            Vec::new()
        }

        async fn heads(&self, _: Partition) -> Result<IndexHeads, ReadError> {
            Ok(IndexHeads::default())
        }

        async fn count(&self) -> Result<Vec<IndexCount>, ReadError> {
            Ok(Vec::new())
        }

        async fn find_command(
            &self,
            _: Partition,
            _: &StreamId,
            _: CommandId,
        ) -> Result<(Offset, Option<Appended>), ReadError> {
            Ok((Offset(0), None))
        }
    }

    impl HeldIndex {
        fn writes(&self) -> Vec<Vec<u32>> {
            self.writes.lock().expect("no panic").clone()
        }
    }

    fn start(limits: &Limits) -> (Arc<HeldIndex>, Gatherer) {
        let index = Arc::new(HeldIndex {
            writes: Mutex::default(),
            under_way: AtomicUsize::new(0),
            under_way_most: AtomicUsize::new(0),
            released: Semaphore::new(0),
        });
        let (gatherer, task) = Gatherer::new(index.clone(), Arc::new(SystemClock), limits);
        tokio::spawn(task);
        (index, gatherer)
    }

    fn batch(partition: u32, events: usize) -> IndexBatch {
        let to = Checkpoint { next: Offset(9), ..Checkpoint::default() }.to_cursor();
        let event = RecordedEvent::clone(&event("a-1", 1, 0, 1));
        let events = vec![event; events];
        IndexBatch { partition: Partition(partition), from: Offset(0), to, events }
    }

    #[tokio::test]
    async fn what_comes_together_is_one_write_and_each_batch_has_its_own_answer() {
        let (index, gatherer) = start(&Limits::default());
        index.released.add_permits(1);
        let mut answers = join_all((1..=5).map(|of| gatherer.advance(batch(of, 1)))).await;
        assert_eq!(index.writes(), [[1, 2, 3, 4, 5]]);
        assert!(matches!(answers.remove(2), Err(ReadError::Diverged { .. })), "{answers:?}");
        let answers: Vec<_> = answers.into_iter().map(|answer| answer.expect("moved")).collect();
        let (moved, behind) = (Advanced::Moved, Advanced::Behind(None));
        assert_eq!(answers, [moved.clone(), moved.clone(), behind, moved]);
    }

    #[tokio::test]
    async fn a_write_takes_no_more_batches_once_it_has_its_events() {
        let limits = Limits { index_batch_events_max: 5, ..Limits::default() };
        let (index, gatherer) = start(&limits);
        index.released.add_permits(9);
        let sizes = [(1, 2), (2, 2), (5, 4), (6, 5), (7, 0), (8, 6)];
        join_all(sizes.map(|(of, events)| gatherer.advance(batch(of, events)))).await;
        assert_eq!(index.writes(), [vec![1, 2, 5], vec![6], vec![7, 8]]);
    }

    #[tokio::test]
    async fn no_more_writes_are_under_way_than_the_limit() {
        let limits = Limits { index_batch_events_max: 1, index_writes_max: 2, ..Limits::default() };
        let (index, gatherer) = start(&limits);
        let release = async {
            for begun in 2..=5 {
                let has_begun = async || index.writes().len() == begun;
                eventually("another write has begun", has_begun).await;
                index.released.add_permits(1);
            }
            index.released.add_permits(1);
        };
        let advance = |of| gatherer.advance(batch(of, 1));
        let (answers, ()) = tokio::join!(join_all((5..10).map(advance)), release);
        assert!(answers.iter().all(|answer| matches!(answer, Ok(Advanced::Moved))), "{answers:?}");
        assert_eq!(index.writes(), [[5], [6], [7], [8], [9]]);
        assert_eq!(index.under_way_most.load(Ordering::SeqCst), 2);
    }
}

//! The pump between an event source and a worker: it reads ahead while a transaction is under way,
//! within a bound, so that batches grow with the backlog.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kafold_core::store::{Batch, Cursor, ReadError, SourceMessage, Subscription};
use kafold_core::{Clock, Partition};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::projection::ProjectionBatch;

/// Messages read ahead of the worker.
const READ_AHEAD_MESSAGES_MAX: usize = 8;
/// Longest wait before an unavailable source is asked again, whatever it says.
const SOURCE_WAIT_MAX: Duration = Duration::from_secs(1);

type Received = Result<SourceMessage, ReadError>;
type StartRequest = (Partition, Option<Cursor>, oneshot::Sender<Result<(), ReadError>>);

/// What the worker has to do next.
#[derive(Debug)]
pub(crate) enum Message {
    Assigned(Vec<Partition>),
    Revoked(Vec<Partition>),
    /// Events, or a part of the log without events that is to be written down.
    Round(ProjectionBatch),
    /// The subscription has ended for good without saying why: a new one is needed.
    Closed,
}

/// When a round is closed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoundLimit {
    pub(crate) events_max: usize,
    pub(crate) bytes_max: usize,
    /// How long advances of the log without events are held back.
    pub(crate) idle: Duration,
}

/// The worker's end of the pump. Dropped, it ends the subscription.
pub(crate) struct Reader {
    received: mpsc::Receiver<Received>,
    starts: mpsc::Sender<StartRequest>,
    pump: JoinHandle<()>,
    clock: Arc<dyn Clock>,
    /// Received and not yet handed out: batches first, then what ended them.
    waiting: VecDeque<Received>,
    round: ProjectionBatch,
    /// Since when a round without events waits to be written down.
    idle_since: Option<Instant>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

impl Reader {
    pub(crate) fn new(subscription: Box<dyn Subscription>, clock: Arc<dyn Clock>) -> Self {
        let (sender, received) = mpsc::channel(READ_AHEAD_MESSAGES_MAX);
        let (starts, start_requests) = mpsc::channel(1);
        let pump = tokio::spawn(pump(subscription, sender, start_requests, clock.clone()));
        let (waiting, round) = (VecDeque::new(), ProjectionBatch::default());
        Self { received, starts, pump, clock, waiting, round, idle_since: None }
    }

    /// Delivers an assigned partition from the cursor on.
    pub(crate) async fn start(
        &self,
        partition: Partition,
        from: Option<Cursor>,
    ) -> Result<(), ReadError> {
        let (answer, answered) = oneshot::channel();
        let ended = || ReadError::unavailable(Duration::ZERO, "the subscription has ended");
        self.starts.send((partition, from, answer)).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// The next thing to do: one event when there is no more, up to the limit when there is.
    /// Cancel-safe.
    pub(crate) async fn next(&mut self, limit: RoundLimit) -> Result<Message, ReadError> {
        loop {
            self.gather(limit);
            let ended = !self.waiting.is_empty() && !self.round.batches().is_empty();
            if self.round.count() > 0 || ended {
                return Ok(self.close_round());
            }
            match self.waiting.pop_front() {
                Some(Ok(SourceMessage::Assigned(partitions))) => {
                    return Ok(Message::Assigned(partitions));
                }
                Some(Ok(SourceMessage::Revoked(partitions))) => {
                    return Ok(Message::Revoked(partitions));
                }
                Some(Ok(batch)) => self.waiting.push_front(Ok(batch)),
                Some(Err(error)) => return Err(error),
                None => match self.wait(limit.idle).await {
                    Waited::Received(message) => self.waiting.push_back(message),
                    Waited::Idle => return Ok(self.close_round()),
                    Waited::Closed => return Ok(Message::Closed),
                },
            }
        }
    }

    /// Moves batches that are there already into the round, up to the limit or the first message of
    /// another kind.
    fn gather(&mut self, limit: RoundLimit) {
        let bytes = |batch: &Batch| batch.events.iter().map(|e| e.payload.len()).sum::<usize>();
        let mut size: usize = self.round.batches().iter().map(bytes).sum();
        let mut count = self.round.count();
        while count < limit.events_max && size < limit.bytes_max {
            let next = self.waiting.pop_front().or_else(|| self.received.try_recv().ok());
            match next {
                Some(Ok(SourceMessage::Batch(batch))) => {
                    size += bytes(&batch);
                    count += batch.events.len();
                    self.round.batches_mut().push(batch);
                }
                Some(other) => return self.waiting.push_front(other),
                None => return,
            }
        }
    }

    fn close_round(&mut self) -> Message {
        self.idle_since = None;
        Message::Round(std::mem::take(&mut self.round))
    }

    async fn wait(&mut self, idle: Duration) -> Waited {
        let received = |message: Option<Received>| message.map_or(Waited::Closed, Waited::Received);
        if self.round.batches().is_empty() {
            return received(self.received.recv().await);
        }
        let now = self.clock.instant();
        let since = *self.idle_since.get_or_insert(now);
        let left = idle.saturating_sub(now.saturating_duration_since(since));
        tokio::select! {
            biased;
            message = self.received.recv() => received(message),
            () = self.clock.sleep(left) => Waited::Idle,
        }
    }
}

enum Waited {
    Received(Received),
    Idle,
    Closed,
}

/// Reads ahead until the reader is dropped or the source has diverged. Requests to start a partition
/// come before reading on, also while the worker is busy and nothing more fits.
async fn pump(
    mut subscription: Box<dyn Subscription>,
    messages: mpsc::Sender<Received>,
    mut starts: mpsc::Receiver<StartRequest>,
    clock: Arc<dyn Clock>,
) {
    loop {
        let permit = tokio::select! {
            biased;
            Some(request) = starts.recv() => {
                start(&mut *subscription, request).await;
                continue;
            }
            permit = messages.reserve() => permit,
        };
        // The reader is gone.
        let Ok(permit) = permit else { return };
        let message = tokio::select! {
            biased;
            Some(request) = starts.recv() => {
                drop(permit);
                start(&mut *subscription, request).await;
                continue;
            }
            message = subscription.next() => message,
        };
        let pause = match &message {
            Ok(_) => None,
            Err(ReadError::Unavailable { retry_after, .. }) => Some(*retry_after),
            Err(ReadError::Diverged { .. }) => return permit.send(message),
        };
        permit.send(message);
        if let Some(pause) = pause {
            // An answer of "at once" must not become a busy loop.
            clock.sleep(pause.clamp(Duration::from_millis(10), SOURCE_WAIT_MAX)).await;
        }
    }
}

async fn start(subscription: &mut dyn Subscription, (partition, from, answer): StartRequest) {
    let started = subscription.start(partition, from).await;
    // Nobody waits any more: the reader is being dropped.
    drop(answer.send(started));
}

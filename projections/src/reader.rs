//! The pump between an event source and a worker: it reads ahead while a transaction is under way,
//! within a bound, so that batches grow with the backlog.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kafold_core::store::{Batch, Cursor, ReadError, SourceMessage, Subscription};
use kafold_core::{Clock, Partition};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::handler::Handler;
use crate::projection::{Part, ProjectionBatch};

/// Messages read ahead of the worker at least.
const READ_AHEAD_MESSAGES_MIN: usize = 40;
/// Shortest wait before an unavailable source is asked again.
const SOURCE_WAIT_MIN: Duration = Duration::from_millis(10);
/// Longest wait before an unavailable source is asked again, whatever it says.
const SOURCE_WAIT_MAX: Duration = Duration::from_secs(1);

/// A message of the source on its way through the pump.
enum Passed {
    Assigned(Vec<Partition>),
    Revoked(Vec<Partition>),
    Batch(Part),
}

type Received = Result<Passed, ReadError>;

/// Payload bytes that were read ahead of the worker.
#[derive(Default)]
struct Ahead {
    bytes: AtomicUsize,
    taken: Notify,
}

impl Ahead {
    fn add(&self, message: &Received) {
        self.bytes.fetch_add(bytes_of(message), Ordering::AcqRel);
    }

    fn take(&self, message: &Received) {
        self.bytes.fetch_sub(bytes_of(message), Ordering::AcqRel);
        self.taken.notify_one();
    }

    /// Returns when they are fewer. Cancel-safe.
    async fn below(&self, bytes_max: usize) {
        while self.bytes.load(Ordering::Acquire) >= bytes_max {
            self.taken.notified().await;
        }
    }
}

fn bytes_of(message: &Received) -> usize {
    match message {
        Ok(Passed::Batch(part)) => payload_bytes(part.batch()),
        _ => 0,
    }
}

fn payload_bytes(batch: &Batch) -> usize {
    batch.events.iter().map(|event| event.payload.len()).sum()
}

/// What the worker asks of the pump.
enum Request {
    Start(Partition, Option<Cursor>, oneshot::Sender<Result<(), ReadError>>),
    Stop(Vec<Partition>, oneshot::Sender<()>),
    /// The last change of partitions has been dealt with.
    Settled,
}

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
    ahead: Arc<Ahead>,
    requests: mpsc::Sender<Request>,
    pump: JoinHandle<()>,
    clock: Arc<dyn Clock>,
    /// Whether the pump waits for [`Request::Settled`].
    is_unsettled: bool,
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
    /// Reads ahead of the worker, and decodes for it, until so many messages or about so many bytes of
    /// payloads wait.
    pub(crate) fn new(
        subscription: Box<dyn Subscription>,
        handler: Arc<dyn Handler>,
        (messages_max, bytes_max): (usize, usize),
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (sender, received) = mpsc::channel(messages_max.max(READ_AHEAD_MESSAGES_MIN));
        let (requests, asked) = mpsc::channel(1);
        let ahead = Arc::new(Ahead::default());
        let pump = Pump { subscription, handler, requests: asked, ahead: ahead.clone(), bytes_max };
        let pump = tokio::spawn(pump.run(sender, clock.clone()));
        Self {
            received,
            ahead,
            requests,
            pump,
            clock,
            is_unsettled: false,
            waiting: VecDeque::new(),
            round: ProjectionBatch::default(),
            idle_since: None,
        }
    }

    /// Delivers an assigned partition from the cursor on.
    pub(crate) async fn start(
        &self,
        partition: Partition,
        from: Option<Cursor>,
    ) -> Result<(), ReadError> {
        let (answer, answered) = oneshot::channel();
        let ended = || ReadError::unavailable(Duration::ZERO, "the subscription has ended");
        let request = Request::Start(partition, from, answer);
        self.requests.send(request).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// Delivers nothing more of these partitions until they are started again, not even what was read
    /// ahead.
    pub(crate) async fn stop(&mut self, partitions: Vec<Partition>) {
        let (answer, answered) = oneshot::channel();
        if self.requests.send(Request::Stop(partitions.clone(), answer)).await.is_ok() {
            // An ended pump delivers nothing either.
            drop(answered.await);
        }
        while let Some(message) = self.try_recv() {
            self.waiting.push_back(message);
        }
        let is_stopped = |batch: &Batch| partitions.contains(&batch.partition);
        self.round.parts_mut().retain(|part| !is_stopped(part.batch()));
        self.waiting.retain(|message| match message {
            Ok(Passed::Batch(part)) => !is_stopped(part.batch()),
            _ => true,
        });
    }

    /// The next thing to do: one event when there is no more, up to the limit when there is.
    /// Cancel-safe. To call it says that the message before has been dealt with.
    pub(crate) async fn next(&mut self, limit: RoundLimit) -> Result<Message, ReadError> {
        if self.is_unsettled && self.requests.send(Request::Settled).await.is_err() {
            return Ok(Message::Closed);
        }
        self.is_unsettled = false;
        loop {
            self.gather(limit);
            let ended = !self.waiting.is_empty() && !self.round.parts().is_empty();
            if self.round.count() > 0 || ended {
                return Ok(self.close_round());
            }
            match self.waiting.pop_front() {
                Some(Ok(Passed::Assigned(partitions))) => {
                    self.is_unsettled = true;
                    return Ok(Message::Assigned(partitions));
                }
                Some(Ok(Passed::Revoked(partitions))) => {
                    self.is_unsettled = true;
                    return Ok(Message::Revoked(partitions));
                }
                Some(Err(error)) => return Err(error),
                Some(batch) => self.waiting.push_front(batch),
                None => match self.wait(limit.idle).await {
                    Waited::Received(message) => {
                        self.ahead.take(&message);
                        self.waiting.push_back(message);
                    }
                    Waited::Idle => return Ok(self.close_round()),
                    Waited::Closed => return Ok(Message::Closed),
                },
            }
        }
    }

    fn try_recv(&mut self) -> Option<Received> {
        let message = self.received.try_recv().ok()?;
        self.ahead.take(&message);
        Some(message)
    }

    /// Moves batches that are there already into the round, up to the limit or the first message of
    /// another kind.
    fn gather(&mut self, limit: RoundLimit) {
        let mut size: usize = self.round.batches().map(payload_bytes).sum();
        let mut count = self.round.count();
        while count < limit.events_max && size < limit.bytes_max {
            let next = self.waiting.pop_front().or_else(|| self.try_recv());
            match next {
                Some(Ok(Passed::Batch(part))) => {
                    size += payload_bytes(part.batch());
                    count += part.batch().events.len();
                    self.round.parts_mut().push(part);
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
        if self.round.parts().is_empty() {
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

/// The reading side, a task of its own.
struct Pump {
    subscription: Box<dyn Subscription>,
    handler: Arc<dyn Handler>,
    requests: mpsc::Receiver<Request>,
    ahead: Arc<Ahead>,
    bytes_max: usize,
}

impl Pump {
    /// Reads ahead until the reader is dropped or the source has diverged.
    ///
    /// It does not read past a change of partitions before the worker has dealt with it: the source
    /// takes the next read for a sign of that, and gives a revoked partition away. Else the worker
    /// could take a partition that already is another's, or take what was read under an earlier
    /// assignment for the present one's.
    async fn run(mut self, messages: mpsc::Sender<Received>, clock: Arc<dyn Clock>) {
        loop {
            let read = async {
                self.ahead.below(self.bytes_max).await;
                let permit = messages.reserve().await.ok()?;
                Some((permit, self.subscription.next().await))
            };
            let (permit, message) = tokio::select! {
                biased;
                request = self.requests.recv() => match request {
                    Some(request) => {
                        self.serve(request).await;
                        continue;
                    }
                    None => return,
                },
                // Cancel-safe, both parts of it.
                read = read => match read {
                    Some(read) => read,
                    // The reader is gone.
                    None => return,
                },
            };
            let message = message.map(|message| self.pass(message));
            let (pause, is_change) = match &message {
                Ok(message) => (None, !matches!(message, Passed::Batch(_))),
                Err(ReadError::Unavailable { retry_after, .. }) => (Some(*retry_after), false),
                Err(ReadError::Diverged { .. }) => return permit.send(message),
            };
            self.ahead.add(&message);
            permit.send(message);
            if is_change && !self.settle().await {
                return;
            }
            if let Some(pause) = pause {
                // An answer of "at once" must not become a busy loop.
                clock.sleep(pause.clamp(SOURCE_WAIT_MIN, SOURCE_WAIT_MAX)).await;
            }
        }
    }

    fn pass(&self, message: SourceMessage) -> Passed {
        match message {
            SourceMessage::Assigned(partitions) => Passed::Assigned(partitions),
            SourceMessage::Revoked(partitions) => Passed::Revoked(partitions),
            SourceMessage::Batch(batch) => {
                let part = Part::from(batch);
                self.handler.decode_ahead(&part);
                Passed::Batch(part)
            }
        }
    }

    /// Serves the worker until it has dealt with a change of partitions. `false`: it is gone.
    async fn settle(&mut self) -> bool {
        loop {
            match self.requests.recv().await {
                Some(Request::Settled) => return true,
                Some(request) => self.serve(request).await,
                None => return false,
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        // Whoever does not wait for its answer any more is being dropped.
        match request {
            Request::Start(partition, from, answer) => {
                drop(answer.send(self.subscription.start(partition, from).await));
            }
            Request::Stop(partitions, answer) => {
                partitions.into_iter().for_each(|partition| self.subscription.stop(partition));
                answer.send(()).unwrap_or_default();
            }
            Request::Settled => {}
        }
    }
}

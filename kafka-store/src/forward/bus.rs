//! The calls of this node that wait for replies of others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, ready, select};
use kafold_core::clock::within;
use kafold_core::{
    AppendError, Clock, CommandBus, CommandExecutor, ForwardedCommand, Offset, Partition, Reply,
    StreamId, trace,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::sync::oneshot;
use tracing::Span;
use uuid::Uuid;

use super::inbox::Inboxes;
use super::nodes::Nodes;
use super::outbox::Outbox;
use super::wire::{self, ReplyContent, ReplyRecord, ReplyTo};
use crate::partition::{Reach, Shared};
use crate::partitioner::partition_of;
use crate::reader::{ReadFailure, Reader};

/// When a caller may try again who found too many calls waiting, or no broker.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A read of replies that finds none is asked for again after this.
const READ_WAIT: Duration = Duration::from_secs(60);
/// Between two attempts to read replies while no broker answers.
const READ_RETRY: Duration = Duration::from_millis(200);

/// Sends commands to their owners, and joins the replies to those who wait.
pub(crate) struct Bus {
    pub(crate) partitions: Vec<Arc<Shared>>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) inboxes: Arc<Inboxes>,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) reach: Arc<Reach>,
    pub(crate) clock: Arc<dyn Clock>,
    /// The partition of the replies topic that this node reads.
    pub(crate) replies: Partition,
    pub(crate) calls_max: usize,
    pub(crate) calls: Arc<Calls>,
}

/// Who waits for a reply.
#[derive(Default)]
pub(crate) struct Calls {
    last: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>,
}

/// One of them; it waits no more when this is dropped.
struct Call {
    calls: Arc<Calls>,
    number: u64,
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut waiting = self.calls.waiting();
        waiting.remove(&self.number);
        metrics::gauge!("kafold_calls").set(waiting.len() as f64);
    }
}

impl Calls {
    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` when as many wait already as may.
    fn begin(self: &Arc<Self>, calls_max: usize) -> Option<(Call, oneshot::Receiver<Vec<u8>>)> {
        let (reply, replied) = oneshot::channel();
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let mut waiting = self.waiting();
        if waiting.len() >= calls_max {
            return None;
        }
        waiting.insert(number, reply);
        metrics::gauge!("kafold_calls").set(waiting.len() as f64);
        drop(waiting);
        Some((Call { calls: Arc::clone(self), number }, replied))
    }

    fn answer(&self, number: u64, json: Vec<u8>) {
        if let Some(reply) = self.waiting().remove(&number) {
            // Who waited may just have stopped.
            let _ = reply.send(json);
        }
    }
}

impl Bus {
    fn partition(&self, stream: &StreamId) -> Partition {
        partition_of(stream, u32::try_from(self.partitions.len()).unwrap_or(u32::MAX))
    }

    fn check(&self) -> Result<(), AppendError> {
        match self.reach.down() {
            Some(why) => Err(AppendError::unavailable(RETRY_AFTER, why)),
            None => Ok(()),
        }
    }

    /// Sends it; an error says that it was not.
    fn post(
        &self,
        command: &ForwardedCommand,
        reply_to: Option<ReplyTo>,
    ) -> Result<oneshot::Receiver<Result<(), KafkaError>>, AppendError> {
        let letter = wire::command(command, reply_to);
        let (size, limit) = (letter.size(), self.outbox.limits().commands);
        if size > limit {
            return Err(AppendError::TooLarge { size, limit });
        }
        let partition = self.partition(&command.stream);
        self.outbox.command(partition, &letter).map_err(|error| match error {
            KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull) => {
                AppendError::unavailable(RETRY_AFTER, "too many commands wait to be sent")
            }
            error => AppendError::unavailable(RETRY_AFTER, error),
        })
    }

    fn left(&self, command: &ForwardedCommand) -> Duration {
        (command.deadline - self.clock.now()).to_std().unwrap_or_default()
    }

    /// Reads what other nodes say, for ever: replies to this one, and about themselves.
    pub(crate) async fn listen(
        self: Arc<Self>,
        reader: Reader<ReplyRecord>,
        partition: Partition,
        mut from: Offset,
    ) {
        loop {
            match reader.read_async(partition, from, READ_WAIT).await {
                Ok(chunk) => {
                    for record in chunk.records {
                        from = record.offset.plus(1);
                        self.hear(record.content);
                    }
                }
                // Old replies are deleted, and nobody waits for them.
                Err(ReadFailure::OutOfRange { end, .. }) => from = end,
                Err(failure) => {
                    tracing::debug!(%partition, %failure, "replies cannot be read");
                    self.clock.sleep(READ_RETRY).await;
                }
            }
        }
    }

    fn hear(&self, content: ReplyContent) {
        match content {
            ReplyContent::Reply { node, call, json } if node == self.nodes.id => {
                self.calls.answer(call, json);
            }
            ReplyContent::Announcement { json, .. } => self.nodes.hear(&json),
            ReplyContent::Reply { .. } | ReplyContent::Other => {}
        }
    }

    /// Where replies to a call of this node go.
    fn reply_to(&self, call: u64) -> ReplyTo {
        let node: Uuid = self.nodes.id;
        ReplyTo { node, call, partition: self.replies }
    }
}

impl CommandBus for Bus {
    fn is_local(&self, stream: &StreamId) -> bool {
        let partition = self.partition(stream);
        self.partitions.get(partition.0 as usize).is_some_and(|shared| shared.is_local())
    }

    fn call(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<Reply, AppendError>> {
        let (span, command) = self.traced(command);
        trace::around(span, self.called(&command), |_, _| ())
    }

    fn send(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<(), AppendError>> {
        let (span, command) = self.traced(command);
        trace::around(span, self.sent(&command), |_, ()| ())
    }

    fn serve(&self, category: &'static str, executor: &Arc<dyn CommandExecutor>) {
        self.inboxes.serve(category, executor);
    }
}

impl Bus {
    /// The span around the way there, and back where a reply is waited for. The command carries it on.
    fn traced(&self, command: ForwardedCommand) -> (Span, ForwardedCommand) {
        use tracing::field::Empty;
        let topic = self.outbox.commands_topic();
        let span = tracing::info_span!(
            "send",
            otel.name = format!("send {topic}"),
            otel.kind = "producer",
            messaging.system = "kafka",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = topic,
            messaging.destination.partition.id = %self.partition(&command.stream),
            messaging.kafka.message.key = command.stream.as_str(),
            error.type = Empty,
            otel.status_code = Empty,
        );
        let trace_parent = span.in_scope(trace::current).or(command.trace_parent);
        (span, ForwardedCommand { trace_parent, ..command })
    }

    fn called(&self, command: &ForwardedCommand) -> BoxFuture<'static, Result<Reply, AppendError>> {
        let begun = self.check().and_then(|()| {
            let full = || {
                let why = format!("{} commands wait for other nodes", self.calls_max);
                AppendError::unavailable(RETRY_AFTER, why)
            };
            let (call, replied) = self.calls.begin(self.calls_max).ok_or_else(full)?;
            let delivery = self.post(command, Some(self.reply_to(call.number)))?;
            Ok((call, replied, delivery))
        });
        let (call, replied, delivery) = match begun {
            Ok(begun) => begun,
            Err(error) => return ready(Err(error)).boxed(),
        };
        let (clock, left) = (Arc::clone(&self.clock), self.left(command));
        let command_id = command.command_id;
        async move {
            let unknown = AppendError::OutcomeUnknown { command_id };
            // A command that was not delivered for all we know may be delivered all the same.
            let undelivered = async move {
                match delivery.await {
                    Ok(Ok(())) | Err(_) => std::future::pending().await,
                    Ok(Err(error)) => error,
                }
            };
            let answer = select(replied, undelivered.boxed());
            let answered = within(&*clock, left, answer).await;
            drop(call);
            match answered {
                Some(Either::Left((Ok(json), _))) => {
                    serde_json::from_slice(&json).map_err(|error| {
                        tracing::error!(%command_id, %error, "a reply cannot be read");
                        unknown
                    })
                }
                Some(Either::Left((Err(_), _)) | Either::Right(_)) | None => Err(unknown),
            }
        }
        .boxed()
    }

    fn sent(&self, command: &ForwardedCommand) -> BoxFuture<'static, Result<(), AppendError>> {
        let posted = self.check().and_then(|()| self.post(command, None));
        let delivery = match posted {
            Ok(delivery) => delivery,
            Err(error) => return ready(Err(error)).boxed(),
        };
        let command_id = command.command_id;
        async move {
            match delivery.await {
                Ok(Ok(())) => Ok(()),
                _ => Err(AppendError::OutcomeUnknown { command_id }),
            }
        }
        .boxed()
    }
}

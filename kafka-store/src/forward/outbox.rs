//! Sends commands, replies and announcements.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use kafold_core::{Clock, Partition, Reply};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use rdkafka::statistics::Statistics;
use tokio::sync::oneshot;

use super::wire::{self, Letter, ReplyTo};
use crate::client::{Renewal, log, raw_partition};
use crate::config::KafkaConfig;
use crate::judge::{RECORD_BYTES_DEFAULT, above_record_limit};
use crate::producer::Polled;

/// How long the last words of a node may take.
const FLUSH_MAX: Duration = Duration::from_millis(500);
const FLUSH_POLL: Duration = Duration::from_millis(2);

/// Longest time for which a replaced producer keeps records that are not sent.
const REPLACED_MAX: Duration = Duration::from_secs(15);

/// Says whether a record is in its topic; dropped unused when nobody wants to know.
type Delivered = oneshot::Sender<KafkaResult<()>>;

pub(crate) struct Outbox {
    sending: RwLock<Sending>,
    config: KafkaConfig,
    clock: Arc<dyn Clock>,
    commands: String,
    replies: String,
}

/// `max.message.bytes` of the two topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordLimits {
    pub(crate) commands: usize,
    pub(crate) replies: usize,
}

/// A producer, which makes batches up to the lower limit.
struct Sending {
    polled: Arc<Polled<Postmark>>,
    limits: RecordLimits,
}

impl Sending {
    fn start(config: &KafkaConfig, limits: RecordLimits) -> KafkaResult<Self> {
        let settings = config.outbox(limits.commands, limits.replies);
        let polled = Polled::start(&settings, Renewal::new(config), Postmark, "kafold-outbox")?;
        Ok(Self { polled: Arc::new(polled), limits })
    }
}

impl Outbox {
    pub(crate) fn start(config: &KafkaConfig, clock: Arc<dyn Clock>) -> KafkaResult<Self> {
        let limits = RecordLimits { commands: RECORD_BYTES_DEFAULT, replies: RECORD_BYTES_DEFAULT };
        Ok(Self {
            sending: RwLock::new(Sending::start(config, limits)?),
            config: config.clone(),
            clock,
            commands: config.commands_topic(),
            replies: config.replies_topic(),
        })
    }

    pub(crate) fn limits(&self) -> RecordLimits {
        self.sending().limits
    }

    /// Takes over changed limits of the two topics. The producer makes batches up to the lower limit, so
    /// it is replaced.
    pub(crate) fn limit_records(&self, limits: RecordLimits) {
        if self.limits() == limits {
            return;
        }
        let sending = match Sending::start(&self.config, limits) {
            Ok(sending) => sending,
            Err(error) => return tracing::warn!(%error, "no producer for commands and replies"),
        };
        let RecordLimits { commands, replies } = limits;
        tracing::warn!(commands, replies, "max.message.bytes has changed");
        let mut current = self.sending.write().unwrap_or_else(PoisonError::into_inner);
        let Sending { polled, .. } = std::mem::replace(&mut *current, sending);
        let clock = Arc::clone(&self.clock);
        tokio::spawn(async move { sent(&polled, &*clock, REPLACED_MAX).await });
    }

    fn sending(&self) -> RwLockReadGuard<'_, Sending> {
        self.sending.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn commands_topic(&self) -> &str {
        &self.commands
    }

    /// Sends a command; an error says that it never will be in the topic.
    pub(crate) fn command(
        &self,
        partition: Partition,
        command: &Letter,
    ) -> KafkaResult<oneshot::Receiver<KafkaResult<()>>> {
        let (delivered, delivery) = oneshot::channel();
        self.post(&self.commands, partition, command, Some(delivered))?;
        Ok(delivery)
    }

    /// Sends a reply. Whoever waits for one that is lost learns that the outcome is unknown.
    pub(crate) fn reply(&self, to: ReplyTo, json: Vec<u8>) {
        let mut letter = wire::reply(to, json);
        let (size, limit) = (letter.size(), self.limits().replies);
        if size > limit {
            tracing::warn!(node = %to.node, size, limit, "a reply is too large to be sent");
            letter.value = serde_json::to_vec(&Reply::OutcomeUnknown).unwrap_or_default();
        }
        if let Err(error) = self.post(&self.replies, to.partition, &letter, None) {
            metrics::counter!("kafold_replies_lost_total").increment(1);
            tracing::warn!(node = %to.node, %error, "a reply was not sent");
        }
    }

    /// Tells all nodes about this one.
    pub(crate) fn announcement(&self, letter: &Letter) -> KafkaResult<()> {
        self.post(&self.replies, super::nodes::PARTITION, letter, None)
    }

    /// Waits until everything is sent, for a moment at most.
    pub(crate) async fn flush(&self) {
        let polled = Arc::clone(&self.sending().polled);
        sent(&polled, &*self.clock, FLUSH_MAX).await;
    }

    fn post(
        &self,
        topic: &str,
        partition: Partition,
        letter: &Letter,
        delivered: Option<Delivered>,
    ) -> KafkaResult<()> {
        let mut headers = OwnedHeaders::new_with_capacity(letter.headers.len());
        for (key, value) in &letter.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let record = BaseRecord::with_opaque_to(topic, Box::new(delivered))
            .partition(raw_partition(partition))
            .key(&letter.key)
            .payload(&letter.value)
            .headers(headers);
        self.sending().polled.inner.send(record).map_err(|(error, _)| error)
    }
}

/// Waits until a producer has sent everything, for a time at most.
async fn sent(polled: &Polled<Postmark>, clock: &dyn Clock, at_most: Duration) {
    let deadline = clock.instant() + at_most;
    while polled.inner.in_flight_count() > 0 && clock.instant() < deadline {
        clock.sleep(FLUSH_POLL).await;
    }
}

struct Postmark;

impl ClientContext for Postmark {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "outbox");
    }
}

impl ProducerContext for Postmark {
    type DeliveryOpaque = Box<Option<Delivered>>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivered: Box<Option<Delivered>>) {
        let result = match result {
            Ok(_) => Ok(()),
            Err((error, message)) => {
                metrics::counter!("kafold_outbox_failures_total").increment(1);
                if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) {
                    let reason = above_record_limit(message.topic());
                    tracing::warn!(reason, "a command or reply was not delivered");
                }
                tracing::debug!(%error, "a command or reply was not delivered");
                Err(error.clone())
            }
        };
        if let Some(delivered) = *delivered {
            // Who wanted to know may have stopped waiting.
            let _ = delivered.send(result);
        }
    }
}

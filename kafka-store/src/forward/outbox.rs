//! Sends commands, replies and announcements.

use std::time::Duration;

use kafold_core::{Clock, Partition};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use rdkafka::statistics::Statistics;
use tokio::sync::oneshot;

use super::wire::{self, Letter, ReplyTo};
use crate::client::{Renewal, log, raw_partition};
use crate::config::KafkaConfig;
use crate::judge::raise_record_limit;
use crate::producer::Polled;

/// How long the last words of a node may take.
const FLUSH_MAX: Duration = Duration::from_millis(500);
const FLUSH_POLL: Duration = Duration::from_millis(2);

/// Says whether a record is in its topic; dropped unused when nobody wants to know.
type Delivered = oneshot::Sender<KafkaResult<()>>;

pub(crate) struct Outbox {
    polled: Polled<Postmark>,
    commands: String,
    replies: String,
}

impl Outbox {
    pub(crate) fn start(config: &KafkaConfig) -> KafkaResult<Self> {
        let polled =
            Polled::start(&config.outbox(), Renewal::new(config), Postmark, "kafold-outbox")?;
        Ok(Self { polled, commands: config.commands_topic(), replies: config.replies_topic() })
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
        let letter = wire::reply(to, json);
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
    pub(crate) async fn flush(&self, clock: &dyn Clock) {
        let deadline = clock.instant() + FLUSH_MAX;
        while self.polled.inner.in_flight_count() > 0 && clock.instant() < deadline {
            clock.sleep(FLUSH_POLL).await;
        }
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
        self.polled.inner.send(record).map_err(|(error, _)| error)
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
            Err((error, _)) => {
                metrics::counter!("kafold_outbox_failures_total").increment(1);
                if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) {
                    tracing::warn!(
                        "a command or reply was not delivered: max.message.bytes of its topic is below \
                         its size, {}",
                        raise_record_limit()
                    );
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

//! The one producer: sends records in order, reports each one's fate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kafold_core::{Offset, Partition};
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{
    BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig,
};
use rdkafka::statistics::Statistics;

use crate::client::{Renewal, log, offset, raw_partition};
use crate::config::KafkaConfig;
use crate::judge::above_record_limit;
use crate::wire::{ClaimId, Encoded};
use crate::writer::ReportFailure;

/// The poll thread looks this often whether it is to end; reports do not wait for it.
const POLL: Duration = Duration::from_millis(100);

/// Which record a report is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tag {
    pub(crate) claim: ClaimId,
    pub(crate) seq: u64,
}

/// What became of one record.
#[derive(Debug)]
pub(crate) struct Report {
    /// Counts the producers of this process: a failure of an old one says nothing of the new one.
    pub(crate) generation: u64,
    pub(crate) partition: Partition,
    pub(crate) tag: Tag,
    pub(crate) result: Result<Option<Offset>, ReportFailure>,
}

/// Where reports and complaints go. Called on the poll thread: it must not block.
pub(crate) trait Sink: Send + Sync + 'static {
    fn report(&self, report: Report);
    /// All connections are lost, maybe for a moment.
    fn unreachable(&self);
}

/// A producer that is polled on a thread of its own, from within which reports are handed on the
/// moment they arrive. Dropping it purges what it still holds, on that thread.
pub(crate) struct Polled<C: ProducerContext + 'static> {
    pub(crate) inner: Arc<BaseProducer<C>>,
    ended: Arc<AtomicBool>,
}

impl<C: ProducerContext + 'static> Polled<C> {
    pub(crate) fn start(
        settings: &ClientConfig,
        mut renewal: Renewal,
        context: C,
        name: &str,
    ) -> KafkaResult<Self> {
        let inner = Arc::new(BaseProducer::from_config_and_context(settings, context)?);
        let ended = Arc::new(AtomicBool::new(false));
        let (polled, end) = (Arc::clone(&inner), Arc::clone(&ended));
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                while !end.load(Ordering::Acquire) {
                    polled.poll(POLL);
                    renewal.look(polled.client());
                }
            })
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { inner, ended })
    }
}

impl<C: ProducerContext + 'static> Drop for Polled<C> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// One generation of the events' producer.
pub(crate) struct Producer {
    polled: Polled<Delivery>,
    topic: String,
}

/// What came of handing a record over.
pub(crate) enum Sent {
    /// Its report will follow.
    Queued,
    /// There is no room now: again, before any later record of the partition.
    Full,
    /// It never will be; this is its report.
    Failed(ReportFailure),
}

impl Producer {
    pub(crate) fn start(
        config: &KafkaConfig,
        record_bytes_max: usize,
        generation: u64,
        sink: Arc<dyn Sink>,
    ) -> KafkaResult<Self> {
        let settings = config.producer(record_bytes_max);
        let delivery = Delivery { generation, sink };
        let polled = Polled::start(&settings, Renewal::new(config), delivery, "kafold-producer")?;
        Ok(Self { polled, topic: config.events_topic() })
    }

    pub(crate) fn send(&self, partition: Partition, tag: Tag, record: &Encoded) -> Sent {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        let message = BaseRecord::with_opaque_to(&self.topic, Box::new(tag))
            .partition(raw_partition(partition))
            .key(&record.key)
            .payload(&*record.value)
            .headers(headers);
        match self.polled.inner.send(message) {
            Ok(()) => Sent::Queued,
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => Sent::Full,
            Err((error, _)) => Sent::Failed(failure(&self.topic, &error)),
        }
    }

    /// Gives up what is queued and in flight; their reports follow.
    pub(crate) fn purge(&self) {
        self.polled.inner.purge(PurgeConfig::default().queue().inflight());
    }
}

struct Delivery {
    generation: u64,
    sink: Arc<dyn Sink>,
}

impl ClientContext for Delivery {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        metrics::counter!("kafold_producer_errors_total").increment(1);
        tracing::debug!(%error, reason, "kafka producer");
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.sink.unreachable();
        }
    }
}

impl ProducerContext for Delivery {
    type DeliveryOpaque = Box<Tag>;

    fn delivery(&self, result: &DeliveryResult<'_>, tag: Box<Tag>) {
        let (message, result) = match result {
            // A success may come without an offset (−1001): then nothing is known of the place.
            Ok(message) => (message, Ok(offset(message.offset()).ok())),
            Err((error, message)) => (message, Err(failure(message.topic(), error))),
        };
        let partition = Partition(u32::try_from(message.partition()).unwrap_or(u32::MAX));
        let generation = self.generation;
        self.sink.report(Report { generation, partition, tag: *tag, result });
    }
}

/// The reason for a failure because of the record's time.
pub(crate) const CLOCK_REFUSED: &str = "the brokers refuse the time of its records: set the clock of this \
                                        machine, or message.timestamp.before.max.ms and \
                                        message.timestamp.after.max.ms of the topic";

fn failure(topic: &str, error: &KafkaError) -> ReportFailure {
    use RDKafkaErrorCode as C;
    let code = error.rdkafka_error_code();
    // Faults of the record itself. Rights, clocks and limits may be mended, and then the same command is
    // accepted.
    let refused = [C::InvalidMessageSize, C::InvalidRecord, C::PolicyViolation];
    let reason = match code {
        Some(C::InvalidTimestamp) => CLOCK_REFUSED.into(),
        Some(C::MessageSizeTooLarge) => above_record_limit(topic),
        _ => error.to_string(),
    };
    ReportFailure {
        fatal: code == Some(C::Fatal),
        refused: code.is_some_and(|code| refused.contains(&code)),
        reason,
    }
}

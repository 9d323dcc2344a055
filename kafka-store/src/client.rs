//! What all clients of the broker share: their log lines, their errors, and questions that need no
//! assignment.

use std::io;
use std::net::ToSocketAddrs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold_core::store::Cause;
use kafold_core::{Offset, Partition};
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};

use crate::config::KafkaConfig;
use crate::error::OpenError;
pub(crate) use crate::refusal::Refusal;

/// An error that the client told beside any question, with librdkafka's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) error: KafkaError,
    /// Such as `sasl_ssl://HOST:PORT/1: SASL authentication error: …`.
    pub(crate) reason: String,
    /// Why it does not pass by itself, if it does not.
    pub(crate) refusal: Option<Refusal>,
}

/// Turns what librdkafka says into `tracing` events and remembers its newest complaint, which says
/// why a question was never answered.
#[derive(Default)]
pub(crate) struct Context {
    newest: Mutex<Option<Complaint>>,
}

impl Context {
    pub(crate) fn complaint(&self) -> Option<Complaint> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn complain(&self, complaint: Complaint) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(complaint);
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka client");
        let refusal = Refusal::of(&error, reason);
        // "All brokers are down" comes after the reason why, and says less.
        let is_summary = error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown);
        if !is_summary || self.complaint().is_none() {
            self.complain(Complaint { error, reason: reason.to_owned(), refusal });
        }
    }
}

impl ConsumerContext for Context {}

/// librdkafka repeats itself at every attempt to reconnect: what matters is told once by those who
/// see the state change, so its own lines stay below `warn`.
pub(crate) fn log(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::error!(target: "librdkafka", facility, "{message}");
        }
        RDKafkaLogLevel::Debug => tracing::trace!(target: "librdkafka", facility, "{message}"),
        _ => tracing::debug!(target: "librdkafka", facility, "{message}"),
    }
}

/// A topic as the brokers describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TopicShape {
    pub(crate) partitions: u32,
    /// Copies of the partition that has fewest.
    pub(crate) replicas: usize,
    /// Whether every partition has a leader now.
    pub(crate) led: bool,
}

/// Asks brokers; every call blocks for at most the request timeout.
pub(crate) struct Inquirer {
    client: BaseConsumer<Context>,
    timeout: Duration,
}

impl Inquirer {
    pub(crate) fn new(config: &KafkaConfig) -> KafkaResult<Self> {
        let client = BaseConsumer::from_config_and_context(&config.inquirer(), Context::default())?;
        Ok(Self { client, timeout: config.limits.request_timeout })
    }

    /// What the client last complained about, for when a question was not answered.
    pub(crate) fn last_error(&self) -> Option<Complaint> {
        self.client.context().complaint()
    }

    /// The shape of a topic, if it exists, and how many brokers there are.
    pub(crate) fn topic(&self, topic: &str) -> KafkaResult<(Option<TopicShape>, usize)> {
        self.topic_within(topic, self.timeout)
    }

    pub(crate) fn topic_within(
        &self,
        topic: &str,
        timeout: Duration,
    ) -> KafkaResult<(Option<TopicShape>, usize)> {
        let metadata = self.client.fetch_metadata(Some(topic), timeout);
        self.serve();
        let metadata = metadata?;
        let brokers = metadata.brokers().len();
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
            return Ok((None, brokers));
        };
        if let Some(error) = found.error() {
            return match RDKafkaErrorCode::from(error) {
                RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic => {
                    Ok((None, brokers))
                }
                code => Err(KafkaError::MetadataFetch(code)),
            };
        }
        let partitions = found.partitions();
        let shape = TopicShape {
            partitions: u32::try_from(partitions.len()).unwrap_or(u32::MAX),
            replicas: partitions.iter().map(|p| p.replicas().len()).min().unwrap_or(0),
            led: !partitions.is_empty() && partitions.iter().all(|p| p.leader() >= 0),
        };
        Ok((Some(shape), brokers))
    }

    /// The brokers that are up: id, host and port of each.
    pub(crate) fn brokers(&self) -> KafkaResult<Vec<(i32, String)>> {
        let metadata = self.client.fetch_metadata(None, self.timeout);
        self.serve();
        let metadata = metadata?;
        let brokers = metadata.brokers().iter();
        Ok(brokers.map(|b| (b.id(), format!("{}:{}", b.host(), b.port()))).collect())
    }

    /// The first and the next offset of a partition, asked of its leader.
    pub(crate) fn ends(&self, topic: &str, partition: Partition) -> KafkaResult<(Offset, Offset)> {
        self.ends_within(topic, partition, self.timeout)
    }

    pub(crate) fn ends_within(
        &self,
        topic: &str,
        partition: Partition,
        timeout: Duration,
    ) -> KafkaResult<(Offset, Offset)> {
        let ends = self.client.fetch_watermarks(topic, raw_partition(partition), timeout);
        self.serve();
        let (start, end) = ends?;
        Ok((offset(start)?, offset(end)?))
    }

    /// The offset of the first record from that time on; the end when there is none.
    pub(crate) fn since(
        &self,
        topic: &str,
        partition: Partition,
        time: DateTime<Utc>,
    ) -> KafkaResult<Offset> {
        let (_, end) = self.ends(topic, partition)?;
        let from = time.timestamp_millis();
        let mut asked = TopicPartitionList::with_capacity(1);
        asked.add_partition_offset(topic, raw_partition(partition), RawOffset::Offset(from))?;
        let found = self.client.offsets_for_times(asked, self.timeout);
        self.serve();
        let found = found?;
        Ok(match found.elements().first().map(|element| element.offset()) {
            Some(RawOffset::Offset(raw)) => offset(raw)?,
            _ => end,
        })
    }

    /// Hands the client's log lines and errors to its context.
    fn serve(&self) {
        while let Some(event) = self.client.poll(Duration::ZERO) {
            drop(event);
        }
    }
}

/// librdkafka's number of a partition; ours are at most [`crate::config::PARTITIONS_MAX`].
pub(crate) fn raw_partition(partition: Partition) -> i32 {
    i32::try_from(partition.0).unwrap_or(i32::MAX)
}

/// An offset of librdkafka's, of which the negative ones are no places.
pub(crate) fn offset(raw: i64) -> KafkaResult<Offset> {
    let invalid = |_| KafkaError::OffsetFetch(RDKafkaErrorCode::NoOffset);
    u64::try_from(raw).map(Offset).map_err(invalid)
}

/// Refuses brokers of which none has an address: a name that nobody knows is a slip in the URL, while
/// a broker that does not answer may be on its way. Blocks while names are looked up.
pub(crate) fn check_hosts(config: &KafkaConfig) -> Result<(), OpenError> {
    let mut unknown: Option<io::Error> = None;
    for broker in config.brokers.split(',') {
        match broker.to_socket_addrs() {
            Err(error) if is_unknown_host(&error) => unknown = Some(error),
            _ => return Ok(()),
        }
    }
    let Some(error) = unknown else { return Ok(()) };
    Err(OpenError::Refused {
        brokers: config.brokers.clone(),
        doing: "looking up the brokers' hosts".into(),
        remedy: "check the host names in the URL".into(),
        cause: Arc::new(error),
    })
}

/// The system gives an unknown name no error kind of its own; a name server that does not answer
/// ("Temporary failure") is worth waiting for.
fn is_unknown_host(error: &io::Error) -> bool {
    let text = error.to_string();
    text.contains("failed to lookup address") && !text.contains("Temporary failure")
}

/// What a failed question means at start: wait, or give up with a remedy.
pub(crate) fn open_error(
    config: &KafkaConfig,
    doing: impl Into<String>,
    error: KafkaError,
    complaint: Option<Complaint>,
) -> OpenError {
    let (brokers, doing) = (config.brokers.clone(), doing.into());
    let complained = || complaint.as_ref().and_then(|complaint| complaint.refusal.clone());
    match Refusal::of(&error, "").or_else(complained) {
        Some(Refusal { cause, remedy }) => {
            OpenError::Refused { brokers, doing, remedy, cause: text(cause) }
        }
        None => OpenError::Unavailable { brokers, doing, cause: waiting(error, complaint) },
    }
}

/// The error with the client's last complaint, which says more.
fn waiting(error: KafkaError, complaint: Option<Complaint>) -> Cause {
    match complaint {
        Some(Complaint { reason, .. }) if !reason.is_empty() => text(format!("{error} ({reason})")),
        Some(complaint) if complaint.error != error => {
            text(format!("{error} ({})", complaint.error))
        }
        _ => Arc::new(error),
    }
}

fn text(text: String) -> Cause {
    Box::<dyn std::error::Error + Send + Sync>::from(text).into()
}

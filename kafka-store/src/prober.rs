//! Probes rights by requests without side effects.
//!
//! - Read on a topic: a fetch at the end of the topic.
//! - Write on a topic: a record with `acks=2`. Brokers check the right first and then refuse the
//!   record: since Kafka 0.9 a producer may request the acknowledgement of one replica, of all, or
//!   of none.
//! - Read on a group: a commit for a partition which no topic has. Brokers check the right on the
//!   group first, then the topic, and store nothing.
//! - Create: a validate-only request. Describe and DescribeConfigs: the requests themselves.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kafold_core::Clock;
use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use tokio::runtime::Handle;

use crate::client::{Context, Inquirer, log};
use crate::config::KafkaConfig;
use crate::judge::Settings;
use crate::judge::record_bytes_max;
use crate::rights::{Answer, Operation, Resource, Right};
use crate::topic::Preparation;

/// The wait of a fetch at the end of a topic for records.
const FETCH_WAIT: Duration = Duration::from_millis(10);
/// Timeout of one poll of the client.
const POLL: Duration = Duration::from_millis(50);
/// The partition of all probes: rights are equal on all partitions of a topic.
const PARTITION: i32 = 0;
/// A number of acknowledgements no broker supports.
const ACKS: &str = "2";
/// Longest wait of a commit for the group's coordinator, in milliseconds. librdkafka uses the
/// member's session timeout, and closing a client waits for its commits.
const COMMIT_MS: &str = "1000";
/// A partition number no topic has.
const NO_PARTITION: i32 = i32::MAX;

/// Probes rights. Every call blocks, for at most the request timeout per right.
pub(crate) struct Prober {
    config: KafkaConfig,
    inquirer: Arc<Inquirer>,
    clock: Arc<dyn Clock>,
    /// `None` before the first use and after a denial, because a client reports a denial only once.
    reader: Option<BaseConsumer<Context>>,
    writer: Option<BaseProducer<Trial>>,
    admin: Option<AdminClient<Context>>,
    /// `max.message.bytes` of each topic in the newest description of its settings.
    pub(crate) record_limits: BTreeMap<String, usize>,
    /// A broker has stored a record with `acks=2`, so no further trial is sent.
    takes_trials: bool,
}

impl Prober {
    pub(crate) fn new(
        config: &KafkaConfig,
        inquirer: Arc<Inquirer>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let config = config.clone();
        Self {
            config,
            inquirer,
            clock,
            reader: None,
            writer: None,
            admin: None,
            record_limits: BTreeMap::new(),
            takes_trials: false,
        }
    }

    /// Probes one right.
    pub(crate) fn ask(&mut self, right: &Right) -> Answer {
        let asked = match (right.operation, &right.resource) {
            (Operation::Read, Resource::Topic(topic)) => self.read(topic),
            (Operation::Write, Resource::Topic(topic)) => self.write(topic),
            (Operation::Describe, Resource::Topic(topic)) => self.describe(topic),
            (Operation::DescribeConfigs, Resource::Topic(topic)) => self.configs(topic),
            (Operation::Create, Resource::TopicPrefix(_)) => self.create(),
            (Operation::Read, Resource::TopicPrefix(_)) => self.read(&self.config.events_topic()),
            (Operation::DescribeConfigs, Resource::TopicPrefix(_)) => {
                self.configs(&self.config.events_topic())
            }
            (Operation::Read, Resource::Group(group) | Resource::GroupPrefix(group)) => {
                self.commit(group)
            }
            (Operation::DescribeConfigs, Resource::Cluster) => self.cluster_configs(),
            (operation, resource) => Ok(Answer::Untried(format!("{operation} on {resource}"))),
        };
        asked.unwrap_or_else(|error| match is_denial(&error) {
            true => Answer::Missing,
            false => Answer::Untried(error.to_string()),
        })
    }

    fn deadline(&self) -> Instant {
        self.clock.instant() + self.config.limits.request_timeout
    }

    /// Returns `None` if the topic exists.
    fn absent(&self, topic: &str) -> KafkaResult<Option<Answer>> {
        let (found, _) = self.inquirer.topic(topic)?;
        Ok(found.is_none().then(|| Answer::NoTopic(topic.to_owned())))
    }

    fn describe(&self, topic: &str) -> KafkaResult<Answer> {
        Ok(self.absent(topic)?.unwrap_or(Answer::Granted))
    }

    fn read(&mut self, topic: &str) -> KafkaResult<Answer> {
        if let Some(absent) = self.absent(topic)? {
            return Ok(absent);
        }
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => {
                let settings = self.config.reader(FETCH_WAIT);
                BaseConsumer::from_config_and_context(&settings, Context::default())?
            }
        };
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition_offset(topic, PARTITION, RawOffset::End)?;
        reader.assign(&list)?;
        let answer = await_fetch(&reader, &*self.clock, self.deadline());
        if answer == Answer::Granted {
            reader.unassign()?;
            self.reader = Some(reader);
        }
        Ok(answer)
    }

    fn write(&mut self, topic: &str) -> KafkaResult<Answer> {
        // A producer keeps a record for an unknown topic until the record's timeout.
        if let Some(absent) = self.absent(topic)? {
            return Ok(absent);
        }
        if self.takes_trials {
            return Ok(Answer::Untried("brokers take a record with acks=2".into()));
        }
        let deadline = self.deadline();
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(trial_writer(&self.config)?),
        };
        let trials = Arc::clone(writer.context());
        trials.lock().remove(topic);
        let record = BaseRecord::<(), str>::to(topic).partition(PARTITION).payload("never stored");
        writer.send(record).map_err(|(error, _)| error)?;
        let refused = loop {
            writer.poll(POLL);
            match trials.lock().remove(topic) {
                Some(reported) => break reported,
                None if self.clock.instant() < deadline => {}
                None => return Ok(timed_out()),
            }
        };
        match refused {
            None => {
                tracing::warn!(
                    topic,
                    "a broker has taken a record with acks=2: Write is not tried again"
                );
                self.takes_trials = true;
                Ok(Answer::Granted)
            }
            Some(error) if code(&error) == Some(RDKafkaErrorCode::InvalidRequiredAcks) => {
                Ok(Answer::Granted)
            }
            Some(error) => Err(error),
        }
    }

    fn configs(&mut self, topic: &str) -> KafkaResult<Answer> {
        match self.absent(topic) {
            Ok(None) => {}
            // DescribeConfigs does not require Describe.
            Err(error) if is_denial(&error) => {}
            Ok(Some(absent)) => return Ok(absent),
            Err(error) => return Err(error),
        }
        self.read_configs(&ResourceSpecifier::Topic(topic))
    }

    fn cluster_configs(&mut self) -> KafkaResult<Answer> {
        match self.inquirer.brokers()?.first() {
            Some((broker, _)) => self.read_configs(&ResourceSpecifier::Broker(*broker)),
            None => Ok(Answer::Untried("no broker is up".into())),
        }
    }

    /// A denial arrives as a description without entries.
    fn read_configs(&mut self, wanted: &ResourceSpecifier<'_>) -> KafkaResult<Answer> {
        let timeout = Some(self.config.limits.request_timeout);
        let admin = match &mut self.admin {
            Some(admin) => admin,
            none => {
                let settings = self.config.inquirer();
                none.insert(AdminClient::from_config_and_context(&settings, Context::default())?)
            }
        };
        let options = AdminOptions::new().request_timeout(timeout).operation_timeout(timeout);
        let described = Handle::current().block_on(admin.describe_configs([wanted], &options))?;
        match described.into_iter().next() {
            Some(Ok(found)) if !found.entries.is_empty() => {
                if let ResourceSpecifier::Topic(topic) = wanted {
                    let limit = record_bytes_max(&Settings(&found));
                    self.record_limits.insert((*topic).to_owned(), limit);
                }
                Ok(Answer::Granted)
            }
            Some(Ok(_)) => Ok(Answer::Missing),
            Some(Err(code)) => Err(KafkaError::AdminOp(code)),
            None => Ok(Answer::Untried("the broker does not answer".into())),
        }
    }

    fn create(&self) -> KafkaResult<Answer> {
        let preparation = Preparation::new(&self.config, &self.inquirer, &*self.clock);
        let tried = preparation.and_then(|preparation| preparation.try_creation());
        Ok(match tried {
            Ok(()) => Answer::Granted,
            Err(crate::OpenError::Refused { .. }) => Answer::Missing,
            Err(error) => Answer::Untried(error.to_string()),
        })
    }

    fn commit(&self, group: &str) -> KafkaResult<Answer> {
        let mut settings = self.config.inquirer();
        settings.set("group.id", group).set("session.timeout.ms", COMMIT_MS);
        let committer: BaseConsumer<Context> =
            BaseConsumer::from_config_and_context(&settings, Context::default())?;
        let mut list = TopicPartitionList::with_capacity(1);
        let topic = self.config.events_topic();
        list.add_partition_offset(&topic, NO_PARTITION, RawOffset::Offset(0))?;
        let deadline = self.deadline();
        loop {
            let refused = committer.commit(&list, CommitMode::Sync).err();
            // Without any right on the group the coordinator lookup fails, and `poll` returns the
            // error.
            let polled = || committer.poll(Duration::ZERO).and_then(Result::err);
            for error in refused.into_iter().chain(polled()) {
                match code(&error) {
                    Some(RDKafkaErrorCode::GroupAuthorizationFailed) => return Ok(Answer::Missing),
                    Some(
                        RDKafkaErrorCode::UnknownTopicOrPartition
                        | RDKafkaErrorCode::TopicAuthorizationFailed,
                    ) => return Ok(Answer::Granted),
                    _ => {}
                }
            }
            if self.clock.instant() >= deadline {
                return Ok(timed_out());
            }
        }
    }
}

fn await_fetch(reader: &BaseConsumer<Context>, clock: &dyn Clock, deadline: Instant) -> Answer {
    loop {
        match reader.poll(POLL) {
            Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Answer::Granted,
            Some(Err(error))
                if code(&error) == Some(RDKafkaErrorCode::TopicAuthorizationFailed) =>
            {
                return Answer::Missing;
            }
            _ if clock.instant() >= deadline => return timed_out(),
            _ => {}
        }
    }
}

fn timed_out() -> Answer {
    Answer::Untried("the broker does not answer in time".into())
}

fn code(error: &KafkaError) -> Option<RDKafkaErrorCode> {
    match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    }
}

/// Returns `true` if the broker authenticated this user and denied the request.
pub(crate) fn is_denial(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as C;
    let denials =
        [C::TopicAuthorizationFailed, C::GroupAuthorizationFailed, C::ClusterAuthorizationFailed];
    code(error).is_some_and(|code| denials.contains(&code))
}

fn trial_writer(config: &KafkaConfig) -> KafkaResult<BaseProducer<Trial>> {
    let mut settings = config.inquirer();
    settings
        .set("enable.idempotence", "false")
        .set("acks", ACKS)
        .set("linger.ms", "0")
        .set("message.send.max.retries", "0")
        .set("message.timeout.ms", config.limits.request_timeout.as_millis().to_string());
    BaseProducer::from_config_and_context(&settings, Trial::default())
}

/// Stores the delivery result of each topic's trial record.
#[derive(Default)]
struct Trial(Mutex<HashMap<String, Option<KafkaError>>>);

impl Trial {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<KafkaError>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Trial {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka client");
    }
}

impl ProducerContext for Trial {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let (topic, refused) = match result {
            Ok(message) => (message.topic(), None),
            Err((error, message)) => (message.topic(), Some(error.clone())),
        };
        self.lock().insert(topic.to_owned(), refused);
    }
}

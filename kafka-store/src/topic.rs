//! The log's topics: created with settings that keep events for ever, refused by name without.

use std::sync::Arc;
use std::time::Duration;

use kafold_core::Clock;
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::runtime::Handle;

use crate::client::{Context, Inquirer, TopicShape, open_error, text};
use crate::config::KafkaConfig;
use crate::error::OpenError;
use crate::judge::{
    ADDED_PARTITIONS, FOR_EVER, REPLICAS_SAFE, Settings, findings, judge_beside, record_bytes_max,
};
use crate::operate::MadeTopic;

/// Partitions of a new log when the URL says nothing.
const PARTITIONS_DEFAULT: u32 = 12;
/// Copies of a new log's partitions when the URL says nothing and there are brokers enough.
const REPLICATION_DEFAULT: usize = 3;
/// Forwarded commands are kept for a day.
const COMMANDS_RETENTION_MS: &str = "86400000";
/// Answers to them are kept for an hour.
const REPLIES_RETENTION_MS: &str = "3600000";
/// Longest wait for the settings of a topic which the asked broker may not have heard of yet. A
/// missing right looks the same, and a first start names the right within seconds.
const SETTINGS_PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at a topic that is being created.
const CREATION_POLL: Duration = Duration::from_millis(50);
/// Kafka's own `group.min.session.timeout.ms`, should a broker not tell.
const SESSION_TIMEOUT_MIN_DEFAULT: Duration = Duration::from_secs(6);

/// The events topic as it was found or made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventsTopic {
    pub(crate) partitions: u32,
    /// The topic's `max.message.bytes`: bytes of the largest record, everything included.
    pub(crate) record_bytes_max: usize,
    /// The shortest session timeout that the brokers allow to a member of a group.
    pub(crate) session_timeout_min: Duration,
    /// `true` if this process has just created the topic.
    pub(crate) is_new: bool,
}

/// Creates the topics that are absent and checks the events topic; tells which were there. Blocks;
/// runs on a thread of the runtime that may.
pub(crate) fn prepare(
    config: &KafkaConfig,
    inquirer: &Inquirer,
    clock: &Arc<dyn Clock>,
) -> Result<(EventsTopic, Vec<MadeTopic>), OpenError> {
    let preparation = Preparation::new(config, inquirer, &**clock)?;
    let topic = config.events_topic();
    let (found, brokers) = preparation.look(&topic)?;
    let replicas = config.replication.map_or(brokers.min(REPLICATION_DEFAULT), usize::from);
    let partitions = match found {
        Some(shape) => used_partitions(config, shape.partitions),
        None => config.partitions.unwrap_or(PARTITIONS_DEFAULT),
    };
    preparation.create(&topic, found, partitions, replicas, FOR_EVER)?;
    // Nothing is made beside a topic that is refused.
    let events = preparation.check(&topic)?;
    let mut made = vec![MadeTopic { topic, existed: found.is_some() }];
    let (commands, replies) = (config.commands_topic(), config.replies_topic());
    for (topic, retention) in [(commands, COMMANDS_RETENTION_MS), (replies, REPLIES_RETENTION_MS)] {
        let (found, _) = preparation.look(&topic)?;
        preparation.create(&topic, found, partitions, replicas, retention)?;
        made.push(MadeTopic { topic, existed: found.is_some() });
    }
    let session_timeout_min = preparation.session_timeout_min();
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    let is_new = found.is_none();
    Ok((EventsTopic { session_timeout_min, is_new, ..events }, made))
}

/// Returns the events topic, checked as in [`prepare`]. Creates nothing and reads no other topic.
/// Blocks.
pub(crate) fn find(
    config: &KafkaConfig,
    inquirer: &Inquirer,
    clock: &Arc<dyn Clock>,
) -> Result<EventsTopic, OpenError> {
    let preparation = Preparation::new(config, inquirer, &**clock)?;
    let topic = config.events_topic();
    if preparation.look(&topic)?.0.is_none() {
        let remedy = "start the service, or make it with `kafold topic create`";
        let cause = format!("there is no topic {topic} yet: {remedy}");
        return Err(OpenError::Unavailable {
            brokers: config.brokers.clone(),
            doing: format!("looking for topic {topic}"),
            cause: text(cause),
        });
    }
    let events = preparation.check(&topic)?;
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(EventsTopic { session_timeout_min: preparation.session_timeout_min(), ..events })
}

/// The topics of commands and replies have as many partitions as that of the events: who owns one of
/// these handles the commands of the same number. Blocks like [`prepare`], and comes after the log
/// itself was checked: where somebody added partitions to the events topic, that is what is wrong.
pub(crate) fn check_beside(
    config: &KafkaConfig,
    inquirer: &Inquirer,
    partitions: u32,
) -> Result<(), OpenError> {
    for topic in [config.commands_topic(), config.replies_topic()] {
        let found = shape(config, inquirer, &topic)?.partitions;
        if let Some(finding) = judge_beside(config, &topic, found, partitions) {
            return Err(OpenError::UnsafeTopic { topic, findings: vec![finding] });
        }
    }
    Ok(())
}

/// Returns the number of partitions that the log uses of a topic with so many: the configured number, if
/// added partitions are accepted.
pub(crate) fn used_partitions(config: &KafkaConfig, found: u32) -> u32 {
    let wanted = config.partitions.filter(|_| config.allow_unsafe.contains(ADDED_PARTITIONS));
    wanted.map_or(found, |wanted| wanted.min(found))
}

fn look(
    config: &KafkaConfig,
    inquirer: &Inquirer,
    topic: &str,
) -> Result<(Option<TopicShape>, usize), OpenError> {
    let doing = || format!("looking for topic {topic}");
    let found = inquirer.topic(topic);
    let found = found.map_err(|error| open_error(config, doing(), error, inquirer.last_error()))?;
    inquirer.check_private()?;
    Ok(found)
}

fn shape(config: &KafkaConfig, inquirer: &Inquirer, topic: &str) -> Result<TopicShape, OpenError> {
    let (shape, _) = look(config, inquirer, topic)?;
    shape.ok_or_else(|| {
        let gone = KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition);
        open_error(config, format!("checking topic {topic}"), gone, inquirer.last_error())
    })
}

fn admin(config: &KafkaConfig) -> Result<AdminClient<Context>, OpenError> {
    let create = AdminClient::from_config_and_context(&config.inquirer(), Context::default());
    create.map_err(|error| open_error(config, "creating a client", error, None))
}

/// Asks about topics, and makes them; every call blocks.
pub(crate) struct Preparation<'a> {
    config: &'a KafkaConfig,
    inquirer: &'a Inquirer,
    clock: &'a dyn Clock,
    admin: AdminClient<Context>,
}

impl<'a> Preparation<'a> {
    pub(crate) fn new(
        config: &'a KafkaConfig,
        inquirer: &'a Inquirer,
        clock: &'a dyn Clock,
    ) -> Result<Self, OpenError> {
        Ok(Self { config, inquirer, clock, admin: admin(config)? })
    }

    pub(crate) fn error(&self, doing: String, error: KafkaError) -> OpenError {
        open_error(self.config, doing, error, self.inquirer.last_error())
    }

    pub(crate) fn look(&self, topic: &str) -> Result<(Option<TopicShape>, usize), OpenError> {
        look(self.config, self.inquirer, topic)
    }

    fn options(&self) -> AdminOptions {
        let timeout = self.config.limits.request_timeout;
        AdminOptions::new().request_timeout(Some(timeout)).operation_timeout(Some(timeout))
    }

    /// Creates the topic unless it was found, and waits until every partition has a leader.
    fn create(
        &self,
        topic: &str,
        found: Option<TopicShape>,
        partitions: u32,
        replicas: usize,
        retention_ms: &str,
    ) -> Result<(), OpenError> {
        if found.is_some_and(|shape| shape.led) {
            return Ok(());
        }
        if found.is_none() {
            self.request_creation(topic, partitions, replicas, retention_ms, false)?;
            tracing::info!(topic, partitions, replicas, "topic created");
        }
        let deadline = self.clock.instant() + self.config.limits.request_timeout;
        while !self.look(topic)?.0.is_some_and(|shape| shape.led) {
            if self.clock.instant() >= deadline {
                let timed_out = KafkaError::MetadataFetch(RDKafkaErrorCode::LeaderNotAvailable);
                return Err(self.error(format!("waiting for leaders of topic {topic}"), timed_out));
            }
            Handle::current().block_on(self.clock.sleep(CREATION_POLL));
        }
        Ok(())
    }

    /// Whether the events topic could be made if it were absent; makes nothing.
    pub(crate) fn try_creation(&self) -> Result<(), OpenError> {
        self.request_creation(&self.config.events_topic(), 1, 1, FOR_EVER, true)
    }

    fn request_creation(
        &self,
        topic: &str,
        partitions: u32,
        replicas: usize,
        retention_ms: &str,
        is_trial: bool,
    ) -> Result<(), OpenError> {
        let in_sync = if replicas >= REPLICAS_SAFE { "2" } else { "1" };
        let fixed = TopicReplication::Fixed(i32::try_from(replicas).unwrap_or(i32::MAX));
        let new = NewTopic::new(topic, i32::try_from(partitions).unwrap_or(i32::MAX), fixed)
            .set("cleanup.policy", "delete")
            .set("retention.ms", retention_ms)
            .set("retention.bytes", "-1")
            .set("min.insync.replicas", in_sync)
            .set("unclean.leader.election.enable", "false")
            .set("message.timestamp.type", "CreateTime");
        let creation = self.admin.create_topics([&new], &self.options().validate_only(is_trial));
        let doing =
            || format!("creating topic {topic} ({partitions} partitions, {replicas} replicas)");
        let results =
            Handle::current().block_on(creation).map_err(|error| self.error(doing(), error))?;
        for result in results {
            match result {
                // Another node was first; what it made is checked like any other.
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, RDKafkaErrorCode::InvalidTopic)) => {
                    return Err(self.invalid(topic, doing()));
                }
                Err((_, code)) => return Err(self.error(doing(), KafkaError::AdminOp(code))),
            }
        }
        Ok(())
    }

    /// The refusal of a topic's name. The client drops the broker's text, which names a topic whose name
    /// is the same after `.` became `_`, as in names of metrics.
    fn invalid(&self, topic: &str, doing: String) -> OpenError {
        let plain = |name: &str| name.replace('.', "_");
        let all = self.inquirer.topics().unwrap_or_default();
        match all.into_iter().find(|other| plain(other) == plain(topic)) {
            Some(other) => OpenError::Refused {
                brokers: self.config.brokers.clone(),
                doing,
                remedy: "choose another log name".into(),
                cause: text(format!(
                    "there is a topic {other}, and Kafka does not tell names apart that differ in . \
                     and _ only"
                )),
            },
            None => self.error(doing, KafkaError::AdminOp(RDKafkaErrorCode::InvalidTopic)),
        }
    }

    /// What the brokers say, or Kafka's own default where they do not tell.
    fn session_timeout_min(&self) -> Duration {
        let asked = self.inquirer.brokers().ok().and_then(|brokers| {
            let resource = self.describe_broker(brokers.first()?.0).ok()?;
            Settings(&resource).get("group.min.session.timeout.ms")?.parse().ok()
        });
        asked.map_or(SESSION_TIMEOUT_MIN_DEFAULT, Duration::from_millis)
    }

    /// The settings of a broker.
    pub(crate) fn describe_broker(&self, broker: i32) -> Result<ConfigResource, OpenError> {
        let wanted = ResourceSpecifier::Broker(broker);
        self.describe(&wanted, &format!("reading the settings of broker {broker}"))?.ok_or_else(
            || OpenError::Refused {
                brokers: self.config.brokers.clone(),
                doing: format!("reading the settings of broker {broker}"),
                remedy: "allow this user DescribeConfigs on the cluster".into(),
                cause: Arc::new(KafkaError::AdminOp(RDKafkaErrorCode::ClusterAuthorizationFailed)),
            },
        )
    }

    fn check(&self, topic: &str) -> Result<EventsTopic, OpenError> {
        let shape = shape(self.config, self.inquirer, topic)?;
        let resource = self.describe_topic(topic)?;
        let settings = Settings(&resource);
        let findings = findings(self.config, topic, shape, &settings);
        if !findings.is_empty() {
            return Err(OpenError::UnsafeTopic { topic: topic.into(), findings });
        }
        Ok(EventsTopic {
            partitions: used_partitions(self.config, shape.partitions),
            record_bytes_max: record_bytes_max(&settings),
            session_timeout_min: SESSION_TIMEOUT_MIN_DEFAULT,
            is_new: false,
        })
    }

    /// The settings of a topic that is there.
    pub(crate) fn describe_topic(&self, topic: &str) -> Result<ConfigResource, OpenError> {
        let patience = self.config.limits.request_timeout.min(SETTINGS_PATIENCE);
        let deadline = self.clock.instant() + patience;
        let mut pause = CREATION_POLL;
        let wanted = ResourceSpecifier::Topic(topic);
        let doing = format!("reading the settings of topic {topic}");
        loop {
            // A refusal for one topic reaches us as a description without entries, and so does that
            // the broker that was asked has not yet heard of a topic that was just made.
            match self.describe(&wanted, &doing)? {
                Some(resource) => return Ok(resource),
                None if self.clock.instant() >= deadline => return Err(self.unreadable(topic)),
                None => Handle::current().block_on(self.clock.sleep(pause)),
            }
            // Doubles the pause, so a user without rights sends few requests.
            pause *= 2;
        }
    }

    /// `None` when the answer holds nothing.
    fn describe(
        &self,
        wanted: &ResourceSpecifier<'_>,
        doing: &str,
    ) -> Result<Option<ConfigResource>, OpenError> {
        let description = self.admin.describe_configs([wanted], &self.options());
        let results = Handle::current()
            .block_on(description)
            .map_err(|error| self.error(doing.into(), error))?;
        match results.into_iter().next() {
            Some(Ok(resource)) => Ok(Some(resource).filter(|found| !found.entries.is_empty())),
            Some(Err(code)) => Err(self.error(doing.into(), KafkaError::AdminOp(code))),
            None => Ok(None),
        }
    }

    fn unreadable(&self, topic: &str) -> OpenError {
        OpenError::Refused {
            brokers: self.config.brokers.clone(),
            doing: format!("reading the settings of topic {topic}"),
            remedy: "allow this user DescribeConfigs on the topic: unread settings may lose events"
                .into(),
            cause: Arc::new(KafkaError::AdminOp(RDKafkaErrorCode::TopicAuthorizationFailed)),
        }
    }
}

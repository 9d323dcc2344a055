//! A log as its operator looks at it: brokers, topics, partitions. Nothing here claims a partition,
//! joins a group or commits an offset, and only [`Operator::create_topics`] makes anything.

pub(crate) mod api;
mod presence;
mod readable;

use std::io;
use std::sync::Arc;

use kafold_core::Clock;
use rdkafka::error::KafkaError;

use crate::client::{Inquirer, TopicShape, check_hosts, open_error};
use crate::config::KafkaConfig;
use crate::error::{Finding, OpenError};
use crate::handshake;
use crate::judge::{self, Settings};
use crate::prober::Prober;
use crate::rights::{Answer, Right, Role};
use crate::topic::{self, Preparation};

pub use crate::handshake::Peer;
pub use api::BrokerApi;
pub use presence::Presence;
pub use readable::{PartitionFacts, ReadableLog};

/// Most attempts to probe a right without a clear answer from the brokers.
const RIGHT_TRIES_MAX: u32 = 3;

/// The version of the client library.
pub fn client_version() -> String {
    rdkafka::util::get_rdkafka_version().1
}

/// Looks at the log that a [`KafkaConfig`] names. Cheap to clone.
#[derive(Clone)]
pub struct Operator {
    config: Arc<KafkaConfig>,
    inquirer: Arc<Inquirer>,
    clock: Arc<dyn Clock>,
}

/// A broker that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broker {
    /// Its id.
    pub id: i32,
    /// `HOST:PORT`, as it advertises itself.
    pub address: String,
}

/// A topic that is there now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeTopic {
    /// Its name.
    pub topic: String,
    /// Whether it was there before.
    pub existed: bool,
}

/// What there is to say about one topic of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicReport {
    /// Its name.
    pub topic: String,
    /// Whether there is such a topic.
    pub exists: bool,
    /// Copies of the partition that has fewest; 0 for a topic that is absent.
    pub replicas: usize,
    /// What it is judged by.
    pub settings: Vec<SettingReport>,
}

/// One setting of a topic, judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingReport {
    /// The setting, such as `retention.ms`.
    pub setting: String,
    /// What the topic has.
    pub value: String,
    /// Why it is unsafe, if it is.
    pub finding: Option<Finding>,
    /// Whether `allow_unsafe` accepts it all the same.
    pub is_accepted: bool,
}

impl Operator {
    /// Makes the clients; refuses brokers of which no host has an address. Nothing is asked yet.
    pub async fn connect(config: KafkaConfig, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        let asked = config.clone();
        let made = tokio::task::spawn_blocking(move || {
            check_hosts(&asked)?;
            Inquirer::new(&asked)
                .map_err(|error| open_error(&asked, "creating a client", error, None))
        });
        let canceled = |_| open_error(&config, "creating a client", KafkaError::Canceled, None);
        let inquirer = Arc::new(made.await.map_err(canceled)??);
        Ok(Self { config: Arc::new(config), inquirer, clock })
    }

    /// Which log it is.
    pub fn config(&self) -> &KafkaConfig {
        &self.config
    }

    /// The brokers that are up.
    pub async fn brokers(&self) -> Result<Vec<Broker>, OpenError> {
        self.blocking("asking for the brokers", |this| {
            let found = this.inquirer.brokers();
            let brokers = found.map_err(|error| this.error("asking for the brokers", error))?;
            Ok(brokers.into_iter().map(|(id, address)| Broker { id, address }).collect())
        })
        .await
    }

    /// Returns the requests the broker supports, and the TLS facts of the connection; `None` in
    /// clear text.
    pub async fn broker_api(&self, broker: &Broker) -> io::Result<(BrokerApi, Option<Peer>)> {
        let (address, config) = (broker.address.clone(), Arc::clone(&self.config));
        let asked = tokio::task::spawn_blocking(move || {
            let timeout = config.limits.request_timeout;
            let mut stream = handshake::connect(&config.inquirer(), &address, timeout)?;
            Ok((api::ask(&mut *stream)?, stream.peer()))
        });
        asked.await.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
    }

    /// Those of the wanted settings that the broker tells, with their values.
    pub async fn broker_settings(
        &self,
        broker: i32,
        wanted: &'static [&'static str],
    ) -> Result<Vec<(&'static str, String)>, OpenError> {
        self.blocking("reading the settings of a broker", move |this| {
            let resource = this.preparation()?.describe_broker(broker)?;
            let settings = Settings(&resource);
            let value = |name: &&'static str| Some((*name, settings.get(name)?.to_owned()));
            Ok(wanted.iter().filter_map(value).collect())
        })
        .await
    }

    /// Makes the topics of the log that are absent, as the store does when it opens it, and refuses
    /// unsafe ones.
    pub async fn create_topics(&self) -> Result<Vec<MadeTopic>, OpenError> {
        self.blocking("preparing topics", |this| {
            let (events, made) = topic::prepare(&this.config, &this.inquirer, &this.clock)?;
            topic::check_beside(&this.config, &this.inquirer, events.partitions)?;
            Ok(made)
        })
        .await
    }

    /// Judges the topics of the log, the events first; absent ones are told so and not made.
    pub async fn check_topics(&self) -> Result<Vec<TopicReport>, OpenError> {
        self.blocking("checking topics", |this| {
            let (preparation, config) = (this.preparation()?, &*this.config);
            let topic = config.events_topic();
            let (events, _) = preparation.look(&topic)?;
            let mut reports = vec![this.report_events(&preparation, &topic, events)?];
            for topic in [config.commands_topic(), config.replies_topic()] {
                let (found, _) = preparation.look(&topic)?;
                let mut report = report_beside(config, topic, found, events);
                // Optional rights: a doctor without them judges the other settings.
                if report.exists
                    && let Ok(resource) = preparation.describe_topic(&report.topic)
                {
                    report.settings.push(judge::judge_record_limit_beside(&Settings(&resource)));
                }
                reports.push(report);
            }
            Ok(reports)
        })
        .await
    }

    /// Whether this user may make the topics; tried without making any.
    pub async fn may_create_topics(&self) -> Result<(), OpenError> {
        self.blocking("trying to create a topic", |this| this.preparation()?.try_creation()).await
    }

    /// Probes each right of a role, including optional rights. Changes nothing.
    pub async fn try_rights(&self, role: Role) -> Result<Vec<(Right, Answer)>, OpenError> {
        self.blocking("trying rights", move |this| {
            let inquirer = Arc::clone(&this.inquirer);
            // A refused login or certificate is reported once, not for each right.
            inquirer.brokers().map_err(|error| this.error("connecting to the brokers", error))?;
            let mut prober = Prober::new(&this.config, inquirer, Arc::clone(&this.clock));
            let rights = role.rights(&this.config).into_iter();
            let mut ask = |right: &Right| {
                let mut answer = prober.ask(right);
                for _ in 1..RIGHT_TRIES_MAX {
                    if let Answer::Untried(_) | Answer::NoTopic(_) = answer {
                        answer = prober.ask(right);
                    }
                }
                answer
            };
            Ok(rights.map(|right| (right.clone(), ask(&right))).collect())
        })
        .await
    }

    /// The events topic, to be read; `None` when there is none.
    pub async fn log(&self) -> Result<Option<ReadableLog>, OpenError> {
        let found = self.blocking("looking for the events topic", |this| {
            Ok(this.preparation()?.look(&this.config.events_topic())?.0)
        });
        let Some(shape) = found.await? else { return Ok(None) };
        let partitions = topic::used_partitions(&self.config, shape.partitions);
        ReadableLog::start(self, partitions, shape.partitions).map(Some)
    }

    fn report_events(
        &self,
        preparation: &Preparation<'_>,
        topic: &str,
        shape: Option<TopicShape>,
    ) -> Result<TopicReport, OpenError> {
        let settings = match shape {
            Some(shape) => {
                let resource = preparation.describe_topic(topic)?;
                let settings = Settings(&resource);
                let mut reports = judge::judge_events(&self.config, topic, shape, &settings);
                reports.push(judge::judge_record_limit(&settings));
                reports
            }
            None => Vec::new(),
        };
        Ok(report(topic.to_owned(), shape, settings))
    }

    /// Runs what blocks on a thread that may.
    async fn blocking<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Self) -> Result<T, OpenError> + Send + 'static,
    ) -> Result<T, OpenError> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.map_err(|_| self.error(doing, KafkaError::Canceled))?
    }

    fn preparation(&self) -> Result<Preparation<'_>, OpenError> {
        Preparation::new(&self.config, &self.inquirer, &*self.clock)
    }

    fn error(&self, doing: &str, error: KafkaError) -> OpenError {
        open_error(&self.config, doing, error, self.inquirer.last_error())
    }
}

/// The topics of commands and replies must have as many partitions as the events, where those exist.
fn report_beside(
    config: &KafkaConfig,
    topic: String,
    shape: Option<TopicShape>,
    events: Option<TopicShape>,
) -> TopicReport {
    let settings = shape.map(|found| SettingReport {
        setting: "partitions".into(),
        value: found.partitions.to_string(),
        finding: events.and_then(|events| {
            let used = topic::used_partitions(config, events.partitions);
            judge::judge_beside(config, &topic, found.partitions, used)
        }),
        is_accepted: false,
    });
    report(topic, shape, settings.into_iter().collect())
}

fn report(topic: String, shape: Option<TopicShape>, settings: Vec<SettingReport>) -> TopicReport {
    let replicas = shape.map_or(0, |shape| shape.replicas);
    TopicReport { topic, exists: shape.is_some(), replicas, settings }
}

//! What all clients of the broker share: their log lines, their errors, and questions that need no
//! assignment.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use kafold_core::clock::SystemClock;
use kafold_core::store::Cause;
use kafold_core::{Clock, Offset, Partition};
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::groups::{GroupInfo, GroupMemberInfo};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use secrecy::{ExposeSecret, SecretString};

use crate::config::KafkaConfig;
use crate::error::OpenError;
use crate::handshake;
use crate::refusal;
pub(crate) use crate::refusal::Refusal;
use crate::transport::{CLEAR_TEXT, Login};

/// First timeout of a request before the first connection; each later timeout is twice as long.
const FIRST_STEP: Duration = Duration::from_millis(600);
/// Interval at which a long-lived client compares its password with the source.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(3);
/// Most queued log lines and errors passed to the context of a client after one request.
const EVENTS_MAX: usize = 64;

/// An error reported by a client outside of any request, with librdkafka's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Complaint {
    pub(crate) error: KafkaError,
    /// The text of librdkafka, such as `sasl_ssl://HOST:PORT/1: SASL authentication error: …`.
    pub(crate) reason: String,
    /// Cause and remedy of a permanent error; `None` for an error worth a retry.
    pub(crate) refusal: Option<Refusal>,
}

impl Complaint {
    /// Returns `true` if a handshake of our own may find the cause: librdkafka has one text for all
    /// certificate faults, and a lost connection may mean TLS at only one end.
    fn is_suspect(&self) -> bool {
        refusal::is_certificate(&self.reason)
            || self.reason.contains("PLAINTEXT broker listener")
            || self.reason.contains("incorrect security.protocol")
            || refusal::wants_certificate(&self.reason)
    }
}

/// Converts librdkafka's messages into `tracing` events. Keeps the newest complaint, which explains
/// a request without an answer.
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

    /// Clears the complaint after a broker has answered.
    fn forgive(&self) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
        // "All brokers are down" follows the error with the cause, and is less specific.
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

/// Copies a changed password from its source to a long-lived client. librdkafka uses the password
/// from the next connection on.
pub(crate) struct Renewal {
    login: Option<Login>,
    given: SecretString,
    next: Instant,
}

impl Renewal {
    /// Creates the renewal for a client just made from the same configuration.
    pub(crate) fn new(config: &KafkaConfig) -> Self {
        let login = config.login.clone().filter(|login| !login.password.is_literal());
        let given = login.as_ref().map(|login| login.password.read()).unwrap_or_default();
        Self { login, given, next: SystemClock.instant() + RENEWAL_INTERVAL }
    }

    /// Passes a changed password to the client. Reads the source at most once per
    /// [`RENEWAL_INTERVAL`]; further calls return at once.
    pub(crate) fn look<C: ClientContext>(&mut self, client: &rdkafka::client::Client<C>) {
        let Some(login) = &self.login else { return };
        let now = SystemClock.instant();
        if now < self.next {
            return;
        }
        self.next = now + RENEWAL_INTERVAL;
        let read = login.password.read();
        if read.expose_secret() != self.given.expose_secret()
            && kafold_kafka_credentials::set(client, &login.user, read.expose_secret())
        {
            tracing::info!("the log's password has changed and is used from now on");
            self.given = read;
        }
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

/// Sends requests to brokers. Every call blocks for at most the request timeout, plus some seconds
/// for a diagnosis when no broker answers.
pub(crate) struct Inquirer {
    config: KafkaConfig,
    client: RwLock<Arc<Client>>,
    timeout: Duration,
}

struct Client {
    consumer: BaseConsumer<Context>,
    /// The fingerprint of the files and secrets in use by the client.
    fingerprint: u64,
    /// `true` once a broker has answered.
    is_connected: AtomicBool,
    /// `true` once no broker can receive forbidden clear text.
    is_private: AtomicBool,
}

impl Inquirer {
    pub(crate) fn new(config: &KafkaConfig) -> KafkaResult<Self> {
        let client = RwLock::new(Arc::new(Client::new(config)?));
        Ok(Self { config: config.clone(), client, timeout: config.limits.request_timeout })
    }

    /// What the client last complained about, for when a question was not answered.
    pub(crate) fn last_error(&self) -> Option<Complaint> {
        self.client().consumer.context().complaint()
    }

    fn client(&self) -> Arc<Client> {
        Arc::clone(&self.client.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends a request, and diagnoses a missing answer. Before the first connection the timeouts
    /// grow from [`FIRST_STEP`], so a permanent error is reported early.
    fn ask<T>(
        &self,
        timeout: Duration,
        question: impl Fn(&BaseConsumer<Context>, Duration) -> KafkaResult<T>,
    ) -> KafkaResult<T> {
        let client = self.client();
        let mut left = timeout;
        let mut step = match client.is_connected.load(Ordering::Relaxed) {
            true => timeout,
            false => FIRST_STEP,
        };
        loop {
            let wait = step.min(left);
            let answer = question(&client.consumer, wait);
            client.serve();
            left -= wait;
            match answer {
                Err(error) if is_silence(&error) => {
                    self.look_into(&client);
                    let is_refused = client.complaint().is_some_and(|said| said.refusal.is_some());
                    if is_refused || left.is_zero() {
                        return Err(error);
                    }
                }
                answered => {
                    client.is_connected.store(true, Ordering::Relaxed);
                    client.consumer.context().forgive();
                    return answered;
                }
            }
            step *= 2;
        }
    }

    /// Adds the cause of a missing answer to the complaint. Replaces the client if a file or a
    /// secret has changed.
    fn look_into(&self, client: &Client) {
        let complaint = client.complaint();
        let is_suspect = complaint.as_ref().is_some_and(Complaint::is_suspect);
        if is_suspect || !client.is_connected.load(Ordering::Relaxed) {
            let reason = complaint.as_ref().map(|complaint| complaint.reason.as_str());
            let place = reason.and_then(refusal::place);
            if let Some(refusal) = handshake::examine(&self.config.inquirer(), place) {
                let complaint = complaint.unwrap_or(Complaint {
                    error: KafkaError::Global(RDKafkaErrorCode::BrokerTransportFailure),
                    reason: String::new(),
                    refusal: None,
                });
                let refusal = Some(refusal);
                client.consumer.context().complain(Complaint { refusal, ..complaint });
            }
        }
        if client.fingerprint != self.config.fingerprint()
            && let Ok(renewed) = Client::new(&self.config)
        {
            *self.client.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(renewed);
        }
    }

    /// Rejects clear text to brokers on other machines. The first broker may name such brokers.
    pub(crate) fn check_private(&self) -> Result<(), OpenError> {
        let client = self.client();
        if !must_be_private(&self.config) || client.is_private.load(Ordering::Relaxed) {
            return Ok(());
        }
        let brokers = self.brokers().map_err(|error| {
            open_error(&self.config, "asking for the brokers", error, self.last_error())
        })?;
        for (_, broker) in brokers {
            let addresses = broker.to_socket_addrs().into_iter().flatten();
            check_local(&broker, addresses)?;
        }
        client.is_private.store(true, Ordering::Relaxed);
        Ok(())
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
        let metadata =
            self.ask(timeout, |client, wait| client.fetch_metadata(Some(topic), wait))?;
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

    /// Returns the names of all topics visible to this user.
    pub(crate) fn topics(&self) -> KafkaResult<Vec<String>> {
        let metadata = self.ask(self.timeout, |client, wait| client.fetch_metadata(None, wait))?;
        Ok(metadata.topics().iter().map(|topic| topic.name().to_owned()).collect())
    }

    /// The brokers that are up: id, host and port of each.
    pub(crate) fn brokers(&self) -> KafkaResult<Vec<(i32, String)>> {
        self.brokers_beside(None)
    }

    /// The same, asked beside one topic: a smaller answer than with all topics.
    pub(crate) fn advertised(&self, topic: &str) -> KafkaResult<Vec<(i32, String)>> {
        self.brokers_beside(Some(topic))
    }

    fn brokers_beside(&self, topic: Option<&str>) -> KafkaResult<Vec<(i32, String)>> {
        let metadata = self.ask(self.timeout, |client, wait| client.fetch_metadata(topic, wait))?;
        let brokers = metadata.brokers().iter();
        Ok(brokers.map(|b| (b.id(), format!("{}:{}", b.host(), b.port()))).collect())
    }

    /// Returns the consumer groups visible to this user.
    pub(crate) fn groups(&self) -> KafkaResult<Vec<Group>> {
        let groups = self.ask(self.timeout, |client, wait| client.fetch_group_list(None, wait))?;
        Ok(groups.groups().iter().map(Group::of).collect())
    }

    /// Returns a group; `None` if the group does not exist or is not visible.
    pub(crate) fn group(&self, name: &str, timeout: Duration) -> KafkaResult<Option<Group>> {
        let groups = self.ask(timeout, |client, wait| client.fetch_group_list(Some(name), wait))?;
        Ok(groups.groups().iter().find(|found| found.name() == name).map(Group::of))
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
        let raw = raw_partition(partition);
        let (start, end) =
            self.ask(timeout, |client, wait| client.fetch_watermarks(topic, raw, wait))?;
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
        let found =
            self.ask(self.timeout, |client, wait| client.offsets_for_times(asked.clone(), wait))?;
        Ok(match found.elements().first().map(|element| element.offset()) {
            Some(RawOffset::Offset(raw)) => offset(raw)?,
            _ => end,
        })
    }
}

/// A consumer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) members: Vec<GroupMember>,
    /// `true` if a member uses the protocol of KIP-848, `group.protocol=consumer`. Brokers list such a
    /// group, and describe the group as dead to clients of the classic protocol such as kafold.
    pub(crate) is_of_new_protocol: bool,
}

/// A member of a consumer group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupMember {
    pub(crate) client_id: String,
    /// The remote address of the member's connection.
    pub(crate) host: String,
}

impl fmt::Display for GroupMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.client_id, self.host)
    }
}

impl Group {
    fn of(group: &GroupInfo) -> Self {
        let member = |member: &GroupMemberInfo| GroupMember {
            client_id: member.client_id().to_owned(),
            // Kafka writes an address as Java does, with an empty host name before it.
            host: member.client_host().trim_start_matches('/').to_owned(),
        };
        Self {
            name: group.name().to_owned(),
            members: group.members().iter().map(member).collect(),
            is_of_new_protocol: group.state() == DEAD,
        }
    }
}

/// The state of a group that a broker does not describe.
const DEAD: &str = "Dead";

impl Client {
    fn new(config: &KafkaConfig) -> KafkaResult<Self> {
        let settings = config.inquirer();
        let consumer = BaseConsumer::from_config_and_context(&settings, Context::default())?;
        Ok(Self {
            consumer,
            fingerprint: crate::transport::fingerprint(&settings),
            is_connected: AtomicBool::new(false),
            is_private: AtomicBool::new(false),
        })
    }

    fn complaint(&self) -> Option<Complaint> {
        self.consumer.context().complaint()
    }

    /// Hands the client's log lines and errors to its context.
    fn serve(&self) {
        // Each poll returns one event at most; `None` means no event or an event for the context.
        for _ in 0..EVENTS_MAX {
            drop(self.consumer.poll(Duration::ZERO));
        }
    }
}

/// Returns `true` for an error which means no answer at all.
fn is_silence(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as C;
    let silent = [C::BrokerTransportFailure, C::OperationTimedOut, C::AllBrokersDown, C::Resolve];
    error.rdkafka_error_code().is_some_and(|code| silent.contains(&code))
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

/// Rejects brokers of which none has an address: an unknown host name is a mistake in the URL,
/// while a silent broker may be starting. Rejects clear text to other machines. Blocks during name
/// lookups.
pub(crate) fn check_hosts(config: &KafkaConfig) -> Result<(), OpenError> {
    let mut unknown: Option<io::Error> = None;
    let mut is_one_known = false;
    for broker in config.brokers.split(',') {
        match broker.to_socket_addrs() {
            Err(error) if is_unknown_host(&error) => unknown = Some(error),
            Ok(addresses) => {
                is_one_known = true;
                if must_be_private(config) {
                    check_local(broker, addresses)?;
                }
            }
            Err(_) => is_one_known = true,
        }
    }
    let Some(error) = unknown.filter(|_| !is_one_known) else { return Ok(()) };
    Err(OpenError::Refused {
        brokers: config.brokers.clone(),
        doing: "looking up the brokers' hosts".into(),
        remedy: "check the host names in the URL".into(),
        cause: Arc::new(error),
    })
}

/// Returns the refusal of a broker with a host that has no address on this machine. Blocks during the
/// lookup. A name server that does not answer is no refusal.
pub(crate) fn without_address(broker: &str) -> Option<Refusal> {
    let error = broker.to_socket_addrs().err().filter(is_unknown_host)?;
    Some(advertised_without_address(broker, error))
}

fn advertised_without_address(broker: &str, error: impl fmt::Display) -> Refusal {
    Refusal::new(
        format!("the broker's advertised host {broker} has no address on this machine ({error})"),
        "set advertised.listeners of the broker to a name that this machine can look up, or give the name \
         an address here",
    )
}

/// Returns the refusal of a broker with an advertised host for which librdkafka found no address. A host of
/// the URL, which librdkafka calls a bootstrap broker, is checked by [`check_hosts`].
fn not_resolved(reason: &str) -> Option<Refusal> {
    let (place, rest) = reason.split_once("Failed to resolve '")?;
    let (broker, error) = rest.split_once("': ")?;
    const UNKNOWN: &str = "Name or service not known";
    (error.starts_with(UNKNOWN) && !place.contains("/bootstrap"))
        .then(|| advertised_without_address(broker, UNKNOWN))
}

fn must_be_private(config: &KafkaConfig) -> bool {
    !config.allow_unsafe.contains(CLEAR_TEXT) && !config.is_encrypted()
}

fn check_local(
    broker: &str,
    mut addresses: impl Iterator<Item = SocketAddr>,
) -> Result<(), OpenError> {
    match addresses.all(|address| address.ip().to_canonical().is_loopback()) {
        true => Ok(()),
        false => Err(OpenError::ClearText { broker: broker.to_owned() }),
    }
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
    let complained = || {
        let complaint = complaint.as_ref()?;
        complaint.refusal.clone().or_else(|| not_resolved(&complaint.reason))
    };
    match Refusal::of(&error, "").or_else(complained) {
        Some(Refusal { cause, remedy }) => {
            OpenError::Refused { brokers, doing, remedy, cause: text(cause) }
        }
        None => OpenError::Unavailable { brokers, doing, cause: waiting(error, complaint) },
    }
}

/// Joins the error with the client's last complaint, which is more specific.
fn waiting(error: KafkaError, complaint: Option<Complaint>) -> Cause {
    match complaint {
        Some(Complaint { reason, .. }) if !reason.is_empty() => text(format!("{error} ({reason})")),
        Some(complaint) if complaint.error != error => {
            text(format!("{error} ({})", complaint.error))
        }
        _ => Arc::new(error),
    }
}

pub(crate) fn text(text: String) -> Cause {
    Box::<dyn std::error::Error + Send + Sync>::from(text).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertised_host_without_an_address_is_named() {
        let Refusal { cause, remedy } = without_address("nowhere.invalid:9092").expect("unknown");
        assert!(cause.contains("nowhere.invalid:9092") && remedy.contains("advertised.listeners"));
        assert_eq!(without_address("localhost:9092"), None);
        assert_eq!(without_address("127.0.0.1:1"), None);
        let of = |place: &str, error: &str| {
            not_resolved(&format!(
                "{place}: Failed to resolve 'far.example:9092': {error} (after 0ms)"
            ))
        };
        let refusal = of("far.example:9092/1", "Name or service not known").expect("is permanent");
        assert!(refusal.cause.contains("host far.example:9092 has no address"), "{refusal:?}");
        assert_eq!(of("far.example:9092/bootstrap", "Name or service not known"), None);
        assert_eq!(of("far.example:9092/1", "Temporary failure in name resolution"), None);
    }
}

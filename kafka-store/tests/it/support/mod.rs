//! What the tests on a real broker share.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Append, Appended, Health, Owner, Ticket};
use kafold_core::{Clock, Commit, EventStore, ExpectedVersion, IdGenerator, StreamId, StreamIndex};
use kafold_kafka_store::{Assignment, KafkaConfig, KafkaStore, OpenError};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

/// How long anything may take that is waited for.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);

/// The broker of the tests, or a line that says what is skipped.
pub(crate) fn brokers(test: &str) -> Option<String> {
    let found = std::env::var("KAFOLD_TEST_KAFKA").ok();
    if found.is_none() {
        assert!(
            std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none(),
            "KAFOLD_TEST_KAFKA names no broker, and nothing may be skipped"
        );
        eprintln!(
            "skipped {test}: KAFOLD_TEST_KAFKA names no broker (dev/kafka up; dev/kafka env)"
        );
    }
    found
}

/// A log name that no other test uses.
pub(crate) fn new_name(prefix: &str) -> String {
    format!("{prefix}-{}", RandomIds.event_id())
}

pub(crate) fn config(brokers: &str, name: &str, options: &str) -> KafkaConfig {
    format!("kafka://{brokers}/{name}?{options}").parse().expect("a valid URL")
}

pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

pub(crate) fn owner(name: &str) -> Owner {
    let address = format!("{name}.test:8080");
    Owner { name: name.into(), address, started_at: SystemClock.now() }
}

pub(crate) async fn open_with(
    config: KafkaConfig,
    index: Arc<dyn StreamIndex>,
    name: &str,
) -> KafkaStore {
    KafkaStore::open(config, index, owner(name), clock(), Arc::new(RandomIds))
        .await
        .unwrap_or_else(|error| panic!("{error}"))
}

/// A process that goes for every partition, whatever a group says, and that does not come back for a
/// long time once it has lost one.
pub(crate) fn contender(config: &KafkaConfig) -> KafkaConfig {
    let mut config = config.clone();
    config.assignment = Assignment::Everything;
    config.limits.yield_backoff = Duration::from_secs(600);
    config.limits.yield_backoff_max = Duration::from_secs(600);
    config
}

/// A store that owns every partition.
pub(crate) async fn open(config: KafkaConfig, name: &str) -> KafkaStore {
    let store = open_with(config, Arc::new(MemoryIndex::new()), name).await;
    ready(&store).await;
    store
}

pub(crate) async fn ready(store: &KafkaStore) {
    until("the store is ready", || match store.health() {
        Health::Ready => Ok(()),
        Health::NotReady(reasons) => Err(reasons.join("; ")),
    })
    .await;
}

/// Waits until the condition holds; tells its last complaint when it does not in time.
pub(crate) async fn until<T>(what: &str, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let deadline = SystemClock.instant() + WAIT_MAX;
    loop {
        match condition() {
            Ok(done) => return done,
            Err(complaint) if SystemClock.instant() > deadline => {
                panic!("{what}: not within {WAIT_MAX:?}: {complaint}")
            }
            Err(_) => pause().await,
        }
    }
}

/// Between two looks at something that is waited for, with a deadline.
pub(crate) async fn pause() {
    rest(Duration::from_millis(5)).await;
}

/// Lets time pass in which nothing is to happen.
pub(crate) async fn rest(time: Duration) {
    SystemClock.sleep(time).await;
}

pub(crate) fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers).create().expect("an admin client")
}

/// A consumer of another program, which has joined a group and got its first answer.
pub(crate) fn joined(brokers: &str, group: &str, topic: &str) -> BaseConsumer {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("client.id", "a stranger")
        .set("group.id", group)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "6000")
        .create()
        .expect("a consumer");
    consumer.subscribe(&[topic]).expect("subscribed");
    let deadline = SystemClock.instant() + WAIT_MAX;
    while consumer.assignment().expect("known").count() == 0 {
        assert!(SystemClock.instant() < deadline, "the group gives it nothing");
        let _ = consumer.poll(Duration::from_millis(50));
    }
    consumer
}

/// Creates a topic as somebody else would.
pub(crate) async fn create_topic(
    brokers: &str,
    topic: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) {
    let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
    for (key, value) in settings {
        new = new.set(key, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    let created = admin(brokers).create_topics([&new], &options).await.expect("an answer");
    created.into_iter().for_each(|result| {
        result.expect("created");
    });
}

pub(crate) async fn delete_topic(brokers: &str, topic: &str) {
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    let deleted = admin(brokers).delete_topics(&[topic], &options).await.expect("an answer");
    deleted.into_iter().for_each(|result| {
        result.expect("deleted");
    });
}

/// Opens until nothing transient is in the way.
pub(crate) async fn retry_open<F>(
    config: KafkaConfig,
    open: impl Fn(KafkaConfig) -> F,
) -> KafkaStore
where
    F: Future<Output = Result<KafkaStore, OpenError>>,
{
    let deadline = SystemClock.instant() + WAIT_MAX;
    loop {
        match open(config.clone()).await {
            Ok(store) => return store,
            Err(error) => assert!(SystemClock.instant() < deadline, "not opened: {error}"),
        }
        pause().await;
    }
}

/// Opens until it is refused with all of the words: brokers take a while to agree on a change.
pub(crate) async fn until_refused<F>(
    config: KafkaConfig,
    open: impl Fn(KafkaConfig) -> F,
    words: &[&str],
) where
    F: Future<Output = Result<KafkaStore, OpenError>>,
{
    let deadline = SystemClock.instant() + WAIT_MAX;
    loop {
        let found = match open(config.clone()).await {
            Ok(_) => "it was opened".into(),
            Err(error) => error.to_string(),
        };
        if words.iter().all(|word| found.contains(word)) {
            return;
        }
        assert!(SystemClock.instant() < deadline, "{found:?} does not say {words:?}");
        pause().await;
    }
}

/// Produces one record to partition 0, as somebody else would.
pub(crate) fn produce(brokers: &str, topic: &str, headers: &[(&str, &[u8])]) {
    produce_value(brokers, topic, headers, "x");
}

pub(crate) fn produce_value(brokers: &str, topic: &str, headers: &[(&str, &[u8])], value: &str) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a producer");
    let mut owned = OwnedHeaders::new();
    for (key, value) in headers {
        owned = owned.insert(Header { key, value: Some(*value) });
    }
    let record = BaseRecord::to(topic).partition(0).key("somebody").payload(value).headers(owned);
    producer.send(record).map_err(|(error, _)| error).expect("queued");
    producer.flush(WAIT_MAX).expect("produced");
}

/// Appends until the outcome is known, always with the same command id, as a handler does.
pub(crate) async fn settle(
    store: &KafkaStore,
    stream: &StreamId,
    expected: ExpectedVersion,
    commit: &Commit,
) -> Appended {
    let deadline = SystemClock.instant() + WAIT_MAX;
    loop {
        let append = Append {
            stream: stream.clone(),
            expected,
            commit: commit.clone(),
            ticket: Ticket::next(),
            after: None,
            deadline: Some(SystemClock.instant() + Duration::from_secs(5)),
        };
        match store.submit(append).await {
            Ok(appended) => return appended,
            Err(error) => assert!(SystemClock.instant() < deadline, "not settled: {error}"),
        }
        pause().await;
    }
}

/// Reads a partition as any consumer does.
pub(crate) fn raw_records(brokers: &str, topic: &str) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "raw")
        .set("enable.partition.eof", "true")
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Beginning).expect("valid");
    consumer.assign(&list).expect("assigned");
    let mut records = Vec::new();
    loop {
        match consumer.poll(Duration::from_secs(20)).expect("an answer in time") {
            Ok(record) => records.push(record.detach()),
            Err(KafkaError::PartitionEOF(_)) => return records,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Makes a topic of these records, as somebody does who restores a copy.
pub(crate) async fn restore(brokers: &str, topic: &str, records: &[OwnedMessage]) {
    // The name of a topic that was just deleted is free again only when all brokers have heard of it.
    let settings = [("retention.ms", "-1"), ("cleanup.policy", "delete")];
    create_topic(brokers, topic, 1, &settings).await;
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .create()
        .expect("a producer");
    for copied in records {
        let mut record = BaseRecord::to(topic).partition(0);
        record.key = copied.key();
        record.payload = copied.payload();
        record.headers = copied.headers().cloned();
        producer.send(record).map_err(|(error, _)| error).expect("queued");
    }
    producer.flush(WAIT_MAX).expect("produced");
}

/// A cluster that is taken down in the end, also when the test fails.
pub(crate) struct Cluster {
    pub(crate) name: &'static str,
}

impl Cluster {
    /// Only where the other real tests run too.
    pub(crate) fn up(name: &'static str, nodes: &str) -> Option<(Self, String)> {
        brokers(name)?;
        let cluster = Self { name };
        let out = cluster.run(&["up", "--nodes", nodes]);
        let brokers = out.lines().last().expect("an address").to_owned();
        Some((cluster, brokers))
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dev/kafka");
        let out = Command::new(script)
            .args(arguments)
            .args(["--name", self.name])
            .output()
            .expect("dev/kafka can be run");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.run(&["down"]);
    }
}

/// Brokers with TLS and rights, from `dev/kafka env` for a cluster made with `--tls`.
pub(crate) struct Tls {
    /// SASL_SSL.
    pub(crate) client: String,
    /// SSL with client certificates.
    pub(crate) mutual: String,
    /// SASL_SSL with the certificate of another host.
    pub(crate) other_host: String,
    /// SASL_SSL with an expired certificate.
    pub(crate) expired: String,
    /// SASL_PLAINTEXT.
    pub(crate) clear: String,
    files: PathBuf,
}

impl Tls {
    /// Returns the cluster of the tests, or prints the skipped test.
    pub(crate) fn of_environment(test: &str) -> Option<Self> {
        let variable = |more: &str| std::env::var(format!("KAFOLD_TEST_KAFKA_TLS{more}")).ok();
        let Some(client) = variable("") else {
            assert!(
                std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none(),
                "KAFOLD_TEST_KAFKA_TLS names no broker, and nothing may be skipped"
            );
            eprintln!(
                "skipped {test}: KAFOLD_TEST_KAFKA_TLS names no broker (dev/kafka up --tls; dev/kafka env)"
            );
            return None;
        };
        let demand = |more: &str| variable(more).unwrap_or_else(|| panic!("{more} is not set"));
        Some(Self {
            client,
            mutual: demand("_MUTUAL"),
            other_host: demand("_OTHER_HOST"),
            expired: demand("_EXPIRED"),
            clear: demand("_CLEAR"),
            files: demand("_FILES").into(),
        })
    }

    /// Returns the path of a file of the cluster, such as `ca.crt`.
    pub(crate) fn file(&self, name: &str) -> String {
        self.files.join(name).display().to_string()
    }

    /// Returns the URL options for the login of a user.
    pub(crate) fn login(&self, user: &str) -> String {
        format!(
            "sasl=scram-sha-512&user={user}&password=@{}",
            self.file(&format!("passwords/{user}"))
        )
    }

    /// Runs `dev/kafka COMMAND --name CLUSTER …`.
    pub(crate) fn run(&self, arguments: &[&str]) {
        let state = self.files.parent().and_then(|state| state.file_name());
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dev/kafka");
        let out = Command::new(script)
            .arg(arguments[0])
            .arg("--name")
            .arg(state.expect("the cluster's folder"))
            .args(&arguments[1..])
            .output()
            .expect("dev/kafka can be run");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Writes a secret to a file with access for the owner alone.
    pub(crate) fn secret_file(&self, name: &str, secret: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, secret).expect("a file");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("its mode");
        path
    }
}

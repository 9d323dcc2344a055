//! Where the log is and how it is used.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;
use secrecy::{ExposeSecret, SecretString};

use crate::error::ConfigError;
use crate::group;
use crate::judge::{ADDED_PARTITIONS, UNSAFE_SETTINGS};
use crate::secret::{self, is_secret};
use crate::transport::{self, Login, Tls, UNSAFE_TRANSPORT};

/// Most partitions a log may have: every one costs a writer, a tail and a row.
pub const PARTITIONS_MAX: u32 = 1_000;
/// Longest name of a log, in bytes.
pub const NAME_BYTES_MAX: usize = 101;
/// Shortest time in which a record must be allowed to reach the log: below it every hiccup of a
/// broker would cost a new claim.
pub const MESSAGE_TIMEOUT_MIN: Duration = Duration::from_secs(5);

/// Signs of life of a node in the time in which one must come.
const HEARTBEATS: u32 = 6;
/// Interval in which a member asks for the partitions of its topic.
const METADATA_INTERVAL: &str = "topic.metadata.refresh.interval.ms";
const METADATA_INTERVAL_MS: &str = "20000";
const RECONNECT_BACKOFF_MAX: &str = "reconnect.backoff.max.ms";
/// How long a forwarded command or a reply may take into its topic.
const OUTBOX_TIMEOUT_MS: &str = "15000";

/// A log on Kafka: `kafka://HOST:PORT[,HOST:PORT]/NAME?partitions=N&replication=R`.
///
/// - `tls=true` encrypts and verifies; `ca=FILE` names the trusted authorities,
///   `cert=FILE&key=FILE` the client's own certificate;
/// - `sasl=scram-sha-512&user=NAME&password=@FILE` logs in. A password is `@FILE` for the contents
///   of a file, `$NAME` for an environment variable, or, with a warning, the literal password; see
///   [`SecretSource`](kafold_core::secret::SecretSource);
/// - `librdkafka.KEY=VALUE` passes a setting to the client, unless the protocol relies on the
///   setting;
/// - `allow_unsafe=NAME,NAME` accepts unsafe settings by name: settings of an existing topic, and
///   `clear_text`, `unverified_tls`, `readable_secret`;
/// - `commands=begin_anew` is for a commands topic which was deleted and created again.
///
/// Values are percent-decoded. Files and secrets are read when the URL is parsed, and again for
/// every new client. `Debug` shows no secret.
#[derive(Clone)]
pub struct KafkaConfig {
    /// `HOST:PORT[,HOST:PORT]`: where to find the cluster.
    pub brokers: String,
    /// The log's name: its topics are `NAME.events`, `NAME.commands` and `NAME.replies`.
    pub name: String,
    /// Partitions of the log; an existing topic must have as many. New topics have 12 by default.
    pub partitions: Option<u32>,
    /// Copies of each partition of a new topic; 3, or one a broker if there are fewer, by default.
    pub replication: Option<u16>,
    /// TLS; `None` means clear text.
    pub tls: Option<Tls>,
    /// The login; `None` means no login.
    pub login: Option<Login>,
    /// Unsafe settings accepted by name: settings of an existing topic, and of connections to
    /// brokers.
    pub allow_unsafe: BTreeSet<String>,
    /// Whether a commands topic that ends below where the log says that it was read to, because it was
    /// deleted and made anew, is handled from its beginning. A topic that is as it was is not touched.
    pub begin_commands_anew: bool,
    /// Settings of librdkafka, none of which the protocol relies on.
    pub librdkafka: Vec<(String, SecretString)>,
    /// Who says which partitions a process is to own. Not part of a URL.
    pub assignment: Assignment,
    /// Limits on queues, batches and waits.
    pub limits: Limits,
}

/// Who says which partitions a process is to own, or to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Assignment {
    /// The consumer group of all nodes: every partition has one owner, and each reader of a name a
    /// share.
    #[default]
    Group,
    /// Nobody: this process goes for every partition, and reads every one. Two that do so take them
    /// from each other again and again, and lose nothing by it: for tests of just that, and for
    /// programs that read the whole log on their own.
    Everything,
}

/// Limits on every queue, batch and wait of the store, and what happens when they are reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Submissions that may wait for the driver; one more is answered `Unavailable` at once.
    /// Default 16 384.
    pub queued_submissions_max: usize,
    /// Proven events of a partition kept in memory until the index has them; above it submissions
    /// are answered `Unavailable`. Default 20 000.
    pub tail_events_max: usize,
    /// Events of a partition that go into the index at a time. A transaction takes partitions until it
    /// has as many, and so exceeds them by one partition's at most. Default 2 000.
    pub index_batch_events_max: usize,
    /// How long an event waits at most for others to go into the index with it; the partitions of a
    /// process wait for the same moments. A full batch, and a partition that is handed over, waits no
    /// longer. What waits is in memory, and read again from the log after a crash. Default 200 ms.
    pub index_delay: Duration,
    /// Transactions under way that write into the index; what comes meanwhile goes with the next one.
    /// Default 4.
    pub index_writes_max: usize,
    /// Loads that one query to the index gathers. Default 256.
    pub load_requests_max: usize,
    /// Loads waiting for the index; one more is answered `Unavailable`. Default 4 096.
    pub queued_loads_max: usize,
    /// Events of a stream loaded at once; longer streams are paged. Default 1 000.
    pub page_events_max: usize,
    /// Records of one read from the log. Default 2 000.
    pub read_records_max: usize,
    /// Bytes of one read from the log, exceeded by at most one record. Default 4 MiB.
    pub read_bytes_max: usize,
    /// Memory for records fetched ahead, in KiB a client. Default 16 384.
    pub fetch_ahead_kib: usize,
    /// How long one question to a broker may take. Default 5 s.
    pub request_timeout: Duration,
    /// How long a record may take into the log before its fate is in doubt and the partition is
    /// claimed anew. Default 5 min: shorter than that, a broker that returns needs no new claim.
    pub message_timeout: Duration,
    /// How often it is asked whether any broker answers, and how long the answer may take; three
    /// questions without one make the store not ready. Default 2 s.
    pub watch_interval: Duration,
    /// How long a graceful stop may take. Default 10 s.
    pub shutdown_timeout: Duration,
    /// How long a node may give no sign of life before its partitions go to others, which never
    /// happens sooner than the brokers' `group.min.session.timeout.ms`. Default 2 s; the option
    /// `librdkafka.session.timeout.ms` of the URL wins.
    pub session_timeout: Duration,
    /// How long a partition that goes to another node may take to settle what is pending; what is then
    /// left is answered `OutcomeUnknown`, and the next owner finds it in the log. Default 5 s.
    pub hand_over_timeout: Duration,
    /// Wait before a partition that another process has claimed is claimed back, doubled each time.
    /// Default 3 s.
    pub yield_backoff: Duration,
    /// The longest such wait. Default 30 s.
    pub yield_backoff_max: Duration,
    /// Commands of this process that wait for the answer of another node; one more is answered
    /// `Unavailable`. Default 10 000.
    pub calls_max: usize,
    /// Commands of other nodes that are being handled, a partition; more wait in the topic. Default
    /// 1 000.
    pub forwarded_commands_max: usize,
    /// How long a command of another node may be tried here before it is answered `Unavailable`: the
    /// answers of all behind it may wait for it. Default 5 s.
    pub forwarded_bound: Duration,
    /// How long a log end that is too low is looked at again before it is believed. Default 30 s.
    pub low_end_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queued_submissions_max: 16_384,
            tail_events_max: 20_000,
            index_batch_events_max: 2_000,
            index_delay: Duration::from_millis(200),
            index_writes_max: 4,
            load_requests_max: 256,
            queued_loads_max: 4_096,
            page_events_max: 1_000,
            read_records_max: 2_000,
            read_bytes_max: 4 << 20,
            fetch_ahead_kib: 16_384,
            request_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(300),
            watch_interval: Duration::from_secs(2),
            shutdown_timeout: Duration::from_secs(10),
            session_timeout: Duration::from_secs(2),
            hand_over_timeout: Duration::from_secs(5),
            yield_backoff: Duration::from_secs(3),
            yield_backoff_max: Duration::from_secs(30),
            calls_max: 10_000,
            forwarded_commands_max: 1_000,
            forwarded_bound: Duration::from_secs(5),
            low_end_patience: Duration::from_secs(30),
        }
    }
}

/// The least `message.max.bytes` that librdkafka takes; a topic may have less.
const MESSAGE_BYTES_MIN: usize = 1_000;
/// librdkafka's default of `batch.size`.
const BATCH_BYTES_MAX: usize = 1_000_000;

impl KafkaConfig {
    /// The topic that holds the events, and nothing but events, claims and barriers.
    pub fn events_topic(&self) -> String {
        format!("{}.events", self.name)
    }

    /// The topic for commands that arrive on a node that does not own their stream.
    pub fn commands_topic(&self) -> String {
        format!("{}.commands", self.name)
    }

    /// The topic for the answers to them.
    pub fn replies_topic(&self) -> String {
        format!("{}.replies", self.name)
    }

    /// Settings of every client. The caller's come first: what the protocol relies on wins.
    fn client(&self) -> ClientConfig {
        // Before librdkafka initializes OpenSSL with a handler at exit: that handler frees what threads of clients still
        // use, which crashed processes at their end.
        #[cfg(feature = "tls")]
        openssl::init();
        let mut config = ClientConfig::new();
        config
            .set("client.id", "kafold")
            .set("socket.nagle.disable", "true")
            // A frozen broker is given up after this, and its partitions' new leader is asked.
            .set("socket.timeout.ms", "10000")
            .set("reconnect.backoff.ms", "50")
            .set(RECONNECT_BACKOFF_MAX, "1000");
        for (key, value) in &self.librdkafka {
            config.set(key, value.expose_secret());
        }
        transport::apply(self.tls.as_ref(), self.login.as_ref(), &mut config);
        // A refused login costs a handshake at both ends, and a process has many clients.
        let costs = transport::is_encrypted(&config) || transport::logs_in(&config);
        if costs && !self.librdkafka.iter().any(|(key, _)| key == RECONNECT_BACKOFF_MAX) {
            config.set(RECONNECT_BACKOFF_MAX, "3000");
        }
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    /// Returns a hash over the settings and the contents of their files and secrets. A different
    /// hash means a change; only a new client uses the changed files.
    pub(crate) fn fingerprint(&self) -> u64 {
        transport::fingerprint(&self.client())
    }

    /// Returns the accepted unsafe settings, one sentence each. Every start logs these warnings.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let is_literal = self.login.as_ref().is_some_and(|login| login.password.is_literal());
        if is_literal || self.librdkafka.iter().any(|(key, _)| is_secret(key)) {
            warnings.push(
                "a secret stands in the log's URL, where process lists and histories show it; write \
                 password=@FILE or password=$VARIABLE"
                    .to_owned(),
            );
        }
        let client = self.client();
        let accepted = |name: &str| self.allow_unsafe.contains(name);
        if accepted(transport::CLEAR_TEXT) && !transport::is_encrypted(&client) {
            warnings.push(
                "unsafe: everything is sent to the brokers in clear text, accepted by \
                 allow_unsafe=clear_text"
                    .to_owned(),
            );
        }
        if accepted(transport::UNVERIFIED_TLS) && unverified(&client).is_some() {
            warnings.push(
                "unsafe: the brokers' certificates are not verified, accepted by \
                 allow_unsafe=unverified_tls"
                    .to_owned(),
            );
        }
        if accepted(secret::READABLE) {
            warnings.push(
                "unsafe: a file with a secret may be readable for others, accepted by \
                 allow_unsafe=readable_secret"
                    .to_owned(),
            );
        }
        warnings
    }

    /// Returns `true` if all data to the brokers is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        transport::is_encrypted(&self.client())
    }

    /// Settings of the one producer; `record_bytes_max` is the topic's `max.message.bytes`.
    pub(crate) fn producer(&self, record_bytes_max: usize) -> ClientConfig {
        let mut config = self.client();
        // Batches form by themselves under load.
        if config.get("linger.ms").is_none() && config.get("queue.buffering.max.ms").is_none() {
            config.set("linger.ms", "0");
        }
        config.set("message.timeout.ms", self.limits.message_timeout.as_millis().to_string());
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.max.bytes", record_bytes_max.max(MESSAGE_BYTES_MIN).to_string());
        config
    }

    /// Settings of the producer of commands and replies. Each of the two topics has a
    /// `max.message.bytes`.
    pub(crate) fn outbox(&self, commands: usize, replies: usize) -> ClientConfig {
        let mut config = self.producer(commands.max(replies));
        // A batch of several records is never too large for its topic.
        let batch = commands.min(replies).clamp(MESSAGE_BYTES_MIN, BATCH_BYTES_MAX);
        config.set("batch.size", batch.to_string());
        // Nobody waits longer for any of it.
        config.set("message.timeout.ms", OUTBOX_TIMEOUT_MS);
        config
    }

    /// Settings of a client that only asks: metadata and the ends of partitions.
    pub(crate) fn inquirer(&self) -> ClientConfig {
        let mut config = self.client();
        // Read committed would report the last stable offset as the end.
        config.set("isolation.level", "read_uncommitted").set("allow.auto.create.topics", "false");
        config
    }

    /// Settings of a member of a group, which is told about partitions and reads none. `database` is
    /// the identity of the database with the state of the group.
    pub(crate) fn member(&self, group: &str, database: Option<&str>) -> ClientConfig {
        let mut config = self.inquirer();
        // A group notices partitions that were added to its topic with the next metadata. Kafka's default
        // is five minutes.
        if config.get(METADATA_INTERVAL).is_none() {
            config.set(METADATA_INTERVAL, METADATA_INTERVAL_MS);
        }
        // Failing over is as fast as the session ends: by the oldest protocol that moves partitions
        // one by one, since the newer one does not allow less than 45 s.
        let session = self.limits.session_timeout;
        for (key, value) in
            [("session.timeout.ms", session), ("heartbeat.interval.ms", session / HEARTBEATS)]
        {
            if config.get(key).is_none() {
                config.set(key, value.as_millis().to_string());
            }
        }
        config
            .set("client.id", group::client_id(database))
            .set("group.id", group)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            // Tells when the member is settled.
            .set("statistics.interval.ms", "200");
        config
    }

    /// The group that spreads the partitions over the nodes.
    pub(crate) fn owners_group(&self) -> String {
        self.commands_topic()
    }

    /// The group that spreads the partitions over the readers with this name and this database.
    pub(crate) fn readers_group(&self, name: &str, database: Option<&str>) -> String {
        let database = database.map_or(String::new(), |it| format!(".{}", group::short(it)));
        format!("{}{name}{database}", self.readers_groups())
    }

    /// The beginning of the names of all groups of readers.
    pub(crate) fn readers_groups(&self) -> String {
        format!("{}.reader.", self.name)
    }

    /// Settings of a client that reads partitions assigned by hand.
    ///
    /// A fetch waits `fetch_wait` for new records, and a partition that is added meanwhile waits
    /// with it.
    pub(crate) fn reader(&self, fetch_wait: Duration) -> ClientConfig {
        let mut config = self.inquirer();
        config
            // librdkafka wants one; nothing is ever committed to it, nobody joins it.
            .set("group.id", format!("{}.reader", self.name))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("check.crcs", "true")
            .set("enable.partition.eof", "true")
            // The default of 1 000 stalls long reads.
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.wait.max.ms", fetch_wait.as_millis().to_string())
            .set("fetch.min.bytes", "1")
            .set("queued.max.messages.kbytes", self.limits.fetch_ahead_kib.to_string());
        config
    }
}

impl FromStr for KafkaConfig {
    type Err = ConfigError;

    // By hand: a general parser takes a list of hosts for an invalid port.
    fn from_str(url: &str) -> Result<Self, ConfigError> {
        let rest = url.strip_prefix("kafka://").ok_or(ConfigError::Scheme)?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (brokers, name) = place.split_once('/').unwrap_or((place, ""));
        check_brokers(brokers)?;
        check_name(name)?;
        let mut config = Self {
            brokers: brokers.into(),
            name: name.into(),
            partitions: None,
            replication: None,
            tls: None,
            login: None,
            allow_unsafe: BTreeSet::new(),
            begin_commands_anew: false,
            librdkafka: Vec::new(),
            assignment: Assignment::default(),
            limits: Limits::default(),
        };
        let mut reach = transport::Options::default();
        for option in query.split('&').filter(|option| !option.is_empty()) {
            let Some((key, value)) = option.split_once('=') else {
                // Text without a value may be the rest of a secret with an `&`.
                return Err(match option {
                    "partitions" => invalid(option, partition_count()),
                    _ => ConfigError::UnknownOption("without a value".into()),
                });
            };
            config.set_option(key, value, &mut reach)?;
        }
        (config.tls, config.login) = reach.finish(&config.allow_unsafe)?;
        config.check_overlap()?;
        config.check_librdkafka()?;
        Ok(config)
    }
}

impl KafkaConfig {
    fn set_option(
        &mut self,
        key: &str,
        raw: &str,
        reach: &mut transport::Options,
    ) -> Result<(), ConfigError> {
        // A password is decoded later: only the raw text distinguishes a file name from a literal
        // password.
        let value = match key {
            "password" => "".into(),
            _ => percent_decode_str(raw)
                .decode_utf8()
                .map_err(|_| invalid(&shown_key(key), "UTF-8 when percent-decoded"))?,
        };
        if reach.set(key, &value, raw)? {
            return Ok(());
        }
        match key {
            "partitions" => {
                let within = |count: &u32| (1..=PARTITIONS_MAX).contains(count);
                let count = value.parse().ok().filter(within);
                self.partitions = Some(count.ok_or_else(|| invalid(key, partition_count()))?);
            }
            "replication" => {
                let count = value.parse().ok().filter(|count| (1..=100).contains(count));
                self.replication =
                    Some(count.ok_or_else(|| invalid(key, "a number from 1 to 100"))?);
            }
            "allow_unsafe" => {
                let known = || {
                    let settings = UNSAFE_SETTINGS.iter().chain(&UNSAFE_TRANSPORT);
                    settings.chain([&ADDED_PARTITIONS]).copied()
                };
                for name in value.split(',') {
                    if !known().any(|known| known == name) {
                        return Err(invalid(key, known().collect::<Vec<_>>().join(" or ")));
                    }
                    self.allow_unsafe.insert(name.to_owned());
                }
            }
            "commands" if value == "begin_anew" => self.begin_commands_anew = true,
            "commands" => return Err(invalid(key, "begin_anew")),
            _ => match key.strip_prefix("librdkafka.") {
                Some(setting) => self.set_librdkafka(setting, &value)?,
                None => return Err(ConfigError::UnknownOption(shown_key(key))),
            },
        }
        Ok(())
    }

    fn set_librdkafka(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        if let Some(why) = why_forbidden(key) {
            return Err(ConfigError::Forbidden { key: key.into(), why });
        }
        if matches!(key, "message.timeout.ms" | "delivery.timeout.ms") {
            let least = MESSAGE_TIMEOUT_MIN.as_millis() as u64;
            // librdkafka takes no more than fits its own number.
            let possible = least..=i32::MAX as u64;
            let milliseconds = value.parse().ok().filter(|ms| *ms == 0 || possible.contains(ms));
            self.limits.message_timeout =
                milliseconds.map(Duration::from_millis).ok_or_else(|| {
                    invalid(
                        &format!("librdkafka.{key}"),
                        format!("0 (never) or {least} to {} milliseconds", i32::MAX),
                    )
                })?;
            return Ok(());
        }
        self.librdkafka.push((key.into(), value.to_owned().into()));
        Ok(())
    }

    /// Rejects librdkafka settings which duplicate the URL's own options.
    fn check_overlap(&self) -> Result<(), ConfigError> {
        for (key, _) in &self.librdkafka {
            let why = match key.as_str() {
                "security.protocol" if self.tls.is_some() || self.login.is_some() => {
                    "tls= and sasl= say it"
                }
                "sasl.mechanism" | "sasl.mechanisms" | "sasl.username" | "sasl.password"
                    if self.login.is_some() =>
                {
                    "sasl=, user= and password= say it"
                }
                _ => continue,
            };
            return Err(ConfigError::Forbidden { key: key.clone(), why });
        }
        Ok(())
    }

    /// Lets librdkafka itself judge the settings, without connecting.
    fn check_librdkafka(&self) -> Result<(), ConfigError> {
        let client = self.client();
        match client.create_native_config() {
            Ok(_) => {}
            Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, _, key, _)) => {
                let reason = "there is no such setting".to_owned();
                return Err(ConfigError::Librdkafka { key: shown_key(&key), reason });
            }
            Err(KafkaError::ClientConfig(_, reason, key, value)) => {
                let reason = without_values(&reason, &key, &value);
                return Err(ConfigError::Librdkafka { key: shown_key(&key), reason });
            }
            // The error text may contain a value.
            Err(_) => {
                return Err(ConfigError::Librdkafka {
                    key: "the settings".into(),
                    reason: "one of them has a byte of 0".into(),
                });
            }
        }
        match unverified(&client) {
            Some(key) if !self.allow_unsafe.contains(transport::UNVERIFIED_TLS) => {
                Err(ConfigError::Unsafe {
                    key: key.into(),
                    why: "anybody on the way may pose as a broker and read everything",
                    name: transport::UNVERIFIED_TLS,
                })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |(key, value): &(String, SecretString)| match is_secret(key) {
            true => (key.clone(), secret::HIDDEN.to_owned()),
            false => (key.clone(), value.expose_secret().to_owned()),
        };
        f.debug_struct("KafkaConfig")
            .field("brokers", &self.brokers)
            .field("name", &self.name)
            .field("partitions", &self.partitions)
            .field("replication", &self.replication)
            .field("tls", &self.tls)
            .field("login", &self.login)
            .field("allow_unsafe", &self.allow_unsafe)
            .field("begin_commands_anew", &self.begin_commands_anew)
            .field("librdkafka", &self.librdkafka.iter().map(shown).collect::<Vec<_>>())
            .field("assignment", &self.assignment)
            .field("limits", &self.limits)
            .finish()
    }
}

fn invalid(option: &str, expected: impl Into<String>) -> ConfigError {
    ConfigError::Value { option: option.into(), expected: expected.into() }
}

fn partition_count() -> String {
    format!("a number from 1 to {PARTITIONS_MAX}")
}

/// Returns the setting which disables certificate verification, if any.
fn unverified(client: &ClientConfig) -> Option<&'static str> {
    // Reads librdkafka's parsed values, since librdkafka accepts several words for `false`.
    let native = client.create_native_config().ok()?;
    let unsafe_values = [
        ("enable.ssl.certificate.verification", "false"),
        ("ssl.endpoint.identification.algorithm", "none"),
    ];
    let found = unsafe_values.iter().find(|(key, value)| {
        native.get(key).is_ok_and(|found| found.trim_end_matches('\0') == *value)
    });
    found.map(|(key, _)| *key)
}

/// Returns a key in printable form. Any other text may be a misplaced secret and is not shown.
fn shown_key(key: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b"._".contains(&b);
    match !key.is_empty() && key.len() <= 60 && key.bytes().all(is_plain) {
        true => format!("{key:?}"),
        false => "(not shown, it may hold a secret)".to_owned(),
    }
}

/// Returns a part of the URL in printable form, unless the part may hold a secret.
fn shown_part(part: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.:[] /".contains(c);
    match part.len() <= 2 * NAME_BYTES_MAX && part.chars().all(is_plain) {
        true => format!("{part:?}"),
        false => "(not shown, it may hold a secret)".to_owned(),
    }
}

/// Returns librdkafka's text without the value and without quoted parts, which may repeat the
/// value.
fn without_values(reason: &str, key: &str, value: &str) -> String {
    let reason = match value {
        "" => reason.to_owned(),
        value => reason.replace(value, "…"),
    };
    let parts = reason.split('"').enumerate();
    parts.map(|(at, part)| if at % 2 == 0 || part == key { part } else { "…" }).collect()
}

fn check_brokers(brokers: &str) -> Result<(), ConfigError> {
    if brokers.is_empty() {
        return Err(ConfigError::NoBroker);
    }
    for broker in brokers.split(',') {
        if broker.contains('@') {
            return Err(ConfigError::Login);
        }
        // USER:PASSWORD without a host looks like a host with a port.
        let shown = match broker.rsplit_once(':') {
            Some((host, port)) if !port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => broker,
        };
        let wrong = |problem| Err(ConfigError::Broker { broker: shown_part(shown), problem });
        // The last colon: an IPv6 address in brackets has more of them.
        let Some((host, port)) = broker.rsplit_once(':') else { return wrong("has no port") };
        if host.is_empty() {
            return wrong("has no host");
        }
        let host_is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:[]".contains(c);
        if !host.chars().all(host_is_plain) {
            return wrong("has a character that no host name has");
        }
        if !port.bytes().all(|b| b.is_ascii_digit()) || !matches!(port.parse(), Ok(1..=65535u32)) {
            return wrong("has no port from 1 to 65535");
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    if name.is_empty() {
        return Err(ConfigError::NoName);
    }
    let first_is_letter = name.starts_with(|c: char| c.is_ascii_lowercase());
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(&b);
    if !first_is_letter || name.len() > NAME_BYTES_MAX || !name.bytes().all(plain) {
        return Err(ConfigError::Name(shown_part(name)));
    }
    Ok(())
}

/// What would break if a caller set this setting of librdkafka.
fn why_forbidden(key: &str) -> Option<&'static str> {
    Some(match key {
        "bootstrap.servers" | "metadata.broker.list" => "the URL's host part names the brokers",
        "acks" | "request.required.acks" => {
            "an append is acknowledged only when all in-sync replicas have it"
        }
        "enable.idempotence" | "max.in.flight" | "max.in.flight.requests.per.connection" => {
            "the records of a partition must reach the log in order"
        }
        "retries" | "message.send.max.retries" => {
            "giving up early turns every hiccup into a new claim"
        }
        "transactional.id" | "transaction.timeout.ms" => {
            "the log itself arbitrates between writers, transactions are not used"
        }
        "isolation.level" => "the end of the log must be its last record",
        "auto.offset.reset" => "a missing offset must be an error, never skipped over",
        "partitioner" => "the store computes the partition of a stream itself",
        "enable.gapless.guarantee" => "it turns one partition's failure into a fatal error for all",
        "queuing.strategy" => "the records of a partition must leave in order",
        "delivery.report.only.error" => "every delivery report is needed as proof",
        "message.max.bytes" => "it follows the topic's max.message.bytes",
        "check.crcs" | "enable.partition.eof" => "the reader relies on it",
        "enable.auto.commit"
        | "auto.commit.enable"
        | "enable.auto.offset.store"
        | "auto.commit.interval.ms"
        | "group.id"
        | "group.instance.id"
        | "group.protocol"
        | "partition.assignment.strategy"
        | "max.poll.interval.ms" => "groups are named and spread by the store",
        "allow.auto.create.topics" => "topics are made by the store, with safe settings",
        "queued.max.messages.kbytes"
        | "fetch.queue.backoff.ms"
        | "fetch.wait.max.ms"
        | "fetch.min.bytes" => "the reader's budget of memory and time rests on it",
        _ if key.starts_with("test.") => "it replaces the real cluster",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::corpus;

    fn parse(url: &str) -> Result<KafkaConfig, ConfigError> {
        url.parse()
    }

    /// The error's text holds each of the words.
    fn refused(url: &str, words: &[&str]) {
        let text = parse(url).expect_err(url).to_string();
        for word in words {
            assert!(text.contains(word), "{url}: {text:?} does not say {word:?}");
        }
    }

    #[test]
    fn a_url_names_brokers_log_and_options() {
        let url = "kafka://a:1,[::1]:2/shop-1.eu?partitions=3&replication=2\
            &allow_unsafe=retention.ms&librdkafka.client.id=x%26y&librdkafka.message.timeout.ms=9000";
        let config = parse(url).expect("valid");
        assert_eq!(config.brokers, "a:1,[::1]:2");
        assert_eq!(config.events_topic(), "shop-1.eu.events");
        assert_eq!((config.partitions, config.replication), (Some(3), Some(2)));
        assert!(config.allow_unsafe.contains("retention.ms"));
        assert_eq!(config.librdkafka[0].0, "client.id");
        assert_eq!(config.limits.message_timeout, Duration::from_secs(9));
        assert_eq!(config.producer(1_000).get("client.id"), Some("x&y"));
        assert_eq!(config.producer(1_000).get("message.timeout.ms"), Some("9000"));
    }

    #[test]
    fn every_url_of_the_corpus_gets_its_verdict() {
        corpus::check(corpus::URLS, |url, verdict| {
            let read = parse(&String::from_utf8(corpus::unescape(url)?).ok()?);
            let said = match &read {
                Ok(_) => "accepted".to_owned(),
                // Whatever was given, the message can be read.
                Err(refused) => refused.to_string().chars().take(1_000).collect(),
            };
            corpus::demand(said.contains(verdict), read)
        });
    }

    proptest! {
        #[test]
        fn no_url_makes_reading_panic(
            at in 0..70_usize,
            text in "\\PC{0,8}|[0-9%&=?/:,.]{0,8}",
            cut in 0..9_usize,
        ) {
            let mut url = "kafka://a:1,b:2/orders?partitions=3&librdkafka.client.id=x%26y".to_owned();
            let at = at.min(url.len());
            url.replace_range(at..(at + cut).min(url.len()), &text);
            if let Ok(config) = parse(&url) {
                prop_assert!(config.partitions.is_none_or(|count| (1..=1_000).contains(&count)));
                prop_assert!(config.events_topic().len() <= 249, "Kafka takes no longer name");
            }
        }
    }

    #[test]
    fn a_url_without_a_place_is_refused_by_its_part() {
        refused("postgres://a/b", &["kafka://"]);
        refused("kafka://", &["no broker"]);
        refused("kafka:///orders", &["no broker"]);
        refused("kafka://a:1", &["names no log", "/NAME"]);
        refused("kafka://a:1/", &["names no log"]);
        refused("kafka://a/orders", &["\"a\"", "no port"]);
        refused("kafka://a:1,b/orders", &["\"b\"", "no port"]);
        refused("kafka://:1/orders", &["no host"]);
        for port in ["0", "65536", "x", "", "+1", "99999999999"] {
            refused(&format!("kafka://a:{port}/orders"), &["1 to 65535"]);
        }
        refused("kafka://user@a:1/orders", &["login", "sasl="]);
        let long = "n".repeat(NAME_BYTES_MAX + 1);
        for name in ["Orders", "1a", "a b", "a/b", "-a", &long] {
            refused(&format!("kafka://a:1/{name}"), &["[a-z]"]);
        }
        assert!(parse(&format!("kafka://a:1/{}", "n".repeat(NAME_BYTES_MAX))).is_ok());
    }

    #[test]
    fn options_that_mean_nothing_are_refused_by_name() {
        refused("kafka://a:1/o?partition=3", &["\"partition\"", "partitions"]);
        for count in ["0", "1001", "x", "-1", ""] {
            refused(&format!("kafka://a:1/o?partitions={count}"), &["partitions", "1 to 1000"]);
        }
        refused("kafka://a:1/o?replication=0", &["replication", "1 to 100"]);
        refused("kafka://a:1/o?allow_unsafe=all", &["allow_unsafe", "retention.ms", "clear_text"]);
        refused("kafka://a:1/o?librdkafka.linger.mss=1", &["linger.mss"]);
        refused("kafka://a:1/o?librdkafka.linger.ms=soon", &["linger.ms"]);
        refused("kafka://a:1/o?librdkafka.message.timeout.ms=10", &["message.timeout.ms", "5000"]);
        refused("kafka://a:1/o?librdkafka.client.id=%ff", &["client.id", "UTF-8"]);
    }

    #[test]
    fn tls_and_login_are_said_by_name() {
        let config = parse("kafka://a:1/o?tls=true&sasl=SCRAM-SHA-512&user=ann&password=x%26y");
        let client = config.expect("valid").inquirer();
        assert_eq!(client.get("security.protocol"), Some("sasl_ssl"));
        assert_eq!(client.get("sasl.mechanism"), Some("SCRAM-SHA-512"));
        assert_eq!(client.get("sasl.username"), Some("ann"));
        assert_eq!(client.get("sasl.password"), Some("x&y"));
        let config = parse("kafka://a:1/o?tls=true").expect("valid");
        assert_eq!(config.inquirer().get("security.protocol"), Some("ssl"));
        assert!(config.is_encrypted());
        let config = parse("kafka://a:1/o?sasl=plain&user=ann&password=x").expect("valid");
        assert_eq!(config.inquirer().get("security.protocol"), Some("sasl_plaintext"));
        assert!(!config.is_encrypted());
        let config = parse("kafka://a:1/o?librdkafka.security.protocol=SASL_SSL").expect("valid");
        assert!(config.is_encrypted());
        assert_eq!(config.fingerprint(), config.fingerprint());
    }

    #[test]
    fn options_of_tls_and_login_that_lack_another_are_refused() {
        refused("kafka://a:1/o?sasl=plain", &["sasl", "user=NAME"]);
        refused("kafka://a:1/o?sasl=plain&user=a", &["sasl", "password=@FILE"]);
        refused("kafka://a:1/o?user=a&password=b", &["user", "sasl="]);
        refused("kafka://a:1/o?password=b", &["password", "sasl="]);
        refused("kafka://a:1/o?sasl=gssapi&user=a&password=b", &["sasl", "scram-sha-512"]);
        refused("kafka://a:1/o?tls=yes", &["tls", "true or false"]);
        refused("kafka://a:1/o?ca=/etc/hostname", &["ca", "tls=true"]);
        refused("kafka://a:1/o?tls=true&ca=/does/not/exist", &["ca", "/does/not/exist", "PEM"]);
        refused("kafka://a:1/o?tls=true&ca=/etc/hostname", &["ca", "no certificate"]);
        refused("kafka://a:1/o?tls=true&cert=/etc/hostname", &["cert", "key=FILE"]);
        let both = "kafka://a:1/o?tls=true&librdkafka.security.protocol=plaintext";
        refused(both, &["security.protocol", "tls="]);
        let both = "kafka://a:1/o?sasl=plain&user=a&password=b&librdkafka.sasl.password=c";
        refused(both, &["sasl.password", "password="]);
    }

    #[test]
    fn certificates_that_nobody_checks_are_refused_and_accepted_by_name() {
        for setting in [
            "enable.ssl.certificate.verification=false",
            "enable.ssl.certificate.verification=0",
            "ssl.endpoint.identification.algorithm=none",
        ] {
            let url = format!("kafka://a:1/o?tls=true&librdkafka.{setting}");
            refused(&url, &["unsafe", "allow_unsafe=unverified_tls"]);
            let config = parse(&format!("{url}&allow_unsafe=retention.ms,unverified_tls"));
            let warnings = config.expect("accepted").warnings();
            assert!(warnings[0].contains("unverified_tls"), "{warnings:?}");
        }
    }

    #[test]
    fn a_secret_is_in_no_error_and_in_no_debug_text() {
        const CANARY: &str = "Canary-17:x";
        let beside = "tls=true&sasl=plain&user=a";
        let mistyped = [
            format!("kafka://ann:{CANARY}@a:1/o"),
            format!("kafka://a:1,ann:{CANARY}@b:1/o"),
            format!("kafka://a:1/o&password={CANARY}"),
            format!("kafka://a:1&password={CANARY}/o"),
            format!("kafka:/a:1/o?password={CANARY}"),
            format!("kafka//ann:{CANARY}@a:1/o"),
            format!("Kafka://a:1/o?password={CANARY}"),
            format!("postgres://ann:{CANARY}@h/d"),
            format!("kafka://a:1/o?{CANARY}"),
            format!("kafka://a:1/o?={CANARY}"),
            format!("kafka://a:1/o?passwort={CANARY}"),
            format!("kafka://a:1/o?Password={CANARY}"),
            format!("kafka://a:1/o?pass={CANARY}"),
            format!("kafka://a:1/o?password={CANARY}"),
            format!("kafka://a:1/o?password:{CANARY}"),
            format!("kafka://a:1/o?password%3d{CANARY}"),
            format!("kafka://a:1/o?{beside}&password=a&{CANARY}"),
            format!("kafka://a:1/o?{beside}&password={CANARY}&b"),
            format!("kafka://a:1/o?{beside}&password=@{CANARY}"),
            format!("kafka://a:1/o?{beside}&password=${CANARY}"),
            format!("kafka://a:1/o?{beside}&password={CANARY}%00"),
            format!("kafka://a:1/o?{beside}&password={CANARY}%ff"),
            format!("kafka://a:1/o?sasl={CANARY}&user=a&password=b"),
            format!("kafka://a:1/o?tls={CANARY}"),
            format!("kafka://a:1/o?partitions={CANARY}"),
            format!("kafka://a:1/o?partitions=3;password={CANARY}"),
            format!("kafka://a:1/o?replication={CANARY}"),
            format!("kafka://a:1/o?allow_unsafe={CANARY}"),
            format!("kafka://a:1/o?commands={CANARY}"),
            format!("kafka://a:1/o?librdkafka={CANARY}"),
            format!("kafka://a:1/o?librdkafka.{CANARY}"),
            format!("kafka://a:1/o?librdkafka.{CANARY}=1"),
            format!("kafka://a:1/o?librdkafka.sasl.passwort={CANARY}"),
            format!("kafka://a:1/o?librdkafka.sasl.password:{CANARY}=1"),
            format!("kafka://a:1/o?librdkafka.sasl.password={CANARY}%ff"),
            format!("kafka://a:1/o?librdkafka.sasl.password={CANARY}%00"),
            format!("kafka://a:1/o?librdkafka.sasl.jaas.config={CANARY}"),
            format!("kafka://a:1/o?librdkafka.security.protocol={CANARY}"),
            format!("kafka://a:1/o?librdkafka.security.protocol=ssl,sasl.password={CANARY}"),
            format!("kafka://a:1/o?librdkafka.debug=all,{CANARY}"),
            format!("kafka://a:1/o?librdkafka.linger.ms={CANARY}"),
            format!("kafka://a:1/o?librdkafka.message.timeout.ms={CANARY}"),
            format!("kafka://a:1/o?librdkafka.acks={CANARY}"),
            format!("kafka://a:1/o?librdkafka.enable.sparse.connections={CANARY}"),
            format!("kafka://a:1/o?librdkafka.SASL.PASSWORD={CANARY}"),
        ];
        for url in &mistyped {
            let said = match parse(url) {
                Ok(config) => format!("{config:?} {:?}", config.warnings()),
                Err(error) => format!("{error} {error:?}"),
            };
            assert!(!said.contains("Canary"), "{url}: {said}");
        }
        let good = format!(
            "kafka://a:1/o?{beside}&password={CANARY}&librdkafka.ssl.key.password={CANARY}"
        );
        let config = parse(&good).expect("valid");
        assert!(!format!("{config:?}").contains("Canary"), "{config:?}");
        assert!(config.warnings()[0].contains("password=@FILE"));
    }

    #[test]
    fn settings_that_would_break_the_protocol_are_refused_by_name() {
        let forbidden = [
            "acks",
            "request.required.acks",
            "enable.idempotence",
            "transactional.id",
            "isolation.level",
            "auto.offset.reset",
            "partitioner",
            "enable.gapless.guarantee",
            "message.max.bytes",
            "delivery.report.only.error",
            "queuing.strategy",
            "bootstrap.servers",
            "test.mock.num.brokers",
        ];
        for key in forbidden {
            refused(&format!("kafka://a:1/o?librdkafka.{key}=1"), &[key, "may not be set"]);
        }
    }

    #[test]
    fn what_the_protocol_relies_on_wins_over_everything() {
        let config = parse("kafka://a:1/o?librdkafka.linger.ms=5").expect("valid");
        let producer = config.producer(1_000_000);
        assert_eq!(producer.get("acks"), Some("all"));
        assert_eq!(producer.get("enable.idempotence"), Some("true"));
        assert_eq!(producer.get("linger.ms"), Some("5"));
        assert_eq!(producer.get("bootstrap.servers"), Some("a:1"));
        let reader = config.reader(Duration::from_millis(50));
        assert_eq!(reader.get("auto.offset.reset"), Some("error"));
        assert_eq!(reader.get("isolation.level"), Some("read_uncommitted"));
    }
}

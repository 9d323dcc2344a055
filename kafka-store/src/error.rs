//! Why the log cannot be opened, each error naming the thing and the remedy.

use std::fmt;

use kafold_core::Partition;
use kafold_core::store::Cause;

/// Why a `kafka://` URL is not a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text does not begin with `kafka://`.
    #[error("the log URL does not begin with kafka://; {EXPECTED}")]
    Scheme,
    /// There is no broker in front of the name.
    #[error("log URL has no broker; {EXPECTED}")]
    NoBroker,
    /// A login precedes a broker's host name.
    #[error(
        "a login does not stand before the broker; write \
         ?sasl=scram-sha-512&user=NAME&password=@FILE behind the log's name"
    )]
    Login,
    /// A broker is not `HOST:PORT`.
    #[error("broker {broker} {problem}; write HOST:PORT, such as localhost:9092")]
    Broker {
        /// The part between two commas, unless the part may hold a secret.
        broker: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There is no name behind the brokers.
    #[error("log URL names no log; {EXPECTED}")]
    NoName,
    /// The name could not be part of topic names.
    #[error("log name {0} is not [a-z][a-z0-9_.-]{{0,100}}: choose another name")]
    Name(String),
    /// An option that is not known.
    #[error(
        "unknown option {0}; known are partitions, replication, tls, ca, cert, key, sasl, user, \
         password, allow_unsafe, commands, librdkafka.KEY; an & in a value is written %26"
    )]
    UnknownOption(String),
    /// An option without a usable value. The error does not repeat the value, which may be a
    /// secret.
    #[error("the value of option {option} is not {expected}")]
    Value {
        /// The option.
        option: String,
        /// What it takes.
        expected: String,
    },
    /// A secret, or a file for TLS, is unusable.
    #[error("option {option} {problem}")]
    Secret {
        /// The option.
        option: String,
        /// The fault, and the remedy.
        problem: String,
    },
    /// An option requires another option.
    #[error("option {option} needs {needed} beside it")]
    Needs {
        /// The option.
        option: &'static str,
        /// The missing option.
        needed: &'static str,
    },
    /// An unsafe setting which `allow_unsafe` does not accept.
    #[error("librdkafka.{key} is unsafe: {why}; remove it, or accept it with ?allow_unsafe={name}")]
    Unsafe {
        /// The setting.
        key: String,
        /// The possible damage.
        why: &'static str,
        /// The name for `allow_unsafe`.
        name: &'static str,
    },
    /// A librdkafka setting that would break a promise of the store.
    #[error("librdkafka.{key} may not be set: {why}; remove it from the URL")]
    Forbidden {
        /// The setting.
        key: String,
        /// What would break.
        why: &'static str,
    },
    /// librdkafka does not know the setting or does not take the value.
    #[error("librdkafka refuses {key}: {reason}; see librdkafka's CONFIGURATION.md")]
    Librdkafka {
        /// The setting.
        key: String,
        /// The text of librdkafka, without the value.
        reason: String,
    },
}

const EXPECTED: &str = "expected kafka://HOST:PORT[,HOST:PORT]/NAME[?OPTION=VALUE&…]";

/// Why a log on Kafka could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The configuration is wrong: it must be changed.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No broker answers now: wait and try again.
    #[error("kafka at {brokers} is unavailable while {doing}: {cause}")]
    Unavailable {
        /// Who was asked.
        brokers: String,
        /// What was tried.
        doing: String,
        /// The client's error.
        #[source]
        cause: Cause,
    },
    /// The broker refuses for good, for want of rights or because of what was asked.
    #[error("kafka at {brokers} refuses {doing}: {cause}; {remedy}")]
    Refused {
        /// Who was asked.
        brokers: String,
        /// What was tried.
        doing: String,
        /// What to do about it.
        remedy: String,
        /// The client's error.
        #[source]
        cause: Cause,
    },
    /// Clear text would be sent to a broker on another machine.
    #[error(
        "broker {broker} is on another machine, and everything would be sent to it in clear text; \
         connect to a TLS listener with ?tls=true&ca=FILE, or accept it with ?allow_unsafe=clear_text"
    )]
    ClearText {
        /// The broker, as `HOST:PORT`.
        broker: String,
    },
    /// An existing topic would lose or misplace events.
    #[error("topic {topic} is refused:{}", list(findings))]
    UnsafeTopic {
        /// The topic.
        topic: String,
        /// Everything that is wrong with it.
        findings: Vec<Finding>,
    },
    /// Another node is up that this one does not go together with.
    #[error("node {node} is up on topic {topic}, and {why}")]
    OtherNode {
        /// The topic on which it said so.
        topic: String,
        /// The other node.
        node: String,
        /// What differs, and the remedy.
        why: String,
    },
    /// What the topic holds is not a log this version can go on with.
    #[error("partition {partition} of topic {topic} is refused: {cause}")]
    Log {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// What is wrong, and the ways out.
        #[source]
        cause: Cause,
    },
}

impl OpenError {
    /// Whether the same call may succeed later without anything being changed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// One reason why a topic is unsafe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The setting, such as `retention.ms`.
    pub setting: String,
    /// Its value.
    pub value: String,
    /// What would go wrong.
    pub why: String,
    /// What to do, to the letter where that is possible.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { setting, value, why, remedy } = self;
        write!(f, "{setting}={value}: {why}; {remedy}")
    }
}

fn list(findings: &[Finding]) -> String {
    findings.iter().map(|finding| format!("\n  {finding}")).collect()
}

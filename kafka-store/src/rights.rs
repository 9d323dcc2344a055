//! The rights each role needs on Kafka: one list for `acl print`, `doctor --as`, a start and a
//! running process.
//!
//! The list omits rights implied by another right of the list. Kafka derives Describe from Read and
//! Write, so a probe could not detect a missing Describe.

use std::fmt;

use secrecy::ExposeSecret;

use crate::config::KafkaConfig;

/// The purpose of a process on a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Writes the log, and may run projections.
    Service,
    /// Runs projections only.
    Worker,
    /// Shows the contents of the log: `status`, `events tail`, `stream show`, `verify`.
    Reader,
    /// Checks brokers, topics and rights: `doctor`, `topic check`.
    Doctor,
    /// Creates topics and repairs: `topic create`, `index rebuild`, `positions reset`.
    Admin,
}

/// An operation of Kafka's authorizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Creates topics.
    Create,
    /// Requests partitions and leaders.
    Describe,
    /// Reads settings.
    DescribeConfigs,
    /// Fetches records of a topic, or joins a consumer group.
    Read,
    /// Produces records.
    Write,
}

/// The resource of a right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// One topic.
    Topic(String),
    /// All topics with this prefix.
    TopicPrefix(String),
    /// One consumer group.
    Group(String),
    /// All consumer groups with this prefix.
    GroupPrefix(String),
    /// The cluster.
    Cluster,
}

/// One right: an operation on a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// The operation.
    pub operation: Operation,
    /// The resource.
    pub resource: Resource,
    /// The behaviour without the right; `None` for a required right.
    pub without: Option<&'static str>,
}

/// The result of probing a right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The broker allows the operation.
    Granted,
    /// The broker denies the operation.
    Missing,
    /// There is no topic of this name.
    NoTopic(String),
    /// The probe failed, for this reason.
    Untried(String),
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] =
        [Self::Service, Self::Worker, Self::Reader, Self::Doctor, Self::Admin];

    /// Returns the role's name for commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Worker => "worker",
            Self::Reader => "reader",
            Self::Doctor => "doctor",
            Self::Admin => "admin",
        }
    }

    /// Returns the role with this name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// Returns the rights of this role on the log.
    pub fn rights(self, log: &KafkaConfig) -> Vec<Right> {
        use Operation::{Create, Describe, DescribeConfigs, Read, Write};
        let needed = |operation, resource| Right { operation, resource, without: None };
        let topic = |operation, name: String| needed(operation, Resource::Topic(name));
        let (events, commands, replies) =
            (log.events_topic(), log.commands_topic(), log.replies_topic());
        let readers = || needed(Read, Resource::GroupPrefix(format!("{}.reader", log.name)));
        let session = || Right {
            without: Some("a node that died is noticed after 6 s, not after 2 s"),
            ..needed(DescribeConfigs, Resource::Cluster)
        };
        let limit = |name| Right {
            without: Some(
                "a forwarded command or reply above max.message.bytes has an unknown outcome, if that is \
                 below its default",
            ),
            ..topic(DescribeConfigs, name)
        };
        match self {
            Self::Service => vec![
                topic(Read, events.clone()),
                topic(Write, events.clone()),
                topic(DescribeConfigs, events),
                topic(Read, commands.clone()),
                topic(Write, commands.clone()),
                limit(commands),
                topic(Read, replies.clone()),
                topic(Write, replies.clone()),
                limit(replies),
                needed(Read, Resource::Group(log.owners_group())),
                readers(),
                session(),
            ],
            Self::Worker => {
                vec![
                    topic(Read, events.clone()),
                    topic(DescribeConfigs, events),
                    readers(),
                    session(),
                ]
            }
            Self::Reader => vec![topic(Read, events)],
            Self::Doctor => vec![
                topic(Read, events.clone()),
                topic(DescribeConfigs, events),
                topic(Describe, commands),
                topic(Describe, replies),
                needed(DescribeConfigs, Resource::Cluster),
            ],
            Self::Admin => [Create, DescribeConfigs, Read]
                .map(|operation| needed(operation, Resource::TopicPrefix(format!("{}.", log.name))))
                .into(),
        }
    }
}

impl Right {
    /// Returns the right to join a consumer group.
    pub(crate) fn of_group(group: &str) -> Self {
        let resource = Resource::Group(group.to_owned());
        Self { operation: Operation::Read, resource, without: None }
    }

    /// Returns the `kafka-acls.sh` command which grants the right to a principal, such as
    /// `User:orders`.
    pub fn command(&self, brokers: &str, principal: &str) -> String {
        let (operation, resource) = (self.operation, &self.resource);
        let principal = quoted(principal);
        let resource = match resource {
            Resource::Topic(name) => format!("--topic {name}"),
            Resource::Group(name) => format!("--group {name}"),
            Resource::TopicPrefix(name) => {
                format!("--resource-pattern-type prefixed --topic {name}")
            }
            Resource::GroupPrefix(name) => {
                format!("--resource-pattern-type prefixed --group {name}")
            }
            Resource::Cluster => "--cluster".into(),
        };
        format!(
            "kafka-acls.sh --bootstrap-server {brokers} --add --allow-principal {principal} \
             --operation {operation} {resource}"
        )
    }

    /// Returns the remedy for the missing right, for the user of the URL.
    pub fn remedy(&self, log: &KafkaConfig, role: Role) -> String {
        let principal = log.user().map_or("User:NAME".into(), |user| format!("User:{user}"));
        let command = self.command(&log.brokers, &principal);
        format!("{command} (kafold acl print --role {} prints all rights)", role.name())
    }

    /// Returns a sentence with the missing right and the remedy.
    pub fn complaint(&self, log: &KafkaConfig, role: Role) -> String {
        format!("{self} is missing for this user: {}", self.remedy(log, role))
    }
}

impl KafkaConfig {
    /// Returns the user of a login by name and password.
    pub(crate) fn user(&self) -> Option<&str> {
        let mut settings = self.librdkafka.iter().rev();
        let named = settings.find(|(key, _)| key == "sasl.username");
        let named = named.map(|(_, user)| user.expose_secret());
        self.login.as_ref().map(|login| login.user.as_str()).or(named)
    }
}

/// Quotes a text for a shell, unless the text is plain.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ":._@=,/+-".contains(c);
    if text.chars().all(is_plain) {
        text.into()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(name) => write!(f, "topic {name}"),
            Self::TopicPrefix(name) => write!(f, "topics {name}*"),
            Self::Group(name) => write!(f, "group {name}"),
            Self::GroupPrefix(name) => write!(f, "groups {name}*"),
            Self::Cluster => f.write_str("the cluster"),
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.operation, self.resource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_is_granted_by_one_command_of_kafka() {
        let log: KafkaConfig = "kafka://a:1,b:2/orders".parse().expect("valid");
        let commands = |role: Role, principal: &str| -> Vec<_> {
            role.rights(&log).iter().map(|right| right.command(&log.brokers, principal)).collect()
        };
        let worker = commands(Role::Worker, "User:w");
        let add =
            "kafka-acls.sh --bootstrap-server a:1,b:2 --add --allow-principal User:w --operation";
        assert_eq!(
            worker,
            [
                format!("{add} Read --topic orders.events"),
                format!("{add} DescribeConfigs --topic orders.events"),
                format!("{add} Read --resource-pattern-type prefixed --group orders.reader"),
                format!("{add} DescribeConfigs --cluster"),
            ]
        );
        assert!(commands(Role::Reader, "User:CN=it's me")[0].contains(r"'User:CN=it'\''s me' "));
        let writes = |role: Role| commands(role, "User:x").iter().any(|c| c.contains("Write"));
        assert_eq!(Role::ALL.map(writes), [true, false, false, false, false]);
    }
}

//! The running processes of a log: nodes with announcements on the replies topic, and members of
//! the log's consumer groups.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kafold_core::Offset;
use kafold_core::forward::Node;
use rdkafka::error::KafkaResult;
use uuid::Uuid;

use super::Operator;
use crate::client::{Group, Inquirer};
use crate::config::KafkaConfig;
use crate::error::OpenError;
use crate::forward::nodes::{self, Announcement};
use crate::forward::wire::{ReplyContent, ReplyRecord};
use crate::group;
use crate::reader::{ReadFailure, Reader};

/// The wait of a fetch for new announcements.
const FETCH_WAIT: Duration = Duration::from_millis(5);

/// The processes which use a log now, as reported by the brokers.
#[derive(Debug, Clone, Default)]
pub struct Presence {
    /// Nodes with an announcement in the last 10 s and no later announcement of their end.
    pub nodes: Vec<Node>,
    /// The log's consumer groups with members, and the number of members: nodes and projection
    /// workers.
    pub groups: Vec<(String, usize)>,
}

impl Operator {
    /// Returns the processes which use the log. A process with a clean stop disappears at once. A
    /// killed process disappears after 10 s, or after the session timeout of its groups if longer.
    pub async fn presence(&self) -> Result<Presence, OpenError> {
        let doing = "asking who uses the log";
        let (groups, replies) = self
            .blocking(doing, move |this| {
                let asked = groups(&this.config, &this.inquirer)
                    .and_then(|groups| Ok((groups, lately(this)?)));
                asked.map_err(|error| this.error(doing, error))
            })
            .await?;
        let nodes = match replies {
            Some((from, end)) if from < end => {
                self.announced(from, end).await.map_err(|error| self.error(doing, error))?
            }
            _ => Vec::new(),
        };
        let groups = groups.into_iter().map(|group| (group.name, group.members.len())).collect();
        Ok(Presence { nodes, groups })
    }

    /// Returns one sentence for each of the log's groups with members that are no part of the service:
    /// other programs, and nodes with another database than the one of this identity. Without an identity,
    /// nodes with different databases are compared with each other. Groups that are not visible to this user
    /// are left out.
    pub async fn strangers(&self, database: Option<&str>) -> Result<Vec<String>, OpenError> {
        let doing = "asking for the members of the log's groups";
        let listing = move |this: &Self| {
            groups(&this.config, &this.inquirer).map_err(|error| this.error(doing, error))
        };
        let groups = self.blocking(doing, listing).await?;
        Ok(group::complaints(&groups, database))
    }

    /// Returns the nodes with a newest announcement in this range other than their end.
    async fn announced(&self, from: Offset, end: Offset) -> KafkaResult<Vec<Node>> {
        let (topic, wait) = (self.config.replies_topic(), self.config.limits.request_timeout);
        let (inquirer, clock) = (Arc::clone(&self.inquirer), Arc::clone(&self.clock));
        let reader: Reader<ReplyRecord> =
            Reader::start(&self.config, topic, FETCH_WAIT, inquirer, clock)?;
        let mut next = from;
        let mut newest: HashMap<Uuid, Announcement> = HashMap::new();
        while next < end {
            let read = reader.read_async(nodes::PARTITION, next, wait).await;
            let chunk = read.map_err(ReadFailure::into_error)?;
            let last = chunk.records.last().map(|record| record.offset);
            next = last.ok_or_else(|| ReadFailure::timed_out().into_error())?.plus(1);
            for record in chunk.records {
                let ReplyContent::Announcement { json, .. } = record.content else { continue };
                if let Ok(announcement) = serde_json::from_slice::<Announcement>(&json) {
                    newest.insert(announcement.node.id, announcement);
                }
            }
        }
        let up = newest.into_values().filter(|announcement| !announcement.leaving);
        let mut nodes: Vec<Node> = up.map(|announcement| announcement.node).collect();
        nodes.sort_by(|a, b| (&a.owner.name, a.id).cmp(&(&b.owner.name, b.id)));
        Ok(nodes)
    }
}

/// Returns the offset range of the announcements of the last 10 s; `None` without a replies topic.
fn lately(operator: &Operator) -> KafkaResult<Option<(Offset, Offset)>> {
    let Operator { config, inquirer, clock } = operator;
    let topic = config.replies_topic();
    if inquirer.topic(&topic)?.0.is_none() {
        return Ok(None);
    }
    let from = inquirer.since(&topic, nodes::PARTITION, clock.now() - nodes::SILENCE_MAX)?;
    let (_, end) = inquirer.ends(&topic, nodes::PARTITION)?;
    Ok(Some((from, end)))
}

/// Returns the log's groups with members.
fn groups(config: &KafkaConfig, inquirer: &Inquirer) -> KafkaResult<Vec<Group>> {
    let (owners, readers) = (config.owners_group(), config.readers_groups());
    let mut groups = inquirer.groups()?;
    groups.retain(|Group { name, members, is_of_new_protocol }| {
        let is_used = !members.is_empty() || *is_of_new_protocol;
        is_used && (*name == owners || name.starts_with(&readers))
    });
    groups.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(groups)
}

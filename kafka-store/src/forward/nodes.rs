//! Which nodes there are and what each owns: every node says so on the replies topic, now and then and
//! whenever it changes. For people, and to refuse nodes that do not go together; nothing is decided by
//! it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kafold_core::clock::within;
use kafold_core::forward::{Node, OwnedPartition};
use kafold_core::store::Owner;
use kafold_core::{Clock, Partition};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::outbox::Outbox;
use super::wire;
use crate::error::OpenError;
use crate::partition::{Reach, Shared};
use crate::wire::FORMAT;

/// Where announcements are, whatever partition of the topic a node reads its replies from.
pub(crate) const PARTITION: Partition = Partition(0);
/// How often a node speaks when nothing changes.
const INTERVAL: Duration = Duration::from_secs(3);
/// A node that was not heard for so long is gone, or cut off.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Nodes that are remembered at most: further ones are heard when others have fallen silent.
const NODES_MAX: usize = 10_000;
/// Changes that come together are told together.
const SETTLE: Duration = Duration::from_millis(20);

/// What a node says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Announcement {
    /// The formats that it writes: of events, and of commands and replies.
    pub(crate) formats: (u8, u8),
    /// How many partitions it takes the log to have.
    pub(crate) log_partitions: u32,
    /// Whether it is about to end.
    pub(crate) leaving: bool,
    #[serde(flatten)]
    pub(crate) node: Node,
}

/// What is known of the nodes.
pub(crate) struct Nodes {
    pub(crate) id: Uuid,
    owner: Owner,
    partitions: Vec<Arc<Shared>>,
    clock: Arc<dyn Clock>,
    heard: Mutex<HashMap<Uuid, (Instant, Node)>>,
    /// The time of the last announcement of this node that came back from the log.
    heard_itself: Mutex<Option<Instant>>,
}

impl Nodes {
    pub(crate) fn new(
        id: Uuid,
        owner: Owner,
        partitions: Vec<Arc<Shared>>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let (heard, heard_itself) = (Mutex::default(), Mutex::default());
        Self { id, owner, partitions, clock, heard, heard_itself }
    }

    /// This node first, then the others that were heard of lately, by name.
    pub(crate) fn all(&self) -> Vec<Node> {
        let now = self.clock.instant();
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        forget_silent(&mut heard, now);
        let mut others: Vec<_> = heard.values().map(|(_, node)| node.clone()).collect();
        drop(heard);
        others.sort_by(|a, b| (&a.owner.name, a.id).cmp(&(&b.owner.name, b.id)));
        let mut all = vec![self.this()];
        all.append(&mut others);
        keep_newest_owners(&mut all);
        all
    }

    /// Returns whether another node was heard lately.
    pub(crate) fn has_others(&self) -> bool {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        forget_silent(&mut heard, self.clock.instant());
        !heard.is_empty()
    }

    /// Returns whether the brokers lately took an announcement of this node.
    pub(crate) fn hears_itself(&self) -> bool {
        let heard = *self.heard_itself.lock().unwrap_or_else(PoisonError::into_inner);
        heard.is_some_and(|at| self.clock.instant().saturating_duration_since(at) < SILENCE_MAX)
    }

    fn this(&self) -> Node {
        let owned = self.partitions.iter().filter_map(|shared| {
            // Owned only while a claim of ours is accepted.
            shared.hold.borrow().as_ref()?;
            let take_over = shared.standing().take_over?;
            Some(OwnedPartition {
                partition: shared.partition,
                epoch: take_over.epoch.0,
                since: take_over.since,
                take_over_ms: u64::try_from(take_over.took.as_millis()).unwrap_or(u64::MAX),
            })
        });
        Node { id: self.id, owner: self.owner.clone(), partitions: owned.collect() }
    }

    /// Takes what a node said of itself.
    pub(crate) fn hear(&self, json: &[u8]) {
        let Ok(Announcement { leaving, node, .. }) = serde_json::from_slice(json) else {
            tracing::debug!("an announcement cannot be read");
            return;
        };
        let now = self.clock.instant();
        if node.id == self.id {
            *self.heard_itself.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
            return;
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.len() >= NODES_MAX {
            forget_silent(&mut heard, now);
        }
        if leaving {
            heard.remove(&node.id);
        } else if heard.len() < NODES_MAX || heard.contains_key(&node.id) {
            heard.insert(node.id, (now, node));
        }
    }

    fn announcement(&self, leaving: bool) -> wire::Letter {
        let announcement = Announcement {
            formats: (FORMAT, wire::FORMAT),
            log_partitions: u32::try_from(self.partitions.len()).unwrap_or(u32::MAX),
            leaving,
            node: self.this(),
        };
        // Numbers, texts and times always are JSON.
        wire::announcement(self.id, serde_json::to_vec(&announcement).unwrap_or_default())
    }

    /// Speaks for ever.
    pub(crate) async fn announce(self: Arc<Self>, outbox: Arc<Outbox>, reach: Arc<Reach>) {
        loop {
            if let Err(error) = outbox.announcement(&self.announcement(false)) {
                tracing::debug!(%error, "the other nodes were not told of this one");
            }
            if within(&*self.clock, INTERVAL, reach.ownership_changed.notified()).await.is_some() {
                self.clock.sleep(SETTLE).await;
            }
        }
    }

    /// The last word.
    pub(crate) fn leave(&self, outbox: &Outbox) {
        if let Err(error) = outbox.announcement(&self.announcement(true)) {
            tracing::debug!(%error, "the other nodes were not told that this one ends");
        }
    }
}

fn forget_silent(heard: &mut HashMap<Uuid, (Instant, Node)>, now: Instant) {
    heard.retain(|_, (at, _)| now.saturating_duration_since(*at) < SILENCE_MAX);
}

/// Of several who believe to own a partition, the one with the highest epoch is right.
fn keep_newest_owners(nodes: &mut [Node]) {
    let mut newest: HashMap<Partition, u32> = HashMap::new();
    for owned in nodes.iter().flat_map(|node| &node.partitions) {
        let epoch = newest.entry(owned.partition).or_default();
        *epoch = owned.epoch.max(*epoch);
    }
    for node in nodes {
        node.partitions.retain(|owned| newest.get(&owned.partition) == Some(&owned.epoch));
    }
}

/// Refuses to become a node beside others that write another format, or take the log to have another
/// number of partitions.
pub(crate) fn check_others(
    topic: &str,
    partitions: u32,
    announcements: &[Announcement],
) -> Result<(), OpenError> {
    let mut newest: HashMap<Uuid, &Announcement> = HashMap::new();
    for announcement in announcements {
        newest.insert(announcement.node.id, announcement);
    }
    for other in newest.into_values().filter(|other| !other.leaving) {
        let (known, found) = ((FORMAT, wire::FORMAT), other.formats);
        let why = if found != known {
            format!(
                "it writes formats {}.{} of events and commands, this program {}.{}: stop all nodes \
                 of the older version first",
                found.0, found.1, known.0, known.1
            )
        } else if other.log_partitions != partitions {
            format!(
                "it takes the log to have {} partitions, this one {partitions}: give both the same \
                 URL",
                other.log_partitions
            )
        } else {
            continue;
        };
        let node = other.node.owner.to_string();
        return Err(OpenError::OtherNode { topic: topic.into(), node, why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn announcement(id: u128) -> Announcement {
        let owner =
            Owner { name: format!("n{id}"), address: "a".into(), started_at: DateTime::UNIX_EPOCH };
        let node = Node { id: Uuid::from_u128(id), owner, partitions: Vec::new() };
        Announcement { formats: (FORMAT, wire::FORMAT), log_partitions: 12, leaving: false, node }
    }

    #[test]
    fn nodes_that_do_not_go_together_are_refused_by_name() {
        let refused = |others: &[Announcement]| {
            check_others("o.replies", 12, others).err().map(|error| error.to_string())
        };
        assert_eq!(refused(&[announcement(1), announcement(2)]), None);
        let newer = Announcement { formats: (2, 1), ..announcement(2) };
        let text = refused(&[announcement(1), newer.clone()]).expect("another format");
        assert!(text.contains("n2") && text.contains("2.1"), "{text}");
        let wider = Announcement { log_partitions: 13, ..announcement(3) };
        let text = refused(&[wider]).expect("another count");
        assert!(text.contains("n3") && text.contains("13 partitions"), "{text}");
        let left = Announcement { leaving: true, ..newer.clone() };
        assert_eq!(refused(&[newer, left]), None, "it is gone");
    }

    #[test]
    fn what_is_no_announcement_is_passed_over_and_no_flood_of_them_fills_the_memory() {
        let clock = Arc::new(kafold_core::clock::SystemClock);
        let this = announcement(0).node;
        let nodes = Nodes::new(this.id, this.owner, Vec::new(), clock);
        let good = serde_json::to_string(&announcement(1)).expect("is JSON");
        for bad in ["", "null", "{}", "[[[[", &good[1..], &good.replace("12", "-1"), "\u{0}"] {
            nodes.hear(bad.as_bytes());
        }
        nodes.hear(good.replace("\"partitions\":[]", "\"partitions\":[{}]").as_bytes());
        nodes.hear(&[b'['; 100_000]);
        assert_eq!(nodes.all().len(), 1, "only itself");
        for id in 1..NODES_MAX as u128 + 10 {
            nodes.hear(&serde_json::to_vec(&announcement(id)).expect("is JSON"));
        }
        assert_eq!(nodes.all().len(), 1 + NODES_MAX);
        let left = Announcement { leaving: true, ..announcement(1) };
        nodes.hear(&serde_json::to_vec(&left).expect("is JSON"));
        assert_eq!(nodes.all().len(), NODES_MAX, "who leaves makes room");
    }

    #[test]
    fn of_two_owners_of_a_partition_the_higher_epoch_is_shown() {
        let owned = |epoch| OwnedPartition {
            partition: Partition(3),
            epoch,
            since: DateTime::UNIX_EPOCH,
            take_over_ms: 0,
        };
        let node = |id, epoch| Node { partitions: vec![owned(epoch)], ..announcement(id).node };
        let mut nodes = [node(1, 4), node(2, 5)];
        keep_newest_owners(&mut nodes);
        assert!(nodes[0].partitions.is_empty());
        assert_eq!(nodes[1].partitions, [owned(5)]);
    }
}

//! The in-memory log as an [`EventSource`].

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;

use super::{Log, MemoryStore};
use crate::event::RecordedEvent;
use crate::ids::{Offset, Partition, StreamId};
use crate::store::{Batch, Cursor, EventSource, ReadError, SourceMessage, Subscription};

/// Who reads the log: members share the partitions of the name they subscribed under.
#[derive(Default)]
pub(super) struct Readers {
    next_member: u64,
    groups: HashMap<String, Group>,
    waiting: HashMap<Member, Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Member(u64);

#[derive(Default)]
struct Group {
    /// In the order of arrival. Partition p is meant for member p modulo their number.
    members: Vec<Member>,
    /// Who has it now: a partition passes on only after its holder has been told.
    holders: HashMap<Partition, Member>,
}

impl Readers {
    pub(super) fn wake(&mut self) {
        self.waiting.drain().for_each(|(_, waker)| waker.wake());
    }

    fn join(&mut self, name: &str) -> Member {
        self.next_member += 1;
        let member = Member(self.next_member);
        self.groups.entry(name.to_owned()).or_default().members.push(member);
        self.wake();
        member
    }

    fn leave(&mut self, name: &str, member: Member) {
        if let Some(group) = self.groups.get_mut(name) {
            group.members.retain(|other| *other != member);
            group.holders.retain(|_, holder| *holder != member);
        }
        self.wake();
    }

    /// What the member has to be told next about its partitions, if anything.
    fn reassign(&mut self, name: &str, member: Member, partitions: u32) -> Option<SourceMessage> {
        let group = self.groups.get_mut(name)?;
        let meant_for = |p: Partition| group.members[p.0 as usize % group.members.len()];
        let all = || (0..partitions).map(Partition);
        let lost: Vec<_> = all()
            .filter(|p| group.holders.get(p) == Some(&member) && meant_for(*p) != member)
            .collect();
        let gained: Vec<_> =
            all().filter(|p| !group.holders.contains_key(p) && meant_for(*p) == member).collect();
        if !lost.is_empty() {
            group.holders.retain(|p, _| !lost.contains(p));
            self.wake();
            return Some(SourceMessage::Revoked(lost));
        }
        group.holders.extend(gained.iter().map(|p| (*p, member)));
        (!gained.is_empty()).then_some(SourceMessage::Assigned(gained))
    }
}

#[async_trait]
impl EventSource for MemoryStore {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let name = database.map_or(name.to_owned(), |database| format!("{name}@{database}"));
        let member = self.log().readers.join(&name);
        Ok(Box::new(MemorySubscription {
            store: self.clone(),
            name,
            member,
            batch_events_max: batch_events_max.max(1),
            started: BTreeMap::new(),
            last: Partition(0),
        }))
    }

    fn partitions(&self) -> u32 {
        self.shared.config.partitions.max(1)
    }

    fn partition_of(&self, stream: &StreamId) -> Partition {
        Self::partition_of(self, stream)
    }

    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError> {
        Ok(self.log().end(partition))
    }
}

struct MemorySubscription {
    store: MemoryStore,
    name: String,
    member: Member,
    batch_events_max: usize,
    started: BTreeMap<Partition, Offset>,
    /// The partition delivered last: the next one has its turn first.
    last: Partition,
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Result<SourceMessage, ReadError> {
        Ok(poll_fn(|context| self.poll_next(context)).await)
    }

    async fn start(&mut self, partition: Partition, from: Option<Cursor>) -> Result<(), ReadError> {
        let next = match from {
            Some(cursor) => self.checked(partition, &cursor)?,
            None => Offset(0),
        };
        self.started.insert(partition, next);
        Ok(())
    }

    fn stop(&mut self, partition: Partition) {
        self.started.remove(&partition);
    }

    fn is_shared(&self) -> bool {
        true
    }
}

impl MemorySubscription {
    fn poll_next(&mut self, context: &Context<'_>) -> Poll<SourceMessage> {
        let store = self.store.clone();
        let mut log = store.log();
        let partitions = store.shared.config.partitions.max(1);
        if let Some(change) = log.readers.reassign(&self.name, self.member, partitions) {
            if let SourceMessage::Revoked(lost) = &change {
                self.started.retain(|partition, _| !lost.contains(partition));
            }
            return Poll::Ready(change);
        }
        if let Some(batch) = self.take_batch(&log) {
            return Poll::Ready(SourceMessage::Batch(batch));
        }
        log.readers.waiting.insert(self.member, context.waker().clone());
        Poll::Pending
    }

    fn take_batch(&mut self, log: &Log) -> Option<Batch> {
        let behind = self.started.range(..=self.last);
        let (partition, from) = self
            .started
            .range(self.last..)
            .skip_while(|(partition, _)| **partition == self.last)
            .chain(behind)
            .map(|(partition, from)| (*partition, *from))
            .find(|(partition, from)| *from < log.end(*partition))?;
        let unread = &log.events[&partition][from.0 as usize..];
        let events = unread[..whole_commits(unread, self.batch_events_max)].to_vec();
        let next = from.plus(events.len() as u64);
        self.started.insert(partition, next);
        self.last = partition;
        let end = log.end(partition);
        Some(Batch { partition, from, events, next: self.cursor(next), end })
    }

    fn cursor(&self, next: Offset) -> Cursor {
        Cursor { next, state: self.store.shared.config.log_id.clone() }
    }

    fn checked(&self, partition: Partition, cursor: &Cursor) -> Result<Offset, ReadError> {
        let what = || format!("partition {partition}");
        let log_id = &self.store.shared.config.log_id;
        if cursor.state != *log_id {
            let reason = format!("the cursor is of log {:?}, this is {log_id:?}", cursor.state);
            return Err(ReadError::diverged(what(), reason));
        }
        let end = self.store.log().end(partition);
        if cursor.next > end {
            let reason = format!("the cursor is at {}, the log ends at {end}", cursor.next);
            return Err(ReadError::diverged(what(), reason));
        }
        Ok(cursor.next)
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.store.log().readers.leave(&self.name, self.member);
    }
}

impl Log {
    fn end(&self, partition: Partition) -> Offset {
        Offset(self.events.get(&partition).map_or(0, Vec::len) as u64)
    }
}

/// How many of the events make whole commits and are at most `most`; one commit at least.
fn whole_commits(events: &[RecordedEvent], most: usize) -> usize {
    // A command is in its stream once, so equal neighbours are of one commit.
    let ends_commit = |count: usize| match (&events[count - 1], events.get(count)) {
        (last, Some(next)) => (&last.stream, last.command_id) != (&next.stream, next.command_id),
        (_, None) => true,
    };
    let below = (1..=most.min(events.len())).rev().find(|count| ends_commit(*count));
    below.unwrap_or_else(|| {
        (most..=events.len()).find(|count| ends_commit(*count)).unwrap_or(events.len())
    })
}

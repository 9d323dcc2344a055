//! The events topic, read by one who is no part of the service.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use kafold_core::store::{Batch, Cursor, Owner};
use kafold_core::{Clock, Offset, Partition, Position, ReadError, StreamId};

use super::Operator;
use crate::client::{Inquirer, open_error};
use crate::config::{Assignment, KafkaConfig};
use crate::error::OpenError;
use crate::fold::{Anchor, Checkpoint, CommitReader, Fold, FoldState, LogIdentity, Read, Verdict};
use crate::inspect::{InspectError, Inspector};
use crate::membership::Denials;
use crate::partitioner::partition_of;
use crate::reader::LogReader;
use crate::rights::Role;
use crate::source::KafkaSource;
use crate::wire::{Body, Claim, ClaimId, Content, LogRecord, Record, Stamp};

/// How long a fetch waits for new records: a partition that begins to be read meanwhile waits with it.
const FETCH_WAIT: Duration = Duration::from_millis(5);
/// What an error that passes suggests as the wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Newest records that are searched for one that proves its place.
const WINDOW_RECORDS: u64 = 500;

/// The events topic of a log, to be read as far as it reaches. Cheap to clone.
#[derive(Clone)]
pub struct ReadableLog {
    config: Arc<KafkaConfig>,
    partitions: u32,
    topic_partitions: u32,
    inquirer: Arc<Inquirer>,
    inspector: Inspector,
    clock: Arc<dyn Clock>,
}

/// What a partition shows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionFacts {
    /// The first offset there is; above 0 the log has lost its beginning.
    pub start: Offset,
    /// The offset of the next record.
    pub end: Offset,
    /// The epoch of its newest accepted claim and who made it, where the newest records tell.
    pub claim: Option<(u32, Owner)>,
    /// When the newest event among the newest records was recorded, by its writer's clock.
    pub newest_event_at: Option<DateTime<Utc>>,
    /// Whether one of the oldest or newest records is kafold's.
    pub has_own: bool,
    /// One of the oldest or newest records that is not kafold's, if there is any.
    pub foreign: Option<Position>,
    /// The same for one that is kafold's and that this program cannot read, and why.
    pub unreadable: Option<(Position, String)>,
}

impl ReadableLog {
    pub(super) fn start(
        operator: &Operator,
        partitions: u32,
        topic_partitions: u32,
    ) -> Result<Self, OpenError> {
        let Operator { config, inquirer, clock } = operator.clone();
        let topic = config.events_topic();
        let reader = LogReader::start(&config, topic, FETCH_WAIT, inquirer.clone(), clock.clone());
        let reader =
            reader.map_err(|error| open_error(&config, "starting a client", error, None))?;
        let inspector =
            Inspector::new(&config, partitions, reader, inquirer.clone(), clock.clone());
        Ok(Self { config, partitions, topic_partitions, inquirer, inspector, clock })
    }

    /// Returns the number of partitions of the log.
    pub fn partitions(&self) -> u32 {
        self.partitions
    }

    /// Returns the partitions that were added to the topic and that the log does not use.
    pub fn added_partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (self.partitions..self.topic_partitions).map(Partition)
    }

    /// The partition of a stream.
    pub fn partition_of(&self, stream: &StreamId) -> Partition {
        partition_of(stream, self.partitions)
    }

    /// The first and the next offset of a partition.
    pub async fn ends(&self, partition: Partition) -> Result<(Offset, Offset), ReadError> {
        self.inspector.ends(partition).await.map_err(self.failed(partition))
    }

    /// Returns the offset of the first record with this time or a later one; the end of the partition if
    /// there is none. A record gets its time from the node that writes it, after its event was recorded.
    pub async fn since(
        &self,
        partition: Partition,
        time: DateTime<Utc>,
    ) -> Result<Offset, ReadError> {
        let (inquirer, topic) = (Arc::clone(&self.inquirer), self.config.events_topic());
        let asked =
            tokio::task::spawn_blocking(move || inquirer.since(&topic, partition, time)).await;
        let closed = || ReadError::unavailable(RETRY_AFTER, "the program ends");
        let found = asked.map_err(|_| closed())?;
        found.map_err(|error| self.failed(partition)(InspectError::Unavailable(error)))
    }

    /// What the partition shows of itself: its ends, and its oldest and newest records.
    pub async fn look(&self, partition: Partition) -> Result<PartitionFacts, ReadError> {
        let failed = || self.failed(partition);
        let (start, end) = self.ends(partition).await?;
        let oldest = match start < end {
            true => self.inspector.read(partition, start).await.map_err(failed())?.records,
            false => Vec::new(),
        };
        let newest = self.newest(partition, end).await.map_err(failed())?;
        let proof = self.proof(partition, &newest).await.map_err(failed())?;
        let claim = newest_claim(partition, &newest, proof.as_ref());
        let all = || oldest.iter().chain(&newest);
        let place = |record: &LogRecord| Position { partition, offset: record.offset };
        Ok(PartitionFacts {
            start,
            end,
            claim: claim.map(|(id, claim)| (id.epoch.0, claim.owner())),
            newest_event_at: newest.iter().rev().find_map(recorded_at),
            has_own: all().any(|record| record.content != Content::Foreign),
            foreign: all().find(|record| record.content == Content::Foreign).map(place),
            unreadable: all().find_map(|record| match &record.content {
                Content::Malformed(reason) => Some((place(record), reason.to_string())),
                _ => None,
            }),
        })
    }

    /// Whether the partition is whole and, with a stored place, still the log that it is of.
    pub async fn check(
        &self,
        partition: Partition,
        stored: Option<&Cursor>,
    ) -> Result<(), ReadError> {
        let stored = self.checkpoint(partition, stored)?;
        self.inspector.check(partition, &stored).await.map_err(self.failed(partition))
    }

    /// A place at or below `before` to read on from, as near to it as the newest records below it
    /// prove; `None` is the beginning of the log.
    pub async fn cursor_before(
        &self,
        partition: Partition,
        before: Offset,
    ) -> Result<Option<Cursor>, ReadError> {
        let found = self.checkpoint_before(partition, before).await;
        let found = found.map_err(self.failed(partition))?;
        Ok(found.map(|checkpoint| checkpoint.to_cursor()))
    }

    /// All events from a place, or from the beginning, up to `end`, which is not behind the end of the
    /// log. A commit that `end` cuts is left out.
    pub fn replay(
        &self,
        partition: Partition,
        from: Option<Cursor>,
        end: Offset,
    ) -> BoxStream<'static, Result<Batch, ReadError>> {
        let log = self.clone();
        let started = async move {
            let checkpoint = log.checkpoint(partition, from.as_ref())?;
            log.inspector.check(partition, &checkpoint).await.map_err(log.failed(partition))?;
            let replay = Replay { log, partition, fold: CommitReader::new(partition, checkpoint) };
            let batches = move |mut replay: Replay| async move {
                match replay.fold.fold().next() < end {
                    true => Ok(Some((replay.next(end).await?, replay))),
                    false => Ok(None),
                }
            };
            Ok::<_, ReadError>(stream::try_unfold(replay, batches))
        };
        stream::once(started).try_flatten().boxed()
    }

    /// Reads on as new events come, every partition, in no group.
    pub fn source(&self) -> KafkaSource {
        let config = KafkaConfig { assignment: Assignment::Everything, ..(*self.config).clone() };
        let (inquirer, clock) = (Arc::clone(&self.inquirer), Arc::clone(&self.clock));
        let denials = Denials::new(Role::Reader, &clock);
        KafkaSource::new(config, self.partitions, inquirer, clock, denials)
    }

    async fn checkpoint_before(
        &self,
        partition: Partition,
        before: Offset,
    ) -> Result<Option<Checkpoint>, InspectError> {
        let newest = self.newest(partition, before).await?;
        let Some(proof) = self.proof(partition, &newest).await? else { return Ok(None) };
        let log = self.inspector.first_claim(partition, before).await?;
        Ok(log.map(|log| proof.checkpoint(Some(log))))
    }

    /// The newest of the records that is accepted for certain, with its claim; the beginning of the
    /// log is not needed to know it.
    ///
    /// A writer writes under its claim only after it has read it as accepted. Where the claim stands
    /// exactly `seq` records before one of its records, all in between are that writer's too: nobody
    /// can have claimed meanwhile. It is the rule by which a writer acknowledges an append.
    async fn proof(
        &self,
        partition: Partition,
        newest: &[LogRecord],
    ) -> Result<Option<Proof>, InspectError> {
        let mut tried = BTreeSet::new();
        for record in newest.iter().rev() {
            let Some((stamp, base)) = claimed_at(record) else { continue };
            if !tried.insert(base) {
                continue;
            }
            let found = self.inspector.read(partition, base).await?.records.into_iter().next();
            let Some(LogRecord { offset, content: Content::Ours(found) }) = found else { continue };
            if let (true, Body::Claim(body)) = (offset == base, found.body)
                && found.stamp.claim == stamp.claim
            {
                return Ok(Some(Proof { offset: record.offset, stamp, claim: body }));
            }
        }
        Ok(None)
    }

    /// The last records below an offset.
    async fn newest(
        &self,
        partition: Partition,
        before: Offset,
    ) -> Result<Vec<LogRecord>, InspectError> {
        let (start, _) = self.inspector.ends(partition).await?;
        let mut next = Offset(before.0.saturating_sub(WINDOW_RECORDS)).max(start);
        let mut newest = Vec::new();
        while next < before {
            for record in self.inspector.read(partition, next).await?.records {
                next = record.offset.plus(1);
                if record.offset < before {
                    newest.push(record);
                }
            }
        }
        Ok(newest)
    }

    fn checkpoint(
        &self,
        partition: Partition,
        from: Option<&Cursor>,
    ) -> Result<Checkpoint, ReadError> {
        let read = from.map(Checkpoint::from_cursor).transpose();
        let read = read.map_err(|error| ReadError::diverged(self.what(partition), error))?;
        Ok(read.unwrap_or_default())
    }

    fn failed(&self, partition: Partition) -> impl FnOnce(InspectError) -> ReadError {
        let what = self.what(partition);
        |error| error.into_read_error(what, RETRY_AFTER)
    }

    fn what(&self, partition: Partition) -> String {
        format!("partition {partition} of topic {}", self.config.events_topic())
    }
}

/// One pass over a partition.
struct Replay {
    log: ReadableLog,
    partition: Partition,
    fold: CommitReader,
}

impl Replay {
    /// The events of the next read.
    async fn next(&mut self, end: Offset) -> Result<Batch, ReadError> {
        let from = self.fold.fold().next();
        let read = self.log.inspector.read(self.partition, from).await;
        let chunk = read.map_err(self.log.failed(self.partition))?;
        let mut events = Vec::new();
        for record in chunk.records.into_iter().take_while(|record| record.offset < end) {
            let read = self.fold.read(record);
            let what = || self.log.what(self.partition);
            if let Read::Commit(commit) = read.map_err(|e| ReadError::diverged(what(), e))? {
                events.extend(commit.events.into_iter().map(Arc::unwrap_or_clone));
            }
        }
        let next = self.fold.fold().checkpoint().to_cursor();
        Ok(Batch { partition: self.partition, from, events, next, end })
    }
}

/// A record that is accepted for certain.
struct Proof {
    offset: Offset,
    stamp: Stamp,
    /// What it was written under.
    claim: Claim,
}

impl Proof {
    /// The place behind it.
    fn checkpoint(&self, log: Option<LogIdentity>) -> Checkpoint {
        let Self { offset, stamp: Stamp { claim, seq, commands_mark }, .. } = *self;
        let anchor = Some(Anchor { offset, claim, seq });
        let state = FoldState { log, claim, next_seq: seq + 1, anchor, commands_mark };
        Checkpoint { next: offset.plus(1), state }
    }
}

/// The newest accepted claim, if the records begin with the log or one of them proves its place.
fn newest_claim(
    partition: Partition,
    newest: &[LogRecord],
    proof: Option<&Proof>,
) -> Option<(ClaimId, Claim)> {
    let checkpoint = proof.map(|proof| proof.checkpoint(None)).unwrap_or_default();
    let mut current = proof.map(|proof| (proof.stamp.claim, proof.claim.clone()));
    let begin = checkpoint.next;
    let mut fold = Fold::new(partition, checkpoint);
    for record in newest.iter().skip_while(|record| record.offset < begin) {
        let Ok(verdict) = fold.apply(record) else { break };
        if let (Verdict::Claim, Content::Ours(Record { stamp, body: Body::Claim(claim) })) =
            (verdict, &record.content)
        {
            current = Some((stamp.claim, claim.clone()));
        }
    }
    current
}

/// A record's stamp, and where its claim must stand if nobody wrote in between; none for a claim
/// itself, and for a record behind which its commit is still open.
fn claimed_at(record: &LogRecord) -> Option<(Stamp, Offset)> {
    let Content::Ours(Record { stamp, body }) = &record.content else { return None };
    let is_whole = match body {
        Body::Claim(_) => false,
        Body::Event(event) => event.index + 1 == event.count,
        Body::Barrier => true,
    };
    let base = record.offset.0.checked_sub(stamp.seq).filter(|_| is_whole && stamp.seq > 0)?;
    Some((*stamp, Offset(base)))
}

fn recorded_at(record: &LogRecord) -> Option<DateTime<Utc>> {
    match &record.content {
        Content::Ours(Record { body: Body::Event(body), .. }) => {
            Some(body.event.metadata.recorded_at)
        }
        _ => None,
    }
}

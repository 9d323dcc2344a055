//! Everything in the log, in the order of each partition, to those who read all of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use kafold_core::store::{Batch, Consumer, Cursor, Health, SourceMessage, Subscription};
use kafold_core::{
    Clock, EventSource, Offset, Partition, Position, ReadError, RecordedEvent, StreamId,
};
use rdkafka::error::KafkaError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::client::Inquirer;
use crate::config::{Assignment, KafkaConfig};
use crate::error::OpenError;
use crate::fold::{Checkpoint, CommitReader, LogDiverged, Read};
use crate::group::GroupMembers;
use crate::guard;
use crate::inspect::Inspector;
use crate::membership::{Denials, Membership, Rebalance};
use crate::partition::Reach;
use crate::partitioner::partition_of;
use crate::reader::{Chunk, LogReader, ReadFailure};
use crate::rights::Role;
use crate::store::{connect, watch};
use crate::topic;
use crate::wire::{Body, Content, LogRecord, Record};

/// A read of a partition that has nothing new is asked for again after this: the answer tells the
/// end of the log.
const WAIT: Duration = Duration::from_secs(60);
/// How long a fetch waits for new records: a restarted partition waits with it.
const FETCH_WAIT: Duration = Duration::from_millis(100);
/// Between two attempts while no broker answers.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Interval of the checks for a decision of a silent group.
const UNSETTLED_POLL: Duration = Duration::from_secs(1);
/// Longest silence of a group before the silence is reported.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Reads the events topic. Subscriptions of one name, in whatever process, share the partitions through
/// a consumer group of that name; with [`Assignment::Everything`] each gets all of them.
pub struct KafkaSource {
    config: KafkaConfig,
    partitions: u32,
    inquirer: Arc<Inquirer>,
    clock: Arc<dyn Clock>,
    denials: Denials,
    /// The number of added partitions that a warning has named.
    added: Arc<AtomicUsize>,
    /// `None` if the store of the same process watches the brokers.
    watch: Option<Watch>,
}

/// Watches the brokers as long as the source lives.
struct Watch {
    reach: Arc<Reach>,
    _tasks: JoinSet<()>,
}

impl KafkaSource {
    /// Opens the source of a log in a process without write access. Creates nothing and reads only
    /// the events topic. An unsafe topic is rejected as in
    /// [`KafkaStore::open`](crate::KafkaStore::open).
    ///
    /// Needs the rights of [`Role::Worker`]. Fails with a transient error when no broker answers or
    /// the topic does not exist yet; call again.
    pub async fn open(config: KafkaConfig, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        match Self::open_log(config.clone(), &clock).await {
            Ok(opened) => Ok(opened),
            Err(error) => Err(guard::explain(error, &config, Role::Worker, &clock).await),
        }
    }

    async fn open_log(mut config: KafkaConfig, clock: &Arc<dyn Clock>) -> Result<Self, OpenError> {
        let (topic, inquirer) = connect(&mut config, clock, topic::find).await?;
        let denials = Denials::new(Role::Worker, clock);
        let (reach, mut tasks) = (Arc::new(Reach::default()), JoinSet::new());
        // A reader writes no records.
        guard::spawn(&mut tasks, &config, Role::Worker, &inquirer, &denials.refusals, |_| ());
        tasks.spawn(watch(
            config.clone(),
            Arc::clone(&inquirer),
            Arc::clone(&reach),
            Arc::clone(clock),
        ));
        let mut source = Self::new(config, topic.partitions, inquirer, Arc::clone(clock), denials);
        source.watch = Some(Watch { reach, _tasks: tasks });
        Ok(source)
    }

    pub(crate) fn new(
        config: KafkaConfig,
        partitions: u32,
        inquirer: Arc<Inquirer>,
        clock: Arc<dyn Clock>,
        denials: Denials,
    ) -> Self {
        let added = Arc::default();
        Self { config, partitions, inquirer, clock, denials, added, watch: None }
    }

    /// Returns `Ready` if a broker answers, accepts the login and grants the needed rights, and no
    /// other program is in the groups of this process's subscriptions. For the
    /// source of a [`KafkaStore`](crate::KafkaStore) the store reports this health.
    pub fn health(&self) -> Health {
        let down = self.watch.as_ref().and_then(|watch| watch.reach.down());
        let strangers = self.watch.iter().flat_map(|_| self.denials.strangers.sentences());
        let reasons: Vec<_> = self.refusals().into_iter().chain(strangers).chain(down).collect();
        if reasons.is_empty() { Health::Ready } else { Health::NotReady(reasons) }
    }

    /// Returns the brokers' refusals, one sentence each with cause and remedy. A refusal lasts
    /// until an operator acts.
    pub fn refusals(&self) -> Vec<String> {
        match self.watch {
            Some(_) => self.denials.refusals.sentences(),
            None => Vec::new(),
        }
    }
}

#[async_trait]
impl EventSource for KafkaSource {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let (inquirer, clock) = (Arc::clone(&self.inquirer), Arc::clone(&self.clock));
        let reader =
            LogReader::start(&self.config, self.config.events_topic(), FETCH_WAIT, inquirer, clock)
                .map_err(|error| ReadError::unavailable(RETRY_AFTER, error))?;
        let inspector = Inspector::new(
            &self.config,
            self.partitions,
            reader.clone(),
            Arc::clone(&self.inquirer),
            Arc::clone(&self.clock),
        );
        let mut tasks = JoinSet::new();
        let (member, group, ready) = match self.config.assignment {
            Assignment::Everything => {
                let all = (0..self.partitions).map(Partition).collect();
                (None, None, VecDeque::from([SourceMessage::Assigned(all)]))
            }
            Assignment::Group => {
                let group = self.config.readers_group(name, database);
                let member = Membership::join(
                    &self.config,
                    &group,
                    self.config.events_topic(),
                    database,
                    self.denials.clone(),
                    &*self.clock,
                )
                .map_err(|error| ReadError::unavailable(RETRY_AFTER, error))?;
                let members = GroupMembers::new(&self.inquirer, &self.clock, &group, database);
                tasks.spawn(members.watch(self.denials.clone()));
                (Some(member), Some(group), VecDeque::new())
            }
        };
        tracing::debug!(name, topic = self.config.events_topic(), "subscribed");
        Ok(Box::new(KafkaSubscription {
            consumer: Consumer { topic: self.config.events_topic(), group },
            partitions: self.partitions,
            added: Arc::clone(&self.added),
            low_end_patience: self.config.limits.low_end_patience,
            batch_events_max: batch_events_max.max(1),
            clock: Arc::clone(&self.clock),
            reader,
            inspector,
            started: BTreeMap::new(),
            starts: 0,
            reads: FuturesUnordered::new(),
            ready,
            group: member,
            revoking: Vec::new(),
            _tasks: tasks,
        }))
    }

    fn partitions(&self) -> u32 {
        self.partitions
    }

    fn partition_of(&self, stream: &StreamId) -> Partition {
        partition_of(stream, self.partitions)
    }

    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError> {
        let (inquirer, topic) = (Arc::clone(&self.inquirer), self.config.events_topic());
        let asked = tokio::task::spawn_blocking(move || inquirer.ends(&topic, partition)).await;
        let (_, end) = asked
            .unwrap_or(Err(KafkaError::Canceled))
            .map_err(|error| ReadError::unavailable(RETRY_AFTER, error))?;
        Ok(end)
    }
}

/// What became of one read, and which start of its partition it belongs to.
struct Answer {
    partition: Partition,
    start: u64,
    result: Result<Chunk, ReadFailure>,
}

struct KafkaSubscription {
    consumer: Consumer,
    partitions: u32,
    /// The number of added partitions that a warning of any subscription of the source has named.
    added: Arc<AtomicUsize>,
    low_end_patience: Duration,
    batch_events_max: usize,
    clock: Arc<dyn Clock>,
    reader: LogReader,
    inspector: Inspector,
    started: BTreeMap<Partition, Started>,
    starts: u64,
    /// At most one read a started partition, and answers to starts that are over.
    reads: FuturesUnordered<BoxFuture<'static, Answer>>,
    /// What one read gave: the next one is asked for when it is taken.
    ready: VecDeque<SourceMessage>,
    /// The place in the group, and what it decides.
    group: Option<(Membership, mpsc::UnboundedReceiver<Rebalance>)>,
    /// Dropped when the reader comes back after it was told: then it has let go of the partitions.
    revoking: Vec<oneshot::Sender<()>>,
    /// Watches the members of the group.
    _tasks: JoinSet<()>,
}

/// A partition that is being delivered.
struct Started {
    start: u64,
    fold: CommitReader,
    /// Where the next batch begins.
    from: Offset,
    /// Since when the log has ended below where we are.
    low_since: Option<Instant>,
}

#[async_trait]
impl Subscription for KafkaSubscription {
    // Cancel-safe: what is waited for keeps what is not taken.
    async fn next(&mut self) -> Result<SourceMessage, ReadError> {
        if self.ready.front().is_none_or(|message| !matches!(message, SourceMessage::Revoked(_))) {
            self.revoking.clear();
        }
        loop {
            if let Some(message) = self.ready.pop_front() {
                self.ask_again(&message);
                return Ok(message);
            }
            let is_unsettled =
                self.group.as_ref().is_some_and(|(member, _)| member.unsettled().is_some());
            let rebalances = async {
                match &mut self.group {
                    Some((_, rebalances)) => rebalances.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(rebalance) = rebalances => self.follow(rebalance),
                Some(answer) = self.reads.next() => self.take(answer)?,
                () = self.clock.sleep(UNSETTLED_POLL), if is_unsettled => self.complain()?,
                // Nothing is started, and no group decides: only a start changes that.
                else => std::future::pending().await,
            }
        }
    }

    async fn start(&mut self, partition: Partition, from: Option<Cursor>) -> Result<(), ReadError> {
        if partition.0 >= self.partitions {
            let reason = format!("the topic has {} partitions", self.partitions);
            return Err(ReadError::diverged(self.what(partition), reason));
        }
        let checkpoint = match &from {
            None => Checkpoint::default(),
            Some(cursor) => Checkpoint::from_cursor(cursor)
                .map_err(|error| ReadError::diverged(self.what(partition), error))?,
        };
        self.stop(partition);
        let checked = self.inspector.check(partition, &checkpoint).await;
        checked.map_err(|error| error.into_read_error(self.what(partition), RETRY_AFTER))?;
        self.starts += 1;
        let started = Started {
            start: self.starts,
            from: checkpoint.next,
            fold: CommitReader::new(partition, checkpoint),
            low_since: None,
        };
        self.started.insert(partition, started);
        self.ask(partition, Duration::ZERO);
        Ok(())
    }

    fn stop(&mut self, partition: Partition) {
        // The reads of an earlier start answer to nobody.
        self.started.remove(&partition);
        self.ready.retain(|message| !is_of(message, partition));
    }

    fn is_shared(&self) -> bool {
        self.group.is_some()
    }

    fn consumer(&self) -> Option<Consumer> {
        Some(self.consumer.clone())
    }
}

impl KafkaSubscription {
    fn follow(&mut self, rebalance: Rebalance) {
        match rebalance {
            Rebalance::Assigned(mut partitions) => {
                let added: Vec<_> =
                    partitions.extract_if(.., |partition| partition.0 >= self.partitions).collect();
                if self.added.fetch_max(added.len(), Ordering::Relaxed) < added.len() {
                    tracing::warn!(
                        topic = self.consumer.topic,
                        ?added,
                        "partitions were added to the topic: they stay unused, since streams are found \
                         by the number of partitions; each start needs ?partitions={}&\
                         allow_unsafe=partitions",
                        self.partitions
                    );
                }
                self.ready.push_back(SourceMessage::Assigned(partitions));
            }
            Rebalance::Revoked { partitions, settled } => {
                self.revoking.push(settled);
                self.revoke(partitions);
            }
            Rebalance::Lost(partitions) => self.revoke(partitions),
        }
    }

    fn revoke(&mut self, partitions: Vec<Partition>) {
        for partition in &partitions {
            self.started.remove(partition);
            self.reader.forget(*partition);
        }
        self.ready.retain(|message| !partitions.iter().any(|p| is_of(message, *p)));
        self.ready.push_back(SourceMessage::Revoked(partitions));
    }

    /// Reports the group's silence after [`SILENCE_MAX`].
    fn complain(&self) -> Result<(), ReadError> {
        let Some((member, _)) = &self.group else { return Ok(()) };
        let waited = (self.clock.now() - member.since()).to_std().unwrap_or_default();
        match member.unsettled() {
            Some(why) if waited >= SILENCE_MAX => Err(ReadError::unavailable(RETRY_AFTER, why)),
            _ => Ok(()),
        }
    }

    fn what(&self, partition: Partition) -> String {
        format!("partition {partition} of topic {}", self.consumer.topic)
    }

    /// Asks for the next records of a partition, after a pause.
    fn ask(&self, partition: Partition, pause: Duration) {
        let Some(started) = self.started.get(&partition) else { return };
        let (start, from) = (started.start, started.fold.fold().next());
        let (reader, clock) = (self.reader.clone(), Arc::clone(&self.clock));
        self.reads.push(Box::pin(async move {
            if !pause.is_zero() {
                clock.sleep(pause).await;
            }
            let result = reader.read_async(partition, from, WAIT).await;
            Answer { partition, start, result }
        }));
    }

    /// The last batch of a read was taken: there is room for the next read.
    fn ask_again(&self, taken: &SourceMessage) {
        let SourceMessage::Batch(batch) = taken else { return };
        if !self.ready.iter().any(|message| is_of(message, batch.partition)) {
            self.ask(batch.partition, Duration::ZERO);
        }
    }

    fn take(&mut self, answer: Answer) -> Result<(), ReadError> {
        let Answer { partition, start, result } = answer;
        let what = self.what(partition);
        let now = self.clock.instant();
        let Some(started) = self.started.get_mut(&partition) else { return Ok(()) };
        if started.start != start {
            return Ok(());
        }
        match result {
            Ok(chunk) => {
                started.low_since = None;
                let batches = match started.fold_chunk(partition, chunk, self.batch_events_max) {
                    Ok(batches) => batches,
                    // Nothing behind the contradiction can be read by anybody.
                    Err(diverged) => {
                        self.started.remove(&partition);
                        return Err(ReadError::diverged(what, diverged));
                    }
                };
                if batches.is_empty() {
                    self.ask(partition, Duration::ZERO);
                }
                self.ready.extend(batches.into_iter().map(SourceMessage::Batch));
                Ok(())
            }
            // The inspector has looked at this partition meanwhile.
            Err(ReadFailure::Replaced) => {
                self.ask(partition, Duration::ZERO);
                Ok(())
            }
            Err(ReadFailure::Unavailable(error)) => {
                self.ask(partition, RETRY_AFTER);
                Err(ReadError::unavailable(RETRY_AFTER, error))
            }
            Err(ReadFailure::Corrupt(offset)) => {
                self.started.remove(&partition);
                let corrupt = LogDiverged::Corrupt(Position { partition, offset });
                Err(ReadError::diverged(what, corrupt))
            }
            Err(failure @ ReadFailure::OutOfRange { .. }) => {
                // A stale leader looks the same for a while as a log that was cut off.
                let since = *started.low_since.get_or_insert(now);
                if now.saturating_duration_since(since) < self.low_end_patience {
                    self.ask(partition, RETRY_AFTER);
                    return Ok(());
                }
                let from = started.from;
                self.started.remove(&partition);
                Err(ReadError::diverged(what, OutOfRange { from, failure }))
            }
        }
    }
}

fn is_of(message: &SourceMessage, partition: Partition) -> bool {
    matches!(message, SourceMessage::Batch(batch) if batch.partition == partition)
}

#[derive(Debug, thiserror::Error)]
#[error(
    "offset {from} is to be read next, but {failure}: the log was truncated, trimmed or recreated. \
     Restore the topic from a copy, or rebuild what was made from it"
)]
struct OutOfRange {
    from: Offset,
    failure: ReadFailure,
}

/// How many events become visible when the record is accepted as the last of its commit.
fn events_of_commit(record: &LogRecord) -> usize {
    match &record.content {
        Content::Ours(Record { body: Body::Event(event), .. }) => event.count.into(),
        _ => 0,
    }
}

impl Started {
    /// Batches of whole commits, each within the limit unless one commit alone exceeds it. What comes
    /// before a contradiction is delivered: the next read begins at the contradiction itself.
    fn fold_chunk(
        &mut self,
        partition: Partition,
        chunk: Chunk,
        batch_events_max: usize,
    ) -> Result<Vec<Batch>, LogDiverged> {
        let end = chunk.end;
        let mut batches = Vec::new();
        let room = |records: usize| Vec::with_capacity(records.min(batch_events_max));
        let mut events: Vec<RecordedEvent> = room(chunk.records.len());
        let mut diverged = None;
        let mut records = chunk.records.into_iter();
        while let Some(record) = records.next() {
            // A batch that has no room for the commit ends before it: that place is behind us when the
            // commit is whole.
            let before = (!events.is_empty()
                && events.len() + events_of_commit(&record) > batch_events_max)
                .then(|| self.fold.fold().checkpoint());
            let commit = match self.fold.read(record) {
                Ok(Read::Commit(commit)) => commit,
                Ok(Read::Void(reason)) => {
                    metrics::counter!("kafold_void_records_total", "reason" => reason.name())
                        .increment(1);
                    continue;
                }
                Ok(Read::Claim(..) | Read::Open(_) | Read::Barrier(_)) => continue,
                Err(contradiction) => {
                    diverged = Some(contradiction);
                    break;
                }
            };
            if let Some(before) = before {
                let full = std::mem::replace(&mut events, room(records.len() + 1));
                batches.push(self.batch(partition, full, &before, end));
            }
            events.extend(commit.events.into_iter().map(Arc::unwrap_or_clone));
        }
        let next = self.fold.fold().checkpoint();
        if next.next > self.from {
            batches.push(self.batch(partition, events, &next, end));
        }
        match diverged {
            Some(diverged) if batches.is_empty() => Err(diverged),
            _ => Ok(batches),
        }
    }

    fn batch(
        &mut self,
        partition: Partition,
        events: Vec<RecordedEvent>,
        next: &Checkpoint,
        end: Offset,
    ) -> Batch {
        let from = std::mem::replace(&mut self.from, next.next);
        Batch { partition, from, events, next: next.to_cursor(), end: end.max(next.next) }
    }
}

//! The event store on Kafka: opens the log, joins driver, loader and indexer, and answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use kafold_core::clock::within;
use kafold_core::forward::Node;
use kafold_core::store::{Append, Appended, Health, Outcome, Owner, View};
use kafold_core::{
    Clock, CommandBus, CommandId, EventStore, IdGenerator, Offset, Partition, ReadError,
    RecordedEvent, StreamId, StreamIndex, Version, trace,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::task::JoinSet;

use crate::aside;
use crate::client::{Inquirer, check_hosts, open_error};
use crate::config::{Assignment, KafkaConfig};
use crate::driver::{Driver, Message, Parts, Slot};
use crate::error::OpenError;
use crate::forward::nodes::{self, Nodes};
use crate::forward::wire::{ReplyContent, ReplyRecord};
use crate::forward::{Bus, Inboxes, Outbox, RecordLimits};
use crate::group::{self, GroupMembers};
use crate::guard;
use crate::indexer::Indexer;
use crate::inspect::{InspectError, Inspector};
use crate::loader::Loader;
use crate::membership::{Denials, Membership};
use crate::ownership::Ownership;
use crate::partition::{Reach, Shared};
use crate::partitioner::partition_of;
use crate::reader::{Decode, Reader};
use crate::rights::Role;
use crate::source::KafkaSource;
use crate::topic::{self, EventsTopic};
use crate::verifier::Verifier;
use crate::writer::{Entropy, PartitionWriter, WriterConfig, WriterLimits};

/// How long a fetch waits for records where somebody waits to own: a partition that begins to be read
/// meanwhile waits with it.
const FETCH_WAIT: Duration = Duration::from_millis(5);
/// How long a fetch behind an idle owner waits, and one for commands or replies, which begin seldom.
const IDLE_FETCH_WAIT: Duration = Duration::from_millis(100);
/// Between two questions to the leader of a topic that was just made.
const LEADER_POLL: Duration = Duration::from_millis(50);
const NO_LEADER: Option<RDKafkaErrorCode> = Some(RDKafkaErrorCode::NotLeaderForPartition);
/// The time from the end of a killed node's session to its removal from the group, at most.
const SESSION_GRACE: Duration = Duration::from_secs(1);
/// Records without a report for so much longer than the producer tries are in doubt.
const REPORT_GRACE: Duration = Duration::from_secs(30);
/// Stands for a producer that tries for ever.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);
/// Questions in a row that no broker answered until it is said that none can be reached.
const PINGS_LOST: u32 = 3;
/// Before a question that no broker answered is asked again.
const PING_AGAIN: Duration = Duration::from_millis(200);
/// How long the index may take to tell where it stands before the store is opened without it.
const INDEX_PATIENCE: Duration = Duration::from_secs(5);
/// Commands of one read: no more than this beyond the limit are ever begun.
const COMMANDS_READ_MAX: usize = 100;

/// An event store whose truth is a Kafka topic. The consumer group of all nodes says which partitions
/// this process is to own; those of other nodes answer [`NotOwner`](kafold_core::AppendError), and
/// [`KafkaStore::commands`] carries commands there.
///
/// Reads need the index for what is no longer in memory; appends need it only for streams that this
/// process does not know yet.
pub struct KafkaStore {
    config: KafkaConfig,
    topic: EventsTopic,
    driver: Driver,
    loader: Arc<Loader>,
    partitions: Vec<Arc<Shared>>,
    ownership: Arc<Ownership>,
    /// `None` when nobody says what is to be owned.
    membership: Option<Arc<Membership>>,
    bus: Arc<Bus>,
    inquirer: Arc<Inquirer>,
    reach: Arc<Reach>,
    denials: Denials,
    clock: Arc<dyn Clock>,
    /// Ended when the store is dropped.
    tasks: Mutex<JoinSet<()>>,
}

impl KafkaStore {
    /// Opens the log: creates its topics if they are absent, refuses unsafe ones, checks that this is
    /// the log the index was made from and that the other nodes go together with this one, and joins
    /// the group of the nodes. Returns as soon as the checks are through; [`EventStore::health`] tells
    /// when commands are taken.
    ///
    /// `owner` is what other processes are told when they find that this one owns a partition. Fails
    /// with a transient error when no broker answers: call again. An index that does not answer is
    /// waited for in the background.
    ///
    /// Needs the rights of [`Role::Service`]. A start without such a right fails with an error
    /// which names the right.
    pub async fn open(
        config: KafkaConfig,
        index: Arc<dyn StreamIndex>,
        owner: Owner,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Result<Self, OpenError> {
        match Self::open_log(config.clone(), index, owner, Arc::clone(&clock), ids).await {
            Ok(opened) => Ok(opened),
            Err(error) => Err(guard::explain(error, &config, Role::Service, &clock).await),
        }
    }

    async fn open_log(
        mut config: KafkaConfig,
        index: Arc<dyn StreamIndex>,
        owner: Owner,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Result<Self, OpenError> {
        let prepare = |config: &KafkaConfig, inquirer: &Inquirer, clock: &Arc<dyn Clock>| {
            Ok(topic::prepare(config, inquirer, clock)?.0)
        };
        let (topic, inquirer) = connect(&mut config, &clock, prepare).await?;
        let denials = Denials::new(Role::Service, &clock);
        let client_error = |error| open_error(&config, "starting a client", error, None);
        let readers = Readers { config: &config, inquirer: &inquirer, clock: &clock };
        // The inspector looks at any partition at any time: a read of its own must not replace one
        // that a writer waits for.
        let inspecting = readers.start(config.events_topic(), FETCH_WAIT)?;
        let inspector = Inspector::new(
            &config,
            topic.partitions,
            inspecting,
            Arc::clone(&inquirer),
            Arc::clone(&clock),
        );
        let inspecting = if topic.is_new { inspector.of_new_topic() } else { inspector.clone() };
        check_log(&config, topic, &*index, &inspecting, &*clock).await?;
        check_beside(&config, topic, &inquirer).await?;
        let database = index.database().map(str::to_owned);
        let owners = config.owners_group();
        let members = GroupMembers::new(&inquirer, &clock, &owners, database.as_deref());
        check_database(&config, &members).await?;

        let shared: Vec<_> =
            (0..topic.partitions).map(|p| Arc::new(Shared::new(Partition(p)))).collect();
        let reach = Arc::new(Reach::default());
        let (loader, asking) =
            Loader::new(Arc::clone(&index), shared.clone(), &config.limits, Arc::clone(&clock));
        let verifier = Verifier::new(
            Arc::clone(&index),
            Arc::clone(&loader),
            shared.clone(),
            Arc::clone(&clock),
        );
        let (driver, inbox) = Driver::new(&config, Arc::clone(&reach));
        let slots = shared
            .iter()
            .map(|shared| slot(&config, topic, &owner, Arc::clone(shared), &ids))
            .collect();
        let parts = Parts {
            config: config.clone(),
            record_bytes_max: topic.record_bytes_max,
            slots,
            reader: readers.start(config.events_topic(), FETCH_WAIT)?,
            watcher: readers.start(config.events_topic(), IDLE_FETCH_WAIT)?,
            loader: Arc::clone(&loader),
            clock: Arc::clone(&clock),
        };
        driver.start(inbox, parts).map_err(client_error)?;
        let (indexer, indexing) = Indexer::new(
            config.clone(),
            index,
            driver.clone(),
            inspector,
            Arc::clone(&inquirer),
            Arc::clone(&clock),
            Arc::clone(&ids),
        );

        let outbox = Arc::new(Outbox::start(&config, Arc::clone(&clock)).map_err(client_error)?);
        let mut few = config.clone();
        few.limits.read_records_max = COMMANDS_READ_MAX;
        let commands = Readers { config: &few, ..readers };
        let inboxes = Arc::new(Inboxes::new(
            &config,
            commands.start(config.commands_topic(), IDLE_FETCH_WAIT)?,
            Arc::clone(&outbox),
            driver.clone(),
            Arc::clone(&clock),
            Arc::clone(&ids),
            topic.partitions,
        ));
        let id = uuid::Uuid::from_u64_pair(ids.random(), ids.random());
        let nodes = Arc::new(Nodes::new(id, owner, shared.clone(), Arc::clone(&clock)));
        let replies = Partition((id.as_u64_pair().1 % u64::from(topic.partitions)) as u32);
        let bus = Arc::new(Bus {
            partitions: shared.clone(),
            outbox: Arc::clone(&outbox),
            inboxes: Arc::clone(&inboxes),
            nodes: Arc::clone(&nodes),
            reach: Arc::clone(&reach),
            clock: Arc::clone(&clock),
            replies,
            calls_max: config.limits.calls_max,
            calls: Arc::default(),
        });
        let mut tasks = JoinSet::new();
        let listening = readers.start(config.replies_topic(), IDLE_FETCH_WAIT)?;
        let begin =
            hear_others(&config, &inquirer, &listening, &nodes, &*clock, topic, replies).await?;
        for (partition, from) in begin {
            tasks.spawn(Arc::clone(&bus).listen(listening.clone(), partition, from));
        }
        tasks.spawn(asking);
        tasks.spawn(indexing);
        tasks.spawn(Arc::clone(&verifier).watch_rows());
        tasks.spawn(watch(
            config.clone(),
            Arc::clone(&inquirer),
            Arc::clone(&reach),
            Arc::clone(&clock),
        ));
        let limits_changed = {
            let (driver, outbox, config) = (driver.clone(), Arc::clone(&outbox), config.clone());
            move |limits: &BTreeMap<String, usize>| {
                if let Some(bytes) = limits.get(&config.events_topic()) {
                    driver.tell(Message::RecordBytesMax(*bytes));
                }
                let known = outbox.limits();
                let limit = |topic, known| limits.get(&topic).copied().unwrap_or(known);
                outbox.limit_records(RecordLimits {
                    commands: limit(config.commands_topic(), known.commands),
                    replies: limit(config.replies_topic(), known.replies),
                });
            }
        };
        guard::spawn(
            &mut tasks,
            &config,
            Role::Service,
            &inquirer,
            &denials.refusals,
            limits_changed,
        );
        let ownership = Arc::new(Ownership::new(
            shared.clone(),
            driver.clone(),
            Arc::new(indexer),
            inboxes,
            verifier,
            Arc::clone(&clock),
            config.limits.hand_over_timeout,
        ));
        let membership = match config.assignment {
            Assignment::Everything => {
                ownership.take_all();
                None
            }
            Assignment::Group => {
                let (membership, rebalances) = Membership::join(
                    &config,
                    &owners,
                    config.commands_topic(),
                    database.as_deref(),
                    denials.clone(),
                    &*clock,
                )
                .map_err(client_error)?;
                tasks.spawn(members.watch(denials.clone()));
                tasks.spawn(Arc::clone(&ownership).follow(rebalances));
                let membership = Arc::new(membership);
                tasks.spawn(aside::watch(
                    Arc::clone(&membership),
                    shared.clone(),
                    Arc::clone(&nodes),
                    Arc::clone(&clock),
                ));
                Some(membership)
            }
        };
        tasks.spawn(nodes.announce(outbox, Arc::clone(&reach)));
        let tasks = Mutex::new(tasks);
        Ok(Self {
            config,
            topic,
            driver,
            loader,
            partitions: shared,
            ownership,
            membership,
            bus,
            inquirer,
            reach,
            denials,
            clock,
            tasks,
        })
    }

    /// The source of the same log. It is independent of the store's life.
    pub fn source(&self) -> KafkaSource {
        KafkaSource::new(
            self.config.clone(),
            self.topic.partitions,
            Arc::clone(&self.inquirer),
            Arc::clone(&self.clock),
            self.denials.clone(),
        )
    }

    /// Returns the brokers' refusals, one sentence each with cause and remedy. A refusal lasts
    /// until an operator acts, and is part of [`EventStore::health`].
    pub fn refusals(&self) -> Vec<String> {
        self.denials.refusals.sentences()
    }

    /// Carries commands to the nodes that own their streams.
    pub fn commands(&self) -> Arc<dyn CommandBus> {
        self.bus.clone()
    }

    /// From the submission to the outcome: what the caller waits for.
    fn send_span(&self, partition: Partition, append: &Append) -> tracing::Span {
        use tracing::field::Empty;
        tracing::info_span!(
            "send",
            otel.name = format!("send {}", self.config.events_topic()),
            otel.kind = "producer",
            messaging.system = "kafka",
            messaging.operation.name = "send",
            messaging.operation.type = "send",
            messaging.destination.name = self.config.events_topic(),
            messaging.destination.partition.id = %partition,
            messaging.kafka.message.key = append.stream.as_str(),
            messaging.batch.message_count = append.commit.count() as i64,
            messaging.kafka.offset = Empty,
            error.type = Empty,
            otel.status_code = Empty,
        )
    }

    /// The nodes that are up, this one first, and what each owns.
    pub fn nodes(&self) -> Vec<Node> {
        self.bus.nodes.all()
    }

    /// How many partitions the log has.
    pub fn partitions(&self) -> u32 {
        self.topic.partitions
    }

    /// Stops gracefully: takes nothing new, settles what is pending, hands the index what it has
    /// not got yet, leaves the group. Takes at most the limit `shutdown_timeout`; what is then left is
    /// settled by the next owner, from the log. Afterwards everything is answered `Unavailable`.
    pub async fn shutdown(&self) {
        let timeout = self.config.limits.shutdown_timeout;
        let leaving = async {
            // First, so that commands of other nodes that were begun are settled as in any hand-over.
            self.ownership.hand_over_all().await;
            self.reach.stop();
            if let Some(membership) = &self.membership {
                membership.leave().await;
            }
        };
        let in_time = within(&*self.clock, timeout, leaving).await.is_some();
        // Also when there was no time for it.
        self.reach.stop();
        self.bus.nodes.leave(&self.bus.outbox);
        self.bus.outbox.flush().await;
        self.driver.tell(Message::Quit);
        self.ownership.abort();
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        tracing::info!(in_time, "kafka store closed");
    }
}

impl Drop for KafkaStore {
    fn drop(&mut self) {
        // The tasks end with their set; threads end by themselves, nobody waits for them.
        self.driver.tell(Message::Quit);
        self.ownership.abort();
    }
}

/// Starts readers of the log's topics.
#[derive(Clone, Copy)]
struct Readers<'a> {
    config: &'a KafkaConfig,
    inquirer: &'a Arc<Inquirer>,
    clock: &'a Arc<dyn Clock>,
}

impl Readers<'_> {
    fn start<T: Decode>(&self, topic: String, wait: Duration) -> Result<Reader<T>, OpenError> {
        let (inquirer, clock) = (Arc::clone(self.inquirer), Arc::clone(self.clock));
        Reader::start(self.config, topic, wait, inquirer, clock)
            .map_err(|error| open_error(self.config, "starting a client", error, None))
    }
}

/// Hears what the other nodes said of themselves lately, and refuses those that this one does not go
/// together with. Where to listen on from, in each partition of replies that this node reads.
async fn hear_others(
    config: &KafkaConfig,
    inquirer: &Arc<Inquirer>,
    reader: &Reader<ReplyRecord>,
    nodes: &Nodes,
    clock: &dyn Clock,
    topic: EventsTopic,
    replies: Partition,
) -> Result<Vec<(Partition, Offset)>, OpenError> {
    let name = config.replies_topic();
    let spoken = nodes::PARTITION;
    let since = clock.now() - nodes::SILENCE_MAX;
    let doing = || format!("reading topic {name}");
    let failed = |error| open_error(config, doing(), error, None);
    let deadline = clock.instant() + config.limits.request_timeout;
    let (mut next, end, replies_end) = loop {
        let (asked, inquirer) = (name.clone(), Arc::clone(inquirer));
        let ends = tokio::task::spawn_blocking(move || {
            let lately = inquirer.since(&asked, spoken, since)?;
            let (_, end) = inquirer.ends(&asked, spoken)?;
            Ok((lately, end, inquirer.ends(&asked, replies)?.1))
        });
        match ends.await.unwrap_or(Err(KafkaError::Canceled)) {
            Ok(found) => break found,
            // Who leads a topic that was just made may not know it yet.
            Err(error) if error.rdkafka_error_code() == NO_LEADER && clock.instant() < deadline => {
                clock.sleep(LEADER_POLL).await;
            }
            Err(error) => return Err(failed(error)),
        }
    };
    let mut announcements = Vec::new();
    while next < end {
        let read = reader.read_async(spoken, next, config.limits.request_timeout).await;
        let chunk = read.map_err(|failure| failed(failure.into_error()))?;
        if chunk.records.is_empty() {
            break;
        }
        for record in chunk.records {
            next = record.offset.plus(1);
            if let ReplyContent::Announcement { json, .. } = record.content {
                nodes.hear(&json);
                announcements.extend(serde_json::from_slice(&json).ok());
            }
        }
    }
    nodes::check_others(&name, topic.partitions, &announcements)?;
    let mut begin = vec![(spoken, next)];
    if replies != spoken {
        begin.push((replies, replies_end));
    }
    Ok(begin)
}

/// Prepares the topics and gives the client that asks about them. What the brokers allow is put into the
/// configuration.
pub(crate) async fn connect(
    config: &mut KafkaConfig,
    clock: &Arc<dyn Clock>,
    prepare: impl FnOnce(&KafkaConfig, &Inquirer, &Arc<dyn Clock>) -> Result<EventsTopic, OpenError>
    + Send
    + 'static,
) -> Result<(EventsTopic, Arc<Inquirer>), OpenError> {
    let (asked, clock) = (config.clone(), Arc::clone(clock));
    let prepared = tokio::task::spawn_blocking(move || {
        check_hosts(&asked)?;
        let inquirer = Inquirer::new(&asked)
            .map_err(|error| open_error(&asked, "creating a client", error, None))?;
        let topic = prepare(&asked, &inquirer, &clock)?;
        Ok::<_, OpenError>((topic, Arc::new(inquirer)))
    });
    let canceled = |_| open_error(config, "preparing topics", KafkaError::Canceled, None);
    let prepared = prepared.await.map_err(canceled)??;
    let session = &mut config.limits.session_timeout;
    *session = (*session).max(prepared.0.session_timeout_min);
    Ok(prepared)
}

async fn check_beside(
    config: &KafkaConfig,
    topic: EventsTopic,
    inquirer: &Arc<Inquirer>,
) -> Result<(), OpenError> {
    let (asking, inquirer) = (config.clone(), Arc::clone(inquirer));
    let checked = tokio::task::spawn_blocking(move || {
        topic::check_beside(&asking, &inquirer, topic.partitions)
    });
    let canceled = |_| open_error(config, "checking topics", KafkaError::Canceled, None);
    checked.await.map_err(canceled)?
}

/// Rejects a start beside a node that writes another database: each of the two would index a part of
/// the log.
async fn check_database(config: &KafkaConfig, members: &GroupMembers) -> Result<(), OpenError> {
    let patience = config.limits.session_timeout + SESSION_GRACE;
    match members.with_other_database(patience).await {
        None => Ok(()),
        Some(other) => Err(OpenError::OtherNode {
            topic: config.commands_topic(),
            node: other.to_string(),
            why: format!("it writes another database; {}", group::REMEDY),
        }),
    }
}

/// Checks every partition against its place in the index. What does not answer is checked when the
/// partition is taken over, as everything is once more.
async fn check_log(
    config: &KafkaConfig,
    topic: EventsTopic,
    index: &dyn StreamIndex,
    inspector: &Inspector,
    clock: &dyn Clock,
) -> Result<(), OpenError> {
    let refuse =
        |partition, cause| OpenError::Log { topic: config.events_topic(), partition, cause };
    let cursors = match within(clock, INDEX_PATIENCE, index.cursors()).await {
        Some(Ok(cursors)) => cursors,
        // The other partitions can be served beside a damaged one.
        Some(Err(error @ ReadError::Diverged { .. })) => {
            tracing::error!(%error, "the index is damaged");
            return Ok(());
        }
        Some(Err(ReadError::Unavailable { .. })) | None => {
            tracing::warn!("the index does not answer: waiting for it in the background");
            return Ok(());
        }
    };
    let check = async |partition| {
        let place = Indexer::place(&cursors, partition)
            .map_err(|error| refuse(partition, Arc::new(error)))?;
        let checked = match inspector.check(partition, &place).await {
            Ok(()) => inspector.check_newest(partition).await,
            Err(error) => Err(error),
        };
        match checked {
            Ok(()) | Err(InspectError::Unavailable(_)) => Ok(()),
            Err(error) => Err(refuse(partition, Arc::new(error))),
        }
    };
    join_all((0..topic.partitions).map(Partition).map(check)).await.into_iter().collect()
}

fn slot(
    config: &KafkaConfig,
    topic: EventsTopic,
    owner: &Owner,
    shared: Arc<Shared>,
    ids: &Arc<dyn IdGenerator>,
) -> Slot {
    let limits = &config.limits;
    let tried = if limits.message_timeout.is_zero() { FOR_EVER } else { limits.message_timeout };
    let writer = WriterConfig {
        partition: shared.partition,
        partitions: topic.partitions,
        owner: owner.clone(),
        log: config.name.clone(),
        limits: WriterLimits {
            record_bytes_max: topic.record_bytes_max,
            unindexed_events_max: limits.tail_events_max,
            report_timeout: tried + REPORT_GRACE,
            yield_backoff: limits.yield_backoff,
            yield_backoff_max: limits.yield_backoff_max,
            ..WriterLimits::default()
        },
    };
    let ids = Arc::clone(ids);
    // A nonce of the operating system's entropy; where that fails the process's own ids are left.
    let entropy: Entropy = Box::new(move || getrandom::u64().unwrap_or_else(|_| ids.random()));
    Slot::new(PartitionWriter::new(writer, entropy), shared)
}

/// Asks again and again whether a broker answers: an idle process would not notice otherwise.
pub(crate) async fn watch(
    config: KafkaConfig,
    inquirer: Arc<Inquirer>,
    reach: Arc<Reach>,
    clock: Arc<dyn Clock>,
) {
    let interval = config.limits.watch_interval;
    let mut lost = 0;
    loop {
        let pause = if lost > 0 { PING_AGAIN } else { interval };
        let suspected = within(&*clock, pause, reach.suspected.notified()).await.is_some();
        let (inquirer, topic) = (Arc::clone(&inquirer), config.events_topic());
        let asked = tokio::task::spawn_blocking(move || inquirer.topic_within(&topic, interval));
        match asked.await {
            Ok(Ok(_)) => {
                lost = 0;
                reach.found();
            }
            Ok(Err(error)) => {
                lost += if suspected { PINGS_LOST } else { 1 };
                if lost >= PINGS_LOST {
                    reach.lost(&error);
                }
            }
            // The runtime is ending.
            Err(_) => return,
        }
    }
}

#[async_trait]
impl EventStore for KafkaStore {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        let partition = partition_of(&append.stream, self.topic.partitions);
        let span = self.send_span(partition, &append);
        trace::around(span, self.driver.submit(partition, append), |span, appended| {
            span.record("messaging.kafka.offset", appended.position.offset.0 as i64);
        })
    }

    fn confirm(&self, view: View) -> Outcome<()> {
        let partition = partition_of(&view.stream, self.topic.partitions);
        self.driver.confirm(partition, view)
    }

    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        self.loader.read(partition_of(stream, self.topic.partitions), stream, after)
    }

    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        let partition = partition_of(stream, self.topic.partitions);
        let found = self.loader.find(partition, stream, command_id).await?;
        Ok(found.map(|first| Appended { duplicate: false, ..first }))
    }

    fn health(&self) -> Health {
        let joining = self.membership.as_deref().and_then(Membership::unsettled);
        let reasons: Vec<_> = (self.refusals().into_iter())
            .chain(self.denials.strangers.sentences())
            .chain(self.reach.down())
            .chain(joining)
            .chain(self.bus.inboxes.complaints())
            .chain(self.partitions.iter().filter_map(|shared| shared.reason()))
            .collect();
        if reasons.is_empty() { Health::Ready } else { Health::NotReady(reasons) }
    }
}

#[cfg(test)]
mod tests {
    use kafold_core::clock::{RandomIds, SystemClock};
    use kafold_core::memory::MemoryIndex;
    use kafold_core::testing::{commit, eventually, new_stream, read_gapless};
    use kafold_core::{ExpectedVersion, Offset};

    use super::*;
    use crate::producer::{Report, Sink, Tag};
    use crate::wire::{ClaimId, Content, LogRecord};
    use crate::writer::ReportFailure;

    /// The newest claim of a partition, read from the log.
    async fn newest_claim(store: &KafkaStore, partition: Partition) -> ClaimId {
        let (config, inquirer, clock) = (&store.config, &store.inquirer, &store.clock);
        let readers = Readers { config, inquirer, clock };
        let reader = readers.start(config.events_topic(), FETCH_WAIT).expect("a reader");
        let read = reader.read_async(partition, Offset(0), Duration::from_secs(10)).await;
        let records: Vec<LogRecord> = read.expect("readable").records;
        let claims = records.into_iter().rev().find_map(|record| match record.content {
            Content::Ours(ours) if ours.stamp.seq == 0 => Some(ours.stamp.claim),
            _ => None,
        });
        claims.expect("it was claimed")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn after_a_fatal_error_a_fresh_producer_claims_every_partition_anew() {
        let Ok(brokers) = std::env::var("KAFOLD_TEST_KAFKA") else {
            eprintln!("skipped after_a_fatal_error: KAFOLD_TEST_KAFKA names no broker");
            return;
        };
        let name = format!("fatal-{}", RandomIds.event_id());
        let config = format!("kafka://{brokers}/{name}?partitions=2").parse().expect("valid");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let owner = Owner { name: "fatal".into(), address: String::new(), started_at: clock.now() };
        let index = Arc::new(MemoryIndex::new());
        let store = KafkaStore::open(config, index, owner, clock, Arc::new(RandomIds))
            .await
            .expect("opened");
        eventually("it is ready", async || store.health() == Health::Ready).await;
        let of = |wanted| {
            std::iter::repeat_with(new_stream).find(|id| partition_of(id, 2) == Partition(wanted))
        };
        let streams = [of(0).expect("one of many"), of(1).expect("one of many")];
        for stream in &streams {
            store.append(stream, ExpectedVersion::NoStream, commit(1)).await.expect("is new");
        }
        let claims =
            [newest_claim(&store, Partition(0)).await, newest_claim(&store, Partition(1)).await];

        let failure = ReportFailure { fatal: true, refused: false, reason: "made up".into() };
        let tag = Tag { claim: claims[0], seq: 1 };
        let partition = Partition(0);
        let result = Err(failure);
        store.driver.report(Report { generation: 0, partition, tag, result });
        for stream in &streams {
            let second = commit(1);
            eventually("the second commit is in", async || {
                store.append(stream, ExpectedVersion::Any, second.clone()).await.is_ok()
            })
            .await;
            read_gapless(&store, stream, 2).await;
        }
        for (partition, old) in claims.into_iter().enumerate() {
            let new = newest_claim(&store, Partition(partition as u32)).await;
            assert!(new.epoch > old.epoch, "partition {partition} was not claimed anew");
        }
    }
}

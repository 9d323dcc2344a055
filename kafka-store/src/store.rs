//! The event store on Kafka: opens the log, joins driver, loader and indexer, and answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use kafold_core::store::{Append, Appended, Health, Outcome, Owner, View};
use kafold_core::{
    Clock, CommandId, EventStore, IdGenerator, Partition, ReadError, RecordedEvent, StreamId,
    StreamIndex, Version,
};
use rdkafka::error::KafkaError;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::client::{Inquirer, open_error};
use crate::config::KafkaConfig;
use crate::driver::{Driver, Message, Parts, Slot};
use crate::error::OpenError;
use crate::fold::Checkpoint;
use crate::indexer::Indexer;
use crate::inspect::{InspectError, Inspector};
use crate::loader::Loader;
use crate::partition::{Reach, Shared};
use crate::partitioner::partition_of;
use crate::reader::LogReader;
use crate::source::KafkaSource;
use crate::topic::{self, EventsTopic};
use crate::writer::{Entropy, PartitionWriter, WriterConfig, WriterLimits};

/// How long a fetch of the writers' reader waits for records: a partition that begins to be read
/// waits with it.
const FETCH_WAIT: Duration = Duration::from_millis(50);
/// Records without a report for so much longer than the producer tries are in doubt.
const REPORT_GRACE: Duration = Duration::from_secs(30);
/// Stands for a producer that tries for ever.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);
/// Questions in a row that no broker answered until it is said that none can be reached.
const PINGS_LOST: u32 = 3;
/// Before a question that no broker answered is asked again.
const PING_AGAIN: Duration = Duration::from_millis(200);
/// How often a graceful stop looks whether the index has everything.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// How long the index may take to tell where it stands before the store is opened without it.
const INDEX_PATIENCE: Duration = Duration::from_secs(5);

/// An event store whose truth is a Kafka topic. This process tries to own every partition: the
/// newest start wins each, and the one before answers [`NotOwner`](kafold_core::AppendError).
///
/// Reads need the index for what is no longer in memory; appends need it only for streams that this
/// process does not know yet.
pub struct KafkaStore {
    config: KafkaConfig,
    topic: EventsTopic,
    driver: Driver,
    loader: Arc<Loader>,
    indexer: Arc<Indexer>,
    partitions: Vec<Arc<Shared>>,
    inquirer: Arc<Inquirer>,
    reach: Arc<Reach>,
    clock: Arc<dyn Clock>,
    /// Ended when the store is dropped.
    tasks: Mutex<JoinSet<()>>,
}

impl KafkaStore {
    /// Opens the log: creates its topics if they are absent, refuses unsafe ones, checks that this is
    /// the log the index was made from, and begins to take over all partitions. Returns as soon as
    /// the checks are through; [`EventStore::health`] tells when commands are taken.
    ///
    /// `owner` is what other processes are told when they find that this one owns a partition. Fails
    /// with a transient error when no broker answers: call again. An index that does not answer is
    /// waited for in the background.
    pub async fn open(
        config: KafkaConfig,
        index: Arc<dyn StreamIndex>,
        owner: Owner,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Result<Self, OpenError> {
        let (topic, inquirer) = connect(&config, &clock).await?;
        let client_error = |error| open_error(&config, "starting a client", error, None);
        let start_reader = || {
            LogReader::start(&config, FETCH_WAIT, Arc::clone(&inquirer), Arc::clone(&clock))
                .map_err(client_error)
        };
        // The inspector looks at any partition at any time: a read of its own must not replace one
        // that a writer waits for.
        let (reader, inspecting) = (start_reader()?, start_reader()?);
        let inspector = Inspector::new(
            &config,
            topic.partitions,
            inspecting,
            Arc::clone(&inquirer),
            Arc::clone(&clock),
        );
        let places = check_log(&config, topic, &*index, &inspector, &*clock).await?;

        let shared: Vec<_> =
            (0..topic.partitions).map(|p| Arc::new(Shared::new(Partition(p)))).collect();
        let reach = Arc::new(Reach::default());
        let (loader, asking) = Loader::new(Arc::clone(&index), shared.clone(), &config.limits);
        let (driver, inbox) = Driver::new(&config, Arc::clone(&reach));
        let slots = shared
            .iter()
            .map(|shared| slot(&config, topic, &owner, Arc::clone(shared), &ids))
            .collect();
        let parts = Parts {
            config: config.clone(),
            record_bytes_max: topic.record_bytes_max,
            slots,
            reader,
            loader: Arc::clone(&loader),
            clock: Arc::clone(&clock),
        };
        driver.start(inbox, parts).map_err(client_error)?;
        let indexer = Arc::new(Indexer::new(
            config.clone(),
            index,
            driver.clone(),
            inspector,
            Arc::clone(&inquirer),
            Arc::clone(&clock),
            ids,
        ));
        let mut tasks = JoinSet::new();
        tasks.spawn(asking);
        tasks.spawn(watch(
            config.clone(),
            Arc::clone(&inquirer),
            Arc::clone(&reach),
            Arc::clone(&clock),
        ));
        for (shared, place) in shared.iter().zip(places) {
            tasks.spawn(Arc::clone(&indexer).run(Arc::clone(shared), place));
        }
        let tasks = Mutex::new(tasks);
        let partitions = shared;
        Ok(Self {
            config,
            topic,
            driver,
            loader,
            indexer,
            partitions,
            inquirer,
            reach,
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
        )
    }

    /// How many partitions the log has.
    pub fn partitions(&self) -> u32 {
        self.topic.partitions
    }

    /// Stops gracefully: takes nothing new, settles what is pending, hands the index what it has
    /// not got yet. Takes at most the limit `shutdown_timeout`; what is then left is settled by the
    /// next start, from the log. Afterwards everything is answered `Unavailable`.
    pub async fn shutdown(&self) {
        let deadline = self.clock.instant() + self.config.limits.shutdown_timeout;
        let (done, stopped) = oneshot::channel();
        self.driver.tell(Message::Stop(done));
        let left = deadline.saturating_duration_since(self.clock.instant());
        let in_time = within(&*self.clock, left, stopped).await.is_some();
        self.indexer.close(&self.partitions);
        let mut drained = false;
        while !drained && self.clock.instant() < deadline {
            drained = self.partitions.iter().all(|shared| shared.tail().events() == 0);
            if !drained {
                self.clock.sleep(DRAIN_POLL).await;
            }
        }
        self.driver.tell(Message::Quit);
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        tracing::info!(settled = in_time, indexed = drained, "kafka store closed");
    }
}

impl Drop for KafkaStore {
    fn drop(&mut self) {
        // The tasks end with their set; threads end by themselves, nobody waits for them.
        self.driver.tell(Message::Quit);
    }
}

/// Prepares the topics and gives the client that asks about them.
pub(crate) async fn connect(
    config: &KafkaConfig,
    clock: &Arc<dyn Clock>,
) -> Result<(EventsTopic, Arc<Inquirer>), OpenError> {
    let (asked, clock) = (config.clone(), Arc::clone(clock));
    let prepared = tokio::task::spawn_blocking(move || {
        let inquirer = Inquirer::new(&asked)
            .map_err(|error| open_error(&asked, "creating a client", error, None))?;
        let topic = topic::prepare(&asked, &inquirer, &clock)?;
        Ok((topic, Arc::new(inquirer)))
    });
    let canceled = |_| open_error(config, "preparing topics", KafkaError::Canceled, None);
    prepared.await.map_err(canceled)?
}

/// Checks every partition against its place in the index. Without an answer of the index each
/// partition is checked later, on its own.
async fn check_log(
    config: &KafkaConfig,
    topic: EventsTopic,
    index: &dyn StreamIndex,
    inspector: &Inspector,
    clock: &dyn Clock,
) -> Result<Vec<Option<Checkpoint>>, OpenError> {
    let partitions = (0..topic.partitions).map(Partition);
    let refuse =
        |partition, cause| OpenError::Log { topic: config.events_topic(), partition, cause };
    let cursors = match within(clock, INDEX_PATIENCE, index.cursors()).await {
        Some(Ok(cursors)) => cursors,
        Some(Err(error @ ReadError::Diverged { .. })) => {
            return Err(refuse(Partition(0), Arc::new(error)));
        }
        Some(Err(ReadError::Unavailable { .. })) | None => {
            tracing::warn!("the index does not answer: waiting for it in the background");
            return Ok(partitions.map(|_| None).collect());
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
            Ok(()) => Ok(Some(place)),
            Err(InspectError::Unavailable(_)) => Ok(None),
            Err(error) => Err(refuse(partition, Arc::new(error))),
        }
    };
    join_all(partitions.map(check)).await.into_iter().collect()
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
            ..WriterLimits::default()
        },
    };
    let ids = Arc::clone(ids);
    // A nonce of the operating system's entropy; where that fails the process's own ids are left.
    let entropy: Entropy = Box::new(move || getrandom::u64().unwrap_or_else(|_| ids.random()));
    Slot::new(PartitionWriter::new(writer, entropy), shared)
}

/// The result of the future, if it comes in time.
async fn within<F: Future>(clock: &dyn Clock, limit: Duration, future: F) -> Option<F::Output> {
    use futures_util::future::{Either, select};
    match select(std::pin::pin!(future), clock.sleep(limit)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}

/// Asks again and again whether a broker answers: an idle process would not notice otherwise.
async fn watch(
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
        self.driver.submit(partition, append)
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
        let reasons: Vec<_> = (self.reach.down().into_iter())
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
    use crate::producer::{Report, Tag};
    use crate::wire::{ClaimId, Content};
    use crate::writer::ReportFailure;

    /// The newest claim of a partition, read from the log.
    async fn newest_claim(store: &KafkaStore, partition: Partition) -> ClaimId {
        let (inquirer, clock) = (Arc::clone(&store.inquirer), Arc::clone(&store.clock));
        let reader =
            LogReader::start(&store.config, FETCH_WAIT, inquirer, clock).expect("a reader");
        let read = reader.read_async(partition, Offset(0), Duration::from_secs(10)).await;
        let records = read.expect("readable").records;
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
        store.driver.tell(Message::Report(Report { generation: 0, partition, tag, result }));
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

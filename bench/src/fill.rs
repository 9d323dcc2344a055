//! Logs and indexes made in bulk: valid ones, as a writer with one claim a partition would have left
//! them, without the cost of deciding anything.

use std::sync::Arc;

use fastrand::Rng;
use kafold::clock::{RandomIds, SystemClock};
use kafold::index::{Advanced, IndexBatch};
use kafold::kafka::fold::{Checkpoint, CommitReader};
use kafold::kafka::partitioner::partition_of;
use kafold::kafka::wire::{
    self, Body, Claim, ClaimId, Content, Encoded, Epoch, EventBody, LogRecord, Nonce, Record, Stamp,
};
use kafold::projections::SqlIndex;
use kafold::{
    Clock, CommandId, Database, IdGenerator, Metadata, Offset, Partition, Position, RecordedEvent,
    StreamId, StreamIndex, Version, codec,
};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::BaseRecord;
use tokio::sync::mpsc;

use crate::Failure;
use crate::baselines::producer::{Window, settings};
use crate::domain::Deposit;
use crate::ours::make_log;
use crate::servers::PARTITIONS;
use crate::zipf::Zipf;

/// Records in flight.
const WINDOW: u64 = 20_000;
/// Payloads made beforehand.
const PAYLOADS: usize = 1_024;
/// Events of one index batch.
const INDEX_BATCH_EVENTS: usize = 5_000;
/// Events of one index batch of a store under load.
const STORE_BATCH_EVENTS: usize = 2_000;
/// Index batches that wait for the database.
const INDEX_BATCHES_WAITING: usize = 8;

/// A log to be made.
#[derive(Debug, Clone, Copy)]
pub struct Fill<'f> {
    /// Where.
    pub brokers: &'f str,
    /// Its name.
    pub name: &'f str,
    /// How many events, of all streams in turn.
    pub events: u64,
    /// How many streams: `account-0`, `account-1` …
    pub streams: u64,
    /// Bytes of each payload.
    pub payload_bytes: usize,
}

impl Fill<'_> {
    /// Makes it, and the index in the database if there is one. Answers how many offsets it has in
    /// all partitions together.
    pub async fn make(self, index: Option<&Database>) -> Result<u64, Failure> {
        make_log(self.brokers, self.name).await?;
        let (batches, mut to_index) = mpsc::channel(INDEX_BATCHES_WAITING);
        let (brokers, name) = (self.brokers.to_owned(), self.name.to_owned());
        let is_indexed = index.is_some();
        let Fill { events, streams, payload_bytes, .. } = self;
        let writing = tokio::task::spawn_blocking(move || {
            let fill = Fill { brokers: &brokers, name: &name, events, streams, payload_bytes };
            fill.write(is_indexed.then_some(batches))
        });
        if let Some(database) = index {
            let index = SqlIndex::new(database.clone());
            while let Some(batch) = to_index.recv().await {
                if index.advance(vec![batch]).await.remove(0)? != Advanced::Moved {
                    return Err("the index was not empty".into());
                }
            }
        }
        writing.await??;
        Ok(events + u64::from(PARTITIONS))
    }

    /// Blocks.
    fn write(self, batches: Option<mpsc::Sender<IndexBatch>>) -> Result<(), Failure> {
        let topic = format!("{}.events", self.name);
        let mut producer = settings(self.brokers, "5")?;
        producer.set("queue.buffering.max.messages", "200000");
        let window = Window::start(&producer, topic.clone(), WINDOW)?;
        let mut random = Rng::with_seed(11);
        let payloads = (0..PAYLOADS).map(|_| payload(self.payload_bytes, &mut random));
        let payloads = payloads.collect::<Result<Vec<_>, _>>()?;
        let mut writers: Vec<_> = (0..PARTITIONS).map(|p| Writer::new(Partition(p))).collect();
        for writer in &mut writers {
            let claim = writer.claim(self.name)?;
            push(&window, &topic, writer.partition, &claim)?;
        }
        for number in 0..self.events {
            let payload = &payloads[number as usize % PAYLOADS];
            let stream = StreamId::new("account", &(number % self.streams).to_string())?;
            let version = Version(number / self.streams + 1);
            let partition = partition_of(&stream, PARTITIONS);
            let writer = &mut writers[partition.0 as usize];
            let event = writer.event(self.name, stream, version, payload)?;
            push(&window, &topic, partition, &event)?;
            match &batches {
                None => writer.events.clear(),
                Some(batches) if writer.events.len() >= INDEX_BATCH_EVENTS => {
                    send(batches, writer.batch())?;
                }
                Some(_) => {}
            }
        }
        window.finish()?;
        if let Some(batches) = batches {
            writers.iter_mut().try_for_each(|writer| send(&batches, writer.batch()))?;
        }
        Ok(())
    }
}

fn payload(bytes: usize, random: &mut Rng) -> Result<Arc<[u8]>, Failure> {
    Ok(codec::encode(&Deposit::of_bytes(bytes, random).event())?.into())
}

fn send(batches: &mpsc::Sender<IndexBatch>, batch: IndexBatch) -> Result<(), Failure> {
    batches.blocking_send(batch).map_err(|_| "the index is fed no more".into())
}

fn push(
    window: &Window,
    topic: &str,
    partition: Partition,
    encoded: &Encoded,
) -> Result<(), Failure> {
    let mut headers = OwnedHeaders::new_with_capacity(encoded.headers.len());
    for (key, value) in &encoded.headers {
        headers = headers.insert(Header { key, value: Some(value) });
    }
    let record = BaseRecord::to(topic)
        .partition(partition.0 as i32)
        .key(encoded.key.as_slice())
        .payload(&*encoded.value)
        .headers(headers);
    window.push(record)
}

/// Index batches of streams drawn by Zipf's law, as a store hands them over.
pub struct IndexFeed {
    writers: Vec<Writer>,
    /// Of each stream its partition and its version.
    streams: Vec<(StreamId, Partition, u64)>,
    payloads: Vec<Arc<[u8]>>,
    zipf: Zipf,
    random: Rng,
}

impl IndexFeed {
    /// Nothing of so many streams.
    pub fn new(streams: u64, payload_bytes: usize) -> Result<Self, Failure> {
        let mut random = Rng::with_seed(13);
        let payloads = (0..PAYLOADS).map(|_| payload(payload_bytes, &mut random));
        let payloads = payloads.collect::<Result<_, _>>()?;
        let stream = |number: u64| {
            let stream = StreamId::new("account", &number.to_string())?;
            let partition = partition_of(&stream, PARTITIONS);
            Ok((stream, partition, 0))
        };
        let writers = (0..PARTITIONS).map(|p| Writer::new(Partition(p))).collect();
        let all = (0..streams).map(stream).collect::<Result<_, Failure>>()?;
        Ok(Self { writers, streams: all, payloads, zipf: Zipf::new(streams), random })
    }

    /// The batches of the next so many events.
    pub fn batches(&mut self, events: u64) -> Result<Vec<IndexBatch>, Failure> {
        let mut batches = Vec::new();
        for number in 0..events {
            let rank = self.zipf.draw(&mut self.random) as usize;
            let (stream, partition, version) = &mut self.streams[rank];
            *version += 1;
            let writer = &mut self.writers[partition.0 as usize];
            if writer.next == 0 {
                writer.claim("bench")?;
            }
            let payload = &self.payloads[number as usize % PAYLOADS];
            writer.event("bench", stream.clone(), Version(*version), payload)?;
            if writer.events.len() >= STORE_BATCH_EVENTS {
                batches.push(writer.batch());
            }
        }
        batches.extend(self.writers.iter_mut().filter(|w| !w.events.is_empty()).map(Writer::batch));
        Ok(batches)
    }
}

/// Writes one partition under one claim: its records are at offset 0, 1, 2 …
struct Writer {
    partition: Partition,
    claim: ClaimId,
    next: u64,
    fold: CommitReader,
    /// What the index has not got yet, from this offset.
    events: Vec<RecordedEvent>,
    from: Offset,
}

impl Writer {
    fn new(partition: Partition) -> Self {
        let claim = ClaimId { epoch: Epoch(1), nonce: Nonce(RandomIds.random()) };
        let fold = CommitReader::new(partition, Checkpoint::default());
        Self { partition, claim, next: 0, fold, events: Vec::new(), from: Offset(0) }
    }

    fn claim(&mut self, log: &str) -> Result<Encoded, Failure> {
        let (owner, address) = ("bench".to_owned(), String::new());
        let started_at = SystemClock.now();
        let claim = Claim { owner, address, partitions: PARTITIONS, started_at };
        self.record(log, Body::Claim(claim))
    }

    fn event(
        &mut self,
        log: &str,
        stream: StreamId,
        version: Version,
        payload: &Arc<[u8]>,
    ) -> Result<Encoded, Failure> {
        let event_id = RandomIds.event_id();
        let event = RecordedEvent {
            stream,
            version,
            position: Position { partition: self.partition, offset: Offset(self.next) },
            command_id: CommandId(event_id),
            event_type: "account.deposited.v1".into(),
            payload: Arc::clone(payload),
            metadata: Metadata {
                event_id,
                recorded_at: wire::stored_time(SystemClock.now()),
                correlation_id: None,
                causation_id: None,
                trace_parent: None,
            },
        };
        self.events.push(event.clone());
        self.record(log, Body::Event(EventBody { index: 0, count: 1, event: Arc::new(event) }))
    }

    fn record(&mut self, log: &str, body: Body) -> Result<Encoded, Failure> {
        let stamp = Stamp { claim: self.claim, seq: self.next, commands_mark: Offset(0) };
        let record = Record { stamp, body };
        let encoded = wire::encode(&record, log, SystemClock.now());
        let offset = Offset(self.next);
        self.fold.read(LogRecord { offset, content: Content::Ours(record) })?;
        self.next += 1;
        Ok(encoded)
    }

    fn batch(&mut self) -> IndexBatch {
        let to = self.fold.fold().checkpoint().to_cursor();
        let from = std::mem::replace(&mut self.from, to.next);
        let events = std::mem::take(&mut self.events);
        IndexBatch { partition: self.partition, from, to, events }
    }
}

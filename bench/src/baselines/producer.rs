//! A raw idempotent producer: no check of any version, nothing read back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::Duration;

use fastrand::Rng;
use kafold::clock::{RandomIds, SystemClock};
use kafold::kafka::partitioner::partition_of;
use kafold::{Clock, IdGenerator, StreamId, codec};
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, ProducerContext};
use tokio::sync::oneshot;

use crate::Failure;
use crate::domain::Deposit;
use crate::measure::now;
use crate::servers::{PARTITIONS, client};
use crate::zipf::Zipf;

/// The poll thread looks this often whether it is to end; reports do not wait for it.
const POLL: Duration = Duration::from_millis(100);
/// How long it is parked at most: nothing depends on it.
const PARK: Duration = Duration::from_millis(100);
/// Before a record is offered again to a producer that was full.
const FULL_RETRY: Duration = Duration::from_millis(1);
/// With fewer in flight than this every report counts.
const FEW: u64 = 64;
/// Variants of headers that differ between records, made beforehand.
const VARIANTS: usize = 4_096;

/// The header of kafold's fold, as long as ours.
const KF_BYTES: usize = 58;

/// A record but for what differs from one to the next.
pub struct Records {
    keys: Vec<(i32, StreamId)>,
    /// Event id, time and the fold's header.
    variants: Vec<(Vec<u8>, Vec<u8>, [u8; KF_BYTES])>,
    payloads: Vec<Arc<[u8]>>,
    source: String,
}

impl Records {
    /// Records of so many streams with payloads of so many bytes, to be written to a log.
    pub fn new(log: &str, streams: u64, payload_bytes: usize) -> Result<Self, Failure> {
        let mut random = Rng::with_seed(7);
        let key = |rank: u64| {
            let stream = StreamId::new("account", &rank.to_string())?;
            Ok((partition_of(&stream, PARTITIONS).0 as i32, stream))
        };
        let keys = (0..streams).map(key).collect::<Result<_, Failure>>()?;
        let payload = |_| {
            let event = Deposit::of_bytes(payload_bytes, &mut random).event();
            Ok(codec::encode(&event)?.into())
        };
        let payloads = (0..VARIANTS).map(payload).collect::<Result<_, Failure>>()?;
        let time = SystemClock.now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let mut kf = [0; KF_BYTES];
        kf[0] = 1;
        let variant = |_| {
            let id = RandomIds.event_id();
            kf[34..50].copy_from_slice(id.as_bytes());
            (id.to_string().into_bytes(), time.clone().into_bytes(), kf)
        };
        let variants = (0..VARIANTS).map(variant).collect();
        Ok(Self { keys, variants, payloads, source: format!("/{log}/account") })
    }

    /// The record of a stream, with the headers and the payload of the variant.
    pub fn record<'r, C>(
        &'r self,
        topic: &'r str,
        rank: u64,
        variant: usize,
        opaque: C,
    ) -> BaseRecord<'r, [u8], [u8], C>
    where
        C: rdkafka::util::IntoOpaque,
    {
        let (partition, key) = &self.keys[rank as usize % self.keys.len()];
        BaseRecord::with_opaque_to(topic, opaque)
            .partition(*partition)
            .key(key.as_str().as_bytes())
            .payload(&*self.payloads[variant % VARIANTS])
            .headers(self.headers(variant))
    }

    /// The headers of a record of ours.
    fn headers(&self, variant: usize) -> OwnedHeaders {
        let (id, time, kf) = &self.variants[variant % VARIANTS];
        OwnedHeaders::new_with_capacity(7)
            .insert(Header { key: "ce_specversion", value: Some("1.0") })
            .insert(Header { key: "ce_id", value: Some(id) })
            .insert(Header { key: "ce_source", value: Some(&self.source) })
            .insert(Header { key: "ce_type", value: Some("account.deposited.v1") })
            .insert(Header { key: "ce_time", value: Some(time) })
            .insert(Header { key: "content-type", value: Some("application/json") })
            .insert(Header { key: "kf", value: Some(kf) })
    }
}

/// Settings as ours, with a linger.
pub fn settings(brokers: &str, linger_ms: &str) -> Result<ClientConfig, Failure> {
    let mut settings = client(brokers)?;
    settings
        .set("client.id", "baseline")
        .set("socket.nagle.disable", "true")
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", linger_ms);
    Ok(settings)
}

/// A producer that is polled on a thread of its own.
struct Polled<C: ProducerContext + 'static> {
    inner: Arc<BaseProducer<C>>,
    ended: Arc<AtomicBool>,
}

impl<C: ProducerContext + 'static> Polled<C> {
    fn start(settings: &ClientConfig, context: C) -> Result<Self, Failure> {
        let inner = Arc::new(BaseProducer::from_config_and_context(settings, context)?);
        let ended = Arc::new(AtomicBool::new(false));
        let (polled, end) = (Arc::clone(&inner), Arc::clone(&ended));
        std::thread::Builder::new().name("baseline-producer".into()).spawn(move || {
            while !end.load(Ordering::Acquire) {
                polled.poll(POLL);
            }
        })?;
        Ok(Self { inner, ended })
    }
}

impl<C: ProducerContext + 'static> Drop for Polled<C> {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// Keeps so many records in flight, as that many callers would who each wait for their report.
pub struct Window {
    polled: Polled<WindowContext>,
    state: Arc<WindowState>,
    topic: String,
    most: u64,
}

#[derive(Default)]
struct WindowState {
    in_flight: AtomicU64,
    failed: AtomicU64,
    /// The sender is woken below this.
    low: AtomicU64,
    sender: std::sync::Mutex<Option<Thread>>,
    is_parked: AtomicBool,
}

struct WindowContext(Arc<WindowState>);

impl ClientContext for WindowContext {}

impl ProducerContext for WindowContext {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let state = &self.0;
        if result.is_err() {
            state.failed.fetch_add(1, Ordering::Relaxed);
        }
        let left = state.in_flight.fetch_sub(1, Ordering::SeqCst) - 1;
        let is_low = left < state.low.load(Ordering::Relaxed);
        if is_low
            && state.is_parked.swap(false, Ordering::SeqCst)
            && let Ok(sender) = state.sender.lock()
            && let Some(sender) = &*sender
        {
            sender.unpark();
        }
    }
}

impl Window {
    /// A producer to the topic with so many records in flight at most.
    pub fn start(settings: &ClientConfig, topic: String, most: u64) -> Result<Self, Failure> {
        let state = Arc::new(WindowState::default());
        let polled = Polled::start(settings, WindowContext(Arc::clone(&state)))?;
        Ok(Self { polled, state, topic, most })
    }

    /// Sends `total` records of streams drawn by Zipf's law and answers how long that took until the
    /// last report. Blocks.
    pub fn run(&self, records: &Records, total: u64, seed: u64) -> Result<Duration, Failure> {
        let (mut random, zipf) = (Rng::with_seed(seed), Zipf::new(records.keys.len() as u64));
        let began = now();
        for number in 0..total {
            let rank = zipf.draw(&mut random);
            self.push(records.record(&self.topic, rank, number as usize, ()))?;
        }
        self.finish()?;
        Ok(now() - began)
    }

    /// Sends one when there is room for it. Blocks; from one thread at a time.
    pub fn push(&self, mut record: BaseRecord<'_, [u8], [u8], ()>) -> Result<(), Failure> {
        // With many in flight, waking for every report would have the sender wait more than send.
        let low = if self.most < FEW { self.most } else { self.most - self.most / 8 };
        self.wait_below(self.most, low)?;
        self.state.in_flight.fetch_add(1, Ordering::SeqCst);
        loop {
            match self.polled.inner.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                    record = again;
                    std::thread::park_timeout(FULL_RETRY);
                }
                Err((error, _)) => {
                    self.state.in_flight.fetch_sub(1, Ordering::SeqCst);
                    return Err(error.into());
                }
            }
        }
    }

    /// Returns after the last report. Blocks.
    pub fn finish(&self) -> Result<(), Failure> {
        self.wait_below(1, 1)?;
        match self.state.failed.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            failed => Err(format!("{failed} records of the baseline failed").into()),
        }
    }

    /// Returns when fewer than `most` are in flight; woken only when they are fewer than `low`.
    fn wait_below(&self, most: u64, low: u64) -> Result<(), Failure> {
        let state = &self.state;
        if state.in_flight.load(Ordering::SeqCst) < most {
            return Ok(());
        }
        state.low.store(low, Ordering::Relaxed);
        let sender = state.sender.lock().map(|mut sender| *sender = Some(std::thread::current()));
        sender.map_err(|error| error.to_string())?;
        while state.in_flight.load(Ordering::SeqCst) >= most {
            state.is_parked.store(true, Ordering::SeqCst);
            if state.in_flight.load(Ordering::SeqCst) >= most {
                std::thread::park_timeout(PARK);
            }
            state.is_parked.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Produces one record and waits for its report, as often as it is asked.
pub struct Waiting {
    polled: Polled<WaitingContext>,
    topic: String,
}

struct WaitingContext;

/// The partition and the offset of a record, or what became of it.
type Place = Result<(i32, i64), KafkaError>;

impl ClientContext for WaitingContext {}

impl ProducerContext for WaitingContext {
    type DeliveryOpaque = Box<oneshot::Sender<Place>>;

    fn delivery(&self, result: &DeliveryResult<'_>, answer: Self::DeliveryOpaque) {
        let place = match result {
            Ok(message) => Ok((message.partition(), message.offset())),
            Err((error, _)) => Err(error.clone()),
        };
        // Who stopped waiting needs no answer.
        let _ = answer.send(place);
    }
}

impl Waiting {
    /// A producer to the topic.
    pub fn start(settings: &ClientConfig, topic: String) -> Result<Self, Failure> {
        Ok(Self { polled: Polled::start(settings, WaitingContext)?, topic })
    }

    /// Produces one of these and answers where it is.
    pub async fn produce(
        &self,
        records: &Records,
        rank: u64,
        variant: usize,
    ) -> Result<(i32, i64), Failure> {
        let (answer, report) = oneshot::channel();
        let record = records.record(&self.topic, rank, variant, Box::new(answer));
        self.polled.inner.send(record).map_err(|(error, _)| error)?;
        Ok(report.await??)
    }
}

/// Produces events of any stream, with the headers of a record of ours.
pub struct Events {
    waiting: Waiting,
    records: Records,
    number: AtomicUsize,
}

impl Events {
    /// A producer to the events topic of a log that is there.
    pub fn start(brokers: &str, log: &str) -> Result<Self, Failure> {
        let waiting = Waiting::start(&settings(brokers, "0")?, format!("{log}.events"))?;
        Ok(Self { waiting, records: Records::new(log, 1, 64)?, number: AtomicUsize::new(0) })
    }

    /// Produces one and answers where it is.
    pub async fn produce(&self, stream: &StreamId, payload: &[u8]) -> Result<(i32, i64), Failure> {
        let headers = self.records.headers(self.number.fetch_add(1, Ordering::Relaxed));
        let (answer, report) = oneshot::channel();
        let record = BaseRecord::with_opaque_to(&self.waiting.topic, Box::new(answer))
            .partition(partition_of(stream, PARTITIONS).0 as i32)
            .key(stream.as_str().as_bytes())
            .payload(payload)
            .headers(headers);
        self.waiting.polled.inner.send(record).map_err(|(error, _)| error)?;
        Ok(report.await??)
    }
}

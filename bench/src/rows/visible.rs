//! R9: from an acknowledged event to its row, at half load, against how soon a raw consumer polls a
//! record that was acknowledged, at the same rate.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fastrand::Rng;
use kafold::projections::{ProjectionWorker, Projections, ReadModel};
use kafold::{CommandHandler, Log};
use rdkafka::Message;
use rdkafka::consumer::BaseConsumer;
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::JoinHandle;

use crate::Failure;
use crate::baselines::consumer::{From, Moments, consumer, each};
use crate::baselines::producer::{Records, Waiting, settings};
use crate::baselines::upsert::Target;
use crate::domain::{Account, Balance, Deposit};
use crate::harness::{Bench, Goal, Sample};
use crate::measure::{Latencies, Until, closed_loop, now, open_loop, per_second};
use crate::ours::{WAIT_MAX, applied, deposit, index_caught_up, indexed, log_url, make_log, open};
use crate::servers::{Scratch, remove_log};
use crate::svg::{Chart, Scale};

const PAYLOAD_BYTES: usize = 256;
const GOAL: f64 = 2.0;
const STREAMS: u64 = 10_000;
const CALLERS: usize = 64;
/// Every so many events one is waited for.
const WATCHED_EVERY: u64 = 8;
/// Nothing is told more exactly.
const LEAST: Duration = Duration::from_micros(1);

/// At half of what index and read model keep up with.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let brokers = bench.servers.broker().await?.to_owned();
    let names = [bench.servers.new_name(), bench.servers.new_name()];
    let ours = Ours::open(bench, &brokers, &names[0]).await?;
    let load = ours.load(bench.size.of(2_000, 20_000, 40_000)).await? / 2.0;
    let seconds = bench.size.of(1.0, 3.0, 6.0);
    let calls = (load * seconds) as u64;
    make_log(&brokers, &names[1]).await?;
    let raw = Raw::open(&brokers, &names[1])?;
    let (mut all_ours, mut all_raw, mut all_written) = Default::default();
    let figures = [("p99_us", Goal::AtMost(GOAL)), ("p50_us", Goal::Stated)];
    let visible = async || sampled(&ours.visible(load, calls).await?, &mut all_ours);
    let mut polled = async || sampled(&raw.polled(load, calls).await?, &mut all_raw);
    bench.compare("R9", format!("{load:.0} events/s"), &figures, visible, &mut polled).await?;
    // The same records, as the raw consumer's: nothing is decided, nothing is indexed.
    let by_hand = bench.servers.database().await?;
    let target = Arc::new(AsyncMutex::new(Target::postgres(&by_hand.url, false).await?));
    let written = async || sampled(&raw.written(load, calls, &target).await?, &mut all_written);
    let figures = figures.map(|(metric, _)| (metric, Goal::Stated));
    let case = "without kafold: rows by hand at the same rate";
    bench.compare("R9", case, &figures, written, polled).await?;
    drop(target);
    by_hand.remove().await?;
    let chart = Chart {
        title: format!("After the acknowledgement, {load:.0} events/s"),
        x: ("percentile", Scale::Percentile),
        y: ("µs", Scale::Logarithmic),
        lines: vec![
            ("row visible".into(), all_ours.curve()),
            ("row by hand".into(), all_written.curve()),
            ("raw consumer".into(), all_raw.curve()),
        ],
    };
    bench.draw("R9", &chart)?;
    ours.close().await?;
    for name in names {
        remove_log(&brokers, &name).await?;
    }
    Ok(())
}

fn sampled(latencies: &Latencies, all: &mut Latencies) -> Result<Sample, Failure> {
    all.add_all(latencies)?;
    let mut sample = Sample::new();
    latencies.put_into(&mut sample);
    Ok(sample)
}

struct Ours {
    log: Log,
    scratch: Scratch,
    projections: Projections,
    handler: CommandHandler<Account>,
    command: Arc<Deposit>,
}

impl Ours {
    async fn open(bench: &Bench, brokers: &str, name: &str) -> Result<Self, Failure> {
        let scratch = bench.servers.database().await?;
        let log = open(&log_url(brokers, name), &scratch.database).await?;
        let worker = ProjectionWorker::new(log.source(), scratch.database.clone());
        let projections = worker.with::<Balance>().spawn();
        let handler = CommandHandler::new(log.store());
        let command = Arc::new(Deposit::of_bytes(PAYLOAD_BYTES, &mut Rng::with_seed(7)));
        Ok(Self { log, scratch, projections, handler, command })
    }

    /// Events a second that are acknowledged, indexed and applied.
    async fn load(&self, calls: u64) -> Result<f64, Failure> {
        let before = indexed(&self.scratch.database).await?;
        let (handler, command) = (self.handler.clone(), Arc::clone(&self.command));
        let began = now();
        closed_loop(CALLERS, Until::Calls(calls), move |number| {
            let (handler, command) = (handler.clone(), Arc::clone(&command));
            async move {
                deposit(&handler, &(number % STREAMS).to_string(), &command).await.map(drop)
            }
        })
        .await?;
        index_caught_up(&self.scratch.database, before, calls).await?;
        applied(&self.projections, before + calls).await?;
        Ok(per_second(calls, now() - began))
    }

    async fn visible(&self, rate_per_s: f64, calls: u64) -> Result<Latencies, Failure> {
        let latencies = Arc::new(Mutex::new(Latencies::default()));
        let before = indexed(&self.scratch.database).await?;
        open_loop(rate_per_s, calls, |number| {
            let (handler, command) = (self.handler.clone(), Arc::clone(&self.command));
            let (projections, latencies) = (self.projections.clone(), Arc::clone(&latencies));
            async move {
                let id = (number % STREAMS).to_string();
                let handled = deposit(&handler, &id, &command).await?;
                let acknowledged = now();
                if number % WATCHED_EVERY == 0 {
                    let position = handled.position.ok_or("an event has no position")?;
                    projections.wait_for_position(Balance::NAME, position, WAIT_MAX).await?;
                    let latency = (now() - acknowledged).max(LEAST);
                    latencies.lock().unwrap_or_else(PoisonError::into_inner).add(latency);
                }
                Ok(())
            }
        })
        .await?;
        index_caught_up(&self.scratch.database, before, calls).await?;
        let latencies = latencies.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(latencies.clone())
    }

    async fn close(self) -> Result<(), Failure> {
        self.projections.shutdown().await;
        self.log.close().await;
        self.scratch.remove().await
    }
}

struct Raw {
    brokers: String,
    topic: String,
    producer: Arc<Waiting>,
    records: Arc<Records>,
}

impl Raw {
    fn open(brokers: &str, name: &str) -> Result<Self, Failure> {
        let topic = format!("{name}.events");
        let producer = Arc::new(Waiting::start(&settings(brokers, "0")?, topic.clone())?);
        let records = Arc::new(Records::new(name, STREAMS, PAYLOAD_BYTES)?);
        Ok(Self { brokers: brokers.to_owned(), topic, producer, records })
    }

    /// Until a record is polled.
    async fn polled(&self, rate_per_s: f64, calls: u64) -> Result<Latencies, Failure> {
        let consumer = self.consumer().await?;
        let polling = tokio::task::spawn_blocking(move || {
            let mut moments = Moments::new();
            each(&consumer, |message| {
                moments.insert((message.partition(), message.offset()), now());
                let is_last = moments.len() as u64 == calls;
                Ok(if is_last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            Ok(moments)
        });
        self.behind_the_report(rate_per_s, calls, polling).await
    }

    /// Until its row is committed.
    async fn written(
        &self,
        rate_per_s: f64,
        calls: u64,
        target: &Arc<AsyncMutex<Target>>,
    ) -> Result<Latencies, Failure> {
        let (consumer, target) = (self.consumer().await?, Arc::clone(target));
        let writing =
            tokio::spawn(async move { target.lock().await.follow(consumer, calls).await });
        self.behind_the_report(rate_per_s, calls, writing).await
    }

    /// Of what comes from now on.
    async fn consumer(&self) -> Result<BaseConsumer, Failure> {
        let (brokers, topic) = (self.brokers.clone(), self.topic.clone());
        tokio::task::spawn_blocking(move || consumer(&brokers, &topic, From::End)).await?
    }

    /// How long after its report each record was there, as a consumer that follows tells.
    async fn behind_the_report(
        &self,
        rate_per_s: f64,
        calls: u64,
        following: JoinHandle<Result<Moments, Failure>>,
    ) -> Result<Latencies, Failure> {
        let acknowledged = Arc::new(Mutex::new(Moments::new()));
        open_loop(rate_per_s, calls, |number| {
            let (producer, records) = (Arc::clone(&self.producer), Arc::clone(&self.records));
            let acknowledged = Arc::clone(&acknowledged);
            async move {
                let place = producer.produce(&records, number % STREAMS, number as usize).await?;
                acknowledged.lock().unwrap_or_else(PoisonError::into_inner).insert(place, now());
                Ok(())
            }
        })
        .await?;
        let there = following.await??;
        let acknowledged = acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let latency = |place: &(i32, i64), at: &Instant| {
            // It may be there before its report is here.
            there.get(place).map(|there| there.saturating_duration_since(*at).max(LEAST))
        };
        Ok(acknowledged.iter().filter_map(|(place, at)| latency(place, at)).collect())
    }
}

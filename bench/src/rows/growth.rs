//! R8: the same load on few and on many streams, with the same bound on memory.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use kafold::clock::RandomIds;
use kafold::handler::HandlerConfig;
use kafold::{CommandHandler, Database, IdGenerator, Log};

use crate::Failure;
use crate::baselines::service::Service;
use crate::domain::{Account, Deposit};
use crate::fill::Fill;
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{Until, closed_loop, now, open_loop};
use crate::ours::{deposit, index_caught_up, indexed, log_url, make_log, open};
use crate::rows::memory::resident_bytes;
use crate::servers::{Scratch, remove_log};
use crate::svg::{Chart, Scale};
use crate::zipf::Zipf;

const PAYLOAD_BYTES: usize = 256;
const CALLERS: usize = 64;
const THROUGHPUT_GOAL: f64 = 0.9;
const LATENCY_GOAL: f64 = 1.2;
const FEW: u64 = 1_000;

/// Each number of streams against a thousand.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let sizes: &[u64] =
        bench.size.of(&[2_000], &[10_000, 100_000], &[100_000, 1_000_000, 10_000_000]);
    let seconds = bench.size.of(1, 3, 4);
    let few = Grown::make(bench, FEW).await?;
    let rate = few.closed(seconds).await?["per_s"] / 2.0;
    let mut lines = [
        ("throughput".to_owned(), vec![(FEW as f64, 1.0)]),
        ("p99".to_owned(), vec![(FEW as f64, 1.0)]),
    ];
    for &streams in sizes {
        let many = Grown::make(bench, streams).await?;
        let figures =
            [("per_s", Goal::AtLeast(THROUGHPUT_GOAL)), ("p99_us", Goal::AtMost(LATENCY_GOAL))];
        let ours = async || many.both(seconds, rate).await;
        let baseline = async || few.both(seconds, rate).await;
        let case = format!("{streams} streams, over {FEW}");
        let compared = bench.compare("R8", case, &figures, ours, baseline).await?;
        let mib = resident_bytes()? / (1 << 20);
        bench.note(format!("{rate:.0} commands/s in the open loop; {mib} MiB in memory"));
        for (line, metric) in lines.iter_mut().zip(["per_s", "p99_us"]) {
            line.1.push((streams as f64, compared.ratio(metric).unwrap_or_default()));
        }
        if bench.size > Size::Test {
            let (on_many, on_few) = (many.by_hand(bench).await?, few.by_hand(bench).await?);
            let figures = [("per_s", Goal::Stated), ("p99_us", Goal::Stated)];
            let case = format!("without kafold: {streams} streams, over {FEW}");
            let run_many = async || on_many.run(seconds).await;
            let run_few = async || on_few.run(seconds).await;
            bench.compare("R8", case, &figures, run_many, run_few).await?;
            on_many.remove().await?;
            on_few.remove().await?;
        }
        many.remove().await?;
    }
    let chart = Chart {
        title: format!("The same load on more streams, over {FEW}"),
        x: ("streams", Scale::Logarithmic),
        y: ("ratio", Scale::Linear),
        lines: lines.into(),
    };
    bench.draw("R8", &chart)?;
    few.remove().await
}

/// A log with so many streams, all indexed.
struct Grown {
    brokers: String,
    name: String,
    streams: u64,
    scratch: Scratch,
    log: Log,
    handler: CommandHandler<Account>,
    command: Arc<Deposit>,
}

impl Grown {
    async fn make(bench: &Bench, streams: u64) -> Result<Self, Failure> {
        let brokers = bench.servers.broker().await?.to_owned();
        let (name, scratch) = (bench.servers.new_name(), bench.servers.database().await?);
        let (events, payload_bytes) = (streams, PAYLOAD_BYTES);
        let fill = Fill { brokers: &brokers, name: &name, events, streams, payload_bytes };
        fill.make(Some(&scratch.database)).await?;
        let log = open(&log_url(&brokers, &name), &scratch.database).await?;
        let handler = CommandHandler::new(log.store());
        let command = Arc::new(Deposit::of_bytes(PAYLOAD_BYTES, &mut Rng::with_seed(7)));
        Ok(Self { brokers, name, streams, scratch, log, handler, command })
    }

    fn call(&self) -> impl Fn(u64) -> BoxedCall + Clone + Send + 'static {
        let (handler, command) = (self.handler.clone(), Arc::clone(&self.command));
        drawn(self.streams, move |id| {
            let (handler, command) = (handler.clone(), Arc::clone(&command));
            Box::pin(async move { deposit(&handler, &id, &command).await.map(drop) })
        })
    }

    /// A service by hand that reads the states of the same streams and writes a log of its own.
    async fn by_hand(&self, bench: &Bench) -> Result<ByHand, Failure> {
        let Database::Postgres(database) = &self.scratch.database else {
            return Err("PostgreSQL is measured".into());
        };
        let (brokers, name) = (self.brokers.clone(), bench.servers.new_name());
        make_log(&brokers, &name).await?;
        let (index, kept) = (database.pool().clone(), HandlerConfig::default().hot_states_max);
        let service = Arc::new(Service::start(&brokers, &name, index, kept)?);
        let (streams, command) = (self.streams, Arc::clone(&self.command));
        Ok(ByHand { brokers, name, streams, service, command })
    }

    async fn closed(&self, seconds: u64) -> Result<Sample, Failure> {
        let before = indexed(&self.scratch.database).await?;
        let end = now() + Duration::from_secs(seconds);
        let measured = closed_loop(CALLERS, Until::Time(end), self.call()).await?;
        index_caught_up(&self.scratch.database, before, measured.latencies.count()).await?;
        Ok(measured.sample())
    }

    /// Throughput of the closed loop, latency of the open one.
    async fn both(&self, seconds: u64, rate_per_s: f64) -> Result<Sample, Failure> {
        let mut sample = self.closed(seconds).await?;
        let before = indexed(&self.scratch.database).await?;
        let calls = (rate_per_s * seconds as f64) as u64;
        open_loop(rate_per_s, calls, self.call()).await?.latencies.put_into(&mut sample);
        index_caught_up(&self.scratch.database, before, calls).await?;
        Ok(sample)
    }

    async fn remove(self) -> Result<(), Failure> {
        self.log.close().await;
        self.scratch.remove().await?;
        remove_log(&self.brokers, &self.name).await
    }
}

/// What serves the same without kafold.
struct ByHand {
    brokers: String,
    name: String,
    streams: u64,
    service: Arc<Service>,
    command: Arc<Deposit>,
}

impl ByHand {
    async fn run(&self, seconds: u64) -> Result<Sample, Failure> {
        let end = now() + Duration::from_secs(seconds);
        let (service, command) = (Arc::clone(&self.service), Arc::clone(&self.command));
        let call = drawn(self.streams, move |id| {
            let (service, command) = (Arc::clone(&service), Arc::clone(&command));
            Box::pin(async move { service.deposit(&id, &command).await })
        });
        Ok(closed_loop(CALLERS, Until::Time(end), call).await?.sample())
    }

    async fn remove(self) -> Result<(), Failure> {
        remove_log(&self.brokers, &self.name).await
    }
}

/// A call on a stream that is drawn by Zipf's law.
fn drawn(
    streams: u64,
    call: impl Fn(String) -> BoxedCall + Clone + Send + 'static,
) -> impl Fn(u64) -> BoxedCall + Clone + Send + 'static {
    let (seed, zipf) = (RandomIds.random(), Zipf::new(streams));
    move |number| {
        let rank = zipf.draw(&mut Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9)));
        call(rank.to_string())
    }
}

type BoxedCall = futures_util::future::BoxFuture<'static, Result<(), Failure>>;

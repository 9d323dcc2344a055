//! R2: one command at a time on an idle log, against producing a record and waiting for its report.
//! R3: many commands on one stream, against how many of them could wait for each other's report.

use std::sync::Arc;

use fastrand::Rng;
use kafold::clock::RandomIds;
use kafold::{CommandHandler, IdGenerator, Log};

use crate::Failure;
use crate::baselines::producer::{Records, Waiting, Window, settings};
use crate::domain::{Account, Deposit};
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{Latencies, Measured, Until, closed_loop};
use crate::ours::{deposit, log_url, make_log, open};
use crate::rows::append::raw;
use crate::servers::{Scratch, remove_log};
use crate::svg::{Chart, Scale};

const PAYLOAD_BYTES: usize = 256;
const ROUND_TRIP_GOAL: f64 = 1.3;
/// The goal where both sides encrypt: 0.8 of the baseline's speed.
const TLS_ROUND_TRIP_GOAL: f64 = 1.25;
const HOT_STREAM_GOAL: f64 = 50.0;
/// In flight of the raw producer beside R3.
const RAW_IN_FLIGHT: u64 = 1_024;
/// The stream of R3.
const HOT: &str = "0";
/// Streams of R2, in turn: none gets so long that its older commands have to be looked up.
const STREAMS: u64 = 1_000;

/// A log, its handler, and a producer beside it to a topic like its own.
struct Beside {
    log: Log,
    scratch: Scratch,
    handler: CommandHandler<Account>,
    command: Arc<Deposit>,
    producer: Arc<Waiting>,
    records: Arc<Records>,
    brokers: String,
    names: [String; 2],
}

impl Beside {
    async fn open(bench: &Bench, brokers: &str) -> Result<Self, Failure> {
        let brokers = brokers.to_owned();
        let names = [bench.servers.new_name(), bench.servers.new_name()];
        let scratch = bench.servers.database().await?;
        let log = open(&log_url(&brokers, &names[0]), &scratch.database).await?;
        let handler = CommandHandler::new(log.store());
        make_log(&brokers, &names[1]).await?;
        let topic = format!("{}.events", names[1]);
        let producer = Arc::new(Waiting::start(&settings(&brokers, "0")?, topic)?);
        let records = Arc::new(Records::new(&names[1], STREAMS, PAYLOAD_BYTES)?);
        let command = Arc::new(Deposit::of_bytes(PAYLOAD_BYTES, &mut Rng::with_seed(7)));
        Ok(Self { log, scratch, handler, command, producer, records, brokers, names })
    }

    /// So many commands of so many callers on so many streams.
    async fn commands(
        &self,
        callers: usize,
        calls: u64,
        streams: u64,
    ) -> Result<Measured, Failure> {
        let (handler, command) = (self.handler.clone(), Arc::clone(&self.command));
        closed_loop(callers, Until::Calls(calls), move |number| {
            let (handler, command) = (handler.clone(), Arc::clone(&command));
            async move {
                deposit(&handler, &(number % streams).to_string(), &command).await.map(drop)
            }
        })
        .await
    }

    /// So many records one after another.
    async fn round_trips(&self, calls: u64) -> Result<Measured, Failure> {
        let (producer, records) = (Arc::clone(&self.producer), Arc::clone(&self.records));
        closed_loop(1, Until::Calls(calls), move |number| {
            let (producer, records) = (Arc::clone(&producer), Arc::clone(&records));
            async move { producer.produce(&records, number % STREAMS, number as usize).await.map(drop) }
        })
        .await
    }

    async fn close(self) -> Result<(), Failure> {
        self.log.close().await;
        self.scratch.remove().await?;
        for name in &self.names {
            remove_log(&self.brokers, name).await?;
        }
        Ok(())
    }
}

/// R2.
pub async fn round_trip(bench: &Bench) -> Result<(), Failure> {
    let brokers = bench.servers.broker().await?;
    let lines = round_trip_to(bench, brokers, "one command, idle", ROUND_TRIP_GOAL).await?;
    let chart = Chart {
        title: "One command on an idle log".into(),
        x: ("percentile", Scale::Percentile),
        y: ("µs", Scale::Logarithmic),
        lines,
    };
    bench.draw("R2", &chart)?;
    if bench.size > Size::Test {
        let tls = bench.servers.tls_broker().await?;
        round_trip_to(bench, tls, "one command, idle, TLS", TLS_ROUND_TRIP_GOAL).await?;
    }
    Ok(())
}

/// Returns the curves of ours and the baseline.
async fn round_trip_to(
    bench: &Bench,
    brokers: &str,
    case: &str,
    goal: f64,
) -> Result<Vec<(String, Vec<(f64, f64)>)>, Failure> {
    let beside = Beside::open(bench, brokers).await?;
    let calls = bench.size.of(200, 500, 10_000);
    // Each stream is known from here on.
    beside.commands(64, STREAMS, STREAMS).await?;
    // All of them together, for the curve.
    let (mut all_ours, mut all_baseline) = (Latencies::default(), Latencies::default());
    let goal = Goal::AtMost(goal);
    let figures = [("p50_us", goal), ("p99_us", goal), ("p999_us", Goal::Stated)];
    let ours = async || sampled(&beside.commands(1, calls, STREAMS).await?, &mut all_ours);
    let baseline = async || sampled(&beside.round_trips(calls).await?, &mut all_baseline);
    bench.compare("R2", case, &figures, ours, baseline).await?;
    beside.close().await?;
    Ok(vec![
        ("command".into(), all_ours.curve()),
        ("produce and wait".into(), all_baseline.curve()),
    ])
}

fn sampled(measured: &Measured, all: &mut Latencies) -> Result<Sample, Failure> {
    all.add_all(&measured.latencies)?;
    Ok(measured.sample())
}

/// R3.
pub async fn hot_stream(bench: &Bench) -> Result<(), Failure> {
    let beside = Beside::open(bench, bench.servers.broker().await?).await?;
    let callers: &[usize] = bench.size.of(&[256], &[256, 1_024], &[64, 256, 1_024, 4_096]);
    let calls = bench.size.of(3_000, 15_000, 50_000);
    let alone = bench.size.of(200, 500, 2_000);
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for &callers in callers {
        let goal = if callers >= 256 { Goal::AtLeast(HOT_STREAM_GOAL) } else { Goal::Stated };
        let compared = bench
            .compare(
                "R3",
                format!("one stream, {callers} callers"),
                &[("per_s", goal)],
                async || Ok(beside.commands(callers, calls, 1).await?.sample()),
                async || Ok(beside.round_trips(alone).await?.sample()),
            )
            .await?;
        let (of_ours, of_baseline) = compared.medians("per_s");
        ours.push((callers as f64, of_ours.unwrap_or_default()));
        baseline.push((callers as f64, of_baseline.unwrap_or_default()));
    }
    let chart = Chart {
        title: "Commands a second on one stream".into(),
        x: ("callers", Scale::Logarithmic),
        y: ("commands/s", Scale::Linear),
        lines: vec![("commands".into(), ours), ("one report at a time".into(), baseline)],
    };
    bench.draw("R3", &chart)?;
    // No conditional append to one partition is faster than this.
    let topic = format!("{}.events", beside.names[1]);
    let window = Window::start(&settings(&beside.brokers, "0")?, topic, RAW_IN_FLIGHT)?;
    let (window, records) =
        (Arc::new(window), Arc::new(Records::new(&beside.names[1], 1, PAYLOAD_BYTES)?));
    let unconditional = async || raw(&window, &records, calls).await;
    let waited = async || Ok(beside.round_trips(alone).await?.sample());
    let case = format!("without kafold: raw producer, {RAW_IN_FLIGHT} in flight, one stream");
    bench.compare("R3", case, &[("per_s", Goal::Stated)], unconditional, waited).await?;
    checked(&beside).await?;
    beside.close().await
}

/// The stream has as many events as its version says.
async fn checked(beside: &Beside) -> Result<(), Failure> {
    let id = RandomIds.event_id().to_string();
    let fresh = CommandHandler::<Account>::new(beside.log.store());
    let (hot, first) =
        (deposit(&fresh, HOT, &beside.command), deposit(&fresh, &id, &beside.command));
    let (hot, first) = (hot.await?, first.await?);
    let before = deposit(&beside.handler, HOT, &beside.command).await?;
    let is_right = first.version.0 == 1 && before.version.0 == hot.version.0 + 1;
    if is_right { Ok(()) } else { Err("a stream lost or gained events".into()) }
}

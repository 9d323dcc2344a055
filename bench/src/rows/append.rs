//! R1: conditional appends with the index on, against a raw idempotent producer of the same records.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use kafold::clock::{RandomIds, SystemClock};
use kafold::handler::HandlerConfig;
use kafold::index::Advanced;
use kafold::projections::SqlIndex;
use kafold::store::{Append, Ticket};
use kafold::{
    Clock, CommandHandler, CommandId, Commit, Database, EventStore, ExpectedVersion, IdGenerator,
    Log, Metadata, NewEvent, StreamId, StreamIndex, Version, codec,
};

use crate::Failure;
use crate::baselines::producer::{Records, Window, settings};
use crate::domain::{Account, Deposit};
use crate::fill::IndexFeed;
use crate::harness::{Bench, Goal, Sample};
use crate::measure::{Until, closed_loop, now, per_second};
use crate::ours::{deposit, index_caught_up, indexed, log_url, make_log, open};
use crate::servers::{Scratch, node_count, remove_log};
use crate::svg::{Chart, Scale};
use crate::zipf::Zipf;

/// Streams that are appended to.
const STREAMS: u64 = 100_000;
/// From so many callers on the goal holds.
const MANY_CALLERS: usize = 1_024;
const GOAL: f64 = 0.85;
/// The goal where both sides encrypt.
const TLS_GOAL: f64 = 0.8;
/// Settings of which the baseline gets the best.
const LINGERS_MS: [&str; 3] = ["0", "1", "5"];
/// Payloads made beforehand.
const PAYLOADS: usize = 1_024;
/// Batches of the index under way at once, as in a store.
const INDEX_BATCHES: usize = 4;
/// Callers of the sustained load.
const SUSTAINED_CALLERS: usize = 1_024;

/// All cases of this size, and the sustained load.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let payloads: &[usize] = bench.size.of(&[256], &[256], &[256, 1_024]);
    let single = bench.servers.broker().await?.to_owned();
    for payload_bytes in payloads {
        cases(bench, &single, *payload_bytes).await?;
    }
    if bench.size > crate::harness::Size::Test {
        index_alone(bench).await?;
        sustained(bench, &single).await?;
        let three = bench.servers.three_brokers().await?.to_owned();
        for payload_bytes in bench.size.of(&payloads[..1], &payloads[..1], payloads) {
            cases(bench, &three, *payload_bytes).await?;
        }
        let tls = bench.servers.tls_broker().await?.to_owned();
        cases(bench, &tls, payloads[0]).await?;
    }
    Ok(())
}

/// One curve: all numbers of callers.
async fn cases(bench: &Bench, brokers: &str, payload_bytes: usize) -> Result<(), Failure> {
    let is_tls = brokers.contains('?');
    let kind = if is_tls { "TLS".to_owned() } else { format!("{} broker(s)", node_count(brokers)) };
    let all: &[usize] = &[1, 8, 64, 1_024, 8_192];
    let callers = bench.size.of(&[64][..], &[1, 64, 1_024, 8_192], all);
    let mut lines =
        [("conditional appends".to_owned(), vec![]), ("raw producer".to_owned(), vec![])];
    for &callers in callers {
        let case = format!("{payload_bytes} B, {callers} callers, {kind}");
        let (ours, baseline) = one(bench, brokers, payload_bytes, callers, case).await?;
        lines[0].1.push((callers as f64, ours));
        lines[1].1.push((callers as f64, baseline));
    }
    let chart = Chart {
        title: format!("Events a second, {payload_bytes} B, {kind}"),
        x: ("callers", Scale::Logarithmic),
        y: ("events/s", Scale::Linear),
        lines: lines.into(),
    };
    let of = if is_tls { "tls".to_owned() } else { node_count(brokers).to_string() };
    bench.draw(&format!("R1-{payload_bytes}-{of}"), &chart)
}

/// Answers the median rates of ours and the baseline.
async fn one(
    bench: &Bench,
    brokers: &str,
    payload_bytes: usize,
    callers: usize,
    case: String,
) -> Result<(f64, f64), Failure> {
    let ours = Ours::open(bench, brokers, payload_bytes).await?;
    let name = bench.servers.new_name();
    make_log(brokers, &name).await?;
    let records = Arc::new(Records::new(&name, STREAMS, payload_bytes)?);
    let topic = format!("{name}.events");
    // Several brokers, on the same cores, take several times as long.
    let calls = calls(bench, callers) / node_count(brokers) as u64;
    let window = |linger: &str| {
        Window::start(&settings(brokers, linger)?, topic.clone(), callers as u64).map(Arc::new)
    };
    let mut best: Option<(f64, &str)> = None;
    for linger in LINGERS_MS {
        let rate = raw(&window(linger)?, &records, calls).await?["per_s"];
        if best.is_none_or(|(best, _)| rate > best) {
            best = Some((rate, linger));
        }
    }
    let linger = best.map_or("0", |(_, linger)| linger);
    let window = window(linger)?;
    let goal = if brokers.contains('?') { TLS_GOAL } else { GOAL };
    let goal = if callers >= MANY_CALLERS { Goal::AtLeast(goal) } else { Goal::Stated };
    let compared = bench
        .compare(
            "R1",
            case,
            &[("per_s", goal)],
            async || ours.append(callers, calls).await,
            async || raw(&window, &records, calls).await,
        )
        .await?;
    bench.note(format!("the baseline's best linger is {linger} ms"));
    ours.close().await?;
    remove_log(brokers, &name).await?;
    let (ours, baseline) = compared.medians("per_s");
    Ok((ours.unwrap_or_default(), baseline.unwrap_or_default()))
}

/// As many as take a second or so, and fewer than the tails hold: the index may lag behind within one
/// run, and has caught up before the next.
fn calls(bench: &Bench, callers: usize) -> u64 {
    match callers {
        1 => bench.size.of(300, 1_000, 2_000),
        2..64 => bench.size.of(1_000, 4_000, 10_000),
        64..1_024 => bench.size.of(3_000, 15_000, 20_000),
        _ => bench.size.of(5_000, 40_000, 40_000),
    }
}

/// So many records by a raw producer.
pub(crate) async fn raw(
    window: &Arc<Window>,
    records: &Arc<Records>,
    calls: u64,
) -> Result<Sample, Failure> {
    let (window, records) = (Arc::clone(window), Arc::clone(records));
    let seed = RandomIds.random();
    let took = tokio::task::spawn_blocking(move || window.run(&records, calls, seed)).await??;
    Ok(Sample::from([("per_s", per_second(calls, took))]))
}

/// A store, and what each stream's next append builds on.
struct Ours {
    log: Log,
    scratch: Scratch,
    brokers: String,
    name: String,
    streams: Arc<Vec<Mutex<Tip>>>,
    payloads: Arc<Vec<Arc<[u8]>>>,
}

struct Tip {
    stream: StreamId,
    version: Version,
    /// Of the last append while its outcome is not known.
    ticket: Option<Ticket>,
}

impl Ours {
    async fn open(bench: &Bench, brokers: &str, payload_bytes: usize) -> Result<Self, Failure> {
        let scratch = bench.servers.database().await?;
        let name = bench.servers.new_name();
        let log = open(&log_url(brokers, &name), &scratch.database).await?;
        let tip = |rank: u64| {
            let stream = StreamId::new("account", &rank.to_string())?;
            Ok(Mutex::new(Tip { stream, version: Version::EMPTY, ticket: None }))
        };
        let streams = (0..STREAMS).map(tip).collect::<Result<_, Failure>>()?;
        let mut random = Rng::with_seed(7);
        let payload = |_| {
            let event = Deposit::of_bytes(payload_bytes, &mut random).event();
            Ok(codec::encode(&event)?.into())
        };
        let payloads = (0..PAYLOADS).map(payload).collect::<Result<_, Failure>>()?;
        let (streams, payloads) = (Arc::new(streams), Arc::new(payloads));
        Ok(Self { log, scratch, brokers: brokers.to_owned(), name, streams, payloads })
    }

    /// How fast appends are acknowledged, and how fast they are in the index too.
    async fn append(&self, callers: usize, calls: u64) -> Result<Sample, Failure> {
        let store = self.log.store();
        let (streams, payloads) = (Arc::clone(&self.streams), Arc::clone(&self.payloads));
        let (seed, zipf) = (RandomIds.random(), Zipf::new(STREAMS));
        let before = indexed(&self.scratch.database).await?;
        let began = now();
        let measured = closed_loop(callers, Until::Calls(calls), move |number| {
            let rank =
                zipf.draw(&mut Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9))) as usize;
            let payload = Arc::clone(&payloads[number as usize % PAYLOADS]);
            let (store, streams) = (Arc::clone(&store), Arc::clone(&streams));
            async move { append(&*store, &streams[rank], payload).await }
        })
        .await?;
        index_caught_up(&self.scratch.database, before, calls).await?;
        let mut sample = measured.sample();
        sample.insert("indexed_per_s", per_second(calls, now() - began));
        Ok(sample)
    }

    async fn close(self) -> Result<(), Failure> {
        let versions = self.streams.iter().map(|tip| locked(tip).version.0);
        let appended: u64 = versions.sum();
        let offsets = indexed(&self.scratch.database).await?;
        if offsets < appended {
            return Err(format!("{appended} events were acknowledged, {offsets} are there").into());
        }
        self.log.close().await;
        self.scratch.remove().await?;
        remove_log(&self.brokers, &self.name).await
    }
}

fn locked(tip: &Mutex<Tip>) -> std::sync::MutexGuard<'_, Tip> {
    tip.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One append on the condition that nobody was first, behind those of the same stream that are on
/// their way.
async fn append(
    store: &dyn EventStore,
    tip: &Mutex<Tip>,
    payload: Arc<[u8]>,
) -> Result<(), Failure> {
    let event_id = RandomIds.event_id();
    let metadata = Metadata {
        event_id,
        recorded_at: SystemClock.now(),
        correlation_id: None,
        causation_id: None,
        trace_parent: None,
    };
    let event = NewEvent { event_type: "account.deposited.v1".into(), payload, metadata };
    let commit = Commit::new(CommandId(event_id), vec![event])?;
    let ticket = Ticket::next();
    let outcome = {
        let mut tip = locked(tip);
        let append = Append {
            stream: tip.stream.clone(),
            expected: ExpectedVersion::Exact(tip.version),
            commit,
            ticket,
            after: tip.ticket,
            deadline: None,
        };
        tip.version = tip.version.plus(1);
        tip.ticket = Some(ticket);
        store.submit(append)
    };
    outcome.await?;
    let mut tip = locked(tip);
    if tip.ticket == Some(ticket) {
        tip.ticket = None;
    }
    Ok(())
}

/// What PostgreSQL takes of the same events with nothing else to do: no store whose index is there can
/// sustain more.
async fn index_alone(bench: &Bench) -> Result<(), Failure> {
    let events = bench.size.of(12_000, 120_000, 600_000);
    let scratch = bench.servers.database().await?;
    let mut samples = Vec::new();
    let mut feed = IndexFeed::new(STREAMS, 256)?;
    let index = SqlIndex::new(scratch.database.clone());
    for _ in 0..bench.size.pairs() {
        let batches = feed.batches(events)?;
        let began = now();
        let advance = |batch| {
            let index = index.clone();
            async move { index.advance(vec![batch]).await.remove(0) }
        };
        let mut feeding = stream::iter(batches).map(advance).buffered(INDEX_BATCHES);
        while let Some(advanced) = feeding.try_next().await? {
            if advanced != Advanced::Moved {
                return Err("the index is not where it was left".into());
            }
        }
        samples.push(Sample::from([("per_s", per_second(events, now() - began))]));
    }
    bench.keep("R1", "256 B, the index alone", &[("per_s", Goal::Stated)], samples, Vec::new());
    scratch.remove().await
}

/// The rate that the index keeps up with: callers who are refused come again, as a client does that
/// gets a 503, all pairs into one log without a pause but the baseline's turn. What counts is how many
/// events are acknowledged and in the index, by when the last one is there.
async fn sustained(bench: &Bench, brokers: &str) -> Result<(), Failure> {
    let seconds = bench.size.of(1, 8, 20);
    let scratch = bench.servers.database().await?;
    let (ours, name) = (bench.servers.new_name(), bench.servers.new_name());
    let log = open(&log_url(brokers, &ours), &scratch.database).await?;
    let config = HandlerConfig { hot_states_max: STREAMS as usize, ..HandlerConfig::default() };
    let handler = CommandHandler::<Account>::new(log.store()).config(config);
    make_log(brokers, &name).await?;
    let records = Arc::new(Records::new(&name, STREAMS, 256)?);
    let topic = format!("{name}.events");
    let window = Window::start(&settings(brokers, "0")?, topic, SUSTAINED_CALLERS as u64)?;
    let window = Arc::new(window);

    let (mut of_ours, mut of_baseline) = (Vec::new(), Vec::new());
    for _ in 0..bench.size.pairs() {
        of_ours.push(refused_come_again(&handler, &scratch.database, seconds).await?);
        let probe = raw(&window, &records, 50_000).await?;
        let calls = (probe["per_s"] * seconds as f64 / 4.0) as u64;
        of_baseline.push(raw(&window, &records, calls.max(50_000)).await?);
    }
    let case = format!("sustained, {SUSTAINED_CALLERS} callers, {seconds} s, indexed");
    let figures = [("per_s", Goal::AtLeast(GOAL)), ("index_lag_events", Goal::Stated)];
    bench.keep("R1", case, &figures, of_ours, of_baseline);
    log.close().await;
    scratch.remove().await?;
    remove_log(brokers, &ours).await?;
    remove_log(brokers, &name).await
}

async fn refused_come_again(
    handler: &CommandHandler<Account>,
    index: &Database,
    seconds: u64,
) -> Result<Sample, Failure> {
    let mut random = Rng::with_seed(RandomIds.random());
    let commands: Vec<_> = (0..PAYLOADS).map(|_| Deposit::of_bytes(256, &mut random)).collect();
    let (commands, zipf, seed) = (Arc::new(commands), Zipf::new(STREAMS), random.u64(..));
    let before = indexed(index).await?;
    let began = now();
    let end = began + Duration::from_secs(seconds);
    let handler = handler.clone();
    let measured = closed_loop(SUSTAINED_CALLERS, Until::Time(end), move |number| {
        let rank = zipf.draw(&mut Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9)));
        let (handler, commands) = (handler.clone(), Arc::clone(&commands));
        async move {
            deposit(&handler, &rank.to_string(), &commands[number as usize % PAYLOADS]).await?;
            Ok(())
        }
    })
    .await?;
    let lag = measured.latencies.count().saturating_sub(indexed(index).await? - before);
    index_caught_up(index, before, measured.latencies.count()).await?;
    let per_s = per_second(measured.latencies.count(), now() - began);
    Ok(Sample::from([("per_s", per_s), ("index_lag_events", lag as f64)]))
}

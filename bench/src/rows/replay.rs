//! R7: everything in the log decoded and folded into states, against a consumer that counts bytes.

use std::collections::HashMap;
use std::ops::ControlFlow;

use kafold::store::SourceMessage;
use kafold::{Aggregate, EventSource, StreamId, codec};

use crate::Failure;
use crate::baselines::consumer::{From, consumer, each};
use crate::baselines::replay;
use crate::domain::{Account, AccountEvent};
use crate::fill::Fill;
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{now, per_second};
use crate::ours::{log_url, source};
use crate::servers::remove_log;

const PAYLOAD_BYTES: usize = 256;
const GOAL: f64 = 0.6;
const BATCH_EVENTS_MAX: usize = 5_000;

/// A whole log.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let (events, streams) = bench.size.of((20_000, 2_000), (300_000, 50_000), (5_000_000, 500_000));
    let brokers = bench.servers.broker().await?.to_owned();
    let name = bench.servers.new_name();
    let (brokers, name) = (brokers.as_str(), name.as_str());
    Fill { brokers, name, events, streams, payload_bytes: PAYLOAD_BYTES }.make(None).await?;
    let figures = [("per_s", Goal::AtLeast(GOAL))];
    let ours = async || replayed(brokers, name, events, streams).await;
    let baseline = async || counted(brokers, name, events).await;
    let case = format!("{events} events of {streams} streams");
    bench.compare("R7", case, &figures, ours, &baseline).await?;
    if bench.size > Size::Test {
        let by_hand = async || {
            let took = replay::by_hand(brokers, name, events, streams).await?;
            Ok(Sample::from([("per_s", per_second(events, took))]))
        };
        let case = "without kafold: headers, JSON and a map of states by hand";
        bench.compare("R7", case, &[("per_s", Goal::Stated)], by_hand, baseline).await?;
    }
    remove_log(brokers, name).await
}

async fn replayed(brokers: &str, name: &str, events: u64, streams: u64) -> Result<Sample, Failure> {
    let source = source(&log_url(brokers, name)).await?;
    let began = now();
    let mut subscription = source.subscribe("replay", None, BATCH_EVENTS_MAX).await?;
    let mut states: HashMap<StreamId, Account> = HashMap::new();
    let mut seen = 0;
    while seen < events {
        match subscription.next().await? {
            SourceMessage::Assigned(partitions) => {
                for partition in partitions {
                    subscription.start(partition, None).await?;
                }
            }
            SourceMessage::Batch(batch) => {
                seen += batch.events.len() as u64;
                for event in &batch.events {
                    let recorded = codec::decode_recorded::<AccountEvent>(event)?;
                    states.entry(recorded.stream).or_default().evolve(&recorded.event);
                }
            }
            SourceMessage::Revoked(_) => return Err("a partition was taken away".into()),
        }
    }
    let took = now() - began;
    let deposits: u64 = states.values().map(|account| account.deposits).sum();
    if (seen, deposits, states.len() as u64) != (events, events, streams) {
        return Err(format!("{deposits} of {events} events were folded").into());
    }
    Ok(Sample::from([("per_s", per_second(events, took))]))
}

/// So many events by a raw consumer.
pub(crate) async fn counted(brokers: &str, name: &str, events: u64) -> Result<Sample, Failure> {
    let (brokers, topic) = (brokers.to_owned(), format!("{name}.events"));
    let counting = move || {
        let began = now();
        let consumer = consumer(&brokers, &topic, From::Beginning)?;
        let (mut seen, mut bytes) = (0, 0);
        each(&consumer, |message| {
            let payload = message.payload_len();
            bytes += payload as u64;
            // Claims have values of other lengths.
            seen += u64::from(payload == PAYLOAD_BYTES);
            Ok(if seen == events { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let took = now() - began;
        if bytes < events * PAYLOAD_BYTES as u64 {
            return Err(Failure::from("the baseline lost bytes"));
        }
        Ok(Sample::from([("per_s", per_second(events, took))]))
    };
    tokio::task::spawn_blocking(counting).await?
}

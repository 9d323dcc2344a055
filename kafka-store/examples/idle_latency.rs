//! What a conditional append costs beside a bare produce, idle, one after the other.
//!
//! `eval "$(dev/kafka env)"; cargo run -p kafold-kafka-store --example idle_latency`
#![expect(clippy::print_stdout, reason = "a program that prints what it measures")]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use kafold_core::clock::SystemClock;
use kafold_core::testing::{commit, exact};
use kafold_core::{Clock, EventStore, StreamId};
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::producer::{BaseRecord, DeliveryResult, ProducerContext, ThreadedProducer};

const ROUNDS: usize = 300;

/// Tells when a record was delivered.
struct Delivered(Sender<()>);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok(), "delivered");
        self.0.send(()).expect("somebody waits");
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::main]
async fn main() {
    let Some(brokers) = support::brokers("idle_latency") else { return };
    let config = support::config(&brokers, &support::new_name("latency"), "partitions=1");
    let store = support::open(config, "latency").await;
    let stream = StreamId::new("order", "1").expect("valid");
    store.append(&stream, exact(0), commit(1)).await.expect("is new");

    let bare_topic = support::new_name("bare");
    support::create_topic(&brokers, &bare_topic, 1, &[]).await;
    let (sender, delivered) = channel();
    let mut settings = ClientConfig::new();
    settings.set("bootstrap.servers", &brokers).set("enable.idempotence", "true");
    settings.set("linger.ms", "0").set("acks", "all");
    let producer: ThreadedProducer<Delivered> =
        ThreadedProducer::from_config_and_context(&settings, Delivered(sender)).expect("made");

    // Taken in turns, so that whatever else the machine does weighs on both alike.
    let (mut appends, mut produces) = (Vec::new(), Vec::new());
    for version in 1..=ROUNDS as u64 {
        let begun = SystemClock.instant();
        store.append(&stream, exact(version), commit(1)).await.expect("is next");
        appends.push(SystemClock.instant() - begun);
        let begun = SystemClock.instant();
        let record = BaseRecord::to(&bare_topic).partition(0).key("order-1").payload("x");
        producer.send(record).map_err(|(error, _)| error).expect("queued");
        delivered.recv().expect("delivered");
        produces.push(SystemClock.instant() - begun);
    }
    let (append, produce) = (median(appends), median(produces));
    let ratio = append.as_secs_f64() / produce.as_secs_f64();
    println!("append {append:?}, bare produce {produce:?} (medians of {ROUNDS}), ratio {ratio:.2}");
}

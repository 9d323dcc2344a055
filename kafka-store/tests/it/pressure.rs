//! Full queues, little memory, and a log that is taken away from under a running store.

use crate::support;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Health, SourceMessage};
use kafold_core::testing::{commit, exact, read_gapless, submit};
use kafold_core::{AppendError, EventSource, EventStore, ExpectedVersion, StreamId};

fn stream(id: &str) -> StreamId {
    StreamId::new("order", id).expect("valid")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_producer_delays_records_and_neither_drops_nor_reorders_them() {
    let Some(brokers) = support::brokers("a_full_producer_delays_records") else { return };
    let options = "partitions=2&librdkafka.queue.buffering.max.messages=3";
    let store =
        support::open(support::config(&brokers, &support::new_name("full"), options), "full").await;
    let streams: Vec<_> = (0..4).map(|id| stream(&id.to_string())).collect();
    let submitted = (0..50).flat_map(|_| &streams).map(|stream| {
        // Ten events a commit: more than the producer takes at once.
        submit(&store, stream, ExpectedVersion::Any, commit(10), None).1
    });
    for outcome in join_all(submitted.collect::<Vec<_>>()).await {
        outcome.expect("delayed, not refused");
    }
    for stream in &streams {
        read_gapless(&store, stream, 500).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_answered_at_once_and_nothing_of_it_happened() {
    let Some(brokers) = support::brokers("a_full_queue_is_answered_at_once") else { return };
    let mut config = support::config(&brokers, &support::new_name("queue"), "partitions=1");
    config.limits.queued_submissions_max = 2;
    let store = support::open(config, "queue").await;
    let submitted = (0..2_000)
        .map(|_| submit(&store, &stream("q"), ExpectedVersion::Any, commit(1), None).1)
        .collect::<Vec<_>>();
    let (mut appended, mut refused) = (0, 0);
    for outcome in join_all(submitted).await {
        match outcome {
            Ok(_) => appended += 1,
            Err(AppendError::Unavailable { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(appended > 0 && refused > 0, "{appended} appended, {refused} refused");
    read_gapless(&store, &stream("q"), appended).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_with_little_memory_read_everything() {
    let Some(brokers) = support::brokers("readers_with_little_memory") else { return };
    let mut config = support::config(&brokers, &support::new_name("little"), "partitions=2");
    config.limits.read_records_max = 3;
    config.limits.fetch_ahead_kib = 1;
    let store = support::open(config.clone(), "writes").await;
    let streams: Vec<_> = (0..4).map(|id| stream(&id.to_string())).collect();
    for _ in 0..40 {
        let round = streams
            .iter()
            .map(|stream| submit(&store, stream, ExpectedVersion::Any, commit(4), None).1);
        for outcome in join_all(round.collect::<Vec<_>>()).await {
            outcome.expect("appended");
        }
    }
    let mut subscription = store.source().subscribe("little", None, 10).await.expect("subscribed");
    let mut events = Vec::new();
    while events.len() < 640 {
        match subscription.next().await.expect("readable") {
            SourceMessage::Assigned(partitions) => {
                for partition in partitions {
                    subscription.start(partition, None).await.expect("can be started");
                }
            }
            SourceMessage::Batch(batch) => events.extend(batch.events),
            SourceMessage::Revoked(_) => panic!("nobody else reads"),
        }
    }
    for stream in &streams {
        let of_stream: Vec<_> = events.iter().filter(|event| event.stream == *stream).collect();
        let versions: Vec<_> = of_stream.iter().map(|event| event.version.0).collect();
        assert_eq!(versions, (1..=160).collect::<Vec<_>>());
    }
    drop(store);
    // The take-over replays it all, with an empty index.
    let store = support::open(config, "reads").await;
    for stream in &streams {
        read_gapless(&store, stream, 160).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_recreated_under_a_running_store_halts_it_by_name() {
    let Some(brokers) = support::brokers("a_topic_recreated_under_a_running_store") else { return };
    let name = support::new_name("under");
    let mut config = support::config(&brokers, &name, "partitions=1");
    config.limits.low_end_patience = Duration::from_secs(2);
    let store = support::open(config.clone(), "running").await;
    for version in 0..20 {
        store.append(&stream("u"), exact(version), commit(1)).await.expect("is next");
    }
    support::delete_topic(&brokers, &format!("{name}.events")).await;
    let opening = |config| async move {
        let index = Arc::new(MemoryIndex::new());
        let ids = Arc::new(kafold_core::clock::RandomIds);
        let owner = support::owner("other");
        kafold_kafka_store::KafkaStore::open(config, index, owner, support::clock(), ids).await
    };
    let other = support::retry_open(config, opening).await;
    support::ready(&other).await;
    let words = ["truncated", "recreated", "lost", "superseded"];
    support::until("the running store says what happened", || match store.health() {
        Health::NotReady(reasons)
            if reasons.iter().any(|reason| words.iter().any(|word| reason.contains(word))) =>
        {
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .await;
    let refused = store.append(&stream("u"), exact(20), commit(1)).await;
    assert!(refused.is_err(), "acknowledged in another log: {refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_has_waited_long_still_delivers() {
    let Some(brokers) = support::brokers("a_subscription_that_has_waited_long") else { return };
    let config = support::config(&brokers, &support::new_name("long"), "partitions=1");
    let store = support::open(config, "long").await;
    let mut subscription = store.source().subscribe("long", None, 10).await.expect("subscribed");
    let waiting = tokio::spawn(async move {
        loop {
            match subscription.next().await.expect("waiting is no failure") {
                SourceMessage::Assigned(partitions) => {
                    for partition in partitions {
                        subscription.start(partition, None).await.expect("can be started");
                    }
                }
                SourceMessage::Batch(batch) if batch.events.is_empty() => {}
                SourceMessage::Batch(batch) => return batch.events.len(),
                SourceMessage::Revoked(_) => panic!("nobody else reads"),
            }
        }
    });
    // Longer than a partition may be idle before its reader lets go of it.
    support::rest(Duration::from_secs(7)).await;
    store.append(&stream("w"), exact(0), commit(1)).await.expect("is new");
    let delivered = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    assert_eq!(delivered.expect("in time").expect("no panic"), 1);
}

//! Brokers that stop and freeze, on a cluster of this test's own.

use crate::support;

use std::time::Duration;

use kafold_core::clock::SystemClock;
use kafold_core::store::{Append, Appended, Health, Ticket};
use kafold_core::testing::{commit, exact, read_gapless};
use kafold_core::{AppendError, Clock, Commit, EventStore, ExpectedVersion, StreamId};
use kafold_kafka_store::KafkaStore;
use support::Cluster;

/// A caller's patience.
const DEADLINE: Duration = Duration::from_millis(1_500);
/// What an answer may take beyond the deadline on a loaded machine.
const GRACE: Duration = Duration::from_secs(2);

fn stream() -> StreamId {
    StreamId::new("order", "1").expect("valid")
}

async fn submit_within_deadline(
    store: &KafkaStore,
    commit: &Commit,
) -> Result<Appended, AppendError> {
    let begun = SystemClock.instant();
    let append = Append {
        stream: stream(),
        expected: ExpectedVersion::Any,
        commit: commit.clone(),
        ticket: Ticket::next(),
        after: None,
        deadline: Some(begun + DEADLINE),
    };
    let outcome = store.submit(append).await;
    let took = SystemClock.instant() - begun;
    assert!(took < DEADLINE + GRACE, "answered after {took:?}");
    outcome
}

/// Writes while no broker answers, then lets it come back: every command is settled by sending it
/// again, applied once, and nothing that was acknowledged is missing.
async fn outage(cluster: &Cluster, brokers: &str, stop: &[&str], start: &[&str]) {
    let config = support::config(brokers, &support::new_name("outage"), "partitions=1");
    let store = support::open(config, "outage").await;
    for version in 0..5 {
        store.append(&stream(), exact(version), commit(1)).await.expect("is next");
    }
    cluster.run(stop);
    let mut commits = Vec::new();
    while store.health() == Health::Ready || commits.len() < 6 {
        let commit = commit(1);
        match submit_within_deadline(&store, &commit).await {
            Err(AppendError::Unavailable { .. } | AppendError::OutcomeUnknown { .. }) => {}
            other => panic!("no broker answers, and yet {other:?}"),
        }
        commits.push(commit);
        assert!(commits.len() < 100, "the outage is not told: {:?}", store.health());
    }
    let Health::NotReady(reasons) = store.health() else { panic!("no broker answers") };
    assert!(reasons[0].contains("no kafka broker"), "{reasons:?}");
    read_gapless(&store, &stream(), 5).await;

    cluster.run(start);
    support::ready(&store).await;
    for commit in &commits {
        support::settle(&store, &stream(), ExpectedVersion::Any, commit).await;
    }
    let total = 5 + commits.len() as u64;
    let events = read_gapless(&store, &stream(), total).await;
    for commit in &commits {
        let count = events.iter().filter(|event| event.command_id == commit.command_id()).count();
        assert_eq!(count, 1, "applied once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_broker_loses_nothing_and_writes_are_answered_in_time() {
    let Some((cluster, brokers)) = Cluster::up("kstore-stop", "1") else { return };
    outage(&cluster, &brokers, &["stop-node", "1", "--kill"], &["start-node", "1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_loses_nothing_and_writes_are_answered_in_time() {
    let Some((cluster, brokers)) = Cluster::up("kstore-freeze", "1") else { return };
    outage(&cluster, &brokers, &["pause-node", "1"], &["resume-node", "1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broker_of_three_may_be_killed_and_another_frozen() {
    let Some((cluster, brokers)) = Cluster::up("kstore-three", "3") else { return };
    let config = support::config(&brokers, &support::new_name("three"), "partitions=3");
    let store = support::open(config, "three").await;
    let streams: Vec<_> =
        (0..9).map(|id| StreamId::new("order", &id.to_string()).expect("valid")).collect();
    let mut acknowledged = 0;
    for fault in [
        None,
        Some(["stop-node", "1", "--kill"]),
        Some(["start-node", "1", "--keep"]),
        Some(["pause-node", "2", "--keep"]),
        Some(["resume-node", "2", "--keep"]),
    ] {
        let begun = SystemClock.instant();
        if let Some(arguments) = fault {
            cluster.run(&arguments);
        }
        let struck = SystemClock.instant();
        for stream in &streams {
            let appended = support::settle(&store, stream, exact(acknowledged), &commit(1)).await;
            assert_eq!(appended.version.0, acknowledged + 1);
        }
        let (fault_took, writes_took) = (struck - begun, SystemClock.instant() - struck);
        println!("{fault:?} took {fault_took:?}, the writes behind it {writes_took:?}");
        acknowledged += 1;
        for stream in &streams {
            read_gapless(&store, stream, acknowledged).await;
        }
    }
    support::ready(&store).await;
}

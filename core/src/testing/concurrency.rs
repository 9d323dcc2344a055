//! What appends at the same time do.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{StoreUnderTest, commit, exact, new_stream, read_gapless};
use crate::ids::{ExpectedVersion, StreamId, Version};
use crate::store::{AppendError, Appended, EventStore};

const WRITERS: u64 = 50;

/// As many tasks as there are commits, each appending one of one event.
async fn append_at_once(
    store: &Arc<dyn EventStore>,
    stream: &StreamId,
    expected: ExpectedVersion,
    count: u64,
) -> Vec<Result<Appended, AppendError>> {
    let tasks = (0..count).map(|_| {
        let (store, stream) = (Arc::clone(store), stream.clone());
        tokio::spawn(async move { store.append(&stream, expected, commit(1)).await })
    });
    join_all(tasks).await.into_iter().map(|task| task.expect("no task panics")).collect()
}

fn assert_one_won(outcomes: &[Result<Appended, AppendError>], version: u64) {
    let won: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
    assert_eq!(won.len(), 1, "exactly one succeeds");
    assert_eq!(won[0].version, Version(version));
    for lost in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        match lost {
            AppendError::Conflict { actual, .. } => assert!(actual.0 >= version, "{actual}"),
            other => panic!("expected a conflict, found {other:?}"),
        }
    }
}

/// Of 50 appends that expect version 2 one succeeds; the others conflict and see version 3.
pub async fn of_concurrent_appends_with_one_expected_version_one_succeeds(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(2)).await.expect("is new");
    let outcomes = append_at_once(&store, &stream, exact(2), WRITERS).await;
    assert_one_won(&outcomes, 3);
    read_gapless(&*store, &stream, 3).await;
}

/// Of 50 appends that expect no stream one makes it.
pub async fn of_concurrent_first_appends_one_succeeds(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let outcomes = append_at_once(&store, &stream, ExpectedVersion::NoStream, WRITERS).await;
    assert_one_won(&outcomes, 1);
    read_gapless(&*store, &stream, 1).await;
}

/// 50 appends that expect nothing get 50 versions.
pub async fn concurrent_appends_at_any_version_all_succeed_gapless(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let outcomes = append_at_once(&store, &stream, ExpectedVersion::Any, WRITERS).await;
    let mut versions: Vec<_> =
        outcomes.into_iter().map(|outcome| outcome.expect("appended").version.0).collect();
    versions.sort_unstable();
    assert_eq!(versions, (1..=WRITERS).collect::<Vec<_>>());
    read_gapless(&*store, &stream, WRITERS).await;
}

/// Streams do not disturb one another.
pub async fn concurrent_appends_to_many_streams_all_succeed(harness: &mut dyn StoreUnderTest) {
    let store = harness.store();
    let streams: Vec<_> = (0..30).map(|_| new_stream()).collect();
    let tasks = streams.iter().map(|stream| {
        let (store, stream) = (Arc::clone(&store), stream.clone());
        tokio::spawn(async move {
            for version in 0..5 {
                store.append(&stream, exact(version), commit(1)).await.expect("nobody else writes");
            }
        })
    });
    join_all(tasks).await.into_iter().for_each(|task| task.expect("no task panics"));
    for stream in &streams {
        read_gapless(&*store, stream, 5).await;
    }
}

//! What one append after another does.

use std::collections::HashSet;

use super::{StoreUnderTest, assert_conflict, commit, exact, new_stream, read_all, read_gapless};
use crate::ids::ExpectedVersion;

/// Version and position of the answer are those of the commit's last event, as it is read.
pub async fn an_append_answers_the_version_and_position_of_its_last_event(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let first = store.append(&stream, ExpectedVersion::NoStream, commit(3)).await.expect("first");
    let second = store.append(&stream, exact(3), commit(1)).await.expect("second");
    let events = read_gapless(&*store, &stream, 4).await;
    assert_eq!((first.version.0, first.position), (3, events[2].position));
    assert_eq!((second.version.0, second.position), (4, events[3].position));
    assert!(!first.duplicate && !second.duplicate);
}

/// Commits of different lengths leave versions 1..n.
pub async fn versions_are_gapless_over_commits_of_several_events(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let mut version = 0;
    for count in [1, 3, 2, 5, 1] {
        let appended = store.append(&stream, exact(version), commit(count)).await.expect("fits");
        version += count;
        assert_eq!(appended.version.0, version);
    }
    read_gapless(&*store, &stream, 12).await;
}

/// Every event of a commit names its command; no other event lies between two of them.
pub async fn the_events_of_a_commit_share_one_command_and_follow_one_another(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let commits = [commit(2), commit(3), commit(1)];
    for each in &commits {
        store.append(&stream, ExpectedVersion::Any, each.clone()).await.expect("appended");
    }
    let events = read_gapless(&*store, &stream, 6).await;
    let commands: Vec<_> = events.iter().map(|event| event.command_id).collect();
    let expected: Vec<_> =
        commits.iter().flat_map(|each| vec![each.command_id(); each.events().len()]).collect();
    assert_eq!(commands, expected);
    let ids: HashSet<_> = events.iter().map(|event| event.metadata.event_id).collect();
    assert_eq!(ids.len(), 6, "event ids are kept apart");
}

/// `NoStream` is refused with the version that is there, and nothing is added.
pub async fn no_stream_conflicts_on_an_existing_stream(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, ExpectedVersion::NoStream, commit(2)).await.expect("is new");
    let outcome = store.append(&stream, ExpectedVersion::NoStream, commit(1)).await;
    assert_conflict(&outcome, &stream, ExpectedVersion::NoStream, 2);
    read_gapless(&*store, &stream, 2).await;
}

/// A version that the stream has not reached is refused, on an empty stream too.
pub async fn an_expected_version_beyond_the_current_one_conflicts(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let outcome = store.append(&stream, exact(1), commit(1)).await;
    assert_conflict(&outcome, &stream, exact(1), 0);
    store.append(&stream, exact(0), commit(1)).await.expect("Exact(0) is an empty stream");
    let outcome = store.append(&stream, exact(2), commit(1)).await;
    assert_conflict(&outcome, &stream, exact(2), 1);
    read_gapless(&*store, &stream, 1).await;
}

/// A version that the stream has left is refused, also one inside a commit.
pub async fn an_old_expected_version_conflicts(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(3)).await.expect("is new");
    for old in [0, 1, 2] {
        let outcome = store.append(&stream, exact(old), commit(1)).await;
        assert_conflict(&outcome, &stream, exact(old), 3);
    }
    read_gapless(&*store, &stream, 3).await;
}

/// Each stream counts for itself, also when one's name begins with the other's.
pub async fn streams_do_not_share_versions(harness: &mut dyn StoreUnderTest) {
    let store = harness.store();
    let short = new_stream();
    let long = format!("{short}-2").parse().expect("still a stream id");
    store.append(&short, exact(0), commit(2)).await.expect("is new");
    store.append(&long, exact(0), commit(1)).await.expect("is new too");
    store.append(&short, exact(2), commit(1)).await.expect("is at 2");
    read_gapless(&*store, &short, 3).await;
    let events = read_gapless(&*store, &long, 1).await;
    assert_eq!(events[0].stream, long);
}

/// A commit of a thousand events is there from the first to the last.
pub async fn a_commit_of_many_events_is_whole(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let many = commit(1_000);
    let appended = store.append(&stream, exact(0), many.clone()).await.expect("appended");
    assert_eq!(appended.version.0, 1_000);
    let events = read_all(&*store, &stream).await;
    let payloads = |event: &crate::NewEvent| event.payload.clone();
    let written: Vec<_> = many.events().iter().map(payloads).collect();
    let read: Vec<_> = events.iter().map(|event| event.payload.clone()).collect();
    assert_eq!(written, read);
}

//! A command is applied at most once in its stream.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{
    StoreUnderTest, assert_conflict, commit, commit_of, exact, new_command, new_stream,
    read_gapless, submit,
};
use crate::ids::ExpectedVersion;
use crate::store::Appended;

/// The duplicate answer to a command whose first answer was `first`.
fn duplicate_of(first: Appended) -> Appended {
    Appended { duplicate: true, ..first }
}

/// The same commit twice is one commit.
pub async fn a_command_sent_again_answers_its_first_outcome_and_adds_nothing(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream, command) = (harness.store(), new_stream(), commit(2));
    let first = store.append(&stream, exact(0), command.clone()).await.expect("is new");
    store.append(&stream, exact(2), commit(1)).await.expect("is at 2");
    let again = store.append(&stream, exact(0), command).await.expect("a duplicate is no error");
    assert_eq!(again, duplicate_of(first));
    read_gapless(&*store, &stream, 3).await;
}

/// The id alone decides.
pub async fn a_command_sent_again_is_known_whatever_its_body_and_expected_version(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    let first = store.append(&stream, exact(0), commit_of(id, 2)).await.expect("is new");
    for expected in [exact(0), exact(2), exact(7), ExpectedVersion::NoStream, ExpectedVersion::Any]
    {
        let again = store.append(&stream, expected, commit_of(id, 5)).await;
        assert_eq!(again.expect("a duplicate is no error"), duplicate_of(first), "{expected}");
    }
    read_gapless(&*store, &stream, 2).await;
}

/// Twenty tasks send one command; one answer is the first, all name the same event.
pub async fn a_command_sent_many_times_at_once_is_applied_once(harness: &mut dyn StoreUnderTest) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    let tasks = (0..20).map(|_| {
        let (store, stream) = (Arc::clone(&store), stream.clone());
        tokio::spawn(async move { store.append(&stream, exact(0), commit_of(id, 2)).await })
    });
    let outcomes: Vec<_> = join_all(tasks)
        .await
        .into_iter()
        .map(|task| task.expect("no task panics").expect("first or duplicate"))
        .collect();
    assert_eq!(outcomes.iter().filter(|outcome| !outcome.duplicate).count(), 1);
    for outcome in &outcomes {
        assert_eq!(
            (outcome.version, outcome.position),
            (outcomes[0].version, outcomes[0].position)
        );
    }
    read_gapless(&*store, &stream, 2).await;
}

/// No window forgets a command.
pub async fn a_command_is_known_after_hundreds_of_later_ones(harness: &mut dyn StoreUnderTest) {
    const LATER: u64 = 400;
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    let first = store.append(&stream, exact(0), commit_of(id, 1)).await.expect("is new");
    let later =
        (0..LATER).map(|_| submit(&*store, &stream, ExpectedVersion::Any, commit(1), None).1);
    for outcome in join_all(later).await {
        outcome.expect("expects nothing");
    }
    let again = store.append(&stream, exact(0), commit_of(id, 1)).await;
    assert_eq!(again.expect("a duplicate is no error"), duplicate_of(first));
    read_gapless(&*store, &stream, LATER + 1).await;
}

/// A new process knows what the old one applied.
pub async fn a_command_is_known_after_reopening(harness: &mut dyn StoreUnderTest) {
    let (stream, id) = (new_stream(), new_command());
    let first = harness.store().append(&stream, exact(0), commit_of(id, 2)).await.expect("is new");
    harness.store().append(&stream, exact(2), commit(1)).await.expect("is at 2");
    if !harness.reopen().await {
        return;
    }
    let store = harness.store();
    let again = store.append(&stream, exact(0), commit_of(id, 2)).await;
    assert_eq!(again.expect("a duplicate is no error"), duplicate_of(first));
    store.append(&stream, exact(3), commit(1)).await.expect("nothing was added");
    read_gapless(&*store, &stream, 4).await;
}

/// The id is looked for in its own stream only.
pub async fn a_command_is_independent_in_another_stream(harness: &mut dyn StoreUnderTest) {
    let (store, id) = (harness.store(), new_command());
    for stream in [new_stream(), new_stream()] {
        let appended = store.append(&stream, exact(0), commit_of(id, 1)).await.expect("is new");
        assert!(!appended.duplicate);
        read_gapless(&*store, &stream, 1).await;
    }
}

/// A conflict settles nothing but that attempt.
pub async fn a_command_that_conflicted_may_be_sent_again(harness: &mut dyn StoreUnderTest) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    let outcome = store.append(&stream, exact(0), commit_of(id, 1)).await;
    assert_conflict(&outcome, &stream, exact(0), 1);
    let appended = store.append(&stream, exact(1), commit_of(id, 1)).await.expect("is at 1");
    assert!(!appended.duplicate);
    read_gapless(&*store, &stream, 2).await;
}

/// `find_command` answers what the append answered, for this stream alone, beyond any window.
pub async fn a_command_is_found_by_its_id(harness: &mut dyn StoreUnderTest) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    assert_eq!(store.find_command(&stream, id).await.expect("can be asked"), None);
    let first = store.append(&stream, exact(0), commit_of(id, 3)).await.expect("is new");
    let later = (0..200).map(|_| submit(&*store, &stream, ExpectedVersion::Any, commit(1), None).1);
    for outcome in join_all(later).await {
        outcome.expect("expects nothing");
    }
    let found = store.find_command(&stream, id).await.expect("can be asked").expect("is there");
    assert_eq!((found.version, found.position), (first.version, first.position));
    assert_eq!(store.find_command(&new_stream(), id).await.expect("can be asked"), None);
    assert_eq!(store.find_command(&stream, new_command()).await.expect("can be asked"), None);
}

//! Commits that build on commits whose outcome is not known yet.

use futures_util::future::join_all;

use super::{
    StoreUnderTest, assert_conflict, assert_nothing_appended, commit, commit_of, eventually, exact,
    new_command, new_stream, read_all, read_gapless, submit, view,
};
use crate::ids::{ExpectedVersion, StreamId, Version};
use crate::store::{AppendError, Appended, EventStore, Outcome, Ticket};

/// Submits commits of one event, the first behind `after`, each other behind the one before, at
/// versions from `version` on, without waiting for any.
fn submit_chain(
    store: &dyn EventStore,
    stream: &StreamId,
    version: u64,
    mut after: Option<Ticket>,
    length: u64,
) -> Vec<Outcome<Appended>> {
    let mut outcomes = Vec::new();
    for step in 0..length {
        let (ticket, outcome) = submit(store, stream, exact(version + step), commit(1), after);
        after = Some(ticket);
        outcomes.push(outcome);
    }
    outcomes
}

fn assert_refused(outcome: &Result<(), AppendError>) {
    let refused =
        matches!(outcome, Err(AppendError::Conflict { .. } | AppendError::NotAppended { .. }));
    assert!(refused, "expected Conflict or NotAppended, found {outcome:?}");
}

/// Twenty commits are submitted before the first outcome is asked for; all are appended.
pub async fn a_chain_of_unsettled_commits_is_appended_in_order(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let outcomes = join_all(submit_chain(&*store, &stream, 0, None, 20)).await;
    for (outcome, version) in outcomes.into_iter().zip(1..) {
        assert_eq!(outcome.expect("appended").version, Version(version));
    }
    read_gapless(&*store, &stream, 20).await;
}

/// The head of the chain fails, so nothing that was decided on it may stand.
pub async fn a_chain_behind_a_conflict_has_no_member_appended(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    let outcomes = join_all(submit_chain(&*store, &stream, 0, None, 10)).await;
    assert_conflict(&outcomes[0], &stream, exact(0), 1);
    outcomes.iter().for_each(assert_nothing_appended);
    read_gapless(&*store, &stream, 1).await;
    store.append(&stream, exact(1), commit(1)).await.expect("the stream goes on");
}

/// The version alone would let the third one in, but it was decided on events that are not there.
pub async fn a_commit_behind_a_failed_one_fails_even_if_its_version_fits(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let (_, first) = submit(&*store, &stream, exact(0), commit(1), None);
    let (failed, second) = submit(&*store, &stream, exact(0), commit(1), None);
    let (_, third) = submit(&*store, &stream, exact(1), commit(1), Some(failed));
    assert_eq!(first.await.expect("is new").version, Version(1));
    assert_conflict(&second.await, &stream, exact(0), 1);
    assert_nothing_appended(&third.await);
    read_gapless(&*store, &stream, 1).await;
}

/// A duplicate's events are not the ones that this decision saw at the end of the stream.
pub async fn a_commit_behind_a_duplicate_is_not_appended(harness: &mut dyn StoreUnderTest) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    store.append(&stream, exact(0), commit_of(id, 1)).await.expect("is new");
    store.append(&stream, exact(1), commit(1)).await.expect("is at 1");
    let (ticket, duplicate) = submit(&*store, &stream, exact(1), commit_of(id, 1), None);
    let (_, behind) = submit(&*store, &stream, exact(2), commit(1), Some(ticket));
    assert!(duplicate.await.expect("a duplicate is no error").duplicate);
    assert_nothing_appended(&behind.await);
    read_gapless(&*store, &stream, 2).await;
}

/// Another commit came between: the version says so, and so does the ticket.
pub async fn a_commit_behind_one_that_was_overtaken_is_not_appended(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let (first, outcome) = submit(&*store, &stream, exact(0), commit(1), None);
    let (_, between) = submit(&*store, &stream, ExpectedVersion::Any, commit(1), None);
    let (_, late) = submit(&*store, &stream, exact(1), commit(1), Some(first));
    let (_, late_at_any) = submit(&*store, &stream, ExpectedVersion::Any, commit(1), Some(first));
    outcome.await.expect("is new");
    assert_eq!(between.await.expect("expects nothing").version, Version(2));
    assert_nothing_appended(&late.await);
    assert_nothing_appended(&late_at_any.await);
    read_gapless(&*store, &stream, 2).await;
}

/// Submissions by one caller are not reordered.
pub async fn appends_at_any_version_keep_the_order_of_submission(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let outcomes =
        (0..20).map(|_| submit(&*store, &stream, ExpectedVersion::Any, commit(2), None).1);
    let outcomes = join_all(outcomes.collect::<Vec<_>>()).await;
    let versions: Vec<_> =
        outcomes.into_iter().map(|outcome| outcome.expect("appended").version.0).collect();
    assert_eq!(versions, (1..=20).map(|commit| commit * 2).collect::<Vec<_>>());
}

/// One is the append, the other its duplicate; a failure would be shared as well.
pub async fn a_pending_command_sent_again_shares_its_outcome(harness: &mut dyn StoreUnderTest) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    let (_, first) = submit(&*store, &stream, exact(0), commit_of(id, 2), None);
    let (_, again) = submit(&*store, &stream, exact(0), commit_of(id, 3), None);
    let (first, again) = (first.await.expect("is new"), again.await.expect("shares the outcome"));
    assert!(!first.duplicate);
    assert_eq!(again, Appended { duplicate: true, ..first });
    read_gapless(&*store, &stream, 2).await;
}

/// A rejection that was decided on pending events may be answered once they are in the log.
pub async fn a_view_with_pending_events_is_confirmed_when_they_are_appended(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    let (ticket, outcome) = submit(&*store, &stream, exact(0), commit(2), None);
    let confirmed = store.confirm(view(&stream, 2, Some(ticket)));
    confirmed.await.expect("the view is the newest once the commit is in");
    assert_eq!(outcome.await.expect("is new").version, Version(2));
}

/// Neither when the pending commit conflicts nor when it was a duplicate.
pub async fn a_view_with_pending_events_is_not_confirmed_when_they_are_not(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    store.append(&stream, exact(0), commit_of(id, 1)).await.expect("is new");
    let (ticket, conflict) = submit(&*store, &stream, exact(0), commit(1), None);
    // The version is the one that the stream has: only the ticket tells that the view is not.
    assert_refused(&store.confirm(view(&stream, 1, Some(ticket))).await);
    assert_conflict(&conflict.await, &stream, exact(0), 1);
    let (ticket, duplicate) = submit(&*store, &stream, exact(0), commit_of(id, 1), None);
    assert_refused(&store.confirm(view(&stream, 2, Some(ticket))).await);
    assert!(duplicate.await.expect("a duplicate is no error").duplicate);
}

/// Whoever stops listening has still written.
pub async fn an_abandoned_answer_does_not_abandon_the_append(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    let (_, outcome) = submit(&*store, &stream, exact(0), commit(1), None);
    drop(outcome);
    eventually("the abandoned commit is read", async || {
        read_all(&*store, &stream).await.len() == 1
    })
    .await;
    store.append(&stream, exact(1), commit(1)).await.expect("is at 1");
}

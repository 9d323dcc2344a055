//! Limits refuse by name and break nothing.

use super::{
    StoreUnderTest, commit, commit_of, event, exact, new_command, new_stream, read_gapless,
};
use crate::clock::{Clock, SystemClock};
use crate::event::Commit;
use crate::ids::ExpectedVersion;
use crate::store::{Append, AppendError, Appended, Ticket};

/// One event too large refuses its whole commit, with size and limit.
pub async fn too_large_events_are_refused_whole_and_the_store_goes_on(
    harness: &mut dyn StoreUnderTest,
) {
    let Some(too_large_bytes) = harness.too_large_bytes() else { return };
    let (store, stream, id) = (harness.store(), new_stream(), new_command());
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    let mut large = event(1);
    large.payload = format!("\"{}\"", "x".repeat(too_large_bytes)).into_bytes().into();
    let too_large = Commit::new(id, vec![event(0), large, event(2)]).expect("three events");
    match store.append(&stream, exact(1), too_large).await {
        Err(AppendError::TooLarge { size, limit }) => {
            assert!(size >= too_large_bytes && limit < size, "{size} over {limit}");
        }
        other => panic!("expected TooLarge, found {other:?}"),
    }
    read_gapless(&*store, &stream, 1).await;
    let smaller = store.append(&stream, exact(1), commit_of(id, 2)).await.expect("fits now");
    assert!(!smaller.duplicate, "the refused attempt settled nothing");
    read_gapless(&*store, &stream, 3).await;
}

/// Whatever the answer, the same command sent again has exactly one effect, and a definite answer
/// stays true.
pub async fn a_deadline_in_the_past_never_makes_an_outcome_a_guess(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    for round in 0..5 {
        let append = Append {
            stream: stream.clone(),
            expected: exact(round),
            commit: commit(1),
            ticket: Ticket::next(),
            after: None,
            deadline: Some(SystemClock.instant()),
        };
        let command = append.commit.clone();
        let sent = command.command_id();
        let late = store.submit(append).await;
        let settled = store.append(&stream, ExpectedVersion::Any, command).await.expect("settles");
        assert_eq!(settled.version.0, round + 1);
        match late {
            Ok(appended) => assert_eq!(Appended { duplicate: true, ..appended }, settled),
            Err(AppendError::Unavailable { .. } | AppendError::NotAppended { .. }) => {
                assert!(!settled.duplicate, "it was said that it had not happened");
            }
            Err(AppendError::OutcomeUnknown { command_id }) => {
                assert_eq!(command_id, sent);
            }
            Err(other) => panic!("a late append was answered {other:?}"),
        }
        read_gapless(&*store, &stream, round + 1).await;
    }
}

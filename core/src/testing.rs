//! The contract suite that every store runs.
//!
//! A store's test file says how its store is made and hands that over:
//!
//! ```text
//! async fn make(claim: &'static str) -> Option<MyHarness> { … }
//! kafold_core::store_contract!(make);
//! ```
//!
//! [`store_contract!`](crate::store_contract) makes one test a claim, so that a failure names what
//! does not hold. The claims are functions here, one file a theme. They use stream names of their
//! own, so one log may serve them all, one after another or at once.

pub mod append;
pub mod concurrency;
pub mod confirm;
pub mod duplicates;
pub mod limits;
pub mod pipelining;
pub mod reading;
pub mod source;

mod wait;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::TryStreamExt;
use futures_util::future::LocalBoxFuture;

use crate::clock::{IdGenerator, RandomIds};
use crate::event::{Commit, Metadata, NewEvent, RecordedEvent};
use crate::ids::{CommandId, ExpectedVersion, StreamId, Version};
use crate::index::{Advanced, IndexBatch, StreamIndex};
use crate::store::{
    Append, AppendError, Appended, Cursor, EventSource, EventStore, Outcome, ReadError, Ticket,
    View,
};

pub use self::wait::eventually;

/// How long one claim may take before it fails; a store is expected to need a tenth of it.
pub const CLAIM_TIMEOUT: Duration = Duration::from_secs(60);

/// A store as the contract suite sees it.
#[async_trait]
pub trait StoreUnderTest: Send + Sync {
    /// The store; after [`StoreUnderTest::reopen`] the one opened again.
    fn store(&self) -> Arc<dyn EventStore>;

    /// The source of the same log.
    fn source(&self) -> Arc<dyn EventSource>;

    /// Closes the store and opens it again on the same log, with nothing remembered but what the
    /// log and what is stored beside it hold. `false` if this store has nothing to open again.
    async fn reopen(&mut self) -> bool {
        false
    }

    /// A cursor as another log of the same kind would have handed out, for partition 0.
    async fn cursor_of_another_log(&self) -> Cursor;

    /// The size in bytes from which a payload is certainly too large for one event, if the store
    /// has a limit.
    fn too_large_bytes(&self) -> Option<usize> {
        None
    }
}

/// Runs one claim on a store, or skips it when there is none, within [`CLAIM_TIMEOUT`].
pub async fn run<H: StoreUnderTest>(
    claim_name: &str,
    harness: Option<H>,
    claim: impl for<'a> FnOnce(&'a mut dyn StoreUnderTest) -> LocalBoxFuture<'a, ()>,
) {
    // Whoever made no store has said why.
    let Some(mut harness) = harness else { return };
    let done = tokio::time::timeout(CLAIM_TIMEOUT, claim(&mut harness)).await;
    assert!(done.is_ok(), "{claim_name} took longer than {CLAIM_TIMEOUT:?}");
}

/// One test for every claim of the contract, on the stores that the given function makes: an
/// `async fn(claim: &'static str) -> Option<impl StoreUnderTest>`, where `None` skips the claim.
/// The calling crate needs tokio with its macros.
#[macro_export]
macro_rules! store_contract {
    ($make:ident) => {
        $crate::store_contract! { @claims $make
            append {
                an_append_answers_the_version_and_position_of_its_last_event,
                versions_are_gapless_over_commits_of_several_events,
                the_events_of_a_commit_share_one_command_and_follow_one_another,
                no_stream_conflicts_on_an_existing_stream,
                an_expected_version_beyond_the_current_one_conflicts,
                an_old_expected_version_conflicts,
                streams_do_not_share_versions,
                a_commit_of_many_events_is_whole,
            }
            concurrency {
                of_concurrent_appends_with_one_expected_version_one_succeeds,
                of_concurrent_first_appends_one_succeeds,
                concurrent_appends_at_any_version_all_succeed_gapless,
                concurrent_appends_to_many_streams_all_succeed,
            }
            confirm {
                the_newest_view_is_confirmed,
                an_old_view_conflicts,
                a_view_of_an_empty_stream_is_confirmed_while_it_is_empty,
                a_view_ahead_of_the_stream_is_not_confirmed,
                confirmed_views_and_appends_agree_on_one_order,
            }
            duplicates {
                a_command_sent_again_answers_its_first_outcome_and_adds_nothing,
                a_command_sent_again_is_known_whatever_its_body_and_expected_version,
                a_command_sent_many_times_at_once_is_applied_once,
                a_command_is_known_after_hundreds_of_later_ones,
                a_command_is_known_after_reopening,
                a_command_is_independent_in_another_stream,
                a_command_that_conflicted_may_be_sent_again,
                a_command_is_found_by_its_id,
            }
            limits {
                too_large_events_are_refused_whole_and_the_store_goes_on,
                a_deadline_in_the_past_never_makes_an_outcome_a_guess,
            }
            pipelining {
                a_chain_of_unsettled_commits_is_appended_in_order,
                a_chain_behind_a_conflict_has_no_member_appended,
                a_commit_behind_a_failed_one_fails_even_if_its_version_fits,
                a_commit_behind_a_duplicate_is_not_appended,
                a_commit_behind_one_that_was_overtaken_is_not_appended,
                appends_at_any_version_keep_the_order_of_submission,
                a_pending_command_sent_again_shares_its_outcome,
                a_view_with_pending_events_is_confirmed_when_they_are_appended,
                a_view_with_pending_events_is_not_confirmed_when_they_are_not,
                an_abandoned_answer_does_not_abandon_the_append,
            }
            reading {
                an_unknown_stream_reads_empty,
                reading_starts_behind_the_given_version,
                what_was_written_is_read_to_the_byte,
                a_stream_reads_the_same_after_reopening,
                an_acknowledged_append_is_read_at_once,
            }
            source {
                every_event_is_delivered_once_in_order_of_its_partition,
                batches_follow_one_another_and_hold_whole_commits_within_their_limit,
                reading_resumes_at_every_cursor_without_gap_or_repetition,
                a_subscription_tails_new_events,
                a_dropped_call_of_next_loses_nothing,
                a_stopped_partition_is_silent_until_it_is_started,
                a_cursor_of_another_log_is_refused,
                cursors_are_good_after_reopening,
            }
        }
    };
    (@claims $make:ident $($theme:ident { $($claim:ident),* $(,)? })*) => {
        $(mod $theme {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $claim() {
                    let harness = super::$make(stringify!($claim)).await;
                    $crate::testing::run(stringify!($claim), harness, |harness| {
                        ::std::boxed::Box::pin($crate::testing::$theme::$claim(harness))
                    })
                    .await;
                }
            )*
        })*
    };
}

/// A stream that no other claim uses.
pub fn new_stream() -> StreamId {
    StreamId::new("contract", &RandomIds.event_id().to_string()).expect("a UUID is a valid id")
}

/// A command that was never sent.
pub fn new_command() -> CommandId {
    CommandId(RandomIds.event_id())
}

/// An event that carries `number` in every part of it.
pub fn event(number: u64) -> NewEvent {
    let base = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::days(20_000);
    NewEvent {
        event_type: "contract.noted.v1".into(),
        payload: format!(r#"{{"number":{number}}}"#).into_bytes().into(),
        metadata: Metadata {
            event_id: RandomIds.event_id(),
            recorded_at: base + TimeDelta::microseconds(number as i64),
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        },
    }
}

/// A commit of `count` events by a new command.
pub fn commit(count: u64) -> Commit {
    commit_of(new_command(), count)
}

/// A commit of `count` events by the given command.
pub fn commit_of(command_id: CommandId, count: u64) -> Commit {
    Commit::new(command_id, (0..count).map(event).collect()).expect("1 to 65535 events")
}

/// The demand of exactly `version` events.
pub fn exact(version: u64) -> ExpectedVersion {
    ExpectedVersion::Exact(Version(version))
}

/// Submits a commit, `after` another submission if given; answers its ticket and its outcome.
pub fn submit(
    store: &dyn EventStore,
    stream: &StreamId,
    expected: ExpectedVersion,
    commit: Commit,
    after: Option<Ticket>,
) -> (Ticket, Outcome<Appended>) {
    let (ticket, stream) = (Ticket::next(), stream.clone());
    let append = Append { stream, expected, commit, ticket, after, deadline: None };
    (ticket, store.submit(append))
}

/// The view of `version` events, seen `after` a pending submission if given.
pub fn view(stream: &StreamId, version: u64, after: Option<Ticket>) -> View {
    View { stream: stream.clone(), version: Version(version), after, deadline: None }
}

/// All events of a stream.
pub async fn read_all(store: &dyn EventStore, stream: &StreamId) -> Vec<RecordedEvent> {
    read_after(store, stream, 0).await
}

/// The events of a stream above `version`.
pub async fn read_after(
    store: &dyn EventStore,
    stream: &StreamId,
    version: u64,
) -> Vec<RecordedEvent> {
    store.read(stream, Version(version)).try_collect().await.expect("a stream can be read")
}

/// Reads a stream and checks that it has the versions 1 to `count`, at rising positions of one
/// partition.
pub async fn read_gapless(
    store: &dyn EventStore,
    stream: &StreamId,
    count: u64,
) -> Vec<RecordedEvent> {
    let events = read_all(store, stream).await;
    assert_eq!(versions(&events), (1..=count).collect::<Vec<_>>(), "versions are gapless, 1..n");
    for pair in events.windows(2) {
        assert_eq!(pair[0].position.partition, pair[1].position.partition);
        assert!(pair[0].position.offset < pair[1].position.offset);
    }
    events
}

/// What the index says to one batch.
pub async fn advance(index: &dyn StreamIndex, batch: IndexBatch) -> Result<Advanced, ReadError> {
    let mut answers = index.advance(vec![batch]).await;
    assert_eq!(answers.len(), 1, "an answer for each batch");
    answers.remove(0)
}

/// The versions of the events, as numbers.
pub fn versions(events: &[RecordedEvent]) -> Vec<u64> {
    events.iter().map(|event| event.version.0).collect()
}

/// Checks that an append failed because nothing was appended: the stream had moved, or what it was
/// to be behind was not there.
pub fn assert_nothing_appended(outcome: &Result<Appended, AppendError>) {
    let definite =
        matches!(outcome, Err(AppendError::Conflict { .. } | AppendError::NotAppended { .. }));
    assert!(definite, "expected Conflict or NotAppended, found {outcome:?}");
}

/// Checks a conflict and its two values.
pub fn assert_conflict<T: std::fmt::Debug>(
    outcome: &Result<T, AppendError>,
    wanted_stream: &StreamId,
    wanted_expected: ExpectedVersion,
    wanted_actual: u64,
) {
    match outcome {
        Err(AppendError::Conflict { stream, expected, actual }) => {
            assert_eq!(stream, wanted_stream);
            assert_eq!(*expected, wanted_expected);
            assert_eq!(*actual, Version(wanted_actual));
        }
        other => panic!("expected a conflict, found {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Offset;
    use crate::memory::{MemoryConfig, MemoryStore};

    const TOO_LARGE_BYTES: usize = 10_000;

    struct InMemory(MemoryStore);

    #[async_trait]
    impl StoreUnderTest for InMemory {
        fn store(&self) -> Arc<dyn EventStore> {
            Arc::new(self.0.clone())
        }

        fn source(&self) -> Arc<dyn EventSource> {
            Arc::new(self.0.clone())
        }

        async fn cursor_of_another_log(&self) -> Cursor {
            Cursor { next: Offset(0), state: "another log".into() }
        }

        fn too_large_bytes(&self) -> Option<usize> {
            Some(TOO_LARGE_BYTES)
        }
    }

    fn in_memory(partitions: u32) -> Option<InMemory> {
        let event_bytes_max = TOO_LARGE_BYTES - 1;
        let config = MemoryConfig { partitions, event_bytes_max, ..MemoryConfig::default() };
        Some(InMemory(MemoryStore::new(config)))
    }

    mod one_partition {
        async fn make(_claim: &str) -> Option<super::InMemory> {
            super::in_memory(1)
        }

        crate::store_contract!(make);
    }

    mod several_partitions {
        async fn make(_claim: &str) -> Option<super::InMemory> {
            super::in_memory(3)
        }

        crate::store_contract!(make);
    }
}

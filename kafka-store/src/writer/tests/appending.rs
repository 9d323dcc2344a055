//! Proof, doubt, conflicts and deduplication (protocol, sections 4 and 5).

use super::*;

#[test]
fn a_commit_is_acknowledged_when_its_last_event_is_proven() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 3);
    bench.load_empty();
    assert_eq!(bench.kinds(), [("event", 1), ("event", 2), ("event", 3)]);
    let landed = bench.land_all();
    bench.report(landed[2].0, Some(3));
    bench.report(landed[0].0, Some(1));
    assert!(bench.answer(request).is_none(), "record 2 has no report");
    bench.report(landed[1].0, Some(2));
    assert_eq!(bench.acknowledged(request), (3, 3, false));
    let proven =
        |output: &Output| matches!(output, Output::Proven(proven) if proven.events.len() == 3);
    let proven = bench.out.iter().position(proven).expect("told to the tail");
    let answer = |output: &Output| matches!(output, Output::Appended { .. });
    assert!(proven < bench.out.iter().position(answer).expect("answered"), "tail before answer");
}

/// A report that proves nothing: no answer, a new claim, and then the truth.
fn doubt_is_settled_by_reading(report: impl FnOnce(&mut Bench, Stamp)) {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let (stamp, _) = bench.land_all()[0];
    report(&mut bench, stamp);
    assert!(bench.answer(request).is_none());
    assert!(bench.has(|output| matches!(output, Output::Doubt(_))));
    bench.catch_up();
    assert_eq!(bench.acknowledged(request), (1, 1, false), "it is in the log");
    bench.claim_again();
}

#[test]
fn only_the_one_right_offset_proves_a_record() {
    doubt_is_settled_by_reading(|bench, stamp| bench.report(stamp, None));
    doubt_is_settled_by_reading(|bench, stamp| bench.report(stamp, Some(0)));
    doubt_is_settled_by_reading(|bench, stamp| bench.report(stamp, Some(2)));
}

#[test]
fn a_failed_report_proves_nothing() {
    doubt_is_settled_by_reading(|bench, stamp| bench.report_failure(stamp, |_| ()));
}

#[test]
fn a_report_that_never_comes_is_doubt_too() {
    doubt_is_settled_by_reading(|bench, _| bench.pass(Duration::from_secs(331)));
}

#[test]
fn consecutive_offsets_behind_another_claim_are_no_proof() {
    let mut bench = Bench::owning();
    let first = bench.submit(exact(0), 1, 2);
    bench.load_empty();
    bench.other_claims(2);
    bench.settle();
    assert!(bench.answer(first).is_none());
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(first)));
}

#[test]
fn a_void_copy_does_not_hide_the_accepted_one() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let record = bench.produced.remove(0);
    bench.report_failure(record.stamp, |_| ());
    // Read to the end, nothing there: the claim goes out, and the record lands before it.
    bench.claim_again();
    assert!(bench.answer(request).is_none());
    bench.land(record.clone());
    bench.land(record);
    bench.land_all();
    bench.catch_up();
    assert_eq!(bench.acknowledged(request), (1, 1, false));
}

#[test]
fn a_void_copy_that_comes_first_proves_nothing() {
    let mut bench = Bench::owning();
    let first = bench.submit(ExpectedVersion::Any, 1, 1);
    bench.load_empty();
    let second = bench.submit(ExpectedVersion::Any, 2, 1);
    let (one, two) = (bench.produced.remove(0), bench.produced.remove(0));
    bench.report_failure(one.stamp, |_| ());
    bench.land(two.clone());
    bench.catch_up();
    assert!(bench.answer(second).is_none(), "void behind a hole, and may still come");
    bench.land(one);
    bench.land(two);
    bench.catch_up();
    assert_eq!(bench.acknowledged(first), (1, 2, false));
    assert_eq!(bench.acknowledged(second), (2, 3, false));
}

#[test]
fn a_partial_commit_is_not_appended_and_its_version_is_given_again() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 2);
    bench.load_empty();
    let (first, second) = (bench.produced.remove(0), bench.produced.remove(0));
    bench.land(first);
    bench.report_failure(second.stamp, |_| ());
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(request)));
    bench.land(second);
    let again = bench.submit(exact(0), 2, 1);
    bench.settle();
    bench.catch_up();
    assert_eq!(bench.acknowledged(again), (1, 4, false));
}

#[test]
fn a_conflict_with_what_is_proven_is_told_at_once() {
    let mut bench = Bench::owning();
    bench.submit(exact(0), 1, 2);
    bench.load_empty();
    bench.settle();
    let stale = bench.submit(exact(1), 2, 1);
    assert_eq!(conflict(bench.answer(stale)), 2);
}

#[test]
fn a_pending_commit_does_not_conflict_until_it_is_proven() {
    let mut bench = Bench::owning();
    bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let second = bench.submit(exact(0), 2, 1);
    assert!(bench.answer(second).is_none());
    bench.settle();
    assert_eq!(conflict(bench.answer(second)), 1);
}

#[test]
fn what_waited_for_a_pending_commit_goes_out_when_that_one_fails() {
    let mut bench = Bench::owning();
    let first = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let second = bench.submit(exact(0), 2, 1);
    let lost = bench.produced.remove(0);
    bench.report_failure(lost.stamp, |_| ());
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(first)));
    bench.settle();
    assert_eq!(bench.acknowledged(second), (1, 2, false));
}

#[test]
fn expecting_more_than_we_have_conflicts_only_once_confirmed() {
    let mut bench = Bench::owning();
    let ahead = bench.submit(exact(3), 1, 1);
    bench.load_empty();
    assert!(bench.answer(ahead).is_none(), "we may be the stale one");
    assert_eq!(bench.kinds(), [("barrier", 1)]);
    bench.settle();
    assert_eq!(conflict(bench.answer(ahead)), 0);
}

#[test]
fn any_version_is_pipelined_behind_what_is_pending() {
    let mut bench = Bench::owning();
    let first = bench.submit(ExpectedVersion::Any, 1, 2);
    bench.load_empty();
    let second = bench.submit(ExpectedVersion::Any, 2, 1);
    bench.settle();
    assert_eq!(bench.acknowledged(first), (2, 2, false));
    assert_eq!(bench.acknowledged(second), (3, 3, false));
}

#[test]
fn a_commit_is_built_on_a_pending_one_only_directly_behind_it() {
    let mut bench = Bench::owning();
    let (_, ticket) = bench.submit_with(exact(0), 1, 1, |_| ());
    bench.load_empty();
    let on_it = |append: &mut Append| append.after = Some(ticket);
    let (behind, _) = bench.submit_with(exact(1), 2, 1, on_it);
    let (no_more, _) = bench.submit_with(exact(1), 3, 1, on_it);
    assert!(is_not_appended(&bench.answer(no_more)), "something else is behind it now");
    bench.settle();
    assert_eq!(bench.acknowledged(behind), (2, 2, false));
    let (late, _) = bench.submit_with(exact(1), 4, 1, on_it);
    assert_eq!(conflict(bench.answer(late)), 2);
}

#[test]
fn what_is_built_on_a_failed_or_repeated_commit_is_not_appended() {
    let mut bench = Bench::owning();
    let (_, ticket) = bench.submit_with(exact(0), 1, 1, |_| ());
    bench.load_empty();
    let lost = bench.produced.remove(0);
    bench.report_failure(lost.stamp, |_| ());
    let (behind, _) = bench.submit_with(exact(1), 2, 1, |append| append.after = Some(ticket));
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(behind)));

    bench.submit(exact(0), 3, 1);
    bench.settle();
    let (_, repeated) = bench.submit_with(exact(0), 3, 1, |_| ());
    let (behind, _) = bench.submit_with(exact(1), 4, 1, |append| append.after = Some(repeated));
    assert!(is_not_appended(&bench.answer(behind)));
}

#[test]
fn a_command_sent_again_is_applied_once_whatever_it_expects() {
    let mut bench = Bench::owning();
    let first = bench.submit(exact(0), 1, 2);
    bench.load_empty();
    let attached = bench.submit(exact(7), 1, 2);
    assert_eq!(bench.kinds().len(), 2, "not produced twice");
    bench.settle();
    assert_eq!(bench.acknowledged(first), (2, 2, false));
    assert_eq!(bench.acknowledged(attached), (2, 2, true));
    let expired = bench.now;
    let (found, _) = bench.submit_with(exact(7), 1, 2, |append| append.deadline = Some(expired));
    assert_eq!(bench.acknowledged(found), (2, 2, true), "before deadline and decision");
}

#[test]
fn beyond_the_window_a_command_is_looked_up() {
    let mut bench = Bench::owning();
    let request = bench.submit(ExpectedVersion::Any, 1, 1);
    bench.load(StreamHead { version: Version(9), recent: Vec::new(), older: None });
    assert!(bench.has(|output| matches!(output, Output::Find { .. })));
    assert!(bench.produced.is_empty());
    let position = Position { partition: PARTITION, offset: Offset(4) };
    let found = Some(Appended { version: Version(3), position, duplicate: true });
    bench.give(Input::Found { stream: stream(), command_id: command(1), found: Ok(found) });
    assert_eq!(bench.acknowledged(request), (3, 4, true));
    let new = bench.submit(exact(9), 2, 1);
    bench.give(Input::Found { stream: stream(), command_id: command(2), found: Ok(None) });
    bench.settle();
    assert_eq!(bench.acknowledged(new), (10, 1, false));
}

#[test]
fn a_deadline_never_proves_that_something_did_not_happen() {
    let mut bench = Bench::owning();
    let soon = bench.now + Duration::from_millis(10);
    let (produced, _) = bench.submit_with(exact(0), 1, 1, |append| append.deadline = Some(soon));
    bench.load_empty();
    let (waiting, _) = bench.submit_with(exact(0), 2, 1, |append| append.deadline = Some(soon));
    bench.pass(Duration::from_millis(11));
    assert!(matches!(bench.answer(produced), Some(Err(AppendError::OutcomeUnknown { .. }))));
    assert!(is_unavailable(&bench.answer(waiting), "deadline passed before"));
    let again = bench.submit(exact(0), 1, 1);
    bench.settle();
    assert_eq!(bench.acknowledged(again), (1, 1, true), "the pending entry outlived it");
}

#[test]
fn what_the_broker_refuses_for_good_is_not_proposed_twice() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let stamp = bench.produced.remove(0).stamp;
    bench.report_failure(stamp, |failure| (failure.refused, failure.reason) = (true, "big".into()));
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(request)));
    let again = bench.submit(exact(0), 1, 1);
    assert!(is_not_appended(&bench.answer(again)));
    assert!(bench.produced.is_empty());
    bench.submit(exact(0), 2, 1);
    assert_eq!(bench.kinds(), [("event", 1)], "another command is");
}

#[test]
fn commits_read_while_a_load_is_under_way_are_not_lost() {
    let mut bench = Bench::owning();
    let early = bench.submit(exact(0), 1, 1);
    // The load was begun; then another takes over for a moment and appends.
    let other = bench.other_claims(2);
    bench.other_appends(other, 1, 1, 99);
    bench.catch_up();
    assert!(is_not_owner(&bench.answer(early)));
    bench.pass(WriterLimits::default().yield_backoff);
    bench.catch_up();
    let request = bench.submit(exact(1), 1, 1);
    bench.land_all();
    bench.catch_up();
    bench.load_empty();
    bench.settle();
    assert_eq!(bench.acknowledged(request), (2, 4, false));
}

//! Confirms (protocol, section 5).

use super::*;

/// An owner whose stream `s-1` is known and empty.
fn loaded() -> Bench {
    let mut bench = Bench::owning();
    let first = bench.confirm(0, None);
    bench.load_empty();
    bench.settle();
    assert!(matches!(bench.confirmed(first), Some(Ok(()))));
    bench.pass(Duration::from_millis(6));
    bench
}

#[test]
fn an_idle_confirm_costs_one_barrier() {
    let mut bench = loaded();
    let view = bench.confirm(0, None);
    assert_eq!(bench.kinds(), [("barrier", 2)]);
    assert!(bench.confirmed(view).is_none(), "nothing is proven yet");
    bench.settle();
    assert!(matches!(bench.confirmed(view), Some(Ok(()))));
}

#[test]
fn a_record_produced_before_the_decision_confirms_nothing() {
    let mut bench = loaded();
    bench.submit(exact(0), 1, 1);
    let landed = bench.land_all();
    let view = bench.confirm(1, None);
    bench.report(landed[0].0, Some(landed[0].1.0));
    assert!(bench.confirmed(view).is_none());
    bench.settle();
    assert!(matches!(bench.confirmed(view), Some(Ok(()))), "the barrier behind it does");
}

#[test]
fn the_next_commit_confirms_as_well_as_a_barrier() {
    let mut bench = loaded();
    bench.confirm(0, None);
    bench.settle();
    // Within 5 ms of that barrier: no other one, the commit does it.
    let view = bench.confirm(0, None);
    assert!(bench.produced.is_empty());
    bench.submit(exact(0), 1, 1);
    assert_eq!(bench.kinds(), [("event", 3)]);
    bench.settle();
    assert!(matches!(bench.confirmed(view), Some(Ok(()))), "it held when the call began");
}

#[test]
fn there_is_one_barrier_in_flight_and_one_in_five_milliseconds() {
    let mut bench = loaded();
    let first = bench.confirm(0, None);
    let second = bench.confirm(0, None);
    let third = bench.confirm(0, None);
    assert_eq!(bench.kinds(), [("barrier", 2)], "later confirms wait for the next");
    bench.settle();
    assert!(bench.confirmed(first).is_some());
    assert!(bench.confirmed(second).is_none() && bench.confirmed(third).is_none());
    assert!(bench.produced.is_empty());
    let wake = bench.writer.next_wake().expect("a barrier is due");
    assert!(wake <= bench.now + Duration::from_millis(5));
    bench.now = wake;
    bench.give(Input::Tick);
    assert_eq!(bench.kinds(), [("barrier", 3)]);
    bench.settle();
    assert!(bench.confirmed(second).is_some() && bench.confirmed(third).is_some());
}

#[test]
fn a_stale_owner_confirms_nothing() {
    let mut bench = loaded();
    let other = bench.other_claims(2);
    bench.other_appends(other, 1, 1, 99);
    let view = bench.confirm(0, None);
    bench.settle();
    assert!(bench.confirmed(view).is_some_and(|result| result.is_err()), "doubt ends it");
    bench.catch_up();
    assert!(matches!(bench.writer.status(), Status::Superseded(_)));
}

#[test]
fn a_confirm_does_not_outlive_its_claim() {
    let mut bench = loaded();
    let view = bench.confirm(0, None);
    let stamp = bench.produced.remove(0).stamp;
    bench.report_failure(stamp, |_| ());
    assert!(is_not_appended(&bench.confirmed(view)));
}

#[test]
fn a_view_that_is_behind_conflicts() {
    let mut bench = loaded();
    bench.submit(exact(0), 1, 2);
    let unproven = bench.confirm(0, None);
    assert!(bench.confirmed(unproven).is_none(), "pending events may fail");
    bench.settle();
    bench.pass(Duration::from_millis(6));
    bench.settle();
    let at_once = bench.confirm(1, None);
    for view in [unproven, at_once] {
        match bench.confirmed(view) {
            Some(Err(AppendError::Conflict { actual, .. })) => assert_eq!(actual, Version(2)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_view_with_pending_events_holds_only_while_they_are_the_last() {
    let mut bench = loaded();
    let (_, ticket) = bench.submit_with(exact(0), 1, 1, |_| ());
    let view = bench.confirm(1, Some(ticket));
    bench.settle();
    bench.pass(Duration::from_millis(6));
    bench.settle();
    assert!(matches!(bench.confirmed(view), Some(Ok(()))));
    let (_, second) = bench.submit_with(exact(1), 2, 1, |_| ());
    bench.submit_with(exact(2), 3, 1, |append| append.after = Some(second));
    let outdated = bench.confirm(2, Some(second));
    assert!(is_not_appended(&bench.confirmed(outdated)));
}

#[test]
fn a_confirm_past_its_deadline_is_unavailable() {
    let mut bench = loaded();
    let request = bench.next_request();
    let deadline = Some(bench.now + Duration::from_millis(3));
    let view = View { stream: stream(), version: Version(0), after: None, deadline };
    bench.give(Input::Confirm { request, view });
    bench.pass(Duration::from_millis(4));
    assert!(is_unavailable(&bench.confirmed(request), "deadline"));
}

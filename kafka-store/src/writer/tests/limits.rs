//! Every limit, and the end.

use super::*;

fn with(change: impl FnOnce(&mut WriterLimits)) -> Bench {
    let mut config = config();
    change(&mut config.limits);
    Bench::owning_with(config)
}

#[test]
fn a_large_event_is_refused_before_anything_is_produced() {
    let mut bench = with(|limits| limits.record_bytes_max = 400);
    let request = bench.submit(exact(0), 1, 1);
    assert!(bench.answer(request).is_none());
    bench.load_empty();
    bench.settle();
    let large = |append: &mut Append| {
        let small = append.commit.events()[0].clone();
        let large = NewEvent { payload: Arc::from(vec![b' '; 300]), ..small.clone() };
        append.commit = Commit::new(command(2), vec![small, large]).expect("two events");
    };
    let (refused, _) = bench.submit_with(exact(1), 2, 1, large);
    match bench.answer(refused) {
        Some(Err(AppendError::TooLarge { size, limit })) => assert!(size > 400 && limit == 400),
        other => panic!("{other:?}"),
    }
    assert!(bench.produced.is_empty());
}

#[test]
fn an_event_that_could_not_be_read_back_is_refused() {
    let mut bench = Bench::owning();
    let nameless = |append: &mut Append| {
        let event = NewEvent { event_type: "".into(), ..append.commit.events()[0].clone() };
        append.commit = Commit::new(command(1), vec![event]).expect("an event");
    };
    let (refused, _) = bench.submit_with(exact(0), 1, 1, nameless);
    assert!(is_not_appended(&bench.answer(refused)));
}

#[test]
fn requests_and_their_bytes_are_bounded() {
    let mut bench = with(|limits| limits.requests_max = 2);
    bench.submit(exact(0), 1, 1);
    let view = bench.confirm(0, None);
    let (third, fourth) = (bench.submit(exact(0), 2, 1), bench.confirm(0, None));
    assert!(is_unavailable(&bench.answer(third), "too many requests"));
    assert!(is_unavailable(&bench.confirmed(fourth), "too many requests"));
    bench.load_empty();
    bench.settle();
    bench.pass(Duration::from_millis(6));
    bench.settle();
    assert!(bench.confirmed(view).is_some());
    let fifth = bench.submit(exact(1), 3, 1);
    bench.settle();
    assert_eq!(bench.acknowledged(fifth).0, 2, "there is room again");

    let mut bench = with(|limits| limits.request_bytes_max = 1_000);
    let alone = bench.submit(exact(0), 1, 9);
    assert!(matches!(bench.answer(alone), Some(Err(AppendError::TooLarge { limit: 1_000, .. }))));
    let second = (0..4).map(|id| bench.submit(exact(0), 2 + id, 1)).last().expect("four");
    assert!(is_unavailable(&bench.answer(second), "too many bytes"));
}

#[test]
fn commits_whose_callers_gave_up_count_too() {
    let mut bench = with(|limits| limits.requests_max = 1);
    let soon = bench.now + Duration::from_millis(1);
    bench.submit_with(exact(0), 1, 1, |append| append.deadline = Some(soon));
    bench.load_empty();
    bench.pass(Duration::from_millis(2));
    let next = bench.submit(exact(0), 2, 1);
    assert!(is_unavailable(&bench.answer(next), "too many requests"));
}

#[test]
fn an_index_that_is_far_behind_pushes_back() {
    let mut bench = with(|limits| limits.unindexed_events_max = 2);
    bench.submit(exact(0), 1, 2);
    bench.load_empty();
    bench.settle();
    let refused = bench.submit(exact(2), 2, 1);
    assert!(is_unavailable(&bench.answer(refused), "index"));
    bench.give(Input::Indexed(Offset(3)));
    let taken = bench.submit(exact(2), 2, 1);
    bench.settle();
    assert_eq!(bench.acknowledged(taken).0, 3);
}

#[test]
fn loads_wait_for_their_turn_and_none_is_forgotten() {
    let mut bench = with(|limits| limits.loads_max = 1);
    let ids: Vec<StreamId> =
        ["s-1", "s-2", "s-3"].map(|id| id.parse().expect("a stream id")).to_vec();
    let requests: Vec<RequestId> = ids
        .iter()
        .map(|id| bench.submit_with(exact(0), 1, 1, |append| append.stream = id.clone()).0)
        .collect();
    for round in 1..=3 {
        let loads: Vec<StreamId> = bench
            .out
            .iter()
            .filter_map(|output| match output {
                Output::Load { stream } => Some(stream.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(loads.len(), round, "one at a time");
        let head = StreamHead { older: Some(Filter::default()), ..StreamHead::default() };
        bench.give(Input::Loaded { stream: loads[round - 1].clone(), head: Ok(head) });
    }
    bench.settle();
    for request in requests {
        assert_eq!(bench.acknowledged(request).0, 1);
    }
}

#[test]
fn a_load_that_fails_is_told_and_tried_again_with_the_next_request() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 1);
    let away = kafold_core::ReadError::unavailable(Duration::ZERO, "the database is away");
    bench.give(Input::Loaded { stream: stream(), head: Err(away) });
    assert!(is_unavailable(&bench.answer(request), "the database is away"));
    let again = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    bench.settle();
    assert_eq!(bench.acknowledged(again), (1, 1, false));
}

#[test]
fn streams_that_are_not_in_use_make_room() {
    let mut bench = with(|limits| limits.streams_max = 1);
    bench.submit(exact(0), 1, 1);
    bench.load_empty();
    bench.settle();
    let other = |append: &mut Append| append.stream = "s-2".parse().expect("a stream id");
    bench.submit_with(exact(0), 2, 1, other);
    bench.out.clear();
    bench.submit(exact(1), 3, 1);
    assert!(bench.has(|output| matches!(output, Output::Load { stream: id } if *id == stream())));
}

#[test]
fn a_release_answers_who_waits_and_settles_what_is_pending() {
    let mut bench = Bench::owning();
    let pending = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let waiting = bench.submit(exact(0), 2, 1);
    let view = bench.confirm(0, None);
    bench.give(Input::Release);
    assert!(is_not_owner(&bench.answer(waiting)));
    assert!(is_not_owner(&bench.confirmed(view)));
    assert!(!bench.has(|output| matches!(output, Output::Released)));
    bench.settle();
    assert_eq!(bench.acknowledged(pending), (1, 1, false));
    assert!(bench.has(|output| matches!(output, Output::Released)));
    let late = bench.submit(exact(1), 3, 1);
    assert!(is_not_owner(&bench.answer(late)));
}

#[test]
fn a_release_in_doubt_claims_once_more_to_settle() {
    let mut bench = Bench::owning();
    let pending = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let stamp = bench.produced.remove(0).stamp;
    bench.report_failure(stamp, |_| ());
    bench.give(Input::Release);
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(pending)));
    assert!(matches!(bench.writer.status(), Status::Released));
}

#[test]
fn who_is_abandoned_with_a_commit_in_flight_is_told_that_it_is_unknown() {
    let mut bench = Bench::owning();
    let pending = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let waiting = bench.submit(exact(0), 2, 1);
    bench.give(Input::Abandon);
    assert!(matches!(bench.answer(pending), Some(Err(AppendError::OutcomeUnknown { .. }))));
    assert!(is_not_owner(&bench.answer(waiting)));
    assert!(bench.has(|output| matches!(output, Output::Released)));
    bench.settle();
    bench.pass(Duration::from_secs(60));
    assert!(bench.produced.is_empty());
}

#[test]
fn a_renewed_writer_begins_where_it_is_told_and_claims_above_its_old_claim() {
    let mut bench = Bench::owning();
    let first = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    bench.settle();
    assert_eq!(bench.acknowledged(first), (1, 1, false));
    bench.give(Input::Release);
    bench.writer.renew();
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    assert_eq!(bench.produced[0].stamp.claim.epoch, Epoch(2));
    bench.land_all();
    bench.catch_up();
    let again = bench.submit(ExpectedVersion::Any, 1, 1);
    assert!(bench.has(|output| matches!(output, Output::Load { .. })));
    let recent = vec![CommandOutcome {
        command_id: command(1),
        version: Version(1),
        position: Position { partition: PARTITION, offset: Offset(1) },
    }];
    bench.load(StreamHead { version: Version(1), recent, older: Some(Filter::default()) });
    assert_eq!(bench.acknowledged(again), (1, 1, true));
}

/// After `commands` commands under this owner, whether the next one, `again`, is looked up.
fn is_looked_up(older_bytes_max: usize, commands: u64, again: u128) -> bool {
    let mut bench = with(|limits| limits.older_commands_bytes_max = older_bytes_max);
    let is_find = |output: &Output| matches!(output, Output::Find { .. });
    for version in 0..commands {
        bench.submit(exact(version), u128::from(version) + 1, 1);
        if version == 0 {
            bench.load_empty();
        }
        assert!(!bench.has(is_find), "it is new");
        bench.settle();
    }
    bench.submit(exact(commands), again, 1);
    bench.has(is_find)
}

#[test]
fn a_stream_that_grew_here_looks_up_what_it_may_have_had() {
    let plenty = 1 << 20;
    assert!(!is_looked_up(plenty, 200, 201));
    assert!(!is_looked_up(plenty, 200, 200), "a recent one");
    assert!(is_looked_up(plenty, 200, 7));
    assert!(!is_looked_up(0, 64, 65), "all are recent");
    assert!(is_looked_up(0, 65, 66), "there is no memory for the first");
}

#[test]
fn requests_before_a_damaged_position_is_repaired_are_refused_at_once() {
    let mut bench = Bench::new(config());
    let waiting = bench.submit(exact(0), 1, 1);
    assert!(bench.answer(waiting).is_none(), "the position is not looked up yet");
    let damage = || Input::Unplaced(Arc::new(std::io::Error::other("a table is damaged")));
    bench.give(damage());
    assert!(is_unavailable(&bench.answer(waiting), "a table is damaged"));
    let (later, view) = (bench.submit(exact(0), 2, 1), bench.confirm(0, None));
    assert!(is_unavailable(&bench.answer(later), "a table is damaged"));
    assert!(is_unavailable(&bench.confirmed(view), "a table is damaged"));
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    bench.land_all();
    bench.catch_up();
    bench.give(damage());
    assert!(matches!(bench.writer.status(), Status::Owning), "only a new writer has no position");
    let taken = bench.submit(exact(0), 3, 1);
    bench.load_empty();
    bench.settle();
    assert_eq!(bench.acknowledged(taken).0, 1);
}

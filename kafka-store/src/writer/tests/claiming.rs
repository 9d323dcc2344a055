//! Taking over, and being taken over (protocol, section 3).

use super::*;

#[test]
fn nothing_is_claimed_before_the_end_is_read() {
    let mut bench = Bench::new(config());
    bench.other_claims(1);
    bench.other_claims(2);
    bench.give(Input::Start(Checkpoint::default()));
    assert!(bench.has(|output| matches!(output, Output::Read { from: Offset(0), .. })));
    let first = bench.log[..1].to_vec();
    bench.give(Input::Records { records: first, end: Offset(2) });
    assert!(bench.produced.is_empty());
    bench.catch_up();
    assert_eq!(bench.kinds(), [("claim", 0)]);
    assert_eq!(bench.produced[0].stamp.claim.epoch, Epoch(3));
}

#[test]
fn nothing_is_decided_or_produced_before_the_own_claim_is_read() {
    let mut bench = Bench::new(config());
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    let request = bench.submit(exact(0), 1, 1);
    let (stamp, offset) = bench.land_all()[0];
    bench.report(stamp, Some(offset.0));
    assert!(!bench.has(|output| matches!(output, Output::Load { .. })), "a report is no reading");
    bench.catch_up();
    bench.load_empty();
    assert_eq!(bench.kinds(), [("event", 1)]);
    bench.settle();
    assert_eq!(bench.acknowledged(request), (1, 1, false));
}

#[test]
fn a_claim_of_our_epoch_by_another_is_not_ours() {
    let mut bench = Bench::new(config());
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    bench.other_claims(1);
    bench.land_all();
    bench.catch_up();
    assert!(!bench.has(|output| matches!(output, Output::Owned { .. })));
    assert!(matches!(bench.writer.status(), Status::Superseded(owner) if owner.name == "other"));
}

#[test]
fn a_lost_race_is_run_again_after_a_while() {
    let mut bench = Bench::new(config());
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    bench.other_claims(1);
    bench.land_all();
    bench.catch_up();
    assert!(matches!(bench.writer.status(), Status::Superseded(_)));
    bench.pass(WriterLimits::default().yield_backoff);
    bench.catch_up();
    assert_eq!(bench.kinds(), [("claim", 0)]);
    assert_eq!(bench.produced[0].stamp.claim.epoch, Epoch(2));
}

#[test]
fn base_is_where_our_reading_accepted_the_claim_not_what_was_reported() {
    let mut bench = Bench::new(config());
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    let claim = bench.produced[0].clone();
    let (stamp, _) = bench.land_all()[0];
    bench.catch_up();
    let request = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    // Another takes over; a retried copy of our claim lands behind and is what the report tells.
    bench.other_claims(2);
    let copy = bench.land(claim);
    bench.report(stamp, Some(copy.0));
    bench.settle();
    assert!(bench.answer(request).is_none(), "record 1 is not at base + 1");
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(request)));
}

#[test]
fn a_superseded_writer_gets_no_ack_and_lets_the_other_work() {
    let mut bench = Bench::owning();
    bench.submit(exact(0), 1, 1);
    bench.load_empty();
    bench.settle();
    let late = bench.submit(exact(1), 2, 1);
    let other = bench.other_claims(2);
    bench.other_appends(other, 1, 2, 99);
    bench.settle();
    assert!(bench.answer(late).is_none(), "offset 4 instead of 2");
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(late)));
    let refused = bench.submit(exact(2), 3, 1);
    let view = bench.confirm(1, None);
    let owner = |error: AppendError| matches!(error, AppendError::NotOwner { owner: Some(owner), .. } if owner.name == "other");
    assert!(owner(bench.answer(refused).expect("an answer").expect_err("refused")));
    assert!(owner(bench.confirmed(view).expect("an answer").expect_err("refused")));
    bench.pass(WriterLimits::default().yield_backoff / 3);
    bench.catch_up();
    assert!(bench.produced.is_empty(), "it does not claim back at once");
}

#[test]
fn an_idle_owner_reads_and_notices_that_it_was_superseded() {
    let mut bench = Bench::owning();
    bench.out.clear();
    bench.pass(Duration::from_secs(1));
    assert!(bench.has(|output| matches!(output, Output::Read { from: Offset(1), .. })));
    bench.other_claims(2);
    bench.catch_up();
    assert!(matches!(bench.writer.status(), Status::Superseded(_)));
}

/// The time that passes until the next claim is produced.
fn wait_for_claim(bench: &mut Bench) -> Duration {
    let begin = bench.now;
    bench.catch_up();
    while bench.produced.is_empty() {
        let wake = bench.writer.next_wake().expect("a claim is due");
        bench.now = bench.now.max(wake);
        bench.give(Input::Tick);
        bench.catch_up();
    }
    bench.now - begin
}

fn assert_doubling(waits: &[Duration], base: Duration, most: Duration) {
    for (attempt, wait) in waits.iter().enumerate() {
        let longest = (base * (1 << attempt)).min(most);
        assert!(longest / 2 <= *wait && *wait <= longest, "attempt {attempt}: {wait:?}");
    }
}

#[test]
fn waits_between_claims_double_and_are_bounded() {
    let mut bench = Bench::owning();
    let mut waits = Vec::new();
    for _ in 2..14 {
        bench.give(Input::ProducerReady);
        bench.produced.clear();
        waits.push(wait_for_claim(&mut bench));
    }
    let limits = WriterLimits::default();
    assert_doubling(&waits, limits.claim_backoff, limits.claim_backoff_max);
}

#[test]
fn waits_before_a_partition_is_claimed_back_double_and_begin_anew_for_a_settled_owner() {
    let limits = WriterLimits::default();
    let mut bench = Bench::owning();
    let lose = |bench: &mut Bench| {
        let epoch = bench.writer.reader.fold().state().claim.epoch.0 + 1;
        bench.other_claims(epoch);
        bench.produced.clear();
        bench.catch_up();
        let wait = wait_for_claim(bench);
        bench.land_all();
        bench.catch_up();
        assert!(matches!(bench.writer.status(), Status::Owning));
        wait
    };
    let waits: Vec<_> = (0..7).map(|_| lose(&mut bench)).collect();
    assert_doubling(&waits, limits.yield_backoff, limits.yield_backoff_max);
    bench.pass(limits.yield_backoff_max);
    assert!(lose(&mut bench) <= limits.yield_backoff, "it had owned the partition for long");
}

#[test]
fn a_fatal_producer_is_replaced_before_the_next_claim() {
    let mut bench = Bench::owning();
    let request = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let stamp = bench.produced.remove(0).stamp;
    bench.report_failure(stamp, |failure| failure.fatal = true);
    assert!(bench.has(|output| matches!(output, Output::FreshProducer)));
    bench.catch_up();
    bench.pass(Duration::from_secs(60));
    assert!(bench.produced.is_empty(), "no claim through the broken producer");
    bench.give(Input::ProducerReady);
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(is_not_appended(&bench.answer(request)));
    assert!(matches!(bench.writer.status(), Status::Owning));
}

#[test]
fn a_fresh_producer_means_a_new_claim_for_every_partition() {
    let mut bench = Bench::owning();
    bench.give(Input::ProducerReady);
    bench.claim_again();
    assert_eq!(bench.produced[0].stamp.claim.epoch, Epoch(2));
}

#[test]
fn a_log_begun_with_another_partition_count_halts() {
    let mut wrong = config();
    wrong.partitions = 2;
    let mut bench = Bench::new(wrong);
    bench.other_claims(1);
    bench.give(Input::Start(Checkpoint::default()));
    let request = bench.submit(exact(0), 1, 1);
    bench.catch_up();
    assert!(is_unavailable(&bench.answer(request), "repartitioned"));
    assert!(bench.produced.is_empty());
}

#[test]
fn a_malformed_record_halts_the_partition() {
    let mut bench = Bench::owning();
    let pending = bench.submit(exact(0), 1, 1);
    bench.load_empty();
    let content = Content::Malformed(crate::wire::Malformed::NewerFormat(2));
    bench.log.push(LogRecord { offset: Offset(1), content });
    bench.produced.clear();
    bench.catch_up();
    let halted = |output: &Output| matches!(output, Output::Halted(cause) if cause.to_string().contains("0:1 is malformed"));
    assert!(bench.has(halted));
    assert!(matches!(bench.answer(pending), Some(Err(AppendError::OutcomeUnknown { .. }))));
    let refused = bench.submit(exact(0), 2, 1);
    assert!(is_unavailable(&bench.answer(refused), "malformed"));
}

//! What the log says of forwarded commands (protocol, section 6).

use super::*;

impl Bench {
    fn mark(&mut self, mark: u64, wanted: bool) {
        let claim = self.writer.reader.fold().state().claim;
        self.give(Input::CommandsMark { claim, mark: Offset(mark), wanted });
    }

    fn settled(&self) -> Vec<u64> {
        let settled = self.out.iter().filter_map(|output| match output {
            Output::CommandsSettled(mark) => Some(mark.0),
            _ => None,
        });
        settled.collect()
    }
}

#[test]
fn the_next_commit_carries_the_mark_and_tells_it_once_it_is_proven() {
    let mut bench = Bench::owning();
    bench.mark(7, false);
    assert!(bench.produced.is_empty(), "nobody waits for it");
    bench.submit(exact(0), 1, 1);
    bench.load_empty();
    assert_eq!(bench.produced[0].stamp.commands_mark, Offset(7));
    bench.mark(7, true);
    assert_eq!(bench.kinds(), [("event", 1)], "what is in flight will say it");
    assert!(bench.settled().is_empty(), "nothing is proven");
    bench.settle();
    assert_eq!(bench.settled(), [7]);
}

#[test]
fn a_mark_that_somebody_waits_for_gets_a_barrier() {
    let mut bench = Bench::owning();
    bench.mark(3, true);
    assert_eq!(bench.kinds(), [("barrier", 1)]);
    bench.mark(5, true);
    assert_eq!(bench.kinds(), [("barrier", 1)], "one is in flight");
    bench.settle();
    assert_eq!(bench.settled(), [3]);
    bench.pass(WriterLimits::default().barrier_interval);
    assert_eq!(bench.kinds(), [("barrier", 2)]);
    bench.settle();
    assert_eq!(bench.settled(), [3, 5]);
}

#[test]
fn a_mark_found_under_an_older_claim_is_not_true_under_the_new_one() {
    let mut bench = Bench::owning();
    let old = bench.writer.reader.fold().state().claim;
    bench.give(Input::ProducerReady);
    bench.claim_again();
    bench.land_all();
    bench.catch_up();
    assert!(matches!(bench.writer.status(), Status::Owning));
    bench.give(Input::CommandsMark { claim: old, mark: Offset(9), wanted: true });
    bench.pass(Duration::from_secs(1));
    assert!(bench.produced.iter().all(|record| record.stamp.commands_mark == Offset(0)));
}

#[test]
fn a_new_owner_is_told_the_highest_accepted_mark() {
    let mut bench = Bench::new(config());
    let other = bench.other_claims(1);
    let stamp = |seq, mark| Stamp { claim: other, seq, commands_mark: Offset(mark) };
    bench.land(Record { stamp: stamp(1, 12), body: Body::Barrier });
    // After a hole: void, and so is what it says.
    bench.land(Record { stamp: stamp(3, 90), body: Body::Barrier });
    bench.give(Input::Start(Checkpoint::default()));
    bench.catch_up();
    bench.land_all();
    bench.catch_up();
    let told = |output: &Output| matches!(output, Output::Owned { commands_mark: Offset(12), .. });
    assert!(bench.has(told), "{:?}", bench.out);
}

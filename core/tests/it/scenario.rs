//! The scenario helper: what it accepts, what it refuses, and in which words.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};

use kafold_core::codec::Upcasters;
use kafold_core::scenario::scenario;
use kafold_core::{Aggregate, DomainEvent};

#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
#[event(upcasters = counter_upcasters)]
enum CounterEvent {
    #[event("counter.raised")]
    Raised { by: u32 },
    #[event("counter.measured")]
    Measured { value: f64 },
    #[event("counter.noted")]
    Noted(#[serde(skip_serializing)] String),
    #[event("counter.lowered")]
    Lowered { by: u32 },
    #[event("counter.moved")]
    Moved {
        #[serde(default = "one", skip_serializing_if = "is_zero")]
        by: u32,
    },
}
use CounterEvent::{Lowered, Measured, Moved, Noted, Raised};

fn counter_upcasters() -> Upcasters {
    Upcasters::none().renamed("counter.increased", 1, "counter.raised", 1)
}

fn one() -> u32 {
    1
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the counter may not pass {0}")]
struct TooHigh(u32);

/// Without `Debug`: neither a state nor a command needs it.
#[derive(Default, Clone)]
struct Counter(u32);

struct Raise(Vec<u32>);

impl Aggregate for Counter {
    const CATEGORY: &'static str = "counter";
    type Command = Raise;
    type Event = CounterEvent;
    type Error = TooHigh;

    fn decide(&self, Raise(steps): &Raise) -> Result<Vec<CounterEvent>, TooHigh> {
        match self.0 + steps.iter().sum::<u32>() {
            0..=9 => Ok(steps.iter().map(|by| Raised { by: *by }).collect()),
            _ => Err(TooHigh(9)),
        }
    }

    fn evolve(&mut self, event: &CounterEvent) {
        if let Raised { by } = event {
            self.0 += by;
        }
    }
}

fn message(check: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(check)).expect_err("the check must not hold");
    *panic.downcast::<String>().expect("a formatted message")
}

#[test]
fn what_follows_is_compared_event_by_event() {
    let scenario = || scenario::<Counter>().given([Raised { by: 1 }]).given([Raised { by: 2 }]);
    scenario().when(Raise(vec![2, 4])).then([Raised { by: 2 }, Raised { by: 4 }]);
    scenario().when(Raise(vec![])).then_nothing().then_state(|counter| assert_eq!(counter.0, 3));
    scenario().when(Raise(vec![6])).then_state(|counter| assert_eq!(counter.0, 9));
    scenario().when(Raise(vec![7])).then_rejected(TooHigh(9));
}

#[test]
fn another_event_or_another_payload_is_noticed() {
    let outcome = || scenario::<Counter>().given([]).when(Raise(vec![1]));
    for other in [Raised { by: 2 }, Lowered { by: 1 }] {
        let shown =
            format!("given\n  nothing\nexpected\n  {other:?}\nactual\n  Raised {{ by: 1 }}");
        assert_eq!(message(|| drop(outcome().then([other]))), shown);
    }
}

#[test]
fn a_failure_shows_the_whole_scenario() {
    let outcome = |step| scenario::<Counter>().given([Raised { by: 5 }]).when(Raise(vec![step]));
    assert_eq!(
        message(|| drop(outcome(1).then([Raised { by: 1 }, Raised { by: 2 }]))),
        "given\n  Raised { by: 5 }\nexpected\n  Raised { by: 1 }\n  Raised { by: 2 }\n\
         actual\n  Raised { by: 1 }"
    );
    assert_eq!(
        message(|| drop(outcome(5).then_nothing())),
        "given\n  Raised { by: 5 }\nexpected\n  nothing\n\
         actual\n  rejected: the counter may not pass 9 (TooHigh(9))"
    );
    assert_eq!(
        message(|| drop(outcome(1).then_rejected(TooHigh(9)))),
        "given\n  Raised { by: 5 }\n\
         expected\n  rejected: the counter may not pass 9 (TooHigh(9))\n\
         actual\n  Raised { by: 1 }"
    );
    assert!(message(|| drop(outcome(5).then_rejected(TooHigh(8)))).contains("TooHigh(8)"));
    assert!(message(|| drop(outcome(5).then_state(|_| ()))).contains("actual\n  rejected"));
}

#[test]
fn an_event_that_cannot_be_read_back_fails_the_test_that_gives_it() {
    let given = |event| message(|| drop(scenario::<Counter>().given([event])));
    assert_eq!(
        given(Measured { value: f64::NAN }),
        "Measured { value: NaN } does not survive being stored: payload of counter.measured.v1: \
         invalid type: null, expected f64 at line 1 column 13; stored as {\"value\":null}"
    );
    assert!(given(Noted("lost".into())).contains("does not survive being stored"));
    assert_eq!(
        given(Moved { by: 0 }),
        "Moved { by: 0 } does not survive being stored: stored as {}, it is read as Moved { by: 1 }"
    );
    let expected =
        || scenario::<Counter>().when(Raise(vec![])).then([Measured { value: f64::INFINITY }]);
    assert!(message(|| drop(expected())).contains("does not survive"));
}

#[test]
fn stored_events_and_fixtures_are_read_through_the_upcasters() {
    let fixture = r#"
        {"position":"0:1","stream":"counter-a","version":1,"type":"counter.increased.v1","payload":{"by":2}}
        {"position":"0:2","stream":"counter-a","version":2,"type":"counter.raised.v1","payload":{"by":3}}
    "#;
    scenario::<Counter>()
        .given_stored("counter.increased.v1", r#"{"by":1}"#)
        .given_fixture(fixture)
        .when(Raise(vec![4]))
        .then_rejected(TooHigh(9));
    scenario::<Counter>().given_fixture(fixture).when(Raise(vec![4])).then([Raised { by: 4 }]);
    let refused = |given: &dyn Fn()| {
        let panic = catch_unwind(AssertUnwindSafe(given)).expect_err("is refused");
        panic.downcast_ref::<String>().expect("a message").clone()
    };
    let unversioned = refused(&|| drop(scenario::<Counter>().given_stored("counter.x", "{}")));
    assert!(unversioned.contains("has no version"), "{unversioned}");
    let unknown = refused(&|| drop(scenario::<Counter>().given_stored("counter.x.v1", "{}")));
    assert!(unknown.contains("counter.x.v1") && unknown.contains("cannot be read"), "{unknown}");
    let no_line = refused(&|| drop(scenario::<Counter>().given_fixture("no json")));
    assert!(no_line.contains("kafold log export"), "{no_line}");
    let two_streams = fixture.replacen("counter-a", "counter-b", 1);
    let two_streams = refused(&|| drop(scenario::<Counter>().given_fixture(&two_streams)));
    assert!(two_streams.contains("events of counter-b and of counter-a"), "{two_streams}");
    let empty = refused(&|| drop(scenario::<Counter>().given_fixture("\n")));
    assert!(empty.contains("no event"), "{empty}");
}

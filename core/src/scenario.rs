//! Given, when, then: the tests of a domain author.
//!
//! ```
//! # use kafold_core::{Aggregate, DomainEvent, scenario::scenario};
//! # use serde::{Deserialize, Serialize};
//! # #[derive(Debug, PartialEq, thiserror::Error)]
//! # #[error("the door is locked")]
//! # struct Locked;
//! # #[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
//! # enum DoorEvent {
//! #     #[event("door.opened")] Opened,
//! #     #[event("door.locked")] Locked { by: String },
//! # }
//! # #[derive(Default, Clone)]
//! # struct Door { is_locked: bool }
//! # struct Open;
//! # impl Aggregate for Door {
//! #     const CATEGORY: &'static str = "door";
//! #     type Command = Open;
//! #     type Event = DoorEvent;
//! #     type Error = Locked;
//! #     fn decide(&self, _: &Open) -> Result<Vec<DoorEvent>, Locked> {
//! #         if self.is_locked { Err(Locked) } else { Ok(vec![DoorEvent::Opened]) }
//! #     }
//! #     fn evolve(&mut self, event: &DoorEvent) {
//! #         self.is_locked = matches!(event, DoorEvent::Locked { .. });
//! #     }
//! # }
//! scenario::<Door>().given([]).when(Open).then([DoorEvent::Opened]);
//! scenario::<Door>()
//!     .given([DoorEvent::Locked { by: "Ada".into() }])
//!     .when(Open)
//!     .then_rejected(Locked);
//! ```
//!
//! Every event makes the way through its stored form and back, and states are built from what came
//! back, so that an event which cannot be stored fails the domain's own tests. Events are compared
//! by what is stored of them.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::aggregate::Aggregate;
use crate::codec::{decode, encode};
use crate::event::DomainEvent;

/// Begins with a stream that has no events.
#[must_use = "go on with `given` or `when`"]
pub fn scenario<A: Aggregate>() -> Scenario<A> {
    Scenario { state: A::default(), given: Vec::new() }
}

/// What has happened before the command.
#[derive(Debug, Clone)]
pub struct Scenario<A: Aggregate> {
    state: A,
    given: Vec<A::Event>,
}

impl<A: Aggregate> Scenario<A> {
    /// These events have happened, after those given before.
    #[must_use = "go on with `when`"]
    #[track_caller]
    pub fn given(mut self, events: impl IntoIterator<Item = A::Event>) -> Self {
        for event in events {
            self.state.evolve(&Stored::of(&event).event);
            self.given.push(event);
        }
        self
    }

    /// This event has happened, in the stored form that the log has: an older shape is lifted by the
    /// upcasters.
    #[must_use = "go on with `when`"]
    #[track_caller]
    pub fn given_stored(mut self, event_type: &str, payload: &str) -> Self {
        let version = event_type.rsplit_once(".v").map(|(_, version)| version.parse::<u32>());
        assert!(
            matches!(version, Some(Ok(_))),
            "{event_type:?} has no version: write it as recorded, such as \"order.placed.v1\""
        );
        let event: A::Event = decode(event_type, payload.as_bytes()).unwrap_or_else(|error| {
            panic!("{event_type} {payload} cannot be read: {error}");
        });
        self.state.evolve(&event);
        self.given.push(event);
        self
    }

    /// The events of a fixture have happened: lines of JSON as `kafold log export` prints them, of one
    /// stream.
    #[must_use = "go on with `when`"]
    #[track_caller]
    pub fn given_fixture(self, lines: &str) -> Self {
        let mut first = None;
        let events = lines.lines().filter(|line| !line.trim().is_empty());
        let scenario = events.fold(self, |scenario, line| {
            let exported: Exported<'_> = serde_json::from_str(line).unwrap_or_else(|error| {
                panic!("{line} is no line of `kafold log export`: {error}");
            });
            let stream = first.get_or_insert_with(|| exported.stream.clone());
            assert!(
                *stream == exported.stream,
                "the fixture has events of {stream} and of {}: export one stream",
                exported.stream
            );
            scenario.given_stored(&exported.event_type, exported.payload.get())
        });
        assert!(first.is_some(), "the fixture has no event: {lines:?}");
        scenario
    }

    /// Decides the command.
    #[must_use = "say what must follow, with one of the `then…`"]
    #[track_caller]
    #[expect(clippy::needless_pass_by_value, reason = "reads like the sentence it is")]
    pub fn when(self, command: A::Command) -> Outcome<A> {
        let Self { mut state, given } = self;
        let decided = state.decide(&command).map(|events| {
            let events: Vec<_> = events.iter().map(Stored::of).collect();
            events.iter().for_each(|stored| state.evolve(&stored.event));
            events
        });
        Outcome { state, given, decided }
    }
}

/// A line of a fixture.
#[derive(Deserialize)]
struct Exported<'l> {
    stream: String,
    #[serde(rename = "type")]
    event_type: String,
    #[serde(borrow)]
    payload: &'l RawValue,
}

/// What the command led to. Every check panics with the whole scenario when it does not hold.
pub struct Outcome<A: Aggregate> {
    state: A,
    given: Vec<A::Event>,
    decided: Result<Vec<Stored<A::Event>>, A::Error>,
}

impl<A: Aggregate> Outcome<A> {
    /// The command led to exactly these events, in this order.
    #[track_caller]
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> Self {
        let expected: Vec<_> = expected.into_iter().map(|event| Stored::of(&event)).collect();
        if !self.decided.as_ref().is_ok_and(|decided| *decided == expected) {
            self.fail(&Shown(&expected));
        }
        self
    }

    /// The command was accepted and changed nothing.
    #[track_caller]
    pub fn then_nothing(self) -> Self {
        self.then([])
    }

    /// The command was refused for this reason.
    #[track_caller]
    #[expect(clippy::needless_pass_by_value, reason = "reads like the sentence it is")]
    pub fn then_rejected(self, expected: A::Error) -> Self
    where
        A::Error: PartialEq,
    {
        if self.decided.as_ref().err() != Some(&expected) {
            self.fail(&rejection(&expected));
        }
        self
    }

    /// Hands the state after the decided events to `check`, which asserts what it wants. A command
    /// that was refused has no state after it.
    #[track_caller]
    pub fn then_state(self, check: impl FnOnce(&A)) -> Self {
        if self.decided.is_err() {
            self.fail(&"  any events");
        }
        check(&self.state);
        self
    }

    #[track_caller]
    fn fail(&self, expected: &dyn fmt::Display) -> ! {
        let given = Shown(&self.given);
        let actual: &dyn fmt::Display = match &self.decided {
            Ok(decided) => &Shown(decided),
            Err(error) => &rejection(error),
        };
        panic!("given\n{given}\nexpected\n{expected}\nactual\n{actual}");
    }
}

/// An event as it comes back from its stored form.
struct Stored<E> {
    event: E,
    payload: Value,
}

impl<E: DomainEvent> Stored<E> {
    #[track_caller]
    fn of(event: &E) -> Self {
        let event_type = event.event_type();
        let failed = |reason: &dyn fmt::Display| -> ! {
            panic!("{event:?} does not survive being stored: {reason}")
        };
        let bytes = encode(event).unwrap_or_else(|error| failed(&error));
        let back: E = decode(&event_type.to_string(), &bytes).unwrap_or_else(|error| {
            failed(&format!("{error}; stored as {}", String::from_utf8_lossy(&bytes)))
        });
        let payload = json(&bytes);
        let again = encode(&back).map(|bytes| json(&bytes));
        if back.event_type() != event_type || again.as_ref() != Ok(&payload) {
            failed(&format!("stored as {payload}, it is read as {back:?}"));
        }
        Self { event: back, payload }
    }
}

fn json(payload: &[u8]) -> Value {
    serde_json::from_slice(payload).expect("a payload is JSON")
}

impl<E: DomainEvent> PartialEq for Stored<E> {
    fn eq(&self, other: &Self) -> bool {
        self.event.type_index() == other.event.type_index() && self.payload == other.payload
    }
}

impl<E: fmt::Debug> fmt::Debug for Stored<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.event.fmt(f)
    }
}

/// Events, one a line.
struct Shown<'a, T>(&'a [T]);

impl<T: fmt::Debug> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.split_first() {
            None => f.write_str("  nothing"),
            Some((first, rest)) => {
                write!(f, "  {first:?}")?;
                rest.iter().try_for_each(|event| write!(f, "\n  {event:?}"))
            }
        }
    }
}

fn rejection(error: &impl std::error::Error) -> String {
    format!("  rejected: {error} ({error:?})")
}

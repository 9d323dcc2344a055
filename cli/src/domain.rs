//! The aggregates of a service, as far as commands need them: events in, a text of the state out.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};

use kafold::codec::{CodecError, decode};
use kafold::{Aggregate, RecordedEvent};

/// The state of one stream.
pub(crate) trait State: Send {
    /// Takes over what the next event says.
    fn apply(&mut self, event: &RecordedEvent) -> Result<(), CodecError>;

    /// The state for people, on several lines.
    fn show(&self) -> String;
}

impl<A: Aggregate + Debug> State for A {
    fn apply(&mut self, event: &RecordedEvent) -> Result<(), CodecError> {
        self.evolve(&decode(&event.event_type, &event.payload)?);
        Ok(())
    }

    fn show(&self) -> String {
        format!("{self:#?}")
    }
}

type Initial = fn() -> Box<dyn State>;

/// The aggregates by category; none in the program `kafold` itself.
#[derive(Default)]
pub(crate) struct Domain(BTreeMap<&'static str, Initial>);

impl Domain {
    pub(crate) fn add<A: Aggregate + Debug>(&mut self) {
        self.0.insert(A::CATEGORY, || Box::new(A::default()));
    }

    /// The state of a stream without events, if the category is known.
    pub(crate) fn initial(&self, category: &str) -> Option<Box<dyn State>> {
        self.0.get(category).map(|initial| initial())
    }
}

impl Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

//! The code of a service, as far as commands need it: aggregates, as events in and a text of the state
//! out, and read models.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::Arc;

use kafold::codec::{CodecError, decode};
use kafold::projections::ProjectionWorker;
use kafold::{Aggregate, Database, EventSource, RecordedEvent};

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

/// Makes the worker of a service's projections.
pub(crate) type MakeWorker = fn(Arc<dyn EventSource>, Database) -> ProjectionWorker;

/// What the program `kafold` itself has nothing of.
#[derive(Default)]
pub(crate) struct Domain {
    /// By category.
    aggregates: BTreeMap<&'static str, Initial>,
    pub(crate) worker: Option<MakeWorker>,
}

impl Domain {
    pub(crate) fn add<A: Aggregate + Debug>(&mut self) {
        self.aggregates.insert(A::CATEGORY, || Box::new(A::default()));
    }

    /// The state of a stream without events, if the category is known.
    pub(crate) fn initial(&self, category: &str) -> Option<Box<dyn State>> {
        self.aggregates.get(category).map(|initial| initial())
    }
}

impl Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.aggregates.keys()).finish()
    }
}

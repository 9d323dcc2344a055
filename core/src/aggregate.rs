//! The consistency boundary.

use crate::event::DomainEvent;
use crate::snapshot::SnapshotSchema;

/// One consistency boundary of the domain: commands become events, events become state.
///
/// Pure and synchronous: no clock, no store, no randomness. A decision may be taken again on a newer
/// state whenever another command was first, so it must depend on nothing but the state and the
/// command; what it needs from outside travels in the command. [`Default`] is the state of a stream
/// without events.
pub trait Aggregate: Default + Clone + Send + Sync + 'static {
    /// The category of its streams, `[a-z][a-z0-9_]*`. Default: that of its events, given by
    /// `#[event(category = "account")]`.
    const CATEGORY: &'static str = match Self::Event::CATEGORY {
        Some(category) => category,
        None => {
            panic!("an aggregate needs CATEGORY, unless its events have #[event(category = \"…\")]")
        }
    };
    /// What may be asked of it.
    type Command: Send + Sync + 'static;
    /// What can have happened to it.
    type Event: DomainEvent;
    /// Why it refuses: business rules, nothing technical.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The schema under which the state is saved, so that a long stream is not read from its beginning.
    /// Default: none, and the state is not saved.
    const SNAPSHOT: Option<SnapshotSchema<Self>> = None;

    /// The events that follow from the command, none if it changes nothing, or the broken rule.
    fn decide(&self, command: &Self::Command) -> Result<Vec<Self::Event>, Self::Error>;

    /// Takes over what an event says. It cannot fail: the event is a fact.
    ///
    /// Runs on decided events before they are appended: a command is refused when `evolve` panics on
    /// one of its events, and nothing is appended.
    fn evolve(&mut self, event: &Self::Event);
}

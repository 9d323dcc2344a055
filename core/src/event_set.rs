//! [`EventSet`]: the events that a read model reads, of one aggregate or of several.

use std::fmt;

use crate::codec::{self, CodecError};
use crate::event::{DomainEvent, EventType, RecordedEvent};

/// The events that a read model reads.
///
/// Each [`DomainEvent`] is one, with the events of one aggregate. `#[derive(EventSet)]` makes an enum the events of
/// several aggregates: each variant holds the events of one.
///
/// ```
/// # use kafold_core::{DomainEvent, EventSet};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
/// # #[event(category = "search")]
/// # enum SearchEvent { #[event("search.made")] Made }
/// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
/// # #[event(category = "member")]
/// # enum MemberEvent { #[event("member.acted")] Acted }
/// #[derive(Debug, Clone, EventSet)]
/// enum Activity {
///     Search(SearchEvent),
///     Member(MemberEvent),
/// }
/// ```
///
/// An event of the log belongs to the variant whose events have its category; events of other categories
/// pass the model by. Each enum of a set declares its [category](DomainEvent::CATEGORY), and no two have the same:
///
/// ```compile_fail,E0080
/// # use kafold_core::{DomainEvent, EventSet};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
/// # #[event(category = "search")]
/// # enum SearchEvent { #[event("search.made")] Made }
/// # #[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
/// # #[event(category = "search")]
/// # enum MemberEvent { #[event("member.acted")] Acted }
/// #[derive(Debug, Clone, EventSet)]
/// enum Activity {
///     Search(SearchEvent),
///     Member(MemberEvent), // has the category of SearchEvent
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a set of events",
    note = "derive DomainEvent on the events of one aggregate, or EventSet on an enum over the events of several"
)]
pub trait EventSet: Clone + fmt::Debug + Send + Sync + 'static {
    /// `true` for the events of one aggregate that declare no category. Their category is learned from the log.
    const LEARNS_CATEGORY: bool;

    /// Reads an event of the log.
    ///
    /// Returns an error for an event of the set's categories that has an unknown type or a newer version, or that
    /// is malformed.
    fn read(event: &RecordedEvent) -> Result<ReadEvent<Self>, CodecError>;

    /// Returns the category of an event type of the set. `None` if no category is declared, or for an unknown type.
    fn category_of(event_type: &str) -> Option<&'static str>;

    /// Returns the event's type.
    fn stored_type(&self) -> EventType;

    /// Returns the event as JSON, see [`codec::encode`].
    fn to_payload(&self) -> Result<Vec<u8>, CodecError>;
}

/// An event of the log, as an [`EventSet`] reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadEvent<E> {
    /// An event of the set.
    Event(E),
    /// An event of another category, or one that the set [ignores](DomainEvent::IGNORED).
    PassedBy,
    /// An event of an unknown type, for a set that [learns its category](EventSet::LEARNS_CATEGORY).
    Unknown,
}

impl<E> ReadEvent<E> {
    /// Converts an event of the set.
    pub fn map<T>(self, convert: impl FnOnce(E) -> T) -> ReadEvent<T> {
        match self {
            Self::Event(event) => ReadEvent::Event(convert(event)),
            Self::PassedBy => ReadEvent::PassedBy,
            Self::Unknown => ReadEvent::Unknown,
        }
    }
}

impl<E: DomainEvent> EventSet for E {
    const LEARNS_CATEGORY: bool = E::CATEGORY.is_none();

    fn read(event: &RecordedEvent) -> Result<ReadEvent<Self>, CodecError> {
        let is_other = E::CATEGORY.is_some_and(|category| category != event.stream.category());
        let is_ignored = || E::IGNORED.contains(&name(&event.event_type));
        if is_other || (!E::IGNORED.is_empty() && is_ignored()) {
            return Ok(ReadEvent::PassedBy);
        }
        match codec::decode(&event.event_type, &event.payload) {
            Err(CodecError::UnknownType { .. }) if Self::LEARNS_CATEGORY => Ok(ReadEvent::Unknown),
            decoded => decoded.map(ReadEvent::Event),
        }
    }

    fn category_of(event_type: &str) -> Option<&'static str> {
        let is_known = E::TYPES.iter().any(|known| known.name == name(event_type));
        E::CATEGORY.filter(|_| is_known)
    }

    fn stored_type(&self) -> EventType {
        self.event_type()
    }

    fn to_payload(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(self)
    }
}

/// Returns the name in the shown form of an [`EventType`].
fn name(event_type: &str) -> &str {
    event_type.rsplit_once(".v").map_or(event_type, |(name, _)| name)
}

/// Functions for `#[derive(EventSet)]`; not for use by hand.
#[doc(hidden)]
pub mod derived {
    /// Panics in the compiler for an enum without a category, and for two enums of one category.
    pub const fn check_categories(categories: &[Option<&str>]) {
        let mut left = categories;
        while let [category, others @ ..] = left {
            let Some(category) = category else {
                panic!(
                    "each enum of an EventSet declares its category: #[event(category = \"…\")]"
                );
            };
            let mut compared = others;
            while let [other, rest @ ..] = compared {
                if let Some(other) = other {
                    assert!(
                        !is_equal(category.as_bytes(), other.as_bytes()),
                        "two enums of an EventSet have the same category: join them into one enum"
                    );
                }
                compared = rest;
            }
            left = others;
        }
    }

    const fn is_equal(mut one: &[u8], mut other: &[u8]) -> bool {
        while let ([a, rest_of_one @ ..], [b, rest_of_other @ ..]) = (one, other) {
            if *a != *b {
                return false;
            }
            (one, other) = (rest_of_one, rest_of_other);
        }
        one.is_empty() && other.is_empty()
    }
}

//! Identifiers, versions and positions: newtypes, so that two integers cannot be swapped.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::clock::{IdGenerator, RandomIds};

/// The ordered events of one aggregate: a category and an id, shown `order-17`.
///
/// The category is `[a-z][a-z0-9_]*`, at most 50 bytes; the id is 1 to 200 bytes without control
/// characters and `/`. The text is split at the first `-`, so an id may contain more of them.
/// Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId {
    text: Arc<str>,
    category_bytes: u8,
}

/// Longest category, in bytes.
pub const CATEGORY_BYTES_MAX: usize = 50;
/// Longest id within a category, in bytes.
pub const STREAM_ID_BYTES_MAX: usize = 200;

/// Why a text is not a [`StreamId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStreamId {
    /// The category is empty, too long or has a character outside `[a-z0-9_]`.
    #[error("category {0:?} is not [a-z][a-z0-9_]* of at most {CATEGORY_BYTES_MAX} bytes")]
    Category(String),
    /// The id has no bytes or too many.
    #[error("an id has 1 to {STREAM_ID_BYTES_MAX} bytes, this one has {0}")]
    Length(usize),
    /// The id has a control character or a `/`.
    #[error("an id may not contain {0:?}")]
    Character(char),
    /// There is no `-` between category and id.
    #[error("{0:?} has no '-' between category and id")]
    NoSeparator(String),
}

impl StreamId {
    /// The stream `category-id`.
    pub fn new(category: &str, id: &str) -> Result<Self, InvalidStreamId> {
        let category_bytes = Self::check(category, id)?;
        Ok(Self { text: format!("{category}-{id}").into(), category_bytes })
    }

    /// The category's length, if both are valid.
    fn check(category: &str, id: &str) -> Result<u8, InvalidStreamId> {
        let first = category.bytes().next();
        let category_is_valid = first.is_some_and(|byte| byte.is_ascii_lowercase())
            && category.len() <= CATEGORY_BYTES_MAX
            && category
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if !category_is_valid {
            let shown = category.chars().take(CATEGORY_BYTES_MAX).collect();
            return Err(InvalidStreamId::Category(shown));
        }
        if id.is_empty() || id.len() > STREAM_ID_BYTES_MAX {
            return Err(InvalidStreamId::Length(id.len()));
        }
        if let Some(bad) = id.chars().find(|c| c.is_control() || *c == '/') {
            return Err(InvalidStreamId::Character(bad));
        }
        // At most CATEGORY_BYTES_MAX, checked above.
        Ok(category.len() as u8)
    }

    /// The part before the first `-`.
    pub fn category(&self) -> &str {
        &self.text[..usize::from(self.category_bytes)]
    }

    /// The part after the first `-`.
    pub fn id(&self) -> &str {
        &self.text[usize::from(self.category_bytes) + 1..]
    }

    /// The whole text, as it stands in the key of a record.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for StreamId {
    type Err = InvalidStreamId;

    fn from_str(text: &str) -> Result<Self, InvalidStreamId> {
        match text.split_once('-') {
            Some((category, id)) => {
                let category_bytes = Self::check(category, id)?;
                Ok(Self { text: text.into(), category_bytes })
            }
            None => {
                Err(InvalidStreamId::NoSeparator(text.chars().take(CATEGORY_BYTES_MAX).collect()))
            }
        }
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamId({})", self.text)
    }
}

/// How many events a stream has, which is also the version of its last event; an empty one has 0.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Version(pub u64);

impl Version {
    /// The version of a stream without events.
    pub const EMPTY: Self = Self(0);

    /// The version `events` later.
    #[must_use]
    pub const fn plus(self, events: u64) -> Self {
        Self(self.0 + events)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an append demands of the stream's version: the optimistic concurrency check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpectedVersion {
    /// Nothing: append behind whatever is there.
    Any,
    /// The stream has no event yet.
    NoStream,
    /// The stream has exactly this version.
    Exact(Version),
}

impl ExpectedVersion {
    /// Whether a stream at `version` satisfies the demand.
    pub fn admits(self, version: Version) -> bool {
        self.version().is_none_or(|expected| expected == version)
    }

    /// The one version demanded; `None` for [`ExpectedVersion::Any`].
    pub fn version(self) -> Option<Version> {
        match self {
            Self::Any => None,
            Self::NoStream => Some(Version::EMPTY),
            Self::Exact(version) => Some(version),
        }
    }
}

impl fmt::Display for ExpectedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::NoStream => f.write_str("no stream"),
            Self::Exact(version) => version.fmt(f),
        }
    }
}

/// Identifies a command for all its retries: sent twice, it is applied at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommandId(pub Uuid);

impl CommandId {
    /// Returns a new random id, a UUIDv7.
    #[expect(clippy::new_without_default, reason = "a default value is not random")]
    pub fn new() -> Self {
        Self(RandomIds.event_id())
    }

    /// Returns the same id for the same name: for commands derived from something with an identity of
    /// its own, such as a line of a file or an event of another stream.
    pub fn derived(namespace: Uuid, name: &[u8]) -> Self {
        Self(Uuid::new_v5(&namespace, name))
    }
}

impl fmt::Display for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One partition of a log, counted from 0.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Partition(pub u32);

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The place of a record in its partition.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Offset(pub u64);

impl Offset {
    /// The offset `records` later.
    #[must_use]
    pub const fn plus(self, records: u64) -> Self {
        Self(self.0 + records)
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where an event is in the log, shown `3:1042`; also the token for reading one's own writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// The partition.
    pub partition: Partition,
    /// The place within it.
    pub offset: Offset,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.partition, self.offset)
    }
}

/// A text that is not a [`Position`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a position: expected PARTITION:OFFSET, such as 3:1042")]
pub struct InvalidPosition(String);

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        let invalid = || InvalidPosition(text.chars().take(60).collect());
        let (partition, offset) = text.split_once(':').ok_or_else(invalid)?;
        // `parse` alone would take a leading '+'; a token is what Display wrote, to the letter.
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(partition) || !digits(offset) {
            return Err(invalid());
        }
        Ok(Self {
            partition: Partition(partition.parse().map_err(|_| invalid())?),
            offset: Offset(offset.parse().map_err(|_| invalid())?),
        })
    }
}

macro_rules! serde_as_text {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(StreamId, Position);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_id_is_split_at_the_first_dash() {
        let stream: StreamId = "order-2024-17".parse().expect("valid");
        assert_eq!((stream.category(), stream.id()), ("order", "2024-17"));
        assert_eq!(stream.to_string(), "order-2024-17");
    }

    #[test]
    fn stream_ids_that_could_not_be_keys_are_refused() {
        let id = |id: &str| StreamId::new("order", id).map(|stream| stream.to_string());
        assert_eq!(id(""), Err(InvalidStreamId::Length(0)));
        assert_eq!(id(&"x".repeat(201)), Err(InvalidStreamId::Length(201)));
        assert_eq!(id("a/b"), Err(InvalidStreamId::Character('/')));
        assert_eq!(id("a\nb"), Err(InvalidStreamId::Character('\n')));
        assert_eq!(id(&"x".repeat(200)).map(|text| text.len()), Ok(206));
        for category in ["", "Order", "1order", "or-der", "or der"] {
            let refused = StreamId::new(category, "1");
            assert!(matches!(refused, Err(InvalidStreamId::Category(_))), "{category:?}");
        }
    }

    #[test]
    fn a_position_reads_what_it_shows_and_nothing_else() {
        let position = Position { partition: Partition(3), offset: Offset(1042) };
        assert_eq!(position.to_string().parse(), Ok(position));
        for bad in ["", "3", "3:", ":1", "+3:1", "3:-1", "3:1:2", " 3:1", "4294967296:0"] {
            assert!(bad.parse::<Position>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_expected_version_admits_what_it_names() {
        assert!(ExpectedVersion::Any.admits(Version(7)));
        assert!(ExpectedVersion::NoStream.admits(Version::EMPTY));
        assert!(!ExpectedVersion::NoStream.admits(Version(1)));
        assert!(!ExpectedVersion::Exact(Version(6)).admits(Version(7)));
    }
}

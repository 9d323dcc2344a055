//! JSON payloads and upcasters.
//!
//! A payload holds the fields of an event's variant alone: a struct variant is an object of its
//! fields, a newtype variant its inner value, a tuple variant an array, a unit variant `{}`. Which
//! variant it is stands in the event's type name, so renaming the variant changes nothing stored;
//! renaming a field does.

use std::any::type_name;
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::ser::Error as _;
use serde::{Deserializer, Serialize};
use serde_json::Value;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};

use crate::event::{DomainEvent, Metadata, NewEvent, Recorded, RecordedEvent};
use fingerprint::{Fingerprint, fingerprint};
use variant::{Fields, Variant};

mod fingerprint;
mod reversed;
mod variant;

/// Why an event cannot become a payload, or a payload an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The program has no event of this name.
    #[error(
        "{events} has no event type {event_type}: a newer program wrote it (update this one), or \
         its variant was removed (keep it, or rename it in `upcasters`)"
    )]
    UnknownType {
        /// As recorded, such as `order.placed.v1`.
        event_type: String,
        /// The enum that was asked for.
        events: &'static str,
    },
    /// The program knows the event, but only in older shapes.
    #[error(
        "{event_type} was written by a newer program, this one knows up to v{known}: update it"
    )]
    NewerVersion {
        /// As recorded.
        event_type: String,
        /// The version of the variant in this program.
        known: u32,
    },
    /// The program knows the event in a newer shape only.
    #[error("{event_type} needs an upcaster to v{known}: add one in `upcasters` of {events}")]
    NoUpcaster {
        /// As recorded.
        event_type: String,
        /// The version of the variant in this program.
        known: u32,
        /// The enum that was asked for.
        events: &'static str,
    },
    /// The payload is not what the variant reads.
    #[error("payload of {event_type}: {reason}")]
    Malformed {
        /// As recorded.
        event_type: String,
        /// serde's own words, with line and column.
        reason: String,
    },
    /// An upcaster refused the payload.
    #[error("payload of {event_type}: the upcaster of {step} says: {reason}")]
    Upcast {
        /// As recorded.
        event_type: String,
        /// The type at which the upcaster stood.
        step: String,
        /// The upcaster's own words.
        reason: String,
    },
    /// The event has something that JSON or this codec cannot express.
    #[error("{event_type} cannot be stored: {reason}")]
    Unstorable {
        /// The type of the event.
        event_type: String,
        /// serde's own words.
        reason: String,
    },
    /// The upcasters contradict themselves or the enum; nothing is read or written until they do not.
    #[error("upcasters of {events}: {mistake}")]
    Upcasters {
        /// The enum they belong to.
        events: &'static str,
        /// What is wrong with them.
        mistake: String,
    },
}

/// serde_json reads nesting of this depth and none deeper, so nothing deeper is stored.
const DEPTH_MAX: usize = 127;

/// The payload of an event.
pub fn encode<E: DomainEvent>(event: &E) -> Result<Vec<u8>, CodecError> {
    // Most payloads fit; a longer one grows.
    let mut payload = Vec::with_capacity(256);
    let written = event.serialize(Fields(&mut serde_json::Serializer::new(&mut payload)));
    match written.and_then(|()| refuse_deep(&payload)) {
        Ok(()) => Ok(payload),
        Err(error) => Err(CodecError::Unstorable {
            event_type: event.event_type().to_string(),
            reason: error.to_string(),
        }),
    }
}

/// What can be written but not read again must not get into the log. Only a payload with enough
/// brackets can be too deep, so that nearly all of them are counted and not parsed.
fn refuse_deep(payload: &[u8]) -> Result<(), serde_json::Error> {
    let brackets = payload.iter().filter(|byte| matches!(byte, b'{' | b'[')).count();
    if brackets <= DEPTH_MAX { Ok(()) } else { serde_json::from_slice::<Value>(payload).map(drop) }
}

/// Returns the event to append, and the event that a reader of the log gets from it.
///
/// A decision, a fold and an answer must be the same before and after a restart, so everything in
/// this process goes on from the second one. Rejects an event which the log cannot give back:
/// numbers that are not finite, integers beyond 64 bits, shapes that serde writes and does not read,
/// values that change on the way. Costs one decoding and two passes over the event.
pub fn new_event<E: DomainEvent>(
    event: &E,
    metadata: Metadata,
) -> Result<(NewEvent, E), CodecError> {
    let event_type = E::codec().ready::<E>()?.names[event.type_index()].clone();
    let payload = encode(event)?;
    let read_back = read_back(event, &payload).map_err(|error| CodecError::Unstorable {
        event_type: event_type.to_string(),
        reason: error.to_string(),
    })?;
    Ok((NewEvent { event_type, payload: payload.into(), metadata }, read_back))
}

/// Decodes the payload. Rejects a payload whose event differs from the encoded event.
fn read_back<E: DomainEvent>(event: &E, payload: &[u8]) -> Result<E, serde_json::Error> {
    // Upcasters get a JSON value, which has no integers beyond 64 bits.
    let written = fingerprint::<false>(event)?;
    let read = |payload: &[u8]| {
        let mut json = serde_json::Deserializer::from_slice(payload);
        decode_variant::<E, _>(event.type_index(), &mut json).map_err(|error| unread(&error))
    };
    let is_same = |read: &E| Ok(fingerprint::<false>(read)? == written && read.is_same(event));
    let read_back = read(payload)?;
    if !is_same(&read_back)? {
        return Err(serde_json::Error::custom(CHANGES));
    }
    if written.needs_order {
        // The JSON value of upcasters does not keep the order of fields.
        let reversed = read(&reversed::fields(payload)?).and_then(|read| is_same(&read));
        match reversed {
            Ok(true) => {}
            // The fields of raw JSON were reversed, too.
            Ok(false) if written.is_raw => {}
            Ok(false) => return Err(unread_in_order(&serde_json::Error::custom(CHANGES))),
            Err(error) => return Err(unread_in_order(&error)),
        }
    }
    Ok(read_back)
}

fn unread(error: &serde_json::Error) -> serde_json::Error {
    serde_json::Error::custom(format!("it could not be read again: {error}"))
}

fn unread_in_order(error: &serde_json::Error) -> serde_json::Error {
    serde_json::Error::custom(format!(
        "with its fields in another order {error}. An enum with a tag and a content takes no integers of \
         128 bits, no raw JSON, and no maps whose keys are not texts"
    ))
}

const CHANGES: &str = "it would be read as another value: some of its fields change in JSON, such as \
                       Some(None), which becomes null, or an untagged enum of which an earlier variant \
                       fits";

/// Returns a value as JSON, or an error for a value that would be read back as another one.
pub(crate) fn to_json<T: Serialize + DeserializeOwned>(
    value: &T,
) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_vec(value)?;
    read_same(value, &json).map(|_| json)
}

/// Returns a value as the JSON text of a column. Rejects the character NUL, which PostgreSQL's JSONB
/// does not store.
pub(crate) fn to_column<T: Serialize>(value: &T) -> Result<String, serde_json::Error> {
    let mut json = Vec::with_capacity(128);
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Jsonb))?;
    String::from_utf8(json).map_err(serde_json::Error::custom)
}

/// Returns the value that is read from the JSON text of a column, or an error for a value that would
/// be read as another one.
pub(crate) fn read_from_column<T: Serialize + DeserializeOwned + PartialEq>(
    value: &T,
) -> Result<T, serde_json::Error> {
    let json = to_column(value)?;
    let (read, written) = read_same(value, json.as_bytes())?;
    if written.is_raw {
        return Err(serde_json::Error::custom(
            "PostgreSQL does not keep raw JSON as it is: use serde_json::Value",
        ));
    }
    if read != *value {
        return Err(serde_json::Error::custom(CHANGES));
    }
    if written.needs_order {
        // PostgreSQL's JSONB does not keep the order of fields.
        read_same(value, &reversed::fields(json.as_bytes())?)
            .map_err(|error| unread_in_order(&error))?;
    }
    Ok(read)
}

/// Returns the value that is read and its fingerprint.
fn read_same<T: Serialize + DeserializeOwned>(
    value: &T,
    json: &[u8],
) -> Result<(T, Fingerprint), serde_json::Error> {
    // Before the value is read: its error names a number that is not finite.
    let written = fingerprint::<true>(value)?;
    let read: T = serde_json::from_slice(json).map_err(|error| unread(&error))?;
    match fingerprint::<true>(&read)? == written {
        true => Ok((read, written)),
        false => Err(serde_json::Error::custom(CHANGES)),
    }
}

/// Writes JSON of which PostgreSQL's JSONB keeps every value. JSONB stores a number as `numeric`: `1e16`
/// would come back as an integer, and −0.0 as 0.0.
struct Jsonb;

impl Formatter for Jsonb {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        // From here on serde_json writes an exponent and no fraction.
        match value.abs() >= 1e16 {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f64(writer, value + 0.0),
        }
    }

    fn write_f32<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        match value.abs() >= 1e16 {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f32(writer, value + 0.0),
        }
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::AsciiControl(0) => Err(io::Error::other(
                "a text contains the character NUL, which PostgreSQL does not store",
            )),
            escape => CompactFormatter.write_char_escape(writer, escape),
        }
    }
}

/// Items for the code of `#[derive(DomainEvent)]`, not for use by hand.
#[doc(hidden)]
pub mod derived {
    /// Two values to compare by autoref specialization: a call of `is_same` takes the method of
    /// [`ByEquality`] where it exists, since the method of [`ByNothing`] needs one reference more.
    #[derive(Debug)]
    pub struct Pair<'a, T>(pub &'a T, pub &'a T);

    /// Compares values that have `PartialEq`.
    pub trait ByEquality {
        /// Returns `true` if both values are equal.
        fn is_same(&self) -> bool;
    }

    impl<T: PartialEq> ByEquality for Pair<'_, T> {
        fn is_same(&self) -> bool {
            self.0 == self.1
        }
    }

    /// Compares nothing.
    pub trait ByNothing {
        /// Returns `true`.
        fn is_same(&self) -> bool;
    }

    impl<T> ByNothing for &Pair<'_, T> {
        fn is_same(&self) -> bool {
            true
        }
    }
}

/// The event with this recorded type and payload, lifted by upcasters if its shape is an older one.
///
/// Missing and additional fields are treated as serde treats them.
pub fn decode<E: DomainEvent>(event_type: &str, payload: &[u8]) -> Result<E, CodecError> {
    let table = E::codec().ready::<E>()?;
    let malformed = |error: serde_json::Error| CodecError::Malformed {
        event_type: event_type.to_owned(),
        reason: error.to_string(),
    };
    if let Some(index) = table.names.iter().position(|name| **name == *event_type) {
        let mut json = serde_json::Deserializer::from_slice(payload);
        let event = decode_variant(index, &mut json).map_err(malformed)?;
        json.end().map_err(malformed)?;
        return Ok(event);
    }
    let shape = Shape::parse(event_type).ok_or_else(|| unknown::<E>(event_type))?;
    let first = table.upcasters.find(shape).ok_or_else(|| unreadable::<E>(shape))?;
    let old = serde_json::from_slice(payload).map_err(malformed)?;
    let (index, new) = table.upcast::<E>(event_type, first, old)?;
    decode_variant(index, new).map_err(malformed)
}

/// A recorded event with its payload decoded.
pub fn decode_recorded<E: DomainEvent>(event: &RecordedEvent) -> Result<Recorded<E>, CodecError> {
    Ok(event.with(decode(&event.event_type, &event.payload)?))
}

fn decode_variant<'de, E: DomainEvent, D: Deserializer<'de>>(
    index: usize,
    fields: D,
) -> Result<E, D::Error> {
    // An enum has fewer than 2³² variants.
    E::deserialize(Variant { index: index as u32, fields })
}

/// No upcaster starts at `shape` and no variant has it: why.
fn unreadable<E: DomainEvent>(shape: Shape<'_>) -> CodecError {
    let event_type = shape.to_string();
    let known = E::TYPES.iter().find(|known| known.name == shape.name);
    match known.map(|known| known.version) {
        None => unknown::<E>(&event_type),
        Some(known) if shape.version > known => CodecError::NewerVersion { event_type, known },
        Some(known) => CodecError::NoUpcaster { event_type, known, events: type_name::<E>() },
    }
}

fn unknown<E: DomainEvent>(event_type: &str) -> CodecError {
    CodecError::UnknownType { event_type: event_type.to_owned(), events: type_name::<E>() }
}

/// What the codec needs of one enum beside the enum itself, made once; the derive keeps it.
#[derive(Debug)]
pub struct Codec(Result<Table, String>);

#[derive(Debug)]
struct Table {
    /// The shown forms of [`DomainEvent::TYPES`], in that order.
    names: Box<[Arc<str>]>,
    upcasters: Upcasters,
}

impl Codec {
    /// The codec of one enum; what [`DomainEvent::codec`] keeps in a static.
    pub fn of<E: DomainEvent>() -> Self {
        let upcasters = E::upcasters();
        Self(match upcasters.mistake::<E>() {
            Some(mistake) => Err(mistake),
            None => {
                let names = E::TYPES.iter().map(|shown| shown.to_string().into()).collect();
                Ok(Table { names, upcasters })
            }
        })
    }

    fn ready<E>(&self) -> Result<&Table, CodecError> {
        self.0.as_ref().map_err(|mistake| CodecError::Upcasters {
            events: type_name::<E>(),
            mistake: mistake.clone(),
        })
    }
}

impl Table {
    /// Lifts an old payload step by step to a current variant's. It ends: [`Upcasters::mistake`]
    /// has followed every chain.
    fn upcast<E: DomainEvent>(
        &self,
        event_type: &str,
        first: &Upcaster,
        old: Value,
    ) -> Result<(usize, Value), CodecError> {
        let (mut step, mut value) = (first, old);
        loop {
            value = (step.lift)(value).map_err(|error| CodecError::Upcast {
                event_type: event_type.to_owned(),
                step: step.from.to_string(),
                reason: error.to_string(),
            })?;
            if let Some(index) = step.to.index_in::<E>() {
                return Ok((index, value));
            }
            step = self.upcasters.find(step.to).ok_or_else(|| unreadable::<E>(step.to))?;
        }
    }
}

/// A name and a version, which need not be a variant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape<'a> {
    name: &'a str,
    version: u32,
}

impl<'a> Shape<'a> {
    fn parse(event_type: &'a str) -> Option<Self> {
        let (name, version) = event_type.rsplit_once(".v")?;
        // `parse` alone would take a leading '+'.
        let digits = version.bytes().all(|byte| byte.is_ascii_digit());
        let version = version.parse().ok().filter(|_| digits)?;
        Some(Self { name, version })
    }

    fn index_in<E: DomainEvent>(self) -> Option<usize> {
        let is_self = |known: &crate::event::EventType| {
            known.name == self.name && known.version == self.version
        };
        E::TYPES.iter().position(is_self)
    }
}

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.v{}", self.name, self.version)
    }
}

type Lift = dyn Fn(Value) -> Result<Value, Box<dyn Error + Send + Sync>> + Send + Sync;

struct Upcaster {
    from: Shape<'static>,
    to: Shape<'static>,
    lift: Box<Lift>,
}

/// How payloads of older versions become payloads of the current one.
///
/// Each entry lifts one version of one event to the next, and entries apply one after another, so
/// an entry is written once and never touched again. They work on [`serde_json::Value`], and only
/// events of an older shape meet them.
///
/// ```
/// # use kafold_core::codec::Upcasters;
/// fn upcasters() -> Upcasters {
///     Upcasters::none()
///         // Version 1 had whole euros.
///         .add("order.paid", 1, |mut json| {
///             let euros = json["amount"].as_u64().ok_or("amount is not a number")?;
///             json["amount_cents"] = (euros * 100).into();
///             Ok(json)
///         })
///         .renamed("order.created", 1, "order.placed", 1)
/// }
/// # assert!(format!("{:?}", upcasters()).contains("order.created.v1"));
/// ```
#[derive(Default)]
pub struct Upcasters(Vec<Upcaster>);

impl Upcasters {
    /// No event has had another shape.
    pub fn none() -> Self {
        Self::default()
    }

    /// Lifts payloads of `name` from version `from` to `from + 1`. The error of `lift` is told to
    /// whoever reads the event.
    #[must_use]
    pub fn add(
        mut self,
        name: &'static str,
        from: u32,
        lift: impl Fn(Value) -> Result<Value, Box<dyn Error + Send + Sync>> + Send + Sync + 'static,
    ) -> Self {
        let to = Shape { name, version: from.saturating_add(1) };
        self.0.push(Upcaster { from: Shape { name, version: from }, to, lift: Box::new(lift) });
        self
    }

    /// Version `old_version` of `old` is read as version `version` of `name`, payload unchanged.
    #[must_use]
    pub fn renamed(
        mut self,
        old: &'static str,
        old_version: u32,
        name: &'static str,
        version: u32,
    ) -> Self {
        let from = Shape { name: old, version: old_version };
        self.0.push(Upcaster { from, to: Shape { name, version }, lift: Box::new(Ok) });
        self
    }

    fn find(&self, from: Shape<'_>) -> Option<&Upcaster> {
        self.0.iter().find(|upcaster| upcaster.from == from)
    }

    /// The first entry that could not do what its author meant.
    fn mistake<E: DomainEvent>(&self) -> Option<String> {
        self.0.iter().enumerate().find_map(|(place, upcaster)| {
            let from = upcaster.from;
            if from.index_in::<E>().is_some() {
                return Some(format!("{from} is current and needs none: raise its version"));
            }
            if self.0[..place].iter().any(|earlier| earlier.from == from) {
                return Some(format!("two of them start at {from}"));
            }
            self.dead_end::<E>(upcaster)
        })
    }

    fn dead_end<E: DomainEvent>(&self, start: &Upcaster) -> Option<String> {
        let (from, mut to) = (start.from, start.to);
        // A chain without a circle has at most as many steps as there are entries.
        for _ in 0..self.0.len() {
            if to.index_in::<E>().is_some() {
                return None;
            }
            match self.find(to) {
                Some(next) => to = next.to,
                None => return Some(format!("{from} becomes {to}, which is no variant's type")),
            }
        }
        Some(format!("{from} turns in a circle"))
    }
}

impl fmt::Debug for Upcasters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.0.iter().map(|each| (each.from.to_string(), each.to.to_string())))
            .finish()
    }
}

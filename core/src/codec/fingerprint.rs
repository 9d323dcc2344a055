//! [`fingerprint`]: a hash over the structure which a value gives to serde. Equal values have equal
//! fingerprints, so a value that is read back from JSON can be compared without `PartialEq`.
//!
//! JSON itself loses differences: NaN and `Some(None)` become `null`. The fingerprint keeps them.
//! Elements of sequences and entries of maps count in any order, because a hash set or hash map that
//! is read back has another order.

use serde::ser::{
    Error as _, Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant,
    SerializeTuple, SerializeTupleStruct, SerializeTupleVariant, Serializer,
};
use serde_json::Error;
use twox_hash::XxHash3_64;

/// Returns the fingerprint of a value, or an error that names a number which JSON does not have. Only
/// `WIDE` values may have integers beyond 64 bits.
pub(super) fn fingerprint<const WIDE: bool>(
    value: &(impl Serialize + ?Sized),
) -> Result<Fingerprint, Error> {
    value.serialize(Hasher::<WIDE>)
}

/// The hash of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint {
    hash: u64,
    kind: Kind,
    /// `true` if the value has an integer type of 128 bits, a map whose keys are not texts, or raw JSON.
    /// serde does not read these after it has buffered them, and it buffers the content of an adjacently
    /// tagged enum if the content comes before the tag.
    pub(super) needs_order: bool,
    /// `true` if the value has raw JSON.
    pub(super) is_raw: bool,
}

impl Fingerprint {
    fn is_text(self) -> bool {
        matches!(self.kind, Kind::Text | Kind::Variant)
    }

    fn needing_order(self) -> Self {
        Self { needs_order: true, ..self }
    }
}

/// The name by which serde_json recognizes raw JSON.
const RAW: &str = "$serde_json::private::RawValue";

/// The kinds of values, which keep `None`, `()` and `0` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bool = 1,
    Signed,
    Unsigned,
    Wide,
    Float,
    Text,
    Bytes,
    None,
    Some,
    Unit,
    Sequence,
    Tuple,
    Map,
    Variant,
}

/// Mixes two hashes; the order matters (the finalizer of SplitMix64).
fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn of(kind: Kind, value: u64) -> Fingerprint {
    Fingerprint { hash: mix(kind as u64, value), kind, needs_order: false, is_raw: false }
}

fn text(text: &str) -> Fingerprint {
    of(Kind::Text, XxHash3_64::oneshot(text.as_bytes()))
}

/// Puts the name of a field before an error in the field.
fn named(name: &str, part: Result<Fingerprint, Error>) -> Result<Fingerprint, Error> {
    part.map_err(|error| Error::custom(format!("{name}: {error}")))
}

#[derive(Clone, Copy)]
struct Hasher<const WIDE: bool>;

/// The hashes of the parts of a value.
struct Parts<const WIDE: bool> {
    kind: Kind,
    hash: u64,
    /// The hash of a map's key, before its value.
    key: u64,
    count: u64,
    needs_order: bool,
    is_raw: bool,
}

impl<const WIDE: bool> Parts<WIDE> {
    fn new(kind: Kind) -> Self {
        Self { kind, hash: 0, key: 0, count: 0, needs_order: false, is_raw: false }
    }

    fn variant(index: u32) -> Self {
        Self { hash: mix(u64::from(index), 1), ..Self::new(Kind::Variant) }
    }

    fn ordered(&mut self, part: Fingerprint) {
        self.hash = mix(self.hash, part.hash);
        self.add(part);
    }

    fn unordered(&mut self, part: Fingerprint) {
        self.hash = self.hash.wrapping_add(mix(part.hash, 2));
        self.add(part);
    }

    fn add(&mut self, part: Fingerprint) {
        self.count += 1;
        self.needs_order |= part.needs_order;
        self.is_raw |= part.is_raw;
    }

    /// Adds an entry of a map whose key has this hash.
    fn entry(&mut self, key: u64, value: Fingerprint) {
        self.unordered(Fingerprint { hash: mix(key, value.hash), ..value });
    }

    fn finish(self) -> Fingerprint {
        let Self { needs_order, is_raw, .. } = self;
        Fingerprint { needs_order, is_raw, ..of(self.kind, mix(self.hash, self.count)) }
    }
}

impl<const WIDE: bool> Serializer for Hasher<WIDE> {
    type Ok = Fingerprint;
    type Error = Error;
    type SerializeSeq = Parts<WIDE>;
    type SerializeTuple = Parts<WIDE>;
    type SerializeTupleStruct = Parts<WIDE>;
    type SerializeTupleVariant = Parts<WIDE>;
    type SerializeMap = Parts<WIDE>;
    type SerializeStruct = Parts<WIDE>;
    type SerializeStructVariant = Parts<WIDE>;

    fn serialize_bool(self, value: bool) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Bool, u64::from(value)))
    }

    fn serialize_i8(self, value: i8) -> Result<Fingerprint, Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i16(self, value: i16) -> Result<Fingerprint, Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i32(self, value: i32) -> Result<Fingerprint, Error> {
        self.serialize_i64(value.into())
    }

    fn serialize_i64(self, value: i64) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Signed, value as u64))
    }

    fn serialize_i128(self, value: i128) -> Result<Fingerprint, Error> {
        let part = match (i64::try_from(value), u64::try_from(value)) {
            (Ok(value), _) => self.serialize_i64(value)?,
            (_, Ok(value)) => self.serialize_u64(value)?,
            _ if WIDE => of_wide(value as u128),
            _ => return Err(too_large(value)),
        };
        Ok(part.needing_order())
    }

    fn serialize_u8(self, value: u8) -> Result<Fingerprint, Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u16(self, value: u16) -> Result<Fingerprint, Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<Fingerprint, Error> {
        self.serialize_u64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Unsigned, value))
    }

    fn serialize_u128(self, value: u128) -> Result<Fingerprint, Error> {
        let part = match u64::try_from(value) {
            Ok(value) => self.serialize_u64(value)?,
            Err(_) if WIDE => of_wide(value),
            Err(_) => return Err(too_large(value)),
        };
        Ok(part.needing_order())
    }

    fn serialize_f32(self, value: f32) -> Result<Fingerprint, Error> {
        self.serialize_f64(value.into())
    }

    fn serialize_f64(self, value: f64) -> Result<Fingerprint, Error> {
        match value.is_finite() {
            // Columns do not keep the sign of 0.0.
            true => Ok(of(Kind::Float, (value + 0.0).to_bits())),
            false => Err(Error::custom(format!(
                "{value} is a number that JSON does not have: use an Option, or a value of your own"
            ))),
        }
    }

    fn serialize_char(self, value: char) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Text, u64::from(u32::from(value))))
    }

    fn serialize_str(self, value: &str) -> Result<Fingerprint, Error> {
        Ok(text(value))
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Bytes, XxHash3_64::oneshot(value)))
    }

    fn serialize_none(self) -> Result<Fingerprint, Error> {
        Ok(of(Kind::None, 0))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Fingerprint, Error> {
        let mut parts = Parts::<WIDE>::new(Kind::Some);
        parts.ordered(value.serialize(self)?);
        Ok(parts.finish())
    }

    fn serialize_unit(self) -> Result<Fingerprint, Error> {
        Ok(of(Kind::Unit, 0))
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<Fingerprint, Error> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
    ) -> Result<Fingerprint, Error> {
        Ok(Parts::<WIDE>::variant(index).finish())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<Fingerprint, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        value: &T,
    ) -> Result<Fingerprint, Error> {
        let mut parts = Parts::<WIDE>::variant(index);
        parts.ordered(value.serialize(self)?);
        Ok(parts.finish())
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::new(Kind::Sequence))
    }

    fn serialize_tuple(self, _: usize) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::new(Kind::Tuple))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::new(Kind::Tuple))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::variant(index))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::new(Kind::Map))
    }

    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Parts<WIDE>, Error> {
        let is_raw = name == RAW;
        Ok(Parts { needs_order: is_raw, is_raw, ..Parts::new(Kind::Map) })
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Parts<WIDE>, Error> {
        Ok(Parts::variant(index))
    }
}

fn of_wide(value: u128) -> Fingerprint {
    of(Kind::Wide, mix(value as u64, (value >> 64) as u64))
}

fn too_large(value: impl std::fmt::Display) -> Error {
    Error::custom(format!(
        "{value} needs more than 64 bits, which upcasters and other readers of JSON lose: store a text"
    ))
}

impl<const WIDE: bool> SerializeSeq for Parts<WIDE> {
    type Ok = Fingerprint;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        let part = value.serialize(Hasher::<WIDE>)?;
        self.unordered(part);
        Ok(())
    }

    fn end(self) -> Result<Fingerprint, Error> {
        Ok(self.finish())
    }
}

impl<const WIDE: bool> SerializeTuple for Parts<WIDE> {
    type Ok = Fingerprint;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        let part = value.serialize(Hasher::<WIDE>)?;
        self.ordered(part);
        Ok(())
    }

    fn end(self) -> Result<Fingerprint, Error> {
        Ok(self.finish())
    }
}

macro_rules! tuples {
    ($($name:ident)*) => {$(
        impl<const WIDE: bool> $name for Parts<WIDE> {
            type Ok = Fingerprint;
            type Error = Error;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
                SerializeTuple::serialize_element(self, value)
            }

            fn end(self) -> Result<Fingerprint, Error> {
                Ok(self.finish())
            }
        }
    )*};
}

tuples!(SerializeTupleStruct SerializeTupleVariant);

impl<const WIDE: bool> SerializeMap for Parts<WIDE> {
    type Ok = Fingerprint;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        let key = key.serialize(Hasher::<WIDE>)?;
        self.key = key.hash;
        self.needs_order |= !key.is_text();
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.entry(self.key, value.serialize(Hasher::<WIDE>)?);
        Ok(())
    }

    /// Names the key in an error, as of a field which serde flattens into a map.
    fn serialize_entry<K: Serialize + ?Sized, V: Serialize + ?Sized>(
        &mut self,
        key: &K,
        value: &V,
    ) -> Result<(), Error> {
        self.serialize_key(key)?;
        self.serialize_value(value).map_err(|error| {
            let name = serde_json::to_string(key).unwrap_or_default();
            Error::custom(format!("{}: {error}", name.trim_matches('"')))
        })
    }

    fn end(self) -> Result<Fingerprint, Error> {
        Ok(self.finish())
    }
}

macro_rules! structs {
    ($($name:ident)*) => {$(
        impl<const WIDE: bool> $name for Parts<WIDE> {
            type Ok = Fingerprint;
            type Error = Error;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                key: &'static str,
                value: &T,
            ) -> Result<(), Error> {
                let value = named(key, value.serialize(Hasher::<WIDE>))?;
                self.entry(text(key).hash, value);
                Ok(())
            }

            fn end(self) -> Result<Fingerprint, Error> {
                Ok(self.finish())
            }
        }
    )*};
}

structs!(SerializeStruct SerializeStructVariant);

//! A read model's row as named columns, the same on every database.

mod key;
mod merge;

use std::fmt;
use std::marker::PhantomData;

use chrono::{DateTime, Datelike, NaiveDate, Utc};
use uuid::Uuid;

pub use key::{KeyPrefix, RowKey};
pub use merge::{Merge, MergeRole, Ordered, Summable};

/// One row of a read model. Derive it: `#[derive(Row)]` on a struct, with `#[row(key)]` on its key
/// field and `#[row(index)]` on fields that are searched by. Several fields with `#[row(key)]` are one key of
/// several columns, in the order of the fields. `#[row(stream)]` on a key of type `String` makes
/// the rows those of streams: the key is the id of the stream.
pub trait Row: Clone + PartialEq + Send + Sync + 'static {
    /// The type of the key field, or a tuple of the types of the key fields.
    type Key: RowKey;

    /// The columns, in the order of the fields.
    const COLUMNS: &'static [Column];

    /// Returns the key from the id of a stream, if the key is `#[row(stream)]`.
    const STREAM_KEY: Option<fn(&str) -> Self::Key> = None;

    /// Returns the values of the key columns.
    fn key(&self) -> Self::Key;

    /// Returns the row as the database gives it back, see [`ColumnValue::normalize`]. A value with
    /// `#[row(json)]` becomes the value that is read from its JSON.
    ///
    /// Rejects a row that a column or an index cannot hold, see also [`INDEXED_TEXT_BYTES_MAX`], and
    /// a value that would be read from its JSON as another one.
    fn normalize(self) -> Result<Self, InvalidValue>;

    /// Returns the values of a [normalized](Row::normalize) row, in the order of [`Row::COLUMNS`].
    /// Rejects a value with `#[row(json)]` that cannot be written as JSON.
    fn into_values(self) -> Result<Vec<Value>, InvalidValue>;

    /// The row with these values, in the order of [`Row::COLUMNS`].
    fn from_values(values: Vec<Value>) -> Result<Self, InvalidValue>;
}

/// One column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// The field's name.
    pub name: &'static str,
    /// What it holds.
    pub kind: ColumnKind,
    /// Whether it may be absent (`Option` fields).
    pub nullable: bool,
    /// Its part in finding rows.
    pub role: ColumnRole,
    /// Its part in merging rows: `#[row(sum)]`, `#[row(min)]` or `#[row(max)]`.
    pub merge: Option<MergeRole>,
}

/// A column by which rows are found: the key of one column, or a field with `#[row(index)]`. `V` is the type of
/// the field. A [`KeyPrefix`] finds rows by the first columns of a longer key.
///
/// `#[derive(Row)]` makes one for each such field, as an associated constant with the name of the field:
/// `Balance::account.eq("ada")` is a condition for the query of a read model. Another column or a value of
/// another type does not compile.
pub struct IndexedColumn<R, V> {
    column: &'static Column,
    of: PhantomData<fn() -> (R, V)>,
}

impl<R: Row, V> IndexedColumn<R, V> {
    /// Returns the column at this place of [`Row::COLUMNS`].
    #[doc(hidden)]
    pub const fn at(place: usize) -> Self {
        Self { column: &R::COLUMNS[place], of: PhantomData }
    }
}

impl<R, V> IndexedColumn<R, V> {
    /// Returns the column.
    pub const fn column(&self) -> &'static Column {
        self.column
    }
}

impl<R: Row, V: ColumnValue> IndexedColumn<R, V> {
    /// Returns the condition that the column has this value. No row meets a condition with `None`, or with
    /// a value that no column holds.
    pub fn eq(self, value: impl Into<V>) -> Condition<R> {
        let value = value.into().normalize().ok().map(ColumnValue::into_value);
        Condition { column: self.column, value, of: PhantomData }
    }
}

/// A condition on the rows of a read model.
pub struct Condition<R> {
    /// The column.
    pub column: &'static Column,
    /// The value of the column; `None` if no row has it.
    pub value: Option<Value>,
    of: PhantomData<fn() -> R>,
}

impl<R> fmt::Debug for Condition<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Condition")
            .field("column", &self.column.name)
            .field("value", &self.value)
            .finish()
    }
}

/// What a column holds; the database's own type follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnKind {
    /// `bool`
    Boolean,
    /// Integers of at most 64 bits with sign.
    Integer,
    /// `f64`
    Real,
    /// `String`
    Text,
    /// `NaiveDate`
    Date,
    /// `DateTime<Utc>`, with microseconds.
    Timestamp,
    /// `Uuid`
    Uuid,
    /// Anything else with serde, by `#[row(json)]`.
    Json,
}

impl fmt::Display for ColumnKind {
    /// Writes a name stored in the fingerprints of read models: a changed name means another table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boolean => "boolean",
            Self::Integer => "integer",
            Self::Real => "real",
            Self::Text => "text",
            Self::Date => "date",
            Self::Timestamp => "timestamp",
            Self::Uuid => "uuid",
            Self::Json => "json",
        })
    }
}

/// A column's part in finding rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnRole {
    /// Identifies the row, alone or with other columns.
    Key,
    /// Searched by.
    Index,
    /// Neither.
    Plain,
}

/// A value of a column.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Absent.
    Null,
    /// [`ColumnKind::Boolean`]
    Boolean(bool),
    /// [`ColumnKind::Integer`]
    Integer(i64),
    /// [`ColumnKind::Real`]
    Real(f64),
    /// [`ColumnKind::Text`]
    Text(String),
    /// [`ColumnKind::Date`]
    Date(NaiveDate),
    /// [`ColumnKind::Timestamp`]
    Timestamp(DateTime<Utc>),
    /// [`ColumnKind::Uuid`]
    Uuid(Uuid),
    /// [`ColumnKind::Json`], as text.
    Json(String),
}

/// Longest text of a column with `#[row(index)]` together with a text key, in bytes. PostgreSQL takes
/// 2704 bytes for an entry of a B-tree, its header included. The limit holds on both databases.
pub const INDEXED_TEXT_BYTES_MAX: usize = 2_600;

/// Longest part of a text in an error, in characters.
const SHOWN_CHARS_MAX: usize = 60;

/// Other years do not sort as text, which dates and timestamps are on SQLite.
fn has_four_digits(year: i32) -> bool {
    (0..=9999).contains(&year)
}

fn out_of_years(time: &impl fmt::Display) -> String {
    format!("{time} is outside the years 0 to 9999")
}

/// Returns a text in quotes, escaped, and cut when it is long.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        None => format!("the text {text:?}"),
        Some((end, _)) => format!("the text {:?}… of {} bytes", &text[..end], text.len()),
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Boolean(value) => write!(f, "boolean {value}"),
            Self::Integer(value) => write!(f, "integer {value}"),
            Self::Real(value) => write!(f, "real {value}"),
            Self::Text(value) => write!(f, "text {value:?}"),
            Self::Date(value) => write!(f, "date {value}"),
            Self::Timestamp(value) => write!(f, "timestamp {value}"),
            Self::Uuid(value) => write!(f, "uuid {value}"),
            Self::Json(value) => write!(f, "json {value}"),
        }
    }
}

/// A value that a field cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: {reason}")]
pub struct InvalidValue {
    /// The column.
    pub column: &'static str,
    /// What is wrong with the value.
    pub reason: String,
}

/// A Rust type that is a column's value.
///
/// NULL cannot tell `Some(None)` from `None`, so an `Option` of an `Option` does not compile:
///
/// ```compile_fail,E0080
/// #[derive(Clone, PartialEq, kafold_core::Row)]
/// struct Sales {
///     #[row(key)]
///     day: String,
///     discount: Option<Option<i64>>,
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a column's type",
    label = "cannot be stored as a column",
    note = "columns are i64, i32, i16, u32, u16, u8, bool, f64, String, NaiveDate, DateTime<Utc>, Uuid \
            and Options of them; mark any other type that has serde with #[row(json)]",
    note = "databases have no integers above i64::MAX: u64 and usize are no columns"
)]
pub trait ColumnValue: Sized {
    /// What the column holds.
    const KIND: ColumnKind;
    /// Whether the value may be absent.
    const NULLABLE: bool = false;

    /// Returns the value that a column gives back, the same on every database: timestamps have
    /// microseconds, leap seconds become the next second, and −0.0 becomes 0.0.
    ///
    /// Rejects a value that some database cannot hold: a real number that is not finite, a text with
    /// the character NUL, a date or timestamp outside the years 0 to 9999.
    fn normalize(self) -> Result<Self, String>;

    /// Returns the text of a column of [`ColumnKind::Text`], and `None` for other columns and for an
    /// absent value. An index entry has a limit for it.
    fn text(&self) -> Option<&str>;

    /// Returns the value of a column.
    fn into_value(self) -> Value;

    /// Reads the value of a column. The error names the reason.
    fn from_value(value: Value) -> Result<Self, String>;
}

macro_rules! column_value {
    ($($type:ty => $kind:ident, $normalize:expr, $text:expr;)*) => {$(
        impl ColumnValue for $type {
            const KIND: ColumnKind = ColumnKind::$kind;

            fn normalize(self) -> Result<Self, String> {
                $normalize(self)
            }

            fn text(&self) -> Option<&str> {
                $text(self)
            }

            fn into_value(self) -> Value {
                Value::$kind(self)
            }

            fn from_value(value: Value) -> Result<Self, String> {
                match value {
                    Value::$kind(inner) => Ok(inner),
                    other => Err(mismatch(Self::KIND, &other)),
                }
            }
        }
    )*};
}
column_value! {
    bool => Boolean, Ok, no_text;
    i64 => Integer, Ok, no_text;
    f64 => Real, normalize_real, no_text;
    String => Text, normalize_text, Some::<&str>;
    NaiveDate => Date, normalize_date, no_text;
    DateTime<Utc> => Timestamp, normalize_timestamp, no_text;
    Uuid => Uuid, Ok, no_text;
}

fn no_text<T>(_: &T) -> Option<&str> {
    None
}

fn normalize_real(real: f64) -> Result<f64, String> {
    if real.is_finite() { Ok(real + 0.0) } else { Err(format!("{real} is not a finite number")) }
}

fn normalize_text(text: String) -> Result<String, String> {
    if !text.as_bytes().contains(&0) {
        return Ok(text);
    }
    let text = shown(&text);
    Err(format!("{text} contains the character NUL, which PostgreSQL does not store"))
}

fn normalize_date(date: NaiveDate) -> Result<NaiveDate, String> {
    if has_four_digits(date.year()) { Ok(date) } else { Err(out_of_years(&date)) }
}

fn normalize_timestamp(at: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    let micros = DateTime::from_timestamp_micros(at.timestamp_micros());
    micros.filter(|micros| has_four_digits(micros.year())).ok_or_else(|| out_of_years(&at))
}

macro_rules! integer_value {
    ($($type:ty),*) => {$(
        impl ColumnValue for $type {
            const KIND: ColumnKind = ColumnKind::Integer;

            fn normalize(self) -> Result<Self, String> {
                Ok(self)
            }

            fn text(&self) -> Option<&str> {
                None
            }

            fn into_value(self) -> Value {
                Value::Integer(self.into())
            }

            fn from_value(value: Value) -> Result<Self, String> {
                match value {
                    Value::Integer(inner) => Self::try_from(inner).map_err(|error| format!("{inner}: {error}")),
                    other => Err(mismatch(Self::KIND, &other)),
                }
            }
        }
    )*};
}
integer_value!(u8, u16, u32, i16, i32);

impl<T: ColumnValue> ColumnValue for Option<T> {
    const KIND: ColumnKind = T::KIND;
    const NULLABLE: bool = {
        assert!(!T::NULLABLE, "NULL cannot tell Some(None) from None: use one Option");
        true
    };

    fn normalize(self) -> Result<Self, String> {
        self.map(T::normalize).transpose()
    }

    fn text(&self) -> Option<&str> {
        self.as_ref().and_then(T::text)
    }

    fn into_value(self) -> Value {
        self.map_or(Value::Null, T::into_value)
    }

    fn from_value(value: Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(None),
            present => T::from_value(present).map(Some),
        }
    }
}

fn mismatch(kind: ColumnKind, value: &Value) -> String {
    format!("expected {kind}, found {value}")
}

/// What `#[derive(Row)]` calls; not for use by hand.
#[doc(hidden)]
pub mod derived {
    use std::marker::PhantomData;
    use std::vec::IntoIter;

    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::{
        ColumnKind, INDEXED_TEXT_BYTES_MAX, InvalidValue, Row, Summable, Value, mismatch, shown,
    };
    use crate::codec;

    /// The values of one row, taken in the order of its columns.
    #[derive(Debug)]
    pub struct Values<R> {
        left: IntoIter<Value>,
        row: PhantomData<R>,
    }

    impl<R: Row> Values<R> {
        /// As many values as the row has columns.
        pub fn new(values: Vec<Value>) -> Result<Self, InvalidValue> {
            let (found, expected) = (values.len(), R::COLUMNS.len());
            if found != expected {
                let column = R::COLUMNS[found.min(expected - 1)].name;
                let reason = format!("the row has {expected} columns, found {found} values");
                return Err(InvalidValue { column, reason });
            }
            Ok(Self { left: values.into_iter(), row: PhantomData })
        }

        /// The next column's value.
        pub fn take<T>(
            &mut self,
            convert: impl FnOnce(Value) -> Result<T, String>,
        ) -> Result<T, InvalidValue> {
            let column = R::COLUMNS[R::COLUMNS.len() - self.left.len()].name;
            let value = self.left.next().expect("one for each column, counted in `new`");
            named(column, convert(value))
        }
    }

    /// Adds the name of the column to the reason for a refusal.
    pub fn named<T>(column: &'static str, result: Result<T, String>) -> Result<T, InvalidValue> {
        result.map_err(|reason| InvalidValue { column, reason })
    }

    /// Returns the value that is read from the JSON of a value. Rejects a value that becomes another
    /// one.
    pub fn normalize_json<T: Serialize + DeserializeOwned + PartialEq>(
        column: &'static str,
        value: &T,
    ) -> Result<T, InvalidValue> {
        named(column, codec::read_from_column(value).map_err(|error| error.to_string()))
    }

    /// Rejects an index entry with too much text. `entry` has the columns of the entry: one or several of the
    /// key, or an indexed column and the key.
    pub fn check_index_entry(entry: &[(&'static str, Option<&str>)]) -> Result<(), InvalidValue> {
        let texts = || entry.iter().filter_map(|(column, text)| Some((*column, (*text)?)));
        let bytes: usize = texts().map(|(_, text)| text.len()).sum();
        if bytes <= INDEXED_TEXT_BYTES_MAX {
            return Ok(());
        }
        let longest = texts().max_by_key(|(_, text)| text.len());
        let (column, text) = longest.expect("without a text there are no bytes");
        Err(InvalidValue { column, reason: too_long(text, bytes) })
    }

    fn too_long(text: &str, bytes: usize) -> String {
        format!(
            "{} makes an index entry of {bytes} bytes, of at most {INDEXED_TEXT_BYTES_MAX} (key and \
             indexed text together): index a hash of it",
            shown(text)
        )
    }

    /// Returns the sum of two values of a column. Panics if the column cannot hold the sum; a panic of a fold is
    /// a fault of its event.
    pub fn sum<T: Summable>(column: &'static str, one: T, other: T) -> T {
        one.sum(other).unwrap_or_else(|| panic!("column {column}: the sum is too large"))
    }

    /// Returns a value as JSON text.
    pub fn into_json<T: Serialize>(column: &'static str, value: &T) -> Result<Value, InvalidValue> {
        let text = codec::to_column(value).map_err(|error| error.to_string());
        named(column, text.map(Value::Json))
    }

    /// A value from JSON text.
    pub fn from_json<T: DeserializeOwned>(value: Value) -> Result<T, String> {
        match value {
            Value::Json(text) => serde_json::from_str(&text).map_err(|error| error.to_string()),
            other => Err(mismatch(ColumnKind::Json, &other)),
        }
    }
}

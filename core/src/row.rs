//! A read model's row as named columns, the same on every database.

use std::fmt;

use chrono::{DateTime, NaiveDate, Utc};
use uuid::Uuid;

/// One row of a read model. Derive it: `#[derive(Row)]` on a struct, with `#[row(key)]` on its key
/// field and `#[row(index)]` on fields that are searched by.
pub trait Row: Clone + PartialEq + Send + Sync + 'static {
    /// The type of the key field.
    type Key: ColumnValue + Clone + Eq + Ord + std::hash::Hash + Send + Sync + 'static;

    /// The columns, in the order of the fields. Exactly one is the key.
    const COLUMNS: &'static [Column];

    /// The value of the key column.
    fn key(&self) -> Self::Key;

    /// The values, in the order of [`Row::COLUMNS`].
    fn into_values(self) -> Vec<Value>;

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
}

/// What a column holds; the database's own type follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnKind {
    /// `bool`
    Boolean,
    /// Integers, 64 bits with sign.
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
    /// Identifies the row.
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
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a column's type",
    label = "cannot be stored as a column",
    note = "columns are integers of at most 64 bits, bool, f64, String, NaiveDate, DateTime<Utc>, \
            Uuid and Options of them; mark any other type that has serde with #[row(json)]"
)]
pub trait ColumnValue: Sized {
    /// What the column holds.
    const KIND: ColumnKind;
    /// Whether the value may be absent.
    const NULLABLE: bool = false;

    /// As a column's value. An integer above `i64::MAX` is stored as `i64::MAX`: bound amounts where
    /// the command is decided.
    fn into_value(self) -> Value;

    /// From a column's value; the error says what is wrong.
    fn from_value(value: Value) -> Result<Self, String>;
}

macro_rules! column_value {
    ($($type:ty => $kind:ident),*) => {$(
        impl ColumnValue for $type {
            const KIND: ColumnKind = ColumnKind::$kind;

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
column_value!(bool => Boolean, i64 => Integer, f64 => Real, String => Text, NaiveDate => Date, DateTime<Utc> => Timestamp, Uuid => Uuid);

macro_rules! integer_value {
    ($($type:ty),*) => {$(
        impl ColumnValue for $type {
            const KIND: ColumnKind = ColumnKind::Integer;

            fn into_value(self) -> Value {
                Value::Integer(i64::try_from(self).unwrap_or(i64::MAX))
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
integer_value!(u8, u16, u32, u64, i16, i32);

impl<T: ColumnValue> ColumnValue for Option<T> {
    const KIND: ColumnKind = T::KIND;
    const NULLABLE: bool = true;

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

    use super::{ColumnKind, InvalidValue, Row, Value, mismatch};

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
            convert(value).map_err(|reason| InvalidValue { column, reason })
        }
    }

    /// A value as JSON text. Panics when it has none, as `#[derive(Row)]` says.
    pub fn into_json<T: Serialize>(value: &T) -> Value {
        match serde_json::to_string(value) {
            Ok(text) => Value::Json(text),
            Err(error) => panic!("a #[row(json)] field has no JSON: {error}"),
        }
    }

    /// A value from JSON text.
    pub fn from_json<T: DeserializeOwned>(value: Value) -> Result<T, String> {
        match value {
            Value::Json(text) => serde_json::from_str(&text).map_err(|error| error.to_string()),
            other => Err(mismatch(ColumnKind::Json, &other)),
        }
    }
}

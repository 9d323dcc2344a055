//! A read model's row as named columns, the same on every database.

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
    format!("expected {kind:?}, found {value:?}")
}

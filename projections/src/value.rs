//! Values of columns in and out of the two databases.
//!
//! PostgreSQL has a type for each kind. SQLite has four: booleans are 0 and 1, and dates, timestamps
//! (UTC, six digits behind the second, `Z`), ids and JSON are text that sorts as its value does.

use chrono::{DateTime, NaiveDate, SecondsFormat, Utc};
use kafold_core::row::{Column, ColumnKind, Value};
use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgArguments, PgRow};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Arguments, Encode, Postgres, Row};
use uuid::Uuid;

use crate::copy::CopyRows;

/// What the bytes of a JSONB begin with.
const JSONB_VERSION: u8 = 1;

/// Binds the values of one column as one array.
pub(crate) fn add_array(
    arguments: &mut PgArguments,
    column: &Column,
    values: Vec<Value>,
) -> Result<(), sqlx::Error> {
    macro_rules! add {
        ($($kind:ident)|+: $type:ty) => {{
            let each = values.into_iter().map(|value| match value {
                Value::Null => Ok(None),
                $(Value::$kind(inner) => Ok(Some(inner)),)+
                other => Err(mismatch(column, &other)),
            });
            let array: Vec<Option<$type>> = each.collect::<Result<_, _>>()?;
            arguments.add(array)
        }};
    }
    let added = match column.kind {
        ColumnKind::Boolean => add!(Boolean: bool),
        ColumnKind::Integer => add!(Integer: i64),
        ColumnKind::Real => add!(Real: f64),
        ColumnKind::Text | ColumnKind::Json => add!(Text | Json: String),
        ColumnKind::Date => add!(Date: NaiveDate),
        ColumnKind::Timestamp => add!(Timestamp: DateTime<Utc>),
        ColumnKind::Uuid => add!(Uuid: Uuid),
    };
    added.map_err(sqlx::Error::Encode)
}

/// Adds one field of a row that goes by COPY.
pub(crate) fn copy_field(
    copy: &mut CopyRows<'_>,
    column: &Column,
    value: Value,
) -> Result<(), sqlx::Error> {
    match (column.kind, value) {
        (_, Value::Null) => copy.field(None::<bool>),
        (ColumnKind::Boolean, Value::Boolean(inner)) => copy.field(inner),
        (ColumnKind::Integer, Value::Integer(inner)) => copy.field(inner),
        (ColumnKind::Real, Value::Real(inner)) => copy.field(inner),
        (ColumnKind::Text, Value::Text(inner) | Value::Json(inner)) => copy.field(inner),
        (ColumnKind::Json, Value::Text(inner) | Value::Json(inner)) => copy.field(Jsonb(inner)),
        (ColumnKind::Date, Value::Date(inner)) => copy.field(inner),
        (ColumnKind::Timestamp, Value::Timestamp(inner)) => copy.field(inner),
        (ColumnKind::Uuid, Value::Uuid(inner)) => copy.field(inner),
        (_, other) => Err(mismatch(column, &other)),
    }
}

/// JSON as the bytes of a JSONB.
struct Jsonb(String);

impl Encode<'_, Postgres> for Jsonb {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buffer.push(JSONB_VERSION);
        Encode::<Postgres>::encode_by_ref(&self.0, buffer)
    }
}

/// Binds one value on PostgreSQL.
pub(crate) fn add_one(
    arguments: &mut PgArguments,
    column: &Column,
    value: Value,
) -> Result<(), sqlx::Error> {
    let added = match value {
        Value::Boolean(inner) => arguments.add(inner),
        Value::Integer(inner) => arguments.add(inner),
        Value::Real(inner) => arguments.add(inner),
        Value::Text(inner) => arguments.add(inner),
        Value::Date(inner) => arguments.add(inner),
        Value::Timestamp(inner) => arguments.add(inner),
        Value::Uuid(inner) => arguments.add(inner),
        other @ (Value::Null | Value::Json(_)) => return Err(mismatch(column, &other)),
    };
    added.map_err(sqlx::Error::Encode)
}

/// Binds one value on SQLite.
pub(crate) fn add_value(arguments: &mut SqliteArguments, value: Value) -> Result<(), sqlx::Error> {
    let added = match value {
        Value::Null => arguments.add(None::<i64>),
        Value::Boolean(inner) => arguments.add(i64::from(inner)),
        Value::Integer(inner) => arguments.add(inner),
        Value::Real(inner) => arguments.add(inner),
        Value::Text(inner) | Value::Json(inner) => arguments.add(inner),
        Value::Date(inner) => arguments.add(inner.to_string()),
        Value::Timestamp(inner) => {
            arguments.add(inner.to_rfc3339_opts(SecondsFormat::Micros, true))
        }
        Value::Uuid(inner) => arguments.add(inner.to_string()),
    };
    added.map_err(sqlx::Error::Encode)
}

/// The value at `index` of a row. JSON must have been selected as text.
pub(crate) fn from_postgres(
    row: &PgRow,
    index: usize,
    column: &Column,
) -> Result<Value, sqlx::Error> {
    macro_rules! get {
        ($kind:ident: $type:ty) => {
            row.try_get::<Option<$type>, _>(index)?.map_or(Value::Null, Value::$kind)
        };
    }
    Ok(match column.kind {
        ColumnKind::Boolean => get!(Boolean: bool),
        ColumnKind::Integer => get!(Integer: i64),
        ColumnKind::Real => get!(Real: f64),
        ColumnKind::Text => get!(Text: String),
        ColumnKind::Date => get!(Date: NaiveDate),
        ColumnKind::Timestamp => get!(Timestamp: DateTime<Utc>),
        ColumnKind::Uuid => get!(Uuid: Uuid),
        ColumnKind::Json => get!(Json: String),
    })
}

/// The value at `index` of a row.
pub(crate) fn from_sqlite(
    row: &SqliteRow,
    index: usize,
    column: &Column,
) -> Result<Value, sqlx::Error> {
    let integer = || row.try_get::<Option<i64>, _>(index);
    let text = || row.try_get::<Option<String>, _>(index);
    let value = match column.kind {
        ColumnKind::Boolean => integer()?.map(|bit| Value::Boolean(bit != 0)),
        ColumnKind::Integer => integer()?.map(Value::Integer),
        ColumnKind::Real => row.try_get::<Option<f64>, _>(index)?.map(Value::Real),
        ColumnKind::Text => text()?.map(Value::Text),
        ColumnKind::Json => text()?.map(Value::Json),
        ColumnKind::Date => parsed(column, text()?, Value::Date)?,
        ColumnKind::Timestamp => parsed(column, text()?, Value::Timestamp)?,
        ColumnKind::Uuid => parsed(column, text()?, Value::Uuid)?,
    };
    Ok(value.unwrap_or(Value::Null))
}

fn parsed<T>(
    column: &Column,
    text: Option<String>,
    value: impl FnOnce(T) -> Value,
) -> Result<Option<Value>, sqlx::Error>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let Some(text) = text else { return Ok(None) };
    match text.parse() {
        Ok(inner) => Ok(Some(value(inner))),
        Err(error) => {
            Err(sqlx::Error::ColumnDecode { index: column.name.to_owned(), source: error.into() })
        }
    }
}

fn mismatch(column: &Column, value: &Value) -> sqlx::Error {
    let Column { name, kind, .. } = column;
    sqlx::Error::Encode(format!("column {name} is {kind}, the value is {value}").into())
}

//! Rows as named columns.

use chrono::{DateTime, NaiveDate, Utc};
use kafold_core::Row;
use kafold_core::row::ColumnKind::{Boolean, Date, Integer, Json, Real, Text, Timestamp};
use kafold_core::row::ColumnRole::{Index, Key, Plain};
use kafold_core::row::{Column, InvalidValue, Merge, MergeRole, RowKey, Value};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Line {
    sku: String,
    quantity: u32,
}

#[derive(Debug, Clone, PartialEq, Row)]
struct OrderDetails {
    #[row(index)]
    customer: String,
    #[row(key)]
    order_id: Uuid,
    #[row(json)]
    lines: Vec<Line>,
    amount_cents: i64,
    weight: f64,
    paid: bool,
    #[row(index)]
    shipped_at: Option<DateTime<Utc>>,
    r#type: Option<i16>,
    #[row(json)]
    note: Option<String>,
    day: NaiveDate,
}

fn details(amount_cents: i64, note: Option<String>, lines: Vec<Line>) -> OrderDetails {
    OrderDetails {
        customer: "c1".into(),
        order_id: Uuid::from_u128(1),
        lines,
        amount_cents,
        weight: 1.5,
        paid: true,
        shipped_at: None,
        r#type: Some(-3),
        note,
        day: NaiveDate::from_ymd_opt(2024, 2, 29).expect("a date"),
    }
}

#[test]
fn every_field_is_a_column_of_its_name() {
    let column = |name, kind, nullable, role| Column { name, kind, nullable, role, merge: None };
    let expected = [
        column("customer", Text, false, Index),
        column("order_id", kafold_core::row::ColumnKind::Uuid, false, Key),
        column("lines", Json, false, Plain),
        column("amount_cents", Integer, false, Plain),
        column("weight", Real, false, Plain),
        column("paid", Boolean, false, Plain),
        column("shipped_at", Timestamp, true, Index),
        column("type", Integer, true, Plain),
        column("note", Json, false, Plain),
        column("day", Date, false, Plain),
    ];
    assert_eq!(OrderDetails::COLUMNS, expected);
    assert_eq!(details(1, None, vec![]).key(), Uuid::from_u128(1));
}

#[test]
fn values_stand_in_the_order_of_the_columns() {
    let lines = vec![Line { sku: "a".into(), quantity: 2 }];
    assert_eq!(
        details(25, None, lines).into_values().expect("stored"),
        [
            Value::Text("c1".into()),
            Value::Uuid(Uuid::from_u128(1)),
            Value::Json(r#"[{"sku":"a","quantity":2}]"#.into()),
            Value::Integer(25),
            Value::Real(1.5),
            Value::Boolean(true),
            Value::Null,
            Value::Integer(-3),
            Value::Json("null".into()),
            Value::Date(NaiveDate::from_ymd_opt(2024, 2, 29).expect("a date")),
        ]
    );
}

proptest! {
    #[test]
    fn a_row_comes_back_from_its_values(
        amount: i64,
        note: Option<String>,
        lines in proptest::collection::vec(any::<(String, u32)>(), 0..4),
    ) {
        let lines = lines.into_iter().map(|(sku, quantity)| Line { sku, quantity }).collect();
        let row = details(amount, note, lines);
        prop_assert_eq!(row.clone().normalize().and_then(Row::into_values).and_then(OrderDetails::from_values), Ok(row));
    }
}

#[test]
fn a_value_that_does_not_fit_names_its_column() {
    let refused = |place: usize, value: Value| {
        let mut values = details(1, None, vec![]).into_values().expect("stored");
        values[place] = value;
        OrderDetails::from_values(values).expect_err("refused").to_string()
    };
    assert_eq!(refused(0, Value::Null), "column customer: expected text, found null");
    assert_eq!(
        refused(2, Value::Text("[]".into())),
        "column lines: expected json, found text \"[]\""
    );
    assert!(refused(2, Value::Json("[".into())).starts_with("column lines: EOF while parsing"));
    assert!(refused(7, Value::Integer(1 << 20)).starts_with("column type: 1048576: "));
}

#[test]
fn a_row_has_as_many_values_as_columns() {
    let mut values = details(1, None, vec![]).into_values().expect("stored");
    let (last, missing) = (values.pop().expect("ten"), values.clone());
    let reason = "the row has 10 columns, found 9 values".to_owned();
    assert_eq!(OrderDetails::from_values(missing), Err(InvalidValue { column: "day", reason }));
    values.extend([last, Value::Null]);
    let reason = "the row has 10 columns, found 11 values".to_owned();
    assert_eq!(OrderDetails::from_values(values), Err(InvalidValue { column: "day", reason }));
}

/// Values at the edges of JSON, in a column.
#[derive(Debug, Clone, PartialEq, Row)]
struct Edges {
    #[row(key)]
    id: i64,
    at: Option<DateTime<Utc>>,
    real: f64,
    #[row(json)]
    json: EdgeJson,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct EdgeJson {
    real: f64,
    single: f32,
    untyped: serde_json::Value,
    twice: Option<Option<u32>>,
    content: Option<EdgeContent>,
}

/// JSONB keeps shorter names of fields first: the content comes before the tag.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "c")]
enum EdgeContent {
    Numbered(std::collections::BTreeMap<u32, bool>),
}

#[test]
fn a_stored_row_is_what_the_database_gives_back() {
    let at = "2016-12-31T23:59:60.123456789Z".parse().ok();
    let json = EdgeJson {
        real: -0.0,
        single: 1e17,
        untyped: serde_json::json!([1e16, -2e20, 1]),
        ..EdgeJson::default()
    };
    let row = Edges { id: 1, at, real: -0.0, json }.normalize().expect("storable");
    let values = row.clone().into_values().expect("storable");
    let next_second = "2017-01-01T00:00:00.123456Z".parse().expect("a time");
    assert_eq!(values[1], Value::Timestamp(next_second));
    let Value::Real(real) = values[2] else { panic!("{values:?}") };
    assert!(real.is_sign_positive());
    let json = r#"{"real":0.0,"single":99999998430674944.0,"untyped":[10000000000000000.0,-200000000000000000000.0,1],"twice":null,"content":null}"#;
    assert_eq!(values[3], Value::Json(json.into()));
    assert_eq!(Edges::from_values(values), Ok(row));
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Raw(Box<serde_json::value::RawValue>);

impl PartialEq for Raw {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

#[test]
fn raw_json_is_no_value_of_a_column() {
    #[derive(Debug, Clone, PartialEq, Row)]
    struct RawRow {
        #[row(key)]
        id: i64,
        #[row(json)]
        raw: Raw,
    }
    let raw = Raw(serde_json::value::RawValue::from_string("1e16".into()).expect("is JSON"));
    let refused = RawRow { id: 1, raw }.normalize().expect_err("JSONB makes an integer of it");
    assert!(refused.to_string().starts_with("column raw: PostgreSQL does not keep raw JSON"));
}

#[test]
fn a_row_that_no_database_holds_names_its_column() {
    let refused = |change: fn(&mut Edges)| {
        let mut row = Edges { id: 1, at: None, real: 1.0, json: EdgeJson::default() };
        change(&mut row);
        row.normalize().expect_err("refused").to_string()
    };
    assert_eq!(refused(|row| row.real = f64::NAN), "column real: NaN is not a finite number");
    let late = refused(|row| row.at = Some(DateTime::<Utc>::MAX_UTC));
    assert!(late.starts_with("column at: +262142-12-31"), "{late}");
    let infinite = refused(|row| row.json.real = f64::INFINITY);
    assert!(infinite.starts_with("column json: "), "{infinite}");
    let twice = refused(|row| row.json.twice = Some(None));
    assert!(twice.starts_with("column json: it would be read as another value"), "{twice}");
    let numbered = refused(|row| {
        row.json.content = Some(EdgeContent::Numbered([(1, true)].into_iter().collect()));
    });
    assert!(numbered.starts_with("column json: with its fields in another order"), "{numbered}");
    let infinite = refused(|row| row.json.real = f64::NAN);
    assert_eq!(
        infinite,
        "column json: real: NaN is a number that JSON does not have: use an Option, or a value of your own"
    );
    let nul = refused(|row| row.json.untyped = "\0".into());
    assert!(nul.starts_with("column json: a text contains the character NUL"), "{nul}");
}

/// A row with a key of two columns, which is added up.
#[derive(Debug, Clone, PartialEq, Row)]
struct DailySearches {
    #[row(key)]
    day: NaiveDate,
    #[row(sum)]
    searches: i64,
    #[row(min)]
    shortest: Option<String>,
    #[row(key)]
    user: String,
    #[row(max, index)]
    slowest: f64,
}

fn daily(searches: i64, shortest: Option<&str>, slowest: f64) -> DailySearches {
    let day = NaiveDate::from_ymd_opt(1997, 9, 16).expect("a date");
    let shortest = shortest.map(str::to_owned);
    DailySearches { day, searches, shortest, user: "u1".into(), slowest }
}

#[test]
fn a_key_of_several_columns_is_a_tuple_in_the_order_of_the_fields() {
    let (day, user): (NaiveDate, String) = daily(1, None, 0.0).key();
    assert_eq!((day.to_string().as_str(), user.as_str()), ("1997-09-16", "u1"));
    let mut columns = vec![Vec::new(); 2];
    (day, user).append_to(&mut columns);
    assert_eq!(columns, [vec![Value::Date(day)], vec![Value::Text("u1".into())]]);
    let invalid = (day, "\0".to_owned()).normalized().expect_err("PostgreSQL stores no NUL");
    assert_eq!(invalid.0, 1, "the second column: {}", invalid.1);
}

#[test]
fn merged_rows_add_up_by_the_roles_of_their_columns() {
    let merged = daily(2, Some("dvd"), 1.5).merge(daily(3, Some("car"), 0.5));
    assert_eq!(merged, daily(5, Some("car"), 1.5));
    assert_eq!(
        daily(2, None, -1.5).merge(daily(-3, Some("car"), -2.0)),
        daily(-1, Some("car"), -1.5)
    );
    let roles: Vec<_> = DailySearches::COLUMNS.iter().map(|column| column.merge).collect();
    let (sum, min, max) = (Some(MergeRole::Sum), Some(MergeRole::Min), Some(MergeRole::Max));
    assert_eq!(roles, [None, sum, min, None, max]);
}

proptest! {
    #[test]
    fn rows_are_merged_in_any_order_and_grouping(
        rows: [(i32, Option<String>, i32); 3],
    ) {
        let [one, two, three] = rows.map(|(searches, shortest, slowest)| {
            daily(searches.into(), shortest.as_deref(), slowest.into())
        });
        let expected = one.clone().merge(two.clone()).merge(three.clone());
        prop_assert_eq!(&three.clone().merge(one.clone()).merge(two.clone()), &expected);
        prop_assert_eq!(&one.merge(two.merge(three)), &expected);
    }
}

#[test]
#[should_panic(expected = "column searches: the sum is too large")]
fn a_sum_never_wraps() {
    let _ = daily(i64::MAX, None, 0.0).merge(daily(1, None, 0.0));
}

#[test]
fn the_texts_of_one_index_entry_have_a_common_limit() {
    #[derive(Debug, Clone, PartialEq, Row)]
    struct Pages {
        #[row(key)]
        host: String,
        #[row(key)]
        path: String,
        #[row(index)]
        title: String,
    }
    let page = |host, path, title| {
        let text = |length| "x".repeat(length);
        Pages { host: text(host), path: text(path), title: text(title) }.normalize()
    };
    assert!(page(1_000, 600, 1_000).is_ok());
    assert_eq!(page(1_000, 1_601, 0).expect_err("a long key").column, "path");
    assert_eq!(page(1_000, 600, 1_001).expect_err("a long index entry").column, "title");
}

//! Values at the edges of their types: a row gives back what its fold returned, the same on both
//! databases and in batches of any size, or its event is refused by name of column and value.

use crate::common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, NaiveDate, Utc};
use common::domain::Orders;
use common::{Dice, TestDatabase, stopped};
use kafold_core::row::INDEXED_TEXT_BYTES_MAX;
use kafold_core::store::ReadError;
use kafold_core::{DomainEvent, Recorded, Row};
use kafold_migrations::Database;
use kafold_projections::{FaultPolicy, ProjectionConfig, ProjectionWorker, Query, ReadModel};
use serde::{Deserialize, Serialize};

on_both!(
    an_error_with_any_text_is_parked,
    random_rows_come_back_or_their_events_are_refused,
    a_value_that_no_column_holds_is_a_fault_that_names_it,
    a_fold_does_not_depend_on_restarts_and_batches,
    a_text_of_the_greatest_length_is_indexed,
    a_key_that_no_column_holds_is_found_nowhere,
    an_unreadable_row_fails_itself_and_not_the_list,
    rows_of_another_definition_are_refused_by_queries,
);

const WAIT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
enum ProbeEvent {
    /// The bits of a real number, since an event has no NaN.
    #[event("probe.sent")]
    Sent { bits: u64, text: String, at: DateTime<Utc>, day: NaiveDate, number: i64, nested: bool },
}

#[derive(Debug, Clone, PartialEq, Row)]
struct Probe {
    #[row(key)]
    id: String,
    real: f64,
    maybe: Option<f64>,
    #[row(index)]
    text: String,
    at: DateTime<Utc>,
    #[row(index)]
    day: Option<NaiveDate>,
    number: i64,
    #[row(json)]
    nested: Nested,
    newer: i64,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Nested {
    real: f64,
    untyped: serde_json::Value,
    wide: u128,
    by_number: BTreeMap<i64, String>,
    internal: Option<Internal>,
    adjacent: Option<Adjacent>,
    untagged: Vec<Untagged>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Internal {
    Fields { a: Option<f64>, text: String },
    Empty,
}

/// JSONB has the shorter `c` before `kind`, and then serde does not read the keys of `Numbered`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "c")]
enum Adjacent {
    Text(String),
    Real(f64),
    Numbered(BTreeMap<i64, f64>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Whole(i64),
    Real(f64),
    Text(String),
    Pair(u8, Option<f32>),
    Nothing,
}

/// A value with an enum of each of serde's forms.
fn nested(real: f64, number: i64, text: &str, bits: u64) -> Nested {
    let text = || text.to_owned();
    Nested {
        real,
        untyped: serde_json::json!([real, number, text()]),
        wide: u128::from(bits) << 64,
        by_number: BTreeMap::from([(number, text())]),
        internal: match number % 3 {
            0 => Some(Internal::Fields { a: Some(real), text: text() }),
            1 => Some(Internal::Empty),
            _ => None,
        },
        adjacent: match number % 7 {
            0 => Some(Adjacent::Numbered(BTreeMap::from([(number, real)]))),
            1 | 2 => Some(Adjacent::Real(real)),
            3 | 4 => Some(Adjacent::Text(text())),
            _ => None,
        },
        untagged: vec![
            Untagged::Whole(number),
            Untagged::Real(real),
            Untagged::Text(text()),
            Untagged::Pair(7, Some(real as f32).filter(|real| real.is_finite())),
            Untagged::Nothing,
        ],
    }
}

impl ReadModel for Probe {
    const NAME: &'static str = "probes";
    const SHARED: bool = false;
    type Event = ProbeEvent;

    fn keys(event: &Recorded<ProbeEvent>) -> Vec<String> {
        let ProbeEvent::Sent { text, .. } = &event.event;
        assert!(!text.starts_with("panics"), "{text}");
        vec![event.stream.id().to_owned()]
    }

    /// Counts events with a time after the time of the row.
    fn fold(id: &String, row: Option<Self>, event: &Recorded<ProbeEvent>) -> Option<Self> {
        let ProbeEvent::Sent { bits, text, at, day, number, nested } = &event.event;
        let real = f64::from_bits(*bits);
        let is_newer = row.as_ref().is_none_or(|row| *at > row.at);
        let nested = match nested {
            true => self::nested(real, *number, text, *bits),
            false => Nested::default(),
        };
        Some(Self {
            id: id.clone(),
            real,
            maybe: Some(real).filter(|_| number % 2 == 0),
            text: text.clone(),
            at: *at,
            day: Some(*day),
            number: *number,
            nested,
            newer: row.map_or(0, |row| row.newer) + i64::from(is_newer),
        })
    }
}

fn sent(real: f64, text: &str, at: &str) -> ProbeEvent {
    ProbeEvent::Sent {
        bits: real.to_bits(),
        text: text.to_owned(),
        at: at.parse().expect("a time"),
        day: NaiveDate::default(),
        number: 1,
        nested: false,
    }
}

const TIME: &str = "2024-02-29T12:00:00.123456789Z";

fn worker(orders: &Orders, database: &TestDatabase, policy: FaultPolicy) -> ProjectionWorker {
    let config = ProjectionConfig {
        fault_policy: policy,
        fault_attempts_max: 1,
        parked_streams_max: 100_000,
        ..ProjectionConfig::default()
    };
    ProjectionWorker::new(Arc::new(orders.store.clone()), database.database.clone())
        .config(config)
        .with::<Probe>()
}

async fn run_through(orders: &Orders, database: &TestDatabase) {
    let projections = worker(orders, database, FaultPolicy::Park).spawn();
    orders.applied(&projections, Probe::NAME, WAIT).await;
    projections.shutdown().await;
}

fn probes(database: &TestDatabase) -> Query<Probe> {
    Query::new(database.database.clone())
}

fn random(dice: &mut Dice) -> ProbeEvent {
    let any = |dice: &mut Dice| (dice.roll(1 << 32) << 32) | dice.roll(1 << 32);
    let seconds = match dice.roll(4) {
        // Any year that chrono has.
        0 => (any(dice) as i64) % 8_000_000_000_000,
        _ => (any(dice) as i64) % 200_000_000_000,
    };
    let at = DateTime::from_timestamp(seconds, dice.roll(2_000_000_000) as u32);
    let at = at.unwrap_or_else(|| TIME.parse().expect("a time"));
    let scalar = |dice: &mut Dice| match dice.roll(3) {
        0 => char::from(dice.roll(128) as u8),
        1 => char::from_u32(dice.roll(0xd800) as u32).expect("a scalar value"),
        _ => char::from_u32(0xe000 + dice.roll(0x10_2000) as u32).expect("a scalar value"),
    };
    let bits = match dice.roll(4) {
        0 => (dice.roll(1 << 53) as f64).to_bits(),
        1 => ((any(dice) as f64) * 100.0).to_bits(),
        2 => (-(dice.roll(2) as f64)).to_bits(),
        _ => any(dice),
    };
    ProbeEvent::Sent {
        bits,
        text: (0..dice.roll(40)).map(|_| scalar(dice)).collect(),
        at,
        day: at.date_naive(),
        number: any(dice) as i64,
        nested: dice.roll(2) == 0,
    }
}

async fn random_rows_come_back_or_their_events_are_refused(database: &TestDatabase) {
    let count = std::env::var("KAFOLD_VALUES").ok().and_then(|count| count.parse().ok());
    let count: usize = count.unwrap_or(2_000);
    let orders = Orders::new(3);
    let mut dice = Dice::new(21);
    for n in 0..count {
        orders.append(&format!("probe-{n}"), &[random(&mut dice)]).await;
    }
    run_through(&orders, database).await;
    let mut expected = Vec::new();
    for row in orders.fold::<Probe>().await {
        if let Ok(row) = row.normalize() {
            expected.push(row);
        }
    }
    expected.sort_by(|one, other| one.id.cmp(&other.id));
    let found = probes(database).all(count).await.expect("readable");
    // Zeros have no sign.
    let bits = |rows: &[Probe]| rows.iter().map(|row| row.real.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&found), bits(&expected));
    assert_eq!(found, expected);
    assert!(found.len() < count && found.len() > count / 4, "{}", found.len());
    let parked = database.number("SELECT COUNT(*) FROM kafold_parked_event").await;
    assert_eq!(parked as usize, count - found.len());
    let named = "SELECT COUNT(*) FROM kafold_parked_event WHERE error LIKE '%: column %'";
    assert_eq!(database.number(named).await, parked);
}

async fn a_value_that_no_column_holds_is_a_fault_that_names_it(database: &TestDatabase) {
    let long = "x".repeat(3_000);
    let nested = |text: &str| {
        let ProbeEvent::Sent { bits, text, at, day, number, .. } = sent(1.0, text, TIME);
        ProbeEvent::Sent { bits, text, at, day, number, nested: true }
    };
    let late = DateTime::<Utc>::MAX_UTC;
    let ProbeEvent::Sent { bits, text, day, number, nested: flat, .. } = sent(1.0, "", TIME);
    let out_of_years = ProbeEvent::Sent { bits, text, at: late, day, number, nested: flat };
    let cases = [
        (sent(f64::NAN, "", TIME), "column real: NaN is not a finite number"),
        (sent(f64::NEG_INFINITY, "", TIME), "column real: -inf is not a finite number"),
        (sent(1.0, "a\0b", TIME), r#"column text: the text "a\0b" contains the character NUL"#),
        (
            sent(1.0, &long, TIME),
            "… of 3000 bytes makes an index entry of 3001 bytes, of at most 2600",
        ),
        (nested("a\0b"), "column text: "),
        (
            out_of_years,
            "column at: +262142-12-31 23:59:59.999999999 UTC is outside the years 0 to 9999",
        ),
    ];
    for (nth, (event, said)) in cases.into_iter().enumerate() {
        let orders = Orders::new(1);
        orders.append("probe-1", &[event]).await;
        let projections = worker(&orders, database, FaultPolicy::Stop).spawn();
        let reason = stopped(&projections).await;
        projections.shutdown().await;
        assert!(reason.contains(said), "{nth}: {reason}");
        assert!(
            reason.starts_with("event 0:0 (probe.sent.v1, version 1 of probe-1): "),
            "{reason}"
        );
    }
}

async fn an_error_with_any_text_is_parked(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("probe-1", &[sent(1.0, "panics \0 \u{202e}", TIME)]).await;
    orders.append("probe-2", &[sent(1.0, "t", TIME)]).await;
    run_through(&orders, database).await;
    let said =
        "SELECT COUNT(*) FROM kafold_parked_event WHERE error LIKE '%: panicked: panics _0 %'";
    assert_eq!(database.number(said).await, 1);
    assert_eq!(probes(database).all(10).await.expect("readable").len(), 1);
}

async fn a_fold_does_not_depend_on_restarts_and_batches(database: &TestDatabase) {
    let orders = Orders::new(1);
    let probe = sent(0.1, "t", TIME);
    orders.append("probe-a", &[probe.clone(), probe.clone(), probe.clone()]).await;
    orders.append("probe-b", std::slice::from_ref(&probe)).await;
    run_through(&orders, database).await;
    orders.append("probe-b", std::slice::from_ref(&probe)).await;
    orders.append("probe-b", std::slice::from_ref(&probe)).await;
    run_through(&orders, database).await;
    let rows = probes(database).all(10).await.expect("readable");
    // The time of the event is after the stored time, by 789 nanoseconds.
    let newer: Vec<_> = rows.iter().map(|row| (row.id.as_str(), row.newer)).collect();
    assert_eq!(newer, [("a", 3), ("b", 3)]);
}

async fn a_text_of_the_greatest_length_is_indexed(database: &TestDatabase) {
    let orders = Orders::new(1);
    // Texts that PostgreSQL cannot compress.
    let mut dice = Dice::new(4);
    let longest: String = (0..INDEXED_TEXT_BYTES_MAX - 1)
        .map(|_| char::from_digit(dice.roll(36) as u32, 36).expect("a digit"))
        .collect();
    orders.append("probe-1", &[sent(1.0, &longest, TIME)]).await;
    orders.append(&format!("probe-{}", "k".repeat(200)), &[sent(1.0, "2", TIME)]).await;
    run_through(&orders, database).await;
    let found = probes(database).find(Probe::text.eq(longest), 10).await.expect("readable");
    assert_eq!(found.len(), 1);
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);
}

async fn a_key_that_no_column_holds_is_found_nowhere(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("probe-1", &[sent(1.0, "t", TIME)]).await;
    run_through(&orders, database).await;
    let query = probes(database);
    assert_eq!(query.get(&"a\0b".to_owned()).await.expect("readable"), None);
    assert_eq!(query.find(Probe::text.eq("a\0b"), 9).await.expect("readable"), []);
    assert_eq!(query.find(Probe::day.eq(NaiveDate::MAX), 9).await.expect("readable"), []);
}

async fn an_unreadable_row_fails_itself_and_not_the_list(database: &TestDatabase) {
    let orders = Orders::new(1);
    for id in ["probe-1", "probe-2", "probe-3"] {
        orders.append(id, &[sent(1.0, "t", TIME)]).await;
    }
    run_through(&orders, database).await;
    database.run("UPDATE probes__g1 SET nested = '[]' WHERE id = '2'").await;
    let query = probes(database);
    let ids = |rows: Vec<Probe>| rows.into_iter().map(|row| row.id).collect::<Vec<_>>();
    assert_eq!(ids(query.all(10).await.expect("readable")), ["1", "3"]);
    let found = query.find(Probe::text.eq("t"), 10).await;
    assert_eq!(ids(found.expect("readable")), ["1", "3"]);
    let one = query.get(&"2".to_owned()).await;
    let Err(ReadError::Diverged { cause, .. }) = one else { panic!("{one:?}") };
    let said = cause.to_string();
    assert!(said.contains("the row of key text \"2\": column nested: invalid length"), "{said}");
}

/// [`Probe`] of a later program: a new column, and another type.
#[derive(Debug, Clone, PartialEq, Row)]
struct LaterProbe {
    #[row(key)]
    id: String,
    title: String,
}

/// The same with a column of another type.
#[derive(Debug, Clone, PartialEq, Row)]
struct RetypedProbe {
    #[row(key)]
    id: String,
    text: i64,
}

macro_rules! later {
    ($model:ty) => {
        impl ReadModel for $model {
            const NAME: &'static str = Probe::NAME;
            type Event = ProbeEvent;

            fn keys(_: &Recorded<ProbeEvent>) -> Vec<String> {
                Vec::new()
            }

            fn fold(_: &String, row: Option<Self>, _: &Recorded<ProbeEvent>) -> Option<Self> {
                row
            }
        }
    };
}
later!(LaterProbe);
later!(RetypedProbe);

async fn rows_of_another_definition_are_refused_by_queries(database: &TestDatabase) {
    async fn refused<M: ReadModel + std::fmt::Debug>(database: &Database) {
        let found = Query::<M>::new(database.clone()).all(10).await;
        let Err(ReadError::Diverged { cause, .. }) = found else { panic!("{found:?}") };
        let said = cause.to_string();
        assert!(said.contains("those of another definition"), "{said}");
        assert!(said.contains("`kafold projections rebuild probes`"), "{said}");
    }
    let orders = Orders::new(1);
    orders.append("probe-1", &[sent(1.0, "t", TIME)]).await;
    run_through(&orders, database).await;
    refused::<LaterProbe>(&database.database).await;
    refused::<RetypedProbe>(&database.database).await;
}

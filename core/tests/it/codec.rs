//! What is stored of an event, for ever, and how older shapes are read.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use kafold_core::codec::{self, CodecError, Upcasters, decode, encode};
use kafold_core::{
    CommandId, DomainEvent, EventType, Metadata, Offset, Partition, Position, RecordedEvent,
    StreamId, Version,
};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Line {
    sku: String,
    quantity: u32,
}

/// Every shape a variant can have, under every way serde can rename.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[serde(rename = "E", rename_all = "SCREAMING_SNAKE_CASE", rename_all_fields = "camelCase")]
enum Shapes {
    #[event("shapes.fields", version = 3)]
    Fields { customer_id: String, lines: Vec<Line>, note: Option<String> },
    #[event("shapes.inner")]
    #[serde(rename = "something else")]
    Inner(Line),
    #[event("shapes.number")]
    Number(i64),
    #[event("shapes.pair", version = 1)]
    Pair(u8, String),
    #[event("shapes.unit", version = 4_294_967_295)]
    Unit,
    #[event("shapes.empty")]
    Empty {},
    #[event("shapes.flat")]
    Flat {
        total: u64,
        #[serde(flatten)]
        more: BTreeMap<String, u64>,
    },
    #[event("shapes.sparse")]
    Sparse {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        #[serde(rename = "old_name")]
        new_name: bool,
    },
}
use Shapes::{Empty, Fields, Flat, Inner, Number, Pair, Sparse, Unit};

fn line() -> Line {
    Line { sku: "a\"ß".into(), quantity: 2 }
}

#[test]
fn a_payload_is_the_fields_of_the_variant_alone() {
    let check = |event: Shapes, event_type: &str, payload: &str| {
        let stored = encode(&event).expect("storable");
        assert_eq!(String::from_utf8_lossy(&stored), payload);
        assert_eq!(event.event_type().to_string(), event_type);
        assert_eq!(decode::<Shapes>(event_type, payload.as_bytes()), Ok(event));
    };
    check(
        Fields { customer_id: "c".into(), lines: vec![line()], note: None },
        "shapes.fields.v3",
        r#"{"customerId":"c","lines":[{"sku":"a\"ß","quantity":2}],"note":null}"#,
    );
    check(Inner(line()), "shapes.inner.v1", r#"{"sku":"a\"ß","quantity":2}"#);
    check(Number(-7), "shapes.number.v1", "-7");
    check(Pair(7, "x".into()), "shapes.pair.v1", r#"[7,"x"]"#);
    check(Unit, "shapes.unit.v4294967295", "{}");
    check(Empty {}, "shapes.empty.v1", "{}");
    let more = BTreeMap::from([("a".into(), 1)]);
    check(Flat { total: 9, more }, "shapes.flat.v1", r#"{"total":9,"a":1}"#);
    check(Sparse { reason: None, new_name: true }, "shapes.sparse.v1", r#"{"old_name":true}"#);
}

fn shapes() -> impl Strategy<Value = Shapes> {
    let line =
        || (any::<String>(), any::<u32>()).prop_map(|(sku, quantity)| Line { sku, quantity });
    let lines = proptest::collection::vec(line(), 0..4);
    let more = proptest::collection::btree_map("[a-s]{1,5}", any::<u64>(), 0..4);
    prop_oneof![
        (any::<String>(), lines, any::<Option<String>>())
            .prop_map(|(customer_id, lines, note)| Fields { customer_id, lines, note }),
        line().prop_map(Inner),
        any::<i64>().prop_map(Number),
        any::<(u8, String)>().prop_map(|(a, b)| Pair(a, b)),
        Just(Unit),
        Just(Empty {}),
        (any::<u64>(), more).prop_map(|(total, more)| Flat { total, more }),
        any::<(Option<String>, bool)>().prop_map(|(reason, new_name)| Sparse { reason, new_name }),
    ]
}

proptest! {
    #[test]
    fn what_was_stored_is_read_back(event in shapes()) {
        let stored = encode(&event).expect("storable");
        prop_assert_eq!(decode::<Shapes>(&event.event_type().to_string(), &stored), Ok(event));
    }

    #[test]
    fn no_payload_and_no_type_name_panics(payload: Vec<u8>, name in "\\PC{0,20}", index in 0..8_usize) {
        let known = Shapes::TYPES[index].to_string();
        let _ = decode::<Shapes>(&known, &payload);
        prop_assert!(decode::<Shapes>(&name, &payload).is_err());
    }
}

/// Shapes that JSON changes, or that serde writes and does not read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
enum Hard {
    #[event("hard.number")]
    Float { value: f64 },
    #[event("hard.single")]
    Single(f32),
    #[event("hard.maybe")]
    Maybe { value: Option<f64> },
    #[event("hard.twice")]
    Twice { value: Option<Option<u8>> },
    #[event("hard.flat")]
    FlatKeys {
        name: String,
        #[serde(flatten)]
        more: BTreeMap<u32, u64>,
    },
    #[event("hard.tagged")]
    TaggedKeys { part: Part },
    #[event("hard.sparse")]
    NoDefault {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        tags: Vec<String>,
    },
    #[event("hard.secret")]
    Secret {
        #[serde(skip_serializing)]
        token: String,
    },
    #[event("hard.wide")]
    Wide { amount: u128 },
    #[event("hard.flat_wide")]
    FlatWide {
        #[serde(flatten)]
        amount: Amount,
    },
    #[event("hard.negative")]
    Negative(i128),
    #[event("hard.choice")]
    Choice(Choice),
    #[event("hard.content")]
    Content(Content),
    #[event("hard.sets")]
    Sets { numbers: HashSet<u64>, names: HashMap<String, Option<i32>> },
    #[event("hard.keys")]
    Keys(BTreeMap<u64, char>),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Part {
    Slots { by_number: BTreeMap<u32, String> },
}

/// serde reads the first variant that fits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Choice {
    Moment(DateTime<Utc>),
    Text(String),
}

/// serde reads all of it as long as the tag comes first, which upcasters do not promise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data")]
enum Content {
    Wide(u128),
    Numbered(BTreeMap<u32, String>),
    Text(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Amount {
    wei: u128,
}

fn read_back(event: &Hard) -> Result<Hard, String> {
    codec::new_event(event, metadata()).map(|(_, event)| event).map_err(|error| error.to_string())
}

#[test]
fn an_event_that_the_log_cannot_give_back_is_refused() {
    let name = || String::from("n");
    let wide = u128::from(u64::MAX) + 1;
    for (event, words) in [
        (Hard::Float { value: f64::NAN }, "value: NaN is a number that JSON does not have"),
        (Hard::Float { value: f64::INFINITY }, "value: inf is a number"),
        (Hard::Maybe { value: Some(f64::NEG_INFINITY) }, "value: -inf is a number"),
        (Hard::Single(f32::NAN), "NaN is a number"),
        (Hard::Twice { value: Some(None) }, "read as another value"),
        (
            Hard::FlatKeys { name: name(), more: BTreeMap::from([(7, 9)]) },
            "could not be read again: invalid type: string \"7\"",
        ),
        (
            Hard::TaggedKeys { part: Part::Slots { by_number: BTreeMap::from([(1, name())]) } },
            "could not be read again",
        ),
        (Hard::NoDefault { tags: vec![] }, "missing field `tags`"),
        (Hard::Secret { token: name() }, "missing field `token`"),
        (Hard::Wide { amount: wide }, "amount: 18446744073709551616 needs more than 64 bits"),
        (Hard::FlatWide { amount: Amount { wei: wide } }, "wei: 18446744073709551616 needs"),
        (Hard::Negative(i128::from(i64::MIN) - 1), "needs more than 64 bits"),
        (
            Hard::Choice(Choice::Text("2024-02-29T12:00:00Z".into())),
            "an untagged enum of which an earlier variant fits",
        ),
        (Hard::Content(Content::Wide(1)), "in another order it could not be read again: u128"),
        (
            Hard::Content(Content::Numbered(BTreeMap::from([(7, name())]))),
            "in another order it could not be read again: invalid type: string \"7\"",
        ),
    ] {
        let refused = read_back(&event).expect_err("refused");
        assert!(refused.contains("cannot be stored: ") && refused.contains(words), "{refused}");
    }
}

/// Raw JSON keeps its spaces.
#[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
enum Rawest {
    #[event("rawest.kept")]
    Kept { json: Box<serde_json::value::RawValue> },
}

#[test]
fn raw_json_is_kept_as_it_is() {
    let json = serde_json::value::RawValue::from_string(r#"{"b": [1,  2e9], "a":1}"#.into());
    let event = Rawest::Kept { json: json.expect("is JSON") };
    let (_, read) = codec::new_event(&event, metadata()).expect("storable");
    assert_eq!(format!("{read:?}"), format!("{event:?}"));
}

fn hard() -> impl Strategy<Value = Hard> {
    let floats = any::<f64>().prop_filter("finite", |value| value.is_finite());
    let singles = any::<f32>().prop_filter("finite", |value| value.is_finite());
    let numbers = proptest::collection::hash_set(any::<u64>(), 0..6);
    let names = proptest::collection::hash_map(any::<String>(), any::<Option<i32>>(), 0..6);
    let keys = proptest::collection::btree_map(any::<u64>(), any::<char>(), 0..6);
    prop_oneof![
        floats.clone().prop_map(|value| Hard::Float { value }),
        (0.0..1.0_f64).prop_map(|value| Hard::Float { value }),
        singles.prop_map(Hard::Single),
        proptest::option::of(floats).prop_map(|value| Hard::Maybe { value }),
        any::<u64>().prop_map(|amount| Hard::Wide { amount: amount.into() }),
        any::<i64>().prop_map(|value| Hard::Negative(value.into())),
        (numbers, names).prop_map(|(numbers, names)| Hard::Sets { numbers, names }),
        keys.prop_map(Hard::Keys),
        any::<String>().prop_map(|text| Hard::Content(Content::Text(text))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn every_other_value_is_read_back_as_the_same(event in hard()) {
        prop_assert_eq!(read_back(&event), Ok(event));
    }
}

fn metadata() -> Metadata {
    Metadata {
        event_id: Uuid::from_u128(7),
        recorded_at: DateTime::<Utc>::UNIX_EPOCH,
        correlation_id: Some("request-1".into()),
        causation_id: None,
        trace_parent: None,
    }
}

#[test]
fn a_recorded_event_keeps_everything_around_its_payload() {
    let (new, _) = codec::new_event(&Number(5), metadata()).expect("storable");
    let (again, _) = codec::new_event(&Number(6), metadata()).expect("storable");
    assert!(std::sync::Arc::ptr_eq(&new.event_type, &again.event_type), "made once a type");
    let recorded = RecordedEvent {
        stream: StreamId::new("shapes", "1").expect("valid"),
        version: Version(3),
        position: Position { partition: Partition(1), offset: Offset(9) },
        command_id: CommandId(Uuid::from_u128(8)),
        event_type: new.event_type,
        payload: new.payload,
        metadata: new.metadata,
    };
    let decoded = codec::decode_recorded::<Shapes>(&recorded).expect("readable");
    assert_eq!(decoded.event, Number(5));
    assert_eq!(decoded.command_id, recorded.command_id);
    assert_eq!((decoded.version, decoded.position), (recorded.version, recorded.position));
    assert_eq!((decoded.stream, decoded.metadata), (recorded.stream, metadata()));
}

fn mistake(event_type: &str, payload: &str) -> String {
    decode::<Shapes>(event_type, payload.as_bytes()).expect_err("unreadable").to_string()
}

#[test]
fn an_unreadable_event_says_what_to_do() {
    for unknown in ["order.placed.v1", "shapes.unit", "shapes.unit.v+1", "shapes.unit.v", "", ".v1"]
    {
        assert_eq!(
            mistake(unknown, "{}"),
            format!(
                "it::codec::Shapes has no event type {unknown}: a newer program wrote it (update this \
                 one), or its variant was removed (keep it, or rename it in `upcasters`)"
            )
        );
    }
    assert_eq!(
        mistake("shapes.fields.v4", "{}"),
        "shapes.fields.v4 was written by a newer program, this one knows up to v3: update it"
    );
    assert_eq!(
        mistake("shapes.fields.v2", "{}"),
        "shapes.fields.v2 needs an upcaster to v3: add one in `upcasters` of it::codec::Shapes"
    );
    assert_eq!(
        mistake("shapes.inner.v1", r#"{"sku":"a"}"#),
        "payload of shapes.inner.v1: missing field `quantity` at line 1 column 11"
    );
}

#[test]
fn a_payload_that_is_not_the_variants_is_refused() {
    for (event_type, payload) in [
        ("shapes.unit.v4294967295", "null"),
        ("shapes.unit.v4294967295", "[]"),
        ("shapes.unit.v4294967295", "{} {}"),
        ("shapes.number.v1", "7 8"),
        ("shapes.number.v1", ""),
        ("shapes.pair.v1", "[7]"),
        ("shapes.pair.v1", r#"[7,"x",8]"#),
        ("shapes.empty.v1", "7"),
        ("shapes.inner.v1", r#"{"Inner":{"sku":"a","quantity":2}}"#),
    ] {
        let refused = mistake(event_type, payload);
        assert!(refused.starts_with(&format!("payload of {event_type}: ")), "{refused}");
    }
    // As serde has it: additional fields do not matter.
    let stored = br#"{"later":[{}]}"#;
    assert_eq!(decode::<Shapes>("shapes.unit.v4294967295", stored), Ok(Unit));
    assert_eq!(decode::<Shapes>("shapes.empty.v1", stored), Ok(Empty {}));
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
enum Free {
    #[event("free.form")]
    Form { json: serde_json::Value },
}

#[test]
fn what_is_nested_too_deep_to_be_read_is_not_stored() {
    let nested = |depth: usize| {
        let json = (1..depth).fold(serde_json::json!(1), |inner, _| serde_json::json!([inner]));
        Free::Form { json }
    };
    let stored = encode(&nested(127)).expect("storable");
    assert_eq!(decode("free.form.v1", &stored), Ok(nested(127)));
    let refused = encode(&nested(128)).expect_err("too deep").to_string();
    assert!(refused.starts_with("free.form.v1 cannot be stored: recursion limit"), "{refused}");
    let wide = Free::Form { json: vec![serde_json::json!({}); 1000].into() };
    assert!(encode(&wide).is_ok());
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(upcasters = payment_upcasters)]
enum Payment {
    #[event("payment.taken", version = 3)]
    Taken { amount_cents: u64, currency: String },
    #[event("payment.returned", version = 1)]
    Returned,
}

fn payment_upcasters() -> Upcasters {
    Upcasters::none()
        .add("payment.taken", 2, |mut json| {
            json["currency"] = "EUR".into();
            Ok(json)
        })
        .add("payment.taken", 1, |json| {
            let euros = json["euros"].as_u64().ok_or("euros is not a number")?;
            Ok(serde_json::json!({ "amount_cents": euros * 100 }))
        })
        .renamed("payment.made", 7, "payment.taken", 1)
        .renamed("payment.given_back", 1, "payment.returned", 1)
}

#[test]
fn older_shapes_are_lifted_step_by_step() {
    let taken = Payment::Taken { amount_cents: 500, currency: "EUR".into() };
    for (event_type, payload) in [
        ("payment.taken.v3", r#"{"amount_cents":500,"currency":"EUR"}"#),
        ("payment.taken.v2", r#"{"amount_cents":500}"#),
        ("payment.taken.v1", r#"{"euros":5}"#),
        ("payment.made.v7", r#"{"euros":5}"#),
    ] {
        assert_eq!(decode(event_type, payload.as_bytes()), Ok(taken.clone()), "{event_type}");
    }
    assert_eq!(decode("payment.given_back.v1", b"{}"), Ok(Payment::Returned));
}

#[test]
fn what_an_upcaster_cannot_lift_is_named() {
    let mistake = |event_type, payload: &[u8]| {
        decode::<Payment>(event_type, payload).expect_err("unreadable").to_string()
    };
    assert_eq!(
        mistake("payment.made.v7", b"{}"),
        "payload of payment.made.v7: the upcaster of payment.taken.v1 says: euros is not a number"
    );
    assert_eq!(
        mistake("payment.taken.v2", br#"{"amount_cents":"5"}"#),
        "payload of payment.taken.v2: invalid type: string \"5\", expected u64"
    );
    assert!(mistake("payment.taken.v1", b"{").starts_with("payload of payment.taken.v1: EOF"));
    assert!(mistake("payment.made.v6", b"{}").contains("has no event type payment.made.v6"));
    assert!(mistake("payment.taken.v4", b"{}").contains("knows up to v3"));
}

/// An enum whose upcasters are `$upcasters`, and what the codec says about them.
macro_rules! mistake_in {
    ($upcasters:expr) => {{
        fn upcasters() -> Upcasters {
            $upcasters
        }
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
        #[event(upcasters = upcasters)]
        enum Wrong {
            #[event("it.happened", version = 2)]
            Happened,
        }
        let reading = decode::<Wrong>("it.happened.v2", b"{}").expect_err("refused");
        let writing = codec::new_event(&Wrong::Happened, metadata()).expect_err("refused");
        assert_eq!(reading, writing);
        match reading {
            CodecError::Upcasters { mistake, .. } => mistake,
            other => panic!("{other}"),
        }
    }};
}

#[test]
fn upcasters_that_cannot_work_are_refused_before_anything_is_stored() {
    assert_eq!(
        mistake_in!(Upcasters::none().add("it.happened", 2, Ok)),
        "it.happened.v2 is current and needs none: raise its version"
    );
    assert_eq!(
        mistake_in!(Upcasters::none().add("it.happened", 1, Ok).add("it.happened", 1, Ok)),
        "two of them start at it.happened.v1"
    );
    assert_eq!(
        mistake_in!(Upcasters::none().add("it.hapened", 1, Ok)),
        "it.hapened.v1 becomes it.hapened.v2, which is no variant's type"
    );
    let circle = mistake_in!(
        Upcasters::none().renamed("a", 1, "b", 1).renamed("b", 1, "a", 1).add("it.happened", 1, Ok)
    );
    assert_eq!(circle, "a.v1 turns in a circle");
}

#[test]
fn a_type_is_shown_as_records_carry_it() {
    let types: Vec<String> = Payment::TYPES.iter().map(EventType::to_string).collect();
    assert_eq!(types, ["payment.taken.v3", "payment.returned.v1"]);
    assert_eq!(Payment::Returned.type_index(), 1);
}

/// By hand, so that the derive's refusal is not in the way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    One { n: u8 },
}

impl DomainEvent for Tagged {
    const TYPES: &'static [EventType] = &[EventType { name: "tagged.one", version: 1 }];

    fn type_index(&self) -> usize {
        0
    }

    fn codec() -> &'static codec::Codec {
        static CODEC: std::sync::OnceLock<codec::Codec> = std::sync::OnceLock::new();
        CODEC.get_or_init(codec::Codec::of::<Self>)
    }
}

#[test]
fn an_enum_that_serde_stores_as_something_else_is_refused_both_ways() {
    let unstorable = encode(&Tagged::One { n: 1 }).expect_err("refused").to_string();
    assert!(unstorable.starts_with("tagged.one.v1 cannot be stored: a domain event is an enum"));
    let unreadable = decode::<Tagged>("tagged.one.v1", b"{}").expect_err("refused").to_string();
    assert!(unreadable.contains("a domain event is an enum"), "{unreadable}");
}

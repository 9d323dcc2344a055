//! A value that is accepted is the same value everywhere: in the state of the deciding node, after a
//! restart, in a snapshot, behind an upcaster, and when another node forwarded its command.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Utc};
use futures_util::TryStreamExt;
use kafold_core::codec::{self, Upcasters};
use kafold_core::handler::{HandleError, HandlerConfig};
use kafold_core::memory::{MemorySnapshots, MemoryStore};
use kafold_core::{
    Aggregate, CommandHandler, DomainEvent, EventStore, SnapshotSchema, SnapshotStore, StreamId,
    Version,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::handler::wire::Wire;

/// Values in one run. `KAFOLD_VALUES` sets another number.
const VALUES: u32 = 10_000;

/// Each scalar of serde and of the libraries whose types are usual in events, externally tagged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Scalar {
    Unit,
    Flag(bool),
    Small(i8, u8, i16, u16),
    Middle(i32, u32),
    Large(i64, u64),
    Huge(i128, u128),
    Single(f32),
    Double(f64),
    Letter(char),
    Text(String),
    Bytes(Vec<u8>),
    Moment(DateTime<Utc>),
    Local(NaiveDateTime),
    Day(NaiveDate),
    Clock(NaiveTime),
    Span(std::time::Duration),
    Id(Uuid),
    Json(serde_json::Value),
}

/// Internally tagged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Internal {
    Nothing,
    Fields { scalar: Scalar, twice: Option<Option<i64>> },
    Keyed { by_number: BTreeMap<i64, String> },
    Named(BTreeMap<String, f64>),
}

/// Adjacently tagged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "content")]
enum Adjacent {
    Nothing,
    One(Scalar),
    Pair(u128, f32),
    Fields { letters: BTreeMap<char, Option<u8>>, flags: BTreeMap<bool, ()> },
}

/// Untagged: serde takes the first variant that fits, so a text that is a time would be refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Whole(i64),
    Real(f64),
    Moment(DateTime<Utc>),
    Text(String),
    Pair(u8, Option<bool>),
    Fields { x: f32, y: i64 },
    Map(BTreeMap<String, Untagged>),
    Nothing,
}

/// A struct with fields that serde merges, leaves out and renames.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    #[serde(rename = "externally-tagged")]
    external: Scalar,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    maybe: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    list: Vec<Option<Untagged>>,
    set: BTreeSet<u64>,
    unordered: HashMap<i32, String>,
    #[serde(flatten)]
    more: BTreeMap<String, Adjacent>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Value {
    External(Scalar),
    Internal(Internal),
    Adjacent(Adjacent),
    Untagged(Untagged),
    Record(Box<Record>),
    Nested(BTreeMap<String, BTreeMap<u16, Vec<Value>>>),
}

/// Times up to this many seconds before and after 1970, leap seconds among them.
fn moments(seconds_max: i64) -> impl Strategy<Value = DateTime<Utc>> + Clone {
    (-seconds_max..seconds_max, 0..2_000_000_000_u32).prop_map(|(seconds, nanos)| {
        // A second in which there are more nanoseconds is the last of its minute.
        let last = seconds.div_euclid(60) * 60 + 59;
        let seconds = if nanos < 1_000_000_000 { seconds } else { last };
        DateTime::from_timestamp(seconds, nanos).expect("in chrono's range")
    })
}

fn scalar() -> impl Strategy<Value = Scalar> {
    let reals = prop_oneof![
        any::<u64>().prop_map(f64::from_bits),
        any::<f64>(),
        (-1e6..1e6_f64),
        any::<i64>().prop_map(|whole| whole as f64),
        Just(-0.0),
    ];
    let json_reals = reals.clone();
    let (moments, recent) = (moments(8_000_000_000_000), moments(2_000_000_000));
    prop_oneof![
        Just(Scalar::Unit),
        any::<bool>().prop_map(Scalar::Flag),
        any::<(i8, u8, i16, u16)>().prop_map(|(a, b, c, d)| Scalar::Small(a, b, c, d)),
        any::<(i32, u32)>().prop_map(|(a, b)| Scalar::Middle(a, b)),
        any::<(i64, u64)>().prop_map(|(a, b)| Scalar::Large(a, b)),
        any::<(i128, u128)>().prop_map(|(a, b)| Scalar::Huge(a, b)),
        any::<(i64, u64)>().prop_map(|(a, b)| Scalar::Huge(a.into(), b.into())),
        any::<u32>().prop_map(|bits| Scalar::Single(f32::from_bits(bits))),
        reals.prop_map(Scalar::Double),
        any::<char>().prop_map(Scalar::Letter),
        any::<String>().prop_map(Scalar::Text),
        proptest::collection::vec(any::<char>(), 0..8)
            .prop_map(|letters| Scalar::Text(letters.into_iter().collect())),
        any::<Vec<u8>>().prop_map(Scalar::Bytes),
        recent.prop_map(Scalar::Moment),
        moments.clone().prop_map(Scalar::Moment),
        moments.clone().prop_map(|at| Scalar::Local(at.naive_utc())),
        moments.clone().prop_map(|at| Scalar::Day(at.date_naive())),
        moments.prop_map(|at| Scalar::Clock(at.time())),
        any::<std::time::Duration>().prop_map(Scalar::Span),
        any::<u128>().prop_map(|id| Scalar::Id(Uuid::from_u128(id))),
        (json_reals, any::<u64>(), any::<String>()).prop_map(|(real, whole, text)| {
            Scalar::Json(serde_json::json!({ "real": real, "whole": [whole, null], text: true }))
        }),
    ]
}

fn untagged() -> impl Strategy<Value = Untagged> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Untagged::Whole),
        any::<f64>().prop_map(Untagged::Real),
        "\\PC{0,5}".prop_map(Untagged::Text),
        any::<(u8, Option<bool>)>().prop_map(|(a, b)| Untagged::Pair(a, b)),
        any::<(f32, i64)>().prop_map(|(x, y)| Untagged::Fields { x, y }),
        Just(Untagged::Nothing),
    ];
    leaf.prop_recursive(3, 8, 3, |inner| {
        proptest::collection::btree_map("[a-y]{0,2}", inner, 0..3).prop_map(Untagged::Map)
    })
}

fn adjacent() -> impl Strategy<Value = Adjacent> {
    let letters = proptest::collection::btree_map(any::<char>(), any::<Option<u8>>(), 0..3);
    let flags = proptest::collection::btree_map(any::<bool>(), Just(()), 0..2);
    prop_oneof![
        Just(Adjacent::Nothing),
        scalar().prop_map(Adjacent::One),
        any::<(u128, f32)>().prop_map(|(a, b)| Adjacent::Pair(a, b)),
        any::<(u64, f32)>().prop_map(|(a, b)| Adjacent::Pair(a.into(), b)),
        (letters, flags).prop_map(|(letters, flags)| Adjacent::Fields { letters, flags }),
    ]
}

fn record() -> impl Strategy<Value = Record> {
    use proptest::collection::{btree_map, btree_set, hash_map, vec};
    let list = vec(proptest::option::of(untagged()), 0..3);
    let (set, unordered) = (btree_set(any::<u64>(), 0..3), hash_map(any::<i32>(), "[a-c]?", 0..2));
    let more = btree_map("[a-z]{0,8}", adjacent(), 0..2);
    (scalar(), any::<Option<f64>>(), list, set, unordered, more).prop_map(
        |(external, maybe, list, set, unordered, more)| Record {
            external,
            maybe,
            list,
            set,
            unordered,
            more,
        },
    )
}

fn value() -> impl Strategy<Value = Value> {
    use proptest::collection::{btree_map, vec};
    let numbers = btree_map(any::<i64>(), any::<String>(), 0..3);
    let internal = prop_oneof![
        Just(Internal::Nothing),
        (scalar(), any::<Option<Option<i64>>>())
            .prop_map(|(scalar, twice)| Internal::Fields { scalar, twice }),
        numbers.prop_map(|by_number| Internal::Keyed { by_number }),
        btree_map("[a-z]{1,4}", any::<f64>(), 0..3).prop_map(Internal::Named),
    ];
    let leaf = prop_oneof![
        4 => scalar().prop_map(Value::External),
        2 => internal.prop_map(Value::Internal),
        2 => adjacent().prop_map(Value::Adjacent),
        2 => untagged().prop_map(Value::Untagged),
        2 => record().prop_map(|record| Value::Record(Box::new(record))),
    ];
    leaf.prop_recursive(3, 6, 2, |inner| {
        let inner = btree_map(any::<u16>(), vec(inner, 0..3), 0..2);
        btree_map("[^\u{0}]{0,3}", inner, 0..2).prop_map(Value::Nested)
    })
}

/// Events of each form that a variant can have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
enum ShelfEvent {
    #[event("shelf.inner")]
    Inner(Value),
    #[event("shelf.fields")]
    Fields { before: u8, value: Value },
    #[event("shelf.pair")]
    Pair(Value, Option<u8>),
    #[event("shelf.flat")]
    Flat {
        #[serde(flatten)]
        record: Record,
    },
}

/// The same events, each one version later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(upcasters = unchanged)]
enum LaterEvent {
    #[event("shelf.inner", version = 2)]
    Inner(Value),
    #[event("shelf.fields", version = 2)]
    Fields { before: u8, value: Value },
    #[event("shelf.pair", version = 2)]
    Pair(Value, Option<u8>),
    #[event("shelf.flat", version = 2)]
    Flat {
        #[serde(flatten)]
        record: Record,
    },
}

fn unchanged() -> Upcasters {
    let add = |upcasters: Upcasters, name| upcasters.add(name, 1, Ok);
    ["shelf.inner", "shelf.fields", "shelf.pair", "shelf.flat"]
        .into_iter()
        .fold(Upcasters::none(), add)
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum ShelfCommand {
    Put(ShelfEvent),
    Show,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
struct Shown(String);

/// Keeps its newest event.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Shelf {
    newest: Option<ShelfEvent>,
}

impl Aggregate for Shelf {
    const CATEGORY: &'static str = "shelf";
    const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("shelf.1"));
    type Command = ShelfCommand;
    type Event = ShelfEvent;
    type Error = Shown;

    fn decide(&self, command: &ShelfCommand) -> Result<Vec<ShelfEvent>, Shown> {
        match command {
            ShelfCommand::Put(event) => Ok(vec![event.clone()]),
            ShelfCommand::Show => Err(Shown(shown(self.newest.as_ref()))),
        }
    }

    fn evolve(&mut self, event: &ShelfEvent) {
        self.newest = Some(event.clone());
    }
}

/// `==` does not see the sign of a zero; no map of a value has more than one key in no order.
fn shown(event: Option<&ShelfEvent>) -> String {
    format!("{event:?}")
}

struct World {
    store: MemoryStore,
    snapshots: Arc<MemorySnapshots>,
    owner: CommandHandler<Shelf>,
    other: CommandHandler<Shelf>,
}

impl World {
    fn new() -> Self {
        let (store, (near, far)) = (MemoryStore::default(), Wire::pair(Shelf::CATEGORY));
        let snapshots = Arc::new(MemorySnapshots::new());
        let handler = || CommandHandler::new(Arc::new(store.clone()));
        let config = HandlerConfig { snapshot_every: 1, ..HandlerConfig::default() };
        let owner = handler()
            .config(config)
            .with_snapshots(snapshots.clone())
            .forwarding(Some(Arc::new(far)));
        let other = handler().forwarding(Some(Arc::new(near)));
        Self { store: store.clone(), snapshots, owner, other }
    }

    async fn put(
        &self,
        handler: &CommandHandler<Shelf>,
        id: &str,
        event: &ShelfEvent,
    ) -> Result<(), String> {
        let command = ShelfCommand::Put(event.clone());
        match handler.handle(id, &command).await {
            Ok(handled) => {
                assert_eq!(handled.version, Version(1));
                Ok(())
            }
            Err(HandleError::Codec { error, .. }) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The newest event by the state of this handler.
    async fn newest(&self, handler: &CommandHandler<Shelf>, id: &str) -> String {
        match handler.handle(id, &ShelfCommand::Show).await {
            Err(HandleError::Rejected(Shown(newest))) => newest,
            other => panic!("{other:?}"),
        }
    }
}

/// Numbers of values of a run.
#[derive(Debug, Default)]
struct Counts {
    tried: u32,
    accepted: u32,
    refused: u32,
}

impl World {
    async fn check(&self, counts: &mut Counts, event: &ShelfEvent) {
        counts.tried += 1;
        let n = counts.tried;
        let ids = [format!("here-{n}"), format!("there-{n}")];
        let here = self.put(&self.owner, &ids[0], event).await;
        let there = self.put(&self.other, &ids[1], event).await;
        assert_eq!(here.is_ok(), there.is_ok(), "{event:?}\nhere {here:?}\nforwarded {there:?}");
        match &here {
            Ok(()) => counts.accepted += 1,
            Err(reason) => {
                counts.refused += 1;
                assert!(reason.contains("shelf."), "it names the event: {reason}");
            }
        }
        for id in ids {
            let stream = StreamId::new(Shelf::CATEGORY, &id).expect("valid");
            let stored: Vec<_> =
                self.store.read(&stream, Version(0)).try_collect().await.expect("read");
            if here.is_err() {
                assert!(stored.is_empty(), "{event:?}");
                continue;
            }
            let expected = shown(Some(event));
            let restarted = CommandHandler::new(Arc::new(self.store.clone()));
            assert_eq!(self.newest(&self.owner, &id).await, expected, "the deciding node");
            assert_eq!(self.newest(&restarted, &id).await, expected, "after a restart");
            let later = codec::decode_recorded::<LaterEvent>(&stored[0]);
            let later = later.map(|later| format!("{:?}", Some(later.event)));
            assert_eq!(later.as_deref(), Ok(expected.as_str()), "behind an upcaster");
            let snapshot = self.snapshots.load(&stream).await.expect("in memory");
            let snapshot = snapshot.unwrap_or_else(|| panic!("no snapshot of {event:?}"));
            let state: Shelf = serde_json::from_slice(&snapshot.state).expect("a snapshot is read");
            assert_eq!(shown(state.newest.as_ref()), expected, "in a snapshot");
        }
    }
}

#[test]
fn an_accepted_value_is_the_same_value_everywhere() {
    let values = std::env::var("KAFOLD_VALUES").ok().and_then(|values| values.parse().ok());
    let values = values.unwrap_or(VALUES);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (world, counts) = (World::new(), RefCell::new(Counts::default()));
    let events = prop_oneof![
        value().prop_map(ShelfEvent::Inner),
        (any::<u8>(), value()).prop_map(|(before, value)| ShelfEvent::Fields { before, value }),
        (value(), any::<Option<u8>>()).prop_map(|(value, after)| ShelfEvent::Pair(value, after)),
        record().prop_map(|record| ShelfEvent::Flat { record }),
    ];
    let mut runner = TestRunner::new(ProptestConfig::with_cases(values));
    let checked = runner.run(&events, |event| {
        runtime.block_on(world.check(&mut counts.borrow_mut(), &event));
        Ok(())
    });
    checked.unwrap_or_else(|failed| panic!("{failed}"));
    let Counts { accepted, refused, .. } = counts.into_inner();
    println!("{accepted} accepted, {refused} refused");
    assert!(accepted > values / 3 && refused > values / 20, "{accepted} and {refused}");
}

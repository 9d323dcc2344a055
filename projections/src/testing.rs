//! Given events, these rows: the tests of a read model, without a database.
//!
//! ```
//! # use kafold_core::{DomainEvent, Recorded, Row};
//! # use kafold_projections::{ReadModel, projection_test};
//! # use serde::{Deserialize, Serialize};
//! # #[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
//! # #[event(category = "account")]
//! # enum AccountEvent { #[event("account.deposited")] Deposited { cents: i64 } }
//! # #[derive(Debug, Clone, PartialEq, Row)]
//! # struct Balance { #[row(stream)] account: String, cents: i64 }
//! # impl ReadModel for Balance {
//! #     const NAME: &'static str = "balances";
//! #     type Event = AccountEvent;
//! #     fn fold(account: &String, row: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
//! #         let AccountEvent::Deposited { cents } = event.event;
//! #         let before = row.map_or(0, |row| row.cents);
//! #         Some(Self { account: account.clone(), cents: before + cents })
//! #     }
//! # }
//! projection_test::<Balance>()
//!     .stream("ada")
//!     .given([AccountEvent::Deposited { cents: 500 }, AccountEvent::Deposited { cents: 20 }])
//!     .rows([Balance { account: "ada".into(), cents: 520 }]);
//! ```
//!
//! The events are encoded and decoded, and the rows pass through the values of their columns, as in a
//! worker. The same events are folded several times: one event a batch, in larger batches, all at once,
//! each event twice with the same row before it, and for a [shared](ReadModel::SHARED) model with the streams
//! in the opposite order. A model whose rows differ between two of these runs fails its test.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;

use chrono::{DateTime, Duration, Utc};
use kafold_core::row::Row;
use kafold_core::store::{Batch, Cursor};
use kafold_core::{
    CommandId, EventSet, Metadata, Offset, Partition, Position, RecordedEvent, StreamId, Version,
};
use uuid::Uuid;

use crate::definition::Definition;
use crate::handler::Fault;
use crate::read_model::{ReadModel, fold_batch};

/// Begins the test of a read model with a log that has no events.
#[must_use = "go on with `given`"]
pub fn projection_test<M: ReadModel>() -> ProjectionTest<M> {
    ProjectionTest { log: TestLog::new(), model: PhantomData }
}

/// The events that a read model is tested with.
#[derive(Debug, Clone)]
pub struct ProjectionTest<M> {
    log: TestLog,
    model: PhantomData<fn() -> M>,
}

impl<M: ReadModel> ProjectionTest<M> {
    /// Sets the id of the stream of the events that follow. Default: `1`. The category of a stream is that of its
    /// events.
    #[must_use = "go on with `given`"]
    pub fn stream(mut self, id: &str) -> Self {
        id.clone_into(&mut self.log.stream);
        self
    }

    /// Sets the time at which the next event is recorded. Each event after it is recorded a second later.
    /// Default: 2020-01-01T00:00:00Z.
    #[must_use = "go on with `given`"]
    pub fn recorded_at(mut self, at: DateTime<Utc>) -> Self {
        self.log.recorded_at = at;
        self
    }

    /// Adds events to the stream, after those given before.
    #[must_use = "go on with `rows`"]
    #[track_caller]
    pub fn given(mut self, events: impl IntoIterator<Item = M::Event>) -> Self {
        for event in events {
            self.log.add(&event);
            self.log.recorded_at += Duration::seconds(1);
        }
        self
    }

    /// Adds an event in the stored form that the log has: an older shape is lifted by the upcasters.
    #[must_use = "go on with `rows`"]
    #[track_caller]
    pub fn given_stored(mut self, event_type: &str, payload: &str) -> Self {
        self.log.add_stored::<M::Event>(event_type, payload.as_bytes());
        self.log.recorded_at += Duration::seconds(1);
        self
    }

    /// Checks that the events lead to exactly these rows, given in any order.
    #[track_caller]
    pub fn rows(self, expected: impl IntoIterator<Item = M>) -> Self
    where
        M: Debug,
    {
        // A model with a mistake in its definition does not compile.
        drop(Definition::of_model::<M>());
        let mut expected: Vec<_> = expected
            .into_iter()
            .map(|row| {
                row.normalize()
                    .unwrap_or_else(|invalid| panic!("an expected row is invalid: {invalid}"))
            })
            .collect();
        expected.sort_by_key(Row::key);
        let one_by_one = self.folded(&self.log.events, 1);
        assert_eq!(one_by_one, expected, "rows of {} after these events", M::NAME);
        for size in [2, 3, self.log.events.len().max(1)] {
            let rows = self.folded(&self.log.events, size);
            assert_eq!(rows, expected, "{} depends on the size of a batch ({size})", M::NAME);
        }
        if M::SHARED {
            let rows = self.folded(&self.other_order(), 1);
            assert_eq!(rows, expected, "{} depends on the order between streams", M::NAME);
        }
        self
    }

    /// Returns the events with the last stream first, and the events of each stream in their order.
    fn other_order(&self) -> Vec<RecordedEvent> {
        let streams: Vec<_> = self.log.events.iter().map(|event| &event.stream).collect();
        let first = |event: &RecordedEvent| streams.iter().position(|&one| *one == event.stream);
        let mut events = self.log.events.clone();
        events.sort_by_key(|event| Reverse(first(event)));
        events
    }

    #[track_caller]
    fn folded(&self, events: &[RecordedEvent], batch_size: usize) -> Vec<M> {
        let mut rows = BTreeMap::new();
        for events in events.chunks(batch_size) {
            let batch = batch(events);
            let folded: Result<Vec<_>, Fault> =
                fold_batch::<M>(&batch, |key| rows.get(key).cloned());
            let again = fold_batch::<M>(&batch, |key| rows.get(key).cloned());
            let folded = folded.unwrap_or_else(|fault| panic!("{}: {}", M::NAME, fault.reason));
            assert!(
                again.as_ref() == Ok(&folded),
                "{}: the same events twice give other rows",
                M::NAME
            );
            for (key, row) in folded {
                match row {
                    Some(row) => rows.insert(key, row),
                    None => rows.remove(&key),
                };
            }
        }
        rows.into_values().collect()
    }
}

/// The events of a test in the order in which they are recorded, in one partition.
#[derive(Debug, Clone)]
pub(crate) struct TestLog {
    /// The id of the stream of the next event.
    pub(crate) stream: String,
    /// The time at which the next event is recorded.
    pub(crate) recorded_at: DateTime<Utc>,
    pub(crate) events: Vec<RecordedEvent>,
}

impl TestLog {
    pub(crate) fn new() -> Self {
        let recorded_at = DateTime::UNIX_EPOCH + Duration::days(18_262);
        Self { stream: "1".to_owned(), recorded_at, events: Vec::new() }
    }

    /// Adds an event as a store has it.
    #[track_caller]
    pub(crate) fn add<E: EventSet>(&mut self, event: &E) {
        let payload = event.to_payload().unwrap_or_else(|error| {
            panic!("{event:?} does not survive being stored: {error}");
        });
        self.add_stored::<E>(&event.stored_type().to_string(), &payload);
    }

    /// Adds an event in its stored form. The category of the stream is that of the event.
    #[track_caller]
    pub(crate) fn add_stored<E: EventSet>(&mut self, event_type: &str, payload: &[u8]) {
        let stream = StreamId::new(E::category_of(event_type).unwrap_or("test"), &self.stream);
        self.add_to(stream.unwrap_or_else(|invalid| panic!("{invalid}")), event_type, payload);
    }

    pub(crate) fn add_to(&mut self, stream: StreamId, event_type: &str, payload: &[u8]) {
        let place = self.events.len();
        let version = self.events.iter().filter(|event| event.stream == stream).count() + 1;
        let id = Uuid::from_u128(place as u128 + 1);
        self.events.push(RecordedEvent {
            stream,
            version: Version(version as u64),
            position: Position { partition: Partition(0), offset: Offset(place as u64) },
            command_id: CommandId(id),
            event_type: Arc::from(event_type),
            payload: Arc::from(payload),
            metadata: Metadata {
                event_id: id,
                recorded_at: self.recorded_at,
                correlation_id: None,
                causation_id: None,
                trace_parent: None,
            },
        });
    }
}

pub(crate) fn batch(events: &[RecordedEvent]) -> Batch {
    let (partition, from) = (Partition(0), Offset(0));
    let next = Cursor { next: from, state: String::new() };
    Batch { partition, from, events: events.to_vec(), next, end: from }
}

//! Orders, and read models and projections over them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use futures_util::TryStreamExt;
use kafold_core::clock::RandomIds;
use kafold_core::event_set::{EventSet, ReadEvent};
use kafold_core::memory::{MemoryConfig, MemoryStore};
use kafold_core::{
    CommandId, Commit, DomainEvent, EventStore, ExpectedVersion, IdGenerator, Metadata, Position,
    Recorded, RecordedEvent, Row, StreamId, Version, codec,
};
use kafold_migrations::Database;
use kafold_projections::sqlx::AssertSqlSafe;
use kafold_projections::{
    Generation, HandlerError, Projection, ProjectionBatch, Projections, Query, ReadModel,
    Transaction, sqlx,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Dice, a_while};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
pub(crate) enum OrderEvent {
    #[event("order.placed", version = 1)]
    Placed { customer: String, cents: i64, tags: Vec<String>, at: DateTime<Utc> },
    #[event("order.cancelled", version = 1)]
    Cancelled { customer: String, cents: i64 },
}

/// Another aggregate in the same log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
pub(crate) enum ParcelEvent {
    #[event("parcel.sent", version = 1)]
    Sent { weight: u32 },
}

/// What a later version of the program writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
pub(crate) enum NewerOrderEvent {
    #[event("order.placed", version = 2)]
    Placed { buyer: String },
}

/// Rows that many streams of all partitions share; gone when their last order is cancelled.
#[derive(Debug, Clone, PartialEq, Row)]
pub(crate) struct CustomerTotals {
    #[row(key)]
    pub(crate) customer: String,
    pub(crate) orders: i64,
    pub(crate) cents: i64,
}

/// Models with the columns of [`CustomerTotals`].
macro_rules! totals {
    ($($(#[$attribute:meta])* $model:ident)*) => {$(
        $(#[$attribute])*
        #[derive(Debug, Clone, PartialEq, kafold_core::Row)]
        pub(crate) struct $model {
            #[row(key)]
            pub(crate) customer: String,
            pub(crate) orders: i64,
            pub(crate) cents: i64,
        }

        impl From<$model> for $crate::common::domain::CustomerTotals {
            fn from($model { customer, orders, cents }: $model) -> Self {
                Self { customer, orders, cents }
            }
        }

        impl From<$crate::common::domain::CustomerTotals> for $model {
            fn from(total: $crate::common::domain::CustomerTotals) -> Self {
                Self { customer: total.customer, orders: total.orders, cents: total.cents }
            }
        }
    )*};
}
pub(crate) use totals;

totals! {
    /// A model whose fold cannot take one event.
    Poisoned
    /// The same a stream, so that each row is one worker's alone.
    StreamTotals
}

impl ReadModel for CustomerTotals {
    const NAME: &'static str = "customer_totals";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        match &event.event {
            OrderEvent::Placed { customer, .. } | OrderEvent::Cancelled { customer, .. } => {
                vec![customer.clone()]
            }
        }
    }

    fn fold(key: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let mut row = row.unwrap_or(Self { customer: key.clone(), orders: 0, cents: 0 });
        match &event.event {
            OrderEvent::Placed { cents, .. } => {
                row.orders += 1;
                row.cents += cents;
            }
            OrderEvent::Cancelled { cents, .. } => {
                row.orders -= 1;
                row.cents -= cents;
            }
        }
        (row.orders != 0 || row.cents != 0).then_some(row)
    }
}

/// One row a stream, with every kind of column.
#[derive(Debug, Clone, PartialEq, Row)]
pub(crate) struct OrderDetails {
    #[row(stream)]
    pub(crate) id: String,
    #[row(index)]
    pub(crate) customer: String,
    pub(crate) cents: i64,
    pub(crate) euros: f64,
    pub(crate) day: NaiveDate,
    pub(crate) at: DateTime<Utc>,
    pub(crate) is_open: bool,
    pub(crate) cancelled_version: Option<u32>,
    pub(crate) last_seen: Option<DateTime<Utc>>,
    pub(crate) note: Option<String>,
    pub(crate) event_id: Uuid,
    #[row(json)]
    pub(crate) tags: Vec<String>,
}

impl ReadModel for OrderDetails {
    const NAME: &'static str = "order_details";
    type Event = OrderEvent;

    fn fold(id: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        match &event.event {
            OrderEvent::Placed { customer, cents, tags, at } => Some(Self {
                id: id.clone(),
                customer: customer.clone(),
                cents: *cents,
                euros: *cents as f64 / 100.0,
                day: at.date_naive(),
                at: *at,
                is_open: true,
                cancelled_version: None,
                last_seen: None,
                note: tags.first().cloned(),
                event_id: event.metadata.event_id,
                tags: tags.clone(),
            }),
            OrderEvent::Cancelled { .. } => row.map(|row| Self {
                is_open: false,
                cancelled_version: u32::try_from(event.version.0).ok(),
                last_seen: Some(event.metadata.recorded_at),
                note: None,
                ..row
            }),
        }
    }
}

/// The amount at which [`Poisoned`] panics.
pub(crate) const POISON_CENTS: i64 = 666;

impl ReadModel for Poisoned {
    const NAME: &'static str = "poisoned";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        CustomerTotals::keys(event)
    }

    fn fold(key: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        if let OrderEvent::Placed { cents, .. } = &event.event {
            assert!(*cents != POISON_CENTS, "the number of the beast");
        }
        CustomerTotals::fold(key, row.map(Into::into), event).map(Into::into)
    }
}

impl ReadModel for StreamTotals {
    const NAME: &'static str = "stream_totals";
    const SHARED: bool = false;
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        vec![event.stream.id().to_owned()]
    }

    fn fold(key: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let before =
            row.map(|Self { customer, orders, cents }| Poisoned { customer, orders, cents });
        let Poisoned { customer, orders, cents } = Poisoned::fold(key, before, event)?;
        Some(Self { customer, orders, cents })
    }
}

/// Writes one row an event with plain INSERTs: an event applied twice breaks its key.
#[derive(Clone, Default)]
pub(crate) struct Ledger {
    /// How many of the next calls fail after they have written.
    pub(crate) failures: Arc<AtomicU32>,
    /// How many events each batch had.
    pub(crate) batches: Arc<Mutex<Vec<usize>>>,
    /// How long an event takes at least.
    pub(crate) event_takes: Duration,
}

impl Ledger {
    pub(crate) fn batches(&self) -> MutexGuard<'_, Vec<usize>> {
        self.batches.lock().expect("no test panics under it")
    }
}

#[async_trait]
impl Projection for Ledger {
    fn name(&self) -> &str {
        "ledger"
    }

    fn tables(&self) -> &[&str] {
        &["ledger"]
    }

    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        let table = generation.table("ledger");
        let sql =
            format!("CREATE TABLE IF NOT EXISTS {table} (position TEXT PRIMARY KEY, type TEXT)");
        let sql = AssertSqlSafe(sql);
        match tx {
            Transaction::Postgres(connection) => {
                sqlx::query(sql).execute(&mut **connection).await?;
            }
            Transaction::Sqlite(connection) => {
                sqlx::query(sql).execute(&mut **connection).await?;
            }
        }
        Ok(())
    }

    async fn apply(
        &self,
        batch: &ProjectionBatch,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        self.batches().push(batch.count());
        a_while(self.event_takes * batch.count() as u32).await;
        let table = generation.table("ledger");
        let sql = format!("INSERT INTO {table} (position, type) VALUES ($1, $2)");
        for event in batch.events() {
            let sql = AssertSqlSafe(sql.clone());
            let (position, event_type) = (event.position.to_string(), &*event.event_type);
            match tx {
                Transaction::Postgres(connection) => {
                    let query = sqlx::query(sql).bind(position).bind(event_type);
                    query.execute(&mut **connection).await?;
                }
                Transaction::Sqlite(connection) => {
                    let query = sqlx::query(sql).bind(position).bind(event_type);
                    query.execute(&mut **connection).await?;
                }
            }
        }
        let failing = self
            .failures
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if failing.is_ok() { Err("not today".into()) } else { Ok(()) }
    }
}

/// A log with a domain's worth of appends.
pub(crate) struct Orders {
    pub(crate) store: MemoryStore,
    streams: Mutex<Vec<StreamId>>,
    appended: AtomicUsize,
}

impl Orders {
    pub(crate) fn new(partitions: u32) -> Self {
        let store = MemoryStore::new(MemoryConfig { partitions, ..MemoryConfig::default() });
        Self { store, streams: Mutex::default(), appended: AtomicUsize::new(0) }
    }

    pub(crate) async fn append<E: DomainEvent>(&self, stream: &str, events: &[E]) -> Position {
        let stream: StreamId = stream.parse().expect("a stream");
        let new = |event| {
            let at = DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("in range");
            let metadata = Metadata {
                event_id: RandomIds.event_id(),
                recorded_at: at,
                correlation_id: None,
                causation_id: None,
                trace_parent: None,
            };
            codec::new_event(event, metadata).expect("it encodes").0
        };
        let command = CommandId(RandomIds.event_id());
        let commit = Commit::new(command, events.iter().map(new).collect()).expect("events");
        let appended = self.store.append(&stream, ExpectedVersion::Any, commit).await;
        let appended = appended.expect("memory takes everything");
        self.appended.fetch_add(events.len(), Ordering::SeqCst);
        let mut streams = self.streams();
        if !streams.contains(&stream) {
            streams.push(stream);
        }
        appended.position
    }

    fn streams(&self) -> MutexGuard<'_, Vec<StreamId>> {
        self.streams.lock().expect("nothing panics under it")
    }

    pub(crate) async fn place(&self, id: &str, customer: &str, cents: i64) -> Position {
        self.append(&format!("order-{id}"), &[placed(customer, cents)]).await
    }

    /// One random commit of one to three events.
    pub(crate) async fn append_random(&self, dice: &mut Dice) -> Position {
        let stream = format!("order-{}", dice.roll(200));
        let mut events = Vec::new();
        for _ in 0..=dice.roll(3) {
            let customer = format!("c{}", dice.roll(7));
            events.push(match dice.roll(5) {
                0 => OrderEvent::Cancelled { customer, cents: dice.roll(50) as i64 },
                _ => placed(&customer, dice.roll(600) as i64),
            });
        }
        if dice.roll(4) == 0 {
            self.append(&format!("parcel-{}", dice.roll(20)), &[ParcelEvent::Sent { weight: 3 }])
                .await;
        }
        self.append(&stream, &events).await
    }

    /// So many streams, of 500 events in one commit each.
    pub(crate) async fn place_many(&self, streams: usize) {
        let events: Vec<_> = (0..500).map(|cents| placed("c1", cents)).collect();
        for stream in 0..streams {
            self.append(&format!("order-many-{stream}"), &events).await;
        }
    }

    /// Waits until the projection has applied everything.
    pub(crate) async fn applied(&self, projections: &Projections, name: &str, wait: Duration) {
        for end in self.ends().await {
            projections.wait_for_position(name, end, wait).await.expect("it is applied");
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.appended.load(Ordering::SeqCst)
    }

    /// Every event, in the order of each stream.
    pub(crate) async fn events(&self) -> Vec<RecordedEvent> {
        let streams = self.streams().clone();
        let mut events = Vec::new();
        for stream in &streams {
            let read = self.store.read(stream, Version::EMPTY);
            events.extend(read.try_collect::<Vec<_>>().await.expect("memory is readable"));
        }
        events
    }

    /// The last position of each partition.
    pub(crate) async fn ends(&self) -> Vec<Position> {
        let mut ends = BTreeMap::new();
        for event in self.events().await {
            let end = ends.entry(event.position.partition).or_insert(event.position);
            *end = event.position.max(*end);
        }
        ends.into_values().collect()
    }

    /// What the model must hold: the fold of the log, event by event.
    pub(crate) async fn fold<M: ReadModel>(&self) -> Vec<M> {
        let mut rows = BTreeMap::new();
        for event in self.events().await {
            let Ok(ReadEvent::Event(decoded)) = M::Event::read(&event) else { continue };
            let event = event.with(decoded);
            for key in M::keys(&event) {
                let row = rows.remove(&key);
                if let Some(row) = M::fold(&key, row, &event) {
                    rows.insert(key, row);
                }
            }
        }
        rows.into_values().collect()
    }

    pub(crate) async fn assert_equals_fold<M: ReadModel + Debug>(&self, database: &Database) {
        let rows = Query::<M>::new(database.clone()).all(1_000_000).await.expect("readable");
        assert_eq!(rows, self.fold::<M>().await, "{} differs from the fold of the log", M::NAME);
    }
}

pub(crate) fn placed(customer: &str, cents: i64) -> OrderEvent {
    let at = DateTime::from_timestamp_micros(1_600_000_000_000_001 + cents * 3_600_000_000);
    OrderEvent::Placed {
        customer: customer.to_owned(),
        cents,
        tags: (0..cents % 3).map(|n| format!("tag \"{n}\" ü")).collect(),
        at: at.expect("in range"),
    }
}

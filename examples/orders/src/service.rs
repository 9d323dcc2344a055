//! The aggregate and the read models, joined to a log and a database.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use kafold::projections::{
    Freshness, ProjectionState, ProjectionStatus, ProjectionWorker, Projections, Query,
};
use kafold::store::{Health, ReadError};
use kafold::{
    Clock, CommandHandler, CommandId, Database, EventSource, EventStore, IdGenerator, Log, Offset,
    Position, StreamId, Version, codec,
};
use lru::LruCache;

use crate::order::{Order, OrderEvent};
use crate::read_models::{CustomerOrders, OrderDetails, OrderRow, SalesByCustomer, SalesByDay};
use crate::sales_by_sku::SalesBySku;

/// Idempotency keys whose orders are remembered: until the read model is sure to have the placed orders.
const RECENT_KEYS_MAX: NonZeroUsize = NonZeroUsize::new(100_000).expect("is not zero");
/// Wait for an appended event to be in the index of another node.
const INDEXED_WITHIN: Duration = Duration::from_secs(3);
/// Interval of the looks at the index meanwhile.
const INDEX_POLL: Duration = Duration::from_millis(20);
/// How long the database may take to answer when readiness is asked for.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(2);

/// What a request works with once log and database are open.
pub(crate) struct Service {
    pub(crate) handler: CommandHandler<Order>,
    pub(crate) log: Log,
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) projections: Projections,
    pub(crate) orders: Query<OrderDetails>,
    pub(crate) customer_orders: Query<CustomerOrders>,
    pub(crate) by_day: Query<SalesByDay>,
    pub(crate) by_customer: Query<SalesByCustomer>,
    pub(crate) database: Database,
    clock: Arc<dyn Clock>,
    uses_of_keys: Mutex<LruCache<CommandId, UseOfKey>>,
}

/// All read models of orders.
pub(crate) fn projections(source: Arc<dyn EventSource>, database: Database) -> ProjectionWorker {
    ProjectionWorker::new(source, database)
        .with(OrderDetails)
        .with(CustomerOrders)
        .with(SalesByDay)
        .with(SalesByCustomer)
        .with_projection(SalesBySku)
}

/// The id of the order for which a key was used, when it is known. A request with the key holds the lock,
/// so that two requests with one key cannot place two orders.
pub(crate) type UseOfKey = Arc<tokio::sync::Mutex<Option<String>>>;

impl Service {
    /// Starts the projections.
    pub(crate) fn start(
        log: &Log,
        database: Database,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Self {
        let projections =
            projections(log.source(), database.clone()).clock(clock.clone(), ids.clone()).spawn();
        Self {
            handler: CommandHandler::with_parts(log.store(), clock.clone(), ids)
                .forwarding(log.commands()),
            log: log.clone(),
            store: log.store(),
            projections,
            orders: Query::new(database.clone()),
            customer_orders: Query::new(database.clone()),
            by_day: Query::new(database.clone()),
            by_customer: Query::new(database.clone()),
            database,
            clock,
            uses_of_keys: Mutex::new(LruCache::new(RECENT_KEYS_MAX)),
        }
    }

    /// Returns the remembered use of a key, of the last [`RECENT_KEYS_MAX`] keys.
    pub(crate) fn use_of_key(&self, key: CommandId) -> UseOfKey {
        let mut uses = self.uses_of_keys.lock().unwrap_or_else(PoisonError::into_inner);
        uses.get_or_insert(key, UseOfKey::default).clone()
    }

    /// Returns the event of an order that has this version, which the log is known to have. The index
    /// of a node that does not own the stream may get the event a moment later.
    pub(crate) async fn event(
        &self,
        stream: &StreamId,
        version: Version,
    ) -> Result<OrderEvent, ReadError> {
        let deadline = self.clock.instant() + INDEXED_WITHIN;
        loop {
            let mut events = self.store.read(stream, Version(version.0.saturating_sub(1)));
            if let Some(event) = events.try_next().await? {
                let decoded = codec::decode_recorded(&event);
                return decoded
                    .map(|recorded| recorded.event)
                    .map_err(|error| ReadError::diverged(stream.to_string(), error));
            }
            if self.clock.instant() >= deadline {
                let cause = format!("version {version} of {stream} is not in the index yet");
                return Err(ReadError::unavailable(INDEX_POLL, cause));
            }
            self.clock.sleep(INDEX_POLL).await;
        }
    }

    /// The order that was placed with the key, as far as the read model has come.
    pub(crate) async fn placed_with(&self, key: CommandId) -> Result<Option<String>, ReadError> {
        let found = self.orders.find(OrderRow::placed_by.eq(key.0), 1).await?;
        Ok(found.into_iter().next().map(|order| order.order_id))
    }

    /// What a projection does.
    pub(crate) fn state(&self, projection: &str) -> Option<ProjectionState> {
        self.status(projection).map(|status| status.state)
    }

    fn status(&self, projection: &str) -> Option<ProjectionStatus> {
        self.projections.status().into_iter().find(|status| status.name == projection)
    }

    /// The last position of each partition that a projection has applied. The database is asked only
    /// where other nodes have a part of the projection.
    pub(crate) async fn applied(&self, projection: &str) -> Result<Vec<Position>, ReadError> {
        let held = self.status(projection).map(|status| status.partitions).unwrap_or_default();
        let next: Vec<_> = match held.len() as u32 == self.log.partitions() {
            true => held.into_iter().map(|(partition, status)| (partition, status.next)).collect(),
            false => Freshness::of(&self.database, projection).await?.0,
        };
        let last = next.into_iter().filter_map(|(partition, next)| {
            let offset = Offset(next.0.checked_sub(1)?);
            Some(Position { partition, offset })
        });
        Ok(last.collect())
    }

    /// Why it is not ready, one sentence an entry; nothing when it is.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<_> = [self.store.health(), self.projections.health()]
            .into_iter()
            .flat_map(|health| match health {
                Health::Ready => Vec::new(),
                Health::NotReady(reasons) => reasons,
            })
            .collect();
        let url = self.database.url();
        complaints.extend(database_complaint(&self.orders, url, &*self.clock).await);
        complaints
    }
}

/// Reads from the database: idle projections do not notice a lost database.
pub(crate) async fn database_complaint(
    orders: &Query<OrderDetails>,
    url: &str,
    clock: &dyn Clock,
) -> Option<String> {
    tokio::select! {
        biased;
        answered = orders.freshness() => {
            let error = answered.err()?;
            Some(format!("the database {url} cannot be read: {error}"))
        }
        () = clock.sleep(DATABASE_TIMEOUT) => {
            Some(format!("the database {url} does not answer within {DATABASE_TIMEOUT:?}"))
        }
    }
}

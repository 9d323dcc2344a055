//! The aggregate and the read models, joined to a log and a database.

use std::sync::Arc;

use kafold::projections::ProjectionWorker;
use kafold::store::ReadError;
use kafold::{CommandHandler, CommandId, Database, EventSource, Kafold, LogReader};

use crate::order::Order;
use crate::read_models::{CustomerOrder, CustomerSales, DaySales, OrderDetails};
use crate::sales_by_sku::SalesBySku;

/// Everything that a request works with once log and database are open.
pub(crate) struct Service {
    pub(crate) kafold: Kafold,
    pub(crate) handler: CommandHandler<Order>,
}

/// Returns a worker with all read models of orders.
pub(crate) fn projections(source: Arc<dyn EventSource>, database: Database) -> ProjectionWorker {
    with_models(ProjectionWorker::new(source, database))
}

/// Starts the projections of a process without commands.
pub(crate) fn start_projections(kafold: &Kafold<LogReader>) {
    with_models(kafold.projections()).spawn();
}

fn with_models(worker: ProjectionWorker) -> ProjectionWorker {
    worker
        .with::<OrderDetails>()
        .with::<CustomerOrder>()
        .with::<DaySales>()
        .with::<CustomerSales>()
        .with_projection(SalesBySku)
}

impl Service {
    /// Starts the projections.
    pub(crate) fn start(kafold: Kafold) -> Arc<Self> {
        with_models(kafold.projections()).spawn();
        Arc::new(Self { handler: kafold.handler(), kafold })
    }

    /// Returns the order that was placed with the key, as far as the read model has come.
    pub(crate) async fn placed_with(&self, key: CommandId) -> Result<Option<String>, ReadError> {
        let orders = self.kafold.query::<OrderDetails>();
        let found = orders.find(OrderDetails::placed_by.eq(key.0), 1).await?;
        Ok(found.into_iter().next().map(|order| order.order_id))
    }
}

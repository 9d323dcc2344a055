//! The routes of the service.
//!
//! - [`commands`]: everything that changes an order;
//! - [`queries`]: the read models and the stream of an order.

use std::sync::Arc;

use axum::extract::State;
use kafold_axum::Http;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::service::Service;

mod commands;
mod queries;

/// The state of the routes. A request that cannot be read is answered 400 also before the service is open.
type App = State<Http<Arc<Service>>>;

/// Returns the routes of orders.
pub(crate) fn routes() -> OpenApiRouter<Http<Arc<Service>>> {
    OpenApiRouter::new()
        .routes(routes!(commands::place))
        .routes(routes!(commands::pay))
        .routes(routes!(commands::ship))
        .routes(routes!(commands::cancel))
        .routes(routes!(queries::order))
        .routes(routes!(queries::events))
        .routes(routes!(queries::customer_orders))
        .routes(routes!(queries::sales))
}

/// The text of `GET /`, for a reader in a browser.
pub(crate) const INDEX: &str = "\
POST /orders                     {\"customer\",\"lines\":[{\"sku\",\"quantity\",\"amount_cents\"}]}, optional: \"order_id\", \"placed_at\"
POST /orders/{id}/payment        {\"amount_cents\"}
POST /orders/{id}/shipment       {\"carrier\",\"tracking\"}
POST /orders/{id}/cancellation   {\"reason\"}
     headers: Idempotency-Key: UUID, If-Match: \"VERSION\"
GET  /orders/{id}
GET  /orders/{id}/events
GET  /customers/{id}/orders
GET  /reports/sales?by=day|sku|customer
     ?after=POSITION waits until a read model has seen the position that a command answered
GET  /health/live  /health/ready  /metrics
GET  /nodes    which node owns which partition, since when
";

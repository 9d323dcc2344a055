//! The read models, and the stream of an order.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use kafold::projections::{ProjectionState, ReadModel, WaitError};
use kafold::{ExpectedVersion, Position, RecordedEvent, Version};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::App;
use super::commands::{problem_of, read_problem, stream_of};
use super::extract::{PathId, QueryOf, positions};
use super::problem::{Problem, RETRY_SOON};
use crate::order::{Line, check_customer};
use crate::read_models::{
    CustomerOrder, CustomerOrders, OrderDetails, OrderRow, SalesByCustomer, SalesByDay, Sums,
};
use crate::sales_by_sku::SalesBySku;
use crate::service::Service;

/// Most orders of one customer in one answer.
const CUSTOMER_ORDERS_MAX: usize = 10_000;
/// Most rows of a report.
const REPORT_ROWS_MAX: usize = 1_000_000;
/// Up to where the answer is complete, as a list for `?after=`.
const APPLIED: HeaderName = HeaderName::from_static("kafold-applied");
/// Where in the log the order's last event is.
const POSITION: HeaderName = HeaderName::from_static("kafold-position");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct After {
    after: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SalesQuery {
    by: Option<By>,
    after: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum By {
    Day,
    Sku,
    Customer,
}

/// The body of `GET /orders/{id}`.
#[derive(Debug, Serialize)]
struct OrderBody {
    order_id: String,
    customer: String,
    status: String,
    lines: Vec<Line>,
    quantity: i64,
    amount_cents: i64,
    placed_at: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    carrier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracking: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    version: i64,
}

/// `GET /orders/{id}`
pub(super) async fn order(
    State(app): State<Arc<App>>,
    PathId(order_id): PathId,
    QueryOf(query): QueryOf<After>,
) -> Result<Response, Problem> {
    stream_of(&order_id)?;
    let service = app.service()?;
    let applied = fresh(&app, service, OrderDetails::NAME, query.after.as_deref()).await?;
    let row = service.orders.get(&order_id).await.map_err(read_problem)?;
    let row = row.ok_or_else(|| unknown_order(&order_id))?;
    let headers = [
        (header::ETAG, ascii(&format!("\"{}\"", row.version))),
        (POSITION, ascii(&row.position)),
        (APPLIED, applied),
    ];
    Ok((headers, Json(OrderBody::from(row))).into_response())
}

impl From<OrderRow> for OrderBody {
    fn from(row: OrderRow) -> Self {
        Self {
            order_id: row.order_id,
            customer: row.customer,
            status: row.status,
            lines: row.lines,
            quantity: row.quantity,
            amount_cents: row.amount_cents,
            placed_at: row.placed_at,
            carrier: row.carrier,
            tracking: row.tracking,
            reason: row.reason,
            version: row.version,
        }
    }
}

/// The body of `GET /customers/{id}/orders`, the oldest order first.
#[derive(Debug, Serialize)]
struct CustomerBody {
    customer: String,
    orders: Vec<CustomerOrderBody>,
}

#[derive(Debug, Serialize)]
struct CustomerOrderBody {
    order_id: String,
    status: String,
    quantity: i64,
    amount_cents: i64,
    placed_at: DateTime<Utc>,
}

impl From<CustomerOrder> for CustomerOrderBody {
    fn from(row: CustomerOrder) -> Self {
        let CustomerOrder { order_id, customer: _, status, quantity, amount_cents, placed_at } =
            row;
        Self { order_id, status, quantity, amount_cents, placed_at }
    }
}

/// `GET /customers/{id}/orders`. Customers are nobody's stream: one without orders has an empty list.
pub(super) async fn customer_orders(
    State(app): State<Arc<App>>,
    PathId(customer): PathId,
    QueryOf(query): QueryOf<After>,
) -> Result<Response, Problem> {
    check_customer(&customer).map_err(|error| Problem::malformed(error.to_string()))?;
    let service = app.service()?;
    let applied = fresh(&app, service, CustomerOrders::NAME, query.after.as_deref()).await?;
    let found = service
        .customer_orders
        .find(CustomerOrder::customer.eq(customer.as_str()), CUSTOMER_ORDERS_MAX + 1)
        .await
        .map_err(read_problem)?;
    let mut found = whole(found, CUSTOMER_ORDERS_MAX, CustomerOrders::NAME)?;
    found.sort_by(|a, b| (a.placed_at, &a.order_id).cmp(&(b.placed_at, &b.order_id)));
    let orders = found.into_iter().map(CustomerOrderBody::from).collect();
    Ok(([(APPLIED, applied)], Json(CustomerBody { customer, orders })).into_response())
}

/// The body of `GET /reports/sales`.
#[derive(Debug, Serialize)]
struct Report {
    rows: Vec<ReportRow>,
    total: Sums,
}

#[derive(Debug, Serialize)]
struct ReportRow {
    key: String,
    #[serde(flatten)]
    sums: Sums,
}

/// `GET /reports/sales?by=day|sku|customer`
pub(super) async fn sales(
    State(app): State<Arc<App>>,
    QueryOf(query): QueryOf<SalesQuery>,
) -> Result<Response, Problem> {
    let by = query.by.ok_or_else(|| Problem::malformed("add ?by=day, ?by=sku or ?by=customer"))?;
    let service = app.service()?;
    let projection = match by {
        By::Day => SalesByDay::NAME,
        By::Sku => SalesBySku::NAME,
        By::Customer => SalesByCustomer::NAME,
    };
    let applied = fresh(&app, service, projection, query.after.as_deref()).await?;
    let report = match by {
        By::Day => {
            let rows = service.by_day.all(REPORT_ROWS_MAX + 1).await.map_err(read_problem)?;
            let rows = whole(rows, REPORT_ROWS_MAX, projection)?;
            Report::of(rows.into_iter().map(|row| (row.day.to_string(), row.sums())))
        }
        By::Customer => {
            let rows = service.by_customer.all(REPORT_ROWS_MAX + 1).await.map_err(read_problem)?;
            let rows = whole(rows, REPORT_ROWS_MAX, projection)?;
            Report::of(rows.into_iter().map(|row| (row.customer.clone(), row.sums())))
        }
        By::Sku => {
            let sales = SalesBySku::read(&service.database).await.map_err(read_problem)?;
            // Rows do not tell how many orders there are: one may stand in several.
            Report { total: sales.total, ..Report::of(sales.rows) }
        }
    };
    Ok(([(APPLIED, applied)], Json(report)).into_response())
}

impl Report {
    /// In the order of the key's bytes, which is the same on every database.
    fn of(rows: impl IntoIterator<Item = (String, Sums)>) -> Self {
        let mut rows: Vec<_> =
            rows.into_iter().map(|(key, sums)| ReportRow { key, sums }).collect();
        rows.sort_by(|a, b| a.key.cmp(&b.key));
        let total = rows.iter().fold(Sums::default(), |total, row| total.plus(row.sums));
        Self { rows, total }
    }
}

/// The body of `GET /orders/{id}/events`.
#[derive(Debug, Serialize)]
struct StreamBody {
    order_id: String,
    events: Vec<EventBody>,
}

#[derive(Debug, Serialize)]
struct EventBody {
    version: Version,
    position: Position,
    event_id: uuid::Uuid,
    #[serde(rename = "type")]
    event_type: String,
    recorded_at: DateTime<Utc>,
    command_id: kafold::CommandId,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    data: Box<RawValue>,
}

/// `GET /orders/{id}/events`: from the log, so it needs no `?after=`.
pub(super) async fn events(
    State(app): State<Arc<App>>,
    PathId(order_id): PathId,
) -> Result<Response, Problem> {
    let stream = stream_of(&order_id)?;
    let service = app.service()?;
    let read = async || -> Result<Vec<_>, Problem> {
        service.store.read(&stream, Version::EMPTY).try_collect().await.map_err(read_problem)
    };
    let mut events = read().await?;
    if events.is_empty() {
        // The stream index is fed behind the write, and other programs can change its tables: the owner
        // of the stream knows whether there are events.
        let loaded = service.handler.load(&order_id).await;
        loaded.map_err(|error| problem_of(error, ExpectedVersion::Any))?;
        events = read().await?;
    }
    let Some(last) = events.last() else { return Err(unknown_order(&order_id)) };
    let headers = [
        (header::ETAG, ascii(&format!("\"{}\"", last.version))),
        (POSITION, ascii(&last.position.to_string())),
    ];
    let events = events.into_iter().map(EventBody::of).collect::<Result<Vec<_>, _>>()?;
    Ok((headers, Json(StreamBody { order_id, events })).into_response())
}

impl EventBody {
    fn of(event: RecordedEvent) -> Result<Self, Problem> {
        Ok(Self {
            version: event.version,
            position: event.position,
            event_id: event.metadata.event_id,
            event_type: event.event_type.to_string(),
            recorded_at: event.metadata.recorded_at,
            command_id: event.command_id,
            correlation_id: event.metadata.correlation_id,
            traceparent: event.metadata.trace_parent,
            data: serde_json::from_slice(&event.payload)
                .map_err(|error| Problem::internal(&error))?,
        })
    }
}

/// Waits for the positions of `?after=`, and tells up to where the answer will be complete.
async fn fresh(
    app: &App,
    service: &Service,
    projection: &str,
    after: Option<&str>,
) -> Result<HeaderValue, Problem> {
    if let Some(after) = after {
        let positions = positions(after)?;
        let begun = app.clock.instant();
        for position in positions {
            check_partition(service, position)?;
            let waited = app.clock.instant().saturating_duration_since(begun);
            let left = app.limits.wait.saturating_sub(waited);
            let applied = service.projections.wait_for_position(projection, position, left).await;
            applied.map_err(|error| wait_problem(service, projection, &error))?;
        }
    }
    let applied = service.applied(projection).await.map_err(read_problem)?;
    let applied = applied.iter().map(ToString::to_string).collect::<Vec<_>>();
    Ok(ascii(&applied.join(",")))
}

fn check_partition(service: &Service, after: Position) -> Result<(), Problem> {
    let count = service.log.partitions();
    if after.partition.0 < count {
        return Ok(());
    }
    Err(Problem::malformed(format!(
        "after: {after} is in no partition of this log, it has {count}; take the position that a \
         command of this service answered"
    )))
}

fn wait_problem(service: &Service, projection: &str, error: &WaitError) -> Problem {
    match (error, service.state(projection)) {
        (WaitError::Timeout { .. }, Some(ProjectionState::Waiting(reason))) => {
            let detail = format!("the read model {projection} waits: {reason}");
            Problem::unavailable("unavailable", RETRY_SOON, detail)
        }
        (WaitError::Timeout { .. }, _) => {
            let detail = format!("{error}: try again, or ask without ?after for what there is");
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "not-applied-yet", detail)
        }
        (WaitError::Stopped { .. } | WaitError::UnknownProjection(_), _) => {
            Problem::unavailable("projection-stopped", RETRY_SOON, error.to_string())
        }
    }
}

/// All rows, or a refusal: an answer that silently lacks some would be a wrong one.
fn whole<T>(rows: Vec<T>, rows_max: usize, view: &str) -> Result<Vec<T>, Problem> {
    if rows.len() <= rows_max {
        return Ok(rows);
    }
    let detail = format!("there are more than {rows_max} rows: query the view {view} in SQL");
    Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "too-many-rows", detail))
}

fn unknown_order(order_id: &str) -> Problem {
    let detail = format!(
        "there is no order {order_id:?}; if it was placed just now, add ?after= with the position \
         that it was answered with"
    );
    Problem::unknown(detail)
}

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("numbers and punctuation are ASCII")
}

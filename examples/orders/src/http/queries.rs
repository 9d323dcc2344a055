//! The read models, and the stream of an order.

#![expect(unused_qualifications, reason = "utoipa writes them around generic parameters")]

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use kafold::projections::ReadModel;
use kafold::{Aggregate, Position, RecordedEvent, StreamId, Version};
use kafold_axum::{After, Id, NoQuery, Problem, QueryProblems};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};

use super::App;
use crate::order::{Order, check_customer};
use crate::read_models::{CustomerOrder, CustomerSales, DaySales, OrderDetails, Sums};
use crate::sales_by_sku::SalesBySku;

/// Most orders of one customer in one answer.
const CUSTOMER_ORDERS_MAX: usize = 10_000;
/// Most rows of a report.
const REPORT_ROWS_MAX: usize = 1_000_000;
/// The position of the order's last event in the log.
const POSITION: HeaderName = HeaderName::from_static("kafold-position");

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct SalesQuery {
    #[param(required, inline, value_type = By)]
    by: Option<By>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum By {
    Day,
    Sku,
    Customer,
}

/// One order, with everything about it.
#[utoipa::path(
    get, path = "/orders/{id}", params(("id" = String, Path), After<NoQuery>),
    responses((status = OK, description = "the order", body = OrderDetails), QueryProblems)
)]
pub(super) async fn order(
    State(app): App,
    Id(order_id): Id,
    after: After,
) -> Result<Response, Problem> {
    stream_of(&order_id)?;
    let service = app.service()?;
    let applied = after.wait::<OrderDetails>(&service.kafold).await?;
    let row = service.kafold.query::<OrderDetails>().get(&order_id).await?;
    let row = row.ok_or_else(|| unknown_order(&order_id))?;
    let headers =
        [(header::ETAG, ascii(&format!("\"{}\"", row.version))), (POSITION, ascii(&row.position))];
    Ok((headers, applied, Json(row)).into_response())
}

/// The body of `GET /customers/{id}/orders`, the oldest order first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CustomerBody {
    customer: String,
    orders: Vec<CustomerOrder>,
}

/// The orders of a customer, the oldest first. A customer without orders has an empty list.
#[utoipa::path(
    get, path = "/customers/{id}/orders", params(("id" = String, Path), After<NoQuery>),
    responses((status = OK, description = "the orders", body = CustomerBody), QueryProblems)
)]
pub(super) async fn customer_orders(
    State(app): App,
    Id(customer): Id,
    after: After,
) -> Result<Response, Problem> {
    check_customer(&customer).map_err(|error| Problem::malformed(error.to_string()))?;
    let service = app.service()?;
    let applied = after.wait::<CustomerOrder>(&service.kafold).await?;
    let condition = CustomerOrder::customer.eq(customer.as_str());
    let query = service.kafold.query::<CustomerOrder>();
    let found = query.find(condition, CUSTOMER_ORDERS_MAX + 1).await?;
    let mut orders = whole(found, CUSTOMER_ORDERS_MAX, CustomerOrder::NAME)?;
    orders.sort_by(|a, b| (a.placed_at, &a.order_id).cmp(&(b.placed_at, &b.order_id)));
    Ok((applied, Json(CustomerBody { customer, orders })).into_response())
}

/// The body of `GET /reports/sales`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Report {
    rows: Vec<ReportRow>,
    total: Sums,
}

#[derive(Debug, Serialize, ToSchema)]
struct ReportRow {
    key: String,
    #[serde(flatten)]
    sums: Sums,
}

/// Sales by day, sku or customer.
#[utoipa::path(
    get, path = "/reports/sales", params(After<SalesQuery>),
    responses((status = OK, description = "the report", body = Report), QueryProblems)
)]
pub(super) async fn sales(State(app): App, after: After<SalesQuery>) -> Result<Response, Problem> {
    let by = after.query.by;
    let by = by.ok_or_else(|| Problem::malformed("add ?by=day, ?by=sku or ?by=customer"))?;
    let service = app.service()?;
    let projection = match by {
        By::Day => DaySales::NAME,
        By::Sku => SalesBySku::NAME,
        By::Customer => CustomerSales::NAME,
    };
    let applied = after.wait_for(&service.kafold, projection).await?;
    let report = match by {
        By::Day => {
            let rows = service.kafold.query::<DaySales>().all(REPORT_ROWS_MAX + 1).await?;
            let rows = whole(rows, REPORT_ROWS_MAX, projection)?;
            Report::of(rows.into_iter().map(|row| (row.day.to_string(), row.sums())))
        }
        By::Customer => {
            let rows = service.kafold.query::<CustomerSales>().all(REPORT_ROWS_MAX + 1).await?;
            let rows = whole(rows, REPORT_ROWS_MAX, projection)?;
            Report::of(rows.into_iter().map(|row| (row.customer.clone(), row.sums())))
        }
        By::Sku => {
            let sales = SalesBySku::read(service.kafold.database()).await?;
            // Rows do not tell how many orders there are: one may stand in several.
            Report { total: sales.total, ..Report::of(sales.rows) }
        }
    };
    Ok((applied, Json(report)).into_response())
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
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StreamBody {
    order_id: String,
    events: Vec<EventBody>,
}

#[derive(Debug, Serialize, ToSchema)]
struct EventBody {
    #[schema(value_type = u64)]
    version: Version,
    #[schema(value_type = String)]
    position: Position,
    event_id: uuid::Uuid,
    #[serde(rename = "type")]
    event_type: String,
    recorded_at: DateTime<Utc>,
    #[schema(value_type = uuid::Uuid)]
    command_id: kafold::CommandId,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    #[schema(value_type = Object)]
    data: Box<RawValue>,
}

/// The events of an order, from the log: the answer needs no `?after=`.
#[utoipa::path(
    get, path = "/orders/{id}/events", params(("id" = String, Path)),
    responses((status = OK, description = "the events", body = StreamBody), QueryProblems)
)]
pub(super) async fn events(State(app): App, Id(order_id): Id) -> Result<Response, Problem> {
    let stream = stream_of(&order_id)?;
    let service = app.service()?;
    let read = async || -> Result<Vec<_>, Problem> {
        Ok(service.handler.store().read(&stream, Version::EMPTY).try_collect().await?)
    };
    let mut events = read().await?;
    if events.is_empty() {
        // The stream index is fed behind the write, and other programs can change its tables: the owner
        // of the stream knows whether there are events.
        service.handler.load(&order_id).await?;
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

/// All rows, or a refusal: an answer that silently lacks some would be a wrong one.
fn whole<T>(rows: Vec<T>, rows_max: usize, view: &str) -> Result<Vec<T>, Problem> {
    if rows.len() <= rows_max {
        return Ok(rows);
    }
    let detail = format!("there are more than {rows_max} rows: query the view {view} in SQL");
    Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "too-many-rows", detail))
}

/// Returns the stream of an order, or the mistake in its id.
pub(super) fn stream_of(order_id: &str) -> Result<StreamId, Problem> {
    StreamId::new(Order::CATEGORY, order_id)
        .map_err(|error| Problem::invalid_id(Order::CATEGORY, &error))
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

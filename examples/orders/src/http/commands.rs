//! Everything that changes an order.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use kafold::{Position, Version};
use kafold_axum::{Body, Call, CommandProblems, Done, Http, Id, Problem, Rule};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::queries::stream_of;
use crate::order::{Line, OrderCommand, OrderError};
use crate::service::Service;

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PlaceBody {
    order_id: Option<String>,
    customer: String,
    lines: Vec<Line>,
    placed_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PaymentBody {
    amount_cents: i64,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ShipmentBody {
    carrier: String,
    tracking: String,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CancellationBody {
    reason: String,
}

/// The result of a command: version and position of its last event.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DoneBody {
    order_id: String,
    #[schema(value_type = u64)]
    version: Version,
    #[schema(value_type = String)]
    position: Option<Position>,
}

/// Places an order. Without `order_id` the order gets the command's id.
#[utoipa::path(
    post, path = "/orders", params(Call), request_body = PlaceBody,
    responses((status = CREATED, description = "done", body = DoneBody), CommandProblems)
)]
pub(super) async fn place(
    State(app): App,
    mut call: Call,
    Body(body): Body<PlaceBody>,
) -> Result<Response, Problem> {
    let service = app.service()?;
    let known = match call.used_for().await {
        Some(order_id) => Some(order_id),
        // A key of our own making was never seen before.
        None if !call.has_key() => None,
        None => service.placed_with(call.command_id()).await?,
    };
    let order_id = match (known, body.order_id) {
        (Some(known), Some(asked)) if known != asked => {
            return Err(Problem::key_reused("order", &known));
        }
        (Some(known), _) => known,
        (None, asked) => asked.unwrap_or_else(|| call.command_id().to_string()),
    };
    let has_time = body.placed_at.is_some();
    let placed_at = in_micros(body.placed_at.unwrap_or_else(|| call.now()));
    let command = OrderCommand::Place { customer: body.customer, lines: body.lines, placed_at };
    let done = call
        .handle_as(&service.handler, &order_id, &command, |event| event.is_of(&command, has_time))
        .await?;
    let location = format!("/orders/{}", utf8_percent_encode(&done.id, ENCODED));
    let location = HeaderValue::from_str(&location).expect("percent-encoded text is ASCII");
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], answer(done)).into_response())
}

/// Pays an order.
#[utoipa::path(
    post, path = "/orders/{id}/payment", params(("id" = String, Path), Call), request_body = PaymentBody,
    responses((status = OK, description = "done", body = DoneBody), CommandProblems)
)]
pub(super) async fn pay(
    State(app): App,
    Id(id): Id,
    call: Call,
    Body(PaymentBody { amount_cents }): Body<PaymentBody>,
) -> Result<Response, Problem> {
    change(&app, &id, call, OrderCommand::Pay { amount_cents }).await
}

/// Ships an order.
#[utoipa::path(
    post, path = "/orders/{id}/shipment", params(("id" = String, Path), Call), request_body = ShipmentBody,
    responses((status = OK, description = "done", body = DoneBody), CommandProblems)
)]
pub(super) async fn ship(
    State(app): App,
    Id(id): Id,
    call: Call,
    Body(ShipmentBody { carrier, tracking }): Body<ShipmentBody>,
) -> Result<Response, Problem> {
    change(&app, &id, call, OrderCommand::Ship { carrier, tracking }).await
}

/// Cancels an order.
#[utoipa::path(
    post, path = "/orders/{id}/cancellation", params(("id" = String, Path), Call),
    request_body = CancellationBody, responses((status = OK, description = "done", body = DoneBody), CommandProblems)
)]
pub(super) async fn cancel(
    State(app): App,
    Id(id): Id,
    call: Call,
    Body(CancellationBody { reason }): Body<CancellationBody>,
) -> Result<Response, Problem> {
    change(&app, &id, call, OrderCommand::Cancel { reason }).await
}

async fn change(
    app: &Http<Arc<Service>>,
    id: &str,
    call: Call,
    command: OrderCommand,
) -> Result<Response, Problem> {
    stream_of(id)?;
    let handler = &app.service()?.handler;
    let done = call.handle_as(handler, id, &command, |event| event.is_of(&command, true));
    Ok(answer(done.await?).into_response())
}

fn answer(done: Done) -> impl IntoResponse {
    let headers = done.headers();
    let Done { id, version, position, .. } = done;
    (headers, Json(DoneBody { order_id: id, version, position }))
}

/// Databases keep microseconds, and a leap second is the next second.
fn in_micros(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}

/// The stable name of each rule, and its status.
impl Rule for OrderError {
    fn problem(&self) -> (StatusCode, &str) {
        match self {
            Self::Unknown => (StatusCode::NOT_FOUND, "unknown-order"),
            Self::Exists => (StatusCode::CONFLICT, "order-exists"),
            Self::AlreadyPaid => (StatusCode::UNPROCESSABLE_ENTITY, "already-paid"),
            Self::WrongAmount { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "wrong-amount"),
            Self::NotPaid => (StatusCode::UNPROCESSABLE_ENTITY, "not-paid"),
            Self::AlreadyShipped => (StatusCode::UNPROCESSABLE_ENTITY, "already-shipped"),
            Self::Cancelled => (StatusCode::UNPROCESSABLE_ENTITY, "cancelled"),
            Self::Lines(_) => (StatusCode::UNPROCESSABLE_ENTITY, "lines-out-of-range"),
            Self::Quantity(_) => (StatusCode::UNPROCESSABLE_ENTITY, "quantity-out-of-range"),
            Self::Amount(_) => (StatusCode::UNPROCESSABLE_ENTITY, "amount-out-of-range"),
            Self::Text { .. } | Self::Customer(_) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid-text")
            }
            Self::PlacedAt(_) => (StatusCode::UNPROCESSABLE_ENTITY, "placed-at-out-of-range"),
        }
    }
}

/// Everything but what RFC 3986 leaves unreserved.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

//! Everything that changes an order.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use kafold::handler::{HandleError, Handled, Request};
use kafold::store::{AppendError, ReadError};
use kafold::{Aggregate, CommandId, ExpectedVersion, Position, StreamId, Version};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use super::App;
use super::extract::{CommandHeaders, JsonOf, PathId, Precondition};
use super::observe::Origin;
use super::problem::{Problem, RETRY_SOON, chain};
use crate::order::{Line, Order, OrderCommand, OrderError};
use crate::service::Service;

/// Marks the answer to a repeated request.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlaceBody {
    order_id: Option<String>,
    customer: String,
    lines: Vec<Line>,
    placed_at: Option<DateTime<Utc>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PaymentBody {
    amount_cents: i64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ShipmentBody {
    carrier: String,
    tracking: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CancellationBody {
    reason: String,
}

/// The result of a command: version and position of its last event.
#[derive(Debug, Serialize)]
struct Done {
    order_id: String,
    version: Version,
    position: Position,
    /// `true` in the answer to a repeated request.
    #[serde(skip)]
    is_repeat: bool,
}

/// One command with its headers.
struct Call<'a> {
    service: &'a Service,
    id: CommandId,
    /// Whether the client gave the id, so that it may have been applied before.
    is_given: bool,
    precondition: Precondition,
    request: Request,
}

/// `POST /orders`
pub(super) async fn place(
    State(app): State<Arc<App>>,
    Extension(origin): Extension<Origin>,
    headers: CommandHeaders,
    body: Result<JsonOf<PlaceBody>, Problem>,
) -> Result<Response, Problem> {
    let JsonOf(body) = body?;
    let call = Call::new(&app, origin, &headers)?;
    let use_of_key = call.service.use_of_key(call.id);
    let mut used_for = use_of_key.lock().await;
    let known = match &*used_for {
        Some(order_id) => Some(order_id.clone()),
        // A key of our own making was never seen before.
        None if !call.is_given => None,
        None => call.service.placed_with(call.id).await.map_err(read_problem)?,
    };
    let order_id = match (known, body.order_id) {
        (Some(known), Some(asked)) if known != asked => return Err(key_reused(&known)),
        (Some(known), _) => known,
        (None, asked) => asked.unwrap_or_else(|| call.id.to_string()),
    };
    let has_time = body.placed_at.is_some();
    let placed_at = body.placed_at.unwrap_or_else(|| app.clock.now());
    let command = OrderCommand::Place {
        customer: body.customer,
        lines: body.lines,
        placed_at: in_micros(placed_at),
    };
    let done = call.run(&mut used_for, &order_id, &command, has_time).await?;
    let location = format!("/orders/{}", utf8_percent_encode(&done.order_id, ENCODED));
    let location = HeaderValue::from_str(&location).expect("percent-encoded text is ASCII");
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], done).into_response())
}

/// `POST /orders/{id}/payment`
pub(super) async fn pay(
    app: State<Arc<App>>,
    origin: Extension<Origin>,
    id: PathId,
    headers: CommandHeaders,
    body: Result<JsonOf<PaymentBody>, Problem>,
) -> Result<Response, Problem> {
    let JsonOf(PaymentBody { amount_cents }) = body?;
    change(app, origin, id, headers, OrderCommand::Pay { amount_cents }).await
}

/// `POST /orders/{id}/shipment`
pub(super) async fn ship(
    app: State<Arc<App>>,
    origin: Extension<Origin>,
    id: PathId,
    headers: CommandHeaders,
    body: Result<JsonOf<ShipmentBody>, Problem>,
) -> Result<Response, Problem> {
    let JsonOf(ShipmentBody { carrier, tracking }) = body?;
    change(app, origin, id, headers, OrderCommand::Ship { carrier, tracking }).await
}

/// `POST /orders/{id}/cancellation`
pub(super) async fn cancel(
    app: State<Arc<App>>,
    origin: Extension<Origin>,
    id: PathId,
    headers: CommandHeaders,
    body: Result<JsonOf<CancellationBody>, Problem>,
) -> Result<Response, Problem> {
    let JsonOf(CancellationBody { reason }) = body?;
    change(app, origin, id, headers, OrderCommand::Cancel { reason }).await
}

async fn change(
    State(app): State<Arc<App>>,
    Extension(origin): Extension<Origin>,
    PathId(order_id): PathId,
    headers: CommandHeaders,
    command: OrderCommand,
) -> Result<Response, Problem> {
    stream_of(&order_id)?;
    let call = Call::new(&app, origin, &headers)?;
    let use_of_key = call.service.use_of_key(call.id);
    let mut used_for = use_of_key.lock().await;
    // The read model is not asked: commands go on while the database is away.
    if let Some(known) = used_for.as_ref().filter(|known| **known != order_id) {
        return Err(key_reused(known));
    }
    Ok(call.run(&mut used_for, &order_id, &command, true).await?.into_response())
}

impl<'a> Call<'a> {
    fn new(app: &'a App, origin: Origin, headers: &CommandHeaders) -> Result<Self, Problem> {
        Ok(Self {
            service: app.service()?,
            // Time-ordered, as good as random for whoever does not know it.
            id: headers.key.unwrap_or_else(|| CommandId(app.ids.event_id())),
            is_given: headers.key.is_some(),
            precondition: headers.precondition,
            request: Request {
                expected: headers.precondition.expected().unwrap_or(ExpectedVersion::Any),
                correlation_id: Some(origin.correlation_id),
                trace_parent: origin.trace_parent,
                deadline: Some(app.clock.instant() + app.limits.work()),
                ..Request::default()
            },
        })
    }

    /// Handles the command, or returns the first result of its key.
    async fn run(
        self,
        used_for: &mut Option<String>,
        order_id: &str,
        command: &OrderCommand,
        has_time: bool,
    ) -> Result<Done, Problem> {
        // Known before the outcome is: if this request is given up, the key still belongs to the order.
        let before = used_for.replace(order_id.to_owned());
        let outcome = self.handle(order_id, command, has_time).await;
        if matches!(&outcome, Err(problem) if problem.is_settled()) {
            *used_for = before;
        }
        outcome
    }

    async fn handle(
        self,
        order_id: &str,
        command: &OrderCommand,
        has_time: bool,
    ) -> Result<Done, Problem> {
        let Self { service, id, request, precondition, is_given } = self;
        let expected = request.expected;
        let done = match precondition {
            Precondition::Never if !is_given => return Err(precondition_failed(None)),
            Precondition::Never => {
                let found = service.store.find_command(&stream_of(order_id)?, id).await;
                let first = found.map_err(read_problem)?;
                let first = first.ok_or_else(|| precondition_failed(None))?;
                let (order_id, version) = (order_id.to_owned(), first.version);
                Done { order_id, version, position: first.position, is_repeat: true }
            }
            _ => match service
                .handler
                .handle_with(order_id, command, Request { command_id: Some(id), ..request })
                .await
            {
                Ok(handled) => done(order_id, &handled)?,
                Err(error) => return Err(problem_of(error, expected)),
            },
        };
        if done.is_repeat {
            let event = service.event(&stream_of(order_id)?, done.version).await;
            let event = event.map_err(read_problem)?;
            if !event.is_of(command, has_time) {
                return Err(key_reused(order_id));
            }
        }
        Ok(done)
    }
}

/// Databases keep microseconds, and a leap second is the next second.
fn in_micros(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}

/// The IETF draft "The Idempotency-Key HTTP Header Field" demands 422 for a key with another payload.
fn key_reused(order_id: &str) -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "idempotency-key-reused",
        format!(
            "the idempotency key was used for another request, on order {order_id}: send this one with \
             a new key"
        ),
    )
}

impl IntoResponse for Done {
    fn into_response(self) -> Response {
        let tag = format!("\"{}\"", self.version);
        let tag = HeaderValue::from_str(&tag).expect("a number in quotes is ASCII");
        let repeat = self.is_repeat.then_some([(REPLAYED, HeaderValue::from_static("true"))]);
        ([(header::ETAG, tag)], repeat, Json(self)).into_response()
    }
}

fn done(order_id: &str, handled: &Handled) -> Result<Done, Problem> {
    let order_id = order_id.to_owned();
    match handled.position {
        Some(position) => {
            let Handled { version, duplicate: is_repeat, .. } = *handled;
            Ok(Done { order_id, version, position, is_repeat })
        }
        None => {
            // Every command of an order decides an event.
            let error = std::io::Error::other("a command of an order changed nothing");
            Err(Problem::internal(&error))
        }
    }
}

/// The stream of an order, or what is wrong with its id.
pub(super) fn stream_of(order_id: &str) -> Result<StreamId, Problem> {
    StreamId::new(Order::CATEGORY, order_id).map_err(|error| invalid_id(&error))
}

fn invalid_id(error: &dyn std::fmt::Display) -> Problem {
    Problem::malformed(format!("the order id cannot be used: {error}"))
}

fn precondition_failed(actual: Option<Version>) -> Problem {
    let detail = match actual {
        Some(actual) => format!(
            "the order is at version {actual}, not the one in if-match: read it again and decide anew"
        ),
        None => "if-match never matches a weak entity tag: send the version in quotes alone".into(),
    };
    Problem::new(StatusCode::PRECONDITION_FAILED, "precondition-failed", detail)
}

pub(super) fn problem_of(error: HandleError<OrderError>, expected: ExpectedVersion) -> Problem {
    match error {
        HandleError::Rejected(rule) => rule_problem(&rule),
        HandleError::Conflict { actual, .. }
        | HandleError::Append(AppendError::Conflict { actual, .. }) => match (expected, actual) {
            (ExpectedVersion::Any, _) => Problem::new(
                StatusCode::CONFLICT,
                "conflict",
                "others changed the order at the same time, again and again: send it once more",
            ),
            (_, actual) => precondition_failed(Some(actual)),
        },
        HandleError::InvalidId(error) => invalid_id(&error),
        HandleError::Append(error) => append_problem(error),
        HandleError::Read(error) => read_problem(error),
        error @ (HandleError::Codec { .. }
        | HandleError::InProjection { .. }
        | HandleError::InvalidCommit(_)) => Problem::internal(&error),
    }
}

/// The stable name of each rule, and its status.
fn rule_problem(rule: &OrderError) -> Problem {
    let (status, name) = match rule {
        OrderError::Unknown => (StatusCode::NOT_FOUND, "unknown-order"),
        OrderError::Exists => (StatusCode::CONFLICT, "order-exists"),
        OrderError::AlreadyPaid => (StatusCode::UNPROCESSABLE_ENTITY, "already-paid"),
        OrderError::WrongAmount { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "wrong-amount"),
        OrderError::NotPaid => (StatusCode::UNPROCESSABLE_ENTITY, "not-paid"),
        OrderError::AlreadyShipped => (StatusCode::UNPROCESSABLE_ENTITY, "already-shipped"),
        OrderError::Cancelled => (StatusCode::UNPROCESSABLE_ENTITY, "cancelled"),
        OrderError::Lines(_) => (StatusCode::UNPROCESSABLE_ENTITY, "lines-out-of-range"),
        OrderError::Quantity(_) => (StatusCode::UNPROCESSABLE_ENTITY, "quantity-out-of-range"),
        OrderError::Amount(_) => (StatusCode::UNPROCESSABLE_ENTITY, "amount-out-of-range"),
        OrderError::Text { .. } | OrderError::Customer(_) => {
            (StatusCode::UNPROCESSABLE_ENTITY, "invalid-text")
        }
        OrderError::PlacedAt(_) => (StatusCode::UNPROCESSABLE_ENTITY, "placed-at-out-of-range"),
    };
    Problem::new(status, name, rule.to_string())
}

fn append_problem(error: AppendError) -> Problem {
    match error {
        AppendError::NotOwner { .. } => {
            let detail = format!("{error}: send it there, or restart this one to take over");
            Problem::unavailable("not-owner", RETRY_SOON, detail)
        }
        AppendError::NotAppended { .. } => {
            Problem::unavailable("not-appended", RETRY_SOON, format!("{error}: send it again"))
        }
        AppendError::OutcomeUnknown { command_id } => {
            let detail = format!(
                "it may or may not have happened: send it again with 'idempotency-key: \
                 {command_id}', which applies it at most once"
            );
            Problem::unavailable("outcome-unknown", RETRY_SOON, detail)
        }
        AppendError::Unavailable { retry_after, cause } => Problem::unavailable(
            "unavailable",
            retry_after,
            format!("the log does not take it now, nothing was written: {cause}"),
        ),
        AppendError::TooLarge { .. } => {
            Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "event-too-large", error.to_string())
        }
        AppendError::Conflict { .. } => {
            Problem::new(StatusCode::CONFLICT, "conflict", error.to_string())
        }
    }
}

/// The problem of something that could not be read.
pub(super) fn read_problem(error: ReadError) -> Problem {
    match error {
        ReadError::Unavailable { retry_after, cause } => Problem::unavailable(
            "unavailable",
            retry_after,
            format!("it cannot be read now, nothing was changed: {cause}"),
        ),
        // No decision rests on a damaged stream until an operator repairs the damage; the service's
        // health reports the damage too.
        error @ ReadError::Diverged { .. } => {
            tracing::error!(error = %chain(&error), "a stream cannot be read");
            Problem::unavailable("not-ready", RETRY_SOON, chain(&error))
        }
    }
}

/// Everything but what RFC 3986 leaves unreserved.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

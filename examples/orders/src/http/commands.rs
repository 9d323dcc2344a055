//! Everything that changes an order.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, SubsecRound, Utc};
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

/// What a command came to: version and position of its last event.
#[derive(Debug, Serialize)]
struct Done {
    order_id: String,
    version: Version,
    position: Position,
}

/// One command, as its headers tell it.
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
    let body = headers.perhaps_repeated(body)?;
    let call = Call::new(&app, origin, &headers)?;
    let placement = call.service.placement(call.id);
    let mut placed_as = placement.lock().await;
    let known = match &*placed_as {
        Some(order_id) => Some(order_id.clone()),
        // A key of our own making was never seen before.
        None if !call.is_given => None,
        None => call.service.placed_with(call.id).await.map_err(read_problem)?,
    };
    let body = body.map(|JsonOf(body)| body);
    let asked = body.as_ref().ok().and_then(|body| body.order_id.clone());
    let order_id = known.or(asked).unwrap_or_else(|| call.id.to_string());
    let command = body.map(|body| OrderCommand::Place {
        customer: body.customer,
        lines: body.lines,
        // Databases keep microseconds.
        placed_at: body.placed_at.unwrap_or_else(|| app.clock.now()).trunc_subsecs(6),
    });
    // Known before the outcome is: should this request be given up, the same key still goes to the
    // same order.
    let before = placed_as.replace(order_id.clone());
    let outcome = call.run(&order_id, command).await;
    if matches!(&outcome, Err(problem) if problem.is_settled()) {
        *placed_as = before;
    }
    let done = outcome?;
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
    let command = body.map(|JsonOf(body)| OrderCommand::Pay { amount_cents: body.amount_cents });
    change(app, origin, id, headers, command).await
}

/// `POST /orders/{id}/shipment`
pub(super) async fn ship(
    app: State<Arc<App>>,
    origin: Extension<Origin>,
    id: PathId,
    headers: CommandHeaders,
    body: Result<JsonOf<ShipmentBody>, Problem>,
) -> Result<Response, Problem> {
    let command = body
        .map(|JsonOf(ShipmentBody { carrier, tracking })| OrderCommand::Ship { carrier, tracking });
    change(app, origin, id, headers, command).await
}

/// `POST /orders/{id}/cancellation`
pub(super) async fn cancel(
    app: State<Arc<App>>,
    origin: Extension<Origin>,
    id: PathId,
    headers: CommandHeaders,
    body: Result<JsonOf<CancellationBody>, Problem>,
) -> Result<Response, Problem> {
    let command = body.map(|JsonOf(body)| OrderCommand::Cancel { reason: body.reason });
    change(app, origin, id, headers, command).await
}

async fn change(
    State(app): State<Arc<App>>,
    Extension(origin): Extension<Origin>,
    PathId(order_id): PathId,
    headers: CommandHeaders,
    command: Result<OrderCommand, Problem>,
) -> Result<Response, Problem> {
    stream_of(&order_id)?;
    let command = headers.perhaps_repeated(command)?;
    let done = Call::new(&app, origin, &headers)?.run(&order_id, command).await?;
    Ok(done.into_response())
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

    /// Handles the command, or answers the first result of its key: whatever the body says now,
    /// even when it cannot be read.
    async fn run(
        self,
        order_id: &str,
        command: Result<OrderCommand, Problem>,
    ) -> Result<Done, Problem> {
        let command = match command {
            Ok(command) if self.precondition != Precondition::Never => command,
            Ok(_) => return self.first_result(order_id, precondition_failed(None)).await,
            Err(problem) => return self.first_result(order_id, problem).await,
        };
        let Self { service, id, request, .. } = self;
        let expected = request.expected;
        match service.handler.handle_with(order_id, &command, id, request).await {
            Ok(handled) => done(order_id, &handled),
            Err(error) => Err(problem_of(error, expected)),
        }
    }

    async fn first_result(&self, order_id: &str, otherwise: Problem) -> Result<Done, Problem> {
        let stream = match stream_of(order_id) {
            Ok(stream) if self.is_given => stream,
            _ => return Err(otherwise),
        };
        let found = self.service.store.find_command(&stream, self.id).await;
        match found.map_err(read_problem)? {
            Some(first) => {
                let (order_id, version) = (order_id.to_owned(), first.version);
                Ok(Done { order_id, version, position: first.position })
            }
            None => Err(otherwise),
        }
    }
}

impl IntoResponse for Done {
    fn into_response(self) -> Response {
        let tag = format!("\"{}\"", self.version);
        let tag = HeaderValue::from_str(&tag).expect("a number in quotes is ASCII");
        ([(header::ETAG, tag)], Json(self)).into_response()
    }
}

fn done(order_id: &str, handled: &Handled) -> Result<Done, Problem> {
    let order_id = order_id.to_owned();
    match handled.position {
        Some(position) => Ok(Done { order_id, version: handled.version, position }),
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

fn problem_of(error: HandleError<OrderError>, expected: ExpectedVersion) -> Problem {
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
        error @ (HandleError::Codec { .. } | HandleError::InvalidCommit(_)) => {
            Problem::internal(&error)
        }
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

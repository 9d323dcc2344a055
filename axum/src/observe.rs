//! What surrounds every request: its id, its limits, its metrics, and answers when it panics.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use kafold::trace;
use tokio::sync::OwnedSemaphorePermit;
use tracing::Instrument;

use crate::app::Shared;
use crate::extract::has_valid_escapes;
use crate::problem::{Problem, RETRY_SOON};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
/// Longest id taken over from a request's headers, in bytes; a longer one is replaced by ours.
const ID_BYTES_MAX: usize = 128;

/// The origin of a request, for the metadata of the events that follow from it.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    /// `x-correlation-id`, else the request's own id.
    pub(crate) correlation_id: String,
    /// `traceparent`, when it is one.
    pub(crate) trace_parent: Option<String>,
}

/// Gives the request an id, runs it within deadline and concurrency, and records logs and metrics.
pub(crate) async fn around(
    State(app): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = app.clock.instant();
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let request_id =
        id_of(request.headers(), &REQUEST_ID).unwrap_or_else(|| app.ids.event_id().to_string());
    let correlation_id = id_of(request.headers(), &CORRELATION_ID);
    let origin = Origin {
        correlation_id: correlation_id.unwrap_or_else(|| request_id.clone()),
        trace_parent: trace_parent(request.headers()),
    };
    let span = span_of(&request, &request_id, route.as_deref());
    trace::set_parent(&span, origin.trace_parent.as_deref());
    request.extensions_mut().insert(origin);
    let mut response = within_limits(&app, request, next).instrument(span.clone()).await;
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let took = app.clock.instant().saturating_duration_since(begun);
    let status = response.status().as_u16();
    span.record("http.response.status_code", i64::from(status));
    if response.status().is_server_error() {
        trace::failed(&span, response.status().as_str());
    }
    span.in_scope(|| tracing::debug!(status, took_ms = took.as_secs_f64() * 1000.0, "answered"));
    let labels = [
        ("method", known_method(&method).unwrap_or("other").to_owned()),
        ("route", route.unwrap_or_else(|| "none".to_owned())),
        ("status", status.to_string()),
    ];
    metrics::counter!("http_requests_total", &labels).increment(1);
    metrics::histogram!("http_request_duration_seconds", &labels).record(took.as_secs_f64());
    response
}

/// Returns the span of a request by the conventions of OpenTelemetry. The status is recorded later.
fn span_of(request: &Request, id: &str, route: Option<&str>) -> tracing::Span {
    use tracing::field::Empty;
    let method = known_method(request.method());
    let name = method.unwrap_or("HTTP");
    tracing::info_span!(
        "request",
        id,
        otel.name = route.map_or_else(|| name.to_owned(), |route| format!("{name} {route}")),
        otel.kind = "server",
        http.request.method = method.unwrap_or("_OTHER"),
        http.route = route,
        url.scheme = "http",
        url.path = request.uri().path(),
        http.response.status_code = Empty,
        error.type = Empty,
        otel.status_code = Empty,
    )
}

/// The place of a request among the requests under way, released with its last clone. A command
/// takes the place when its body has arrived.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turn(Arc<OnceLock<OwnedSemaphorePermit>>);

impl Turn {
    /// Takes the place, or returns 503 when all places are taken.
    pub(crate) fn take(&self, app: &Shared) -> Result<(), Problem> {
        let permit = Arc::clone(&app.permits).try_acquire_owned().map_err(|_| {
            let detail = "as many requests as this service takes are under way: try again";
            Problem::unavailable("overloaded", RETRY_SOON, detail)
        })?;
        // Taken once: a second permit is released at once.
        self.0.get_or_init(|| permit);
        Ok(())
    }
}

async fn within_limits(app: &Shared, mut request: Request, next: Next) -> Response {
    if !has_valid_escapes(request.uri().path()) {
        let detail = "the path has a '%' without two hexadecimal digits: percent-encode it";
        return Problem::malformed(detail).into_response();
    }
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let turn = Turn::default();
    // An orchestrator must not end the process because of an overload.
    if is_read
        && !request.uri().path().starts_with("/health/")
        && let Err(overloaded) = turn.take(app)
    {
        return overloaded.into_response();
    }
    request.extensions_mut().insert(turn.clone());
    let deadline = app.limits.deadline;
    tokio::select! {
        biased;
        response = next.run(request) => response,
        // Commands, waits and bodies end by themselves before this; what remains is a database that
        // does not answer.
        () = app.clock.sleep(deadline) => if is_read {
            let detail = format!("no answer within {deadline:?}: try again");
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "timeout", detail).into_response()
        } else {
            let detail = format!("no answer within {deadline:?}: send it again with the same \
                                  idempotency-key, which applies it at most once");
            Problem::unavailable("outcome-unknown", RETRY_SOON, detail).into_response()
        },
    }
}

/// The answer when a handler panicked.
#[expect(clippy::needless_pass_by_value, reason = "catch-panic hands it over so")]
pub(crate) fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let error = std::io::Error::other(text.unwrap_or_else(|| "panicked".to_owned()));
    Problem::internal(&error).into_response()
}

fn id_of(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let text = headers.get(name)?.to_str().ok()?;
    let is_plain = (1..=ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic());
    is_plain.then(|| text.to_owned())
}

fn trace_parent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("traceparent")?.to_str().ok()?;
    trace::is_trace_parent(text).then(|| text.to_owned())
}

/// A method made up by a client must not become a metric or a name of its own.
fn known_method(method: &Method) -> Option<&str> {
    match *method {
        Method::GET
        | Method::HEAD
        | Method::POST
        | Method::PUT
        | Method::PATCH
        | Method::DELETE
        | Method::OPTIONS => Some(method.as_str()),
        _ => None,
    }
}

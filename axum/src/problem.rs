//! [`Problem`]: errors as `application/problem+json` (RFC 9457), and those of commands and queries.

use std::error::Error;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kafold::handler::HandleError;
use kafold::ids::InvalidStreamId;
use kafold::store::{AppendError, ReadError};
use kafold::{ExpectedVersion, Version};
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of every error here.
pub(crate) const PROBLEM_JSON: &str = "application/problem+json";

/// The default of `Retry-After`.
pub(crate) const RETRY_SOON: Duration = Duration::from_secs(1);

/// One error as it is answered.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Problem {
    /// `/problems/NAME`: a stable name, for programs.
    #[serde(rename = "type")]
    #[schema(example = "/problems/malformed")]
    kind: String,
    #[schema(value_type = String)]
    title: &'static str,
    #[serde(serialize_with = "as_number")]
    #[schema(value_type = u16)]
    status: StatusCode,
    /// The thing and the remedy, for people.
    detail: String,
    /// One sentence each, where several things are wrong at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
    #[serde(skip)]
    headers: Vec<(HeaderName, HeaderValue)>,
}

fn as_number<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

impl Problem {
    /// A problem of this stable name; the detail names the thing and the remedy.
    pub fn new(status: StatusCode, name: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("/problems/{name}"),
            title: status.canonical_reason().unwrap_or("Error"),
            status,
            detail: detail.into(),
            reasons: Vec::new(),
            headers: Vec::new(),
        }
    }

    /// The request cannot be read.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// An id that no stream of this category has.
    pub fn invalid_id(category: &str, error: &InvalidStreamId) -> Self {
        Self::malformed(format!("the {category} id cannot be used: {error}"))
    }

    /// There is no such thing.
    pub fn unknown(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown", detail)
    }

    /// It cannot be done now; the name says why, and nothing is lost by sending it again.
    pub fn unavailable(name: &str, retry_after: Duration, detail: impl Into<String>) -> Self {
        // Whole seconds, and at least one: 0 would ask for a busy loop.
        let seconds = retry_after.as_millis().div_ceil(1000).clamp(1, 3600) as u64;
        Self::new(StatusCode::SERVICE_UNAVAILABLE, name, detail)
            .with_header(header::RETRY_AFTER, HeaderValue::from(seconds))
    }

    /// Our own fault. The caller learns nothing of it, the log everything.
    pub fn internal(error: &(dyn Error + 'static)) -> Self {
        tracing::error!(error = %chain(error), "a request failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the service failed; its log says more under the request id in x-request-id",
        )
    }

    /// The broken rule of a domain, with its name and status.
    pub fn rule(rule: &impl Rule) -> Self {
        let (status, name) = rule.problem();
        Self::new(status, name, rule.to_string())
    }

    /// Returns `true` if nothing came of the request and nothing will. A 503 may hide an unknown outcome.
    pub(crate) fn is_settled(&self) -> bool {
        self.status.is_client_error()
    }

    /// Changes the detail.
    pub(crate) fn with_detail(mut self, change: impl FnOnce(&str) -> String) -> Self {
        self.detail = change(&self.detail);
        self
    }

    /// Adds the single things that are wrong.
    pub fn with_reasons(mut self, reasons: Vec<String>) -> Self {
        self.reasons = reasons;
        self
    }

    /// Adds a header to the answer.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// A broken rule of a domain as a [`Problem`]: `impl Rule for Overdrawn {}` answers 422 and
/// `/problems/rejected`, with the text of the error.
pub trait Rule: Error {
    /// Returns the status and the stable name of the problem.
    fn problem(&self) -> (StatusCode, &str) {
        (StatusCode::UNPROCESSABLE_ENTITY, "rejected")
    }
}

/// Returns the problem of a command on an aggregate of this category.
pub(crate) fn of_command<E: Rule>(
    category: &str,
    error: HandleError<E>,
    expected: ExpectedVersion,
) -> Problem {
    match error {
        HandleError::Rejected(rule) => Problem::rule(&rule),
        HandleError::Conflict { actual, .. }
        | HandleError::Append(AppendError::Conflict { actual, .. }) => match expected {
            ExpectedVersion::Any => Problem::new(
                StatusCode::CONFLICT,
                "conflict",
                format!(
                    "others changed the {category} at the same time, again and again: send it once more"
                ),
            ),
            _ => precondition_failed(category, Some(actual)),
        },
        HandleError::InvalidId(error) => Problem::invalid_id(category, &error),
        HandleError::Append(error) => error.into(),
        HandleError::Read(error) => error.into(),
        error @ (HandleError::Codec { .. }
        | HandleError::InProjection { .. }
        | HandleError::InvalidCommit(_)) => Problem::internal(&error),
    }
}

pub(crate) fn precondition_failed(category: &str, actual: Option<Version>) -> Problem {
    let detail = match actual {
        Some(actual) => format!(
            "the {category} is at version {actual}, not the one in if-match: read it again and decide anew"
        ),
        None => "if-match never matches a weak entity tag: send the version in quotes alone".into(),
    };
    Problem::new(StatusCode::PRECONDITION_FAILED, "precondition-failed", detail)
}

/// The answer to `If-Match: *` on a stream without events.
pub(crate) fn absent(category: &str) -> Problem {
    let detail =
        format!("if-match demands an existing stream, and there is no {category} with this id");
    Problem::new(StatusCode::PRECONDITION_FAILED, "precondition-failed", detail)
}

impl<E: Rule> From<HandleError<E>> for Problem {
    fn from(error: HandleError<E>) -> Self {
        of_command("stream", error, ExpectedVersion::Any)
    }
}

impl From<AppendError> for Problem {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::NotOwner { .. } => {
                let detail = format!("{error}: send it there, or restart this one to take over");
                Self::unavailable("not-owner", RETRY_SOON, detail)
            }
            AppendError::NotAppended { .. } => {
                Self::unavailable("not-appended", RETRY_SOON, format!("{error}: send it again"))
            }
            AppendError::OutcomeUnknown { command_id } => {
                let detail = format!(
                    "it may or may not have happened: send it again with 'idempotency-key: \
                     {command_id}', which applies it at most once"
                );
                Self::unavailable("outcome-unknown", RETRY_SOON, detail)
            }
            AppendError::Unavailable { retry_after, cause } => Self::unavailable(
                "unavailable",
                retry_after,
                format!("the log does not take it now, nothing was written: {cause}"),
            ),
            AppendError::TooLarge { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "event-too-large", error.to_string())
            }
            AppendError::Conflict { .. } => {
                Self::new(StatusCode::CONFLICT, "conflict", error.to_string())
            }
        }
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unavailable { retry_after, cause } => Self::unavailable(
                "unavailable",
                retry_after,
                format!("it cannot be read now, nothing was changed: {cause}"),
            ),
            // No decision rests on a damaged stream until an operator repairs the damage; the service's
            // health reports the damage too.
            error @ ReadError::Diverged { .. } => {
                tracing::error!(error = %chain(&error), "a stream cannot be read");
                Self::unavailable("not-ready", RETRY_SOON, chain(&error))
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(&self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.extend(self.headers);
        response
    }
}

/// Returns an error with its chain of causes, in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many errors already end with what their cause says.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

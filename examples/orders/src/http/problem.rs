//! Errors as `application/problem+json` (RFC 9457): what went wrong and what to do about it.

use std::error::Error;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// The media type of every error here.
pub(crate) const PROBLEM_JSON: &str = "application/problem+json";

/// What `Retry-After` says where nothing better is known.
pub(crate) const RETRY_SOON: Duration = Duration::from_secs(1);

/// One error as it is answered.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Problem {
    /// `/problems/NAME`: a stable name, for programs.
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    #[serde(serialize_with = "as_number")]
    status: StatusCode,
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
    pub(crate) fn new(status: StatusCode, name: &str, detail: impl Into<String>) -> Self {
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
    pub(crate) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// There is no such thing.
    pub(crate) fn unknown(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown", detail)
    }

    /// It cannot be done now; the name says why, and nothing is lost by sending it again.
    pub(crate) fn unavailable(
        name: &str,
        retry_after: Duration,
        detail: impl Into<String>,
    ) -> Self {
        // Whole seconds, and at least one: 0 would ask for a busy loop.
        let seconds = retry_after.as_millis().div_ceil(1000).clamp(1, 3600) as u64;
        Self::new(StatusCode::SERVICE_UNAVAILABLE, name, detail)
            .with_header(header::RETRY_AFTER, HeaderValue::from(seconds))
    }

    /// Our own fault. The caller learns nothing of it, the log everything.
    pub(crate) fn internal(error: &(dyn Error + 'static)) -> Self {
        tracing::error!(error = %chain(error), "a request failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the service failed; its log says more under the request id in x-request-id",
        )
    }

    /// Whether nothing came of the request and nothing will. A 503 may hide an unknown outcome.
    pub(crate) fn is_settled(&self) -> bool {
        self.status.is_client_error()
    }

    /// Adds the single things that are wrong.
    pub(crate) fn with_reasons(mut self, reasons: Vec<String>) -> Self {
        self.reasons = reasons;
        self
    }

    /// Adds a header to the answer.
    pub(crate) fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
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

/// An error with everything that led to it, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
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

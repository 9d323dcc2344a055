//! Ids, JSON bodies and query strings of requests, with problems that name the place of a mistake.

use axum::body;
use axum::extract::{self, FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use futures_util::StreamExt;
use kafold::clock::within;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use tokio::sync::SemaphorePermit;

use crate::app::{Http, Shared};
use crate::observe::Turn;
use crate::problem::{Problem, RETRY_SOON};
use crate::server::BODY_TIMEOUT;

/// Largest body, in bytes; a longer body is answered 413.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// A body up to this size is always read. Larger bodies share a limit, because a client may send
/// most of a body and wait.
pub(crate) const SMALL_BODY_BYTES_MAX: usize = 16 * 1024;
/// Of a body that is too large, as much is read and thrown away: a client that sends without
/// waiting for an answer would otherwise see a broken connection instead of the 413.
const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Extracts the `{id}` of a path.
#[derive(Debug, Clone)]
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(rejection) => Err(Problem::malformed(format!(
                "the id in the path cannot be read: {}; percent-encode it as UTF-8",
                rejection.body_text()
            ))),
        }
    }
}

/// Extracts the query string as `T`.
#[derive(Debug, Clone)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        query(&parts.uri).map(Self)
    }
}

/// Reads the query string of a URI as `T`.
pub(crate) fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Problem> {
    match extract::Query::<T>::try_from_uri(uri) {
        Ok(extract::Query(query)) => Ok(query),
        Err(rejection) => Err(Problem::malformed(format!(
            "the query string cannot be read: {}",
            std::error::Error::source(&rejection)
                .map_or_else(|| rejection.body_text(), ToString::to_string)
        ))),
    }
}

/// Extracts a JSON body as `T`. The problem of a body that cannot be read names the field by JSON pointer
/// (RFC 6901). Limits: 1 MiB, 10 s and the deadline of the request.
#[derive(Debug, Clone)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<Http<S>> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, http: &Http<S>) -> Result<Self, Problem> {
        let app = &*http.shared;
        let (parts, body) = request.into_parts();
        let is_json = is_json(&parts.headers);
        let patience = app.limits.work().min(BODY_TIMEOUT);
        let mut large = None;
        let body = read_body(app, &parts.headers, body, &mut large);
        let read = within(&*app.clock, patience, body).await;
        let bytes = read.unwrap_or_else(|| {
            let detail = format!("the body was not complete within {patience:?}: nothing was done");
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "body-timeout", detail))
        })?;
        parts.extensions.get::<Turn>().map_or(Ok(()), |turn| turn.take(app))?;
        if !is_json {
            return Err(Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "the body must be JSON: send the header 'content-type: application/json'",
            ));
        }
        match from_json(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(reason) => Err(Problem::malformed(format!("the body cannot be read: {reason}"))),
        }
    }
}

/// Parses the document as `T`. An error names the place by JSON pointer (RFC 6901):
/// `/lines/0/quantity: …`.
///
/// An unknown or missing field is named behind the pointer of its parent. The pointer of the whole
/// document is empty and left out.
fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut document = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut document).map_err(|error| {
        // serde quotes field names with backquotes.
        let reason = error.inner().to_string().replace('`', "\"");
        let pointer = pointer(error.path(), &reason);
        if pointer.is_empty() { reason } else { format!("{pointer}: {reason}") }
    })?;
    document.end().map_err(|error| error.to_string())?;
    Ok(value)
}

fn pointer(path: &serde_path_to_error::Path, reason: &str) -> String {
    let mut keys: Vec<String> = path
        .iter()
        .map(|segment| match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key } | Segment::Enum { variant: key } => key.clone(),
            Segment::Unknown => "?".to_owned(),
        })
        .collect();
    // The path of an unknown field ends with the field, the path of a missing field ends with the
    // parent.
    keys.pop_if(|last| reason.starts_with(&format!("unknown field \"{last}\"")));
    let escaped = |key: &String| format!("/{}", key.replace('~', "~0").replace('/', "~1"));
    keys.iter().map(escaped).collect()
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(Ok(text)) = headers.get(header::CONTENT_TYPE).map(HeaderValue::to_str) else {
        return false;
    };
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Reads a body. A body which is not small holds a permit in `large`, as long as the caller holds
/// the bytes.
async fn read_body<'a>(
    app: &'a Shared,
    headers: &HeaderMap,
    body: body::Body,
    large: &mut Option<SemaphorePermit<'a>>,
) -> Result<Vec<u8>, Problem> {
    let too_large = || {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            format!("a body has at most {BODY_BYTES_MAX} bytes: send less in one request"),
        )
    };
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let announced = announced.and_then(|text| text.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX) && headers.contains_key(header::EXPECT)
    {
        // The client waits for leave to send the body: it gets the answer instead.
        return Err(too_large());
    }
    let mut chunks = body.into_data_stream();
    let (mut bytes, mut seen) = (Vec::new(), 0_usize);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            Problem::malformed(format!("the body ended before it was complete: {error}"))
        })?;
        seen += chunk.len();
        if seen > SMALL_BODY_BYTES_MAX && large.is_none() {
            *large = Some(app.large_bodies.try_acquire().map_err(|_| {
                let detail = "as many large bodies as this service takes are under way: try again";
                Problem::unavailable("overloaded", RETRY_SOON, detail)
            })?);
        }
        if seen <= BODY_BYTES_MAX {
            bytes.extend_from_slice(&chunk);
        } else if seen > DRAIN_BYTES_MAX {
            break;
        }
    }
    if seen > BODY_BYTES_MAX { Err(too_large()) } else { Ok(bytes) }
}

/// Whether every `%` in a path begins an escape of two hexadecimal digits.
pub(crate) fn has_valid_escapes(path: &str) -> bool {
    path.split('%')
        .skip(1)
        .all(|rest| rest.len() >= 2 && rest.as_bytes()[..2].iter().all(u8::is_ascii_hexdigit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_two_hexadecimal_digits() {
        for good in ["/orders/a", "/orders/%41%e2%82%ac", ""] {
            assert!(has_valid_escapes(good), "{good}");
        }
        for bad in ["/%", "/%4", "/%zz", "/a%4/b", "/%%41"] {
            assert!(!has_valid_escapes(bad), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_in_a_body_is_named_by_its_pointer() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[expect(dead_code, reason = "only read")]
        struct Body {
            lines: Vec<Line>,
            #[serde(default, rename = "a/b~")]
            odd: Option<u8>,
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[expect(dead_code, reason = "only read")]
        struct Line {
            quantity: i64,
        }
        for (body, begin) in [
            (r#"{"lines":[{"quantity":"1"}]}"#, "/lines/0/quantity: invalid type: string \"1\""),
            (r#"{"lines":[{"quantity":1},{}]}"#, "/lines/1: missing field \"quantity\""),
            (r#"{"lines":[{"quantity":1,"x":1}]}"#, "/lines/0: unknown field \"x\""),
            (
                r#"{"lines":[{"quantity":1,"quantity":1}]}"#,
                "/lines/0: duplicate field \"quantity\"",
            ),
            (r#"{"lines":7}"#, "/lines: invalid type: integer `7`".replace('`', "\"").as_str()),
            (r#"{"a/b~":-1,"lines":[]}"#, "/a~1b~0: invalid value"),
            ("{}", "missing field \"lines\""),
            (r#"{"x":1}"#, "unknown field \"x\""),
            (r#"{"lines":[]} {}"#, "trailing characters"),
            ("", "EOF while parsing"),
        ] {
            let reason = from_json::<Body>(body.as_bytes()).expect_err(body);
            assert!(reason.starts_with(begin), "{body}: {reason}");
        }
        assert!(from_json::<Body>(br#"{"lines":[]}"#).is_ok());
    }
}

//! What a request brings: ids, JSON bodies, query strings, and the headers of commands.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use futures_util::StreamExt;
use kafold::clock::within;
use kafold::{CommandId, ExpectedVersion, Position, Version};
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use tokio::sync::SemaphorePermit;
use uuid::Uuid;

use super::App;
use super::observe::Turn;
use super::problem::{Problem, RETRY_SOON};
use super::server::BODY_TIMEOUT;

/// Largest body that is read; an order of the most and longest lines has a tenth of it.
pub(crate) const BODY_BYTES_MAX: usize = 1024 * 1024;
/// A body up to this size is always read. Larger bodies share a limit, because a client may send
/// most of a body and wait.
pub(crate) const SMALL_BODY_BYTES_MAX: usize = 16 * 1024;
/// Of a body that is too large, as much is read and thrown away: a client that sends without
/// waiting for an answer would otherwise see a broken connection instead of the 413.
const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Most positions in one `?after=`: more than any log has partitions.
const POSITIONS_MAX: usize = 10_000;

/// The `{id}` of a path.
pub(crate) struct PathId(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
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

/// The query string as `T`.
pub(crate) struct QueryOf<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(rejection) => Err(Problem::malformed(format!(
                "the query string cannot be read: {}",
                std::error::Error::source(&rejection)
                    .map_or_else(|| rejection.body_text(), ToString::to_string)
            ))),
        }
    }
}

/// A JSON body as `T`.
pub(crate) struct JsonOf<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for JsonOf<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Problem> {
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
    app: &'a App,
    headers: &HeaderMap,
    body: Body,
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

/// The headers of a command.
#[derive(Debug, Clone)]
pub(crate) struct CommandHeaders {
    /// `Idempotency-Key`: the command id, when the client gave one.
    pub(crate) key: Option<CommandId>,
    /// `If-Match`.
    pub(crate) precondition: Precondition,
}

/// What `If-Match` demands of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Precondition {
    /// Nothing (no header, or `*`: every command but the first needs an order anyway).
    None,
    /// Exactly this version.
    Version(Version),
    /// Something no order ever satisfies: a weak entity tag, which `If-Match` never matches.
    Never,
}

impl Precondition {
    /// As a store checks it; `None` for [`Precondition::Never`].
    pub(crate) fn expected(self) -> Option<ExpectedVersion> {
        match self {
            Self::None => Some(ExpectedVersion::Any),
            Self::Version(version) => Some(ExpectedVersion::Exact(version)),
            Self::Never => None,
        }
    }
}

impl FromStr for Precondition {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        if text == "*" {
            return Ok(Self::None);
        }
        let (weak, tag) = text.strip_prefix("W/").map_or((false, text), |tag| (true, tag));
        let digits = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).ok_or(())?;
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(());
        }
        let version = Version(digits.parse().map_err(drop)?);
        Ok(if weak { Self::Never } else { Self::Version(version) })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for CommandHeaders {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // The IETF's draft writes the key in quotes, as a string of a structured field.
        let unquoted = |text: &str| {
            let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
            Uuid::from_str(inner.unwrap_or(text))
        };
        let key = parsed(&parts.headers, "idempotency-key", "a UUID", unquoted)?;
        let precondition = parsed(
            &parts.headers,
            "if-match",
            "one version in quotes, such as \"3\", as the ETag of GET /orders/{id} has it",
            Precondition::from_str,
        )?;
        Ok(Self {
            key: key.map(CommandId),
            precondition: precondition.unwrap_or(Precondition::None),
        })
    }
}

/// The header's value, when it is there at most once and can be read.
fn parsed<T, E>(
    headers: &HeaderMap,
    name: &str,
    expected: &str,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<Option<T>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let read = value.to_str().ok().and_then(|text| parse(text.trim()).ok());
    match (read, values.next()) {
        (Some(read), None) => Ok(Some(read)),
        (None, _) => Err(Problem::malformed(format!(
            "the header {name} must be {expected}, not {}",
            Shown(value)
        ))),
        (_, Some(_)) => Err(Problem::malformed(format!("the header {name} may stand only once"))),
    }
}

/// A header value cut to what an error message bears.
struct Shown<'a>(&'a HeaderValue);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = String::from_utf8_lossy(self.0.as_bytes()).chars().take(60).collect();
        write!(f, "{text:?}")
    }
}

/// The positions of `?after=`: one, or several separated by commas.
pub(crate) fn positions(text: &str) -> Result<Vec<Position>, Problem> {
    if text.split(',').count() > POSITIONS_MAX {
        return Err(Problem::malformed(format!("after takes at most {POSITIONS_MAX} positions")));
    }
    let parse = |part: &str| {
        part.parse().map_err(|error| {
            Problem::malformed(format!(
                "after: {error}; it takes the position that a command answered"
            ))
        })
    };
    text.split(',').map(parse).collect()
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
    fn a_precondition_is_one_quoted_version() {
        let read = |text: &str| text.parse::<Precondition>();
        assert_eq!(read("\"3\""), Ok(Precondition::Version(Version(3))));
        assert_eq!(read("*"), Ok(Precondition::None));
        assert_eq!(read("W/\"3\""), Ok(Precondition::Never));
        for bad in ["", "3", "\"", "\"\"", "\"x\"", "\"-1\"", "\"+1\"", "\"1\", \"2\"", "W/3"] {
            assert_eq!(read(bad), Err(()), "{bad}");
        }
    }

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

    #[test]
    fn positions_are_a_list_without_holes() {
        let count = |text: &str| positions(text).map(|list| list.len()).ok();
        assert_eq!(count("0:1"), Some(1));
        assert_eq!(count("0:1,3:1042"), Some(2));
        for bad in ["", ",", "0:1,", "x", "0:1 ,1:1", "-1:0"] {
            assert_eq!(count(bad), None, "{bad}");
        }
    }
}

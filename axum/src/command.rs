//! [`Call`]: a command over HTTP, with `Idempotency-Key`, `If-Match` and the metadata of its events.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use kafold::handler::{Handled, Request};
use kafold::store::ReadError;
use kafold::{
    Aggregate, CommandHandler, CommandId, ExpectedVersion, Position, RecordedEvent, StreamId,
    Version, codec,
};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::OwnedMutexGuard;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::app::{Http, Shared};
use crate::observe::Origin;
use crate::problem::{self, Problem, Rule};

/// Marks the answer to a repeated request.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// Wait for an appended event to be in the index of another node.
const INDEXED_WITHIN: Duration = Duration::from_secs(3);
/// Interval of the looks at the index meanwhile.
const INDEX_POLL: Duration = Duration::from_millis(20);

/// Extracts the headers of a command, and handles the command by them.
///
/// - `Idempotency-Key: UUID` is the command id: a repeated request returns the first result, with the header
///   `idempotent-replayed: true`. A key used for another stream or another command is answered 422, as the
///   IETF draft "The Idempotency-Key HTTP Header Field" demands. The streams of the last
///   [`RECENT_KEYS_MAX`](crate::RECENT_KEYS_MAX) keys are remembered; the log knows the commands of each stream. Another
///   process, or this one after a restart, does not know for which stream a key was used: there the key counts for
///   each stream by itself.
/// - `If-Match: "VERSION"` demands the version of the stream that an `ETag` had, and `If-Match: *` a stream with
///   events; otherwise the answer is 412.
/// - `x-correlation-id` and `traceparent` become metadata of the events.
/// - The deadline is that of the request.
#[derive(Debug)]
pub struct Call {
    shared: Arc<Shared>,
    id: CommandId,
    is_given: bool,
    precondition: Precondition,
    origin: Origin,
    used_for: Option<OwnedMutexGuard<Option<String>>>,
}

impl<S: Send + Sync> FromRequestParts<Http<S>> for Call {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, http: &Http<S>) -> Result<Self, Problem> {
        // The IETF's draft writes the key in quotes, as a string of a structured field.
        let unquoted = |text: &str| {
            let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
            Uuid::from_str(inner.unwrap_or(text))
        };
        let key = parsed(&parts.headers, "idempotency-key", "a UUID", unquoted)?;
        let precondition = parsed(
            &parts.headers,
            "if-match",
            "one version in quotes, such as \"3\", as the ETag of an answer has it",
            Precondition::from_str,
        )?;
        let shared = Arc::clone(&http.shared);
        // Time-ordered, as good as random for a client that does not know the id.
        let id = CommandId(key.unwrap_or_else(|| shared.ids.event_id()));
        // A router without the layers of a service has no origin.
        let alone = || Origin { correlation_id: id.to_string(), trace_parent: None };
        let origin = Extension::<Origin>::from_request_parts(parts, http).await;
        let origin = origin.map_or_else(|_| alone(), |Extension(origin)| origin);
        Ok(Self {
            id,
            is_given: key.is_some(),
            precondition: precondition.unwrap_or(Precondition::None),
            origin,
            shared,
            used_for: None,
        })
    }
}

impl Call {
    /// Returns the command id: the idempotency key, or a new id.
    pub fn command_id(&self) -> CommandId {
        self.id
    }

    /// Returns `true` if the client gave an idempotency key, so that the command may have been handled before.
    pub fn has_key(&self) -> bool {
        self.is_given
    }

    /// Returns the time of the machine.
    pub fn now(&self) -> DateTime<Utc> {
        self.shared.clock.now()
    }

    /// Returns the id of the stream for which the key was used, if this process remembers it. Waits for
    /// another request with the same key.
    pub async fn used_for(&mut self) -> Option<String> {
        self.use_of_key().await.clone()
    }

    async fn use_of_key(&mut self) -> &mut Option<String> {
        if self.used_for.is_none() {
            self.used_for = Some(self.shared.use_of_key(self.id).lock_owned().await);
        }
        self.used_for.as_deref_mut().expect("was just set")
    }

    /// Handles the command on the aggregate `id`, or returns the first result of its key.
    ///
    /// The repeated command must be the first one: decided on the state before the first one, it must give
    /// the stored events, otherwise the answer is 422. For a command whose events depend on more than state
    /// and command, such as on the time of the request, use [`handle_as`](Self::handle_as).
    pub async fn handle<A>(
        self,
        handler: &CommandHandler<A>,
        id: &str,
        command: &A::Command,
    ) -> Result<Done, Problem>
    where
        A: Aggregate<Error: Rule>,
    {
        let command_id = self.id;
        let is_same = |events: Vec<_>| decides::<A>(&events, command_id, command);
        self.settle(handler, id, command, |_| Version::EMPTY, is_same).await
    }

    /// As [`handle`](Self::handle), with a comparison of the author: `is_same` returns `true` if the last
    /// event of the first command may follow from this command.
    pub async fn handle_as<A>(
        self,
        handler: &CommandHandler<A>,
        id: &str,
        command: &A::Command,
        is_same: impl FnOnce(&A::Event) -> bool,
    ) -> Result<Done, Problem>
    where
        A: Aggregate<Error: Rule>,
    {
        let is_same = |events: Vec<RecordedEvent>| {
            let Some(last) = events.last() else { return Ok(true) };
            codec::decode_recorded::<A::Event>(last).map(|last| is_same(&last.event))
        };
        let before = |last: Version| Version(last.0.saturating_sub(1));
        self.settle(handler, id, command, before, is_same).await
    }

    /// Handles the command under the lock of its key, and compares a repeated command with the events after
    /// `after`, called with the version of its last event. The key belongs to the stream from before the outcome
    /// is known: a request that is given up may have written.
    async fn settle<A>(
        mut self,
        handler: &CommandHandler<A>,
        id: &str,
        command: &A::Command,
        after: fn(Version) -> Version,
        is_same: impl FnOnce(Vec<RecordedEvent>) -> Result<bool, codec::CodecError>,
    ) -> Result<Done, Problem>
    where
        A: Aggregate<Error: Rule>,
    {
        let stream = StreamId::new(A::CATEGORY, id);
        let stream = stream.map_err(|error| Problem::invalid_id(A::CATEGORY, &error))?;
        let before = match self.use_of_key().await {
            Some(known) if known != id => return Err(Problem::key_reused(A::CATEGORY, known)),
            used_for => used_for.replace(id.to_owned()),
        };
        let outcome = async {
            let done = self.run(handler, &stream, command).await?;
            if done.is_repeat {
                let events =
                    self.events(handler, &stream, after(done.version), done.version).await?;
                let is_same = is_same(events);
                if !is_same.map_err(|error| ReadError::diverged(stream.to_string(), error))? {
                    return Err(Problem::key_reused(A::CATEGORY, id));
                }
            }
            Ok(done)
        };
        let outcome = outcome.await;
        if matches!(&outcome, Err(problem) if problem.is_settled()) {
            *self.use_of_key().await = before;
        }
        outcome
    }

    /// Handles the command, or finds the first one of its key when `If-Match` never matches.
    async fn run<A>(
        &self,
        handler: &CommandHandler<A>,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Done, Problem>
    where
        A: Aggregate<Error: Rule>,
    {
        match self.precondition.expected() {
            None => {
                let never = || problem::precondition_failed(A::CATEGORY, None);
                if !self.is_given {
                    return Err(never());
                }
                let first = handler.store().find_command(stream, self.id).await?;
                let first = first.ok_or_else(never)?;
                let (version, position) = (first.version, Some(first.position));
                Ok(Done { id: stream.id().to_owned(), version, position, is_repeat: true })
            }
            Some(expected) => {
                // A stream that exists goes on existing, so the look before the command is enough.
                if self.precondition == Precondition::Exists
                    && handler.load(stream.id()).await?.1 == Version(0)
                {
                    return Err(problem::absent(A::CATEGORY));
                }
                let request = Request {
                    command_id: Some(self.id),
                    expected,
                    correlation_id: Some(self.origin.correlation_id.clone()),
                    trace_parent: self.origin.trace_parent.clone(),
                    deadline: Some(self.shared.clock.instant() + self.shared.limits.work()),
                    ..Request::default()
                };
                let handled = handler.handle_with(stream.id(), command, request).await;
                let handled =
                    handled.map_err(|error| problem::of_command(A::CATEGORY, error, expected))?;
                Ok(Done::of(stream, handled))
            }
        }
    }

    /// Returns the events of the stream after a version, up to one that the log is known to have. The index
    /// of a node that does not own the stream may get the event a moment later.
    async fn events<A: Aggregate>(
        &self,
        handler: &CommandHandler<A>,
        stream: &StreamId,
        after: Version,
        version: Version,
    ) -> Result<Vec<RecordedEvent>, Problem> {
        let clock = &self.shared.clock;
        let deadline = clock.instant() + INDEXED_WITHIN;
        loop {
            let mut events = Vec::new();
            let mut read = handler.store().read(stream, after);
            while let Some(event) = read.try_next().await? {
                let is_last = event.version == version;
                events.push(event);
                if is_last {
                    return Ok(events);
                }
            }
            if clock.instant() >= deadline {
                let cause = format!("version {version} of {stream} is not in the index yet");
                return Err(ReadError::unavailable(INDEX_POLL, cause).into());
            }
            clock.sleep(INDEX_POLL).await;
        }
    }
}

/// Returns whether the command, decided on the state before the first command with this id, gives the events
/// of that command.
fn decides<A: Aggregate>(
    events: &[RecordedEvent],
    id: CommandId,
    command: &A::Command,
) -> Result<bool, codec::CodecError> {
    let mut state = A::default();
    let mut stored = Vec::new();
    for event in events {
        let decoded = codec::decode_recorded::<A::Event>(event)?.event;
        match event.command_id == id {
            true => stored.push(payload(&decoded)?),
            false => state.evolve(&decoded),
        }
    }
    let Ok(decided) = state.decide(command) else { return Ok(false) };
    let decided = decided.iter().map(payload).collect::<Result<Vec<_>, _>>()?;
    Ok(decided == stored)
}

/// Returns type and payload of an event as they are stored.
fn payload<E: kafold::DomainEvent>(event: &E) -> Result<(String, Value), codec::CodecError> {
    let bytes = codec::encode(event)?;
    let payload = serde_json::from_slice(&bytes).expect("an encoded event is JSON");
    Ok((event.event_type().to_string(), payload))
}

/// The result of a command: version and position of its last event. As a response it has the version as
/// `ETag`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Done {
    /// The id of the stream.
    pub id: String,
    /// The version of the stream after the command, for `If-Match`.
    #[schema(value_type = u64)]
    pub version: Version,
    /// The position of the last event of the stream, for `?after=`.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// `true` in the answer to a repeated request.
    #[serde(skip)]
    pub is_repeat: bool,
}

impl Done {
    fn of(stream: &StreamId, handled: Handled) -> Self {
        let Handled { version, position, duplicate: is_repeat, .. } = handled;
        Self { id: stream.id().to_owned(), version, position, is_repeat }
    }

    /// Returns the headers of the answer: `ETag`, and `idempotent-replayed` for a repeated request.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::ETAG, ascii(&format!("\"{}\"", self.version)));
        if self.is_repeat {
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        headers
    }
}

impl IntoResponse for Done {
    fn into_response(self) -> Response {
        (self.headers(), Json(self)).into_response()
    }
}

/// Returns the header value of a text that is ASCII by construction.
pub(crate) fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("numbers and punctuation are ASCII")
}

impl Problem {
    /// An idempotency key that was used for another command, or for another stream of this category.
    pub fn key_reused(category: &str, id: &str) -> Self {
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency-key-reused",
            format!(
                "the idempotency key was used for another request, on {category} {id}: send this one with \
                 a new key"
            ),
        )
    }
}

/// The demand of `If-Match` on the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Precondition {
    /// Nothing.
    None,
    /// A stream with events: `*`.
    Exists,
    /// Exactly this version.
    Version(Version),
    /// A demand that no stream ever satisfies: a weak entity tag, which `If-Match` never matches.
    Never,
}

impl Precondition {
    /// Returns the demand as a store checks it; `None` for [`Precondition::Never`].
    fn expected(self) -> Option<ExpectedVersion> {
        match self {
            Self::None | Self::Exists => Some(ExpectedVersion::Any),
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
            return Ok(Self::Exists);
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

/// Returns the value of a header that is there at most once.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_precondition_is_one_quoted_version() {
        let read = |text: &str| text.parse::<Precondition>();
        assert_eq!(read("\"3\""), Ok(Precondition::Version(Version(3))));
        assert_eq!(read("*"), Ok(Precondition::Exists));
        assert_eq!(read("W/\"3\""), Ok(Precondition::Never));
        for bad in ["", "3", "\"", "\"\"", "\"x\"", "\"-1\"", "\"+1\"", "\"1\", \"2\"", "W/3"] {
            assert_eq!(read(bad), Err(()), "{bad}");
        }
    }
}

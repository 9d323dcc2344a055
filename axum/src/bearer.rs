//! One bearer token for all commands and queries (RFC 6750).
//!
//! Suits a service with few and equally trusted callers. Callers with individual rights need OIDC,
//! at a proxy in front.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use crate::problem::Problem;

/// Shortest token: a shorter token can be guessed.
const TOKEN_BYTES_MIN: usize = 16;
/// Longest token, and so the most bytes read from a file.
const TOKEN_BYTES_MAX: usize = 4096;

/// A bearer token. `Debug` and errors never show the token.
#[derive(Clone)]
pub struct BearerToken(String);

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(●●●)")
    }
}

/// The reason for a missing token.
#[derive(Debug, thiserror::Error)]
pub enum BearerTokenError {
    /// The token is written on the command line, visible to every user of the machine.
    #[error("a token is not written itself, where others can read it: write @FILE or $NAME")]
    Literal,
    /// The variable is not set.
    #[error("the environment has no variable {0}: set it to the token")]
    NoVariable(String),
    /// The file cannot be read.
    #[error("the token's file {path} cannot be read: {error}")]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        error: std::io::Error,
    },
    /// Other users can read the file.
    #[error("the token's file {0} can be read by others: chmod 0600 {0}")]
    Readable(String),
    /// The text is no valid token.
    #[error(
        "{0} holds no token: {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} visible ASCII characters, such as of openssl rand -hex 32"
    )]
    Unfit(String),
}

impl BearerToken {
    /// Reads the token named by `@FILE` or `$NAME`. Removes line breaks at the end.
    pub fn read(source: &str, allow_readable: bool) -> Result<Self, BearerTokenError> {
        let (place, text) = if let Some(path) = source.strip_prefix('@') {
            (path, read_file(path, allow_readable)?)
        } else if let Some(name) = source.strip_prefix('$') {
            let text = std::env::var(name);
            (name, text.map_err(|_| BearerTokenError::NoVariable(name.to_owned()))?)
        } else {
            return Err(BearerTokenError::Literal);
        };
        let token = text.trim_end_matches(['\r', '\n']);
        let is_fit = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len())
            && token.bytes().all(|byte| byte.is_ascii_graphic());
        is_fit
            .then(|| Self(token.to_owned()))
            .ok_or_else(|| BearerTokenError::Unfit(place.to_owned()))
    }

    /// Returns `true` if the header carries the token. Compares in constant time.
    fn is_in(&self, header: Option<&HeaderValue>) -> bool {
        let Some((scheme, token)) =
            header.and_then(|value| value.to_str().ok()).and_then(|text| text.split_once(' '))
        else {
            return false;
        };
        let is_equal: bool = self.0.as_bytes().ct_eq(token.trim().as_bytes()).into();
        scheme.eq_ignore_ascii_case("bearer") && is_equal
    }
}

fn read_file(path: &str, allow_readable: bool) -> Result<String, BearerTokenError> {
    let unreadable = |error| BearerTokenError::Unreadable { path: path.to_owned(), error };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.permissions().mode();
    if mode & 0o004 != 0 && !allow_readable {
        return Err(BearerTokenError::Readable(path.to_owned()));
    }
    let mut text = String::new();
    file.take(TOKEN_BYTES_MAX as u64 + 2).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

/// Rejects a request without the token. Health and the list of endpoints need no token.
pub(crate) async fn check(
    State(token): State<Arc<BearerToken>>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let is_open = path == "/" || path.starts_with("/health/");
    if is_open || token.is_in(request.headers().get(header::AUTHORIZATION)) {
        return next.run(request).await;
    }
    let detail = "this service wants a token: send the header 'authorization: Bearer TOKEN'";
    Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
        .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
        .into_response()
}

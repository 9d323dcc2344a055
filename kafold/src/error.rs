//! Why a log cannot be opened.

use std::error::Error;

/// Why a log cannot be opened: wait, or change something.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The text is not the URL of a log.
    #[error(
        "{url} is not the URL of a log: write sqlite://FILE or kafka://HOST:PORT[,HOST:PORT]/NAME"
    )]
    Url {
        /// The text in printable form; see [`shown_url`](crate::shown_url).
        url: String,
    },
    /// A log on Kafka was opened without a database.
    #[error(
        "a log on Kafka needs a database for its stream index and its read models: add \
         .database(\"postgres://…\") or .database(\"sqlite://FILE\")"
    )]
    NoDatabase,
    /// The log does not answer now: wait and try again.
    #[error("{0}")]
    Unavailable(#[source] Box<dyn Error + Send + Sync>),
    /// It will not open until someone changes something; the message says what.
    #[error("{0}")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
}

impl OpenError {
    /// Whether the same call may succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    #[cfg(any(feature = "embedded", feature = "kafka"))]
    pub(crate) fn of(is_transient: bool, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        match is_transient {
            true => Self::Unavailable(error.into()),
            false => Self::Refused(error.into()),
        }
    }
}

//! [`OpenError`].

use std::error::Error;
use std::fmt;

/// The reason for which a log cannot be opened. `Debug` writes the sentence of `Display`, so that `main` prints it.
#[derive(thiserror::Error)]
pub enum OpenError {
    /// The text is not the URL of a log.
    #[error(
        "{url} is not the URL of a log: write sqlite://FILE or kafka://HOST:PORT[,HOST:PORT]/NAME"
    )]
    Url {
        /// The text in printable form; see [`shown_url`](crate::shown_url).
        url: String,
    },
    /// The program was built without the kind of log that the URL names.
    #[error(
        "this program was built without logs on {log}: add the feature \"{feature}\" of kafold"
    )]
    Feature {
        /// The kind of log.
        log: &'static str,
        /// The feature of the crate.
        feature: &'static str,
    },
    /// A log on Kafka was opened without a database.
    #[error(
        "a log on Kafka needs a database for its stream index and its read models: add \
         .database(\"postgres://…\") or .database(\"sqlite://FILE\"), or set KAFOLD_DATABASE for \
         open_from_env"
    )]
    NoDatabase,
    /// The database cannot be used. [`DatabaseError::Unavailable`](kafold_migrations::DatabaseError::Unavailable) is transient.
    #[cfg(any(feature = "embedded", feature = "projections"))]
    #[error(fmt = database)]
    Database(#[from] kafold_migrations::DatabaseError),
    /// The log does not answer now: wait and try again.
    #[error("the log is not there yet: {0}")]
    Unavailable(#[source] Box<dyn Error + Send + Sync>),
    /// The log will not open until someone changes something; the message says what.
    #[error("the log cannot be used: {0}")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
}

impl fmt::Debug for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl OpenError {
    /// Whether the same call may succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_) => true,
            #[cfg(any(feature = "embedded", feature = "projections"))]
            Self::Database(error) => {
                matches!(error, kafold_migrations::DatabaseError::Unavailable { .. })
            }
            Self::Url { .. } | Self::Feature { .. } | Self::NoDatabase | Self::Refused(_) => false,
        }
    }

    #[cfg(any(feature = "embedded", feature = "kafka"))]
    pub(crate) fn of(is_transient: bool, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        match is_transient {
            true => Self::Unavailable(error.into()),
            false => Self::Refused(error.into()),
        }
    }
}

#[cfg(any(feature = "embedded", feature = "projections"))]
fn database(error: &kafold_migrations::DatabaseError, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let is_transient = matches!(error, kafold_migrations::DatabaseError::Unavailable { .. });
    let standing = if is_transient { "is not there yet" } else { "cannot be used" };
    write!(f, "the database {standing}: {error}")
}

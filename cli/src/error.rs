//! How a command ends when it does not end well.

use std::error::Error as StdError;
use std::io;

use kafold::projections::{ControlError, VerifyError, sqlx};
use kafold::{DatabaseError, ReadError, kafka};

/// Why a command ends before its end, or with a code other than 0.
#[derive(Debug)]
pub(crate) enum Error {
    /// It was asked for in a way that cannot be: exit code 2.
    Usage(String),
    /// It failed, or what was looked at is not as it should be: exit code 1.
    Failed(String),
    /// Ctrl-C: exit code 130, as shells have it.
    Interrupted,
    /// Nobody reads what is printed any more: no failure.
    OutputClosed,
}

impl Error {
    pub(crate) fn usage(reason: impl Into<String>) -> Self {
        Self::Usage(reason.into())
    }

    pub(crate) fn failed(reason: impl Into<String>) -> Self {
        Self::Failed(reason.into())
    }

    /// Why, in a sentence.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Usage(reason) | Self::Failed(reason) => reason,
            Self::Interrupted => "interrupted",
            Self::OutputClosed => "nobody reads",
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) => 1,
            Self::Interrupted => 130,
            Self::OutputClosed => 0,
        }
    }
}

impl From<io::Error> for Error {
    /// Of writing to standard output.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::failed(format!("cannot write to standard output: {error}")),
        }
    }
}

impl From<kafka::OpenError> for Error {
    fn from(error: kafka::OpenError) -> Self {
        let reason = chain(&error);
        match error {
            kafka::OpenError::Config(_) => Self::Usage(reason),
            kafka::OpenError::Unavailable { .. } => Self::Failed(format!(
                "{reason}; check the brokers in the URL, and that they are up"
            )),
            _ => Self::Failed(reason),
        }
    }
}

impl From<DatabaseError> for Error {
    fn from(error: DatabaseError) -> Self {
        let reason = chain(&error);
        match error {
            DatabaseError::Unavailable { .. } => {
                Self::Failed(format!("{reason}; check the URL, and that the server is up"))
            }
            _ => Self::Failed(reason),
        }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        let reason = match &error {
            ReadError::Unavailable { cause, .. } => {
                format!("the log or the database does not answer: {}; try again", chain(&**cause))
            }
            error @ ReadError::Diverged { .. } => chain(error),
        };
        Self::Failed(reason)
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        Self::Failed(chain(&error))
    }
}

impl From<VerifyError> for Error {
    fn from(error: VerifyError) -> Self {
        Self::Failed(chain(&error))
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let remedy = kafold::refusal(&error).map_or("try again".to_owned(), |why| why.remedy);
        Self::Failed(format!("the database cannot be read: {}; {remedy}", chain(&error)))
    }
}

/// The error with its causes, each once.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many errors already say what their cause says.
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

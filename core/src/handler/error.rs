//! Why a command was not handled.

use std::fmt;
use std::sync::Arc;

use tracing::Span;

use super::Handled;
use crate::codec::CodecError;
use crate::event::InvalidCommit;
use crate::ids::{ExpectedVersion, InvalidStreamId, StreamId, Version};
use crate::store::{AppendError, ReadError};
use crate::trace;

/// The reason for which a command was not handled; each variant tells the caller what to do. `Debug` writes the sentence of `Display`,
/// so that a `main` which returns the error prints it.
#[derive(Clone, thiserror::Error)]
pub enum HandleError<E: std::error::Error + 'static> {
    /// The aggregate refuses, on a state that was the newest when it was answered: tell the user.
    #[error(transparent)]
    Rejected(E),
    /// The stream is not at the version that the caller demanded, and never will be again if that is
    /// below: look at it again. Without a demand, others were faster in every attempt: send the command
    /// again.
    #[error("stream {stream} is at version {actual}, expected {expected}")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// What was demanded, by the caller or by the last attempt.
        expected: ExpectedVersion,
        /// What the stream has; where that is above the demand, maybe more by now.
        actual: Version,
    },
    /// There can be no such aggregate: correct the id.
    #[error(transparent)]
    InvalidId(#[from] InvalidStreamId),
    /// The store's own answer, never a conflict: act as the variant says.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The stream could not be loaded and nothing was appended: try again if it is unavailable.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An event of the stream cannot be read, or a decided one not be written, by this program:
    /// nothing was appended, and the program has to be corrected.
    #[error("stream {stream}: {error}")]
    Codec {
        /// The stream.
        stream: StreamId,
        /// What does not fit.
        #[source]
        error: CodecError,
    },
    /// The command was sent from within the transaction of a projection, for which the command might
    /// wait: nothing was appended. Write down what is to be sent, and send it after the transaction.
    #[error(
        "projection {projection} sends a command from within its transaction, and might wait for itself: \
         write down what is to be sent, and send it from another task after the transaction"
    )]
    InProjection {
        /// The name of the projection.
        projection: Arc<str>,
    },
    /// The command decided more events than a commit holds: nothing was appended, split it.
    #[error(transparent)]
    InvalidCommit(#[from] InvalidCommit),
}

impl<E: std::error::Error + 'static> fmt::Debug for HandleError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<E: std::error::Error + 'static> HandleError<E> {
    /// The answer after the last attempt failed so. What the attempt demanded of the stream is not what
    /// the caller did: only a stream that has moved past his demand contradicts it for certain.
    pub(super) fn exhausted(demanded: ExpectedVersion, failure: AppendError) -> Self {
        match failure {
            AppendError::Conflict { stream, expected, actual } => match demanded.version() {
                None => Self::Conflict { stream, expected, actual },
                Some(demand) if demand < actual => {
                    Self::Conflict { stream, expected: demanded, actual }
                }
                Some(_) => {
                    let reason = format!("others changed stream {stream} in every attempt");
                    Self::Append(AppendError::NotAppended { reason })
                }
            },
            other => Self::Append(other),
        }
    }
}

/// The value of the metric label `outcome`.
pub(super) fn outcome_name<E: std::error::Error>(
    result: &Result<Handled, HandleError<E>>,
) -> &'static str {
    match result {
        Ok(handled) if handled.duplicate => "duplicate",
        Ok(handled) if handled.events == 0 => "unchanged",
        Ok(_) => "appended",
        Err(failure) => failure_name(failure),
    }
}

/// The same of a command that is written down for its owner.
pub(super) fn sent_name<E: std::error::Error>(result: &Result<(), HandleError<E>>) -> &'static str {
    result.as_ref().map_or_else(failure_name, |()| "sent")
}

/// Tells the command's span what it came to. What speaks for the domain is an answer and no failure.
pub(super) fn tell_span<T, E: std::error::Error>(
    span: &Span,
    outcome: &'static str,
    result: &Result<T, HandleError<E>>,
) {
    span.record("outcome", outcome);
    match result {
        Ok(_) | Err(HandleError::Rejected(_) | HandleError::Conflict { .. }) => {}
        Err(_) => trace::failed(span, outcome),
    }
}

fn failure_name<E: std::error::Error>(failure: &HandleError<E>) -> &'static str {
    match failure {
        HandleError::Rejected(_) => "rejected",
        HandleError::Conflict { .. } => "conflict",
        HandleError::Append(failure) => failure.name(),
        HandleError::Read(ReadError::Unavailable { .. }) => "unavailable",
        HandleError::InvalidCommit(_) => "too_large",
        HandleError::InvalidId(_) => "invalid_id",
        HandleError::InProjection { .. } => "in_projection",
        HandleError::Read(ReadError::Diverged { .. }) | HandleError::Codec { .. } => "unreadable",
    }
}

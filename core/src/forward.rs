//! The seam [`CommandBus`]: commands on their way to the node that owns their stream, and answers on
//! their way back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::handler::Handled;
use crate::ids::{CommandId, ExpectedVersion, Partition, StreamId, Version};
use crate::store::{AppendError, Owner};

/// A command as it travels from node to node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardedCommand {
    /// The stream that it is for.
    pub stream: StreamId,
    /// Names it for all its copies: it is applied at most once.
    pub command_id: CommandId,
    /// The command as JSON.
    pub payload: Arc<[u8]>,
    /// The version that the stream must have.
    pub expected: ExpectedVersion,
    /// As in [`Metadata`](crate::Metadata).
    pub correlation_id: Option<String>,
    /// As in [`Metadata`](crate::Metadata).
    pub causation_id: Option<String>,
    /// As in [`Metadata`](crate::Metadata).
    pub trace_parent: Option<String>,
    /// After it the command is not executed any more. By the clocks of two nodes: they may differ by
    /// what a caller can bear.
    pub deadline: DateTime<Utc>,
}

/// What a forwarded command came to at the owner, for the caller to answer as its own handler would
/// have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was handled.
    Handled(Handled),
    /// The aggregate refuses.
    Rejected {
        /// The domain's own error as JSON.
        error: Box<RawValue>,
    },
    /// The stream is not at the version that the caller demanded, or others were faster in every
    /// attempt.
    Conflict {
        /// What was demanded, by the caller or by the last attempt; `None` for nothing.
        expected: Option<Version>,
        /// What the stream has.
        actual: Version,
    },
    /// An event that it decided is larger than the log takes.
    TooLarge {
        /// Bytes of the largest event.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// It certainly did not happen.
    NotAppended {
        /// What prevented it.
        reason: String,
    },
    /// The owner could not take it within its bound; nothing of it happened.
    Unavailable {
        /// When to try again, in milliseconds.
        retry_after_ms: u64,
        /// What the owner waits for.
        reason: String,
    },
    /// The owner's program or its log has to be corrected; nothing more comes of it.
    Failed {
        /// What is affected.
        what: String,
        /// What is wrong.
        reason: String,
    },
}

impl Reply {
    /// Whether the log itself holds this answer: nobody can find another one later. Any other answer
    /// is given only when the log says that the command is settled, or the next owner would decide
    /// it once more.
    pub fn is_in_log(&self) -> bool {
        matches!(self, Self::Handled(handled) if handled.duplicate || handled.events > 0)
    }

    /// Whether the same command may be welcome a moment later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::NotAppended { .. })
    }

    /// [`Reply::Unavailable`] for the given reason.
    pub fn unavailable(retry_after: Duration, reason: impl Into<String>) -> Self {
        let retry_after_ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
        Self::Unavailable { retry_after_ms, reason: reason.into() }
    }
}

/// Carries commands to the owner of their stream.
///
/// Delivery is at least once; the effect is exactly once, because every copy carries the same command
/// id.
pub trait CommandBus: Send + Sync + 'static {
    /// Whether this node may decide commands of the stream itself now. A hint: the store has the last
    /// word.
    fn is_local(&self, stream: &StreamId) -> bool;

    /// Sends the command to the owner of its stream and waits for the answer.
    ///
    /// [`AppendError::Unavailable`] and [`AppendError::TooLarge`]: it was not sent.
    /// [`AppendError::OutcomeUnknown`]: it was, and no answer came before its deadline.
    fn call(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<Reply, AppendError>>;

    /// Writes the command down for the owner of its stream, which handles it at some time before its
    /// deadline; nobody is told what it came to. Errors as those of [`CommandBus::call`].
    fn send(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<(), AppendError>>;

    /// Commands of this category that arrive for this node go to the executor from now on, as long as
    /// somebody else holds it. A second one for a category replaces the first.
    fn serve(&self, category: &'static str, executor: &Arc<dyn CommandExecutor>);
}

/// Handles forwarded commands of one category on the node that owns their streams.
#[async_trait]
pub trait CommandExecutor: Send + Sync + 'static {
    /// Handles the command here and nowhere else, with an answer by `deadline`.
    ///
    /// An error means that the command is not settled: [`AppendError::NotOwner`], this node does not
    /// own the stream any more; [`AppendError::OutcomeUnknown`], what it came to is not known yet.
    async fn execute(
        &self,
        command: &ForwardedCommand,
        deadline: Instant,
    ) -> Result<Reply, AppendError>;
}

/// One node of the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Names this run of the process.
    pub id: Uuid,
    /// Who it is and where it is reached, as its claims say.
    #[serde(flatten)]
    pub owner: Owner,
    /// What it owns, in the order of the partitions.
    pub partitions: Vec<OwnedPartition>,
}

impl Node {
    /// The only node there can be: the process that has the file of an embedded log open, whose one
    /// partition needs no claim.
    pub fn only(owner: Owner) -> Self {
        let since = owner.started_at;
        let partition =
            OwnedPartition { partition: Partition(0), epoch: 0, since, take_over_ms: 0 };
        Self { id: Uuid::nil(), owner, partitions: vec![partition] }
    }
}

/// A partition in the hands of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedPartition {
    /// The partition.
    pub partition: Partition,
    /// The epoch of its claim.
    pub epoch: u32,
    /// Since when the node owns it.
    pub since: DateTime<Utc>,
    /// How long the take-over took, in milliseconds: from the group's word to the accepted claim.
    pub take_over_ms: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_reply_reads_back_as_it_was_written() {
        let error = serde_json::value::to_raw_value(&json!({"WrongAmount": {"due": 1}}));
        let replies = [
            Reply::Handled(Handled {
                version: Version(2),
                position: None,
                duplicate: true,
                events: 0,
            }),
            Reply::Rejected { error: error.expect("JSON") },
            Reply::Conflict { expected: Some(Version(1)), actual: Version(2) },
            Reply::TooLarge { size: 3, limit: 2 },
            Reply::NotAppended { reason: "lost".into() },
            Reply::unavailable(Duration::from_millis(1_500), "full"),
            Reply::Failed { what: "stream a-1".into(), reason: "unreadable".into() },
        ];
        for reply in replies {
            let json = serde_json::to_string(&reply).expect("JSON");
            let read: Reply = serde_json::from_str(&json).expect("a reply");
            assert_eq!(serde_json::to_string(&read).expect("JSON"), json);
            assert_eq!(format!("{read:?}"), format!("{reply:?}"));
        }
    }
}

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
    /// The command as JSON; empty for a load, which asks the owner for the version of the stream.
    pub payload: Arc<[u8]>,
    /// The version that the stream must have.
    pub expected: ExpectedVersion,
    /// As in [`Metadata`](crate::Metadata).
    pub correlation_id: Option<String>,
    /// As in [`Metadata`](crate::Metadata).
    pub causation_id: Option<String>,
    /// As in [`Metadata`](crate::Metadata); where traces are recorded, of the span that sends it.
    pub trace_parent: Option<String>,
    /// After it the command is not executed any more. By the clocks of two nodes: they may differ by
    /// what a caller can bear.
    pub deadline: DateTime<Utc>,
}

/// What a forwarded command came to at the owner, for the caller to answer as its own handler would
/// have.
///
/// As JSON an object whose only key is the name of the variant. The name may not become a field
/// beside the others: then serde reads the whole object first, and no raw JSON can be read of that.
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
    /// An owner before this one may have applied it, and this one cannot look: the same command sent
    /// again finds out.
    OutcomeUnknown,
    /// The owner's program or its log has to be corrected; nothing more comes of it.
    Failed {
        /// What is affected.
        what: String,
        /// What is wrong.
        reason: String,
    },
}

impl ForwardedCommand {
    /// Returns `true` for a load, which asks the owner of the stream for its version.
    pub fn is_load(&self) -> bool {
        self.payload.is_empty()
    }
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

    /// Gives commands of this category that arrive for this node to the executor, as long as a handler
    /// holds it. Of several executors for a category the newest that is still held gets them.
    fn serve(&self, category: &'static str, executor: &Arc<dyn CommandExecutor>);
}

/// Handles forwarded commands of one category on the node that owns their streams.
#[async_trait]
pub trait CommandExecutor: Send + Sync + 'static {
    /// Handles the command here and nowhere else, with an answer by `deadline`.
    ///
    /// An error means that the command is not settled: [`AppendError::NotOwner`], this node does not
    /// own the stream any more; [`AppendError::OutcomeUnknown`], what it came to is not known yet:
    /// then it is executed again, and [`Reply::Unavailable`], [`Reply::NotAppended`],
    /// [`Reply::TooLarge`] and [`Reply::Failed`] of a later execution say nothing of this one.
    ///
    /// Panics where the domain's own code does.
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
    use super::*;

    /// Nodes of another release read and write this: what stands here stays for ever.
    fn check(json: &str, is_expected: impl FnOnce(&Reply) -> bool) {
        let reply: Reply = serde_json::from_str(json).expect(json);
        assert!(is_expected(&reply), "{reply:?}");
        assert_eq!(serde_json::to_string(&reply).expect("is JSON"), json);
    }

    #[test]
    fn a_reply_is_read_as_it_was_written() {
        check(
            r#"{"handled":{"version":3,"position":"1:42","duplicate":false,"events":2}}"#,
            |reply| matches!(reply, Reply::Handled(handled) if handled.version == Version(3)),
        );
        check(
            r#"{"rejected":{"error":{"Insufficient": 1.50}}}"#,
            |reply| matches!(reply, Reply::Rejected { error } if error.get() == r#"{"Insufficient": 1.50}"#),
        );
        check(
            r#"{"conflict":{"expected":2,"actual":3}}"#,
            |reply| matches!(reply, Reply::Conflict { expected, .. } if *expected == Some(Version(2))),
        );
        check(
            r#"{"conflict":{"expected":null,"actual":3}}"#,
            |reply| matches!(reply, Reply::Conflict { expected: None, actual } if *actual == Version(3)),
        );
        check(r#"{"too_large":{"size":9,"limit":8}}"#, |reply| {
            matches!(reply, Reply::TooLarge { size: 9, limit: 8 })
        });
        check(
            r#"{"not_appended":{"reason":"r"}}"#,
            |reply| matches!(reply, Reply::NotAppended { reason } if reason == "r"),
        );
        check(r#"{"unavailable":{"retry_after_ms":7,"reason":"r"}}"#, |reply| {
            matches!(reply, Reply::Unavailable { retry_after_ms: 7, .. })
        });
        check(r#""outcome_unknown""#, |reply| matches!(reply, Reply::OutcomeUnknown));
        check(
            r#"{"failed":{"what":"w","reason":"r"}}"#,
            |reply| matches!(reply, Reply::Failed { what, .. } if what == "w"),
        );
    }

    #[test]
    fn only_a_commit_is_an_answer_that_the_log_holds() {
        let handled = |events, duplicate| {
            let (version, position) = (Version(1), None);
            Reply::Handled(Handled { version, position, duplicate, events }).is_in_log()
        };
        assert!(handled(1, false) && handled(0, true));
        assert!(!handled(0, false), "the next owner may decide otherwise");
        assert!(!Reply::unavailable(Duration::ZERO, "r").is_in_log());
    }
}

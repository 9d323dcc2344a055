//! Commands on their way to the owner of their stream, and those of others that end here.
//!
//! Whichever way the copies of a command take, they carry one command id, and each node looks for it
//! in the stream before it decides: that is why a command may be sent again whenever nothing is
//! known of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use serde::de::{DeserializeOwned, Error as _};
use serde_json::value::RawValue;
use tracing::Instrument;

use super::{CommandHandler, HandleError, Handled, Job, Request};
use super::{command_span, count_retry, error, handled, too_late, unknown};
use crate::aggregate::Aggregate;
use crate::codec;
use crate::forward::{CommandBus, CommandExecutor, ForwardedCommand, Reply};
use crate::ids::ExpectedVersion;
use crate::store::{AppendError, Appended, ReadError};

type Answer<A> = Result<Handled, HandleError<<A as Aggregate>::Error>>;

/// The way to other nodes, and how a command and a rejection travel there and back.
pub(super) struct Forwarding<A: Aggregate> {
    bus: Arc<dyn CommandBus>,
    /// Lives as long as its handler: the bus does not keep it, for it keeps the store. `None` before the
    /// handler is served.
    executor: Option<Arc<dyn CommandExecutor>>,
    executor_of: fn(CommandHandler<A>) -> Arc<dyn CommandExecutor>,
    encode: fn(&A::Command) -> serde_json::Result<Vec<u8>>,
    decode_rejection: fn(&RawValue) -> serde_json::Result<A::Error>,
}

impl<A: Aggregate> Clone for Forwarding<A> {
    fn clone(&self) -> Self {
        let Self { executor_of, encode, decode_rejection, .. } = *self;
        let (bus, executor) = (Arc::clone(&self.bus), self.executor.clone());
        Self { bus, executor, executor_of, encode, decode_rejection }
    }
}

impl<A: Aggregate> Forwarding<A> {
    pub(super) fn new(bus: Arc<dyn CommandBus>) -> Self
    where
        A::Command: Serialize + DeserializeOwned,
        A::Error: Serialize + DeserializeOwned,
    {
        let executor_of =
            |handler| -> Arc<dyn CommandExecutor> { Arc::new(Executor::<A>(handler)) };
        let encode = |command: &A::Command| codec::to_json(command);
        let decode_rejection = |json: &RawValue| serde_json::from_str(json.get());
        Self { bus, executor: None, executor_of, encode, decode_rejection }
    }

    /// Gives the bus a handler for the commands of others. The handler has no bus: a command that was
    /// sent here goes no further.
    pub(super) fn serve(self, handler: CommandHandler<A>) -> Self {
        let executor = (self.executor_of)(handler);
        self.bus.serve(A::CATEGORY, &executor);
        Self { executor: Some(executor), ..self }
    }
}

impl<A: Aggregate> CommandHandler<A> {
    /// Handles the command wherever its stream is owned, again while its outcome is unknown and its
    /// deadline has not passed: each copy has the same id, and finds what the ones before came to.
    pub(super) async fn run_anywhere(
        &self,
        forwarding: &Forwarding<A>,
        job: &Job<'_, A>,
    ) -> Answer<A> {
        let mut attempt = 1;
        loop {
            let answer = self.here_or_there(forwarding, job).await;
            if !is_unknown(&answer) {
                return if attempt == 1 { answer } else { of_all_copies(job, answer) };
            }
            let may_go_on =
                attempt < self.config.attempts_max && self.clock.instant() < job.deadline;
            if !may_go_on || !self.wait(attempt, job).await {
                return answer;
            }
            count_retry::<A>("unknown");
            tracing::debug!(attempt, "the outcome is unknown, sending the same command again");
            attempt += 1;
        }
    }

    /// The bus only hints at who owns a stream: the store has the last word.
    async fn here_or_there(&self, forwarding: &Forwarding<A>, job: &Job<'_, A>) -> Answer<A> {
        if forwarding.bus.is_local(&job.stream) {
            match self.run_here(job).await {
                Err(HandleError::Append(AppendError::NotOwner { .. })) => {}
                answer => return answer,
            }
        }
        self.ask_owner(forwarding, job).await
    }

    async fn ask_owner(&self, forwarding: &Forwarding<A>, job: &Job<'_, A>) -> Answer<A> {
        let command = self.forwarded(forwarding, job)?;
        // The bus goes by the wall clock, which may be set back; the caller's patience is not.
        let reply = self.within(job.deadline, forwarding.bus.call(command)).await;
        let answer = match reply.unwrap_or_else(|| Err(unknown(job.command_id))) {
            Ok(reply) => forwarding.answer(job, reply),
            Err(failure) => Err(failure.into()),
        };
        count_forwarded::<A>(error::outcome_name(&answer));
        answer
    }

    /// Has the command written down for the owner of its stream, and waits no longer for that than
    /// a caller waits for an answer.
    pub(super) async fn send_to_owner(
        &self,
        forwarding: &Forwarding<A>,
        job: &Job<'_, A>,
    ) -> Result<(), HandleError<A::Error>> {
        let command = self.forwarded(forwarding, job)?;
        let patience = job.deadline.min(self.clock.instant() + self.config.deadline);
        let written = self.within(patience, forwarding.bus.send(command)).await;
        let result = written.unwrap_or_else(|| Err(unknown(job.command_id))).map_err(Into::into);
        count_forwarded::<A>(error::sent_name(&result));
        result
    }

    /// The command as it travels, if there is time left for it.
    fn forwarded(
        &self,
        forwarding: &Forwarding<A>,
        job: &Job<'_, A>,
    ) -> Result<ForwardedCommand, HandleError<A::Error>> {
        let remaining = job.deadline.saturating_duration_since(self.clock.instant());
        if remaining.is_zero() {
            return Err(too_late().into());
        }
        let payload = job.command.map(forwarding.encode).transpose().map_err(|error| {
            ReadError::diverged(format!("writing {} as JSON", job.named()), error)
        })?;
        Ok(ForwardedCommand {
            stream: job.stream.clone(),
            command_id: job.command_id,
            payload: payload.unwrap_or_default().into(),
            expected: job.request.expected,
            correlation_id: job.request.correlation_id.clone(),
            causation_id: job.request.causation_id.clone(),
            trace_parent: job.request.trace_parent.clone(),
            deadline: later(self.clock.now(), remaining),
        })
    }
}

impl<A: Aggregate> Forwarding<A> {
    /// What the caller is told: what its own handler would have told it.
    fn answer(&self, job: &Job<'_, A>, reply: Reply) -> Answer<A> {
        Err(match reply {
            Reply::Handled(handled) => return Ok(handled),
            Reply::Rejected { error } => match (self.decode_rejection)(&error) {
                Ok(rule) => HandleError::Rejected(rule),
                Err(error) => {
                    let what = format!("reading the rejection of {}", job.named());
                    ReadError::diverged(what, error).into()
                }
            },
            Reply::Conflict { expected, actual } => {
                let attempted = expected.map_or(ExpectedVersion::Any, ExpectedVersion::Exact);
                let demanded = job.request.expected;
                let expected = if demanded == ExpectedVersion::Any { attempted } else { demanded };
                HandleError::Conflict { stream: job.stream.clone(), expected, actual }
            }
            Reply::TooLarge { size, limit } => AppendError::TooLarge { size, limit }.into(),
            Reply::NotAppended { reason } => AppendError::NotAppended { reason }.into(),
            Reply::Unavailable { retry_after_ms, reason } => {
                AppendError::unavailable(Duration::from_millis(retry_after_ms), reason).into()
            }
            Reply::OutcomeUnknown => unknown(job.command_id).into(),
            Reply::Failed { what, reason } => ReadError::diverged(what, reason).into(),
        })
    }
}

/// Handles the commands that other nodes send, with a handler that knows no bus.
struct Executor<A: Aggregate>(CommandHandler<A>);

#[async_trait]
impl<A: Aggregate> CommandExecutor for Executor<A>
where
    A::Command: DeserializeOwned,
    A::Error: Serialize + DeserializeOwned,
{
    async fn execute(
        &self,
        command: &ForwardedCommand,
        deadline: Instant,
    ) -> Result<Reply, AppendError> {
        let span = command_span(&command.stream, command.command_id, true);
        let answer = self.handle(command, deadline).instrument(span.clone()).await;
        let outcome = error::outcome_name(&answer);
        error::tell_span(&span, outcome, &answer);
        metrics::counter!("kafold_executed_commands_total", "category" => A::CATEGORY, "outcome" => outcome)
            .increment(1);
        reply::<A>(command, answer)
    }
}

impl<A: Aggregate> Executor<A>
where
    A::Command: DeserializeOwned,
{
    async fn handle(&self, forwarded: &ForwardedCommand, deadline: Instant) -> Answer<A> {
        let command = match &*forwarded.payload {
            [] => None,
            payload => match serde_json::from_slice(payload) {
                Ok(command) => Some(command),
                Err(error) => return self.unreadable(forwarded, deadline, error).await,
            },
        };
        let request = Request {
            command_id: Some(forwarded.command_id),
            expected: forwarded.expected,
            correlation_id: forwarded.correlation_id.clone(),
            causation_id: forwarded.causation_id.clone(),
            trace_parent: forwarded.trace_parent.clone(),
            deadline: Some(deadline),
        };
        let (stream, command_id) = (forwarded.stream.clone(), forwarded.command_id);
        let command = command.as_ref();
        self.0.run_here(&Job { stream, command, command_id, request, deadline }).await
    }

    /// A command that this program cannot read may have been applied by another one: only when it
    /// was not, nothing of it happened.
    async fn unreadable(
        &self,
        forwarded: &ForwardedCommand,
        deadline: Instant,
        error: serde_json::Error,
    ) -> Answer<A> {
        let ForwardedCommand { stream, command_id, .. } = forwarded;
        let found = self.0.store.find_command(stream, *command_id);
        match self.0.within(deadline, found).await.ok_or_else(too_late)?? {
            Some(first) => Ok(handled(Appended { duplicate: true, ..first }, 0)),
            None => {
                let what = format!("reading command {command_id} of category {}", A::CATEGORY);
                Err(ReadError::diverged(what, error).into())
            }
        }
    }
}

/// What is told to the node that sent the command; nothing of what is not settled.
fn reply<A: Aggregate>(command: &ForwardedCommand, answer: Answer<A>) -> Result<Reply, AppendError>
where
    A::Error: Serialize + DeserializeOwned,
{
    let failed =
        |reason: String| Reply::Failed { what: format!("stream {}", command.stream), reason };
    match answer {
        Ok(handled) => Ok(Reply::Handled(handled)),
        Err(HandleError::Rejected(rule)) => Ok(rejected(command, &rule)),
        Err(HandleError::Conflict { expected, actual, .. }) => {
            Ok(Reply::Conflict { expected: expected.version(), actual })
        }
        Err(HandleError::Append(failure)) => not_appended(failure),
        Err(HandleError::Read(ReadError::Unavailable { retry_after, cause })) => {
            Ok(Reply::unavailable(retry_after, cause.to_string()))
        }
        Err(HandleError::Read(ReadError::Diverged { what, cause })) => {
            Ok(Reply::Failed { what, reason: cause.to_string() })
        }
        Err(HandleError::Codec { error, .. }) => Ok(failed(error.to_string())),
        Err(HandleError::InvalidCommit(error)) => Ok(failed(error.to_string())),
        Err(HandleError::InvalidId(error)) => Ok(failed(error.to_string())),
        Err(error @ HandleError::InProjection { .. }) => Ok(failed(error.to_string())),
    }
}

fn rejected<E: Serialize + DeserializeOwned>(command: &ForwardedCommand, rule: &E) -> Reply {
    let ForwardedCommand { stream, command_id, .. } = command;
    let raw = |json| {
        let text = String::from_utf8(json).map_err(serde_json::Error::custom)?;
        RawValue::from_string(text)
    };
    match codec::to_json(rule).and_then(raw) {
        Ok(error) => Reply::Rejected { error },
        Err(error) => Reply::Failed {
            what: format!(
                "writing the rejection of command {command_id} of stream {stream} as JSON"
            ),
            reason: error.to_string(),
        },
    }
}

fn not_appended(failure: AppendError) -> Result<Reply, AppendError> {
    match failure {
        AppendError::Conflict { expected, actual, .. } => {
            Ok(Reply::Conflict { expected: expected.version(), actual })
        }
        AppendError::TooLarge { size, limit } => Ok(Reply::TooLarge { size, limit }),
        AppendError::NotAppended { reason } => Ok(Reply::NotAppended { reason }),
        AppendError::Unavailable { retry_after, cause } => {
            Ok(Reply::unavailable(retry_after, cause.to_string()))
        }
        unsettled @ (AppendError::NotOwner { .. } | AppendError::OutcomeUnknown { .. }) => {
            Err(unsettled)
        }
    }
}

fn is_unknown<E: std::error::Error>(answer: &Result<Handled, HandleError<E>>) -> bool {
    matches!(answer, Err(HandleError::Append(AppendError::OutcomeUnknown { .. })))
}

/// The answer to the last copy of a command whose copies before have unknown outcomes. What was
/// decided on the newest state settles them too; that the last one was not taken, or could not be
/// decided, says nothing of them.
fn of_all_copies<A: Aggregate>(job: &Job<'_, A>, answer: Answer<A>) -> Answer<A> {
    match answer {
        Ok(_) | Err(HandleError::Rejected(_) | HandleError::Conflict { .. }) => answer,
        Err(failure) => {
            tracing::warn!(%failure, "the command was sent again, and what it came to is still unknown");
            Err(unknown(job.command_id).into())
        }
    }
}

/// What the caller of an asynchronous command is told when it was handled at once. An owner that
/// handles it later could not tell of a rejection, so nobody does.
pub(super) fn sent_answer<A: Aggregate>(
    id: &str,
    answer: Answer<A>,
) -> Result<(), HandleError<A::Error>> {
    match answer {
        Ok(_) => Ok(()),
        Err(HandleError::Rejected(rule)) => {
            tracing::info!(category = A::CATEGORY, id, %rule, "a sent command was rejected");
            Ok(())
        }
        Err(failure) => Err(failure),
    }
}

/// The wall clock's time so much later, or the last one that it can tell.
fn later(now: DateTime<Utc>, remaining: Duration) -> DateTime<Utc> {
    let remaining = TimeDelta::from_std(remaining).ok();
    remaining.and_then(|later| now.checked_add_signed(later)).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

fn count_forwarded<A: Aggregate>(outcome: &'static str) {
    metrics::counter!("kafold_forwarded_commands_total", "category" => A::CATEGORY, "outcome" => outcome)
        .increment(1);
}

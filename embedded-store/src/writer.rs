//! The task that turns submissions into transactions.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kafold_core::store::{Append, View};
use kafold_core::{AppendError, Appended, Clock, CommandId};
use kafold_migrations::{SqliteDatabase, WriteTurn};
use tokio::sync::{mpsc, oneshot};

use crate::config::{EmbeddedConfig, RETRY_AFTER};
use crate::error::{is_certainly_not_committed, nothing_written};
use crate::event::{self, Begun, PlacedEvent, Question, event_bytes};
use crate::group::{Group, Tickets};
use crate::guard::Guard;

/// What may wait for the writer.
pub(crate) enum Submission {
    /// A commit to append.
    Append(Waiting<Append, Appended>),
    /// A view to confirm.
    Confirm(Waiting<View, ()>),
}

/// What the queue of the writer holds.
pub(crate) enum Message {
    Submission(Submission),
    /// Ends the writer when everything before is settled; then tells so.
    Close(oneshot::Sender<()>),
}

/// Work whose caller waits for an answer.
pub(crate) struct Waiting<W, A> {
    pub(crate) work: W,
    pub(crate) turn: Arc<Turn>,
    pub(crate) answer: oneshot::Sender<Result<A, AppendError>>,
}

/// Whether a submission's turn has come, or its caller has given up first: exactly one of the two.
#[derive(Debug, Default)]
pub(crate) struct Turn(AtomicU8);

const WAITS: u8 = 0;
const BEGUN: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Turn {
    /// The writer is about to write; `false` when the caller has given up.
    fn begin(&self) -> bool {
        self.decide(BEGUN)
    }

    /// The caller's deadline has passed; `false` when something may be written already.
    pub(crate) fn give_up(&self) -> bool {
        self.decide(GIVEN_UP)
    }

    fn decide(&self, state: u8) -> bool {
        self.0.compare_exchange(WAITS, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Why the store cannot write, if it cannot.
#[derive(Debug, Default)]
pub(crate) struct Failure(Mutex<Option<String>>);

impl Failure {
    pub(crate) fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, failure: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }
}

/// The one writer of this process to the log.
pub(crate) struct Writer {
    pub(crate) database: SqliteDatabase,
    pub(crate) config: EmbeddedConfig,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) queue: mpsc::Receiver<Message>,
    pub(crate) failure: Arc<Failure>,
    pub(crate) guard: Arc<Guard>,
}

/// What became of a COMMIT.
enum Committed {
    Yes,
    /// Certainly not, now and later.
    No(AppendError),
    Unknown,
}

impl Writer {
    /// Serves the queue until it is closed.
    pub(crate) async fn run(mut self) {
        let mut tickets = Tickets::default();
        while let Some(first) = self.next().await {
            let (group, closing) = self.gather(first).await;
            if !group.is_empty() {
                self.serve(group, &mut tickets).await;
            }
            if let Some(closed) = closing {
                // Whoever closed the store may have stopped waiting.
                let _ = closed.send(());
                return;
            }
        }
    }

    /// The next submission. While the store cannot write, tries to again and again, so that its
    /// health does not depend on callers who heed it.
    async fn next(&mut self) -> Option<Message> {
        while self.failure.get().is_some() {
            tokio::select! {
                message = self.queue.recv() => return message,
                () = self.clock.sleep(RETRY_AFTER) => {
                    self.note(prove_writable(&self.database).await.err());
                }
            }
        }
        self.queue.recv().await
    }

    /// Adds what else has been submitted, within the limits of a group.
    async fn gather(&mut self, first: Message) -> (Vec<Submission>, Option<oneshot::Sender<()>>) {
        // Callers who were just answered get to submit their next: without this, a lone early one
        // has a transaction of its own every time.
        tokio::task::yield_now().await;
        let (mut group, mut bytes, mut next) = (Vec::new(), 0, Some(first));
        while let Some(message) = next {
            let submission = match message {
                Message::Submission(submission) => submission,
                Message::Close(closed) => return (group, Some(closed)),
            };
            bytes += submission.bytes();
            group.push(submission);
            let full = group.len() >= self.config.group_submissions_max
                || bytes >= self.config.group_bytes_max;
            next = if full { None } else { self.queue.try_recv().ok() };
        }
        (group, None)
    }

    /// Decides a group, writes it and answers it.
    async fn serve(&self, submissions: Vec<Submission>, tickets: &mut Tickets) {
        let questions: Vec<_> = submissions.iter().map(|one| one.question(tickets)).collect();
        let begun = async {
            let mut turn = self.database.turn().await?;
            let begun = event::begin(&mut turn, &questions).await?;
            Ok((turn, begun))
        };
        let (mut turn, Begun { end, declared_end, known }) = match begun.await {
            Ok(begun) => begun,
            Err(error) => return self.refuse(submissions, &nothing_written(error)),
        };
        let checked = self.guard.check_group(&mut turn, &questions, &known, declared_end, end);
        if let Err(error) = checked.await {
            // Closing the connection rolls the transaction back.
            drop(turn);
            return self.refuse(submissions, &AppendError::unavailable(RETRY_AFTER, error));
        }
        let (bytes_max, now) = (self.config.event_bytes_max, self.clock.instant());
        let mut group = Group::new(&questions, &known, end, tickets, bytes_max, now);
        let verdicts: Vec<_> = submissions.iter().map(|one| one.decide(&mut group)).collect();
        let committed = match self.write(turn, group.rows()).await {
            Ok(committed) => committed,
            Err(error) => return self.refuse(submissions, &nothing_written(error)),
        };
        if let (Committed::Yes, false) = (&committed, group.rows().is_empty()) {
            self.guard.appended(group.rows());
            tickets.remember(group.last_commits());
            self.database.notify_changed();
        }
        let answers: Vec<_> = verdicts
            .into_iter()
            .zip(&questions)
            .zip(&known)
            .map(|((verdict, question), known)| {
                // A duplicate of what the file held before is true whatever became of the group.
                let stands = matches!(committed, Committed::Yes) || known.first.is_some();
                if stands { verdict } else { verdict.uncommitted(&committed, question.command) }
            })
            .collect();
        for (submission, verdict) in submissions.into_iter().zip(answers) {
            submission.answer(verdict);
        }
    }

    /// Inserts and commits; an error means that nothing was written.
    async fn write(
        &self,
        mut turn: WriteTurn,
        rows: &[PlacedEvent<'_>],
    ) -> Result<Committed, sqlx::Error> {
        if rows.is_empty() {
            // What was read was true while the lock was held: that is all these answers need.
            event::rollback(&mut turn).await?;
            turn.end();
            return Ok(Committed::Yes);
        }
        let Err(error) = event::insert_and_commit(&mut turn, rows).await else {
            turn.end();
            self.note(None);
            return Ok(Committed::Yes);
        };
        // Its transaction may still be open, and to settle takes a turn of its own.
        drop(turn);
        if is_certainly_not_committed(&error) {
            return Err(error);
        }
        tracing::warn!(%error, "a commit failed: reading what became of it");
        Ok(self.settle(rows, error).await)
    }

    /// Finds out whether a transaction whose COMMIT failed is in the file.
    async fn settle(&self, rows: &[PlacedEvent<'_>], error: sqlx::Error) -> Committed {
        let first = rows[0];
        let found = async {
            let mut transaction = self.database.write().await?;
            let found =
                event::find_command(&mut *transaction, first.stream, first.command_id).await;
            transaction.rollback().await?;
            found
        };
        match found.await {
            Ok(Some(_)) => return Committed::Yes,
            Ok(None) => {}
            Err(error) => {
                self.note(Some(error));
                return Committed::Unknown;
            }
        }
        // It cannot be read, but its frames may still lie whole behind the end of the log file, and
        // would count after a crash. A commit in their place ends that.
        match prove_writable(&self.database).await {
            Ok(()) => Committed::No(nothing_written(error)),
            Err(error) => {
                self.note(Some(error));
                Committed::Unknown
            }
        }
    }

    /// Answers everyone that nothing was written.
    fn refuse(&self, submissions: Vec<Submission>, answer: &AppendError) {
        self.failure.set(Some(answer.to_string()));
        tracing::warn!(error = %answer, appends = submissions.len(), "cannot write");
        for submission in submissions {
            submission.refuse(answer.clone());
        }
    }

    fn note(&self, error: Option<sqlx::Error>) {
        self.failure.set(error.map(|error| nothing_written(error).to_string()));
    }
}

/// Commits a change that means nothing.
async fn prove_writable(database: &SqliteDatabase) -> Result<(), sqlx::Error> {
    let mut transaction = database.write().await?;
    sqlx::query("UPDATE kafold_log SET log_id = log_id").execute(&mut *transaction).await?;
    transaction.commit().await
}

/// The answer to a submission of either kind.
enum Verdict {
    Append(Result<Appended, AppendError>),
    Confirm(Result<(), AppendError>),
}

impl Verdict {
    /// The answer when the group that it was decided in is not certainly in the file.
    fn uncommitted(self, committed: &Committed, command_id: Option<CommandId>) -> Self {
        let undecided = || AppendError::NotAppended {
            reason: "the transaction that it was decided in failed: decide again".into(),
        };
        match (self, committed, command_id) {
            (Self::Append(Ok(_)), Committed::No(error), _) => Self::Append(Err(error.clone())),
            (Self::Append(Ok(_)), _, Some(command_id)) => {
                Self::Append(Err(AppendError::OutcomeUnknown { command_id }))
            }
            // Conflicts and confirms may rest on events of the group.
            (Self::Append(Err(AppendError::Conflict { .. })), ..) => Self::Append(Err(undecided())),
            (Self::Confirm(Ok(()) | Err(AppendError::Conflict { .. })), ..) => {
                Self::Confirm(Err(undecided()))
            }
            (other, ..) => other,
        }
    }
}

impl Submission {
    /// What the file has to be asked for it.
    fn question(&self, tickets: &Tickets) -> Question<'_> {
        let (stream, command) = match self {
            Self::Append(append) => (&append.work.stream, Some(append.work.commit.command_id())),
            Self::Confirm(confirm) => (&confirm.work.stream, None),
        };
        Question { stream, command, last: tickets.version_of(stream) }
    }

    fn decide<'a>(&'a self, group: &mut Group<'a>) -> Verdict {
        match self {
            Self::Append(one) => Verdict::Append(group.append(&one.work, || one.turn.begin())),
            Self::Confirm(one) => Verdict::Confirm(group.confirm(&one.work)),
        }
    }

    /// Whoever does not listen any more has abandoned the answer, not the work.
    fn answer(self, verdict: Verdict) {
        match (self, verdict) {
            (Self::Append(one), Verdict::Append(answer)) => drop(one.answer.send(answer)),
            (Self::Confirm(one), Verdict::Confirm(answer)) => drop(one.answer.send(answer)),
            _ => unreachable!("a verdict is made for its own submission"),
        }
    }

    fn refuse(self, error: AppendError) {
        match self {
            Self::Append(one) => drop(one.answer.send(Err(error))),
            Self::Confirm(one) => drop(one.answer.send(Err(error))),
        }
    }

    fn bytes(&self) -> usize {
        let Self::Append(Waiting { work, .. }) = self else { return 0 };
        work.commit.events().iter().map(|event| event_bytes(&work.stream, event)).sum()
    }
}

//! [`EmbeddedStore`], the [`EventStore`].

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use kafold_core::digest::Digest;
use kafold_core::store::{Append, Health, Outcome, View};
use kafold_core::{
    AppendError, Appended, Clock, CommandId, EventStore, ReadError, RecordedEvent, StreamId,
    Version, trace,
};
use kafold_migrations::SqliteDatabase;
use tokio::sync::{mpsc, oneshot};

use crate::config::{COMPARISONS_MAX, EmbeddedConfig, RETRY_AFTER};
use crate::error::not_read;
use crate::event::{self, StreamPage};
use crate::group::deadline_passed;
use crate::guard::Guard;
use crate::source::check_own_log;
use crate::writer::{Failure, Message, Submission, Turn, Waiting, Writer};

/// An event store in one SQLite file. Cheap to clone; clones share one writer.
///
/// Several stores on one file, in one process or many, are safe and take turns; one is faster.
#[derive(Clone)]
pub struct EmbeddedStore {
    database: SqliteDatabase,
    clock: Arc<dyn Clock>,
    queue: mpsc::Sender<Message>,
    failure: Arc<Failure>,
    guard: Arc<Guard>,
}

impl EmbeddedStore {
    /// Opens the log in the file and starts its writer on the current tokio runtime. A file whose
    /// `kafold_event` is the index of another log is [`ReadError::Diverged`].
    pub async fn open(
        database: SqliteDatabase,
        config: EmbeddedConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ReadError> {
        check_own_log(&database).await?;
        let guard = Arc::new(Guard::open(&database).await?);
        let (queue, submissions) = mpsc::channel(config.queue_submissions_max.max(1));
        let failure = Arc::<Failure>::default();
        let writer = Writer {
            database: database.clone(),
            config,
            clock: Arc::clone(&clock),
            queue: submissions,
            failure: Arc::clone(&failure),
            guard: Arc::clone(&guard),
        };
        let watching = (database.clone(), Arc::clone(&guard), Arc::clone(&clock));
        tokio::spawn(async move {
            let (database, guard, clock) = watching;
            tokio::select! {
                () = writer.run() => {}
                () = guard.watch(&database, &*clock) => {}
            }
        });
        Ok(Self { database, clock, queue, failure, guard })
    }

    /// Settles everything that was submitted and stops the writer; whatever is submitted later is
    /// [`AppendError::Unavailable`]. Reading goes on. Without it, the writer settles what is in the
    /// queue when the last clone is dropped, as long as the runtime lives.
    pub async fn close(&self) {
        let (closing, closed) = oneshot::channel();
        if self.queue.send(Message::Close(closing)).await.is_ok() {
            // An error means that the writer is gone, which is what was asked for.
            let _ = closed.await;
        }
    }

    /// Returns a page of a stream. The last page is compared with the digests in this process's
    /// memory.
    async fn checked_page(
        &self,
        stream: &StreamId,
        after: Version,
        before: Option<Digest>,
    ) -> Result<(StreamPage, Option<Digest>), ReadError> {
        for _ in 0..COMPARISONS_MAX {
            let end = self.guard.end();
            let page = event::read_page(self.database.readers(), stream, after).await;
            let page = page.map_err(|error| self.guard.note(Some(stream), error))?;
            let digest = before.map(|mut digest| {
                page.events.iter().for_each(|event| digest ^= Digest::of(event));
                digest
            });
            if page.more
                || self.guard.check_page(&self.database, stream, after, &page, digest, end).await?
            {
                return Ok((page, digest));
            }
        }
        Err(ReadError::unavailable(RETRY_AFTER, "the log grows too fast to be compared"))
    }

    fn submitted(&self, append: Append) -> Outcome<Appended> {
        let (deadline, command_id) = (append.deadline, append.commit.command_id());
        let (waiting, turn, answer) = waiting(append);
        if let Err(refused) = self.enqueue(Submission::Append(waiting)) {
            return boxed(std::future::ready(Err(refused)));
        }
        boxed(answered(answer, deadline, Arc::clone(&self.clock), move || {
            if turn.give_up() {
                deadline_passed()
            } else {
                AppendError::OutcomeUnknown { command_id }
            }
        }))
    }

    fn enqueue(&self, submission: Submission) -> Result<(), AppendError> {
        self.queue.try_send(Message::Submission(submission)).map_err(|refused| {
            let cause = match refused {
                mpsc::error::TrySendError::Full(_) => "too many submissions wait for the store",
                mpsc::error::TrySendError::Closed(_) => "the store is closed",
            };
            AppendError::unavailable(RETRY_AFTER, cause)
        })
    }
}

/// A submission's two ends: what the writer gets and what the caller waits on.
fn waiting<W, A>(work: W) -> (Waiting<W, A>, Arc<Turn>, Answer<A>) {
    let (sender, answer) = oneshot::channel();
    let turn = Arc::new(Turn::default());
    (Waiting { work, turn: Arc::clone(&turn), answer: sender }, turn, answer)
}

type Answer<A> = oneshot::Receiver<Result<A, AppendError>>;

/// The answer, or at the deadline `late`. A writer that is gone has answered nothing, so that is
/// `late` as well.
async fn answered<A>(
    answer: Answer<A>,
    deadline: Option<Instant>,
    clock: Arc<dyn Clock>,
    late: impl FnOnce() -> AppendError,
) -> Result<A, AppendError> {
    let passed = async {
        match deadline {
            Some(deadline) => {
                clock.sleep(deadline.saturating_duration_since(clock.instant())).await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        // An answer that is there counts, however late it is asked for.
        biased;
        answer = answer => answer.unwrap_or_else(|_| Err(late())),
        () = passed => Err(late()),
    }
}

fn boxed<A: Send + 'static>(
    answer: impl Future<Output = Result<A, AppendError>> + Send + 'static,
) -> Outcome<A> {
    answer.boxed()
}

#[async_trait]
impl EventStore for EmbeddedStore {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        let span = tracing::info_span!(
            "append",
            stream = append.stream.as_str(),
            events = append.commit.count() as i64,
            offset = tracing::field::Empty,
            error.type = tracing::field::Empty,
            otel.status_code = tracing::field::Empty,
        );
        trace::around(span, self.submitted(append), |span, appended| {
            span.record("offset", appended.position.offset.0 as i64);
        })
    }

    fn confirm(&self, view: View) -> Outcome<()> {
        let deadline = view.deadline;
        let (waiting, _, answer) = waiting(view);
        if let Err(refused) = self.enqueue(Submission::Confirm(waiting)) {
            return boxed(std::future::ready(Err(refused)));
        }
        boxed(answered(answer, deadline, Arc::clone(&self.clock), deadline_passed))
    }

    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        // The digest of the rows read so far verifies a stream read from the beginning.
        let digest = (after == Version::EMPTY).then(Digest::default);
        let reading = (self.clone(), stream.clone());
        // Pages are of different moments, which does no harm: what has been written never changes.
        let pages = stream::try_unfold(Some((after, digest)), move |place| {
            let (store, stream) = reading.clone();
            async move {
                let Some((after, digest)) = place else { return Ok(None) };
                let (page, digest) = store.checked_page(&stream, after, digest).await?;
                let next = page.events.last().filter(|_| page.more);
                let next = next.map(|last| (last.version, digest));
                Ok::<_, ReadError>(Some((stream::iter(page.events.into_iter().map(Ok)), next)))
            }
        });
        pages.try_flatten().boxed()
    }

    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        let found = event::find_command(self.database.readers(), stream, command_id);
        found.await.map_err(not_read)
    }

    fn health(&self) -> Health {
        match self.guard.damage().or_else(|| self.failure.get()) {
            Some(failure) => Health::NotReady(vec![failure]),
            None if self.queue.is_closed() => Health::NotReady(vec!["the store is closed".into()]),
            None => Health::Ready,
        }
    }
}

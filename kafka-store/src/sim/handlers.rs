//! The real command handler on a simulated node: its store hands everything to the node's writer and
//! its index, and its futures are polled when the seed says so.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use kafold_core::handler::{HandleError, Handled, HandlerConfig, Request};
use kafold_core::store::{Append, Appended, Health, Outcome, View};
use kafold_core::{
    Aggregate, AppendError, Clock, CommandHandler, CommandId, DomainEvent, EventStore,
    ExpectedVersion, IdGenerator, ReadError, RecordedEvent, StreamId, Version,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::calls::STREAMS;
use super::coverage::State;
use super::node::outcome_of;
use super::random::Random;
use super::reference::{Violation, is_conflict};
use super::world::World;

/// Commands on their way through handlers at most.
const TASKS_MAX: usize = 10;
/// What a caller of a handler is told to wait.
const RETRY_AFTER: Duration = Duration::from_millis(5);

// --- the domain ----------------------------------------------------------------------------------

/// Also what the raw calls of the simulation append.
#[derive(Debug, Clone, PartialEq, Eq, DomainEvent, Serialize, Deserialize)]
pub(super) enum Happened {
    #[event("s.happened", version = 1)]
    Happened { index: u64 },
}

/// How many events there are. Refuses by that number alone, so that every refusal tells which version
/// it was decided on.
#[derive(Debug, Clone, Default)]
pub(super) struct Count(u64);

/// That many events, unless the count would then be divisible by four.
pub(super) struct Grow(u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("refused at {0}")]
pub(super) struct RefusedAt(u64);

impl Aggregate for Count {
    const CATEGORY: &'static str = "s";
    type Command = Grow;
    type Event = Happened;
    type Error = RefusedAt;

    fn decide(&self, Grow(more): &Grow) -> Result<Vec<Happened>, RefusedAt> {
        if (self.0 + more).is_multiple_of(4) {
            return Err(RefusedAt(self.0));
        }
        Ok((0..*more).map(|index| Happened::Happened { index }).collect())
    }

    fn evolve(&mut self, _: &Happened) {
        self.0 += 1;
    }
}

// --- the store under the handler -----------------------------------------------------------------

/// What handlers of a node have asked for and nobody has taken up yet.
#[derive(Default)]
pub(super) struct Inbox(VecDeque<Wish>);

enum Wish {
    Append(Append, oneshot::Sender<Result<Appended, AppendError>>),
    Confirm(View, oneshot::Sender<Result<(), AppendError>>),
    Read(StreamId, Version, oneshot::Sender<Result<Vec<RecordedEvent>, ReadError>>),
    Find(StreamId, CommandId, oneshot::Sender<Result<Option<Appended>, ReadError>>),
}

pub(super) type SharedInbox = Arc<Mutex<Inbox>>;

struct SimStore(SharedInbox);

impl SimStore {
    fn wish<T>(&self, wish: impl FnOnce(oneshot::Sender<T>) -> Wish) -> oneshot::Receiver<T> {
        let (tell, told) = oneshot::channel();
        lock(&self.0).0.push_back(wish(tell));
        told
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A node that crashed answers nothing: its callers are gone as well.
fn crashed() -> ReadError {
    ReadError::unavailable(RETRY_AFTER, "the node is gone")
}

#[async_trait]
impl EventStore for SimStore {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        let command_id = append.commit.command_id();
        let told = self.wish(|tell| Wish::Append(append, tell));
        Box::pin(
            async move { told.await.unwrap_or(Err(AppendError::OutcomeUnknown { command_id })) },
        )
    }

    fn confirm(&self, view: View) -> Outcome<()> {
        let told = self.wish(|tell| Wish::Confirm(view, tell));
        Box::pin(async move {
            told.await.unwrap_or_else(|_| Err(AppendError::unavailable(RETRY_AFTER, crashed())))
        })
    }

    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        let told = self.wish(|tell| Wish::Read(stream.clone(), after, tell));
        let events = async move { told.await.unwrap_or_else(|_| Err(crashed())) };
        let events = futures_util::stream::once(events).flat_map(|events| {
            let events = match events {
                Ok(events) => events.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            futures_util::stream::iter(events)
        });
        Box::pin(events)
    }

    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        let told = self.wish(|tell| Wish::Find(stream.clone(), command_id, tell));
        told.await.unwrap_or_else(|_| Err(crashed()))
    }

    fn health(&self) -> Health {
        Health::Ready
    }
}

// --- clock and ids -------------------------------------------------------------------------------

/// The time of the simulated world.
#[derive(Clone)]
pub(super) struct SimClock(Arc<Mutex<Instant>>);

impl SimClock {
    pub(super) fn new(now: Instant) -> Self {
        Self(Arc::new(Mutex::new(now)))
    }

    pub(super) fn set(&self, now: Instant) {
        *lock(&self.0) = now;
    }
}

#[async_trait]
impl Clock for SimClock {
    fn now(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH
    }

    fn instant(&self) -> Instant {
        *lock(&self.0)
    }

    async fn sleep(&self, duration: Duration) {
        let until = self.instant() + duration;
        // Polled again and again by the world.
        std::future::poll_fn(|_| match self.instant() >= until {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

struct SimIds(Mutex<Random>);

impl IdGenerator for SimIds {
    fn event_id(&self) -> Uuid {
        Uuid::from_u128(self.random().into())
    }

    fn random(&self) -> u64 {
        lock(&self.0).next()
    }
}

// --- the handler and its tasks -------------------------------------------------------------------

pub(super) fn handler(inbox: &SharedInbox, clock: &SimClock, seed: u64) -> CommandHandler<Count> {
    let store = Arc::new(SimStore(Arc::clone(inbox)));
    let ids = Arc::new(SimIds(Mutex::new(Random(seed))));
    CommandHandler::with_parts(store, Arc::new(clock.clone()), ids).config(HandlerConfig {
        attempts_max: 3,
        deadline: Duration::from_secs(600),
        hot_states_max: 2,
        recent_commands_max: 2,
        pending_max: 3,
        backoff_base: Duration::from_millis(1),
        backoff_max: Duration::from_millis(4),
        ..HandlerConfig::default()
    })
}

type Answer = Result<Handled, HandleError<RefusedAt>>;

/// A command on its way through a node's handler.
pub(super) struct Task {
    pub(super) incarnation: usize,
    stream: StreamId,
    command_id: CommandId,
    more: u64,
    expected: ExpectedVersion,
    version_before: Version,
    future: BoxFuture<'static, Answer>,
}

impl World {
    /// A command is given to some node's handler.
    pub(super) fn call_handler(&mut self, at: usize) {
        if self.tasks.len() >= TASKS_MAX {
            return;
        }
        let name = self.random.below(STREAMS).to_string();
        let stream = StreamId::new("s", &name).expect("valid");
        let more = 1 + self.random.below(3);
        let command_id = match self.random.chance(20) {
            true => self.any_command_of(&stream),
            false => None,
        };
        let command_id = command_id.unwrap_or_else(|| {
            let new = CommandId(Uuid::from_u128(self.random.next().into()));
            self.calls.know(new, &stream);
            new
        });
        let version_before = self.truth.version(&stream);
        let expected = match self.random.below(6) {
            0 => ExpectedVersion::Exact(version_before),
            1 => ExpectedVersion::Exact(version_before.plus(1)),
            _ => ExpectedVersion::Any,
        };
        let deadline = self.any_deadline();
        let node = &self.nodes[at];
        let (handler, incarnation) = (node.handler.clone(), node.incarnation);
        let future = Box::pin(async move {
            let command_id = Some(command_id);
            let request = Request { command_id, expected, deadline, ..Request::default() };
            handler.handle_with(&name, &Grow(more), request).await
        });
        self.note(|| format!("node {incarnation} handles {command_id} of {stream}: {more} more"));
        self.tasks.push(Task {
            incarnation,
            stream,
            command_id,
            more,
            expected,
            version_before,
            future,
        });
    }

    /// One of the commands goes on as far as it can.
    pub(super) fn poll_task(&mut self) -> Result<(), Violation> {
        let step = self.step;
        let able: Vec<usize> = (0..self.tasks.len())
            .filter(|place| {
                let incarnation = self.tasks[*place].incarnation;
                let is_his = |node: &&super::node::Node| node.incarnation == incarnation;
                self.nodes.iter().find(is_his).is_some_and(|node| node.paused_until <= step)
            })
            .collect();
        if able.is_empty() {
            return Ok(());
        }
        let place = able[self.random.index(able.len())];
        self.clock.set(self.now);
        let mut context = Context::from_waker(Waker::noop());
        let future: Pin<&mut (dyn Future<Output = Answer> + Send)> =
            self.tasks[place].future.as_mut();
        match future.poll(&mut context) {
            Poll::Pending => Ok(()),
            Poll::Ready(answer) => {
                let task = self.tasks.swap_remove(place);
                self.note(|| format!("command {} -> {answer:?}", task.command_id));
                self.handled(&task, answer)
            }
        }
    }

    /// The first thing that a handler of some node wishes for is taken up.
    pub(super) fn take_wish(&mut self) -> Result<(), Violation> {
        let Some(at) = self.pick(|node| !lock(&node.inbox).0.is_empty()) else { return Ok(()) };
        let Some(wish) = lock(&self.nodes[at].inbox).0.pop_front() else { return Ok(()) };
        match wish {
            Wish::Append(append, tell) => self.submit_of_handler(at, append, tell),
            Wish::Confirm(view, tell) => self.confirm_of_handler(at, view, tell),
            Wish::Read(stream, after, tell) => {
                let events = self.read_events(at, &stream)?.map(|mut events| {
                    events.retain(|event| event.version > after);
                    events
                });
                let failed = self.random.chance(self.fault_percent) && !self.healing;
                let read = events.filter(|_| !failed).ok_or_else(crashed);
                // Whoever asked may be gone.
                drop(tell.send(read));
                Ok(())
            }
            Wish::Find(stream, command_id, tell) => {
                let found = self.read_events(at, &stream)?;
                let found = found.map(|events| outcome_of(&events, command_id));
                drop(tell.send(found.ok_or_else(crashed)));
                Ok(())
            }
        }
    }

    /// What a caller of the handler was told must be true.
    fn handled(&mut self, task: &Task, answer: Answer) -> Result<(), Violation> {
        let Task { stream, command_id, version_before, .. } = task;
        let accepted = self.truth.commits.get(command_id);
        let version = self.truth.version(stream);
        let seen = |at: u64| {
            let whole = at == 0
                || self
                    .truth
                    .commits
                    .values()
                    .any(|commit| commit.stream == *stream && commit.version == Version(at));
            whole && version_before.0 <= at && at <= version.0
        };
        match answer {
            Ok(handled) => {
                self.coverage.saw(if handled.duplicate {
                    State::HandledDuplicate
                } else {
                    State::Handled
                });
                let told = handled.position.map(|position| (handled.version, position.offset));
                let is_so = accepted.is_some_and(|accepted| {
                    Some((accepted.version, accepted.offset)) == told && accepted.stream == *stream
                });
                if is_so {
                    return Ok(());
                }
                Err(format!(
                    "command {command_id} is {accepted:?}, its caller was told {handled:?}"
                ))
            }
            Err(HandleError::Rejected(RefusedAt(at))) => {
                self.coverage.saw(State::Rejected);
                let admitted = task.expected.admits(Version(at));
                if seen(at) && admitted && (at + task.more).is_multiple_of(4) {
                    return Ok(());
                }
                Err(format!(
                    "command {command_id} of {stream} was refused at {at}, which was \
                     {version_before} to {version}, expected {}",
                    task.expected
                ))
            }
            Err(HandleError::Conflict { actual, .. }) => {
                self.coverage.saw(State::HandlerConflict);
                let holds = match task.expected.version() {
                    None => true,
                    Some(demand) => {
                        is_conflict(demand, actual, *version_before, version)
                            && (demand < actual || seen(actual.0))
                    }
                };
                if holds {
                    return Ok(());
                }
                Err(format!(
                    "command {command_id} of {stream}: expected {}, told {actual}, was \
                     {version_before} to {version}",
                    task.expected
                ))
            }
            Err(HandleError::Append(AppendError::OutcomeUnknown { .. })) => {
                self.coverage.saw(State::HandledUnknown);
                Ok(())
            }
            // What the store answered was checked where it was answered.
            Err(HandleError::Append(_) | HandleError::Read(_)) => Ok(()),
            Err(error) => Err(format!("command {command_id} of {stream}: {error}")),
        }
    }
}

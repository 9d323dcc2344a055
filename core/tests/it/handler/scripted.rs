//! A store that does what a script says, and otherwise what the in-memory store does.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::stream::BoxStream;
use kafold_core::handler::HandlerConfig;
use kafold_core::memory::MemoryStore;
use kafold_core::store::{Append, Health, Outcome, Ticket, View};
use kafold_core::testing::{self, read_all};
use kafold_core::{
    AppendError, Appended, CommandHandler, CommandId, Commit, EventStore, ExpectedVersion,
    ReadError, RecordedEvent, StreamId, Version,
};
use tokio::sync::oneshot;

use crate::handler::domain::Accounts;

/// What becomes of one call.
pub(crate) enum Act {
    /// What the in-memory store does.
    Pass,
    /// This answer, and nothing else.
    Fail(AppendError),
    /// Somebody else deposits a cent first.
    Overtake,
    /// It is done, but the answer is lost.
    LoseAnswer,
}

#[derive(Default)]
struct Seen {
    submits: VecDeque<Act>,
    confirms: VecDeque<Act>,
    submitted: Vec<Append>,
    confirmed: Vec<View>,
    reads: Vec<Version>,
    finds: usize,
    /// Whether answers to submissions wait to be released.
    holds: bool,
    held: Vec<Option<oneshot::Sender<()>>>,
}

#[derive(Clone, Default)]
pub(crate) struct ScriptedStore {
    log: MemoryStore,
    seen: Arc<Mutex<Seen>>,
}

impl ScriptedStore {
    /// The same log as another node sees it, with a script of its own.
    pub(crate) fn beside(&self) -> Self {
        Self { log: self.log.clone(), seen: Arc::default() }
    }

    pub(crate) fn accounts(&self) -> Accounts {
        self.accounts_with(HandlerConfig::default())
    }

    /// A handler of its own, with quick retries.
    pub(crate) fn accounts_with(&self, mut config: HandlerConfig) -> Accounts {
        config.backoff_base = std::time::Duration::from_millis(1);
        CommandHandler::new(Arc::new(self.clone())).config(config)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no test panics under this lock")
    }

    pub(crate) fn on_submit(&self, acts: impl IntoIterator<Item = Act>) {
        self.seen().submits.extend(acts);
    }

    pub(crate) fn on_confirm(&self, acts: impl IntoIterator<Item = Act>) {
        self.seen().confirms.extend(acts);
    }

    pub(crate) fn submitted(&self) -> Vec<Append> {
        self.seen().submitted.clone()
    }

    pub(crate) fn confirmed(&self) -> Vec<View> {
        self.seen().confirmed.clone()
    }

    pub(crate) fn reads(&self) -> Vec<Version> {
        self.seen().reads.clone()
    }

    pub(crate) fn finds(&self) -> usize {
        self.seen().finds
    }

    /// From now on submissions are done at once, but answered only when released.
    pub(crate) fn hold(&self) {
        self.seen().holds = true;
    }

    /// Answers the submission of this index among those held.
    pub(crate) fn release(&self, index: usize) {
        if let Some(held) = self.seen().held[index].take() {
            // Whoever asked may have gone.
            let _ = held.send(());
        }
    }

    /// Answers all and holds nothing more.
    pub(crate) fn release_all(&self) {
        self.seen().holds = false;
        (0..self.held()).for_each(|index| self.release(index));
    }

    pub(crate) fn held(&self) -> usize {
        self.seen().held.len()
    }

    /// Waits until so many submissions were held.
    pub(crate) async fn until_held(&self, count: usize) {
        testing::eventually("submissions are held", async || self.held() >= count).await;
        assert_eq!(self.held(), count);
    }

    /// Somebody else deposits a cent in account `a`.
    pub(crate) fn deposit_a_cent(&self) -> CommandId {
        self.add_to_a("account.deposited.v1")
    }

    /// An event of this type in account `a`, with the payload of a deposit of a cent.
    pub(crate) fn add_to_a(&self, event_type: &str) -> CommandId {
        let stream: StreamId = "account-a".parse().expect("valid");
        let mut event = testing::event(0);
        event.event_type = event_type.into();
        event.payload = br#"{"cents":1}"#.as_slice().into();
        let command_id = testing::new_command();
        let commit = Commit::new(command_id, vec![event]).expect("one event");
        let (_, outcome) = testing::submit(&self.log, &stream, ExpectedVersion::Any, commit, None);
        outcome.now_or_never().expect("is settled at once").expect("expects nothing");
        command_id
    }

    /// The events of account `a`.
    pub(crate) async fn events(&self) -> Vec<RecordedEvent> {
        read_all(&self.log, &"account-a".parse().expect("valid")).await
    }
}

pub(crate) fn not_appended() -> Act {
    Act::Fail(AppendError::NotAppended { reason: "as told".into() })
}

pub(crate) fn unavailable() -> Act {
    Act::Fail(AppendError::unavailable(std::time::Duration::from_secs(7), "as told"))
}

pub(crate) fn not_owner() -> Act {
    Act::Fail(AppendError::NotOwner { partition: kafold_core::Partition(0), owner: None })
}

pub(crate) fn conflict(actual: u64) -> Act {
    Act::Fail(AppendError::Conflict {
        stream: "account-a".parse().expect("valid"),
        expected: ExpectedVersion::Exact(Version(99)),
        actual: Version(actual),
    })
}

#[async_trait]
impl EventStore for ScriptedStore {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        let act = {
            let mut seen = self.seen();
            seen.submitted.push(append.clone());
            seen.submits.pop_front().unwrap_or(Act::Pass)
        };
        let command_id = append.commit.command_id();
        let result = match act {
            Act::Pass => self.log.submit(append),
            Act::Fail(error) => futures_util::future::ready(Err(error)).boxed(),
            Act::Overtake => {
                self.deposit_a_cent();
                self.log.submit(append)
            }
            Act::LoseAnswer => {
                let done = self.log.submit(append);
                let unknown = AppendError::OutcomeUnknown { command_id };
                async move { done.await.and(Err(unknown)) }.boxed()
            }
        };
        let mut seen = self.seen();
        if !seen.holds {
            return result;
        }
        let (release, released) = oneshot::channel();
        seen.held.push(Some(release));
        async move {
            released.await.expect("the test releases what it holds");
            result.await
        }
        .boxed()
    }

    fn confirm(&self, view: View) -> Outcome<()> {
        let act = {
            let mut seen = self.seen();
            seen.confirmed.push(view.clone());
            seen.confirms.pop_front().unwrap_or(Act::Pass)
        };
        match act {
            Act::Pass => self.log.confirm(view),
            Act::Fail(error) => futures_util::future::ready(Err(error)).boxed(),
            Act::Overtake | Act::LoseAnswer => {
                self.deposit_a_cent();
                self.log.confirm(view)
            }
        }
    }

    fn read(
        &self,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        self.seen().reads.push(after);
        self.log.read(stream, after)
    }

    async fn find_command(
        &self,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        self.seen().finds += 1;
        self.log.find_command(stream, command_id).await
    }

    fn health(&self) -> Health {
        Health::Ready
    }
}

/// The tickets that submissions were behind, and their own.
pub(crate) fn tickets(submitted: &[Append]) -> Vec<(Option<Ticket>, Ticket)> {
    submitted.iter().map(|append| (append.after, append.ticket)).collect()
}

//! What is known of one stream: proven events, and those submitted on top of them.

use std::any::Any;
use std::collections::{VecDeque, vec_deque};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::outcome::SharedOutcome;
use super::{Last, Step};
use crate::aggregate::Aggregate;
use crate::codec::CodecError;
use crate::event::{DomainEvent, RecordedEvent};
use crate::ids::{CommandId, Position, Version};
use crate::mutant::{self, Mutant};
use crate::store::{AppendError, Appended, Ticket};

/// One stream. Only what the log holds for good becomes proven.
pub(super) struct Slot<A: Aggregate> {
    /// `None` until it is loaded, and again when it cannot be relied on.
    proven: Option<Proven<A>>,
    /// `None` while nothing is pending: most streams are not written for long.
    unproven: Option<Box<Unproven<A>>>,
    /// The version that a conflict told of, if it is beyond the proven one.
    moved_to: Version,
}

/// What was submitted on top of what is proven, at least one commit.
struct Unproven<A: Aggregate> {
    /// Submitted in this order, each behind the one before.
    pending: VecDeque<Pending<A>>,
    /// The proven state with all pending events; made when it is needed.
    head: Option<A>,
}

/// A commit that was submitted.
pub(super) struct Pending<A: Aggregate> {
    pub(super) ticket: Ticket,
    pub(super) command_id: CommandId,
    pub(super) events: Vec<A::Event>,
    /// Of its last event.
    pub(super) version: Version,
    pub(super) outcome: SharedOutcome,
}

/// What the log holds of a stream.
#[derive(Clone, Default)]
pub(super) struct Proven<A> {
    pub(super) state: A,
    pub(super) version: Version,
    /// Where the last event is; `None` while there is none.
    pub(super) last: Option<Position>,
    pub(super) recent: RecentCommands,
    /// The version of the newest snapshot.
    pub(super) saved: Version,
}

impl<A: Aggregate> Default for Slot<A> {
    fn default() -> Self {
        Self { proven: None, unproven: None, moved_to: Version::EMPTY }
    }
}

/// Why a slot has a state where one is asked for.
const LOADED: &str = "make_current has loaded the stream, and the lock is still held";

impl<A: Aggregate> Slot<A> {
    /// What is known of the stream, for whoever reads on from there: it comes back by
    /// [`Slot::set_proven`], or not at all when reading fails. What is pending may be read as well,
    /// so it must not be taken over a second time from here.
    pub(super) fn take_to_read_on(&mut self) -> Option<Proven<A>> {
        self.unproven = None;
        self.proven.take()
    }

    /// The part that is proven, for a change that nothing pending depends on.
    pub(super) fn proven_mut(&mut self) -> Option<&mut Proven<A>> {
        self.proven.as_mut()
    }

    pub(super) fn set_proven(&mut self, proven: Proven<A>) {
        self.proven = Some(proven);
    }

    /// Returns the proven state and version, if the stream is loaded.
    pub(super) fn proven(&self) -> Option<(&A, Version)> {
        self.proven.as_ref().map(|proven| (&proven.state, proven.version))
    }

    /// Records that the log has this version.
    pub(super) fn moved_to(&mut self, version: Version) {
        self.moved_to = self.moved_to.max(version);
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.proven.is_some()
    }

    /// Whether all is proven here that the log is known to hold.
    pub(super) fn is_current(&self) -> bool {
        self.proven.as_ref().is_some_and(|proven| proven.version >= self.moved_to)
    }

    pub(super) fn proven_version(&self) -> Version {
        self.proven.as_ref().expect(LOADED).version
    }

    /// With all pending events.
    pub(super) fn version(&self) -> Version {
        self.pending().next_back().map_or_else(|| self.proven_version(), |last| last.version)
    }

    pub(super) fn last_ticket(&self) -> Option<Ticket> {
        self.pending().next_back().map(|last| last.ticket)
    }

    pub(super) fn last(&self) -> Last {
        match self.pending().next_back() {
            Some(last) => Last::Pending(last.outcome.clone()),
            None => Last::Proven(self.proven.as_ref().expect(LOADED).last),
        }
    }

    /// The state to decide on: the newest, with all pending events.
    pub(super) fn head(&mut self) -> &A {
        let proven = &self.proven.as_ref().expect(LOADED).state;
        let Some(unproven) = &mut self.unproven else { return proven };
        let events = unproven.pending.iter().flat_map(|pending| &pending.events);
        unproven.head.get_or_insert_with(|| {
            let mut head = proven.clone();
            events.for_each(|event| head.evolve(event));
            head
        })
    }

    fn pending(&self) -> vec_deque::Iter<'_, Pending<A>> {
        self.unproven.as_ref().map(|unproven| unproven.pending.iter()).unwrap_or_default()
    }

    /// Returns the newest state with these events on top, or an error for an event on which `evolve`
    /// panics.
    pub(super) fn evolved(&mut self, events: &[A::Event]) -> Result<A, CodecError> {
        // If evolve panics, the head is gone and made anew next time.
        let head = self.unproven.as_mut().and_then(|unproven| unproven.head.take());
        let mut head = head.unwrap_or_else(|| self.head().clone());
        for event in events {
            // The state is dropped after a panic.
            let evolved = catch_unwind(AssertUnwindSafe(|| head.evolve(event)));
            evolved.map_err(|panic| CodecError::Unstorable {
                event_type: event.event_type().to_string(),
                reason: format!("the state cannot follow it: evolve panics: {}", words_of(&*panic)),
            })?;
        }
        Ok(head)
    }

    /// Adds a commit which was submitted, and the state with its events.
    pub(super) fn push(&mut self, pending: Pending<A>, head: A) {
        let empty = || Box::new(Unproven { pending: VecDeque::new(), head: None });
        let unproven = self.unproven.get_or_insert_with(empty);
        unproven.head = Some(head);
        unproven.pending.push_back(pending);
    }

    /// Where a command stands that was sent before: recent or pending.
    pub(super) fn find<E>(&self, command_id: CommandId) -> Option<Step<E>> {
        let proven = self.proven.as_ref().expect(LOADED);
        if let Some(appended) = proven.recent.find(command_id) {
            return Some(Step::Known(appended));
        }
        let pending = self.pending().find(|pending| pending.command_id == command_id)?;
        Some(Step::Shared(pending.outcome.clone()))
    }

    /// Whether a command that [`Slot::find`] does not know cannot be in the stream.
    pub(super) fn knows_every_command(&self) -> bool {
        self.proven.as_ref().is_some_and(|proven| proven.recent.is_complete)
    }

    /// Waits until fewer than `pending_max` commits are pending.
    pub(super) async fn make_room(&mut self, pending_max: usize) {
        while self.pending().len() >= pending_max.max(1)
            && let Some(first) = self.pending().next()
        {
            // settle() takes the result; here it is only waited for.
            let _ = first.outcome.clone().await;
            self.settle();
        }
    }

    /// Takes over the outcomes that are known, in order.
    pub(super) fn settle(&mut self) {
        while let Some(first) = self.pending().next()
            && let Some(result) = first.outcome.known()
        {
            let ticket = first.ticket;
            match result {
                Ok(appended) if !appended.duplicate => self.prove_first(appended),
                // Its events are not the ones at the end of the stream.
                Ok(appended) => self.lost_first(appended.version),
                Err(failure) => self.failed(ticket, &failure),
            }
        }
    }

    fn prove_first(&mut self, appended: Appended) {
        let first = self.unproven.as_mut().and_then(|unproven| unproven.pending.pop_front());
        let last = self.unproven.take_if(|unproven| unproven.pending.is_empty());
        let head = last.and_then(|unproven| unproven.head);
        // Taken out: if evolve panics, or the store says what cannot be, the stream is loaded again.
        if let (Some(first), Some(mut proven)) = (first, self.proven.take()) {
            let follows = proven.version.plus(first.events.len() as u64) == appended.version;
            proven.append(&first, head, appended);
            self.proven = follows.then_some(proven);
        }
    }

    /// The first pending commit was in the stream already, at `version`.
    fn lost_first(&mut self, version: Version) {
        self.unproven = None;
        self.moved_to(version);
    }

    /// A submission was not appended, or is not known to be: it and all behind it are no part of
    /// the head any more. A no-op if that was found already, by one that it was behind.
    pub(super) fn failed(&mut self, ticket: Ticket, failure: &AppendError) {
        let is_it = |pending: &Pending<A>| pending.ticket == ticket;
        if let Some(unproven) = &mut self.unproven
            && let Some(index) = unproven.pending.iter().position(is_it)
        {
            if mutant::active(Mutant::PendingStateInCache)
                && let (Some(proven), Some(pending)) =
                    (&mut self.proven, unproven.pending.get(index))
            {
                pending.events.iter().for_each(|event| proven.state.evolve(event));
            }
            unproven.pending.truncate(index);
            unproven.head = None;
            self.unproven.take_if(|unproven| unproven.pending.is_empty());
            self.unconfirmed(failure);
        }
    }

    /// Learns from a failure what is wrong with the proven part, if anything.
    pub(super) fn unconfirmed(&mut self, failure: &AppendError) {
        match failure {
            AppendError::Conflict { actual, .. } => self.moved_to(*actual),
            // What is in the log now is to be seen from the log alone.
            AppendError::NotOwner { .. } | AppendError::OutcomeUnknown { .. } => self.forget(),
            AppendError::NotAppended { .. }
            | AppendError::Unavailable { .. }
            | AppendError::TooLarge { .. } => {}
        }
    }

    fn forget(&mut self) {
        *self = Self::default();
    }
}

impl<A: Aggregate> Proven<A> {
    /// Without events: the begin of every load.
    pub(super) fn empty(recent_commands_max: usize) -> Self {
        let recent = RecentCommands::new(recent_commands_max, true);
        let (version, saved) = (Version::EMPTY, Version::EMPTY);
        Self { state: A::default(), version, last: None, recent, saved }
    }

    /// Adds a commit. `state` is the state after the commit; `None` runs `evolve` on the events.
    fn append(&mut self, commit: &Pending<A>, state: Option<A>, appended: Appended) {
        match state {
            Some(state) => self.state = state,
            None => commit.events.iter().for_each(|event| self.state.evolve(event)),
        }
        self.version = appended.version;
        self.last = Some(appended.position);
        self.recent.add(commit.command_id, appended.version, appended.position);
    }

    /// Takes over the next event as the log has it.
    pub(super) fn apply(&mut self, recorded: &RecordedEvent, event: &A::Event) {
        self.state.evolve(event);
        self.version = recorded.version;
        self.last = Some(recorded.position);
        self.recent.add(recorded.command_id, recorded.version, recorded.position);
    }
}

/// Returns the message of a panic.
fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// The stream's newest commands and what they came to, oldest first.
#[derive(Clone, Default)]
pub(super) struct RecentCommands {
    commands: VecDeque<(CommandId, Version, Position)>,
    commands_max: usize,
    /// Whether no command of the stream is missing.
    is_complete: bool,
}

impl RecentCommands {
    pub(super) fn new(commands_max: usize, is_complete: bool) -> Self {
        Self { commands: VecDeque::new(), commands_max: commands_max.max(1), is_complete }
    }

    /// Events of one command follow one another: the last one's version and position stay.
    pub(super) fn add(&mut self, command_id: CommandId, version: Version, position: Position) {
        if self.commands.back().is_some_and(|(last, ..)| *last == command_id) {
            self.commands.pop_back();
        }
        if self.commands.len() == self.commands_max {
            self.commands.pop_front();
            self.is_complete = false;
        }
        if self.commands.len() == self.commands.capacity() {
            // Most streams have few: room for one, two, four …
            self.commands.reserve_exact(self.commands.len().max(1));
        }
        self.commands.push_back((command_id, version, position));
    }

    fn find(&self, command_id: CommandId) -> Option<Appended> {
        let (_, version, position) =
            *self.commands.iter().rev().find(|(known, ..)| *known == command_id)?;
        Some(Appended { version, position, duplicate: true })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(CommandId, Version, Position)> {
        self.commands.iter()
    }
}

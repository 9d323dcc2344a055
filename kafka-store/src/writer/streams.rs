//! What a writer knows of each stream, and who waits there.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::{Append, Ticket, View};
use kafold_core::{CommandId, Filter, RecordedEvent, StreamId, Version};
use lru::LruCache;

use super::messages::{CommandOutcome, RequestId, StreamHead};

/// A submission or confirm that cannot be decided yet.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) request: RequestId,
    pub(super) ask: Ask,
    pub(super) deadline: Option<Instant>,
    /// Bytes of its records; 0 for a confirm.
    pub(super) bytes: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Ask {
    Append(Append),
    Confirm(View),
}

/// One stream. It is forgotten only while nobody waits and nothing is pending or looked up.
#[derive(Debug, Clone, Default)]
pub(super) struct Stream {
    pub(super) knowledge: Knowledge,
    /// In the order of the calls; only the first is ever decided.
    pub(super) waiting: VecDeque<Waiting>,
    /// The commits in flight, in order: their commands and the last seq of each.
    pub(super) pending: VecDeque<(CommandId, u64)>,
    /// The version behind the last pending commit.
    pub(super) pending_version: Version,
    /// The last commit, pending or proven, when it is one of ours: what one can build on.
    pub(super) last: Option<(Ticket, Version)>,
    /// The command that is being looked up.
    pub(super) finding: Option<CommandId>,
    /// The command that was looked up for the first in the queue and is not in the stream.
    pub(super) not_found: Option<CommandId>,
    /// It waits for its turn to look up.
    pub(super) queued: bool,
    /// The first in the queue expects more than we have, and the log is asked whether we are stale.
    pub(super) asking: bool,
    /// It is in [`Streams::waiting`].
    pub(super) listed: bool,
}

/// What is known of a stream's proven events.
#[derive(Debug, Clone, Default)]
pub(super) enum Knowledge {
    /// Nothing: it must be loaded.
    #[default]
    Unknown,
    /// A load is under way; these commits became visible since: their last events and counts.
    Loading(Vec<(Arc<RecordedEvent>, u64)>),
    /// Everything that matters.
    Known(Known),
}

/// The proven version of a stream and its recent commands.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) version: Version,
    recent: VecDeque<CommandOutcome>,
    /// The commands before the recent ones, if they are known.
    pub(super) older: Option<Filter>,
}

/// A commit that does not continue its stream: the stream's version and the commit's first.
pub(super) struct NotGapless {
    pub(super) actual: Version,
    pub(super) found: Version,
}

impl Known {
    fn new(head: StreamHead, recent_max: usize) -> Self {
        let StreamHead { version, recent, older } = head;
        let mut known = Self { version, recent: recent.into(), older };
        known.cut(recent_max);
        known
    }

    /// Whether a command that [`Known::find`] does not know cannot be in the stream.
    pub(super) fn excludes(&self, command_id: CommandId) -> bool {
        self.older.as_ref().is_some_and(|older| !older.may_hold(&command_id))
    }

    pub(super) fn find(&self, command_id: CommandId) -> Option<&CommandOutcome> {
        self.recent.iter().rev().find(|outcome| outcome.command_id == command_id)
    }

    fn cut(&mut self, recent_max: usize) {
        while self.recent.len() > recent_max {
            let oldest = self.recent.pop_front();
            if let (Some(older), Some(oldest)) = (&mut self.older, oldest)
                && !mutant::active(Mutant::OlderForgotten)
            {
                older.add(&oldest.command_id);
            }
        }
    }

    /// Adds a visible commit of `count` events of which `last` is the last, unless it is known.
    fn push(
        &mut self,
        last: &RecordedEvent,
        count: u64,
        recent_max: usize,
    ) -> Result<(), NotGapless> {
        if last.version <= self.version {
            // The index was ahead of our own reading: another owner feeds it too.
            return Ok(());
        }
        if last.version != self.version.plus(count) {
            let found = Version((last.version.0 + 1).saturating_sub(count));
            return Err(NotGapless { actual: self.version, found });
        }
        self.version = last.version;
        let (command_id, version, position) = (last.command_id, last.version, last.position);
        self.recent.push_back(CommandOutcome { command_id, version, position });
        self.cut(recent_max);
        Ok(())
    }
}

impl Stream {
    pub(super) fn known(&self) -> Option<&Known> {
        match &self.knowledge {
            Knowledge::Known(known) => Some(known),
            Knowledge::Unknown | Knowledge::Loading(_) => None,
        }
    }

    /// Adds a commit that became visible.
    pub(super) fn push(
        &mut self,
        events: &[Arc<RecordedEvent>],
        recent_max: usize,
    ) -> Result<(), NotGapless> {
        let (Some(last), count) = (events.last(), events.len() as u64) else { return Ok(()) };
        match &mut self.knowledge {
            Knowledge::Known(known) => known.push(last, count, recent_max)?,
            Knowledge::Loading(since) => since.push((Arc::clone(last), count)),
            Knowledge::Unknown => {}
        }
        Ok(())
    }

    /// Takes over what was loaded, and what became visible since the load began.
    pub(super) fn loaded(&mut self, head: StreamHead, recent_max: usize) -> Result<(), NotGapless> {
        let since = match std::mem::take(&mut self.knowledge) {
            Knowledge::Loading(since) => since,
            other => {
                self.knowledge = other;
                return Ok(());
            }
        };
        let mut known = Known::new(head, recent_max);
        for (last, count) in &since {
            known.push(last, *count, recent_max)?;
        }
        self.knowledge = Knowledge::Known(known);
        Ok(())
    }

    /// Memory of what is known of its older commands.
    fn older_bytes(&self) -> usize {
        let older = self.known().and_then(|known| known.older.as_ref());
        older.map_or(0, Filter::bytes)
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.pending.is_empty()
            && self.finding.is_none()
            && !matches!(self.knowledge, Knowledge::Loading(_))
    }
}

/// The streams that were used last.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    /// `None` while it is worked on.
    entries: LruCache<StreamId, Option<Box<Stream>>>,
    entries_max: usize,
    /// Memory of older commands: what there is, or more than that.
    older_bytes: usize,
    older_bytes_max: usize,
    /// Those where somebody waits.
    pub(super) waiting: BTreeSet<StreamId>,
    /// Loads and look-ups under way.
    pub(super) lookups: usize,
    /// Streams whose first in the queue waits for its turn to look up.
    pub(super) lookup_queue: VecDeque<StreamId>,
}

impl Streams {
    pub(super) fn new(entries_max: usize, older_bytes_max: usize) -> Self {
        Self {
            entries: LruCache::unbounded(),
            entries_max,
            older_bytes: 0,
            older_bytes_max,
            waiting: BTreeSet::new(),
            lookups: 0,
            lookup_queue: VecDeque::new(),
        }
    }

    pub(super) fn peek(&self, id: &StreamId) -> Option<&Stream> {
        self.entries.peek(id)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: &StreamId) -> Option<&mut Stream> {
        self.entries.peek_mut(id)?.as_deref_mut()
    }

    /// Lets the stream's entry, if there is one, learn something of its commands.
    pub(super) fn learn<T>(
        &mut self,
        id: &StreamId,
        learn: impl FnOnce(&mut Stream) -> T,
    ) -> Option<T> {
        let stream = self.entries.peek_mut(id)?.as_deref_mut()?;
        let before = stream.older_bytes();
        let learned = learn(stream);
        self.older_bytes += stream.older_bytes().saturating_sub(before);
        if self.older_bytes > self.older_bytes_max {
            self.forget_older();
        }
        Some(learned)
    }

    /// Keeps what is known of the older commands of the streams used last, three quarters of the
    /// limit: those of the others are looked up.
    fn forget_older(&mut self) {
        let most = self.older_bytes_max / 4 * 3;
        self.older_bytes = 0;
        for stream in self.entries.iter_mut().filter_map(|(_, stream)| stream.as_deref_mut()) {
            let bytes = stream.older_bytes();
            if self.older_bytes + bytes <= most {
                self.older_bytes += bytes;
            } else if let Knowledge::Known(known) = &mut stream.knowledge {
                known.older = None;
            }
        }
    }

    /// For the model check.
    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = (&StreamId, &Stream)> {
        self.entries.iter().filter_map(|(id, stream)| Some((id, stream.as_deref()?)))
    }

    /// The stream's entry, as the most recently used; others make room.
    pub(super) fn entry(&mut self, id: &StreamId) -> &mut Stream {
        if self.entries.len() >= self.entries_max && !self.entries.contains(id) {
            self.make_room();
        }
        let entry = self.entries.get_or_insert_mut_ref(id, Option::default);
        entry.get_or_insert_default()
    }

    /// Takes the stream out while it is worked on, as the most recently used; [`Streams::put`] brings it
    /// back.
    pub(super) fn take(&mut self, id: &StreamId) -> Option<Box<Stream>> {
        self.entries.get_mut(id)?.take()
    }

    pub(super) fn put(&mut self, id: &StreamId, mut stream: Box<Stream>) {
        let listed = !stream.waiting.is_empty();
        if listed != stream.listed {
            stream.listed = listed;
            match listed {
                true => self.waiting.insert(id.clone()),
                false => self.waiting.remove(id),
            };
        }
        if let Some(entry) = self.entries.peek_mut(id) {
            *entry = Some(stream);
        }
    }

    /// Notes whether somebody waits there.
    pub(super) fn list(&mut self, id: &StreamId) {
        if let Some(stream) = self.take(id) {
            self.put(id, stream);
        }
    }

    /// Nobody waits there any more.
    pub(super) fn take_waiting_of(&mut self, id: &StreamId) -> VecDeque<Waiting> {
        self.waiting.remove(id);
        let Some(stream) = self.get_mut(id) else { return VecDeque::new() };
        stream.listed = false;
        std::mem::take(&mut stream.waiting)
    }

    /// Everybody who waits anywhere, in the order of the streams.
    pub(super) fn take_waiting(&mut self) -> Vec<Waiting> {
        let mut all = Vec::new();
        for id in std::mem::take(&mut self.waiting) {
            if let Some(stream) = self.get_mut(&id) {
                stream.listed = false;
                all.extend(stream.waiting.drain(..));
            }
        }
        all
    }

    fn make_room(&mut self) {
        // Each busy entry is passed once; requests are bounded, and so are they.
        for _ in 0..self.entries.len() {
            if self.entries.len() < self.entries_max {
                return;
            }
            let Some((id, stream)) = self.entries.pop_lru() else { return };
            if stream.as_ref().is_some_and(|stream| !stream.is_idle()) {
                self.entries.push(id, stream);
            }
        }
    }
}

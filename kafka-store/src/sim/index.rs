//! The stream index in memory, which can be rolled back, and a reader with checkpoints.

use std::sync::Arc;

use futures_util::FutureExt;
use kafold_core::index::{Advanced, IndexBatch, IndexLoad};
use kafold_core::memory::MemoryIndex;
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Cursor;
use kafold_core::testing::advance;
use kafold_core::{Offset, ReadError, RecordedEvent, StreamId, StreamIndex, Version};

use super::coverage::{Coverage, State};
use super::reference::{PARTITION, Reference, Violation};
use crate::fold::{Checkpoint, CommitReader, Read};

/// The real index in memory, and what it was fed: so it can be as it was before.
#[derive(Default)]
pub(super) struct Index {
    index: MemoryIndex,
    fed: Vec<IndexBatch>,
}

impl Clone for Index {
    fn clone(&self) -> Self {
        let copy = Self { index: MemoryIndex::new(), fed: self.fed.clone() };
        for batch in &copy.fed {
            copy.take(batch).expect("it was taken before");
        }
        copy
    }
}

/// What is in memory never waits.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("it does not wait")
}

impl Index {
    fn take(&self, batch: &IndexBatch) -> Result<Advanced, ReadError> {
        at_once(advance(&self.index, batch.clone()))
    }

    fn cursor(&self) -> Option<Cursor> {
        let cursors = at_once(self.index.cursors()).expect("it is in memory");
        cursors.into_iter().map(|(_, cursor)| cursor).next()
    }

    pub(super) fn position(&self) -> Offset {
        self.cursor().map_or(Offset(0), |cursor| cursor.next)
    }

    /// Where a node starts.
    pub(super) fn checkpoint(&self) -> Result<Checkpoint, Violation> {
        restore(self.cursor().as_ref())
    }

    pub(super) fn events(&self, stream: &StreamId) -> Vec<RecordedEvent> {
        let all = IndexLoad { partition: PARTITION, stream: stream.clone(), after: Version::EMPTY };
        let loaded = at_once(self.index.load(&[all], usize::MAX)).into_iter();
        loaded.flat_map(|read| read.expect("it is in memory").events).collect()
    }

    pub(super) fn advance(
        &mut self,
        batch: &IndexBatch,
        coverage: &mut Coverage,
    ) -> Result<Advanced, Violation> {
        if self.position() > batch.from {
            coverage.saw(State::IndexFedTwice);
        }
        let advanced = self.take(batch).map_err(|diverged| diverged.to_string())?;
        if matches!(advanced, Advanced::Moved) {
            self.fed.push(batch.clone());
        }
        Ok(advanced)
    }

    /// The index is exactly the prefix of the log below its position.
    pub(super) fn check(&self, truth: &Reference) -> Result<(), Violation> {
        let position = self.position();
        if position > truth.end() {
            return Err(format!("the index stands at {position}, behind the log's end"));
        }
        for (stream, events) in &truth.streams {
            let below = events.iter().filter(|event| event.position.offset < position);
            if !below.map(|event| &**event).eq(&self.events(stream)) {
                return Err(format!("the index of {stream} at {position} is not the log's prefix"));
            }
        }
        Ok(())
    }
}

fn restore(cursor: Option<&Cursor>) -> Result<Checkpoint, Violation> {
    let Some(cursor) = cursor else { return Ok(Checkpoint::default()) };
    let restored = Checkpoint::from_cursor(cursor).map_err(|error| error.to_string())?;
    if mutant::active(Mutant::CheckpointWithoutState) {
        return Ok(Checkpoint { next: restored.next, ..Checkpoint::default() });
    }
    Ok(restored)
}

/// A reader that stores what it has and its checkpoint together, and starts again from there.
pub(super) struct Reader {
    reader: CommitReader,
    seen: Vec<Arc<RecordedEvent>>,
    stored: (Option<Cursor>, usize),
}

impl Reader {
    pub(super) fn new() -> Self {
        Self {
            reader: CommitReader::new(PARTITION, Checkpoint::default()),
            seen: Vec::new(),
            stored: (None, 0),
        }
    }

    /// Reads up to `records_max` records.
    pub(super) fn read(&mut self, truth: &Reference, records_max: u64) -> Result<(), Violation> {
        let from = self.reader.fold().next().0 as usize;
        for record in truth.log.iter().skip(from).take(records_max as usize) {
            match self.reader.read(record.clone()) {
                Ok(Read::Commit(commit)) => self.seen.extend(commit.events),
                Ok(_) => {}
                Err(diverged) => return Err(format!("a reader halted: {diverged}")),
            }
        }
        let next = self.reader.fold().next();
        let expected = truth.events.iter().filter(|event| event.position.offset < next);
        if !expected.eq(self.visible()) && !self.reader.fold().is_open() {
            return Err(format!("a reader at {next} saw other events than were accepted"));
        }
        Ok(())
    }

    fn visible(&self) -> impl Iterator<Item = &Arc<RecordedEvent>> {
        self.seen.iter()
    }

    pub(super) fn store(&mut self) {
        self.stored = (Some(self.reader.fold().checkpoint().to_cursor()), self.seen.len());
    }

    pub(super) fn restart(&mut self, coverage: &mut Coverage) -> Result<(), Violation> {
        if self.reader.fold().is_open() {
            coverage.saw(State::ReaderRestartedInsideCommit);
        }
        let (cursor, seen) = &self.stored;
        self.seen.truncate(*seen);
        self.reader = CommitReader::new(PARTITION, restore(cursor.as_ref())?);
        Ok(())
    }
}

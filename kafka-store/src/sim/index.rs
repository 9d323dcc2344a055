//! The simulated stream index, by the rules of a real one, and a reader with checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use kafold_core::index::{Advanced, IndexBatch};
use kafold_core::store::Cursor;
use kafold_core::{Offset, RecordedEvent, StreamId};

use super::coverage::{Coverage, State};
use super::reference::{PARTITION, Reference, Violation};
use crate::fold::{Checkpoint, CommitReader, Read};
use kafold_core::mutant::{self, Mutant};

#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    pub(super) rows: BTreeMap<StreamId, Vec<RecordedEvent>>,
    pub(super) cursor: Option<Cursor>,
}

impl Index {
    pub(super) fn position(&self) -> Offset {
        self.cursor.as_ref().map_or(Offset(0), |cursor| cursor.next)
    }

    /// Where a node starts.
    pub(super) fn checkpoint(&self) -> Result<Checkpoint, Violation> {
        restore(self.cursor.as_ref())
    }

    pub(super) fn advance(
        &mut self,
        batch: &IndexBatch,
        coverage: &mut Coverage,
    ) -> Result<Advanced, Violation> {
        let position = self.position();
        if position < batch.from && !mutant::active(Mutant::IndexPlainMaximum) {
            return Ok(Advanced::Behind(self.cursor.clone()));
        }
        if position > batch.from {
            coverage.saw(State::IndexFedTwice);
        }
        for event in &batch.events {
            let rows = self.rows.entry(event.stream.clone()).or_default();
            match rows.binary_search_by_key(&event.version, |row| row.version) {
                Ok(place) if rows[place] == *event => {}
                Ok(place) => return Err(format!("index has {:?}, fed {event:?}", rows[place])),
                Err(place) => rows.insert(place, event.clone()),
            }
        }
        if batch.to.next > position {
            self.cursor = Some(batch.to.clone());
        }
        Ok(Advanced::Moved)
    }

    /// The index is exactly the prefix of the log below its position.
    pub(super) fn check(&self, truth: &Reference) -> Result<(), Violation> {
        let position = self.position();
        if position > truth.end() {
            return Err(format!("the index stands at {position}, behind the log's end"));
        }
        let mut expected: BTreeMap<&StreamId, Vec<&RecordedEvent>> = BTreeMap::new();
        for event in truth.events.iter().filter(|event| event.position.offset < position) {
            expected.entry(&event.stream).or_default().push(event);
        }
        let rows: BTreeMap<&StreamId, Vec<&RecordedEvent>> =
            self.rows.iter().map(|(id, rows)| (id, rows.iter().collect())).collect();
        if rows == expected {
            return Ok(());
        }
        Err(format!("the index at {position} is not the log's prefix"))
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

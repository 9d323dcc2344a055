//! Readers of the log: one from its beginning, and one from every checkpoint that it stored.

use kafold_core::mutant::{self, Mutant};

use crate::fold::{Checkpoint, CommitReader, Read};
use crate::sim::reference::{PARTITION, Reference, Violation};
use crate::wire::LogRecord;

#[derive(Debug, Clone)]
pub(super) struct Readers {
    first: Reader,
    /// Those who are not yet where the first one is: then they would go on like it for ever.
    restarted: Vec<Reader>,
}

#[derive(Debug, Clone)]
struct Reader {
    commits: CommitReader,
    /// Events that were visible so far, with those before its checkpoint.
    seen: usize,
}

impl Readers {
    pub(super) fn new() -> Self {
        let commits = CommitReader::new(PARTITION, Checkpoint::default());
        Self { first: Reader { commits, seen: 0 }, restarted: Vec::new() }
    }

    /// All take the record that was just appended; then the first one stores its checkpoint and
    /// another begins there.
    pub(super) fn take_last(&mut self, truth: &Reference) -> Result<(), Violation> {
        let Some(record) = truth.log.last() else { return Ok(()) };
        for reader in self.restarted.iter_mut().chain([&mut self.first]) {
            reader.take(record, truth)?;
            reader.saw_all(truth)?;
        }
        self.restarted.push(self.first.restart(truth)?);
        let Self { first, restarted } = self;
        restarted.retain(|reader| !reader.is_like(first));
        Ok(())
    }
}

impl Reader {
    fn take(&mut self, record: &LogRecord, truth: &Reference) -> Result<(), Violation> {
        match self.commits.read(record.clone()) {
            Ok(Read::Commit(commit)) => {
                let accepted = truth.events.iter().skip(self.seen).take(commit.events.len());
                if !accepted.eq(&commit.events) {
                    return Err(format!("a reader at {} sees what is not accepted", record.offset));
                }
                self.seen += commit.events.len();
            }
            Ok(_) => {}
            Err(diverged) => return Err(format!("a reader halts: {diverged}")),
        }
        Ok(())
    }

    /// The reader that begins at what this one would store, and has read on to the log's end.
    fn restart(&self, truth: &Reference) -> Result<Self, Violation> {
        let mut stored = self.commits.fold().checkpoint();
        if mutant::active(Mutant::CheckpointWithoutState) {
            stored = Checkpoint { next: stored.next, ..Checkpoint::default() };
        }
        let from = stored.next.0 as usize;
        let commits = CommitReader::new(PARTITION, stored);
        let mut reader = Self { commits, seen: self.seen };
        for record in truth.log.iter().skip(from) {
            reader.take(record, truth)?;
        }
        reader.saw_all(truth)?;
        Ok(reader)
    }

    fn saw_all(&self, truth: &Reference) -> Result<(), Violation> {
        match self.seen == truth.events.len() {
            true => Ok(()),
            false => Err(format!("a reader sees {} of {} events", self.seen, truth.events.len())),
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        let (own, others) = (self.commits.fold(), other.commits.fold());
        self.seen == other.seen
            && own.next() == others.next()
            && own.state() == others.state()
            && !own.is_open()
            && !others.is_open()
    }
}

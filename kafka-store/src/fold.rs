//! The fold: what every reader of a partition runs, so that all agree for ever about which records
//! count.
//!
//! [`Fold`] is the rule itself, in constant memory. [`CommitReader`] adds the buffer of the commit
//! that is still open and hands out whole commits.

use std::fmt;
use std::sync::Arc;

use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Cursor;
use kafold_core::{CommandId, Offset, Partition, Position, RecordedEvent, StreamId, Version};
use serde::{Deserialize, Serialize};

use crate::wire::{
    Body, Claim, ClaimId, Content, Epoch, EventBody, LogRecord, Malformed, Nonce, Record, Stamp,
};

/// What the fold knows between two records; no commit is open. Stored beside every position.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoldState {
    /// The log's identity and partition count, from its first claim; `None` before it.
    pub log: Option<LogIdentity>,
    /// The current claim; epoch 0 before the first.
    pub claim: ClaimId,
    /// The only `seq` that will be accepted next; 0 before the first claim.
    pub next_seq: u64,
    /// The last accepted record, to recognise the log by.
    pub anchor: Option<Anchor>,
    /// The highest commands mark of an accepted record.
    pub commands_mark: Offset,
}

/// Whose log a partition is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogIdentity {
    /// The nonce of the partition's first claim.
    pub nonce: Nonce,
    /// How many partitions the topic had then, and must have for ever.
    pub partitions: u32,
}

/// An accepted record by which a log is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Where it is.
    pub offset: Offset,
    /// The claim it was written under.
    pub claim: ClaimId,
    /// Its place under that claim.
    pub seq: u64,
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {} of {}", self.seq, self.claim)
    }
}

/// A place to read on from, with all the fold must know there. No commit is open at it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// The first offset not yet folded.
    pub next: Offset,
    /// The fold's state before it.
    pub state: FoldState,
}

/// A cursor whose state is not one of ours.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "the stored state {state:?} at offset {next} cannot be read ({reason}): rebuild what stores it"
)]
pub struct InvalidCursor {
    next: Offset,
    state: String,
    reason: String,
}

impl Checkpoint {
    /// As it is stored: the state is compact JSON.
    pub fn to_cursor(&self) -> Cursor {
        // Numbers and options of numbers always are JSON.
        let state = serde_json::to_string(&self.state).unwrap_or_default();
        Cursor { next: self.next, state }
    }

    /// From what was stored.
    pub fn from_cursor(cursor: &Cursor) -> Result<Self, InvalidCursor> {
        let read = serde_json::from_str::<FoldState>(&cursor.state);
        let state = read.map_err(|error| error.to_string()).and_then(|state| {
            let contradicts = || "its numbers contradict each other".to_owned();
            state.is_behind(cursor.next).then_some(state).ok_or_else(contradicts)
        });
        match state {
            Ok(state) => Ok(Self { next: cursor.next, state }),
            Err(reason) => Err(InvalidCursor {
                next: cursor.next,
                state: cursor.state.chars().take(200).collect(),
                reason,
            }),
        }
    }
}

impl FoldState {
    /// Whether a fold can have been in this state with `next` to come: whoever goes on from a state
    /// that never was accepts records that nobody else does.
    fn is_behind(&self, next: Offset) -> bool {
        if next.0 > i64::MAX as u64 {
            return false;
        }
        let Some(anchor) = self.anchor else {
            // Nothing was accepted yet.
            return *self == Self::default();
        };
        self.log.is_some_and(|log| log.partitions > 0)
            && self.claim.epoch > Epoch(0)
            && anchor.claim == self.claim
            && anchor.seq.checked_add(1) == Some(self.next_seq)
            && anchor.offset < next
    }
}

/// The log contradicts itself or cannot be read: the partition halts, for every reader alike.
///
/// Nothing can be skipped: the fold is a function of the log alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogDiverged {
    /// A record with our header that is not what the format says.
    #[error(
        "the record at {position} is malformed: {reason}. Nothing behind it can be read: restore the topic from a copy, or copy the records before it into a new one"
    )]
    Malformed {
        /// Where it is.
        position: Position,
        /// What is wrong with it.
        reason: Malformed,
    },
    /// The broker gives records that are not the ones that were written.
    #[error(
        "the record at {0} failed its checksum: the disk of the broker that leads the partition has other bytes than were written. Nothing behind it can be read: let another replica lead and this broker copy the partition anew, or restore the topic from a copy"
    )]
    Corrupt(Position),
    /// An event or barrier where nobody has claimed yet.
    #[error(
        "the record at {0} comes before the partition's first claim: the log has lost its beginning"
    )]
    BeforeFirstClaim(Position),
    /// An event or barrier under a claim that is not in the log.
    #[error(
        "the record at {position} was written under the claim of {found}, which is not in the log (the current one is {current}): the log has lost records"
    )]
    UnknownClaim {
        /// Where it is.
        position: Position,
        /// The claim it names.
        found: ClaimId,
        /// The claim that the log has.
        current: ClaimId,
    },
    /// An accepted record that does not continue the open commit.
    #[error(
        "the record at {position} breaks the commit that is open there: its {field} does not follow"
    )]
    BrokenCommit {
        /// Where it is.
        position: Position,
        /// What does not follow.
        field: &'static str,
    },
    /// Offsets of a log of ours are dense.
    #[error(
        "partition {partition} has a hole: expected offset {expected}, found {found}. The topic was compacted or trimmed, or written with transactions"
    )]
    Hole {
        /// The partition.
        partition: Partition,
        /// The offset that follows what was read.
        expected: Offset,
        /// The offset that came.
        found: Offset,
    },
    /// A stream's versions are not gapless.
    #[error(
        "the commit at {position} continues stream {stream} at version {found}, which is at {actual}"
    )]
    BrokenStream {
        /// Where the commit's first event is.
        position: Position,
        /// The stream.
        stream: StreamId,
        /// The version of the stream before it.
        actual: Version,
        /// The version of the commit's first event.
        found: Version,
    },
}

/// What the fold says of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// An accepted claim; it is current from here on. An open commit is void.
    Claim,
    /// An accepted event of a commit that is still open.
    Event,
    /// The accepted last event of its commit, which is visible from here on.
    Commit,
    /// An accepted barrier.
    Barrier,
    /// A record that never counts.
    Void(VoidReason),
}

/// Why a record never counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VoidReason {
    /// A claim whose epoch was taken already: it lost the race, or is a copy.
    LateClaim,
    /// A claim that skips epochs: only a bug or another log's writer makes one.
    FarClaim,
    /// Its writer was superseded.
    Superseded,
    /// A second copy of an accepted record.
    Duplicate,
    /// A record before it under the same claim is missing.
    AfterHole,
    /// Not ours.
    Foreign,
}

impl VoidReason {
    /// A short name, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::LateClaim => "late_claim",
            Self::FarClaim => "far_claim",
            Self::Superseded => "superseded",
            Self::Duplicate => "duplicate",
            Self::AfterHole => "after_hole",
            Self::Foreign => "foreign",
        }
    }
}

/// The rule by which every reader accepts or voids each record, in the order of the log.
#[derive(Debug, Clone)]
pub struct Fold {
    partition: Partition,
    next: Offset,
    state: FoldState,
    open: Option<OpenCommit>,
}

/// The commit of which some events are accepted and the last is not.
#[derive(Debug, Clone)]
struct OpenCommit {
    /// Its first event's place and the state before it: where a checkpoint stays meanwhile.
    before: Box<Checkpoint>,
    stream: StreamId,
    command_id: CommandId,
    count: u16,
    next_index: u16,
    next_version: Version,
}

impl Fold {
    /// A reader that goes on at `from`; the default checkpoint is the beginning of the log.
    pub fn new(partition: Partition, from: Checkpoint) -> Self {
        Self { partition, next: from.next, state: from.state, open: None }
    }

    /// Takes the next record. Records come in the order of the log, none left out.
    pub fn apply(&mut self, record: &LogRecord) -> Result<Verdict, LogDiverged> {
        let position = Position { partition: self.partition, offset: record.offset };
        if record.offset != self.next {
            let (partition, expected) = (self.partition, self.next);
            return Err(LogDiverged::Hole { partition, expected, found: record.offset });
        }
        let verdict = match &record.content {
            Content::Foreign => Verdict::Void(VoidReason::Foreign),
            Content::Malformed(_) if mutant::active(Mutant::SkipMalformed) => {
                Verdict::Void(VoidReason::Foreign)
            }
            Content::Malformed(reason) => {
                return Err(LogDiverged::Malformed { position, reason: reason.clone() });
            }
            Content::Ours(Record { stamp, body: Body::Claim(claim) }) => {
                self.claim(record.offset, stamp, claim)
            }
            Content::Ours(Record { stamp, body: Body::Event(event) }) => {
                match self.sequence(position, stamp)? {
                    Some(reason) => Verdict::Void(reason),
                    None => self.event(position, stamp, event)?,
                }
            }
            Content::Ours(Record { stamp, body: Body::Barrier }) => {
                match self.sequence(position, stamp)? {
                    Some(reason) => Verdict::Void(reason),
                    None => self.barrier(position, stamp)?,
                }
            }
        };
        self.next = self.next.plus(1);
        Ok(verdict)
    }

    /// The first offset not yet folded.
    pub fn next(&self) -> Offset {
        self.next
    }

    /// The state behind the last record; inside an open commit not one to store, see
    /// [`Fold::checkpoint`].
    pub fn state(&self) -> &FoldState {
        &self.state
    }

    /// Whether some but not all events of a commit are accepted.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The place to store. While a commit is open it stays at that commit's first event, with the
    /// state before it.
    pub fn checkpoint(&self) -> Checkpoint {
        match &self.open {
            Some(open) if !mutant::active(Mutant::CheckpointInsideCommit) => (*open.before).clone(),
            _ => Checkpoint { next: self.next, state: self.state.clone() },
        }
    }

    fn claim(&mut self, offset: Offset, stamp: &Stamp, claim: &Claim) -> Verdict {
        let Some(next_epoch) = self.state.claim.epoch.0.checked_add(1).map(Epoch) else {
            return Verdict::Void(VoidReason::LateClaim);
        };
        if stamp.claim.epoch > next_epoch {
            return Verdict::Void(VoidReason::FarClaim);
        }
        let equal = stamp.claim.epoch == self.state.claim.epoch;
        let is_taken = stamp.claim.epoch < next_epoch;
        if is_taken && !(equal && mutant::active(Mutant::FoldAcceptsEqualEpoch)) {
            return Verdict::Void(VoidReason::LateClaim);
        }
        if !mutant::active(Mutant::FoldKeepsCommitOpen) {
            self.open = None;
        }
        self.state.claim = stamp.claim;
        self.state.next_seq = 0;
        let identity = LogIdentity { nonce: stamp.claim.nonce, partitions: claim.partitions };
        self.state.log.get_or_insert(identity);
        self.accept(offset, stamp);
        Verdict::Claim
    }

    /// Why the record is void, if it is. Only a record that is not void goes on.
    fn sequence(
        &self,
        position: Position,
        stamp: &Stamp,
    ) -> Result<Option<VoidReason>, LogDiverged> {
        let current = self.state.claim;
        if current.epoch == Epoch(0) {
            return Err(LogDiverged::BeforeFirstClaim(position));
        }
        if stamp.claim.epoch < current.epoch {
            return Ok(Some(VoidReason::Superseded));
        }
        if stamp.claim != current {
            return Err(LogDiverged::UnknownClaim { position, found: stamp.claim, current });
        }
        Ok(match stamp.seq.cmp(&self.state.next_seq) {
            std::cmp::Ordering::Less if mutant::active(Mutant::FoldAcceptsDuplicate) => None,
            std::cmp::Ordering::Less => Some(VoidReason::Duplicate),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater if mutant::active(Mutant::FoldAcceptsHole) => None,
            std::cmp::Ordering::Greater => Some(VoidReason::AfterHole),
        })
    }

    fn event(
        &mut self,
        position: Position,
        stamp: &Stamp,
        body: &EventBody,
    ) -> Result<Verdict, LogDiverged> {
        let broken = |field| Err(LogDiverged::BrokenCommit { position, field });
        let event = &body.event;
        match &mut self.open {
            None if body.index != 0 => return broken("index"),
            None if body.count > 1 => {
                let before = Checkpoint { next: position.offset, state: self.state.clone() };
                self.open = Some(OpenCommit {
                    before: Box::new(before),
                    stream: event.stream.clone(),
                    command_id: event.command_id,
                    count: body.count,
                    next_index: 1,
                    next_version: event.version.plus(1),
                });
            }
            None => {}
            Some(open) => {
                if event.stream != open.stream {
                    return broken("stream");
                }
                if event.command_id != open.command_id {
                    return broken("command id");
                }
                if body.count != open.count {
                    return broken("count");
                }
                if body.index != open.next_index {
                    return broken("index");
                }
                if event.version != open.next_version {
                    return broken("version");
                }
                open.next_index = body.index + 1;
                open.next_version = event.version.plus(1);
            }
        }
        self.accept(position.offset, stamp);
        // The parser holds index < count.
        if body.index + 1 < body.count {
            return Ok(Verdict::Event);
        }
        self.open = None;
        Ok(Verdict::Commit)
    }

    fn barrier(&mut self, position: Position, stamp: &Stamp) -> Result<Verdict, LogDiverged> {
        if self.open.is_some() {
            return Err(LogDiverged::BrokenCommit { position, field: "kind (a barrier)" });
        }
        self.accept(position.offset, stamp);
        Ok(Verdict::Barrier)
    }

    fn accept(&mut self, offset: Offset, stamp: &Stamp) {
        self.state.next_seq = stamp.seq + 1;
        self.state.anchor = Some(Anchor { offset, claim: stamp.claim, seq: stamp.seq });
        self.state.commands_mark = self.state.commands_mark.max(stamp.commands_mark);
    }
}

/// The fold with the buffer of the open commit: records in, whole commits out.
///
/// Holds the events of one commit at most, which a record's header bounds to 65 535.
#[derive(Debug, Clone)]
pub struct CommitReader {
    fold: Fold,
    open: Vec<Arc<RecordedEvent>>,
}

/// What became of one record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// A claim was accepted. Events of a commit that it left open are void.
    Claim(ClaimId, Claim),
    /// An event was accepted; its commit is still open.
    Open(Stamp),
    /// A commit became visible.
    Commit(ReadCommit),
    /// A barrier was accepted.
    Barrier(Stamp),
    /// The record never counts.
    Void(VoidReason),
}

/// An accepted commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCommit {
    /// The stamp of its last event.
    pub stamp: Stamp,
    /// Its events, all of them, never none.
    pub events: Vec<Arc<RecordedEvent>>,
}

impl CommitReader {
    /// A reader that goes on at `from`; the default checkpoint is the beginning of the log.
    pub fn new(partition: Partition, from: Checkpoint) -> Self {
        Self { fold: Fold::new(partition, from), open: Vec::new() }
    }

    /// The fold underneath.
    pub fn fold(&self) -> &Fold {
        &self.fold
    }

    /// Takes the next record. After an error the reader stays where it was.
    pub fn read(&mut self, record: LogRecord) -> Result<Read, LogDiverged> {
        let verdict = self.fold.apply(&record)?;
        Ok(match (verdict, record.content) {
            (Verdict::Void(reason), _) => Read::Void(reason),
            (Verdict::Claim, Content::Ours(Record { stamp, body: Body::Claim(claim) })) => {
                self.open.clear();
                Read::Claim(stamp.claim, claim)
            }
            (Verdict::Event, Content::Ours(Record { stamp, body: Body::Event(body) })) => {
                self.open.push(body.event);
                Read::Open(stamp)
            }
            (Verdict::Commit, Content::Ours(Record { stamp, body: Body::Event(body) })) => {
                self.open.push(body.event);
                Read::Commit(ReadCommit { stamp, events: std::mem::take(&mut self.open) })
            }
            (_, Content::Ours(Record { stamp, .. })) => Read::Barrier(stamp),
            // The fold accepts records of ours only.
            (_, Content::Foreign | Content::Malformed(_)) => Read::Void(VoidReason::Foreign),
        })
    }
}

#[cfg(test)]
mod tests;

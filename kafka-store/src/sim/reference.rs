//! The simulated partition with a fold of its own: what is true, against which answers are checked.
//!
//! Written differently from the fold under test, so that one mistake is not made twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use kafold_core::{CommandId, Offset, Partition, Position, RecordedEvent, StreamId, Version};

use super::coverage::{Coverage, State};
use crate::wire::{Body, ClaimId, Content, EventBody, LogRecord, Record};

/// A broken promise, in words.
pub(crate) type Violation = String;

/// A record on its way to the log, or in it.
#[derive(Debug, Clone)]
pub(crate) struct Produced {
    pub(crate) record: Record,
    /// The incarnation of the node that produced it, and when.
    pub(crate) by: usize,
    pub(crate) order: u64,
}

/// An accepted commit.
#[derive(Debug, Clone)]
pub(crate) struct Accepted {
    pub(crate) stream: StreamId,
    pub(crate) version: Version,
    pub(crate) offset: Offset,
    pub(crate) by: usize,
    pub(crate) produced_at: u64,
}

#[derive(Clone, Default)]
pub(crate) struct Reference {
    pub(crate) log: Vec<LogRecord>,
    claim: Option<ClaimId>,
    last_seq: u64,
    open: Vec<Arc<RecordedEvent>>,
    /// All accepted events, in the order of the log.
    pub(crate) events: Vec<Arc<RecordedEvent>>,
    pub(crate) streams: BTreeMap<StreamId, Vec<Arc<RecordedEvent>>>,
    pub(crate) commits: BTreeMap<CommandId, Accepted>,
    /// The highest commands mark of an accepted record.
    pub(crate) mark: Offset,
    /// Where each claim is.
    pub(crate) claims: BTreeMap<(u32, u64), Offset>,
}

pub(crate) const PARTITION: Partition = Partition(0);

/// Whether it was true to say that a stream is at `actual` and not as demanded: it was at `before` when
/// the call began and is at `now`. Below `actual` a demand is passed for ever, however old that is.
pub(crate) fn is_conflict(
    demanded: Version,
    actual: Version,
    before: Version,
    now: Version,
) -> bool {
    demanded != actual && actual <= now && (demanded < actual || before <= actual)
}

impl Reference {
    pub(crate) fn version(&self, stream: &StreamId) -> Version {
        Version(self.streams.get(stream).map_or(0, |events| events.len() as u64))
    }

    pub(crate) fn end(&self) -> Offset {
        Offset(self.log.len() as u64)
    }

    /// What the last accepted record was: the current claim and the seq under it.
    pub(crate) fn head(&self) -> (Option<ClaimId>, u64) {
        (self.claim, self.last_seq)
    }

    /// Appends a record, as the broker does, and folds it.
    pub(crate) fn append(
        &mut self,
        produced: Produced,
        coverage: &mut Coverage,
    ) -> Result<Offset, Violation> {
        let offset = self.end();
        let Produced { mut record, by, order } = produced;
        if let Body::Event(body) = &mut record.body {
            let mut event = RecordedEvent::clone(&body.event);
            event.position = Position { partition: PARTITION, offset };
            body.event = Arc::new(event);
        }
        self.log.push(LogRecord { offset, content: Content::Ours(record.clone()) });
        let stamp = record.stamp;
        let current_epoch = self.claim.map_or(0, |claim| claim.epoch.0);
        if let Body::Claim(_) = record.body {
            if stamp.claim.epoch.0 == current_epoch + 1 {
                if !self.open.is_empty() {
                    coverage.saw(State::PartialCommitVoided);
                }
                self.open.clear();
                self.claim = Some(stamp.claim);
                self.last_seq = 0;
                self.mark = self.mark.max(stamp.commands_mark);
                self.claims.insert((stamp.claim.epoch.0, stamp.claim.nonce.0), offset);
            } else if !self.claims.contains_key(&(stamp.claim.epoch.0, stamp.claim.nonce.0)) {
                coverage.saw(State::LostClaimRace);
            }
            return Ok(offset);
        }
        if stamp.claim.epoch.0 > current_epoch {
            return Err(format!("{stamp:?} at {offset} was written before its claim was accepted"));
        }
        if Some(stamp.claim) != self.claim {
            if stamp.claim.epoch.0 == current_epoch {
                return Err(format!("{stamp:?} at {offset} was written under a void claim"));
            }
            coverage.saw(State::VoidEvent);
            return Ok(offset);
        }
        if stamp.seq != self.last_seq + 1 {
            coverage.saw(if stamp.seq > self.last_seq { State::Gap } else { State::DuplicateCopy });
            return Ok(offset);
        }
        self.last_seq = stamp.seq;
        self.mark = self.mark.max(stamp.commands_mark);
        if let Body::Event(body) = &record.body {
            self.open_or_close(body, offset, by, order)?;
        }
        Ok(offset)
    }

    fn open_or_close(
        &mut self,
        body: &EventBody,
        offset: Offset,
        by: usize,
        order: u64,
    ) -> Result<(), Violation> {
        if usize::from(body.index) != self.open.len() {
            return Err(format!("event {} of its commit at {offset} is out of order", body.index));
        }
        self.open.push(Arc::clone(&body.event));
        if self.open.len() < usize::from(body.count) {
            return Ok(());
        }
        let commit = std::mem::take(&mut self.open);
        let stream = body.event.stream.clone();
        let command_id = body.event.command_id;
        for event in &commit {
            let expected = self.version(&stream).plus(1);
            if event.version != expected || event.stream != stream {
                return Err(format!("version {} follows {expected} in {stream}", event.version));
            }
            self.streams.entry(stream.clone()).or_default().push(Arc::clone(event));
            self.events.push(Arc::clone(event));
        }
        let version = body.event.version;
        let accepted = Accepted { stream, version, offset, by, produced_at: order };
        match self.commits.insert(command_id, accepted) {
            Some(first) => {
                Err(format!("command {command_id} was applied at {} and {offset}", first.offset))
            }
            None => Ok(()),
        }
    }
}

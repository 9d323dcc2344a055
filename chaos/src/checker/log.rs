//! The final log, folded by the rule for foreign consumers.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::Verdict;
use crate::history::{Header, Line, Place, RecordLine};

/// Records that never count, by reason.
pub type Voids = BTreeMap<&'static str, u64>;

/// What the log says for good.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) streams: HashMap<String, Vec<Event>>,
    pub(super) commits: HashMap<Uuid, Commit>,
    /// The accepted events of each partition, in its order.
    pub(super) partitions: BTreeMap<u32, Vec<Accepted>>,
    /// The offset behind the last record of each partition.
    pub(super) ends: BTreeMap<u32, u64>,
}

/// An accepted event, as its stream has it.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) at: Place,
    pub(super) said: Said,
    /// Whether it is the last of its commit: only there a state can be seen.
    pub(super) is_last: bool,
}

/// What an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Added { group: u64, amount: u64 },
    Closed { group: u64 },
}

impl Said {
    fn of(record: &RecordLine) -> Option<Self> {
        let number = |name| record.value.get(name)?.as_u64();
        match record.event_type.as_str() {
            "tally.added.v1" => {
                Some(Self::Added { group: number("group")?, amount: number("amount")? })
            }
            "tally.closed.v1" => Some(Self::Closed { group: number("group")? }),
            _ => None,
        }
    }
}

/// An accepted event, as its partition has it.
#[derive(Debug, Clone)]
pub(super) struct Accepted {
    pub(super) offset: u64,
    pub(super) stream: String,
    pub(super) index: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Commit {
    pub(super) stream: String,
    /// The versions of its first and last event.
    pub(super) first: u64,
    pub(super) last: u64,
    /// Where its last event is.
    pub(super) at: Place,
}

/// The fold of one partition: what the README gives in fifteen lines.
#[derive(Default)]
struct Fold {
    epoch: u32,
    nonce: Option<u64>,
    next: u64,
    open: Vec<RecordLine>,
}

impl Log {
    pub(super) fn fold(lines: &[Line], verdict: &mut Verdict) -> Self {
        let mut log = Self::default();
        let mut folds: BTreeMap<u32, Fold> = BTreeMap::new();
        for line in lines {
            let Line::Record(record) = line else { continue };
            let Place { partition, offset } = record.at;
            let end = log.ends.entry(partition).or_default();
            if offset != *end {
                verdict.found("offset-hole", format!("{} follows offset {end}", record.at));
            }
            *end = offset + 1;
            let fold = folds.entry(partition).or_default();
            match fold.read(record) {
                Ok(Read::Void(reason)) => *verdict.voids.entry(reason).or_default() += 1,
                Ok(Read::Claim) => verdict.claims += 1,
                Ok(Read::More) => {}
                Ok(Read::Commit(events)) => log.accept(&events, verdict),
                Err(detail) => verdict.found("log-broken", format!("{}: {detail}", record.at)),
            }
        }
        log
    }

    fn accept(&mut self, events: &[(Header, RecordLine)], verdict: &mut Verdict) {
        let Some((last, last_record)) = events.last() else { return };
        let stream = self.streams.entry(last_record.key.clone()).or_default();
        let before = stream.len() as u64;
        for (place, (header, record)) in events.iter().enumerate() {
            let at = record.at;
            let wanted = stream.len() as u64 + 1;
            if header.version != wanted {
                let detail =
                    format!("{} {} at {at} follows {}", record.key, header.version, wanted - 1);
                verdict.found("version-gap", detail);
            }
            if header.command != last.command || record.key != last_record.key {
                verdict.found("commit-mixed", format!("{at} differs from {}", last_record.at));
            }
            let accepted =
                Accepted { offset: at.offset, stream: record.key.clone(), index: stream.len() };
            self.partitions.entry(at.partition).or_default().push(accepted);
            let is_last = place + 1 == events.len();
            match Said::of(record) {
                Some(said) => stream.push(Event { at, said, is_last }),
                None => return verdict.found("log-broken", format!("{at} says nothing known")),
            }
            verdict.events += 1;
        }
        verdict.commits += 1;
        let commit = Commit {
            stream: last_record.key.clone(),
            first: before + 1,
            last: before + events.len() as u64,
            at: last_record.at,
        };
        match self.commits.entry(last.command) {
            Entry::Occupied(first) => {
                let (command, first, at) = (last.command, first.get().at, commit.at);
                verdict.found("command-twice", format!("{command} at {first} and {at}"));
            }
            Entry::Vacant(place) => {
                place.insert(commit);
            }
        }
    }
}

enum Read {
    Void(&'static str),
    Claim,
    More,
    Commit(Vec<(Header, RecordLine)>),
}

impl Fold {
    fn read(&mut self, record: &RecordLine) -> Result<Read, String> {
        let Some(header) = record.kf else { return Ok(Read::Void("foreign")) };
        let current = (header.epoch, Some(header.nonce)) == (self.epoch, self.nonce);
        match header.kind {
            1 if header.epoch == self.epoch + 1 => {
                let next = Self {
                    epoch: header.epoch,
                    nonce: Some(header.nonce),
                    next: 1,
                    open: Vec::new(),
                };
                *self = next;
                Ok(Read::Claim)
            }
            1 => Ok(Read::Void("late claim")),
            2 | 3 if self.nonce.is_none() => Err("a record before the first claim".into()),
            2 | 3 if header.epoch > self.epoch => {
                Err("a record of a claim that is not there".into())
            }
            2 | 3 if header.epoch == self.epoch && !current => {
                Err("a record under a claim that lost its epoch".into())
            }
            2 | 3 if !current => Ok(Read::Void("superseded")),
            2 | 3 if header.seq < self.next => Ok(Read::Void("duplicate")),
            2 | 3 if header.seq > self.next => Ok(Read::Void("after a hole")),
            2 => {
                self.next += 1;
                if usize::from(header.index) != self.open.len() {
                    return Err(format!(
                        "event {} of its commit follows {}",
                        header.index,
                        self.open.len()
                    ));
                }
                self.open.push(record.clone());
                if header.index + 1 < header.count {
                    return Ok(Read::More);
                }
                let open = std::mem::take(&mut self.open);
                Ok(Read::Commit(
                    open.into_iter().filter_map(|record| Some((record.kf?, record))).collect(),
                ))
            }
            3 => {
                self.next += 1;
                Ok(Read::More)
            }
            kind => Err(format!("a record of kind {kind}")),
        }
    }
}

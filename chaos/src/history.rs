//! What happened, one JSON line each: operations, faults, what read models showed, and the records of
//! the final log.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::TallyCommand;

/// Microseconds since the campaign began, by the one clock of the process that drives it.
pub type Micros = u64;

/// One line of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A command and its answer.
    Command(CommandLine),
    /// A stream as a node showed it.
    Read(ReadLine),
    /// A read model and its checkpoint, of one SQL snapshot.
    Rows(RowsLine),
    /// Something was broken or mended.
    Fault(FaultLine),
    /// A record of the final log. Those of a partition come in the order of their offsets.
    Record(RecordLine),
}

/// One attempt of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandLine {
    /// Its id, the same in every attempt.
    pub command: Uuid,
    /// The aggregate.
    pub stream: String,
    /// What was asked.
    pub ask: TallyCommand,
    /// The version that was demanded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<u64>,
    /// Which node was asked.
    pub node: usize,
    /// When it was asked.
    pub begun: Micros,
    /// When the answer was there.
    pub ended: Micros,
    /// The answer.
    pub answer: Answer,
}

/// What a node answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is in the log.
    Appended {
        /// The version of its last event.
        version: u64,
        /// Where that event is.
        at: Place,
    },
    /// The aggregate refuses, for this reason.
    Rejected(String),
    /// The stream was not at the demanded version.
    Conflict {
        /// The version it had.
        actual: u64,
    },
    /// It certainly did not happen.
    Failed(String),
    /// It may have happened, or happen yet.
    Unknown(String),
}

/// An offset in a partition, shown as `3:1042`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    /// The partition.
    pub partition: u32,
    /// The offset.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.partition, self.offset)
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl TryFrom<String> for Place {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.split_once(':').and_then(|(partition, offset)| {
            Some(Self { partition: partition.parse().ok()?, offset: offset.parse().ok()? })
        });
        parsed.ok_or_else(|| format!("'{text}' is no PARTITION:OFFSET"))
    }
}

/// A stream as a node showed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadLine {
    /// The aggregate.
    pub stream: String,
    /// Which node was asked.
    pub node: usize,
    /// When it was asked.
    pub begun: Micros,
    /// When the answer was there.
    pub ended: Micros,
    /// Where each of its events is.
    pub events: Vec<Place>,
    /// Whether the node proved that this was the newest state: then it is linearizable.
    pub confirmed: bool,
}

/// A read model as the database showed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsLine {
    /// The read model.
    pub model: String,
    /// When it was read.
    pub at: Micros,
    /// The next offset of each partition: what lies below is applied.
    pub checkpoint: BTreeMap<u32, u64>,
    /// The rows by their key, without the key.
    pub rows: BTreeMap<String, BTreeMap<String, i64>>,
}

/// A fault, or its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultLine {
    /// When.
    pub at: Micros,
    /// Its kind, such as `node-killed`.
    pub kind: String,
    /// What it hit, such as `node 2`, and for how long.
    pub what: String,
}

/// A record of the final log, read by a client that knows nothing of kafold but the bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordLine {
    /// Where it is.
    pub at: Place,
    /// What the header `kf` says; none in a foreign record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kf: Option<Header>,
    /// The key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// `ce_type` of an event.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub event_type: String,
    /// The event's payload; null in claims and barriers.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub value: serde_json::Value,
}

/// The header `kf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// 1 claim, 2 event, 3 barrier.
    pub kind: u8,
    /// The number of its claim.
    pub epoch: u32,
    /// Tells claims of one epoch apart.
    pub nonce: u64,
    /// Its place under the claim.
    pub seq: u64,
    /// The event's version.
    pub version: u64,
    /// Its place in the commit, from 0.
    pub index: u16,
    /// Events of the commit.
    pub count: u16,
    /// The command.
    pub command: Uuid,
    /// All forwarded commands below are settled.
    pub mark: u64,
}

//! The wire format of the events topic: the one module that knows bytes and header names.
//!
//! One Kafka record an event, as a CloudEvent in binary mode, with the header `kf` that the fold
//! needs. [`encode`] and [`parse`] are each other's inverse; golden bytes of every kind stand in the
//! tests for ever. What [`parse`] refuses is part of the format: every reader must refuse the same.

mod parse;

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Datelike, SecondsFormat, Utc};
use kafold_core::ids::{InvalidStreamId, StreamId};
use kafold_core::store::Owner;
use kafold_core::{CommandId, NewEvent, Offset, RecordedEvent};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use parse::parse;

/// The format written here, the first byte of the header `kf`.
pub const FORMAT: u8 = 1;
/// The header that makes a record ours.
pub const HEADER_NAME: &str = "kf";
/// Length of the header `kf` of format 1.
pub const HEADER_BYTES: usize = 58;
/// The key of claims and barriers: never a stream, for it has no `-`.
pub const CONTROL_KEY: &str = "kafold";
/// `ce_type` of a claim.
pub const CLAIM_TYPE: &str = "kafold.claim.v1";
/// `ce_type` of a barrier.
pub const BARRIER_TYPE: &str = "kafold.barrier.v1";
/// Bytes that Kafka adds to key, value and headers of one record at most: its batch's header, and
/// lengths and deltas as varints at their widest.
pub const RECORD_OVERHEAD_BYTES: usize = 61 + 36;

/// Headers of an event's record that has all of them.
const HEADERS_MAX: usize = 10;
/// What RFC 3339 can tell: a year has four digits.
const RFC3339_YEARS: std::ops::RangeInclusive<i32> = 0..=9_999;

const KIND_CLAIM: u8 = 1;
const KIND_EVENT: u8 = 2;
const KIND_BARRIER: u8 = 3;
const JSON: &str = "application/json";
const SPEC_VERSION: &str = "1.0";

/// Counts the accepted claims of a partition, from 1; 0 before the first.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u32);

/// Tells claims of one epoch apart; drawn anew from the operating system's entropy for every claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub u64);

/// The claim that a record was written under.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClaimId {
    /// The claim's epoch.
    pub epoch: Epoch,
    /// The claim's nonce.
    pub nonce: Nonce,
}

impl fmt::Display for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch: Epoch(epoch), nonce: Nonce(nonce) } = self;
        write!(f, "epoch {epoch} (nonce {nonce:016x})")
    }
}

/// What every record of ours carries: within one claim a `seq` is never given to another record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The claim it was written under, or, of a claim, itself.
    pub claim: ClaimId,
    /// 1, 2, 3 … under its claim; a claim's own is 0.
    pub seq: u64,
    /// All forwarded commands of this partition below that offset are settled.
    pub commands_mark: Offset,
}

/// A record of ours, before it is produced and after it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Who wrote it, and its place among that writer's records.
    pub stamp: Stamp,
    /// What it says.
    pub body: Body,
}

/// What a record of ours says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Somebody wants to write this partition.
    Claim(Claim),
    /// An event of a commit.
    Event(EventBody),
    /// Nothing but that its writer still owns the partition.
    Barrier,
}

/// An event of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventBody {
    /// Its place in the commit, from 0.
    pub index: u16,
    /// How many events the commit has.
    pub count: u16,
    /// The event. Before it is produced its position is the one it will have if nobody else writes.
    pub event: Arc<RecordedEvent>,
}

/// Who claims; the value of a claim, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The node's name.
    pub owner: String,
    /// Where other nodes reach it, if it said so.
    pub address: String,
    /// How many partitions the topic has, as far as the claimant knows.
    pub partitions: u32,
    /// When the claimant started.
    pub started_at: DateTime<Utc>,
}

impl Claim {
    /// The claimant.
    pub fn owner(&self) -> Owner {
        Owner {
            name: self.owner.clone(),
            address: self.address.clone(),
            started_at: self.started_at,
        }
    }
}

/// A record of the partition, as the fold takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// Its place.
    pub offset: Offset,
    /// What it is.
    pub content: Content,
}

/// What a record of the partition is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// One of ours.
    Ours(Record),
    /// Without our header: somebody else's.
    Foreign,
    /// With our header, and not what the format says.
    Malformed(Malformed),
}

/// What is wrong with a record that has our header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Written by a newer kafold.
    #[error("format {0} is newer than {FORMAT}, the newest this program knows: upgrade it")]
    NewerFormat(u8),
    /// The header has no bytes, or a format that never was.
    #[error("the header kf {}", .0.map_or("is empty".to_owned(), |byte| format!("begins with {byte}, which is no format")))]
    UnknownFormat(Option<u8>),
    /// Format 1 has one length.
    #[error("the header kf has {0} bytes instead of {HEADER_BYTES}")]
    HeaderLength(usize),
    /// Neither claim nor event nor barrier.
    #[error("kind {0} is none of 1 (claim), 2 (event), 3 (barrier)")]
    UnknownKind(u8),
    /// A number of the header that cannot be.
    #[error("{field} is {value}, which a {kind} cannot have")]
    Field {
        /// The kind of the record.
        kind: &'static str,
        /// The header's field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The key is not a stream id.
    #[error("the key is not a stream id: {0}")]
    Stream(#[from] InvalidStreamId),
    /// The key is absent, not UTF-8, or not that of its kind.
    #[error("the key is {0}")]
    Key(String),
    /// A header that every record of ours has is absent.
    #[error("the header {0} is absent")]
    HeaderAbsent(&'static str),
    /// One header twice: readers could disagree about which one counts.
    #[error("the header {0} is there twice")]
    HeaderTwice(&'static str),
    /// A header's value is not what CloudEvents or this format demand.
    #[error("the header {name} is {value:?}")]
    HeaderValue {
        /// The header.
        name: &'static str,
        /// Its value, at most 60 characters of it.
        value: String,
    },
    /// The value is not a claim's or a barrier's.
    #[error("the value is not that of a {kind}: {reason}")]
    Value {
        /// The kind of the record.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A record as bytes, ready for a producer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The record's key.
    pub key: Vec<u8>,
    /// The record's headers, in this order.
    pub headers: Vec<(&'static str, Vec<u8>)>,
    /// The record's value.
    pub value: Arc<[u8]>,
}

/// The record as bytes. `log` is the log's NAME in `ce_source`; `now` becomes the time of a claim or
/// barrier, an event has its own.
pub fn encode(record: &Record, log: &str, now: DateTime<Utc>) -> Encoded {
    match &record.body {
        Body::Claim(claim) => {
            // The three strings and a number of a claim always are JSON.
            let value = serde_json::to_vec(claim).unwrap_or_default();
            encode_control(record, KIND_CLAIM, CLAIM_TYPE, log, now, value)
        }
        Body::Barrier => encode_control(record, KIND_BARRIER, BARRIER_TYPE, log, now, Vec::new()),
        Body::Event(body) => encode_event(&record.stamp, body, log),
    }
}

fn encode_event(stamp: &Stamp, body: &EventBody, log: &str) -> Encoded {
    let event = &body.event;
    let metadata = &event.metadata;
    let header = Header {
        kind: KIND_EVENT,
        stamp: *stamp,
        version: event.version.0,
        index: body.index,
        count: body.count,
        command_id: event.command_id,
    };
    let mut headers = Vec::with_capacity(HEADERS_MAX);
    headers.extend([
        ("ce_specversion", SPEC_VERSION.into()),
        ("ce_id", metadata.event_id.to_string().into_bytes()),
        ("ce_source", format!("/{log}/{}", event.stream.category()).into_bytes()),
        ("ce_type", event.event_type.as_bytes().to_vec()),
        ("ce_time", show_time(metadata.recorded_at).into_bytes()),
        ("content-type", JSON.into()),
    ]);
    let optional = [
        ("ce_correlationid", &metadata.correlation_id),
        ("ce_causationid", &metadata.causation_id),
        ("traceparent", &metadata.trace_parent),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            headers.push((name, value.clone().into_bytes()));
        }
    }
    // Last: its bytes are no text, and whoever prints the headers shows the readable ones first.
    headers.push((HEADER_NAME, header.encode().to_vec()));
    Encoded { key: event.stream.as_str().into(), headers, value: Arc::clone(&event.payload) }
}

fn encode_control(
    record: &Record,
    kind: u8,
    ce_type: &str,
    log: &str,
    now: DateTime<Utc>,
    value: Vec<u8>,
) -> Encoded {
    let stamp = record.stamp;
    let header =
        Header { kind, stamp, version: 0, index: 0, count: 0, command_id: CommandId(Uuid::nil()) };
    let mut headers = vec![
        ("ce_specversion", SPEC_VERSION.into()),
        ("ce_id", control_id(&stamp).to_string().into_bytes()),
        ("ce_source", format!("/{log}").into_bytes()),
        ("ce_type", ce_type.into()),
        ("ce_time", show_time(now).into_bytes()),
    ];
    if !value.is_empty() {
        headers.push(("content-type", JSON.into()));
    }
    headers.push((HEADER_NAME, header.encode().to_vec()));
    Encoded { key: CONTROL_KEY.into(), headers, value: value.into() }
}

/// Nonce and seq name a control record everywhere: its id is made of them, as a custom UUID (v8).
fn control_id(stamp: &Stamp) -> Uuid {
    let pair = Uuid::from_u64_pair(stamp.claim.nonce.0, stamp.seq);
    uuid::Builder::from_custom_bytes(pair.into_bytes()).into_uuid()
}

/// RFC 3339 in UTC with microseconds and `Z`.
fn show_time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// The time as a record keeps it: whole microseconds.
pub fn stored_time(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}

/// Why an event could not be read back if it were written; checked before anything is produced, for
/// a malformed record halts its partition for every reader.
pub fn check_event(event: &NewEvent) -> Result<(), String> {
    if event.event_type.is_empty() {
        return Err("an event's type is empty".into());
    }
    let time = event.metadata.recorded_at;
    if !RFC3339_YEARS.contains(&stored_time(time).year()) {
        return Err(format!("the event's time {time} has no RFC 3339 form"));
    }
    Ok(())
}

/// Bytes of an event's record at most, everything included, as Kafka counts them against
/// `max.message.bytes`.
pub fn event_size(log: &str, stream: &StreamId, event: &NewEvent) -> usize {
    // Name and value of a header stand behind a varint each.
    let header = |name: &str, value: usize| name.len() + value + 10;
    let metadata = &event.metadata;
    let optional = [
        ("ce_correlationid", &metadata.correlation_id),
        ("ce_causationid", &metadata.causation_id),
        ("traceparent", &metadata.trace_parent),
    ];
    let optional = optional
        .iter()
        .filter_map(|(name, value)| value.as_ref().map(|value| header(name, value.len())))
        .sum::<usize>();
    RECORD_OVERHEAD_BYTES
        + stream.as_str().len()
        + event.payload.len()
        + header(HEADER_NAME, HEADER_BYTES)
        + header("ce_specversion", SPEC_VERSION.len())
        + header("ce_id", 36)
        + header("ce_source", 2 + log.len() + stream.category().len())
        + header("ce_type", event.event_type.len())
        + header("ce_time", 27)
        + header("content-type", JSON.len())
        + optional
}

/// The numbers of the header `kf`.
struct Header {
    kind: u8,
    stamp: Stamp,
    version: u64,
    index: u16,
    count: u16,
    command_id: CommandId,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = FORMAT;
        bytes[1] = self.kind;
        bytes[2..6].copy_from_slice(&self.stamp.claim.epoch.0.to_be_bytes());
        bytes[6..14].copy_from_slice(&self.stamp.claim.nonce.0.to_be_bytes());
        bytes[14..22].copy_from_slice(&self.stamp.seq.to_be_bytes());
        bytes[22..30].copy_from_slice(&self.version.to_be_bytes());
        bytes[30..32].copy_from_slice(&self.index.to_be_bytes());
        bytes[32..34].copy_from_slice(&self.count.to_be_bytes());
        bytes[34..50].copy_from_slice(self.command_id.0.as_bytes());
        bytes[50..58].copy_from_slice(&self.stamp.commands_mark.0.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        match bytes.first() {
            Some(&FORMAT) => {}
            Some(&newer) if newer > FORMAT => return Err(Malformed::NewerFormat(newer)),
            other => return Err(Malformed::UnknownFormat(other.copied())),
        }
        let bytes: &[u8; HEADER_BYTES] =
            bytes.try_into().map_err(|_| Malformed::HeaderLength(bytes.len()))?;
        Ok(Self {
            kind: bytes[1],
            stamp: Stamp {
                claim: ClaimId {
                    epoch: Epoch(u32::from_be_bytes(cut(bytes, 2))),
                    nonce: Nonce(u64::from_be_bytes(cut(bytes, 6))),
                },
                seq: u64::from_be_bytes(cut(bytes, 14)),
                commands_mark: Offset(u64::from_be_bytes(cut(bytes, 50))),
            },
            version: u64::from_be_bytes(cut(bytes, 22)),
            index: u16::from_be_bytes(cut(bytes, 30)),
            count: u16::from_be_bytes(cut(bytes, 32)),
            command_id: CommandId(Uuid::from_bytes(cut(bytes, 34))),
        })
    }

    /// The name of the kind, when all fields are ones that this kind can have.
    fn check(&self) -> Result<(), Malformed> {
        let kind = match self.kind {
            KIND_CLAIM => "claim",
            KIND_EVENT => "event",
            KIND_BARRIER => "barrier",
            other => return Err(Malformed::UnknownKind(other)),
        };
        let demand = |holds: bool, field: &'static str, value: u64| {
            if holds { Ok(()) } else { Err(Malformed::Field { kind, field, value }) }
        };
        let stamp = &self.stamp;
        demand(stamp.claim.epoch.0 > 0, "epoch", 0)?;
        demand((stamp.seq == 0) == (self.kind == KIND_CLAIM), "seq", stamp.seq)?;
        if self.kind == KIND_EVENT {
            demand(self.index < self.count, "index", self.index.into())?;
            // What databases store as a number; the one behind it is a number too.
            let possible = u64::from(self.index) + 1..=i64::MAX as u64;
            return demand(possible.contains(&self.version), "version", self.version);
        }
        demand(self.version == 0, "version", self.version)?;
        demand(self.index == 0, "index", self.index.into())?;
        demand(self.count == 0, "count", self.count.into())?;
        demand(self.command_id.0.is_nil(), "command id", self.command_id.0.as_u64_pair().1)
    }
}

/// The `N` bytes at `from`, which lie within the header.
fn cut<const N: usize>(bytes: &[u8; HEADER_BYTES], from: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[from..from + N]);
    part
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

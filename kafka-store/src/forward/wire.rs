//! Commands, replies and announcements as bytes: the one module of their format.
//!
//! A command is a record of the commands topic: key the stream, value the command as JSON, and the
//! header `kc`. A reply or an announcement is a record of the replies topic: key the node it is for or
//! from, value JSON, and the header `kr`. Both headers are big-endian and begin with the format.

use chrono::DateTime;
use kafold_core::{CommandId, ExpectedVersion, ForwardedCommand, Offset, Partition, Version};
use rdkafka::message::{BorrowedMessage, Message};
use uuid::Uuid;

use crate::reader::{Decode, with_headers};

/// The format of the headers `kc` and `kr` that this version writes, and the newest it reads.
pub(crate) const FORMAT: u8 = 1;
pub(crate) const COMMAND_HEADER: &str = "kc";
pub(crate) const REPLY_HEADER: &str = "kr";
const CORRELATION: &str = "ce_correlationid";
const CAUSATION: &str = "ce_causationid";
const TRACE: &str = "traceparent";

/// format u8 · expected u8 (0 any, 1 exactly) · version u64 · command id 16 bytes · deadline i64 in
/// milliseconds since 1970 · node that waits 16 bytes (zero: nobody) · its call u64 · the partition of
/// replies it reads u32.
const COMMAND_HEADER_BYTES: usize = 62;
/// format u8 · kind u8 (1 reply, 2 announcement) · node 16 bytes · call u64.
const REPLY_HEADER_BYTES: usize = 26;
const KIND_REPLY: u8 = 1;
const KIND_ANNOUNCEMENT: u8 = 2;

/// Where a reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyTo {
    /// The node that waits.
    pub(crate) node: Uuid,
    /// Which of its calls.
    pub(crate) call: u64,
    /// The partition of the replies topic that it reads.
    pub(crate) partition: Partition,
}

/// A record as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Letter {
    pub(crate) key: Vec<u8>,
    pub(crate) headers: Vec<(&'static str, Vec<u8>)>,
    pub(crate) value: Vec<u8>,
}

impl Letter {
    /// Bytes of the record at most, as Kafka counts them.
    pub(crate) fn size(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len() + 10);
        crate::wire::RECORD_OVERHEAD_BYTES
            + self.key.len()
            + self.value.len()
            + headers.sum::<usize>()
    }
}

pub(crate) fn command(command: &ForwardedCommand, reply_to: Option<ReplyTo>) -> Letter {
    let (node, call, partition) = match reply_to {
        Some(ReplyTo { node, call, partition }) => (node, call, partition.0),
        None => (Uuid::nil(), 0, 0),
    };
    let expected = command.expected.version();
    let mut header = Vec::with_capacity(COMMAND_HEADER_BYTES);
    header.push(FORMAT);
    header.push(u8::from(expected.is_some()));
    header.extend(expected.unwrap_or(Version::EMPTY).0.to_be_bytes());
    header.extend(command.command_id.0.as_bytes());
    header.extend(command.deadline.timestamp_millis().to_be_bytes());
    header.extend(node.as_bytes());
    header.extend(call.to_be_bytes());
    header.extend(partition.to_be_bytes());
    let mut headers = Vec::new();
    let optional = [
        (CORRELATION, &command.correlation_id),
        (CAUSATION, &command.causation_id),
        (TRACE, &command.trace_parent),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            headers.push((name, value.clone().into_bytes()));
        }
    }
    headers.push((COMMAND_HEADER, header));
    Letter { key: command.stream.as_str().into(), headers, value: command.payload.to_vec() }
}

pub(crate) fn reply(to: ReplyTo, json: Vec<u8>) -> Letter {
    letter(KIND_REPLY, to.node, to.call, json)
}

pub(crate) fn announcement(node: Uuid, json: Vec<u8>) -> Letter {
    letter(KIND_ANNOUNCEMENT, node, 0, json)
}

fn letter(kind: u8, node: Uuid, call: u64, value: Vec<u8>) -> Letter {
    let mut header = Vec::with_capacity(REPLY_HEADER_BYTES);
    header.extend([FORMAT, kind]);
    header.extend(node.as_bytes());
    header.extend(call.to_be_bytes());
    let headers = vec![(REPLY_HEADER, header)];
    Letter { key: node.to_string().into_bytes(), headers, value }
}

/// A record of the commands topic.
#[derive(Debug, Clone)]
pub(crate) struct CommandRecord {
    pub(crate) offset: Offset,
    /// The command and who waits for it, or why the record is none.
    pub(crate) content: Result<(ForwardedCommand, Option<ReplyTo>), String>,
}

/// A record of the replies topic.
#[derive(Debug, Clone)]
pub(crate) struct ReplyRecord {
    pub(crate) offset: Offset,
    pub(crate) content: ReplyContent,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ReplyContent {
    /// The answer to a call of a node, as JSON.
    Reply { node: Uuid, call: u64, json: Vec<u8> },
    /// What a node says of itself, as JSON.
    Announcement { node: Uuid, json: Vec<u8> },
    /// Not ours, or of a newer format.
    Other,
}

#[derive(Default)]
struct Headers<'m> {
    command: Option<&'m [u8]>,
    reply: Option<&'m [u8]>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    trace_parent: Option<String>,
}

fn collect<'m>(message: &'m BorrowedMessage<'_>) -> Headers<'m> {
    let text = |value: Option<&[u8]>| value.map(|value| String::from_utf8_lossy(value).into());
    let collected = with_headers(message, |headers| {
        let mut found = Headers::default();
        for (name, value) in headers {
            match name {
                COMMAND_HEADER => found.command = value,
                REPLY_HEADER => found.reply = value,
                CORRELATION => found.correlation_id = text(value),
                CAUSATION => found.causation_id = text(value),
                TRACE => found.trace_parent = text(value),
                _ => {}
            }
        }
        found
    });
    collected.unwrap_or_default()
}

impl Decode for CommandRecord {
    fn decode(message: &BorrowedMessage<'_>, _: Partition, offset: Offset) -> Self {
        let content = parse_command(message.key(), collect(message), message.payload());
        Self { offset, content }
    }

    fn offset(&self) -> Offset {
        self.offset
    }
}

impl Decode for ReplyRecord {
    fn decode(message: &BorrowedMessage<'_>, _: Partition, offset: Offset) -> Self {
        let json = message.payload().unwrap_or_default();
        let content = collect(message).reply.and_then(|header| parse_reply(header, json));
        Self { offset, content: content.unwrap_or(ReplyContent::Other) }
    }

    fn offset(&self) -> Offset {
        self.offset
    }
}

fn parse_command(
    key: Option<&[u8]>,
    headers: Headers<'_>,
    value: Option<&[u8]>,
) -> Result<(ForwardedCommand, Option<ReplyTo>), String> {
    let header = headers.command.ok_or("it has no header kc")?;
    if header.first() != Some(&FORMAT) {
        let found = header.first().map_or("absent".to_owned(), ToString::to_string);
        return Err(format!("its format is {found}, this program knows {FORMAT}"));
    }
    let header: &[u8; COMMAND_HEADER_BYTES] =
        header.try_into().map_err(|_| format!("its header kc has {} bytes", header.len()))?;
    let stream = key
        .and_then(|key| std::str::from_utf8(key).ok())
        .ok_or("its key is no text")?
        .parse()
        .map_err(|error| format!("its key is no stream: {error}"))?;
    let version = Version(u64::from_be_bytes(cut(header, 2)));
    let deadline = DateTime::from_timestamp_millis(i64::from_be_bytes(cut(header, 26)));
    let node = Uuid::from_bytes(cut(header, 34));
    let reply_to = (!node.is_nil()).then(|| ReplyTo {
        node,
        call: u64::from_be_bytes(cut(header, 50)),
        partition: Partition(u32::from_be_bytes(cut(header, 58))),
    });
    let command = ForwardedCommand {
        stream,
        command_id: CommandId(Uuid::from_bytes(cut(header, 10))),
        payload: value.unwrap_or_default().into(),
        expected: match header[1] {
            0 => ExpectedVersion::Any,
            1 => ExpectedVersion::Exact(version),
            other => return Err(format!("its demand is {other}, which is neither 0 nor 1")),
        },
        correlation_id: headers.correlation_id,
        causation_id: headers.causation_id,
        trace_parent: headers.trace_parent,
        deadline: deadline.ok_or("its deadline is no time")?,
    };
    Ok((command, reply_to))
}

fn parse_reply(header: &[u8], json: &[u8]) -> Option<ReplyContent> {
    let header: &[u8; REPLY_HEADER_BYTES] = header.try_into().ok()?;
    let node = Uuid::from_bytes(cut(header, 2));
    let json = json.to_vec();
    match (header[0], header[1]) {
        (FORMAT, KIND_REPLY) => {
            Some(ReplyContent::Reply { node, call: u64::from_be_bytes(cut(header, 18)), json })
        }
        // Announcements tell the format of their node, and are read whatever it is.
        (_, KIND_ANNOUNCEMENT) => Some(ReplyContent::Announcement { node, json }),
        _ => None,
    }
}

/// The `N` bytes at `from`, which lie within the header.
fn cut<const N: usize, const L: usize>(bytes: &[u8; L], from: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[from..from + N]);
    part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::corpus;

    fn forwarded() -> ForwardedCommand {
        ForwardedCommand {
            stream: "order-17".parse().expect("valid"),
            command_id: CommandId(Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10)),
            payload: (*br#"{"pay":1}"#).into(),
            expected: ExpectedVersion::Exact(Version(3)),
            correlation_id: Some("c-1".into()),
            causation_id: None,
            trace_parent: Some("00-ab".into()),
            deadline: DateTime::from_timestamp_millis(1_700_000_000_123).expect("a time"),
        }
    }

    const TO: ReplyTo =
        ReplyTo { node: Uuid::from_u128(0xff), call: 0x1122, partition: Partition(5) };

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn read(letter: &Letter) -> Result<(ForwardedCommand, Option<ReplyTo>), String> {
        let find = |name| letter.headers.iter().find(|(n, _)| *n == name).map(|(_, v)| &v[..]);
        let text = |name| find(name).map(|value| String::from_utf8_lossy(value).into());
        let headers = Headers {
            command: find(COMMAND_HEADER),
            reply: None,
            correlation_id: text(CORRELATION),
            causation_id: text(CAUSATION),
            trace_parent: text(TRACE),
        };
        parse_command(Some(&letter.key), headers, Some(&letter.value))
    }

    #[test]
    fn the_bytes_of_a_command_stay_as_they_are() {
        let letter = command(&forwarded(), Some(TO));
        assert_eq!(letter.key, b"order-17");
        assert_eq!(letter.value, br#"{"pay":1}"#);
        let names: Vec<_> = letter.headers.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["ce_correlationid", "traceparent", "kc"]);
        let golden = "0101000000000000000301020304050607080\
                      90a0b0c0d0e0f100000018bcfe5687b000000000000000000000000000000ff\
                      000000000000112200000005";
        assert_eq!(hex(&letter.headers[2].1), golden);
        assert_eq!(read(&letter), Ok((forwarded(), Some(TO))));
    }

    /// The letter with edits of the corpus.
    fn edit(letter: &mut Letter, edit: &str) -> Option<()> {
        let (name, text) = edit.split_once('=')?;
        let bytes = corpus::unescape(text)?;
        let header = &mut letter.headers.last_mut()?.1;
        match name {
            "key" => letter.key = bytes,
            "value" => letter.value = bytes,
            "header" => *header = corpus::unhex(&bytes)?,
            _ => {
                let (at, bytes) = (name.strip_prefix('@')?.parse().ok()?, corpus::unhex(&bytes)?);
                header.get_mut(at..at + bytes.len())?.copy_from_slice(&bytes);
            }
        }
        Some(())
    }

    #[test]
    fn every_letter_of_the_corpus_gets_its_verdict() {
        corpus::check(corpus::COMMANDS, |edits, verdict| {
            let mut edits = edits.split(' ');
            let kind = edits.next()?;
            let sample = match kind {
                "command" => command(&forwarded(), Some(TO)),
                "reply" => reply(TO, b"{}".to_vec()),
                "announcement" => announcement(TO.node, b"{}".to_vec()),
                _ => return None,
            };
            let mut letter = sample.clone();
            edits.try_for_each(|one| edit(&mut letter, one))?;
            let said = |same| if same { "same" } else { "changed" };
            if kind == "command" {
                let found = read(&letter);
                let holds = match &found {
                    Ok(_) => verdict == said(found == read(&sample)),
                    Err(why) => why.contains(verdict),
                };
                return corpus::demand(holds, found);
            }
            let read = |letter: &Letter| parse_reply(&letter.headers[0].1, &letter.value);
            let found = read(&letter);
            let holds = verdict == found.as_ref().map_or("other", |_| said(found == read(&sample)));
            corpus::demand(holds, found)
        });
    }

    proptest! {
        #[test]
        fn what_is_read_of_any_header_is_written_as_it_was_read(
            header in proptest::collection::vec(any::<u8>(), COMMAND_HEADER_BYTES),
            (demand, deadline) in (0..3_u8, 0..4_000_000_000_000_u64),
            key in proptest::collection::vec(any::<u8>(), 0..20),
            id in "[a-z]{1,5}",
            value in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut letter = Letter { key, headers: vec![(COMMAND_HEADER, header)], value };
            letter.headers[0].1[..2].copy_from_slice(&[FORMAT, demand]);
            let _ = read(&letter);
            letter.key = format!("order-{id}").into_bytes();
            letter.headers[0].1[26..34].copy_from_slice(&deadline.to_be_bytes());
            if let Ok((found, to)) = read(&letter) {
                prop_assert_eq!(read(&command(&found, to)), Ok((found, to)));
            } else {
                prop_assert_eq!(demand, 2);
            }
        }
    }

    #[test]
    fn a_command_that_nobody_waits_for_has_no_address() {
        let any = ForwardedCommand { expected: ExpectedVersion::Any, ..forwarded() };
        assert_eq!(read(&command(&any, None)), Ok((any, None)));
    }

    #[test]
    fn no_stream_travels_as_version_zero() {
        let new = ForwardedCommand { expected: ExpectedVersion::NoStream, ..forwarded() };
        let (read, _) = read(&command(&new, None)).expect("a command");
        assert_eq!(read.expected, ExpectedVersion::Exact(Version::EMPTY));
    }

    #[test]
    fn what_is_no_command_is_told_why() {
        let mut newer = command(&forwarded(), None);
        let last = newer.headers.len() - 1;
        newer.headers[last].1[0] = 2;
        assert!(read(&newer).expect_err("newer").contains("format is 2"));
        let mut short = command(&forwarded(), None);
        short.headers[last].1.pop();
        assert!(read(&short).expect_err("short").contains("61 bytes"));
        let mut keyless = command(&forwarded(), None);
        keyless.key = b"nostream".to_vec();
        assert!(read(&keyless).expect_err("no stream").contains("no stream"));
        let headers = Headers::default();
        assert!(parse_command(None, headers, None).expect_err("foreign").contains("kc"));
    }

    #[test]
    fn the_bytes_of_replies_and_announcements_stay_as_they_are() {
        let letter = reply(TO, b"{}".to_vec());
        assert_eq!(letter.key, b"00000000-0000-0000-0000-0000000000ff");
        let (name, header) = &letter.headers[0];
        assert_eq!(*name, "kr");
        assert_eq!(hex(header), "0101000000000000000000000000000000ff0000000000001122");
        let (node, call) = (TO.node, TO.call);
        let json = b"{}".to_vec();
        assert_eq!(parse_reply(header, b"{}"), Some(ReplyContent::Reply { node, call, json }));
        let mut header = announcement(TO.node, Vec::new()).headers[0].1.clone();
        assert_eq!(hex(&header), "0102000000000000000000000000000000ff0000000000000000");
        header[0] = 9;
        let newer = parse_reply(&header, b"x");
        assert!(matches!(newer, Some(ReplyContent::Announcement { .. })), "told whatever format");
    }
}

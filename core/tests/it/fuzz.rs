//! Nothing that others give as an id or store as a payload makes reading panic, loop or guess.

use kafold_core::codec::{CodecError, Upcasters, decode, encode};
use kafold_core::ids::{CATEGORY_BYTES_MAX, STREAM_ID_BYTES_MAX};
use kafold_core::{CommandId, DomainEvent, Offset, Partition, Position, Reply, StreamId, Version};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

const IDS: &str = include_str!("../corpus/ids.txt");

/// `None` is accepted; a text that is accepted is shown as it was read.
fn read_id(kind: &str, text: &str) -> Option<String> {
    fn refusal<T: DeserializeOwned>(json: &str) -> Option<String> {
        serde_json::from_str::<T>(json).err().map(|error| error.to_string())
    }
    match kind {
        "stream" => match text.parse::<StreamId>() {
            Ok(stream) => {
                assert_eq!(stream.as_str(), text);
                assert_eq!(format!("{}-{}", stream.category(), stream.id()), text);
                None
            }
            Err(refused) => Some(refused.to_string()),
        },
        "position" => match text.parse::<Position>() {
            Ok(position) => {
                assert_eq!(position.to_string().parse(), Ok(position));
                None
            }
            Err(refused) => Some(refused.to_string()),
        },
        "command" => refusal::<CommandId>(&serde_json::to_string(text).expect("a text is JSON")),
        "version" => refusal::<Version>(text),
        other => panic!("{other} is no kind"),
    }
}

#[test]
fn every_id_of_the_corpus_gets_its_verdict() {
    for case in IDS.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (input, verdict) = case.rsplit_once(" => ").expect(case);
        let (kind, json) = input.split_once(' ').expect(case);
        let text: String = serde_json::from_str(json).expect(case);
        let found = read_id(kind, &text).unwrap_or_else(|| "accepted".into());
        assert!(found.contains(verdict), "{case}\nis {found}");
    }
}

/// One event of each kind of reading: as it is, lifted once, lifted twice, and by an upcaster that refuses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(upcasters = upcasters)]
enum Told {
    #[event("told.paid", version = 3)]
    Paid { cents: u64, note: Option<String> },
    #[event("told.nested")]
    Nested(serde_json::Value),
    #[event("told.unit")]
    Unit,
}

fn upcasters() -> Upcasters {
    Upcasters::none()
        .add("told.paid", 1, |mut json| {
            let euros = json["euros"].as_u64().ok_or("euros is no number")?;
            let object = json.as_object_mut().ok_or("it is no object")?;
            object.insert("cents".into(), euros.checked_mul(100).ok_or("too much")?.into());
            Ok(json)
        })
        .add("told.paid", 2, |json| match json.get("note") {
            Some(note) if !note.is_string() => Err("note is no text".into()),
            _ => Ok(json),
        })
}

const SAMPLES: [(&str, &str); 5] = [
    ("told.paid.v3", r#"{"cents":2500,"note":"né\u0000"}"#),
    ("told.paid.v2", r#"{"cents":2500,"note":"n"}"#),
    ("told.paid.v1", r#"{"euros":25}"#),
    ("told.nested.v1", r#"{"a":[1,2.5e3,{"b":null}],"c":"\ud83d\ude80"}"#),
    ("told.unit.v1", r#"{"more":[{}]}"#),
];

#[test]
fn payloads_that_no_program_of_ours_writes_are_told_by_name() {
    let check = |event_type: &str, payload: &[u8], words: &str| {
        let found = match decode::<Told>(event_type, payload) {
            Ok(read) => format!("{read:?}"),
            Err(refused) => refused.to_string(),
        };
        let shown = String::from_utf8_lossy(payload);
        assert!(found.contains(words), "{event_type} {shown:.40} is {found:.300}");
    };
    for (event_type, payload) in SAMPLES {
        assert!(decode::<Told>(event_type, payload.as_bytes()).is_ok(), "{event_type}");
        // Cut anywhere, a payload says that it is.
        for end in 0..payload.len() {
            check(event_type, &payload.as_bytes()[..end], "payload of told");
        }
        check(event_type, &[payload.as_bytes(), b"x"].concat(), "trailing characters");
    }
    check("told.paid.v3", br#"{"cents":1,"cents":2,"note":null}"#, "duplicate field");
    check("told.paid.v3", br#"{"cents":18446744073709551616,"note":null}"#, "invalid type");
    check("told.paid.v3", br#"{"cents":-1,"note":null}"#, "invalid value");
    check("told.paid.v3", b"\"\xff\"", "payload of told.paid.v3");
    check("told.paid.v1", br#"{"euros":18446744073709551615}"#, "too much");
    check("told.paid.v1", br#"[25]"#, "upcaster of told.paid.v1 says: euros is no number");
    check("told.paid.v2", br#"{"cents":1,"note":7}"#, "upcaster of told.paid.v2 says");
    check("told.unit.v1", b"[]", "payload of told.unit.v1");
    for open in [&b"["[..], b"{\"a\":"] {
        check("told.nested.v1", &open.repeat(100_000), "recursion limit exceeded");
        // What is passed over is not kept, so it may be as deep as it likes.
        check("told.unit.v1", &[b"{\"a\":", &open.repeat(100_000)[..]].concat(), "EOF");
        check("told.paid.v1", &open.repeat(100_000), "recursion limit exceeded");
    }
    for unknown in
        ["", "told", "told.paid", "told.paid.v", "told.paid.v+1", "told.paid.v4294967296", ".v1"]
    {
        check(unknown, b"{}", "has no event type");
    }
    check("told.paid.v4", b"{}", "newer program");
    check("told.paid.v0", b"{}", "needs an upcaster");
}

proptest! {
    #[test]
    fn a_stream_id_is_accepted_exactly_when_its_parts_are(text in "[a-c_A0-9é/\\x00 -]{0,12}|\\PC{0,12}") {
        let expected = text.split_once('-').is_some_and(|(category, id)| {
            let mut bytes = category.bytes();
            bytes.next().is_some_and(|first| first.is_ascii_lowercase())
                && bytes.all(|b| b == b'_' || b.is_ascii_lowercase() || b.is_ascii_digit())
                && category.len() <= CATEGORY_BYTES_MAX
                && (1..=STREAM_ID_BYTES_MAX).contains(&id.len())
                && !id.chars().any(|c| c == '/' || c.is_control())
        });
        prop_assert_eq!(read_id("stream", &text).is_none(), expected);
    }

    #[test]
    fn every_position_is_read_back_and_nothing_else_is_one(partition: u32, offset: u64, at in 0..9_usize, odd in "[^0-9]") {
        let position = Position { partition: Partition(partition), offset: Offset(offset) };
        let mut text = position.to_string();
        prop_assert_eq!(text.parse(), Ok(position));
        text.insert_str(at.min(text.len()), &odd);
        prop_assert!(text.parse::<Position>().is_err(), "{}", text);
    }

    #[test]
    fn a_mutated_payload_is_refused_by_name_or_is_an_event_that_is_read_back(
        sample in 0..SAMPLES.len(),
        edits in proptest::collection::vec((any::<usize>(), any::<u8>(), 0..3_u8), 1..4),
    ) {
        let (event_type, payload) = SAMPLES[sample];
        let mut payload = payload.as_bytes().to_vec();
        for (at, byte, kind) in edits {
            let at = at % payload.len().max(1);
            match kind {
                0 if at < payload.len() => payload[at] ^= 1 << (byte % 8),
                1 => payload.insert(at, byte),
                _ => payload.truncate(at),
            }
        }
        match decode::<Told>(event_type, &payload) {
            Ok(event) => {
                let stored = encode(&event).expect("it was read");
                let known = event.event_type().to_string();
                prop_assert_eq!(decode::<Told>(&known, &stored), Ok(event));
            }
            Err(CodecError::Malformed { event_type: told, .. } | CodecError::Upcast { event_type: told, .. }) => {
                prop_assert_eq!(told, event_type);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn no_reply_of_another_node_makes_reading_panic(at: usize, text in "[0-9]{0,25}|[\\[{\":,a-z}\\]]{0,3}") {
        for reply in [
            r#"{"handled":{"version":3,"position":"1:42","duplicate":false,"events":2}}"#,
            r#"{"rejected":{"error":{"Insufficient": 1.50}}}"#,
            r#"{"unavailable":{"retry_after_ms":7,"reason":"r"}}"#,
        ] {
            let mut json = reply.to_owned();
            let at = at % json.len();
            json.replace_range(at..=at, &text);
            if let Ok(read) = serde_json::from_str::<Reply>(&json) {
                let again = serde_json::to_string(&read).expect("is JSON");
                prop_assert!(serde_json::from_str::<Reply>(&again).is_ok(), "{}", again);
            }
        }
    }
}

//! Golden bytes of every kind, which stay for ever; round trips; everything that is refused.

use kafold_core::{Metadata, Partition, Position, Version};
use proptest::prelude::*;

use super::*;

const PARTITION: Partition = Partition(3);
const OFFSET: Offset = Offset(1_042);

fn time(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).expect("in range")
}

fn stamp(seq: u64) -> Stamp {
    let claim = ClaimId { epoch: Epoch(0x0102_0304), nonce: Nonce(0x1112_1314_1516_1718) };
    Stamp { claim, seq, commands_mark: Offset(0x5152) }
}

pub(super) fn event() -> RecordedEvent {
    RecordedEvent {
        stream: "order-17".parse().expect("a stream id"),
        version: Version(0x3132),
        position: Position { partition: PARTITION, offset: OFFSET },
        command_id: CommandId(Uuid::from_u128(0x4142_4344_4546_4748_494a_4b4c_4d4e_4f50)),
        event_type: "order.placed.v1".into(),
        payload: Arc::from(*br#"{"customer":"c1"}"#),
        metadata: Metadata {
            event_id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001),
            recorded_at: time(1_700_000_000_123_456),
            correlation_id: Some("request-1".into()),
            causation_id: Some("command-1".into()),
            trace_parent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        },
    }
}

pub(super) fn event_record(event: RecordedEvent) -> Record {
    let body = EventBody { index: 1, count: 2, event: Arc::new(event) };
    Record { stamp: stamp(0x2122), body: Body::Event(body) }
}

pub(super) fn claim_record() -> Record {
    let claim = Claim {
        owner: "node-1".into(),
        address: "http://10.0.0.1:8080".into(),
        partitions: 12,
        started_at: time(1_700_000_000_000_001),
    };
    Record { stamp: stamp(0), body: Body::Claim(claim) }
}

pub(super) fn barrier_record() -> Record {
    Record { stamp: stamp(9), body: Body::Barrier }
}

pub(super) fn encoded(record: &Record) -> Encoded {
    encode(record, "orders", time(1_700_000_000_000_000))
}

fn read_back(encoded: &Encoded) -> Content {
    let headers = encoded.headers.iter().map(|(name, value)| (*name, Some(value.as_slice())));
    let record = parse(PARTITION, OFFSET, Some(&encoded.key), headers, Some(&encoded.value));
    assert_eq!(record.offset, OFFSET);
    record.content
}

/// The header `kf`, which is the last: its bytes are no text, and consoles show those before it first.
fn kf(encoded: &mut Encoded) -> &mut Vec<u8> {
    let (name, value) = encoded.headers.last_mut().expect("headers");
    assert_eq!(*name, HEADER_NAME);
    value
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Key, headers (`kf` as hex) and value, as a golden text.
fn shown(encoded: &Encoded) -> String {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let mut lines = vec![text(&encoded.key)];
    for (name, value) in &encoded.headers {
        let value = if *name == HEADER_NAME { hex(value) } else { text(value) };
        lines.push(format!("{name}: {value}"));
    }
    lines.push(text(&encoded.value));
    lines.join("\n")
}

#[test]
fn an_event_has_these_bytes_for_ever() {
    let golden = "order-17
ce_specversion: 1.0
ce_id: 01900000-0000-7000-8000-000000000001
ce_source: /orders/order
ce_type: order.placed.v1
ce_time: 2023-11-14T22:13:20.123456Z
content-type: application/json
ce_correlationid: request-1
ce_causationid: command-1
traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
kf: 010201020304111213141516171800000000000021220000000000003132000100024142434445464748494a4b4c4d4e4f500000000000005152
{\"customer\":\"c1\"}";
    let record = event_record(event());
    assert_eq!(shown(&encoded(&record)), golden);
    assert_eq!(read_back(&encoded(&record)), Content::Ours(record));
}

#[test]
fn a_claim_has_these_bytes_for_ever() {
    let golden = "kafold
ce_specversion: 1.0
ce_id: 11121314-1516-8718-8000-000000000000
ce_source: /orders
ce_type: kafold.claim.v1
ce_time: 2023-11-14T22:13:20.000000Z
content-type: application/json
kf: 01010102030411121314151617180000000000000000000000000000000000000000000000000000000000000000000000000000000000005152
{\"owner\":\"node-1\",\"address\":\"http://10.0.0.1:8080\",\"partitions\":12,\"started_at\":\"2023-11-14T22:13:20.000001Z\"}";
    let record = claim_record();
    assert_eq!(shown(&encoded(&record)), golden);
    assert_eq!(read_back(&encoded(&record)), Content::Ours(record));
}

#[test]
fn a_barrier_has_these_bytes_for_ever() {
    let golden = "kafold
ce_specversion: 1.0
ce_id: 11121314-1516-8718-8000-000000000009
ce_source: /orders
ce_type: kafold.barrier.v1
ce_time: 2023-11-14T22:13:20.000000Z
kf: 01030102030411121314151617180000000000000009000000000000000000000000000000000000000000000000000000000000000000005152
";
    let record = barrier_record();
    assert_eq!(shown(&encoded(&record)), golden);
    assert_eq!(read_back(&encoded(&record)), Content::Ours(record));
}

#[test]
fn the_header_is_58_bytes_whatever_the_kind() {
    for record in [event_record(event()), claim_record(), barrier_record()] {
        assert_eq!(kf(&mut encoded(&record)).len(), HEADER_BYTES);
    }
}

#[test]
fn a_record_without_our_header_is_foreign_whatever_else_it_has() {
    let twice = [("ce_id", Some(&b"x"[..])), ("ce_id", None)];
    for headers in [&[][..], &[("ce_id", None)], &twice] {
        let record = parse(PARTITION, OFFSET, None, headers.iter().copied(), None);
        assert_eq!(record.content, Content::Foreign);
    }
}

#[test]
fn other_headers_pass_unread() {
    let mut record = encoded(&barrier_record());
    record.headers.push(("ce_partitionkey", vec![0xff]));
    assert_eq!(read_back(&record), Content::Ours(barrier_record()));
}

/// What reading says of a record that `change` was done to.
fn malformed(record: &Record, change: impl FnOnce(&mut Encoded)) -> Malformed {
    let mut encoded = encoded(record);
    change(&mut encoded);
    match read_back(&encoded) {
        Content::Malformed(malformed) => malformed,
        other => panic!("not refused: {other:?}"),
    }
}

/// The same for one byte of the header `kf`.
fn with_byte(record: &Record, at: usize, byte: u8) -> Malformed {
    malformed(record, |encoded| kf(encoded)[at] = byte)
}

#[test]
fn a_newer_format_is_told_apart_whatever_its_length() {
    let event = event_record(event());
    assert_eq!(with_byte(&event, 0, 2), Malformed::NewerFormat(2));
    let short = malformed(&event, |encoded| *kf(encoded) = vec![7]);
    assert_eq!(short, Malformed::NewerFormat(7));
    assert_eq!(with_byte(&event, 0, 0), Malformed::UnknownFormat(Some(0)));
    let empty = malformed(&event, |encoded| kf(encoded).clear());
    assert_eq!(empty, Malformed::UnknownFormat(None));
}

#[test]
fn a_header_of_another_length_or_kind_is_refused() {
    let event = event_record(event());
    let short = malformed(&event, |encoded| kf(encoded).truncate(57));
    assert_eq!(short, Malformed::HeaderLength(57));
    let long = malformed(&event, |encoded| kf(encoded).push(0));
    assert_eq!(long, Malformed::HeaderLength(59));
    for kind in [0, 4, 255] {
        assert_eq!(with_byte(&event, 1, kind), Malformed::UnknownKind(kind));
    }
}

#[test]
fn numbers_that_a_kind_cannot_have_are_refused() {
    let field = |malformed| match malformed {
        Malformed::Field { kind, field, .. } => (kind, field),
        other => panic!("{other:?}"),
    };
    let event = event_record(event());
    assert_eq!(field(with_byte(&event, 31, 2)), ("event", "index"), "index = count");
    let no_count = malformed(&event, |encoded| kf(encoded)[32..34].fill(0));
    assert_eq!(field(no_count), ("event", "index"));
    let no_version = malformed(&event, |encoded| kf(encoded)[22..30].fill(0));
    assert_eq!(field(no_version), ("event", "version"));
    let no_seq = malformed(&event, |encoded| kf(encoded)[14..22].fill(0));
    assert_eq!(field(no_seq), ("event", "seq"));
    let no_epoch = malformed(&event, |encoded| kf(encoded)[2..6].fill(0));
    assert_eq!(field(no_epoch), ("event", "epoch"));
    assert_eq!(field(with_byte(&claim_record(), 21, 1)), ("claim", "seq"));
    for (at, name) in [(29, "version"), (31, "index"), (33, "count"), (49, "command id")] {
        assert_eq!(field(with_byte(&barrier_record(), at, 1)), ("barrier", name));
        assert_eq!(field(with_byte(&claim_record(), at, 1)), ("claim", name));
    }
}

#[test]
fn keys_that_name_no_stream_are_refused() {
    let event = event_record(event());
    let key = |key: &[u8]| malformed(&event, |encoded| encoded.key = key.to_vec());
    assert!(matches!(key(b"order-\xff"), Malformed::Key(_)));
    assert!(matches!(key(b"order"), Malformed::Stream(InvalidStreamId::NoSeparator(_))));
    assert!(matches!(key(b"order-a/b"), Malformed::Stream(InvalidStreamId::Character('/'))));
    assert!(matches!(key(b"kafold"), Malformed::Stream(_)));
    let barrier = malformed(&barrier_record(), |encoded| encoded.key = b"order-1".to_vec());
    assert_eq!(barrier, Malformed::Key("order-1".into()));
    let encoded = encoded(&barrier_record());
    let headers = encoded.headers.iter().map(|(name, value)| (*name, Some(value.as_slice())));
    let absent = parse(PARTITION, OFFSET, None, headers, None);
    assert_eq!(absent.content, Content::Malformed(Malformed::Key("absent".into())));
}

#[test]
fn cloud_event_headers_are_demanded_of_every_kind() {
    for record in [event_record(event()), claim_record(), barrier_record()] {
        for name in ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time"] {
            let absent = malformed(&record, |encoded| encoded.headers.retain(|one| one.0 != name));
            assert_eq!(absent, Malformed::HeaderAbsent(name));
            let twice = malformed(&record, |encoded| encoded.headers.push((name, vec![b'x'])));
            assert_eq!(twice, Malformed::HeaderTwice(name));
        }
        let kf = encoded(&record).headers.last().expect("headers").clone();
        assert_eq!(malformed(&record, |to| to.headers.push(kf)), Malformed::HeaderTwice("kf"));
    }
}

#[test]
fn header_values_that_say_nothing_are_refused() {
    let event = event_record(event());
    let cases: [(&str, &[u8]); 9] = [
        ("ce_specversion", b"0.3"),
        ("ce_id", b"not a uuid"),
        ("ce_source", b""),
        ("ce_type", b""),
        ("ce_type", b"\xff"),
        ("ce_time", b"yesterday"),
        ("ce_time", b"\xff"),
        ("ce_correlationid", b"\xff"),
        ("traceparent", b"\xff"),
    ];
    for (name, bytes) in cases {
        let refused = malformed(&event, |encoded| {
            let header = encoded.headers.iter_mut().find(|one| one.0 == name);
            header.expect("an event has it").1 = bytes.to_vec();
        });
        assert!(matches!(refused, Malformed::HeaderValue { name: told, .. } if told == name));
    }
}

#[test]
fn values_that_are_no_claim_or_barrier_are_refused() {
    let value = |record: &Record, value: &[u8]| {
        let refused = malformed(record, |encoded| encoded.value = value.into());
        assert!(matches!(refused, Malformed::Value { .. }), "{refused:?}");
    };
    value(&claim_record(), b"");
    value(&claim_record(), b"[]");
    value(&claim_record(), br#"{"owner":"n","address":"","partitions":12}"#);
    let no_partitions =
        br#"{"owner":"n","address":"","partitions":0,"started_at":"2024-01-01T00:00:00Z"}"#;
    value(&claim_record(), no_partitions);
    value(&barrier_record(), b"x");
}

#[test]
fn an_event_that_could_not_be_read_back_is_refused_before_it_is_written() {
    let new = |event_type: &str, recorded_at| {
        let RecordedEvent { payload, metadata, .. } = event();
        let metadata = Metadata { recorded_at, ..metadata };
        NewEvent { event_type: event_type.into(), payload, metadata }
    };
    assert_eq!(check_event(&new("a.v1", time(0))), Ok(()));
    assert!(check_event(&new("", time(0))).is_err());
    assert!(check_event(&new("a.v1", DateTime::<Utc>::MAX_UTC)).is_err());
    assert!(check_event(&new("a.v1", DateTime::<Utc>::MIN_UTC)).is_err());
}

proptest! {
    #[test]
    fn what_is_encoded_is_read_back(
        (epoch, nonce, seq, mark) in (1..u32::MAX, any::<u64>(), 1..u64::MAX, any::<u64>()),
        (index, more, version) in (0..u16::MAX, any::<u16>(), any::<u32>()),
        (command, id, micros) in (any::<u128>(), any::<u128>(), 0..4_000_000_000_000_000_i64),
        (key, ce_type) in ("[a-zA-Z0-9_ é東🚀-]{1,40}", "[a-z.é]{1,20}"),
        payload in proptest::collection::vec(any::<u8>(), 0..200),
        texts in proptest::array::uniform3(proptest::option::of(".{0,30}")),
    ) {
        let [correlation_id, causation_id, trace_parent] = texts;
        let recorded_at = time(micros);
        let event = RecordedEvent {
            stream: StreamId::new("order", &key).expect("valid"),
            version: Version(u64::from(version) + u64::from(index) + 1),
            position: Position { partition: PARTITION, offset: OFFSET },
            command_id: CommandId(Uuid::from_u128(command)),
            event_type: ce_type.into(),
            payload: payload.into(),
            metadata: Metadata {
                event_id: Uuid::from_u128(id),
                recorded_at,
                correlation_id,
                causation_id,
                trace_parent,
            },
        };
        let count = index.saturating_add(more).max(index + 1);
        let new = NewEvent {
            event_type: Arc::clone(&event.event_type),
            payload: Arc::clone(&event.payload),
            metadata: event.metadata.clone(),
        };
        prop_assert_eq!(check_event(&new), Ok(()));
        let size = event_size("orders", &event.stream, &new);
        let claim = ClaimId { epoch: Epoch(epoch), nonce: Nonce(nonce) };
        let stamp = Stamp { claim, seq, commands_mark: Offset(mark) };
        let body = Body::Event(EventBody { index, count, event: Arc::new(event) });
        let record = Record { stamp, body };
        let encoded = encoded(&record);
        prop_assert_eq!(read_back(&encoded), Content::Ours(record));
        let bytes = encoded.key.len()
            + encoded.value.len()
            + encoded.headers.iter().map(|(name, value)| name.len() + value.len() + 10).sum::<usize>();
        prop_assert_eq!(size, RECORD_OVERHEAD_BYTES + bytes);
    }

    #[test]
    fn no_bytes_make_reading_panic(
        kf in proptest::collection::vec(any::<u8>(), 0..70),
        kind in 0..5_u8,
        key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20)),
        value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
    ) {
        let mut kf = kf;
        if let [format, second, ..] = &mut kf[..] {
            (*format, *second) = (FORMAT, kind);
        }
        let template = encoded(&event_record(event()));
        let mut headers: Vec<(&str, Option<&[u8]>)> =
            template.headers.iter().map(|(name, value)| (*name, Some(value.as_slice()))).collect();
        headers.last_mut().expect("headers").1 = Some(&kf);
        let record = parse(PARTITION, OFFSET, key.as_deref(), headers, value.as_deref());
        prop_assert!(!matches!(record.content, Content::Foreign));
    }
}

//! The fold on the shortest logs in which each rule matters.

use std::sync::Arc;

use chrono::DateTime;
use kafold_core::{Metadata, RecordedEvent};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::corpus;

const PARTITION: Partition = Partition(2);
/// What is stored behind a claim and a barrier, for ever.
const STATE: &str = r#"{"log":{"nonce":10,"partitions":12},"claim":{"epoch":1,"nonce":10},"next_seq":2,"anchor":{"offset":1,"claim":{"epoch":1,"nonce":10},"seq":1},"commands_mark":1}"#;

/// A log under construction: records go in at the next offset.
struct Log {
    reader: CommitReader,
}

impl Log {
    fn new() -> Self {
        Self { reader: CommitReader::new(PARTITION, Checkpoint::default()) }
    }

    fn put(&mut self, content: Content) -> Result<Read, LogDiverged> {
        let offset = self.reader.fold().next();
        self.reader.read(LogRecord { offset, content })
    }

    fn claim(&mut self, epoch: u32, nonce: u64) -> Result<Read, LogDiverged> {
        let claim = Claim {
            owner: "n".into(),
            address: String::new(),
            partitions: 12,
            started_at: DateTime::UNIX_EPOCH,
        };
        self.put(ours(epoch, nonce, 0, Body::Claim(claim)))
    }

    fn barrier(&mut self, epoch: u32, nonce: u64, seq: u64) -> Result<Read, LogDiverged> {
        self.put(ours(epoch, nonce, seq, Body::Barrier))
    }

    /// Event `index` of `count`, of the stream `s-1`, command 1, at version index + 1.
    fn event(
        &mut self,
        claim: (u32, u64),
        seq: u64,
        place: (u16, u16),
    ) -> Result<Read, LogDiverged> {
        self.put(event(claim, seq, place, ("s-1", u64::from(place.0) + 1, 1)))
    }

    /// A log with one accepted claim (1, 10).
    fn claimed() -> Self {
        let mut log = Self::new();
        assert!(matches!(log.claim(1, 10), Ok(Read::Claim(..))));
        log
    }
}

fn ours(epoch: u32, nonce: u64, seq: u64, body: Body) -> Content {
    let claim = ClaimId { epoch: Epoch(epoch), nonce: Nonce(nonce) };
    let stamp = Stamp { claim, seq, commands_mark: Offset(seq) };
    Content::Ours(Record { stamp, body })
}

fn event(
    (epoch, nonce): (u32, u64),
    seq: u64,
    (index, count): (u16, u16),
    (stream, version, command): (&str, u64, u128),
) -> Content {
    let event = RecordedEvent {
        stream: stream.parse().expect("a stream id"),
        version: Version(version),
        position: Position { partition: PARTITION, offset: Offset(0) },
        command_id: CommandId(Uuid::from_u128(command)),
        event_type: "t.v1".into(),
        payload: Arc::from(*b"{}"),
        metadata: Metadata {
            event_id: Uuid::nil(),
            recorded_at: DateTime::UNIX_EPOCH,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        },
    };
    let body = EventBody { index, count, event: Arc::new(event) };
    ours(epoch, nonce, seq, Body::Event(body))
}

fn is_void(read: Result<Read, LogDiverged>, expected: VoidReason) {
    match read {
        Ok(Read::Void(reason)) => assert_eq!(reason, expected),
        other => panic!("not void: {other:?}"),
    }
}

fn commit_of(read: Result<Read, LogDiverged>) -> usize {
    match read {
        Ok(Read::Commit(commit)) => commit.events.len(),
        other => panic!("not a commit: {other:?}"),
    }
}

#[test]
fn a_claim_is_accepted_only_with_the_next_epoch() {
    let mut log = Log::claimed();
    is_void(log.claim(1, 11), VoidReason::LateClaim);
    is_void(log.claim(3, 11), VoidReason::FarClaim);
    assert!(matches!(log.claim(2, 11), Ok(Read::Claim(..))));
    is_void(log.claim(1, 10), VoidReason::LateClaim);
    assert_eq!(log.reader.fold().state().claim.nonce, Nonce(11));
}

#[test]
fn the_identity_of_the_log_is_its_first_claim() {
    let mut log = Log::claimed();
    assert!(matches!(log.claim(2, 11), Ok(Read::Claim(..))));
    let identity = LogIdentity { nonce: Nonce(10), partitions: 12 };
    assert_eq!(log.reader.fold().state().log, Some(identity));
}

#[test]
fn records_count_one_two_three_or_are_void() {
    let mut log = Log::claimed();
    is_void(log.barrier(1, 10, 2), VoidReason::AfterHole);
    assert!(matches!(log.barrier(1, 10, 1), Ok(Read::Barrier(_))));
    is_void(log.barrier(1, 10, 1), VoidReason::Duplicate);
    assert_eq!(commit_of(log.event((1, 10), 2, (0, 1))), 1);
    assert!(matches!(log.claim(2, 11), Ok(Read::Claim(..))));
    is_void(log.event((1, 10), 3, (0, 1)), VoidReason::Superseded);
    assert_eq!(commit_of(log.event((2, 11), 1, (0, 1))), 1);
}

#[test]
fn a_commit_becomes_visible_whole_or_not_at_all() {
    let mut log = Log::claimed();
    assert!(matches!(log.event((1, 10), 1, (0, 3)), Ok(Read::Open(_))));
    is_void(log.put(Content::Foreign), VoidReason::Foreign);
    assert!(matches!(log.event((1, 10), 2, (1, 3)), Ok(Read::Open(_))));
    assert_eq!(commit_of(log.event((1, 10), 3, (2, 3))), 3);

    assert!(matches!(log.event((1, 10), 4, (0, 2)), Ok(Read::Open(_))));
    assert!(matches!(log.claim(2, 11), Ok(Read::Claim(..))), "voids the open commit");
    is_void(log.event((1, 10), 5, (1, 2)), VoidReason::Superseded);
    assert_eq!(commit_of(log.event((2, 11), 1, (0, 1))), 1);
}

#[test]
fn a_log_without_its_claims_has_diverged() {
    let position = Position { partition: PARTITION, offset: Offset(0) };
    assert_eq!(Log::new().barrier(1, 1, 1), Err(LogDiverged::BeforeFirstClaim(position)));
    let mut log = Log::claimed();
    for unknown in [(1, 11), (2, 10), (2, 11)] {
        let read = log.event(unknown, 1, (0, 1));
        assert!(matches!(read, Err(LogDiverged::UnknownClaim { .. })), "{unknown:?}: {read:?}");
    }
}

#[test]
fn a_commit_that_does_not_continue_has_diverged() {
    let next = [
        ("index", event((1, 10), 2, (2, 3), ("s-1", 2, 1))),
        ("count", event((1, 10), 2, (1, 2), ("s-1", 2, 1))),
        ("stream", event((1, 10), 2, (1, 3), ("s-2", 2, 1))),
        ("version", event((1, 10), 2, (1, 3), ("s-1", 3, 1))),
        ("command id", event((1, 10), 2, (1, 3), ("s-1", 2, 2))),
        ("kind (a barrier)", ours(1, 10, 2, Body::Barrier)),
    ];
    for (expected, content) in next {
        let mut log = Log::claimed();
        assert!(matches!(log.event((1, 10), 1, (0, 3)), Ok(Read::Open(_))));
        match log.put(content) {
            Err(LogDiverged::BrokenCommit { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let mut log = Log::claimed();
    let read = log.event((1, 10), 1, (1, 2));
    assert!(matches!(read, Err(LogDiverged::BrokenCommit { field: "index", .. })), "{read:?}");
}

#[test]
fn nothing_malformed_is_skipped() {
    for reason in [Malformed::NewerFormat(2), Malformed::UnknownKind(9)] {
        let mut log = Log::claimed();
        let read = log.put(Content::Malformed(reason.clone()));
        let position = Position { partition: PARTITION, offset: Offset(1) };
        assert_eq!(read, Err(LogDiverged::Malformed { position, reason }));
        assert_eq!(log.reader.fold().next(), Offset(1), "it stays in front of the record");
    }
}

#[test]
fn a_missing_offset_has_diverged() {
    let mut log = Log::claimed();
    let offset = Offset(3);
    let read = log.reader.read(LogRecord { offset, content: Content::Foreign });
    let (partition, expected) = (PARTITION, Offset(1));
    assert_eq!(read, Err(LogDiverged::Hole { partition, expected, found: offset }));
}

#[test]
fn a_checkpoint_stays_before_an_open_commit_with_the_state_there() {
    let mut log = Log::claimed();
    let before = log.reader.fold().checkpoint();
    assert!(matches!(log.event((1, 10), 1, (0, 2)), Ok(Read::Open(_))));
    is_void(log.put(Content::Foreign), VoidReason::Foreign);
    assert_eq!(log.reader.fold().checkpoint(), before);
    let resumed = Checkpoint::from_cursor(&before.to_cursor()).expect("our own");
    assert_eq!(resumed, before);
    let mut again = Log { reader: CommitReader::new(PARTITION, resumed) };
    assert!(matches!(again.event((1, 10), 1, (0, 2)), Ok(Read::Open(_))));
    assert_eq!(commit_of(again.event((1, 10), 2, (1, 2))), 2);
}

#[test]
fn a_cursor_tells_anchor_and_commands_mark_and_refuses_other_text() {
    let mut log = Log::claimed();
    assert!(matches!(log.barrier(1, 10, 1), Ok(Read::Barrier(_))));
    let cursor = log.reader.fold().checkpoint().to_cursor();
    assert_eq!(cursor.state, STATE);
    let bad = Cursor { next: Offset(2), state: "{}".into() };
    let refused = Checkpoint::from_cursor(&bad).expect_err("no state of ours").to_string();
    assert!(refused.contains("offset 2"), "{refused}");
}

#[test]
fn every_stored_cursor_of_the_corpus_gets_its_verdict() {
    corpus::check(corpus::CURSORS, |case, verdict| {
        let (next, change) = case.split_once(' ')?;
        let (old, new) = change.split_once(" -> ")?;
        let state = if old == "*" { new.to_owned() } else { STATE.replace(old, new) };
        let changes = old == "*" || old == new || state != STATE;
        let cursor = Cursor { next: Offset(next.parse().ok()?), state };
        let read = Checkpoint::from_cursor(&cursor);
        let holds = match &read {
            Ok(read) => verdict == "accepted" && read.next == cursor.next,
            Err(refused) => refused.to_string().contains(verdict),
        };
        changes.then(|| corpus::demand(holds, read))?
    });
}

proptest! {
    /// Whatever stands in a database: it is refused, or whoever goes on from it reads without panic.
    #[test]
    fn no_stored_cursor_makes_a_reader_panic(
        next in prop_oneof![Just(2), Just(u64::MAX), any::<u64>()],
        edits in proptest::collection::vec((0..STATE.len(), "[0-9]{0,20}|[\"{},:a-z]"), 0..4),
    ) {
        let mut state = STATE.to_owned();
        for (at, text) in edits {
            let at = at.min(state.len());
            state.replace_range(at..(at + 1).min(state.len()), &text);
        }
        let Ok(place) = Checkpoint::from_cursor(&Cursor { next: Offset(next), state }) else {
            return Ok(());
        };
        prop_assert_eq!(&Checkpoint::from_cursor(&place.to_cursor()).expect("our own"), &place);
        let (claim, seq) = (place.state.claim, place.state.next_seq);
        let mut reader = CommitReader::new(PARTITION, place);
        let record = ours(claim.epoch.0, claim.nonce.0, seq, Body::Barrier);
        let _ = reader.read(LogRecord { offset: Offset(next), content: record });
    }
}

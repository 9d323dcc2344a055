//! What is read of a stream is what was written.

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    StoreUnderTest, commit, exact, new_command, new_stream, read_after, read_all, read_gapless,
    versions,
};
use crate::clock::{IdGenerator, RandomIds};
use crate::event::{Commit, Metadata, NewEvent};

/// No events and no error.
pub async fn an_unknown_stream_reads_empty(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    assert!(read_all(&*store, &stream).await.is_empty());
    assert!(read_after(&*store, &stream, 5).await.is_empty());
}

/// Also in the middle of a commit, at the end and beyond it.
pub async fn reading_starts_behind_the_given_version(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    for version in [0, 3, 6] {
        store.append(&stream, exact(version), commit(3)).await.expect("nobody else writes");
    }
    for after in 0..=10 {
        let read = read_after(&*store, &stream, after).await;
        assert_eq!(versions(&read), (after + 1..=9).collect::<Vec<_>>(), "after {after}");
    }
}

/// Events with everything that a store might lose on the way.
fn awkward_events() -> Vec<NewEvent> {
    let recorded_at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::microseconds(1_735_689_599_999_999);
    let plain = || Metadata {
        event_id: RandomIds.event_id(),
        recorded_at,
        correlation_id: None,
        causation_id: None,
        trace_parent: None,
    };
    let event = |event_type: &str, payload: &str, metadata| NewEvent {
        event_type: event_type.into(),
        payload: payload.as_bytes().into(),
        metadata,
    };
    let told = Metadata {
        correlation_id: Some("request 7 — Grüße, 漢字, 🦀".into()),
        causation_id: Some("order-17:3".into()),
        trace_parent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
        ..plain()
    };
    let half_told = Metadata { correlation_id: Some("only this".into()), ..plain() };
    vec![
        event("contract.told.v1", "{ \"b\" : 1.0,\n\"a\":\"\\u00e9 é 🦀\",  \"b\":1e400 }", told),
        event("contract.half_told.v12", "{}", half_told),
        event("contract.noted.v1", "[18446744073709551615,-0.0,null]", plain()),
        event("contract.noted.v1", "\"\\u0000\"", plain()),
    ]
}

/// Payload bytes are not parsed and printed again; times keep their microseconds, texts their
/// characters, and what is absent stays so.
pub async fn what_was_written_is_read_to_the_byte(harness: &mut dyn StoreUnderTest) {
    let (store, stream, events) = (harness.store(), new_stream(), awkward_events());
    let id = new_command();
    let command = Commit::new(id, events.clone()).expect("a few events");
    let appended = store.append(&stream, exact(0), command).await.expect("is new");
    let read = read_gapless(&*store, &stream, events.len() as u64).await;
    for (written, read) in events.iter().zip(&read) {
        assert_eq!(read.stream, stream);
        assert_eq!(read.command_id, id);
        assert_eq!(read.event_type, written.event_type);
        assert_eq!(
            String::from_utf8_lossy(&read.payload),
            String::from_utf8_lossy(&written.payload)
        );
        assert_eq!(read.metadata, written.metadata);
    }
    assert_eq!(read.last().map(|event| event.position), Some(appended.position));
}

/// Every field of every event, positions included.
pub async fn a_stream_reads_the_same_after_reopening(harness: &mut dyn StoreUnderTest) {
    let stream = new_stream();
    let awkward = Commit::new(new_command(), awkward_events()).expect("a few events");
    harness.store().append(&stream, exact(0), awkward).await.expect("is new");
    harness.store().append(&stream, exact(4), commit(3)).await.expect("is at 4");
    let before = read_gapless(&*harness.store(), &stream, 7).await;
    if !harness.reopen().await {
        return;
    }
    let store = harness.store();
    assert_eq!(read_gapless(&*store, &stream, 7).await, before);
    store.append(&stream, exact(7), commit(1)).await.expect("is at 7");
}

/// Whoever was told that it is written finds it.
pub async fn an_acknowledged_append_is_read_at_once(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    for version in 0..20 {
        let appended = store.append(&stream, exact(version), commit(1)).await.expect("is next");
        let read = read_after(&*store, &stream, version).await;
        assert_eq!(read.last().map(|event| event.position), Some(appended.position));
        assert_eq!(read.len(), 1);
    }
}

//! The in-memory source shared by readers, the in-memory index and the in-memory snapshots. What
//! every store promises is held by the contract suite.

use futures_util::FutureExt;
use kafold_core::index::{Advanced, IndexBatch, IndexLoad};
use kafold_core::memory::{MemoryConfig, MemoryIndex, MemorySnapshots};
use kafold_core::store::{Cursor, SourceMessage, Subscription};
use kafold_core::testing::{advance, commit, exact, new_command, new_stream, versions};
use kafold_core::{
    CommandId, EventSource, EventStore, MemoryStore, Offset, Partition, Position, ReadError,
    RecordedEvent, Snapshot, SnapshotStore, StreamId, StreamIndex, Version,
};

fn store(partitions: u32) -> MemoryStore {
    MemoryStore::new(MemoryConfig { partitions, ..MemoryConfig::default() })
}

async fn next(subscription: &mut Box<dyn Subscription>) -> SourceMessage {
    subscription.next().await.expect("in memory")
}

fn partitions(of: impl IntoIterator<Item = u32>) -> Vec<Partition> {
    of.into_iter().map(Partition).collect()
}

#[tokio::test]
async fn readers_of_one_name_share_the_partitions() {
    let store = store(4);
    let mut one = store.subscribe("readers", None, 10).await.expect("in memory");
    assert_eq!(next(&mut one).await, SourceMessage::Assigned(partitions(0..4)));
    let mut other = store.subscribe("readers", None, 10).await.expect("in memory");
    assert_eq!(next(&mut one).await, SourceMessage::Revoked(partitions([1, 3])));
    assert_eq!(next(&mut other).await, SourceMessage::Assigned(partitions([1, 3])));
    let mut stranger = store.subscribe("strangers", None, 10).await.expect("in memory");
    assert_eq!(next(&mut stranger).await, SourceMessage::Assigned(partitions(0..4)));
    drop(one);
    assert_eq!(next(&mut other).await, SourceMessage::Assigned(partitions([0, 2])));
}

#[tokio::test]
async fn a_revoked_partition_is_delivered_to_its_new_reader_alone() {
    let store = store(2);
    let mut one = store.subscribe("readers", None, 10).await.expect("in memory");
    next(&mut one).await;
    for partition in partitions(0..2) {
        one.start(partition, None).await.expect("the begin is always good");
    }
    let mut other = store.subscribe("readers", None, 10).await.expect("in memory");
    assert_eq!(next(&mut one).await, SourceMessage::Revoked(partitions([1])));
    next(&mut other).await;
    other.start(Partition(1), None).await.expect("the begin is always good");
    let mut ends = [0, 0];
    while ends.contains(&0) {
        let appended = store.append(&new_stream(), exact(0), commit(1)).await.expect("is new");
        ends[appended.position.partition.0 as usize] += 1;
    }
    for (reader, partition) in [(&mut one, 0), (&mut other, 1)] {
        let mut seen = 0;
        while seen < ends[partition as usize] {
            let SourceMessage::Batch(batch) = next(reader).await else { panic!("no batch") };
            assert_eq!(batch.partition, Partition(partition));
            seen += batch.events.len();
        }
        let more = next(reader).now_or_never();
        assert_eq!(more, None, "everything of its own has come, and nothing else does");
    }
}

#[tokio::test]
async fn a_cursor_beyond_the_log_is_refused() {
    let store = store(1);
    let stream = new_stream();
    store.append(&stream, exact(0), commit(2)).await.expect("is new");
    let mut reader = store.subscribe("reader", None, 10).await.expect("in memory");
    next(&mut reader).await;
    reader.start(Partition(0), None).await.expect("the begin is always good");
    let SourceMessage::Batch(batch) = next(&mut reader).await else { panic!("no batch") };
    let beyond = Cursor { next: Offset(3), ..batch.next };
    let refused = reader.start(Partition(0), Some(beyond)).await;
    assert!(matches!(refused, Err(ReadError::Diverged { .. })), "{refused:?}");
}

/// Events of one command each, at offsets from `offset` on.
fn events(stream: &StreamId, first_version: u64, offset: u64, count: u64) -> Vec<RecordedEvent> {
    let new = kafold_core::testing::event(0);
    (0..count)
        .map(|n| RecordedEvent {
            stream: stream.clone(),
            version: Version(first_version + n),
            position: position(offset + n),
            command_id: CommandId::derived(uuid::Uuid::nil(), &(offset + n).to_be_bytes()),
            event_type: new.event_type.clone(),
            payload: new.payload.clone(),
            metadata: new.metadata.clone(),
        })
        .collect()
}

fn position(offset: u64) -> Position {
    Position { partition: Partition(0), offset: Offset(offset) }
}

fn batch(from: u64, to: u64, events: Vec<RecordedEvent>) -> IndexBatch {
    let to = Cursor { next: Offset(to), state: format!("at {to}") };
    IndexBatch { partition: Partition(0), from: Offset(from), to, events }
}

async fn load(
    index: &MemoryIndex,
    stream: &StreamId,
    after: u64,
    limit: usize,
) -> (Vec<u64>, bool) {
    let (partition, stream) = (Partition(0), stream.clone());
    let request = IndexLoad { partition, stream, after: Version(after) };
    let read = index.load(&[request], limit).await.remove(0).expect("in memory");
    (versions(&read.events), read.more)
}

#[tokio::test]
async fn the_index_answers_streams_and_commands_as_far_as_it_stands() {
    let (index, stream) = (MemoryIndex::new(), new_stream());
    let fed = events(&stream, 1, 5, 3);
    let last = fed[2].clone();
    assert_eq!(advance(&index, batch(0, 9, fed)).await.expect("fits"), Advanced::Moved);
    assert_eq!(load(&index, &stream, 0, 10).await, (vec![1, 2, 3], false));
    assert_eq!(load(&index, &stream, 1, 1).await, (vec![2], true));
    assert_eq!(load(&index, &stream, 3, 10).await, (vec![], false));
    assert_eq!(load(&index, &new_stream(), 0, 10).await, (vec![], false));
    let found = index.find_command(Partition(0), &stream, last.command_id).await;
    let (standing, found) = found.expect("in memory");
    let found = found.expect("was fed");
    assert_eq!(standing, Offset(9));
    assert_eq!((found.version, found.position), (last.version, last.position));
    let unknown = index.find_command(Partition(0), &stream, new_command()).await;
    assert_eq!(unknown.expect("in memory"), (Offset(9), None));
}

#[tokio::test]
async fn feeding_the_index_again_changes_nothing() {
    let (index, stream) = (MemoryIndex::new(), new_stream());
    let fed = events(&stream, 1, 0, 4);
    advance(&index, batch(0, 4, fed.clone())).await.expect("fits");
    advance(&index, batch(0, 2, fed[..2].to_vec())).await.expect("is there already");
    assert_eq!(load(&index, &stream, 0, 10).await, (vec![1, 2, 3, 4], false));
    let cursor = Cursor { next: Offset(4), state: "at 4".into() };
    assert_eq!(index.cursors().await.expect("in memory"), [(Partition(0), cursor)]);
}

#[tokio::test]
async fn the_index_takes_no_batch_behind_a_gap() {
    let (index, stream) = (MemoryIndex::new(), new_stream());
    let behind = advance(&index, batch(1, 2, events(&stream, 1, 1, 1))).await.expect("no error");
    assert_eq!(behind, Advanced::Behind(None));
    advance(&index, batch(0, 1, events(&stream, 1, 0, 1))).await.expect("fits");
    let behind = advance(&index, batch(2, 3, events(&stream, 2, 2, 1))).await.expect("no error");
    let cursor = Cursor { next: Offset(1), state: "at 1".into() };
    assert_eq!(behind, Advanced::Behind(Some(cursor)));
    assert_eq!(load(&index, &stream, 0, 10).await, (vec![1], false));
}

#[tokio::test]
async fn the_index_refuses_what_contradicts_it_and_keeps_nothing_of_it() {
    let (index, stream) = (MemoryIndex::new(), new_stream());
    advance(&index, batch(0, 2, events(&stream, 1, 0, 2))).await.expect("fits");
    let elsewhere = events(&stream, 2, 3, 2);
    let skipping = events(&stream, 4, 2, 1);
    for contradiction in [elsewhere, skipping] {
        let refused = advance(&index, batch(2, 9, contradiction)).await;
        assert!(matches!(refused, Err(ReadError::Diverged { .. })), "{refused:?}");
    }
    assert_eq!(load(&index, &stream, 0, 10).await, (vec![1, 2], false));
    assert_eq!(index.cursors().await.expect("in memory")[0].1.next, Offset(2));
}

#[tokio::test]
async fn the_newest_snapshot_of_a_schema_is_kept() {
    let (snapshots, stream) = (MemorySnapshots::new(), new_stream());
    let snapshot = |version: u64, schema: &str| Snapshot {
        stream: stream.clone(),
        version: Version(version),
        schema: schema.into(),
        state: vec![],
        recent_commands: vec![],
    };
    let kept = async || {
        let found = snapshots.load(&stream).await.expect("in memory").expect("was saved");
        (found.version.0, found.schema)
    };
    snapshots.save(&snapshot(5, "one")).await.expect("in memory");
    snapshots.save(&snapshot(4, "one")).await.expect("in memory");
    assert_eq!(kept().await, (5, "one".into()));
    snapshots.save(&snapshot(4, "two")).await.expect("in memory");
    assert_eq!(kept().await, (4, "two".into()));
    snapshots.clear();
    assert_eq!(snapshots.load(&stream).await.expect("in memory"), None);
}

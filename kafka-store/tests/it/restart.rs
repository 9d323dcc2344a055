//! Restarts, two stores on one log, and an index that is slow, down or lost.

use crate::support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::TryStreamExt;
use kafold_core::digest::BucketDigests;
use kafold_core::index::{
    Advanced, IndexBatch, IndexCount, IndexHeads, IndexLoad, IndexRead, SavedDigests,
};
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Appended, Cursor, Health};
use kafold_core::testing::{
    commit, commit_of, eventually, exact, new_command, read_gapless, submit,
};
use kafold_core::{
    AppendError, CommandId, EventStore, ExpectedVersion, Offset, Partition, ReadError, StreamId,
    StreamIndex, Version,
};
use kafold_kafka_store::KafkaStore;

fn stream(id: &str) -> StreamId {
    StreamId::new("order", id).expect("valid")
}

/// An index that can be lost and be down, and that remembers what it was fed.
#[derive(Default)]
struct TestIndex {
    inner: Mutex<Arc<MemoryIndex>>,
    down: AtomicBool,
    /// The heads are not answered.
    heads_wait: AtomicBool,
    batches: Mutex<Vec<(Partition, Offset, usize)>>,
    saved: Mutex<HashMap<Partition, SavedDigests>>,
}

impl TestIndex {
    fn inner(&self) -> Result<Arc<MemoryIndex>, ReadError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(ReadError::unavailable(Duration::from_millis(10), "the test says so"));
        }
        Ok(Arc::clone(&self.inner.lock().expect("no panic")))
    }

    fn lose_everything(&self) {
        *self.inner.lock().expect("no panic") = Arc::new(MemoryIndex::new());
    }

    fn batches(&self) -> Vec<(Partition, Offset, usize)> {
        std::mem::take(&mut self.batches.lock().expect("no panic"))
    }
}

#[async_trait]
impl StreamIndex for TestIndex {
    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
        self.inner()?.cursors().await
    }

    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
        let inner = match self.inner() {
            Ok(inner) => inner,
            Err(down) => return batches.iter().map(|_| Err(down.clone())).collect(),
        };
        let told = batches.iter().map(|batch| (batch.partition, batch.from, batch.events.len()));
        self.batches.lock().expect("no panic").extend(told);
        inner.advance(batches).await
    }

    async fn load(
        &self,
        requests: &[IndexLoad],
        limit: usize,
    ) -> Vec<Result<IndexRead, ReadError>> {
        match self.inner() {
            Ok(inner) => inner.load(requests, limit).await,
            Err(error) => requests.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn heads(&self, partition: Partition) -> Result<IndexHeads, ReadError> {
        if self.heads_wait.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.inner()?.heads(partition).await
    }

    async fn saved_digests(&self, partition: Partition) -> Result<Option<SavedDigests>, ReadError> {
        Ok(self.saved.lock().expect("no panic").get(&partition).cloned())
    }

    async fn save_digests(
        &self,
        partition: Partition,
        at: &Cursor,
        digests: &BucketDigests,
    ) -> Result<(), ReadError> {
        let (at, digests) = (at.clone(), digests.clone());
        let saved = SavedDigests { at, digests, events: u64::MAX };
        self.saved.lock().expect("no panic").insert(partition, saved);
        Ok(())
    }

    async fn count(&self) -> Result<Vec<IndexCount>, ReadError> {
        self.inner()?.count().await
    }

    async fn find_command(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<(Offset, Option<Appended>), ReadError> {
        self.inner()?.find_command(partition, stream, command_id).await
    }
}

/// How many events of the stream the index itself has.
async fn indexed(index: &TestIndex, partition: Partition, stream: &StreamId) -> usize {
    let load = IndexLoad { partition, stream: stream.clone(), after: Version::EMPTY };
    let reads = index.load(&[load], 10_000).await.into_iter();
    reads.map(|read| read.expect("the index is up").events.len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn saved_digests_spare_the_next_owner_the_heads() {
    let Some(brokers) = support::brokers("saved_digests_spare_the_next_owner_the_heads") else {
        return;
    };
    let config = support::config(&brokers, &support::new_name("saved"), "partitions=1");
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config.clone(), index.clone(), "first").await;
    support::ready(&store).await;
    for version in 0..20 {
        store.append(&stream("a"), exact(version), commit(1)).await.expect("is next");
    }
    // Until the heads are compared there is nothing to save.
    read_gapless(&store, &stream("a"), 20).await;
    store.shutdown().await;
    let saved = index.saved.lock().expect("no panic")[&Partition(0)].clone();
    assert_eq!(saved.at.next, Offset(21), "a claim and twenty events");

    index.heads_wait.store(true, Ordering::SeqCst);
    let store = support::open_with(config.clone(), index.clone(), "second").await;
    support::ready(&store).await;
    store.append(&stream("a"), exact(20), commit(1)).await.expect("is at 20");
    read_gapless(&store, &stream("a"), 21).await;
    index.heads_wait.store(false, Ordering::SeqCst);
    store.shutdown().await;

    // A position below the index's: the log is read from there, and nothing is fed twice.
    *index.saved.lock().expect("no panic").get_mut(&Partition(0)).expect("saved") = saved.clone();
    index.batches();
    index.heads_wait.store(true, Ordering::SeqCst);
    let store = support::open_with(config.clone(), index.clone(), "third").await;
    support::ready(&store).await;
    read_gapless(&store, &stream("a"), 21).await;
    store.append(&stream("a"), exact(21), commit(1)).await.expect("is at 21");
    eventually("the index has it", async || {
        index.batches.lock().expect("no panic").iter().map(|(.., events)| events).sum::<usize>()
            == 1
    })
    .await;
    index.heads_wait.store(false, Ordering::SeqCst);
    store.shutdown().await;

    // Digests of another log are none.
    let other = |state: &str| state.replace("\"partitions\":1", "\"partitions\":2");
    let mut foreign = saved;
    foreign.at.state = other(&foreign.at.state);
    foreign.digests = BucketDigests::default();
    index.saved.lock().expect("no panic").insert(Partition(0), foreign);
    let store = support::open_with(config, index, "fourth").await;
    support::ready(&store).await;
    read_gapless(&store, &stream("a"), 22).await;
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_replays_only_from_the_position_of_the_index() {
    let Some(brokers) = support::brokers("a_restart_replays_only_from_the_index") else { return };
    let config = support::config(&brokers, &support::new_name("restart"), "partitions=1");
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config.clone(), index.clone(), "first").await;
    support::ready(&store).await;
    for version in 0..20 {
        store.append(&stream("a"), exact(version), commit(1)).await.expect("is next");
    }
    store.shutdown().await;
    let at = index.cursors().await.expect("up")[0].1.next;
    assert_eq!(at, Offset(21), "a claim and twenty events");
    index.batches();

    let store = support::open_with(config, index.clone(), "second").await;
    support::ready(&store).await;
    let appended = store.append(&stream("a"), exact(20), commit(1)).await.expect("is at 20");
    read_gapless(&store, &stream("a"), 21).await;
    store.shutdown().await;
    let fed = index.batches();
    assert!(fed.iter().all(|(_, from, _)| *from >= at), "{fed:?} begins at {at}");
    assert_eq!(fed.iter().map(|(.., events)| events).sum::<usize>(), 1, "{fed:?}");
    assert!(appended.position.offset >= at);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_claims_later_wins_every_partition_and_the_one_before_says_who() {
    let Some(brokers) = support::brokers("who_claims_later_wins") else { return };
    let config = support::config(&brokers, &support::new_name("two"), "partitions=3");
    let config = support::contender(&config);
    let older = support::open(config.clone(), "older").await;
    let streams: Vec<_> = (0..12).map(|id| stream(&id.to_string())).collect();
    for stream in &streams {
        older.append(stream, exact(0), commit(1)).await.expect("is new");
    }
    let newer = support::open(config, "newer").await;
    for stream in &streams {
        newer.append(stream, exact(1), commit(1)).await.expect("is at 1");
        // It may not know yet; then its append is void and it must not say otherwise.
        let answer = match older.append(stream, exact(1), commit(1)).await {
            Err(AppendError::NotAppended { .. }) => older.append(stream, exact(1), commit(1)).await,
            other => other,
        };
        match answer {
            Err(AppendError::NotOwner { owner, .. }) => {
                let owner = owner.expect("the claim says who");
                assert_eq!((&*owner.name, &*owner.address), ("newer", "newer.test:8080"));
            }
            other => panic!("the superseded store answered {other:?}"),
        }
        newer.append(stream, exact(2), commit(1)).await.expect("is at 2");
        read_gapless(&newer, stream, 3).await;
    }
    let Health::NotReady(reasons) = older.health() else { panic!("it owns nothing") };
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    let named = "superseded by newer at newer.test:8080";
    assert!(reasons.iter().all(|reason| reason.contains(named)), "{reasons:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_store_notices_by_itself_that_it_was_superseded() {
    let Some(brokers) = support::brokers("an_idle_store_notices_by_itself") else { return };
    let config = support::config(&brokers, &support::new_name("idle"), "partitions=2");
    let config = support::contender(&config);
    let older = support::open(config.clone(), "older").await;
    let _newer = support::open(config, "newer").await;
    support::until("the older store says so", || match older.health() {
        Health::NotReady(reasons) if reasons.iter().all(|r| r.contains("newer")) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_store_acknowledges_nothing_that_is_not_in_the_log() {
    let Some(brokers) = support::brokers("a_superseded_store_acknowledges_nothing") else { return };
    let config = support::config(&brokers, &support::new_name("race"), "partitions=1");
    let config = support::contender(&config);
    let older = Arc::new(support::open(config.clone(), "older").await);
    // The older one writes all the time while the newer one takes over.
    let writing = {
        let older = Arc::clone(&older);
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            loop {
                let id = new_command();
                let (_, outcome) =
                    submit(&*older, &stream("r"), ExpectedVersion::Any, commit_of(id, 1), None);
                match outcome.await {
                    Ok(appended) => acknowledged.push((id, appended)),
                    Err(AppendError::NotOwner { .. }) => return acknowledged,
                    Err(AppendError::NotAppended { .. } | AppendError::OutcomeUnknown { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    };
    let newer = support::open(config, "newer").await;
    let appended =
        newer.append(&stream("r"), ExpectedVersion::Any, commit(1)).await.expect("owns it");
    let acknowledged = writing.await.expect("no panic");
    assert!(!acknowledged.is_empty(), "it owned the partition at first");
    let events = read_gapless(&newer, &stream("r"), appended.version.0).await;
    for (id, appended) in acknowledged {
        let at = events.iter().find(|event| event.version == appended.version);
        let at = at.map(|event| (event.command_id, event.position));
        assert_eq!(at, Some((id, appended.position)), "acknowledged, so in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_alone_does_not_stay_behind_in_the_index() {
    let Some(brokers) = support::brokers("a_claim_alone_does_not_stay_behind") else { return };
    let config = support::config(&brokers, &support::new_name("claim"), "partitions=1");
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config, index.clone(), "claims").await;
    support::ready(&store).await;
    support::until("the index has passed the claim", || {
        let fed = index.batches.lock().expect("no panic");
        let passed = *fed == [(Partition(0), Offset(0), 0)];
        if passed { Ok(()) } else { Err(format!("fed {fed:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_index_is_fed_again_from_the_log() {
    let Some(brokers) = support::brokers("a_lost_index_is_fed_again") else { return };
    let config = support::config(&brokers, &support::new_name("lost"), "partitions=1");
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config, index.clone(), "feeds").await;
    support::ready(&store).await;
    for version in 0..50 {
        store.append(&stream("l"), exact(version), commit(1)).await.expect("is next");
    }
    wait_indexed(&index, 50).await;
    index.lose_everything();
    // Nothing is missing meanwhile: either it is all there or the store says that it cannot tell.
    let appended = store.append(&stream("l"), exact(50), commit(1)).await.expect("is at 50");
    assert_eq!(appended.version, Version(51));
    wait_indexed(&index, 51).await;
    read_gapless(&store, &stream("l"), 51).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_lost_while_nothing_is_appended_is_fed_again_for_a_reader() {
    let Some(brokers) = support::brokers("an_index_that_is_lost_while_nothing") else { return };
    let config = support::config(&brokers, &support::new_name("idle-lost"), "partitions=1");
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config, index.clone(), "idle-lost").await;
    support::ready(&store).await;
    store.append(&stream("l"), ExpectedVersion::NoStream, commit(3)).await.expect("is new");
    wait_indexed(&index, 3).await;
    let read = async || {
        let events = store.read(&stream("l"), Version::EMPTY);
        events.map_ok(|event| event.version.0).try_collect::<Vec<_>>().await
    };
    index.down.store(true, Ordering::SeqCst);
    eventually("nothing is left in the tail", async || read().await.is_err()).await;
    index.lose_everything();
    index.down.store(false, Ordering::SeqCst);

    let refused = read().await.expect_err("the index has nothing");
    assert!(matches!(refused, ReadError::Unavailable { .. }), "{refused}");
    eventually("it is fed again", async || read().await.is_ok_and(|read| read == [1, 2, 3])).await;
    store.shutdown().await;
}

#[expect(clippy::disallowed_methods, reason = "a deadline for a condition")]
async fn wait_indexed(index: &TestIndex, events: usize) {
    let deadline = std::time::Instant::now() + support::WAIT_MAX;
    while indexed(index, Partition(0), &stream("l")).await < events {
        assert!(std::time::Instant::now() < deadline, "{events} events are not indexed");
        support::pause().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_index_is_down_commands_go_on_until_the_tail_is_full() {
    let Some(brokers) = support::brokers("while_the_index_is_down") else { return };
    let mut config = support::config(&brokers, &support::new_name("down"), "partitions=1");
    config.limits.tail_events_max = 20;
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config, index.clone(), "waits").await;
    support::ready(&store).await;
    store.append(&stream("l"), exact(0), commit(1)).await.expect("is new");
    wait_indexed(&index, 1).await;
    index.down.store(true, Ordering::SeqCst);
    let mut version = 1;
    let refused = loop {
        match store.append(&stream("l"), exact(version), commit(1)).await {
            Ok(appended) => version = appended.version.0,
            Err(error) => break error,
        }
        assert!(version < 100, "the tail is bounded");
    };
    assert!(matches!(refused, AppendError::Unavailable { .. }), "{refused}");
    assert!(version > 10, "{version}: the known stream goes on without the index");
    let unknown = read(&store, "unknown").await.expect_err("only the index knows");
    assert!(matches!(unknown, ReadError::Unavailable { .. }), "{unknown}");
    support::until("the reason is told", || match store.health() {
        Health::NotReady(reasons) if reasons[0].contains("the test says so") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    index.down.store(false, Ordering::SeqCst);
    support::ready(&store).await;
    let command = commit(1);
    support::settle(&store, &stream("l"), exact(version), &command).await;
    read_gapless(&store, &stream("l"), version + 1).await;
}

async fn read(store: &KafkaStore, id: &str) -> Result<usize, ReadError> {
    use futures_util::TryStreamExt;
    let events: Vec<_> = store.read(&stream(id), Version::EMPTY).try_collect().await?;
    Ok(events.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_down_at_start_is_waited_for() {
    let Some(brokers) = support::brokers("an_index_that_is_down_at_start") else { return };
    let config = support::config(&brokers, &support::new_name("late"), "partitions=12");
    let index = Arc::new(TestIndex::default());
    index.down.store(true, Ordering::SeqCst);
    let store = support::open_with(config, index.clone(), "waits").await;
    support::until("the reason is told", || match store.health() {
        Health::NotReady(reasons) if reasons[0].contains("the test says so") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    index.down.store(false, Ordering::SeqCst);
    support::ready(&store).await;
    store.append(&stream("x"), exact(0), commit(1)).await.expect("is new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stream_is_read_in_pages() {
    let Some(brokers) = support::brokers("a_long_stream_is_read_in_pages") else { return };
    let mut config = support::config(&brokers, &support::new_name("pages"), "partitions=1");
    config.limits.page_events_max = 7;
    config.limits.index_batch_events_max = 5;
    let index = Arc::new(TestIndex::default());
    let store = support::open_with(config.clone(), index.clone(), "first").await;
    support::ready(&store).await;
    for version in 0..50 {
        store.append(&stream("l"), exact(version * 2), commit(2)).await.expect("is next");
    }
    read_gapless(&store, &stream("l"), 100).await;
    store.shutdown().await;
    assert_eq!(indexed(&index, Partition(0), &stream("l")).await, 100, "handed over at the end");
    // Nothing in the tail: all pages are the index's.
    let store = support::open_with(config, index, "second").await;
    read_gapless(&store, &stream("l"), 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_dropped_without_a_stop_hangs_nothing_and_loses_nothing() {
    let Some(brokers) = support::brokers("a_store_dropped_without_a_stop") else { return };
    let config = support::config(&brokers, &support::new_name("dropped"), "partitions=1");
    let store = support::open(config.clone(), "dropped").await;
    for version in 0..10 {
        store.append(&stream("d"), exact(version), commit(1)).await.expect("is next");
    }
    let (_, left) = submit(&store, &stream("d"), exact(10), commit(1), None);
    drop(store);
    // Whatever became of it, it is answered.
    if let Err(error) = left.await {
        let definite = AppendError::OutcomeUnknown { command_id: new_command() };
        assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&definite), "{error}");
    }
    let store = support::open(config, "next").await;
    let events = read(&store, "d").await.expect("readable");
    assert!(events >= 10, "{events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_store_says_so_and_answers_at_once() {
    let Some(brokers) = support::brokers("a_closed_store_says_so") else { return };
    let config = support::config(&brokers, &support::new_name("closed"), "partitions=2");
    let older = support::open(config.clone(), "older").await;
    let newer = support::open(config, "newer").await;
    // A superseded one has nothing to settle.
    for store in [older, newer] {
        store.shutdown().await;
        support::until("it is closed", || match store.health() {
            Health::NotReady(reasons) if reasons[0] == "the store is closed" => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        let refused = store.append(&stream("c"), exact(0), commit(1)).await;
        assert!(matches!(refused, Err(AppendError::Unavailable { .. })), "{refused:?}");
    }
}

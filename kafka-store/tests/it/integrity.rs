//! A log that is not what it was is refused by name, by whoever comes to it with a position of before: the
//! store with its index, and every reader with its cursor. Nothing is reset, nothing is written.

use crate::support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kafold_core::clock::RandomIds;
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Cursor, Health, SourceMessage};
use kafold_core::testing::{commit, exact};
use kafold_core::{EventSource, EventStore, Partition, ReadError, StreamId, StreamIndex};
use kafold_kafka_store::{Assignment, KafkaConfig, KafkaSource, KafkaStore, OpenError};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminOptions, AlterConfig, NewPartitions, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders, OwnedMessage};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use support::Cluster;

fn stream() -> StreamId {
    StreamId::new("order", "1").expect("valid")
}

/// A log of one claim and so many events, all of them read and indexed by somebody.
struct Log {
    brokers: String,
    topic: String,
    config: KafkaConfig,
    index: Arc<MemoryIndex>,
    /// Where a reader stands who has read all of it.
    cursor: Cursor,
    records: Vec<OwnedMessage>,
}

impl Log {
    async fn of(brokers: String, name: &str, events: u64) -> Self {
        let name = support::new_name(name);
        let mut config = support::config(&brokers, &name, "");
        config.assignment = Assignment::Everything;
        config.limits.low_end_patience = Duration::from_millis(100);
        let index = Arc::new(MemoryIndex::new());
        let topic = config.events_topic();
        support::restore(&brokers, &topic, &[]).await;
        let store = support::open_with(config.clone(), index.clone(), "before").await;
        support::ready(&store).await;
        append(&store, 0, events).await;
        store.shutdown().await;
        let records = support::raw_records(&brokers, &topic);
        assert_eq!(records.len() as u64, 1 + events, "a claim and the events");
        let mut log = Self {
            brokers,
            topic,
            config,
            index,
            cursor: Cursor { next: kafold_core::Offset(0), state: String::new() },
            records,
        };
        log.cursor = log.read().await.expect("nothing has happened to it yet");
        assert_eq!(log.cursor.next.0, 1 + events);
        log
    }

    /// Reads the log as it is now from the beginning to its end.
    async fn read(&self) -> Result<Cursor, ReadError> {
        let source = KafkaSource::open(self.config.clone(), support::clock()).await;
        let source = source.unwrap_or_else(|error| panic!("{error}"));
        let mut subscription = source.subscribe("reads", None, 10).await?;
        subscription.start(Partition(0), None).await?;
        loop {
            match in_time(subscription.next()).await? {
                SourceMessage::Batch(batch) if batch.next.next == batch.end => {
                    return Ok(batch.next);
                }
                _ => {}
            }
        }
    }

    /// The topic is deleted, and another one of these records takes its place.
    async fn replace(&self, records: &[OwnedMessage]) {
        support::delete_topic(&self.brokers, &self.topic).await;
        support::restore(&self.brokers, &self.topic, records).await;
    }

    /// Somebody else, who knows nothing of before, writes on.
    async fn write_on(&self, from: u64, events: u64) {
        let other = support::open(self.config.clone(), "other").await;
        append(&other, from, events).await;
        other.shutdown().await;
    }

    /// First and next offset.
    fn ends(&self) -> (i64, i64) {
        let client: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", &self.brokers).create().expect("a client");
        client.fetch_watermarks(&self.topic, 0, support::WAIT_MAX).expect("an answer")
    }

    async fn open_with(&self, config: KafkaConfig) -> Result<KafkaStore, OpenError> {
        let owner = support::owner("after");
        let (clock, ids) = (support::clock(), Arc::new(RandomIds));
        KafkaStore::open(config, self.index.clone(), owner, clock, ids).await
    }

    async fn try_open(&self, index: Arc<MemoryIndex>) -> Result<KafkaStore, String> {
        let (config, owner) = (self.config.clone(), support::owner("after"));
        let opened =
            KafkaStore::open(config, index, owner, support::clock(), Arc::new(RandomIds)).await;
        opened.map_err(|error| {
            assert!(!error.is_transient(), "waiting does not help: {error}");
            error.to_string()
        })
    }

    /// A reader that comes with its cursor.
    async fn resume(&self) -> Result<SourceMessage, ReadError> {
        let source = KafkaSource::open(self.config.clone(), support::clock()).await;
        let source = source.unwrap_or_else(|error| panic!("{error}"));
        let mut subscription = source.subscribe("reads", None, 10).await?;
        subscription.start(Partition(0), Some(self.cursor.clone())).await?;
        in_time(subscription.next()).await
    }

    /// Index and reader, both with their position of before, are told so by name; neither they nor the log
    /// are changed by it.
    async fn is_refused(&self, words: &[&str]) {
        let (ends, place) = (self.ends(), self.index.cursors().await.expect("in memory"));
        let opened = self.try_open(self.index.clone()).await;
        says(&opened.err().expect("the store is refused"), &self.topic, words);
        match self.resume().await {
            Err(error @ ReadError::Diverged { .. }) => says(&error.to_string(), &self.topic, words),
            other => panic!("the reader is not refused: {other:?}"),
        }
        assert_eq!(self.ends(), ends, "nothing is written");
        assert_eq!(self.index.cursors().await.expect("in memory"), place, "nothing is reset");
    }
}

async fn append(store: &KafkaStore, from: u64, events: u64) {
    for version in from..from + events {
        store.append(&stream(), exact(version), commit(1)).await.expect("is next");
    }
}

/// The next message of a log in which something is to happen.
async fn in_time<T>(message: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(support::WAIT_MAX, message).await;
    waited.expect("neither a message nor an error in time")
}

#[track_caller]
fn says(text: &str, topic: &str, words: &[&str]) {
    for word in words.iter().chain(&[topic]) {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

/// The health of a store that has halted for good, in one text.
async fn halted(store: &KafkaStore, words: &[&str]) -> String {
    support::until("the store halts by name", || match store.health() {
        Health::NotReady(reasons) if words.iter().all(|word| reasons[0].contains(word)) => {
            Ok(reasons[0].clone())
        }
        other => Err(format!("{other:?}")),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn records_deleted_from_the_front_are_missed_by_everybody() {
    let Some(brokers) = support::brokers("records_deleted_from_the_front") else { return };
    let log = Log::of(brokers, "trimmed", 5).await;
    let mut before = TopicPartitionList::new();
    before.add_partition_offset(&log.topic, 0, Offset::Offset(3)).expect("valid");
    let options = AdminOptions::new().operation_timeout(Some(support::WAIT_MAX));
    support::admin(&log.brokers).delete_records(&before, &options).await.expect("deleted");
    assert_eq!(log.ends(), (3, 6));
    let words = ["/0 was trimmed", "begins at offset 3", "retention.ms=-1", "Restore the topic"];
    log.is_refused(&words).await;
    // Also without any position of before.
    let fresh = log.try_open(Arc::new(MemoryIndex::new())).await;
    says(&fresh.err().expect("refused"), &log.topic, &words);
    let fresh = log.read().await.expect_err("refused");
    says(&fresh.to_string(), &log.topic, &words);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_ends_below_what_was_read_is_truncated() {
    let Some(brokers) = support::brokers("a_log_that_ends_below") else { return };
    let log = Log::of(brokers, "truncated", 5).await;
    log.replace(&log.records[..4]).await;
    log.is_refused(&["was truncated", "ends at offset 4", "below 6", "rebuild"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_was_made_anew_is_another_log_even_while_it_is_empty() {
    let Some(brokers) = support::brokers("a_topic_that_was_made_anew") else { return };
    let log = Log::of(brokers, "anew", 5).await;
    log.replace(&[]).await;
    log.is_refused(&["was recreated", "first claim is absent", "another database"]).await;
    log.write_on(0, 9).await;
    log.is_refused(&["was recreated", "first claim is", "another database"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_is_recognised_at_the_same_length_and_beyond() {
    let Some(brokers) = support::brokers("an_older_copy_is_recognised") else { return };
    let log = Log::of(brokers, "older", 5).await;
    log.replace(&log.records[..4]).await;
    // A claim and one event: as long as before, with other contents.
    log.write_on(3, 1).await;
    assert_eq!(log.ends(), (0, 6));
    let words = ["an older copy", "at offset 5", "Restore the newer copy", "rebuild"];
    log.is_refused(&words).await;
    log.write_on(4, 3).await;
    log.is_refused(&words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_copy_is_the_same_log() {
    let Some(brokers) = support::brokers("a_whole_copy_is_the_same_log") else { return };
    let log = Log::of(brokers, "whole", 5).await;
    log.replace(&log.records).await;
    let store = log.try_open(log.index.clone()).await.unwrap_or_else(|error| panic!("{error}"));
    support::ready(&store).await;
    append(&store, 5, 1).await;
    let SourceMessage::Assigned(_) = log.resume().await.expect("its cursor is good") else {
        panic!("it is assigned everything first");
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_were_added_are_refused_by_readers_too() {
    let Some(brokers) = support::brokers("partitions_that_were_added") else { return };
    let log = Log::of(brokers, "grown", 5).await;
    let grown = NewPartitions::new(&log.topic, 3);
    let options = AdminOptions::new().operation_timeout(Some(support::WAIT_MAX));
    support::admin(&log.brokers).create_partitions([&grown], &options).await.expect("grown");
    log.is_refused(&[
        "was repartitioned",
        "3 partitions",
        "begun with 1",
        "allow_unsafe=partitions",
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_loses_events_is_refused_by_readers_too() {
    let Some(brokers) = support::brokers("a_policy_that_loses_events") else { return };
    let log = Log::of(brokers, "policy", 5).await;
    for (setting, value, safe) in
        [("retention.ms", "1000", "-1"), ("cleanup.policy", "compact", "delete")]
    {
        let topic = ResourceSpecifier::Topic(&log.topic);
        // Nothing is old or unique enough to be lost before the next line is over.
        let alter = AlterConfig::new(topic).set("retention.ms", "-1").set(setting, value);
        let admin = support::admin(&log.brokers);
        admin.alter_configs([&alter], &AdminOptions::new()).await.expect("altered");
        let remedy = format!("--add-config {setting}={safe}");
        let words = [&*log.topic, setting, value, &remedy];
        support::until_refused(log.config.clone(), |config| log.open_with(config), &words).await;
        let source = KafkaSource::open(log.config.clone(), support::clock()).await;
        says(&source.err().expect("refused").to_string(), &log.topic, &words);
    }
    assert_eq!(log.ends(), (0, 6), "nothing is written");
}

/// The records with one more byte changed in the header `kf` of one of them.
fn flipped(records: &[OwnedMessage], at: usize, byte: usize, bit: u8) -> Vec<OwnedMessage> {
    let mut records = records.to_vec();
    let record = &records[at];
    let mut headers = OwnedHeaders::new();
    for header in record.headers().expect("ours has headers").iter() {
        let mut value = header.value.unwrap_or_default().to_vec();
        if header.key == "kf" {
            value[byte] ^= 1 << bit;
        }
        headers = headers.insert(Header { key: header.key, value: Some(&value) });
    }
    records[at] = record.clone().replace_headers(Some(headers));
    records
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_halts_store_and_readers_at_its_position() {
    let Some(brokers) = support::brokers("a_flipped_bit_halts") else { return };
    let log = Log::of(brokers, "flipped", 5).await;
    // Which byte and bit of the header, and what is said of it.
    let flips = [
        (0, 1, "format 3 is newer"),
        (0, 0, "begins with 0"),
        (1, 0, "which a barrier cannot have"),
        (1, 7, "kind 130"),
        (5, 1, "was written under the claim"),
        (13, 0, "was written under the claim"),
        (29, 0, "version is"),
        (31, 0, "index is 1"),
        (33, 0, "index is 0"),
        (33, 1, "breaks the commit that is open"),
        (22, 7, "version is"),
    ];
    for (byte, bit, words) in flips {
        // Of the event of version 1, at offset 1; that behind is as it was.
        log.replace(&flipped(&log.records, 1, byte, bit)).await;
        let position = if (byte, bit) == (33, 1) { "0:2" } else { "0:1" };
        let read = log.read().await.expect_err("nothing behind it may be delivered");
        assert!(matches!(read, ReadError::Diverged { .. }), "{read}");
        says(&read.to_string(), &log.topic, &[position, words]);

        let ends = log.ends();
        let index = Arc::new(MemoryIndex::new());
        let store = log.try_open(index.clone()).await.unwrap_or_else(|error| panic!("{error}"));
        halted(&store, &["halted", position, words]).await;
        let refused = store.append(&stream(), exact(0), commit(1)).await;
        assert!(refused.is_err(), "written behind it: {refused:?}");
        store.shutdown().await;
        assert_eq!(log.ends(), ends, "nothing is written");
        assert!(index.cursors().await.expect("in memory").iter().all(|(_, c)| c.next.0 <= 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_store_and_reader_halt_at_what_others_write_malformed() {
    let Some(brokers) = support::brokers("a_running_store_and_reader_halt") else { return };
    let log = Log::of(brokers, "malformed", 1).await;
    let store = log.try_open(log.index.clone()).await.unwrap_or_else(|error| panic!("{error}"));
    support::ready(&store).await;
    let mut subscription = store.source().subscribe("running", None, 10).await.expect("subscribed");
    subscription.start(Partition(0), Some(log.cursor.clone())).await.expect("it is there");
    // Somebody else's record is passed over …
    support::produce(&log.brokers, &log.topic, &[("ce_id", b"x")]);
    support::settle(&store, &stream(), exact(1), &commit(1)).await;
    // … and one that says it is ours and is not, is not.
    support::produce(&log.brokers, &log.topic, &[("kf", &[1; 58])]);
    let reason = halted(&store, &["halted", "is malformed", "restore the topic"]).await;
    let mut delivered = 0;
    let error = loop {
        match in_time(subscription.next()).await {
            Ok(SourceMessage::Batch(batch)) => delivered += batch.events.len(),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(delivered, 1, "the event between the two");
    let position = reason.split_once("the record at ").expect("says where").1;
    let (position, _) = position.split_once(' ').expect("and what");
    says(&error.to_string(), &log.topic, &[position, "is malformed", "restore the topic"]);
    let ends = log.ends();
    let refused = store.append(&stream(), exact(2), commit(1)).await;
    assert!(refused.is_err(), "written behind it: {refused:?}");
    assert_eq!(log.ends(), ends, "nothing is written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_on_the_brokers_disk_is_found_and_not_skipped() {
    let Some((cluster, brokers)) = Cluster::up("kafold-integrity-disk", "1") else { return };
    let log = Log::of(brokers, "disk", 20).await;
    cluster.run(&["stop-node", "1"]);
    // One bit of a payload near the middle.
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/dev").join(cluster.name);
    let segment = folder.join(format!("n1/{}-0/00000000000000000000.log", log.topic));
    let mut bytes = fs::read(&segment).expect("the only segment");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, bytes).expect("written back");
    cluster.run(&["start-node", "1"]);

    let words = ["the record at 0:", "failed its checksum", "restore the topic"];
    let read = log.read().await.expect_err("nothing behind it may be delivered");
    says(&read.to_string(), &log.topic, &words);
    let index = Arc::new(MemoryIndex::new());
    let store = log.try_open(index.clone()).await.unwrap_or_else(|error| panic!("{error}"));
    halted(&store, &words).await;
}

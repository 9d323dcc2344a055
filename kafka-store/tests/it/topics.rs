//! Which topics are taken, and what stands in them.

use crate::support;

use std::sync::Arc;
use std::time::Duration;

use kafold_core::clock::RandomIds;
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{AppendError, Health};
use kafold_core::testing::{
    commit, commit_of, event, eventually, exact, new_command, read_gapless,
};
use kafold_core::{Commit, EventStore, IdGenerator, NewEvent, StreamId};
use kafold_kafka_store::{KafkaConfig, KafkaStore, OpenError};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};

async fn try_open(config: KafkaConfig) -> Result<KafkaStore, OpenError> {
    let index = Arc::new(MemoryIndex::new());
    let owner = support::owner("tries");
    KafkaStore::open(config, index, owner, support::clock(), Arc::new(RandomIds)).await
}

/// The topic is refused, and the text names all of the words.
async fn refused(config: KafkaConfig, words: &[&str]) {
    let error = try_open(config).await.err().expect("refused");
    assert!(!error.is_transient(), "{error}");
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

const SAFE: [(&str, &str); 2] = [("retention.ms", "-1"), ("cleanup.policy", "delete")];

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_would_lose_events_is_refused_by_name() {
    let Some(brokers) = support::brokers("a_topic_that_would_lose_events") else { return };
    let unsafe_settings = [
        ("retention.ms", "604800000"),
        ("retention.bytes", "1000000000"),
        ("cleanup.policy", "compact"),
        ("unclean.leader.election.enable", "true"),
        ("message.timestamp.type", "LogAppendTime"),
        ("min.insync.replicas", "2"),
    ];
    for (setting, value) in unsafe_settings {
        let name = support::new_name("unsafe");
        let topic = format!("{name}.events");
        let others = SAFE.into_iter().filter(|(other, _)| *other != setting);
        let settings: Vec<_> = others.chain([(setting, value)]).collect();
        support::create_topic(&brokers, &topic, 1, &settings).await;
        let remedy = format!("--add-config {setting}=");
        let allow = format!("allow_unsafe={setting}");
        let words = [&*topic, setting, value, &remedy, &allow];
        refused(support::config(&brokers, &name, ""), &words).await;
        if setting != "min.insync.replicas" {
            let accepted = try_open(support::config(&brokers, &name, &allow)).await;
            accepted.unwrap_or_else(|error| panic!("accepted by name: {error}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafkas_default_of_seven_days_is_refused() {
    let Some(brokers) = support::brokers("kafkas_default_of_seven_days") else { return };
    let name = support::new_name("seven-days");
    support::create_topic(&brokers, &format!("{name}.events"), 1, &[]).await;
    refused(support::config(&brokers, &name, ""), &["retention.ms", "604800000"]).await;
    let client: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", &brokers).create().expect("a client");
    let all = client.fetch_metadata(None, Duration::from_secs(10)).expect("an answer");
    let made: Vec<_> = all.topics().iter().filter(|t| t.name().starts_with(&name)).collect();
    assert_eq!(made.len(), 1, "nothing is made beside a topic that is refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_kafka_takes_for_another_topic_is_refused_with_that_topic() {
    let Some(brokers) = support::brokers("a_name_that_kafka_takes_for_another") else { return };
    let name = support::new_name("colliding");
    let other = format!("{name}_events");
    support::create_topic(&brokers, &other, 1, &[]).await;
    let words = [&*other, ". and _", "choose another log name"];
    refused(support::config(&brokers, &name, ""), &words).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_partition_count_is_refused_by_url_and_by_log() {
    let Some(brokers) = support::brokers("another_partition_count") else { return };
    let name = support::new_name("count");
    let config = support::config(&brokers, &name, "partitions=2");
    support::open(config.clone(), "first").await.shutdown().await;
    let other = support::config(&brokers, &name, "partitions=3");
    refused(other, &["partitions", "2", "3", &format!("{name}.events")]).await;

    // Partitions that somebody added: the log's own first claim says how many there were.
    let grown = rdkafka::admin::NewPartitions::new("", 3);
    let topic = format!("{name}.events");
    let grown = rdkafka::admin::NewPartitions { topic_name: &topic, ..grown };
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    support::admin(&brokers).create_partitions([&grown], &options).await.expect("grown");
    let unnamed = support::config(&brokers, &name, "");
    support::until_refused(unnamed, try_open, &["repartitioned", "3 partitions", "with 2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_log_has_three_topics_with_safe_settings() {
    let Some(brokers) = support::brokers("a_new_log_has_three_topics") else { return };
    let name = support::new_name("new");
    let store = support::open(support::config(&brokers, &name, ""), "new").await;
    assert_eq!(store.partitions(), 12);
    let wanted = [("events", "-1"), ("commands", "86400000"), ("replies", "3600000")];
    for (topic, retention) in wanted {
        let topic = format!("{name}.{topic}");
        let described = support::admin(&brokers)
            .describe_configs([&ResourceSpecifier::Topic(&topic)], &AdminOptions::new())
            .await
            .expect("an answer");
        let config = described.into_iter().next().expect("one").expect("described");
        let value = |setting| config.get(setting).and_then(|entry| entry.value.clone());
        assert_eq!(value("retention.ms").as_deref(), Some(retention));
        assert_eq!(value("retention.bytes").as_deref(), Some("-1"));
        assert_eq!(value("cleanup.policy").as_deref(), Some("delete"));
        assert_eq!(value("min.insync.replicas").as_deref(), Some("1"), "one broker");
        assert_eq!(value("unclean.leader.election.enable").as_deref(), Some("false"));
        assert_eq!(value("message.timestamp.type").as_deref(), Some("CreateTime"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_broker_is_worth_waiting_for_and_too_many_replicas_are_not() {
    let Some(brokers) = support::brokers("no_broker_is_worth_waiting_for") else { return };
    let mut silent: KafkaConfig = "kafka://127.0.0.1:1/orders".parse().expect("valid");
    silent.limits.request_timeout = Duration::from_millis(500);
    let error = try_open(silent).await.err().expect("nobody is there");
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains("unavailable"), "{error}");
    let unknown: KafkaConfig = "kafka://nowhere.invalid:9092/orders".parse().expect("valid");
    refused(unknown, &["nowhere.invalid:9092", "check the host names"]).await;
    let name = support::new_name("replicas");
    let config = support::config(&brokers, &name, "replication=9");
    refused(config, &["9 replicas", "?replication=", &format!("{name}.events")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_topic_is_noticed_by_name() {
    let Some(brokers) = support::brokers("a_recreated_topic") else { return };
    let name = support::new_name("recreated");
    let config = support::config(&brokers, &name, "partitions=1");
    let index = Arc::new(MemoryIndex::new());
    let store = support::open_with(config.clone(), index.clone(), "before").await;
    support::ready(&store).await;
    let stream = StreamId::new("order", "1").expect("valid");
    store.append(&stream, exact(0), commit(3)).await.expect("is new");
    store.shutdown().await;
    drop(store);

    support::delete_topic(&brokers, &format!("{name}.events")).await;
    // Somebody else begins a log of the same name, with another database.
    let other = support::retry_open(config.clone(), try_open).await;
    support::ready(&other).await;
    for version in 0..20 {
        other.append(&stream, exact(version), commit(1)).await.expect("is new here");
    }
    other.shutdown().await;
    let owner = support::owner("after");
    let opened =
        KafkaStore::open(config, index, owner, support::clock(), Arc::new(RandomIds)).await;
    let text = opened.err().expect("another log").to_string();
    assert!(text.contains("recreated") && text.contains(&name), "{text}");
}

fn header(record: &rdkafka::message::OwnedMessage, name: &str) -> Option<Vec<u8>> {
    let headers = record.headers()?;
    headers.iter().find(|header| header.key == name)?.value.map(<[u8]>::to_vec)
}

fn text(record: &rdkafka::message::OwnedMessage, name: &str) -> String {
    String::from_utf8(header(record, name).unwrap_or_default()).expect("text")
}

#[tokio::test(flavor = "multi_thread")]
async fn one_record_an_event_with_the_headers_of_a_cloud_event() {
    let Some(brokers) = support::brokers("one_record_an_event") else { return };
    let name = support::new_name("wire");
    let store = support::open(support::config(&brokers, &name, "partitions=1"), "wire").await;
    let stream = StreamId::new("order", "17").expect("valid");
    let command = new_command();
    let mut second = event(2);
    second.metadata.correlation_id = Some("request-1".into());
    second.metadata.causation_id = Some("cause-1".into());
    second.metadata.trace_parent = Some("00-trace-01".into());
    let events = vec![event(1), second.clone()];
    let two = Commit::new(command, events.clone()).expect("two events");
    store.append(&stream, exact(0), two).await.expect("is new");
    store.shutdown().await;

    let records = support::raw_records(&brokers, &format!("{name}.events"));
    assert_eq!(records.len(), 3, "a claim and two events");
    let (claim, events_found) = records.split_first().expect("three");
    assert_eq!(claim.key(), Some(&b"kafold"[..]));
    assert_eq!(text(claim, "ce_type"), "kafold.claim.v1");
    let said: serde_json::Value =
        serde_json::from_slice(claim.payload().unwrap_or_default()).expect("JSON");
    assert_eq!(said["owner"], "wire");
    assert_eq!(said["address"], "wire.test:8080");
    assert_eq!(said["partitions"], 1);
    let claim_stamp = header(claim, "kf").expect("every record of ours has one");
    for (index, (record, event)) in events_found.iter().zip(&events).enumerate() {
        assert_eq!(record.key(), Some(&b"order-17"[..]));
        assert_eq!(record.payload(), Some(&*event.payload));
        assert_eq!(text(record, "ce_specversion"), "1.0");
        assert_eq!(text(record, "ce_id"), event.metadata.event_id.to_string());
        assert_eq!(text(record, "ce_source"), format!("/{name}/order"));
        assert_eq!(text(record, "ce_type"), "contract.noted.v1");
        assert_eq!(text(record, "content-type"), "application/json");
        let kf = header(record, "kf").expect("every record of ours has one");
        assert_eq!(kf.len(), 58);
        assert_eq!(kf[..2], [1, 2], "format 1, an event");
        assert_eq!(kf[2..14], claim_stamp[2..14], "under the claim");
        let number = |range: std::ops::Range<usize>| {
            kf[range].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        assert_eq!(number(14..22), index as u64 + 1, "seq");
        assert_eq!(number(22..30), index as u64 + 1, "version");
        assert_eq!((number(30..32), number(32..34)), (index as u64, 2), "index and count");
        assert_eq!(&kf[34..50], command.0.as_bytes());
    }
    assert_eq!(text(&events_found[0], "ce_time"), "2024-10-04T00:00:00.000001Z");
    assert_eq!(header(&events_found[0], "ce_correlationid"), None);
    assert_eq!(text(&events_found[1], "ce_correlationid"), "request-1");
    assert_eq!(text(&events_found[1], "ce_causationid"), "cause-1");
    assert_eq!(text(&events_found[1], "traceparent"), "00-trace-01");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_somebody_else_is_passed_over_and_one_of_a_newer_format_is_refused() {
    let Some(brokers) = support::brokers("a_record_of_somebody_else") else { return };
    let name = support::new_name("foreign");
    let config = support::config(&brokers, &name, "partitions=1");
    let stream = StreamId::new("order", "1").expect("valid");
    let topic = format!("{name}.events");

    let store = support::open(config.clone(), "before").await;
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    support::produce(&brokers, &topic, &[]);
    // In doubt, because somebody else wrote in between; the same command settles it.
    let command = new_command();
    let appended = support::settle(&store, &stream, exact(1), &commit_of(command, 1)).await;
    assert_eq!(appended.version.0, 2);
    store.shutdown().await;

    support::produce(&brokers, &topic, &[("kf", &[9; 70])]);
    refused(config, &[&topic, "format 9", "upgrade"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_that_is_shortened_later_is_refused_at_the_next_start() {
    let Some(brokers) = support::brokers("retention_that_is_shortened_later") else { return };
    let name = support::new_name("later");
    let config = support::config(&brokers, &name, "partitions=1");
    support::open(config.clone(), "first").await.shutdown().await;
    let topic = format!("{name}.events");
    let alter = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("retention.ms", "1000");
    support::admin(&brokers).alter_configs([&alter], &AdminOptions::new()).await.expect("altered");
    support::until_refused(config, try_open, &["retention.ms", "1000", &topic]).await;
}

/// Gives the topic these settings beside the safe ones: AlterConfigs replaces all of them.
async fn alter(brokers: &str, topic: &str, more: &[(&str, &str)]) {
    let settings = SAFE.iter().chain(more);
    let alter = settings
        .fold(AlterConfig::new(ResourceSpecifier::Topic(topic)), |alter, (key, value)| {
            alter.set(key, value)
        });
    let altered = support::admin(brokers).alter_configs([&alter], &AdminOptions::new()).await;
    assert!(altered.expect("altered").iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_limit_of_records_is_taken_over() {
    let Some(brokers) = support::brokers("a_changed_limit_of_records_is_taken_over") else {
        return;
    };
    let name = support::new_name("limit");
    let (config, topic) =
        (support::config(&brokers, &name, "partitions=1"), format!("{name}.events"));
    let store = try_open(config).await.expect("is made");
    support::ready(&store).await;
    let large = |bytes: usize| {
        let id = RandomIds.event_id().to_string();
        let stream = StreamId::new("order", &id).expect("valid");
        // Random digits, which compression leaves large.
        let digits = std::iter::repeat_with(|| format!("{:016x}", RandomIds.random()));
        let payload: String = digits.take(bytes / 16).collect();
        let event = NewEvent { payload: format!("\"{payload}\"").into_bytes().into(), ..event(1) };
        let commit = Commit::new(new_command(), vec![event]).expect("one event");
        let store = &store;
        async move { store.append(&stream, exact(0), commit).await }
    };
    large(100_000).await.expect("fits");
    alter(&brokers, &topic, &[("max.message.bytes", "50000")]).await;
    eventually("the lower limit is known", async || {
        matches!(large(100_000).await, Err(AppendError::TooLarge { limit: 50_000, .. }))
    })
    .await;
    eventually("small events go on", async || large(100).await.is_ok()).await;
    alter(&brokers, &topic, &[("max.message.bytes", "2000000")]).await;
    eventually("the higher limit is known", async || large(1_500_000).await.is_ok()).await;
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_topic_of_commands_or_replies_is_named_until_it_is_made_again() {
    let test = "a_deleted_topic_of_commands_or_replies_is_named_until_it_is_made_again";
    let Some(brokers) = support::brokers(test) else { return };
    let name = support::new_name("gone");
    let config = support::config(&brokers, &name, "partitions=1");
    let store = try_open(config).await.expect("is made");
    support::ready(&store).await;
    for topic in [format!("{name}.commands"), format!("{name}.replies")] {
        support::delete_topic(&brokers, &topic).await;
        eventually("the deleted topic is named", async || {
            let Health::NotReady(reasons) = store.health() else { return false };
            let words = ["is gone", "`kafold topic create", topic.as_str()];
            reasons.iter().any(|reason| words.iter().all(|word| reason.contains(word)))
        })
        .await;
        support::create_topic(&brokers, &topic, 1, &[]).await;
        support::ready(&store).await;
    }
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_clock_is_named() {
    let Some(brokers) = support::brokers("a_refused_clock_is_named") else { return };
    let name = support::new_name("clock");
    let (config, topic) =
        (support::config(&brokers, &name, "partitions=1"), format!("{name}.events"));
    let store = try_open(config.clone()).await.expect("is made");
    support::ready(&store).await;
    store.shutdown().await;
    // No record is as young as this.
    alter(&brokers, &topic, &[("message.timestamp.before.max.ms", "0")]).await;
    let is_named = |store: &KafkaStore| {
        let Health::NotReady(reasons) = store.health() else { return false };
        reasons.iter().any(|reason| reason.contains("set the clock of this machine"))
    };
    let mut store = try_open(config.clone()).await.expect("is taken");
    eventually("the clock is named", async || {
        // A broker applies a setting after it has acknowledged the change: the first claim may still be
        // accepted, and a node that is ready writes no other claim.
        if store.health() == Health::Ready {
            store.shutdown().await;
            store = try_open(config.clone()).await.expect("is taken");
        }
        is_named(&store)
    })
    .await;
    alter(&brokers, &topic, &[]).await;
    support::ready(&store).await;
    store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_of_kafka_is_read() {
    let Some(brokers) = support::brokers("every_compression_of_kafka_is_read") else { return };
    for compression in ["gzip", "snappy", "lz4", "zstd"] {
        let name = support::new_name(compression);
        let (config, topic) =
            (support::config(&brokers, &name, "partitions=1"), format!("{name}.events"));
        let store = try_open(config.clone()).await.expect("is made");
        support::ready(&store).await;
        // The topic setting makes the broker compress every batch.
        alter(&brokers, &topic, &[("compression.type", compression)]).await;
        let stream = StreamId::new("order", "a").expect("valid");
        for version in 0..3 {
            store.append(&stream, exact(version), commit(1)).await.expect("is next");
        }
        store.shutdown().await;
        // The new store reads the log from offset 0.
        let store = try_open(config).await.expect("is taken");
        support::ready(&store).await;
        read_gapless(&store, &stream, 3).await;
        store.shutdown().await;
    }
}

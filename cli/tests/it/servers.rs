//! Every command on Kafka and PostgreSQL.

use crate::support;

use std::net::TcpListener;
use std::time::Duration;

use kafold::projections::sqlx::{Connection, PgConnection, query};
use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier,
    TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use support::{create_database, fill, run, servers, timed, unique_name};
use tempfile::TempDir;

/// The longest that anybody waits for a server that is not there.
const UNREACHABLE_MAX: Duration = Duration::from_secs(12);

fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a client")
}

/// A topic as somebody else makes it.
async fn create_topic(brokers: &str, topic: &str, settings: &[(&str, &str)]) {
    let mut new = NewTopic::new(topic, 2, TopicReplication::Fixed(1));
    for (key, value) in settings {
        new = new.set(key, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)));
    let made = admin(brokers).create_topics([&new], &options).await.expect("an answer");
    made.into_iter().for_each(|made| drop(made.expect("created")));
}

fn produce(brokers: &str, topic: &str) {
    produce_to(brokers, topic, 0);
}

fn produce_to(brokers: &str, topic: &str, partition: i32) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a producer");
    let record = BaseRecord::<str, str>::to(topic).payload("hello").partition(partition);
    producer.send(record).map_err(|(error, _)| error).expect("queued");
    producer.flush(Duration::from_secs(10)).expect("delivered");
}

#[test]
fn servers_that_are_not_there_are_told_soon() {
    let folder = TempDir::new().expect("a folder");
    // It takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = silent.local_addr().expect("an address").to_string();
    let commands: [&[&str]; 6] = [
        &["topic", "check"],
        &["topic", "create"],
        &["stream", "show", "order-1"],
        &["events", "tail"],
        &["status"],
        &["doctor"],
    ];
    for (host, words) in [
        (silent.as_str(), "unavailable"),
        ("127.0.0.1:1", "unavailable"),
        ("nowhere.invalid:9092", "nowhere.invalid:9092"),
    ] {
        let url = format!("kafka://{host}/orders");
        std::thread::scope(|scope| {
            for command in commands {
                let (folder, url) = (folder.path(), &url);
                scope.spawn(move || {
                    let args = [command, &["--log", url]].concat();
                    let (ended, took) = timed(|| run(folder, &args));
                    ended.says(1, &["kafold: "]);
                    let said = format!("{}{}", ended.stdout, ended.stderr);
                    assert!(said.contains(words), "{said}");
                    assert!(took < UNREACHABLE_MAX, "{command:?} took {took:?}");
                });
            }
        });
    }
    for host in [silent.as_str(), "127.0.0.1:1"] {
        let url = format!("postgres://u:secret@{host}/d");
        let (ended, took) = timed(|| run(folder.path(), &["migrate", "--database", url.as_str()]));
        ended.only_says(1, &["unavailable", "check the URL"]);
        assert!(took < UNREACHABLE_MAX, "it took {took:?}");
    }
    let args = ["status", "--database", "postgres://u@nowhere.invalid/d"];
    run(folder.path(), &args).says(1, &["nowhere.invalid", "check the host name"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_made_once_and_checked() {
    let Some((brokers, _)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let name = unique_name();
    let url = format!("kafka://{brokers}/{name}?partitions=2&replication=1");
    let topic = |command: &'static str, more: &[&'static str]| {
        let args = [&["topic", command, "--log", url.as_str()], more].concat();
        run(folder.path(), &args)
    };
    let absent = topic("check", &[]);
    absent.says(1, &["is not safe"]);
    assert!(
        absent.stdout.contains(&format!("{name}.events: there is no such topic")),
        "{absent:?}"
    );
    assert!(topic("check", &["--json"]).stdout.contains("absent"), "checking makes nothing");
    for command in [&["stream", "show", "order-1"][..], &["events", "tail"], &["status"]] {
        let args = [command, &["--log", url.as_str()]].concat();
        run(folder.path(), &args).says(1, &[&format!("there is no topic {name}.events")]);
    }

    let made = topic("create", &[]).ok();
    assert!(made.contains(&format!("{name}.events created\n")), "{made}");
    let made = topic("create", &["--json"]).json();
    let events = json!({"topic": format!("{name}.events"), "existed": true});
    assert_eq!((&made["topics"][0], made["topics"].as_array().map(Vec::len)), (&events, Some(3)));
    assert!(topic("check", &[]).ok().contains("min.insync.replicas"));
    assert_eq!(topic("check", &["--json"]).json()["safe"], true);

    let other = format!("kafka://{brokers}/{name}?partitions=3");
    let wrong = run(folder.path(), &["topic", "check", "--log", &other]);
    wrong.says(1, &["1 finding"]);
    assert!(wrong.stdout.contains("partitions=2: ?partitions= says 3"), "{wrong:?}");
    run(folder.path(), &["topic", "create", "--log", &other]).only_says(1, &["partitions=2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_of_others_and_unsafe_ones_are_refused_by_name() {
    let Some((brokers, _)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let (foreign, forgetful) = (unique_name(), unique_name());
    create_topic(&brokers, &format!("{foreign}.events"), &[("retention.ms", "-1")]).await;
    produce(&brokers, &format!("{foreign}.events"));
    let url = format!("kafka://{brokers}/{foreign}");
    let check = run(folder.path(), &["topic", "check", "--log", &url]);
    check.says(1, &["is not safe"]);
    assert!(
        check.stdout.contains("records=foreign at 0:0: the record is not kafold's"),
        "{check:?}"
    );
    let check = run(folder.path(), &["topic", "check", "--json", "--log", &url]);
    let json: Value = serde_json::from_str(&check.stdout).expect("JSON");
    assert_eq!(json["safe"], false);
    let doctor = run(folder.path(), &["doctor", "--log", &url]);
    doctor.says(1, &["problem"]);
    assert!(doctor.stdout.contains("not kafold's"), "{doctor:?}");
    let events = run(folder.path(), &["events", "tail", "--from-beginning", "--log", &url]).ok();
    assert_eq!(events, "", "no record there is an event");
    let show = run(folder.path(), &["stream", "show", "order-1", "--log", &url]);
    show.only_says(1, &["there is no stream order-1"]);

    create_topic(&brokers, &format!("{forgetful}.events"), &[("retention.ms", "1000")]).await;
    let url = format!("kafka://{brokers}/{forgetful}");
    let check = run(folder.path(), &["topic", "check", "--log", &url]);
    check.says(1, &["is not safe"]);
    for words in ["retention.ms=1000", "the broker deletes old events", "kafka-configs.sh"] {
        assert!(check.stdout.contains(words), "{check:?}");
    }
    let create = run(folder.path(), &["topic", "create", "--log", &url]);
    create.only_says(1, &["retention.ms=1000", "the broker deletes old events"]);
    let accepted = format!("{url}?allow_unsafe=retention.ms");
    let create = run(folder.path(), &["topic", "create", "--log", &accepted]);
    assert!(create.ok().contains("existed already"));
    let check = run(folder.path(), &["topic", "check", "--log", &accepted]).ok();
    assert!(check.contains("retention.ms=1000"), "it is still told: {check}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_events_are_read_with_an_index_and_without() {
    let Some((brokers, postgres)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let (name, database) = (unique_name(), create_database(&postgres).await);
    let url = format!("kafka://{brokers}/{name}?partitions=3&replication=1");
    fill(&url, Some(&database)).await;
    // Somebody else's record, and a second life of the log, with another claim in every partition.
    produce(&brokers, &format!("{name}.events"));
    fill(&url, None).await;
    let check = run(folder.path(), &["topic", "check", "--log", &url]).ok();
    assert!(check.contains("somebody else writes to the topic"), "it does no harm: {check}");

    let show =
        |args: &[&str]| run(folder.path(), &[&["stream", "show"], args, &["--log", &url]].concat());
    let alone = show(&["order-1", "--json"]).json();
    assert_eq!(
        (&alone["last_version"], alone["events"].as_array().map(Vec::len)),
        (&json!(6), Some(6))
    );
    let indexed = show(&["order-1", "--json", "--database", &database]).json();
    assert_eq!(indexed, alone, "the index and the end of the log behind it");
    let was = show(&["order-2", "--at", "1", "--database", &database]).ok();
    assert!(was.contains("order-2: version 1 of 2"), "{was}");
    show(&["order-1", "--at", "9"]).only_says(1, &["last version is 6"]);

    let tail = |args: &[&str]| {
        let all = [&["events", "tail", "--json"], args, &["--log", url.as_str()]].concat();
        let lines = run(folder.path(), &all).ok();
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    };
    let all = tail(&["--from-beginning"]);
    assert_eq!(all.len(), 10);
    let of_stream = tail(&["--from-beginning", "--stream", "order-1"]);
    let versions: Vec<_> = of_stream.iter().map(|event| event["version"].as_u64()).collect();
    assert_eq!(versions, (1..=6).map(Some).collect::<Vec<_>>());
    // From every event on, what is behind it in its partition, wherever the reading began.
    for (at, event) in all.iter().enumerate() {
        let from = event["position"].as_str().expect("a position");
        let (partition, _) = from.split_once(':').expect("a position");
        let same = |event: &&Value| {
            event["position"]
                .as_str()
                .is_some_and(|text| text.starts_with(&format!("{partition}:")))
        };
        let expected: Vec<_> = all[at..].iter().filter(same).cloned().collect();
        assert_eq!(tail(&["--from", from]), expected, "from {from}");
    }
    // The second newest event is where a partition may be begun at by its time.
    let recorded = all[all.len() - 2]["recorded_at"].as_str().expect("a time");
    let later = |event: &&Value| event["recorded_at"].as_str() >= Some(recorded);
    let expected: Vec<_> = all.iter().filter(later).cloned().collect();
    assert_eq!(tail(&["--since", recorded]), expected);
    assert_eq!(tail(&["--until", recorded]).len(), all.len() - expected.len());
    let refused = run(folder.path(), &["events", "tail", "--from", "3:0", "--log", &url]);
    refused.only_says(1, &["3 partitions"]);
    let refused = run(folder.path(), &["events", "tail", "--from", "0:999", "--log", &url]);
    refused.only_says(1, &["behind the end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_doctor_tell_what_there_is() {
    let Some((brokers, postgres)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let (database, empty) = (create_database(&postgres).await, create_database(&postgres).await);
    let url = format!("kafka://{brokers}/{}?partitions=3&replication=1", unique_name());
    fill(&url, Some(&database)).await;

    let both = |command: &'static str, more: &[&'static str]| {
        let args = [&[command, "--log", &url, "--database", &database], more].concat();
        run(folder.path(), &args)
    };
    let text = both("status", &[]).ok();
    for words in ["3 partitions", "index     ", "CLAIMED BY", "no projection"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let json = both("status", &["--json"]).json();
    assert_eq!(json["log"]["kind"], "kafka");
    // The claim of a partition without events need not have come to the index.
    assert!(json["index"]["lag_records"].as_u64() <= Some(3), "{json}");
    let partitions = json["log"]["partitions"].as_array().expect("partitions");
    assert!(partitions.iter().all(|partition| partition["owner"]["name"].is_string()), "{json}");

    let json = both("doctor", &["--json"]).json();
    assert_eq!(json["healthy"], true, "{json}");
    let text = both("doctor", &[]).ok();
    for words in ["PostgreSQL", "schema 21", "connections", "librdkafka", "rights: create"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let other = format!("kafka://{brokers}/{}?partitions=3&replication=1", unique_name());
    fill(&other, None).await;
    let args = ["doctor", "--log", &other, "--database", &database];
    let wrong = run(folder.path(), &args);
    wrong.says(1, &["problem"]);
    assert!(wrong.stdout.contains("it is not of this log"), "{wrong:?}");
    let args = ["stream", "show", "order-1", "--log", &other, "--database", &database];
    run(folder.path(), &args).only_says(1, &["recreated"]);

    let args = ["status", "--log", &url, "--database", &empty];
    let half = run(folder.path(), &args);
    half.says(1, &["no current kafold tables", "migrate"]);
    assert!(half.stdout.contains("3 partitions"), "the log is shown all the same: {half:?}");
    let migrated = run(folder.path(), &["migrate", "--database", &empty]).ok();
    assert!(migrated.contains("applied 0007 kafold audit\n"), "{migrated}");

    let mut connection = PgConnection::connect(&empty).await.expect("the database");
    let newer = "INSERT INTO kafold_migrations SELECT 9999, 'of the future', installed_on, success, \
                 checksum, execution_time FROM kafold_migrations LIMIT 1";
    query(newer).execute(&mut connection).await.expect("inserted");
    for command in ["migrate", "status"] {
        let ended = run(folder.path(), &[command, "--database", &empty]);
        ended.says(1, &["schema 9999", "newer kafold version"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn added_partitions_and_a_lowered_limit_are_shown() {
    let Some((brokers, postgres)) = servers() else { return };
    let folder = TempDir::new().expect("a folder");
    let (name, database) = (unique_name(), create_database(&postgres).await);
    let (topic, url) = (format!("{name}.events"), format!("kafka://{brokers}/{name}"));
    fill(&format!("{url}?partitions=2&replication=1"), Some(&database)).await;
    let admin = admin(&brokers);
    let grown = NewPartitions::new(&topic, 4);
    let grown = admin.create_partitions([&grown], &AdminOptions::new()).await.expect("an answer");
    grown.into_iter().for_each(|grown| drop(grown.expect("grown")));
    let lowered = AlterConfig::new(ResourceSpecifier::Topic(&topic))
        .set("retention.ms", "-1")
        .set("max.message.bytes", "2000");
    let lowered = admin.alter_configs([&lowered], &AdminOptions::new()).await.expect("an answer");
    lowered.into_iter().for_each(|lowered| drop(lowered.expect("altered")));

    let both = |command: &str, log: &str| {
        run(folder.path(), &[command, "--log", log, "--database", &database])
    };
    let words = "4 partitions, the log was begun with 2";
    let status = both("status", &url);
    status.says(1, &[words, "?partitions=2&allow_unsafe=partitions"]);
    assert!(status.stdout.contains(words), "{status:?}");
    let doctor = both("doctor", &url);
    doctor.says(1, &["problem"]);
    assert!(doctor.stdout.contains(words), "{doctor:?}");
    assert!(
        doctor.stdout.contains("max.message.bytes=2000: an event with more bytes"),
        "{doctor:?}"
    );

    let accepted = format!("{url}?partitions=2&allow_unsafe=partitions");
    fill(&accepted, Some(&database)).await;
    let status = both("status", &accepted).ok();
    assert!(
        status.contains("2 partitions added to the topic: the log does not use them"),
        "{status}"
    );
    let doctor = both("doctor", &accepted).ok();
    for words in
        ["partitions=4: the log uses the first 2", "keep ?partitions=2&allow_unsafe=partitions"]
    {
        assert!(doctor.contains(words), "{doctor}");
    }
    assert!(!doctor.contains("give the number"), "followed already: {doctor}");
    assert!(!doctor.contains("in added partitions"), "{doctor}");
    let check = |url: &str| run(folder.path(), &["topic", "check", "--log", url]);
    produce_to(&brokers, &topic, 3);
    assert!(check(&accepted).ok().contains("records=1 record in added partitions"));
}

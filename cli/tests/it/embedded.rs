//! Every command on a log in a SQLite file.

use crate::support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use kafold::projections::sqlx::{Connection, SqliteConnection, query};
use serde_json::{Value, json};
use support::{Running, append, fill, kafold, open, run, wait_for};
use tempfile::TempDir;

const LOG: [&str; 2] = ["--log", "sqlite://a.db"];

/// A folder with a log in the file `a.db`.
async fn filled() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    fill(&url(folder.path()), None).await;
    folder
}

fn url(folder: &Path) -> String {
    format!("sqlite://{}", folder.join("a.db").display())
}

async fn change(folder: &Path, statement: &'static str) {
    let mut connection = SqliteConnection::connect(&url(folder)).await.expect("the file");
    query(statement).execute(&mut connection).await.expect("the statement");
}

fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &LOG].concat()
}

#[test]
fn migrate_tells_what_it_applied_and_applies_it_once() {
    let folder = TempDir::new().expect("a folder");
    let migrate = ["migrate", "--database", "sqlite://a.db"];
    let first = run(folder.path(), &migrate).ok();
    assert!(first.starts_with("applied 0001 kafold event\n"), "{first}");
    assert!(first.ends_with("sqlite://a.db is current: schema 22\n"), "{first}");
    assert_eq!(run(folder.path(), &migrate).ok(), "sqlite://a.db was current: schema 22\n");
    let json = run(folder.path(), &[&migrate[..], &["--json"]].concat()).json();
    assert_eq!(json, json!({"database": "sqlite://a.db", "schema": 22, "applied": []}));
    // The log's own file is the database when none is named.
    run(folder.path(), &with(&["migrate"])).ok();
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_by_name() {
    let folder = filled().await;
    let refused = |url: &str, words: &[&str]| {
        for command in [&["stream", "show", "order-1"][..], &["events", "tail", "--from", "0:0"]] {
            let args = [command, &["--log", url]].concat();
            run(folder.path(), &args).only_says(1, &[&[url], words].concat());
        }
        for command in ["status", "doctor"] {
            run(folder.path(), &[command, "--log", url]).says(1, &[]);
        }
    };
    refused("sqlite://absent.db", &["there is no file", "migrate"]);
    assert!(!folder.path().join("absent.db").exists());
    refused("sqlite://absent/a.db", &["is not a folder"]);
    fs::create_dir(folder.path().join("folder")).expect("a folder");
    refused("sqlite://folder", &["is a folder", "name a file in it"]);
    fs::write(folder.path().join("text"), "no database at all, but long enough").expect("a file");
    refused("sqlite://text", &["not a SQLite database"]);
    fs::write(folder.path().join("empty"), "").expect("a file");
    refused("sqlite://empty", &["no current kafold tables", "migrate"]);

    let migrate = |url| run(folder.path(), &["migrate", "--database", url]);
    migrate("sqlite://absent/a.db").only_says(1, &["is not a folder"]);
    migrate("sqlite://folder").only_says(1, &["is a folder"]);
    migrate("sqlite://text").only_says(1, &["not a SQLite database"]);

    change(folder.path(), "INSERT INTO kafold_migrations SELECT 9999, 'of the future', installed_on, success, checksum, execution_time FROM kafold_migrations LIMIT 1").await;
    refused("sqlite://a.db", &["schema 9999", "newer kafold version"]);
    migrate("sqlite://a.db").only_says(1, &["schema 9999", "newer kafold version"]);
}

#[tokio::test]
async fn a_stream_is_shown_as_it_is_and_as_it_was() {
    let folder = filled().await;
    let show = |args: &[&str]| run(folder.path(), &[&["stream", "show"], args, &LOG].concat());
    let text = show(&["order-1"]).ok();
    assert!(text.starts_with("order-1: 3 events\n"), "{text}");
    for words in ["version 1  at 0:0  order.changed.v1", "\"step\": 3", "correlation a request"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    assert_eq!(show(&["1", "--category", "order"]).ok(), text);

    let json = show(&["order-1", "--at", "2", "--json"]).json();
    assert_eq!((&json["stream"], &json["version"]), (&json!("order-1"), &json!(2)));
    assert_eq!(json["last_version"], 3);
    let events = json["events"].as_array().expect("events");
    assert_eq!(events.len(), 2);
    assert_eq!(events[1]["position"], "0:2");
    assert_eq!(events[1]["payload"], json!({"step": 2}));
    assert_eq!(json["next"]["event"]["version"], 3, "what comes next");

    let last = show(&["order-1", "--last", "1"]).ok();
    assert!(last.contains("2 earlier events left out") && !last.contains("version 1 "), "{last}");

    show(&["order-1", "--at", "7"]).only_says(1, &["3 events", "last version is 3", "version 7"]);
    show(&["order-9"]).only_says(1, &["there is no stream order-9 in sqlite://a.db"]);
}

#[tokio::test]
async fn tail_prints_what_is_asked_for_in_the_order_of_the_log() {
    let folder = filled().await;
    let tail = |args: &[&str]| {
        let all = [&["events", "tail", "--json"], args, &LOG].concat();
        let lines = run(folder.path(), &all).ok();
        let event = |line: &str| serde_json::from_str::<Value>(line).expect("JSON a line");
        let place = |event: Value| event["position"].as_str().expect("a position").to_owned();
        lines.lines().map(event).map(place).collect::<Vec<_>>()
    };
    assert_eq!(tail(&["--from-beginning"]), ["0:0", "0:1", "0:2", "0:3", "0:4"]);
    assert_eq!(tail(&["--from", "0:3"]), ["0:3", "0:4"]);
    assert_eq!(tail(&["--from", "0:5"]), [""; 0], "the end is a place to begin");
    assert_eq!(tail(&["--from", "0:1", "--limit", "2"]), ["0:1", "0:2"]);
    assert_eq!(tail(&["--from-beginning", "--category", "customer"]), ["0:3"]);
    assert_eq!(tail(&["--from-beginning", "--stream", "order-1"]), ["0:0", "0:2", "0:4"]);
    assert_eq!(tail(&["--from-beginning", "--type", "order.changed.v1"]).len(), 4);
    assert_eq!(tail(&["--from-beginning", "--type", "customer.changed"]), ["0:3"]);
    assert_eq!(tail(&["--from-beginning", "--type", "customer.changed.v2"]), [""; 0]);

    let json = |args: &[&str]| run(folder.path(), &with(&[args, &["--json"]].concat())).json();
    let types = json(&["types", "list"]);
    let types: Vec<_> = types["types"].as_array().expect("a list").iter().collect();
    let counts: Vec<_> = types.iter().map(|found| (&found["type"], &found["events"])).collect();
    assert_eq!(
        counts,
        [(&json!("customer.changed.v1"), &json!(1)), (&json!("order.changed.v1"), &json!(4))]
    );
    assert_eq!(json(&["types", "list", "--since", "2100-01-01T00:00:00Z"]), json!({"types": []}));
    let streams = json(&["stream", "list", "--category", "order"]);
    assert_eq!(streams["total"], 2);
    assert_eq!(
        (&streams["streams"][0]["stream"], &streams["streams"][0]["version"]),
        (&json!("order-1"), &json!(3))
    );
    let one = run(folder.path(), &with(&["stream", "list", "--last", "1"])).ok();
    assert!(one.contains("order-1") && one.ends_with("3 streams; --last 3 lists all\n"), "{one}");

    let exported = run(folder.path(), &with(&["log", "export", "--stream", "order-1"])).ok();
    let payloads: Vec<Value> = exported
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON a line")["payload"].clone())
        .collect();
    assert_eq!(payloads, [json!({"step": 1}), json!({"step": 2}), json!({"step": 3})]);
    assert_eq!(run(folder.path(), &with(&["log", "export"])).ok().lines().count(), 5);
    let filtered = |predicate| tail(&["--from-beginning", "--where", predicate]);
    assert_eq!(filtered(r#"data.step >= 2 && category == "order""#), ["0:2", "0:4"]);
    assert_eq!(filtered(r#"data.name == "Ann" || stream == "order-2""#), ["0:1", "0:3"]);
    assert_eq!(tail(&["--from-beginning", "--correlation", "a request"]).len(), 5);
    assert_eq!(tail(&["--from-beginning", "--correlation", "another"]), [""; 0]);
    assert_eq!(tail(&["--since", "1h", "--until", "2100-01-01T00:00:00Z"]).len(), 5);
    assert_eq!(tail(&["--until", "1h"]), [""; 0]);
    assert_eq!(tail(&["--since", "2100-01-01T00:00:00Z"]), [""; 0]);
    let mistaken = |args: &[&str], words: &[&str]| {
        run(folder.path(), &with(&[&["events", "tail"], args].concat())).only_says(2, words);
    };
    mistaken(&["--where", "data.step = 1"], &["--where", "column 11", "&&, || or the end"]);
    mistaken(&["--where", "payload.step == 1"], &["column 1", "one of data, type, stream"]);
    mistaken(&["--since", "10m", "--until", "1h"], &["--until must be after --since"]);
    mistaken(&["--since", "yesterday"], &["--since", "yesterday", "10m"]);

    let lines =
        run(folder.path(), &with(&["events", "tail", "--from", "0:1", "--limit", "1"])).ok();
    assert!(lines.starts_with("0:1  "), "{lines}");
    let payload = r#"order-2  1  order.changed.v1  {"step":1,"big":12345678901234567890123}"#;
    assert!(lines.ends_with(&format!("{payload}\n")), "numbers are as they were written: {lines}");

    let refused = |from, words: &[&str]| {
        run(folder.path(), &with(&["events", "tail", "--from", from])).only_says(1, words);
    };
    refused("0:6", &["0:6", "partition 0 ends at 5"]);
    refused("1:0", &["1:0", "1 partition"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_follows_until_it_is_interrupted() {
    let folder = filled().await;
    let log = open(&url(folder.path()), None).await;
    let mut command = kafold(folder.path(), &with(&["events", "tail", "--json"]));
    let mut child = Running(command.stdout(Stdio::piped()).spawn().expect("the program starts"));
    let stdout = child.0.stdout.take().expect("piped");
    let (line, mut printed) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        let (mut first, mut stdout) = (String::new(), BufReader::new(stdout));
        stdout.read_line(&mut first).expect("text");
        line.blocking_send(first).expect("somebody waits");
        // A program whose output nobody takes ends by itself.
        std::io::copy(&mut stdout, &mut std::io::sink()).expect("text");
    });
    // It begins at the end, wherever that is when it starts: one of these comes behind it.
    let store = log.store();
    let first = loop {
        append(&store, "order-1", r#"{"step":"new"}"#).await;
        if let Ok(first) = printed.try_recv() {
            break first;
        }
    };
    let event: Value = serde_json::from_str(&first).expect("JSON");
    assert_eq!(event["payload"], json!({"step": "new"}), "nothing that was there is printed");
    assert!(event["version"].as_u64() > Some(3), "{event}");
    child.interrupt();
    let status = wait_for("the program ends", || child.0.try_wait().expect("a child"));
    assert_eq!(status.code(), Some(130));
    log.close().await;
}

#[tokio::test]
async fn status_and_doctor_tell_what_there_is() {
    let folder = filled().await;
    change(folder.path(), "INSERT INTO kafold_projection (name, live_generation, fingerprint, desired_state, actual_state, actual_state_reason, updated_at) VALUES ('sales', 1, 'f', 'running', 'running', NULL, 0)").await;
    change(folder.path(), "INSERT INTO kafold_checkpoint (projection, generation, partition, next_offset, fold_state, fence, end_offset, last_event_at, updated_at) VALUES ('sales', 1, 0, 3, '', 1, 5, 1000000, 0)").await;
    let text = run(folder.path(), &with(&["status"])).ok();
    assert!(text.contains("sqlite://a.db: 1 partition, 5 records"), "{text}");
    assert!(text.contains("sales") && text.contains("2 records"), "{text}");
    let json = run(folder.path(), &with(&["status", "--json"])).json();
    assert_eq!((&json["log"]["kind"], &json["log"]["records"]), (&json!("embedded"), &json!(5)));
    assert_eq!(json["index"], Value::Null, "a log in a file is its own index");
    let sales = &json["projections"][0];
    assert_eq!((&sales["name"], &sales["state"]), (&json!("sales"), &json!("running")));
    assert_eq!((&sales["lag_records"], &sales["generation"]), (&json!(2), &json!(1)));
    assert!(sales["lag_seconds"].as_f64() > Some(1e6), "{sales}");
    // Without the log, as far as the database tells.
    let json = run(folder.path(), &["status", "--database", "sqlite://a.db", "--json"]).json();
    assert_eq!((&json["log"], &json["projections"][0]["lag_records"]), (&Value::Null, &json!(2)));

    let json = run(folder.path(), &with(&["doctor", "--json"])).json();
    assert_eq!((&json["healthy"], &json["warnings"]), (&json!(true), &json!(0)));
    change(folder.path(), "UPDATE kafold_projection SET actual_state = 'stopped', actual_state_reason = 'a table is gone'").await;
    let sick = run(folder.path(), &with(&["doctor"]));
    sick.says(1, &["kafold: 1 problem in "]);
    assert!(sick.stdout.contains("sales has stopped: a table is gone"), "{sick:?}");
    change(folder.path(), "UPDATE kafold_checkpoint SET next_offset = 6").await;
    let sick = run(folder.path(), &with(&["doctor", "--json"]));
    sick.says(1, &["problem"]);
    let json: Value = serde_json::from_str(&sick.stdout).expect("JSON");
    assert_eq!(json["healthy"], false);
    assert!(sick.stdout.contains("sales stands at 0:6, behind the end of the log"), "{sick:?}");
    let ahead = run(folder.path(), &with(&["status"]));
    ahead.says(
        1,
        &["ahead of its log", "sales stands at 0:6, the log ends at 0:5", "positions reset"],
    );
    let ahead = run(folder.path(), &with(&["status", "--json"]));
    let json: Value = serde_json::from_str(&ahead.stdout).expect("JSON");
    assert_eq!(json["ahead"], json!([{"what": "sales", "partition": 0, "next": 6, "end": 5}]));
}

/// Sequences which act on a terminal: escape sequences, single control characters of C0 and C1,
/// DEL, directions of text.
const CONTROL_SEQUENCES: [&str; 30] = [
    "\u{1b}[2J",
    "\u{1b}[31m",
    "\u{1b}]0;title\u{7}",
    "\u{1b}]8;;http://x\u{1b}\\\\",
    "\u{1b}P$q\u{1b}\\\\",
    "\u{1b}c",
    "\u{1b}[6n",
    "\u{1b}[?1049h",
    "\u{1b}]52;c;eA==\u{7}",
    "\u{1}",
    "\u{7}",
    "\u{8}",
    "\t",
    "\u{b}",
    "\u{c}",
    "\r",
    "\r\n",
    "\u{e}",
    "\u{18}",
    "\u{1b}",
    "\u{7f}",
    "\u{80}",
    "\u{85}",
    "\u{9b}2J",
    "\u{9d}0;t\u{9c}",
    "\u{61c}",
    "\u{200f}",
    "\u{202a}",
    "\u{202e}",
    "\u{2066}",
];

#[tokio::test]
async fn no_control_character_of_the_log_or_the_database_is_printed() {
    let folder = TempDir::new().expect("a folder");
    let log = open(&url(folder.path()), None).await;
    let store = log.store();
    for sequence in CONTROL_SEQUENCES {
        let in_json = serde_json::to_string(sequence).expect("a text");
        append(&store, "order-1", &format!("no JSON {sequence} at all")).await;
        append(&store, "order-1", &format!("{{\t\"in\":\r\n{in_json}}}")).await;
        // Only some sequences are valid in an id.
        let id = format!("order-x{sequence}y");
        if let Ok(stream) = id.parse::<kafold::StreamId>() {
            append(&store, &stream.to_string(), "{}").await;
        }
        let mut event = support::event("order.changed.v1", "{}");
        event.metadata.correlation_id = Some(format!("a{sequence}b\nc"));
        support::append_event(&store, "order-2", event).await;
    }
    log.close().await;
    let reason = CONTROL_SEQUENCES.concat();
    let mut connection = SqliteConnection::connect(&url(folder.path())).await.expect("the file");
    query("INSERT INTO kafold_projection (name, live_generation, fingerprint, desired_state, actual_state, actual_state_reason, updated_at) VALUES ('sales', 1, 'f', 'running', 'stopped', $1, 0)")
        .bind(&reason)
        .execute(&mut connection)
        .await
        .expect("a row");
    connection.close().await.expect("closed");
    let unknown = format!("order-{}", "\u{1b}[2J\u{9b}\u{202e}");
    for command in [
        &["events", "tail", "--from-beginning"][..],
        &["stream", "show", "order-1"],
        &["stream", "show", "order-2"],
        &["stream", "show", &unknown],
        &["status"],
        &["doctor"],
        &["projections", "list"],
    ] {
        for json in [&[][..], &["--json"]] {
            let ended = run(folder.path(), &[command, json, &LOG].concat());
            for text in [&ended.stdout, &ended.stderr] {
                let acts = |c: char| {
                    (c.is_control() && c != '\n')
                        || matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
                };
                let found: Vec<_> = text.chars().filter(|c| acts(*c)).collect();
                assert!(found.is_empty(), "{command:?} {json:?} printed {found:?}: {text}");
            }
        }
    }
    let tail = run(folder.path(), &with(&["events", "tail", "--from-beginning"])).ok();
    assert_eq!(tail.lines().count(), tail.lines().filter(|line| line.starts_with("0:")).count());
    assert!(tail.contains(r"no JSON \u001b[2J at all"), "{tail}");
    let tail = run(folder.path(), &with(&["events", "tail", "--from-beginning", "--json"])).ok();
    let payloads: Vec<String> = tail
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON a line"))
        .filter_map(|event| Some(event["payload"]["in"].as_str()?.to_owned()))
        .collect();
    assert_eq!(payloads, CONTROL_SEQUENCES, "a document keeps its meaning");
}

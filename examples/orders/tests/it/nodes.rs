//! Replicas of the service: any of them takes any command, and each may die at any moment.

use crate::support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kafold::CommandId;
use serde_json::{Value, json};
use support::{
    Reply, Service, Stack, free_address, order, orders, run, timed, unique_name, wait_at_most,
    wait_for,
};
use uuid::Uuid;

/// What `awk` adds up of the sample: purchases, cents, CDs, customers.
const SAMPLE: [i64; 4] = [199, 701_236, 497, 48];

fn sample() -> String {
    format!("{}/tests/data/cdnow_sample.txt", env!("CARGO_MANIFEST_DIR"))
}

/// Which node owns each partition, as one node sees it.
fn owners(node: &Service) -> BTreeMap<u64, String> {
    let nodes = node.get("/nodes").json();
    let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
    let owned = nodes.into_iter().flat_map(|node| {
        let address = node["address"].as_str().unwrap_or_default().to_owned();
        let partitions = node["partitions"].as_array().cloned().unwrap_or_default();
        partitions
            .into_iter()
            .map(move |owned| (owned["partition"].as_u64().expect("a number"), address.clone()))
    });
    owned.collect()
}

/// Waits until every one of the nodes owns something and together they own everything.
fn shared(nodes: &[&Service]) {
    wait_for("the partitions are shared", || {
        let owners = owners(nodes[0]);
        let each = nodes.iter().all(|node| owners.values().any(|address| *address == node.url()));
        (owners.len() == 3 && each).then_some(())
    });
    nodes.iter().for_each(|node| node.wait_ready());
}

fn start_import(stack: &Stack, nodes: &[&Service]) -> std::process::Child {
    let sample = sample();
    let urls: Vec<_> = nodes.iter().map(|node| node.url()).collect();
    let urls = urls.join(",");
    // A few at a time, so that there is time to disturb.
    orders(stack.folder.path(), &["import", &sample, "--in-flight", "4", "--url", &urls])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts")
}

fn placed(node: &Service) -> i64 {
    node.get("/reports/sales?by=day").json()["total"]["orders"].as_i64().unwrap_or(0)
}

/// After whatever happened: imported once more, everything is there, once, in gapless streams.
fn is_whole(stack: &Stack, node: &Service) {
    let output = run(stack.folder.path(), &["import", &sample(), "--url", &node.url()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("reports what the file has"), "{output:?}");
    let total = node.get("/reports/sales?by=customer").json();
    let count = |name: &str| total["total"][name].as_i64().expect("a number");
    let customers = total["rows"].as_array().expect("rows").len() as i64;
    let found = [count("orders"), count("amount_cents"), count("quantity"), customers];
    assert_eq!(found, SAMPLE);
    for line in 2..=200 {
        let events = node.get(&format!("/orders/cdnow-{line}/events")).json();
        let versions: Vec<_> = events["events"]
            .as_array()
            .expect("events")
            .iter()
            .map(|event| event["version"].as_u64().expect("a version"))
            .collect();
        assert_eq!(versions, [1, 2], "cdnow-{line}");
    }
}

#[cfg(feature = "otlp")]
#[test]
fn a_trace_leads_through_the_node_that_owns_the_stream() {
    use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
    use support::collector::{Collector, child, hex, number, text};

    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let collector = Collector::start();
    let mut nodes = [(); 2].map(|()| stack.start_with(&[], &collector.environment()));
    shared(&nodes.iter().collect::<Vec<_>>());
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let trace_parent = format!("00-{trace}-00f067aa0ba902b7-01");
    // Both nodes get an order of every partition, whichever they own.
    for node in &nodes {
        for nth in 0..12 {
            let order = order(&format!("hop-{}-{nth}", node.address.port()), 1);
            let placed = node.post_with("/orders", &[("traceparent", &trace_parent)], &order);
            assert_eq!(placed.status, 201, "{placed:?}");
        }
    }
    for node in &mut nodes {
        node.signal("TERM");
        assert!(node.ended().success(), "{}", node.log());
    }
    let spans = collector.trace(trace);
    let log = stack.log_name().expect("it has topics");
    let topic = format!("{log}.commands");
    let sent = spans.iter().find(|span| span.name == format!("send {topic}"));
    let sent = sent.expect("a command for the other node");
    assert_eq!(sent.kind(), SpanKind::Producer);
    assert_eq!(text(sent, "messaging.destination.name"), topic);
    let name = format!("process {topic}");
    let processed = child(&spans, &hex(&sent.span_id), &name, SpanKind::Consumer);
    let key = "messaging.kafka.message.key";
    assert_eq!(text(processed, key), text(sent, key));
    let partition = "messaging.destination.partition.id";
    assert_eq!(text(processed, partition), text(sent, partition));
    assert!(number(processed, "messaging.kafka.offset") >= 0);
    let command = child(&spans, &hex(&processed.span_id), "command", SpanKind::Internal);
    assert_eq!(text(command, "outcome"), "appended");
    child(&spans, &hex(&command.span_id), &format!("send {log}.events"), SpanKind::Producer);
}

#[test]
fn an_import_to_three_replicas_survives_kills() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let addresses = [free_address(), free_address(), free_address()];
    let start = |address: &str| stack.start(&["--listen", address]);
    let mut nodes: Vec<_> = addresses.iter().map(|address| start(address)).collect();
    shared(&nodes.iter().collect::<Vec<_>>());
    let mut importing = start_import(&stack, &nodes.iter().collect::<Vec<_>>());
    for round in 0..3 {
        let (victim, watcher) = (round % 3, &nodes[(round + 1) % 3]);
        wait_for("some orders are in", || (placed(watcher) >= 20 * round as i64).then_some(()));
        let killed = std::mem::replace(&mut nodes[victim], start(&free_address()));
        killed.kill();
        nodes[victim] = start(&addresses[victim]);
        nodes[victim].wait_ready();
    }
    let status = wait_for("the import ends", || importing.try_wait().expect("a child"));
    assert!(status.success(), "{}", nodes[0].log());
    is_whole(&stack, &nodes[1]);
}

#[test]
fn in_a_rolling_restart_a_single_retry_cures_every_error() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let addresses = [free_address(), free_address(), free_address()];
    let start = |address: &str| stack.start(&["--listen", address]);
    let mut nodes: Vec<_> = addresses.iter().map(|address| start(address)).collect();
    shared(&nodes.iter().collect::<Vec<_>>());
    let enough = AtomicBool::new(false);
    let outcomes = thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|client| {
                let (enough, addresses) = (&enough, &addresses);
                scope.spawn(move || {
                    let mut outcomes = Vec::new();
                    for nth in 0.. {
                        if enough.load(Ordering::Relaxed) {
                            return outcomes;
                        }
                        let order_id = format!("roll-{client}-{nth}");
                        outcomes.push(place_retrying_once(addresses, client + nth, &order_id));
                    }
                    outcomes
                })
            })
            .collect();
        for (nth, address) in addresses.iter().enumerate() {
            nodes[nth].signal("TERM");
            assert!(nodes[nth].ended().success(), "{}", nodes[nth].log());
            nodes[nth] = start(address);
            shared(&nodes.iter().collect::<Vec<_>>());
        }
        enough.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect::<Vec<_>>()
    });
    assert!(outcomes.len() > 30, "{}", outcomes.len());
    for (order_id, reply) in &outcomes {
        assert_eq!(reply.status, 201, "{order_id}: {reply:?}");
        let order_id = order_id.split(',').next().expect("an id");
        // Another node's streams are as fresh as the index, which the last ones may not be in yet.
        let events = wait_for("the order is there", || {
            nodes[0].get(&format!("/orders/{order_id}/events")).json()["events"].as_array().cloned()
        });
        assert_eq!(events.len(), 1, "{order_id}");
    }
}

/// Places an order at the node whose turn it is; if that fails, once more with the same key at the
/// next.
fn place_retrying_once(addresses: &[String; 3], turn: usize, order_id: &str) -> (String, Reply) {
    let key = CommandId::derived(Uuid::NAMESPACE_OID, order_id.as_bytes()).to_string();
    let post = |turn: usize| {
        let address = addresses[turn % 3].parse().expect("an address");
        support::post(address, "/orders", &[("idempotency-key", &key)], &order(order_id, 5))
    };
    let first = post(turn);
    if first.status == 201 {
        return (order_id.to_owned(), first);
    }
    (format!("{order_id}, after {} {:?}", first.status, first.text), post(turn + 1))
}

#[test]
fn a_replica_that_was_frozen_answers_nothing_that_another_has_changed() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let first = stack.serve();
    first.place("shared", 700);
    first.signal("STOP");
    // Whoever comes owns everything as soon as the group has given up the first.
    let second = stack.serve();
    let paid = second.post("/orders/shared/payment", &json!({"amount_cents": 700}));
    assert_eq!(paid.status, 200, "{paid:?}");
    let order_ids: Vec<_> = (0..10).map(|nth| format!("second-{nth}")).collect();
    order_ids.iter().for_each(|order_id| drop(second.place(order_id, 1)));
    first.signal("CONT");

    // It had loaded the order before it was paid: a rejection of its own would be a stale one.
    let shipped =
        first.post("/orders/shared/shipment", &json!({"carrier": "post", "tracking": "t1"}));
    assert_eq!(shipped.status, 200, "it was paid: {shipped:?}");
    let again = first.post("/orders/shared/payment", &json!({"amount_cents": 700}));
    again.is_problem(422, "already-paid");
    let other = first.place(&unique_name(), 1);
    let path = format!("/orders/{}?after={}", id(&other), other.position());
    assert_eq!(second.get(&path).status, 200, "what it answered is in the log");
    for order_id in &order_ids {
        let events = second.get(&format!("/orders/{order_id}/events")).json();
        assert_eq!(events["events"].as_array().map(Vec::len), Some(1), "{order_id}");
    }
    let log = first.log();
    let noticed = ["superseded by", "revoked by the group", "the group cannot be heard"];
    assert!(noticed.iter().any(|words| log.contains(words)), "{log}");
    shared(&[&first, &second]);
}

fn id(placed: &Reply) -> String {
    placed.json()["order_id"].as_str().expect("an id").to_owned()
}

#[test]
fn every_replica_answers_as_the_owner_would() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let nodes = [stack.serve(), stack.serve(), stack.serve()];
    shared(&nodes.iter().collect::<Vec<_>>());
    for nth in 0..9 {
        let (order_id, turn) = (format!("any-{nth}"), |n: usize| &nodes[(nth + n) % 3]);
        let key = CommandId::derived(Uuid::NAMESPACE_OID, order_id.as_bytes()).to_string();
        let place = |node: &Service| {
            node.post_with("/orders", &[("idempotency-key", &key)], &order(&order_id, 700))
        };
        let placed = place(turn(0));
        assert_eq!(placed.status, 201, "{placed:?}");
        assert_eq!(place(turn(1)).json(), placed.json(), "the same key elsewhere");
        turn(2).post("/orders", &order(&order_id, 700)).is_problem(409, "order-exists");
        let pay = |node: &Service, headers: &[(&str, &str)], amount: i64| -> Reply {
            let path = format!("/orders/{order_id}/payment");
            node.post_with(&path, headers, &json!({"amount_cents": amount}))
        };
        pay(turn(0), &[], 1).is_problem(422, "wrong-amount");
        pay(turn(1), &[], 1).is_problem(422, "wrong-amount");
        pay(turn(2), &[("if-match", "\"7\"")], 700).is_problem(412, "precondition-failed");
        let paid = pay(turn(1), &[("if-match", "\"1\"")], 700);
        assert_eq!((paid.status, &paid.json()["version"]), (200, &Value::from(2)), "{paid:?}");
        let path = format!("/orders/{order_id}?after={}", paid.position());
        for node in &nodes {
            let shown = node.get(&path);
            assert_eq!(shown.json()["status"], "paid", "{shown:?}");
            assert_eq!(shown.header("kafold-applied").map(|list| list.split(',').count()), Some(3));
        }
    }
}

#[test]
fn a_replica_with_another_database_is_refused_and_the_first_one_serves_on() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let first = stack.serve();
    assert_eq!(first.place("a1", 100).status, 201);
    let mut args = vec!["serve", "--listen", "127.0.0.1:0"];
    args.extend(stack.args.iter().map(String::as_str));
    *args.last_mut().expect("the database") = "sqlite://another.db";
    let (refused, took) = timed(|| run(stack.folder.path(), &args));
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("writes another database") && text.contains("give both"), "{text}");
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(first.get("/health/ready").status, 200, "{}", first.log());
    let placed = first.place("a2", 100);
    let path = format!("/orders/a2?after={}", placed.position());
    assert_eq!(first.get(&path).status, 200);
}

/// Builds a library that sets the clock of a program two hours ahead while a file exists.
fn clock_ahead(folder: &Path) -> PathBuf {
    const SOURCE: &str = r#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <sys/time.h>
        #include <threads.h>
        #include <time.h>
        #include <unistd.h>

        static long ahead(void) {
            const char *file = getenv("CLOCK_AHEAD");
            return file && access(file, F_OK) == 0 ? 7200 : 0;
        }

        int clock_gettime(clockid_t id, struct timespec *at) {
            long code = syscall(SYS_clock_gettime, id, at);
            if (code == 0 && id == CLOCK_REALTIME) at->tv_sec += ahead();
            return (int)code;
        }

        int gettimeofday(struct timeval *restrict at, void *restrict zone) {
            struct timespec now;
            (void)zone;
            clock_gettime(CLOCK_REALTIME, &now);
            at->tv_sec = now.tv_sec;
            at->tv_usec = now.tv_nsec / 1000;
            return 0;
        }

        /* The kernel waits by its own clock. */
        int cnd_timedwait(cnd_t *restrict condition, mtx_t *restrict mutex,
                          const struct timespec *restrict until) {
            static int (*wait)(cnd_t *, mtx_t *, const struct timespec *);
            struct timespec real = *until;
            if (!wait) *(void **)&wait = dlsym(RTLD_NEXT, "cnd_timedwait");
            real.tv_sec -= ahead();
            return wait(condition, mutex, &real);
        }

        time_t time(time_t *at) {
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            if (at) *at = now.tv_sec;
            return now.tv_sec;
        }
    "#;
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    std::fs::write(&source, SOURCE).expect("written");
    let mut cc = Command::new("cc");
    let built = cc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(built.expect("cc starts").success());
    library
}

#[test]
fn a_replica_with_a_refused_clock_leaves_its_partitions_to_the_others() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let library = clock_ahead(stack.folder.path());
    let switch = stack.folder.path().join("ahead");
    std::fs::write(&switch, "").expect("written");
    let right = stack.serve();
    let text = |path: &Path| path.to_str().expect("is text").to_owned();
    let environment = [("LD_PRELOAD", text(&library)), ("CLOCK_AHEAD", text(&switch))];
    let environment: Vec<_> = environment.iter().map(|(name, it)| (*name, it.as_str())).collect();
    let wrong = stack.start_with(&[], &environment);
    let complaint = |words: &str| wrong.get("/health/ready").text.contains(words);
    wait_for("it leaves the group", || {
        complaint("outside of the group of the nodes").then_some(())
    });
    assert!(complaint("set the clock of this machine"));
    wait_for("the other replica owns all", || (owners(&right).len() == 3).then_some(()));
    for nth in 0..12 {
        assert_eq!(right.place(&format!("clock-{nth}"), 100).status, 201, "{}", right.log());
    }
    std::fs::remove_file(&switch).expect("removed");
    wait_at_most(Duration::from_secs(90), "the clock is right, and it is ready", || {
        (wrong.get("/health/ready").status == 200).then_some(())
    });
    shared(&[&right, &wrong]);
}

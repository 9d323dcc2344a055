//! `orders import` against a running service.

use crate::support;

use std::fs;
use std::process::{Child, Output, Stdio};

use serde_json::{Value, json};
use support::{Service, Stack, free_address, on_each_log, orders, run, wait_for};

on_each_log!(
    a_second_import_changes_nothing,
    an_import_survives_three_kills_of_the_service,
    an_import_beside_other_orders_compares_its_own,
);

/// What `awk` adds up of the sample: purchases, cents, CDs, customers.
const SAMPLE: [i64; 4] = [199, 701_236, 497, 48];

fn sample() -> String {
    format!("{}/tests/data/cdnow_sample.txt", env!("CARGO_MANIFEST_DIR"))
}

fn import(stack: &Stack, service: &Service, file: &str) -> Output {
    run(stack.folder.path(), &["import", file, "--url", &service.url()])
}

#[track_caller]
fn is_imported(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("The service reports what the file has."), "{text}");
}

#[track_caller]
fn totals_are(service: &Service, expected: [i64; 4]) {
    let [orders, amount_cents, quantity, customers] = expected;
    let total = json!({"orders": orders, "quantity": quantity, "amount_cents": amount_cents});
    for by in ["day", "sku", "customer"] {
        let report = service.get(&format!("/reports/sales?by={by}")).json();
        assert_eq!(report["total"], total, "{by}");
        if by == "customer" {
            assert_eq!(report["rows"].as_array().map(Vec::len), Some(customers as usize));
        }
    }
}

/// Every purchase of the sample is placed at version 1 and paid at version 2, and nothing else.
fn streams_are_whole(service: &Service) {
    for line in 2..=200 {
        let stream = service.get(&format!("/orders/cdnow-{line}/events")).json();
        let events = stream["events"].as_array().unwrap_or_else(|| panic!("{stream}"));
        let seen: Vec<_> = events.iter().map(|event| (&event["version"], &event["type"])).collect();
        let (placed, paid) = (json!("order.placed.v1"), json!("order.paid.v1"));
        assert_eq!(seen, [(&json!(1), &placed), (&json!(2), &paid)], "line {line}");
    }
}

fn a_second_import_changes_nothing(stack: &Stack) {
    let service = stack.serve();
    is_imported(&import(stack, &service, &sample()));
    totals_are(&service, SAMPLE);
    let order = service.get("/orders/cdnow-2").json();
    let line = json!({"sku": "cd", "quantity": 1, "amount_cents": 1177});
    assert_eq!((&order["customer"], &order["lines"]), (&json!("00001"), &json!([line])));
    assert_eq!(order["placed_at"], "1997-01-01T00:00:00Z");
    let end = |service: &Service| service.get("/orders/cdnow-200/events").text;
    let before = end(&service);

    is_imported(&import(stack, &service, &sample()));
    totals_are(&service, SAMPLE);
    streams_are_whole(&service);
    assert_eq!(end(&service), before);
}

fn an_import_survives_three_kills_of_the_service(stack: &Stack) {
    let address = free_address();
    let service = stack.start(&["--listen", &address]);
    service.wait_ready();
    let mut importing = start_import(stack, &service);
    let mut service = Some(service);
    for kill in 1..=3 {
        let running = service.take().expect("a service");
        wait_for("some orders are in", || {
            let report = running.get("/reports/sales?by=day").json();
            (report["total"]["orders"].as_i64()? >= kill * 30).then_some(())
        });
        running.kill();
        // Where the import looks for it: it waits for the service to come back.
        service = Some(stack.start(&["--listen", &address]));
    }
    let service = service.expect("a service");
    let status = wait_for("the import ends", || importing.try_wait().expect("a child"));
    assert!(status.success(), "{}", service.log());
    is_imported(&import(stack, &service, &sample()));
    totals_are(&service, SAMPLE);
    streams_are_whole(&service);
}

fn start_import(stack: &Stack, service: &Service) -> Child {
    // Two at a time, so that there is time to kill the service.
    orders(stack.folder.path(), &["import", &sample(), "--in-flight", "2", "--url", &service.url()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts")
}

fn an_import_beside_other_orders_compares_its_own(stack: &Stack) {
    let service = stack.serve();
    service.place("own", 700);
    let output = import(stack, &service, &sample());
    is_imported(&output);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("holds other orders too"), "{text}");

    let other =
        json!({"customer": "c9", "lines": [{"sku": "cd", "quantity": 1, "amount_cents": 5}]});
    assert_eq!(service.post("/orders", &other).status, 201);
    let output = import(stack, &service, &sample());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("differs"), "{text}");
}

#[test]
fn a_file_with_mistakes_sends_nothing() {
    let stack = Stack::embedded();
    let service = stack.serve();
    let file = stack.folder.path().join("bad.txt");
    fs::write(&file, "00001 19970101 1 11.77\n00002 19970230 1 5.00\n00003 19970101 0 1\n")
        .expect("a file");
    let output = import(&stack, &service, "bad.txt");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for told in ["bad.txt", "line 2: ", "line 3: ", "nothing was sent"] {
        assert!(errors.contains(told), "{errors}");
    }
    assert_eq!(service.get("/orders/cdnow-1/events").status, 404);

    for (content, told) in [(&b""[..], "no purchase"), (b"\xff\xfe\n", "not UTF-8")] {
        fs::write(&file, content).expect("a file");
        let errors = import(&stack, &service, "bad.txt").stderr;
        let errors = String::from_utf8_lossy(&errors).into_owned();
        assert!(errors.contains(told), "{errors}");
    }
    let errors = import(&stack, &service, "absent.txt").stderr;
    assert!(String::from_utf8_lossy(&errors).contains("cannot read absent.txt"));
}

#[test]
fn a_changed_line_is_refused_and_named() {
    let stack = Stack::embedded();
    let service = stack.serve();
    let file = stack.folder.path().join("one.txt");
    fs::write(&file, "00001 19970101 1 11.77\n").expect("a file");
    is_imported(&import(&stack, &service, "one.txt"));
    fs::write(&file, "00001 19970101 1 11.78\n").expect("a file");
    let output = import(&stack, &service, "one.txt");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("line 1: the service refused it with 409"), "{errors}");
}

#[test]
fn without_a_service_it_fails_at_once_and_says_what_to_do() {
    let stack = Stack::embedded();
    let folder = stack.folder.path();
    // Port 9 is discard: nobody listens there.
    let output = run(folder, &["import", &sample(), "--url", "http://127.0.0.1:9"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for told in ["http://127.0.0.1:9", "orders serve", "--url"] {
        assert!(errors.contains(told), "{errors}");
    }
    for url in ["x", "https://127.0.0.1", "http://"] {
        let output = run(folder, &["import", &sample(), "--url", url]);
        assert_eq!(output.status.code(), Some(2), "{url}");
    }
}

#[test]
fn an_interrupted_import_says_that_it_can_go_on() {
    let stack = Stack::embedded();
    let service = stack.serve();
    // Stopped, it answers nothing, so the import cannot end before it is interrupted.
    let mut importing = orders(
        stack.folder.path(),
        &["import", &sample(), "--in-flight", "1", "--url", &service.url()],
    )
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .spawn()
    .expect("the program starts");
    wait_for("an order is in", || {
        let report: Value = service.get("/reports/sales?by=day").json();
        (report["total"]["orders"].as_i64()? > 0).then_some(())
    });
    service.signal("STOP");
    let pid = importing.id().to_string();
    let sent = std::process::Command::new("kill").args(["-INT", &pid]).status();
    assert!(sent.expect("kill starts").success());
    let status = wait_for("the import ends", || importing.try_wait().expect("a child"));
    assert_eq!(status.code(), Some(130));
    let output = importing.wait_with_output().expect("its output");
    assert!(String::from_utf8_lossy(&output.stderr).contains("running it again is safe"));
    service.signal("CONT");
    is_imported(&import(&stack, &service, &sample()));
    streams_are_whole(&service);
}

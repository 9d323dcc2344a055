//! Start, waiting, stopping, and two of them on one log, against the built program.

use crate::support;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use serde_json::json;
use support::{Stack, on_each_log, order, run, timed, unique_name, wait_for};

on_each_log!(
    asked_to_stop_it_settles_and_keeps_what_it_answered,
    a_killed_service_keeps_what_it_answered,
);

fn asked_to_stop_it_settles_and_keeps_what_it_answered(stack: &Stack) {
    let mut service = stack.serve();
    let accepted: Vec<String> = thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let service = &service;
                scope.spawn(move || {
                    let place = |nth: i32| {
                        let order_id = format!("stop-{writer}-{nth}");
                        (service.post("/orders", &order(&order_id, 1)).status == 201)
                            .then_some(order_id)
                    };
                    // Until it takes no more.
                    (0..).map_while(place).collect::<Vec<_>>()
                })
            })
            .collect();
        wait_for("writes are under way", || {
            (service.get("/orders/stop-0-5/events").status == 200).then_some(())
        });
        service.signal("TERM");
        writers.into_iter().flat_map(|writer| writer.join().expect("a writer")).collect()
    });
    let (status, took) = timed(|| service.ended());
    assert!(status.success(), "{status}: {}", service.log());
    assert!(took.as_secs() < 15, "{took:?}");
    assert!(accepted.len() >= 6);
    let service = stack.serve();
    for order_id in accepted {
        assert_eq!(service.get(&format!("/orders/{order_id}/events")).status, 200, "{order_id}");
    }
}

fn a_killed_service_keeps_what_it_answered(stack: &Stack) {
    let service = stack.serve();
    let positions: Vec<_> =
        (0..20).map(|nth| service.place(&format!("killed-{nth}"), 1).position()).collect();
    service.kill();
    let service = stack.serve();
    for (nth, position) in positions.iter().enumerate() {
        let path = format!("/orders/killed-{nth}?after={position}");
        assert_eq!(service.get(&path).status, 200, "{path}");
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let stack = Stack::embedded();
    let mut service = stack.serve();
    // A request that does not come to its end keeps the first signal's stop waiting.
    let mut slow = std::net::TcpStream::connect(service.address).expect("a connection");
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    std::io::Write::write_all(&mut slow, head.as_bytes()).expect("half a request");
    wait_for("the request has begun", || {
        let inside = service.get("/metrics").status == 200;
        inside.then_some(())
    });
    service.signal("TERM");
    wait_for("it stops", || service.log().contains("stopping").then_some(()));
    service.signal("TERM");
    let (status, took) = timed(|| service.ended());
    assert!(status.success() && took.as_secs() < 5, "{status} after {took:?}");
}

#[test]
fn a_body_that_does_not_come_is_answered_within_the_deadline() {
    let stack = Stack::embedded();
    let service = stack.start(&["--deadline", "1s"]);
    service.wait_ready();
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    let (reply, took) = timed(|| service.send(head.as_bytes()));
    reply.is_problem(408, "body-timeout");
    assert!(took.as_millis() < 2_500, "{took:?}");
}

#[test]
fn wrong_settings_end_it_with_a_message_that_names_them() {
    let stack = Stack::embedded();
    let folder = stack.folder.path();
    fs::write(folder.join("not-a-database"), "just text, and long enough to be read as a file header of some database, which it is not at all, not even a bit of one").expect("a file");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = listener.local_addr().expect("an address").to_string();
    let cases: [(&[&str], i32, &[&str]); 16] = [
        (&["--log", "mysql://x"], 2, &["--log", "sqlite://FILE", "kafka://"]),
        (&["--log", "kafka://localhost:9092/x"], 2, &["--database"]),
        (
            &["--log", "kafka://localhost/x y", "--database", "sqlite://x.db"],
            1,
            &["localhost", "no port"],
        ),
        (&["--log", "sqlite://absent/orders.db"], 1, &["absent"]),
        (&["--log", "sqlite://not-a-database"], 1, &["not-a-database"]),
        (&["--log", "sqlite://"], 1, &["sqlite://"]),
        (&["--database", "mysql://x"], 2, &["--database", "postgres://"]),
        (&["--database", "postgres://127.0.0.1:port/x"], 1, &["database"]),
        (&["--listen", "nowhere"], 2, &["nowhere"]),
        (&["--listen", &taken], 1, &[&taken, "--listen"]),
        (&["--listen", "0.0.0.0:0"], 2, &["0.0.0.0:0", "--behind-proxy", "open_listener"]),
        (&["--bearer-token", "secret-text-that-is-long"], 2, &["@FILE", "$NAME"]),
        (&["--bearer-token", "@absent"], 2, &["--bearer-token", "absent"]),
        (&["--bearer-token", "$ABSENT"], 2, &["--bearer-token", "ABSENT"]),
        (&["--deadline", "1h"], 2, &["--deadline", "100ms to 300s"]),
        (&["--colour", "red"], 2, &["--colour"]),
    ];
    for (args, code, told) in cases {
        let listen = if args[0] == "--listen" { &[][..] } else { &["--listen", "127.0.0.1:0"][..] };
        let output = run(folder, &[&["serve"][..], listen, args].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        for text in told {
            assert!(errors.contains(text), "{args:?}: {errors}");
        }
    }
}

#[test]
fn an_open_listener_is_served_behind_a_proxy_or_when_allowed_and_warned_about() {
    let stack = Stack::embedded();
    let proxied = stack.start(&["--listen", "0.0.0.0:0", "--behind-proxy"]);
    assert_eq!(proxied.get("/health/live").status, 200);
    assert!(!proxied.log().contains("open_listener"), "{}", proxied.log());
    proxied.kill();
    let open = stack.start(&["--listen", "0.0.0.0:0", "--allow-unsafe", "open_listener"]);
    assert_eq!(open.get("/health/live").status, 200);
    assert!(open.log().contains("open_listener is allowed"), "{}", open.log());
}

#[test]
fn with_a_bearer_token_all_but_health_and_the_list_of_endpoints_wants_it() {
    let stack = Stack::embedded();
    let token = "0123456789abcdef0123456789abcdef";
    let file = stack.folder.path().join("token");
    fs::write(&file, format!("{token}\n")).expect("a file");
    let readable = Permissions::from_mode(0o644);
    fs::set_permissions(&file, readable).expect("a mode");
    let listen = ["serve", "--listen", "127.0.0.1:0", "--bearer-token", "@token"];
    let refused = run(stack.folder.path(), &listen);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("readable_secret") && said.contains("chmod") && !said.contains(token));

    fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("a mode");
    let service = stack.start(&["--bearer-token", "@token"]);
    service.wait_ready();
    assert_eq!(service.get("/").status, 200);
    let with = |authorization: &str| {
        let headers = [("authorization", authorization)];
        service.request("GET", "/orders/a", &headers, b"")
    };
    service.get("/orders/a").is_problem(401, "unauthorized");
    assert_eq!(service.get("/metrics").header("www-authenticate"), Some("Bearer"));
    service.post("/orders", &order("a", 1)).is_problem(401, "unauthorized");
    for wrong in [
        token,
        "Bearer",
        "Bearer ",
        "Basic x",
        &format!("Bearer {token}0"),
        &format!("Basic {token}"),
    ] {
        with(wrong).is_problem(401, "unauthorized");
    }
    with(&format!("Bearer {token}")).is_problem(404, "unknown");
    let headers = [("authorization", format!("bearer {token}"))];
    let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(service.post_with("/orders", &headers, &order("a", 1)).status, 201);
    assert!(!service.log().contains(token));
}

#[test]
fn the_page_that_a_browser_shows_has_the_headers_that_keep_it_harmless() {
    let page = Stack::embedded().serve().get("/");
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
        ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"),
    ] {
        assert_eq!(page.header(name), Some(value), "{page:?}");
    }
}

#[test]
fn help_teaches() {
    let stack = Stack::embedded();
    let told = |args: &[&str]| {
        let output = run(stack.folder.path(), args);
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for text in [
        "serve",
        "import",
        "KAFOLD_LOG",
        "KAFOLD_DATABASE",
        "KAFOLD_LISTEN",
        "--deadline",
        "--behind-proxy",
        "proxy that ends TLS",
        "4096 connections",
        "Examples",
    ] {
        assert!(told(&["--help"]).contains(text), "{text}");
    }
    assert!(told(&["import", "--help"]).contains("cdnow-N"));
    assert!(told(&["--version"]).contains("orders"));
}

#[test]
fn started_before_its_broker_and_database_it_waits_and_says_so() {
    let stack = Stack::embedded();
    // Nobody listens on port 9.
    let database = ["--database", "postgres://nobody@127.0.0.1:9/nothing"];
    let mut service = stack.start(&database);
    wait_for("it says that it waits", || {
        service.log().contains("the database is not there yet").then_some(())
    });
    assert_eq!(service.get("/health/live").status, 200);
    let ready = service.get("/health/ready");
    ready.is_problem(503, "unavailable");
    assert!(ready.text.contains("the database is not there yet"), "{ready:?}");
    service.post("/orders", &order("early", 1)).is_problem(503, "unavailable");
    service.get("/orders/early").is_problem(503, "unavailable");
    service.request("POST", "/orders", &[], b"").is_problem(415, "unsupported-media-type");
    service.signal("TERM");
    assert!(service.ended().success());

    let log = format!("kafka://127.0.0.1:9/{}", unique_name());
    let args = ["--log", log.as_str(), "--database", "sqlite://views.db"];
    let mut service = stack.start(&args);
    wait_for("it says that it waits", || {
        service.log().contains("the log is not there yet").then_some(())
    });
    service.get("/health/ready").is_problem(503, "unavailable");
    service.signal("INT");
    assert!(service.ended().success());
}

#[test]
fn without_its_database_it_says_so_and_loses_nothing() {
    let Some(stack) = Stack::kafka_and_postgres() else { return };
    let (stack, proxy) = stack.with_database_proxy();
    let service = stack.serve();
    let mut accepted = vec![service.place("before", 1)];
    proxy.cut();
    for path in ["/orders/before", "/reports/sales?by=day", "/reports/sales?by=sku"] {
        let (reply, took) = timed(|| service.get(path));
        reply.is_problem(503, "unavailable");
        assert!(took.as_secs() < 10, "{took:?}");
    }
    let ready = service.get("/health/ready");
    ready.is_problem(503, "not-ready");
    assert!(ready.text.contains("database"), "{ready:?}");
    let during = service.post("/orders", &order("during", 1));
    match during.status {
        201 => accepted.push(during),
        _ => during.is_problem(503, "unavailable"),
    }
    proxy.mend();
    service.wait_ready();
    accepted.push(service.place("after", 1));
    let mut total = json!(0);
    for reply in &accepted {
        let order_id = reply.json()["order_id"].as_str().expect("an id").to_owned();
        let path = format!("/orders/{order_id}?after={}", reply.position());
        let found = wait_for("the read model follows", || {
            let reply = service.get(&path);
            (reply.status != 503).then_some(reply)
        });
        assert_eq!(found.status, 200, "{found:?}");
        // Another read model, with its own pace after the outage.
        let report = format!("/reports/sales?by=day&after={}", reply.position());
        let reported = wait_for("the report follows", || {
            let reply = service.get(&report);
            (reply.status == 200).then_some(reply)
        });
        total = reported.json()["total"]["orders"].clone();
    }
    assert_eq!(total, json!(accepted.len()));
}

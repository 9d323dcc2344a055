//! The outside surface, line by line, against the built program.

use crate::support;

use std::collections::BTreeSet;
use std::thread;

use serde_json::{Value, json};
use support::{Reply, Service, Stack, on_each_log, order, timed, wait_for};

on_each_log!(
    an_order_goes_its_way_and_every_view_shows_it,
    a_repeated_key_answers_the_first_result_and_another_request_is_refused,
    one_of_fifty_concurrent_payments_succeeds,
    a_precondition_holds_or_nothing_happens,
    a_view_asked_after_a_position_never_shows_the_state_before,
    reports_count_orders_not_rows_and_take_back_what_is_cancelled,
    rules_are_named,
    bad_input_is_a_problem_that_names_it,
    health_and_metrics_tell_how_it_is,
);

const KEY: &str = "7f8c2a54-9f3e-4c1b-8a55-0d1f2e3a4b5c";

fn get_after(service: &Service, path: &str, position: &str) -> Value {
    let mark = if path.contains('?') { '&' } else { '?' };
    let reply = service.get(&format!("{path}{mark}after={position}"));
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

fn versions(service: &Service, order_id: &str) -> Vec<u64> {
    let events = service.get(&format!("/orders/{order_id}/events")).json();
    let events = events["events"].as_array().expect("events").clone();
    events.iter().map(|event| event["version"].as_u64().expect("a version")).collect()
}

fn an_order_goes_its_way_and_every_view_shows_it(stack: &Stack) {
    let service = stack.serve();
    let body = json!({"order_id": "way-1", "customer": "Ada Ölund", "placed_at": "2024-02-29T23:59:59.123456+01:00",
        "lines": [{"sku": "a", "quantity": 2, "amount_cents": 2500}, {"sku": "a", "quantity": 1, "amount_cents": 0}]});
    let placed = service.post("/orders", &body);
    assert_eq!(placed.status, 201, "{placed:?}");
    assert_eq!(placed.header("location"), Some("/orders/way-1"));
    assert_eq!(
        (&placed.json()["order_id"], &placed.json()["version"]),
        (&json!("way-1"), &json!(1))
    );
    let paid = service.post("/orders/way-1/payment", &json!({"amount_cents": 2500}));
    assert_eq!((paid.status, &paid.json()["version"]), (200, &json!(2)));
    let shipment = json!({"carrier": "post", "tracking": "t 1"});
    let shipped = service.post("/orders/way-1/shipment", &shipment);
    assert_eq!((shipped.status, &shipped.json()["version"]), (200, &json!(3)));

    let path = format!("/orders/way-1?after={}", shipped.position());
    let details = service.get(&path);
    assert_eq!(details.header("etag"), Some("\"3\""));
    assert_eq!(details.header("kafold-position"), Some(shipped.position().as_str()));
    let shown = json!({"order_id": "way-1", "customer": "Ada Ölund", "status": "shipped",
        "lines": body["lines"], "quantity": 3, "amount_cents": 2500, "version": 3,
        "placed_at": "2024-02-29T22:59:59.123456Z", "carrier": "post", "tracking": "t 1"});
    assert_eq!(details.json(), shown);
    assert_eq!(service.get("/orders/way-1").text, details.text, "the same state is the same body");

    let listed = get_after(&service, "/customers/Ada%20%C3%96lund/orders", &shipped.position());
    assert_eq!(listed["orders"][0]["order_id"], "way-1");
    assert_eq!(listed["orders"][0]["status"], "shipped");
    let by_day = get_after(&service, "/reports/sales?by=day", &shipped.position());
    let row = json!({"key": "2024-02-29", "orders": 1, "quantity": 3, "amount_cents": 2500});
    assert_eq!(by_day["rows"], json!([row]));

    let stream = service.get("/orders/way-1/events").json();
    let events = stream["events"].as_array().expect("events");
    let types: Vec<_> =
        events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    assert_eq!(types, ["order.placed.v1", "order.paid.v1", "order.shipped.v1"]);
    assert_eq!(versions(&service, "way-1"), [1, 2, 3]);
    assert_eq!(events[2]["position"], json!(shipped.position()));
    assert_eq!(events[1]["data"], json!({"customer": "Ada Ölund", "amount_cents": 2500}));
}

fn a_repeated_key_answers_the_first_result_and_another_request_is_refused(stack: &Stack) {
    let service = stack.serve();
    let key = [("idempotency-key", KEY)];
    let mut body = order("", 100);
    body.as_object_mut().expect("an object").remove("order_id");
    let first = service.post_with("/orders", &key, &body);
    assert_eq!(first.status, 201, "{first:?}");
    assert_eq!(first.header("idempotent-replayed"), None);
    let order_id = first.json()["order_id"].as_str().expect("an id").to_owned();
    let repeated = |path: &str, key: &[(&str, &str)], body: &Value, first: &Reply| {
        let again = service.post_with(path, key, body);
        assert_eq!((again.status, again.json()), (first.status, first.json()));
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
    };
    let reused = |service: &Service, path: &str, key: &[(&str, &str)], body: &Value| {
        let again = service.post_with(path, key, body);
        let problem = "/problems/idempotency-key-reused";
        assert_eq!((again.status, &again.json()["type"]), (422, &json!(problem)), "{again:?}");
    };

    repeated("/orders", &key, &body, &first);
    reused(&service, "/orders", &key, &order("quite-another", 100));
    let mut other = body.clone();
    other["customer"] = "somebody else".into();
    reused(&service, "/orders", &key, &other);
    other = body.clone();
    other["placed_at"] = "2001-02-03T04:05:06Z".into();
    reused(&service, "/orders", &key, &other);
    let headers = [("content-type", "application/json"), key[0]];
    assert_eq!(service.request("POST", "/orders", &headers, b"{not json").status, 400);

    let payment = format!("/orders/{order_id}/payment");
    // A key of an earlier operation.
    reused(&service, &payment, &key, &json!({"amount_cents": 100}));
    let pay_key =
        [("idempotency-key", "0d4a3f4e-3a43-4b43-93b1-7a1f9b1c2d3e"), ("if-match", "\"1\"")];
    let paid = service.post_with(&payment, &pay_key, &json!({"amount_cents": 100}));
    assert_eq!(paid.status, 200, "{paid:?}");
    repeated(&payment, &pay_key, &json!({"amount_cents": 100}), &paid);
    reused(&service, &payment, &pay_key, &json!({"amount_cents": 7}));
    let cancellation = format!("/orders/{order_id}/cancellation");
    reused(&service, &cancellation, &pay_key[..1], &json!({"reason": "none"}));
    reused(&service, "/orders", &pay_key[..1], &order("another", 100));
    assert_eq!(versions(&service, &order_id), [1, 2]);

    // The same key on an order whose id was chosen, then with another id and with none.
    let chosen = [("idempotency-key", "11111111-2222-4333-8444-555555555555")];
    let first_chosen = service.post_with("/orders", &chosen, &order("chosen", 100));
    repeated("/orders", &chosen, &order("chosen", 100), &first_chosen);
    repeated("/orders", &chosen, &body, &first_chosen);
    reused(&service, "/orders", &chosen, &order("not-chosen", 100));
    // The key of one order is used on another order.
    reused(&service, "/orders/chosen/payment", &pay_key[..1], &json!({"amount_cents": 100}));
    reused(&service, &payment, &chosen, &json!({"amount_cents": 100}));

    // Nothing of this is lost with the process, once the read model has it.
    get_after(&service, "/orders/chosen", &first_chosen.position());
    service.kill();
    let service = stack.serve();
    let again = service.post_with("/orders", &chosen, &order("chosen", 100));
    assert_eq!((again.status, again.json()), (201, first_chosen.json()));
    reused(&service, "/orders", &chosen, &order("not-chosen", 100));
    reused(&service, "/orders", &chosen, &order("chosen", 101));
    assert_eq!(service.get("/orders/not-chosen/events").status, 404);
    assert_eq!(versions(&service, &order_id), [1, 2]);
}

fn one_of_fifty_concurrent_payments_succeeds(stack: &Stack) {
    let service = stack.serve();
    service.place("contended", 700);
    let statuses: Vec<u16> = thread::scope(|scope| {
        let pay =
            || service.post("/orders/contended/payment", &json!({"amount_cents": 700})).status;
        let payers: Vec<_> = (0..50).map(|_| scope.spawn(pay)).collect();
        payers.into_iter().map(|payer| payer.join().expect("a status")).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 409, 422].contains(status)), "{statuses:?}");
    assert_eq!(versions(&service, "contended"), [1, 2]);
}

fn a_precondition_holds_or_nothing_happens(stack: &Stack) {
    let service = stack.serve();
    service.place("guarded", 700);
    let pay = |tag: &str| {
        let body = json!({"amount_cents": 700});
        service.post_with("/orders/guarded/payment", &[("if-match", tag)], &body)
    };
    for stale in ["\"0\"", "\"2\"", "\"18446744073709551615\"", "W/\"1\""] {
        pay(stale).is_problem(412, "precondition-failed");
    }
    let body = json!({"amount_cents": 700});
    let absent = service.post_with("/orders/absent/payment", &[("if-match", "*")], &body);
    absent.is_problem(412, "precondition-failed");
    for malformed in ["1", "\"\"", "\"x\"", "\"1\", \"2\"", "\"-1\"", "\"99999999999999999999\""] {
        pay(malformed).is_problem(400, "malformed");
    }
    assert_eq!(versions(&service, "guarded"), [1]);
    assert_eq!(pay("\"1\"").status, 200);
    pay("\"1\"").is_problem(412, "precondition-failed");
    pay("*").is_problem(422, "already-paid");
}

fn a_view_asked_after_a_position_never_shows_the_state_before(stack: &Stack) {
    let service = stack.serve();
    for nth in 1..=20 {
        let order_id = format!("fresh-{nth}");
        let placed = service.place(&order_id, 700).position();
        assert_eq!(
            get_after(&service, &format!("/orders/{order_id}"), &placed)["status"],
            "placed"
        );
        let paid =
            service.post(&format!("/orders/{order_id}/payment"), &json!({"amount_cents": 700}));
        let paid = paid.position();
        assert_eq!(get_after(&service, &format!("/orders/{order_id}"), &paid)["status"], "paid");
        for by in ["day", "sku", "customer"] {
            let report = get_after(&service, &format!("/reports/sales?by={by}"), &paid);
            assert_eq!(report["total"]["orders"], nth, "{by}");
        }
        let listed = get_after(&service, "/customers/c1/orders", &paid);
        assert_eq!(listed["orders"].as_array().map(Vec::len), Some(nth));
    }
    // The header of an answer is a token for the next one.
    let applied = service.get("/reports/sales?by=day");
    let applied = applied.header("kafold-applied").expect("a header").to_owned();
    get_after(&service, "/reports/sales?by=day", &applied);

    for bad in [
        "",
        "x",
        "1",
        "0:",
        ":1",
        "-1:0",
        "0:-1",
        "0:1x",
        "0:1,",
        "999999:0",
        "0:99999999999999999999",
    ] {
        service.get(&format!("/orders/fresh-1?after={bad}")).is_problem(400, "malformed");
    }
    let (late, took) = timed(|| service.get("/orders/fresh-1?after=0:999999999"));
    late.is_problem(504, "not-applied-yet");
    assert!((4..=7).contains(&took.as_secs()), "{took:?}");
}

fn reports_count_orders_not_rows_and_take_back_what_is_cancelled(stack: &Stack) {
    let service = stack.serve();
    let place = |order_id: &str, customer: &str, day: &str, lines: Value| {
        let body = json!({"order_id": order_id, "customer": customer, "lines": lines,
                          "placed_at": format!("{day}T12:00:00Z")});
        let placed = service.post("/orders", &body);
        assert_eq!(placed.status, 201, "{placed:?}");
    };
    let line = |sku: &str, quantity: i64, cents: i64| json!({"sku": sku, "quantity": quantity, "amount_cents": cents});
    place(
        "r1",
        "x",
        "2024-01-01",
        json!([line("a", 1, 100), line("b", 2, 200), line("a", 3, 300)]),
    );
    place("r2", "x", "2024-01-02", json!([line("b", 4, 0)]));
    place("r3", "y", "2024-01-02", json!([line("c", 5, 500), line("a", 1, 1)]));
    service.post("/orders/r3/payment", &json!({"amount_cents": 501}));
    service.post("/orders/r2/payment", &json!({"amount_cents": 0}));
    let cancelled = service.post("/orders/r3/cancellation", &json!({"reason": "broken"}));
    assert_eq!(cancelled.status, 200, "{cancelled:?}");
    let row = |key: &str, orders: i64, quantity: i64, cents: i64| json!({"key": key, "orders": orders, "quantity": quantity, "amount_cents": cents});
    let expected = [
        ("day", json!([row("2024-01-01", 1, 6, 600), row("2024-01-02", 1, 4, 0)])),
        ("sku", json!([row("a", 1, 4, 400), row("b", 2, 6, 200)])),
        ("customer", json!([row("x", 2, 10, 600)])),
    ];
    // Positions of three streams, perhaps in three partitions: all of them.
    let streams = ["r1", "r2", "r3"].map(|id| {
        let events = service.get(&format!("/orders/{id}/events"));
        events.header("kafold-position").expect("a position").to_owned()
    });
    for (by, rows) in expected {
        let path = format!("/reports/sales?by={by}");
        let report = get_after(&service, &path, &streams.join(","));
        let total = json!({"orders": 2, "quantity": 10, "amount_cents": 600});
        assert_eq!(report, json!({"rows": rows, "total": total}), "{by}");
    }
}

fn rules_are_named(stack: &Stack) {
    let service = stack.serve();
    let post = |path: &str, body: Value| service.post(path, &body);
    let pay = |id: &str, cents: i64| {
        post(&format!("/orders/{id}/payment"), json!({"amount_cents": cents}))
    };
    let ship = |id: &str| {
        post(&format!("/orders/{id}/shipment"), json!({"carrier": "c", "tracking": "t"}))
    };
    let cancel = |id: &str| post(&format!("/orders/{id}/cancellation"), json!({"reason": "r"}));

    for reply in [pay("nobody", 1), ship("nobody"), cancel("nobody")] {
        reply.is_problem(404, "unknown-order");
    }
    service.get("/orders/nobody").is_problem(404, "unknown");
    service.get("/orders/nobody/events").is_problem(404, "unknown");
    assert_eq!(service.get("/customers/nobody/orders").json()["orders"], json!([]));

    service.place("p", 700);
    service.post("/orders", &order("p", 700)).is_problem(409, "order-exists");
    ship("p").is_problem(422, "not-paid");
    pay("p", 699).is_problem(422, "wrong-amount");
    assert_eq!(pay("p", 700).status, 200);
    pay("p", 700).is_problem(422, "already-paid");
    assert_eq!(ship("p").status, 200);
    ship("p").is_problem(422, "already-shipped");
    cancel("p").is_problem(422, "already-shipped");

    service.place("q", 0);
    assert_eq!(pay("q", 0).status, 200, "nothing pays an order of nothing");
    assert_eq!(cancel("q").status, 200, "a paid order can be cancelled");
    for reply in [pay("q", 0), ship("q"), cancel("q")] {
        reply.is_problem(422, "cancelled");
    }

    let place = |line: Value| post("/orders", json!({"customer": "c1", "lines": [line]}));
    let line = |quantity: i64, cents: i64| json!({"sku": "a", "quantity": quantity, "amount_cents": cents});
    for quantity in [0, -1, i64::MIN, i64::MAX] {
        place(line(quantity, 1)).is_problem(422, "quantity-out-of-range");
    }
    for cents in [-1, 1_000_000_001, i64::MAX] {
        place(line(1, cents)).is_problem(422, "amount-out-of-range");
    }
    let one = line(1, 1);
    for customer in ["", "  ", "a\u{0}b", &"x".repeat(201)] {
        post("/orders", json!({"customer": customer, "lines": [one]}))
            .is_problem(422, "invalid-text");
    }
    post("/orders", json!({"customer": "c1", "lines": []})).is_problem(422, "lines-out-of-range");
    post("/orders", json!({"customer": "c1", "lines": vec![&one; 101]}))
        .is_problem(422, "lines-out-of-range");
    for day in ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"] {
        post("/orders", json!({"customer": "c1", "lines": [one], "placed_at": day}))
            .is_problem(422, "placed-at-out-of-range");
    }
}

fn bad_input_is_a_problem_that_names_it(stack: &Stack) {
    let service = stack.serve();
    let json_type = ("content-type", "application/json");
    let post = |body: &str| service.request("POST", "/orders", &[json_type], body.as_bytes());
    let line = r#"{"sku":"a","quantity":1,"amount_cents":1}"#;
    for body in [
        "".to_owned(),
        "{".to_owned(),
        "null".to_owned(),
        "[]".to_owned(),
        "\u{feff}{}".to_owned(),
        format!(r#"{{"customer":"c","lines":[{line}]}} trailing"#),
        format!(r#"{{"customer":1,"lines":[{line}]}}"#),
        format!(r#"{{"lines":[{line}]}}"#),
        format!(r#"{{"customer":"c","lines":[{line}],"colour":"red"}}"#),
        format!(r#"{{"customer":"c","customer":"d","lines":[{line}]}}"#),
        format!(r#"{{"customer":"\ud800","lines":[{line}]}}"#),
        format!(r#"{{"customer":"c","lines":[{line}],"placed_at":"yesterday"}}"#),
        format!(r#"{{"customer":"c","lines":[{line}],"placed_at":1700000000}}"#),
        r#"{"customer":"c","lines":[{"sku":"a","quantity":1.5,"amount_cents":1}]}"#.to_owned(),
        r#"{"customer":"c","lines":[{"sku":"a","quantity":"1","amount_cents":1}]}"#.to_owned(),
        r#"{"customer":"c","lines":[{"sku":"a","quantity":1,"amount_cents":1e30}]}"#.to_owned(),
        r#"{"customer":"c","lines":[{"sku":"a","quantity":1,"amount_cents":1,"x":1}]}"#.to_owned(),
        r#"{"customer":"c","lines":"#.to_owned() + &"[".repeat(100_000),
    ] {
        post(&body).is_problem(400, "malformed");
    }
    for (path, body, begin) in [
        (
            "/orders",
            r#"{"customer":"c","lines":[{"sku":"a","quantity":"1","amount_cents":1}]}"#,
            "/lines/0/quantity: invalid type",
        ),
        (
            "/orders",
            r#"{"customer":"c","lines":[{"quantity":1,"amount_cents":1}]}"#,
            "/lines/0: missing field \"sku\"",
        ),
        ("/orders", r#"{"customer":"c","lines":[],"colour":"red"}"#, "unknown field \"colour\""),
        ("/orders", r#"{"customer":"c","lines":[],"placed_at":"yesterday"}"#, "/placed_at: "),
        ("/orders/x/payment", r#"{"amount_cents":"7"}"#, "/amount_cents: invalid type"),
        ("/orders/x/shipment", r#"{"carrier":1,"tracking":"t"}"#, "/carrier: invalid type"),
        ("/orders/x/cancellation", "{}", "missing field \"reason\""),
    ] {
        let refused = service.request("POST", path, &[json_type], body.as_bytes());
        refused.is_problem(400, "malformed");
        let detail = refused.json()["detail"].as_str().expect("a text").to_owned();
        let expected = format!("the body cannot be read: {begin}");
        assert!(detail.starts_with(&expected), "{body}: {detail}");
    }
    let invalid_utf8 = b"{\"customer\":\"\xff\",\"lines\":[]}";
    service.request("POST", "/orders", &[json_type], invalid_utf8).is_problem(400, "malformed");

    for id in ["", "a/b", "a\nb", "\u{7f}", &"x".repeat(201), &"x".repeat(10_000)] {
        service.post("/orders", &order(id, 1)).is_problem(400, "malformed");
    }
    let paths = [
        "/orders/a%2Fb".to_owned(),
        "/orders/a%00b".to_owned(),
        "/orders/a%0Ab".to_owned(),
        "/orders/%ff".to_owned(),
        "/orders/%zz".to_owned(),
        "/orders/a%2".to_owned(),
        format!("/orders/{}", "x".repeat(10_000)),
    ];
    for path in &paths {
        service.get(path).is_problem(400, "malformed");
        service.get(&format!("{path}/events")).is_problem(400, "malformed");
        service
            .post(&format!("{path}/payment"), &json!({"amount_cents": 1}))
            .is_problem(400, "malformed");
        service
            .get(&format!("/customers{}/orders", &path["/orders".len()..]))
            .is_problem(400, "malformed");
    }

    service.post("/orders//payment", &json!({"amount_cents": 1})).is_problem(400, "malformed");
    for path in ["/nowhere", "/orders/a/b/c", "/orders/a/b", "//", "/orders/"] {
        service.get(path).is_problem(404, "no-route");
    }
    for (method, path) in [
        ("GET", "/orders"),
        ("DELETE", "/orders/a"),
        ("GET", "/orders/a/payment"),
        ("POST", "/health/live"),
        ("BREW", "/orders"),
    ] {
        let refused = service.request(method, path, &[], b"");
        refused.is_problem(405, "method-not-allowed");
        assert!(refused.header("allow").is_some(), "{refused:?}");
    }
    for query in ["", "?by=week", "?by=", "?by=day&by=sku", "?by=day&colour=red", "?BY=day"] {
        service.get(&format!("/reports/sales{query}")).is_problem(400, "malformed");
    }

    let body = order("typed", 1).to_string();
    for headers in [
        &[][..],
        &[("content-type", "text/plain")],
        &[("content-type", "application/x-www-form-urlencoded")],
    ] {
        let refused = service.request("POST", "/orders", headers, body.as_bytes());
        refused.is_problem(415, "unsupported-media-type");
    }
    let charset = [("content-type", "application/json; charset=utf-8")];
    assert_eq!(service.request("POST", "/orders", &charset, body.as_bytes()).status, 201);

    for key in ["", "x", "7f8c2a54-9f3e-4c1b-8a55", "7f8c2a54-9f3e-4c1b-8a55-0d1f2e3a4b5g"] {
        let refused = service.post_with("/orders", &[("idempotency-key", key)], &order("keyed", 1));
        refused.is_problem(400, "malformed");
    }
    let twice = [("idempotency-key", KEY), ("idempotency-key", KEY)];
    service.post_with("/orders", &twice, &order("keyed", 1)).is_problem(400, "malformed");

    let large = format!(r#"{{"customer":"{}","lines":[{line}]}}"#, "x".repeat(10_000_000));
    post(&large).is_problem(413, "body-too-large");
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: 10000000\r\nconnection: close\r\n\r\n";
    service.send(head.as_bytes()).is_problem(413, "body-too-large");

    assert_eq!(service.get("/orders/keyed/events").status, 404, "nothing half done");
    assert_eq!(service.get("/health/ready").status, 200);
    assert!(!service.log().contains("ERROR"), "{}", service.log());
}

fn health_and_metrics_tell_how_it_is(stack: &Stack) {
    let service = stack.serve();
    assert_eq!(service.get("/health/live").json()["status"], "live");
    assert_eq!(service.get("/health/ready").json()["status"], "ready");
    service.place("measured", 1);
    let own_id =
        service.request("GET", "/orders/measured/events", &[("x-request-id", "mine-1")], b"");
    assert_eq!(own_id.header("x-request-id"), Some("mine-1"));
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let headers = [("traceparent", trace), ("x-correlation-id", "corr-1")];
    service.post_with("/orders/measured/payment", &headers, &json!({"amount_cents": 1}));
    let paid = &service.get("/orders/measured/events").json()["events"][1];
    assert_eq!((&paid["traceparent"], &paid["correlation_id"]), (&json!(trace), &json!("corr-1")));

    let metrics = service.get("/metrics");
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
    let line = "http_requests_total{method=\"POST\",route=\"/orders\",status=\"201\"} 1";
    assert!(metrics.text.contains(line), "{}", metrics.text);
    let names: BTreeSet<_> =
        metrics.text.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    for name in ["http_request_duration_seconds_bucket", "kafold_commands_total"] {
        assert!(names.contains(name), "{name} is not among {names:?}");
    }
    wait_for("the lag is none", || {
        let text = service.get("/metrics").text;
        let lags: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("kafold_projection_lag_records{"))
            .collect();
        (lags.len() == 5 && lags.iter().all(|line| line.ends_with(" 0"))).then_some(())
    });
    wait_for("the index is not behind either", || {
        let text = service.get("/metrics").text;
        let mut lags = text.lines().filter(|line| line.starts_with("kafold_index_lag_records{"));
        lags.all(|line| line.ends_with(" 0")).then_some(())
    });
}

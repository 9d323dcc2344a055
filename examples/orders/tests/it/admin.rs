//! The operator's commands in the service's own program, where orders have a state.

use crate::support;

use std::process::Output;

use serde_json::{Value, json};
use support::{Stack, execute, run};

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

#[test]
fn the_state_of_an_order_is_shown_and_what_the_next_event_changes() {
    for stack in [Some(Stack::embedded()), Stack::kafka_and_postgres()].into_iter().flatten() {
        let service = stack.serve();
        service.place("17", 2500);
        let paid = service.post("/orders/17/payment", &json!({"amount_cents": 2500}));
        assert_eq!(paid.status, 200, "{paid:?}");
        let admin = |args: &[&str]| {
            let stack_args = stack.args.iter().map(String::as_str);
            let args = ["admin"].into_iter().chain(args.iter().copied()).chain(stack_args);
            run(stack.folder.path(), &args.collect::<Vec<_>>())
        };

        // Of a service that runs, and with the log that it takes by itself.
        let now = text(&admin(&["stream", "show", "order-17"]));
        assert!(now.contains("state at version 2:\nOrder {\n    status: Paid,"), "{now}");
        let was = text(&admin(&["stream", "show", "order-17", "--at", "1"]));
        assert!(was.contains("state at version 1:\nOrder {\n    status: Placed,"), "{was}");
        let changes = "version 2, order.paid.v1, comes next:\n    Order {\n  -     status: Placed,\n  +     status: Paid,";
        assert!(was.contains(changes), "{was}");
        let json = text(&admin(&["stream", "show", "17", "--category", "order", "--json"]));
        let json: Value = serde_json::from_str(&json).expect("one document");
        assert!(json["state"].as_str().is_some_and(|state| state.contains("status: Paid")));

        let status = text(&admin(&["status", "--json"]));
        let status: Value = serde_json::from_str(&status).expect("one document");
        assert_eq!(status["projections"].as_array().map(Vec::len), Some(5), "{status}");
        assert!(text(&admin(&["doctor"])).contains("sales_by_day is running"));

        let refused = admin(&["stream", "show", "order-18"]);
        assert_eq!(refused.status.code(), Some(1));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.starts_with("orders admin: there is no stream order-18"), "{said}");
    }
}

#[test]
fn every_read_model_is_rebuilt_under_load_and_is_what_the_log_says() {
    for stack in [Some(Stack::embedded()), Stack::kafka_and_postgres()].into_iter().flatten() {
        let service = stack.serve();
        let admin = |args: &[&str]| {
            let stack_args = stack.args.iter().map(String::as_str);
            let args = ["admin"].into_iter().chain(args.iter().copied()).chain(stack_args);
            run(stack.folder.path(), &args.collect::<Vec<_>>())
        };
        for order in 0..20 {
            service.place(&order.to_string(), 100);
        }
        let rebuilding = std::thread::scope(|scope| {
            let rebuild = scope.spawn(|| admin(&["projections", "rebuild", "--all", "--wait"]));
            for order in 20..60 {
                service.place(&order.to_string(), 100);
                let sales = service.get("/reports/sales?by=sku");
                assert_eq!(sales.status, 200, "no query fails: {sales:?}");
            }
            rebuild.join().expect("it does not panic")
        });
        let told = text(&rebuilding);
        assert_eq!(told.matches("switched to generation 2").count(), 5, "{told}");
        let verified = text(&admin(&["verify"]));
        assert_eq!(
            verified.matches("no difference").count(),
            verified.lines().count(),
            "{verified}"
        );
        for name in ["order_details (generation 2): 60 rows", "sales_by_sku (generation 2)"] {
            assert!(verified.contains(name), "{verified}");
        }
        let Some(database) = stack.args.last() else { continue };
        drop(service);
        execute(database, "DROP TABLE sales_by_day__g2 CASCADE".to_owned());
        let half = admin(&["verify"]);
        assert_eq!(half.status.code(), Some(1), "{half:?}");
        let said = String::from_utf8_lossy(&half.stderr);
        assert!(said.contains("1 projection could not be verified: sales_by_day"), "{said}");
        let told = String::from_utf8_lossy(&half.stdout);
        assert!(told.contains("order_details (generation 2): 60 rows"), "{told}");
        assert!(told.contains("sales_by_day: NOT VERIFIED: "), "{told}");
    }
}

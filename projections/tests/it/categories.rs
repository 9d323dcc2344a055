//! A read model takes an event by category and type, on both databases.

use crate::common;

use std::sync::Arc;
use std::time::Duration;

use common::domain::Orders;
use common::{TestDatabase, stopped};
use kafold_core::{DomainEvent, Recorded, Row};
use kafold_projections::{
    FaultPolicy, ProjectionConfig, ProjectionWorker, Projections, Query, ReadModel,
};
use serde::{Deserialize, Serialize};

on_both!(
    one_name_in_two_categories_is_no_confusion,
    an_unknown_type_of_the_category_stops_until_the_newer_program_takes_over,
    an_ignored_type_is_left_out,
    without_a_category_two_of_them_are_refused,
    without_a_category_an_unknown_type_of_a_read_category_stops,
    without_a_category_events_left_out_before_are_noticed,
);

const WAIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "cart")]
enum CartEvent {
    #[event("item.added")]
    Added { count: i64 },
}

/// The same in a program that is a release ahead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "cart")]
enum NewerCartEvent {
    #[event("item.added")]
    Added { count: i64 },
    #[event("item.removed")]
    Removed { count: i64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(ignore("item.removed"), category = "cart")]
enum AddedOnly {
    #[event("item.added")]
    Added { count: i64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
enum Undeclared {
    #[event("item.added")]
    Added { count: i64 },
}

#[derive(Debug, Clone, PartialEq, Row)]
struct Items {
    #[row(key)]
    list: String,
    count: i64,
}

macro_rules! items {
    ($($model:ident: $event:ident { $($variant:ident => $sign:literal),* })*) => {$(
        struct $model;

        impl ReadModel for $model {
            const NAME: &'static str = "items";
            const SHARED: bool = false;
            type Event = $event;
            type Row = Items;

            fn keys(event: &Recorded<$event>) -> Vec<String> {
                vec![event.stream.to_string()]
            }

            fn fold(list: &String, row: Option<Items>, event: &Recorded<$event>) -> Option<Items> {
                let more = match &event.event {
                    $($event::$variant { count } => $sign * count),*
                };
                let count = row.map_or(0, |row| row.count) + more;
                Some(Items { list: list.clone(), count })
            }
        }
    )*};
}
items! {
    Carts: CartEvent { Added => 1 }
    NewerCarts: NewerCartEvent { Added => 1, Removed => -1 }
    AddedItems: AddedOnly { Added => 1 }
    UndeclaredItems: Undeclared { Added => 1 }
}

fn spawn(orders: &Orders, database: &TestDatabase, model: impl ReadModel) -> Projections {
    // Parks by default: an event of a newer program parks nothing.
    let config = ProjectionConfig { fault_attempts_max: 1, ..ProjectionConfig::default() };
    assert_eq!(config.fault_policy, FaultPolicy::Park);
    let source = Arc::new(orders.store.clone());
    let worker = ProjectionWorker::new(source, database.database.clone()).config(config);
    worker.with(model).spawn()
}

async fn applied(orders: &Orders, database: &TestDatabase, model: impl ReadModel) {
    let projections = spawn(orders, database, model);
    orders.applied(&projections, "items", WAIT).await;
    projections.shutdown().await;
}

async fn stops(orders: &Orders, database: &TestDatabase, model: impl ReadModel) -> String {
    let projections = spawn(orders, database, model);
    let reason = stopped(&projections).await;
    projections.shutdown().await;
    reason
}

async fn counts(database: &TestDatabase) -> Vec<(String, i64)> {
    let rows = Query::<Carts>::new(database.database.clone()).all(100).await.expect("readable");
    rows.into_iter().map(|row| (row.list, row.count)).collect()
}

fn added(count: i64) -> [NewerCartEvent; 1] {
    [NewerCartEvent::Added { count }]
}

fn removed(count: i64) -> [NewerCartEvent; 1] {
    [NewerCartEvent::Removed { count }]
}

async fn one_name_in_two_categories_is_no_confusion(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("wishlist-1", &added(100)).await;
    orders.append("cart-1", &added(2)).await;
    orders.append("wishlist-2", &removed(100)).await;
    applied(&orders, database, Carts).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
}

async fn an_unknown_type_of_the_category_stops_until_the_newer_program_takes_over(
    database: &TestDatabase,
) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    orders.append("cart-1", &removed(3)).await;
    orders.append("cart-1", &added(1)).await;
    let reason = stops(&orders, database, Carts).await;
    assert!(reason.contains("(item.removed.v1, version 2 of cart-1): "), "{reason}");
    assert!(reason.contains("a newer program wrote it"), "{reason}");
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 5)]);
    // The definition of the rows is the same, so the newer program goes on with them.
    applied(&orders, database, NewerCarts).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 3)]);
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);
}

async fn an_ignored_type_is_left_out(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    orders.append("cart-1", &removed(3)).await;
    applied(&orders, database, AddedItems).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 5)]);
}

async fn without_a_category_two_of_them_are_refused(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("parcel-1", &removed(1)).await;
    orders.append("cart-1", &added(2)).await;
    applied(&orders, database, UndeclaredItems).await;
    orders.append("wishlist-1", &added(100)).await;
    let reason = stops(&orders, database, UndeclaredItems).await;
    assert!(reason.contains("occur in two categories, cart and wishlist"), "{reason}");
    assert!(reason.contains("#[event(category = \"cart\")]"), "{reason}");
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
    // In one batch, it is the same.
    database.run("DELETE FROM kafold_checkpoint").await;
    database.run("DELETE FROM kafold_projection_category").await;
    database.run("DELETE FROM items__g1").await;
    let reason = stops(&orders, database, UndeclaredItems).await;
    assert!(reason.contains("occur in two categories, cart and wishlist"), "{reason}");
    applied(&orders, database, Carts).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
}

async fn without_a_category_an_unknown_type_of_a_read_category_stops(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    applied(&orders, database, UndeclaredItems).await;
    // A worker that has seen nothing of the category since its start.
    for stream in ["cart-2", "cart-3"] {
        orders.append(stream, &removed(3)).await;
        let reason = stops(&orders, database, UndeclaredItems).await;
        assert!(reason.contains("but not this type: a newer program wrote it"), "{reason}");
    }
    applied(&orders, database, NewerCarts).await;
    assert_eq!(counts(database).await[1], ("cart-2".to_owned(), -3));
}

async fn without_a_category_events_left_out_before_are_noticed(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("cart-1", &removed(3)).await;
    applied(&orders, database, UndeclaredItems).await;
    orders.append("cart-1", &added(5)).await;
    let reason = stops(&orders, database, UndeclaredItems).await;
    assert!(reason.contains("events of the category cart were left out before"), "{reason}");
}

//! A read model takes an event by category and type, on both databases.

use crate::common;

use std::sync::Arc;
use std::time::Duration;

use common::domain::Orders;
use common::{TestDatabase, stopped};
use kafold_core::{DomainEvent, EventSet, Recorded, Row};
use kafold_projections::{
    FaultPolicy, ProjectionConfig, ProjectionWorker, Projections, Query, ReadModel,
};
use serde::{Deserialize, Serialize};

on_both!(
    one_name_in_two_categories_is_no_confusion,
    an_unknown_type_of_the_category_stops_until_the_newer_program_takes_over,
    an_ignored_type_is_left_out,
    a_model_reads_the_events_of_several_aggregates,
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

macro_rules! items {
    ($($model:ident: $event:ident { $($variant:ident => $sign:literal),* })*) => {$(
        #[derive(Debug, Clone, PartialEq, Row)]
        struct $model {
            #[row(key)]
            list: String,
            count: i64,
        }

        impl ReadModel for $model {
            const NAME: &'static str = "items";
            const SHARED: bool = false;
            type Event = $event;

            fn keys(event: &Recorded<$event>) -> Vec<String> {
                vec![event.stream.to_string()]
            }

            fn fold(list: &String, row: Option<Self>, event: &Recorded<$event>) -> Option<Self> {
                let more = match &event.event {
                    $($event::$variant { count } => $sign * count),*
                };
                let count = row.map_or(0, |row| row.count) + more;
                Some(Self { list: list.clone(), count })
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

fn spawn<M: ReadModel>(orders: &Orders, database: &TestDatabase) -> Projections {
    // Parks by default: an event of a newer program parks nothing.
    let config = ProjectionConfig { fault_attempts_max: 1, ..ProjectionConfig::default() };
    assert_eq!(config.fault_policy, FaultPolicy::Park);
    let source = Arc::new(orders.store.clone());
    let worker = ProjectionWorker::new(source, database.database.clone()).config(config);
    worker.with::<M>().spawn()
}

async fn applied<M: ReadModel>(orders: &Orders, database: &TestDatabase) {
    let projections = spawn::<M>(orders, database);
    orders.applied(&projections, "items", WAIT).await;
    projections.shutdown().await;
}

async fn stops<M: ReadModel>(orders: &Orders, database: &TestDatabase) -> String {
    let projections = spawn::<M>(orders, database);
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
    applied::<Carts>(&orders, database).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
}

async fn an_unknown_type_of_the_category_stops_until_the_newer_program_takes_over(
    database: &TestDatabase,
) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    orders.append("cart-1", &removed(3)).await;
    orders.append("cart-1", &added(1)).await;
    let reason = stops::<Carts>(&orders, database).await;
    assert!(reason.contains("(item.removed.v1, version 2 of cart-1): "), "{reason}");
    assert!(reason.contains("a newer program wrote it"), "{reason}");
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 5)]);
    // The definition of the rows is the same, so the newer program goes on with them.
    applied::<NewerCarts>(&orders, database).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 3)]);
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);
}

async fn an_ignored_type_is_left_out(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    orders.append("cart-1", &removed(3)).await;
    applied::<AddedItems>(&orders, database).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 5)]);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "wishlist", ignore("item.removed"))]
enum WishlistEvent {
    #[event("item.added")]
    Added { count: i64 },
}

#[derive(Debug, Clone, PartialEq, EventSet)]
enum ListEvent {
    Cart(CartEvent),
    Wishlist(WishlistEvent),
}

/// Rows of two aggregates; their keys have two columns.
#[derive(Debug, Clone, PartialEq, Row)]
struct Lists {
    #[row(key)]
    category: String,
    #[row(key)]
    id: String,
    count: i64,
}

impl ReadModel for Lists {
    const NAME: &'static str = "items";
    const SHARED: bool = false;
    type Event = ListEvent;

    fn keys(event: &Recorded<ListEvent>) -> Vec<(String, String)> {
        vec![(event.stream.category().to_owned(), event.stream.id().to_owned())]
    }

    fn fold(
        (category, id): &(String, String),
        row: Option<Self>,
        event: &Recorded<ListEvent>,
    ) -> Option<Self> {
        let (ListEvent::Cart(CartEvent::Added { count })
        | ListEvent::Wishlist(WishlistEvent::Added { count })) = event.event;
        let count = row.map_or(0, |row| row.count) + count;
        Some(Self { category: category.clone(), id: id.clone(), count })
    }
}

async fn a_model_reads_the_events_of_several_aggregates(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.append("wishlist-1", &added(100)).await;
    orders.append("cart-1", &added(2)).await;
    orders.append("parcel-1", &removed(1)).await;
    orders.append("wishlist-1", &removed(1)).await;
    orders.append("wishlist-1", &added(11)).await;
    applied::<Lists>(&orders, database).await;
    let query = Query::<Lists>::new(database.database.clone());
    let rows = query.all(10).await.expect("readable");
    let list = |category: &str, count| Lists { category: category.into(), id: "1".into(), count };
    assert_eq!(rows, [list("cart", 2), list("wishlist", 111)]);
    // An unknown type of one of the categories stops the model, as for a single aggregate.
    orders.append("cart-2", &removed(1)).await;
    let reason = stops::<Lists>(&orders, database).await;
    assert!(reason.contains("a newer program wrote it"), "{reason}");
}

async fn without_a_category_two_of_them_are_refused(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("parcel-1", &removed(1)).await;
    orders.append("cart-1", &added(2)).await;
    applied::<UndeclaredItems>(&orders, database).await;
    orders.append("wishlist-1", &added(100)).await;
    let reason = stops::<UndeclaredItems>(&orders, database).await;
    assert!(reason.contains("occur in two categories, cart and wishlist"), "{reason}");
    assert!(reason.contains("#[event(category = \"cart\")]"), "{reason}");
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
    // In one batch, it is the same.
    database.run("DELETE FROM kafold_checkpoint").await;
    database.run("DELETE FROM kafold_projection_category").await;
    database.run("DELETE FROM items__g1").await;
    let reason = stops::<UndeclaredItems>(&orders, database).await;
    assert!(reason.contains("occur in two categories, cart and wishlist"), "{reason}");
    applied::<Carts>(&orders, database).await;
    assert_eq!(counts(database).await, [("cart-1".to_owned(), 2)]);
}

async fn without_a_category_an_unknown_type_of_a_read_category_stops(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.append("cart-1", &added(5)).await;
    applied::<UndeclaredItems>(&orders, database).await;
    // A worker that has seen nothing of the category since its start.
    for stream in ["cart-2", "cart-3"] {
        orders.append(stream, &removed(3)).await;
        let reason = stops::<UndeclaredItems>(&orders, database).await;
        assert!(reason.contains("but not this type: a newer program wrote it"), "{reason}");
    }
    applied::<NewerCarts>(&orders, database).await;
    assert_eq!(counts(database).await[1], ("cart-2".to_owned(), -3));
}

async fn without_a_category_events_left_out_before_are_noticed(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.append("cart-1", &removed(3)).await;
    applied::<UndeclaredItems>(&orders, database).await;
    orders.append("cart-1", &added(5)).await;
    let reason = stops::<UndeclaredItems>(&orders, database).await;
    assert!(reason.contains("events of the category cart were left out before"), "{reason}");
}

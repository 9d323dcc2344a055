//! Tables, definitions and queries, on both databases.

use crate::common;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use common::domain::{CustomerTotals, OrderDetails, OrderEvent, Orders, placed, totals};
use common::{TestDatabase, stopped};
use kafold_core::row::Merge;
use kafold_core::store::ReadError;
use kafold_core::{Aggregate, CommandHandler, Recorded, Row};
use kafold_migrations::Database;
use kafold_projections::{
    FaultPolicy, Generation, HandlerError, Projection, ProjectionBatch, ProjectionConfig,
    ProjectionState, ProjectionWorker, Query, ReadModel, Transaction, sqlx,
};
use sqlx::Row as _;

on_both!(
    every_kind_of_column_comes_back_as_it_went,
    many_new_rows_at_once_come_back_as_they_went,
    rows_are_found_by_declared_columns_in_the_order_of_the_key,
    keys_of_several_columns_are_loaded_found_and_deleted,
    a_row_that_folds_to_nothing_is_deleted,
    freshness_tells_what_an_answer_holds,
    the_view_is_there_for_sql_of_the_authors_own,
    changed_columns_are_refused_until_rebuilt,
    a_changed_version_is_refused_until_rebuilt,
    a_foreign_table_of_that_name_is_refused_and_left_alone,
    a_lost_table_is_told_and_not_made_anew,
    names_no_database_takes_stop_the_projection,
    a_projection_for_the_other_database_says_so,
    a_command_from_within_a_projection_is_refused_by_name,
    a_fold_to_another_key_is_a_fault,
    two_workers_that_start_at_once_make_one_table,
);

const WAIT: Duration = Duration::from_secs(20);

fn worker(orders: &Orders, database: &TestDatabase) -> ProjectionWorker {
    let config =
        ProjectionConfig { fault_policy: FaultPolicy::Stop, ..ProjectionConfig::default() };
    ProjectionWorker::new(Arc::new(orders.store.clone()), database.database.clone()).config(config)
}

async fn run_through<M: ReadModel>(orders: &Orders, database: &TestDatabase) {
    let projections = worker(orders, database).with::<M>().spawn();
    orders.applied(&projections, M::NAME, WAIT).await;
    projections.shutdown().await;
}

async fn every_kind_of_column_comes_back_as_it_went(database: &TestDatabase) {
    rows_come_back_as_they_went(40, database).await;
}

/// As many as PostgreSQL is given by COPY.
async fn many_new_rows_at_once_come_back_as_they_went(database: &TestDatabase) {
    rows_come_back_as_they_went(4_000, database).await;
}

async fn rows_come_back_as_they_went(count: i64, database: &TestDatabase) {
    let orders = Orders::new(2);
    for n in 0..count {
        orders.place(&n.to_string(), "Zoë \"x\" 100% '; --", n * 1_000).await;
    }
    let cancelled = OrderEvent::Cancelled { customer: "c".to_owned(), cents: 1 };
    orders.append("order-7", std::slice::from_ref(&cancelled)).await;
    orders.append("order-39", &[placed("", -5), cancelled]).await;
    run_through::<OrderDetails>(&orders, database).await;
    orders.assert_equals_fold::<OrderDetails>(&database.database).await;
    // Loaded and folded again, nothing is lost on the way either.
    orders.append("order-7", &[placed("again", 90_000)]).await;
    run_through::<OrderDetails>(&orders, database).await;
    orders.assert_equals_fold::<OrderDetails>(&database.database).await;
}

async fn rows_are_found_by_declared_columns_in_the_order_of_the_key(database: &TestDatabase) {
    let orders = Orders::new(3);
    for (id, customer) in [("b", "x"), ("B", "x"), ("a1", "x"), ("a", "y"), ("ä", "x")] {
        orders.place(id, customer, 1).await;
    }
    run_through::<OrderDetails>(&orders, database).await;
    let query = Query::<OrderDetails>::new(database.database.clone());
    let ids = async |customer: &str, limit| {
        let rows = query.find(OrderDetails::customer.eq(customer), limit).await.expect("readable");
        rows.into_iter().map(|row| row.id).collect::<Vec<_>>()
    };
    assert_eq!(ids("x", 10).await, ["B", "a1", "b", "ä"]);
    assert_eq!(ids("x", 2).await, ["B", "a1"]);
    assert!(ids("nobody", 10).await.is_empty());
    assert_eq!(query.get("nothing").await.expect("readable"), None);
    assert_eq!(query.all(3).await.expect("readable").len(), 3);
    let by_key = query.find(OrderDetails::id.eq("a1"), 10).await.expect("readable");
    assert_eq!(by_key.len(), 1);
}

/// Rows that many streams share, with a key of two columns that are not the first of the row.
#[derive(Debug, Clone, PartialEq, Row)]
struct CustomerDays {
    #[row(sum, index)]
    cents: i64,
    #[row(key)]
    day: NaiveDate,
    #[row(max)]
    last_at: DateTime<Utc>,
    #[row(key)]
    customer: String,
}

impl ReadModel for CustomerDays {
    const NAME: &'static str = "customer_days";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<(NaiveDate, String)> {
        let at = event.metadata.recorded_at;
        match &event.event {
            OrderEvent::Placed { customer, at, .. } => vec![(at.date_naive(), customer.clone())],
            OrderEvent::Cancelled { customer, .. } => vec![(at.date_naive(), customer.clone())],
        }
    }

    fn fold(
        (day, customer): &(NaiveDate, String),
        row: Option<Self>,
        event: &Recorded<OrderEvent>,
    ) -> Option<Self> {
        let OrderEvent::Placed { cents, at, .. } = event.event else { return None };
        let one = Self { cents, day: *day, last_at: at, customer: customer.clone() };
        Some(row.map_or(one.clone(), |row| row.merge(one)))
    }
}

/// Many rows, so that PostgreSQL takes them by COPY and SQLite in several statements.
async fn keys_of_several_columns_are_loaded_found_and_deleted(database: &TestDatabase) {
    let orders = Orders::new(3);
    for n in 0..1_500 {
        orders.place(&n.to_string(), &format!("c{}", n % 7), n).await;
    }
    run_through::<CustomerDays>(&orders, database).await;
    orders.assert_equals_fold::<CustomerDays>(&database.database).await;
    for n in 0..1_500 {
        orders.place(&n.to_string(), &format!("c{}", n % 7), n).await;
    }
    run_through::<CustomerDays>(&orders, database).await;
    orders.assert_equals_fold::<CustomerDays>(&database.database).await;

    let query = Query::<CustomerDays>::new(database.database.clone());
    let all = query.all(10_000).await.expect("readable");
    assert!(all.is_sorted_by_key(Row::key) && all.len() > 400, "{} rows", all.len());
    let day = all[200].day;
    let of_day: Vec<_> = all.iter().filter(|row| row.day == day).cloned().collect();
    assert!(of_day.len() > 5, "{of_day:?}");
    assert_eq!(query.prefix((day,), 100).await.expect("readable"), of_day);
    assert_eq!(query.prefix((day,), 2).await.expect("readable"), of_day[..2]);
    let key = all[200].key();
    assert_eq!(query.get(&key).await.expect("readable").as_ref(), Some(&all[200]));
    assert_eq!(query.get(&(day, "nobody".to_owned())).await.expect("readable"), None);
    let cents = all[200].cents;
    let found = query.find(CustomerDays::cents.eq(cents), 10).await.expect("readable");
    assert!(found.contains(&all[200]) && found.iter().all(|row| row.cents == cents));

    let recorded_on = "2023-11-14".parse().expect("a day");
    let at = "2023-11-14T01:00:00Z".parse().expect("a time");
    let placed = OrderEvent::Placed { customer: "c1".into(), cents: 1, tags: vec![], at };
    orders.append("order-new", &[placed]).await;
    run_through::<CustomerDays>(&orders, database).await;
    let key = (recorded_on, "c1".to_owned());
    assert!(query.get(&key).await.expect("readable").is_some());
    let cancelled = OrderEvent::Cancelled { customer: "c1".into(), cents: 1 };
    orders.append("order-new", &[cancelled]).await;
    run_through::<CustomerDays>(&orders, database).await;
    assert!(query.get(&key).await.expect("readable").is_none());
    orders.assert_equals_fold::<CustomerDays>(&database.database).await;
}

async fn a_row_that_folds_to_nothing_is_deleted(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.place("1", "c1", 10).await;
    orders.place("2", "c2", 10).await;
    run_through::<CustomerTotals>(&orders, database).await;
    let cancelled = OrderEvent::Cancelled { customer: "c1".to_owned(), cents: 10 };
    orders.append("order-1", &[cancelled]).await;
    run_through::<CustomerTotals>(&orders, database).await;
    let rows = Query::<CustomerTotals>::new(database.database.clone()).all(10).await;
    let c2 = CustomerTotals { customer: "c2".to_owned(), orders: 1, cents: 10 };
    assert_eq!(rows.expect("readable"), [c2]);
}

async fn freshness_tells_what_an_answer_holds(database: &TestDatabase) {
    let orders = Orders::new(1);
    let query = Query::<CustomerTotals>::new(database.database.clone());
    assert_eq!(query.freshness().await.expect("readable").to_string(), "");
    // Before its worker has started for the first time there is no table: that is no lasting fault.
    let early = query.get(&"c1".to_owned()).await;
    assert!(matches!(early, Err(ReadError::Unavailable { .. })), "{early:?}");
    orders.place("1", "c1", 10).await;
    orders.place("2", "c1", 10).await;
    run_through::<CustomerTotals>(&orders, database).await;
    assert_eq!(query.freshness().await.expect("readable").to_string(), "0:2");
}

async fn the_view_is_there_for_sql_of_the_authors_own(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.place("1", "c1", 10).await;
    run_through::<CustomerTotals>(&orders, database).await;
    let sql = "SELECT cents FROM customer_totals WHERE customer = 'c1' AND orders = 1";
    assert_eq!(database.number(sql).await, 10);
    assert_eq!(database.number("SELECT COUNT(*) FROM customer_totals__g1").await, 1);
}

/// As [`CustomerTotals`] of a later program.
#[derive(Debug, Clone, PartialEq, Row)]
struct MoreColumns {
    #[row(key)]
    customer: String,
    orders: i64,
    cents: i64,
    largest: Option<i64>,
}

impl ReadModel for MoreColumns {
    const NAME: &'static str = CustomerTotals::NAME;
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        CustomerTotals::keys(event)
    }

    fn fold(_: &String, row: Option<Self>, _: &Recorded<OrderEvent>) -> Option<Self> {
        row
    }
}

totals!(NewVersion WrongKey);

impl ReadModel for NewVersion {
    const NAME: &'static str = CustomerTotals::NAME;
    const VERSION: u32 = 2;
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        CustomerTotals::keys(event)
    }

    fn fold(key: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        CustomerTotals::fold(key, row.map(Into::into), event).map(Into::into)
    }
}

async fn refused_after_change<M: ReadModel>(database: &TestDatabase) -> String {
    let orders = Orders::new(1);
    orders.place("1", "c1", 10).await;
    run_through::<CustomerTotals>(&orders, database).await;
    orders.place("2", "c1", 10).await;
    let projections = worker(&orders, database).with::<M>().spawn();
    let reason = stopped(&projections).await;
    assert!(reason.contains("`kafold projections rebuild customer_totals`"), "{reason}");
    assert_eq!(database.number("SELECT cents FROM customer_totals").await, 10);
    // The program that built the rows goes on with them.
    run_through::<CustomerTotals>(&orders, database).await;
    assert_eq!(database.number("SELECT cents FROM customer_totals").await, 20);
    reason
}

async fn changed_columns_are_refused_until_rebuilt(database: &TestDatabase) {
    let reason = refused_after_change::<MoreColumns>(database).await;
    assert!(reason.contains("largest integer?"), "{reason}");
}

async fn a_changed_version_is_refused_until_rebuilt(database: &TestDatabase) {
    let reason = refused_after_change::<NewVersion>(database).await;
    assert!(reason.contains("[v2: customer text key"), "{reason}");
}

async fn a_foreign_table_of_that_name_is_refused_and_left_alone(database: &TestDatabase) {
    database.run("CREATE TABLE customer_totals (mine INTEGER)").await;
    database.run("INSERT INTO customer_totals VALUES (5)").await;
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    let reason = stopped(&projections).await;
    assert!(reason.contains("a table or view customer_totals that is not its own"), "{reason}");
    assert_eq!(database.number("SELECT COUNT(*) FROM customer_totals WHERE mine = 5").await, 1);
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_projection").await, 0);
}

async fn a_lost_table_is_told_and_not_made_anew(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.place("1", "c1", 10).await;
    run_through::<CustomerTotals>(&orders, database).await;
    database.run("DROP VIEW customer_totals").await;
    database.run("DROP TABLE customer_totals__g1").await;
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    let reason = stopped(&projections).await;
    assert!(reason.contains("has lost customer_totals"), "{reason}");
}

/// A projection under any name, for one database or for both.
struct Named {
    name: &'static str,
    runs_on: fn(&mut Transaction<'_>) -> Result<(), HandlerError>,
}

#[async_trait]
impl Projection for Named {
    fn name(&self) -> &str {
        self.name
    }

    async fn setup(&self, _: Generation, tx: &mut Transaction<'_>) -> Result<(), HandlerError> {
        (self.runs_on)(tx)
    }

    async fn apply(
        &self,
        _: &ProjectionBatch,
        _: Generation,
        _: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        Ok(())
    }
}

async fn names_no_database_takes_stop_the_projection(database: &TestDatabase) {
    let orders = Orders::new(1);
    for name in ["Sales", "kafold_event", "a b", "\"", ""] {
        let named = Named { name, runs_on: |_| Ok(()) };
        let projections = worker(&orders, database).with_projection(named).spawn();
        let reason = stopped(&projections).await;
        assert!(reason.contains("cannot be the name of a projection"), "{reason}");
    }
    let twice = worker(&orders, database).with::<CustomerTotals>().with::<CustomerTotals>().spawn();
    let ProjectionState::Stopped(reason) = &twice.status()[1].state else { panic!("a duplicate") };
    assert!(reason.contains("is named customer_totals too"), "{reason}");
}

async fn a_projection_for_the_other_database_says_so(database: &TestDatabase) {
    let runs_on: fn(&mut Transaction<'_>) -> Result<(), HandlerError> = match database.database {
        Database::Postgres(_) => |tx| Ok(tx.sqlite().map(drop)?),
        Database::Sqlite(_) => |tx| Ok(tx.postgres().map(drop)?),
    };
    let orders = Orders::new(1);
    let named = Named { name: "choosy", runs_on };
    let projections = worker(&orders, database).with_projection(named).spawn();
    let reason = stopped(&projections).await;
    assert!(reason.contains("this projection needs"), "{reason}");
}

#[derive(Clone, Default)]
struct Open;

impl Aggregate for Open {
    const CATEGORY: &'static str = "order";
    type Command = ();
    type Event = OrderEvent;
    type Error = std::convert::Infallible;

    fn decide(&self, (): &()) -> Result<Vec<OrderEvent>, Self::Error> {
        Ok(vec![placed("c1", 10)])
    }

    fn evolve(&mut self, _: &OrderEvent) {}
}

/// Sends a command for each batch.
struct Commanding(CommandHandler<Open>);

#[async_trait]
impl Projection for Commanding {
    fn name(&self) -> &str {
        "commanding"
    }

    async fn apply(
        &self,
        _: &ProjectionBatch,
        _: Generation,
        _: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        self.0.handle("2", &()).await?;
        Ok(())
    }
}

async fn a_command_from_within_a_projection_is_refused_by_name(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.place("1", "c1", 10).await;
    let commanding = Commanding(CommandHandler::new(Arc::new(orders.store.clone())));
    let projections = worker(&orders, database).with_projection(commanding).spawn();
    let reason = stopped(&projections).await;
    let words = "projection commanding sends a command from within its transaction";
    assert!(reason.contains(words), "{reason}");
}

impl ReadModel for WrongKey {
    const NAME: &'static str = "wrong_key";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        CustomerTotals::keys(event)
    }

    fn fold(_: &String, _: Option<Self>, _: &Recorded<OrderEvent>) -> Option<Self> {
        Some(Self { customer: "someone else".to_owned(), orders: 1, cents: 1 })
    }
}

async fn a_fold_to_another_key_is_a_fault(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.place("1", "c1", 10).await;
    let projections = worker(&orders, database).with::<WrongKey>().spawn();
    let reason = stopped(&projections).await;
    assert!(reason.contains("event 0:0 ") && reason.contains("row of another key"), "{reason}");
}

async fn two_workers_that_start_at_once_make_one_table(database: &TestDatabase) {
    let orders = Orders::new(4);
    for n in 0..20 {
        orders.place(&n.to_string(), "c1", 1).await;
    }
    let spawned: Vec<_> =
        (0..4).map(|_| worker(&orders, database).with::<CustomerTotals>().spawn()).collect();
    for projections in &spawned {
        orders.applied(projections, CustomerTotals::NAME, WAIT).await;
    }
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

#[tokio::test]
async fn postgres_columns_have_types_of_their_own() {
    let Some(database) = TestDatabase::postgres().await else { return };
    let orders = Orders::new(1);
    orders.place("1", "c1", 10).await;
    run_through::<OrderDetails>(&orders, &database).await;
    let Database::Postgres(postgres) = &database.database else { unreachable!("it is postgres") };
    let sql = "SELECT string_agg(column_name || ' ' || data_type, ', ' ORDER BY ordinal_position) \
               FROM information_schema.columns WHERE table_name = 'order_details'";
    let row = sqlx::query(sql).fetch_one(postgres.pool()).await.expect("readable");
    let types: String = row.get(0);
    for wanted in
        ["euros double precision", "day date", "at timestamp with", "event_id uuid", "tags jsonb"]
    {
        assert!(types.contains(wanted), "{types}");
    }
    database.remove().await;
}

//! What operators do to projections, on both databases: parked streams, pause, rebuild.

use crate::common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::domain::{
    CustomerTotals, Ledger, OrderDetails, Orders, POISON_CENTS, Poisoned, StreamTotals, totals,
};
use common::{Dice, TestDatabase};
use kafold_core::testing::eventually;
use kafold_core::{Position, Recorded, Row, StreamId};
use kafold_projections::{
    By, Control, ControlError, FaultPolicy, Generation, OverviewState, ProjectionConfig,
    ProjectionState, ProjectionStatus, ProjectionWorker, Projections, Query, ReadModel,
};

on_both!(
    a_projection_that_no_worker_runs_is_named_and_can_be_removed,
    the_stream_of_an_event_that_fails_is_parked_and_the_others_go_on,
    a_retry_after_a_fix_applies_the_stream_in_order,
    a_long_parked_stream_is_retried_to_its_end,
    a_retry_that_fails_again_stays_parked_behind_what_it_applied,
    a_skipped_event_is_left_out_and_the_rest_of_its_stream_applied,
    what_is_parked_for_long_can_be_left_out_at_once,
    a_row_that_the_database_refuses_is_parked,
    a_statement_that_the_database_refuses_stops_the_projection,
    no_more_streams_are_parked_than_may_be,
    a_paused_projection_applies_nothing_until_it_is_resumed,
    rows_that_an_operator_mended_are_read_again,
    rows_that_a_retry_wrote_are_read_again,
    what_stopped_goes_on_when_it_is_resumed,
    a_position_that_stops_a_projection_can_be_skipped,
    a_rebuild_takes_the_place_of_the_live_rows_while_writes_go_on,
    a_rebuild_goes_on_after_a_crash,
    what_the_database_forgot_is_applied_again,
    an_aborted_rebuild_leaves_the_live_rows_alone,
    a_changed_definition_is_rebuilt_and_switched_to,
    a_rebuild_with_parked_streams_waits_for_the_operator,
    what_was_waited_for_is_in_the_rows_before_and_after_a_switch,
    the_old_generations_progress_is_not_told_for_the_new_rows,
    operators_at_odds_leave_every_projection_usable,
    a_verification_finds_what_is_not_the_fold_of_the_log,
    what_is_parked_or_skipped_is_no_difference,
    an_overview_tells_what_operators_have_to_know,
);

const WAIT: Duration = Duration::from_secs(20);
const ME: By<'static> = By { actor: "me", reason: Some("a test") };

fn quick() -> ProjectionConfig {
    ProjectionConfig {
        retry_delay: Duration::from_millis(2),
        retry_delay_max: Duration::from_millis(20),
        control_poll_interval: Duration::from_millis(20),
        ..ProjectionConfig::default()
    }
}

fn worker(orders: &Orders, database: &TestDatabase) -> ProjectionWorker {
    let source = Arc::new(orders.store.clone());
    ProjectionWorker::new(source, database.database.clone()).config(quick())
}

fn control(database: &TestDatabase) -> Control {
    Control::new(database.database.clone())
}

/// Waits until everything is applied; a projection that was told to go on may take a moment to hear it.
async fn applied(projections: &Projections, orders: &Orders, name: &str) {
    eventually(&format!("{name} is running"), async || {
        status(projections, name).state == ProjectionState::Running
    })
    .await;
    orders.applied(projections, name, WAIT).await;
}

fn status(projections: &Projections, name: &str) -> ProjectionStatus {
    let mut all = projections.status().into_iter();
    all.find(|status| status.name == name).expect("it is run here")
}

async fn in_state(projections: &Projections, name: &str, wanted: &str) {
    eventually(&format!("{name} is {wanted}"), async || {
        status(projections, name).state.to_string().starts_with(wanted)
    })
    .await;
}

fn stream(text: &str) -> StreamId {
    text.parse().expect("a stream")
}

async fn totals<M>(database: &TestDatabase) -> BTreeMap<String, i64>
where
    M: ReadModel + Into<CustomerTotals>,
{
    let rows = Query::<M>::new(database.database.clone()).all(1_000).await.expect("readable");
    rows.into_iter().map(Into::into).map(|row: CustomerTotals| (row.customer, row.cents)).collect()
}

totals! {
    /// [`Poisoned`] as it is after its fold was mended.
    Mended
}

impl ReadModel for Mended {
    const NAME: &'static str = Poisoned::NAME;
    type Event = <Poisoned as ReadModel>::Event;

    fn keys(event: &Recorded<Self::Event>) -> Vec<String> {
        CustomerTotals::keys(event)
    }

    fn fold(key: &String, row: Option<Self>, event: &Recorded<Self::Event>) -> Option<Self> {
        CustomerTotals::fold(key, row.map(Into::into), event).map(Into::into)
    }
}

async fn poisoned(orders: &Orders, database: &TestDatabase) -> Projections {
    orders.place("1", "c1", 1).await;
    orders.place("bad", "c1", 10).await;
    orders.place("bad", "c2", POISON_CENTS).await;
    orders.place("bad", "c1", 100).await;
    orders.place("2", "c1", 1_000).await;
    let projections = worker(orders, database).with::<Poisoned>().spawn();
    applied(&projections, orders, Poisoned::NAME).await;
    projections
}

async fn the_stream_of_an_event_that_fails_is_parked_and_the_others_go_on(database: &TestDatabase) {
    let orders = Orders::new(3);
    let projections = poisoned(&orders, database).await;
    assert_eq!(totals::<Poisoned>(database).await, BTreeMap::from([("c1".to_owned(), 1_011)]));
    let seen = status(&projections, Poisoned::NAME);
    assert_eq!((seen.parked_streams, seen.parked_events), (1, 2));
    // Later events of the stream go behind it, in another process too.
    drop(projections);
    let projections = worker(&orders, database).with::<Poisoned>().spawn();
    orders.place("bad", "c1", 10_000).await;
    orders.place("3", "c1", 100_000).await;
    applied(&projections, &orders, Poisoned::NAME).await;
    assert_eq!(totals::<Poisoned>(database).await["c1"], 101_011);
    assert_eq!(status(&projections, Poisoned::NAME).parked_events, 3);
    let at_fault = "SELECT COUNT(*) FROM kafold_parked_event \
                    WHERE stream_id = 'bad' AND error LIKE '%beast%' AND attempts = 5";
    assert_eq!(database.number(at_fault).await, 1);
    let behind = "SELECT COUNT(*) FROM kafold_parked_event WHERE error IS NULL";
    assert_eq!(database.number(behind).await, 2);
}

async fn a_retry_after_a_fix_applies_the_stream_in_order(database: &TestDatabase) {
    let orders = Orders::new(3);
    drop(poisoned(&orders, database).await);
    let projections = worker(&orders, database).with::<Mended>().spawn();
    orders.place("bad", "c1", 10_000).await;
    applied(&projections, &orders, Mended::NAME).await;
    assert_eq!(status(&projections, Mended::NAME).parked_events, 3);
    let asked = control(database).retry(None, Some(&stream("order-bad")), ME).await;
    assert_eq!(asked.expect("it is parked"), 1);
    eventually("it is parked no more", async || {
        status(&projections, Mended::NAME).parked_streams == 0
    })
    .await;
    orders.place("bad", "c1", 100_000).await;
    applied(&projections, &orders, Mended::NAME).await;
    orders.assert_equals_fold::<Mended>(&database.database).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);
    let audited = "SELECT COUNT(*) FROM kafold_audit WHERE actor = 'me' AND action = 'retry'";
    assert_eq!(database.number(audited).await, 1);
}

async fn a_long_parked_stream_is_retried_to_its_end(database: &TestDatabase) {
    let orders = Orders::new(1);
    orders.place("bad", "c1", POISON_CENTS).await;
    for _ in 0..1_010 {
        orders.place("bad", "c1", 1).await;
    }
    let projections = worker(&orders, database).with::<Poisoned>().spawn();
    applied(&projections, &orders, Poisoned::NAME).await;
    drop(projections);
    let projections = worker(&orders, database).with::<Mended>().spawn();
    applied(&projections, &orders, Mended::NAME).await;
    // What came after the request goes with the rest, although it is more than one transaction takes.
    database.run("UPDATE kafold_parked_event SET retry = (version = 1)").await;
    eventually("nothing is parked", async || {
        let left = status(&projections, Mended::NAME);
        (left.parked_streams, left.parked_events) == (0, 0)
    })
    .await;
    orders.assert_equals_fold::<Mended>(&database.database).await;
}

async fn a_retry_that_fails_again_stays_parked_behind_what_it_applied(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = poisoned(&orders, database).await;
    control(database).retry(Some(Poisoned::NAME), None, ME).await.expect("it is parked");
    let again = "SELECT COUNT(*) FROM kafold_parked_event \
                 WHERE attempts = 6 AND error LIKE '%beast%' AND NOT retry";
    eventually("it failed again", async || database.number(again).await == 1).await;
    assert_eq!(status(&projections, Poisoned::NAME).parked_events, 2);
    assert_eq!(totals::<Poisoned>(database).await["c1"], 1_011);
}

async fn a_skipped_event_is_left_out_and_the_rest_of_its_stream_applied(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = poisoned(&orders, database).await;
    let control = control(database);
    let silent = By { reason: None, ..ME };
    let refused = control.skip_parked(None, &stream("order-bad"), silent).await;
    assert!(matches!(refused, Err(ControlError::Refused(_))), "{refused:?}");
    control.skip_parked(None, &stream("order-bad"), ME).await.expect("it is parked");
    eventually("it is parked no more", async || {
        status(&projections, Poisoned::NAME).parked_streams == 0
    })
    .await;
    assert_eq!(totals::<Poisoned>(database).await, BTreeMap::from([("c1".to_owned(), 1_111)]));
    let skipped = "SELECT COUNT(*) FROM kafold_skipped_event WHERE reason = 'a test'";
    assert_eq!(database.number(skipped).await, 1);
    orders.place("bad", "c1", 10_000).await;
    applied(&projections, &orders, Poisoned::NAME).await;
    assert_eq!(totals::<Poisoned>(database).await["c1"], 11_111);
}

async fn what_is_parked_for_long_can_be_left_out_at_once(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = poisoned(&orders, database).await;
    let control = control(database);
    let long_ago = chrono::DateTime::UNIX_EPOCH;
    assert_eq!(control.skip_parked_before(long_ago, ME).await.expect("asked"), 0);
    let sometime = chrono::DateTime::from_timestamp(4_000_000_000, 0).expect("in range");
    assert_eq!(control.skip_parked_before(sometime, ME).await.expect("asked"), 2);
    eventually("nothing is parked", async || {
        status(&projections, Poisoned::NAME).parked_streams == 0
    })
    .await;
    orders.place("bad", "c1", 10_000).await;
    applied(&projections, &orders, Poisoned::NAME).await;
    assert_eq!(totals::<Poisoned>(database).await, BTreeMap::from([("c1".to_owned(), 11_011)]));
}

async fn a_projection_that_no_worker_runs_is_named_and_can_be_removed(database: &TestDatabase) {
    let orders = Orders::new(2);
    orders.place("1", "c1", 1).await;
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    let control = control(database);
    let state = async || {
        let [overview] = &control.list(&[]).await.expect("listed")[..] else { panic!("one") };
        (overview.state, overview.reason.clone().unwrap_or_default())
    };
    eventually("a worker is seen", async || state().await.0 == OverviewState::Running).await;
    let refused = control.remove(CustomerTotals::NAME, ME).await.expect_err("a worker runs");
    assert!(refused.to_string().contains("stop all programs that have it"), "{refused}");
    projections.shutdown().await;
    database.run("UPDATE kafold_projection SET seen_at = seen_at - 100").await;
    let (stopped, reason) = state().await;
    assert_eq!(stopped, OverviewState::Stopped);
    assert!(reason.starts_with("no worker has run it for 10"), "{reason}");
    assert!(
        reason.contains("`kafold projections remove customer_totals --reason TEXT`"),
        "{reason}"
    );

    // A paused projection without a program is named too.
    assert!(control.pause(CustomerTotals::NAME, ME).await.expect("asked"));
    let (paused, reason) = state().await;
    assert_eq!(paused, OverviewState::Paused);
    assert!(reason.starts_with("no worker has run it for 10"), "{reason}");

    let nobody = By { actor: "nobody", reason: None };
    let refused = control.remove(CustomerTotals::NAME, nobody).await.expect_err("no reason");
    assert!(refused.to_string().contains("takes a reason"), "{refused}");
    control.remove(CustomerTotals::NAME, ME).await.expect("removed");
    for sql in [
        "SELECT COUNT(*) FROM kafold_projection",
        "SELECT COUNT(*) FROM kafold_checkpoint",
        "SELECT COUNT(*) FROM kafold_projection_category",
    ] {
        assert_eq!(database.number(sql).await, 0, "{sql}");
    }
    // A program that has the projection again begins anew.
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    assert_eq!(totals::<CustomerTotals>(database).await, BTreeMap::from([("c1".to_owned(), 1)]));
}

async fn a_row_that_the_database_refuses_is_parked(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    database.run("CREATE UNIQUE INDEX one_each ON customer_totals__g1 (orders)").await;
    orders.place("2", "c2", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    orders.place("3", "c1", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    assert_eq!(status(&projections, CustomerTotals::NAME).parked_streams, 1);
    assert_eq!(totals::<CustomerTotals>(database).await, BTreeMap::from([("c1".to_owned(), 2)]));
}

async fn a_statement_that_the_database_refuses_stops_the_projection(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    database.run("DROP VIEW customer_totals").await;
    database.run("DROP TABLE customer_totals__g1").await;
    orders.place("2", "c1", 1).await;
    in_state(&projections, CustomerTotals::NAME, "stopped").await;
    assert_eq!(database.number("SELECT COUNT(*) FROM kafold_parked_event").await, 0);
    // It can be built anew.
    let next = control(database).rebuild(CustomerTotals::NAME, false, ME).await.expect("asked");
    switched(&projections, CustomerTotals::NAME, next).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn no_more_streams_are_parked_than_may_be(database: &TestDatabase) {
    let orders = Orders::new(1);
    let config = ProjectionConfig { parked_streams_max: 2, ..quick() };
    for id in ["1", "2", "3"] {
        orders.place(id, "c1", POISON_CENTS).await;
    }
    let projections = worker(&orders, database).config(config).with::<Poisoned>().spawn();
    in_state(&projections, Poisoned::NAME, "stopped: 2 streams of partition 0 are parked").await;
    let streams = "SELECT COUNT(*) FROM kafold_parked_event";
    assert_eq!(database.number(streams).await, 2);
    assert_eq!(database.number("SELECT next_offset FROM kafold_checkpoint").await, 2);
}

async fn a_paused_projection_applies_nothing_until_it_is_resumed(database: &TestDatabase) {
    let orders = Orders::new(4);
    let spawn = || worker(&orders, database).with::<CustomerTotals>().spawn();
    let workers = [spawn(), spawn()];
    orders.place("1", "c1", 1).await;
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    let control = control(database);
    assert!(control.pause(CustomerTotals::NAME, ME).await.expect("asked"));
    assert!(!control.pause(CustomerTotals::NAME, ME).await.expect("asked"), "it is already");
    for projections in &workers {
        in_state(projections, CustomerTotals::NAME, "paused").await;
    }
    let mut dice = Dice::new(5);
    for _ in 0..200 {
        orders.append_random(&mut dice).await;
    }
    // One that starts meanwhile, and one that takes over, apply nothing either.
    let [first, second] = workers;
    drop(first);
    let third = spawn();
    in_state(&third, CustomerTotals::NAME, "paused").await;
    eventually("each has its part", async || {
        [&second, &third]
            .iter()
            .all(|worker| status(worker, CustomerTotals::NAME).partitions.len() == 2)
    })
    .await;
    assert_eq!(totals::<CustomerTotals>(database).await, BTreeMap::from([("c1".to_owned(), 1)]));
    let actual = "SELECT COUNT(*) FROM kafold_projection WHERE actual_state = 'paused'";
    assert_eq!(database.number(actual).await, 1);
    assert!(control.resume(CustomerTotals::NAME, ME).await.expect("asked"));
    applied(&second, &orders, CustomerTotals::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn rows_that_an_operator_mended_are_read_again(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<StreamTotals>().spawn();
    for _ in 0..2 {
        orders.place("1", "c1", 10).await;
        applied(&projections, &orders, StreamTotals::NAME).await;
    }
    let control = control(database);
    assert!(control.pause(StreamTotals::NAME, ME).await.expect("asked"));
    in_state(&projections, StreamTotals::NAME, "paused").await;
    database.run("UPDATE stream_totals__g1 SET cents = cents + 100").await;
    assert!(control.resume(StreamTotals::NAME, ME).await.expect("asked"));
    orders.place("1", "c1", 10).await;
    applied(&projections, &orders, StreamTotals::NAME).await;
    assert_eq!(totals::<StreamTotals>(database).await["1"], 130);
}

async fn rows_that_a_retry_wrote_are_read_again(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<StreamTotals>().spawn();
    for cents in [1, 10, POISON_CENTS, 100] {
        orders.place("1", "c1", cents).await;
        applied(&projections, &orders, StreamTotals::NAME).await;
    }
    control(database).skip_parked(None, &stream("order-1"), ME).await.expect("it is parked");
    eventually("it is parked no more", async || {
        status(&projections, StreamTotals::NAME).parked_streams == 0
    })
    .await;
    orders.place("1", "c1", 1_000).await;
    applied(&projections, &orders, StreamTotals::NAME).await;
    assert_eq!(totals::<StreamTotals>(database).await["1"], 1_111);
}

async fn what_stopped_goes_on_when_it_is_resumed(database: &TestDatabase) {
    let orders = Orders::new(2);
    let config = ProjectionConfig { fault_policy: FaultPolicy::Stop, ..quick() };
    let ledger = Ledger::default();
    ledger.failures.store(u32::MAX, std::sync::atomic::Ordering::SeqCst);
    let projections =
        worker(&orders, database).config(config).with_projection(ledger.clone()).spawn();
    orders.place("1", "c1", 1).await;
    in_state(&projections, "ledger", "stopped").await;
    let written = "SELECT COUNT(*) FROM kafold_projection WHERE actual_state = 'stopped'";
    eventually("it is written down", async || database.number(written).await == 1).await;
    ledger.failures.store(0, std::sync::atomic::Ordering::SeqCst);
    control(database).resume("ledger", ME).await.expect("asked");
    applied(&projections, &orders, "ledger").await;
    assert_eq!(database.number("SELECT COUNT(*) FROM ledger").await, 1);
    assert_eq!(database.number(written).await, 0);
}

async fn a_position_that_stops_a_projection_can_be_skipped(database: &TestDatabase) {
    let orders = Orders::new(1);
    let config = ProjectionConfig { fault_policy: FaultPolicy::Stop, ..quick() };
    orders.place("1", "c1", 1).await;
    let bad = orders.place("2", "c1", POISON_CENTS).await;
    orders.place("3", "c1", 10).await;
    let projections = worker(&orders, database).config(config).with::<Poisoned>().spawn();
    in_state(&projections, Poisoned::NAME, "stopped").await;
    let control = control(database);
    let passed = Position { offset: kafold_core::Offset(0), ..bad };
    let refused = control.skip(Poisoned::NAME, passed, ME).await;
    assert!(matches!(refused, Err(ControlError::Refused(_))), "{refused:?}");
    control.skip(Poisoned::NAME, bad, ME).await.expect("asked");
    applied(&projections, &orders, Poisoned::NAME).await;
    assert_eq!(totals::<Poisoned>(database).await["c1"], 11);
}

async fn switched(projections: &Projections, name: &str, generation: Generation) {
    eventually("it is switched to", async || {
        let status = status(projections, name);
        status.generation == generation && status.state == ProjectionState::Running
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_rebuild_that_is_far_behind_does_not_wait_for_the_disk() {
    let Some(database) = TestDatabase::postgres().await else { return };
    // Whoever moves a checkpoint tells whether it waits.
    for sql in [
        "CREATE TABLE durability (generation INT, setting TEXT, transaction TEXT)",
        "CREATE FUNCTION note_durability() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           INSERT INTO durability SELECT NEW.generation, current_setting('synchronous_commit'), \
             pg_current_xact_id(); \
           RETURN NULL; END $$",
        "CREATE TRIGGER note_durability AFTER UPDATE OF next_offset ON kafold_checkpoint \
           FOR EACH ROW EXECUTE FUNCTION note_durability()",
    ] {
        database.run(sql).await;
    }
    let orders = Orders::new(2);
    orders.place_many(40).await;
    let projections = worker(&orders, &database).with::<CustomerTotals>().spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    let forgettable = "SELECT COUNT(*) FROM durability WHERE setting = 'off'";
    assert_eq!(database.number(forgettable).await, 0);
    let next = control(&database).rebuild(CustomerTotals::NAME, false, ME).await.expect("asked");
    switched(&projections, CustomerTotals::NAME, next).await;
    orders.place("after", "c", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    assert!(database.number(forgettable).await > 0);
    let durable = "SELECT COUNT(DISTINCT transaction) FROM durability \
                   WHERE setting = 'on' AND generation = 2";
    assert!(database.number(durable).await > 1, "what is near the end, and what is live");
    projections.shutdown().await;
    database.remove().await;
}

async fn a_rebuild_takes_the_place_of_the_live_rows_while_writes_go_on(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(6), Dice::new(3));
    let spawn = || {
        worker(&orders, database)
            .with::<CustomerTotals>()
            .with_projection(Ledger::default())
            .spawn()
    };
    let workers = [spawn(), spawn()];
    for _ in 0..500 {
        orders.append_random(&mut dice).await;
    }
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    let control = control(database);
    for name in [CustomerTotals::NAME, "ledger"] {
        // Rows that no event accounts for are gone afterwards.
        let next = control.rebuild(name, false, ME).await.expect("asked");
        assert_eq!(next, Generation(2));
        let again = control.rebuild(name, false, ME).await;
        assert!(matches!(again, Err(ControlError::Refused(_))), "{again:?}");
        for _ in 0..100 {
            orders.append_random(&mut dice).await;
        }
        for projections in &workers {
            switched(projections, name, next).await;
        }
        for _ in 0..100 {
            orders.append_random(&mut dice).await;
        }
        applied(&workers[1], &orders, name).await;
    }
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let counted = database.number("SELECT COUNT(*) FROM ledger").await;
    assert_eq!(counted as usize, orders.count());
    let old = "SELECT COUNT(*) FROM kafold_checkpoint WHERE generation = 1";
    assert_eq!(database.number(old).await, 0);
    eventually("the old tables are gone", async || tables(database, "__g1").await == 0).await;
    assert_eq!(tables(database, "__g2").await, 2);
}

/// How many tables have names that end so.
async fn tables(database: &TestDatabase, suffix: &'static str) -> i64 {
    let of = |all: &'static str| format!("{all} LIKE '%{suffix}'");
    let sql = match database.database {
        kafold_migrations::Database::Postgres(_) => {
            of("SELECT COUNT(*) FROM pg_class WHERE relkind = 'r' AND relname")
        }
        kafold_migrations::Database::Sqlite(_) => {
            of("SELECT COUNT(*) FROM sqlite_schema WHERE type = 'table' AND name")
        }
    };
    database.number(String::leak(sql)).await
}

async fn a_rebuild_goes_on_after_a_crash(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(3), Dice::new(9));
    for _ in 0..300 {
        orders.append_random(&mut dice).await;
    }
    let config = ProjectionConfig {
        batch_events_max: 7,
        sqlite_batch_events_max: 7,
        rebuild_batch_events_max: 7,
        control_poll_interval: Duration::from_millis(5),
        ..ProjectionConfig::default()
    };
    let spawn =
        || worker(&orders, database).config(config.clone()).with::<CustomerTotals>().spawn();
    let projections = spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    let next = control(database).rebuild(CustomerTotals::NAME, false, ME).await.expect("asked");
    drop(projections);
    for _ in 0..20 {
        let projections = spawn();
        common::a_while(Duration::from_millis(dice.roll(40))).await;
        drop(projections);
    }
    let projections = spawn();
    switched(&projections, CustomerTotals::NAME, next).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn what_the_database_forgot_is_applied_again(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(3), Dice::new(10));
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    let mut more = async || {
        for _ in 0..100 {
            orders.append_random(&mut dice).await;
        }
        applied(&projections, &orders, CustomerTotals::NAME).await;
    };
    more().await;
    database.run("CREATE TABLE rows_then AS SELECT * FROM customer_totals__g1").await;
    database.run("CREATE TABLE places_then AS SELECT * FROM kafold_checkpoint").await;
    more().await;
    // As a server that crashed, or a replica that had not heard of the last commits.
    database.run("DELETE FROM customer_totals__g1").await;
    database.run("INSERT INTO customer_totals__g1 SELECT * FROM rows_then").await;
    let back = "UPDATE kafold_checkpoint SET next_offset = t.next_offset, fold_state = t.fold_state \
                FROM places_then t WHERE kafold_checkpoint.partition = t.partition";
    database.run(back).await;
    more().await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn an_aborted_rebuild_leaves_the_live_rows_alone(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(2), Dice::new(4));
    for _ in 0..50 {
        orders.append_random(&mut dice).await;
    }
    let projections = worker(&orders, database).with::<Poisoned>().with::<CustomerTotals>().spawn();
    orders.place("bad", "c1", POISON_CENTS).await;
    applied(&projections, &orders, Poisoned::NAME).await;
    let control = control(database);
    // Parked streams keep it from switching.
    control.rebuild(Poisoned::NAME, false, ME).await.expect("asked");
    let waits = "SELECT COUNT(*) FROM kafold_projection WHERE next_reason LIKE '%are parked%'";
    eventually("it says why it waits", async || database.number(waits).await == 1).await;
    control.abort(Poisoned::NAME, ME).await.expect("asked");
    let again = control.abort(Poisoned::NAME, ME).await;
    assert!(matches!(again, Err(ControlError::Refused(_))), "{again:?}");
    eventually("its tables are gone", async || tables(database, "__g2").await == 0).await;
    assert_eq!(status(&projections, Poisoned::NAME).next, None);
    orders.place("9", "c9", 9).await;
    applied(&projections, &orders, Poisoned::NAME).await;
    assert_eq!(totals::<Poisoned>(database).await["c9"], 9);
    // Another one is another generation.
    let next = control.rebuild(Poisoned::NAME, true, ME).await.expect("asked");
    assert_eq!(next, Generation(3));
    switched(&projections, Poisoned::NAME, next).await;
}

async fn a_changed_definition_is_rebuilt_and_switched_to(database: &TestDatabase) {
    totals!(Changed);
    impl ReadModel for Changed {
        const NAME: &'static str = CustomerTotals::NAME;
        const VERSION: u32 = 2;
        type Event = <CustomerTotals as ReadModel>::Event;
        fn keys(event: &Recorded<Self::Event>) -> Vec<String> {
            CustomerTotals::keys(event)
        }
        fn fold(key: &String, row: Option<Self>, event: &Recorded<Self::Event>) -> Option<Self> {
            let row = CustomerTotals::fold(key, row.map(Into::into), event)?;
            Some(Self { orders: row.orders + 1_000, ..row.into() })
        }
    }
    let (orders, mut dice) = (Orders::new(3), Dice::new(6));
    for _ in 0..100 {
        orders.append_random(&mut dice).await;
    }
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    projections.shutdown().await;
    let projections = worker(&orders, database).with::<Changed>().spawn();
    in_state(&projections, Changed::NAME, "stopped: projection customer_totals has changed").await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let next = control(database).rebuild(Changed::NAME, false, ME).await.expect("asked");
    switched(&projections, Changed::NAME, next).await;
    applied(&projections, &orders, Changed::NAME).await;
    orders.assert_equals_fold::<Changed>(&database.database).await;
}

#[tokio::test]
async fn views_that_depend_on_a_read_model_are_named_by_its_switch_and_its_removal() {
    #[derive(Debug, Clone, PartialEq, Row)]
    struct Wider {
        #[row(key)]
        customer: String,
        orders: i64,
    }
    impl ReadModel for Wider {
        const NAME: &'static str = CustomerTotals::NAME;
        type Event = <CustomerTotals as ReadModel>::Event;
        fn keys(event: &Recorded<Self::Event>) -> Vec<String> {
            CustomerTotals::keys(event)
        }
        fn fold(key: &String, row: Option<Self>, _: &Recorded<Self::Event>) -> Option<Self> {
            let orders = row.map_or(0, |row| row.orders) + 1;
            Some(Self { customer: key.clone(), orders })
        }
    }
    let Some(database) = TestDatabase::postgres().await else { return };
    let (orders, control) = (Orders::new(1), control(&database));
    orders.place("1", "c1", 1).await;
    let projections = worker(&orders, &database).with::<CustomerTotals>().spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    projections.shutdown().await;
    let (report, drop_report) =
        ("CREATE VIEW report AS SELECT orders FROM customer_totals", "DROP VIEW report");
    database.run(report).await;

    let projections = worker(&orders, &database).with::<Wider>().spawn();
    let next = control.rebuild(Wider::NAME, false, ME).await.expect("asked");
    let waits = "SELECT COUNT(*) FROM kafold_projection \
                 WHERE next_reason LIKE '%view report depends on view customer_totals: drop %'";
    eventually("it says why it waits", async || database.number(waits).await == 1).await;
    database.run(drop_report).await;
    switched(&projections, Wider::NAME, next).await;
    projections.shutdown().await;

    database.run(report).await;
    database.run("UPDATE kafold_projection SET seen_at = seen_at - 100").await;
    let refused = control.remove(Wider::NAME, ME).await.expect_err("a view depends on it");
    assert!(refused.to_string().starts_with("view report depends on view"), "{refused}");
    database.run(drop_report).await;
    control.remove(Wider::NAME, ME).await.expect("removed");
    database.remove().await;
}

async fn a_rebuild_with_parked_streams_waits_for_the_operator(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = poisoned(&orders, database).await;
    let control = control(database);
    let next = control.rebuild(Poisoned::NAME, false, ME).await.expect("asked");
    let waits = "SELECT COUNT(*) FROM kafold_projection WHERE next_reason LIKE '%are parked%'";
    eventually("it says why it waits", async || database.number(waits).await == 1).await;
    assert_eq!(status(&projections, Poisoned::NAME).generation, Generation(1));
    assert_eq!(control.rebuild(Poisoned::NAME, true, ME).await.expect("said so"), next);
    switched(&projections, Poisoned::NAME, next).await;
    assert_eq!(status(&projections, Poisoned::NAME).parked_events, 2);
    assert_eq!(totals::<Poisoned>(database).await["c1"], 1_011);
}

async fn what_was_waited_for_is_in_the_rows_before_and_after_a_switch(database: &TestDatabase) {
    let orders = Arc::new(Orders::new(4));
    let spawn = || worker(&orders, database).with::<CustomerTotals>().spawn();
    let workers = [spawn(), spawn()];
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    let control = control(database);
    let query = Query::<CustomerTotals>::new(database.database.clone());
    let (mut placed, mut switches) = (0_i64, 0);
    while switches < 3 {
        if status(&workers[0], CustomerTotals::NAME).next.is_none() {
            match control.rebuild(CustomerTotals::NAME, false, ME).await {
                Ok(_) => switches += 1,
                Err(ControlError::Refused(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        for n in 0..20 {
            let written = orders.place(&format!("{placed}"), "c1", 1).await;
            placed += 1;
            let asked = &workers[n % 2];
            asked.wait_for_position(CustomerTotals::NAME, written, WAIT).await.expect("applied");
            let row = query.get(&"c1".to_owned()).await.expect("readable").expect("there");
            assert_eq!(row.cents, placed, "what was waited for is in the rows");
        }
    }
}

async fn the_old_generations_progress_is_not_told_for_the_new_rows(database: &TestDatabase) {
    let orders = Orders::new(1);
    // It has the live generation, and hears nothing of what is asked.
    let deaf = ProjectionConfig { control_poll_interval: 100 * WAIT, ..quick() };
    let deaf = worker(&orders, database).config(deaf).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 1).await;
    applied(&deaf, &orders, CustomerTotals::NAME).await;
    let builder = worker(&orders, database).with::<CustomerTotals>().spawn();
    let control = control(database);
    let next = control.rebuild(CustomerTotals::NAME, false, ME).await.expect("asked");
    switched(&builder, CustomerTotals::NAME, next).await;
    control.pause(CustomerTotals::NAME, ME).await.expect("asked");
    in_state(&builder, CustomerTotals::NAME, "paused").await;
    let written = orders.place("2", "c1", 10).await;
    let waited =
        deaf.wait_for_position(CustomerTotals::NAME, written, Duration::from_millis(500)).await;
    assert!(waited.is_err(), "the rows that queries see are without it");
    assert_eq!(totals::<CustomerTotals>(database).await["c1"], 1);
    control.resume(CustomerTotals::NAME, ME).await.expect("asked");
    deaf.wait_for_position(CustomerTotals::NAME, written, WAIT)
        .await
        .expect("applied by the other one");
    assert_eq!(totals::<CustomerTotals>(database).await["c1"], 11);
}

async fn operators_at_odds_leave_every_projection_usable(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(3), Dice::new(13));
    let spawn = || worker(&orders, database).with::<CustomerTotals>().with::<Poisoned>().spawn();
    let workers = [spawn(), spawn()];
    orders.place("bad", "c1", POISON_CENTS).await;
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    applied(&workers[0], &orders, Poisoned::NAME).await;
    let operate = async |seed: u64| {
        let (control, mut dice) = (control(database), Dice::new(seed));
        for _ in 0..60 {
            let name = [CustomerTotals::NAME, Poisoned::NAME][dice.roll(2) as usize];
            let done = match dice.roll(6) {
                0 => control.pause(name, ME).await.map(drop),
                1 | 2 => control.resume(name, ME).await.map(drop),
                3 => control.rebuild(name, dice.roll(2) == 0, ME).await.map(drop),
                4 => control.abort(name, ME).await.map(drop),
                _ => control.retry(Some(name), None, ME).await.map(drop),
            };
            match done {
                Ok(()) | Err(ControlError::Refused(_)) => {}
                Err(error) => panic!("{error}"),
            }
            common::a_while(Duration::from_millis(dice.roll(30))).await;
        }
    };
    let write = async {
        for _ in 0..300 {
            orders.append_random(&mut dice).await;
            common::a_while(Duration::from_millis(2)).await;
        }
    };
    tokio::join!(operate(1), operate(2), write);
    let control = control(database);
    for name in [CustomerTotals::NAME, Poisoned::NAME] {
        control.resume(name, ME).await.expect("asked");
        // A rebuild with parked streams waits; this one need not.
        control.rebuild(name, true, ME).await.expect("asked, or said of the one under way");
    }
    eventually("both are switched", async || {
        let sql = "SELECT COUNT(*) FROM kafold_projection WHERE next_generation IS NULL";
        database.number(sql).await == 2
    })
    .await;
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    applied(&workers[1], &orders, Poisoned::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn a_verification_finds_what_is_not_the_fold_of_the_log(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(3), Dice::new(21));
    for _ in 0..300 {
        orders.append_random(&mut dice).await;
    }
    let all = || {
        let worker = worker(&orders, database).with::<CustomerTotals>().with::<OrderDetails>();
        worker.with_projection(Ledger::default())
    };
    let projections = all().spawn();
    for name in all().names() {
        applied(&projections, &orders, &name).await;
        let steps = std::sync::Mutex::new(Vec::new());
        let tell = |progress| steps.lock().expect("no panic").push(progress);
        let found = all().verify(&name, &tell).await.expect("verified");
        assert!(found.differences.is_empty() && found.rows > 0, "{found:?}");
        let last = *steps.lock().expect("no panic").last().expect("it tells");
        assert_eq!((last.done, last.total), (orders.count() as u64, orders.count() as u64));
    }
    projections.shutdown().await;
    database.run("UPDATE customer_totals__g1 SET cents = cents + 1 WHERE customer = 'c1'").await;
    database.run("DELETE FROM customer_totals__g1 WHERE customer = 'c2'").await;
    let found = all().verify(CustomerTotals::NAME, &|_| {}).await.expect("verified");
    let [table] = found.differences.as_slice() else { panic!("{found:?}") };
    assert_eq!((table.unexpected, table.missing), (1, 2));
    assert!(table.first_unexpected[0].contains("\"c1\""), "{table:?}");
    assert!(table.first_missing.iter().any(|row| row.contains("\"c2\"")), "{table:?}");
    assert_eq!(tables(database, "__verify").await, 0, "nothing is left behind");
}

async fn what_is_parked_or_skipped_is_no_difference(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = poisoned(&orders, database).await;
    let verify = async || {
        let worker = worker(&orders, database).with::<Poisoned>();
        worker.verify(Poisoned::NAME, &|_| {}).await.expect("verified")
    };
    let found = verify().await;
    assert!(found.differences.is_empty(), "{found:?}");
    assert_eq!((found.events, found.left_out), (3, 2));
    control(database).skip_parked(None, &stream("order-bad"), ME).await.expect("it is parked");
    eventually("it is parked no more", async || {
        status(&projections, Poisoned::NAME).parked_streams == 0
    })
    .await;
    let found = verify().await;
    assert!(found.differences.is_empty(), "{found:?}");
    assert_eq!((found.events, found.left_out), (4, 1));
}

async fn an_overview_tells_what_operators_have_to_know(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = poisoned(&orders, database).await;
    let control = control(database);
    let overview = async || {
        let mut all = control.list(&[]).await.expect("readable");
        all.pop().expect("one projection")
    };
    let seen = overview().await;
    assert_eq!((seen.name.as_str(), seen.generation), (Poisoned::NAME, 1));
    assert_eq!((seen.parked_streams, seen.parked_events, seen.lag_records), (1, 2, 0));
    assert_eq!(seen.state, OverviewState::Running);
    let parked = control.parked(None, 10).await.expect("readable");
    let [stream_parked] = parked.as_slice() else { panic!("{parked:?}") };
    assert_eq!((stream_parked.stream.as_str(), stream_parked.version), ("order-bad", 2));
    assert!(stream_parked.error.as_ref().is_some_and(|error| error.contains("beast")));
    let events = control.parked_events(None, &stream("order-bad"), 10).await.expect("readable");
    assert_eq!(events.len(), 2);
    assert_eq!(events[0].payload.0["cents"], POISON_CENTS);
    control.pause(Poisoned::NAME, ME).await.expect("asked");
    assert_eq!(overview().await.state, OverviewState::Paused);
    in_state(&projections, Poisoned::NAME, "paused").await;
    control.rebuild(Poisoned::NAME, false, ME).await.expect("asked");
    let seen = overview().await;
    assert_eq!((seen.state, seen.paused), (OverviewState::Rebuilding, true));
    let rebuild = seen.rebuild.expect("under way");
    assert_eq!(rebuild.generation, 2);
    let acts = control.audit(None, 10).await.expect("readable");
    let acts: Vec<_> = acts.iter().map(|act| (act.actor.as_str(), act.action.as_str())).collect();
    assert_eq!(acts, [("me", "rebuild"), ("me", "pause")]);
}

//! The worker's promises, on both databases.

use crate::common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::domain::{
    CustomerTotals, Ledger, NewerOrderEvent, OrderDetails, OrderEvent, Orders, POISON_CENTS,
    Poisoned, StreamTotals, placed,
};
use common::source::{Alone, Panicking, Switched};
use common::{Dice, TestDatabase, a_while};
use kafold_core::store::Health;
use kafold_core::testing::eventually;
use kafold_core::{EventSource, Offset, Partition, Position};
use kafold_projections::{
    FaultPolicy, ProjectionConfig, ProjectionState, ProjectionStatus, ProjectionWorker,
    Projections, Query, ReadModel, WaitError,
};

on_both!(
    a_model_equals_the_fold_of_the_log,
    killed_at_any_moment_it_counts_every_event_once,
    rows_shared_by_many_partitions_are_exact,
    rows_that_are_remembered_are_exact,
    rows_that_another_worker_wrote_are_read_again,
    the_older_of_two_workers_is_fenced_and_totals_are_exact,
    a_lost_fence_rolls_the_rows_back,
    workers_of_one_projection_share_its_partitions_and_take_over,
    a_partition_that_the_group_still_gives_is_taken_back,
    a_fold_that_panics_stops_only_its_projection,
    everything_before_the_event_at_fault_is_applied,
    a_handler_that_fails_for_a_while_is_tried_again,
    an_event_of_a_newer_program_stops_the_model_by_name,
    a_source_that_is_away_is_waited_for,
    a_defect_outside_of_the_fold_is_tried_again_and_then_stops_the_projection,
    another_log_under_the_same_name_is_refused,
    a_backlog_is_applied_in_large_batches,
    batches_grow_while_transactions_are_short,
    what_was_waited_for_is_always_there,
    a_wait_sees_the_progress_of_another_process,
    a_wait_for_nothing_ends,
    a_graceful_end_leaves_everything_committed,
);

killed_by!(
    CheckpointOutsideTransaction: killed_at_any_moment_it_counts_every_event_once on sqlite,
    NoFence: a_lost_fence_rolls_the_rows_back on sqlite,
    SharedRowsUnlocked: rows_shared_by_many_partitions_are_exact on postgres,
    SkipUnreadable: an_event_of_a_newer_program_stops_the_model_by_name on sqlite,
);

const WAIT: Duration = Duration::from_secs(20);

fn quick() -> ProjectionConfig {
    ProjectionConfig {
        retry_delay: Duration::from_millis(2),
        retry_delay_max: Duration::from_millis(20),
        fault_policy: FaultPolicy::Stop,
        ..ProjectionConfig::default()
    }
}

fn worker(orders: &Orders, database: &TestDatabase) -> ProjectionWorker {
    let source = Arc::new(orders.store.clone());
    ProjectionWorker::new(source, database.database.clone()).config(quick())
}

fn worker_alone(orders: &Orders, database: &TestDatabase, name: &'static str) -> ProjectionWorker {
    let source = Arc::new(Alone { store: orders.store.clone(), name });
    // One that lost a partition hears of it only by its fence, and leaves it at that.
    let config = ProjectionConfig { retake_delay: 10 * WAIT, ..quick() };
    ProjectionWorker::new(source, database.database.clone()).config(config)
}

async fn applied(projections: &Projections, orders: &Orders, name: &str) {
    orders.applied(projections, name, WAIT).await;
}

fn status(projections: &Projections, name: &str) -> ProjectionStatus {
    let mut all = projections.status().into_iter();
    all.find(|status| status.name == name).expect("it is run here")
}

fn stopped_because(projections: &Projections, name: &str) -> Option<String> {
    match status(projections, name).state {
        ProjectionState::Stopped(reason) => Some(reason),
        _ => None,
    }
}

async fn stopped(projections: &Projections, name: &str) -> String {
    eventually("it stops", async || stopped_because(projections, name).is_some()).await;
    stopped_because(projections, name).expect("it has stopped")
}

async fn a_model_equals_the_fold_of_the_log(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(12), Dice::new(1));
    let projections = worker(&orders, database)
        .with::<CustomerTotals>()
        .with::<OrderDetails>()
        .with_projection(Ledger::default())
        .spawn();
    for round in 0..30 {
        for _ in 0..dice.roll(60) {
            orders.append_random(&mut dice).await;
        }
        if round % 5 == 0 {
            applied(&projections, &orders, CustomerTotals::NAME).await;
            orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
        }
    }
    for name in [CustomerTotals::NAME, OrderDetails::NAME, "ledger"] {
        applied(&projections, &orders, name).await;
    }
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    orders.assert_equals_fold::<OrderDetails>(&database.database).await;
    let counted = database.number("SELECT COUNT(*) FROM ledger").await;
    assert_eq!(counted as usize, orders.count());
    assert_eq!(projections.health(), Health::Ready);
}

async fn killed_at_any_moment_it_counts_every_event_once(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(4), Dice::new(7));
    for _ in 0..60 {
        let projections =
            worker(&orders, database).with::<CustomerTotals>().with_projection(Ledger::default());
        let projections = projections.spawn();
        for _ in 0..dice.roll(40) {
            orders.append_random(&mut dice).await;
        }
        a_while(Duration::from_micros(dice.roll(25_000))).await;
        // As killed: its tasks end at whatever await they are.
        drop(projections);
    }
    let ledger = Ledger::default();
    let projections =
        worker(&orders, database).with::<CustomerTotals>().with_projection(ledger).spawn();
    applied(&projections, &orders, CustomerTotals::NAME).await;
    applied(&projections, &orders, "ledger").await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let counted = database.number("SELECT COUNT(*) FROM ledger").await;
    assert_eq!(counted as usize, orders.count());
}

async fn rows_shared_by_many_partitions_are_exact(database: &TestDatabase) {
    // Three workers of one group: each has some of the partitions, all write the same row, in many
    // small transactions at once.
    let orders = Orders::new(12);
    let config = ProjectionConfig { batch_events_max: 3, sqlite_batch_events_max: 10, ..quick() };
    let spawn =
        || worker(&orders, database).config(config.clone()).with::<CustomerTotals>().spawn();
    let workers = [spawn(), spawn(), spawn()];
    eventually("each has its part", async || {
        workers.iter().all(|worker| status(worker, CustomerTotals::NAME).partitions.len() == 4)
    })
    .await;
    for n in 0..1_500 {
        orders.place(&n.to_string(), "everyone", 1).await;
    }
    applied(&workers[0], &orders, CustomerTotals::NAME).await;
    let row = Query::<CustomerTotals>::new(database.database.clone());
    let row = row.get(&"everyone".to_owned()).await.expect("readable").expect("there");
    assert_eq!((row.orders, row.cents), (1_500, 1_500));
}

async fn rows_that_are_remembered_are_exact(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(4), Dice::new(11));
    // Fewer than there are streams: some are remembered, some were and some are new.
    let config = ProjectionConfig { remembered_rows_max: 20, ..quick() };
    let spawn = || worker(&orders, database).config(config.clone()).with::<StreamTotals>().spawn();
    for _ in 0..3 {
        // Begins where there are rows already, but for the first time.
        let projections = spawn();
        for _ in 0..20 {
            for _ in 0..dice.roll(40) {
                orders.append_random(&mut dice).await;
            }
            let gone = [placed("c1", 5), OrderEvent::Cancelled { customer: "c1".into(), cents: 5 }];
            orders.append("order-gone", &gone).await;
            orders.place("hot", "c1", 1).await;
            applied(&projections, &orders, StreamTotals::NAME).await;
        }
        orders.assert_equals_fold::<StreamTotals>(&database.database).await;
        projections.shutdown().await;
    }
}

async fn rows_that_another_worker_wrote_are_read_again(database: &TestDatabase) {
    let orders = Orders::new(1);
    let config = ProjectionConfig { retake_delay: Duration::from_millis(100), ..quick() };
    let projections = worker(&orders, database).config(config).with::<StreamTotals>().spawn();
    for _ in 0..2 {
        orders.place("1", "c1", 10).await;
        applied(&projections, &orders, StreamTotals::NAME).await;
    }
    // It took the partition, wrote, and is gone.
    database.run("UPDATE kafold_checkpoint SET fence = fence + 1").await;
    database.run("UPDATE stream_totals__g1 SET cents = cents + 100").await;
    orders.place("1", "c1", 10).await;
    applied(&projections, &orders, StreamTotals::NAME).await;
    assert_eq!(database.number("SELECT cents FROM stream_totals").await, 130);
}

async fn the_older_of_two_workers_is_fenced_and_totals_are_exact(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(3), Dice::new(3));
    let older = worker_alone(&orders, database, "older")
        .with::<CustomerTotals>()
        .with_projection(Ledger::default())
        .spawn();
    for _ in 0..200 {
        orders.append_random(&mut dice).await;
    }
    applied(&older, &orders, "ledger").await;
    let newer = worker_alone(&orders, database, "newer")
        .with::<CustomerTotals>()
        .with_projection(Ledger::default())
        .spawn();
    eventually("the newer one has taken all", async || {
        newer.status().iter().all(|status| status.partitions.len() == 3)
    })
    .await;
    for _ in 0..200 {
        orders.append_random(&mut dice).await;
    }
    for name in [CustomerTotals::NAME, "ledger"] {
        applied(&newer, &orders, name).await;
        eventually("the older one says so", async || {
            status(&older, name).superseded.len() == orders.ends().await.len()
        })
        .await;
        assert!(status(&older, name).partitions.is_empty());
        assert!(status(&newer, name).superseded.is_empty());
    }
    let Health::NotReady(complaints) = older.health() else { panic!("it is fenced") };
    assert!(complaints[0].contains("another worker has taken partitions"), "{complaints:?}");
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let counted = database.number("SELECT COUNT(*) FROM ledger").await;
    assert_eq!(counted as usize, orders.count());
    // A wait at the older one sees what the newer one does.
    let written = orders.place("x", "c1", 5).await;
    older
        .wait_for_position(CustomerTotals::NAME, written, WAIT)
        .await
        .expect("applied by the newer one");
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn a_lost_fence_rolls_the_rows_back(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 10).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    database.run("UPDATE kafold_checkpoint SET fence = fence + 1").await;
    orders.place("2", "c1", 10).await;
    eventually("it notices", async || {
        !status(&projections, CustomerTotals::NAME).superseded.is_empty()
    })
    .await;
    assert_eq!(database.number("SELECT cents FROM customer_totals").await, 10);
    assert_eq!(database.number("SELECT next_offset FROM kafold_checkpoint").await, 1);
}

async fn workers_of_one_projection_share_its_partitions_and_take_over(database: &TestDatabase) {
    let (orders, mut dice) = (Orders::new(4), Dice::new(7));
    let spawn = || worker(&orders, database).with::<CustomerTotals>().spawn();
    let held = |projections: &Projections| {
        status(projections, CustomerTotals::NAME).partitions.keys().copied().collect::<Vec<_>>()
    };
    let first = spawn();
    eventually("one alone has all", async || held(&first).len() == 4).await;
    let mut others = vec![spawn(), spawn()];
    for _ in 0..3 {
        eventually("each partition has one worker, each worker its share", async || {
            let held: Vec<_> = others.iter().chain([&first]).map(held).collect();
            let mut all = held.concat();
            all.sort_unstable();
            all == (0..4).map(Partition).collect::<Vec<_>>() && !held.contains(&Vec::new())
        })
        .await;
        for _ in 0..100 {
            orders.append_random(&mut dice).await;
        }
        // In the middle of the work: one leaves and another joins.
        others.remove(0).shutdown().await;
        for _ in 0..100 {
            orders.append_random(&mut dice).await;
        }
        others.push(spawn());
    }
    let position = orders.place("last", "c1", 1).await;
    first.wait_for_position(CustomerTotals::NAME, position, WAIT).await.expect("by whoever has it");
    eventually("all is applied", async || {
        let sql = "SELECT CAST(SUM(next_offset) AS BIGINT) FROM kafold_checkpoint";
        database.number(sql).await as usize == orders.count()
    })
    .await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn a_partition_that_the_group_still_gives_is_taken_back(database: &TestDatabase) {
    let orders = Orders::new(2);
    let config = ProjectionConfig { retake_delay: Duration::from_millis(100), ..quick() };
    let projections = worker(&orders, database).config(config).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 10).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    // A worker that the group had given up took them, and is gone.
    database.run("UPDATE kafold_checkpoint SET fence = fence + 1").await;
    for (id, customer) in [("2", "c1"), ("3", "c2"), ("4", "c1")] {
        orders.place(id, customer, 10).await;
    }
    applied(&projections, &orders, CustomerTotals::NAME).await;
    assert!(status(&projections, CustomerTotals::NAME).superseded.is_empty());
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn a_fold_that_panics_stops_only_its_projection(database: &TestDatabase) {
    let orders = Orders::new(2);
    let projections = worker(&orders, database).with::<Poisoned>().with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 10).await;
    let poison = orders.place("2", "c1", POISON_CENTS).await;
    orders.place("3", "c1", 10).await;
    let reason = stopped(&projections, Poisoned::NAME).await;
    assert!(reason.contains("number of the beast"), "{reason}");
    assert!(reason.contains(&poison.to_string()), "{reason}");
    assert!(reason.contains("order.placed.v1, version 1 of order-2"), "{reason}");
    applied(&projections, &orders, CustomerTotals::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
    let waited = projections.wait_for_position(Poisoned::NAME, poison, WAIT).await;
    assert!(matches!(waited, Err(WaitError::Stopped { .. })), "{waited:?}");
    let sql = "SELECT COUNT(*) FROM kafold_projection \
               WHERE name = 'poisoned' AND actual_state = 'stopped' \
                 AND actual_state_reason LIKE '%beast%'";
    eventually("it is written down", async || database.number(sql).await == 1).await;
    // From another process too.
    let other = worker(&orders, database).spawn();
    let waited = other.wait_for_position(Poisoned::NAME, poison, WAIT).await;
    assert!(matches!(waited, Err(WaitError::Stopped { .. })), "{waited:?}");
}

async fn everything_before_the_event_at_fault_is_applied(database: &TestDatabase) {
    let orders = Orders::new(1);
    for n in 0..777 {
        orders.place(&n.to_string(), "c1", 1).await;
    }
    let commit = [placed("c1", 1), placed("c1", POISON_CENTS), placed("c1", 1)];
    let last = orders.append("order-bad", &commit).await;
    for n in 0..300 {
        orders.place(&format!("later{n}"), "c1", 1).await;
    }
    // One row, and a row a stream, many of them new in one batch.
    let projections = worker(&orders, database).with::<Poisoned>().with::<StreamTotals>().spawn();
    assert_eq!(last.offset, Offset(779));
    for name in [Poisoned::NAME, StreamTotals::NAME] {
        let reason = stopped(&projections, name).await;
        assert!(reason.contains("event 0:778 "), "{reason}");
    }
    assert_eq!(database.number("SELECT orders FROM poisoned").await, 777);
    assert_eq!(database.number("SELECT COUNT(*) FROM stream_totals").await, 777);
    let there = "SELECT COUNT(*) FROM kafold_checkpoint WHERE next_offset = 777";
    assert_eq!(database.number(there).await, 2);
}

async fn a_handler_that_fails_for_a_while_is_tried_again(database: &TestDatabase) {
    let orders = Orders::new(2);
    let ledger = Ledger::default();
    ledger.failures.store(3, Ordering::SeqCst);
    let projections = worker(&orders, database).with_projection(ledger.clone()).spawn();
    for n in 0..50 {
        orders.append(&format!("order-{n}"), &[placed("c1", 1), placed("c1", 2)]).await;
    }
    applied(&projections, &orders, "ledger").await;
    assert_eq!(database.number("SELECT COUNT(*) FROM ledger").await, 100);
    ledger.failures.store(u32::MAX, Ordering::SeqCst);
    let bad = orders.place("x", "c1", 1).await;
    let reason = stopped(&projections, "ledger").await;
    assert!(reason.contains(&format!("commit {bad} ")) && reason.contains("not today"), "{reason}");
    assert_eq!(database.number("SELECT COUNT(*) FROM ledger").await, 100);
    // Started again after the handler was mended, it goes on where it stood.
    drop(projections);
    let projections = worker(&orders, database).with_projection(Ledger::default()).spawn();
    applied(&projections, &orders, "ledger").await;
    assert_eq!(database.number("SELECT COUNT(*) FROM ledger").await, 101);
}

async fn an_event_of_a_newer_program_stops_the_model_by_name(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    let newer = NewerOrderEvent::Placed { buyer: "c1".to_owned() };
    orders.append("order-1", &[newer]).await;
    let reason = stopped(&projections, CustomerTotals::NAME).await;
    assert!(reason.contains("event 0:0 ") && reason.contains("order.placed.v2"), "{reason}");
}

async fn a_source_that_is_away_is_waited_for(database: &TestDatabase) {
    let orders = Orders::new(2);
    let is_off = Arc::new(AtomicBool::new(true));
    let source = Arc::new(Switched { store: orders.store.clone(), is_off: is_off.clone() });
    let projections = ProjectionWorker::new(source, database.database.clone())
        .config(quick())
        .with::<CustomerTotals>()
        .spawn();
    orders.place("1", "c1", 10).await;
    eventually("it says that it waits", async || {
        let Health::NotReady(why) = projections.health() else { return false };
        why[0].contains("the log is unavailable: switched off")
    })
    .await;
    is_off.store(false, Ordering::SeqCst);
    applied(&projections, &orders, CustomerTotals::NAME).await;
    assert_eq!(projections.health(), Health::Ready);
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

async fn a_defect_outside_of_the_fold_is_tried_again_and_then_stops_the_projection(
    database: &TestDatabase,
) {
    let orders = Orders::new(2);
    orders.place("1", "c1", 10).await;
    let spawn = |panics: u32| {
        let source = Panicking { store: orders.store.clone(), left: panics.into() };
        let worker = ProjectionWorker::new(Arc::new(source), database.database.clone());
        worker.config(quick()).with::<CustomerTotals>().spawn()
    };
    let projections = spawn(3);
    eventually("it runs", async || projections.health() == Health::Ready).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    projections.shutdown().await;

    let _stopped = spawn(4);
    let stopped = "SELECT COUNT(*) FROM kafold_projection WHERE actual_state = 'stopped' \
                   AND actual_state_reason LIKE 'panicked: a driver with a defect%'";
    eventually("it has stopped", async || database.number(stopped).await == 1).await;
}

async fn another_log_under_the_same_name_is_refused(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("1", "c1", 10).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    let recreated = Orders::new(1);
    recreated.place("1", "c1", 10).await;
    let wrong = worker(&recreated, database).with::<CustomerTotals>().spawn();
    stopped(&wrong, CustomerTotals::NAME).await;
    drop(wrong);
    eventually("the worker of the right log stores that it goes on", async || {
        let running = "SELECT COUNT(*) FROM kafold_projection WHERE actual_state = 'running'";
        database.number(running).await == 1
    })
    .await;
    orders.place("2", "c1", 0).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    drop(projections);
    let projections = worker(&recreated, database).with::<CustomerTotals>().spawn();
    // The old checkpoint is beyond the position, which is one of the new log.
    let first = Position { partition: Partition(0), offset: Offset(0) };
    let waited = projections.wait_for_position(CustomerTotals::NAME, first, WAIT).await;
    assert!(matches!(waited, Err(WaitError::Stopped { .. })), "{waited:?}");
    let reason = stopped(&projections, CustomerTotals::NAME).await;
    assert!(reason.contains("the cursor is of log"), "{reason}");
    assert_eq!(database.number("SELECT cents FROM customer_totals").await, 10);
    // A worker of the right log would have kept its partitions.
    assert_eq!(database.number("SELECT MAX(fence) FROM kafold_checkpoint").await, 1);
}

async fn a_backlog_is_applied_in_large_batches(database: &TestDatabase) {
    let orders = Orders::new(3);
    for n in 0..6_000 {
        orders.place(&n.to_string(), "c1", 1).await;
    }
    let ledger = Ledger::default();
    let projections = worker(&orders, database).with_projection(ledger.clone()).spawn();
    applied(&projections, &orders, "ledger").await;
    let batches = std::mem::take(&mut *ledger.batches());
    assert!(batches.len() <= 60, "{batches:?}");
    assert!(batches.iter().all(|count| *count <= 5_500), "{batches:?}");
    orders.place("last", "c1", 1).await;
    applied(&projections, &orders, "ledger").await;
    assert_eq!(*ledger.batches(), [1]);
}

async fn batches_grow_while_transactions_are_short(database: &TestDatabase) {
    let orders = Orders::new(1);
    for n in 0..5_000 {
        orders.place(&n.to_string(), "c1", 1).await;
    }
    let config = ProjectionConfig {
        sqlite_batch_events_max: 5_000,
        // An eighth of it is the most on PostgreSQL.
        transaction_timeout: Duration::from_secs(2),
        sqlite_transaction_max: Duration::from_millis(250),
        ..quick()
    };
    // A thousand take 200 ms at least, and more than half of the time: no batch is larger after that.
    let ledger = Ledger { event_takes: Duration::from_micros(200), ..Ledger::default() };
    let projections = worker(&orders, database).config(config);
    let projections = projections.with_projection(ledger.clone()).spawn();
    applied(&projections, &orders, "ledger").await;
    let batches = std::mem::take(&mut *ledger.batches());
    assert!(batches.iter().all(|count| *count <= 1_000), "{batches:?}");
}

async fn what_was_waited_for_is_always_there(database: &TestDatabase) {
    let orders = Arc::new(Orders::new(4));
    let projections = worker(&orders, database).with::<OrderDetails>().spawn();
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let (orders, projections) = (orders.clone(), projections.clone());
            let query = Query::<OrderDetails>::new(database.database.clone());
            tokio::spawn(async move {
                for n in 0..25 {
                    let id = format!("{task}x{n}");
                    let written = orders.place(&id, "c1", n).await;
                    projections
                        .wait_for_position(OrderDetails::NAME, written, WAIT)
                        .await
                        .expect("applied");
                    let row = query.get(&id).await.expect("readable");
                    assert_eq!(row.expect("waited for").cents, n);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no old state was shown");
    }
}

async fn a_wait_sees_the_progress_of_another_process(database: &TestDatabase) {
    let orders = Orders::new(4);
    let applies = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("first", "c1", 1).await;
    applied(&applies, &orders, CustomerTotals::NAME).await;
    let source = Arc::new(orders.store.clone()) as Arc<dyn EventSource>;
    let waits = ProjectionWorker::new(source, database.again().await).spawn();
    let query = Query::<CustomerTotals>::new(database.database.clone());
    for n in 2..60 {
        let written = orders.place(&n.to_string(), "c1", 1).await;
        waits
            .wait_for_position(CustomerTotals::NAME, written, WAIT)
            .await
            .expect("applied elsewhere");
        let row = query.get(&"c1".to_owned()).await.expect("readable").expect("there");
        assert_eq!(row.orders, n);
    }
}

async fn a_wait_for_nothing_ends(database: &TestDatabase) {
    let orders = Orders::new(1);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    let future = Position { partition: Partition(0), offset: Offset(10) };
    let short = Duration::from_millis(100);
    let waited = projections.wait_for_position(CustomerTotals::NAME, future, short).await;
    assert!(matches!(waited, Err(WaitError::Timeout { .. })), "{waited:?}");
    let waited = projections.wait_for_position("nobody", future, WAIT).await;
    assert_eq!(waited, Err(WaitError::UnknownProjection("nobody".to_owned())));
}

async fn a_graceful_end_leaves_everything_committed(database: &TestDatabase) {
    let orders = Orders::new(4);
    let projections = worker(&orders, database).with::<CustomerTotals>().spawn();
    orders.place("0", "c1", 1).await;
    applied(&projections, &orders, CustomerTotals::NAME).await;
    for n in 1..500 {
        orders.place(&n.to_string(), "c1", 1).await;
    }
    projections.shutdown().await;
    assert_eq!(status(&projections, CustomerTotals::NAME).state, ProjectionState::Down);
    let applied =
        database.number("SELECT CAST(COALESCE(SUM(orders), 0) AS BIGINT) FROM customer_totals");
    let applied = applied.await;
    let next = database
        .number("SELECT CAST(COALESCE(SUM(next_offset), 0) AS BIGINT) FROM kafold_checkpoint");
    assert_eq!(applied, next.await);
    let cancelled = OrderEvent::Cancelled { customer: "c1".to_owned(), cents: 1 };
    orders.append("order-1", &[cancelled]).await;
    let again = worker(&orders, database).with::<CustomerTotals>().spawn();
    self::applied(&again, &orders, CustomerTotals::NAME).await;
    orders.assert_equals_fold::<CustomerTotals>(&database.database).await;
}

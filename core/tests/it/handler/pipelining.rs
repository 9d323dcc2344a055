//! Commands of one stream do not wait for one another's outcome.

use futures_util::future::join_all;
use kafold_core::handler::{HandleError, HandlerConfig, Request};
use kafold_core::testing::{eventually, versions};
use kafold_core::{AppendError, ExpectedVersion, Version};

use crate::handler::domain::AccountCommand::{Close, Deposit, Look, Withdraw};
use crate::handler::domain::{AccountError, Accounts, Answer, assert_balance, handle, spawn};
use crate::handler::scripted::{ScriptedStore, conflict, not_appended, tickets, unavailable};

type Task = tokio::task::JoinHandle<Answer>;

/// Deposits of 1, 2, 4 … cents, each submitted before the next is sent.
async fn submit_deposits(store: &ScriptedStore, accounts: &Accounts, count: usize) -> Vec<Task> {
    let mut tasks = Vec::new();
    for n in 0..count {
        let held = store.held();
        tasks.push(spawn(accounts, Deposit(1 << n)));
        store.until_held(held + 1).await;
    }
    tasks
}

async fn assert_all_appended(store: &ScriptedStore, accounts: &Accounts, tasks: Vec<Task>) {
    let count = tasks.len();
    for task in join_all(tasks).await {
        task.expect("runs").expect("no rule is broken");
    }
    let events = store.events().await;
    assert_eq!(versions(&events), (1..=count as u64).collect::<Vec<_>>());
    assert_balance(accounts, (1 << count) - 1).await;
}

#[tokio::test]
async fn commands_are_submitted_before_the_first_outcome_is_known() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let tasks = submit_deposits(&store, &accounts, 6).await;
    let submitted = store.submitted();
    let expected: Vec<_> = submitted.iter().map(|append| append.expected).collect();
    let chain: Vec<_> = (0..6).map(|n| ExpectedVersion::Exact(Version(n))).collect();
    assert_eq!(expected, chain);
    let tickets = tickets(&submitted);
    assert_eq!(tickets[0].0, None);
    assert!(tickets.windows(2).all(|pair| pair[1].0 == Some(pair[0].1)), "each is behind the last");
    store.release_all();
    assert_all_appended(&store, &accounts, tasks).await;
}

#[tokio::test]
async fn outcomes_may_come_in_any_order() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let tasks = submit_deposits(&store, &accounts, 5).await;
    for index in [4, 2, 3, 0, 1] {
        store.release(index);
        tokio::task::yield_now().await;
    }
    store.release_all();
    assert_all_appended(&store, &accounts, tasks).await;
}

#[tokio::test]
async fn when_the_first_fails_all_behind_it_are_decided_again() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    store.on_submit([not_appended()]);
    let tasks = submit_deposits(&store, &accounts, 6).await;
    assert!(store.events().await.is_empty());
    store.release_all();
    assert_all_appended(&store, &accounts, tasks).await;
}

#[tokio::test]
async fn when_one_in_the_middle_is_refused_the_others_are_appended() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let mut tasks = submit_deposits(&store, &accounts, 2).await;
    store.on_submit([unavailable()]);
    let refused = spawn(&accounts, Deposit(1_000));
    store.until_held(3).await;
    for cents in [4, 8] {
        tasks.push(spawn(&accounts, Deposit(cents)));
    }
    store.until_held(5).await;
    // The refusal is known first, then what was behind it, then the rest.
    store.release(2);
    let answer = refused.await.expect("runs");
    let unavailable = matches!(answer, Err(HandleError::Append(AppendError::Unavailable { .. })));
    assert!(unavailable, "{answer:?}");
    // Neither it nor what was behind it is in the state that is decided on now.
    assert_balance(&accounts, 3).await;
    store.release_all();
    assert_all_appended(&store, &accounts, tasks).await;
}

#[tokio::test]
async fn decisions_see_all_pending_events() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let deposits = submit_deposits(&store, &accounts, 4).await;
    assert_balance(&accounts, 15).await;
    let withdrawal = spawn(&accounts, Withdraw(14));
    store.until_held(5).await;
    assert_balance(&accounts, 1).await;
    store.release_all();
    for task in deposits.into_iter().chain([withdrawal]) {
        task.await.expect("runs").expect("no rule is broken");
    }
    assert_balance(&accounts, 1).await;
    assert_eq!(store.submitted().len(), 5);
}

#[tokio::test]
async fn reading_on_takes_nothing_over_twice() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let first = submit_deposits(&store, &accounts, 1).await;
    store.deposit_a_cent();
    store.on_submit([conflict(2)]);
    let second = spawn(&accounts, Deposit(100));
    store.until_held(2).await;
    // The second learns of version 2 while the first is still pending, and reads both.
    store.release(1);
    store.until_held(3).await;
    assert_eq!(store.submitted()[2].expected, ExpectedVersion::Exact(Version(2)));
    store.release_all();
    for task in first.into_iter().chain([second]) {
        task.await.expect("runs").expect("no rule is broken");
    }
    assert_balance(&accounts, 102).await;
}

#[tokio::test]
async fn a_rejection_on_pending_events_waits_for_them() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let closing = spawn(&accounts, Close);
    store.until_held(1).await;
    let rejected = handle(&accounts, Deposit(1)).await;
    assert!(matches!(rejected, Err(HandleError::Rejected(AccountError::Closed))), "{rejected:?}");
    let view = store.confirmed().pop().expect("a rejection is confirmed");
    assert_eq!((view.version, view.after), (Version(1), Some(store.submitted()[0].ticket)));
    store.release_all();
    closing.await.expect("runs").expect("no rule is broken");
}

#[tokio::test]
async fn a_rejection_on_pending_events_that_fail_is_decided_again() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    store.hold();
    store.on_submit([unavailable()]);
    let closing = spawn(&accounts, Close);
    store.until_held(1).await;
    let depositing = spawn(&accounts, Deposit(1));
    eventually("the rejection asks", async || !store.confirmed().is_empty()).await;
    store.release_all();
    closing.await.expect("runs").expect_err("unavailable");
    let deposited = depositing.await.expect("runs").expect("it was never closed");
    assert_eq!(deposited.version, Version(2));
    assert_balance(&accounts, 2).await;
}

#[tokio::test]
async fn a_command_without_events_behind_pending_ones_answers_their_position() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let depositing = spawn(&accounts, Deposit(1));
    store.until_held(1).await;
    let looking = spawn(&accounts, Look);
    eventually("the look asks", async || !store.confirmed().is_empty()).await;
    store.release_all();
    let deposited = depositing.await.expect("runs").expect("no rule is broken");
    let looked = looking.await.expect("runs").expect("no rule is broken");
    assert_eq!((looked.version, looked.position), (deposited.version, deposited.position));
}

#[tokio::test]
async fn a_demand_that_a_pending_event_breaks_waits_for_it() {
    for pending_fails in [false, true] {
        let store = ScriptedStore::default();
        let accounts = store.accounts();
        store.hold();
        if pending_fails {
            store.on_submit([unavailable()]);
        }
        let pending = spawn(&accounts, Deposit(1));
        store.until_held(1).await;
        let demanding = {
            let accounts = accounts.clone();
            let request = Request { expected: ExpectedVersion::NoStream, ..Request::default() };
            tokio::spawn(async move { accounts.handle_with("a", &Deposit(2), request).await })
        };
        eventually("the demand asks", async || !store.confirmed().is_empty()).await;
        store.release_all();
        assert_eq!(pending.await.expect("runs").is_err(), pending_fails);
        match demanding.await.expect("runs") {
            Ok(handled) if pending_fails => assert_eq!(handled.version, Version(1)),
            Err(HandleError::Conflict { actual, .. }) if !pending_fails => {
                assert_eq!(actual, Version(1));
            }
            other => panic!("pending fails: {pending_fails}, found {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_its_events() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let leaving = spawn(&accounts, Deposit(5));
    store.until_held(1).await;
    leaving.abort();
    leaving.await.expect_err("was aborted");
    let behind = spawn(&accounts, Withdraw(5));
    store.until_held(2).await;
    store.release_all();
    assert_eq!(behind.await.expect("runs").expect("there are 5 cents").version, Version(2));
    assert_balance(&accounts, 0).await;
    assert_eq!(store.reads().len(), 1, "nothing had to be loaded again");
}

#[tokio::test]
async fn no_more_than_the_limit_is_pending() {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { pending_max: 2, ..HandlerConfig::default() });
    store.hold();
    let tasks: Vec<_> = (0..5).map(|n| spawn(&accounts, Deposit(1 << n))).collect();
    for released in 0..5 {
        let in_flight = (released + 2).min(5);
        eventually("there is room for one more", async || store.held() >= in_flight).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(store.held(), in_flight, "others wait");
        store.release(released);
    }
    store.release_all();
    assert_all_appended(&store, &accounts, tasks).await;
}

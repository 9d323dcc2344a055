//! The cache is bounded and changes no answer.

use kafold_core::Version;
use kafold_core::handler::HandlerConfig;

use crate::handler::domain::AccountCommand::{Deposit, Withdraw};
use crate::handler::domain::{assert_balance, handle, spawn};
use crate::handler::scripted::ScriptedStore;

#[tokio::test]
async fn a_hot_stream_is_not_read_again() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    for _ in 0..10 {
        handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    }
    assert_balance(&accounts, 10).await;
    assert_eq!(store.reads(), [Version(0)]);
}

#[tokio::test]
async fn the_cache_holds_no_more_streams_than_its_limit() {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { hot_states_max: 3, ..HandlerConfig::default() });
    for round in 1..=3 {
        for id in ["a", "b", "c", "d", "e"] {
            let handled = accounts.handle(id, &Deposit(1)).await;
            assert_eq!(handled.expect("no rule is broken").version, Version(round));
            assert!(accounts.hot_states() <= 3);
        }
    }
    assert_eq!(store.reads().len(), 15, "each was given up before its next turn");
    let paid = accounts.handle("c", &Withdraw(3)).await;
    assert_eq!(paid.expect("there are 3 cents").version, Version(4));
}

#[tokio::test]
async fn a_stream_given_up_with_pending_events_loses_none() {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { hot_states_max: 1, ..HandlerConfig::default() });
    store.hold();
    let pending = spawn(&accounts, Deposit(5));
    store.until_held(1).await;
    accounts.handle("b", &Withdraw(1)).await.expect_err("there is nothing");
    let next = spawn(&accounts, Withdraw(5));
    store.until_held(2).await;
    store.release_all();
    assert_eq!(pending.await.expect("runs").expect("no rule is broken").version, Version(1));
    assert_eq!(next.await.expect("runs").expect("there are 5 cents").version, Version(2));
    assert_balance(&accounts, 0).await;
}

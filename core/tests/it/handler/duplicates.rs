//! A command is applied once, and sent again it answers what it came to.

use kafold_core::clock::{Clock, SystemClock};
use kafold_core::handler::{HandlerConfig, Request};
use kafold_core::{ExpectedVersion, Handled, Version};

use crate::handler::domain::AccountCommand::{Close, Deposit, DepositCents, Withdraw};
use crate::handler::domain::{Accounts, assert_balance, handle, new_command};
use crate::handler::scripted::ScriptedStore;

fn duplicate_of(first: Handled) -> Handled {
    Handled { duplicate: true, events: 0, ..first }
}

#[tokio::test]
async fn a_command_sent_again_answers_its_first_outcome() {
    let store = ScriptedStore::default();
    let (accounts, id) = (store.accounts(), new_command());
    let first = accounts.handle_with("a", &DepositCents(2), id).await.expect("no rule is broken");
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    let again = accounts.handle_with("a", &Close, id).await.expect("is known, whatever it says");
    assert_eq!(again, duplicate_of(first));
    assert_eq!(store.submitted().len(), 2, "a recent command is not submitted again");
    assert_eq!(store.finds(), 0);
}

#[tokio::test]
async fn a_command_sent_again_is_known_before_demand_and_deadline() {
    let store = ScriptedStore::default();
    let (accounts, id) = (store.accounts(), new_command());
    let first = accounts.handle_with("a", &Deposit(1), id).await.expect("no rule is broken");
    handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    let late = Request { deadline: Some(SystemClock.instant()), ..Request::default() };
    let again =
        accounts.handle_with("a", &Deposit(1), Request { command_id: Some(id), ..late }).await;
    assert_eq!(again.expect("is known"), duplicate_of(first));
    for version in [0, 7] {
        let expected = ExpectedVersion::Exact(Version(version));
        let request = Request { expected, ..Request::default() };
        let again = accounts
            .handle_with("a", &Deposit(1), Request { command_id: Some(id), ..request })
            .await;
        assert_eq!(again.expect("is known"), duplicate_of(first));
    }
}

/// A handler that remembers two commands, and a command followed by others.
async fn beyond_the_window() -> (ScriptedStore, Accounts, kafold_core::CommandId, Handled) {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { recent_commands_max: 2, ..HandlerConfig::default() });
    let id = new_command();
    let first = accounts.handle_with("a", &Deposit(10), id).await.expect("no rule is broken");
    for _ in 0..4 {
        handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    }
    (store, accounts, id, first)
}

#[tokio::test]
async fn a_command_is_known_beyond_the_window_when_it_would_append() {
    let (store, accounts, id, first) = beyond_the_window().await;
    let again = accounts.handle_with("a", &Deposit(10), id).await.expect("is known");
    assert_eq!(again, duplicate_of(first));
    assert_eq!(store.finds(), 0, "the store finds it when it is submitted");
    // What was decided for the copy is in no state.
    assert_balance(&accounts, 14).await;
    assert_eq!(store.reads().len(), 1, "the proven state is still good");
    handle(&accounts, Deposit(1)).await.expect("the stream goes on");
    assert_eq!(store.events().await.len(), 6);
}

#[tokio::test]
async fn a_command_is_known_beyond_the_window_when_it_would_be_rejected() {
    let (store, accounts, id, first) = beyond_the_window().await;
    let again = accounts.handle_with("a", &Withdraw(1_000), id).await.expect("is known");
    assert_eq!(again, duplicate_of(first));
    assert!(store.confirmed().is_empty());
}

#[tokio::test]
async fn a_command_is_known_beyond_the_window_before_demand_and_deadline() {
    let (_, accounts, id, first) = beyond_the_window().await;
    let late = Request { deadline: Some(SystemClock.instant()), ..Request::default() };
    let again =
        accounts.handle_with("a", &Deposit(10), Request { command_id: Some(id), ..late }).await;
    assert_eq!(again.expect("is known"), duplicate_of(first));
    for version in [0, 99] {
        let expected = ExpectedVersion::Exact(Version(version));
        let request = Request { expected, ..Request::default() };
        let again = accounts
            .handle_with("a", &Deposit(10), Request { command_id: Some(id), ..request })
            .await;
        assert_eq!(again.expect("is known"), duplicate_of(first));
    }
}

#[tokio::test]
async fn a_handler_that_starts_later_knows_the_command() {
    let store = ScriptedStore::default();
    let id = new_command();
    let first = store.accounts().handle_with("a", &DepositCents(3), id).await.expect("is new");
    let again = store.accounts().handle_with("a", &DepositCents(3), id).await.expect("is known");
    assert_eq!(again, duplicate_of(first));
    assert_eq!(store.submitted().len(), 1);
}

#[tokio::test]
async fn a_pending_command_sent_again_shares_its_outcome() {
    let store = ScriptedStore::default();
    let (accounts, id) = (store.accounts(), new_command());
    store.hold();
    let send = || {
        let accounts = accounts.clone();
        tokio::spawn(async move { accounts.handle_with("a", &Deposit(5), id).await })
    };
    let first = send();
    store.until_held(1).await;
    let copies = [send(), send(), send()];
    store.release_all();
    let first = first.await.expect("runs").expect("no rule is broken");
    for copy in copies {
        assert_eq!(copy.await.expect("runs").expect("is known"), duplicate_of(first));
    }
    assert_eq!(store.submitted().len(), 1);
    assert_balance(&accounts, 5).await;
}

#[tokio::test]
async fn a_rejected_command_sent_again_is_decided_anew() {
    let store = ScriptedStore::default();
    let (accounts, id) = (store.accounts(), new_command());
    accounts.handle_with("a", &Withdraw(5), id).await.expect_err("there is nothing");
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    let handled = accounts.handle_with("a", &Withdraw(5), id).await.expect("there is enough now");
    assert!(!handled.duplicate);
}

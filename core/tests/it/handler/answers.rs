//! Every answer of the handler is true of the log when it is given.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use chrono::Timelike;
use futures_util::future::join_all;
use kafold_core::clock::{Clock, RandomIds, SystemClock};
use kafold_core::handler::{HandleError, HandlerConfig, Request};
use kafold_core::memory::MemoryStore;
use kafold_core::projecting::on_behalf_of;
use kafold_core::{Aggregate, AppendError, CommandHandler, EventStore, ExpectedVersion, Version};

use crate::handler::domain::AccountCommand::{
    Close, Deposit, DepositCents, Look, PanicDeciding, Trap, Withdraw,
};
use crate::handler::domain::{
    AccountError, AccountEvent, Accounts, Answer, EVOLVE_PANICS, assert_balance, handle,
    new_command, spawn,
};
use crate::handler::scripted::{Act, ScriptedStore, conflict, not_appended, unavailable};
use crate::handler::wire::ManualClock;

fn at(version: u64) -> Request {
    Request { expected: ExpectedVersion::Exact(Version(version)), ..Request::default() }
}

async fn handle_at(accounts: &Accounts, version: u64, cents: u64) -> Answer {
    accounts.handle_with("a", &Deposit(cents), at(version)).await
}

#[tokio::test]
async fn an_answer_names_version_and_position_of_the_last_event() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let handled = handle(&accounts, DepositCents(3)).await.expect("no rule is broken");
    let events = store.events().await;
    assert_eq!((handled.version, handled.events, handled.duplicate), (Version(3), 3, false));
    assert_eq!(handled.position, Some(events[2].position));
}

#[tokio::test]
async fn conflicts_are_decided_again_on_the_newer_state() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.on_submit([Act::Overtake, Act::Overtake, Act::Overtake]);
    let handled = handle(&accounts, Deposit(10)).await.expect("succeeds in the end");
    assert_eq!(handled.version, Version(4));
    assert_eq!(store.submitted().len(), 4);
    // Each retry reads only what is new.
    assert_eq!(store.reads(), [0, 0, 1, 2].map(Version));
    assert_balance(&accounts, 13).await;
}

#[tokio::test]
async fn the_last_conflict_is_answered_with_both_versions() {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { attempts_max: 3, ..HandlerConfig::default() });
    store.on_submit((0..9).map(|_| Act::Overtake));
    match handle(&accounts, Deposit(10)).await {
        Err(HandleError::Conflict { expected, actual, .. }) => {
            assert_eq!(expected, ExpectedVersion::Exact(Version(2)));
            assert_eq!(actual, Version(3));
        }
        other => panic!("expected a conflict, found {other:?}"),
    }
    assert_eq!(store.submitted().len(), 3);
}

/// The store says that the view of the last attempt is old; what was demanded may be what is there now.
#[tokio::test]
async fn a_demand_that_the_last_conflict_does_not_contradict_is_no_conflict() {
    let store = ScriptedStore::default();
    let accounts =
        store.accounts_with(HandlerConfig { attempts_max: 1, ..HandlerConfig::default() });
    store.on_confirm([conflict(1)]);
    match handle_at(&accounts, 1, 10).await {
        Err(HandleError::Append(AppendError::NotAppended { reason })) => {
            assert!(reason.contains("account-a"), "{reason}");
        }
        other => panic!("the demand may be met, found {other:?}"),
    }
    handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    store.on_submit([conflict(3)]);
    match handle_at(&accounts, 1, 10).await {
        Err(HandleError::Conflict { expected, actual, .. }) => {
            assert_eq!((expected, actual), (ExpectedVersion::Exact(Version(1)), Version(3)));
        }
        other => panic!("the stream has moved on, found {other:?}"),
    }
}

#[tokio::test]
async fn what_was_not_appended_is_decided_again() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.on_submit([not_appended(), not_appended(), conflict(0)]);
    let handled = handle(&accounts, Deposit(10)).await.expect("succeeds in the end");
    assert_eq!(handled.version, Version(1));
    assert_balance(&accounts, 10).await;
}

#[tokio::test]
async fn what_the_caller_must_act_on_reaches_it_as_it_is() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let not_owner = || AppendError::NotOwner { partition: kafold_core::Partition(3), owner: None };
    store.on_submit([
        unavailable(),
        Act::Fail(AppendError::TooLarge { size: 9, limit: 8 }),
        Act::Fail(not_owner()),
    ]);
    let failure = || async {
        match handle(&accounts, Deposit(1)).await {
            Err(HandleError::Append(failure)) => failure,
            other => panic!("expected the store's answer, found {other:?}"),
        }
    };
    assert!(matches!(failure().await, AppendError::Unavailable { .. }));
    assert!(matches!(failure().await, AppendError::TooLarge { size: 9, limit: 8 }));
    assert!(matches!(failure().await, AppendError::NotOwner { .. }));
    assert_eq!(store.submitted().len(), 3, "nothing is tried again");
    assert_balance(&accounts, 0).await;
}

#[tokio::test]
async fn after_not_owner_the_stream_is_loaded_anew() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    let owner = AppendError::NotOwner { partition: kafold_core::Partition(0), owner: None };
    store.on_submit([Act::Fail(owner)]);
    handle(&accounts, Deposit(5)).await.expect_err("another owns it");
    let reads = store.reads().len();
    assert_balance(&accounts, 5).await;
    assert_eq!(store.reads()[reads..], [Version(0)]);
}

#[tokio::test]
async fn an_unknown_outcome_is_settled_by_the_same_command() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let id = new_command();
    store.on_submit([Act::LoseAnswer]);
    match accounts.handle_with("a", &Deposit(5), id).await {
        Err(HandleError::Append(AppendError::OutcomeUnknown { command_id })) => {
            assert_eq!(command_id, id);
        }
        other => panic!("expected OutcomeUnknown, found {other:?}"),
    }
    // Others see what the log has, whatever was told.
    assert_balance(&accounts, 5).await;
    let settled = accounts.handle_with("a", &Deposit(5), id).await.expect("is in the log");
    assert_eq!((settled.version, settled.duplicate, settled.events), (Version(1), true, 0));
    assert_eq!(store.events().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_concurrent_commands_one_is_accepted() {
    let store: Arc<MemoryStore> = Arc::default();
    let one: Accounts = CommandHandler::new(store.clone());
    // A second handler has a cache of its own, as another process would.
    let other: Accounts = CommandHandler::new(store);
    handle(&one, Deposit(1)).await.expect("no rule is broken");
    let tasks = (0..50).map(|n| spawn(if n % 2 == 0 { &one } else { &other }, Close));
    let answers: Vec<_> =
        join_all(tasks).await.into_iter().map(|task| task.expect("runs")).collect();
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    for answer in answers.into_iter().filter(Result::is_err) {
        assert!(matches!(answer, Err(HandleError::Rejected(AccountError::Closed))), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_commands_all_count() {
    let store: Arc<MemoryStore> = Arc::default();
    let handlers: Vec<Accounts> =
        (0..3).map(|_| CommandHandler::new(store.clone() as Arc<_>)).collect();
    let tasks = (0..90).map(|n| spawn(&handlers[n % 3], Deposit(1)));
    for task in join_all(tasks).await {
        task.expect("runs").expect("no rule is broken");
    }
    for accounts in &handlers {
        assert_balance(accounts, 90).await;
    }
}

#[tokio::test]
async fn a_rejection_is_decided_again_when_the_view_has_moved() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    assert_balance(&accounts, 0).await;
    store.deposit_a_cent();
    let handled = handle(&accounts, Withdraw(1)).await.expect("there is a cent by now");
    assert_eq!(handled.version, Version(2));
    // Also when it moves while the rejection is on its way.
    store.on_confirm([Act::Overtake]);
    handle(&accounts, Withdraw(1)).await.expect("there is a cent by now");
}

#[tokio::test]
async fn a_rejection_that_cannot_be_confirmed_is_not_answered() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.on_confirm([unavailable()]);
    let answer = handle(&accounts, Withdraw(1)).await;
    let unavailable = matches!(answer, Err(HandleError::Append(AppendError::Unavailable { .. })));
    assert!(unavailable, "{answer:?}");
    store.on_confirm([not_appended(), not_appended()]);
    assert_balance(&accounts, 0).await;
    assert_eq!(store.confirmed().len(), 4);
}

#[tokio::test]
async fn a_command_without_events_answers_where_the_stream_is() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let looked = handle(&accounts, Look).await.expect("no rule is broken");
    assert_eq!((looked.version, looked.position), (Version(0), None));
    let deposited = handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    let looked = handle(&accounts, Look).await.expect("no rule is broken");
    assert_eq!((looked.version, looked.position), (Version(1), deposited.position));
    assert_eq!((looked.events, looked.duplicate), (0, false));
    store.deposit_a_cent();
    let looked = handle(&accounts, Look).await.expect("no rule is broken");
    assert_eq!(looked.version, Version(2), "only the newest state is answered");
}

#[tokio::test]
async fn an_old_demand_conflicts_at_once() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    handle(&accounts, DepositCents(2)).await.expect("no rule is broken");
    match handle_at(&accounts, 1, 1).await {
        Err(HandleError::Conflict { expected, actual, .. }) => {
            assert_eq!((expected, actual), (ExpectedVersion::Exact(Version(1)), Version(2)));
        }
        other => panic!("expected a conflict, found {other:?}"),
    }
    assert!(store.confirmed().is_empty());
    assert_eq!(handle_at(&accounts, 2, 1).await.expect("is at 2").version, Version(3));
}

#[tokio::test]
async fn a_demand_ahead_of_the_view_is_checked_with_the_log() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    match handle_at(&accounts, 2, 1).await {
        Err(HandleError::Conflict { actual, .. }) => assert_eq!(actual, Version(1)),
        other => panic!("expected a conflict, found {other:?}"),
    }
    assert_eq!(store.confirmed().len(), 1);
    store.deposit_a_cent();
    assert_eq!(handle_at(&accounts, 2, 1).await.expect("is at 2").version, Version(3));
}

#[tokio::test]
async fn a_demand_that_held_when_decided_conflicts_when_overtaken() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.on_submit([Act::Overtake]);
    match handle_at(&accounts, 0, 1).await {
        Err(HandleError::Conflict { expected, actual, .. }) => {
            assert_eq!((expected, actual), (ExpectedVersion::Exact(Version(0)), Version(1)));
        }
        other => panic!("expected a conflict, found {other:?}"),
    }
    assert_eq!(store.events().await.len(), 1);
}

#[tokio::test]
async fn nothing_is_decided_after_the_deadline() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let request = Request { deadline: Some(SystemClock.instant()), ..Request::default() };
    let answer = accounts.handle_with("a", &Deposit(1), request).await;
    let unavailable = matches!(answer, Err(HandleError::Append(AppendError::Unavailable { .. })));
    assert!(unavailable, "{answer:?}");
    assert!(store.submitted().is_empty());
}

#[tokio::test]
async fn the_deadline_travels_to_the_store_and_bounds_the_retries() {
    let store = ScriptedStore::default();
    let accounts = store.accounts_with(HandlerConfig {
        backoff_max: Duration::from_secs(60),
        attempts_max: 1_000,
        ..HandlerConfig::default()
    });
    let deadline = SystemClock.instant() + Duration::from_secs(1);
    store.on_submit((0..1_000).map(|_| not_appended()));
    let request = Request { deadline: Some(deadline), ..Request::default() };
    let answer = accounts.handle_with("a", &Deposit(1), request).await;
    let told = matches!(answer, Err(HandleError::Append(AppendError::NotAppended { .. })));
    assert!(told, "{answer:?}");
    assert!(store.submitted().len() < 20, "pauses grow: {}", store.submitted().len());
    assert!(store.submitted().iter().all(|append| append.deadline == Some(deadline)));
}

#[tokio::test]
async fn ids_that_cannot_be_streams_are_refused() {
    let accounts = ScriptedStore::default().accounts();
    let answer = accounts.handle("a/b", &Deposit(1)).await;
    assert!(matches!(answer, Err(HandleError::InvalidId(_))), "{answer:?}");
}

#[tokio::test]
async fn too_many_events_are_refused_and_the_stream_goes_on() {
    let accounts = ScriptedStore::default().accounts();
    let answer = handle(&accounts, DepositCents(65_536)).await;
    assert!(matches!(answer, Err(HandleError::InvalidCommit(_))), "{answer:?}");
    assert_balance(&accounts, 0).await;
}

#[tokio::test]
async fn events_carry_what_the_request_says() {
    let store = ScriptedStore::default();
    let request = Request {
        correlation_id: Some("correlation".into()),
        causation_id: Some("causation".into()),
        trace_parent: Some("trace".into()),
        ..Request::default()
    };
    let id = new_command();
    store
        .accounts()
        .handle_with("a", &DepositCents(2), Request { command_id: Some(id), ..request })
        .await
        .expect("no rule is broken");
    let events = store.events().await;
    for event in &events {
        assert_eq!(event.command_id, id);
        assert_eq!(event.metadata.correlation_id.as_deref(), Some("correlation"));
        assert_eq!(event.metadata.causation_id.as_deref(), Some("causation"));
        assert_eq!(event.metadata.trace_parent.as_deref(), Some("trace"));
        assert_eq!(
            event.metadata.recorded_at.nanosecond() % 1_000,
            0,
            "the log keeps microseconds"
        );
    }
    assert_ne!(events[0].metadata.event_id, events[1].metadata.event_id);
}

#[tokio::test]
async fn a_panic_in_decide_harms_no_other_command() {
    let accounts = ScriptedStore::default().accounts();
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    spawn(&accounts, PanicDeciding).await.expect_err("panics");
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    assert_balance(&accounts, 10).await;
}

#[tokio::test]
async fn an_event_that_the_state_cannot_follow_is_not_appended() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    handle(&accounts, Deposit(5)).await.expect("no rule is broken");
    EVOLVE_PANICS.store(true, Ordering::SeqCst);
    let refused = handle(&accounts, Trap).await.expect_err("its evolve panics").to_string();
    assert!(refused.contains("account.trapped.v1 cannot be stored"), "{refused}");
    assert!(refused.contains("evolve panics: as told"), "{refused}");
    handle(&accounts, Deposit(5)).await.expect("other commands go on");
    assert_eq!(store.events().await.len(), 2);
    // An event which is in the log already makes each load fail, and nothing else.
    EVOLVE_PANICS.store(false, Ordering::SeqCst);
    handle(&accounts, Trap).await.expect("its evolve does not panic");
    EVOLVE_PANICS.store(true, Ordering::SeqCst);
    spawn(&store.accounts(), Deposit(1)).await.expect_err("panics when the event is loaded");
    EVOLVE_PANICS.store(false, Ordering::SeqCst);
    assert_balance(&accounts, 10).await;
}

#[tokio::test]
async fn a_command_from_within_the_transaction_of_a_projection_is_refused() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let sales = Arc::from("sales");
    let refused = on_behalf_of(&sales, handle(&accounts, Deposit(1))).await;
    match refused {
        Err(HandleError::InProjection { projection }) => assert_eq!(&*projection, "sales"),
        other => panic!("expected a refusal, found {other:?}"),
    }
    let sent = on_behalf_of(&sales, accounts.send("a", &Deposit(1))).await;
    assert!(matches!(sent, Err(HandleError::InProjection { .. })), "{sent:?}");
    let other_task = on_behalf_of(&sales, async { spawn(&accounts, Deposit(1)).await });
    other_task.await.expect("no panic").expect("is not of the projection");
    assert_eq!(store.submitted().len(), 1);
}

static SLOW_CLOCK: LazyLock<Arc<ManualClock>> = LazyLock::new(Arc::default);

/// Takes nine seconds to decide.
#[derive(Debug, Clone, Default)]
struct Slow;

impl Aggregate for Slow {
    const CATEGORY: &'static str = "account";
    type Command = ();
    type Event = AccountEvent;
    type Error = AccountError;

    fn decide(&self, (): &()) -> Result<Vec<AccountEvent>, AccountError> {
        SLOW_CLOCK.advance(Duration::from_secs(9));
        Ok(vec![AccountEvent::Closed])
    }

    fn evolve(&mut self, _: &AccountEvent) {}
}

#[tokio::test]
async fn a_decision_that_outlasts_the_deadline_is_named_and_not_appended() {
    let store = MemoryStore::default();
    let clock = SLOW_CLOCK.clone();
    let slow: CommandHandler<Slow> =
        CommandHandler::with_parts(Arc::new(store.clone()), clock, Arc::new(RandomIds));
    let quick_enough = slow.handle("a", &()).await;
    quick_enough.expect("nine of ten seconds");
    let deadline = Some(SLOW_CLOCK.instant() + Duration::from_secs(8));
    let request = Request { deadline, ..Request::default() };
    let id = new_command();
    let late = slow
        .handle_with("a", &(), Request { command_id: Some(id), ..request })
        .await
        .expect_err("the deadline passed");
    assert!(late.to_string().contains("while `decide` ran, for 9s"), "{late}");
    let stream = "account-a".parse().expect("a stream");
    assert_eq!(store.find_command(&stream, id).await.expect("in memory"), None);
}

#[tokio::test]
async fn a_load_returns_state_and_version_of_the_newest_log() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let (account, version) = accounts.load("a").await.expect("there is none yet");
    assert_eq!((account.cents, version), (0, Version::EMPTY));
    handle(&accounts, DepositCents(3)).await.expect("no rule is broken");
    // The cached state is old.
    store.deposit_a_cent();
    let (account, version) = accounts.load("a").await.expect("readable");
    assert_eq!((account.cents, version), (4, Version(4)));
    assert_eq!(store.submitted().len(), 1, "a load appends nothing");
    let refused = accounts.load("a/b").await;
    assert!(matches!(refused, Err(HandleError::InvalidId(_))), "{refused:?}");
    store.on_confirm([unavailable()]);
    let refused = accounts.load("a").await;
    assert!(
        matches!(refused, Err(HandleError::Append(AppendError::Unavailable { .. }))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_load_waits_for_commands_whose_outcome_is_open() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    store.hold();
    let deposit = spawn(&accounts, Deposit(5));
    store.until_held(1).await;
    let mut load = pin!(accounts.load("a"));
    store.release_all();
    let (account, version) = load.as_mut().await.expect("readable");
    assert_eq!((account.cents, version), (5, Version(1)));
    deposit.await.expect("ends").expect("no rule is broken");
}

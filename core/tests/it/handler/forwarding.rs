//! Commands of streams that another node owns are handled there, as if they had been handled here.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join;
use kafold_core::clock::{Clock, SystemClock};
use kafold_core::handler::{HandleError, HandlerConfig, Request};
use kafold_core::memory::MemorySnapshots;
use kafold_core::testing::{eventually, exact};
use kafold_core::{
    AppendError, CommandHandler, CommandId, ExpectedVersion, ForwardedCommand, Handled, ReadError,
    Reply, SnapshotStore, Version,
};
use serde_json::json;
use serde_json::value::to_raw_value;

use crate::handler::domain::AccountCommand::{
    self, Deposit, DepositCents, Look, Mumble, Mute, Waver, Withdraw,
};
use crate::handler::domain::{
    Account, AccountError, Accounts, Answer, assert_balance, handle, new_command,
};
use crate::handler::scripted::{Act, ScriptedStore, not_appended, not_owner, unavailable};
use crate::handler::wire::{
    Counters, Delivery, ManualClock, Node, Wire, in_ten_seconds, nodes, nodes_with,
};

fn demanding(expected: ExpectedVersion) -> Request {
    Request { expected, ..Request::default() }
}

fn few_attempts() -> HandlerConfig {
    HandlerConfig { attempts_max: 3, ..HandlerConfig::default() }
}

/// A command as it is on the wire.
fn on_the_wire(payload: &str, command_id: CommandId) -> ForwardedCommand {
    ForwardedCommand {
        stream: "account-a".parse().expect("valid"),
        command_id,
        payload: payload.as_bytes().into(),
        expected: ExpectedVersion::Any,
        correlation_id: None,
        causation_id: None,
        trace_parent: None,
        deadline: SystemClock.now() + Duration::from_secs(10),
    }
}

async fn execute(node: &Node, payload: &str, command_id: CommandId) -> Result<Reply, AppendError> {
    node.wire.executor().execute(&on_the_wire(payload, command_id), in_ten_seconds()).await
}

fn first_again(first: Handled) -> Handled {
    Handled { duplicate: true, events: 0, ..first }
}

fn unknown(id: CommandId) -> Act {
    Act::Fail(AppendError::OutcomeUnknown { command_id: id })
}

fn assert_unknown(answer: &Answer, id: CommandId) {
    match answer {
        Err(HandleError::Append(AppendError::OutcomeUnknown { command_id })) => {
            assert_eq!(*command_id, id);
        }
        other => panic!("expected OutcomeUnknown, found {other:?}"),
    }
}

fn assert_unavailable<T: std::fmt::Debug>(answer: &Result<T, HandleError<AccountError>>) {
    let unavailable = matches!(answer, Err(HandleError::Append(AppendError::Unavailable { .. })));
    assert!(unavailable, "{answer:?}");
}

/// The text of an answer that says that a program or a log has to be corrected.
fn diverged<T: std::fmt::Debug>(answer: Result<T, HandleError<AccountError>>) -> String {
    match answer {
        Err(error @ HandleError::Read(ReadError::Diverged { .. })) => error.to_string(),
        other => panic!("expected Diverged, found {other:?}"),
    }
}

// The way there.

#[tokio::test]
async fn a_command_of_a_foreign_stream_is_forwarded_without_loading_it() {
    let (near, far) = nodes();
    let id = new_command();
    let handled = near.accounts.handle_with("a", &DepositCents(3), id).await.expect("is forwarded");
    let last = far.store.events().await[2].position;
    let expected =
        Handled { version: Version(3), position: Some(last), duplicate: false, events: 3 };
    assert_eq!(handled, expected);
    assert_eq!(near.wire.called()[0].command_id, id);
    assert!(near.store.reads().is_empty() && near.store.submitted().is_empty());
    assert_eq!(near.accounts.hot_states(), 0);
}

#[tokio::test]
async fn a_command_of_an_own_stream_is_handled_here() {
    let (_, far) = nodes();
    handle(&far.accounts, Deposit(1)).await.expect("no rule is broken");
    assert!(far.wire.called().is_empty());
}

#[tokio::test]
async fn a_load_of_a_foreign_stream_has_what_its_owner_confirms() {
    let (near, far) = nodes();
    let load = async || near.accounts.load("a").await.expect("readable");
    let (account, version) = load().await;
    assert_eq!((account.cents, version), (0, Version::EMPTY));
    handle(&far.accounts, Deposit(5)).await.expect("no rule is broken");
    let (account, version) = load().await;
    assert_eq!((account.cents, version), (5, Version(1)));
    // The state of this node is in its cache now, and the owner goes on.
    handle(&far.accounts, Withdraw(2)).await.expect("no rule is broken");
    let (account, version) = load().await;
    assert_eq!((account.cents, version), (3, Version(2)));
    assert!(near.wire.called().iter().all(|called| called.payload.is_empty()));
    assert_eq!(far.store.submitted().len(), 2, "a load appends nothing");
}

#[tokio::test]
async fn a_load_whose_owner_does_not_answer_is_unavailable() {
    let (near, _) = nodes_with(few_attempts(), Arc::new(SystemClock));
    let unknown = || AppendError::OutcomeUnknown { command_id: new_command() };
    near.wire.on_delivery((0..3).map(|_| Delivery::Answer(Err(unknown()))));
    let refused = near.accounts.load("a").await;
    assert!(
        matches!(refused, Err(HandleError::Append(AppendError::Unavailable { .. }))),
        "{refused:?}"
    );
}

/// The index of a stream is fed behind the write of its owner.
#[tokio::test]
async fn a_load_waits_until_the_confirmed_version_can_be_read() {
    let (near, far) = nodes();
    let confirmed = Handled { version: Version(1), position: None, duplicate: false, events: 0 };
    near.wire.on_delivery([Delivery::Answer(Ok(Reply::Handled(confirmed)))]);
    let loaded = async { near.accounts.load("a").await.expect("readable in time") };
    let deposited = async {
        eventually("the load has read", async || near.store.reads().len() > 1).await;
        handle(&far.accounts, Deposit(5)).await.expect("no rule is broken");
    };
    let ((account, version), ()) = join(loaded, deposited).await;
    assert_eq!((account.cents, version), (5, Version(1)));
}

#[tokio::test]
async fn a_forwarded_command_carries_all_that_the_caller_said() {
    let clock = Arc::new(ManualClock::default());
    let (near, far) = nodes_with(HandlerConfig::default(), clock.clone());
    let (id, deadline) = (new_command(), clock.instant() + Duration::from_secs(7));
    let request = Request {
        command_id: Some(id),
        expected: ExpectedVersion::NoStream,
        correlation_id: Some("correlation".into()),
        causation_id: Some("causation".into()),
        trace_parent: Some("trace".into()),
        deadline: Some(deadline),
    };
    near.accounts.handle_with("a", &Deposit(5), request).await.expect("there is none yet");
    let called = &near.wire.called()[0];
    let expected = ForwardedCommand {
        expected: ExpectedVersion::NoStream,
        correlation_id: Some("correlation".into()),
        causation_id: Some("causation".into()),
        trace_parent: Some("trace".into()),
        deadline: clock.now() + Duration::from_secs(7),
        ..on_the_wire(r#"{"Deposit":5}"#, id)
    };
    assert_eq!(called, &expected);
    let metadata = &far.store.events().await[0].metadata;
    assert_eq!(metadata.correlation_id, expected.correlation_id);
    assert_eq!(metadata.causation_id, expected.causation_id);
    assert_eq!(metadata.trace_parent, expected.trace_parent);
}

#[tokio::test]
async fn not_owner_is_forwarded_with_the_same_id_and_what_is_left_of_the_deadline() {
    let clock = Arc::new(ManualClock::default());
    let (near, far) = nodes_with(HandlerConfig::default(), clock.clone());
    near.wire.set_local(true);
    near.store.hold();
    near.store.on_submit([not_owner()]);
    let (began, id) = (clock.now(), new_command());
    let handling = near.accounts.handle_with("a", &Deposit(5), id);
    let losing = async {
        near.store.until_held(1).await;
        clock.advance(Duration::from_secs(4));
        near.store.release_all();
    };
    let (handled, ()) = join(handling, losing).await;
    assert_eq!(handled.expect("is forwarded").version, Version(1));
    let called = near.wire.called();
    assert_eq!((called.len(), called[0].command_id), (1, id));
    assert_eq!(called[0].deadline, began + HandlerConfig::default().deadline);
    assert_eq!(far.store.submitted().len(), 1);
}

#[tokio::test]
async fn a_rejection_that_this_node_may_not_give_is_decided_by_the_owner() {
    let (near, far) = nodes();
    near.wire.set_local(true);
    near.store.on_confirm([not_owner()]);
    handle(&far.accounts, Deposit(5)).await.expect("no rule is broken");
    assert_balance(&near.accounts, 5).await;
    assert_eq!((near.wire.called().len(), far.store.confirmed().len()), (1, 1));
}

#[tokio::test]
async fn without_a_bus_nothing_changes() {
    let store = ScriptedStore::default();
    let accounts = store.accounts().forwarding(None);
    let id = new_command();
    store.on_submit([not_owner(), unknown(id)]);
    let answer = accounts.handle_with("a", &Deposit(1), id).await;
    let not_owner = matches!(answer, Err(HandleError::Append(AppendError::NotOwner { .. })));
    assert!(not_owner, "{answer:?}");
    assert_unknown(&accounts.handle_with("a", &Deposit(1), id).await, id);
}

#[tokio::test]
async fn a_command_that_cannot_be_written_is_told_so_and_not_sent() {
    let (near, _) = nodes();
    let id = new_command();
    let told = diverged(near.accounts.handle_with("a", &Mute, id).await);
    assert!(told.contains(&format!("writing command {id} of stream account-a as JSON")), "{told}");
    assert_eq!(diverged(near.accounts.send_with("a", &Mute, id).await), told);
    assert!(near.wire.called().is_empty() && near.wire.sent().is_empty());
}

#[tokio::test]
async fn ids_that_cannot_be_streams_are_refused_and_not_sent() {
    let (near, _) = nodes();
    let answer = near.accounts.handle("a/b", &Deposit(1)).await;
    assert!(matches!(answer, Err(HandleError::InvalidId(_))), "{answer:?}");
    let answer = near.accounts.send("a/b", &Deposit(1)).await;
    assert!(matches!(answer, Err(HandleError::InvalidId(_))), "{answer:?}");
}

// The way back.

/// Handles a command twice, each time on a log prepared in the same way: on a node that is alone,
/// and forwarded to one that owns the stream. The answers must be the same.
async fn check<T>(
    prepare: impl Fn(&ScriptedStore) -> T,
    command: AccountCommand,
    request: Request,
) -> Answer {
    let (alone, (near, far)) =
        (ScriptedStore::default(), nodes_with(few_attempts(), Arc::new(SystemClock)));
    prepare(&alone);
    prepare(&far.store);
    let id = new_command();
    let accounts = alone.accounts_with(few_attempts());
    let local = accounts
        .handle_with("a", &command, Request { command_id: Some(id), ..request.clone() })
        .await;
    let forwarded =
        near.accounts.handle_with("a", &command, Request { command_id: Some(id), ..request }).await;
    assert_eq!(format!("{forwarded:?}"), format!("{local:?}"));
    assert_eq!(near.wire.called().len(), 1, "an answer of the owner is final");
    assert!(near.store.reads().is_empty());
    forwarded
}

#[tokio::test]
async fn a_handled_command_is_answered_as_the_local_path_does() {
    let answer = check(|_| {}, DepositCents(2), Request::default()).await;
    assert_eq!(answer.expect("no rule is broken").events, 2);
    let unchanged = |store: &ScriptedStore| store.deposit_a_cent();
    let answer = check(unchanged, Look, Request::default()).await.expect("no rule is broken");
    assert_eq!((answer.version, answer.events), (Version(1), 0));
    let nothing = check(|_| {}, Look, Request::default()).await.expect("no rule is broken");
    assert_eq!((nothing.version, nothing.position), (Version(0), None));
}

#[tokio::test]
async fn a_rejection_arrives_as_the_error_of_the_domain() {
    let prepare = |store: &ScriptedStore| store.deposit_a_cent();
    let answer = check(prepare, Withdraw(5), Request::default()).await;
    let rejected = matches!(answer, Err(HandleError::Rejected(AccountError::Insufficient(1))));
    assert!(rejected, "{answer:?}");
}

#[tokio::test]
async fn a_demand_that_does_not_hold_conflicts_as_the_local_path_does() {
    let two = |store: &ScriptedStore| {
        store.deposit_a_cent();
        store.deposit_a_cent();
    };
    let demands = [ExpectedVersion::NoStream, exact(0), exact(9)];
    for demand in demands {
        match check(two, Deposit(1), demanding(demand)).await {
            Err(HandleError::Conflict { expected, actual, .. }) => {
                assert_eq!((expected, actual), (demand, Version(2)));
            }
            other => panic!("expected a conflict, found {other:?}"),
        }
    }
    check(two, Deposit(1), demanding(exact(2))).await.expect("is at 2");
}

#[tokio::test]
async fn the_owners_last_conflict_is_answered_with_both_versions() {
    let overtake = |store: &ScriptedStore| store.on_submit((0..9).map(|_| Act::Overtake));
    match check(overtake, Deposit(1), Request::default()).await {
        Err(HandleError::Conflict { expected, actual, .. }) => {
            assert_eq!((expected, actual), (exact(2), Version(3)));
        }
        other => panic!("expected a conflict, found {other:?}"),
    }
}

#[tokio::test]
async fn what_the_owner_could_not_append_arrives_as_the_local_path_answers_it() {
    let answer = check(|s| s.on_submit([unavailable()]), Deposit(1), Request::default()).await;
    assert_unavailable(&answer);
    let answer = check(|s| s.on_confirm([unavailable()]), Withdraw(1), Request::default()).await;
    assert_unavailable(&answer);
    let too_large = AppendError::TooLarge { size: 9, limit: 8 };
    let prepare = |store: &ScriptedStore| store.on_submit([Act::Fail(too_large.clone())]);
    let answer = check(prepare, Deposit(1), Request::default()).await;
    let large = matches!(answer, Err(HandleError::Append(AppendError::TooLarge { .. })));
    assert!(large, "{answer:?}");
    let prepare = |s: &ScriptedStore| s.on_submit((0..9).map(|_| not_appended()));
    let answer = check(prepare, Deposit(1), Request::default()).await;
    let not = matches!(answer, Err(HandleError::Append(AppendError::NotAppended { .. })));
    assert!(not, "{answer:?}");
}

#[tokio::test]
async fn what_the_owner_cannot_read_or_write_is_told_in_its_words() {
    let (near, far) = nodes();
    far.store.add_to_a("account.unheard_of.v1");
    let local = handle(&far.accounts, Deposit(1)).await.expect_err("cannot be read").to_string();
    assert_eq!(diverged(handle(&near.accounts, Deposit(1)).await), local);

    let (near, far) = nodes();
    let local = handle(&far.accounts, DepositCents(65_536)).await.expect_err("too many");
    let told = diverged(handle(&near.accounts, DepositCents(65_536)).await);
    assert_eq!(told, format!("stream account-a: {local}"));
    assert_eq!(near.wire.called().len(), 1);
}

#[tokio::test]
async fn a_rejection_that_cannot_be_read_is_told_so() {
    let (near, _) = nodes();
    let error = to_raw_value(&json!({ "BornTomorrow": 1 })).expect("is JSON");
    near.wire.on_delivery([Delivery::Answer(Ok(Reply::Rejected { error }))]);
    let id = new_command();
    let told = diverged(near.accounts.handle_with("a", &Deposit(1), id).await);
    assert!(told.contains(&format!("reading the rejection of command {id}")), "{told}");
    assert!(told.contains("BornTomorrow"), "{told}");
}

#[tokio::test]
async fn a_rejection_that_cannot_be_written_is_told_so() {
    let (near, _) = nodes();
    let id = new_command();
    let told = diverged(near.accounts.handle_with("a", &Mumble, id).await);
    assert!(told.contains(&format!("writing the rejection of command {id}")), "{told}");
    assert!(told.contains("Mumbled"), "{told}");
    let told = diverged(near.accounts.handle("a", &Waver).await);
    assert!(told.contains("it would be read as another value"), "{told}");
}

#[tokio::test]
async fn what_the_bus_could_not_carry_reaches_the_caller_as_it_is() {
    let (near, far) = nodes();
    let unavailable = AppendError::unavailable(Duration::from_secs(7), "as told");
    let too_large = AppendError::TooLarge { size: 9, limit: 8 };
    near.wire.on_delivery([unavailable, too_large].map(|error| Delivery::Answer(Err(error))));
    assert_unavailable(&handle(&near.accounts, Deposit(1)).await);
    let answer = handle(&near.accounts, Deposit(1)).await;
    let large = matches!(answer, Err(HandleError::Append(AppendError::TooLarge { size: 9, .. })));
    assert!(large, "{answer:?}");
    assert_eq!(near.wire.called().len(), 2, "nothing is tried again");
    assert!(far.store.submitted().is_empty());
}

// Deadlines and unknown outcomes.

#[tokio::test]
async fn a_caller_does_not_wait_for_the_bus_after_its_deadline() {
    let clock = Arc::new(ManualClock::default());
    let (near, _) = nodes_with(HandlerConfig::default(), clock.clone());
    near.wire.on_delivery([Delivery::Swallow, Delivery::Swallow]);
    let id = new_command();
    let late = async {
        eventually("it was sent", async || !near.wire.called().is_empty()).await;
        clock.advance(HandlerConfig::default().deadline);
    };
    let (answer, ()) = join(near.accounts.handle_with("a", &Deposit(1), id), late).await;
    assert_unknown(&answer, id);
    assert_eq!(near.wire.called().len(), 1, "after the deadline it is not sent again");
}

#[tokio::test]
async fn a_command_whose_deadline_has_passed_is_not_sent() {
    let (near, _) = nodes();
    let late = || Request { deadline: Some(SystemClock.instant()), ..Request::default() };
    let answer = near.accounts.handle_with("a", &Deposit(1), late()).await;
    assert_unavailable(&answer);
    assert_unavailable(&near.accounts.send_with("a", &Deposit(1), late()).await);
    assert!(near.wire.called().is_empty() && near.wire.sent().is_empty());
}

/// A deposit of 5 cents on a node that thinks it owns the stream, and whose store answers so.
async fn deposit_on_owner(near: &Node, acts: impl IntoIterator<Item = Act>) -> Answer {
    near.wire.set_local(true);
    near.store.on_submit(acts);
    handle(&near.accounts, Deposit(5)).await
}

#[tokio::test]
async fn an_unknown_outcome_is_settled_here_by_the_same_id_and_applied_once() {
    let (near, _) = nodes();
    let handled = deposit_on_owner(&near, [Act::LoseAnswer]).await.expect("is in the log");
    assert_eq!((handled.version, handled.duplicate), (Version(1), true));
    let lost = unknown(new_command());
    let handled = deposit_on_owner(&near, [lost]).await.expect("was not in the log");
    assert_eq!((handled.version, handled.duplicate), (Version(2), false));
    assert_eq!(near.store.events().await.len(), 2);
    assert!(near.wire.called().is_empty());
}

#[tokio::test]
async fn an_unknown_outcome_is_settled_by_the_new_owner_and_applied_once() {
    let (near, far) = nodes();
    let handled = deposit_on_owner(&near, [Act::LoseAnswer, not_owner()]).await;
    let handled = handled.expect("is in the log");
    assert_eq!((handled.version, handled.duplicate), (Version(1), true));
    assert_eq!(near.wire.called().len(), 0, "the log told this node");

    let (id, lost) = (new_command(), unknown(new_command()));
    near.store.on_submit([lost, not_owner()]);
    let handled = near.accounts.handle_with("a", &Deposit(5), id).await.expect("is handled there");
    assert_eq!((handled.version, handled.duplicate), (Version(2), false));
    assert_eq!(near.wire.called().len(), 1);
    assert_eq!(far.store.events().await[1].command_id, id);
    assert_balance(&far.accounts, 10).await;
}

#[tokio::test]
async fn a_lost_reply_before_the_deadline_is_asked_for_again() {
    let (near, far) = nodes();
    near.wire.on_delivery([Delivery::LoseReply]);
    let handled = handle(&near.accounts, Deposit(5)).await.expect("is in the log");
    assert_eq!((handled.version, handled.duplicate), (Version(1), true));
    let called = near.wire.called();
    assert_eq!(called.len(), 2);
    assert_eq!(called[0].command_id, called[1].command_id);
    assert_eq!(far.store.events().await.len(), 1);
}

#[tokio::test]
async fn an_unknown_outcome_stays_unknown_when_the_next_copy_is_not_taken() {
    let taken_by_nobody = [
        AppendError::unavailable(Duration::from_secs(7), "as told"),
        AppendError::TooLarge { size: 9, limit: 8 },
        AppendError::NotAppended { reason: "as told".into() },
    ];
    for refusal in taken_by_nobody {
        let (near, far) = nodes();
        let id = new_command();
        near.wire.on_delivery([Delivery::LoseReply, Delivery::Answer(Err(refusal))]);
        assert_unknown(&near.accounts.handle_with("a", &Deposit(5), id).await, id);
        assert_eq!(near.wire.called().len(), 2);
        assert_eq!(far.store.events().await.len(), 1, "it was applied, whatever the copy came to");
    }
}

#[tokio::test]
async fn what_the_owner_decides_settles_an_unknown_outcome() {
    let (near, _) = nodes();
    near.wire.set_local(true);
    near.store.on_confirm([unknown(new_command())]);
    assert_balance(&near.accounts, 0).await;
    assert_eq!(near.store.confirmed().len(), 2);
}

#[tokio::test]
async fn unknown_outcomes_are_not_asked_about_for_ever() {
    let (near, _) = nodes_with(few_attempts(), Arc::new(SystemClock));
    let id = new_command();
    let unknown = || Delivery::Answer(Err(AppendError::OutcomeUnknown { command_id: id }));
    near.wire.on_delivery((0..9).map(|_| unknown()));
    assert_unknown(&near.accounts.handle_with("a", &Deposit(5), id).await, id);
    assert_eq!(near.wire.called().len(), 3);
}

// The owner's side.

#[tokio::test]
async fn the_executor_never_forwards() {
    let (_, far) = nodes();
    far.wire.set_local(false);
    far.store.on_submit([not_owner(), unknown(new_command())]);
    let id = new_command();
    let answer = execute(&far, r#"{"Deposit":1}"#, id).await;
    assert!(matches!(answer, Err(AppendError::NotOwner { .. })), "{answer:?}");
    let answer = execute(&far, r#"{"Deposit":1}"#, id).await;
    assert!(matches!(answer, Err(AppendError::OutcomeUnknown { .. })), "{answer:?}");
    assert_eq!(far.store.submitted().len(), 2, "nor does it try again");
    let answer = execute(&far, r#"{"Deposit":1}"#, id).await.expect("owns it");
    assert!(answer.is_in_log(), "{answer:?}");
    assert!(far.wire.called().is_empty());
}

#[tokio::test]
async fn an_executed_command_has_the_deadline_that_it_is_given() {
    let (_, far) = nodes();
    let (deadline, command) = (in_ten_seconds(), on_the_wire(r#"{"Deposit":1}"#, new_command()));
    far.wire.executor().execute(&command, deadline).await.expect("owns it");
    assert_eq!(far.store.submitted()[0].deadline, Some(deadline));
    let (now, command) = (SystemClock.instant(), on_the_wire(r#"{"Deposit":1}"#, new_command()));
    let reply = far.wire.executor().execute(&command, now).await.expect("is settled");
    assert!(matches!(reply, Reply::Unavailable { .. }), "{reply:?}");
    assert_eq!(far.store.events().await.len(), 1);
}

#[tokio::test]
async fn the_executor_shares_cache_snapshots_and_limits_with_its_handler() {
    let (store, (wire, _)) = (ScriptedStore::default(), Wire::pair("account"));
    let (snapshots, config) = (
        Arc::new(MemorySnapshots::new()),
        HandlerConfig { snapshot_every: 1, attempts_max: 1, ..HandlerConfig::default() },
    );
    let accounts = store
        .accounts_with(config)
        .with_snapshots(snapshots.clone())
        .forwarding(Some(Arc::new(wire.clone())));
    wire.set_local(true);
    handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    let execute = async || {
        let command = on_the_wire(r#"{"Deposit":1}"#, new_command());
        wire.executor().execute(&command, in_ten_seconds()).await.expect("is settled")
    };
    execute().await;
    assert_eq!(store.reads(), [Version(0)], "the executor found it loaded");
    let stream = "account-a".parse().expect("valid");
    let saved = snapshots.load(&stream).await.expect("in memory").expect("was saved");
    assert_eq!(saved.version, Version(2));
    store.on_submit([not_appended()]);
    let reply = execute().await;
    assert!(matches!(reply, Reply::NotAppended { .. }), "{reply:?}");
    assert_balance(&accounts, 2).await;
}

#[tokio::test]
async fn a_command_that_cannot_be_read_is_told_so_and_changes_nothing() {
    let (_, far) = nodes();
    match execute(&far, r#"{"Juggle":1}"#, new_command()).await.expect("is settled") {
        Reply::Failed { what, reason } => {
            assert!(what.contains("category account"), "{what}");
            assert!(reason.contains("Juggle"), "{reason}");
        }
        other => panic!("expected Failed, found {other:?}"),
    }
    assert!(far.store.events().await.is_empty());
}

#[tokio::test]
async fn a_command_that_cannot_be_read_any_more_answers_what_it_came_to() {
    let (_, far) = nodes();
    let id = new_command();
    let first =
        far.accounts.handle_with("a", &DepositCents(2), id).await.expect("no rule is broken");
    match execute(&far, r#"{"Juggle":1}"#, id).await.expect("is settled") {
        Reply::Handled(handled) => assert_eq!(handled, first_again(first)),
        other => panic!("expected Handled, found {other:?}"),
    }
}

// One command id, many copies.

#[tokio::test]
async fn a_command_sent_over_both_paths_is_applied_once() {
    let (near, far) = nodes();
    let id = new_command();
    let first = near.accounts.handle_with("a", &DepositCents(2), id).await.expect("is forwarded");
    near.wire.set_local(true);
    let again = near.accounts.handle_with("a", &DepositCents(2), id).await.expect("is known");
    assert_eq!(again, first_again(first));

    let id = new_command();
    let first = near.accounts.handle_with("a", &Deposit(1), id).await.expect("is handled here");
    near.wire.set_local(false);
    let again = near.accounts.handle_with("a", &Deposit(1), id).await.expect("is known");
    assert_eq!(again, first_again(first));
    assert_eq!(far.store.events().await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_on_both_paths_at_once_are_applied_once() {
    let (near, far) = nodes();
    for round in 1..=20 {
        let id = new_command();
        let send = |accounts: &Accounts| {
            let accounts = accounts.clone();
            tokio::spawn(async move { accounts.handle_with("a", &Deposit(1), id).await })
        };
        let copies = [send(&near.accounts), send(&far.accounts), send(&near.accounts)];
        let mut first_ones = 0;
        for copy in copies {
            let handled = copy.await.expect("runs").expect("no rule is broken");
            assert_eq!(handled.version, Version(round));
            first_ones += usize::from(!handled.duplicate);
        }
        assert_eq!(first_ones, 1);
    }
    assert_balance(&near.accounts, 20).await;
}

/// A command, then `later` others, and the command forwarded once more to an owner that remembers
/// four: it answers what it came to first, whatever it says now.
async fn check_window(later: usize, copy: AccountCommand) {
    let config = HandlerConfig { recent_commands_max: 4, ..HandlerConfig::default() };
    let (near, far) = nodes_with(config, Arc::new(SystemClock));
    let id = new_command();
    let first = near.accounts.handle_with("a", &DepositCents(3), id).await.expect("is forwarded");
    for _ in 0..later {
        handle(&near.accounts, Deposit(1)).await.expect("is forwarded");
    }
    let again = near.accounts.handle_with("a", &copy, id).await.expect("is known");
    assert_eq!(again, first_again(first), "{later} later");
    assert_eq!(first.version, Version(3));
    let events = far.store.events().await;
    assert_eq!(events.len(), 3 + later);
    assert_eq!(again.position, Some(events[2].position));
    assert_balance(&near.accounts, 3 + later as u64).await;
}

#[tokio::test]
async fn a_copy_inside_at_and_beyond_the_window_answers_its_first_outcome() {
    // With three later ones it is the oldest that is remembered, with four it was just forgotten.
    for later in [0, 2, 3, 4, 5, 40] {
        for copy in [DepositCents(3), Withdraw(1_000), Look, Mumble] {
            check_window(later, copy).await;
        }
    }
}

// The asynchronous command.

#[tokio::test]
async fn a_sent_command_is_written_down_with_its_deadline() {
    let clock = Arc::new(ManualClock::default());
    let config =
        HandlerConfig { send_deadline: Duration::from_secs(1_800), ..HandlerConfig::default() };
    let (near, far) = nodes_with(config, clock.clone());
    let id = new_command();
    near.accounts.send_with("a", &Deposit(5), id).await.expect("is written down");
    let deadline = Some(clock.instant() + Duration::from_secs(3));
    let request = Request { deadline, ..demanding(ExpectedVersion::NoStream) };
    near.accounts
        .send_with("a", &Deposit(5), Request { command_id: Some(id), ..request })
        .await
        .expect("is written down");
    let (payload, now) = (r#"{"Deposit":5}"#, clock.now());
    let first =
        ForwardedCommand { deadline: now + Duration::from_secs(1_800), ..on_the_wire(payload, id) };
    let second = ForwardedCommand {
        deadline: now + Duration::from_secs(3),
        expected: ExpectedVersion::NoStream,
        ..on_the_wire(payload, id)
    };
    assert_eq!(near.wire.sent(), [first, second]);
    assert!(near.wire.called().is_empty() && far.store.submitted().is_empty());
    assert_eq!(HandlerConfig::default().send_deadline, Duration::from_secs(3_600));
}

#[tokio::test]
async fn a_sent_command_of_an_own_stream_is_written_down_as_well() {
    let (_, far) = nodes();
    far.accounts.send("a", &Deposit(5)).await.expect("is written down");
    assert_eq!(far.wire.sent().len(), 1);
    assert!(far.store.submitted().is_empty());
}

#[tokio::test]
async fn a_command_that_could_not_be_written_down_is_told_so() {
    let (near, _) = nodes();
    let unavailable = AppendError::unavailable(Duration::from_secs(7), "as told");
    near.wire.on_delivery([Delivery::Answer(Err(unavailable))]);
    assert_unavailable(&near.accounts.send("a", &Deposit(1)).await);
}

#[tokio::test]
async fn a_sender_waits_no_longer_than_for_an_answer() {
    let clock = Arc::new(ManualClock::default());
    let (near, _) = nodes_with(HandlerConfig::default(), clock.clone());
    near.wire.on_delivery([Delivery::Swallow]);
    let id = new_command();
    let late = async {
        eventually("it was handed over", async || !near.wire.sent().is_empty()).await;
        clock.advance(HandlerConfig::default().deadline);
    };
    let (answer, ()) = join(near.accounts.send_with("a", &Deposit(1), id), late).await;
    let unknown = matches!(answer, Err(HandleError::Append(AppendError::OutcomeUnknown { .. })));
    assert!(unknown, "{answer:?}");
}

#[tokio::test]
async fn without_a_bus_a_sent_command_is_handled_at_once() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    let id = new_command();
    accounts.send_with("a", &Deposit(5), id).await.expect("no rule is broken");
    assert_eq!(store.events().await[0].command_id, id);
    accounts.send_with("a", &Deposit(5), id).await.expect("is known");
    assert_balance(&accounts, 5).await;
}

#[tokio::test]
async fn without_a_bus_only_rejections_of_sent_commands_are_swallowed() {
    let store = ScriptedStore::default();
    let accounts = store.accounts();
    accounts.send("a", &Withdraw(5)).await.expect("nobody waits for a rejection");
    let (demand, id) = (demanding(exact(7)), new_command());
    let answer =
        accounts.send_with("a", &Deposit(1), Request { command_id: Some(id), ..demand }).await;
    assert!(matches!(answer, Err(HandleError::Conflict { .. })), "{answer:?}");
    store.on_submit([unavailable()]);
    assert_unavailable(&accounts.send("a", &Deposit(1)).await);
    assert!(store.events().await.is_empty());
}

// What is counted, and what is asked of a domain.

#[tokio::test]
async fn callers_forwarded_and_executed_commands_are_counted_apart() {
    let counters = Counters::default();
    let _counting = metrics::set_default_local_recorder(&counters);
    let (near, far) = nodes();
    handle(&far.accounts, Deposit(1)).await.expect("no rule is broken");
    handle(&near.accounts, Deposit(1)).await.expect("is forwarded");
    handle(&near.accounts, Withdraw(3)).await.expect_err("there are 2 cents");
    near.wire.on_delivery([Delivery::LoseReply]);
    handle(&near.accounts, Deposit(1)).await.expect("is in the log");
    near.accounts.send("a", &Deposit(1)).await.expect("is written down");
    let late = Request { deadline: Some(SystemClock.instant()), ..Request::default() };
    assert_unavailable(&near.accounts.handle_with("a", &Deposit(1), late).await);
    let of = |name: &str| counters.by_outcome(name).join(" ");
    let callers = "appended=2 duplicate=1 rejected=1 sent=1 unavailable=1";
    assert_eq!(of("kafold_commands_total"), callers);
    let forwarded = "appended=1 duplicate=1 rejected=1 sent=1 unknown=1";
    assert_eq!(of("kafold_forwarded_commands_total"), forwarded);
    assert_eq!(of("kafold_executed_commands_total"), "appended=2 duplicate=1 rejected=1");
}

#[tokio::test]
async fn a_domain_without_serde_may_send() {
    #[derive(Debug, Clone, Default)]
    struct Plain(Account);
    struct Command;
    #[derive(Debug, thiserror::Error)]
    #[error("refused")]
    struct Refused;
    impl kafold_core::Aggregate for Plain {
        const CATEGORY: &'static str = "plain";
        type Command = Command;
        type Event = crate::handler::domain::AccountEvent;
        type Error = Refused;
        fn decide(&self, _: &Command) -> Result<Vec<Self::Event>, Refused> {
            if self.0.closed { Err(Refused) } else { Ok(vec![Self::Event::Closed]) }
        }
        fn evolve(&mut self, event: &Self::Event) {
            kafold_core::Aggregate::evolve(&mut self.0, event);
        }
    }
    let plain = CommandHandler::<Plain>::new(Arc::new(ScriptedStore::default()));
    plain.send("a", &Command).await.expect("no rule is broken");
    plain.send("a", &Command).await.expect("nobody waits for a rejection");
    plain.handle("a", &Command).await.expect_err("is closed");
}

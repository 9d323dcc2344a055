//! Snapshots make loading shorter and change no answer.

use std::sync::Arc;

use async_trait::async_trait;
use kafold_core::handler::HandlerConfig;
use kafold_core::memory::MemorySnapshots;
use kafold_core::{Offset, Position, ReadError, Snapshot, SnapshotStore, StreamId, Version};

use crate::handler::domain::AccountCommand::{Deposit, Withdraw};
use crate::handler::domain::{Accounts, assert_balance, handle, new_command};
use crate::handler::scripted::ScriptedStore;

fn stream() -> StreamId {
    "account-a".parse().expect("valid")
}

fn accounts(store: &ScriptedStore, snapshots: &Arc<MemorySnapshots>) -> Accounts {
    let config = HandlerConfig { snapshot_every: 4, ..HandlerConfig::default() };
    store.accounts_with(config).with_snapshots(snapshots.clone())
}

/// An account with ten deposits of a cent and its snapshots.
async fn ten_deposits() -> (ScriptedStore, Arc<MemorySnapshots>) {
    let (store, snapshots) = (ScriptedStore::default(), Arc::new(MemorySnapshots::new()));
    let accounts = accounts(&store, &snapshots);
    for _ in 0..10 {
        handle(&accounts, Deposit(1)).await.expect("no rule is broken");
    }
    (store, snapshots)
}

/// The snapshot of account `a`, changed, in a store of its own.
async fn changed(
    snapshots: &MemorySnapshots,
    change: impl FnOnce(&mut Snapshot),
) -> Arc<MemorySnapshots> {
    let mut snapshot = snapshots.load(&stream()).await.expect("in memory").expect("was saved");
    change(&mut snapshot);
    let changed = Arc::new(MemorySnapshots::new());
    changed.save(&snapshot).await.expect("in memory");
    changed
}

#[tokio::test]
async fn a_long_stream_is_loaded_from_its_snapshot() {
    let (store, snapshots) = ten_deposits().await;
    let saved = snapshots.load(&stream()).await.expect("in memory").expect("was saved");
    assert_eq!(saved.version, Version(8), "one every four events");
    let reads = store.reads().len();
    assert_balance(&accounts(&store, &snapshots), 10).await;
    assert_eq!(store.reads()[reads..], [7, 8].map(Version), "its last event, and what follows");
}

#[tokio::test]
async fn the_saved_state_is_what_is_decided_on() {
    let (store, snapshots) = ten_deposits().await;
    let doctored =
        changed(&snapshots, |saved| saved.state = br#"{"cents":500,"closed":false}"#.to_vec());
    assert_balance(&accounts(&store, &doctored.await), 502).await;
}

#[tokio::test]
async fn a_snapshot_of_another_schema_is_ignored() {
    let (store, snapshots) = ten_deposits().await;
    let other = changed(&snapshots, |saved| {
        saved.schema = "account.0".into();
        saved.state = br#"{"cents":500,"closed":false}"#.to_vec();
    });
    assert_balance(&accounts(&store, &other.await), 10).await;
}

#[tokio::test]
async fn a_snapshot_whose_state_cannot_be_read_is_ignored() {
    let (store, snapshots) = ten_deposits().await;
    let broken = changed(&snapshots, |saved| saved.state = b"{".to_vec());
    assert_balance(&accounts(&store, &broken.await), 10).await;
}

#[tokio::test]
async fn a_snapshot_of_another_log_is_ignored() {
    let (store, snapshots) = ten_deposits().await;
    let elsewhere = changed(&snapshots, |saved| {
        let (.., position) = saved.recent_commands.last_mut().expect("has commands");
        *position = Position { offset: Offset(77), ..*position };
    });
    assert_balance(&accounts(&store, &elsewhere.await), 10).await;
    let ahead = changed(&snapshots, |saved| {
        saved.version = Version(20);
        saved.recent_commands.last_mut().expect("has commands").1 = Version(20);
    });
    let accounts = accounts(&store, &ahead.await);
    assert_balance(&accounts, 10).await;
    assert_eq!(handle(&accounts, Withdraw(10)).await.expect("has 10").version, Version(11));
}

#[tokio::test]
async fn deleted_snapshots_change_no_answer() {
    let (store, snapshots) = ten_deposits().await;
    snapshots.clear();
    let accounts = accounts(&store, &snapshots);
    assert_balance(&accounts, 10).await;
    handle(&accounts, Withdraw(10)).await.expect("there are 10 cents");
    let saved = snapshots.load(&stream()).await.expect("in memory").expect("was saved again");
    assert_eq!(saved.version, Version(11));
}

#[tokio::test]
async fn commands_before_the_snapshot_are_known() {
    let (store, snapshots) = (ScriptedStore::default(), Arc::new(MemorySnapshots::new()));
    let config =
        HandlerConfig { snapshot_every: 4, recent_commands_max: 2, ..HandlerConfig::default() };
    let handler = || store.accounts_with(config.clone()).with_snapshots(snapshots.clone());
    let ids: Vec<_> = (0..4).map(|_| new_command()).collect();
    let accounts = handler();
    for id in &ids {
        accounts.handle_with("a", &Deposit(1), *id).await.expect("no rule is broken");
    }
    let accounts = handler();
    for (id, version) in ids.iter().zip(1..) {
        let again = accounts.handle_with("a", &Withdraw(1_000), *id).await.expect("is known");
        assert_eq!((again.version, again.duplicate), (Version(version), true));
    }
    assert_eq!(store.finds(), 2, "two are in the snapshot, the store was asked for the others");
}

struct BrokenSnapshots;

#[async_trait]
impl SnapshotStore for BrokenSnapshots {
    async fn load(&self, _: &StreamId) -> Result<Option<Snapshot>, ReadError> {
        Err(ReadError::unavailable(std::time::Duration::from_secs(1), "as told"))
    }

    async fn save(&self, _: &Snapshot) -> Result<(), ReadError> {
        Err(ReadError::unavailable(std::time::Duration::from_secs(1), "as told"))
    }
}

#[tokio::test]
async fn a_broken_snapshot_store_changes_no_answer() {
    let store = ScriptedStore::default();
    let config = HandlerConfig { snapshot_every: 1, ..HandlerConfig::default() };
    let accounts = store.accounts_with(config).with_snapshots(Arc::new(BrokenSnapshots));
    for version in 1..=5 {
        let handled = handle(&accounts, Deposit(1)).await.expect("no rule is broken");
        assert_eq!(handled.version, Version(version));
    }
    assert_balance(&accounts, 5).await;
}

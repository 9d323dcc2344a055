//! What a rejection may rely on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    StoreUnderTest, assert_conflict, commit, exact, new_stream, read_gapless, submit, view,
};
use crate::store::AppendError;

/// Also when it is asked for several times.
pub async fn the_newest_view_is_confirmed(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(2)).await.expect("is new");
    for _ in 0..3 {
        store.confirm(view(&stream, 2, None)).await.expect("is the newest");
    }
    read_gapless(&*store, &stream, 2).await;
}

/// The conflict tells both versions.
pub async fn an_old_view_conflicts(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(2)).await.expect("is new");
    store.append(&stream, exact(2), commit(1)).await.expect("is at 2");
    for old in [0, 1, 2] {
        let outcome = store.confirm(view(&stream, old, None)).await;
        assert_conflict(&outcome, &stream, exact(old), 3);
    }
}

/// Version 0 is a view like any other, and confirming it makes no stream.
pub async fn a_view_of_an_empty_stream_is_confirmed_while_it_is_empty(
    harness: &mut dyn StoreUnderTest,
) {
    let (store, stream) = (harness.store(), new_stream());
    store.confirm(view(&stream, 0, None)).await.expect("is empty");
    store.append(&stream, exact(0), commit(1)).await.expect("is still empty");
    let outcome = store.confirm(view(&stream, 0, None)).await;
    assert_conflict(&outcome, &stream, exact(0), 1);
}

/// Whoever has seen more than the store must be wrong, or the store is not the newest.
pub async fn a_view_ahead_of_the_stream_is_not_confirmed(harness: &mut dyn StoreUnderTest) {
    let (store, stream) = (harness.store(), new_stream());
    store.append(&stream, exact(0), commit(1)).await.expect("is new");
    let outcome = store.confirm(view(&stream, 2, None)).await;
    let refused =
        matches!(outcome, Err(AppendError::Conflict { .. } | AppendError::NotAppended { .. }));
    assert!(refused, "{outcome:?}");
}

/// While one task appends, a view that an acknowledged append has overtaken is never confirmed.
pub async fn confirmed_views_and_appends_agree_on_one_order(harness: &mut dyn StoreUnderTest) {
    const APPENDS: u64 = 30;
    let (store, stream) = (harness.store(), new_stream());
    let acknowledged = Arc::new(AtomicU64::new(0));
    let writer = {
        let (store, stream, acknowledged) =
            (Arc::clone(&store), stream.clone(), Arc::clone(&acknowledged));
        tokio::spawn(async move {
            for version in 0..APPENDS {
                let (_, outcome) = submit(&*store, &stream, exact(version), commit(1), None);
                let appended = outcome.await.expect("nobody else writes");
                acknowledged.store(appended.version.0, Ordering::SeqCst);
            }
        })
    };
    let mut version = 0;
    while version < APPENDS {
        let before = acknowledged.load(Ordering::SeqCst);
        match store.confirm(view(&stream, version, None)).await {
            Ok(()) => assert!(version >= before, "view {version} confirmed, {before} was appended"),
            Err(AppendError::Conflict { actual, .. }) => version = actual.0,
            // The view was of what the writer has in flight: ask again.
            Err(AppendError::NotAppended { .. }) => {}
            Err(other) => panic!("a confirm was answered {other:?}"),
        }
        tokio::task::yield_now().await;
    }
    writer.await.expect("no task panics");
}

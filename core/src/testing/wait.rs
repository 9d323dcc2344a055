//! The one place where tests wait.

use std::time::Duration;

/// How long [`eventually`] waits before it gives up.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// How often [`eventually`] looks.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Waits until `condition` holds; panics with `what` when it does not within 15 s.
#[expect(clippy::disallowed_methods, reason = "the one helper that polls, for tests alone")]
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let polling = async {
        while !condition().await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let done = tokio::time::timeout(WAIT_MAX, polling).await;
    assert!(done.is_ok(), "{what}: not within {WAIT_MAX:?}");
}

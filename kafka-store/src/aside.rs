//! A node leaves the group of the nodes while the brokers refuse the times of its records. The other nodes
//! serve its partitions meanwhile.

use std::sync::Arc;
use std::time::Duration;

use kafold_core::Clock;

use crate::forward::nodes::Nodes;
use crate::membership::Membership;
use crate::partition::Shared;
use crate::producer::CLOCK_REFUSED;

/// Interval of the checks.
const INTERVAL: Duration = Duration::from_secs(2);
/// Time from the first refusal until the node leaves the group.
const REFUSED_MAX: Duration = Duration::from_secs(10);
/// Least time outside of the group: each return moves partitions.
const ASIDE_MIN: Duration = Duration::from_secs(30);

/// Leaves the group when the brokers have refused the times of this node's claims for [`REFUSED_MAX`] and
/// another node is up. Comes back when the brokers take this node's announcements again, or no other
/// node is up any more. Ends with the task only.
pub(crate) async fn watch(
    membership: Arc<Membership>,
    partitions: Vec<Arc<Shared>>,
    nodes: Arc<Nodes>,
    clock: Arc<dyn Clock>,
) {
    let mut refused_since = None;
    loop {
        clock.sleep(INTERVAL).await;
        let now = clock.instant();
        if !partitions.iter().any(|shared| is_refused(shared)) {
            refused_since = None;
            continue;
        }
        let since = *refused_since.get_or_insert(now);
        if now.saturating_duration_since(since) < REFUSED_MAX || !nodes.has_others() {
            continue;
        }
        refused_since = None;
        tracing::warn!("leaving the group to the other nodes: {CLOCK_REFUSED}");
        membership.step_aside(format!("outside of the group of the nodes, since {CLOCK_REFUSED}"));
        clock.sleep(ASIDE_MIN).await;
        while nodes.has_others() && !nodes.hears_itself() {
            clock.sleep(INTERVAL).await;
        }
        tracing::info!("joining the group of the nodes again");
        membership.come_back();
    }
}

fn is_refused(shared: &Shared) -> bool {
    let is_of_clock = |trouble: &String| trouble.contains(CLOCK_REFUSED);
    shared.is_assigned() && shared.standing().trouble.as_ref().is_some_and(is_of_clock)
}

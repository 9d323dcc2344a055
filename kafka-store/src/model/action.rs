//! What can happen next.

use kafold_core::Offset;

use super::bounds::{Delivery, Demand};
use super::node::Node;
use super::world::World;
use crate::wire::Body;

/// One step. Writers are named by their place.
#[derive(Debug, Clone, Copy)]
pub(super) enum Action {
    /// A commit of so many events; `command` is one that was sent before.
    Submit {
        at: usize,
        demand: Demand,
        events: u8,
        command: Option<u8>,
    },
    Confirm {
        at: usize,
        demand: Demand,
    },
    /// The first record in a writer's queue goes its way.
    Deliver {
        at: usize,
        how: Delivery,
    },
    /// A record arrives that nobody counts on any more.
    Arrive {
        late: usize,
    },
    /// The writer is told the next report.
    Report {
        at: usize,
    },
    /// The writer is handed the records it asked for: all, or one.
    Read {
        at: usize,
        all: bool,
    },
    /// The writer gives up waiting for a report that will not come.
    Wait {
        at: usize,
    },
    /// What was on its way may still arrive.
    Crash {
        at: usize,
    },
}

impl World {
    /// All that can happen next, always in the same order.
    pub(super) fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::with_capacity(16);
        for at in 0..self.seats.len() {
            self.actions_at(at, &mut actions);
            // Those who have done nothing are all alike: one of them is enough.
            if !self.seats[at].touched {
                break;
            }
        }
        for (late, record) in self.late.iter().enumerate() {
            let is_copy = late > 0 && self.late[late - 1].stamp == record.stamp;
            if !is_copy {
                actions.push(Action::Arrive { late });
            }
        }
        actions
    }

    /// Whether somebody waits for an answer and nothing comes of itself that brings it nearer, though
    /// the writer may still claim.
    pub(super) fn is_stuck(&self) -> bool {
        self.left.claims > 0
            && (0..self.seats.len()).filter(|at| self.calls.is_waiting(*at)).any(|at| {
                let mut actions = Vec::new();
                self.actions_at(at, &mut actions);
                actions.iter().all(|action| action.is_from_outside())
            })
    }

    fn actions_at(&self, at: usize, actions: &mut Vec<Action>) {
        let seat = &self.seats[at];
        if let Some(first) = seat.queue.front() {
            actions.push(Action::Deliver { at, how: Delivery::Fine });
            if self.left.faults > 0 {
                let is_claim = matches!(first.body, Body::Claim(_));
                let faults = self.bounds.faults.iter().copied();
                let faults = faults.filter(|how| !is_claim || how.concerns_claims());
                actions.extend(faults.map(|how| Action::Deliver { at, how }));
            }
        }
        let Some(node) = &seat.node else { return };
        if !seat.reports.is_empty() {
            actions.push(Action::Report { at });
        }
        if let Some(from) = node.read {
            self.reads_at(at, node, from, actions);
        }
        let has_read = node.read.is_none_or(|from| from >= self.truth.end());
        let is_idle = seat.queue.is_empty() && seat.reports.is_empty() && has_read;
        if is_idle && node.waits_until().is_some() {
            actions.push(Action::Wait { at });
        }
        if self.left.crashes > 0 && seat.touched {
            actions.push(Action::Crash { at });
        }
        if node.owns() || self.bounds.asked_early {
            self.calls_at(at, actions);
        }
    }

    fn reads_at(&self, at: usize, node: &Node, from: Offset, actions: &mut Vec<Action>) {
        let behind = self.truth.end().0.saturating_sub(from.0);
        // How far somebody has read who answers nobody and has not claimed yet makes no difference.
        let is_seen =
            !node.is_catching_up() || self.calls.is_waiting(at) || self.bounds.asked_early;
        if behind > 1 && is_seen {
            actions.push(Action::Read { at, all: false });
        }
        if behind > 0 || (node.is_catching_up() && self.left.claims > 0) {
            actions.push(Action::Read { at, all: true });
        }
    }

    fn calls_at(&self, at: usize, actions: &mut Vec<Action>) {
        for demand in self.bounds.demands.iter().copied() {
            if !self.is_worth_asking(at, demand) {
                continue;
            }
            if self.left.confirms > 0 && demand != Demand::Any {
                actions.push(Action::Confirm { at, demand });
            }
            if self.left.commits == 0 {
                continue;
            }
            for events in self.bounds.events.iter().copied() {
                actions.push(Action::Submit { at, demand, events, command: None });
            }
            if self.bounds.retries && demand != Demand::Behind {
                for (command, events) in self.calls.commands() {
                    actions.push(Action::Submit { at, demand, events, command: Some(command) });
                }
            }
        }
    }

    /// Whether the demand is possible, and another one than the others.
    fn is_worth_asking(&self, at: usize, demand: Demand) -> bool {
        let Some(node) = &self.seats[at].node else { return false };
        match demand {
            Demand::Any | Demand::Seen => true,
            Demand::Newest => self.version() != node.version(),
            Demand::Behind => node.last.is_some(),
        }
    }
}

impl Action {
    /// Whether nothing brings it about by itself.
    pub(super) fn is_from_outside(self) -> bool {
        match self {
            Self::Submit { .. }
            | Self::Confirm { .. }
            | Self::Crash { .. }
            | Self::Arrive { .. } => true,
            Self::Deliver { how, .. } => how != Delivery::Fine,
            Self::Report { .. } | Self::Read { .. } | Self::Wait { .. } => false,
        }
    }
}

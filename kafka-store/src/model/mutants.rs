//! Every rule of the protocol that can be removed, and the shortest history that then breaks a
//! promise.
//!
//! Some are shorter than those of the protocol's own explorer, because more is looked at here: a
//! writer that halts, an event that is told as proven or is written under no accepted claim, and a
//! reader that cannot go on count as broken promises before any caller is told anything wrong.
//!
//! `KAFOLD_MODEL_TELL=AckOnAnyReport` tells that mutant's history.

use std::sync::atomic::{AtomicUsize, Ordering};

use kafold_core::mutant::Mutant;

use super::bounds::Delivery::{CopiedLate, Late, LateUnreported, NoOffset, SaidToFail, SentTwice};
use super::bounds::Demand::{Any, Behind, Newest, Seen};
use super::bounds::{Bounds, Left};
use super::explore::{Explored, Explorer};
use crate::sim::say;

/// A rule's removal and the smallest bounds that show it.
struct Case {
    mutant: Mutant,
    /// Steps of the shortest history.
    steps: usize,
    /// What the protocol's own explorer counted, if it did.
    specified: Option<usize>,
    bounds: Bounds,
}

const fn case(mutant: Mutant, steps: usize, specified: Option<usize>, bounds: Bounds) -> Case {
    Case { mutant, steps, specified, bounds }
}

/// One commit of one event by one of two writers, and no faults.
const CALM: Bounds = Bounds {
    writers: 2,
    left: Left { claims: 2, commits: 1, confirms: 0, faults: 0, crashes: 0 },
    demands: &[Seen],
    events: &[1],
    retries: false,
    asked_early: false,
    faults: &[],
};
const TWO_COMMITS: Bounds = Bounds { left: Left { commits: 2, ..CALM.left }, ..CALM };
const ONE_FAULT: Left = Left { faults: 1, ..CALM.left };
const TWO_FAULTS: Left = Left { faults: 2, ..CALM.left };

/// Not here: what concerns the index and malformed records, of which the model has none.
const CASES: [Case; 25] = [
    case(Mutant::AckOnEnqueue, 4, None, CALM),
    case(
        Mutant::AckWithoutPredecessor,
        9,
        None,
        Bounds { left: ONE_FAULT, events: &[2], faults: &[LateUnreported], ..CALM },
    ),
    case(Mutant::AckOnAnyReport, 8, Some(8), CALM),
    case(Mutant::AckOnConsecutiveOffsets, 8, Some(10), CALM),
    case(
        Mutant::AckOnUnknownOffset,
        8,
        Some(8),
        Bounds { left: ONE_FAULT, faults: &[NoOffset], ..CALM },
    ),
    case(
        Mutant::BaseFromReport,
        8,
        Some(9),
        Bounds { left: ONE_FAULT, faults: &[SentTwice], ..CALM },
    ),
    case(Mutant::OwnedByEpoch, 7, Some(8), CALM),
    case(Mutant::NoReadBeforeProducing, 5, Some(8), CALM),
    case(
        Mutant::FoldAcceptsHole,
        6,
        Some(6),
        Bounds { left: ONE_FAULT, events: &[2], faults: &[Late], ..CALM },
    ),
    case(
        Mutant::FoldAcceptsDuplicate,
        6,
        Some(6),
        Bounds { left: ONE_FAULT, faults: &[SentTwice], ..CALM },
    ),
    case(Mutant::FoldAcceptsEqualEpoch, 7, Some(11), CALM),
    case(Mutant::FoldKeepsCommitOpen, 10, Some(11), Bounds { events: &[1, 2], ..TWO_COMMITS }),
    case(
        Mutant::ReportAwaitedForEver,
        6,
        None,
        Bounds { left: ONE_FAULT, faults: &[LateUnreported], ..CALM },
    ),
    case(
        Mutant::NotAppendedOnFailure,
        6,
        Some(7),
        Bounds { left: ONE_FAULT, faults: &[SaidToFail], ..CALM },
    ),
    case(
        Mutant::NotAppendedOnVoid,
        8,
        Some(10),
        Bounds { left: TWO_FAULTS, events: &[2], faults: &[Late, CopiedLate], ..CALM },
    ),
    case(
        Mutant::NotAppendedWithoutClaim,
        8,
        None,
        Bounds { left: ONE_FAULT, faults: &[Late], ..CALM },
    ),
    case(
        Mutant::PendingOutlivesClaim,
        11,
        Some(14),
        Bounds {
            left: Left { commits: 2, ..ONE_FAULT },
            demands: &[Seen, Behind],
            faults: &[Late],
            ..CALM
        },
    ),
    case(Mutant::ConflictFromPending, 5, Some(5), TWO_COMMITS),
    case(
        Mutant::ConflictUnconfirmed,
        9,
        Some(9),
        Bounds { demands: &[Seen, Newest], ..TWO_COMMITS },
    ),
    case(
        Mutant::ConfirmWithoutBarrier,
        6,
        Some(6),
        Bounds { left: Left { confirms: 1, ..CALM.left }, ..CALM },
    ),
    case(
        Mutant::ConfirmByEarlierRecord,
        12,
        Some(14),
        Bounds {
            left: Left { commits: 2, confirms: 1, ..CALM.left },
            demands: &[Seen, Behind],
            ..CALM
        },
    ),
    case(
        Mutant::ConfirmAcrossClaim,
        12,
        Some(14),
        Bounds {
            left: Left { confirms: 1, ..ONE_FAULT },
            demands: &[Seen, Behind],
            faults: &[Late],
            ..CALM
        },
    ),
    case(Mutant::CheckpointInsideCommit, 6, Some(7), Bounds { events: &[2], ..CALM }),
    case(Mutant::CheckpointWithoutState, 5, Some(5), CALM),
    case(Mutant::DedupeOff, 7, Some(9), Bounds { demands: &[Any], retries: true, ..TWO_COMMITS }),
];

#[test]
fn every_rule_that_is_removed_is_missed() {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut explored = Vec::new();
        while let Some(case) = CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
            let bounds = case.bounds.clone();
            let explorer =
                Explorer { bounds, mutant: Some(case.mutant), threads: 1, is_loud: false };
            explored.push((case, explorer.explore()));
        }
        explored
    };
    let mut explored = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mut explored = work();
        explored.extend(other.join().expect("no panic"));
        explored
    });
    explored.sort_by_key(|(case, _)| CASES.iter().position(|other| other.mutant == case.mutant));
    say(&format!("{:<24} steps  specified   states  violation", "mutant"));
    let alive = explored.iter().filter(|(case, explored)| !is_found(case, explored));
    let alive: Vec<_> = alive.map(|(case, _)| case.mutant).collect();
    assert!(alive.is_empty(), "not found, or too late: {alive:?}");
}

fn is_found(case: &Case, explored: &Explored) -> bool {
    let Explored { states, depth, found } = explored;
    let specified = case.specified.map_or(String::new(), |steps| format!("[{steps}]"));
    let words = found.as_ref().map_or("none", |found| &found.violation);
    let words: String = words.chars().take(100).collect();
    let name = format!("{:?}", case.mutant);
    say(&format!("{name:<24} {depth:5}  {specified:>9} {states:8}  {words}"));
    let is_asked =
        std::env::var("KAFOLD_MODEL_TELL").is_ok_and(|name| name == format!("{:?}", case.mutant));
    if let Some(found) = found
        && is_asked
    {
        println!("{}", found.history.join("\n"));
    }
    found.is_some() && *depth <= case.steps
}

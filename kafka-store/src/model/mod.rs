//! The exhaustive model check: the real writers and the real fold, in every history within bounds.
//!
//! Where the simulation plays long histories by chance, this plays all short ones: whatever callers,
//! producers, the broker and readers may do next is done, in every order. What is checked after each
//! step is what the protocol promises: an acknowledged commit is in the log once and where it was told;
//! what was denied never is; versions have no gaps and no expectation is passed over; answers to
//! conflicts and confirms were true at some moment of the call; a command is applied once; all
//! readers agree, those too that begin at a checkpoint; and nobody waits for ever.
//!
//! `KAFOLD_MODEL=large cargo test --release -p kafold-kafka-store model -- --nocapture` goes further
//! and tells its progress; the name of one of [`LARGE`] instead runs that one alone.
//!
//! - `bounds`: what may happen, and how often;
//! - `action`: what may happen next;
//! - `world`: one state, and the step to the next; `drive`: what writers are given and say;
//! - `log`: the way of records, and what goes wrong on it; `words`: all this to be read;
//! - `node`: one writer and what is around it; `readers`: those who read the log;
//! - `calls`: what was asked, and whether the answer holds;
//! - `explore`: breadth first through all states; `mixer`: their fingerprints;
//! - `mutants`: every rule that can be removed is missed.

mod action;
mod bounds;
mod calls;
mod drive;
mod explore;
mod log;
mod mixer;
mod mutants;
mod node;
mod readers;
mod words;
mod world;

use kafold_core::Clock;
use kafold_core::clock::SystemClock;

use bounds::Delivery::{CopiedLate, Late, NoOffset, SentTwice};
use bounds::Demand::{Any, Behind, Newest, Seen};
use bounds::{Bounds, Delivery, Left};
use explore::Explorer;

/// Two writers in turn, two commits, and one thing that goes wrong.
const BASE: Bounds = Bounds {
    writers: 2,
    left: Left { claims: 3, commits: 2, confirms: 0, faults: 1, crashes: 0 },
    demands: &[Seen],
    events: &[1],
    retries: false,
    asked_early: false,
    faults: &[NoOffset, Late, CopiedLate, SentTwice],
};
const NO_FAULTS: Left = Left { faults: 0, ..BASE.left };
const TWO_FAULTS: Left = Left { faults: 2, ..BASE.left };

/// Explored by every test run.
const SMALL: &[(&str, Bounds)] = &[
    ("commits", Bounds { demands: &[Any, Seen], faults: &[Late], ..BASE }),
    (
        "pairs",
        Bounds {
            left: Left { claims: 2, ..BASE.left },
            events: &[2],
            faults: Delivery::ALL_FAULTS,
            ..BASE
        },
    ),
    (
        "confirms",
        Bounds {
            left: Left { commits: 1, confirms: 1, ..BASE.left },
            demands: &[Seen, Newest, Behind],
            faults: &[NoOffset, Late],
            ..BASE
        },
    ),
    ("chains", Bounds { demands: &[Seen, Newest, Behind], faults: &[NoOffset, Late], ..BASE }),
    ("retries", Bounds { demands: &[Any], retries: true, faults: &[Late], ..BASE }),
    ("crashes", Bounds { left: Left { crashes: 1, ..BASE.left }, faults: &[Late], ..BASE }),
    ("asked-early", Bounds { left: NO_FAULTS, asked_early: true, ..BASE }),
];

/// Explored on demand.
const LARGE: &[(&str, Bounds)] = &[
    (
        "all-faults",
        Bounds { left: TWO_FAULTS, events: &[1, 2], faults: Delivery::ALL_FAULTS, ..BASE },
    ),
    (
        "many-confirms",
        Bounds {
            left: Left { confirms: 2, ..BASE.left },
            demands: &[Seen, Newest, Behind],
            ..BASE
        },
    ),
    (
        "three-writers",
        Bounds { writers: 3, left: Left { claims: 4, crashes: 1, ..BASE.left }, ..BASE },
    ),
    (
        "many-retries",
        Bounds {
            left: Left { commits: 3, ..BASE.left },
            demands: &[Any, Seen],
            retries: true,
            ..BASE
        },
    ),
    (
        "all-asked-early",
        Bounds {
            left: Left { confirms: 1, ..BASE.left },
            demands: &[Any, Seen],
            asked_early: true,
            ..BASE
        },
    ),
    (
        "three-commits",
        Bounds {
            left: Left { commits: 3, crashes: 1, ..BASE.left },
            demands: &[Seen, Behind],
            events: &[1, 2],
            ..BASE
        },
    ),
];

#[test]
fn no_history_breaks_a_promise() {
    let wanted = std::env::var("KAFOLD_MODEL").unwrap_or_default();
    let large = LARGE.iter().filter(|(name, _)| wanted == "large" || wanted == *name);
    let small = SMALL.iter().filter(|(name, _)| wanted.is_empty() || wanted == *name);
    for (name, bounds) in small.chain(large) {
        let is_loud = !wanted.is_empty();
        explore(name, bounds, is_loud);
    }
}

fn explore(name: &str, bounds: &Bounds, is_loud: bool) {
    let begun = SystemClock.instant();
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let explorer = Explorer { bounds: bounds.clone(), mutant: None, threads, is_loud };
    let explored = explorer.explore();
    let took = SystemClock.instant().duration_since(begun);
    let (states, depth) = (explored.states, explored.depth);
    crate::sim::say(&format!(
        "{name}: {states} states, histories of up to {depth} steps, {took:.1?}"
    ));
    if let Some(found) = explored.found {
        panic!("{}\n{}", found.violation, found.history.join("\n"));
    }
}

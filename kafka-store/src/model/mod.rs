//! The exhaustive model check: the real writers and the real fold, in all histories within bounds.

mod action;
mod bounds;
mod calls;
mod explore;
mod mutants;
mod node;
mod readers;
mod world;

use bounds::{Bounds, Delivery, Demand, Left};
use explore::Explorer;

fn small() -> Bounds {
    Bounds {
        writers: 2,
        left: Left { claims: 2, commits: 2, confirms: 1, faults: 1, crashes: 0 },
        demands: &[Demand::Any, Demand::Seen],
        events: &[1],
        retries: false,
        asked_early: false,
        faults: &[Delivery::NoOffset, Delivery::Late, Delivery::CopiedLate, Delivery::SentTwice],
    }
}

#[test]
fn small_is_fine() {
    let explorer = Explorer { bounds: small(), mutant: None, threads: 2, is_loud: true };
    let explored = explorer.explore();
    println!("{} states, {} steps", explored.states, explored.depth);
    if let Some(found) = explored.found {
        println!("{}\n{}", found.violation, found.history.join("\n"));
        panic!("broken");
    }
}

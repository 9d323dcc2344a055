//! The seeded simulation: the real fold, tail, index, writers and command handlers on a simulated
//! partition, with faults.
//!
//! A failing seed is printed; `KAFOLD_SIM_SEED=n cargo test -p kafold-kafka-store one_seed` plays it
//! again to the letter and shows its steps.

mod calls;
pub(crate) mod coverage;
mod handlers;
mod index;
mod mutants;
mod node;
mod random;
pub(crate) mod reference;
mod world;

use std::io::Write;

use coverage::{Coverage, State};
use reference::Violation;
use world::World;

/// Histories of a normal test run; `KAFOLD_SIM_SEEDS=FROM..TO` plays others.
const SEEDS: std::ops::Range<u64> = 0..10_000;

fn seeds() -> std::ops::Range<u64> {
    let named = std::env::var("KAFOLD_SIM_SEEDS").ok();
    let named = named.as_deref().and_then(|named| named.split_once(".."));
    named.map_or(SEEDS, |(from, to)| match (from.parse(), to.parse()) {
        (Ok(from), Ok(to)) => from..to,
        _ => panic!("KAFOLD_SIM_SEEDS is FROM..TO"),
    })
}

/// To the stream itself: what a passing test prints is not shown.
pub(crate) fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").expect("it is open");
}

/// One history, and what it met.
fn play(seed: u64) -> (Result<(), Violation>, Coverage) {
    let mut world = World::new(seed);
    let result = world.run();
    (result, world.coverage)
}

#[test]
fn no_history_breaks_a_promise() {
    let workers = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let coverage = std::thread::scope(|scope| {
        let played = (0..workers).map(|worker| scope.spawn(move || play_every(worker, workers)));
        let played: Vec<_> = played.collect();
        let mut coverage = Coverage::default();
        for worker in played {
            coverage.add(worker.join().expect("a worker that did not panic"));
        }
        coverage
    });
    say(&format!("histories {:?} met {:?}", seeds(), coverage.0));
    for state in State::ALL {
        assert!(coverage.0.contains_key(&state), "no history met {state:?}");
    }
}

fn play_every(first: u64, step: u64) -> Coverage {
    let mut coverage = Coverage::default();
    for seed in seeds().skip(first as usize).step_by(step as usize) {
        let (result, met) = play(seed);
        if let Err(violation) = result {
            panic!("KAFOLD_SIM_SEED={seed}: {violation}");
        }
        coverage.add(met);
    }
    coverage
}

/// Plays the history named by `KAFOLD_SIM_SEED` with all its steps.
#[test]
fn one_seed() {
    let Some(seed) = std::env::var("KAFOLD_SIM_SEED").ok().and_then(|seed| seed.parse().ok())
    else {
        return;
    };
    let mut world = World::new(seed);
    world.trace = Some(Vec::new());
    let result = world.run();
    for line in world.trace.unwrap_or_default() {
        println!("{line}");
    }
    result.expect("no promise is broken");
}

#[test]
fn the_same_seed_is_the_same_history() {
    let trace = |seed| {
        let mut world = World::new(seed);
        world.trace = Some(Vec::new());
        let result = world.run();
        (result, world.truth.log, world.coverage.0)
    };
    assert_eq!(trace(7), trace(7));
}

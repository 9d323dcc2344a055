//! Breadth first through all states: the first broken promise has one of the shortest histories.
//!
//! A frontier of whole states would not fit into memory. It is kept as the choices that lead to each,
//! in an order in which neighbours share most of their way, so that a state is made again from its
//! neighbour's by a step or two.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use kafold_core::Clock;
use kafold_core::clock::SystemClock;
use kafold_core::mutant::{self, Mutant};

use super::bounds::Bounds;
use super::mixer::Mixer;
use super::world::World;
use crate::sim::reference::Violation;

/// What an exploration came to.
pub(super) struct Explored {
    pub(super) states: usize,
    /// Steps of the longest history.
    pub(super) depth: usize,
    pub(super) found: Option<Found>,
}

/// A shortest history that breaks a promise.
pub(super) struct Found {
    pub(super) violation: Violation,
    pub(super) history: Vec<String>,
}

pub(super) struct Explorer {
    pub(super) bounds: Bounds,
    pub(super) mutant: Option<Mutant>,
    pub(super) threads: usize,
    /// Whether each level is told.
    pub(super) is_loud: bool,
}

impl Explorer {
    pub(super) fn explore(&self) -> Explored {
        let now = SystemClock.instant();
        let root = World::new(self.bounds.clone(), now);
        let visited = Visited::default();
        visited.insert(root.fingerprint());
        let mut level = vec![Chunk { bytes: vec![0], paths: 1 }];
        let mut depth = 0;
        loop {
            let next = match self.next_level(now, &visited, &level, depth) {
                Ok(next) => next,
                Err(broken) => {
                    let (states, depth) = (visited.len(), broken.choices.len());
                    return Explored { states, depth, found: Some(self.retell(root, &broken)) };
                }
            };
            if next.is_empty() {
                return Explored { states: visited.len(), depth, found: None };
            }
            depth += 1;
            level = next;
            if self.is_loud {
                let paths: usize = level.iter().map(|chunk| chunk.paths).sum();
                println!("  {depth:3} steps: {paths:9} new states, {:10} in all", visited.len());
            }
        }
    }

    /// All states one step further, unless some step breaks a promise.
    fn next_level(
        &self,
        now: Instant,
        visited: &Visited,
        level: &[Chunk],
        depth: usize,
    ) -> Result<Vec<Chunk>, Broken> {
        let (begun, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || {
            mutant::with(self.mutant, || {
                let root = World::new(self.bounds.clone(), now);
                let mut next = Frontier::default();
                while !stop.load(Ordering::Relaxed)
                    && let Some(chunk) = level.get(begun.fetch_add(1, Ordering::Relaxed))
                {
                    if let Err(broken) = expand(&root, visited, chunk, depth, &mut next) {
                        stop.store(true, Ordering::Relaxed);
                        return Err(broken);
                    }
                }
                next.chunks.retain(|chunk| chunk.paths > 0);
                Ok(next.chunks)
            })
        };
        let parts = std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            parts.extend(others.into_iter().map(|other| other.join().expect("no panic")));
            parts
        });
        Ok(parts.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
    }

    /// The history once more, in words.
    fn retell(&self, mut world: World, broken: &Broken) -> Found {
        world.notes = Some(Vec::new());
        let violation = mutant::with(self.mutant, || {
            broken.choices.iter().find_map(|choice| {
                let action = world.actions()[usize::from(*choice)];
                world.step(action).err()
            })
        });
        Found {
            violation: violation.unwrap_or_else(|| "nobody will ever answer".into()),
            history: world.notes.unwrap_or_default(),
        }
    }
}

/// The choices that break a promise.
struct Broken {
    choices: Vec<u8>,
}

fn expand(
    root: &World,
    visited: &Visited,
    chunk: &Chunk,
    depth: usize,
    next: &mut Frontier,
) -> Result<(), Broken> {
    let mut worlds = vec![root.clone()];
    let mut choices = Vec::with_capacity(depth + 1);
    let mut bytes = chunk.bytes.iter().copied();
    next.begin_chunk();
    while let Some(shared) = bytes.next() {
        choices.truncate(shared.into());
        worlds.truncate(usize::from(shared) + 1);
        for choice in bytes.by_ref().take(depth - usize::from(shared)) {
            let world = &worlds[worlds.len() - 1];
            let action = world.actions()[usize::from(choice)];
            let after = world.after(action).expect("this step broke no promise before");
            worlds.push(after);
            choices.push(choice);
        }
        let world = &worlds[worlds.len() - 1];
        if world.is_stuck() {
            return Err(Broken { choices });
        }
        for (choice, action) in (0..).zip(world.actions()) {
            choices.push(choice);
            match world.after(action) {
                Err(_) => return Err(Broken { choices }),
                Ok(after) if visited.insert(after.fingerprint()) => next.push(&choices),
                Ok(_) => {}
            }
            choices.pop();
        }
    }
    Ok(())
}

/// Ways of one length: for each, how many choices it shares with the one before, and the others.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    paths: usize,
}

/// The next level as far as one thread has found it.
#[derive(Default)]
struct Frontier {
    chunks: Vec<Chunk>,
    last: Vec<u8>,
}

impl Frontier {
    /// Ways in one chunk: a chunk is one thread's work, and its first way is made from the beginning.
    const PATHS_MAX: usize = 4_096;

    fn begin_chunk(&mut self) {
        if self.chunks.last().is_some_and(|last| last.paths < Self::PATHS_MAX / 4) {
            return;
        }
        self.chunks.push(Chunk::default());
        self.last.clear();
    }

    fn push(&mut self, choices: &[u8]) {
        if self.chunks.last().is_none_or(|last| last.paths == Self::PATHS_MAX) {
            self.chunks.push(Chunk::default());
            self.last.clear();
        }
        let shared = self.last.iter().zip(choices).take_while(|(one, other)| one == other).count();
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.bytes.push(shared as u8);
            chunk.bytes.extend_from_slice(&choices[shared..]);
            chunk.paths += 1;
        }
        self.last.clear();
        self.last.extend_from_slice(choices);
    }
}

/// The fingerprints of all states so far, in parts, so that threads seldom wait for each other.
struct Visited([Mutex<HashSet<u64, BuildHasherDefault<Mixer>>>; 256]);

impl Default for Visited {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Visited {
    /// Whether it is new.
    fn insert(&self, fingerprint: u64) -> bool {
        let part = &self.0[(fingerprint >> 56) as usize];
        part.lock().expect("no thread panics meanwhile").insert(fingerprint)
    }

    fn len(&self) -> usize {
        self.0.iter().map(|part| part.lock().expect("no thread panics meanwhile").len()).sum()
    }
}

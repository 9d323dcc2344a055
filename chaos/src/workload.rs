//! Clients that ask the nodes for things all the time, and write down what they are told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kafold::Clock;
use kafold::clock::SystemClock;
use tokio::sync::{RwLock, watch};
use uuid::Uuid;

use crate::cluster::{NoAnswer, NodePlace};
use crate::domain::{GROUPS, TallyCommand};
use crate::history::{Answer, CommandLine, Line, ReadLine};
use crate::node::{Ask, Said};
use crate::random::Random;
use crate::recorder::Recorder;

/// Clients at once.
pub const CLIENTS: u64 = 16;
/// Streams that are in use at once: few, so that clients meet on them.
const STREAMS_MAX: usize = 120;
/// Commands that are remembered, to be sent again long after.
const COMMANDS_MAX: usize = 2_000;
/// Attempts of one command while its outcome is not known.
const ATTEMPTS_MAX: u32 = 25;
const RETRY_WAIT: Duration = Duration::from_millis(200);

/// What the clients share.
pub struct Workload {
    nodes: Arc<Vec<NodePlace>>,
    recorder: Arc<Recorder>,
    shared: Mutex<Shared>,
    /// Held for reading by every client that is at work.
    turn: RwLock<()>,
    done: watch::Sender<bool>,
}

#[derive(Default)]
struct Shared {
    streams: VecDeque<Known>,
    commands: VecDeque<(Uuid, String, TallyCommand, Option<u64>)>,
    streams_made: u64,
}

/// A stream, and the highest version that a client was told.
#[derive(Debug, Clone)]
struct Known {
    id: String,
    group: u64,
    version: u64,
}

impl Workload {
    /// Nobody asks yet.
    pub fn new(nodes: Arc<Vec<NodePlace>>, recorder: Arc<Recorder>) -> Arc<Self> {
        let (done, _) = watch::channel(false);
        let (shared, turn) = (Mutex::default(), RwLock::new(()));
        Arc::new(Self { nodes, recorder, shared, turn, done })
    }

    /// Sends the clients off.
    pub fn spawn(self: &Arc<Self>, random: &mut Random) {
        for client in 0..CLIENTS {
            let mut random = Random(random.any() ^ client);
            let workload = Arc::clone(self);
            tokio::spawn(async move {
                while !*workload.done.borrow() {
                    let wait = Duration::from_millis(random.of(20..200));
                    SystemClock.sleep(wait).await;
                    let _at_work = workload.turn.read().await;
                    if !*workload.done.borrow() {
                        workload.step(&mut random).await;
                    }
                }
            });
        }
    }

    /// Nobody is at work while the guard lives.
    pub async fn pause(&self) -> tokio::sync::RwLockWriteGuard<'_, ()> {
        self.turn.write().await
    }

    /// Sends the clients home.
    pub fn end(&self) {
        self.done.send_replace(true);
    }

    async fn step(&self, random: &mut Random) {
        match random.of(0..100) {
            0..=24 => self.read(random).await,
            25..=29 => self.again(random).await,
            _ => {
                let (known, ask, expected) = self.choose(random);
                let command =
                    Uuid::from_u128(u128::from(random.any()) << 64 | u128::from(random.any()));
                self.command(command, known.id, ask, expected, random).await;
            }
        }
    }

    /// A stream that is in use, or a new one, and what to do with it.
    fn choose(&self, random: &mut Random) -> (Known, TallyCommand, Option<u64>) {
        let known = {
            let mut shared = self.shared();
            if shared.streams.len() < STREAMS_MAX / 4 || random.chance(8) {
                let group = random.of(0..GROUPS);
                let id = format!("tally-{}", shared.streams_made);
                shared.streams_made += 1;
                shared.streams.push_back(Known { id, group, version: 0 });
                if shared.streams.len() > STREAMS_MAX {
                    shared.streams.pop_front();
                }
            }
            let place = random.of(0..shared.streams.len() as u64) as usize;
            shared.streams[place].clone()
        };
        let group = known.group;
        let ask = if random.chance(3) {
            TallyCommand::Close { group }
        } else {
            let amounts = (0..random.of(1..5)).map(|_| random.of(1..40)).collect();
            TallyCommand::Add { group, amounts }
        };
        let expected = match random.of(0..10) {
            0..=5 => None,
            6 => Some(known.version + random.of(1..3)),
            _ => Some(known.version),
        };
        (known, ask, expected)
    }

    /// One command until its outcome is known.
    async fn command(
        &self,
        command: Uuid,
        stream: String,
        ask: TallyCommand,
        expected: Option<u64>,
        random: &mut Random,
    ) {
        let sent = (command, stream.clone(), ask.clone(), expected);
        {
            let mut shared = self.shared();
            shared.commands.push_back(sent);
            if shared.commands.len() > COMMANDS_MAX {
                shared.commands.pop_front();
            }
        }
        for _ in 0..ATTEMPTS_MAX {
            match self.attempt(command, &stream, &ask, expected, random).await {
                Some(Answer::Unknown(_)) => {}
                // Whether it is tried again is the caller's to decide: half of them do not.
                Some(Answer::Failed(_)) if random.chance(50) => {}
                Some(_) => return,
                None => {}
            }
            SystemClock.sleep(RETRY_WAIT).await;
        }
    }

    /// A command of long ago comes again: nothing may come of it twice.
    async fn again(&self, random: &mut Random) {
        let old = {
            let shared = self.shared();
            let place = random.of(0..shared.commands.len() as u64) as usize;
            shared.commands.get(place).cloned()
        };
        if let Some((command, stream, ask, expected)) = old {
            self.attempt(command, &stream, &ask, expected, random).await;
        }
    }

    /// Asks some node; `None` when it was down and not asked.
    async fn attempt(
        &self,
        command: Uuid,
        stream: &str,
        ask: &TallyCommand,
        expected: Option<u64>,
        random: &mut Random,
    ) -> Option<Answer> {
        let node = random.of(0..self.nodes.len() as u64) as usize;
        let asked = Ask::Command { stream: stream.to_owned(), command, ask: ask.clone(), expected };
        let begun = self.recorder.now();
        let answer = match self.nodes[node].ask(asked).await {
            Ok(Said::Answer(answer)) => answer,
            Ok(other) => Answer::Unknown(format!("{other:?}")),
            Err(NoAnswer::Down) => return None,
            Err(error) => Answer::Unknown(error.to_string()),
        };
        if let Answer::Appended { version, .. } = &answer {
            let mut shared = self.shared();
            if let Some(known) = shared.streams.iter_mut().find(|known| known.id == stream) {
                known.version = known.version.max(*version);
            }
        }
        self.recorder.add(Line::Command(CommandLine {
            command,
            stream: stream.to_owned(),
            ask: ask.clone(),
            expected,
            node,
            begun,
            ended: self.recorder.now(),
            answer: answer.clone(),
        }));
        Some(answer)
    }

    async fn read(&self, random: &mut Random) {
        let stream = {
            let shared = self.shared();
            let place = random.of(0..shared.streams.len() as u64) as usize;
            shared.streams.get(place).map(|known| known.id.clone())
        };
        let Some(stream) = stream else { return };
        let node = random.of(0..self.nodes.len() as u64) as usize;
        let (begun, confirm) = (self.recorder.now(), random.chance(50));
        let asked = Ask::Read { stream: stream.clone(), confirm };
        if let Ok(Said::Stream { events, confirmed }) = self.nodes[node].ask(asked).await {
            let ended = self.recorder.now();
            let read = ReadLine { stream, node, begun, ended, events, confirmed };
            self.recorder.add(Line::Read(read));
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

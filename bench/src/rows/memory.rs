//! R12: memory that a hot stream costs the command handler, against a map of states. Each is measured in
//! a process of its own, as what the process has more after than before.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use async_trait::async_trait;
use fastrand::Rng;
use futures_util::FutureExt;
use futures_util::future::ready;
use futures_util::stream::{self, BoxStream, StreamExt};
use kafold::clock::RandomIds;
use kafold::handler::HandlerConfig;
use kafold::store::{Append, Appended, Health, Outcome, View};
use kafold::{
    Aggregate, CommandHandler, CommandId, EventStore, ExpectedVersion, IdGenerator, Offset,
    Partition, Position, ReadError, RecordedEvent, StreamId, Version,
};
use lru::LruCache;
use tokio::process::Command;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::Failure;
use crate::domain::{Account, Deposit};
use crate::harness::{Bench, Goal, Sample};

const GOAL: f64 = 1.5;

/// What is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kept {
    /// Streams by a command handler.
    Handler,
    /// States by their id in a map.
    Map,
    /// What a handler by hand needs of each stream, the one used longest ago first to go.
    ByHand,
}

/// A stream as [`Kept::ByHand`] keeps it: commands of one stream take turns, a version is expected, and
/// a command that is sent again is answered.
#[derive(Default)]
struct Stream {
    state: Account,
    version: Version,
    commands: Vec<(CommandId, Version, Position)>,
}

/// One command on each stream.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let streams = bench.size.of(20_000, 200_000, 1_000_000);
    let figures = [("bytes", Goal::AtMost(GOAL))];
    let ours = async || measured("handler", streams).await;
    let map = async || measured("map", streams).await;
    bench.compare("R12", format!("a stream, {streams} of them"), &figures, ours, &map).await?;
    bench.note("the handler alone: a writer keeps versions of the streams in use beside it");
    let by_hand = async || measured("by-hand", streams).await;
    let case = "without kafold: least recently used, with lock, version and command";
    bench.compare("R12", case, &[("bytes", Goal::Stated)], by_hand, map).await?;
    Ok(())
}

async fn measured(kept: &str, streams: u64) -> Result<Sample, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.args(["memory", kept, &streams.to_string()]).output().await?;
    let said = String::from_utf8_lossy(&output.stdout);
    let bytes: f64 = said.trim().parse().map_err(|_| format!("{command:?} said {said:?}"))?;
    Ok(Sample::from([("bytes", bytes / streams as f64)]))
}

/// Bytes that so many streams need; for a process of its own.
pub async fn measure(kept: Kept, streams: u64) -> Result<u64, Failure> {
    let before = resident_bytes()?;
    match kept {
        Kept::Handler => {
            let hot_states_max = streams as usize;
            let config = HandlerConfig { hot_states_max, ..HandlerConfig::default() };
            let handler = CommandHandler::<Account>::new(Arc::new(Agreeing)).config(config);
            let command = Deposit::of_bytes(64, &mut Rng::with_seed(7));
            for _ in 0..streams {
                let id = RandomIds.event_id();
                handler.handle_with(&id.to_string(), &command, CommandId(id)).await?;
            }
            let after = resident_bytes()?;
            assert_eq!(handler.hot_states(), hot_states_max);
            Ok(after - before)
        }
        Kept::Map => {
            let mut states: HashMap<Uuid, Account> = HashMap::new();
            let event = Deposit::of_bytes(64, &mut Rng::with_seed(7)).event();
            for _ in 0..streams {
                states.entry(RandomIds.event_id()).or_default().evolve(&event);
            }
            let after = resident_bytes()?;
            assert_eq!(states.len() as u64, streams);
            Ok(after - before)
        }
        Kept::ByHand => {
            let limit = NonZeroUsize::new(streams as usize).unwrap_or(NonZeroUsize::MIN);
            let mut kept = LruCache::<StreamId, Arc<Mutex<Stream>>>::new(limit);
            let event = Deposit::of_bytes(64, &mut Rng::with_seed(7)).event();
            for _ in 0..streams {
                let id = RandomIds.event_id();
                let name = StreamId::new(Account::CATEGORY, &id.to_string())?;
                let stream = Arc::clone(kept.get_or_insert(name, Arc::default));
                let mut stream = stream.lock().await;
                stream.state.evolve(&event);
                stream.version = stream.version.plus(1);
                let position = Position { partition: Partition(0), offset: Offset(0) };
                let command = (CommandId(id), stream.version, position);
                stream.commands.reserve_exact(1);
                stream.commands.push(command);
            }
            let after = resident_bytes()?;
            assert_eq!(kept.len() as u64, streams);
            Ok(after - before)
        }
    }
}

/// What this process has in memory.
pub(crate) fn resident_bytes() -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kib.ok_or("this system does not tell a process's memory")? * 1_024)
}

/// A store that takes everything and keeps nothing.
struct Agreeing;

#[async_trait]
impl EventStore for Agreeing {
    fn submit(&self, append: Append) -> Outcome<Appended> {
        let before = match append.expected {
            ExpectedVersion::Exact(version) => version,
            _ => Version::EMPTY,
        };
        let version = before.plus(append.commit.count());
        let position = Position { partition: Partition(0), offset: Offset(version.0) };
        ready(Ok(Appended { version, position, duplicate: false })).boxed()
    }

    fn confirm(&self, _: View) -> Outcome<()> {
        ready(Ok(())).boxed()
    }

    fn read(
        &self,
        _: &StreamId,
        _: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        stream::empty().boxed()
    }

    async fn find_command(
        &self,
        _: &StreamId,
        _: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        Ok(None)
    }

    fn health(&self) -> Health {
        Health::Ready
    }
}

//! What is broken, for how long, and how it is mended: drawn from a seed.

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use kafold::Clock;
use kafold::clock::{SystemClock, within};
use kafold::projections::sqlx;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::Failure;
use crate::cluster::NodePlace;
use crate::proxy::Line;
use crate::random::Random;
use crate::recorder::Recorder;
use crate::servers::{BROKERS, PARTITIONS, Servers};

/// Everything that can be broken. Who breaks one of them holds its lock until it is mended.
pub struct Faults {
    servers: Arc<Servers>,
    nodes: Arc<Vec<NodePlace>>,
    recorder: Arc<Recorder>,
    /// One broker at a time: two would be below `min.insync.replicas`.
    broker: Mutex<()>,
    database: Mutex<()>,
    lines: Vec<Mutex<()>>,
    node_locks: Vec<Mutex<()>>,
    /// Where broker 3 keeps its data on a small file system of its own.
    small_disk: Option<PathBuf>,
    /// The kinds that are drawn; all when empty.
    only: Vec<String>,
}

/// One fault, drawn and not yet begun.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Line(usize, LineFault, Duration),
    BrokerKill(usize, Duration),
    BrokerPause(usize, Duration),
    BrokerRestart(usize),
    RollingRestart,
    LeaderMove(u32, usize),
    NodeKill(usize, Duration),
    NodePause(usize, Duration),
    NodeStop(usize, Duration),
    DatabaseKill(Duration),
    DatabaseTerminate,
    DatabaseLock(Duration),
    DiskFull(Duration),
}

/// The kinds of faults, as histories and reports name them.
pub const KINDS: [&str; 17] = [
    "broker-killed",
    "broker-paused",
    "broker-restarted",
    "database-killed",
    "database-locked",
    "database-terminated",
    "disk-full",
    "leader-moved",
    "line-cut",
    "line-delayed",
    "line-dripping",
    "line-half-open",
    "node-killed",
    "node-paused",
    "node-stopped",
    "request-held",
    "rolling-restart",
];

#[derive(Debug, Clone, Copy)]
enum LineFault {
    Becomes(Line),
    HoldsNext,
}

impl Fault {
    /// As histories and reports name it.
    fn kind(&self) -> &'static str {
        match self {
            Self::Line(_, LineFault::Becomes(line), _) => match line {
                Line::Good => "line-good",
                Line::Cut => "line-cut",
                Line::HalfOpen { .. } => "line-half-open",
                Line::Delayed(_) => "line-delayed",
                Line::Dripping(_) => "line-dripping",
            },
            Self::Line(_, LineFault::HoldsNext, _) => "request-held",
            Self::BrokerKill(..) => "broker-killed",
            Self::BrokerPause(..) => "broker-paused",
            Self::BrokerRestart(_) => "broker-restarted",
            Self::RollingRestart => "rolling-restart",
            Self::LeaderMove(..) => "leader-moved",
            Self::NodeKill(..) => "node-killed",
            Self::NodePause(..) => "node-paused",
            Self::NodeStop(..) => "node-stopped",
            Self::DatabaseKill(_) => "database-killed",
            Self::DatabaseTerminate => "database-terminated",
            Self::DatabaseLock(_) => "database-locked",
            Self::DiskFull(_) => "disk-full",
        }
    }
}

/// Between two faults.
const PAUSE_MS: std::ops::Range<u64> = 1_500..5_000;
/// The longest a fault takes, before it is mended.
const FAULT_MS: std::ops::Range<u64> = 500..9_000;
/// The broker that keeps its data on the small file system, if there is one.
pub const SMALL_DISK_BROKER: usize = 3;

impl Faults {
    /// All is well.
    pub fn new(
        servers: Arc<Servers>,
        nodes: Arc<Vec<NodePlace>>,
        recorder: Arc<Recorder>,
        small_disk: Option<PathBuf>,
        only: Vec<String>,
    ) -> Arc<Self> {
        let lines = servers.proxies.iter().map(|_| Mutex::default()).collect();
        let node_locks = nodes.iter().map(|_| Mutex::default()).collect();
        let (broker, database) = (Mutex::default(), Mutex::default());
        Arc::new(Self {
            servers,
            nodes,
            recorder,
            broker,
            database,
            lines,
            node_locks,
            small_disk,
            only,
        })
    }

    /// Breaks things for so long; when it returns, everything is mended.
    /// Ends early when it is asked to stop.
    pub async fn run(
        self: &Arc<Self>,
        time: Duration,
        random: &mut Random,
        stop: impl Future<Output = ()>,
    ) -> Result<(), Failure> {
        let mut stop = pin!(stop);
        let until = SystemClock.instant() + time;
        let mut under_way = JoinSet::new();
        while SystemClock.instant() < until {
            let pause = Duration::from_millis(random.of(PAUSE_MS));
            if within(&SystemClock, pause, stop.as_mut()).await.is_some() {
                break;
            }
            let fault = self.draw(random);
            let faults = Arc::clone(self);
            under_way.spawn(async move {
                faults.commit(fault).await.map_err(|error| format!("{fault:?}: {error}"))
            });
            while let Some(ended) = under_way.try_join_next() {
                ended??;
            }
        }
        while let Some(ended) = under_way.join_next().await {
            ended??;
        }
        Ok(())
    }

    fn draw(&self, random: &mut Random) -> Fault {
        loop {
            let fault = self.draw_any(random);
            if self.only.is_empty() || self.only.iter().any(|kind| kind == fault.kind()) {
                return fault;
            }
        }
    }

    fn draw_any(&self, random: &mut Random) -> Fault {
        let time = Duration::from_millis(random.of(FAULT_MS));
        let broker = random.of(1..BROKERS as u64 + 1) as usize;
        let node = random.of(0..self.nodes.len() as u64) as usize;
        match random.of(0..100) {
            0..=5 => Fault::Line(broker, LineFault::Becomes(Line::Cut), time),
            6..=13 => {
                let (requests, replies) =
                    [(true, true), (true, false), (false, true)][random.of(0..3) as usize];
                let line = Line::HalfOpen { requests, replies };
                Fault::Line(broker, LineFault::Becomes(line), time)
            }
            14..=19 => {
                let line = Line::Delayed(Duration::from_millis(random.of(20..1_500)));
                Fault::Line(broker, LineFault::Becomes(line), time)
            }
            20..=23 => {
                let line = Line::Dripping(random.of(500..20_000));
                Fault::Line(broker, LineFault::Becomes(line), time)
            }
            24..=37 => Fault::Line(broker, LineFault::HoldsNext, time),
            38..=43 => Fault::BrokerKill(broker, time),
            44..=49 => Fault::BrokerPause(broker, time),
            50..=51 => Fault::BrokerRestart(broker),
            52 => Fault::RollingRestart,
            53..=56 => Fault::LeaderMove(random.of(0..u64::from(PARTITIONS)) as u32, broker),
            57..=67 => Fault::NodeKill(node, time),
            68..=77 => Fault::NodePause(node, time),
            78..=83 => Fault::NodeStop(node, time),
            84..=87 => Fault::DatabaseKill(time),
            88..=91 => Fault::DatabaseTerminate,
            92..=95 => Fault::DatabaseLock(time),
            _ if self.small_disk.is_some() => Fault::DiskFull(time),
            _ => Fault::NodeKill(node, time),
        }
    }

    /// Breaks one thing and mends it. What is broken already is left alone.
    async fn commit(&self, fault: Fault) -> Result<(), Failure> {
        let say = |what: String| self.recorder.fault(fault.kind(), what);
        match fault {
            Fault::Line(broker, line, time) => {
                let Ok(_mine) = self.lines[broker - 1].try_lock() else { return Ok(()) };
                say(format!("broker {broker} for {time:?}: {line:?}"));
                self.break_line(broker, line, time).await;
                self.recorder.fault("mended", format!("the line to broker {broker}"));
                Ok(())
            }
            Fault::BrokerKill(broker, time) => {
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say(format!("broker {broker} for {time:?}"));
                self.servers.broker("stop-node", broker, &["--kill"]).await?;
                SystemClock.sleep(time).await;
                self.start_broker(broker).await
            }
            Fault::BrokerPause(broker, time) => {
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say(format!("broker {broker} for {time:?}"));
                self.servers.broker("pause-node", broker, &[]).await?;
                SystemClock.sleep(time).await;
                self.servers.broker("resume-node", broker, &[]).await?;
                self.recorder.fault("mended", format!("broker {broker} runs on"));
                Ok(())
            }
            Fault::BrokerRestart(broker) => {
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say(format!("broker {broker}"));
                self.restart_broker(broker).await
            }
            Fault::RollingRestart => {
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say("one broker after another".to_owned());
                for broker in 1..=BROKERS {
                    self.restart_broker(broker).await?;
                }
                Ok(())
            }
            Fault::LeaderMove(partition, broker) => {
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say(format!("partition {partition} to broker {broker}"));
                // A replica that lags cannot be elected: nothing moves then.
                if let Err(error) = self.servers.lead(partition, broker).await {
                    tracing::info!("no leader was moved: {error}");
                }
                Ok(())
            }
            Fault::NodeKill(node, time) | Fault::NodeStop(node, time) => {
                let Ok(_mine) = self.node_locks[node].try_lock() else { return Ok(()) };
                say(format!("node {node} for {time:?}"));
                match fault {
                    Fault::NodeStop(..) => self.nodes[node].stop().await?,
                    _ => self.nodes[node].kill().await?,
                }
                SystemClock.sleep(time).await;
                self.nodes[node].start()?;
                self.recorder.fault("mended", format!("node {node} is started"));
                Ok(())
            }
            Fault::NodePause(node, time) => {
                let Ok(_mine) = self.node_locks[node].try_lock() else { return Ok(()) };
                say(format!("node {node} for {time:?}"));
                self.nodes[node].signal("STOP").await?;
                SystemClock.sleep(time).await;
                self.nodes[node].signal("CONT").await?;
                self.recorder.fault("mended", format!("node {node} runs on"));
                Ok(())
            }
            Fault::DatabaseKill(time) => {
                let Ok(_mine) = self.database.try_lock() else { return Ok(()) };
                say(format!("for {time:?}"));
                self.servers.postgres("stop", &["--kill"]).await?;
                SystemClock.sleep(time).await;
                self.servers.postgres("start", &[]).await?;
                self.recorder.fault("mended", "the database runs");
                Ok(())
            }
            Fault::DatabaseTerminate => {
                let Ok(_mine) = self.database.try_lock() else { return Ok(()) };
                say("every connection of the nodes".to_owned());
                let query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                             WHERE usename = current_user AND pid <> pg_backend_pid()";
                sqlx::query(query).execute(&self.servers.pool).await?;
                Ok(())
            }
            Fault::DatabaseLock(time) => {
                let Ok(_mine) = self.database.try_lock() else { return Ok(()) };
                say(format!("checkpoints and index for {time:?}"));
                #[expect(clippy::disallowed_methods, reason = "the campaign's own pool")]
                let mut tx = self.servers.pool.begin().await?;
                let lock =
                    "LOCK TABLE kafold_checkpoint, kafold_partition IN ACCESS EXCLUSIVE MODE";
                sqlx::query(lock).execute(&mut *tx).await?;
                SystemClock.sleep(time).await;
                tx.rollback().await?;
                self.recorder.fault("mended", "the tables are free");
                Ok(())
            }
            Fault::DiskFull(time) => {
                let Some(folder) = &self.small_disk else { return Ok(()) };
                let Ok(_mine) = self.broker.try_lock() else { return Ok(()) };
                say(format!("broker {SMALL_DISK_BROKER} for {time:?}"));
                self.fill_disk(folder, time).await
            }
        }
    }

    async fn break_line(&self, broker: usize, fault: LineFault, time: Duration) {
        let proxy = &self.servers.proxies[broker - 1];
        match fault {
            LineFault::Becomes(line) => {
                proxy.set(line);
                SystemClock.sleep(time).await;
                proxy.set(Line::Good);
            }
            LineFault::HoldsNext => {
                proxy.hold_next(time);
                SystemClock.sleep(time).await;
                proxy.release();
            }
        }
    }

    async fn restart_broker(&self, broker: usize) -> Result<(), Failure> {
        self.servers.broker("stop-node", broker, &[]).await?;
        self.start_broker(broker).await
    }

    async fn start_broker(&self, broker: usize) -> Result<(), Failure> {
        self.servers.broker("start-node", broker, &[]).await?;
        self.recorder.fault("mended", format!("broker {broker} runs"));
        Ok(())
    }

    /// The broker notices by itself that it cannot write, and ends.
    async fn fill_disk(&self, folder: &Path, time: Duration) -> Result<(), Failure> {
        let filler = folder.join("filler");
        let full = fs::File::create(&filler)
            .and_then(|mut file| std::io::copy(&mut std::io::repeat(0), &mut file).map(drop));
        if full.is_ok() {
            return Err("the small file system has no end".into());
        }
        SystemClock.sleep(time).await;
        fs::remove_file(&filler)?;
        self.servers.broker("stop-node", SMALL_DISK_BROKER, &["--kill"]).await?;
        self.start_broker(SMALL_DISK_BROKER).await
    }
}

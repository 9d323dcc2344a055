//! The nodes of the service: processes that are started, asked, frozen and killed.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kafold::Clock;
use kafold::clock::{SystemClock, within};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};

use crate::Failure;
use crate::node::{Ask, Call, Reply, Said};

/// How long a node is waited for: longer than any deadline of its own.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(12);
/// How long a node may take to end by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);
/// How long a node may take to be ready when nothing is broken.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// One place for a process.
pub struct NodePlace {
    number: usize,
    arguments: [String; 4],
    log: PathBuf,
    running: Mutex<Option<Running>>,
    /// It was told to end, or killed.
    may_end: Arc<AtomicBool>,
    /// Why a process ended though nobody told it to.
    ended: Arc<Mutex<Vec<String>>>,
    calls: AtomicU64,
}

struct Running {
    child: Child,
    lines: mpsc::UnboundedSender<Vec<u8>>,
    pending: Pending,
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Said>>>>;

/// Why a node gave no answer.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub enum NoAnswer {
    /// It is not there, and was not asked.
    #[error("the node is down")]
    Down,
    /// It was asked, and ended.
    #[error("the node ended")]
    Ended,
    /// It was asked, and said nothing in time.
    #[error("the node gave no answer in time")]
    Late,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NodePlace {
    /// A place without a process; what it logs goes to `folder`.
    pub fn new(number: usize, log: &str, database: &str, folder: &std::path::Path) -> Self {
        let arguments = ["--log", log, "--database", database].map(str::to_owned);
        Self {
            number,
            arguments,
            log: folder.join(format!("node-{number}.log")),
            running: Mutex::new(None),
            may_end: Arc::new(AtomicBool::new(false)),
            ended: Arc::default(),
            calls: AtomicU64::new(0),
        }
    }

    /// Starts a process, unless one runs.
    pub fn start(&self) -> Result<(), Failure> {
        let mut running = lock(&self.running);
        if running.is_some() {
            return Ok(());
        }
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("node").args(&self.arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);
        let mut child = command.spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a node without pipes".into());
        };
        let (lines, written) = mpsc::unbounded_channel();
        let pending = Pending::default();
        self.may_end.store(false, Ordering::SeqCst);
        tokio::spawn(write(stdin, written));
        let ending = Ending {
            number: self.number,
            may_end: Arc::clone(&self.may_end),
            ended: Arc::clone(&self.ended),
        };
        tokio::spawn(read(stdout, Arc::clone(&pending), ending));
        *running = Some(Running { child, lines, pending });
        Ok(())
    }

    /// Asks it, and waits for the answer for [`ANSWER_TIMEOUT`] at most.
    pub async fn ask(&self, ask: Ask) -> Result<Said, NoAnswer> {
        let answer = {
            let running = lock(&self.running);
            let Some(running) = running.as_ref() else { return Err(NoAnswer::Down) };
            let id = self.calls.fetch_add(1, Ordering::SeqCst);
            let mut line = serde_json::to_vec(&Call { id, ask }).unwrap_or_default();
            line.push(b'\n');
            let (said, answer) = oneshot::channel();
            lock(&running.pending).insert(id, said);
            if running.lines.send(line).is_err() {
                return Err(NoAnswer::Ended);
            }
            answer
        };
        match within(&SystemClock, ANSWER_TIMEOUT, answer).await {
            Some(Ok(said)) => Ok(said),
            Some(Err(_)) => Err(NoAnswer::Ended),
            None => Err(NoAnswer::Late),
        }
    }

    /// Sends it a signal, such as `STOP`.
    pub async fn signal(&self, name: &str) -> Result<(), Failure> {
        let pid = lock(&self.running).as_ref().and_then(|running| running.child.id());
        let Some(pid) = pid else { return Ok(()) };
        Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().await?;
        Ok(())
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(&self) -> Result<(), Failure> {
        self.may_end.store(true, Ordering::SeqCst);
        let running = lock(&self.running).take();
        if let Some(Running { mut child, .. }) = running {
            child.kill().await?;
        }
        Ok(())
    }

    /// SIGTERM, and waits until it has ended by itself.
    pub async fn stop(&self) -> Result<(), Failure> {
        self.may_end.store(true, Ordering::SeqCst);
        self.signal("TERM").await?;
        let running = lock(&self.running).take();
        if let Some(Running { mut child, lines: _lines, .. }) = running {
            match within(&SystemClock, STOP_TIMEOUT, child.wait()).await {
                Some(status) if status.as_ref().is_ok_and(std::process::ExitStatus::success) => {}
                Some(status) => return Err(format!("node {}: {status:?}", self.number).into()),
                None => return Err(format!("node {} does not end", self.number).into()),
            }
        }
        Ok(())
    }

    /// Waits until it is ready.
    pub async fn ready(&self) -> Result<(), Failure> {
        let begun = SystemClock.instant();
        loop {
            let said = self.ask(Ask::Status).await;
            if matches!(&said, Ok(Said::Status(complaints)) if complaints.is_empty()) {
                return Ok(());
            }
            if SystemClock.instant() - begun > READY_TIMEOUT {
                return Err(format!("node {} is not ready: {said:?}", self.number).into());
            }
            SystemClock.sleep(POLL).await;
        }
    }

    /// Why processes here ended though nobody told them to.
    pub fn ended(&self) -> Vec<String> {
        lock(&self.ended).clone()
    }
}

async fn write(mut stdin: ChildStdin, mut lines: mpsc::UnboundedReceiver<Vec<u8>>) {
    while let Some(line) = lines.recv().await {
        // A process that is gone is noticed by who reads from it.
        if stdin.write_all(&line).await.is_err() {
            return;
        }
    }
}

struct Ending {
    number: usize,
    may_end: Arc<AtomicBool>,
    ended: Arc<Mutex<Vec<String>>>,
}

async fn read(stdout: ChildStdout, pending: Pending, ending: Ending) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str::<Reply>(&line) {
            Ok(reply) => {
                if let Some(waiting) = lock(&pending).remove(&reply.id) {
                    // Whoever asked may have given up.
                    drop(waiting.send(reply.said));
                }
            }
            Err(error) => lock(&ending.ended).push(format!("{line}: {error}")),
        }
    }
    // Everybody who waits learns that it ended.
    lock(&pending).clear();
    if !ending.may_end.load(Ordering::SeqCst) {
        lock(&ending.ended).push(format!("node {} ended by itself", ending.number));
    }
}

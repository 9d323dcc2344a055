//! One node of the service under test: commands in on standard input, answers out on standard output,
//! a JSON line each. It ends when its input does.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use kafold::clock::SystemClock;
use kafold::handler::{HandleError, HandlerConfig, Request};
use kafold::projections::{ProjectionWorker, Projections};
use kafold::store::{AppendError, Health, View};
use kafold::{
    Aggregate, Clock, CommandHandler, CommandId, Database, DatabaseError, EventStore,
    ExpectedVersion, Log, LogOptions, Mode, RecordedEvent, StreamId, Version,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;
use crate::domain::{GroupRow, Tally, TallyCommand, TallyError, TallyRow};
use crate::history::{Answer, Place};

/// Within this time a command is answered.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(5);
/// Between two attempts to reach what is down at the start.
const OPEN_RETRY: Duration = Duration::from_millis(300);

/// How a node is started.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// The log.
    #[arg(long)]
    log: String,
    /// The database of index and read models.
    #[arg(long)]
    database: String,
}

/// A line of standard input.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// Names the answer.
    pub id: u64,
    /// What is wanted.
    pub ask: Ask,
}

/// What a node can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// To handle a command.
    Command {
        /// The aggregate.
        stream: String,
        /// The command's id.
        command: Uuid,
        /// The command.
        ask: TallyCommand,
        /// The version that is demanded.
        expected: Option<u64>,
    },
    /// To show a stream.
    Read {
        /// The aggregate.
        stream: String,
        /// Whether it should be proven to be the newest.
        confirm: bool,
    },
    /// How it is.
    Status,
}

/// A line of standard output.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The call's.
    pub id: u64,
    /// What it came to.
    pub said: Said,
}

/// What a node answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// Of a command.
    Answer(Answer),
    /// Of a read: where its events are.
    Stream {
        /// In their order.
        events: Vec<Place>,
        /// Whether it was proven to be the newest.
        confirmed: bool,
    },
    /// A read that came to nothing.
    NotRead(String),
    /// Why it is not ready; nothing when it is.
    Status(Vec<String>),
}

struct Node {
    handler: CommandHandler<Tally>,
    store: Arc<dyn EventStore>,
    projections: Projections,
}

/// Serves until the input ends or SIGTERM comes.
pub async fn run(args: NodeArgs) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let (log, database) = tokio::select! {
        biased;
        _ = terminate.recv() => return Ok(()),
        opened = open(&args) => opened?,
    };
    let projections = ProjectionWorker::new(log.source(), database.clone())
        .with::<TallyRow>()
        .with::<GroupRow>()
        .spawn();
    let config = HandlerConfig { deadline: COMMAND_DEADLINE, ..HandlerConfig::default() };
    let handler = CommandHandler::new(log.store()).config(config).forwarding(log.commands());
    let node = Arc::new(Node { handler, store: log.store(), projections });

    let (answers, written) = mpsc::unbounded_channel();
    let writer = tokio::spawn(write(written));
    let mut calls = JoinSet::new();
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        let line = tokio::select! {
            biased;
            _ = terminate.recv() => break,
            line = lines.next_line() => line?,
        };
        // Whoever started it is gone.
        let Some(line) = line else { std::process::exit(1) };
        let call: Call = serde_json::from_str(&line)?;
        let (node, answers) = (Arc::clone(&node), answers.clone());
        calls.spawn(async move {
            let reply = Reply { id: call.id, said: node.answer(call.ask).await };
            // The writer ends last.
            drop(answers.send(reply));
        });
        while let Some(ended) = calls.try_join_next() {
            ended?;
        }
    }
    log.close().await;
    while let Some(ended) = calls.join_next().await {
        ended?;
    }
    node.projections.shutdown().await;
    drop(answers);
    writer.await??;
    // The thread that waits for standard input would hold the process.
    std::process::exit(0)
}

async fn open(args: &NodeArgs) -> Result<(Log, Database), Failure> {
    loop {
        let reason = match try_open(args).await {
            Ok(opened) => return Ok(opened),
            Err(OpenFailure::Down(reason)) => reason,
            Err(OpenFailure::Refused(reason)) => return Err(reason.into()),
        };
        tracing::warn!("waiting: {reason}");
        SystemClock.sleep(OPEN_RETRY).await;
    }
}

enum OpenFailure {
    Down(String),
    Refused(String),
}

async fn try_open(args: &NodeArgs) -> Result<(Log, Database), OpenFailure> {
    let database = Database::open(&args.database, Mode::Migrate).await.map_err(|error| {
        let is_down = matches!(error, DatabaseError::Unavailable { .. });
        if is_down {
            OpenFailure::Down(error.to_string())
        } else {
            OpenFailure::Refused(error.to_string())
        }
    })?;
    let log = LogOptions::new(&args.log).index(&database).open().await.map_err(|error| {
        let text = error.to_string();
        if error.is_transient() { OpenFailure::Down(text) } else { OpenFailure::Refused(text) }
    })?;
    Ok((log, database))
}

async fn write(mut replies: mpsc::UnboundedReceiver<Reply>) -> Result<(), std::io::Error> {
    let mut out = tokio::io::stdout();
    while let Some(reply) = replies.recv().await {
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        out.write_all(&line).await?;
        out.flush().await?;
    }
    Ok(())
}

impl Node {
    async fn answer(&self, ask: Ask) -> Said {
        match ask {
            Ask::Command { stream, command, ask, expected } => {
                Said::Answer(self.handle(&stream, command, &ask, expected).await)
            }
            Ask::Read { stream, confirm } => match self.read(&stream, confirm).await {
                Ok((events, confirmed)) => Said::Stream { events, confirmed },
                Err(reason) => Said::NotRead(reason),
            },
            Ask::Status => Said::Status(
                [self.store.health(), self.projections.health()]
                    .into_iter()
                    .flat_map(|health| match health {
                        Health::Ready => Vec::new(),
                        Health::NotReady(reasons) => reasons,
                    })
                    .collect(),
            ),
        }
    }

    async fn handle(
        &self,
        stream: &str,
        command: Uuid,
        ask: &TallyCommand,
        expected: Option<u64>,
    ) -> Answer {
        let id = stream.split_once('-').map_or(stream, |(_, id)| id);
        let demanded = expected
            .map_or(ExpectedVersion::Any, |version| ExpectedVersion::Exact(Version(version)));
        let command_id = Some(CommandId(command));
        let request = Request { command_id, expected: demanded, ..Request::default() };
        match self.handler.handle_with(id, ask, request).await {
            Ok(handled) => match handled.position {
                Some(position) => Answer::Appended {
                    version: handled.version.0,
                    at: Place { partition: position.partition.0, offset: position.offset.0 },
                },
                None => Answer::Failed("a command without events was taken".into()),
            },
            Err(HandleError::Rejected(reason)) => Answer::Rejected(reason.to_string()),
            Err(HandleError::Conflict { actual, .. }) if expected.is_some() => {
                Answer::Conflict { actual: actual.0 }
            }
            Err(error @ HandleError::Append(AppendError::OutcomeUnknown { .. })) => {
                Answer::Unknown(error.to_string())
            }
            Err(error) => failed(&error),
        }
    }

    async fn read(&self, stream: &str, confirm: bool) -> Result<(Vec<Place>, bool), String> {
        let id = stream.split_once('-').map_or(stream, |(_, id)| id);
        let stream = StreamId::new(Tally::CATEGORY, id).map_err(|error| error.to_string())?;
        let read = self.store.read(&stream, Version::EMPTY);
        let events: Vec<RecordedEvent> =
            read.try_collect().await.map_err(|error| error.to_string())?;
        let version = events.last().map_or(Version::EMPTY, |last| last.version);
        let deadline = Some(SystemClock.instant() + COMMAND_DEADLINE);
        let view = View { stream, version, after: None, deadline };
        let confirmed = confirm && self.store.confirm(view).await.is_ok();
        let place = |event: &RecordedEvent| Place {
            partition: event.position.partition.0,
            offset: event.position.offset.0,
        };
        Ok((events.iter().map(place).collect(), confirmed))
    }
}

fn failed(error: &HandleError<TallyError>) -> Answer {
    Answer::Failed(error.to_string())
}

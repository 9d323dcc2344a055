//! Ours, opened as a service opens it.

use std::sync::Arc;
use std::time::Duration;

use kafold::clock::{RandomIds, SystemClock};
use kafold::kafka::{Assignment, KafkaConfig, KafkaSource, Operator};
use kafold::projections::{ProjectionState, Projections, SqlIndex};
use kafold::store::Health;
use kafold::{
    AppendError, CommandHandler, CommandId, Database, HandleError, Handled, IdGenerator, Log,
    LogOptions, StreamIndex,
};

use crate::Failure;
use crate::domain::{Account, Deposit};
use crate::measure::{now, sleep, until};
use crate::servers::{PARTITIONS, node_count};

/// How long anything may take that is waited for.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
/// How long whatever works through a whole log may take.
pub const LONG_WAIT_MAX: Duration = Duration::from_secs(3_600);

/// The URL of a log.
pub fn log_url(brokers: &str, name: &str) -> String {
    let replication = node_count(brokers);
    let (address, options) = brokers.split_once('?').unwrap_or((brokers, ""));
    let and = if options.is_empty() { "" } else { "&" };
    format!(
        "kafka://{address}/{name}?partitions={PARTITIONS}&replication={replication}{and}{options}"
    )
}

/// Opens the log with its index in the database, and waits until it takes commands everywhere.
pub async fn open(url: &str, index: &Database) -> Result<Log, Failure> {
    let log = LogOptions::new(url).index(index).open().await?;
    ready(&log).await?;
    Ok(log)
}

/// Waits until it takes commands everywhere.
pub async fn ready(log: &Log) -> Result<(), Failure> {
    let ready = async || Ok((log.health() == Health::Ready).then_some(()));
    until("the log is ready", WAIT_MAX, ready).await
}

/// Makes the topics of a log as ours are, for whoever writes them by hand.
pub async fn make_log(brokers: &str, name: &str) -> Result<(), Failure> {
    let config: KafkaConfig = log_url(brokers, name).parse()?;
    let operator = Operator::connect(config, Arc::new(SystemClock)).await?;
    Ok(operator.create_topics().await.map(drop)?)
}

/// A reader of the whole log that shares it with nobody.
pub async fn source(url: &str) -> Result<KafkaSource, Failure> {
    let mut config: KafkaConfig = url.parse()?;
    config.assignment = Assignment::Everything;
    Ok(KafkaSource::open(config, Arc::new(SystemClock)).await?)
}

/// Offsets of the log that the index has.
pub async fn indexed(index: &Database) -> Result<u64, Failure> {
    let cursors = SqlIndex::new(index.clone()).cursors().await?;
    Ok(cursors.iter().map(|(_, cursor)| cursor.next.0).sum())
}

/// Waits until the index has grown by so many offsets at least since it had `before`.
pub async fn index_caught_up(index: &Database, before: u64, events: u64) -> Result<(), Failure> {
    let grown = async || Ok((indexed(index).await? >= before + events).then_some(()));
    until("the index has all events", LONG_WAIT_MAX, grown).await
}

/// Waits until projections have applied everything below these offsets together, so many offsets in
/// all.
pub async fn applied(projections: &Projections, offsets: u64) -> Result<(), Failure> {
    let all = async || {
        for status in projections.status() {
            if let ProjectionState::Stopped(reason) = &status.state {
                return Err(reason.clone().into());
            }
            let next: u64 = status.partitions.values().map(|partition| partition.next.0).sum();
            if next < offsets {
                return Ok(None);
            }
        }
        Ok(Some(()))
    };
    until("everything is applied", LONG_WAIT_MAX, all).await
}

/// One command, sent again with the same id while the log cannot take it or its outcome is unknown, as
/// a client does that gets a 503.
pub async fn deposit(
    handler: &CommandHandler<Account>,
    id: &str,
    command: &Deposit,
) -> Result<Handled, Failure> {
    let (command_id, began) = (CommandId(RandomIds.event_id()), now());
    loop {
        let failure = match handler.handle_with(id, command, command_id).await {
            Ok(handled) => return Ok(handled),
            Err(failure) => failure,
        };
        let pause = match &failure {
            HandleError::Append(AppendError::Unavailable { retry_after, .. }) => *retry_after,
            HandleError::Append(AppendError::OutcomeUnknown { .. }) => Duration::ZERO,
            _ => return Err(failure.into()),
        };
        if now() - began > WAIT_MAX {
            return Err(failure.into());
        }
        sleep(pause).await;
    }
}

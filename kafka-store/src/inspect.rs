//! Gathers what [`identity`](crate::identity) judges: is this still the log that a position is of?

use std::sync::Arc;
use std::time::Duration;

use kafold_core::{Clock, Offset, Partition, Position, ReadError};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use tokio::sync::Mutex;

use crate::client::Inquirer;
use crate::config::KafkaConfig;
use crate::fold::{Anchor, Checkpoint, Fold, LogDiverged, LogIdentity};
use crate::identity::{self, AnchorFound, IdentityError, LogFacts};
use crate::reader::{Chunk, LogReader, ReadFailure};
use crate::wire::{Content, Malformed};

/// Between two looks at a log that seems too short.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why a partition was not found to be the right one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InspectError {
    /// No broker answers: ask again.
    #[error("{0}")]
    Unavailable(KafkaError),
    /// It is not, for good.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It contradicts itself.
    #[error(transparent)]
    Diverged(#[from] LogDiverged),
}

impl InspectError {
    /// As the seams of the core tell it; `what` is what was looked at.
    pub(crate) fn into_read_error(self, what: String, retry_after: Duration) -> ReadError {
        match self {
            Self::Unavailable(error) => ReadError::unavailable(retry_after, error),
            error => ReadError::diverged(what, error),
        }
    }
}

/// Looks at partitions of one events topic.
#[derive(Clone)]
pub(crate) struct Inspector {
    reader: LogReader,
    inquirer: Arc<Inquirer>,
    clock: Arc<dyn Clock>,
    topic: String,
    partitions: u32,
    patience: Duration,
    read_wait: Duration,
    /// A read replaces the one before: of one partition there is one at a time.
    turns: Arc<[Mutex<()>]>,
}

impl Inspector {
    /// `partitions` is what metadata says. Whoever shares the reader has his reads cancelled when the
    /// inspector looks at the same partition.
    pub(crate) fn new(
        config: &KafkaConfig,
        partitions: u32,
        reader: LogReader,
        inquirer: Arc<Inquirer>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            reader,
            inquirer,
            clock,
            topic: config.events_topic(),
            partitions,
            patience: config.limits.low_end_patience,
            read_wait: config.limits.request_timeout,
            turns: (0..partitions).map(|_| Mutex::default()).collect(),
        }
    }

    /// The same, reading through another reader.
    pub(crate) fn with_reader(&self, reader: LogReader) -> Self {
        Self { reader, ..self.clone() }
    }

    /// Returns an inspector without patience, for a topic that was just created and has no stale leader.
    pub(crate) fn of_new_topic(&self) -> Self {
        Self { patience: Duration::ZERO, ..self.clone() }
    }

    /// Checks a stored position, the default one for none. An end that is too low is looked at
    /// again for a while: a stale leader looks the same.
    pub(crate) async fn check(
        &self,
        partition: Partition,
        stored: &Checkpoint,
    ) -> Result<(), InspectError> {
        let deadline = self.clock.instant() + self.patience;
        loop {
            let facts = self.facts(partition, stored).await?;
            match identity::check(Some(stored), &facts) {
                Ok(()) => return Ok(()),
                Err(error) if error.may_pass() && self.clock.instant() < deadline => {
                    tracing::warn!(%partition, %error, "looking again: the leader may be stale");
                    self.clock.sleep(LOOK_AGAIN).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Looks at the newest record: a format that this program does not know is better found before
    /// it begins than when its readers come to it.
    pub(crate) async fn check_newest(&self, partition: Partition) -> Result<(), InspectError> {
        let (start, end) = self.ends(partition).await?;
        if end == start {
            return Ok(());
        }
        let newest = Offset(end.0 - 1);
        for record in self.read(partition, newest).await?.records {
            if let Content::Malformed(reason @ Malformed::NewerFormat(_)) = record.content {
                let position = Position { partition, offset: record.offset };
                return Err(LogDiverged::Malformed { position, reason }.into());
            }
        }
        Ok(())
    }

    async fn facts(
        &self,
        partition: Partition,
        stored: &Checkpoint,
    ) -> Result<LogFacts, InspectError> {
        let (start, end) = self.ends(partition).await?;
        // Without its beginning the log is refused whatever else it holds.
        let whole = start == Offset(0);
        let first_claim = if whole { self.first_claim(partition, end).await? } else { None };
        let log_partitions = match (first_claim, partition) {
            (Some(first), _) => first.partitions,
            (None, Partition(0)) => self.partitions,
            (None, _) => {
                let first = Partition(0);
                let (_, end) = self.ends(first).await?;
                identity::partitions_of(self.first_claim(first, end).await?, self.partitions)
            }
        };
        let anchor = match stored.state.anchor {
            Some(anchor) if whole && anchor.offset < end => {
                self.anchor(partition, anchor.offset).await?
            }
            _ => AnchorFound::NotRead,
        };
        Ok(LogFacts {
            topic: self.topic.clone(),
            partition,
            partitions: self.partitions,
            log_partitions,
            start,
            end,
            first_claim,
            anchor,
        })
    }

    pub(crate) async fn ends(
        &self,
        partition: Partition,
    ) -> Result<(Offset, Offset), InspectError> {
        let (inquirer, topic) = (Arc::clone(&self.inquirer), self.topic.clone());
        let asked = tokio::task::spawn_blocking(move || inquirer.ends(&topic, partition)).await;
        asked.unwrap_or(Err(KafkaError::Canceled)).map_err(InspectError::Unavailable)
    }

    /// The partition's first accepted claim, if there is one below `end`.
    pub(crate) async fn first_claim(
        &self,
        partition: Partition,
        end: Offset,
    ) -> Result<Option<LogIdentity>, InspectError> {
        let mut fold = Fold::new(partition, Checkpoint::default());
        while fold.next() < end {
            for record in self.read(partition, fold.next()).await?.records {
                fold.apply(&record)?;
                if fold.state().log.is_some() {
                    return Ok(fold.state().log);
                }
            }
        }
        Ok(None)
    }

    async fn anchor(
        &self,
        partition: Partition,
        offset: Offset,
    ) -> Result<AnchorFound, InspectError> {
        let chunk = self.read(partition, offset).await?;
        Ok(match chunk.records.into_iter().next() {
            Some(record) if record.offset > offset => AnchorFound::Hole(record.offset),
            Some(record) => match record.content {
                Content::Ours(ours) => AnchorFound::Ours(Anchor {
                    offset,
                    claim: ours.stamp.claim,
                    seq: ours.stamp.seq,
                }),
                Content::Foreign | Content::Malformed(_) => AnchorFound::Other,
            },
            None => AnchorFound::NotRead,
        })
    }

    /// Records that are known to be there.
    pub(crate) async fn read(
        &self,
        partition: Partition,
        from: Offset,
    ) -> Result<Chunk, InspectError> {
        let turn = self.turns[partition.0 as usize].lock().await;
        let answer = self.reader.read_async(partition, from, self.read_wait).await;
        drop(turn);
        match answer {
            Ok(chunk) if !chunk.records.is_empty() => Ok(chunk),
            Err(ReadFailure::Unavailable(error)) => Err(InspectError::Unavailable(error)),
            Err(ReadFailure::Corrupt(offset)) => {
                Err(LogDiverged::Corrupt(Position { partition, offset }).into())
            }
            // It was there a moment ago: the leader has changed, or does not answer.
            Ok(_) | Err(ReadFailure::OutOfRange { .. } | ReadFailure::Replaced) => {
                let code = RDKafkaErrorCode::RequestTimedOut;
                Err(InspectError::Unavailable(KafkaError::MessageConsumption(code)))
            }
        }
    }
}

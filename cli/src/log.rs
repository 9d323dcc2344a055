//! A log that is only read: nothing is created, claimed, joined or committed.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use kafold::clock::within;
use kafold::embedded::EmbeddedSource;
use kafold::kafka::Operator;
use kafold::kafka::operate::{PartitionFacts, ReadableLog};
use kafold::store::{Batch, Cursor, SourceMessage, Subscription};
use kafold::{Clock, Database, EventSource, Mode, Offset, Partition, ReadError, StreamId};

use crate::error::Error;
use crate::options::LogUrl;
use crate::overview::PartitionView;

/// Under this name the log is subscribed to; there is no group behind it.
const READER: &str = "kafold";
/// Events of one batch.
const BATCH_EVENTS_MAX: usize = 1_000;
/// Partitions that are asked about at once.
const PARTITIONS_AT_ONCE: usize = 32;
/// How long names of hosts may be looked up.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(8);

/// Either kind of log, as far as it reaches.
#[derive(Clone)]
pub(crate) enum Log {
    /// The file, and its one partition.
    Embedded { database: Database, source: EmbeddedSource },
    /// The events topic.
    Kafka(ReadableLog),
}

impl Log {
    /// Opens a log that is there.
    pub(crate) async fn open(url: &LogUrl, clock: &Arc<dyn Clock>) -> Result<Self, Error> {
        match url {
            LogUrl::Sqlite(file) => {
                let database = Database::open(file, Mode::Check).await?;
                let Database::Sqlite(opened) = &database else {
                    return Err(Error::usage(format!("{file} is not sqlite://FILE")));
                };
                let source = EmbeddedSource::open(opened.clone(), clock.clone()).await?;
                Ok(Self::Embedded { database, source })
            }
            LogUrl::Kafka(config) => {
                let operator = operator(url, clock).await?;
                let found = operator.log().await?;
                found.map(Self::Kafka).ok_or_else(|| {
                    Error::failed(format!(
                        "there is no topic {} at {}: start the service once, make it with `topic \
                         create`, or name another log",
                        config.events_topic(),
                        config.brokers
                    ))
                })
            }
        }
    }

    /// Either kind's file, where the events are in SQL.
    pub(crate) fn database(&self) -> Option<&Database> {
        match self {
            Self::Embedded { database, .. } => Some(database),
            Self::Kafka(_) => None,
        }
    }

    pub(crate) fn partitions(&self) -> u32 {
        match self {
            Self::Embedded { .. } => 1,
            Self::Kafka(log) => log.partitions(),
        }
    }

    pub(crate) fn partition_of(&self, stream: &StreamId) -> Partition {
        match self {
            Self::Embedded { .. } => Partition(0),
            Self::Kafka(log) => log.partition_of(stream),
        }
    }

    /// The first and the next offset of a partition.
    pub(crate) async fn ends(&self, partition: Partition) -> Result<(Offset, Offset), ReadError> {
        match self {
            Self::Embedded { source, .. } => Ok((Offset(0), source.end().await?)),
            Self::Kafka(log) => log.ends(partition).await,
        }
    }

    /// Returns an offset with all events recorded at this time or later at or above it.
    pub(crate) async fn since(
        &self,
        partition: Partition,
        time: DateTime<Utc>,
    ) -> Result<Offset, ReadError> {
        match self {
            // A file is read fast, and has no index by time.
            Self::Embedded { .. } => Ok(Offset(0)),
            Self::Kafka(log) => log.since(partition, time).await,
        }
    }

    /// What a partition shows of itself.
    pub(crate) async fn look(&self, partition: Partition) -> Result<PartitionView, ReadError> {
        if let Self::Kafka(log) = self {
            let PartitionFacts { start, end, claim, newest_event_at, .. } =
                log.look(partition).await?;
            return Ok(PartitionView { partition, start, end, claim, newest_event_at });
        }
        let (start, end) = self.ends(partition).await?;
        let newest = match end.0.checked_sub(1) {
            Some(before) => {
                let from = self.cursor_before(partition, Offset(before)).await?;
                self.replay(partition, from, end).try_next().await?
            }
            None => None,
        };
        let newest = newest.and_then(|batch| batch.events.into_iter().next_back());
        let newest_event_at = newest.map(|event| event.metadata.recorded_at);
        Ok(PartitionView { partition, start, end, claim: None, newest_event_at })
    }

    /// A place at or below `before` to read on from; `None` is the beginning of the log.
    pub(crate) async fn cursor_before(
        &self,
        partition: Partition,
        before: Offset,
    ) -> Result<Option<Cursor>, ReadError> {
        match self {
            Self::Embedded { source, .. } => source.cursor_at(before).await.map(Some),
            Self::Kafka(log) => log.cursor_before(partition, before).await,
        }
    }

    /// All events from a place, or from the beginning, up to about `end`.
    pub(crate) fn replay(
        &self,
        partition: Partition,
        from: Option<Cursor>,
        end: Offset,
    ) -> BoxStream<'static, Result<Batch, ReadError>> {
        match self {
            Self::Embedded { source, .. } => replay_embedded(source.clone(), from, end),
            Self::Kafka(log) => log.replay(partition, from, end),
        }
    }

    /// What reads all of it, each reader every partition.
    pub(crate) fn source(&self) -> Arc<dyn EventSource> {
        match self {
            Self::Embedded { source, .. } => Arc::new(source.clone()),
            Self::Kafka(log) => Arc::new(log.source()),
        }
    }

    /// Events as they come, from these places on.
    pub(crate) async fn follow(
        &self,
        places: Vec<(Partition, Option<Cursor>)>,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let mut subscription = match self {
            Self::Embedded { source, .. } => {
                source.subscribe(READER, None, BATCH_EVENTS_MAX).await?
            }
            Self::Kafka(log) => log.source().subscribe(READER, None, BATCH_EVENTS_MAX).await?,
        };
        // Without a group everything is assigned at once.
        subscription.next().await?;
        for (partition, from) in places {
            subscription.start(partition, from).await?;
        }
        Ok(subscription)
    }
}

/// Asks about every partition, several at once; the answers are in the order of the partitions.
pub(crate) async fn ask_all<T, E, F>(
    partitions: impl IntoIterator<Item = Partition>,
    ask: impl Fn(Partition) -> F,
) -> Result<Vec<T>, E>
where
    F: Future<Output = Result<T, E>>,
{
    stream::iter(partitions).map(ask).buffered(PARTITIONS_AT_ONCE).try_collect().await
}

/// Looks at the log's brokers and topics; `url` names Kafka.
pub(crate) async fn operator(url: &LogUrl, clock: &Arc<dyn Clock>) -> Result<Operator, Error> {
    let LogUrl::Kafka(config) = url else {
        return Err(Error::usage(format!(
            "{} is a file and has no topics: give --log kafka://HOST:PORT[,HOST:PORT]/NAME",
            url.shown()
        )));
    };
    let connecting = Operator::connect((**config).clone(), clock.clone());
    match within(&**clock, LOOK_UP_TIMEOUT, connecting).await {
        Some(connected) => Ok(connected?),
        None => Err(Error::failed(format!(
            "the hosts of {} were not found within {LOOK_UP_TIMEOUT:?}: check the URL and the name \
             server",
            config.brokers
        ))),
    }
}

fn replay_embedded(
    source: EmbeddedSource,
    from: Option<Cursor>,
    end: Offset,
) -> BoxStream<'static, Result<Batch, ReadError>> {
    let next = from.as_ref().map_or(Offset(0), |cursor| cursor.next);
    let started = async move {
        let mut subscription = source.subscribe(READER, None, BATCH_EVENTS_MAX).await?;
        subscription.next().await?;
        subscription.start(Partition(0), from).await?;
        let batches = move |(mut subscription, next): (Box<dyn Subscription>, Offset)| async move {
            if next >= end {
                return Ok(None);
            }
            match subscription.next().await? {
                SourceMessage::Batch(batch) => {
                    let next = batch.next.next;
                    Ok(Some((batch, (subscription, next))))
                }
                SourceMessage::Assigned(_) | SourceMessage::Revoked(_) => Ok(None),
            }
        };
        Ok::<_, ReadError>(stream::try_unfold((subscription, next), batches))
    };
    stream::once(started).try_flatten().boxed()
}

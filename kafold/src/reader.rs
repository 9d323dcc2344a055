//! A log of either kind, opened read-only.

use std::fmt;
use std::sync::Arc;

use kafold_core::store::Health;
use kafold_core::{Clock, EventSource};

#[cfg(feature = "embedded")]
use kafold_embedded_store::EmbeddedSource;
#[cfg(feature = "kafka")]
use kafold_kafka_store::{KafkaConfig, KafkaSource};
#[cfg(feature = "embedded")]
use kafold_migrations::Database;

use crate::error::OpenError;

/// A read-only log, for processes with projections alone. On Kafka such a process claims no
/// partition, has no producer of events and needs only the rights of a worker:
/// `kafold acl print --role worker`. Cheap to clone.
#[derive(Clone)]
pub struct LogReader {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    #[cfg(feature = "embedded")]
    Embedded { source: Arc<EmbeddedSource>, database: Database },
    #[cfg(feature = "kafka")]
    Kafka(Arc<KafkaSource>),
}

impl fmt::Debug for LogReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => "LogReader(embedded)",
            #[cfg(feature = "kafka")]
            Kind::Kafka(_) => "LogReader(kafka)",
        })
    }
}

impl LogReader {
    pub(crate) async fn open(url: &str, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        match url.split_once("://").map(|(scheme, _)| scheme) {
            #[cfg(feature = "embedded")]
            Some("sqlite") => Self::open_embedded(url, clock).await,
            #[cfg(feature = "kafka")]
            Some("kafka") => {
                let config = url.parse::<KafkaConfig>();
                let config = config.map_err(|error| OpenError::of(false, error))?;
                let opened = KafkaSource::open(config, clock).await;
                let source = opened.map_err(|error| OpenError::of(error.is_transient(), error))?;
                Ok(Self { kind: Kind::Kafka(Arc::new(source)) })
            }
            _ => Err(OpenError::Url { url: url.into() }),
        }
    }

    #[cfg(feature = "embedded")]
    async fn open_embedded(url: &str, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        use kafold_core::ReadError;
        use kafold_migrations::{DatabaseError, Mode};
        let opened = Database::open(url, Mode::Check).await;
        let database = opened.map_err(|error| {
            OpenError::of(matches!(error, DatabaseError::Unavailable { .. }), error)
        })?;
        let Database::Sqlite(file) = &database else {
            return Err(OpenError::Url { url: url.into() });
        };
        let source = EmbeddedSource::open(file.clone(), clock).await;
        let source = source.map_err(|error| {
            OpenError::of(matches!(error, ReadError::Unavailable { .. }), error)
        })?;
        Ok(Self { kind: Kind::Embedded { source: Arc::new(source), database } })
    }

    /// Returns the source of events for projections.
    pub fn source(&self) -> Arc<dyn EventSource> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { source, .. } => source.clone(),
            #[cfg(feature = "kafka")]
            Kind::Kafka(source) => source.clone(),
        }
    }

    /// Returns the log's own file, which may hold read models too; `None` on Kafka.
    #[cfg(feature = "embedded")]
    pub fn database(&self) -> Option<&Database> {
        match &self.kind {
            Kind::Embedded { database, .. } => Some(database),
            #[cfg(feature = "kafka")]
            Kind::Kafka(_) => None,
        }
    }

    /// Returns the number of partitions of the log.
    pub fn partitions(&self) -> u32 {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => 1,
            #[cfg(feature = "kafka")]
            Kind::Kafka(source) => source.partitions(),
        }
    }

    /// Returns `Ready` if the log is readable.
    pub fn health(&self) -> Health {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => Health::Ready,
            #[cfg(feature = "kafka")]
            Kind::Kafka(source) => source.health(),
        }
    }

    /// Returns the brokers' refusals, one sentence each with cause and remedy. A refusal lasts
    /// until an operator acts. A starting program ends with the refusal; a running program is not
    /// ready.
    pub fn refusals(&self) -> Vec<String> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => Vec::new(),
            #[cfg(feature = "kafka")]
            Kind::Kafka(source) => source.refusals(),
        }
    }
}

//! [`open`]: one handle for the log, its database, handlers, projections and queries.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::future::IntoFuture;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kafold_core::forward::Node;
use kafold_core::handler::HandlerConfig;
use kafold_core::store::Health;
use kafold_core::{Aggregate, Clock, CommandHandler, IdGenerator};
use kafold_migrations::{Database, DatabaseError, Mode};
use kafold_projections::{
    ProjectionConfig, ProjectionWorker, Projections, Query, ReadModel, SqlSnapshots,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::OpenError;
use crate::log::{Log, LogOptions};

/// Opens a log and the database of its read models.
///
/// `url` is `sqlite://FILE`, which is created when absent, or `kafka://HOST:PORT[,HOST:PORT]/NAME`, whose
/// topics are created when absent with `?partitions=N&replication=R` (12 partitions, 3 replicas or as
/// many as there are brokers). A log on Kafka needs a [`database`](Opening::database); a log in a file has
/// its read models in the same file, unless another database is given. Await the result, after setting
/// options:
///
/// ```no_run
/// # async fn example() -> Result<(), kafold::OpenError> {
/// let kafold = kafold::open("kafka://localhost:9092/accounts")
///     .database("postgres://localhost/accounts")
///     .await?;
/// # Ok(())
/// # }
/// ```
pub fn open(url: impl Into<String>) -> Opening {
    Opening {
        log: LogOptions::new(url),
        database: None,
        handlers: HandlerConfig::default(),
        projections: ProjectionConfig::default(),
    }
}

/// The options of [`open`].
#[derive(Debug, Clone)]
#[must_use = "opens nothing until it is awaited"]
pub struct Opening {
    log: LogOptions,
    database: Option<String>,
    handlers: HandlerConfig,
    projections: ProjectionConfig,
}

impl Opening {
    /// Sets the database of the read models, of the stream index of a log on Kafka, and of snapshots:
    /// `postgres://USER:PASSWORD@HOST:PORT/NAME` or `sqlite://FILE`. Missing tables are created; tables of a
    /// newer version are refused.
    pub fn database(mut self, url: impl Into<String>) -> Self {
        self.database = Some(url.into());
        self
    }

    /// Sets the name of this node for other nodes and for operators. Default: the host's name and the
    /// process id.
    pub fn node_name(mut self, name: impl Into<String>) -> Self {
        self.log = self.log.node_name(name);
        self
    }

    /// Sets the address at which others reach this process. Default: none.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.log = self.log.address(address);
        self
    }

    /// Sets the limits of command handlers.
    pub fn handler_config(mut self, config: HandlerConfig) -> Self {
        self.handlers = config;
        self
    }

    /// Sets the limits of projections.
    pub fn projection_config(mut self, config: ProjectionConfig) -> Self {
        self.projections = config;
        self
    }

    /// Sets where time and ids come from. Default: the machine.
    pub fn clock(mut self, clock: Arc<dyn Clock>, ids: Arc<dyn IdGenerator>) -> Self {
        self.log = self.log.clock(clock, ids);
        self
    }

    async fn open(self) -> Result<Kafold, OpenError> {
        let refused = |error: DatabaseError| {
            OpenError::of(matches!(error, DatabaseError::Unavailable { .. }), error)
        };
        let database = match &self.database {
            Some(url) => Some(Database::open(url, Mode::Migrate).await.map_err(refused)?),
            None if self.log.needs_database() => return Err(OpenError::NoDatabase),
            None => None,
        };
        let mut options = self.log;
        if let Some(database) = &database {
            options = options.index(database);
        }
        let (clock, ids) = options.clock_and_ids();
        let log = options.open().await?;
        let database = database.or_else(|| log.database().cloned()).ok_or(OpenError::NoDatabase)?;
        Ok(Kafold {
            inner: Arc::new(Inner {
                log,
                database,
                clock,
                ids,
                handler_config: self.handlers,
                projection_config: self.projections,
                handlers: Mutex::default(),
                spawned: Arc::default(),
            }),
        })
    }
}

impl IntoFuture for Opening {
    type Output = Result<Kafold, OpenError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.open())
    }
}

/// An open log with its database. Cheap to clone.
#[derive(Clone)]
pub struct Kafold {
    inner: Arc<Inner>,
}

struct Inner {
    log: Log,
    database: Database,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
    handler_config: HandlerConfig,
    projection_config: ProjectionConfig,
    /// The [`CommandHandler`] of each kind of aggregate.
    handlers: Mutex<HashMap<TypeId, Box<dyn Any + Send>>>,
    /// All projections of this process.
    spawned: Arc<Mutex<Vec<Projections>>>,
}

impl fmt::Debug for Kafold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kafold")
            .field("log", &self.inner.log)
            .field("database", &self.inner.database.url())
            .finish()
    }
}

impl Kafold {
    /// Returns the handler of an aggregate's commands; each call returns a clone of the same handler.
    ///
    /// Commands of streams that another node owns are sent to that node, and this node handles those
    /// that others send, from the first call on. An aggregate with a
    /// [`SNAPSHOT`](Aggregate::SNAPSHOT) has its snapshots in the database.
    pub fn handler<A: Aggregate>(&self) -> CommandHandler<A>
    where
        A::Command: Serialize + DeserializeOwned,
        A::Error: Serialize + DeserializeOwned,
    {
        let inner = &self.inner;
        let mut handlers = lock(&inner.handlers);
        let known = handlers.get(&TypeId::of::<A>());
        if let Some(known) = known.and_then(|known| known.downcast_ref::<CommandHandler<A>>()) {
            return known.clone();
        }
        let (store, clock, ids) = (inner.log.store(), inner.clock.clone(), inner.ids.clone());
        let handler = CommandHandler::<A>::with_parts(store, clock, ids)
            .config(inner.handler_config.clone())
            .with_snapshots(Arc::new(SqlSnapshots::new(inner.database.clone())))
            .forwarding(inner.log.commands());
        handlers.insert(TypeId::of::<A>(), Box::new(handler.clone()));
        handler
    }

    /// Returns a worker for read models and projections. They run until [`close`](Self::close), once the
    /// worker is spawned.
    pub fn projections(&self) -> ProjectionWorker {
        let Inner { log, database, clock, ids, projection_config, spawned, .. } = &*self.inner;
        let spawned = Arc::clone(spawned);
        ProjectionWorker::new(log.source(), database.clone())
            .config(projection_config.clone())
            .clock(clock.clone(), ids.clone())
            .on_spawn(move |projections| lock(&spawned).push(projections.clone()))
    }

    /// Returns a query on a read model.
    pub fn query<M: ReadModel>(&self) -> Query<M> {
        match lock(&self.inner.spawned).last() {
            Some(spawned) => spawned.query(),
            None => Query::new(self.inner.database.clone()).config(&self.inner.projection_config),
        }
    }

    /// Returns the log, for its store, its source and its refusals.
    pub fn log(&self) -> &Log {
        &self.inner.log
    }

    /// Returns the database of the read models.
    pub fn database(&self) -> &Database {
        &self.inner.database
    }

    /// Returns the nodes of the service, this one first, and the partitions of each.
    pub fn nodes(&self) -> Vec<Node> {
        self.inner.log.nodes()
    }

    /// Returns `Ready` while commands are accepted and every projection of this process runs; otherwise
    /// the reasons, one sentence each.
    pub fn health(&self) -> Health {
        let spawned = lock(&self.inner.spawned).clone();
        let all =
            std::iter::once(self.inner.log.health()).chain(spawned.iter().map(Projections::health));
        let mut reasons = Vec::new();
        for health in all {
            let Health::NotReady(more) = health else { continue };
            // Log and projections may name the same database.
            reasons.extend(
                more.into_iter().filter(|reason| !reasons.contains(reason)).collect::<Vec<_>>(),
            );
        }
        if reasons.is_empty() { Health::Ready } else { Health::NotReady(reasons) }
    }

    /// Takes no more commands, settles what is pending, hands the partitions over, and ends the
    /// projections after the transactions under way; bounded in time.
    pub async fn close(self) {
        let inner = self.inner;
        inner.log.clone().close().await;
        let spawned = std::mem::take(&mut *lock(&inner.spawned));
        for projections in spawned {
            projections.shutdown().await;
        }
        inner.database.clone().close().await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No call panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! [`open`]: one handle for the log, its database, handlers, projections and queries.

use std::any::{Any, TypeId, type_name};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::IntoFuture;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use kafold_core::forward::Node;
use kafold_core::handler::HandleError;
use kafold_core::handler::HandlerConfig;
use kafold_core::store::{Health, ReadError};
use kafold_core::timeline::{self, NoRule, Timeline, TimelineCommand};
use kafold_core::{
    Aggregate, Clock, CommandBus, CommandHandler, EventSource, EventStore, IdGenerator, Offset,
    Partition, Position,
};
use kafold_migrations::rights::Role;
use kafold_migrations::{Database, Mode};
use kafold_projections::{
    Freshness, NodeReporter, ProjectionConfig, ProjectionStatus, ProjectionWorker, Projections,
    Query, ReadModel, SqlSnapshots, WaitError, WindowQuery, Windowed,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::OpenError;
use crate::log::{Log, LogOptions};
use crate::reader::LogReader;

/// Longest wait for the database in [`check_database`].
const DATABASE_TIMEOUT: Duration = Duration::from_secs(2);

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

/// As [`open`], with the log of the variable `KAFOLD_LOG`, or `default`, and with the database of the variable
/// `KAFOLD_DATABASE`, if it is set. The program `kafold` reads the same variables.
pub fn open_from_env(default: &str) -> Opening {
    // A value that is not UTF-8 is no URL, which is found when the log is opened.
    let variable = |name| std::env::var_os(name).map(|url| url.to_string_lossy().into_owned());
    let opening = open(variable("KAFOLD_LOG").unwrap_or_else(|| default.to_owned()));
    match variable("KAFOLD_DATABASE") {
        Some(database) => opening.database(database),
        None => opening,
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

    /// Opens the log read-only, for a process with projections and queries alone: it takes no commands, claims
    /// no partitions, and needs the rights of a worker only (`kafold acl print --role worker`, `kafold grants
    /// print --role worker`). Creates no topics and no file of a log.
    pub fn reader(self) -> OpeningReader {
        OpeningReader(self)
    }

    /// Opens the database, if one is given.
    async fn open_database(&self) -> Result<Option<Database>, OpenError> {
        match &self.database {
            Some(url) => Ok(Some(Database::open(url, Mode::Migrate).await?)),
            None if self.log.needs_database() => Err(OpenError::NoDatabase),
            None => Ok(None),
        }
    }

    async fn open(self) -> Result<Kafold, OpenError> {
        let database = self.open_database().await?;
        let mut options = self.log.clone();
        if let Some(database) = &database {
            options = options.index(database);
        }
        let log = options.open().await?;
        let database = database.or_else(|| log.database().cloned()).ok_or(OpenError::NoDatabase)?;
        Ok(self.opened(log, database))
    }

    async fn open_reader(self) -> Result<Kafold<LogReader>, OpenError> {
        let database = self.open_database().await?;
        let log = self.log.clone().open_reader().await?;
        let database = database.or_else(|| log.database().cloned()).ok_or(OpenError::NoDatabase)?;
        database.require(Role::Worker).await?;
        Ok(self.opened(log, database))
    }

    fn opened<L: OpenedLog>(self, log: L, database: Database) -> Kafold<L> {
        let (clock, ids) = self.log.clock_and_ids();
        let timelines = log.commands().map(|(store, bus)| {
            let handler = CommandHandler::with_parts(store, clock.clone(), ids.clone());
            let snapshots = Arc::new(SqlSnapshots::new(database.clone()));
            handler.config(self.handlers.clone()).with_snapshots(snapshots).forwarding(bus)
        });
        let name = self.log.name().to_owned();
        let handlers = Arc::new(Mutex::default());
        let spawned = Arc::new(Mutex::default());
        let health = {
            let (log, handlers, spawned) =
                (log.clone(), Arc::clone(&handlers), Arc::clone(&spawned));
            move || health(&log, &handlers, &spawned)
        };
        let reporter =
            NodeReporter::spawn(database.clone(), ids.event_id(), name, Arc::clone(&clock), health);
        Kafold {
            inner: Arc::new(Inner {
                reporter,
                log,
                database,
                clock,
                ids,
                handler_config: self.handlers,
                projection_config: self.projections,
                handlers,
                timelines,
                spawned,
            }),
        }
    }
}

impl IntoFuture for Opening {
    type Output = Result<Kafold, OpenError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.open())
    }
}

/// The options of [`Opening::reader`].
#[derive(Debug, Clone)]
#[must_use = "opens nothing until it is awaited"]
pub struct OpeningReader(Opening);

impl OpeningReader {
    /// Sets the address at which others reach this process. Default: none.
    pub fn address(self, address: impl Into<String>) -> Self {
        Self(self.0.address(address))
    }
}

impl IntoFuture for OpeningReader {
    type Output = Result<Kafold<LogReader>, OpenError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.0.open_reader())
    }
}

/// A store, and the carrier of commands to other nodes where there are others.
pub type CommandPath = (Arc<dyn EventStore>, Option<Arc<dyn CommandBus>>);

/// A [`Log`] or a [`LogReader`], of a [`Kafold`].
#[async_trait]
pub trait OpenedLog: fmt::Debug + Clone + Send + Sync + 'static {
    /// Returns the source of events for projections.
    fn source(&self) -> Arc<dyn EventSource>;

    /// Returns the number of partitions of the log.
    fn partitions(&self) -> u32;

    /// Returns the store and the carrier of commands to other nodes; `None` for a process that takes no commands.
    fn commands(&self) -> Option<CommandPath>;

    /// Returns the nodes of the service, this one first; `None` for a process that takes no commands.
    fn nodes(&self) -> Option<Vec<Node>>;

    /// Returns the brokers' refusals, one sentence each with cause and remedy.
    fn refusals(&self) -> Vec<String>;

    /// Returns `Ready`, or the reasons why not, of a process with or without command handlers.
    fn health(&self, has_handlers: bool) -> Health;

    /// Settles what is pending and closes the log.
    async fn close(self);
}

#[async_trait]
impl OpenedLog for Log {
    fn source(&self) -> Arc<dyn EventSource> {
        Self::source(self)
    }

    fn partitions(&self) -> u32 {
        Self::partitions(self)
    }

    fn commands(&self) -> Option<CommandPath> {
        Some((self.store(), Self::commands(self)))
    }

    fn nodes(&self) -> Option<Vec<Node>> {
        Some(Self::nodes(self))
    }

    fn refusals(&self) -> Vec<String> {
        Self::refusals(self)
    }

    fn health(&self, has_handlers: bool) -> Health {
        let health = Self::health(self);
        // A log in a file has no other process that would send commands to this one.
        if has_handlers || Self::commands(self).is_none() {
            return health;
        }
        health.and(Health::NotReady(vec![
            "this process takes partitions of the log and has no command handler: make the handlers when it \
             starts, with handler::<A>(), or open the log with reader()"
                .to_owned(),
        ]))
    }

    async fn close(self) {
        Self::close(self).await;
    }
}

#[async_trait]
impl OpenedLog for LogReader {
    fn source(&self) -> Arc<dyn EventSource> {
        Self::source(self)
    }

    fn partitions(&self) -> u32 {
        Self::partitions(self)
    }

    fn commands(&self) -> Option<CommandPath> {
        None
    }

    fn nodes(&self) -> Option<Vec<Node>> {
        None
    }

    fn refusals(&self) -> Vec<String> {
        Self::refusals(self)
    }

    fn health(&self, _: bool) -> Health {
        Self::health(self)
    }

    async fn close(self) {}
}

/// An open log with its database. Cheap to clone.
///
/// [`open`] opens a log for commands; [`reader`](Opening::reader) opens a `Kafold<LogReader>`, which has
/// projections and queries only.
pub struct Kafold<L = Log> {
    inner: Arc<Inner<L>>,
}

impl<L> Clone for Kafold<L> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

/// The handlers of a process.
#[derive(Default)]
struct Handlers {
    /// The [`CommandHandler`] of each kind of aggregate.
    of_type: HashMap<TypeId, Box<dyn Any + Send>>,
    /// The name of the aggregate of each category.
    categories: HashMap<&'static str, &'static str>,
}

struct Inner<L> {
    log: L,
    reporter: NodeReporter,
    database: Database,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
    handler_config: HandlerConfig,
    projection_config: ProjectionConfig,
    handlers: Arc<Mutex<Handlers>>,
    /// `None` for a process that takes no commands.
    timelines: Option<CommandHandler<Timeline>>,
    /// All projections of this process.
    spawned: Arc<Mutex<Vec<Projections>>>,
}

impl<L: fmt::Debug> fmt::Debug for Kafold<L> {
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
    /// that others send, from the first call on: make the first call when the process starts. Commands that
    /// come before are refused for now, and the node is not [ready](Self::health). An aggregate with a
    /// [`SNAPSHOT`](Aggregate::SNAPSHOT) has its snapshots in the database.
    ///
    /// # Panics
    ///
    /// If the process has a handler of another aggregate with the same [`CATEGORY`](Aggregate::CATEGORY): it would
    /// decide the commands of this one.
    #[track_caller]
    pub fn handler<A: Aggregate>(&self) -> CommandHandler<A>
    where
        A::Command: Serialize + DeserializeOwned,
        A::Error: Serialize + DeserializeOwned,
    {
        let inner = &self.inner;
        let mut handlers = lock(&inner.handlers);
        let known = handlers.of_type.get(&TypeId::of::<A>());
        if let Some(known) = known.and_then(|known| known.downcast_ref::<CommandHandler<A>>()) {
            return known.clone();
        }
        let (other, kind) = (handlers.categories.get(A::CATEGORY), type_name::<A>());
        if let Some(other) = other {
            let (category, other) = (A::CATEGORY, *other);
            // A panic must not leave the lock poisoned for the handlers of other categories.
            drop(handlers);
            panic!(
                "{kind} and {other} are aggregates of the same category {category:?}: give one of them another \
                 category, as in #[event(category = \"…\")] on its events"
            );
        }
        let (store, clock, ids) = (inner.log.store(), inner.clock.clone(), inner.ids.clone());
        let handler = CommandHandler::<A>::with_parts(store, clock, ids)
            .config(inner.handler_config.clone())
            .with_snapshots(Arc::new(SqlSnapshots::new(inner.database.clone())))
            .forwarding(inner.log.commands());
        handlers.categories.insert(A::CATEGORY, kind);
        handlers.of_type.insert(TypeId::of::<A>(), Box::new(handler.clone()));
        handler
    }

    /// Moves the clock of a timeline forward in all partitions, by clock events in the log: no event of the timeline
    /// before this time is to come. For importers at the end of their data, and for tests. A model's timeline is
    /// [`Windowed::TIMELINE`]. Returns the position of the clock event in each partition, for
    /// [`wait_for_position`](Self::wait_for_position); none where the clock was there already.
    ///
    /// A time after the present counts as the present. An event that comes later with a time before this one may be late.
    pub async fn advance_clock(
        &self,
        timeline: &str,
        to: DateTime<Utc>,
    ) -> Result<Vec<Position>, HandleError<NoRule>> {
        let (source, timelines) = (self.inner.log.source(), self.inner.timelines.as_ref());
        let timelines = timelines.expect("a log for commands has timelines");
        let to = to.min(self.inner.clock.now());
        let mut positions = Vec::new();
        for partition in (0..source.partitions()).map(Partition) {
            let stream = timeline::stream(timeline, partition, |s| source.partition_of(s))?;
            let advance = TimelineCommand::Advance { to };
            let handled = timelines.handle(stream.id(), &advance).await?;
            positions.extend(handled.position.filter(|_| handled.events > 0));
        }
        Ok(positions)
    }

    /// Returns the nodes of the service, this one first, and the partitions of each.
    pub fn nodes(&self) -> Vec<Node> {
        self.inner.log.nodes()
    }
}

impl<L: OpenedLog> Kafold<L> {
    /// Returns a worker for read models and projections. They run until [`close`](Self::close), once the
    /// worker is spawned.
    pub fn projections(&self) -> ProjectionWorker {
        let Inner { log, database, clock, ids, projection_config, spawned, .. } = &*self.inner;
        let spawned = Arc::clone(spawned);
        let worker = ProjectionWorker::new(log.source(), database.clone())
            .config(projection_config.clone())
            .clock(clock.clone(), ids.clone())
            .on_spawn(move |projections| lock(&spawned).push(projections.clone()));
        match &self.inner.timelines {
            Some(timelines) => worker.timelines(timelines.clone()),
            None => worker,
        }
    }

    /// Returns a query on a read model.
    pub fn query<M: ReadModel>(&self) -> Query<M> {
        match lock(&self.inner.spawned).last() {
            Some(spawned) => spawned.query(),
            None => Query::new(self.inner.database.clone()).config(&self.inner.projection_config),
        }
    }

    /// Returns a query on a windowed model.
    pub fn windows<M: Windowed>(&self) -> WindowQuery<M> {
        match lock(&self.inner.spawned).last() {
            Some(spawned) => spawned.windows(),
            None => {
                WindowQuery::new(self.inner.database.clone()).config(&self.inner.projection_config)
            }
        }
    }

    /// Returns the log, for its store, its source and its refusals.
    pub fn log(&self) -> &L {
        &self.inner.log
    }

    /// Returns the database of the read models.
    pub fn database(&self) -> &Database {
        &self.inner.database
    }

    /// Returns the projection of this name, if this process runs it.
    pub fn projection(&self, name: &str) -> Option<ProjectionStatus> {
        lock(&self.inner.spawned).iter().find_map(|spawned| spawned.status_of(name))
    }

    /// Waits until the projection of this name has applied everything up to and including the position.
    /// Another process that shares the database may run the projection. For the rows of a read model after
    /// one's own write use [`Query::after`].
    pub async fn wait_for_position(
        &self,
        projection: &str,
        position: Position,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        self.running(projection).wait_for_position(projection, position, timeout).await
    }

    /// Returns the last position of each partition that a projection has applied: up to where its rows are
    /// complete. The database is asked only where other processes run a part of the projection.
    pub async fn applied(&self, projection: &str) -> Result<Vec<Position>, ReadError> {
        let here = self.projection(projection).map(|status| status.partitions).unwrap_or_default();
        let next: Vec<_> = match here.len() as u32 == self.inner.log.partitions() {
            true => here.into_iter().map(|(partition, status)| (partition, status.next)).collect(),
            false => Freshness::of(&self.inner.database, projection).await?.0,
        };
        let last = next.into_iter().filter_map(|(partition, next)| {
            let offset = Offset(next.0.checked_sub(1)?);
            Some(Position { partition, offset })
        });
        Ok(last.collect())
    }

    /// Returns the handle on the projection of this name, otherwise the last handle spawned. A process without
    /// projections gets a handle that sees the projections of other processes.
    fn running(&self, projection: &str) -> Projections {
        let spawned = lock(&self.inner.spawned).clone();
        let has = |one: &&Projections| one.status_of(projection).is_some();
        let found = spawned.iter().find(has).or(spawned.last()).cloned();
        found.unwrap_or_else(|| self.projections().spawn())
    }

    /// Returns `Ready` while commands are accepted and every projection of this process runs; otherwise
    /// the reasons, one sentence each. A process on Kafka without a [`handler`](Self::handler) is not ready.
    pub fn health(&self) -> Health {
        let Inner { log, handlers, spawned, .. } = &*self.inner;
        health(log, handlers, spawned)
    }

    /// As [`health`](Self::health), and reads from the database, because idle projections do not notice a lost
    /// database. Answers within 2 s.
    pub async fn check(&self) -> Health {
        let database = check_database(&self.inner.database, &*self.inner.clock).await;
        self.health().and(database)
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
        inner.reporter.close().await;
        inner.database.clone().close().await;
    }
}

fn health(
    log: &impl OpenedLog,
    handlers: &Mutex<Handlers>,
    spawned: &Mutex<Vec<Projections>>,
) -> Health {
    let has_handlers = !lock(handlers).of_type.is_empty();
    let spawned = lock(spawned).clone();
    let health = spawned.iter().map(Projections::health);
    health.fold(log.health(has_handlers), Health::and).and(spawned_twice(&spawned))
}

/// Returns the projections that run twice in this process: only one of the two gets the partitions.
fn spawned_twice(spawned: &[Projections]) -> Health {
    let mut seen = HashSet::new();
    let names = spawned.iter().flat_map(Projections::status).map(|status| status.name);
    let twice: Vec<_> = names.filter(|name| !seen.insert(name.clone())).collect();
    if twice.is_empty() {
        return Health::Ready;
    }
    let reason = |name| {
        format!(
            "projection {name} is spawned twice in this process: add it to one worker and spawn it once"
        )
    };
    Health::NotReady(twice.into_iter().map(reason).collect())
}

/// Reads from the database, because idle projections do not notice a lost database. Answers within 2 s.
pub async fn check_database(database: &Database, clock: &dyn Clock) -> Health {
    let url = database.url();
    tokio::select! {
        biased;
        // Any name reads the tables.
        read = Freshness::of(database, "") => match read {
            Ok(_) => Health::Ready,
            Err(error) => {
                Health::NotReady(vec![format!("the database {url} cannot be read: {error}")])
            }
        },
        () = clock.sleep(DATABASE_TIMEOUT) => {
            let complaint = format!("the database {url} does not answer within {DATABASE_TIMEOUT:?}");
            Health::NotReady(vec![complaint])
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No call panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

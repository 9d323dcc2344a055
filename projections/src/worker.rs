//! [`ProjectionWorker`]: which projections run, and how they are started.

use std::collections::HashSet;
use std::sync::Arc;

use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::{Clock, EventSource, IdGenerator};
use kafold_migrations::{Database, Role};
use tokio::sync::{Notify, watch};

use crate::config::ProjectionConfig;
use crate::desired::{self, AllDesired};
use crate::handle::Projections;
use crate::handler::Handler;
use crate::projection::{Projection, ProjectionHandler};
use crate::read_model::{ModelHandler, ReadModel};
use crate::runner::Orders;
use crate::status::{ProjectionState, SharedStatus};
use crate::supervisor::Supervisor;

/// What every projection of a worker shares.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) source: Arc<dyn EventSource>,
    pub(crate) database: Database,
    pub(crate) config: ProjectionConfig,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ids: Arc<dyn IdGenerator>,
    /// Has what operators ask looked up at once.
    pub(crate) look: Arc<Notify>,
}

type OnSpawn = Box<dyn FnOnce(&Projections) + Send>;

/// Folds the events of a log into read models.
///
/// Each projection is a task with a subscription of its own, named after it, so one that fails or is
/// slow leaves the others alone. Rows and checkpoint commit in one transaction: after any crash a
/// read model equals the fold of the log up to its checkpoint.
pub struct ProjectionWorker {
    pub(crate) context: Context,
    pub(crate) handlers: Vec<Arc<dyn Handler>>,
    spawned: Option<OnSpawn>,
}

impl ProjectionWorker {
    /// A worker without projections, reading `source` and writing `database`.
    pub fn new(source: Arc<dyn EventSource>, database: Database) -> Self {
        let context = Context {
            source,
            database,
            config: ProjectionConfig::default(),
            clock: Arc::new(SystemClock),
            ids: Arc::new(RandomIds),
            look: Arc::new(Notify::new()),
        };
        Self { context, handlers: Vec::new(), spawned: None }
    }

    /// Runs a read model.
    #[must_use]
    pub fn with<M: ReadModel>(mut self, model: M) -> Self {
        // The value only names the type.
        drop(model);
        self.handlers.push(Arc::new(ModelHandler::<M>::new()));
        self
    }

    /// Runs a projection written by hand.
    #[must_use]
    pub fn with_projection(mut self, projection: impl Projection) -> Self {
        self.handlers.push(Arc::new(ProjectionHandler::new(projection)));
        self
    }

    /// Sets the limits.
    #[must_use]
    pub fn config(mut self, config: ProjectionConfig) -> Self {
        self.context.config = config;
        self
    }

    /// Sets where time and jitter come from.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>, ids: Arc<dyn IdGenerator>) -> Self {
        self.context.clock = clock;
        self.context.ids = ids;
        self
    }

    /// Sets a function that gets the handle of the spawned projections, such as one that keeps the handle
    /// for a graceful stop.
    #[must_use]
    pub fn on_spawn(mut self, spawned: impl FnOnce(&Projections) + Send + 'static) -> Self {
        self.spawned = Some(Box::new(spawned));
        self
    }

    /// Starts every projection. Waits for nothing: while the log or the database is down the
    /// projections wait, and say so in their status. Needs a tokio runtime around it.
    #[must_use = "dropped, it ends the projections"]
    pub fn spawn(self) -> Projections {
        let (shutdown, asked) = watch::channel(false);
        let (told, desired) = watch::channel(AllDesired::default());
        let mut names = HashSet::new();
        let mut started = Vec::with_capacity(self.handlers.len());
        for handler in self.handlers {
            let definition = handler.definition();
            let name = definition.name.clone();
            let status = SharedStatus::new(&name);
            let mistake = definition.check().err().or_else(|| {
                let taken = !names.insert(name.clone());
                taken.then(|| format!("another projection of this worker is named {name} too"))
            });
            let task = match mistake {
                Some(mistake) => {
                    tracing::error!(projection = name, mistake, "projection cannot run");
                    status.change(|status| status.state = ProjectionState::Stopped(mistake));
                    None
                }
                None => {
                    let orders = Orders { shutdown: asked.clone(), desired: desired.clone() };
                    let (context, status) = (self.context.clone(), status.clone());
                    Some(tokio::spawn(Supervisor::new(handler, context, status, orders).run()))
                }
            };
            started.push((status, task));
        }
        drop(desired);
        let running = started.iter().filter(|(_, task)| task.is_some());
        let running = running.map(|(status, _)| status.name().to_owned()).collect();
        self.context.database.watch(Role::Worker);
        tokio::spawn(desired::poll(self.context.clone(), running, told));
        let projections = Projections::new(self.context, started, shutdown);
        if let Some(spawned) = self.spawned {
            spawned(&projections);
        }
        projections
    }
}

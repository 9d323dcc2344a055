//! [`ProjectionWorker`]: which projections run, and how they are started.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::row::Merge;
use kafold_core::timeline::Timeline;
use kafold_core::window::Window;
use kafold_core::{Clock, CommandHandler, EventSource, IdGenerator};
use kafold_migrations::{Database, Role};
use tokio::sync::{Notify, watch};

use crate::clock_events::ClockEvents;
use crate::config::ProjectionConfig;
use crate::desired::{self, AllDesired};
use crate::handle::Projections;
use crate::handler::Handler;
use crate::projection::{Projection, ProjectionHandler};
use crate::read_model::{ModelHandler, ReadModel};
use crate::runner::Orders;
use crate::status::{ProjectionState, SharedStatus};
use crate::supervisor::Supervisor;
use crate::windowed::{Fixed, Sessions, WindowHandler, Windowed};

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
    grace: Option<Duration>,
    timelines: Option<CommandHandler<Timeline>>,
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
        Self { context, handlers: Vec::new(), spawned: None, grace: None, timelines: None }
    }

    /// Runs a read model.
    #[must_use = "projections run after `spawn`"]
    pub fn with<M: ReadModel>(mut self) -> Self {
        self.handlers.push(Arc::new(ModelHandler::<M>::new()));
        self
    }

    /// Runs a windowed model, except one of sessions.
    #[must_use = "projections run after `spawn`"]
    pub fn with_windows<M: Windowed>(mut self) -> Self {
        self.handlers.push(Arc::new(WindowHandler::<M, Fixed>::fixed(self.window_of::<M>())));
        self
    }

    /// Runs a windowed model of sessions.
    #[must_use = "projections run after `spawn`"]
    pub fn with_sessions<M: Windowed + Merge>(mut self) -> Self {
        self.handlers.push(Arc::new(WindowHandler::<M, Sessions>::sessions(self.window_of::<M>())));
        self
    }

    /// Sets the grace of the windowed models that are added after this call, in place of the grace of
    /// [`Windowed::WINDOW`]. A model with another grace is another definition: the worker refuses its rows until they
    /// are rebuilt.
    #[must_use = "projections run after `spawn`"]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = Some(grace);
        self
    }

    fn window_of<M: Windowed>(&self) -> Window {
        self.grace.map_or(M::WINDOW, |grace| M::WINDOW.with_grace(grace))
    }

    /// Runs a projection written by hand.
    #[must_use = "projections run after `spawn`"]
    pub fn with_projection(mut self, projection: impl Projection) -> Self {
        self.handlers.push(Arc::new(ProjectionHandler::new(projection)));
        self
    }

    /// Sets the limits.
    #[must_use = "projections run after `spawn`"]
    pub fn config(mut self, config: ProjectionConfig) -> Self {
        self.context.config = config;
        self
    }

    /// Sets where time and jitter come from.
    #[must_use = "projections run after `spawn`"]
    pub fn clock(mut self, clock: Arc<dyn Clock>, ids: Arc<dyn IdGenerator>) -> Self {
        self.context.clock = clock;
        self.context.ids = ids;
        self
    }

    /// Appends clock events through this handler: windows close although a partition has no events. Default: windows close
    /// only with the events of all partitions.
    #[must_use = "projections run after `spawn`"]
    pub fn timelines(mut self, handler: CommandHandler<Timeline>) -> Self {
        self.timelines = Some(handler);
        self
    }

    /// Sets a function that gets the handle of the spawned projections, such as one that keeps the handle
    /// for a graceful stop.
    #[must_use = "projections run after `spawn`"]
    pub fn on_spawn(mut self, spawned: impl FnOnce(&Projections) + Send + 'static) -> Self {
        self.spawned = Some(Box::new(spawned));
        self
    }

    /// Starts every projection. Waits for nothing: while the log or the database is down the
    /// projections wait, and say so in their status. Needs a tokio runtime around it. The projections end when
    /// the last clone of the returned handle is dropped.
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
                    if let Some(handler) = &self.timelines
                        && let Some(events) =
                            ClockEvents::of(definition, context.clone(), handler.clone())
                    {
                        tokio::spawn(events.run(asked.clone()));
                    }
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

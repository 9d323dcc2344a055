//! [`Projections`]: the handle on running projections.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kafold_core::store::Health;
use kafold_core::{Handled, Position};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::query::Query;
use crate::read_model::ReadModel;
use crate::status::{ProjectionStatus, SharedStatus};
use crate::wait::{WaitError, Waiter};
use crate::windowed::{WindowQuery, Windowed};
use crate::worker::Context;

/// The running projections of a worker. Cheap to clone; when the last clone is dropped, they end as
/// if the process had been killed, which loses nothing.
#[derive(Clone)]
pub struct Projections {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    waiter: Arc<Waiter>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    shutdown: watch::Sender<bool>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let tasks = self.tasks.get_mut().unwrap_or_else(PoisonError::into_inner);
        if tasks.iter().any(|task| !task.is_finished()) {
            tracing::warn!("projections end, because the handle on them was dropped");
        }
        tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Projections {
    pub(crate) fn new(
        context: Context,
        started: Vec<(SharedStatus, Option<JoinHandle<()>>)>,
        shutdown: watch::Sender<bool>,
    ) -> Self {
        let (statuses, tasks): (Vec<_>, Vec<_>) = started.into_iter().unzip();
        let tasks = Mutex::new(tasks.into_iter().flatten().collect());
        let Context { database, clock, config, .. } = &context;
        let waiter = Waiter::new(database.clone(), clock.clone(), config, statuses);
        let waiter = Arc::new(waiter);
        Self { inner: Arc::new(Inner { context, waiter, tasks, shutdown }) }
    }

    /// Waits until a read model has applied one's own write, in this process or in another one that
    /// shares the database; a query after it sees the write. Waits at most
    /// [`wait_timeout`](crate::ProjectionConfig::wait_timeout).
    pub async fn wait_for<M: ReadModel>(&self, handled: &Handled) -> Result<(), WaitError> {
        self.inner.waiter.wait_for(M::NAME, handled.position).await
    }

    /// Waits until the projection of this name has applied everything up to and including the position.
    /// Another process that shares the database may run the projection.
    pub async fn wait_for_position(
        &self,
        name: &str,
        position: Position,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        self.inner.waiter.wait_for_position(name, position, timeout).await
    }

    /// Returns a query on a read model, whose [`after`](Query::after) sees the progress of this
    /// process's projections at once.
    pub fn query<M: ReadModel>(&self) -> Query<M> {
        Query::with_waiter(self.inner.context.database.clone(), self.inner.waiter.clone())
    }

    /// Returns a query on a windowed model.
    pub fn windows<M: Windowed>(&self) -> WindowQuery<M> {
        WindowQuery::with_waiter(self.inner.context.database.clone(), self.inner.waiter.clone())
    }

    /// How each projection of this worker fares.
    pub fn status(&self) -> Vec<ProjectionStatus> {
        self.inner.waiter.statuses().iter().map(SharedStatus::now).collect()
    }

    /// Returns the status of the projection of this name, if this worker runs it.
    pub fn status_of(&self, name: &str) -> Option<ProjectionStatus> {
        let mut statuses = self.inner.waiter.statuses().iter();
        statuses.find(|status| status.name() == name).map(SharedStatus::now)
    }

    /// Returns `Ready` if every projection of this worker runs and the database grants all needed
    /// rights; otherwise the reasons. Also updates the metrics of the lag.
    pub fn health(&self) -> Health {
        let now = self.inner.context.clock.now();
        self.inner.waiter.statuses().iter().for_each(|status| status.measure_lag(now));
        let mut complaints: Vec<_> =
            self.status().iter().flat_map(ProjectionStatus::complaints).collect();
        let refuses = |complaint| format!("the database refuses: {complaint}");
        complaints.extend(self.inner.context.database.complaint().map(refuses));
        if complaints.is_empty() { Health::Ready } else { Health::NotReady(complaints) }
    }

    /// Ends every projection after the transaction it is in, within
    /// [`shutdown_timeout`](crate::ProjectionConfig::shutdown_timeout).
    pub async fn shutdown(&self) {
        // Nobody listens any more when all have stopped.
        self.inner.shutdown.send_replace(true);
        let tasks = {
            let mut tasks = self.inner.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *tasks)
        };
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let Context { clock, config, .. } = &self.inner.context;
        tokio::select! {
            biased;
            _ = futures_util::future::join_all(tasks) => {}
            () = clock.sleep(config.shutdown_timeout) => {
                tracing::warn!("projections did not end in time and are abandoned");
                aborts.iter().for_each(|abort| abort.abort());
            }
        }
    }
}

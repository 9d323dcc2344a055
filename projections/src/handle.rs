//! [`Projections`]: the handle on running projections.

use std::future::pending;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kafold_core::Position;
use kafold_core::store::Health;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::registry::{self, Standing};
use crate::status::{ProjectionState, ProjectionStatus, SharedStatus};
use crate::wait::{Listener, WaitError, heard_applied};
use crate::worker::Context;

/// The running projections of a worker. Cheap to clone; when the last clone is dropped, they end as
/// if the process had been killed, which loses nothing.
#[derive(Clone)]
pub struct Projections {
    inner: Arc<Inner>,
}

struct Inner {
    context: Context,
    statuses: Vec<SharedStatus>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    shutdown: watch::Sender<bool>,
    /// Made when a wait first needs to know of another process.
    listener: OnceLock<Listener>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let tasks = self.tasks.get_mut().unwrap_or_else(PoisonError::into_inner);
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
        let listener = OnceLock::new();
        Self { inner: Arc::new(Inner { context, statuses, tasks, shutdown, listener }) }
    }

    /// Waits until the projection has applied everything up to and including the position, in this
    /// process or in another one that shares the database; a query after it sees the position's
    /// rows. `name` need not be run by this worker.
    pub async fn wait_for(
        &self,
        name: &str,
        position: Position,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        let mut standing = "not looked up yet".to_owned();
        let waited = tokio::select! {
            biased;
            waited = self.wait(name, position, &mut standing) => Some(waited),
            () = self.inner.context.clock.sleep(timeout) => None,
        };
        waited.unwrap_or_else(|| {
            let projection = name.to_owned();
            Err(WaitError::Timeout { projection, position, timeout, standing })
        })
    }

    /// How each projection of this worker fares.
    pub fn status(&self) -> Vec<ProjectionStatus> {
        self.inner.statuses.iter().map(SharedStatus::now).collect()
    }

    /// Returns `Ready` if every projection of this worker runs and the database grants all needed
    /// rights; otherwise the reasons. Also updates the metrics of the lag.
    pub fn health(&self) -> Health {
        let now = self.inner.context.clock.now();
        self.inner.statuses.iter().for_each(|status| status.measure_lag(now));
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

    async fn wait(
        &self,
        name: &str,
        position: Position,
        standing: &mut String,
    ) -> Result<(), WaitError> {
        let local = self.inner.statuses.iter().find(|status| status.name() == name);
        let is_local = local.is_some();
        let mut watched = local.map(SharedStatus::watch);
        loop {
            let (here, is_starting) = match &mut watched {
                Some(watched) => {
                    let status = watched.borrow_and_update();
                    let is_starting = matches!(status.state, ProjectionState::Starting);
                    (look(&status, position, standing)?, is_starting)
                }
                None => (None, false),
            };
            if here == Some(true) {
                return Ok(());
            }
            tokio::select! {
                () = changed(watched.as_mut()) => {}
                // The partition may be held by another process. Before this worker has recognised the log,
                // a checkpoint may be one of another log.
                applied = self.wait_elsewhere(name, position, is_local),
                    if here.is_none() && !is_starting =>
                {
                    return applied;
                }
            }
        }
    }

    /// Waits for whoever runs it to have applied the position.
    async fn wait_elsewhere(
        &self,
        name: &str,
        position: Position,
        is_local: bool,
    ) -> Result<(), WaitError> {
        let Context { database, clock, config, .. } = &self.inner.context;
        let new = || Listener::new(database, clock.clone(), config.wait_poll_interval);
        let listener = self.inner.listener.get_or_init(new);
        let mut heard = listener.watch();
        loop {
            match registry::standing(database, name, position.partition).await {
                Ok(Some(Standing { next, .. })) if next > position.offset => return Ok(()),
                // A worker of this process tells by itself whether it has stopped.
                Ok(Some(Standing { stopped: Some(reason), .. })) if !is_local => {
                    return Err(stopped(name, &reason));
                }
                Ok(None) if !is_local => {
                    return Err(WaitError::UnknownProjection(name.to_owned()));
                }
                Ok(_) => {}
                // The database may be back before the time is over.
                Err(error) => tracing::debug!(%error, name, "cannot look up a checkpoint"),
            }
            let applied = heard.wait_for(|heard| heard_applied(heard, name, position));
            tokio::select! {
                Ok(_) = applied => return Ok(()),
                () = clock.sleep(listener.poll_interval()) => {}
            }
        }
    }
}

/// Whether the worker of this process has applied the position, if it holds the partition.
fn look(
    status: &ProjectionStatus,
    position: Position,
    standing: &mut String,
) -> Result<Option<bool>, WaitError> {
    if let ProjectionState::Stopped(reason) = &status.state {
        return Err(stopped(&status.name, reason));
    }
    let applied = status.has_applied(position);
    if applied != Some(true) {
        *standing = match status.partitions.get(&position.partition) {
            Some(partition) => format!("it is at {}, {}", partition.next, status.state),
            None => format!("this worker does not hold the partition, {}", status.state),
        };
    }
    Ok(applied)
}

/// Wakes when the worker of this process has news; never when it has no such projection.
async fn changed(watched: Option<&mut watch::Receiver<ProjectionStatus>>) {
    let Some(watched) = watched else { return pending().await };
    if watched.changed().await.is_err() {
        // Unreachable while the handle lives: it holds the sender.
        pending::<()>().await;
    }
}

fn stopped(name: &str, reason: &str) -> WaitError {
    WaitError::Stopped { projection: name.to_owned(), reason: reason.to_owned() }
}

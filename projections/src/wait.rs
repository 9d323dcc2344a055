//! Read your writes: waiting until a projection has applied a position, whoever runs it.
//!
//! A worker in this process is watched directly. Another process's is looked up in the database:
//! woken by LISTEN/NOTIFY on PostgreSQL, over one connection for all who wait, and by bounded
//! polling on SQLite and while that connection is down.

use std::collections::HashMap;
use std::future::pending;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kafold_core::{Clock, Offset, Partition, Position};
use kafold_migrations::{Database, PostgresDatabase};
use sqlx::postgres::PgListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::checkpoint::CHANNEL;
use crate::config::ProjectionConfig;
use crate::registry::{self, Standing};
use crate::status::{ProjectionState, ProjectionStatus, SharedStatus};

/// How often the database is asked although the listener is up, in case a message was lost.
const LISTENING_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long the listener waits before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_secs(1);
/// Entries of other workers' progress kept at most; beyond it, they are asked for again.
const HEARD_MAX: usize = 10_000;

/// Why a wait ended before the position was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The time is over: the projection is behind, waits, or the position is not in the log.
    #[error("{projection} has not applied {position} within {timeout:?} ({standing})")]
    Timeout {
        /// The projection.
        projection: String,
        /// What was waited for.
        position: Position,
        /// How long.
        timeout: Duration,
        /// Where it stands, or why that is not known.
        standing: String,
    },
    /// Neither this process nor the database knows a projection of this name.
    #[error("there is no projection {0}")]
    UnknownProjection(String),
    /// It has stopped and will not apply anything until it is started again.
    #[error("projection {projection} has stopped: {reason}")]
    Stopped {
        /// The projection.
        projection: String,
        /// Why.
        reason: String,
    },
}

/// Waits for projections, of this process and of others.
pub(crate) struct Waiter {
    database: Database,
    clock: Arc<dyn Clock>,
    poll_interval: Duration,
    /// Longest wait for one's own write.
    timeout: Duration,
    /// The projections of this process.
    statuses: Vec<SharedStatus>,
    /// Connected when a wait first needs to know of another process.
    listener: OnceLock<Listener>,
}

impl Waiter {
    pub(crate) fn new(
        database: Database,
        clock: Arc<dyn Clock>,
        config: &ProjectionConfig,
        statuses: Vec<SharedStatus>,
    ) -> Self {
        let (poll_interval, timeout) = (config.wait_poll_interval, config.wait_timeout);
        let listener = OnceLock::new();
        Self { database, clock, poll_interval, timeout, statuses, listener }
    }

    pub(crate) fn statuses(&self) -> &[SharedStatus] {
        &self.statuses
    }

    /// Waits until a projection has applied one's own write, at most
    /// [`wait_timeout`](ProjectionConfig::wait_timeout).
    pub(crate) async fn wait_for(
        &self,
        name: &str,
        position: Option<Position>,
    ) -> Result<(), WaitError> {
        match position {
            Some(position) => self.wait_for_position(name, position, self.timeout).await,
            // The stream has no event.
            None => Ok(()),
        }
    }

    pub(crate) async fn wait_for_position(
        &self,
        name: &str,
        position: Position,
        timeout: Duration,
    ) -> Result<(), WaitError> {
        let mut standing = "not looked up yet".to_owned();
        let waited = tokio::select! {
            biased;
            waited = self.wait(name, position, &mut standing) => Some(waited),
            () = self.clock.sleep(timeout) => None,
        };
        waited.unwrap_or_else(|| {
            let projection = name.to_owned();
            Err(WaitError::Timeout { projection, position, timeout, standing })
        })
    }

    async fn wait(
        &self,
        name: &str,
        position: Position,
        standing: &mut String,
    ) -> Result<(), WaitError> {
        let local = self.statuses.iter().find(|status| status.name() == name);
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

    /// Waits until another process has applied the position.
    async fn wait_elsewhere(
        &self,
        name: &str,
        position: Position,
        is_local: bool,
    ) -> Result<(), WaitError> {
        let Self { database, clock, .. } = self;
        let new = || Listener::new(database, clock.clone(), self.poll_interval);
        let listener = self.listener.get_or_init(new);
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

/// Returns whether the worker of this process has applied the position, if it holds the partition.
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

/// Where a projection was heard to be in a partition.
type Heard = HashMap<(String, Partition), Offset>;

/// Hears of the progress of workers in other processes. Dropped, it stops listening.
struct Listener {
    heard: Arc<watch::Sender<Heard>>,
    is_up: Arc<AtomicBool>,
    task: Option<JoinHandle<()>>,
    poll_interval: Duration,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Listener {
    /// Listens from now on, on PostgreSQL.
    fn new(database: &Database, clock: Arc<dyn Clock>, poll_interval: Duration) -> Self {
        let heard = Arc::new(watch::Sender::new(Heard::new()));
        let is_up = Arc::new(AtomicBool::new(false));
        let task = match database {
            Database::Postgres(database) => {
                let (database, heard, is_up) = (database.clone(), heard.clone(), is_up.clone());
                Some(tokio::spawn(listen(database, heard, is_up, clock)))
            }
            Database::Sqlite(_) => None,
        };
        Self { heard, is_up, task, poll_interval }
    }

    /// Wakes its watcher whenever something was heard.
    fn watch(&self) -> watch::Receiver<Heard> {
        self.heard.subscribe()
    }

    /// How long to wait at most before the database is asked again.
    fn poll_interval(&self) -> Duration {
        match self.is_up.load(Ordering::Acquire) {
            true => LISTENING_POLL_INTERVAL,
            false => self.poll_interval,
        }
    }
}

/// Whether the projection was heard to be beyond the position.
fn heard_applied(heard: &Heard, name: &str, position: Position) -> bool {
    let next = heard.get(&(name.to_owned(), position.partition));
    next.is_some_and(|next| *next > position.offset)
}

async fn listen(
    database: PostgresDatabase,
    heard: Arc<watch::Sender<Heard>>,
    is_up: Arc<AtomicBool>,
    clock: Arc<dyn Clock>,
) {
    loop {
        let error = hear(&database, &heard, &is_up).await;
        is_up.store(false, Ordering::Release);
        // Waiters poll until it is back.
        tracing::debug!(%error, "listening for checkpoints is interrupted");
        clock.sleep(RECONNECT_DELAY).await;
    }
}

/// Listens until the connection fails.
async fn hear(
    database: &PostgresDatabase,
    heard: &watch::Sender<Heard>,
    is_up: &AtomicBool,
) -> sqlx::Error {
    let mut listener = match PgListener::connect_with(database.pool()).await {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    if let Err(error) = listener.listen(CHANNEL).await {
        return error;
    }
    is_up.store(true, Ordering::Release);
    loop {
        match listener.try_recv().await {
            Ok(Some(message)) => note(heard, message.payload()),
            Ok(None) => return sqlx::Error::PoolClosed,
            Err(error) => return error,
        }
    }
}

fn note(heard: &watch::Sender<Heard>, payload: &str) {
    let mut parts = payload.split('/');
    let (name, partition, next) = (parts.next(), parts.next(), parts.next());
    let partition = partition.and_then(|text| text.parse().ok()).map(Partition);
    let next = next.and_then(|text| text.parse().ok()).map(Offset);
    let (Some(name), Some(partition), Some(next)) = (name, partition, next) else {
        tracing::warn!(payload, "a notification on {CHANNEL} is not kafold's");
        return;
    };
    heard.send_modify(|heard| {
        if heard.len() >= HEARD_MAX {
            heard.clear();
        }
        heard.insert((name.to_owned(), partition), next);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_is_heard_and_a_foreign_one_is_not() {
        let heard = watch::Sender::new(Heard::new());
        note(&heard, "sales/3/17");
        note(&heard, "nonsense");
        note(&heard, "sales/x/18");
        let at = |offset| Position { partition: Partition(3), offset: Offset(offset) };
        assert!(heard_applied(&heard.borrow(), "sales", at(16)));
        assert!(!heard_applied(&heard.borrow(), "sales", at(17)));
        assert_eq!(heard.borrow().len(), 1);
    }
}

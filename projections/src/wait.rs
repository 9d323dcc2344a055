//! Read your writes: waiting until a projection has applied a position, whoever runs it.
//!
//! A worker in this process is watched directly. Another process's is looked up in the database:
//! woken by LISTEN/NOTIFY on PostgreSQL, over one connection for all who wait, and by bounded
//! polling on SQLite and while that connection is down.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kafold_core::{Clock, Offset, Partition, Position};
use kafold_migrations::{Database, PostgresDatabase};
use sqlx::postgres::PgListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::checkpoint::CHANNEL;

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

/// Where a projection was heard to be in a partition.
type Heard = HashMap<(String, Partition), Offset>;

/// Hears of the progress of workers in other processes. Dropped, it stops listening.
pub(crate) struct Listener {
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
    pub(crate) fn new(database: &Database, clock: Arc<dyn Clock>, poll_interval: Duration) -> Self {
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
    pub(crate) fn watch(&self) -> watch::Receiver<Heard> {
        self.heard.subscribe()
    }

    /// How long to wait at most before the database is asked again.
    pub(crate) fn poll_interval(&self) -> Duration {
        match self.is_up.load(Ordering::Acquire) {
            true => LISTENING_POLL_INTERVAL,
            false => self.poll_interval,
        }
    }
}

/// Whether the projection was heard to be beyond the position.
pub(crate) fn heard_applied(heard: &Heard, name: &str, position: Position) -> bool {
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

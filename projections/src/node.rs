//! The health of each process of a service, stored in the database for programs that run elsewhere, such as
//! `kafold status`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kafold_core::Clock;
use kafold_core::store::{Health, ReadError};
use kafold_migrations::Database;
use serde::Serialize;
use tokio::sync::watch;
use uuid::Uuid;

use crate::index::read_error;
use crate::sql::{either, reading, with_clock};
use crate::transaction::OpenTransaction;

/// Interval of the reports of a node.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait for the deletion of a report at the end of a process.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// Most reasons in a report, and most characters of a reason.
const REASONS_MAX: usize = 20;
const REASON_CHARS_MAX: usize = 500;

/// Reports the health of this process every 5 s, until it is closed or dropped.
pub struct NodeReporter {
    clock: Arc<dyn Clock>,
    /// The task of the reports has the receiver.
    stop: watch::Sender<()>,
}

impl fmt::Debug for NodeReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeReporter").finish_non_exhaustive()
    }
}

impl NodeReporter {
    /// Starts the reports. `id` identifies the process and `name` shows it to operators.
    pub fn spawn(
        database: Database,
        id: Uuid,
        name: String,
        clock: Arc<dyn Clock>,
        health: impl Fn() -> Health + Send + 'static,
    ) -> Self {
        let (stop, stopped) = watch::channel(());
        let task = report_until(stopped, database, id, name, Arc::clone(&clock), health);
        tokio::spawn(task);
        Self { clock, stop }
    }

    /// Ends the reports and deletes the newest one, within 2 s: a node that ends as it should is no longer
    /// shown.
    pub async fn close(&self) {
        self.stop.send_replace(());
        tokio::select! {
            () = self.stop.closed() => {}
            () = self.clock.sleep(CLOSE_MAX) => {}
        }
    }
}

async fn report_until(
    mut stopped: watch::Receiver<()>,
    database: Database,
    id: Uuid,
    name: String,
    clock: Arc<dyn Clock>,
    health: impl Fn() -> Health,
) {
    let mut is_stored = true;
    loop {
        let stored = report(&database, id, &name, health()).await;
        if let (Err(error), true) = (&stored, is_stored) {
            tracing::warn!(%error, "cannot store the health of this node for operators");
        }
        is_stored = stored.is_ok();
        tokio::select! {
            () = clock.sleep(REPORT_INTERVAL) => {}
            _ = stopped.changed() => break,
        }
    }
    if let Err(error) = delete(&database, id).await {
        tracing::debug!(%error, "cannot delete the health of this node");
    }
}

async fn report(
    database: &Database,
    id: Uuid,
    name: &str,
    health: Health,
) -> Result<(), sqlx::Error> {
    let reasons = match health {
        Health::Ready => Vec::new(),
        Health::NotReady(reasons) => reasons,
    };
    let cut = |reason: &String| reason.chars().take(REASON_CHARS_MAX).collect::<String>();
    let reasons: Vec<_> = reasons.iter().take(REASONS_MAX).map(cut).collect();
    let is_ready = reasons.is_empty();
    let is_postgres = matches!(database, Database::Postgres(_));
    let stored = with_clock(
        is_postgres,
        "INSERT INTO kafold_node (id, name, seen_at, unready_at, reasons) \
         SELECT $1, $2, s, CASE WHEN $3 THEN NULL ELSE s END, $4 FROM (SELECT ",
        " AS s) AS now WHERE TRUE ON CONFLICT (id) DO UPDATE SET \
           seen_at = excluded.seen_at, reasons = excluded.reasons, \
           unready_at = CASE WHEN $3 THEN NULL ELSE COALESCE(kafold_node.unready_at, excluded.seen_at) END",
    );
    let forgotten = with_clock(is_postgres, "DELETE FROM kafold_node WHERE seen_at < ", " - 86400");
    let mut open = OpenTransaction::begin_forgettable(database).await?;
    either!(&mut open.lend(), connection => {
        let stored = sqlx::query(stored).bind(id.to_string()).bind(name).bind(is_ready);
        stored.bind(serde_json::json!(reasons).to_string()).execute(&mut **connection).await?;
        sqlx::query(forgotten).execute(&mut **connection).await?;
    });
    open.commit().await
}

async fn delete(database: &Database, id: Uuid) -> Result<(), sqlx::Error> {
    let mut open = OpenTransaction::begin_forgettable(database).await?;
    let sql = "DELETE FROM kafold_node WHERE id = $1";
    either!(&mut open.lend(), connection => {
        sqlx::query(sql).bind(id.to_string()).execute(&mut **connection).await?;
    });
    open.commit().await
}

/// The newest report of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeReport {
    /// The name of the node.
    pub name: String,
    /// Seconds since the report.
    pub seen_seconds: i64,
    /// Seconds for which the node has not been ready; `None` for a ready node.
    pub unready_seconds: Option<i64>,
    /// The reasons for which the node is not ready, one sentence each.
    pub reasons: Vec<String>,
}

impl NodeReport {
    /// A node without a report for longer was killed, or cannot write to the database.
    pub const SILENT_SECONDS: i64 = 20;
    /// A node which is not ready for longer needs an operator: a start and a rebalance take a few seconds.
    pub const UNREADY_SECONDS: i64 = 15;

    /// Returns the reports of all nodes, by name. A node which was killed is in it for a day.
    pub async fn all(database: &Database) -> Result<Vec<Self>, ReadError> {
        Self::read(database).await.map_err(read_error)
    }

    async fn read(database: &Database) -> Result<Vec<Self>, sqlx::Error> {
        let sql = with_clock(
            matches!(database, Database::Postgres(_)),
            "SELECT name, s - seen_at, s - unready_at, reasons FROM (SELECT ",
            " AS s) AS now, kafold_node ORDER BY name, id",
        );
        let rows: Vec<(String, i64, Option<i64>, String)> =
            reading!(database, pool => sqlx::query_as(sql).fetch_all(pool).await?);
        let of = |(name, seen_seconds, unready_seconds, reasons): (_, _, _, String)| {
            let reasons = serde_json::from_str(&reasons)
                .map_err(|error| sqlx::Error::Decode(error.into()))?;
            Ok(Self { name, seen_seconds, unready_seconds, reasons })
        };
        rows.into_iter().map(of).collect()
    }

    /// Returns `true` for a node which was killed, or cannot write to the database.
    pub fn is_silent(&self) -> bool {
        self.seen_seconds > Self::SILENT_SECONDS
    }

    /// Returns the complaint about a node which was killed, or cannot write to the database.
    pub fn silence(&self) -> Option<String> {
        let Self { name, seen_seconds, .. } = self;
        self.is_silent().then(|| {
            format!(
                "node {name} has not reported for {seen_seconds} s: it was killed, or it cannot write to the database"
            )
        })
    }

    /// Returns the complaint about a node which runs and is not ready for longer than a start takes.
    pub fn complaint(&self) -> Option<String> {
        let seconds = self.unready_seconds.filter(|seconds| *seconds > Self::UNREADY_SECONDS)?;
        let Self { name, reasons, .. } = self;
        (!self.is_silent()).then(|| {
            format!("node {name} has not been ready for {seconds} s: {}", reasons.join("; "))
        })
    }
}

//! The table `kafold_audit`: who did what to a projection, when and why.

use chrono::{DateTime, Utc};
use kafold_migrations::micros::Time;
use serde_json::Value;

use crate::sql::either;
use crate::transaction::Transaction;

/// One act, and who asked for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Act<'a> {
    pub(crate) actor: &'a str,
    pub(crate) action: &'a str,
}

impl<'a> Act<'a> {
    /// What a worker did because it was time for it.
    pub(crate) fn by_worker(action: &'a str) -> Self {
        Self { actor: "worker", action }
    }
}

/// Enters an act, in the transaction that does it.
pub(crate) async fn add(
    tx: &mut Transaction<'_>,
    act: Act<'_>,
    projection: &str,
    details: Value,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "INSERT INTO kafold_audit (at, actor, action, projection, details) \
               VALUES ($1, $2, $3, $4, $5)";
    let details = (!details.is_null()).then(|| details.to_string());
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(Time(now)).bind(act.actor).bind(act.action);
        let query = query.bind(projection).bind(details);
        query.execute(&mut **connection).await.map(drop)
    })
}

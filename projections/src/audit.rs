//! The tables `kafold_audit` and `kafold_audit_head`: actor, act, time and reason of every act on a
//! projection.
//!
//! The record is append-only and a hash chain ([`kafold_migrations::audit`]). Every writer locks
//! the single row of the head, so the chain never forks.

use chrono::{DateTime, Utc};
use kafold_core::store::ReadError;
use kafold_migrations::audit::{AuditContent, NO_HASH, SQLITE_KEEP, SQLITE_LET_GO, hex};
use kafold_migrations::micros::Time;
use kafold_migrations::{Database, begin};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::Executor;

use crate::control::{By, Control, ControlError};
use crate::index::read_error;
use crate::sql::{either, locking};
use crate::transaction::{OpenTransaction, Transaction};

/// Number of rows read at a time by a verification.
const PAGE_ROWS: i64 = 1_000;
/// Most findings stored by a verification; further findings are only counted.
const FINDINGS_MAX: usize = 10;
/// The action of the row written by a prune.
const PRUNE: &str = "prune";
/// Most earlier prunes in the row of a prune.
const EARLIER_MAX: usize = 100;

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

/// The beginning and the end of the record.
#[derive(Debug, Clone, sqlx::FromRow)]
struct Head {
    pruned_id: i64,
    pruned_hash: Vec<u8>,
    row_count: i64,
    newest_id: i64,
    newest_hash: Vec<u8>,
}

const SELECT_HEAD: &str = "SELECT pruned_id, pruned_hash, row_count, newest_id, newest_hash \
                           FROM kafold_audit_head";

/// Writes an act to the record, in the transaction of the act. `projection` is `None` for an act on
/// all projections.
pub(crate) async fn add(
    tx: &mut Transaction<'_>,
    act: Act<'_>,
    projection: Option<&str>,
    details: Value,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let head = lock_head(tx).await?;
    add_behind(tx, head, act, projection, details, now).await
}

async fn add_behind(
    tx: &mut Transaction<'_>,
    head: Head,
    act: Act<'_>,
    projection: Option<&str>,
    details: Value,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let row = AuditContent {
        id: head.newest_id.saturating_add(1),
        at: now,
        actor: act.actor.to_owned(),
        action: act.action.to_owned(),
        projection: projection.map(str::to_owned),
        details: (!details.is_null()).then(|| details.to_string()),
    };
    let hash = row.hash(&head.newest_hash).to_vec();
    let insert = "INSERT INTO kafold_audit \
                    (id, at, actor, action, projection, details, previous_hash, hash) \
                  VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
    let advance = "UPDATE kafold_audit_head \
                   SET row_count = row_count + 1, newest_id = $1, newest_hash = $2";
    either!(tx, connection => {
        let query = sqlx::query(insert).bind(row.id).bind(Time(now)).bind(row.actor);
        let query = query.bind(row.action).bind(row.projection).bind(row.details);
        query.bind(head.newest_hash).bind(&hash).execute(&mut **connection).await?;
        let query = sqlx::query(advance).bind(row.id).bind(hash);
        query.execute(&mut **connection).await.map(drop)
    })
}

/// Returns the head, locked until the end of the transaction. A transaction locks the head last.
async fn lock_head(tx: &mut Transaction<'_>) -> Result<Head, sqlx::Error> {
    let sql = locking(tx, SELECT_HEAD, " FOR UPDATE");
    let head: Option<Head> =
        either!(tx, connection => sqlx::query_as(sql).fetch_optional(&mut **connection).await?);
    let lost = "the table kafold_audit_head has lost its row, so that no act can be entered in \
                kafold_audit: restore both tables from a copy of the database";
    head.ok_or_else(|| sqlx::Error::Configuration(lost.into()))
}

/// The result of a verification of the record.
#[derive(Debug, Clone, Serialize)]
pub struct AuditVerification {
    /// Number of rows in the record.
    pub rows: u64,
    /// The number of the newest row removed by a prune; 0 if none.
    pub pruned_to: i64,
    /// The number of the newest row; 0 if the record never had a row.
    pub newest: i64,
    /// The hash of the newest row. A copy kept elsewhere later proves the rows up to this row
    /// unchanged.
    pub newest_hash: String,
    /// Number of all findings.
    pub findings_total: u64,
    /// The first ten findings, each a sentence with the row's number.
    pub findings: Vec<String>,
}

impl Control {
    /// Removes the oldest acts from the record, up to the first act at or after `before`, and
    /// writes a row with the count and the reason. Returns the number of removed acts; 0 writes no
    /// row. The row repeats the newest 100 of the removed rows of earlier prunes, so those stay on
    /// record.
    ///
    /// Rejects an empty reason. Events and checkpoints are never removed by age. Skipped events
    /// stay as long as their generation, because they name the events missing from its rows.
    pub async fn prune(&self, before: DateTime<Utc>, by: By<'_>) -> Result<u64, ControlError> {
        let reason = by.reason_for("to remove acts from the record")?;
        let mut open = OpenTransaction::begin(&self.database).await?;
        let tx = &mut open.lend();
        let mut head = lock_head(tx).await?;
        let Some((last, hash)) = last_older(tx, before).await? else {
            open.rollback().await?;
            return Ok(0);
        };
        let earlier = earlier_prunes(tx, last).await?;
        let pruned = delete_up_to(tx, last).await?;
        let sql = "UPDATE kafold_audit_head \
                   SET pruned_id = $1, pruned_hash = $2, row_count = row_count - $3";
        either!(tx, connection => {
            let query = sqlx::query(sql).bind(last).bind(&hash).bind(pruned);
            query.execute(&mut **connection).await.map(drop)?;
        });
        head.row_count -= pruned;
        let details = json!({
            "rows": pruned, "before": before, "last_id": last, "last_hash": hex(&hash),
            "reason": reason, "earlier": earlier,
        });
        let act = Act { actor: by.actor, action: PRUNE };
        add_behind(tx, head, act, None, details, self.clock.now()).await?;
        open.commit().await?;
        Ok(pruned.unsigned_abs())
    }

    /// Checks every row of the record against its hash, the previous row and the head, in one
    /// snapshot of the database.
    pub async fn verify_audit(&self) -> Result<AuditVerification, ReadError> {
        self.check_chain().await.map_err(read_error)
    }

    async fn check_chain(&self) -> Result<AuditVerification, sqlx::Error> {
        match &self.database {
            Database::Postgres(database) => {
                let sql = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY";
                let mut transaction = begin(database.pool(), sql).await?;
                check_in(&mut Transaction::Postgres(&mut transaction)).await
            }
            Database::Sqlite(database) => {
                let mut transaction = begin(database.readers(), "BEGIN").await?;
                check_in(&mut Transaction::Sqlite(&mut transaction)).await
            }
        }
    }
}

/// Returns the last row before the first row at or after `before`, with its hash.
async fn last_older(
    tx: &mut Transaction<'_>,
    before: DateTime<Utc>,
) -> Result<Option<(i64, Vec<u8>)>, sqlx::Error> {
    let sql = "SELECT id, hash FROM kafold_audit \
               WHERE hash IS NOT NULL \
                 AND id < COALESCE((SELECT MIN(id) FROM kafold_audit WHERE at >= $1), id + 1) \
               ORDER BY id DESC LIMIT 1";
    either!(tx, connection => {
        sqlx::query_as(sql).bind(Time(before)).fetch_optional(&mut **connection).await
    })
}

/// Returns the rows of the prunes up to a row, and the prunes which these rows repeat, oldest first.
async fn earlier_prunes(tx: &mut Transaction<'_>, last: i64) -> Result<Vec<Value>, sqlx::Error> {
    let sql = "SELECT id, at, actor, action, projection, details FROM kafold_audit \
               WHERE action = $1 AND id <= $2 ORDER BY id";
    let rows: Vec<AuditContent> = either!(tx, connection => {
        sqlx::query_as(sql).bind(PRUNE).bind(last).fetch_all(&mut **connection).await?
    });
    let mut prunes = Vec::new();
    for AuditContent { id, at, actor, details, .. } in rows {
        let details = details.as_deref().map(serde_json::from_str);
        let mut details: Value = details.and_then(Result::ok).unwrap_or_default();
        if let Some(Value::Array(earlier)) = details.get_mut("earlier").map(Value::take) {
            prunes.extend(earlier);
        }
        let of = |name| details.get(name).cloned().unwrap_or_default();
        prunes.push(json!({
            "id": id, "at": at, "actor": actor, "rows": of("rows"), "before": of("before"),
            "last_id": of("last_id"), "last_hash": of("last_hash"), "reason": of("reason"),
        }));
    }
    Ok(prunes.split_off(prunes.len().saturating_sub(EARLIER_MAX)))
}

/// Returns the number of deleted rows.
async fn delete_up_to(tx: &mut Transaction<'_>, last: i64) -> Result<i64, sqlx::Error> {
    let sql = "DELETE FROM kafold_audit WHERE id <= $1";
    let deleted = match tx {
        Transaction::Postgres(connection) => {
            connection.execute("SET LOCAL kafold.audit_prune = 'on'").await?;
            let deleted = sqlx::query(sql).bind(last).execute(&mut **connection).await?;
            connection.execute("SET LOCAL kafold.audit_prune = 'off'").await?;
            deleted.rows_affected()
        }
        Transaction::Sqlite(connection) => {
            connection.execute(sqlx::raw_sql(SQLITE_LET_GO)).await?;
            let deleted = sqlx::query(sql).bind(last).execute(&mut **connection).await?;
            connection.execute(sqlx::raw_sql(SQLITE_KEEP)).await?;
            deleted.rows_affected()
        }
    };
    Ok(i64::try_from(deleted).unwrap_or(i64::MAX))
}

async fn check_in(tx: &mut Transaction<'_>) -> Result<AuditVerification, sqlx::Error> {
    let head: Option<Head> = either!(tx, connection => {
        sqlx::query_as(SELECT_HEAD).fetch_optional(&mut **connection).await?
    });
    let sql = "SELECT id, at, actor, action, projection, details, previous_hash, hash \
               FROM kafold_audit WHERE id > $1 ORDER BY id LIMIT $2";
    let mut check = Check::new(head);
    let mut from = i64::MIN;
    loop {
        let page: Vec<AuditRow> = either!(tx, connection => {
            let query = sqlx::query_as(sql).bind(from).bind(PAGE_ROWS);
            query.fetch_all(&mut **connection).await?
        });
        let Some(last) = page.last() else { return Ok(check.end()) };
        from = last.content.id;
        page.iter().for_each(|row| check.row(row));
    }
}

#[derive(Debug, Clone, sqlx::FromRow)]
struct AuditRow {
    #[sqlx(flatten)]
    content: AuditContent,
    previous_hash: Option<Vec<u8>>,
    hash: Option<Vec<u8>>,
}

/// Checks the chain row by row.
struct Check {
    head: Option<Head>,
    rows: i64,
    /// The number and the hash of the previous row.
    last: (i64, Vec<u8>),
    /// The last row removed by the newest prune on record, and its hash.
    last_prune: Option<(i64, String)>,
    findings_total: u64,
    findings: Vec<String>,
}

impl Check {
    fn new(head: Option<Head>) -> Self {
        let begin = head.as_ref().map(|head| (head.pruned_id, head.pruned_hash.clone()));
        Self {
            head,
            rows: 0,
            last: begin.unwrap_or((0, NO_HASH.to_vec())),
            last_prune: None,
            findings_total: 0,
            findings: Vec::new(),
        }
    }

    fn finding(&mut self, finding: String) {
        self.findings_total += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }

    fn row(&mut self, row: &AuditRow) {
        self.rows += 1;
        let AuditRow { content, previous_hash, hash } = row;
        let AuditContent { id, actor, action, .. } = content;
        let (Some(previous), Some(hash)) = (previous_hash, hash) else {
            return self.finding(format!(
                "row {id} ({action} by {actor}) has no hash: it was inserted by hand"
            ));
        };
        let (last, ref last_hash) = self.last;
        let is_linked = previous == last_hash;
        if content.hash(previous) != **hash {
            self.finding(format!(
                "row {id} ({action} by {actor}) was altered, or inserted by hand: its content does \
                 not give its hash"
            ));
        } else if !is_linked && *id > last.saturating_add(1) {
            self.finding(removed(last, id - 1));
        } else if !is_linked {
            self.finding(format!(
                "row {id} ({action} by {actor}) does not follow row {last}: one of the two was \
                 altered or inserted by hand"
            ));
        }
        if action == PRUNE {
            self.last_prune =
                content.details.as_deref().and_then(pruned_to).or(self.last_prune.take());
        }
        self.last = (*id, hash.clone());
    }

    /// Compares the end of the chain with the head.
    fn end(mut self) -> AuditVerification {
        let Some(head) = self.head.clone() else {
            self.finding(
                "kafold_audit_head has lost its row: nothing says how many rows there were".into(),
            );
            return self.verification(0, 0, &NO_HASH);
        };
        let Head { pruned_id, pruned_hash, row_count, newest_id, newest_hash } = head;
        let (last, last_hash) = self.last.clone();
        if self.rows == 0 && row_count > 0 {
            self.finding(format!(
                "all rows were removed: there were {row_count}, up to row {newest_id}"
            ));
        } else if last < newest_id {
            self.finding(format!("the newest rows were removed: {}", removed(last, newest_id)));
        } else if last > newest_id {
            self.finding(format!(
                "row {last} was inserted by hand: the newest row is {newest_id} by kafold_audit_head"
            ));
        } else if last_hash != newest_hash {
            self.finding(format!(
                "row {last} was altered: kafold_audit_head has another hash of it"
            ));
        }
        if self.findings.is_empty() && self.rows != row_count {
            let rows = self.rows;
            self.finding(format!("there are {rows} rows, and {row_count} by kafold_audit_head"));
        }
        let is_on_record = match &self.last_prune {
            Some((id, hash)) => (*id, hash) == (pruned_id, &hex(&pruned_hash)),
            None => (pruned_id, &*pruned_hash) == (0, &NO_HASH[..]),
        };
        if !is_on_record {
            self.finding(format!(
                "the rows up to row {pruned_id} were removed, and no prune is on record for them"
            ));
        }
        self.verification(pruned_id, newest_id, &newest_hash)
    }

    fn verification(self, pruned_to: i64, newest: i64, newest_hash: &[u8]) -> AuditVerification {
        AuditVerification {
            rows: self.rows.unsigned_abs(),
            pruned_to,
            newest,
            newest_hash: hex(newest_hash),
            findings_total: self.findings_total,
            findings: self.findings,
        }
    }
}

/// Returns the last row removed by a prune and its hash, from the details of the prune.
fn pruned_to(details: &str) -> Option<(i64, String)> {
    let details: Value = serde_json::from_str(details).ok()?;
    Some((details["last_id"].as_i64()?, details["last_hash"].as_str()?.to_owned()))
}

fn removed(before: i64, last: i64) -> String {
    match before.saturating_add(1) {
        first if first == last => format!("row {first} was removed"),
        first => format!("rows {first} to {last} were removed"),
    }
}

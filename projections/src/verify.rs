//! [`ProjectionWorker::verify`]: whether the rows of a projection are what the log says.
//!
//! The live rows are copied, with the checkpoints they belong to, in one snapshot; the log is folded
//! again up to those checkpoints into tables of their own; then the database compares the two, row by
//! row. Queries and workers go on meanwhile. What is parked or skipped is left out on both sides.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use chrono::SecondsFormat;
use kafold_core::store::{Batch, ReadError, SourceMessage, Subscription};
use kafold_core::window::Timestamp;
use kafold_core::{Offset, Partition, Position};
use kafold_migrations::{Identifier, SqlText};
use serde::Serialize;
use sqlx::SqlStr;

use crate::clock_step::{EventCounts, PartitionClock};
use crate::definition::Definition;
use crate::generation::{self, Generation};
use crate::handler::{ApplyError, Handler, Target};
use crate::parked;
use crate::projection::ProjectionBatch;
use crate::retention;
use crate::sql::either;
use crate::transaction::{OpenTransaction, Transaction};
use crate::worker::{Context, ProjectionWorker};

/// The tables that the log is folded into.
const FRESH: Generation = Generation::VERIFIED;
/// Events in one transaction.
const BATCH_EVENTS_MAX: usize = 5_000;
/// How long the log may have nothing to say before its end.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Differences that are told of one table.
const SHOWN_MAX: u64 = 10;

/// What a verification found.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// The projection.
    pub projection: String,
    /// The generation whose rows were compared.
    pub generation: u32,
    /// Events that were folded again.
    pub events: u64,
    /// Events that were left out, because they are parked or skipped.
    pub left_out: u64,
    /// Rows that are compared.
    pub rows: i64,
    /// What differs, a table an entry; nothing when all is as it must be.
    pub differences: Vec<TableDifference>,
    /// For a windowed model, the numbers of its events. They differ if rows or late events do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counts: Option<CountsComparison>,
}

/// The numbers of events of a windowed model, stored and folded again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CountsComparison {
    /// The numbers in the checkpoints.
    pub stored: EventCounts,
    /// The numbers from the fold of the log.
    pub folded: EventCounts,
}

impl Verification {
    /// Returns `true` if rows and counts are those of the log.
    pub fn is_equal(&self) -> bool {
        let counts = self.counts.is_none_or(|counts| counts.stored == counts.folded);
        self.differences.is_empty() && counts
    }
}

/// How a table differs from the fold of the log.
#[derive(Debug, Clone, Serialize)]
pub struct TableDifference {
    /// The table, by its plain name.
    pub table: String,
    /// Rows that no fold of the log gives.
    pub unexpected: i64,
    /// Rows that the fold of the log gives and the table lacks.
    pub missing: i64,
    /// The first unexpected rows, as JSON.
    pub first_unexpected: Vec<String>,
    /// The first missing rows, as JSON.
    pub first_missing: Vec<String>,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Records of the log that are read.
    pub done: u64,
    /// Records that are to be read.
    pub total: u64,
}

/// Why nothing is known about the rows.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// This worker runs no such projection, or it has never run.
    #[error("there is no projection {0} to verify: it is not this program's, or it has never run")]
    Unknown(String),
    /// It writes tables that it does not name.
    #[error("projection {0} names no tables: there is nothing to compare")]
    NoTables(String),
    /// The handler fails at an event that it has applied before.
    #[error("projection {projection} cannot be folded again: {reason}")]
    Handler {
        /// The projection.
        projection: String,
        /// At which event, and how.
        reason: String,
    },
    /// The log cannot be read.
    #[error("the log cannot be read: {0}")]
    Log(#[from] ReadError),
    /// It says nothing although there is more of it.
    #[error("the log gives nothing more within {READ_TIMEOUT:?}, and {left} records are left")]
    Silent {
        /// How many.
        left: u64,
    },
    /// The database failed.
    #[error("the database cannot be asked: {0}")]
    Database(#[from] sqlx::Error),
}

impl ProjectionWorker {
    /// The names of the projections it runs.
    pub fn names(&self) -> Vec<String> {
        self.handlers.iter().map(|handler| handler.definition().name.clone()).collect()
    }

    /// Folds the log again and compares the rows of a projection with the result. The source should be
    /// one that gives every partition to every reader. One verification at a time.
    pub async fn verify(
        &self,
        name: &str,
        progress: &(dyn Fn(VerifyProgress) + Sync),
    ) -> Result<Verification, VerifyError> {
        let mut handlers = self.handlers.iter();
        let handler = handlers.find(|handler| handler.definition().name == name);
        let unknown = || VerifyError::Unknown(name.to_owned());
        let handler = handler.ok_or_else(unknown)?;
        if handler.definition().tables.is_empty() {
            return Err(VerifyError::NoTables(name.to_owned()));
        }
        let verifying = Verifying { context: &self.context, handler: &**handler, progress };
        verifying.drop_tables().await?;
        let snapshot = verifying.copy().await?.ok_or_else(unknown)?;
        let found = verifying.compare(snapshot).await;
        verifying.drop_tables().await?;
        found
    }
}

/// One verification under way.
struct Verifying<'v> {
    context: &'v Context,
    handler: &'v dyn Handler,
    progress: &'v (dyn Fn(VerifyProgress) + Sync),
}

/// What the copied rows are to be the fold of.
struct Snapshot {
    generation: Generation,
    /// Everything below, in each partition …
    ends: BTreeMap<Partition, Offset>,
    /// … but these events.
    parked: HashSet<Position>,
    skipped: HashSet<Position>,
    /// The numbers of events of a windowed model.
    counts: EventCounts,
}

/// The result of folding the log again.
#[derive(Default)]
struct Folded {
    events: u64,
    left_out: u64,
    clocks: HashMap<Partition, PartitionClock>,
    counts: EventCounts,
}

impl Verifying<'_> {
    fn definition(&self) -> &Definition {
        self.handler.definition()
    }

    /// Copies the live rows, and tells what they are the fold of.
    async fn copy(&self) -> Result<Option<Snapshot>, sqlx::Error> {
        let mut open = OpenTransaction::begin(&self.context.database).await?;
        let tx = &mut open.lend();
        // On SQLite a transaction that writes sees one state anyway.
        if let Transaction::Postgres(connection) = tx {
            let sql = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ";
            sqlx::query(sql).execute(&mut **connection).await?;
        }
        let name = &self.definition().name;
        let sql = "SELECT live_generation FROM kafold_projection WHERE name = $1";
        let live: Option<i32> = either!(tx, connection => {
            sqlx::query_scalar(sql).bind(name).fetch_optional(&mut **connection).await?
        });
        let Some(generation) = live.map(Generation::of) else {
            open.rollback().await?;
            return Ok(None);
        };
        let sql = "SELECT partition, next_offset FROM kafold_checkpoint \
                   WHERE projection = $1 AND generation = $2";
        let ends = pairs(tx, sql, name, generation).await?;
        let sql = "SELECT partition, \"offset\" FROM kafold_parked_event \
                   WHERE projection = $1 AND generation = $2";
        let parked = pairs(tx, sql, name, generation).await?;
        let sql = "SELECT partition, \"offset\" FROM kafold_skipped_event \
                   WHERE projection = $1 AND generation = $2";
        let skipped = pairs(tx, sql, name, generation).await?;
        let counts = EventCounts::of_live(tx, name).await?;
        for table in self.definition().tables() {
            let mut sql = SqlText::new("CREATE TABLE ");
            sql.name(&copy_of(&table)).text(" AS SELECT * FROM ");
            let sql = sql.name(&generation.table(table.as_str())).finish();
            generation::run(tx, sql).await?;
        }
        self.handler.setup(FRESH, tx).await.map_err(|error| match error {
            ApplyError::Database(error) => error,
            ApplyError::Fault(fault) => sqlx::Error::Protocol(fault.reason),
        })?;
        open.commit().await?;
        let position = |(partition, offset)| Position { partition, offset };
        Ok(Some(Snapshot {
            generation,
            ends: ends.into_iter().collect(),
            parked: parked.into_iter().map(position).collect(),
            skipped: skipped.into_iter().map(position).collect(),
            counts,
        }))
    }

    async fn compare(&self, snapshot: Snapshot) -> Result<Verification, VerifyError> {
        let Folded { events, left_out, counts, clocks } = self.fold(&snapshot).await?;
        let partitions = (0..self.context.source.partitions()).map(Partition);
        let clock = |partition| clocks.get(&partition).map(|clock| clock.clock).unwrap_or_default();
        let expired = retention::expired_before(self.definition(), partitions.map(clock));
        let mut open = OpenTransaction::begin(&self.context.database).await?;
        let tx = &mut open.lend();
        let (mut rows, mut differences) = (0, Vec::new());
        if let Some(before) = expired {
            self.expire(tx, before).await?;
        }
        for table in self.definition().tables() {
            let (copy, fresh) = (copy_of(&table), FRESH.table(table.as_str()));
            rows += count(tx, SqlText::new("SELECT COUNT(*) FROM ").name(&copy).finish()).await?;
            let unexpected = count_difference(tx, &copy, &fresh).await?;
            let missing = count_difference(tx, &fresh, &copy).await?;
            if unexpected + missing > 0 {
                differences.push(TableDifference {
                    table: table.as_str().to_owned(),
                    unexpected,
                    missing,
                    first_unexpected: first(tx, &copy, &fresh).await?,
                    first_missing: first(tx, &fresh, &copy).await?,
                });
            }
        }
        open.rollback().await?;
        Ok(Verification {
            projection: self.definition().name.clone(),
            generation: snapshot.generation.0,
            events,
            left_out,
            rows,
            differences,
            counts: self
                .definition()
                .window
                .map(|_| CountsComparison { stored: snapshot.counts, folded: counts }),
        })
    }

    /// Deletes the rows of windows that are not kept, which the live table may have or not.
    async fn expire(&self, tx: &mut Transaction<'_>, before: Timestamp) -> Result<(), sqlx::Error> {
        for table in self.definition().tables() {
            for name in [copy_of(&table), FRESH.table(table.as_str())] {
                let mut sql = SqlText::new("DELETE FROM ");
                let sql = sql.name(&name).text(" WHERE window_end < $1").finish();
                match tx {
                    Transaction::Postgres(connection) => {
                        sqlx::query(sql).bind(before).execute(&mut **connection).await?;
                    }
                    Transaction::Sqlite(connection) => {
                        let before = before.to_rfc3339_opts(SecondsFormat::Micros, true);
                        sqlx::query(sql).bind(before).execute(&mut **connection).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Folds the log up to the snapshot.
    async fn fold(&self, snapshot: &Snapshot) -> Result<Folded, VerifyError> {
        let Context { source, clock, .. } = self.context;
        let name = format!("{}__verify", self.definition().name);
        let mut subscription = source.subscribe(&name, None, BATCH_EVENTS_MAX).await?;
        let total = snapshot.ends.values().map(|end| end.0).sum();
        let mut reached: BTreeMap<Partition, Offset> = BTreeMap::new();
        let mut folded = Folded::default();
        loop {
            let done =
                |(p, end): (&Partition, &Offset)| reached.get(p).map_or(0, |at| at.0).min(end.0);
            let done: u64 = snapshot.ends.iter().map(done).sum();
            (self.progress)(VerifyProgress { done, total });
            if done == total {
                return Ok(folded);
            }
            let message = tokio::select! {
                biased;
                message = subscription.next() => message?,
                () = clock.sleep(READ_TIMEOUT) => {
                    return Err(VerifyError::Silent { left: total - done });
                }
            };
            let mut batch = match message {
                SourceMessage::Assigned(partitions) => {
                    start(&mut *subscription, &partitions, snapshot).await?;
                    continue;
                }
                SourceMessage::Revoked(_) => continue,
                SourceMessage::Batch(batch) => batch,
            };
            let (partition, next) = (batch.partition, batch.next.next);
            let end = snapshot.ends.get(&partition).copied().unwrap_or_default();
            batch.events.retain(|event| event.position.offset < end);
            let within = batch.events.len();
            parked::leave_out(&mut batch.events, |at| snapshot.skipped.contains(&at));
            batch.events.retain(|event| !snapshot.parked.contains(&event.position));
            folded.events += batch.events.len() as u64;
            folded.left_out += (within - batch.events.len()) as u64;
            self.apply(batch, &mut folded).await?;
            reached.insert(partition, next);
            if next >= end {
                subscription.stop(partition);
            }
        }
    }

    async fn apply(&self, batch: Batch, folded: &mut Folded) -> Result<(), VerifyError> {
        let mut round = ProjectionBatch::default();
        round.parts_mut().push(batch.into());
        let name = &self.definition().name;
        let failed = |reason: String| VerifyError::Handler { projection: name.clone(), reason };
        if round.count() == 0 {
            return Ok(());
        }
        let clocks = &folded.clocks;
        let clock_of = |partition| Some(clocks.get(&partition).copied().unwrap_or_default());
        let work = self.handler.prepare(&round, &clock_of);
        let work = work.map_err(|fault| failed(fault.reason))?;
        let mut open = OpenTransaction::begin(&self.context.database).await?;
        let target = Target { name, generation: FRESH };
        work.apply(target, &mut open.lend(), None).await.map_err(|error| match error {
            ApplyError::Database(error) => error.into(),
            ApplyError::Fault(fault) => failed(fault.reason),
        })?;
        for (partition, step) in work.clock_steps().into_iter().flatten() {
            folded.clocks.entry(*partition).or_default().clock = step.clock;
            folded.counts += step.counts;
        }
        Ok(open.commit().await?)
    }

    /// Drops the tables of this verification, or of one that was killed.
    async fn drop_tables(&self) -> Result<(), sqlx::Error> {
        let mut open = OpenTransaction::begin(&self.context.database).await?;
        for table in self.definition().tables() {
            for table in [copy_of(&table), FRESH.table(table.as_str())] {
                let sql = SqlText::new("DROP TABLE IF EXISTS ").name(&table).finish();
                generation::run(&mut open.lend(), sql).await?;
            }
        }
        open.commit().await
    }
}

/// Starts the partitions of which anything is to be read.
async fn start(
    subscription: &mut dyn Subscription,
    partitions: &[Partition],
    snapshot: &Snapshot,
) -> Result<(), ReadError> {
    for partition in partitions {
        if snapshot.ends.get(partition).is_some_and(|end| *end > Offset(0)) {
            subscription.start(*partition, None).await?;
        }
    }
    Ok(())
}

fn copy_of(table: &Identifier) -> Identifier {
    Identifier::new(&format!("{}__verify", table.as_str())).expect("a table's name is short")
}

async fn pairs(
    tx: &mut Transaction<'_>,
    sql: &'static str,
    name: &str,
    generation: Generation,
) -> Result<Vec<(Partition, Offset)>, sqlx::Error> {
    let rows: Vec<(i32, i64)> = either!(tx, connection => {
        let query = sqlx::query_as(sql).bind(name).bind(generation.int());
        query.fetch_all(&mut **connection).await?
    });
    let pair = |(partition, offset): (i32, i64)| {
        (Partition(partition.unsigned_abs()), Offset(offset.unsigned_abs()))
    };
    Ok(rows.into_iter().map(pair).collect())
}

async fn count(tx: &mut Transaction<'_>, sql: SqlStr) -> Result<i64, sqlx::Error> {
    either!(tx, connection => sqlx::query_scalar(sql).fetch_one(&mut **connection).await)
}

async fn count_difference(
    tx: &mut Transaction<'_>,
    one: &Identifier,
    other: &Identifier,
) -> Result<i64, sqlx::Error> {
    let mut sql = SqlText::new("SELECT COUNT(*) FROM (");
    count(tx, difference(&mut sql, one, other).text(") d").finish()).await
}

/// Adds the query of the rows of one table that the other lacks.
fn difference<'s>(sql: &'s mut SqlText, one: &Identifier, other: &Identifier) -> &'s mut SqlText {
    sql.text("SELECT * FROM ").name(one).text(" EXCEPT SELECT * FROM ").name(other)
}

/// The first of them, as JSON.
async fn first(
    tx: &mut Transaction<'_>,
    one: &Identifier,
    other: &Identifier,
) -> Result<Vec<String>, sqlx::Error> {
    let mut sql = SqlText::new("SELECT ");
    match tx {
        Transaction::Postgres(_) => {
            sql.text("to_jsonb(d)::text");
        }
        Transaction::Sqlite(connection) => {
            let columns: Vec<String> = sqlx::query_scalar("SELECT name FROM pragma_table_info($1)")
                .bind(one.as_str())
                .fetch_all(&mut **connection)
                .await?;
            sql.text("json_object(");
            let names = columns.iter().filter_map(|column| Identifier::new(column).ok());
            sql.list(", ", names, |sql, name| {
                sql.quoted(&name).text(", ").name(&name);
            });
            sql.text(")");
        }
    }
    let sql = difference(sql.text(" FROM ("), one, other);
    let sql = sql.text(" ORDER BY 1 LIMIT ").number(SHOWN_MAX).text(") d").finish();
    either!(tx, connection => sqlx::query_scalar(sql).fetch_all(&mut **connection).await)
}

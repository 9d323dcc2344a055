//! The table `kafold_projection`: which projections there are, by which definition their rows were
//! built, and how they fare.

use chrono::{DateTime, Utc};
use kafold_core::{Offset, Partition};
use kafold_migrations::{Database, micros};

use crate::checkpoint::int;
use crate::definition::Definition;
use crate::handler::{ApplyError, Fault, Handler};
use crate::table::Table;
use crate::transaction::{OpenTransaction, Transaction};

/// The generation a projection begins with.
const FIRST_GENERATION: u32 = 1;

/// Enters the projection and makes its tables when it is new; else demands that its definition is
/// the one its rows were built by. Answers the live generation.
pub(crate) async fn register(
    database: &Database,
    handler: &dyn Handler,
    now: DateTime<Utc>,
) -> Result<u32, ApplyError> {
    let definition = handler.definition();
    let mut open = OpenTransaction::begin(database).await?;
    let tx = &mut open.lend();
    lock(tx).await?;
    let generation = match find(tx, &definition.name).await? {
        None => {
            create(tx, definition, now).await?;
            FIRST_GENERATION
        }
        Some((generation, fingerprint)) => {
            check(tx, definition, generation, &fingerprint).await?;
            set_state_in(tx, &definition.name, State::Running, None, now).await?;
            generation
        }
    };
    handler.setup(tx).await?;
    open.commit().await?;
    Ok(generation)
}

/// What `kafold_projection.actual_state` may say of a worker that cannot be paused or rebuilt yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Stopped,
}

/// Writes down how the projection fares.
pub(crate) async fn set_state(
    database: &Database,
    name: &str,
    state: State,
    reason: Option<&str>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let mut open = OpenTransaction::begin(database).await?;
    set_state_in(&mut open.lend(), name, state, reason, now).await?;
    open.commit().await
}

/// How a projection stands in one partition, by whomever it is run.
#[derive(Debug, Clone)]
pub(crate) struct Standing {
    pub(crate) stopped: Option<String>,
    pub(crate) next: Offset,
}

/// `None` when the database knows no such projection.
pub(crate) async fn standing(
    database: &Database,
    name: &str,
    partition: Partition,
) -> Result<Option<Standing>, sqlx::Error> {
    let sql = "SELECT p.actual_state, p.actual_state_reason, c.next_offset \
               FROM kafold_projection p LEFT JOIN kafold_checkpoint c \
                 ON c.projection = p.name AND c.generation = p.live_generation \
                 AND c.partition = $2 \
               WHERE p.name = $1";
    let row: Option<(String, Option<String>, Option<i64>)> = match database {
        Database::Postgres(database) => {
            let query = sqlx::query_as(sql).bind(name).bind(int(partition));
            query.fetch_optional(database.pool()).await?
        }
        Database::Sqlite(database) => {
            let query = sqlx::query_as(sql).bind(name).bind(int(partition));
            query.fetch_optional(database.readers()).await?
        }
    };
    Ok(row.map(|(state, reason, next)| Standing {
        stopped: (state == State::Stopped.text()).then(|| reason.unwrap_or_default()),
        next: Offset(next.and_then(|next| u64::try_from(next).ok()).unwrap_or(0)),
    }))
}

impl State {
    fn text(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// One registration at a time: two processes that start at once make each table once.
async fn lock(tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(()) };
    let lock = "SELECT pg_advisory_xact_lock(hashtextextended('kafold/projections', 0))";
    sqlx::query(lock).execute(&mut **connection).await.map(drop)
}

async fn find(tx: &mut Transaction<'_>, name: &str) -> Result<Option<(u32, String)>, sqlx::Error> {
    let sql = "SELECT live_generation, fingerprint FROM kafold_projection WHERE name = $1";
    let row: Option<(i32, String)> = match tx {
        Transaction::Postgres(connection) => {
            sqlx::query_as(sql).bind(name).fetch_optional(&mut **connection).await?
        }
        Transaction::Sqlite(connection) => {
            sqlx::query_as(sql).bind(name).fetch_optional(&mut **connection).await?
        }
    };
    Ok(row.map(|(generation, text)| (generation.unsigned_abs(), text)))
}

async fn create(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    now: DateTime<Utc>,
) -> Result<(), ApplyError> {
    let name = definition.name.as_str();
    if let Some(table) = Table::new(definition, FIRST_GENERATION) {
        for foreign in [table.view.as_str(), table.table.as_str()] {
            if exists(tx, foreign).await? {
                return Err(refused(format!(
                    "read model {name} cannot be made: the database has a table or view {foreign} \
                     that is not kafold's; rename one of the two"
                )));
            }
        }
        table.create(tx).await?;
    }
    let sql = "INSERT INTO kafold_projection \
                 (name, live_generation, fingerprint, desired_state, actual_state, updated_at) \
               VALUES ($1, $2, $3, 'running', 'running', $4)";
    // FIRST_GENERATION is 1.
    let generation = FIRST_GENERATION as i32;
    match tx {
        Transaction::Postgres(connection) => {
            let query = sqlx::query(sql).bind(name).bind(generation).bind(&definition.fingerprint);
            query.bind(now).execute(&mut **connection).await?;
        }
        Transaction::Sqlite(connection) => {
            let query = sqlx::query(sql).bind(name).bind(generation).bind(&definition.fingerprint);
            query.bind(micros::to_micros(now)).execute(&mut **connection).await?;
        }
    }
    Ok(())
}

async fn check(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    generation: u32,
    fingerprint: &str,
) -> Result<(), ApplyError> {
    let Definition { name, fingerprint: wanted, .. } = definition;
    if fingerprint != wanted {
        return Err(refused(format!(
            "projection {name} has changed: its rows were built as [{fingerprint}], this program \
             has [{wanted}]; build them anew with `kafold projections rebuild {name}`"
        )));
    }
    let Some(table) = Table::new(definition, generation) else { return Ok(()) };
    for missing in [table.view.as_str(), table.table.as_str()] {
        if !exists(tx, missing).await? {
            return Err(refused(format!(
                "read model {name} has lost {missing}; build it anew with \
                 `kafold projections rebuild {name}`"
            )));
        }
    }
    Ok(())
}

/// Whether a table or view of this name is found without naming a schema.
async fn exists(tx: &mut Transaction<'_>, name: &str) -> Result<bool, sqlx::Error> {
    match tx {
        Transaction::Postgres(connection) => {
            let query = sqlx::query_scalar("SELECT to_regclass(quote_ident($1)) IS NOT NULL");
            query.bind(name).fetch_one(&mut **connection).await
        }
        Transaction::Sqlite(connection) => {
            // SQLite's names know no case.
            let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = $1 COLLATE NOCASE)";
            sqlx::query_scalar(sql).bind(name).fetch_one(&mut **connection).await
        }
    }
}

async fn set_state_in(
    tx: &mut Transaction<'_>,
    name: &str,
    state: State,
    reason: Option<&str>,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection \
               SET actual_state = $2, actual_state_reason = $3, updated_at = $4 WHERE name = $1";
    match tx {
        Transaction::Postgres(connection) => {
            let query = sqlx::query(sql).bind(name).bind(state.text()).bind(reason).bind(now);
            query.execute(&mut **connection).await.map(drop)
        }
        Transaction::Sqlite(connection) => {
            let query = sqlx::query(sql).bind(name).bind(state.text()).bind(reason);
            query.bind(micros::to_micros(now)).execute(&mut **connection).await.map(drop)
        }
    }
}

fn refused(reason: String) -> ApplyError {
    Fault::somewhere(reason).into()
}

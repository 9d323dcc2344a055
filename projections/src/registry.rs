//! The table `kafold_projection`: which projections there are, by which definition their rows were
//! built, how they fare, and the way of a rebuild from its first table to its switch.

use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold_core::{Clock, Offset, Partition};
use kafold_migrations::Database;
use kafold_migrations::micros::Time;

use crate::audit::{self, Act};
use crate::checkpoint::int;
use crate::definition::Definition;
use crate::generation::{self, Generation};
use crate::handler::{ApplyError, Fault, Handler, Target};
use crate::parked;
use crate::sql::{either, locking, reading, with_clock};
use crate::transaction::{OpenTransaction, Transaction};

/// How long a switch may hold up the live generation on PostgreSQL, until the next one is at least as
/// far; then it is tried again later.
const SWITCH_HOLD_MAX: Duration = Duration::from_secs(2);
/// Between two looks at how far the next generation is.
const SWITCH_POLL: Duration = Duration::from_millis(10);
/// How many records of a partition a build may be behind the live generation for it to be held up, or
/// behind the end of the log to take the place of one that has stopped.
pub(crate) const SWITCH_LAG_MAX: i64 = 1_000;
/// How long a change of views or tables waits for queries that are under way; then it is tried again.
const SWITCH_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '2s'";
/// The prefix of a projection's fingerprint after a reset of positions: the rows come from a log
/// which no longer exists.
const RESET: &str = "reset, was ";

/// Enters the projection and makes its tables when it is new; else demands that its definition is
/// the one its rows were built by. Answers the live generation.
pub(crate) async fn register(
    database: &Database,
    handler: &dyn Handler,
    partitions: u32,
    now: DateTime<Utc>,
) -> Result<Generation, ApplyError> {
    let definition = handler.definition();
    let mut open = OpenTransaction::begin(database).await?;
    let tx = &mut open.lend();
    lock(tx).await?;
    let generation = match find(tx, &definition.name).await? {
        None => {
            refuse_foreign(tx, definition).await?;
            set_up(tx, handler, Generation::FIRST).await?;
            generation::create_views(tx, definition, Generation::FIRST).await?;
            insert(tx, definition, now).await?;
            seen_in(tx, &definition.name).await?;
            Generation::FIRST
        }
        Some(found) if found.is_reset() => begin_anew(tx, handler, &found, now).await?,
        Some(found) => {
            check(tx, definition, &found).await?;
            set_up(tx, handler, found.live()).await?;
            set_state_in(tx, &definition.name, State::Running, None, now).await?;
            found.live()
        }
    };
    generation::share(tx, definition, generation).await?;
    if definition.window.is_some() {
        set_windows(tx, definition, partitions).await?;
    }
    open.commit().await?;
    Ok(generation)
}

/// Stores the windows of the live generation, and the number of partitions whose clocks close them.
async fn set_windows(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    partitions: u32,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection SET live_window = $2, partitions = $3, live_timeline = $4 \
               WHERE name = $1";
    let partitions = i32::try_from(partitions).unwrap_or(i32::MAX);
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(&definition.name).bind(definition.window_json());
        let query = query.bind(partitions).bind(definition.timeline);
        query.execute(&mut **connection).await.map(drop)
    })
}

/// Creates the tables of a generation, unless another login owns a table.
async fn set_up(
    tx: &mut Transaction<'_>,
    handler: &dyn Handler,
    generation: Generation,
) -> Result<(), ApplyError> {
    let definition = handler.definition();
    for table in definition.tables() {
        if generation::foreign_owner(tx, &generation.table(table.as_str())).await?.is_some() {
            return Ok(());
        }
    }
    handler.setup(generation, tx).await
}

/// Makes the generation requested by a reset of positions live at once, with empty rows: the old
/// rows are no progress to compare with.
async fn begin_anew(
    tx: &mut Transaction<'_>,
    handler: &dyn Handler,
    found: &Found,
    now: DateTime<Utc>,
) -> Result<Generation, ApplyError> {
    let definition = handler.definition();
    if definition.tables.is_empty() {
        return Err(refused(reset_reason(found)));
    }
    let Some(next) = found.next() else { return Err(refused(reset_reason(found))) };
    set_up(tx, handler, next).await?;
    set_builder(tx, definition).await?;
    switch_views(tx, definition, found, next).await?;
    finish_switch(tx, definition, found, next, now).await?;
    Ok(next)
}

/// Returns the reason for a projection which does not run after a reset of positions.
fn reset_reason(found: &Found) -> String {
    let name = &found.name;
    match found.refuses_rebuild() {
        Some(reason) => format!("the positions of projection {name} were reset; {reason}"),
        None => format!(
            "the positions of projection {name} were reset: a worker builds it anew from the beginning \
             of the log when it starts, unless the rebuild was given up; \
             `kafold projections rebuild {name}` asks for it again"
        ),
    }
}

/// Marks a projection for a rebuild by the next worker to start; no worker uses the rows before.
/// Returns `None` for a projection without named tables, which is only kept from running.
pub(crate) async fn reset(
    tx: &mut Transaction<'_>,
    found: &Found,
    now: DateTime<Utc>,
) -> Result<Option<Generation>, sqlx::Error> {
    let is_rebuilt = found.refuses_rebuild().is_none();
    let next = is_rebuilt.then(|| Generation::of(found.last_generation.saturating_add(1)));
    let sql = "UPDATE kafold_projection \
               SET fingerprint = $2, next_generation = $3, \
                   last_generation = COALESCE($3, last_generation), next_fingerprint = NULL, \
                   next_requested_at = $4, next_takes_parked = $5, next_reason = NULL, \
                   resumptions = resumptions + 1, actual_state = 'stopped', advance_to = NULL, \
                   actual_state_reason = $6, updated_at = $4 WHERE name = $1";
    let fingerprint = format!("{RESET}{}", found.built_by());
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(&found.name).bind(fingerprint);
        let query = query.bind(next.map(Generation::int)).bind(Time(now)).bind(false);
        query.bind(reset_reason(found)).execute(&mut **connection).await.map(drop)?;
    });
    Ok(next)
}

/// What `kafold_projection.actual_state` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Paused,
    Stopped,
}

impl State {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
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

/// Stores that a projection runs, if the stored state is "stopped" and the generation is live.
pub(crate) async fn goes_on(
    database: &Database,
    name: &str,
    live: Generation,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection \
               SET actual_state = $3, actual_state_reason = NULL, updated_at = $4 \
               WHERE name = $1 AND live_generation = $2 AND actual_state = $5";
    let (running, stopped) = (State::Running.text(), State::Stopped.text());
    let mut open = OpenTransaction::begin(database).await?;
    either!(open.lend(), connection => {
        let query = sqlx::query(sql).bind(name).bind(live.int()).bind(running).bind(Time(now));
        query.bind(stopped).execute(connection).await.map(drop)?;
    });
    open.commit().await
}

/// Writes down why a rebuild does not go on.
pub(crate) async fn set_next_reason(
    database: &Database,
    name: &str,
    next: Generation,
    reason: &str,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection SET next_reason = $3 \
               WHERE name = $1 AND next_generation = $2";
    let mut open = OpenTransaction::begin(database).await?;
    either!(open.lend(), connection => {
        let query = sqlx::query(sql).bind(name).bind(next.int()).bind(reason);
        query.execute(connection).await.map(drop)?;
    });
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
    let row: Option<(String, Option<String>, Option<i64>)> = reading!(database, pool => {
        sqlx::query_as(sql).bind(name).bind(int(partition)).fetch_optional(pool).await?
    });
    Ok(row.map(|(state, reason, next)| Standing {
        stopped: (state == State::Stopped.text()).then(|| reason.unwrap_or_default()),
        next: Offset(next.and_then(|next| u64::try_from(next).ok()).unwrap_or(0)),
    }))
}

/// Makes the tables of a generation that was asked for, if that has not been done; others may have
/// built and switched to it meanwhile. `false`: it is not wanted any more, or another definition builds it.
pub(crate) async fn begin_build(
    database: &Database,
    handler: &dyn Handler,
    next: Generation,
) -> Result<bool, ApplyError> {
    let definition = handler.definition();
    let mut open = OpenTransaction::begin(database).await?;
    let tx = &mut open.lend();
    lock(tx).await?;
    let is_ours = |found: &Found| {
        let builder = found.next_fingerprint.as_ref();
        let by_others = builder.is_some_and(|builder| *builder != definition.fingerprint);
        found.next() == Some(next) && !by_others
    };
    let is_live =
        |found: &Found| found.live() == next && found.fingerprint == definition.fingerprint;
    let found = find(tx, &definition.name).await?;
    if !found.as_ref().is_some_and(is_ours) {
        open.rollback().await?;
        return Ok(found.as_ref().is_some_and(is_live));
    }
    if definition.tables.is_empty() {
        return Err(refused(no_tables(&definition.name)));
    }
    set_up(tx, handler, next).await?;
    generation::share(tx, definition, next).await?;
    set_builder(tx, definition).await?;
    open.commit().await?;
    Ok(true)
}

/// Stores the fingerprint of the definition which builds the next generation.
async fn set_builder(tx: &mut Transaction<'_>, definition: &Definition) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection SET next_fingerprint = $2, next_reason = NULL \
               WHERE name = $1";
    let Definition { name, fingerprint, .. } = definition;
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(name).bind(fingerprint);
        query.execute(&mut **connection).await.map(drop)
    })
}

/// Whether a generation is live or being built, which stays so until the end of the transaction.
pub(crate) async fn is_wanted(
    tx: &mut Transaction<'_>,
    target: Target<'_>,
) -> Result<bool, sqlx::Error> {
    // After a reset no worker may write the previously live rows.
    let select = "SELECT 1 FROM kafold_projection \
                  WHERE name = $1 AND $2 IN (live_generation, next_generation) \
                    AND ($2 <> live_generation OR fingerprint NOT LIKE 'reset, was %')";
    let sql = locking(tx, select, " FOR SHARE");
    let found: Option<i32> = either!(tx, connection => {
        let query = sqlx::query_scalar(sql).bind(target.name).bind(target.generation.int());
        query.fetch_optional(&mut **connection).await?
    });
    Ok(found.is_some())
}

/// What an attempt to switch came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Switched {
    Done,
    /// The next generation is not as far as the live one.
    Behind,
    /// So many of its streams are parked, and nobody said that it does not matter.
    Parked(i64),
    /// It is not wanted any more.
    Gone,
    /// A view belongs to another login, whose processes switch.
    Foreign {
        view: String,
        owner: String,
    },
}

/// Makes the next generation the live one, in one transaction, if it is as far as the live one in
/// every partition: whoever has waited for a position finds it in the rows before and after.
///
/// The live generation's checkpoints are locked meanwhile, and gone afterwards: whoever still writes
/// it fails, before anybody takes its progress for that of the rows that queries see.
pub(crate) async fn switch(
    database: &Database,
    definition: &Definition,
    next: Generation,
    clock: &dyn Clock,
) -> Result<Switched, sqlx::Error> {
    let mut open = OpenTransaction::begin(database).await?;
    let switched = switch_in(&mut open.lend(), definition, next, clock).await?;
    match switched {
        Switched::Done => open.commit().await?,
        _ => open.rollback().await?,
    }
    Ok(switched)
}

async fn switch_in(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    next: Generation,
    clock: &dyn Clock,
) -> Result<Switched, sqlx::Error> {
    let name = definition.name.as_str();
    lock(tx).await?;
    let found = find(tx, name).await?.filter(|found| found.next() == Some(next));
    let Some(found) = found else { return Ok(Switched::Gone) };
    if !is_as_far(tx, &found, next, SWITCH_LAG_MAX).await? {
        return Ok(Switched::Behind);
    }
    // Before the live generation is held: its workers must not wait for a switch that cannot be made here.
    if let Some(foreign) = foreign_view(tx, definition).await? {
        let parked = unaccepted(tx, &found, next).await?;
        return Ok(parked.map_or(foreign, Switched::Parked));
    }
    let deadline = clock.instant() + SWITCH_HOLD_MAX;
    hold(tx, name, found.live()).await?;
    while !is_as_far(tx, &found, next, 0).await? {
        // On SQLite nobody else can write while this transaction is open.
        if matches!(tx, Transaction::Sqlite(_)) || clock.instant() >= deadline {
            return Ok(Switched::Behind);
        }
        clock.sleep(SWITCH_POLL).await;
    }
    if let Some(parked) = unaccepted(tx, &found, next).await? {
        return Ok(Switched::Parked(parked));
    }
    switch_views(tx, definition, &found, next).await?;
    generation::share(tx, definition, next).await?;
    finish_switch(tx, definition, &found, next, clock.now()).await?;
    Ok(Switched::Done)
}

/// Returns the number of parked streams of the next generation, unless there are none or an operator has accepted them.
async fn unaccepted(
    tx: &mut Transaction<'_>,
    found: &Found,
    next: Generation,
) -> Result<Option<i64>, sqlx::Error> {
    let target = Target { name: &found.name, generation: next };
    let parked = parked::count_streams(tx, target).await?;
    Ok((parked > 0 && !found.next_takes_parked).then_some(parked))
}

/// Returns [`Switched::Foreign`] if another login owns a view.
async fn foreign_view(
    tx: &mut Transaction<'_>,
    definition: &Definition,
) -> Result<Option<Switched>, sqlx::Error> {
    for view in definition.tables() {
        if let Some(owner) = generation::foreign_owner(tx, &view).await? {
            return Ok(Some(Switched::Foreign { view: view.as_str().to_owned(), owner }));
        }
    }
    Ok(None)
}

async fn switch_views(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    found: &Found,
    next: Generation,
) -> Result<(), sqlx::Error> {
    if let Transaction::Postgres(connection) = tx {
        sqlx::query(SWITCH_LOCK_TIMEOUT).execute(&mut **connection).await?;
    }
    let same_columns = columns_of(&found.fingerprint) == columns_of(&definition.fingerprint);
    generation::switch_views(tx, definition, next, same_columns).await
}

async fn finish_switch(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    found: &Found,
    next: Generation,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE kafold_projection \
               SET live_generation = next_generation, fingerprint = next_fingerprint, \
                   next_generation = NULL, next_fingerprint = NULL, next_requested_at = NULL, \
                   next_takes_parked = $3, next_reason = NULL, actual_state = $4, \
                   actual_state_reason = NULL, updated_at = $2, live_window = $5, \
                   live_timeline = $6 \
               WHERE name = $1";
    let state = if found.is_paused() { State::Paused } else { State::Running };
    let name = &definition.name;
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(name).bind(Time(now)).bind(false).bind(state.text());
        let query = query.bind(definition.window_json()).bind(definition.timeline);
        query.execute(&mut **connection).await.map(drop)?;
    });
    forget(tx, name, next).await?;
    let details = serde_json::json!({ "from": found.live().0, "to": next.0 });
    audit::add(tx, Act::by_worker("switch"), Some(name), details, now).await
}

/// Removes what the tables of kafold hold of all generations but the live one. None comes back: who
/// takes a partition looks first whether its generation is wanted.
pub(crate) async fn forget(
    tx: &mut Transaction<'_>,
    name: &str,
    live: Generation,
) -> Result<(), sqlx::Error> {
    for sql in [
        "DELETE FROM kafold_checkpoint WHERE projection = $1 AND generation <> $2",
        "DELETE FROM kafold_parked_event WHERE projection = $1 AND generation <> $2",
        "DELETE FROM kafold_skipped_event WHERE projection = $1 AND generation <> $2",
        "DELETE FROM kafold_projection_category WHERE projection = $1 AND generation <> $2",
        "DELETE FROM kafold_late_event WHERE projection = $1 AND generation <> $2",
    ] {
        either!(tx, connection => {
            let query = sqlx::query(sql).bind(name).bind(live.int());
            query.execute(&mut **connection).await.map(drop)?;
        });
    }
    Ok(())
}

/// Removes a projection with all its tables and rows.
pub(crate) async fn remove(
    tx: &mut Transaction<'_>,
    definition: &Definition,
) -> Result<(), sqlx::Error> {
    generation::drop_views(tx, definition).await?;
    generation::drop_tables(tx, definition, &[]).await?;
    // No generation has this number.
    forget(tx, &definition.name, Generation(0)).await?;
    let sql = "DELETE FROM kafold_projection WHERE name = $1";
    either!(tx, connection => {
        sqlx::query(sql).bind(&definition.name).execute(&mut **connection).await.map(drop)
    })
}

/// Drops the tables of generations that are neither live nor being built: after a switch or an abort,
/// and after a crash behind one. A table that a query still reads is left for the next time.
pub(crate) async fn drop_stale(
    database: &Database,
    definition: &Definition,
) -> Result<(), sqlx::Error> {
    let mut open = OpenTransaction::begin(database).await?;
    let tx = &mut open.lend();
    lock(tx).await?;
    let Some(found) = find(tx, &definition.name).await? else { return open.rollback().await };
    if let Transaction::Postgres(connection) = tx {
        sqlx::query(SWITCH_LOCK_TIMEOUT).execute(&mut **connection).await?;
    }
    let keep: Vec<_> = [found.live()].into_iter().chain(found.next()).collect();
    generation::drop_tables(tx, definition, &keep).await?;
    open.commit().await
}

/// One registration, build or switch at a time: two processes that start at once make each table
/// once.
pub(crate) async fn lock(tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(()) };
    let lock = "SELECT pg_advisory_xact_lock(hashtextextended('kafold/projections', 0))";
    sqlx::query(lock).execute(&mut **connection).await.map(drop)
}

/// A row of the table.
#[derive(sqlx::FromRow)]
pub(crate) struct Found {
    pub(crate) name: String,
    live_generation: i32,
    pub(crate) last_generation: i32,
    fingerprint: String,
    next_generation: Option<i32>,
    next_fingerprint: Option<String>,
    pub(crate) next_requested_at: Option<Time>,
    next_takes_parked: bool,
    pub(crate) next_reason: Option<String>,
    pub(crate) desired_state: String,
    pub(crate) actual_state: String,
}

impl Found {
    pub(crate) fn live(&self) -> Generation {
        Generation::of(self.live_generation)
    }

    pub(crate) fn next(&self) -> Option<Generation> {
        self.next_generation.map(Generation::of)
    }

    /// Returns the definition which built the live rows, without its columns.
    pub(crate) fn definition(&self) -> Definition {
        let fingerprint = self.built_by().to_owned();
        let by_hand = fingerprint.strip_prefix("projection v").and_then(|it| it.split_once(": "));
        let tables = match by_hand {
            Some((_, "")) => Vec::new(),
            Some((_, tables)) => tables.split(", ").map(str::to_owned).collect(),
            None => vec![self.name.clone()],
        };
        let name = self.name.clone();
        Definition {
            name,
            fingerprint,
            columns: None,
            tables,
            window: None,
            timeline: None,
            is_spread: false,
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.desired_state == State::Paused.text()
    }

    /// Returns `true` after a reset of positions, until a worker has begun the rebuild.
    pub(crate) fn is_reset(&self) -> bool {
        is_reset(&self.fingerprint)
    }

    /// Returns the fingerprint of the definition which built the rows.
    fn built_by(&self) -> &str {
        self.fingerprint.strip_prefix(RESET).unwrap_or(&self.fingerprint)
    }

    /// Why it cannot be rebuilt, if it is written by hand into tables that it does not name.
    pub(crate) fn refuses_rebuild(&self) -> Option<String> {
        let built_by = self.built_by();
        let names_none = built_by.starts_with("projection v") && built_by.ends_with(": ");
        names_none.then(|| no_tables(&self.name))
    }
}

/// The row of a projection, locked until the end of the transaction.
pub(crate) async fn find(
    tx: &mut Transaction<'_>,
    name: &str,
) -> Result<Option<Found>, sqlx::Error> {
    let sql = locking(tx, FIND, " FOR UPDATE");
    either!(tx, connection => {
        sqlx::query_as(sql).bind(name).fetch_optional(&mut **connection).await
    })
}

/// Stores that a worker runs the projections. Returns whether all of them are registered.
pub(crate) async fn seen(database: &Database, names: &[String]) -> Result<bool, sqlx::Error> {
    let mut open = OpenTransaction::begin_forgettable(database).await?;
    let mut are_all_registered = true;
    for name in names {
        are_all_registered &= seen_in(&mut open.lend(), name).await?;
    }
    open.commit().await?;
    Ok(are_all_registered)
}

/// Stores that a worker runs the projection. Returns whether the projection is registered.
async fn seen_in(tx: &mut Transaction<'_>, name: &str) -> Result<bool, sqlx::Error> {
    let is_postgres = matches!(tx, Transaction::Postgres(_));
    let sql =
        with_clock(is_postgres, "UPDATE kafold_projection SET seen_at = ", " WHERE name = $1");
    either!(tx, connection => {
        let updated = sqlx::query(sql).bind(name).execute(&mut **connection).await?;
        Ok(updated.rows_affected() > 0)
    })
}

/// Returns the seconds since a worker last ran a projection.
pub(crate) async fn unseen_seconds(
    tx: &mut Transaction<'_>,
    name: &str,
) -> Result<Option<i64>, sqlx::Error> {
    let is_postgres = matches!(tx, Transaction::Postgres(_));
    let sql =
        with_clock(is_postgres, "SELECT ", " - seen_at FROM kafold_projection WHERE name = $1");
    either!(tx, connection => {
        sqlx::query_scalar(sql).bind(name).fetch_one(&mut **connection).await
    })
}

/// Returns the fingerprint of the definition which built the live rows of a projection.
pub(crate) async fn built_by(
    database: &Database,
    name: &str,
) -> Result<Option<String>, sqlx::Error> {
    let sql = "SELECT fingerprint FROM kafold_projection WHERE name = $1";
    let found: Option<String> = reading!(database, pool => {
        sqlx::query_scalar(sql).bind(name).fetch_optional(pool).await
    })?;
    Ok(found.map(|found| found.strip_prefix(RESET).unwrap_or(&found).to_owned()))
}

/// Returns the rows of all projections, by name, locked until the end of the transaction.
pub(crate) async fn find_all(tx: &mut Transaction<'_>) -> Result<Vec<Found>, sqlx::Error> {
    let sql = locking(tx, FIND, " FOR UPDATE");
    either!(tx, connection => {
        sqlx::query_as(sql).bind(None::<&str>).fetch_all(&mut **connection).await
    })
}

/// Selects one projection, or all.
const FIND: &str = "SELECT name, live_generation, last_generation, fingerprint, next_generation, \
                      next_fingerprint, next_requested_at, next_takes_parked, next_reason, \
                      desired_state, actual_state \
                    FROM kafold_projection WHERE name = COALESCE($1, name) ORDER BY name";

/// Returns `true` for the fingerprint of a projection after a reset of positions.
pub(crate) fn is_reset(fingerprint: &str) -> bool {
    fingerprint.starts_with(RESET)
}

fn no_tables(name: &str) -> String {
    format!(
        "projection {name} names no tables, so it cannot be built beside itself: run it under a new \
         name, and drop what it wrote"
    )
}

/// Refuses to put a view or table where somebody else's is.
async fn refuse_foreign(
    tx: &mut Transaction<'_>,
    definition: &Definition,
) -> Result<(), ApplyError> {
    let name = &definition.name;
    for table in definition.tables() {
        let generation = Generation::FIRST.table(table.as_str());
        for foreign in [table.as_str(), generation.as_str()] {
            if generation::exists(tx, foreign).await? {
                return Err(refused(format!(
                    "projection {name} cannot be made: the database has a table or view {foreign} \
                     that is not its own; rename one of the two"
                )));
            }
        }
    }
    Ok(())
}

async fn insert(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    now: DateTime<Utc>,
) -> Result<(), sqlx::Error> {
    let sql = "INSERT INTO kafold_projection \
                 (name, live_generation, fingerprint, desired_state, actual_state, updated_at) \
               VALUES ($1, $2, $3, 'running', 'running', $4)";
    let Definition { name, fingerprint, .. } = definition;
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(name).bind(Generation::FIRST.int()).bind(fingerprint);
        query.bind(Time(now)).execute(&mut **connection).await.map(drop)
    })
}

async fn check(
    tx: &mut Transaction<'_>,
    definition: &Definition,
    found: &Found,
) -> Result<(), ApplyError> {
    let Definition { name, fingerprint: wanted, .. } = definition;
    let Found { fingerprint, .. } = found;
    if fingerprint != wanted {
        return Err(refused(format!(
            "projection {name} has changed: its rows were built as [{fingerprint}], this program \
             has [{wanted}]; build them anew with `kafold projections rebuild {name}`"
        )));
    }
    for table in definition.tables() {
        let generation = found.live().table(table.as_str());
        for missing in [table.as_str(), generation.as_str()] {
            if !generation::exists(tx, missing).await? {
                return Err(refused(format!(
                    "projection {name} has lost {missing}; build it anew with \
                     `kafold projections rebuild {name}`"
                )));
            }
        }
    }
    Ok(())
}

/// Stops the live generation where it stands, until the end of the transaction.
async fn hold(tx: &mut Transaction<'_>, name: &str, live: Generation) -> Result<(), sqlx::Error> {
    let Transaction::Postgres(connection) = tx else { return Ok(()) };
    let sql = "SELECT 1 FROM kafold_checkpoint WHERE projection = $1 AND generation = $2 \
               ORDER BY partition FOR UPDATE";
    let query = sqlx::query(sql).bind(name).bind(live.int());
    query.execute(&mut **connection).await.map(drop)
}

/// Whether the next generation is as far as the live one in every partition, but for some records;
/// beside one that has stopped, whether it is near the end of the log.
async fn is_as_far(
    tx: &mut Transaction<'_>,
    found: &Found,
    next: Generation,
    lag_max: i64,
) -> Result<bool, sqlx::Error> {
    let sql = "SELECT NOT EXISTS (SELECT 1 FROM kafold_checkpoint l \
                 LEFT JOIN kafold_checkpoint n ON n.projection = l.projection \
                   AND n.generation = $3 AND n.partition = l.partition \
                 WHERE l.projection = $1 AND l.generation = $2 \
                   AND (n.next_offset IS NULL OR n.next_offset + $4 < l.next_offset)) \
               AND EXISTS (SELECT 1 FROM kafold_checkpoint \
                 WHERE projection = $1 AND generation = $3) \
               AND NOT EXISTS (SELECT 1 FROM kafold_checkpoint \
                 WHERE projection = $1 AND generation = $3 AND end_offset - next_offset > $5)";
    let end_lag_max =
        if found.actual_state == State::Stopped.text() { SWITCH_LAG_MAX } else { i64::MAX };
    either!(tx, connection => {
        let query = sqlx::query_scalar(sql).bind(&found.name).bind(found.live_generation);
        let query = query.bind(next.int()).bind(lag_max).bind(end_lag_max);
        query.fetch_one(&mut **connection).await
    })
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
    either!(tx, connection => {
        let query = sqlx::query(sql).bind(name).bind(state.text()).bind(reason).bind(Time(now));
        query.execute(&mut **connection).await.map(drop)
    })
}

/// The part of a fingerprint that tells of columns.
fn columns_of(fingerprint: &str) -> &str {
    fingerprint.split_once(": ").map_or("", |(_, columns)| columns)
}

fn refused(reason: String) -> ApplyError {
    Fault::somewhere(reason).into()
}

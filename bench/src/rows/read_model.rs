//! R4, R5: a full topic into a read model, against a consumer that writes it by hand. R6: the rebuild of
//! a read model, against one COPY of its rows.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join;
use futures_util::stream::TryStreamExt;
use kafold::projections::sqlx::postgres::PgPool;
use kafold::projections::sqlx::{self, Row};
use kafold::projections::{By, Control, Generation, ProjectionWorker, Projections, ReadModel};
use kafold::{Database, Mode};

use crate::Failure;
use crate::baselines::copy;
use crate::baselines::upsert::Target;
use crate::domain::{Balance, Movement};
use crate::fill::Fill;
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{now, per_second, until};
use crate::ours::{LONG_WAIT_MAX, applied, log_url, source};
use crate::rows::replay::counted;
use crate::servers::{Scratch, remove_log};

const PAYLOAD_BYTES: usize = 256;
const GOAL: f64 = 0.95;
const REBUILD_GOAL: f64 = 0.6;
/// Events of one transaction, of ours by default and of the baseline.
const POSTGRES_BATCH: usize = 5_000;
const SQLITE_BATCH: usize = 1_000;
const REBUILD_BATCH: usize = 50_000;
/// Bytes that one part of a COPY has.
const COPY_PART_BYTES: usize = 1 << 20;

/// A topic full of events.
struct Topic {
    brokers: String,
    name: String,
    events: u64,
    offsets: u64,
}

impl Topic {
    async fn fill(bench: &Bench, events: u64, streams: u64) -> Result<Self, Failure> {
        let brokers = bench.servers.broker().await?.to_owned();
        let name = bench.servers.new_name();
        let payload_bytes = PAYLOAD_BYTES;
        let fill = Fill { brokers: &brokers, name: &name, events, streams, payload_bytes };
        let offsets = fill.make(None).await?;
        Ok(Self { brokers, name, events, offsets })
    }

    /// Runs a read model of ours over all of it.
    async fn worker<M: ReadModel>(&self, database: &Database) -> Result<Projections, Failure> {
        let source = Arc::new(source(&log_url(&self.brokers, &self.name)).await?);
        Ok(ProjectionWorker::new(source, database.clone()).with::<M>().spawn())
    }

    async fn ours(&self, database: &Database) -> Result<Sample, Failure> {
        let began = now();
        let projections = self.worker::<Balance>(database).await?;
        applied(&projections, self.offsets).await?;
        let took = now() - began;
        projections.shutdown().await;
        let sql = "SELECT CAST(sum(deposits) AS BIGINT) FROM balances";
        let deposits: i64 = match database {
            Database::Postgres(database) => {
                sqlx::query_scalar(sql).fetch_one(database.pool()).await?
            }
            Database::Sqlite(database) => {
                sqlx::query_scalar(sql).fetch_one(database.readers()).await?
            }
        };
        self.rate(deposits, took)
    }

    async fn by_hand(&self, target: &mut Target, batch_events: usize) -> Result<Sample, Failure> {
        let topic = format!("{}.events", self.name);
        let took = target.apply(&self.brokers, &topic, self.events, batch_events).await?;
        self.rate(self.events as i64, took)
    }

    fn rate(&self, rows: i64, took: Duration) -> Result<Sample, Failure> {
        if rows != self.events as i64 {
            return Err(format!("{rows} of {} events were applied", self.events).into());
        }
        Ok(Sample::from([("per_s", per_second(self.events, took))]))
    }

    fn copied(&self, (rows, took): (u64, Duration)) -> Result<Sample, Failure> {
        self.rate(rows as i64, took)
    }

    async fn remove(self) -> Result<(), Failure> {
        remove_log(&self.brokers, &self.name).await
    }
}

/// R4.
pub async fn postgres(bench: &Bench) -> Result<(), Failure> {
    let (events, streams) = bench.size.of((20_000, 5_000), (150_000, 50_000), (500_000, 100_000));
    let topic = Topic::fill(bench, events, streams).await?;
    let ours = async || {
        let scratch = bench.servers.database().await?;
        let sample = topic.ours(&scratch.database).await?;
        scratch.remove().await?;
        Ok(sample)
    };
    let by_hand = async |loading| {
        let scratch = bench.servers.database().await?;
        let mut target = Target::postgres(&scratch.url, loading).await?;
        let sample = topic.by_hand(&mut target, POSTGRES_BATCH).await?;
        drop(target);
        scratch.remove().await?;
        Ok(sample)
    };
    compare_both(bench, "R4", "into PostgreSQL", ours, by_hand).await?;
    topic.remove().await
}

/// Against sums that are added in the statement, and against rows that are read first.
async fn compare_both(
    bench: &Bench,
    row: &'static str,
    case: &str,
    mut ours: impl AsyncFnMut() -> Result<Sample, Failure>,
    mut by_hand: impl AsyncFnMut(bool) -> Result<Sample, Failure>,
) -> Result<(), Failure> {
    let figures = [("per_s", Goal::AtLeast(GOAL))];
    let adding = format!("{case}, by hand adding sums");
    bench.compare(row, adding, &figures, &mut ours, async || by_hand(false).await).await?;
    if bench.size > Size::Test {
        let figures = [("per_s", Goal::Stated)];
        let reading = format!("{case}, by hand reading rows first");
        bench.compare(row, reading, &figures, &mut ours, async || by_hand(true).await).await?;
    }
    Ok(())
}

/// R5.
pub async fn sqlite(bench: &Bench) -> Result<(), Failure> {
    let (events, streams) = bench.size.of((10_000, 5_000), (100_000, 50_000), (500_000, 100_000));
    let topic = Topic::fill(bench, events, streams).await?;
    let ours = async || {
        let folder = tempfile::tempdir_in(on_disk()?)?;
        let url = format!("sqlite://{}", folder.path().join("ours.db").display());
        let database = Database::open(&url, Mode::Migrate).await?;
        let sample = topic.ours(&database).await?;
        database.close().await;
        Ok(sample)
    };
    let by_hand = async |loading| {
        let folder = tempfile::tempdir_in(on_disk()?)?;
        let mut target = Target::sqlite(&folder.path().join("by-hand.db"), loading).await?;
        topic.by_hand(&mut target, SQLITE_BATCH).await
    };
    compare_both(bench, "R5", "into SQLite", ours, by_hand).await?;
    topic.remove().await
}

/// A folder on a disk: temporary folders may be in memory.
pub(crate) fn on_disk() -> Result<&'static Path, Failure> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"));
    std::fs::create_dir_all(folder)?;
    Ok(folder)
}

/// R6.
pub async fn rebuild(bench: &Bench) -> Result<(), Failure> {
    let events = bench.size.of(5_000, 100_000, 2_000_000);
    let topic = Topic::fill(bench, events, events / 10).await?;
    let scratch = bench.servers.database().await?;
    let projections = topic.worker::<Movement>(&scratch.database).await?;
    applied(&projections, topic.offsets).await?;
    let rows = rows_as_text(&scratch, events).await?;
    let figures = [("per_s", Goal::AtLeast(REBUILD_GOAL))];
    let ours = async || rebuilt(&topic, &scratch, &projections).await;
    let copy = async || topic.copied(copy::once(pool(&scratch)?, &rows).await?);
    bench.compare("R6", "into PostgreSQL, a row an event", &figures, ours, &copy).await?;
    // What any rebuild does: with nothing in between, and with rows made of events.
    let figures = [("per_s", Goal::Stated)];
    let beside = async || {
        let began = now();
        let read = counted(&topic.brokers, &topic.name, events);
        let (_, (rows, _)) = try_join(read, copy::once(pool(&scratch)?, &rows)).await?;
        topic.copied((rows, now() - began))
    };
    let case = "without kafold: one COPY while a raw consumer reads the log";
    bench.compare("R6", case, &figures, beside, &copy).await?;
    let events_topic = format!("{}.events", topic.name);
    let by_hand = async || {
        let (brokers, pool) = (&topic.brokers, pool(&scratch)?);
        let copied = copy::rebuild(brokers, &events_topic, events, REBUILD_BATCH, pool).await?;
        topic.copied(copied)
    };
    let case = "without kafold: by hand, a COPY and the checkpoint in a transaction";
    bench.compare("R6", case, &figures, by_hand, copy).await?;
    projections.shutdown().await;
    scratch.remove().await?;
    topic.remove().await
}

fn pool(scratch: &Scratch) -> Result<&PgPool, Failure> {
    match &scratch.database {
        Database::Postgres(database) => Ok(database.pool()),
        Database::Sqlite(_) => Err("PostgreSQL is measured".into()),
    }
}

/// From the request to the switch.
async fn rebuilt(
    topic: &Topic,
    scratch: &Scratch,
    projections: &Projections,
) -> Result<Sample, Failure> {
    let by = By { actor: "bench", reason: None };
    let began = now();
    let next = Control::new(scratch.database.clone()).rebuild(Movement::NAME, false, by).await?;
    let is_live =
        |next: Generation| projections.status().iter().all(|status| status.generation == next);
    until("it is rebuilt", LONG_WAIT_MAX, async || Ok(is_live(next).then_some(()))).await?;
    let took = now() - began;
    let rows = sqlx::query_scalar("SELECT count(*) FROM movements").fetch_one(pool(scratch)?);
    topic.rate(rows.await?, took)
}

/// All rows as COPY takes them.
async fn rows_as_text(scratch: &Scratch, events: u64) -> Result<Vec<Vec<u8>>, Failure> {
    let sql = "SELECT id::text, account, amount_cents, version FROM movements";
    let mut rows = sqlx::query(sql).fetch(pool(scratch)?);
    let (mut parts, mut part, mut count) = (Vec::new(), Vec::new(), 0);
    while let Some(row) = rows.try_next().await? {
        let (id, account): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let (amount_cents, version): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
        let line = format!("{id}\t{account}\t{amount_cents}\t{version}\n");
        part.extend_from_slice(line.as_bytes());
        count += 1;
        if part.len() >= COPY_PART_BYTES {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    if count == events { Ok(parts) } else { Err(format!("{count} rows of {events} events").into()) }
}

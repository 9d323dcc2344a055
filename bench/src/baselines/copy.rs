//! Rows of a log into PostgreSQL by COPY: all of them at once, made beforehand; or made of events, in
//! transactions that a rebuild can go on behind.

use std::collections::HashMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::Duration;

use kafold::projections::sqlx;
use kafold::projections::sqlx::postgres::{PgPool, PgPoolCopyExt};
use rdkafka::Message;
use tokio::sync::mpsc;

use crate::Failure;
use crate::baselines::consumer::{From, consumer, each};
use crate::baselines::replay::recorded;
use crate::domain::AccountEvent;
use crate::measure::now;

/// A table like the read model's.
const TABLE: &str = "CREATE TABLE by_copy (id UUID PRIMARY KEY, account TEXT COLLATE \"C\" NOT NULL, \
                     amount_cents BIGINT NOT NULL, version BIGINT NOT NULL)";
const COPY: &str = "COPY by_copy FROM STDIN";
/// Parts that are made ahead of their COPY.
const PARTS_AHEAD: usize = 4;

/// One COPY; how many rows, and how long it took.
pub async fn once(pool: &PgPool, parts: &[Vec<u8>]) -> Result<(u64, Duration), Failure> {
    sqlx::query(TABLE).execute(pool).await?;
    let began = now();
    let mut copy = pool.copy_in_raw(COPY).await?;
    for part in parts {
        copy.send(part.as_slice()).await?;
    }
    let rows = copy.finish().await?;
    let took = now() - began;
    sqlx::query("DROP TABLE by_copy").execute(pool).await?;
    Ok((rows, took))
}

/// Rows of events, and where each partition goes on behind them.
#[derive(Default)]
struct Part {
    lines: Vec<u8>,
    rows: usize,
    next: HashMap<i32, i64>,
}

/// A rebuild that can be interrupted, as ours: rows and checkpoint of `part_rows` events are a
/// transaction, and the next ones are read, decoded and encoded meanwhile. How many rows, and how long
/// it took.
pub async fn rebuild(
    brokers: &str,
    topic: &str,
    events: u64,
    part_rows: usize,
    pool: &PgPool,
) -> Result<(u64, Duration), Failure> {
    let checkpoint = "CREATE TABLE by_copy_checkpoint (partition INTEGER PRIMARY KEY, \
                      next_offset BIGINT NOT NULL)";
    sqlx::query(TABLE).execute(pool).await?;
    sqlx::query(checkpoint).execute(pool).await?;
    let began = now();
    let (made, mut parts) = mpsc::channel(PARTS_AHEAD);
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    let making =
        tokio::task::spawn_blocking(move || make(&brokers, &topic, events, part_rows, &made));
    let mut rows = 0;
    while let Some(Part { lines, next, .. }) = parts.recv().await {
        #[expect(clippy::disallowed_methods, reason = "a baseline shares nothing with kafold")]
        let mut tx = pool.begin().await?;
        let mut copy = tx.copy_in_raw(COPY).await?;
        copy.send(lines).await?;
        rows += copy.finish().await?;
        let (partitions, next): (Vec<_>, Vec<_>) = next.into_iter().unzip();
        let moved = "INSERT INTO by_copy_checkpoint SELECT * FROM UNNEST($1::int4[], $2::int8[]) \
                     ON CONFLICT (partition) DO UPDATE SET next_offset = excluded.next_offset";
        sqlx::query(moved).bind(partitions).bind(next).execute(&mut *tx).await?;
        tx.commit().await?;
    }
    making.await??;
    let took = now() - began;
    sqlx::query("DROP TABLE by_copy, by_copy_checkpoint").execute(pool).await?;
    Ok((rows, took))
}

/// Blocks.
fn make(
    brokers: &str,
    topic: &str,
    events: u64,
    part_rows: usize,
    made: &mpsc::Sender<Part>,
) -> Result<(), Failure> {
    let consumer = consumer(brokers, topic, From::Beginning)?;
    let (mut part, mut seen) = (Part::default(), 0);
    each(&consumer, |message| {
        let Some((account, event)) = recorded(message)? else {
            return Ok(ControlFlow::Continue(()));
        };
        let AccountEvent::Deposited { amount_cents, .. } = event.event;
        writeln!(part.lines, "{}\t{account}\t{amount_cents}\t{}", event.id, event.version)?;
        part.next.insert(message.partition(), message.offset() + 1);
        part.rows += 1;
        seen += 1;
        if part.rows == part_rows || seen == events {
            made.blocking_send(std::mem::take(&mut part)).map_err(|_| "nobody takes the rows")?;
        }
        Ok(if seen == events { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })
}

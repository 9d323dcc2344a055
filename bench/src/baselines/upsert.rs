//! A consumer that writes a read model by hand, rows and checkpoint in one transaction: sums are added in
//! the statement, so that no row is read first; or rows are read and written whole, as a fold of any kind
//! must.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::Duration;

use kafold::projections::sqlx::postgres::PgConnection;
use kafold::projections::sqlx::sqlite::SqliteConnection;
use kafold::projections::sqlx::{self, Connection, QueryBuilder, Sqlite};
use rdkafka::Message;
use rdkafka::consumer::BaseConsumer;
use rdkafka::message::BorrowedMessage;
use serde::Deserialize;
use tokio::sync::mpsc;

use crate::Failure;
use crate::baselines::consumer::{From, Moments, consumer, each};
use crate::measure::now;
use crate::servers::PARTITIONS;

/// Events that the reader hands over at once.
const CHUNK_EVENTS: usize = 500;
/// Chunks read ahead.
const CHUNKS_AHEAD: usize = 16;
/// Rows of one statement on SQLite.
const SQLITE_ROWS: usize = 500;

/// Where the rows go.
pub struct Target {
    tables: Tables,
    /// Whether rows are read first.
    loading: bool,
}

enum Tables {
    /// By `UNNEST`.
    Postgres(PgConnection),
    /// By many rows in a statement.
    Sqlite(SqliteConnection),
}

/// An event as far as the rows need it.
struct Event {
    partition: i32,
    offset: i64,
    id: String,
    amount_cents: i64,
}

#[derive(Deserialize)]
struct Payload {
    amount_cents: i64,
}

/// The sum and the count that a batch adds to a row.
type Sums = HashMap<String, (i64, i64)>;

impl Target {
    /// A database in PostgreSQL with the tables of this baseline.
    pub async fn postgres(url: &str, loading: bool) -> Result<Self, Failure> {
        let mut connection = PgConnection::connect(url).await?;
        let balances = "CREATE TABLE by_hand (id TEXT COLLATE \"C\" PRIMARY KEY, \
                        balance_cents BIGINT NOT NULL, deposits BIGINT NOT NULL)";
        let checkpoint = "CREATE TABLE by_hand_checkpoint (partition INTEGER PRIMARY KEY, \
                          next_offset BIGINT NOT NULL)";
        let places = "INSERT INTO by_hand_checkpoint \
                      SELECT partition, 0 FROM generate_series(0, $1) partition";
        sqlx::query(balances).execute(&mut connection).await?;
        sqlx::query(checkpoint).execute(&mut connection).await?;
        sqlx::query(places).bind(PARTITIONS as i32 - 1).execute(&mut connection).await?;
        Ok(Self { tables: Tables::Postgres(connection), loading })
    }

    /// A SQLite file, as durable as ours.
    pub async fn sqlite(file: &std::path::Path, loading: bool) -> Result<Self, Failure> {
        let mut connection = super::sqlite(file).await?;
        let balances = "CREATE TABLE by_hand (id TEXT PRIMARY KEY, balance_cents INTEGER NOT NULL, \
                        deposits INTEGER NOT NULL) STRICT, WITHOUT ROWID";
        let checkpoint = "CREATE TABLE by_hand_checkpoint (partition INTEGER PRIMARY KEY, \
                          next_offset INTEGER NOT NULL) STRICT";
        sqlx::query(balances).execute(&mut connection).await?;
        sqlx::query(checkpoint).execute(&mut connection).await?;
        for partition in 0..PARTITIONS {
            let place = sqlx::query("INSERT INTO by_hand_checkpoint VALUES ($1, 0)");
            place.bind(partition as i32).execute(&mut connection).await?;
        }
        Ok(Self { tables: Tables::Sqlite(connection), loading })
    }

    /// Applies the first `events` events of a topic, `batch_events` in one transaction, and answers how
    /// long that took. Checks what came of it.
    pub async fn apply(
        &mut self,
        brokers: &str,
        topic: &str,
        events: u64,
        batch_events: usize,
    ) -> Result<Duration, Failure> {
        let began = now();
        let (chunks, mut read) = mpsc::channel(CHUNKS_AHEAD);
        let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
        let reading =
            tokio::task::spawn_blocking(move || read_all(&brokers, &topic, events, &chunks));
        let mut batch: Vec<Event> = Vec::new();
        while let Some(chunk) = read.recv().await {
            batch.extend::<Vec<Event>>(chunk);
            while batch.len() < batch_events
                && let Ok(chunk) = read.try_recv()
            {
                batch.extend(chunk);
            }
            self.write(std::mem::take(&mut batch)).await?;
        }
        reading.await??;
        let took = now() - began;
        match self.deposits().await? {
            all if all == events as i64 => Ok(took),
            other => Err(format!("the baseline applied {other} of {events} events").into()),
        }
    }

    /// Applies the next `events` events of a consumer, all that have come in one transaction, and
    /// answers when each was committed.
    pub async fn follow(
        &mut self,
        consumer: BaseConsumer,
        events: u64,
    ) -> Result<Moments, Failure> {
        let (come, mut read) = mpsc::channel(CHUNK_EVENTS * CHUNKS_AHEAD);
        let reading = tokio::task::spawn_blocking(move || {
            let mut seen = 0;
            each(&consumer, |message| {
                if let Some(event) = event(message)? {
                    come.blocking_send(event).map_err(|_| "nobody takes the events")?;
                    seen += 1;
                }
                Ok(if seen == events { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })
        });
        let (mut moments, mut batch) = (Moments::new(), Vec::new());
        while read.recv_many(&mut batch, CHUNK_EVENTS).await > 0 {
            let places: Vec<_> = batch.iter().map(|e: &Event| (e.partition, e.offset)).collect();
            self.write(std::mem::take(&mut batch)).await?;
            let committed = now();
            moments.extend(places.into_iter().map(|place| (place, committed)));
        }
        reading.await??;
        Ok(moments)
    }

    async fn write(&mut self, batch: Vec<Event>) -> Result<(), Failure> {
        // From where to where each partition is read.
        let mut moved: HashMap<i32, (i64, i64)> = HashMap::new();
        let mut sums = Sums::new();
        for event in batch {
            let next = event.offset + 1;
            moved.entry(event.partition).or_insert((event.offset, next)).1 = next;
            let sum = sums.entry(event.id).or_default();
            sum.0 += event.amount_cents;
            sum.1 += 1;
        }
        match &mut self.tables {
            Tables::Postgres(connection) => {
                write_postgres(connection, self.loading, sums, moved).await
            }
            Tables::Sqlite(connection) => write_sqlite(connection, self.loading, sums, moved).await,
        }
    }

    async fn deposits(&mut self) -> Result<i64, Failure> {
        let sql = "SELECT CAST(sum(deposits) AS BIGINT) FROM by_hand";
        Ok(match &mut self.tables {
            Tables::Postgres(connection) => sqlx::query_scalar(sql).fetch_one(connection).await?,
            Tables::Sqlite(connection) => {
                let sql = "SELECT sum(deposits) FROM by_hand";
                sqlx::query_scalar(sql).fetch_one(connection).await?
            }
        })
    }
}

/// Blocks.
fn read_all(
    brokers: &str,
    topic: &str,
    events: u64,
    chunks: &mpsc::Sender<Vec<Event>>,
) -> Result<(), Failure> {
    let consumer = consumer(brokers, topic, From::Beginning)?;
    let (mut chunk, mut seen) = (Vec::with_capacity(CHUNK_EVENTS), 0);
    each(&consumer, |message| {
        chunk.extend(event(message)?);
        let is_last = seen + chunk.len() as u64 == events;
        if chunk.len() == CHUNK_EVENTS || is_last {
            seen += chunk.len() as u64;
            let full = std::mem::replace(&mut chunk, Vec::with_capacity(CHUNK_EVENTS));
            chunks.blocking_send(full).map_err(|_| "nobody takes the events")?;
        }
        Ok(if is_last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })
}

/// `None` of what is no event.
fn event(message: &BorrowedMessage<'_>) -> Result<Option<Event>, Failure> {
    let Some(Ok(key)) = message.key_view::<str>() else { return Err("a key is no text".into()) };
    let Some(id) = key.strip_prefix("account-") else { return Ok(None) };
    let payload: Payload = serde_json::from_slice(message.payload().unwrap_or_default())?;
    let (partition, offset) = (message.partition(), message.offset());
    Ok(Some(Event { partition, offset, id: id.to_owned(), amount_cents: payload.amount_cents }))
}

async fn write_postgres(
    connection: &mut PgConnection,
    loading: bool,
    mut sums: Sums,
    moved: HashMap<i32, (i64, i64)>,
) -> Result<(), Failure> {
    let mut tx = connection.begin().await?;
    if loading {
        let ids: Vec<_> = sums.keys().cloned().collect();
        let sql = "SELECT id, balance_cents, deposits FROM by_hand WHERE id = ANY($1)";
        add_rows(&mut sums, sqlx::query_as(sql).bind(ids).fetch_all(&mut *tx).await?);
    }
    let (mut ids, mut amounts, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for (id, (amount, count)) in sums {
        ids.push(id);
        amounts.push(amount);
        counts.push(count);
    }
    let sql = if loading {
        "INSERT INTO by_hand SELECT * FROM UNNEST($1::text[], $2::int8[], $3::int8[]) \
         ON CONFLICT (id) DO UPDATE SET balance_cents = excluded.balance_cents, \
           deposits = excluded.deposits"
    } else {
        "INSERT INTO by_hand SELECT * FROM UNNEST($1::text[], $2::int8[], $3::int8[]) \
         ON CONFLICT (id) DO UPDATE SET \
           balance_cents = by_hand.balance_cents + excluded.balance_cents, \
           deposits = by_hand.deposits + excluded.deposits"
    };
    sqlx::query(sql).bind(ids).bind(amounts).bind(counts).execute(&mut *tx).await?;
    let (mut partitions, mut from, mut to) = (Vec::new(), Vec::new(), Vec::new());
    for (partition, (first, next)) in moved {
        partitions.push(partition);
        from.push(first);
        to.push(next);
    }
    // A claim may lie between two events: what was read before is below the first of these.
    let sql = "UPDATE by_hand_checkpoint c SET next_offset = m.next \
               FROM UNNEST($1::int4[], $2::int8[], $3::int8[]) AS m (partition, first, next) \
               WHERE c.partition = m.partition AND c.next_offset <= m.first";
    let query = sqlx::query(sql).bind(&partitions).bind(from).bind(to);
    let done = query.execute(&mut *tx).await?.rows_affected();
    if done != partitions.len() as u64 {
        return Err("somebody else has moved a checkpoint".into());
    }
    Ok(tx.commit().await?)
}

/// Adds what is in the table, so that the sums are what is to be there.
fn add_rows(sums: &mut Sums, rows: Vec<(String, i64, i64)>) {
    for (id, balance_cents, deposits) in rows {
        if let Some(sum) = sums.get_mut(&id) {
            sum.0 += balance_cents;
            sum.1 += deposits;
        }
    }
}

async fn write_sqlite(
    connection: &mut SqliteConnection,
    loading: bool,
    mut sums: Sums,
    moved: HashMap<i32, (i64, i64)>,
) -> Result<(), Failure> {
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    if loading {
        let ids: Vec<_> = sums.keys().cloned().collect();
        for ids in ids.chunks(SQLITE_ROWS) {
            let mut sql = QueryBuilder::<Sqlite>::new(
                "SELECT id, balance_cents, deposits FROM by_hand WHERE id IN (",
            );
            let mut places = sql.separated(", ");
            for id in ids {
                places.push_bind(id);
            }
            sql.push(")");
            add_rows(&mut sums, sql.build_query_as().fetch_all(&mut *tx).await?);
        }
    }
    let mut rows: Vec<_> = sums.into_iter().collect();
    // In the order of the table, which it is written in faster.
    rows.sort_unstable();
    for rows in rows.chunks(SQLITE_ROWS) {
        let mut sql = QueryBuilder::<Sqlite>::new("INSERT INTO by_hand ");
        sql.push_values(rows, |mut row, (id, (amount, count))| {
            row.push_bind(id).push_bind(amount).push_bind(count);
        });
        sql.push(if loading {
            " ON CONFLICT (id) DO UPDATE SET balance_cents = excluded.balance_cents, \
             deposits = excluded.deposits"
        } else {
            " ON CONFLICT (id) DO UPDATE SET \
             balance_cents = balance_cents + excluded.balance_cents, \
             deposits = deposits + excluded.deposits"
        });
        sql.build().execute(&mut *tx).await?;
    }
    for (partition, (first, next)) in moved {
        let sql = "UPDATE by_hand_checkpoint SET next_offset = $3 \
                   WHERE partition = $1 AND next_offset <= $2";
        let query = sqlx::query(sql).bind(partition).bind(first).bind(next);
        if query.execute(&mut *tx).await?.rows_affected() != 1 {
            return Err("somebody else has moved a checkpoint".into());
        }
    }
    Ok(tx.commit().await?)
}

//! Sales by sku, as a [`Projection`] with SQL written by hand.
//!
//! An order with several skus counts in the row of each, so the number of orders does not follow
//! from the rows. It is kept in a row of its own, under the empty sku, which no line can have: one
//! statement reads rows and total of the same moment.
//!
//! Written by hand because the database can add by itself: no row is read to be written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use kafold::projections::sqlx::{self, AssertSqlSafe, PgConnection, SqliteConnection};
use kafold::projections::{Generation, HandlerError, Projection, ProjectionBatch, Transaction};
use kafold::store::ReadError;
use kafold::{Database, Recorded, is_transient};

use crate::order::OrderEvent;
use crate::read_models::{Sale, Sums};

/// Written by the projection `sales_by_sku`, read by `GET /reports/sales?by=sku`.
const COLUMNS: &str = "
    sku          TEXT   NOT NULL PRIMARY KEY,
    orders       BIGINT NOT NULL,
    quantity     BIGINT NOT NULL,
    amount_cents BIGINT NOT NULL";

/// Rows come in the order of their sku, so that two transactions lock shared rows in one order.
const ROWS_POSTGRES: &str =
    "SELECT * FROM UNNEST($1::text[], $2::bigint[], $3::bigint[], $4::bigint[])";

const ADD: &str = "ON CONFLICT (sku) DO UPDATE SET
    orders       = t.orders + excluded.orders,
    quantity     = t.quantity + excluded.quantity,
    amount_cents = t.amount_cents + excluded.amount_cents";
/// Rows in one statement on SQLite: far below its limit of 32 766 bound values.
const ROWS_MAX_SQLITE: usize = 1_000;

/// Rows of which no order is left stay, with zeros.
const SELECT: &str =
    "SELECT sku, orders, quantity, amount_cents FROM sales_by_sku WHERE orders <> 0";

/// The sku of the row that counts every order once.
const TOTAL: &str = "";

/// What a caller is told to wait while the database is down.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Sales by sku.
pub(crate) struct SalesBySku;

/// What the table says at one moment.
#[derive(Debug, Default)]
pub(crate) struct SkuSales {
    pub(crate) rows: Vec<(String, Sums)>,
    pub(crate) total: Sums,
}

impl SalesBySku {
    pub(crate) const NAME: &'static str = "sales_by_sku";

    /// Every row.
    pub(crate) async fn read(database: &Database) -> Result<SkuSales, ReadError> {
        type Columns = (String, i64, i64, i64);
        let rows: Result<Vec<Columns>, sqlx::Error> = match database {
            Database::Postgres(database) => sqlx::query_as(SELECT).fetch_all(database.pool()).await,
            Database::Sqlite(database) => {
                sqlx::query_as(SELECT).fetch_all(database.readers()).await
            }
        };
        let mut sales = SkuSales::default();
        for (sku, orders, quantity, amount_cents) in rows.map_err(read_error)? {
            let sums = Sums { orders, quantity, amount_cents };
            match sku.as_str() {
                TOTAL => sales.total = sums,
                _ => sales.rows.push((sku, sums)),
            }
        }
        Ok(sales)
    }
}

fn read_error(error: sqlx::Error) -> ReadError {
    if is_transient(&error) {
        ReadError::unavailable(RETRY_AFTER, error)
    } else {
        ReadError::diverged("the table sales_by_sku", error)
    }
}

#[async_trait]
impl Projection for SalesBySku {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn tables(&self) -> &[&str] {
        &[Self::NAME]
    }

    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        let table = generation.table(Self::NAME);
        // Made of constants and a checked name, as all statements here.
        let create = AssertSqlSafe(format!("CREATE TABLE IF NOT EXISTS {table} ({COLUMNS})"));
        match tx {
            Transaction::Postgres(connection) => {
                sqlx::query(create).execute(&mut **connection).await?;
            }
            Transaction::Sqlite(connection) => {
                sqlx::query(create).execute(&mut **connection).await?;
            }
        }
        Ok(())
    }

    async fn apply(
        &self,
        batch: &ProjectionBatch,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), HandlerError> {
        let events = batch.decode::<OrderEvent>()?;
        let changes = changes(&events);
        if changes.is_empty() {
            return Ok(());
        }
        let insert = format!("INSERT INTO {} AS t", generation.table(Self::NAME));
        match tx {
            Transaction::Postgres(connection) => {
                add_postgres(connection, &insert, &changes).await?;
            }
            Transaction::Sqlite(connection) => add_sqlite(connection, &insert, &changes).await?,
        }
        Ok(())
    }
}

/// What a batch adds to each row, in the order of the skus.
fn changes(events: &[Recorded<OrderEvent>]) -> Vec<(&str, Sums)> {
    let mut changes: BTreeMap<&str, Sums> = BTreeMap::new();
    for sale in events.iter().filter_map(|event| Sale::of(&event.event)) {
        let total = changes.entry(TOTAL).or_default();
        *total = total.plus_order(sale.lines, sale.sign);
        let skus: BTreeSet<&str> = sale.lines.iter().map(|line| line.sku.as_str()).collect();
        for sku in skus {
            let row = changes.entry(sku).or_default();
            *row = row.plus_order(sale.lines.iter().filter(|line| line.sku == sku), sale.sign);
        }
    }
    changes.into_iter().filter(|(_, sums)| *sums != Sums::default()).collect()
}

async fn add_postgres(
    connection: &mut PgConnection,
    insert: &str,
    changes: &[(&str, Sums)],
) -> Result<(), sqlx::Error> {
    let column = |value: fn(&Sums) -> i64| -> Vec<i64> {
        changes.iter().map(|(_, sums)| value(sums)).collect()
    };
    sqlx::query(AssertSqlSafe(format!("{insert} {ROWS_POSTGRES} {ADD}")))
        .bind(changes.iter().map(|(sku, _)| (*sku).to_owned()).collect::<Vec<_>>())
        .bind(column(|sums| sums.orders))
        .bind(column(|sums| sums.quantity))
        .bind(column(|sums| sums.amount_cents))
        .execute(connection)
        .await?;
    Ok(())
}

async fn add_sqlite(
    connection: &mut SqliteConnection,
    insert: &str,
    changes: &[(&str, Sums)],
) -> Result<(), sqlx::Error> {
    for part in changes.chunks(ROWS_MAX_SQLITE) {
        let rows = vec!["(?, ?, ?, ?)"; part.len()].join(", ");
        let statement = format!("{insert} VALUES {rows} {ADD}");
        let mut query = sqlx::query(AssertSqlSafe(statement));
        for (sku, sums) in part {
            query = query.bind(*sku).bind(sums.orders).bind(sums.quantity).bind(sums.amount_cents);
        }
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

//! What the database shows: read models and their checkpoints, of one snapshot each.

use std::collections::BTreeMap;

use kafold::projections::ReadModel;
use kafold::projections::sqlx::{self, PgPool, Row};

use crate::domain::{GroupRow, TallyRow};
use crate::history::{Micros, RowsLine};

const MODELS: [(&str, &str); 2] = [
    (TallyRow::NAME, "SELECT id, total, version AS counted, closed FROM tallies"),
    (GroupRow::NAME, "SELECT id, total, events AS counted, closed FROM groups"),
];

/// A read model as it is now. Fails while the database is down.
pub async fn rows(pool: &PgPool, model: &str, at: Micros) -> Result<RowsLine, sqlx::Error> {
    let select =
        MODELS.iter().find(|(name, _)| *name == model).map_or(MODELS[0].1, |found| found.1);
    let counted = if model == GroupRow::NAME { "events" } else { "version" };
    #[expect(clippy::disallowed_methods, reason = "the checker shares nothing with the store")]
    let mut tx = pool.begin().await?;
    sqlx::query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .execute(&mut *tx)
        .await?;
    let checkpoint: Vec<(i32, i64)> = sqlx::query_as(
        "SELECT partition, next_offset FROM kafold_checkpoint WHERE projection = $1",
    )
    .bind(model)
    .fetch_all(&mut *tx)
    .await?;
    let mut rows = BTreeMap::new();
    for row in sqlx::query(select).fetch_all(&mut *tx).await? {
        let mut columns = BTreeMap::new();
        for (name, column) in [("total", "total"), (counted, "counted"), ("closed", "closed")] {
            columns.insert(name.to_owned(), row.try_get::<i64, _>(column)?);
        }
        rows.insert(row.try_get("id")?, columns);
    }
    tx.commit().await?;
    let checkpoint = checkpoint
        .into_iter()
        // Neither is ever negative.
        .map(|(partition, next)| (partition.unsigned_abs(), next.unsigned_abs()))
        .collect();
    Ok(RowsLine { model: model.to_owned(), at, checkpoint, rows })
}

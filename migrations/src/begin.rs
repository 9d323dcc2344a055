//! [`begin`]: transactions whose beginning may be cancelled.

use std::panic::resume_unwind;

use sqlx::{Database, Pool, Transaction};

/// Begins a transaction on a connection of the pool, with this statement, such as `BEGIN`. The future may be dropped at
/// any point.
///
/// [`Pool::begin`] on PostgreSQL must not be cancelled (sqlx 0.9). If the future is dropped while it waits for the answer
/// to `BEGIN`, the connection returns to the pool with an open transaction. A later user of the connection runs its
/// statements in that transaction, and loses them when the transaction is rolled back, although each was acknowledged.
/// Here a task begins the transaction. The task is not dropped with its caller, and rolls back what nobody waits for.
#[expect(clippy::disallowed_methods, reason = "the task is never dropped half way")]
pub async fn begin<DB: Database>(
    pool: &Pool<DB>,
    statement: &'static str,
) -> Result<Transaction<'static, DB>, sqlx::Error> {
    let pool = pool.clone();
    let begun = tokio::spawn(async move { pool.begin_with(statement).await });
    begun.await.unwrap_or_else(|failed| match failed.try_into_panic() {
        Ok(panic) => resume_unwind(panic),
        // The runtime ends, and with it the pool.
        Err(_) => Err(sqlx::Error::PoolClosed),
    })
}

//! `migrate`: creates the toolkit's tables, or makes them current.

use kafold::{Database, DatabaseError, Mode};
use serde::Serialize;

use crate::admin::Context;
use crate::error::Error;
use crate::tables;

#[derive(Serialize)]
struct Report<'r> {
    database: &'r str,
    /// The highest migration.
    schema: i64,
    applied: Vec<Migration<'r>>,
}

#[derive(Serialize)]
struct Migration<'r> {
    version: i64,
    name: &'r str,
}

pub(crate) async fn run(context: &mut Context) -> Result<(), Error> {
    let url = context.options.database_url()?;
    let before = match Database::open(&url, Mode::Check).await {
        Ok(_) => None,
        Err(DatabaseError::NotMigrated { found, .. }) => Some(found),
        // A file that is not there yet; anything else is refused again.
        Err(DatabaseError::Refused { .. }) => Some(0),
        Err(error) => return Err(error.into()),
    };
    let database = Database::open(&url, Mode::Migrate).await?;
    let all = tables::migrations(&database).await?;
    let is_new = |version: i64| before.is_some_and(|before| version > before);
    let applied: Vec<_> = all.iter().filter(|(version, _)| is_new(*version)).collect();
    let schema = all.last().map_or(0, |(version, _)| *version);
    let url = database.url();
    if context.out.json {
        let applied = applied.iter().map(|(version, name)| Migration { version: *version, name });
        let report = Report { database: url, schema, applied: applied.collect() };
        return context.out.document(&report);
    }
    for (version, name) in &applied {
        context.out.line(&format!("applied {version:04} {name}"))?;
    }
    let state = if applied.is_empty() { "was current" } else { "is current" };
    context.out.line(&format!("{url} {state}: schema {schema}"))
}

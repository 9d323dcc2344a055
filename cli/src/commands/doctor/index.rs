//! Compares the tables of the stream index, or of a log in a file, with each other.

use kafold::Database;
use kafold::StreamIndex;
use kafold::projections::SqlIndex;

use super::{Checks, Seen};
use crate::error::{Error, chain};
use crate::log::Log;
use crate::output::count;

const NAME: &str = "stream index";

pub(super) async fn check(seen: Option<&Seen>, database: &Database, checks: &mut Checks) {
    let checked = match (seen.map(|seen| &seen.log), database) {
        (Some(Log::Embedded { .. }), Database::Sqlite(file)) => check_file(file, checks).await,
        _ => check_index(database, checks).await,
    };
    if let Err(error) = checked {
        checks.failed(NAME, &error);
    }
}

async fn check_file(
    file: &kafold::embedded::SqliteDatabase,
    checks: &mut Checks,
) -> Result<(), Error> {
    let events = kafold::embedded::check_heads(file).await?;
    checks.ok(NAME, format!("{} and their heads agree", count(events, "event")));
    Ok(())
}

/// Compares each partition's heads with the position's totals, and the rows with the heads.
async fn check_index(database: &Database, checks: &mut Checks) -> Result<(), Error> {
    let index = SqlIndex::new(database.clone());
    let mut differences = Vec::new();
    for (partition, _) in index.cursors().await? {
        let heads = index.heads(partition).await?;
        differences.extend(heads.check(partition, index.heads_table()).err());
    }
    let counts = index.count().await?;
    differences.extend(counts.iter().filter_map(|count| count.check().err()));
    if differences.is_empty() {
        let events = counts.iter().map(|count| count.rows.events).sum();
        checks.ok(NAME, format!("{} and their heads agree", count(events, "event")));
    }
    for difference in differences {
        checks.problem(NAME, chain(&difference), "run: kafold index rebuild");
    }
    Ok(())
}

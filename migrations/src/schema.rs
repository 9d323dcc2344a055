//! The migration sets, and where a database stands in its own.

use sqlx::migrate::Migrator;

use crate::error::DatabaseError;

/// Where applied migrations are recorded, beside any migrations table of the user's own.
pub(crate) const TABLE: &str = "kafold_migrations";

/// The migrations of PostgreSQL.
pub(crate) fn postgres() -> Migrator {
    own(sqlx::migrate!("./postgres"))
}

/// The migrations of SQLite.
pub(crate) fn sqlite() -> Migrator {
    own(sqlx::migrate!("./sqlite"))
}

/// Its own table, and no lock of sqlx's: callers run a set in one transaction that holds a lock, so
/// that a failure leaves neither half a set nor the lock behind.
fn own(mut migrator: Migrator) -> Migrator {
    migrator.dangerous_set_table_name(TABLE);
    migrator.set_locking(false);
    migrator
}

/// One applied migration: its version and checksum.
pub(crate) type Applied = (i64, Vec<u8>);

/// Where a database stands in its migration set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Every migration is applied.
    Current,
    /// Some are not.
    Behind {
        /// Highest applied version, 0 if none.
        found: i64,
        /// Highest known version.
        known: i64,
    },
}

/// Compares what is applied with what this program knows.
pub(crate) fn standing(
    url: &str,
    migrator: &Migrator,
    applied: &[Applied],
) -> Result<Standing, DatabaseError> {
    let newest = |versions: &mut dyn Iterator<Item = i64>| versions.max().unwrap_or(0);
    let known = newest(&mut migrator.iter().map(|migration| migration.version));
    let found = newest(&mut applied.iter().map(|(version, _)| *version));
    if found > known {
        return Err(DatabaseError::NewerSchema { url: url.to_owned(), found, known });
    }
    for (version, checksum) in applied {
        let same = |migration: &&sqlx::migrate::Migration| {
            migration.version == *version && *migration.checksum == **checksum
        };
        if !migrator.iter().any(|migration| same(&migration)) {
            return Err(DatabaseError::refused(
                format!("{url}: migration {version} in {TABLE} is not the one of this program"),
                "use the kafold version that made these tables, or another database",
            ));
        }
    }
    match migrator.iter().all(|migration| applied.iter().any(|(v, _)| *v == migration.version)) {
        true => Ok(Standing::Current),
        false => Ok(Standing::Behind { found, known }),
    }
}

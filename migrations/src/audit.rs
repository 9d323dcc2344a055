//! The hash chain of `kafold_audit`: each row carries the hash of the previous row.
//!
//! `kafold_audit_head` holds the row count, the newest id and the newest hash a second time, so a
//! removal of the newest rows is noticed too. The chain detects changes by every user without write
//! access to both tables. A user with write access to both can forge a whole new chain; only a copy
//! of the newest hash kept elsewhere detects such a forgery.

use sha2::{Digest, Sha256};
use sqlx::types::chrono::{DateTime, Utc};
use sqlx::{PgConnection, SqliteConnection};

use crate::micros::{Time, to_micros};

/// A SHA-256 hash.
pub type Hash = [u8; 32];
/// The previous hash of the first row: 32 zero bytes.
pub const NO_HASH: Hash = [0; 32];

/// Drops the triggers of `kafold_audit` on SQLite, which would refuse a prune. [`SQLITE_KEEP`]
/// creates the triggers again. Both belong in the transaction of the prune.
pub const SQLITE_LET_GO: &str = "DROP TRIGGER IF EXISTS kafold_audit_kept_insert; \
     DROP TRIGGER IF EXISTS kafold_audit_kept_update; \
     DROP TRIGGER IF EXISTS kafold_audit_kept_delete";
/// Creates the triggers which refuse every change of a row of `kafold_audit` on SQLite.
pub const SQLITE_KEEP: &str = include_str!("../sqlite/0015_kafold_audit_kept.sql");

/// Number of rows chained at a time when a database is migrated.
const PAGE_ROWS: i64 = 1_000;

/// The content of a row of `kafold_audit`.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct AuditContent {
    /// The row's number: the previous row's number plus one.
    pub id: i64,
    /// The time of the act.
    #[sqlx(try_from = "Time")]
    pub at: DateTime<Utc>,
    /// The user who acted.
    pub actor: String,
    /// The act, such as `pause`.
    pub action: String,
    /// The projection that the act changed.
    pub projection: Option<String>,
    /// Details of the act, as JSON.
    pub details: Option<String>,
}

impl AuditContent {
    /// Returns the row's hash, given the hash of the previous row.
    ///
    /// The hash is SHA-256 over the previous hash, the id and the time in microseconds since 1970
    /// (64 bits each, big-endian), and the four texts. A text is one byte 1, the length in bytes
    /// (64 bits, big-endian) and the UTF-8 bytes; NULL is one byte 0.
    pub fn hash(&self, previous: &[u8]) -> Hash {
        let mut hasher = Sha256::new();
        hasher.update(previous);
        hasher.update(self.id.to_be_bytes());
        hasher.update(to_micros(self.at).to_be_bytes());
        let (projection, details) = (self.projection.as_deref(), self.details.as_deref());
        for text in [Some(&*self.actor), Some(&*self.action), projection, details] {
            hasher.update([u8::from(text.is_some())]);
            if let Some(text) = text {
                hasher.update((text.len() as u64).to_be_bytes());
                hasher.update(text);
            }
        }
        hasher.finalize().into()
    }
}

/// Returns a hash in hexadecimal.
pub fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The end of the chain while the migration adds the existing rows to the chain.
struct Chained {
    count: i64,
    id: i64,
    hash: Hash,
}

impl Chained {
    const NOTHING: Self = Self { count: 0, id: 0, hash: NO_HASH };

    /// Chains the next row. Returns its id, previous hash and hash.
    fn add(&mut self, row: &AuditContent) -> (i64, Hash, Hash) {
        let previous = self.hash;
        self.hash = row.hash(&previous);
        self.id = row.id;
        self.count += 1;
        (row.id, previous, self.hash)
    }
}

const IS_NEW: &str =
    "SELECT EXISTS (SELECT 1 FROM kafold_audit_head WHERE row_count = 0 AND newest_id = 0)";
const PAGE: &str = "SELECT id, at, actor, action, projection, details FROM kafold_audit \
                    WHERE id > $1 AND hash IS NULL ORDER BY id LIMIT $2";
const HEAD: &str = "UPDATE kafold_audit_head SET row_count = $1, newest_id = $2, newest_hash = $3";

/// Chains the rows written before the chain existed. The migration runs this function; later calls
/// change nothing.
pub(crate) async fn chain_postgres(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    if !sqlx::query_scalar::<_, bool>(IS_NEW).fetch_one(&mut *connection).await? {
        return Ok(());
    }
    let sql = "UPDATE kafold_audit a SET previous_hash = c.previous_hash, hash = c.hash \
               FROM UNNEST($1::int8[], $2::bytea[], $3::bytea[]) AS c (id, previous_hash, hash) \
               WHERE a.id = c.id";
    let mut chained = Chained::NOTHING;
    loop {
        let page = sqlx::query_as(PAGE).bind(chained.id).bind(PAGE_ROWS);
        let page: Vec<AuditContent> = page.fetch_all(&mut *connection).await?;
        if page.is_empty() {
            break;
        }
        let (mut ids, mut previous, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
        for (id, before, hash) in page.iter().map(|row| chained.add(row)) {
            ids.push(id);
            previous.push(before.to_vec());
            hashes.push(hash.to_vec());
        }
        let query = sqlx::query(sql).bind(ids).bind(previous).bind(hashes);
        query.execute(&mut *connection).await?;
    }
    let query = sqlx::query(HEAD).bind(chained.count).bind(chained.id);
    query.bind(chained.hash.to_vec()).execute(connection).await.map(drop)
}

/// Chains the existing rows on SQLite, like [`chain_postgres`].
pub(crate) async fn chain_sqlite(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    if !sqlx::query_scalar::<_, bool>(IS_NEW).fetch_one(&mut *connection).await? {
        return Ok(());
    }
    let sql = "UPDATE kafold_audit SET previous_hash = $2, hash = $3 WHERE id = $1";
    let mut chained = Chained::NOTHING;
    loop {
        let page = sqlx::query_as(PAGE).bind(chained.id).bind(PAGE_ROWS);
        let page: Vec<AuditContent> = page.fetch_all(&mut *connection).await?;
        if page.is_empty() {
            break;
        }
        for (id, previous, hash) in page.iter().map(|row| chained.add(row)) {
            let query = sqlx::query(sql).bind(id).bind(previous.to_vec()).bind(hash.to_vec());
            query.execute(&mut *connection).await?;
        }
    }
    let query = sqlx::query(HEAD).bind(chained.count).bind(chained.id);
    query.bind(chained.hash.to_vec()).execute(connection).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> AuditContent {
        AuditContent {
            id: 7,
            at: DateTime::from_timestamp_micros(1_700_000_000_123_456).expect("a time"),
            actor: "root".into(),
            action: "pause".into(),
            projection: Some("sales".into()),
            details: None,
        }
    }

    #[test]
    fn the_hash_of_a_row_stays_as_it_is() {
        let golden = "3d81a47ac2ba8f5498d24c15b4d18dae67e988196992d79d5a44b5b445e33a85";
        assert_eq!(hex(&row().hash(&NO_HASH)), golden);
    }

    #[test]
    fn every_part_of_a_row_changes_its_hash() {
        let all = [
            row(),
            AuditContent { id: 8, ..row() },
            AuditContent { at: DateTime::UNIX_EPOCH, ..row() },
            AuditContent { actor: "rootpause".into(), action: String::new(), ..row() },
            AuditContent { action: "resume".into(), ..row() },
            AuditContent { projection: None, ..row() },
            AuditContent { projection: None, details: Some("sales".into()), ..row() },
            AuditContent { details: Some(String::new()), ..row() },
        ];
        let mut hashes: Vec<_> = all.iter().map(|row| row.hash(&NO_HASH)).collect();
        hashes.push(row().hash(&[1; 32]));
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), all.len() + 1);
    }
}

//! The toolkit's own SQL tables, and the [`Database`] handle that brings them up to date.
//!
//! One migration set for each kind of database, in `postgres/` and `sqlite/`, one table a file; what
//! has been applied stands in the table `kafold_migrations`, with sqlx's columns. Times are
//! `TIMESTAMPTZ` on PostgreSQL and whole microseconds since 1970 in UTC on SQLite (see
//! [`micros`]); ids are `UUID` there and 16 bytes here; payloads are the bytes that were written.
//!
//! - [`database`]: opening either kind of database by its URL;
//! - [`postgres`] and [`sqlite`]: pools with their limits; SQLite's one writer a file and process;
//! - [`identifier`]: names of tables and columns, and the only way here to SQL made at run time;
//! - [`rights`]: the SQL rights of each role;
//! - [`certificate`]: what a server shows to whoever asks for TLS;
//! - [`error`]: what is worth waiting for, and what is refused until somebody mends it.
//!
//! ```
//! # async fn example() -> Result<(), kafold_migrations::DatabaseError> {
//! use kafold_migrations::{Database, Mode};
//!
//! let database = Database::open("sqlite://orders.db", Mode::Migrate).await?;
//! println!("tables are up to date in {}", database.url());
//! # Ok(())
//! # }
//! ```

pub mod certificate;
pub mod database;
pub mod error;
pub mod identifier;
pub mod micros;
pub mod postgres;
pub mod rights;
mod schema;
pub mod sqlite;
mod transport;
mod url;

pub use certificate::ServerTls;
pub use database::{Database, Mode};
pub use error::{DatabaseError, Refusal, is_transient, refusal};
pub use identifier::{Identifier, InvalidIdentifier, SqlText};
pub use postgres::PostgresDatabase;
pub use rights::Role;
pub use sqlite::{SqliteDatabase, WriteTransaction, WriteTurn};
pub use sqlx;

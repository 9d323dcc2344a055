//! The toolkit's own SQL tables, and the [`Database`] handle which brings the tables up to date.
//!
//! One migration set for each kind of database, in `postgres/` and `sqlite/`, one table a file. The
//! table `kafold_migrations`, with sqlx's columns, records the applied migrations. Times are
//! `TIMESTAMPTZ` on PostgreSQL and whole microseconds since 1970 in UTC on SQLite (see [`micros`]);
//! ids are `UUID` on PostgreSQL and 16 bytes on SQLite; payloads are stored byte for byte.
//!
//! - [`database`]: opening either kind of database by its URL;
//! - [`postgres`] and [`sqlite`]: pools with their limits; SQLite's one writer a file and process;
//! - [`begin`]: transactions whose beginning may be cancelled;
//! - [`audit`]: the hash chain of `kafold_audit`;
//! - [`identifier`]: names of tables and columns, and the only module with SQL made at run time;
//! - [`rights`]: the SQL rights of each role;
//! - [`certificate`]: the TLS version and certificate of a server;
//! - [`error`]: errors worth a retry, and refusals which last until an operator acts.
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

pub mod audit;
mod begin;
pub mod certificate;
pub mod database;
pub mod error;
pub mod identifier;
pub mod micros;
pub mod postgres;
pub mod rights;
mod schema;
mod server;
pub mod sqlite;
mod transport;
mod url;

pub use begin::begin;
pub use certificate::ServerTls;
pub use database::{Database, Mode};
pub use error::{DatabaseError, Refusal, is_transient, refusal};
pub use identifier::{Identifier, InvalidIdentifier, SqlText};
pub use postgres::PostgresDatabase;
pub use rights::Role;
pub use server::POSTGRES_VERSION_MIN;
pub use sqlite::{SqliteDatabase, WriteTransaction, WriteTurn};
pub use sqlx;

//! The event store in one SQLite file: the default that needs no server.
//!
//! The log *is* the table `kafold_event`: one partition, offsets from 0 without gaps. One writer
//! task gathers the appends that arrive while the one before is being synced into one transaction,
//! so that many callers share one `fsync`; a unique stream and version, checked inside the
//! transaction, makes each append conditional. Other processes may have the file open and append to
//! it too. What is acknowledged has been synced to the disk.
//!
//! - [`store`]: [`EmbeddedStore`], the [`EventStore`](kafold_core::EventStore);
//! - [`source`]: [`EmbeddedSource`], the [`EventSource`](kafold_core::EventSource);
//! - [`config`]: the limits;
//! - `writer`: the task that turns submissions into transactions;
//! - `group`: what one transaction holds and answers, decided without IO;
//! - `guard`: detects changes of the file by other programs;
//! - `event`: the queries of the table `kafold_event`;
//! - `error`: what SQLite's errors mean to a caller.
//!
//! ```
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use kafold_core::clock::SystemClock;
//! use kafold_embedded_store::{EmbeddedConfig, EmbeddedSource, EmbeddedStore};
//! use kafold_migrations::{Database, Mode};
//!
//! let Database::Sqlite(file) = Database::open("sqlite://orders.db", Mode::Migrate).await? else {
//!     unreachable!("the URL names SQLite");
//! };
//! let clock = Arc::new(SystemClock);
//! let store = EmbeddedStore::open(file.clone(), EmbeddedConfig::default(), clock.clone()).await?;
//! let source = EmbeddedSource::open(file, clock).await?;
//! # Ok(())
//! # }
//! ```

pub mod config;
mod error;
mod event;
mod group;
mod guard;
pub mod source;
pub mod store;
mod writer;

pub use config::EmbeddedConfig;
pub use guard::{check_heads, rebuild_heads};
pub use kafold_migrations::SqliteDatabase;
pub use source::EmbeddedSource;
pub use store::EmbeddedStore;

//! Event sourcing and CQRS on Kafka: the one crate a service depends on.
//!
//! The domain model and its seams ([`kafold_core`]) stand at the root; beside them
//! [`open_log`], which opens either kind of log by its URL, [`Database`], and [`projections`], the
//! read models. Which log it is changes nothing for what is built on it.
//!
//! Features that are on by default: `embedded` (the log in one SQLite file), `kafka` (the log in
//! partitioned topics), `projections` (read models on PostgreSQL and SQLite). Those that are not:
//! `opentelemetry`, with which the spans of one request share a trace from the caller to the read
//! model, whoever exports them ([`trace`]); `otlp`, which exports them as the variables `OTEL_…` say
//! (the module `otlp`).
//!
//! ```
//! # tokio::runtime::Runtime::new().expect("runtime").block_on(async {
//! # let folder = tempfile::tempdir()?;
//! # let url = format!("sqlite://{}", folder.path().join("orders.db").display());
//! let log = kafold::open_log(&url).await?; // "sqlite://orders.db" or "kafka://localhost:9092/orders"
//! assert_eq!(log.store().health(), kafold::store::Health::Ready);
//! log.close().await;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! # }).expect("opens");
//! ```

mod error;
mod log;
#[cfg(feature = "otlp")]
pub mod otlp;
mod reader;

pub use kafold_core::*;

pub use error::OpenError;
pub use log::{Log, LogOptions, open_log, shown_url};
pub use reader::LogReader;

#[cfg(any(feature = "embedded", feature = "projections"))]
pub use kafold_migrations::{
    Database, DatabaseError, Mode, PostgresDatabase, Refusal, is_transient, refusal, rights,
};

/// The log in one SQLite file, for those who need more of it than [`open_log`] gives.
#[cfg(feature = "embedded")]
pub use kafold_embedded_store as embedded;

/// The log on Kafka, for those who need more of it than [`open_log`] gives.
#[cfg(feature = "kafka")]
pub use kafold_kafka_store as kafka;

/// Events into SQL read models.
#[cfg(feature = "projections")]
pub use kafold_projections as projections;

/// The README's code is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

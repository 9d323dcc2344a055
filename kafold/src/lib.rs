//! Event sourcing and CQRS on Kafka: the one crate a service depends on.
//!
//! [`open`] opens either kind of log by its URL, with the database of its read models, and gives all that
//! a service needs: [`handler`](Kafold::handler), [`projections`](Kafold::projections),
//! [`query`](Kafold::query), [`close`](Kafold::close). Which log it is changes nothing for what is built on
//! it. The domain model and its seams ([`kafold_core`]) stand at the root, and the parts of [`open`] beside
//! them for a program that composes its own: [`open_log`], [`Database`], [`CommandHandler`] and
//! [`projections`].
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
//! let kafold = kafold::open(&url).await?; // "sqlite://orders.db" or "kafka://localhost:9092/orders"
//! assert_eq!(kafold.health(), kafold::store::Health::Ready);
//! kafold.close().await;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! # }).expect("opens");
//! ```

#[cfg(not(any(feature = "embedded", feature = "kafka")))]
compile_error!(
    "kafold needs a kind of log: enable its feature `embedded` (SQLite), `kafka`, or both"
);

mod error;
mod log;
#[cfg(feature = "otlp")]
pub mod otlp;
mod reader;
#[cfg(feature = "projections")]
mod service;

pub use kafold_core::*;

pub use error::OpenError;
pub use log::{Log, LogOptions, open_log, shown_url};
pub use reader::LogReader;
#[cfg(feature = "projections")]
pub use service::{
    CommandPath, Kafold, OpenedLog, Opening, OpeningReader, check_database, open, open_from_env,
};

#[cfg(any(feature = "embedded", feature = "projections"))]
pub use kafold_migrations::{
    Database, DatabaseError, Mode, PostgresDatabase, Refusal, is_transient, refusal, rights,
};

/// The names of a service's domain, its read models and their tests: `use kafold::prelude::*`.
pub mod prelude {
    pub use kafold_core::scenario::scenario;
    pub use kafold_core::{Aggregate, CommandId, DomainEvent, EventSet, Recorded, Row};
    #[cfg(feature = "projections")]
    pub use {
        crate::Kafold,
        kafold_core::row::Merge,
        kafold_core::window::{Timestamp, Window},
        kafold_projections::{
            Place, ReadModel, Windowed, projection_test, session_test, stream_test,
        },
    };
}

/// The log in one SQLite file, for those who need more of it than [`open_log`] gives.
#[cfg(feature = "embedded")]
pub use kafold_embedded_store as embedded;

/// The log on Kafka, for those who need more of it than [`open_log`] gives.
#[cfg(feature = "kafka")]
pub use kafold_kafka_store as kafka;

/// Events into SQL read models.
#[cfg(feature = "projections")]
pub use kafold_projections as projections;

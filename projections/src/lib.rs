//! Events into SQL read models, on PostgreSQL and SQLite.
//!
//! A [`ReadModel`] is a row that is folded by key from the events of one aggregate; its table is made from
//! the row, and one definition runs on both databases. A [`Windowed`] model is a row of each window of event time. A
//! [`Projection`] writes its own SQL. A
//! [`ProjectionWorker`] runs them: rows and checkpoint commit in one transaction, so that after any
//! crash a read model equals the fold of the log up to its checkpoint. [`Query`] reads the rows,
//! [`Projections::wait_for`] waits until one's own write is in them. [`SqlIndex`] and
//! [`SqlSnapshots`] are the SQL behind a store that cannot read by key.
//!
//! ```no_run
//! # use kafold_core::{EventSource, Handled, Recorded};
//! # use kafold_projections::{Projections, ProjectionWorker, Query, ReadModel, WaitError};
//! # use kafold_migrations::Database;
//! # use std::sync::Arc;
//! # async fn example<SalesByDay: ReadModel>(
//! #     source: Arc<dyn EventSource>,
//! #     database: Database,
//! #     written: Handled,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let projections = ProjectionWorker::new(source, database).with::<SalesByDay>().spawn();
//! let rows = projections.query::<SalesByDay>().after(&written).all(100).await?;
//! projections.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! - [`read_model`], [`windowed`], [`projection`], [`transaction`]: what a service author writes;
//! - [`worker`], [`handle`], [`config`], [`status`], [`wait`]: running it, and how it fares;
//! - [`query`]: typed reads;
//! - [`testing`]: the tests of a read model;
//! - [`index`], [`snapshot`]: core's seams in SQL;
//! - [`control`], [`overview`], [`verify`], [`positions`]: the operators' acts and views.
//!
//! Inside: `runner` is the loop of one projection, `reader` the pump from the source to it,
//! `checkpoint`, `registry` and `table` hold the queries of one table each.

mod audit;
mod categories;
mod checkpoint;
mod clock_events;
mod clock_step;
pub mod config;
pub mod control;
mod copy;
mod definition;
mod desired;
pub mod generation;
pub mod handle;
mod handler;
pub mod index;
pub mod late_events;
mod memory;
pub mod node;
pub mod overview;
mod parked;
pub mod positions;
pub mod projection;
pub mod query;
pub mod read_model;
mod reader;
mod registry;
mod retention;
mod rows;
mod runner;
pub mod snapshot;
mod sql;
pub mod status;
mod supervisor;
mod table;
pub mod testing;
pub mod timelines;
pub mod transaction;
mod value;
pub mod verify;
mod view;
pub mod wait;
pub mod windowed;
pub mod worker;

pub use audit::AuditVerification;
pub use clock_step::EventCounts;
pub use config::{FaultPolicy, ProjectionConfig};
pub use control::{By, Control, ControlError};
pub use definition::NAME_CHARS_MAX;
pub use generation::Generation;
pub use handle::Projections;
pub use index::SqlIndex;
pub use late_events::{GraceSeconds, LateEvent, LateGroup, LateSummary};
pub use node::{NodeReport, NodeReporter};
pub use overview::{AuditEntry, Overview, OverviewState, ParkedStream};
pub use positions::{EventTable, PositionsReset, ResetProjection};
pub use projection::{HandlerError, Projection, ProjectionBatch, UnreadableEvent};
pub use query::{Freshness, Query};
pub use read_model::ReadModel;
pub use snapshot::SqlSnapshots;
/// For a hand-written [`Projection`], whose transaction is one of sqlx's connections.
pub use sqlx;
pub use status::{PartitionStatus, ProjectionState, ProjectionStatus};
pub use testing::{ProjectionTest, projection_test};
pub use timelines::ModelClock;
pub use transaction::{Transaction, WrongDatabase};
pub use verify::{CountsComparison, Verification, VerifyError, VerifyProgress};
pub use wait::WaitError;
pub use windowed::{
    InWindow, OpenOrFinal, Place, StreamTest, WindowQuery, Windowed, session_test, stream_test,
};
pub use worker::ProjectionWorker;

//! The operator's program `kafold`, and the same commands for a service to mount in its own binary,
//! where they have the domain's code: `orders admin …`.
//!
//! A service flattens [`AdminArgs`] into its own arguments and hands them to [`Admin`]:
//!
//! ```
//! # use kafold::Aggregate;
//! # use clap::Parser;
//! # use std::{fmt::Debug, process::ExitCode};
//! use kafold_cli::{Admin, AdminArgs};
//!
//! #[derive(Parser)]
//! enum Cli {
//!     /// Looks at the log and the read models of this service.
//!     Admin(AdminArgs),
//! }
//!
//! async fn run<Order: Aggregate + Debug>(cli: Cli) -> ExitCode {
//!     let Cli::Admin(args) = cli;
//!     let admin = Admin::new("orders admin").default_log("sqlite://orders.db").aggregate::<Order>();
//!     admin.run(args).await
//! }
//! ```
//!
//! Every command prints for people, or with `--json` exactly one JSON document on standard output
//! (`events tail`: one a line). What is wrong is one sentence on standard error. The exit code is 0 when
//! all is well, 1 when something failed or is not as it should be, 2 for wrong usage, 130 when
//! interrupted. A closed pipe is the reader's choice and no failure.
//!
//! - [`parse`]: the command line, with errors without secrets; [`admin`]: the commands mounted by a
//!   service; `program`: the binary, with completions and man pages;
//! - `commands`: one module for each command;
//! - `options`: the log and the database; `log`: a read-only log; `tables`: the toolkit's tables,
//!   read-only; `overview`: log and tables side by side;
//! - `domain`: the aggregates of a service, to show states;
//! - `output`, `progress`, `event`, `diff`: the printed output; `error`: errors and exit codes.

pub mod admin;
mod arguments;
mod commands;
mod diff;
mod domain;
mod error;
mod event;
mod log;
mod new;
mod options;
mod output;
mod overview;
mod predicate;
mod program;
mod progress;
mod tables;

pub use admin::{Admin, AdminArgs};
pub use arguments::parse;
pub use output::{PrintableStderr, printable};
pub use program::main;

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
//! - [`parse`]: arguments, whose errors repeat no secret; [`admin`]: what a service mounts; `program`: the binary, which adds completions and man pages;
//! - `commands`: a module a command;
//! - `options`: which log and which database are meant; `log`: a log that is only read; `tables`: the
//!   toolkit's tables, only read; `overview`: both side by side;
//! - `domain`: the aggregates of a service, to show states;
//! - `output`, `progress`, `event`, `diff`: what is printed and how; `error`: how it ends.

pub mod admin;
mod arguments;
mod commands;
mod diff;
mod domain;
mod error;
mod event;
mod log;
mod options;
mod output;
mod overview;
mod program;
mod progress;
mod tables;

pub use admin::{Admin, AdminArgs};
pub use arguments::parse;
pub use output::{PrintableStderr, printable};
pub use program::main;

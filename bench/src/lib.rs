//! kafold against careful baselines.
//!
//! A benchmark runs ours and a baseline in turn, in one process and on the same servers, and tells the
//! ratio of each pair: what else the machine does at the time falls on both. `dev/bench` runs them;
//! `docs/performance.md` has the table, what each row means, and the figures.
//!
//! - [`harness`]: pairs, their ratios, raw samples as JSON; [`svg`]: the curves;
//! - [`measure`]: closed loops for throughput, open loops for latency;
//! - [`servers`]: brokers and databases by the scripts in `dev/`; [`fill`]: logs made in bulk;
//! - [`domain`]: the one aggregate and its read models; [`zipf`]: which streams are drawn;
//! - [`ours`]: opening a log as a service does;
//! - [`baselines`]: what somebody would write by hand instead, as carefully as we can;
//! - [`rows`]: the benchmarks, a file a family.

use std::error::Error;

pub mod baselines;
pub mod domain;
pub mod fill;
pub mod harness;
pub mod measure;
pub mod ours;
pub mod proxy;
pub mod rows;
pub mod servers;
pub mod svg;
pub mod zipf;

/// Whatever ends a benchmark early.
pub type Failure = Box<dyn Error + Send + Sync>;

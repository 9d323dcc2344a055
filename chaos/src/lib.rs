//! The fault campaign of kafold, which anyone can run with one command: `dev/chaos`.
//!
//! A small service on kafold ([`domain`], [`node`]) runs as three processes on three real brokers
//! behind TCP proxies ([`proxy`]) and a PostgreSQL ([`servers`]). Clients ([`workload`]) ask it for
//! things while everything that can break is broken, drawn from a seed ([`faults`]). What they were
//! told is a history ([`history`]), which the [`checker`] holds against the final log, read by a
//! client that knows nothing of kafold ([`raw`]), and against what the read models showed
//! ([`shown`]).

pub mod campaign;
pub mod checker;
pub mod cluster;
pub mod disk;
pub mod domain;
pub mod faults;
pub mod history;
pub mod node;
pub mod proxy;
pub mod random;
pub mod raw;
pub mod recorder;
pub mod report;
pub mod servers;
pub mod shown;
pub mod workload;

/// Why a campaign could not be run to its end.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

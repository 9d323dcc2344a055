//! Tests across all crates.

mod damage;
mod layout;
mod metrics;
mod rolling;
mod service;
mod supply;

//! Tests on SQLite files.

#[macro_use]
mod common;

mod contract;
mod faults;
mod processes;

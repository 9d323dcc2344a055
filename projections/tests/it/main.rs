//! Tests on both databases.

#[macro_use]
mod common;

mod audit;
mod categories;
mod index;
mod models;
mod nodes;
mod operators;
mod outage;
mod values;
mod windows;
mod worker;

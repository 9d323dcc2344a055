//! Tests of the domain's toolkit.

mod codec;
mod fuzz;
mod handler;
mod memory;
mod row;
mod scenario;
mod ui;
mod values;

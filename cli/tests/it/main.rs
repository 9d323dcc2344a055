//! Tests of the built program.

#[macro_use]
mod support;

mod embedded;
mod positions;
mod projections;
mod servers;
mod usage;

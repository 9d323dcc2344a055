//! Tests on a real broker.

#[macro_use]
mod support;

mod contract;
mod faults;
mod integrity;
mod nodes;
mod pressure;
mod restart;
mod rights;
mod tls;
mod topics;

//! Tests of the built service.

mod support;

mod admin;
mod fuzz;
mod hostile;
mod import;
mod life;
mod nodes;
mod secrets;
mod secure;
mod spans;
mod surface;

//! The benchmarks, a file a family. Each function measures one row of the table in
//! `docs/performance.md`.

pub mod append;
pub mod bytes;
pub mod command;
pub mod embedded;
pub mod growth;
pub mod http;
pub mod memory;
pub mod read_model;
pub mod replay;
pub mod start;
pub mod visible;

use crate::Failure;
use crate::harness::Bench;

/// The rows in the order of the table, with what each measures.
pub const ROWS: &[(&str, &str)] = &[
    ("R1", "conditional append"),
    ("R2", "one command round trip, idle"),
    ("R3", "one hot stream, many callers"),
    ("R4", "exactly-once read model into PostgreSQL"),
    ("R5", "exactly-once read model into SQLite"),
    ("R6", "rebuild into PostgreSQL"),
    ("R7", "replay"),
    ("R8", "growth"),
    ("R9", "event acknowledged to row visible"),
    ("R10", "embedded store"),
    ("R11", "whole service over HTTP"),
    ("R12", "memory of a hot stream"),
    ("R13", "bytes on the wire and on disk"),
    ("R14", "start to first answered command"),
];

/// Runs one row and writes what came of it.
pub async fn run(bench: &Bench, row: &str) -> Result<(), Failure> {
    let measured = match row {
        "R1" => append::run(bench).await,
        "R2" => command::round_trip(bench).await,
        "R3" => command::hot_stream(bench).await,
        "R4" => read_model::postgres(bench).await,
        "R5" => read_model::sqlite(bench).await,
        "R6" => read_model::rebuild(bench).await,
        "R7" => replay::run(bench).await,
        "R8" => growth::run(bench).await,
        "R9" => visible::run(bench).await,
        "R10" => embedded::run(bench).await,
        "R11" => http::run(bench).await,
        "R12" => memory::run(bench).await,
        "R14" => start::run(bench).await,
        "R13" => bytes::run(bench).await,
        other => Err(format!("there is no row {other}").into()),
    };
    // What came before a failure was measured, too.
    bench.write(row)?;
    measured
}

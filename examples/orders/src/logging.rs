//! Structured logs on standard error.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `RUST_LOG` is no filter.
#[derive(Debug, thiserror::Error)]
#[error("RUST_LOG: {0}; such as info or info,orders=debug")]
pub(crate) struct InvalidFilter(tracing_subscriber::filter::ParseError);

/// Logs from now on, at `level` unless `RUST_LOG` says otherwise.
pub(crate) fn start(level: &str, format: LogFormat) -> Result<(), InvalidFilter> {
    let filter = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let filter = EnvFilter::try_new(filter.as_deref().unwrap_or(level)).map_err(InvalidFilter)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}

//! Structured logs on standard error, and spans to a collector where one is named.

use clap::ValueEnum;
#[cfg(feature = "otlp")]
use kafold::otlp::Otlp;
use kafold_cli::PrintableStderr;
use tracing::Subscriber;
use tracing_subscriber::fmt::layer;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The environment says what cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidLogging {
    #[error("RUST_LOG: {0}; such as info or info,orders=debug")]
    Filter(tracing_subscriber::filter::ParseError),
    #[cfg(feature = "otlp")]
    #[error(transparent)]
    Spans(#[from] kafold::otlp::InvalidSettings),
}

/// Logs from now on, at `level` unless `RUST_LOG` says otherwise.
pub(crate) fn start(level: &str, format: LogFormat) -> Result<(), InvalidLogging> {
    tracing_subscriber::registry().with(filter(level)?).with(lines(format)).init();
    Ok(())
}

/// The same for the service, whose spans go where the variables `OTEL_…` say.
#[cfg(feature = "otlp")]
pub(crate) fn start_with_spans(level: &str, format: LogFormat) -> Result<Spans, InvalidLogging> {
    let otlp = Otlp::from_env("orders")?;
    match &otlp {
        // What the log leaves out may be exported all the same.
        Some(otlp) => {
            let lines = lines(format).with_filter(filter(level)?);
            tracing_subscriber::registry().with(lines).with(otlp.layer()).init();
        }
        None => start(level, format)?,
    }
    Ok(Spans(otlp))
}

/// The same for the service, which says so when its spans are wanted somewhere.
#[cfg(not(feature = "otlp"))]
pub(crate) fn start_with_spans(level: &str, format: LogFormat) -> Result<Spans, InvalidLogging> {
    start(level, format)?;
    let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let names = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    if let Some(name) = names.into_iter().find(is_set) {
        tracing::warn!(
            "{name} names a collector, but this program was built without the export of spans: build \
             it with --features otlp"
        );
    }
    Ok(Spans())
}

fn filter(level: &str) -> Result<EnvFilter, InvalidLogging> {
    let filter = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    EnvFilter::try_new(filter.as_deref().unwrap_or(level)).map_err(InvalidLogging::Filter)
}

fn lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    // Without colours, because escape sequences of colours look like escape sequences in a request.
    let lines = layer().with_ansi(false).with_writer(PrintableStderr::new);
    match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// The export of spans, if there is one.
pub(crate) struct Spans(#[cfg(feature = "otlp")] Option<Otlp>);

impl Spans {
    /// Exports what has ended until now, within a bound.
    pub(crate) async fn flush(self) {
        #[cfg(feature = "otlp")]
        if let Some(otlp) = self.0 {
            otlp.shutdown().await;
        }
    }
}

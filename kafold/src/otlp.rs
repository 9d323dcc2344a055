//! Spans on their way to a collector of OpenTelemetry: OTLP, protobuf over HTTP.
//!
//! ```no_run
//! use kafold::otlp::Otlp;
//! use tracing_subscriber::prelude::*;
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let otlp = Otlp::from_env("orders")?; // nothing, unless the environment names a collector
//! tracing_subscriber::registry().with(otlp.as_ref().map(Otlp::layer)).init();
//! // … and when the service has stopped:
//! if let Some(otlp) = otlp {
//!     otlp.shutdown().await;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Whatever the collector does, no command waits for it and none fails: a span that ends goes into a
//! queue of [`QUEUE_SPANS_MAX`], which a thread of its own sends in batches, and what does not fit is
//! dropped. `kafold_spans_dropped_total` counts it by `reason`, and the log tells when the export
//! begins to fail and when it works again.
//!
//! The variables are OpenTelemetry's own. A collector is named by `OTEL_EXPORTER_OTLP_ENDPOINT` or
//! `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`; there are headers (`OTEL_EXPORTER_OTLP_HEADERS`), the timeout
//! (`OTEL_EXPORTER_OTLP_TIMEOUT`), the service (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`), the
//! sampler (`OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG`), batches (`OTEL_BSP_SCHEDULE_DELAY`,
//! `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`), and `OTEL_SDK_DISABLED` and `OTEL_TRACES_EXPORTER=none` to have
//! none of it. An endpoint of `https://` needs a TLS feature of the crate `reqwest`, such as `rustls`,
//! which the service turns on in its own `Cargo.toml`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry::{Context, Key};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter,
    SpanProcessor,
};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::dynamic_filter_fn;
use tracing_subscriber::registry::LookupSpan;

/// Spans that have ended and are not exported yet, at most; one more is dropped and counted.
pub const QUEUE_SPANS_MAX: usize = 2_048;
/// How long [`Otlp::shutdown`] may take; what is not exported then is given up.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);

/// What the exporter itself is made of is not traced, or every export would lead to another.
const NOT_TRACED: [&str; 6] =
    ["h2", "hyper", "hyper_util", "opentelemetry", "opentelemetry_sdk", "reqwest"];

/// The export of spans. Cheap to clone; clones share one queue.
#[derive(Clone)]
pub struct Otlp {
    provider: SdkTracerProvider,
}

/// The environment asks for an export that there cannot be; the message says what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("spans cannot be exported as the variables OTEL_… say: {0}")]
pub struct InvalidSettings(#[source] Box<dyn std::error::Error + Send + Sync>);

impl fmt::Debug for Otlp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Otlp")
    }
}

impl Otlp {
    /// The export that the environment asks for; `None` when it names no collector. `service` is the
    /// service's name unless the environment knows a better one.
    pub fn from_env(service: &str) -> Result<Option<Self>, InvalidSettings> {
        if !is_wanted() {
            return Ok(None);
        }
        let http = opentelemetry_otlp::SpanExporter::builder().with_http().build();
        let http = http.map_err(|error| InvalidSettings(error.into()))?;
        let queue = Queue::before(http);
        let provider = SdkTracerProvider::builder()
            .with_resource(resource(service))
            .with_span_processor(queue);
        Ok(Some(Self { provider: provider.build() }))
    }

    /// Exports the spans of level info and above, with the events in them, whatever the log shows: so a
    /// filter of the log belongs to the layer of the log, for one before all layers is for spans too.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        // Asked for every span anew, and never settled by `always`: `enabled` that is asked without a
        // span or an event to follow, as sqlx asks it, would otherwise hide the next one from filters.
        let traced = dynamic_filter_fn(|metadata, _| is_traced(metadata))
            .with_callsite_filter(|metadata| match is_traced(metadata) {
                true => Interest::sometimes(),
                false => Interest::never(),
            })
            .with_max_level_hint(LevelFilter::INFO);
        // What says where in the program a span is from costs more than it tells: names do that.
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("kafold"))
            .with_location(false)
            .with_target(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(traced)
    }

    /// Exports what has ended until now, within [`FLUSH_MAX`], and nothing from then on.
    pub async fn shutdown(self) {
        let shutdown = move || self.provider.shutdown_with_timeout(FLUSH_MAX);
        // A runtime that is ending waits for nothing either.
        if let Ok(Err(error)) = tokio::task::spawn_blocking(shutdown).await {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

fn is_traced(metadata: &Metadata<'_>) -> bool {
    let root = metadata.target().split("::").next().unwrap_or_default();
    *metadata.level() <= Level::INFO && !NOT_TRACED.contains(&root)
}

fn is_wanted() -> bool {
    let value = |name: &str| std::env::var(name).unwrap_or_default();
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    let is_disabled = value("OTEL_SDK_DISABLED").eq_ignore_ascii_case("true");
    let is_none = value("OTEL_TRACES_EXPORTER") == "none";
    endpoints.iter().any(|name| !value(name).is_empty()) && !is_disabled && !is_none
}

fn resource(service: &str) -> Resource {
    let found = Resource::builder().build();
    let name = found.get(&Key::from_static_str("service.name")).map(|name| name.to_string());
    // So OpenTelemetry calls a service that has not said its name.
    if name.is_none_or(|name| name.starts_with("unknown_service")) {
        return Resource::builder().with_service_name(service.to_owned()).build();
    }
    found
}

/// The SDK's batches behind a bound that tells what it drops.
#[derive(Debug)]
struct Queue {
    batches: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    fn before(exporter: impl SpanExporter + 'static) -> Self {
        let waiting = Arc::<AtomicUsize>::default();
        let told = Told { exporter, waiting: Arc::clone(&waiting), is_failing: false.into() };
        let config = BatchConfigBuilder::default().with_max_queue_size(QUEUE_SPANS_MAX).build();
        Self { batches: BatchSpanProcessor::new(told, config), waiting }
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= QUEUE_SPANS_MAX {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            dropped("queue_full", 1);
            return;
        }
        self.batches.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

/// An exporter whose failures are told once.
#[derive(Debug)]
struct Told<E> {
    exporter: E,
    waiting: Arc<AtomicUsize>,
    is_failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Told<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        self.waiting.fetch_sub(spans, Ordering::AcqRel);
        let was_failing = self.is_failing.swap(result.is_err(), Ordering::AcqRel);
        match &result {
            Ok(()) if was_failing => tracing::info!("spans are exported again"),
            Ok(()) => {}
            Err(error) => {
                dropped("not_exported", spans);
                if !was_failing {
                    tracing::warn!(
                        %error,
                        "spans are lost, nothing else is: look whether a collector listens where \
                         OTEL_EXPORTER_OTLP_ENDPOINT says"
                    );
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

fn dropped(reason: &'static str, spans: usize) {
    metrics::counter!("kafold_spans_dropped_total", "reason" => reason).increment(spans as u64);
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use opentelemetry::trace::Tracer;
    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    /// Tells that it was asked, and answers when it is told to.
    #[derive(Debug)]
    struct Collector {
        asked: Sender<usize>,
        answers: Mutex<Receiver<OTelSdkResult>>,
    }

    impl SpanExporter for Collector {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            // Nobody may be asking any more.
            let _ = self.asked.send(batch.len());
            self.answers.lock().expect("no panic holds it").recv().unwrap_or(Ok(()))
        }
    }

    fn provider() -> (SdkTracerProvider, Receiver<usize>, Sender<OTelSdkResult>) {
        let ((asked, was_asked), (answer, answers)) = (channel(), channel());
        let queue = Queue::before(Collector { asked, answers: Mutex::new(answers) });
        let provider = SdkTracerProvider::builder().with_span_processor(queue).build();
        (provider, was_asked, answer)
    }

    #[test]
    fn a_collector_that_does_not_answer_fills_the_queue_and_nothing_waits() {
        let (provider, was_asked, answer) = provider();
        let tracer = provider.tracer("test");
        for _ in 0..3 * QUEUE_SPANS_MAX {
            drop(tracer.start("span"));
        }
        let mut exported = was_asked.recv().expect("a first batch");
        drop(answer);
        provider.shutdown_with_timeout(FLUSH_MAX).expect("all is answered now");
        drop((tracer, provider));
        exported += was_asked.iter().sum::<usize>();
        assert!((QUEUE_SPANS_MAX..3 * QUEUE_SPANS_MAX).contains(&exported), "{exported}");
    }

    #[test]
    fn a_batch_that_failed_leaves_its_room() {
        let (provider, was_asked, answer) = provider();
        let tracer = provider.tracer("test");
        for _ in 0..3 {
            for _ in 0..QUEUE_SPANS_MAX {
                drop(tracer.start("span"));
            }
            for _ in 0..QUEUE_SPANS_MAX {
                let _ = answer.send(Err(OTelSdkError::InternalFailure("made up".into())));
            }
            drop(provider.force_flush());
        }
        drop((answer, provider.shutdown_with_timeout(FLUSH_MAX), tracer, provider));
        assert_eq!(was_asked.iter().sum::<usize>(), 3 * QUEUE_SPANS_MAX);
    }

    #[tokio::test]
    async fn a_shutdown_does_not_wait_for_a_collector_that_does_not_answer() {
        let (provider, was_asked, answer) = provider();
        drop(provider.tracer("test").start("span"));
        let otlp = Otlp { provider };
        let shutdown = otlp.shutdown();
        let within = tokio::time::timeout(5 * FLUSH_MAX, shutdown).await;
        assert!(within.is_ok() && was_asked.recv() == Ok(1), "it was asked, and given up");
        drop(answer);
    }
}

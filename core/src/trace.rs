//! W3C trace context, and how spans carry it from node to node and from an event to its readers.
//!
//! Everywhere else a span is `tracing`'s and knows of no trace: this is the only module of the domain,
//! the stores and the projections that names OpenTelemetry, behind the feature `opentelemetry`.
//! Without it, or without a layer of `tracing_opentelemetry` that activates contexts (as it does by
//! default), there is no [`current`] trace context, and [`set_parent`] and [`link`] do nothing.

use futures_util::FutureExt;
use tracing::{Instrument, Span};

use crate::store::Outcome;

/// Links of one span at most: of a larger batch the first commits are linked, and the rest is not. As
/// many as the SDKs of OpenTelemetry keep unless they are told otherwise.
pub const LINKS_MAX: usize = 128;

/// Whether the text is a `traceparent` of version 00 of W3C Trace Context, the one that there is.
pub fn is_trace_parent(text: &str) -> bool {
    let is_hex = |part: &str, length: usize| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        part.len() == length && part.bytes().all(is_digit)
    };
    let is_id = |part: &str, length| is_hex(part, length) && part.bytes().any(|byte| byte != b'0');
    let mut parts = text.split('-');
    let mut next = || parts.next().unwrap_or_default();
    let is_valid = next() == "00" && is_id(next(), 32) && is_id(next(), 16) && is_hex(next(), 2);
    is_valid && parts.next().is_none()
}

/// The trace context of the current span, as the header `traceparent`; `None` outside any trace.
pub fn current() -> Option<String> {
    #[cfg(feature = "opentelemetry")]
    return open_telemetry::current();
    #[cfg(not(feature = "opentelemetry"))]
    None
}

/// Puts a new span below a span of another process. A span that was made within another one stays
/// there, and what is no `traceparent` is left out.
pub fn set_parent(span: &Span, trace_parent: Option<&str>) {
    #[cfg(feature = "opentelemetry")]
    open_telemetry::set_parent(span, trace_parent);
    #[cfg(not(feature = "opentelemetry"))]
    let _ = (span, trace_parent);
}

/// Links a span to those that its work comes from, at most [`LINKS_MAX`] of them. Equal ones in a row,
/// as events of one command are, make one link; what is no `traceparent` is left out.
pub fn link<'a>(span: &Span, trace_parents: impl Iterator<Item = &'a str>) {
    #[cfg(feature = "opentelemetry")]
    open_telemetry::link(span, trace_parents);
    #[cfg(not(feature = "opentelemetry"))]
    let _ = (span, trace_parents);
}

/// Tells a span with the fields `error.type` and `otel.status_code` that its work failed.
pub fn failed(span: &Span, error_type: &str) {
    span.record("error.type", error_type);
    // In small letters, so that who looks for the level ERROR in a log does not find it here.
    span.record("otel.status_code", "error");
}

/// The outcome with a span around it, which learns the error or what `done` tells it.
pub fn around<T: Send + 'static>(
    span: Span,
    outcome: Outcome<T>,
    done: impl FnOnce(&Span, &T) + Send + 'static,
) -> Outcome<T> {
    // On the path of every append: what nobody records costs nothing.
    if span.is_disabled() {
        return outcome;
    }
    let told = span.clone();
    let watched = outcome.map(move |result| {
        match &result {
            Ok(value) => done(&told, value),
            Err(failure) => failed(&told, failure.name()),
        }
        result
    });
    watched.instrument(span).boxed()
}

#[cfg(feature = "opentelemetry")]
mod open_telemetry {
    use opentelemetry::Context;
    use opentelemetry::trace::{
        SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState,
    };
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    use super::{LINKS_MAX, is_trace_parent};

    pub(super) fn current() -> Option<String> {
        Context::map_current(|context| {
            let span = context.span();
            let here = span.span_context();
            here.is_valid().then(|| {
                let sampled = here.trace_flags() & TraceFlags::SAMPLED;
                format!("00-{}-{}-{sampled:02x}", here.trace_id(), here.span_id())
            })
        })
    }

    pub(super) fn set_parent(span: &Span, trace_parent: Option<&str>) {
        let is_inside = Context::map_current(|context| context.span().span_context().is_valid());
        let remote = if is_inside { None } else { trace_parent.and_then(remote) };
        if let Some(remote) = remote {
            // Nobody who listens to traces, or nobody who listens to this span.
            let _ = span.set_parent(Context::new().with_remote_span_context(remote));
        }
    }

    pub(super) fn link<'a>(span: &Span, trace_parents: impl Iterator<Item = &'a str>) {
        if span.is_disabled() {
            return;
        }
        let mut last = None;
        let distinct = trace_parents.filter(|next| last.replace(*next) != Some(*next));
        distinct.filter_map(remote).take(LINKS_MAX).for_each(|origin| span.add_link(origin));
    }

    fn remote(trace_parent: &str) -> Option<SpanContext> {
        if !is_trace_parent(trace_parent) {
            return None;
        }
        // Each part has its length and its digits.
        let trace_id = TraceId::from_hex(&trace_parent[3..35]).ok()?;
        let span_id = SpanId::from_hex(&trace_parent[36..52]).ok()?;
        let flags = u8::from_str_radix(&trace_parent[53..], 16).ok()?;
        let sampled = TraceFlags::new(flags) & TraceFlags::SAMPLED;
        Some(SpanContext::new(trace_id, span_id, sampled, true, TraceState::NONE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trace_parent_is_one() {
        assert!(is_trace_parent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for other in [
            "",
            "00-4bf92f35",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
        ] {
            assert!(!is_trace_parent(other), "{other}");
        }
    }

    #[cfg(feature = "opentelemetry")]
    mod recorded {
        use opentelemetry::trace::{SpanId, Status, TracerProvider};
        use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
        use tracing::info_span;
        use tracing_subscriber::prelude::*;

        use super::super::*;
        use crate::store::{AppendError, Outcome};

        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

        fn remote(span: u64) -> String {
            format!("00-{TRACE}-{span:016x}-01")
        }

        /// The spans that the work leaves.
        fn spans_of(work: impl FnOnce()) -> Vec<SpanData> {
            let exporter = InMemorySpanExporter::default();
            // Its end would empty the exporter.
            let provider =
                SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
            let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
            let subscriber = tracing_subscriber::registry().with(layer);
            tracing::subscriber::with_default(subscriber, work);
            exporter.get_finished_spans().expect("no panic holds it")
        }

        #[test]
        fn a_span_below_one_of_another_process_is_the_current_one() {
            let mut inside = None;
            let spans = spans_of(|| {
                assert_eq!(current(), None, "outside any span");
                let span = info_span!("below");
                set_parent(&span, Some(&remote(7)));
                inside = span.in_scope(current);
            });
            let [span] = &spans[..] else { panic!("{spans:?}") };
            assert_eq!(span.parent_span_id, SpanId::from(7));
            let id = span.span_context.span_id();
            assert_eq!(inside, Some(format!("00-{TRACE}-{id}-01")));
            assert!(is_trace_parent(&inside.expect("it is one")));
        }

        #[test]
        fn a_trace_that_is_not_sampled_stays_so() {
            let spans = spans_of(|| {
                let span = info_span!("below");
                set_parent(&span, Some(&format!("00-{TRACE}-00f067aa0ba902b7-00")));
                let inside = span.in_scope(current).expect("it has a context");
                assert!(inside.starts_with(&format!("00-{TRACE}-")) && inside.ends_with("-00"));
            });
            assert!(spans.is_empty(), "{spans:?}");
        }

        #[test]
        fn a_parent_in_this_process_comes_first_and_what_is_none_is_left_out() {
            let spans = spans_of(|| {
                info_span!("outer").in_scope(|| {
                    let inner = info_span!("inner");
                    set_parent(&inner, Some(&remote(7)));
                    inner.in_scope(|| {});
                });
                let alone = info_span!("alone");
                set_parent(&alone, Some("00-nonsense"));
                alone.in_scope(|| {});
            });
            let [inner, outer, alone] = &spans[..] else { panic!("{spans:?}") };
            assert_eq!(inner.parent_span_id, outer.span_context.span_id());
            assert_eq!(outer.parent_span_id, SpanId::INVALID);
            assert_eq!(alone.parent_span_id, SpanId::INVALID);
        }

        #[test]
        fn links_are_distinct_valid_and_bounded() {
            let commits = LINKS_MAX as u64 + 10;
            let spans = spans_of(|| {
                // Every commit has two events; what stands between is nothing.
                let events = (1..=commits).flat_map(|n| [remote(n), remote(n), "00-x".into()]);
                let events: Vec<_> = events.collect();
                let span = info_span!("reader");
                link(&span, events.iter().map(String::as_str));
                span.in_scope(|| {});
            });
            let links = spans[0].links.iter().map(|link| link.span_context.span_id());
            let expected: Vec<_> = (1..=LINKS_MAX as u64).map(SpanId::from).collect();
            assert_eq!(links.collect::<Vec<_>>(), expected);
            assert!(spans[0].links.iter().all(|link| link.span_context.is_remote()));
        }

        #[test]
        fn a_failure_is_told_to_the_span_around_it() {
            let outcome = |result| -> Outcome<u8> { async move { result }.boxed() };
            let spans = spans_of(|| {
                use tracing::field::Empty;
                let span =
                    || info_span!("work", n = Empty, error.type = Empty, otel.status_code = Empty);
                let done = |span: &Span, n: &u8| {
                    span.record("n", n);
                };
                let failure = AppendError::NotAppended { reason: "made up".into() };
                assert!(around(span(), outcome(Ok(3)), done).now_or_never().is_some());
                assert!(around(span(), outcome(Err(failure)), done).now_or_never().is_some());
            });
            let [well, badly] = &spans[..] else { panic!("{spans:?}") };
            let text = |span: &SpanData, key: &str| {
                let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
                found.map(|attribute| attribute.value.to_string())
            };
            assert_eq!((text(well, "n"), &well.status), (Some("3".into()), &Status::Unset));
            assert_eq!(text(badly, "error.type").as_deref(), Some("not_appended"));
            assert_eq!(badly.status, Status::error(""));
        }
    }
}

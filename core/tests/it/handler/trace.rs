//! What trace context the events carry that a command decides.

use std::sync::Arc;

use futures_util::StreamExt;
use kafold_core::handler::Request;
use kafold_core::{CommandHandler, EventStore, MemoryStore, StreamId, Version, trace};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
use tracing::Instrument;
use tracing_subscriber::prelude::*;

use crate::handler::domain::{Account, AccountCommand};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Deposits twice on behalf of the caller; the trace context of each event.
async fn deposited_twice() -> [Option<String>; 2] {
    let store = Arc::new(MemoryStore::default());
    let accounts = CommandHandler::<Account>::new(store.clone());
    let given = format!("00-{TRACE}-{CALLER}-01");
    let request = Request { trace_parent: Some(given), ..Request::default() };
    let deposit = AccountCommand::DepositCents(2);
    accounts.handle_with("ada", &deposit, request).await.expect("deposited");
    let stream = StreamId::new("account", "ada").expect("valid");
    let events: Vec<_> = store.read(&stream, Version::EMPTY).collect().await;
    let carried = events.into_iter().map(|event| event.expect("read").metadata.trace_parent);
    carried.collect::<Vec<_>>().try_into().expect("two events")
}

#[tokio::test]
async fn events_carry_the_command_below_its_caller() {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    let subscriber = tracing_subscriber::registry().with(layer);
    let _traced = tracing::subscriber::set_default(subscriber);

    let carried = deposited_twice().await;
    let spans = exporter.get_finished_spans().expect("no panic holds it");
    let [command] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(command.name, "command");
    assert_eq!(command.parent_span_id.to_string(), CALLER);
    let expected = format!("00-{TRACE}-{}-01", command.span_context.span_id());
    assert_eq!(carried, [Some(expected.clone()), Some(expected)]);

    exporter.reset();
    let mut outer = None;
    let within = async {
        outer = trace::current();
        deposited_twice().await
    };
    let carried = within.instrument(tracing::info_span!("outer")).await;
    let spans = exporter.get_finished_spans().expect("no panic holds it");
    let [command, outer_span] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(command.parent_span_id, outer_span.span_context.span_id());
    let (trace_id, id) = (outer_span.span_context.trace_id(), command.span_context.span_id());
    assert_eq!(carried[0], Some(format!("00-{trace_id}-{id}-01")));
}

#[tokio::test]
async fn where_nobody_traces_events_carry_what_the_caller_gave() {
    let given = Some(format!("00-{TRACE}-{CALLER}-01"));
    assert_eq!(deposited_twice().await, [given.clone(), given]);
}

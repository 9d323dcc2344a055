//! A collector of spans: OTLP over HTTP, on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;

/// Takes spans until the process ends.
pub(crate) struct Collector {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl Collector {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::<Mutex<Vec<_>>>::default();
        let received = Arc::clone(&requests);
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (connection, received) = (connection.expect("a connection"), received.clone());
                thread::spawn(move || while take(&connection, &received).is_some() {});
            }
        });
        Self { url, requests }
    }

    /// What a service is told to find it, without a proxy for the web between.
    pub(crate) fn environment(&self) -> [(&'static str, &str); 2] {
        [("OTEL_EXPORTER_OTLP_ENDPOINT", &self.url), ("NO_PROXY", "127.0.0.1")]
    }

    /// The spans of a trace.
    pub(crate) fn trace(&self, trace_id: &str) -> Vec<Span> {
        self.all().into_iter().filter(|span| hex(&span.trace_id) == trace_id).collect()
    }

    /// Those that are linked to a span.
    pub(crate) fn linked_to(&self, span: &Span) -> Vec<Span> {
        let is_linked = |other: &Span| other.links.iter().any(|link| link.span_id == span.span_id);
        self.all().into_iter().filter(is_linked).collect()
    }

    /// Who sends them.
    pub(crate) fn services(&self) -> Vec<Option<Value>> {
        let requests = self.requests.lock().expect("no panic holds it");
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        let resources = resources.filter_map(|spans| spans.resource.as_ref());
        resources.map(|resource| value(&resource.attributes, "service.name")).collect()
    }

    fn all(&self) -> Vec<Span> {
        let requests = self.requests.lock().expect("no panic holds it");
        let resources = requests.iter().flat_map(|request| request.resource_spans.clone());
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }
}

/// One request, answered; `None` when there are no more.
fn take(connection: &TcpStream, to: &Mutex<Vec<ExportTraceServiceRequest>>) -> Option<()> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
    assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
    let mut length = 0;
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).expect("a header");
        if let Some(("content-length", value)) = line.split_once(": ") {
            length = value.trim().parse().expect("a number");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    let request = ExportTraceServiceRequest::decode(&*body).expect("protobuf");
    to.lock().expect("no panic holds it").push(request);
    let mut connection = connection;
    connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok()
}

pub(crate) fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn value(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    found.value.clone()?.value
}

/// Demands a span of this name and kind below that parent, and that nothing of it failed.
pub(crate) fn child<'s>(spans: &'s [Span], parent: &str, name: &str, kind: SpanKind) -> &'s Span {
    let is_it = |span: &&Span| {
        hex(&span.parent_span_id) == parent && span.name == name && span.kind() == kind
    };
    let known = || spans.iter().map(|span| (&span.name, span.kind)).collect::<Vec<_>>();
    let found = spans.iter().find(is_it);
    let found = found.unwrap_or_else(|| panic!("no {name} below {parent} among {:?}", known()));
    assert!(found.status.as_ref().is_none_or(|status| status.code == 0), "{found:?}");
    found
}

pub(crate) fn text(span: &Span, key: &str) -> String {
    match value(&span.attributes, key) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} is {other:?} in {span:?}"),
    }
}

pub(crate) fn number(span: &Span, key: &str) -> i64 {
    match value(&span.attributes, key) {
        Some(Value::IntValue(number)) => number,
        other => panic!("{key} is {other:?} in {span:?}"),
    }
}

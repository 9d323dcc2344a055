//! Spans from a request to the read models, and what a collector cannot do to the service.

#[cfg(feature = "otlp")]
mod exported {
    use std::net::TcpListener;

    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

    use crate::support::collector::{Collector, child, hex, number, text};
    use crate::support::{Stack, free_address, on_each_log, order, timed};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const CALLER: &str = "00f067aa0ba902b7";

    on_each_log!(one_trace_leads_from_a_request_to_the_append_and_its_readers_are_linked_to_it);

    pub(super) fn one_trace_leads_from_a_request_to_the_append_and_its_readers_are_linked_to_it(
        stack: &Stack,
    ) {
        let collector = Collector::start();
        let mut service = stack.start_with(&[], &collector.environment());
        service.wait_ready();
        let trace_parent = format!("00-{TRACE}-{CALLER}-01");
        let headers = [("traceparent", trace_parent.as_str())];
        let placed = service.post_with("/orders", &headers, &order("traced", 2500));
        assert_eq!(placed.status, 201, "{placed:?}");
        let read = service.get(&format!("/orders/traced?after={}", placed.position()));
        assert_eq!(read.status, 200, "{read:?}");
        let recorded = service.get("/orders/traced/events").json()["events"][0].clone();
        // Nothing is waited for: the end of the service exports what there is.
        service.signal("TERM");
        assert!(service.ended().success(), "{}", service.log());

        assert_eq!(collector.services()[0], Some(Value::StringValue("orders".into())));
        let spans = collector.trace(TRACE);
        let request = child(&spans, CALLER, "POST /orders", SpanKind::Server);
        assert_eq!(text(request, "http.request.method"), "POST");
        assert_eq!(text(request, "http.route"), "/orders");
        assert_eq!(text(request, "url.path"), "/orders");
        assert_eq!(number(request, "http.response.status_code"), 201);
        let command = child(&spans, &hex(&request.span_id), "command", SpanKind::Internal);
        assert_eq!(text(command, "outcome"), "appended");
        let carried = format!("00-{TRACE}-{}-01", hex(&command.span_id));
        assert_eq!(recorded["traceparent"], carried, "it is the command's");

        let readers = collector.linked_to(command);
        let details = readers.iter().find(|reader| text(reader, "projection") == "order_details");
        let details = details.expect("a round of the read model");
        assert_eq!(details.kind(), SpanKind::Consumer);
        assert_eq!(number(details, "messaging.batch.message_count"), 1);
        assert_eq!(number(details, "generation"), 1);
        let below = hex(&command.span_id);
        match stack.log_name() {
            None => {
                let append = child(&spans, &below, "append", SpanKind::Internal);
                assert_eq!(text(append, "stream"), "order-traced");
                assert_eq!(details.name, "process order_details");
            }
            Some(log) => {
                let topic = format!("{log}.events");
                let send = child(&spans, &below, &format!("send {topic}"), SpanKind::Producer);
                assert_eq!(text(send, "messaging.system"), "kafka");
                assert_eq!(text(send, "messaging.operation.name"), "send");
                assert_eq!(text(send, "messaging.operation.type"), "send");
                assert_eq!(text(send, "messaging.destination.name"), topic);
                assert_eq!(text(send, "messaging.kafka.message.key"), "order-traced");
                assert_eq!(number(send, "messaging.batch.message_count"), 1);
                let position = placed.position();
                let (partition, offset) = position.split_once(':').expect("a position");
                assert_eq!(text(send, "messaging.destination.partition.id"), partition);
                assert_eq!(number(send, "messaging.kafka.offset").to_string(), offset);
                assert_eq!(details.name, format!("process {topic}"));
                // Behind the point stands the database.
                let group = text(details, "messaging.consumer.group.name");
                assert!(group.starts_with(&format!("{log}.reader.order_details.")), "{group}");
            }
        }
    }

    /// With a collector at the address, whatever it is, all is answered as ever and the end comes soon.
    fn check_disturbs_nothing(address: &str) -> String {
        let stack = Stack::embedded();
        let url = format!("http://{address}");
        let environment =
            [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("NO_PROXY", "127.0.0.1")];
        let more = [("OTEL_BSP_SCHEDULE_DELAY", "10"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")];
        let mut service = stack.start_with(&[], &[environment, more].concat());
        service.wait_ready();
        for nth in 0..100 {
            service.place(&format!("untraced-{nth}"), 1);
        }
        service.signal("TERM");
        let (status, took) = timed(|| service.ended());
        assert!(status.success(), "{status}: {}", service.log());
        assert!(took.as_secs() < 8, "{took:?}");
        service.log()
    }

    #[test]
    fn a_collector_that_is_down_disturbs_nothing_and_is_told_of_once() {
        let log = check_disturbs_nothing(&free_address());
        assert_eq!(log.matches("spans are lost").count(), 1, "{log}");
    }

    #[test]
    fn a_collector_that_does_not_answer_disturbs_nothing() {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        check_disturbs_nothing(&silent.local_addr().expect("an address").to_string());
    }
}

#[cfg(not(feature = "otlp"))]
#[test]
fn a_program_that_exports_nothing_says_so_once_when_a_collector_is_named() {
    let stack = support::Stack::embedded();
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")];
    let service = stack.start_with(&[], &environment);
    service.wait_ready();
    assert_eq!(service.log().matches("--features otlp").count(), 1, "{}", service.log());
}

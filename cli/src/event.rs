//! An event as it is printed.

use chrono::{DateTime, SecondsFormat, Utc};
use kafold::{CommandId, Position, RecordedEvent, StreamId, Version};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::output::printable_line;

/// An event in JSON.
#[derive(Serialize)]
pub(crate) struct EventJson<'e> {
    position: Position,
    stream: &'e StreamId,
    version: Version,
    #[serde(rename = "type")]
    event_type: &'e str,
    recorded_at: String,
    command_id: CommandId,
    event_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'e str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causation_id: Option<&'e str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'e str>,
    payload: Payload<'e>,
}

/// The payload as it was written; one that is not JSON is a text.
#[derive(Serialize)]
#[serde(untagged)]
enum Payload<'e> {
    AsWritten(&'e RawValue),
    Rewritten(Value),
}

impl<'e> EventJson<'e> {
    pub(crate) fn of(event: &'e RecordedEvent) -> Self {
        let metadata = &event.metadata;
        Self {
            position: event.position,
            stream: &event.stream,
            version: event.version,
            event_type: &event.event_type,
            recorded_at: time(metadata.recorded_at),
            command_id: event.command_id,
            event_id: metadata.event_id.to_string(),
            correlation_id: metadata.correlation_id.as_deref(),
            causation_id: metadata.causation_id.as_deref(),
            traceparent: metadata.trace_parent.as_deref(),
            payload: payload(&event.payload),
        }
    }
}

/// The names of the values of [`value`].
pub(crate) const NAMES: [&str; 9] = [
    "data",
    "type",
    "stream",
    "category",
    "id",
    "version",
    "recorded_at",
    "correlation_id",
    "causation_id",
];

/// Returns an event as one JSON value, for predicates. `data` is the payload.
pub(crate) fn value(event: &RecordedEvent) -> Value {
    let RecordedEvent { stream, version, event_type, metadata, payload, .. } = event;
    json!({
        "data": serde_json::from_slice::<Value>(payload).unwrap_or_default(),
        "type": **event_type,
        "stream": stream.as_str(),
        "category": stream.category(),
        "id": stream.id(),
        "version": version,
        "recorded_at": time(metadata.recorded_at),
        "correlation_id": metadata.correlation_id,
        "causation_id": metadata.causation_id,
    })
}

fn payload(bytes: &[u8]) -> Payload<'_> {
    match serde_json::from_slice::<&RawValue>(bytes) {
        // Raw JSON keeps its numbers unchanged. White space between tokens would add line breaks or
        // escapes, so such a payload is parsed and written again.
        Ok(raw) if !raw.get().contains(['\n', '\r', '\t']) => Payload::AsWritten(raw),
        Ok(raw) => Payload::Rewritten(serde_json::from_str(raw.get()).unwrap_or_default()),
        Err(_) => Payload::Rewritten(String::from_utf8_lossy(bytes).into()),
    }
}

/// An event on one line.
pub(crate) fn line(event: &RecordedEvent) -> String {
    let RecordedEvent { stream, version, position, event_type, .. } = event;
    let recorded_at = time(event.metadata.recorded_at);
    let payload = match serde_json::from_slice::<&RawValue>(&event.payload) {
        // Replaces white space between tokens.
        Ok(json) => json.get().replace(['\n', '\r', '\t'], " "),
        Err(_) => String::from_utf8_lossy(&event.payload).into_owned(),
    };
    let line = format!("{position}  {recorded_at}  {stream}  {version}  {event_type}  {payload}");
    printable_line(&line)
}

/// An event with all that is known of it, on several lines.
pub(crate) fn block(event: &RecordedEvent) -> String {
    let RecordedEvent { version, position, event_type, metadata, command_id, .. } = event;
    let recorded_at = time(metadata.recorded_at);
    let event_type = printable_line(event_type);
    let mut text = format!("version {version}  at {position}  {event_type}  {recorded_at}\n");
    let event_id = metadata.event_id.to_string();
    let command_id = command_id.to_string();
    let facts = [
        ("command", Some(&command_id)),
        ("event", Some(&event_id)),
        ("correlation", metadata.correlation_id.as_ref()),
        ("causation", metadata.causation_id.as_ref()),
        ("traceparent", metadata.trace_parent.as_ref()),
    ];
    for (name, value) in facts {
        if let Some(value) = value {
            text += &format!("  {name:<12}{}\n", printable_line(value));
        }
    }
    for line in pretty(&event.payload).lines() {
        text += &format!("  {line}\n");
    }
    text
}

fn pretty(payload: &[u8]) -> String {
    match serde_json::from_slice::<&RawValue>(payload) {
        Ok(json) => indented(json.get()),
        Err(_) => String::from_utf8_lossy(payload).into_owned(),
    }
}

/// JSON on many lines; names keep their order and numbers all their digits, as no parsed value does.
fn indented(json: &str) -> String {
    let (mut text, mut depth, mut in_string, mut escaped) = (String::new(), 0, false, false);
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("  ", depth));
    };
    let mut rest = json.chars().peekable();
    while let Some(c) = rest.next() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = c == '\\' && !escaped;
            text.push(c);
            continue;
        }
        match c {
            '{' | '[' => {
                while rest.next_if(|c| c.is_ascii_whitespace()).is_some() {}
                text.push(c);
                match rest.next_if(|c| matches!(c, '}' | ']')) {
                    Some(end) => text.push(end),
                    None => {
                        depth += 1;
                        line(&mut text, depth);
                    }
                }
            }
            '}' | ']' => {
                depth -= 1;
                line(&mut text, depth);
                text.push(c);
            }
            ',' => {
                text.push(c);
                line(&mut text, depth);
            }
            ':' => text.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => {
                in_string = c == '"';
                text.push(c);
            }
        }
    }
    text
}

/// RFC 3339 in UTC, to the microsecond.
pub(crate) fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_indented_and_keeps_order_and_digits() {
        let json = r#"{"z" :1.00,"a":[ ],"b":{"s":"a\\\",: {"},"l":[1 , {}]}"#;
        let expected = "{\n  \"z\": 1.00,\n  \"a\": [],\n  \"b\": {\n    \"s\": \"a\\\\\\\",: {\"\n  },\n  \"l\": [\n    1,\n    {}\n  ]\n}";
        assert_eq!(indented(json), expected);
        assert_eq!(pretty(b"no json"), "no json");
    }
}

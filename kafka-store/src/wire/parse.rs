//! From bytes to records: what is refused here, every reader must refuse.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use kafold_core::{Metadata, Offset, Partition, Position, RecordedEvent, Version};
use uuid::Uuid;

use super::{
    Body, CONTROL_KEY, Claim, Content, EventBody, HEADER_NAME, Header, KIND_CLAIM, KIND_EVENT,
    LogRecord, Malformed, Record, SPEC_VERSION,
};

/// Reads a record of the events topic. Never fails: what is wrong with it is its content.
///
/// An absent value counts as one of length 0, for clients show the two alike.
pub fn parse<'a>(
    partition: Partition,
    offset: Offset,
    key: Option<&'a [u8]>,
    headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>,
    value: Option<&'a [u8]>,
) -> LogRecord {
    let position = Position { partition, offset };
    let content = match Headers::collect(headers) {
        Ok(Headers { kf: None, .. }) => Content::Foreign,
        Ok(headers) => match parse_ours(position, key, &headers, value.unwrap_or_default()) {
            Ok(record) => Content::Ours(record),
            Err(malformed) => Content::Malformed(malformed),
        },
        Err(malformed) => Content::Malformed(malformed),
    };
    LogRecord { offset, content }
}

fn parse_ours(
    position: Position,
    key: Option<&[u8]>,
    headers: &Headers<'_>,
    value: &[u8],
) -> Result<Record, Malformed> {
    let header = Header::decode(headers.kf.unwrap_or_default())?;
    header.check()?;
    headers.check_cloud_event()?;
    let key = key.ok_or_else(|| Malformed::Key("absent".into()))?;
    let key = std::str::from_utf8(key).map_err(|_| Malformed::Key(shorten(key)))?;
    let body = match header.kind {
        KIND_EVENT => Body::Event(parse_event(position, &header, key, headers, value)?),
        kind => {
            if key != CONTROL_KEY {
                return Err(Malformed::Key(shorten(key.as_bytes())));
            }
            if kind == KIND_CLAIM { Body::Claim(parse_claim(value)?) } else { barrier(value)? }
        }
    };
    Ok(Record { stamp: header.stamp, body })
}

fn parse_event(
    position: Position,
    header: &Header,
    key: &str,
    headers: &Headers<'_>,
    value: &[u8],
) -> Result<EventBody, Malformed> {
    let event = RecordedEvent {
        stream: key.parse()?,
        version: Version(header.version),
        position,
        command_id: header.command_id,
        event_type: text("ce_type", headers.ce_type)?.unwrap_or_default().into(),
        payload: value.into(),
        metadata: headers.metadata()?,
    };
    Ok(EventBody { index: header.index, count: header.count, event: Arc::new(event) })
}

fn parse_claim(value: &[u8]) -> Result<Claim, Malformed> {
    let refuse = |reason: String| Malformed::Value { kind: "claim", reason };
    let claim: Claim = serde_json::from_slice(value).map_err(|error| refuse(error.to_string()))?;
    if claim.partitions == 0 {
        return Err(refuse("it counts 0 partitions".into()));
    }
    Ok(claim)
}

fn barrier(value: &[u8]) -> Result<Body, Malformed> {
    if !value.is_empty() {
        let reason = format!("it has {} bytes instead of 0", value.len());
        return Err(Malformed::Value { kind: "barrier", reason });
    }
    Ok(Body::Barrier)
}

/// The headers that are read, each found in one pass. Others are not ours and pass unread.
#[derive(Default)]
struct Headers<'a> {
    kf: Option<&'a [u8]>,
    specversion: Option<&'a [u8]>,
    ce_id: Option<&'a [u8]>,
    source: Option<&'a [u8]>,
    ce_type: Option<&'a [u8]>,
    time: Option<&'a [u8]>,
    correlation_id: Option<&'a [u8]>,
    causation_id: Option<&'a [u8]>,
    trace_parent: Option<&'a [u8]>,
}

impl<'a> Headers<'a> {
    fn collect(
        headers: impl IntoIterator<Item = (&'a str, Option<&'a [u8]>)>,
    ) -> Result<Self, Malformed> {
        let mut found = Self::default();
        let mut twice = None;
        for (name, value) in headers {
            let (slot, name) = match name {
                HEADER_NAME => (&mut found.kf, HEADER_NAME),
                "ce_specversion" => (&mut found.specversion, "ce_specversion"),
                "ce_id" => (&mut found.ce_id, "ce_id"),
                "ce_source" => (&mut found.source, "ce_source"),
                "ce_type" => (&mut found.ce_type, "ce_type"),
                "ce_time" => (&mut found.time, "ce_time"),
                "ce_correlationid" => (&mut found.correlation_id, "ce_correlationid"),
                "ce_causationid" => (&mut found.causation_id, "ce_causationid"),
                "traceparent" => (&mut found.trace_parent, "traceparent"),
                _ => continue,
            };
            if slot.replace(value.unwrap_or_default()).is_some() {
                twice = Some(name);
            }
        }
        match twice {
            // Somebody else's record may repeat what it likes.
            Some(name) if found.kf.is_some() => Err(Malformed::HeaderTwice(name)),
            _ => Ok(found),
        }
    }

    fn check_cloud_event(&self) -> Result<(), Malformed> {
        let required = [
            ("ce_specversion", self.specversion),
            ("ce_id", self.ce_id),
            ("ce_source", self.source),
            ("ce_type", self.ce_type),
            ("ce_time", self.time),
        ];
        for (name, value) in required {
            match value {
                None => return Err(Malformed::HeaderAbsent(name)),
                Some([]) => return Err(Malformed::HeaderValue { name, value: String::new() }),
                Some(_) => {}
            }
        }
        match self.specversion {
            Some(version) if version != SPEC_VERSION.as_bytes() => {
                Err(Malformed::HeaderValue { name: "ce_specversion", value: shorten(version) })
            }
            _ => Ok(()),
        }
    }

    fn metadata(&self) -> Result<Metadata, Malformed> {
        let invalid = |name, value: &[u8]| Malformed::HeaderValue { name, value: shorten(value) };
        let id = self.ce_id.unwrap_or_default();
        let time = self.time.unwrap_or_default();
        Ok(Metadata {
            event_id: Uuid::try_parse_ascii(id).map_err(|_| invalid("ce_id", id))?,
            recorded_at: parse_time(time).ok_or_else(|| invalid("ce_time", time))?,
            correlation_id: text("ce_correlationid", self.correlation_id)?.map(str::to_owned),
            causation_id: text("ce_causationid", self.causation_id)?.map(str::to_owned),
            trace_parent: text("traceparent", self.trace_parent)?.map(str::to_owned),
        })
    }
}

fn text<'a>(name: &'static str, value: Option<&'a [u8]>) -> Result<Option<&'a str>, Malformed> {
    let Some(value) = value else { return Ok(None) };
    match std::str::from_utf8(value) {
        Ok(text) => Ok(Some(text)),
        Err(_) => Err(Malformed::HeaderValue { name, value: shorten(value) }),
    }
}

fn parse_time(text: &[u8]) -> Option<DateTime<Utc>> {
    let text = std::str::from_utf8(text).ok()?;
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.with_timezone(&Utc))
}

/// At most 60 characters of it, for messages.
fn shorten(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(60).collect()
}

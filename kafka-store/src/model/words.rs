//! Steps and records in words, for the histories that break a promise.

use std::fmt;

use super::action::Action;
use crate::wire::{Body, Record};
use crate::writer::Output;

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Submit { at, demand, events, command: None } => {
                write!(f, "writer {at} is given a commit of {events}, expecting {demand:?}")
            }
            Self::Submit { at, demand, events, command: Some(command) } => {
                write!(f, "writer {at} is given command {command} again: {events}, {demand:?}")
            }
            Self::Confirm { at, demand } => write!(f, "writer {at} is to confirm {demand:?}"),
            Self::Deliver { at, how } => write!(f, "writer {at}'s next record goes: {how:?}"),
            Self::Arrive { .. } => f.write_str("a late record arrives"),
            Self::Report { at } => write!(f, "writer {at} is told a report"),
            Self::Read { at, all: true } => write!(f, "writer {at} reads to the end"),
            Self::Read { at, all: false } => write!(f, "writer {at} reads one record"),
            Self::Wait { at } => write!(f, "writer {at} has waited for a report in vain"),
            Self::Crash { at } => write!(f, "writer {at} crashes"),
        }
    }
}

pub(super) fn record_in_words(record: &Record) -> String {
    let (epoch, nonce, seq) =
        (record.stamp.claim.epoch.0, record.stamp.claim.nonce.0, record.stamp.seq);
    match &record.body {
        Body::Claim(_) => format!("claim {epoch}/{nonce}"),
        Body::Barrier => format!("barrier {epoch}/{nonce}/{seq}"),
        Body::Event(body) => format!(
            "event {epoch}/{nonce}/{seq}, {} of {}, version {}",
            body.index + 1,
            body.count,
            body.event.version
        ),
    }
}

pub(super) fn words(output: &Output) -> String {
    match output {
        Output::Produce(record) => format!("produces {}", record_in_words(record)),
        Output::Proven(proven) => {
            format!("knows {} more events, all below {}", proven.events.len(), proven.next.next)
        }
        Output::Appended { request, result } => format!("answers {request:?}: {result:?}"),
        other => format!("{other:?}"),
    }
}

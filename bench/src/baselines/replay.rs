//! A replay by a consumer that trusts the log: it reads of each record what an event has, and folds it.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold::{Aggregate, codec};
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Headers};
use uuid::Uuid;

use crate::Failure;
use crate::baselines::consumer::{From, consumer, each};
use crate::domain::{Account, AccountEvent};
use crate::measure::now;

/// Where the version is in the header of kafold's fold.
const KF_VERSION: Range<usize> = 22..30;

/// What is kept of a stream.
#[derive(Default)]
struct State {
    account: Account,
    version: u64,
    last: Option<(Uuid, DateTime<Utc>)>,
}

/// What is read of a record.
pub struct Recorded {
    /// What happened.
    pub event: AccountEvent,
    /// Of the stream behind it.
    pub version: u64,
    /// The event's.
    pub id: Uuid,
    recorded_at: DateTime<Utc>,
}

/// Folds the first `events` events of a log into the states of so many streams and answers how long that
/// took.
pub async fn by_hand(
    brokers: &str,
    log: &str,
    events: u64,
    streams: u64,
) -> Result<Duration, Failure> {
    let (brokers, topic) = (brokers.to_owned(), format!("{log}.events"));
    let replaying = move || {
        let began = now();
        let consumer = consumer(&brokers, &topic, From::Beginning)?;
        let (mut states, mut seen) = (HashMap::<String, State>::new(), 0);
        each(&consumer, |message| {
            let Some((id, event)) = recorded(message)? else {
                return Ok(ControlFlow::Continue(()));
            };
            let state = match states.get_mut(id) {
                Some(state) => state,
                None => states.entry(id.to_owned()).or_default(),
            };
            state.account.evolve(&event.event);
            (state.version, state.last) = (event.version, Some((event.id, event.recorded_at)));
            seen += 1;
            Ok(if seen == events { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let took = now() - began;
        let versions: u64 = states.values().map(|state| state.version).sum();
        if (versions, states.len() as u64) != (events, streams) {
            return Err(format!("{versions} of {events} events were folded").into());
        }
        Ok(took)
    };
    tokio::task::spawn_blocking(replaying).await?
}

/// The stream's id and the event; `None` of a claim.
pub fn recorded<'m>(
    message: &'m BorrowedMessage<'_>,
) -> Result<Option<(&'m str, Recorded)>, Failure> {
    let Some(Ok(key)) = message.key_view::<str>() else { return Err("a key is no text".into()) };
    let Some(id) = key.strip_prefix("account-") else { return Ok(None) };
    let (mut version, mut event_id, mut recorded_at, mut event_type) = (None, None, None, None);
    for header in message.headers().ok_or("a record has no headers")?.iter() {
        let value = header.value.unwrap_or_default();
        let text = || std::str::from_utf8(value);
        match header.key {
            "kf" => version = value.get(KF_VERSION).map(u64_of).transpose()?,
            "ce_id" => event_id = Some(text()?.parse()?),
            "ce_time" => recorded_at = Some(DateTime::parse_from_rfc3339(text()?)?.to_utc()),
            "ce_type" => event_type = Some(text()?),
            _ => {}
        }
    }
    let event = codec::decode(event_type.ok_or("no type")?, message.payload().unwrap_or_default())?;
    let version = version.ok_or("no version")?;
    let (event_id, recorded_at) = (event_id.ok_or("no id")?, recorded_at.ok_or("no time")?);
    Ok(Some((id, Recorded { event, version, id: event_id, recorded_at })))
}

fn u64_of(bytes: &[u8]) -> Result<u64, Failure> {
    Ok(u64::from_be_bytes(bytes.try_into()?))
}

//! R7: everything in the log decoded and folded into states, against a consumer that counts bytes.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};

use chrono::{DateTime, Utc};
use kafold::store::SourceMessage;
use kafold::{Aggregate, EventSource, StreamId, codec};
use rdkafka::Message;
use rdkafka::message::{BorrowedMessage, Headers};
use uuid::Uuid;

use crate::Failure;
use crate::baselines::consumer::{From, consumer, each};
use crate::domain::{Account, AccountEvent};
use crate::fill::Fill;
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{now, per_second};
use crate::ours::{log_url, source};
use crate::servers::remove_log;

const PAYLOAD_BYTES: usize = 256;
const GOAL: f64 = 0.6;
const BATCH_EVENTS_MAX: usize = 5_000;
/// Where the version is in the header of kafold's fold.
const KF_VERSION: Range<usize> = 22..30;

/// A whole log.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let (events, streams) = bench.size.of((20_000, 2_000), (300_000, 50_000), (5_000_000, 500_000));
    let brokers = bench.servers.broker().await?.to_owned();
    let name = bench.servers.new_name();
    let (brokers, name) = (brokers.as_str(), name.as_str());
    Fill { brokers, name, events, streams, payload_bytes: PAYLOAD_BYTES }.make(None).await?;
    let figures = [("per_s", Goal::AtLeast(GOAL))];
    let ours = async || replayed(brokers, name, events, streams).await;
    let baseline = async || counted(brokers, name, events).await;
    let case = format!("{events} events of {streams} streams");
    bench.compare("R7", case, &figures, ours, &baseline).await?;
    if bench.size > Size::Test {
        let by_hand = async || replayed_by_hand(brokers, name, events, streams).await;
        let case = "without kafold: headers, JSON and a map of states by hand";
        bench.compare("R7", case, &[("per_s", Goal::Stated)], by_hand, baseline).await?;
    }
    remove_log(brokers, name).await
}

async fn replayed(brokers: &str, name: &str, events: u64, streams: u64) -> Result<Sample, Failure> {
    let source = source(&log_url(brokers, name)).await?;
    let began = now();
    let mut subscription = source.subscribe("replay", BATCH_EVENTS_MAX).await?;
    let mut states: HashMap<StreamId, Account> = HashMap::new();
    let mut seen = 0;
    while seen < events {
        match subscription.next().await? {
            SourceMessage::Assigned(partitions) => {
                for partition in partitions {
                    subscription.start(partition, None).await?;
                }
            }
            SourceMessage::Batch(batch) => {
                seen += batch.events.len() as u64;
                for event in &batch.events {
                    let recorded = codec::decode_recorded::<AccountEvent>(event)?;
                    states.entry(recorded.stream).or_default().evolve(&recorded.event);
                }
            }
            SourceMessage::Revoked(_) => return Err("a partition was taken away".into()),
        }
    }
    let took = now() - began;
    let deposits: u64 = states.values().map(|account| account.deposits).sum();
    if (seen, deposits, states.len() as u64) != (events, events, streams) {
        return Err(format!("{deposits} of {events} events were folded").into());
    }
    Ok(Sample::from([("per_s", per_second(events, took))]))
}

/// The same by a consumer that trusts the log: it reads of each record what an event has, and folds it.
async fn replayed_by_hand(
    brokers: &str,
    name: &str,
    events: u64,
    streams: u64,
) -> Result<Sample, Failure> {
    let (brokers, topic) = (brokers.to_owned(), format!("{name}.events"));
    let replaying = move || {
        let began = now();
        let consumer = consumer(&brokers, &topic, From::Beginning)?;
        let (mut states, mut seen) = (HashMap::<String, ByHand>::new(), 0);
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
        Ok(Sample::from([("per_s", per_second(events, took))]))
    };
    tokio::task::spawn_blocking(replaying).await?
}

/// What a replay by hand keeps of a stream.
#[derive(Default)]
struct ByHand {
    account: Account,
    version: u64,
    last: Option<(Uuid, DateTime<Utc>)>,
}

/// What a replay by hand reads of a record.
pub(crate) struct Recorded {
    pub(crate) event: AccountEvent,
    pub(crate) version: u64,
    pub(crate) id: Uuid,
    recorded_at: DateTime<Utc>,
}

/// The stream's id and the event; `None` of a claim.
pub(crate) fn recorded<'m>(
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
    let (id_of, recorded_at) = (event_id.ok_or("no id")?, recorded_at.ok_or("no time")?);
    Ok(Some((id, Recorded { event, version, id: id_of, recorded_at })))
}

fn u64_of(bytes: &[u8]) -> Result<u64, Failure> {
    Ok(u64::from_be_bytes(bytes.try_into()?))
}

/// So many events by a raw consumer.
pub(crate) async fn counted(brokers: &str, name: &str, events: u64) -> Result<Sample, Failure> {
    let (brokers, topic) = (brokers.to_owned(), format!("{name}.events"));
    let counting = move || {
        let began = now();
        let consumer = consumer(&brokers, &topic, From::Beginning)?;
        let (mut seen, mut bytes) = (0, 0);
        each(&consumer, |message| {
            let payload = message.payload_len();
            bytes += payload as u64;
            // Claims have values of other lengths.
            seen += u64::from(payload == PAYLOAD_BYTES);
            Ok(if seen == events { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let took = now() - began;
        if bytes < events * PAYLOAD_BYTES as u64 {
            return Err(Failure::from("the baseline lost bytes"));
        }
        Ok(Sample::from([("per_s", per_second(events, took))]))
    };
    tokio::task::spawn_blocking(counting).await?
}

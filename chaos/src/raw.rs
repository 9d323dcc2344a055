//! Reads the log as any consumer does, and the bytes of the header by hand.

use std::time::Duration;

use kafold::Clock;
use kafold::clock::SystemClock;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use uuid::Uuid;

use crate::Failure;
use crate::history::{Header, Place, RecordLine};

const HEADER_BYTES: usize = 58;
/// How long the whole log may take to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(500);

/// Every record of every partition, each partition in its order. Blocks.
pub fn read(brokers: &str, topic: &str, partitions: u32) -> Result<Vec<RecordLine>, Failure> {
    let mut records = Vec::new();
    for partition in 0..partitions {
        read_partition(brokers, topic, partition, &mut records)?;
    }
    Ok(records)
}

fn read_partition(
    brokers: &str,
    topic: &str,
    partition: u32,
    records: &mut Vec<RecordLine>,
) -> Result<(), Failure> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "chaos-raw")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_uncommitted")
        .set("check.crcs", "true")
        .create()?;
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, i32::try_from(partition)?, Offset::Beginning)?;
    consumer.assign(&list)?;
    let begun = SystemClock.instant();
    loop {
        match consumer.poll(POLL) {
            Some(Ok(message)) => records.push(record(&message, partition)?),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(()),
            Some(Err(_)) | None if SystemClock.instant() - begun < READ_TIMEOUT => {}
            Some(Err(error)) => return Err(error.into()),
            None => return Err(format!("partition {partition} cannot be read to its end").into()),
        }
    }
}

fn record(message: &BorrowedMessage<'_>, partition: u32) -> Result<RecordLine, Failure> {
    let headers = message.headers();
    let named = |name| headers?.iter().find(|header| header.key == name)?.value;
    let kf = named("kf").map(header).transpose()?;
    let is_event = kf.is_some_and(|kf| kf.kind == 2);
    let value = match message.payload() {
        Some(payload) if is_event => serde_json::from_slice(payload)?,
        _ => serde_json::Value::Null,
    };
    let key = message.key().filter(|_| is_event).unwrap_or_default();
    let event_type = named("ce_type").filter(|_| is_event).unwrap_or_default();
    Ok(RecordLine {
        at: Place { partition, offset: u64::try_from(message.offset())? },
        kf,
        key: String::from_utf8(key.to_vec())?,
        event_type: String::from_utf8(event_type.to_vec())?,
        value,
    })
}

/// Format u8, kind u8, epoch u32, nonce u64, seq u64, version u64, index u16, count u16, command id 16
/// bytes, commands mark u64, big-endian.
fn header(bytes: &[u8]) -> Result<Header, Failure> {
    let bytes: &[u8; HEADER_BYTES] = bytes.try_into()?;
    let number = |from: usize, bytes_long: usize| {
        bytes[from..from + bytes_long].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    if bytes[0] != 1 {
        return Err(format!("a record of format {}", bytes[0]).into());
    }
    Ok(Header {
        kind: bytes[1],
        epoch: u32::try_from(number(2, 4))?,
        nonce: number(6, 8),
        seq: number(14, 8),
        version: number(22, 8),
        index: u16::try_from(number(30, 2))?,
        count: u16::try_from(number(32, 2))?,
        command: Uuid::from_slice(&bytes[34..50])?,
        mark: number(50, 8),
    })
}

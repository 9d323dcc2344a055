//! A raw consumer of the events topic, with the settings of our readers.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::BorrowedMessage;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::Failure;
use crate::measure::now;
use crate::servers::{PARTITIONS, client};

/// How long nothing may come before that is a failure.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How long a broker may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// When the record at a partition and an offset was there.
pub type Moments = HashMap<(i32, i64), Instant>;

/// Where a consumer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// With the first record.
    Beginning,
    /// Behind the last record that is there when the consumer is made.
    End,
}

/// A consumer of all partitions of a topic.
pub fn consumer(brokers: &str, topic: &str, from: From) -> Result<BaseConsumer, Failure> {
    let mut settings = client(brokers)?;
    settings
        .set("client.id", "baseline")
        .set("group.id", "baseline")
        .set("socket.nagle.disable", "true")
        .set("isolation.level", "read_uncommitted")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("check.crcs", "true")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "100")
        .set("fetch.min.bytes", "1")
        .set("queued.max.messages.kbytes", "16384");
    let consumer: BaseConsumer = settings.create()?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS as i32 {
        let from = match from {
            From::Beginning => Offset::Beginning,
            // Found out now: records of the next moment are not to be missed.
            From::End => Offset::Offset(consumer.fetch_watermarks(topic, partition, ANSWER_MAX)?.1),
        };
        partitions.add_partition_offset(topic, partition, from)?;
    }
    consumer.assign(&partitions)?;
    Ok(consumer)
}

/// Gives each record until it is told to stop. Blocks.
pub fn each(
    consumer: &BaseConsumer,
    mut take: impl FnMut(&BorrowedMessage<'_>) -> Result<ControlFlow<()>, Failure>,
) -> Result<(), Failure> {
    let mut heard = now();
    loop {
        match consumer.poll(Duration::from_millis(100)) {
            Some(message) => {
                if take(&message?)?.is_break() {
                    return Ok(());
                }
                heard = now();
            }
            None if now() - heard > SILENCE_MAX => return Err("the topic is silent".into()),
            None => {}
        }
    }
}

//! What a topic is judged by: settings that lose or misplace events, each with why and what to do.

use rdkafka::admin::ConfigResource;

use crate::client::TopicShape;
use crate::config::KafkaConfig;
use crate::error::Finding;
use crate::operate::SettingReport;

/// Copies from which one broker may be lost without losing or blocking anything.
pub(crate) const REPLICAS_SAFE: usize = 3;
/// In-sync replicas that must have a record before it is acknowledged, at [`REPLICAS_SAFE`].
const IN_SYNC_SAFE: u64 = 2;
/// A retention that never ends.
pub(crate) const FOR_EVER: &str = "-1";

/// Settings of an existing topic that `allow_unsafe` can accept.
pub(crate) const UNSAFE_SETTINGS: [&str; 6] = [
    "retention.ms",
    "retention.bytes",
    "cleanup.policy",
    "min.insync.replicas",
    "unclean.leader.election.enable",
    "message.timestamp.type",
];

/// The setting for the bytes of the largest record, everything included.
const RECORD_BYTES_MAX: &str = "max.message.bytes";
/// The least `max.message.bytes` with which a log can be written. A claim has some 500 bytes.
const RECORD_BYTES_LEAST: usize = 1_000;
/// Kafka's default of `max.message.bytes`, for a broker that does not return the setting.
pub(crate) const RECORD_BYTES_DEFAULT: usize = 1_048_588;

/// The name by which `allow_unsafe` accepts partitions that were added to a topic.
pub(crate) const ADDED_PARTITIONS: &str = "partitions";

/// Everything that is wrong with an existing events topic and not accepted.
pub(crate) fn findings(
    config: &KafkaConfig,
    topic: &str,
    shape: TopicShape,
    settings: &Settings<'_>,
) -> Vec<Finding> {
    let reports = judge_events(config, topic, shape, settings).into_iter();
    let unaccepted = reports.filter_map(|report| match report.is_accepted {
        true => {
            let setting = report.setting;
            tracing::warn!(topic, setting, "unsafe: accepted by allow_unsafe");
            None
        }
        false => report.finding,
    });
    unaccepted.collect()
}

/// What an existing events topic is judged by.
pub(crate) fn judge_events(
    config: &KafkaConfig,
    topic: &str,
    shape: TopicShape,
    settings: &Settings<'_>,
) -> Vec<SettingReport> {
    let wanted = config.partitions.filter(|wanted| *wanted != shape.partitions);
    let is_accepted = wanted.is_some_and(|wanted| wanted < shape.partitions)
        && config.allow_unsafe.contains(ADDED_PARTITIONS);
    let partitions = SettingReport {
        setting: "partitions".into(),
        value: shape.partitions.to_string(),
        finding: wanted.map(|wanted| match is_accepted {
            true => added_partitions(shape.partitions, wanted),
            false => partition_count(shape.partitions, wanted),
        }),
        is_accepted,
    };
    let others = UNSAFE_SETTINGS.iter().map(|setting| {
        let value = settings.get(setting);
        let shown = value.unwrap_or("(unreadable)").to_owned();
        let finding = judge(setting, value, shape.replicas).map(|(why, safe)| {
            let brokers = &config.brokers;
            let remedy = format!(
                "run kafka-configs.sh --bootstrap-server {brokers} --alter --entity-type topics \
                 --entity-name {topic} --add-config {setting}={safe}, or accept it with \
                 ?allow_unsafe={setting}"
            );
            Finding { setting: (*setting).into(), value: shown.clone(), why, remedy }
        });
        let is_accepted = finding.is_some() && config.allow_unsafe.contains(*setting);
        SettingReport { setting: (*setting).into(), value: shown, finding, is_accepted }
    });
    std::iter::once(partitions).chain(others).collect()
}

/// The finding that partitions were added to a topic, which the URL accepts.
fn added_partitions(found: u32, used: u32) -> Finding {
    Finding {
        setting: "partitions".into(),
        value: found.to_string(),
        why: format!(
            "the log uses the first {used}: the added partitions stay unused, since streams are found by \
             the number of partitions"
        ),
        remedy: format!("keep ?partitions={used}&allow_unsafe=partitions in each URL of the log"),
    }
}

/// Warns of a topic that takes smaller records than Kafka's default.
pub(crate) fn judge_record_limit(settings: &Settings<'_>) -> SettingReport {
    let limit = record_bytes_max(settings);
    let is_accepted = limit >= RECORD_BYTES_LEAST;
    let finding = (limit < RECORD_BYTES_DEFAULT).then(|| Finding {
        setting: RECORD_BYTES_MAX.into(),
        value: limit.to_string(),
        why: match is_accepted {
            true => "an event with more bytes is refused as too large".into(),
            false => "nodes cannot even claim a partition with records of this size".into(),
        },
        remedy: format!(
            "raise it to Kafka's default of {RECORD_BYTES_DEFAULT} or more, unless it is meant: \
             running services take it over"
        ),
    });
    let value = limit.to_string();
    SettingReport { setting: RECORD_BYTES_MAX.into(), value, finding, is_accepted }
}

/// Warns of a topic beside the events that takes smaller records than Kafka's default.
pub(crate) fn judge_record_limit_beside(settings: &Settings<'_>) -> SettingReport {
    let report = judge_record_limit(settings);
    let finding = report.finding.map(|finding| Finding {
        why: "a forwarded command or its reply with more bytes does not reach the node that owns the stream"
            .into(),
        ..finding
    });
    SettingReport { finding, is_accepted: true, ..report }
}

/// The finding that a log has another number of partitions than the URL says.
fn partition_count(found: u32, wanted: u32) -> Finding {
    Finding {
        setting: "partitions".into(),
        value: found.to_string(),
        why: format!(
            "?partitions= says {wanted}, and streams are found by the number of partitions: their \
             events would be looked for, and written, in the wrong one"
        ),
        remedy: "give the number the log was begun with; where partitions were added, also \
                 ?allow_unsafe=partitions, which leaves the added ones unused"
            .into(),
    }
}

/// Why a setting loses events and which value does not; `None` if it is safe.
fn judge(setting: &str, value: Option<&str>, replicas: usize) -> Option<(String, &'static str)> {
    let (safe, why) = match setting {
        "retention.ms" | "retention.bytes" => (FOR_EVER, "the broker deletes old events"),
        "cleanup.policy" => {
            ("delete", "compaction deletes all but the newest event of every stream")
        }
        "unclean.leader.election.enable" => {
            ("false", "a replica without the newest events may become leader and drop them")
        }
        "message.timestamp.type" => {
            ("CreateTime", "the broker would replace the time at which an event was recorded")
        }
        // What is left is min.insync.replicas.
        _ => return judge_in_sync(value, replicas),
    };
    (value != Some(safe)).then(|| (why.into(), safe))
}

fn judge_in_sync(value: Option<&str>, replicas: usize) -> Option<(String, &'static str)> {
    let safe = if replicas >= REPLICAS_SAFE { "2" } else { "1" };
    let least = if replicas >= REPLICAS_SAFE { IN_SYNC_SAFE } else { 1 };
    match value.and_then(|text| text.parse::<u64>().ok()) {
        None => Some(("it is not known how many copies acknowledge an event".into(), safe)),
        Some(count) if count < least => Some((
            format!("of {replicas} replicas one alone may acknowledge an event and then be lost"),
            safe,
        )),
        Some(count) if count > replicas as u64 => {
            Some((format!("with {replicas} replicas no event is ever acknowledged"), safe))
        }
        Some(_) => None,
    }
}

/// What is wrong with the partitions of a topic beside the events, which has `partitions`.
pub(crate) fn judge_beside(
    config: &KafkaConfig,
    topic: &str,
    found: u32,
    partitions: u32,
) -> Option<Finding> {
    let events = config.events_topic();
    let is_accepted = found > partitions && config.allow_unsafe.contains(ADDED_PARTITIONS);
    (found != partitions && !is_accepted).then(|| Finding {
        setting: "partitions".into(),
        value: found.to_string(),
        why: format!(
            "{events} has {partitions}, and commands are sent to the partition of their stream"
        ),
        remedy: match found < partitions {
            true => format!(
                "where partitions were added to {events}, give the number of partitions that the log was \
                 begun with, as ?partitions=N&allow_unsafe=partitions; if no node has ever used {topic}, \
                 delete it: it is made anew with {partitions}"
            ),
            false => format!(
                "where partitions were added to {topic}, give the number of partitions that the log was \
                 begun with, as ?partitions=N&allow_unsafe=partitions; if no node has ever used it, delete \
                 it: it is made anew with {partitions}"
            ),
        },
    })
}

/// Returns `max.message.bytes` of a topic with these settings.
pub(crate) fn record_bytes_max(settings: &Settings<'_>) -> usize {
    let limit = settings.get(RECORD_BYTES_MAX).and_then(|text| text.parse().ok());
    limit.unwrap_or(RECORD_BYTES_DEFAULT)
}

/// Returns the reason for a record that is larger than its topic takes, and the remedy.
pub(crate) fn above_record_limit(topic: &str) -> String {
    format!(
        "{RECORD_BYTES_MAX} of topic {topic} is below the size of the batch: raise it (kafka-configs.sh \
         --alter --entity-type topics --entity-name {topic} --add-config \
         {RECORD_BYTES_MAX}={RECORD_BYTES_DEFAULT})"
    )
}

/// The settings of a topic or a broker by name.
pub(crate) struct Settings<'a>(pub(crate) &'a ConfigResource);

impl Settings<'_> {
    pub(crate) fn get(&self, setting: &str) -> Option<&str> {
        self.0.get(setting)?.value.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_log_that_keeps_everything_is_safe() {
        let unsafe_settings = [
            ("retention.ms", "604800000", "-1"),
            ("retention.bytes", "1073741824", "-1"),
            ("cleanup.policy", "compact", "delete"),
            ("cleanup.policy", "compact,delete", "delete"),
            ("unclean.leader.election.enable", "true", "false"),
            ("message.timestamp.type", "LogAppendTime", "CreateTime"),
        ];
        for (setting, value, safe) in unsafe_settings {
            assert_eq!(
                judge(setting, Some(value), 3).map(|found| found.1),
                Some(safe),
                "{setting}"
            );
            assert_eq!(judge(setting, Some(safe), 3), None, "{setting}");
            assert!(judge(setting, None, 3).is_some(), "{setting} unread");
        }
    }

    #[test]
    fn as_many_replicas_must_acknowledge_as_survive_a_broker() {
        let refused = |value: &str, replicas| judge("min.insync.replicas", Some(value), replicas);
        assert!(refused("1", 3).is_some());
        assert_eq!(refused("2", 3), None);
        assert_eq!(refused("1", 1), None);
        assert_eq!(refused("1", 2), None);
        assert!(refused("2", 1).is_some(), "nothing could be written");
        assert!(judge("min.insync.replicas", None, 1).is_some());
    }
}

//! Clock events: event time that moves on without events of its own.
//!
//! A partition without events holds the windows of all partitions open. The worker of a windowed model that has read
//! such a partition to its end appends a clock event to it, an ordinary event of the aggregate [`Timeline`]. Importers
//! append clock events at the end of their data.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::Partition;
use crate::aggregate::Aggregate;
use crate::ids::{InvalidStreamId, StreamId};
use crate::snapshot::SnapshotSchema;

/// The category of the streams of clock events.
pub const CATEGORY: &str = "kafold_clock";

/// Stored as written: renaming a variant or a field changes what old events decode to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, kafold_core_macros::DomainEvent)]
#[event(category = CATEGORY)]
pub enum TimelineEvent {
    /// No event of the timeline before this time is to come in the partition.
    #[event("clock.advanced")]
    Advanced {
        /// The time of the clock.
        to: DateTime<Utc>,
    },
}

/// A command of a [`Timeline`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimelineCommand {
    /// Moves the clock forward; an earlier time changes nothing.
    Advance {
        /// The time of the clock.
        to: DateTime<Utc>,
    },
}

/// The clock events of one timeline in one partition. A clock moves only forward.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    advanced_to: Option<DateTime<Utc>>,
}

/// The error of a timeline, which refuses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum NoRule {}

impl Aggregate for Timeline {
    type Command = TimelineCommand;
    type Event = TimelineEvent;
    type Error = NoRule;

    const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("timeline.1"));

    fn decide(&self, command: &TimelineCommand) -> Result<Vec<TimelineEvent>, NoRule> {
        let TimelineCommand::Advance { to } = *command;
        let is_forward = self.advanced_to.is_none_or(|advanced_to| advanced_to < to);
        Ok(if is_forward { vec![TimelineEvent::Advanced { to }] } else { Vec::new() })
    }

    fn evolve(&mut self, event: &TimelineEvent) {
        let TimelineEvent::Advanced { to } = *event;
        self.advanced_to = Some(to);
    }
}

/// Returns the stream of a timeline's clock events in a partition: `kafold_clock-TIMELINE-N` with the least N that
/// `partition_of` assigns to the partition.
pub fn stream(
    timeline: &str,
    partition: Partition,
    partition_of: impl Fn(&StreamId) -> Partition,
) -> Result<StreamId, InvalidStreamId> {
    let mut n = 0_u32;
    loop {
        let stream = StreamId::new(CATEGORY, &format!("{timeline}-{n}"))?;
        if partition_of(&stream) == partition {
            return Ok(stream);
        }
        n += 1;
    }
}

/// Returns the timeline of a stream of clock events; `None` for other streams.
pub fn timeline_of(stream: &StreamId) -> Option<&str> {
    let id = (stream.category() == CATEGORY).then(|| stream.id())?;
    id.rsplit_once('-').map(|(timeline, _)| timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).expect("in range")
    }

    #[test]
    fn a_clock_moves_only_forward() {
        let mut timeline = Timeline::default();
        for (to, moves) in [(5, true), (5, false), (4, false), (6, true)] {
            let events =
                timeline.decide(&TimelineCommand::Advance { to: at(to) }).expect("no rule");
            assert_eq!(events.len(), usize::from(moves), "to {to}");
            events.iter().for_each(|event| timeline.evolve(event));
        }
    }

    #[test]
    fn each_partition_has_a_stream_of_each_timeline() {
        let partition_of = |stream: &StreamId| Partition(stream.id().len() as u32 % 3);
        let streams: Vec<_> =
            (0..3).map(|n| stream("trending", Partition(n), partition_of)).collect();
        for (n, stream) in streams.iter().enumerate() {
            let stream = stream.as_ref().expect("valid");
            assert_eq!(partition_of(stream), Partition(n as u32));
            assert_eq!(timeline_of(stream), Some("trending"));
        }
        let other = StreamId::new("search", "trending-1").expect("valid");
        assert_eq!(timeline_of(&other), None);
    }
}

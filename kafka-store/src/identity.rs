//! Whether a partition is still the log that a stored position came from.
//!
//! Pure checks on facts that the driver gathers at start. A log end that looks too low is believed
//! only after metadata was refreshed for a while: a stale leader looks the same.

use kafold_core::mutant::{self, Mutant};
use kafold_core::{Offset, Partition};

use crate::fold::{Anchor, Checkpoint, LogIdentity};

/// What the partition shows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFacts {
    /// The topic's name, for messages.
    pub topic: String,
    /// The partition.
    pub partition: Partition,
    /// How many partitions the topic has now.
    pub partitions: u32,
    /// How many the log was begun with, see [`partitions_of`].
    pub log_partitions: u32,
    /// The first offset there is.
    pub start: Offset,
    /// The offset of the next record.
    pub end: Offset,
    /// The partition's first claim, if there is any.
    pub first_claim: Option<LogIdentity>,
    /// What was found where the stored anchor should be; [`AnchorFound::NotRead`] without one.
    pub anchor: AnchorFound,
}

/// What a read at the anchor's offset gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnchorFound {
    /// There is no stored anchor, or the log ends before it.
    NotRead,
    /// A record of ours stands there.
    Ours(Anchor),
    /// A record that is not ours stands there.
    Other,
    /// The next record that there is stands at this higher offset.
    Hole(Offset),
}

/// Why a stored position does not belong to this log. Nothing is ever reset silently.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Records at the beginning were deleted.
    #[error(
        "{topic}/{partition} was trimmed: it begins at offset {start} instead of 0. Restore the topic from a copy; set retention.ms=-1 and retention.bytes=-1 so that it cannot happen again"
    )]
    Trimmed {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// Where it begins.
        start: Offset,
    },
    /// Records at the end were lost.
    #[error(
        "{topic}/{partition} was truncated: it ends at offset {end}, but records below {stored} were read from it before. Restore the topic, or accept the loss of the records: `kafold positions reset --reason TEXT` rebuilds from this log what stores positions (index, checkpoints, snapshots)"
    )]
    Truncated {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// Where it ends.
        end: Offset,
        /// The stored position.
        stored: Offset,
    },
    /// The topic was deleted and made again.
    #[error("{topic}/{partition} is not the log of this database: its first claim is {}, but the stored position {stored} comes from a log that began with claim {expected:016x}. Either the database belongs to another log, or the topic was recreated. Use the log of this database, or another database for this log, or `kafold positions reset --reason TEXT`, which rebuilds from this log what stores positions (index, checkpoints, snapshots)", found.map_or("absent".into(), |nonce| format!("{nonce:016x}")))]
    Recreated {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// The first claim's nonce of the log that the position came from.
        expected: u64,
        /// The nonce of this log's first claim.
        found: Option<u64>,
        /// The stored position.
        stored: Offset,
    },
    /// The log went on from an older copy of itself.
    #[error("{topic}/{partition} is an older copy that was written on: at offset {} stands {found}, but {expected} was read there before. Restore the newer copy, or rebuild from this log what stores positions (index, checkpoints, snapshots): `kafold positions reset --reason TEXT`", expected.offset)]
    OlderCopy {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// What was read there before.
        expected: Anchor,
        /// What stands there now.
        found: String,
    },
    /// Records in between were removed.
    #[error(
        "{topic}/{partition} was compacted: offset {expected} is gone, the next record is at {found}. Restore the topic from a copy; set cleanup.policy=delete so that it cannot happen again"
    )]
    Compacted {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// The offset that was looked at.
        expected: Offset,
        /// The offset of the next record.
        found: Offset,
    },
    /// Partitions were added: streams would be looked for in others than they are in.
    #[error(
        "{topic}/{partition} was repartitioned: the topic has {found} partitions, the log was begun with {expected}. Go on with the first {expected} by ?partitions={expected}&allow_unsafe=partitions"
    )]
    Repartitioned {
        /// The topic.
        topic: String,
        /// The partition.
        partition: Partition,
        /// How many the log was begun with.
        expected: u32,
        /// How many the topic has.
        found: u32,
    },
}

impl IdentityError {
    /// Whether it may be a stale leader's answer: refresh metadata and look again for a while.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Truncated { .. } | Self::Recreated { found: None, .. })
    }
}

/// How many partitions the log has: what partition 0's first claim says, or, while partition 0 has
/// none, metadata; then to be checked again when its claim appears.
pub fn partitions_of(partition_0: Option<LogIdentity>, metadata: u32) -> u32 {
    partition_0.map_or(metadata, |identity| identity.partitions)
}

/// Checks a stored position against the log, or a log without one against itself.
pub fn check(stored: Option<&Checkpoint>, log: &LogFacts) -> Result<(), IdentityError> {
    let (topic, partition) = (log.topic.clone(), log.partition);
    if log.start > Offset(0) {
        return Err(IdentityError::Trimmed { topic, partition, start: log.start });
    }
    let begun_with = log.first_claim.map_or(log.log_partitions, |first| first.partitions);
    if begun_with != log.partitions {
        let (expected, found) = (begun_with, log.partitions);
        return Err(IdentityError::Repartitioned { topic, partition, expected, found });
    }
    match stored {
        Some(_) if mutant::active(Mutant::AutoReset) => Ok(()),
        Some(stored) => check_stored(stored, log),
        None => Ok(()),
    }
}

fn check_stored(stored: &Checkpoint, log: &LogFacts) -> Result<(), IdentityError> {
    let (topic, partition) = (log.topic.clone(), log.partition);
    if let Some(expected) = stored.state.log {
        let found = log.first_claim;
        if found.map(|first| first.nonce) != Some(expected.nonce) {
            let (expected, stored) = (expected.nonce.0, stored.next);
            let found = found.map(|first| first.nonce.0);
            return Err(IdentityError::Recreated { topic, partition, expected, found, stored });
        }
    }
    if log.end < stored.next {
        let (end, stored) = (log.end, stored.next);
        return Err(IdentityError::Truncated { topic, partition, end, stored });
    }
    let Some(expected) = stored.state.anchor else { return Ok(()) };
    let found = match log.anchor {
        AnchorFound::Ours(found) if found == expected => return Ok(()),
        AnchorFound::Hole(found) => {
            let expected = expected.offset;
            return Err(IdentityError::Compacted { topic, partition, expected, found });
        }
        AnchorFound::Ours(found) => found.to_string(),
        AnchorFound::Other => "a record that is not ours".into(),
        AnchorFound::NotRead => "nothing that was read".into(),
    };
    Err(IdentityError::OlderCopy { topic, partition, expected, found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fold::FoldState;
    use crate::wire::{ClaimId, Epoch, Nonce};

    const FIRST: LogIdentity = LogIdentity { nonce: Nonce(7), partitions: 12 };

    fn anchor() -> Anchor {
        let claim = ClaimId { epoch: Epoch(2), nonce: Nonce(9) };
        Anchor { offset: Offset(40), claim, seq: 5 }
    }

    fn stored() -> Checkpoint {
        let claim = anchor().claim;
        let state = FoldState {
            log: Some(FIRST),
            claim,
            next_seq: 6,
            anchor: Some(anchor()),
            ..FoldState::default()
        };
        Checkpoint { next: Offset(41), state }
    }

    fn log() -> LogFacts {
        LogFacts {
            topic: "orders.events".into(),
            partition: Partition(3),
            partitions: 12,
            log_partitions: 12,
            start: Offset(0),
            end: Offset(41),
            first_claim: Some(FIRST),
            anchor: AnchorFound::Ours(anchor()),
        }
    }

    /// The log differs by `change` from the one that was stored; the refusal says all `words`.
    fn refused(change: impl FnOnce(&mut LogFacts), words: &[&str]) -> IdentityError {
        let mut changed = log();
        change(&mut changed);
        let error = check(Some(&stored()), &changed).expect_err("another log");
        let shown = error.to_string();
        for word in words.iter().chain(&["orders.events/3"]) {
            assert!(shown.contains(word), "{word:?} is not in {shown:?}");
        }
        error
    }

    #[test]
    fn the_log_that_was_stored_is_recognised() {
        assert_eq!(check(Some(&stored()), &log()), Ok(()));
        assert_eq!(check(None, &log()), Ok(()));
        let grown = LogFacts { end: Offset(1_000), ..log() };
        assert_eq!(check(Some(&stored()), &grown), Ok(()));
        let virgin = LogFacts { first_claim: None, end: Offset(0), ..log() };
        assert_eq!(check(Some(&Checkpoint::default()), &virgin), Ok(()));
    }

    #[test]
    fn a_trimmed_log_is_refused_even_without_a_position() {
        refused(|log| log.start = Offset(5), &["trimmed", "offset 5", "retention.ms=-1"]);
        let trimmed = LogFacts { start: Offset(1), ..log() };
        assert!(matches!(check(None, &trimmed), Err(IdentityError::Trimmed { .. })));
    }

    #[test]
    fn a_truncated_log_is_refused_but_may_be_a_stale_leader() {
        let error = refused(
            |log| log.end = Offset(40),
            &["truncated", "offset 40", "below 41", "kafold positions reset"],
        );
        assert!(error.may_pass());
    }

    #[test]
    fn a_recreated_topic_is_refused() {
        let nonce = Nonce(8);
        let other = Some(LogIdentity { nonce, ..FIRST });
        let words = ["recreated", "0000000000000008", "0000000000000007", "kafold positions reset"];
        assert!(!refused(|log| log.first_claim = other, &words).may_pass());
        let empty = |log: &mut LogFacts| (log.first_claim, log.end) = (None, Offset(0));
        assert!(refused(empty, &["recreated", "absent"]).may_pass());
    }

    #[test]
    fn an_older_copy_that_went_on_is_refused() {
        let found = Anchor { seq: 4, ..anchor() };
        let words = [
            "older copy",
            "offset 40",
            "record 4 of epoch 2",
            "record 5 of epoch 2",
            "kafold positions reset",
        ];
        refused(|log| log.anchor = AnchorFound::Ours(found), &words);
        refused(|log| log.anchor = AnchorFound::Other, &["older copy", "not ours"]);
        refused(|log| log.anchor = AnchorFound::NotRead, &["older copy"]);
    }

    #[test]
    fn a_position_that_is_believed_whatever_the_log_is_shows() {
        let believed = std::panic::catch_unwind(|| {
            mutant::with(Some(Mutant::AutoReset), an_older_copy_that_went_on_is_refused);
        });
        assert!(believed.is_err(), "AutoReset is not found");
        crate::sim::say("AutoReset killed by an_older_copy_that_went_on_is_refused");
    }

    #[test]
    fn a_compacted_topic_is_refused() {
        let hole = AnchorFound::Hole(Offset(44));
        let words = ["compacted", "offset 40", "at 44", "cleanup.policy=delete"];
        refused(|log| log.anchor = hole, &words);
    }

    #[test]
    fn another_partition_count_is_refused_on_virgin_partitions_too() {
        refused(|log| log.partitions = 24, &["repartitioned", "24", "12"]);
        let virgin = LogFacts { first_claim: None, partitions: 24, ..log() };
        assert!(matches!(check(None, &virgin), Err(IdentityError::Repartitioned { .. })));
        assert_eq!(partitions_of(Some(FIRST), 24), 12);
        assert_eq!(partitions_of(None, 24), 24);
    }
}

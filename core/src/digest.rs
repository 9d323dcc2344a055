//! Digests which detect a missing or changed event in a copy of events.
//!
//! The stream index is a copy of the log in SQL tables, which other programs can change. A
//! [`Digest`] is an XOR over events: the digest of a set does not depend on an order, and an insert
//! updates the digest without reading the other events. A node keeps the digest of each [`Bucket`]
//! of streams in memory ([`BucketDigests`]) and compares the digest with the tables at every load
//! of a stream. The digests detect damage, not forgery: XXH3 is no cryptographic hash.

use std::ops::BitXorAssign;

use twox_hash::XxHash3_64;

use crate::event::RecordedEvent;
use crate::ids::StreamId;

/// Number of buckets of a partition's streams: 128 KiB of digests a partition. A load reads the
/// heads of all streams of one bucket, about 60 heads in a partition with a million streams.
pub const BUCKETS: usize = 1 << BUCKET_BITS;
const BUCKET_BITS: u32 = 14;
/// A stream's hash without this number of low bits is the bucket's number, signed as in SQL.
pub const BUCKET_SHIFT: u32 = u64::BITS - BUCKET_BITS;

/// The XOR of the 64-bit XXH3 hashes of events. Equal sets of events have equal digests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// Returns the digest of one event, over all stored fields.
    pub fn of(event: &RecordedEvent) -> Self {
        let metadata = &event.metadata;
        let mut fixed = [0; 60];
        fixed[..8].copy_from_slice(&event.version.0.to_le_bytes());
        fixed[8..12].copy_from_slice(&event.position.partition.0.to_le_bytes());
        fixed[12..20].copy_from_slice(&event.position.offset.0.to_le_bytes());
        fixed[20..36].copy_from_slice(event.command_id.0.as_bytes());
        fixed[36..52].copy_from_slice(metadata.event_id.as_bytes());
        fixed[52..].copy_from_slice(&metadata.recorded_at.timestamp_micros().to_le_bytes());
        // Each part is hashed with the hash so far as the seed, so moving a byte from one part to
        // the next changes the hash.
        let mut hash = XxHash3_64::oneshot(&fixed);
        let mut add = |part: &[u8]| hash = XxHash3_64::oneshot_with_seed(hash, part);
        add(event.stream.as_str().as_bytes());
        add(event.event_type.as_bytes());
        add(&event.payload);
        for text in [&metadata.correlation_id, &metadata.causation_id, &metadata.trace_parent] {
            // An absent text differs from an empty text.
            add(&[u8::from(text.is_some())]);
            add(text.as_deref().unwrap_or_default().as_bytes());
        }
        Self(hash)
    }

    /// Returns the digest of other bytes than an event, such as a row of another table. Each part
    /// is hashed after the previous part.
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let add = |hash, part: &[u8]| XxHash3_64::oneshot_with_seed(hash, part);
        Self(parts.into_iter().fold(0, add))
    }
}

impl BitXorAssign for Digest {
    fn bitxor_assign(&mut self, other: Self) {
        self.0 ^= other.0;
    }
}

/// Returns the hash of a stream: the column `hash` of the tables, signed as in SQL.
pub fn stream_hash(stream: &StreamId) -> i64 {
    XxHash3_64::oneshot(stream.as_str().as_bytes()) as i64
}

/// A group of a partition's streams with equal upper bits in their hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bucket(usize);

impl Bucket {
    /// Returns the bucket of a stream.
    pub fn of(stream: &StreamId) -> Self {
        Self::of_hash(stream_hash(stream))
    }

    /// Returns the bucket of a stream's hash.
    pub fn of_hash(hash: i64) -> Self {
        // Buckets follow the order of signed hashes in SQL: the lowest hashes come first.
        Self(((hash as u64) ^ (1 << 63)) as usize >> BUCKET_SHIFT)
    }

    /// Returns the lowest and the highest hash of the bucket, both inclusive.
    pub fn hashes(self) -> (i64, i64) {
        let lowest = ((self.0 as u64) << BUCKET_SHIFT) ^ (1 << 63);
        (lowest as i64, (lowest | ((1 << BUCKET_SHIFT) - 1)) as i64)
    }
}

/// The digests of all buckets of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketDigests(Box<[Digest]>);

impl Default for BucketDigests {
    fn default() -> Self {
        Self(vec![Digest::default(); BUCKETS].into())
    }
}

impl BucketDigests {
    /// Adds an event to the bucket of its stream, or removes an event already added.
    pub fn toggle(&mut self, event: &RecordedEvent) {
        self.add(Bucket::of(&event.stream), Digest::of(event));
    }

    /// Adds a digest to a bucket.
    pub fn add(&mut self, bucket: Bucket, digest: Digest) {
        self.0[bucket.0] ^= digest;
    }

    /// Returns the digest of a bucket.
    pub fn get(&self, bucket: Bucket) -> Digest {
        self.0[bucket.0]
    }

    /// Returns the digests as bytes: 8 for each bucket, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|digest| digest.0.to_le_bytes()).collect()
    }

    /// Returns the digests from their bytes, or `None` for another number of buckets.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (digests, rest) = bytes.as_chunks();
        let digests: Box<_> = digests.iter().map(|d| Digest(u64::from_le_bytes(*d))).collect();
        (rest.is_empty() && digests.len() == BUCKETS).then_some(Self(digests))
    }

    /// Returns the digest of all events of the partition.
    pub fn total(&self) -> Digest {
        let mut total = Digest::default();
        self.0.iter().for_each(|digest| total ^= *digest);
        total
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::event::Metadata;
    use crate::ids::{CommandId, Offset, Partition, Position, Version};

    fn event() -> RecordedEvent {
        RecordedEvent {
            stream: "order-17".parse().expect("a stream id"),
            version: Version(3),
            position: Position { partition: Partition(1), offset: Offset(42) },
            command_id: CommandId(Uuid::from_u128(7)),
            event_type: "order.placed.v1".into(),
            payload: Arc::from(*br#"{"a":1}"#),
            metadata: Metadata {
                event_id: Uuid::from_u128(9),
                recorded_at: DateTime::UNIX_EPOCH,
                correlation_id: Some("c".into()),
                causation_id: None,
                trace_parent: None,
            },
        }
    }

    #[test]
    fn every_field_of_an_event_changes_its_digest() {
        let changes: [fn(&mut RecordedEvent); 12] = [
            |e| e.stream = "order-18".parse().expect("a stream id"),
            |e| e.version = Version(4),
            |e| e.position.partition = Partition(2),
            |e| e.position.offset = Offset(43),
            |e| e.command_id = CommandId(Uuid::from_u128(8)),
            |e| e.event_type = "order.placed.v2".into(),
            |e| e.payload = Arc::from(*br#"{"a":2}"#),
            |e| e.metadata.event_id = Uuid::from_u128(10),
            |e| e.metadata.recorded_at += chrono::TimeDelta::microseconds(1),
            |e| e.metadata.correlation_id = None,
            |e| e.metadata.causation_id = Some(String::new()),
            |e| {
                (e.metadata.correlation_id, e.metadata.causation_id) = (None, Some("c".into()));
            },
        ];
        let mut seen = vec![Digest::of(&event())];
        for change in changes {
            let mut changed = event();
            change(&mut changed);
            let digest = Digest::of(&changed);
            assert!(!seen.contains(&digest), "{changed:?}");
            seen.push(digest);
        }
    }

    #[test]
    fn the_digest_of_an_event_stays_the_same_for_ever() {
        assert_eq!(
            Digest::of(&event()),
            Digest(3_968_515_222_993_230_159),
            "stored in the tables of every user"
        );
        assert_eq!(stream_hash(&event().stream), 2_543_671_532_102_667_198);
    }

    #[test]
    fn the_buckets_cover_all_hashes_in_the_order_of_sql() {
        let ends = |nth| Bucket(nth).hashes();
        assert_eq!((ends(0).0, ends(BUCKETS - 1).1), (i64::MIN, i64::MAX));
        for nth in 1..BUCKETS {
            assert_eq!(ends(nth).0, ends(nth - 1).1 + 1);
        }
        for hash in [i64::MIN, -1, 0, 1, i64::MAX, stream_hash(&event().stream)] {
            let (lowest, highest) = Bucket::of_hash(hash).hashes();
            assert!((lowest..=highest).contains(&hash), "{hash}");
        }
    }

    #[test]
    fn an_event_that_is_taken_away_again_leaves_no_trace() {
        let mut buckets = BucketDigests::default();
        buckets.toggle(&event());
        assert_eq!(buckets.get(Bucket::of(&event().stream)), Digest::of(&event()));
        assert_eq!(buckets.total(), Digest::of(&event()));
        let bytes = buckets.to_bytes();
        assert_eq!(BucketDigests::from_bytes(&bytes).as_ref(), Some(&buckets));
        assert_eq!(BucketDigests::from_bytes(&bytes[8..]), None);
        assert_eq!(BucketDigests::from_bytes(&bytes[1..]), None);
        buckets.toggle(&event());
        assert_eq!(buckets, BucketDigests::default());
    }
}

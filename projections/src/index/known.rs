//! [`KnownDigests`]: the digests of streams that this process wrote recently.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kafold_core::digest::{Digest, stream_hash};
use kafold_core::{Partition, StreamId, Version};

/// Number of streams. A service that writes to more streams between two events of a stream reads
/// the digest from the table.
const SLOTS: usize = 1 << 16;

/// A direct-mapped cache: a stream has one slot, and the last writer of the slot stays. Takes 2 MiB
/// from the first write on.
///
/// The digest of a stream up to a version never changes, so no entry becomes wrong. An entry made
/// from a damaged row was wrong from the beginning; see [`KnownDigests::compared`].
#[derive(Default)]
pub(super) struct KnownDigests(Mutex<Known>);

#[derive(Default)]
struct Known {
    slots: Vec<Slot>,
    /// Partitions whose heads differed from the declared totals at the last comparison.
    damaged: HashSet<Partition>,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Two hashes of the stream, 128 bits together.
    stream: (i64, u64),
    version: u64,
    digest: Digest,
}

impl KnownDigests {
    /// Returns the digest of the stream's events up to a version.
    pub(super) fn get(&self, stream: &StreamId, version: Version) -> Option<Digest> {
        let (at, stream) = place(stream);
        let slot = *self.known().slots.get(at)?;
        (slot.stream == stream && slot.version == version.0).then_some(slot.digest)
    }

    /// Stores the digests of streams up to their last events.
    pub(super) fn put<'a>(
        &self,
        written: impl IntoIterator<Item = (&'a StreamId, Version, Digest)>,
    ) {
        let mut known = self.known();
        known.slots.resize(SLOTS, Slot::default());
        for (stream, version, digest) in written {
            let (at, stream) = place(stream);
            known.slots[at] = Slot { stream, version: version.0, digest };
        }
    }

    /// Forgets all entries while the heads of a partition differ from the declared totals, and once
    /// more when the heads agree again after a rebuild.
    pub(super) fn compared(&self, partition: Partition, agree: bool) {
        let mut known = self.known();
        let was_damaged = known.damaged.remove(&partition);
        if !agree {
            known.damaged.insert(partition);
        }
        if was_damaged || !agree {
            known.slots = Vec::new();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the number of the stream's slot and the stream's two hashes.
fn place(stream: &StreamId) -> (usize, (i64, u64)) {
    let hash = stream_hash(stream);
    let second = Digest::of_parts([&hash.to_le_bytes()[..], stream.as_str().as_bytes()]);
    (hash as usize % SLOTS, (hash, second.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_known_for_its_stream_and_version_only() {
        let known = KnownDigests::default();
        let stream = |nth: usize| -> StreamId { format!("a-{nth}").parse().expect("a stream id") };
        assert_eq!(known.get(&stream(0), Version(1)), None);
        let streams: Vec<_> = (0..2 * SLOTS).map(stream).collect();
        known.put(streams.iter().zip(1..).map(|(stream, n)| (stream, Version(n), Digest(n))));
        let found = |nth: usize| known.get(&streams[nth], Version(nth as u64 + 1));
        assert_eq!(found(2 * SLOTS - 1), Some(Digest(2 * SLOTS as u64)));
        assert_eq!(known.get(&streams[2 * SLOTS - 1], Version(1)), None);
        let known = (0..streams.len()).filter(|nth| found(*nth).is_some()).count();
        assert!((SLOTS / 2..=SLOTS).contains(&known), "{known}");
        assert!((0..streams.len()).all(|nth| found(nth).is_none_or(|d| d.0 == nth as u64 + 1)));
    }

    #[test]
    fn entries_made_while_a_partition_was_damaged_are_forgotten() {
        let (known, stream) = (KnownDigests::default(), "a-1".parse().expect("a stream id"));
        let put = || known.put([(&stream, Version(1), Digest(7))]);
        let is_known = || known.get(&stream, Version(1)).is_some();
        for (partition, agree, kept) in
            [(0, true, true), (0, false, false), (1, true, true), (0, true, false), (0, true, true)]
        {
            put();
            known.compared(Partition(partition), agree);
            assert_eq!(is_known(), kept, "{partition} {agree}");
        }
    }
}

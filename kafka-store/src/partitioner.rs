//! Which partition a stream lives in: Java's default, so that any other producer or consumer of the
//! topic computes the same.

use kafold_core::{Partition, StreamId};

const SEED: u32 = 0x9747_b28c;
const MULTIPLIER: u32 = 0x5bd1_e995;
const SHIFT: u32 = 24;

/// The partition of a stream, in a topic of `partitions` partitions, which must not be 0.
pub fn partition_of(stream: &StreamId, partitions: u32) -> Partition {
    // Java's `toPositive` clears the sign.
    let positive = murmur2(stream.as_str().as_bytes()) & 0x7fff_ffff;
    Partition(positive % partitions.max(1))
}

/// `org.apache.kafka.common.utils.Utils.murmur2`.
fn murmur2(data: &[u8]) -> u32 {
    // Java's arrays are shorter than 2^31.
    let mut hash = SEED ^ data.len() as u32;
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        let mut word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        word = word.wrapping_mul(MULTIPLIER);
        word ^= word >> SHIFT;
        word = word.wrapping_mul(MULTIPLIER);
        hash = hash.wrapping_mul(MULTIPLIER) ^ word;
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        for (place, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * place);
        }
        hash = hash.wrapping_mul(MULTIPLIER);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 15)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with kafka-clients 4.3.1: `Utils.murmur2(key)`, and `toPositive` of it modulo 12 and 7.
    const JAVA: [(&str, i32, u32, u32); 16] = [
        ("a-1", 2_032_095_808, 4, 1),
        ("b-x", -1_985_849_379, 5, 6),
        ("order-0", -1_282_856_692, 4, 4),
        ("order-1", 1_221_710_326, 10, 4),
        ("order-17", 1_568_318_961, 9, 6),
        ("order-123", -940_440_895, 1, 0),
        ("order-1234", 202_518_744, 0, 1),
        ("order-12345", -1_747_359_319, 1, 3),
        ("order-2024-17", -424_241_631, 5, 0),
        ("order-cdnow-1", 895_684_419, 3, 0),
        ("order-cdnow-69659", 1_297_588_980, 0, 2),
        ("customer-c1", -305_995_394, 6, 4),
        ("s-é", 1_785_639_089, 5, 3),
        ("order-東京", -981_226_710, 2, 0),
        ("cart-🚀", 734_059_312, 4, 0),
        ("a-", -1_178_004_620, 0, 0),
    ];

    #[test]
    fn every_stream_is_where_java_would_put_it() {
        for (key, hash, of_12, of_7) in JAVA {
            // The longest id there is, too long to be written out.
            let key = if key == "a-" { format!("a-{}", "x".repeat(200)) } else { key.to_owned() };
            assert_eq!(murmur2(key.as_bytes()), hash as u32, "{key}");
            let stream: StreamId = key.parse().expect("a stream id");
            assert_eq!(partition_of(&stream, 12), Partition(of_12), "{key}");
            assert_eq!(partition_of(&stream, 7), Partition(of_7), "{key}");
            assert_eq!(partition_of(&stream, 1), Partition(0), "{key}");
        }
    }
}

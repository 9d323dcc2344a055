//! What was never there, without a look where it would be.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Bits for each item, and how many of them are set: of a thousand that were never added, one or two
/// are taken for one that may have been.
const ITEM_BITS: usize = 16;
const HASHES: usize = 6;
/// Items of the first part; each part is twice the one before, so often at most.
const PART_ITEMS_MIN: usize = 128;
const DOUBLINGS_MAX: usize = 16;

/// A Bloom filter that grows: what it does not hold was never added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Their number is a power of two.
    words: Box<[u64]>,
    /// Items that may still be added.
    room: usize,
}

impl Filter {
    /// Adds an item.
    pub fn add(&mut self, item: &impl Hash) {
        if self.parts.last().is_none_or(|part| part.room == 0) {
            let room = PART_ITEMS_MIN << self.parts.len().min(DOUBLINGS_MAX);
            self.parts.push(Part { words: vec![0; room * ITEM_BITS / 64].into(), room });
        }
        if let Some(part) = self.parts.last_mut() {
            part.room -= 1;
            for bit in bits(hash_of(item), part.words.len()) {
                part.words[bit / 64] |= 1 << (bit % 64);
            }
        }
    }

    /// Whether the item may have been added; `false` is certain.
    pub fn may_hold(&self, item: &impl Hash) -> bool {
        let hash = hash_of(item);
        let is_in = |part: &Part| {
            let mut bits = bits(hash, part.words.len());
            bits.all(|bit| part.words[bit / 64] & (1 << (bit % 64)) != 0)
        };
        self.parts.iter().any(is_in)
    }

    /// Its memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| size_of_val(&*part.words)).sum()
    }
}

/// Whoever chooses items that fall together gets look-ups, and no other answer.
fn hash_of(item: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    item.hash(&mut hasher);
    hasher.finish()
}

fn bits(hash: u64, words: usize) -> impl Iterator<Item = usize> {
    let (first, step) = (hash as usize, (hash >> 32) as usize | 1);
    let mask = words * 64 - 1;
    (0..HASHES).map(move |nth| first.wrapping_add(step.wrapping_mul(nth)) & mask)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::CommandId;

    fn command(n: u128) -> CommandId {
        // As near to one another as ids of version 7 of one millisecond.
        CommandId(Uuid::from_u128((0x0199_7000_0000_7000_8000 << 48) + n))
    }

    #[test]
    fn nothing_that_was_added_is_missed_and_little_else_is_taken_for_it() {
        let mut filter = Filter::default();
        assert!(!filter.may_hold(&command(0)) && filter.bytes() == 0);
        for n in 0..20_000 {
            filter.add(&command(n));
        }
        assert!((0..20_000).all(|n| filter.may_hold(&command(n))));
        let wrong = (20_000..120_000).filter(|n| filter.may_hold(&command(*n))).count();
        assert!(wrong < 1_500, "{wrong} of 100 000");
        assert!(filter.bytes() < 20_000 * 4, "{} bytes", filter.bytes());
    }
}

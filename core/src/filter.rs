//! What was never there, without a look where it would be.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Bits for each item of a small filter: of a thousand that were never added, one or two are taken for
/// one that may have been.
const ITEM_BITS: usize = 16;
/// And of one for many items: a few of a million are.
const MANY_ITEM_BITS: usize = 32;
/// Items of the first part of a small one; each part is twice the one before, up to a size.
const PART_ITEMS_MIN: usize = 128;
const PART_ITEMS_MAX: usize = PART_ITEMS_MIN << 16;

/// A Bloom filter that grows: what it does not hold was never added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    parts: Vec<Part>,
    item_bits: usize,
    /// Items of the next part.
    next_items: usize,
}

/// A small one, which is seldom wrong.
impl Default for Filter {
    fn default() -> Self {
        Self { parts: Vec::new(), item_bits: ITEM_BITS, next_items: PART_ITEMS_MIN }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Their number is a power of two.
    lines: Box<[Line]>,
    /// Items that may still be added.
    room: usize,
}

/// All bits of an item are in one line of the processor's cache, so that it waits for memory once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(align(64))]
struct Line([u64; 8]);

impl Filter {
    /// One that is hardly ever wrong, and has memory for about so many items as soon as there is one:
    /// look-ups in few parts are faster.
    pub fn of_many(items: usize) -> Self {
        let next_items = items.clamp(PART_ITEMS_MIN, PART_ITEMS_MAX).next_power_of_two();
        Self { parts: Vec::new(), item_bits: MANY_ITEM_BITS, next_items }
    }

    /// Adds an item.
    pub fn add(&mut self, item: &impl Hash) {
        if self.parts.last().is_none_or(|part| part.room == 0) {
            let room = self.next_items;
            let lines = room * self.item_bits / (size_of::<Line>() * 8);
            self.parts.push(Part { lines: vec![Line::default(); lines].into(), room });
            self.next_items = (2 * room).min(PART_ITEMS_MAX);
        }
        if let Some(part) = self.parts.last_mut() {
            part.room -= 1;
            let hash = hash_of(item);
            let nth = part.nth_line(hash);
            for (word, bit) in bits(hash, self.item_bits) {
                part.lines[nth].0[word] |= bit;
            }
        }
    }

    /// Whether the item may have been added; `false` is certain.
    pub fn may_hold(&self, item: &impl Hash) -> bool {
        let hash = hash_of(item);
        self.parts.iter().any(|part| {
            let Line(words) = &part.lines[part.nth_line(hash)];
            bits(hash, self.item_bits).all(|(word, bit)| words[word] & bit != 0)
        })
    }

    /// Its memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| size_of_val(&*part.lines)).sum()
    }
}

impl Part {
    fn nth_line(&self, hash: u64) -> usize {
        hash as usize & (self.lines.len() - 1)
    }
}

/// Whoever chooses items that fall together gets look-ups, and no other answer.
fn hash_of(item: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    item.hash(&mut hasher);
    hasher.finish()
}

/// The bits of an item in its line, about as many as are best: word and bit within it. They depend on
/// all of the hash, so that few of the items of one line share them.
fn bits(hash: u64, item_bits: usize) -> impl Iterator<Item = (usize, u64)> {
    // Knuth's generator; its upper bits are the good ones.
    let step = |state: &u64| Some(state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1));
    let states = std::iter::successors(step(&hash), step);
    states.take(item_bits * 3 / 8).map(|state| ((state >> 61) as usize, 1 << (state >> 55 & 63)))
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
        let few = (Filter::default(), 1_500, 20_000 * 4);
        let many = (Filter::of_many(1_000), 10, 20_000 * 8);
        for (mut filter, wrong_max, bytes_max) in [few, many] {
            assert!(!filter.may_hold(&command(0)) && filter.bytes() == 0);
            for n in 0..20_000 {
                filter.add(&command(n));
            }
            assert!((0..20_000).all(|n| filter.may_hold(&command(n))));
            let wrong = (20_000..120_000).filter(|n| filter.may_hold(&command(*n))).count();
            assert!(wrong < wrong_max, "{wrong} of 100 000");
            assert!(filter.bytes() < bytes_max, "{} bytes", filter.bytes());
        }
    }
}

//! Which commands a stream had before its recent ones.

use std::hash::{DefaultHasher, Hash, Hasher};

use kafold_core::CommandId;

/// Bits for each command, and how many of them are set: of a thousand commands that never were, one
/// or two are taken for one that may have been.
const COMMAND_BITS: usize = 16;
const HASHES: usize = 6;
/// Commands of the first part; each part is twice the one before, so often at most.
const PART_COMMANDS_MIN: usize = 128;
const DOUBLINGS_MAX: usize = 13;

/// A Bloom filter that grows: what it does not hold was never added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OlderCommands {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Their number is a power of two.
    words: Box<[u64]>,
    /// Commands that may still be added.
    room: usize,
}

impl OlderCommands {
    /// Adds a command.
    pub fn add(&mut self, command_id: CommandId) {
        if self.parts.last().is_none_or(|part| part.room == 0) {
            let room = PART_COMMANDS_MIN << self.parts.len().min(DOUBLINGS_MAX);
            self.parts.push(Part { words: vec![0; room * COMMAND_BITS / 64].into(), room });
        }
        if let Some(part) = self.parts.last_mut() {
            part.room -= 1;
            for bit in bits(command_id, part.words.len()) {
                part.words[bit / 64] |= 1 << (bit % 64);
            }
        }
    }

    /// Whether the command may have been added; `false` is certain.
    pub fn may_hold(&self, command_id: CommandId) -> bool {
        let is_in = |part: &Part| {
            let mut bits = bits(command_id, part.words.len());
            bits.all(|bit| part.words[bit / 64] & (1 << (bit % 64)) != 0)
        };
        self.parts.iter().any(is_in)
    }

    /// Its memory.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| size_of_val(&*part.words)).sum()
    }
}

/// Whoever chooses ids that fall together gets look-ups, and no other answer.
fn bits(command_id: CommandId, words: usize) -> impl Iterator<Item = usize> {
    let mut hasher = DefaultHasher::new();
    command_id.0.as_u128().hash(&mut hasher);
    let hash = hasher.finish();
    let (first, step) = (hash as usize, (hash >> 32) as usize | 1);
    let mask = words * 64 - 1;
    (0..HASHES).map(move |nth| first.wrapping_add(step.wrapping_mul(nth)) & mask)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn command(n: u128) -> CommandId {
        // As near to one another as ids of version 7 of one millisecond.
        CommandId(Uuid::from_u128((0x0199_7000_0000_7000_8000 << 48) + n))
    }

    #[test]
    fn nothing_that_was_added_is_missed_and_little_else_is_taken_for_it() {
        let mut older = OlderCommands::default();
        assert!(!older.may_hold(command(0)) && older.bytes() == 0);
        for n in 0..20_000 {
            older.add(command(n));
        }
        assert!((0..20_000).all(|n| older.may_hold(command(n))));
        let wrong = (20_000..120_000).filter(|n| older.may_hold(command(*n))).count();
        assert!(wrong < 1_500, "{wrong} of 100 000");
        assert!(older.bytes() < 20_000 * 4, "{} bytes", older.bytes());
    }
}

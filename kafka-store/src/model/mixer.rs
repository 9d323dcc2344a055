//! A hasher for fingerprints: fast, well mixed, and the same in every run. Nobody attacks it.

use std::hash::Hasher;

pub(super) struct Mixer(u64);

const MULTIPLIER: u64 = 0x9fb2_1c65_1e98_df25;
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

impl Default for Mixer {
    fn default() -> Self {
        Self(INCREMENT)
    }
}

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * u128::from(MULTIPLIER);
        self.0 = ((product as u64) ^ (product >> 64) as u64).wrapping_add(INCREMENT);
    }

    fn finish(&self) -> u64 {
        let mut last = Self(self.0);
        last.write_u64(0);
        last.0
    }
}

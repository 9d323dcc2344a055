//! Draws by Zipf's law.

use fastrand::Rng;

/// Zipf's law with exponent 1 over `count` things: the first is drawn twice as often as the second.
#[derive(Debug, Clone, Copy)]
pub struct Zipf {
    count: u64,
}

impl Zipf {
    /// Over things 0 to `count − 1`.
    pub fn new(count: u64) -> Self {
        Self { count: count.max(1) }
    }

    /// Draws one: the logarithm evenly, rounded down, and rejected where that is too likely.
    pub fn draw(self, random: &mut Rng) -> u64 {
        let span = ((self.count + 1) as f64).ln();
        loop {
            let rank = (random.f64() * span).exp().floor().clamp(1.0, self.count as f64);
            // What it should be over what it was, which is most for the first.
            let likely = 1.0 / (rank * (1.0 / rank).ln_1p());
            if random.f64() * std::f64::consts::LOG2_E <= likely {
                return rank as u64 - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_drawn_as_often_as_zipf_says() {
        let (mut random, zipf, draws) = (Rng::with_seed(1), Zipf::new(1_000), 200_000);
        let mut counts = vec![0_u32; 1_000];
        for _ in 0..draws {
            counts[zipf.draw(&mut random) as usize] += 1;
        }
        let harmonic: f64 = (1..=1_000).map(|rank| 1.0 / f64::from(rank)).sum();
        for rank in [1_usize, 2, 10] {
            let expected = f64::from(draws) / harmonic / rank as f64;
            let drawn = f64::from(counts[rank - 1]);
            assert!((drawn / expected - 1.0).abs() < 0.1, "rank {rank}: {drawn} of {expected}");
        }
    }
}

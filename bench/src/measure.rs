//! Closed loops for throughput, open loops for latency, percentiles.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use kafold::Clock;
use kafold::clock::SystemClock;
use tokio::task::JoinSet;

use crate::Failure;
use crate::harness::Sample;

/// Between two looks of an open loop at what is due.
const OPEN_LOOP_STEP: Duration = Duration::from_millis(1);

/// Longer latencies count as this one.
const LONGEST: Duration = Duration::from_secs(600);

/// The monotonic time.
pub fn now() -> Instant {
    SystemClock.instant()
}

/// Returns when so much time has passed.
pub async fn sleep(time: Duration) {
    SystemClock.sleep(time).await;
}

/// Durations, to three digits.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // Bounds and precision are valid.
        let histogram = Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 3);
        Self(histogram.expect("a histogram of three digits"))
    }
}

impl Latencies {
    /// Adds one.
    pub fn add(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds all of others.
    pub fn add_all(&mut self, others: &Self) -> Result<(), Failure> {
        Ok(self.0.add(&others.0)?)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// That of which so many percent are not longer, in microseconds.
    pub fn percentile_us(&self, percent: f64) -> f64 {
        self.0.value_at_percentile(percent) as f64 / 1_000.0
    }

    /// `(percentile, microseconds)` up to p99.9, for a curve.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let percentiles = [1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9];
        percentiles.into_iter().map(|percent| (percent, self.percentile_us(percent))).collect()
    }

    /// Adds the percentiles to a sample.
    pub fn put_into(&self, sample: &mut Sample) {
        for (name, percent) in
            [("p50_us", 50.0), ("p90_us", 90.0), ("p99_us", 99.0), ("p999_us", 99.9)]
        {
            sample.insert(name, self.percentile_us(percent));
        }
    }
}

impl FromIterator<Duration> for Latencies {
    fn from_iter<T: IntoIterator<Item = Duration>>(durations: T) -> Self {
        let mut latencies = Self::default();
        durations.into_iter().for_each(|latency| latencies.add(latency));
        latencies
    }
}

/// What a loop came to.
pub struct Measured {
    /// From the first call to the last answer.
    pub took: Duration,
    /// Of every call.
    pub latencies: Latencies,
}

impl Measured {
    /// Calls a second, and the percentiles.
    pub fn sample(&self) -> Sample {
        let mut sample = Sample::from([("per_s", per_second(self.latencies.count(), self.took))]);
        self.latencies.put_into(&mut sample);
        sample
    }
}

/// How many a second.
pub fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// When a closed loop ends.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many calls.
    Calls(u64),
    /// When no call may begin any more.
    Time(Instant),
}

impl Until {
    fn is_over(self, number: u64) -> bool {
        match self {
            Self::Calls(calls) => number >= calls,
            Self::Time(end) => now() >= end,
        }
    }
}

/// So many callers, each calling again when it is answered. `call` gets the number of the call. The
/// first failure ends it.
pub async fn closed_loop<F>(
    callers: usize,
    until: Until,
    call: impl Fn(u64) -> F + Clone + Send + 'static,
) -> Result<Measured, Failure>
where
    F: Future<Output = Result<(), Failure>> + Send,
{
    let next = Arc::new(AtomicU64::new(0));
    let began = now();
    let mut tasks = JoinSet::new();
    for _ in 0..callers {
        let (next, call) = (Arc::clone(&next), call.clone());
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if until.is_over(number) {
                    return Ok::<_, Failure>(latencies);
                }
                let asked = now();
                call(number).await?;
                latencies.push(now() - asked);
            }
        });
    }
    let latencies = all(tasks).await?;
    Ok(Measured { took: now() - began, latencies: latencies.into_iter().flatten().collect() })
}

/// So many calls a second, each at its intended time, whether the ones before are answered or not.
/// Latencies count from the intended time: a call that could not even begin in time is late.
pub async fn open_loop<F>(
    rate_per_s: f64,
    calls: u64,
    call: impl Fn(u64) -> F,
) -> Result<Measured, Failure>
where
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let began = now();
    let mut tasks = JoinSet::new();
    let mut number = 0;
    while number < calls {
        let due = began + Duration::from_secs_f64(number as f64 / rate_per_s);
        if now() < due {
            sleep(OPEN_LOOP_STEP.min(due.saturating_duration_since(now()))).await;
            continue;
        }
        let called = call(number);
        tasks.spawn(async move {
            called.await?;
            Ok::<_, Failure>(now() - due)
        });
        number += 1;
    }
    let latencies = all(tasks).await?.into_iter().collect();
    Ok(Measured { took: now() - began, latencies })
}

async fn all<T: 'static>(mut tasks: JoinSet<Result<T, Failure>>) -> Result<Vec<T>, Failure> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(ended) = tasks.join_next().await {
        results.push(ended??);
    }
    Ok(results)
}

/// Asks again and again until the answer is there, and complains when that takes too long.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let deadline = now() + limit;
    loop {
        if let Some(found) = ask().await? {
            return Ok(found);
        }
        if now() > deadline {
            return Err(format!("{what}: not within {limit:?}").into());
        }
        sleep(Duration::from_millis(2)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_added() {
        let latencies: Latencies = (1..=1_000).map(Duration::from_micros).collect();
        for (percent, expected) in [(50.0, 500.0), (99.0, 990.0), (99.9, 999.0)] {
            let found = latencies.percentile_us(percent);
            assert!((found / expected - 1.0).abs() < 0.002, "p{percent}: {found}");
        }
    }
}

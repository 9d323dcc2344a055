//! The only way to time and randomness.
//!
//! Everything else in kafold gets a [`Clock`] and an [`IdGenerator`] handed in, so that a test and
//! a simulation decide what time it is.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::future::{Either, select};
use uuid::Uuid;

/// Tells the time and waits.
#[async_trait]
pub trait Clock: Send + Sync + 'static {
    /// The time of day, for what is recorded and read by people.
    fn now(&self) -> DateTime<Utc>;

    /// The monotonic time, for deadlines.
    fn instant(&self) -> Instant;

    /// Returns when `duration` has passed.
    async fn sleep(&self, duration: Duration);
}

/// Draws identifiers and jitter.
pub trait IdGenerator: Send + Sync + 'static {
    /// A new event id; a UUIDv7, so that ids sort by time.
    fn event_id(&self) -> Uuid;

    /// Evenly distributed over all values: jitter for waits.
    fn random(&self) -> u64;
}

/// The machine's own clock and tokio's timer.
#[cfg(feature = "tokio")]
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

#[cfg(feature = "tokio")]
#[expect(clippy::disallowed_methods, reason = "the one module that may read the clock and sleep")]
#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn instant(&self) -> Instant {
        Instant::now()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// Ids from the operating system's randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct RandomIds;

#[expect(clippy::disallowed_methods, reason = "the one module that may draw random ids")]
impl IdGenerator for RandomIds {
    fn event_id(&self) -> Uuid {
        Uuid::now_v7()
    }

    fn random(&self) -> u64 {
        Uuid::new_v4().as_u64_pair().1
    }
}

/// The future's output if it comes within the time, which a future that is done at once always does.
pub async fn within<F: Future>(clock: &dyn Clock, time: Duration, future: F) -> Option<F::Output> {
    match select(pin!(future), clock.sleep(time)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}

/// `base`, doubled for every attempt after the first, at most `most`, of which a random half to
/// whole is taken: callers that failed together do not come back together.
pub fn backoff(ids: &dyn IdGenerator, attempt: u32, base: Duration, most: Duration) -> Duration {
    let doubled = base.saturating_mul(1 << attempt.saturating_sub(1).min(20)).min(most);
    let half = doubled / 2;
    let spread = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).saturating_add(1);
    half + Duration::from_micros(ids.random() % spread)
}

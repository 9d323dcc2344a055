//! Feeds the stream index behind the write, and finds out from it where a partition begins.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kafold_core::clock::{backoff, within};
use kafold_core::digest::BucketDigests;
use kafold_core::index::{Advanced, IndexBatch};
use kafold_core::store::Cursor;
use kafold_core::{Clock, IdGenerator, Offset, Partition, ReadError, RecordedEvent, StreamIndex};

use crate::client::Inquirer;
use crate::config::KafkaConfig;
use crate::driver::{Driver, Message, Tenure};
use crate::fold::{Checkpoint, CommitReader, InvalidCursor, LogDiverged, Read};
use crate::gatherer::Gatherer;
use crate::inspect::{InspectError, Inspector};
use crate::partition::{DamageSite, Shared};
use crate::reader::{LogReader, ReadFailure};
use crate::tail::Tail;
use crate::writer::Input;

/// Wait before the index or the log is tried again, doubled for each failure, half of it random.
const RETRY_BASE: Duration = Duration::from_millis(100);
/// The longest such wait.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Offsets without events (claims, barriers) that are not worth a transaction of their own, unless
/// nothing else comes.
const EMPTY_OFFSETS: u64 = 1_000;
/// How long they wait for an event to go with.
const EMPTY_WAIT: Duration = Duration::from_secs(5);
/// How long a fetch for a lost index waits for records.
const FETCH_WAIT: Duration = Duration::from_millis(50);
/// Least offsets and time between two saved digests of a partition.
const SAVE_OFFSETS: u64 = 4_096;
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// Events of a partition whose heads are added up in the time in which one record is read from the
/// log. An owner begins at saved digests only where that is faster.
const EVENTS_PER_RECORD: u64 = 32;
/// How long a read of records that are known to be there may take.
const READ_WAIT: Duration = Duration::from_secs(5);

/// What the tasks that feed the index work with; one task an assigned partition.
pub(crate) struct Indexer {
    pub(crate) config: KafkaConfig,
    pub(crate) index: Arc<dyn StreamIndex>,
    pub(crate) driver: Driver,
    pub(crate) inspector: Inspector,
    pub(crate) inquirer: Arc<Inquirer>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ids: Arc<dyn IdGenerator>,
    gatherer: Gatherer,
    /// From here on all partitions count the times at which they go into the index.
    begin: Instant,
    /// Reads the log for an index that has lost its place.
    again: Mutex<Option<LogReader>>,
}

/// Why the index of a partition cannot be fed any more.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error(transparent)]
    Index(#[from] ReadError),
    #[error(transparent)]
    Cursor(#[from] InvalidCursor),
    #[error(transparent)]
    Log(#[from] LogDiverged),
    #[error("{0}")]
    Read(ReadFailure),
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error("no reader could be started: {0}")]
    Reader(rdkafka::error::KafkaError),
}

impl FeedError {
    fn is_transient(&self) -> bool {
        match self {
            // An operator can rebuild a damaged index beside a running service.
            Self::Index(_) => true,
            Self::Inspect(error) => matches!(error, InspectError::Unavailable(_)),
            Self::Read(ReadFailure::Corrupt(_)) => false,
            Self::Read(_) | Self::Reader(_) => true,
            Self::Cursor(_) | Self::Log(_) => false,
        }
    }
}

impl Indexer {
    /// The indexer, and the task that writes for it.
    pub(crate) fn new(
        config: KafkaConfig,
        index: Arc<dyn StreamIndex>,
        driver: Driver,
        inspector: Inspector,
        inquirer: Arc<Inquirer>,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (gatherer, gathering) =
            Gatherer::new(Arc::clone(&index), Arc::clone(&clock), &config.limits);
        let begin = clock.instant();
        let again = Mutex::new(None);
        let indexer =
            Self { config, index, driver, inspector, inquirer, clock, ids, gatherer, begin, again };
        (indexer, gathering)
    }

    /// Where the index stands in a partition.
    pub(crate) fn place(
        cursors: &[(Partition, Cursor)],
        partition: Partition,
    ) -> Result<Checkpoint, InvalidCursor> {
        let found = cursors.iter().find(|(of, _)| *of == partition);
        found.map_or_else(|| Ok(Checkpoint::default()), |(_, c)| Checkpoint::from_cursor(c))
    }

    /// Begins a partition at its place in the index, once that is known to be good, then feeds the
    /// index until the tenure ends.
    pub(crate) async fn run(self: Arc<Self>, shared: Arc<Shared>, tenure: Tenure) {
        let Some(place) = self.find_place(&shared, tenure).await else { return };
        let (partition, from) = (shared.partition, place.next);
        let saved = self.saved_digests(partition, &place).await;
        let (begin, tail) = match saved {
            Some((begin, digests)) => {
                (begin.clone(), Tail::with_digests(partition, begin, digests))
            }
            None => (place.clone(), Tail::new(partition, place)),
        };
        *shared.tail() = tail;
        shared.placed();
        self.driver.tell(Message::Input(partition, tenure, Input::Start(begin)));
        self.feed(&shared, tenure, from).await;
    }

    /// Returns saved digests of this log and their position at or below `place`, if beginning there
    /// is faster than adding up the heads. The heads are compared in both cases, later.
    async fn saved_digests(
        &self,
        partition: Partition,
        place: &Checkpoint,
    ) -> Option<(Checkpoint, BucketDigests)> {
        let saved = match self.index.saved_digests(partition).await {
            Ok(saved) => saved?,
            Err(error) => {
                tracing::warn!(%partition, %error, "the saved digests are not used");
                return None;
            }
        };
        let at = Checkpoint::from_cursor(&saved.at).ok()?;
        let records = place.next.0.checked_sub(at.next.0)?;
        let is_faster = records.saturating_mul(EVENTS_PER_RECORD) <= saved.events;
        (at.state.log == place.state.log && is_faster).then_some((at, saved.digests))
    }

    /// Saves the digests of a partition, if they are `offsets` above the saved ones. A failure costs
    /// the next owner time, and nothing else.
    pub(crate) async fn save_digests(&self, shared: &Shared, offsets: u64) {
        let Some((at, digests)) = shared.tail().digests_to_save(offsets) else { return };
        let saved = self.index.save_digests(shared.partition, &at.to_cursor(), &digests).await;
        if let Err(error) = saved {
            tracing::warn!(partition = %shared.partition, %error, "the digests are not saved");
        }
    }

    /// `None` when the partition was halted.
    async fn find_place(&self, shared: &Shared, tenure: Tenure) -> Option<Checkpoint> {
        for attempt in 1.. {
            let error = match self.try_place(shared.partition).await {
                Ok(place) => {
                    shared.mended(&DamageSite::Feed);
                    return Some(place);
                }
                Err(error) => error,
            };
            if !error.is_transient() {
                self.halt(shared, tenure, error);
                return None;
            }
            shared.standing().waiting = Some(error.to_string());
            if let FeedError::Index(damage @ ReadError::Diverged { .. }) = &error {
                shared.damaged(DamageSite::Feed, damage);
                let refusal = Input::Unplaced(Arc::new(error));
                self.driver.tell(Message::Input(shared.partition, tenure, refusal));
            }
            self.pause(attempt).await;
        }
        None
    }

    async fn try_place(&self, partition: Partition) -> Result<Checkpoint, FeedError> {
        let place = self.stored_place(partition).await?;
        self.inspector.check(partition, &place).await?;
        Ok(place)
    }

    async fn stored_place(&self, partition: Partition) -> Result<Checkpoint, FeedError> {
        let stored = self.index.cursor(partition).await?;
        Ok(stored.map(|cursor| Checkpoint::from_cursor(&cursor)).transpose()?.unwrap_or_default())
    }

    async fn feed(&self, shared: &Shared, tenure: Tenure, mut from: Offset) {
        let mut attempt = 0;
        let mut due: Option<Instant> = None;
        let mut save_at = self.clock.instant() + SAVE_INTERVAL;
        loop {
            // What the tail no longer holds is in the index, unless that has lost its place.
            let fed = if shared.index_lost.load(Ordering::Acquire) {
                self.look_again(shared).await
            } else if from < shared.tail().start() {
                self.feed_again(shared).await
            } else {
                // An owner which began at saved digests reads the log from below the index's position.
                self.forget_indexed(shared, tenure, from);
                let Some(delay) = self.delay(shared, from) else {
                    due = None;
                    shared.advanced.notified().await;
                    continue;
                };
                let now = self.clock.instant();
                let next = next_moment(self.begin, now, delay);
                let until = due.map_or(next, |due| due.min(next));
                if until > now {
                    due = Some(until);
                    within(&*self.clock, until - now, shared.advanced.notified()).await;
                    continue;
                }
                due = None;
                let batch = shared.tail().batch(from, self.config.limits.index_batch_events_max);
                let Some(batch) = batch else { continue };
                self.advance(shared, tenure, batch).await
            };
            match fed {
                Ok(next) => {
                    attempt = 0;
                    from = next;
                    shared.standing().index = None;
                    shared.mended(&DamageSite::Feed);
                    let now = self.clock.instant();
                    if now >= save_at {
                        self.save_digests(shared, SAVE_OFFSETS).await;
                        save_at = now + SAVE_INTERVAL;
                    }
                }
                Err(error) if error.is_transient() => {
                    attempt += 1;
                    tracing::warn!(partition = %shared.partition, %error, attempt, "index not fed");
                    self.tell_if_serious(shared, &error);
                    self.pause(attempt).await;
                }
                Err(error) => return self.halt(shared, tenure, error),
            }
        }
    }

    /// How long what the tail has from an offset on may wait for more to go with it; `None` when it
    /// has nothing. What ends the wait before is told meanwhile, and nothing else.
    fn delay(&self, shared: &Shared, from: Offset) -> Option<Duration> {
        let limits = &self.config.limits;
        let full = limits.index_batch_events_max.min(limits.tail_events_max / 2);
        let mut tail = shared.tail();
        let offsets = tail.next().next.0.saturating_sub(from.0);
        let label = shared.partition.to_string();
        metrics::gauge!("kafold_tail_events", "partition" => label.clone())
            .set(tail.events() as f64);
        metrics::gauge!("kafold_index_lag_records", "partition" => label).set(offsets as f64);
        let at_once = tail.events() >= full
            || (tail.events() == 0 && offsets >= EMPTY_OFFSETS)
            || shared.handing_over.load(Ordering::Acquire);
        let wake_at = if offsets > 0 && tail.events() > 0 { full } else { 0 };
        tail.wake_at(wake_at);
        match tail.events() {
            _ if offsets == 0 => None,
            _ if at_once => Some(Duration::ZERO),
            0 => Some(EMPTY_WAIT),
            _ => Some(limits.index_delay),
        }
    }

    /// Where the index stands then.
    async fn advance(
        &self,
        shared: &Shared,
        tenure: Tenure,
        batch: IndexBatch,
    ) -> Result<Offset, FeedError> {
        let to = batch.to.next;
        match self.gatherer.advance(batch).await? {
            Advanced::Moved => {
                self.forget_indexed(shared, tenure, to);
                Ok(to)
            }
            Advanced::Behind(cursor) => Ok(cursor.map_or(Offset(0), |cursor| cursor.next)),
        }
    }

    /// Drops from the tail, and from the writer's count, what an index at `position` has.
    fn forget_indexed(&self, shared: &Shared, tenure: Tenure, position: Offset) {
        if shared.tail().drop_below(position) {
            self.driver.tell(Message::Input(shared.partition, tenure, Input::Indexed(position)));
        }
    }

    /// Where the index stands, which a reader has found behind.
    async fn look_again(&self, shared: &Shared) -> Result<Offset, FeedError> {
        let place = self.stored_place(shared.partition).await?;
        shared.index_lost.store(false, Ordering::Release);
        Ok(place.next)
    }

    /// The index was deleted or restored: what the tail no longer holds comes from the log.
    async fn feed_again(&self, shared: &Shared) -> Result<Offset, FeedError> {
        let partition = shared.partition;
        let reader = self.reader()?;
        let place = self.stored_place(partition).await?;
        let mut from = place.next;
        tracing::warn!(%partition, %from, "the index is behind: feeding it again from the log");
        self.inspector.with_reader(reader.clone()).check(partition, &place).await?;
        let mut fold = CommitReader::new(partition, place);
        let mut events: Vec<RecordedEvent> = Vec::new();
        while from < shared.tail().start() {
            let chunk = reader.read_async(partition, fold.fold().next(), READ_WAIT).await;
            let records = chunk.map_err(FeedError::Read)?.records;
            if records.is_empty() {
                return Err(FeedError::Read(ReadFailure::timed_out()));
            }
            for record in records {
                if let Read::Commit(commit) = fold.read(record)? {
                    events.extend(commit.events.into_iter().map(Arc::unwrap_or_clone));
                }
            }
            let to = fold.fold().checkpoint();
            if to.next == from {
                continue;
            }
            let events = std::mem::take(&mut events);
            let batch = IndexBatch { partition, from, to: to.to_cursor(), events };
            from = match self.gatherer.advance(batch).await? {
                Advanced::Moved => to.next,
                // It was deleted once more.
                Advanced::Behind(_) => return Err(FeedError::Read(ReadFailure::timed_out())),
            };
        }
        reader.forget(partition);
        Ok(from)
    }

    fn reader(&self) -> Result<LogReader, FeedError> {
        let mut again = self.again.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = &*again {
            return Ok(reader.clone());
        }
        let (inquirer, clock) = (Arc::clone(&self.inquirer), Arc::clone(&self.clock));
        let topic = self.config.events_topic();
        let reader = LogReader::start(&self.config, topic, FETCH_WAIT, inquirer, clock)
            .map_err(FeedError::Reader)?;
        Ok(again.insert(reader).clone())
    }

    fn halt(&self, shared: &Shared, tenure: Tenure, error: FeedError) {
        shared.standing().index = Some(error.to_string());
        self.driver.tell(Message::Input(shared.partition, tenure, Input::Halt(Arc::new(error))));
    }

    /// Reports an error as a problem of the partition in two cases: the tail is full and accepts no
    /// commands, or the index contradicts the log and waits for an operator.
    fn tell_if_serious(&self, shared: &Shared, error: &FeedError) {
        if let FeedError::Index(error @ ReadError::Diverged { .. }) = error {
            return shared.damaged(DamageSite::Feed, error);
        }
        let is_full = shared.tail().events() >= self.config.limits.tail_events_max;
        let reason = || format!("the index cannot be fed and the tail is full: {error}");
        shared.standing().index = is_full.then(reason);
    }

    async fn pause(&self, attempt: u32) {
        self.clock.sleep(backoff(&*self.ids, attempt, RETRY_BASE, RETRY_MAX)).await;
    }
}

/// The first of the moments that come every `period` after `begin` which is later than `now`; `now`
/// itself without a period. What waits for the same moments comes together.
fn next_moment(begin: Instant, now: Instant, period: Duration) -> Instant {
    let since = now.saturating_duration_since(begin).as_micros();
    let since_moment = since.checked_rem(period.as_micros());
    let since_moment = since_moment.map(|micros| Duration::from_micros(micros as u64));
    since_moment.map_or(now, |since_moment| now + (period - since_moment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_the_same_for_all_and_none_is_later_than_a_period() {
        #[expect(clippy::disallowed_methods, reason = "any moment will do")]
        let begin = Instant::now();
        let moment = |now: u64, period: u64| {
            let millis = Duration::from_millis;
            (next_moment(begin, begin + millis(now), millis(period)) - begin).as_millis()
        };
        assert_eq!([0, 1, 199, 200, 399].map(|now| moment(now, 200)), [200, 200, 200, 400, 400]);
        assert_eq!([0, 7].map(|now| moment(now, 0)), [0, 7]);
        assert_eq!(moment(4_999, 5_000), 5_000);
    }
}

//! Given events and their times, these rows of windows: the tests of a windowed model, without a database.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::marker::PhantomData;

use kafold_core::codec;
use kafold_core::row::Merge;
use kafold_core::timeline::{self, TimelineEvent};
use kafold_core::window::Timestamp;
use kafold_core::{Partition, RecordedEvent};

use super::judge::{Judged, decode};
use super::{Fixed, Sessions, StoredRows, WindowRow, WindowRows, Windowed};
use crate::clock_step::{ClockStep, EventCounts, PartitionClock};
use crate::handler::Fault;
use crate::testing::{TestLog, batch};

/// Begins the test of a windowed model, except one of sessions, with a log that has no events.
///
/// ```
/// # use std::time::Duration;
/// # use kafold_core::window::{Timestamp, Window};
/// # use kafold_core::{DomainEvent, Recorded, Row};
/// # use kafold_projections::{Place, Windowed, stream_test};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Debug, Clone, Serialize, Deserialize, DomainEvent)]
/// # #[event(category = "search")]
/// # enum SearchEvent { #[event("search.made")] Made { query: String, at: Timestamp } }
/// # #[derive(Debug, Clone, PartialEq, Row)]
/// # struct Trending { #[row(key)] query: String, #[row(sum)] searches: i64 }
/// # impl Windowed for Trending {
/// #     const NAME: &'static str = "trending";
/// #     const WINDOW: Window =
/// #         Window::tumbling(Duration::from_secs(3_600)).grace(Duration::from_secs(300));
/// #     const PLACE: Place = Place::Spread;
/// #     type Event = SearchEvent;
/// #     fn at(event: &Recorded<SearchEvent>) -> Timestamp {
/// #         let SearchEvent::Made { at, .. } = event.event;
/// #         at
/// #     }
/// #     fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
/// #         let SearchEvent::Made { query, .. } = &event.event;
/// #         vec![query.clone()]
/// #     }
/// #     fn fold(query: &String, row: Option<Self>, _: &Recorded<SearchEvent>) -> Self {
/// #         let before = row.map_or(0, |row| row.searches);
/// #         Self { query: query.clone(), searches: before + 1 }
/// #     }
/// # }
/// let at = |text: &str| text.parse::<Timestamp>().expect("a time");
/// let car = |time: &str| SearchEvent::Made { query: "car".into(), at: at(time) };
/// stream_test::<Trending>()
///     .feed([car("2026-01-01T10:10:00Z"), car("2026-01-01T10:50:00Z")])
///     .advance_to(at("2026-01-01T11:05:00Z"))
///     .feed([car("2026-01-01T10:59:00Z")])
///     .rows([(at("2026-01-01T10:00:00Z"), Trending { query: "car".into(), searches: 2 })])
///     .late(1)
///     .closed([at("2026-01-01T10:00:00Z")]);
/// ```
#[must_use = "go on with `feed`"]
pub fn stream_test<M: Windowed>() -> StreamTest<M> {
    StreamTest::new(run::<M, Fixed>)
}

/// Begins the test of a windowed model of sessions, as [`stream_test`] does for other windows.
#[must_use = "go on with `feed`"]
pub fn session_test<M: Windowed + Merge>() -> StreamTest<M> {
    StreamTest::new(run::<M, Sessions>)
}

/// The events that a windowed model is tested with, in one partition, and their times.
///
/// The events are encoded and decoded, judged and folded as by a worker, several times: one event a batch, in larger batches
/// and all at once. A model whose rows differ between two of these runs fails its test.
#[derive(Debug, Clone)]
pub struct StreamTest<M: Windowed> {
    log: TestLog,
    /// The time of the recording of the next event, if it is not that of the event.
    recorded_at: Option<Timestamp>,
    run: Run<M>,
    model: PhantomData<fn() -> M>,
}

/// Folds the events in batches of a size.
type Run<M> = fn(&[RecordedEvent], usize) -> Result<Folded<M>, Fault>;

/// The rows after the events, the clock and the counts.
#[derive(Debug, Clone, PartialEq)]
struct Folded<M> {
    rows: Vec<WindowRow<M>>,
    step: ClockStep,
}

impl<M: Windowed> StreamTest<M> {
    fn new(run: Run<M>) -> Self {
        Self { log: TestLog::new(), recorded_at: None, run, model: PhantomData }
    }

    /// Sets the id of the stream of the events that follow. Default: `1`.
    #[must_use = "go on with `feed`"]
    pub fn stream(mut self, id: &str) -> Self {
        id.clone_into(&mut self.log.stream);
        self
    }

    /// Sets the time at which the events that follow are recorded. Default: each event is recorded at its own time, or at the
    /// latest time before.
    #[must_use = "go on with `feed`"]
    pub fn recorded_at(mut self, at: Timestamp) -> Self {
        self.recorded_at = Some(at);
        self
    }

    /// Adds events to the stream, after those fed before.
    #[must_use = "go on with `rows`"]
    #[track_caller]
    pub fn feed(mut self, events: impl IntoIterator<Item = M::Event>) -> Self {
        for event in events {
            self.log.add(&event);
            let place = self.log.events.len() - 1;
            let recorded = &self.log.events[place];
            let decoded = crate::projection::decode::<M::Event>(recorded);
            let decoded = decoded.unwrap_or_else(|error| panic!("{event:?}: {}", error.error));
            let latest = place.checked_sub(1).map(|before| &self.log.events[before].metadata);
            let latest = latest.map_or(Timestamp::MIN_UTC, |metadata| metadata.recorded_at);
            let recorded_at = match (self.recorded_at, decoded) {
                (Some(recorded_at), _) => recorded_at,
                (None, kafold_core::event_set::ReadEvent::Event(event)) => {
                    M::at(&event).max(latest)
                }
                (None, _) => latest,
            };
            self.log.events[place].metadata.recorded_at = recorded_at;
            self.log.recorded_at = recorded_at;
        }
        self
    }

    /// Adds a clock event of the model's timeline: no event before this time is to come.
    #[must_use = "go on with `rows`"]
    #[track_caller]
    pub fn advance_to(mut self, to: Timestamp) -> Self {
        let stream = timeline::stream(M::TIMELINE, Partition(0), |_| Partition(0));
        let stream = stream.unwrap_or_else(|invalid| panic!("TIMELINE: {invalid}"));
        let event = TimelineEvent::Advanced { to };
        let payload = codec::encode(&event).expect("a time is JSON");
        self.log.recorded_at = self.log.recorded_at.max(to);
        let event_type = kafold_core::DomainEvent::event_type(&event).to_string();
        self.log.add_to(stream, &event_type, &payload);
        self
    }

    /// Checks that the events lead to exactly these rows, each with the start of its window, in any order. A session
    /// starts with its first event.
    #[track_caller]
    pub fn rows(self, expected: impl IntoIterator<Item = (Timestamp, M)>) -> Self
    where
        M: Debug,
    {
        let mut expected: Vec<_> = expected.into_iter().collect();
        expected.sort_by_key(|(start, row)| (row.key(), *start));
        let mut found: Vec<_> =
            self.folded().rows.into_iter().map(|row| (row.span.start, row.row)).collect();
        found.sort_by_key(|(start, row)| (row.key(), *start));
        assert_eq!(found, expected, "rows of {} after these events", M::NAME);
        self
    }

    /// Checks the number of events that are late for all of their windows.
    #[track_caller]
    pub fn late(self, expected: i64) -> Self {
        let EventCounts { late, .. } = self.folded().step.counts;
        assert_eq!(late, expected, "late events of {}", M::NAME);
        self
    }

    /// Checks the number of events that are stamped too far after their recording.
    #[track_caller]
    pub fn future(self, expected: i64) -> Self {
        let EventCounts { future, .. } = self.folded().step.counts;
        assert_eq!(future, expected, "events of {} from the future", M::NAME);
        self
    }

    /// Checks that exactly the windows with these starts are closed, of those with rows: their rows never change again.
    #[track_caller]
    pub fn closed(self, expected: impl IntoIterator<Item = Timestamp>) -> Self {
        let Folded { rows, step } = self.folded();
        let through = M::WINDOW.closed_through(step.clock);
        let is_closed = |row: &&WindowRow<M>| {
            through.is_some_and(|through| match M::WINDOW.is_session() {
                true => row.span.end < through,
                false => row.span.end <= through,
            })
        };
        let mut found: Vec<_> = rows.iter().filter(is_closed).map(|row| row.span.start).collect();
        found.sort_unstable();
        found.dedup();
        let mut expected: Vec<_> = expected.into_iter().collect();
        expected.sort_unstable();
        assert_eq!(found, expected, "closed windows of {}", M::NAME);
        self
    }

    #[track_caller]
    fn folded(&self) -> Folded<M> {
        let events = &self.log.events;
        let run = |size| {
            let folded = (self.run)(events, size);
            folded.unwrap_or_else(|fault| panic!("{}: {}", M::NAME, fault.reason))
        };
        let one_by_one = run(1);
        for size in [2, 3, events.len().max(1)] {
            let is_same = run(size) == one_by_one;
            assert!(is_same, "{} depends on the size of a batch ({size})", M::NAME);
        }
        one_by_one
    }
}

/// Judges and folds the events as a worker does.
fn run<M: Windowed, S: WindowRows<M>>(
    events: &[RecordedEvent],
    batch_size: usize,
) -> Result<Folded<M>, Fault> {
    let mut stored: StoredRows<M> = BTreeMap::new();
    let mut total = ClockStep::default();
    for events in events.chunks(batch_size) {
        let batch = batch(events);
        let decoded = decode::<M>(&batch)?;
        let mut judged = Judged::<M>::new(M::WINDOW);
        let before = PartitionClock { clock: total.clock, late_rows: 0 };
        judged.add(&batch, &decoded, &|_| Some(before));
        let Judged { touches, steps, .. } = judged;
        S::fold_into(&S::new(M::WINDOW, touches), &mut stored)?;
        for step in steps.into_values() {
            total.clock = step.clock;
            total.newest = total.newest.max(step.newest);
            total.counts += step.counts;
        }
    }
    Ok(Folded { rows: stored.into_values().collect(), step: total })
}

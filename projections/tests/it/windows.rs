//! Windowed models, on both databases: rows, late events, what is final, and the same after a rebuild.

use crate::common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use common::{Dice, TestDatabase};
use futures_util::TryStreamExt;
use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::memory::{MemoryConfig, MemoryStore};
use kafold_core::row::Merge;
use kafold_core::testing::eventually;
use kafold_core::timeline::{self, TimelineEvent};
use kafold_core::window::{EventClock, Span, Window};
use kafold_core::{
    Clock, CommandHandler, CommandId, Commit, DomainEvent, EventSource, EventStore,
    ExpectedVersion, IdGenerator, Metadata, Partition, Position, Recorded, RecordedEvent, Row,
    StreamId, Version, codec,
};
use kafold_projections::{
    By, Control, EventCounts, GraceSeconds, LateGroup, ModelClock, Place, ProjectionConfig,
    ProjectionWorker, Projections, WindowQuery, Windowed,
};
use serde::{Deserialize, Serialize};

on_both!(
    rows_late_events_and_counts_are_those_of_the_model_in_any_batches,
    an_event_between_two_sessions_joins_both,
    a_rebuild_makes_the_same_rows_and_late_events,
    a_row_is_final_when_the_clocks_of_all_partitions_have_passed_its_window,
    clock_events_of_the_own_timeline_alone_move_the_clock,
    a_quiet_log_closes_a_window_when_it_is_due_with_one_clock_event_a_partition,
    quiet_partitions_follow_those_with_events,
    an_import_that_ends_closes_no_window_after_its_newest_event,
    an_operator_moves_the_clock_of_a_timeline,
    a_stamp_from_the_future_moves_nothing,
    late_events_are_listed_and_added_up,
    the_listed_grace_takes_every_late_event_in,
    a_row_of_a_spread_model_is_the_sum_over_the_partitions,
    rows_of_old_windows_are_deleted_and_verified,
    verify_notices_a_changed_row_and_a_changed_count,
    another_grace_is_another_definition,
);

const WAIT: Duration = Duration::from_secs(20);
const PARTITIONS: u32 = 3;
const MINUTE: i64 = 60;

const fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

type Timestamp = DateTime<Utc>;

fn time(seconds: i64) -> Timestamp {
    DateTime::from_timestamp(1_000_000_000 + seconds, 0).expect("in range")
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "search")]
enum SearchEvent {
    #[event("search.made")]
    Made { query: String, at: Timestamp },
}

fn at(event: &Recorded<SearchEvent>) -> Timestamp {
    let SearchEvent::Made { at, .. } = event.event;
    at
}

fn queries(event: &Recorded<SearchEvent>) -> Vec<String> {
    let SearchEvent::Made { query, .. } = &event.event;
    Some(query.clone()).filter(|query| !query.is_empty()).into_iter().collect()
}

/// Queries of all users, added up over the partitions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Row)]
struct Trending {
    #[row(key)]
    query: String,
    #[row(sum, index)]
    searches: i64,
    #[row(max)]
    last_at: Timestamp,
}

/// The same under a lock.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Row)]
struct SharedTrending {
    #[row(key)]
    query: String,
    searches: i64,
}

/// Searches of a user in an hour.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Row)]
struct Hourly {
    #[row(key)]
    user: String,
    searches: i64,
}

/// The visits of a user.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Row)]
struct Visits {
    #[row(key)]
    user: String,
    #[row(sum)]
    searches: i64,
}

impl Windowed for Trending {
    const NAME: &'static str = "trending";
    const WINDOW: Window = Window::hopping(minutes(60), minutes(15)).grace(minutes(5));
    const PLACE: Place = Place::Spread;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        at(event)
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        queries(event)
    }

    fn fold(query: &String, row: Option<Self>, event: &Recorded<SearchEvent>) -> Self {
        let one = Self { query: query.clone(), searches: 1, last_at: at(event) };
        row.map_or(one.clone(), |row| row.merge(one))
    }
}

impl Windowed for SharedTrending {
    const NAME: &'static str = "shared_trending";
    const WINDOW: Window = Trending::WINDOW;
    const PLACE: Place = Place::Shared;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        at(event)
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        queries(event)
    }

    fn fold(query: &String, row: Option<Self>, _: &Recorded<SearchEvent>) -> Self {
        Self { query: query.clone(), searches: 1 + row.map_or(0, |row| row.searches) }
    }
}

fn user(event: &Recorded<SearchEvent>) -> Vec<String> {
    vec![event.stream.id().to_owned()]
}

impl Windowed for Hourly {
    const NAME: &'static str = "hourly";
    const WINDOW: Window = Window::tumbling(minutes(60)).offset(minutes(7)).grace(minutes(5));
    const PLACE: Place = Place::Local;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        at(event)
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        user(event)
    }

    fn fold(user: &String, row: Option<Self>, _: &Recorded<SearchEvent>) -> Self {
        Self { user: user.clone(), searches: 1 + row.map_or(0, |row| row.searches) }
    }
}

impl Windowed for Visits {
    const NAME: &'static str = "visits";
    const WINDOW: Window = Window::session(minutes(10)).grace(minutes(5));
    const PLACE: Place = Place::Local;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        at(event)
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        user(event)
    }

    fn fold(user: &String, row: Option<Self>, _: &Recorded<SearchEvent>) -> Self {
        Self { user: user.clone(), searches: 1 + row.map_or(0, |row| row.searches) }
    }
}

/// A log of searches, with the records of each partition in their order.
struct Searches {
    store: MemoryStore,
    records: BTreeMap<Partition, Vec<Record>>,
    last: BTreeMap<Partition, Position>,
}

#[derive(Clone)]
struct Record {
    user: String,
    query: String,
    at: Timestamp,
    recorded_at: Timestamp,
}

impl Searches {
    fn new(partitions: u32) -> Self {
        let store = MemoryStore::new(MemoryConfig { partitions, ..MemoryConfig::default() });
        Self { store, records: BTreeMap::new(), last: BTreeMap::new() }
    }

    async fn append<E: DomainEvent>(
        &mut self,
        stream: &StreamId,
        event: &E,
        recorded_at: Timestamp,
    ) -> Position {
        let metadata = Metadata {
            event_id: RandomIds.event_id(),
            recorded_at,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        };
        let event = codec::new_event(event, metadata).expect("it encodes").0;
        let commit = Commit::new(CommandId(RandomIds.event_id()), vec![event]).expect("an event");
        let appended = self.store.append(stream, ExpectedVersion::Any, commit).await;
        let position = appended.expect("memory takes everything").position;
        self.last.insert(position.partition, position);
        position
    }

    /// Appends a search, recorded at `recorded` seconds.
    async fn search(&mut self, user: &str, query: &str, at: i64, recorded: i64) -> Partition {
        let (at, recorded_at) = (time(at), time(recorded));
        let stream = StreamId::new("search", user).expect("a stream");
        let event = SearchEvent::Made { query: query.to_owned(), at };
        let Position { partition, .. } = self.append(&stream, &event, recorded_at).await;
        let record = Record { user: user.to_owned(), query: query.to_owned(), at, recorded_at };
        self.records.entry(partition).or_default().push(record);
        partition
    }

    /// Appends a clock event of the timeline to each partition.
    async fn advance(&mut self, timeline: &str, to: i64) {
        let mut streams = BTreeMap::new();
        let mut n = 0;
        while streams.len() < self.store.partitions() as usize {
            let stream = StreamId::new(timeline::CATEGORY, &format!("{timeline}-{n}"));
            let stream = stream.expect("a stream");
            streams.entry(self.store.partition_of(&stream)).or_insert(stream);
            n += 1;
        }
        for stream in streams.into_values() {
            let event = TimelineEvent::Advanced { to: time(to) };
            self.append(&stream, &event, time(to)).await;
        }
    }

    /// A random log: three users a partition on average, some events late, some from the future, some without query.
    async fn random(&mut self, dice: &mut Dice, count: u64) {
        let mut now = 0;
        for _ in 0..count {
            now += dice.roll(6 * MINUTE as u64) as i64;
            let delay = match dice.roll(10) {
                0 => 5 * MINUTE + dice.roll(90 * MINUTE as u64) as i64,
                1 => -(dice.roll(3 * 3_600) as i64),
                _ => dice.roll(4 * MINUTE as u64) as i64,
            };
            let user = format!("u{}", dice.roll(9));
            let query = ["", "car", "dvd", "map"][dice.roll(4) as usize];
            self.search(&user, query, now - delay, now).await;
        }
    }

    async fn applied(&self, projections: &Projections, name: &str) {
        for position in self.last.values() {
            let applied = projections.wait_for_position(name, *position, WAIT).await;
            applied.expect("it is applied");
        }
    }

    /// The events in time of each partition and their clock, and the counts of the model, by the rules of
    /// `kafold_core::window` alone.
    fn judged<M: Windowed<Event = SearchEvent>>(
        &self,
        keys: fn(&Record) -> Option<String>,
    ) -> (Vec<(Record, EventClock)>, EventCounts) {
        let (mut in_time, mut counts) = (Vec::new(), EventCounts::default());
        for records in self.records.values() {
            let mut clock = EventClock::default();
            for record in records {
                let before = clock;
                clock = clock.after(&M::WINDOW, record.at, record.recorded_at);
                if M::WINDOW.is_future(record.at, record.recorded_at) {
                    counts.future += 1;
                    counts.late_rows += 1;
                    continue;
                }
                if keys(record).is_none() {
                    counts.keyless += 1;
                    continue;
                }
                let late = match M::WINDOW.is_session() {
                    true => vec![M::WINDOW.is_late_for_sessions(record.at, before)],
                    false => {
                        let is_late = |span| M::WINDOW.is_late(span, before);
                        M::WINDOW.spans(record.at).map(is_late).collect()
                    }
                };
                let late_windows = late.iter().filter(|late| **late).count();
                counts.late_windows += late_windows as i64;
                counts.late_rows += i64::from(late_windows > 0);
                match late_windows == late.len() {
                    true => counts.late += 1,
                    false => {
                        counts.in_windows += 1;
                        in_time.push((record.clone(), before));
                    }
                }
            }
        }
        (in_time, counts)
    }

    /// The number of searches by window and key.
    fn windows<M: Windowed<Event = SearchEvent>>(
        &self,
        keys: fn(&Record) -> Option<String>,
    ) -> BTreeMap<(Span, String), i64> {
        let mut rows = BTreeMap::new();
        for (record, clock) in self.judged::<M>(keys).0 {
            let spans = M::WINDOW.spans(record.at).filter(|span| !M::WINDOW.is_late(*span, clock));
            for span in spans {
                *rows.entry((span, keys(&record).expect("in time"))).or_default() += 1;
            }
        }
        rows
    }
}

fn by_query(record: &Record) -> Option<String> {
    Some(record.query.clone()).filter(|query| !query.is_empty())
}

fn by_user(record: &Record) -> Option<String> {
    Some(record.user.clone())
}

fn worker(searches: &Searches, database: &TestDatabase, batch: usize) -> ProjectionWorker {
    let config = ProjectionConfig {
        batch_events_max: batch,
        sqlite_batch_events_max: batch,
        ..ProjectionConfig::default()
    };
    ProjectionWorker::new(Arc::new(searches.store.clone()), database.database.clone())
        .config(config)
}

fn all(worker: ProjectionWorker) -> Projections {
    let worker = worker.with_windows::<Trending>().with_windows::<SharedTrending>();
    worker.with_windows::<Hourly>().with_sessions::<Visits>().spawn()
}

async fn run_through(searches: &Searches, database: &TestDatabase, batch: usize) {
    let projections = all(worker(searches, database, batch));
    for name in ["trending", "shared_trending", "hourly", "visits"] {
        searches.applied(&projections, name).await;
    }
    projections.shutdown().await;
}

fn query<M: Windowed>(database: &TestDatabase) -> WindowQuery<M> {
    WindowQuery::new(database.database.clone())
}

/// The number of searches by window and key, as the model has them.
async fn stored<M: Windowed>(
    database: &TestDatabase,
    entry: fn(M) -> (String, i64),
) -> BTreeMap<(Span, String), i64> {
    let rows = query::<M>(database).all(1_000_000).await.expect("readable");
    let entry = |(span, row)| {
        let (key, searches) = entry(row);
        ((span, key), searches)
    };
    rows.into_iter().map(|row| entry((row.span, row.row))).collect()
}

async fn trending(database: &TestDatabase) -> BTreeMap<(Span, String), i64> {
    stored::<Trending>(database, |row| (row.query, row.searches)).await
}

async fn hourly(database: &TestDatabase) -> BTreeMap<(Span, String), i64> {
    stored::<Hourly>(database, |row| (row.user, row.searches)).await
}

async fn visits(database: &TestDatabase) -> BTreeMap<(Span, String), i64> {
    stored::<Visits>(database, |row| (row.user, row.searches)).await
}

/// The sessions of each user, from the times of the events in time alone.
fn sessions(searches: &Searches) -> BTreeMap<(Span, String), i64> {
    let mut times: BTreeMap<String, Vec<Timestamp>> = BTreeMap::new();
    for (record, _) in searches.judged::<Visits>(by_user).0 {
        times.entry(record.user).or_default().push(record.at);
    }
    let mut sessions = BTreeMap::new();
    for (user, mut times) in times {
        times.sort_unstable();
        let is_near = |one: &Timestamp, other: &Timestamp| *other - *one <= TimeDelta::minutes(10);
        for session in times.chunk_by(is_near) {
            let span = Span { start: session[0], end: session[session.len() - 1] };
            sessions.insert((span, user.clone()), session.len() as i64);
        }
    }
    sessions
}

async fn rows_late_events_and_counts_are_those_of_the_model_in_any_batches(
    database: &TestDatabase,
) {
    let mut searches = Searches::new(PARTITIONS);
    let mut dice = Dice::new(17);
    for batch in [1, 7, 1_000] {
        searches.random(&mut dice, 150).await;
        run_through(&searches, database, batch).await;
        let expected = searches.windows::<Trending>(by_query);
        assert_eq!(trending(database).await, expected, "batches of {batch}");
        let shared = stored::<SharedTrending>(database, |row| (row.query, row.searches)).await;
        assert_eq!(shared, expected, "batches of {batch}");
        assert_eq!(hourly(database).await, searches.windows::<Hourly>(by_user));
        assert_eq!(visits(database).await, sessions(&searches));
    }
    let counts = query::<Trending>(database).counts().await.expect("readable");
    assert_eq!(counts, searches.judged::<Trending>(by_query).1);
    assert_eq!(counts.events(), 450);
    assert!(counts.late > 0 && counts.future > 0 && counts.keyless > 0, "{counts:?}");
    let counts = query::<Visits>(database).counts().await.expect("readable");
    assert_eq!(counts, searches.judged::<Visits>(by_user).1);
    assert_eq!(counts.events(), 450);
    let listed = "SELECT COUNT(*) FROM kafold_late_event WHERE projection = 'visits'";
    assert_eq!(database.number(listed).await, counts.late + counts.future);
}

async fn an_event_between_two_sessions_joins_both(database: &TestDatabase) {
    let mut searches = Searches::new(1);
    searches.search("ada", "car", 0, 0).await;
    searches.search("ada", "car", 20 * MINUTE, 20 * MINUTE).await;
    searches.search("bob", "car", 10 * MINUTE, 20 * MINUTE).await;
    run_through(&searches, database, 10).await;
    let visits_of = async |user: &str| {
        let rows = query::<Visits>(database).of_key(user, 10).await.expect("readable");
        rows.into_iter().map(|row| (row.span, row.row.searches)).collect::<Vec<_>>()
    };
    assert_eq!(visits_of("ada").await.len(), 2);
    // The gap is included on both sides.
    searches.search("ada", "car", 10 * MINUTE, 21 * MINUTE).await;
    run_through(&searches, database, 10).await;
    let whole = Span { start: time(0), end: time(20 * MINUTE) };
    assert_eq!(visits_of("ada").await, [(whole, 3)]);
    assert_eq!(visits_of("bob").await.len(), 1);
}

async fn a_rebuild_makes_the_same_rows_and_late_events(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    searches.random(&mut Dice::new(4), 300).await;
    let projections = all(worker(&searches, database, 5));
    let names = ["trending", "shared_trending", "hourly", "visits"];
    for name in names {
        searches.applied(&projections, name).await;
    }
    let rows = (trending(database).await, hourly(database).await, visits(database).await);
    let listed = |generation| {
        let sql = match generation {
            1 => {
                "SELECT CAST(COALESCE(SUM(version * 7 + windows + \"offset\"), 0) AS BIGINT) FROM kafold_late_event \
                  WHERE generation = 1"
            }
            _ => {
                "SELECT CAST(COALESCE(SUM(version * 7 + windows + \"offset\"), 0) AS BIGINT) FROM kafold_late_event \
                  WHERE generation = 2"
            }
        };
        database.number(sql)
    };
    let late = listed(1).await;
    assert!(late > 0);
    let control = Control::new(database.database.clone());
    for name in names {
        control
            .rebuild(name, false, By { actor: "test", reason: None })
            .await
            .expect("it may be rebuilt");
    }
    let switched = "SELECT COUNT(*) FROM kafold_projection WHERE live_generation = 2";
    eventually("all are switched", async || database.number(switched).await == 4).await;
    projections.shutdown().await;
    let again = (trending(database).await, hourly(database).await, visits(database).await);
    assert_eq!(again, rows);
    assert_eq!(listed(2).await, late);
    let counts = query::<Trending>(database).counts().await.expect("readable");
    assert_eq!(counts, searches.judged::<Trending>(by_query).1);
}

async fn a_row_is_final_when_the_clocks_of_all_partitions_have_passed_its_window(
    database: &TestDatabase,
) {
    let mut searches = Searches::new(2);
    let mut users = BTreeMap::new();
    for n in 0..20 {
        let user = format!("u{n}");
        users
            .entry(searches.store.partition_of(&StreamId::new("search", &user).expect("valid")))
            .or_insert(user);
    }
    let [one, other] = [&users[&Partition(0)], &users[&Partition(1)]];
    let last_of_window = 52 * MINUTE - time(0).timestamp() % 3_600;
    let query = query::<Hourly>(database);
    let is_final = async |user: &str| {
        let rows = query.of_key(user, 10).await.expect("readable");
        rows.iter().map(|row| row.is_final).collect::<Vec<_>>()
    };
    let hour = 60 * MINUTE;
    searches.search(one, "car", last_of_window, last_of_window).await;
    searches.search(one, "car", last_of_window + 2 * hour, last_of_window + 2 * hour).await;
    run_through(&searches, database, 10).await;
    assert_eq!(query.closed_through().await.expect("readable"), None, "no event of a partition");
    assert_eq!(is_final(one).await, [false, false]);
    searches.search(other, "car", last_of_window, last_of_window).await;
    run_through(&searches, database, 10).await;
    assert_eq!(is_final(one).await, [false, false]);
    let windows = query.windows(10).await.expect("readable");
    assert_eq!(windows.len(), 2);
    assert!(windows[0].span.start > windows[1].span.start && !windows[1].is_final);
    searches.search(other, "car", last_of_window + hour, last_of_window + hour).await;
    run_through(&searches, database, 10).await;
    assert_eq!(is_final(one).await, [true, false]);
    assert_eq!(is_final(other).await, [true, false]);
    let closed = query.closed_through().await.expect("readable");
    assert_eq!(closed, Some(time(last_of_window + hour) - TimeDelta::minutes(5)));
}

async fn clock_events_of_the_own_timeline_alone_move_the_clock(database: &TestDatabase) {
    let mut searches = Searches::new(2);
    searches.search("ada", "car", 0, 0).await;
    searches.advance("other", 10_000).await;
    run_through(&searches, database, 10).await;
    let query = query::<Hourly>(database);
    assert_eq!(query.closed_through().await.expect("readable"), None);
    searches.advance("hourly", 20_000).await;
    run_through(&searches, database, 10).await;
    let closed = query.closed_through().await.expect("readable");
    assert_eq!(closed, Some(time(20_000 - 5 * MINUTE)));
    let rows = query.of_key("ada", 10).await.expect("readable");
    assert!(rows[0].is_final);
    // An event of the closed window is late.
    searches.search("ada", "car", 1, 20_001).await;
    run_through(&searches, database, 10).await;
    assert_eq!(query.of_key("ada", 10).await.expect("readable"), rows);
    assert_eq!(query.counts().await.expect("readable").late, 1);
}

/// A clock that begins at a time of the test and runs faster than the machine's.
struct FastClock {
    begin: Instant,
    wall: Timestamp,
    factor: u32,
}

impl FastClock {
    fn at(seconds: i64) -> Arc<Self> {
        Arc::new(Self { begin: SystemClock.instant(), wall: time(seconds), factor: 20 })
    }

    fn passed(&self) -> Duration {
        self.begin.elapsed() * self.factor
    }
}

#[async_trait]
impl Clock for FastClock {
    fn now(&self) -> Timestamp {
        self.wall + self.passed()
    }

    fn instant(&self) -> Instant {
        self.begin + self.passed()
    }

    async fn sleep(&self, duration: Duration) {
        SystemClock.sleep(duration / self.factor).await;
    }
}

/// Runs the sessions of users, and appends clock events.
fn closing(searches: &Searches, database: &TestDatabase, clock: &Arc<FastClock>) -> Projections {
    let store: Arc<dyn EventStore> = Arc::new(searches.store.clone());
    let handler = CommandHandler::with_parts(store, clock.clone(), Arc::new(RandomIds));
    worker(searches, database, 10)
        .clock(clock.clone(), Arc::new(RandomIds))
        .timelines(handler)
        .with_sessions::<Visits>()
        .spawn()
}

/// Returns the times of the clock events of a timeline, by partition.
async fn clock_events(searches: &Searches, timeline: &str) -> Vec<Vec<Timestamp>> {
    let mut all = Vec::new();
    for partition in (0..searches.store.partitions()).map(Partition) {
        let of = |stream: &StreamId| searches.store.partition_of(stream);
        let stream = timeline::stream(timeline, partition, of).expect("a stream");
        let read = searches.store.read(&stream, Version::EMPTY);
        let events: Vec<RecordedEvent> = read.try_collect().await.expect("readable");
        let to = |event: &RecordedEvent| {
            let TimelineEvent::Advanced { to } = codec::decode_recorded(event).expect("ours").event;
            to
        };
        all.push(events.iter().map(to).collect());
    }
    all
}

async fn closed_through(database: &TestDatabase) -> Option<Timestamp> {
    query::<Visits>(database).closed_through().await.expect("readable")
}

/// Two gaps and the grace of [`Visits`].
const CLOSES_AFTER: i64 = 25 * MINUTE;

async fn a_quiet_log_closes_a_window_when_it_is_due_with_one_clock_event_a_partition(
    database: &TestDatabase,
) {
    let mut searches = Searches::new(PARTITIONS);
    searches.search("ada", "car", 0, 1).await;
    // The session is due 20 s after the start; two processes look at the same time.
    let clock = FastClock::at(CLOSES_AFTER - 20);
    let processes = [(); 2].map(|()| closing(&searches, database, &clock));
    eventually("the session is final", async || closed_through(database).await > Some(time(0)))
        .await;
    let events = clock_events(&searches, "visits").await;
    for (partition, events) in events.iter().enumerate() {
        assert_eq!(events.len(), 1, "of partition {partition}: {events:?}");
        assert!(events[0] > time(CLOSES_AFTER) && events[0] <= clock.now(), "{events:?}");
    }
    let rows = query::<Visits>(database).of_key("ada", 10).await.expect("readable");
    assert!(rows[0].is_final, "{rows:?}");
    // Nothing is open any more, and nothing more is appended.
    clock.sleep(Duration::from_secs(30)).await;
    assert_eq!(clock_events(&searches, "visits").await, events);
    for process in processes {
        process.shutdown().await;
    }
}

async fn quiet_partitions_follow_those_with_events(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    let quiet = searches.search("ada", "car", 0, 0).await;
    let clock = FastClock::at(CLOSES_AFTER + 100);
    let projections = closing(&searches, database, &clock);
    // A partition in which an event comes each second.
    let busy = ["bob", "cem", "dan", "eve", "fay"].into_iter().find(|user| {
        let stream = StreamId::new("search", user).expect("a stream");
        searches.store.partition_of(&stream) != quiet
    });
    let busy = busy.expect("another partition");
    let mut seconds = CLOSES_AFTER;
    let deadline = SystemClock.instant() + WAIT;
    while closed_through(database).await <= Some(time(0)) {
        assert!(SystemClock.instant() < deadline, "the session of ada is not closed");
        seconds += 1;
        searches.search(busy, "dvd", seconds, seconds + 60).await;
        clock.sleep(Duration::from_secs(1)).await;
    }
    let events = clock_events(&searches, "visits").await;
    let stream = StreamId::new("search", busy).expect("a stream");
    for (partition, events) in (0..).map(Partition).zip(&events) {
        let is_busy = partition == searches.store.partition_of(&stream);
        assert_eq!(events.is_empty(), is_busy, "{partition}: {events:?}");
        assert!(
            events.iter().all(|to| *to <= time(seconds)),
            "no later than the events: {events:?}"
        );
    }
    searches.applied(&projections, "visits").await;
    let counts = query::<Visits>(database).counts().await.expect("readable");
    assert_eq!((counts.late, counts.future), (0, 0));
    projections.shutdown().await;
}

async fn an_import_that_ends_closes_no_window_after_its_newest_event(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    // Events of the past, recorded a year later.
    let later = 365 * 86_400;
    searches.search("ada", "car", 0, later).await;
    searches.search("bob", "dvd", CLOSES_AFTER + 60, later + 1).await;
    let clock = FastClock::at(later + 10);
    let begin = clock.instant();
    let projections = closing(&searches, database, &clock);
    eventually("the session of ada is final", async || {
        closed_through(database).await > Some(time(0))
    })
    .await;
    assert!(clock.instant() - begin >= Duration::from_secs(60), "a pause of an import is no end");
    let newest = time(CLOSES_AFTER + 60);
    let events = clock_events(&searches, "visits").await;
    assert!(events.iter().flatten().all(|to| *to == newest), "{events:?}");
    let is_final = async |user| {
        let rows = query::<Visits>(database).of_key(user, 10).await.expect("readable");
        rows[0].is_final
    };
    assert!(is_final("ada").await && !is_final("bob").await);
    projections.shutdown().await;
}

async fn an_operator_moves_the_clock_of_a_timeline(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    searches.search("ada", "car", 0, 1).await;
    let projections = closing(&searches, database, &FastClock::at(CLOSES_AFTER - 60));
    let control = Control::new(database.database.clone());
    let by = By { actor: "me", reason: None };
    let to = time(200);
    eventually("the model is registered", async || {
        control.advance_clock("visits", to, by).await.is_ok()
    })
    .await;
    let clock = async || control.clocks().await.expect("readable").swap_remove(0);
    eventually("the clocks of all partitions are there", async || clock().await.clock == Some(to))
        .await;
    let ModelClock { name, timeline, closed_through, without_clock, advance_to, .. } =
        clock().await;
    assert_eq!((name.as_str(), timeline.as_str(), without_clock), ("visits", "visits", 0));
    assert_eq!(closed_through, Some(to - TimeDelta::seconds(CLOSES_AFTER)));
    assert_eq!(advance_to, None, "it is done");
    assert_eq!(clock_events(&searches, "visits").await, vec![vec![to]; PARTITIONS as usize]);

    let refused = async |timeline, to| {
        let refused = control.advance_clock(timeline, to, by).await;
        refused.expect_err("is refused").to_string()
    };
    let unknown = refused("views", to).await;
    assert_eq!(unknown, "no windowed model has the timeline \"views\"; timelines are: visits");
    let future = refused("visits", SystemClock.now() + TimeDelta::hours(1)).await;
    assert!(future.contains("is after the present"), "{future}");
    projections.shutdown().await;
}

async fn a_stamp_from_the_future_moves_nothing(database: &TestDatabase) {
    let mut searches = Searches::new(1);
    searches.search("ada", "car", 0, 0).await;
    searches.search("broken", "car", 100 * 365 * 86_400, 10).await;
    searches.search("ada", "car", 20, 20).await;
    run_through(&searches, database, 10).await;
    let query = query::<Hourly>(database);
    let counts = query.counts().await.expect("readable");
    assert_eq!((counts.in_windows, counts.late, counts.future), (2, 0, 1));
    let closed = query.closed_through().await.expect("readable");
    assert_eq!(closed, Some(time(20 - 5 * MINUTE)));
    let named = "SELECT COUNT(*) FROM kafold_late_event \
                 WHERE projection = 'hourly' AND kind = 'future' AND stream_id = 'broken'";
    assert_eq!(database.number(named).await, 1);
}

async fn late_events_are_listed_and_added_up(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    searches.random(&mut Dice::new(11), 400).await;
    run_through(&searches, database, 100).await;
    let control = Control::new(database.database.clone());
    let counts = searches.judged::<Trending>(by_query).1;
    let summary = control.late_summary("trending").await.expect("readable");
    let added = (summary.late, summary.late_windows, summary.future, summary.unlisted);
    assert_eq!(added, (counts.late, counts.late_windows, counts.future, 0));
    let of = |groups: &[LateGroup]| groups.iter().map(|group| group.late + group.future).sum();
    assert_eq!(
        (of(&summary.by_hour), of(&summary.by_stream)),
        (counts.late_rows, counts.late_rows)
    );

    let all = control.late_events("trending", None, None, 10_000).await.expect("readable");
    assert_eq!(all.len() as i64, counts.late_rows);
    let mut graces: Vec<_> = all.iter().filter_map(|event| event.grace_s).collect();
    graces.sort_unstable();
    assert_eq!(graces.len() as i64, counts.late);
    let takes_in = |percent: usize| {
        let grace = graces[(graces.len() * percent).div_ceil(100) - 1];
        Some((grace + 999_999) / 1_000_000)
    };
    let GraceSeconds { p50, p90, p99, p100 } = summary.grace_s;
    assert_eq!([p50, p90, p99, p100], [50, 90, 99, 100].map(takes_in));

    let one: StreamId = all[0].stream.parse().expect("a stream");
    let of_one = control.late_events("trending", Some(&one), None, 10_000).await.expect("readable");
    let expected: Vec<_> = all.iter().filter(|event| event.stream == one.as_str()).collect();
    assert_eq!(of_one.iter().collect::<Vec<_>>(), expected);
    let since: Timestamp = all[all.len() / 2].at.parse().expect("a time");
    let later = control.late_events("trending", None, Some(since), 10_000).await;
    let later = later.expect("readable");
    let expected: Vec<_> = all
        .iter()
        .filter(|event| event.at.parse::<Timestamp>().expect("a time") >= since)
        .collect();
    assert_eq!(later.iter().collect::<Vec<_>>(), expected);
    assert_eq!(control.late_events("trending", None, None, 3).await.expect("readable"), all[..3]);
}

async fn the_listed_grace_takes_every_late_event_in(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    searches.random(&mut Dice::new(9), 400).await;
    run_through(&searches, database, 100).await;
    for (name, is_session) in [("trending", false), ("visits", true)] {
        let sql = match is_session {
            false => "SELECT MAX(grace_us) FROM kafold_late_event WHERE projection = 'trending'",
            true => "SELECT MAX(grace_us) FROM kafold_late_event WHERE projection = 'visits'",
        };
        let grace = Duration::from_micros(database.number(sql).await.unsigned_abs());
        let window = if is_session { Visits::WINDOW } else { Trending::WINDOW };
        for (grace, is_enough) in [(grace, true), (grace - Duration::from_micros(1), false)] {
            let window = window.with_grace(grace);
            let late = searches.records.values().map(|records| {
                let mut clock = EventClock::default();
                let late = records.iter().filter(|record| {
                    let before = clock;
                    clock = clock.after(&window, record.at, record.recorded_at);
                    let has_key = is_session || !record.query.is_empty();
                    let is_late = match is_session {
                        true => window.is_late_for_sessions(record.at, before),
                        false => window.spans(record.at).all(|span| window.is_late(span, before)),
                    };
                    has_key && is_late && !window.is_future(record.at, record.recorded_at)
                });
                late.count()
            });
            assert_eq!(late.sum::<usize>() == 0, is_enough, "{name} with a grace of {grace:?}");
        }
    }
}

async fn a_row_of_a_spread_model_is_the_sum_over_the_partitions(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    let mut partitions = BTreeSet::new();
    for n in 0..30 {
        partitions.insert(searches.search(&format!("u{n}"), "car", n, n).await);
        searches.search(&format!("u{n}"), if n < 10 { "dvd" } else { "map" }, n, n).await;
    }
    assert_eq!(partitions.len(), PARTITIONS as usize);
    run_through(&searches, database, 10).await;
    let query = query::<Trending>(database);
    let newest = query.windows(1).await.expect("readable")[0].span;
    let top = query.top(newest.start, Trending::searches, 2).await.expect("readable");
    let top: Vec<_> = top.into_iter().map(|row| row.row).collect();
    let row = |query: &str, searches, last| Trending {
        query: query.to_owned(),
        searches,
        last_at: time(last),
    };
    assert_eq!(top, [row("car", 30, 29), row("map", 20, 29)]);
    let dvd = query.get(newest.start, "dvd").await.expect("readable").expect("a row");
    assert_eq!(dvd.row, row("dvd", 10, 9));
    let all = query.window(newest.start, 10).await.expect("readable");
    assert_eq!(all.len(), 3);
    let rows = "SELECT COUNT(*) FROM trending__g1 WHERE query = 'car'";
    assert_eq!(database.number(rows).await, 4 * i64::from(PARTITIONS));
    assert_eq!(database.number("SELECT COUNT(*) FROM trending").await, 12);
}

/// As [`Hourly`], with rows that are kept for three hours.
#[derive(Debug, Clone, PartialEq, Row)]
struct KeptHourly {
    #[row(key)]
    user: String,
    searches: i64,
}

impl Windowed for KeptHourly {
    const NAME: &'static str = "kept_hourly";
    const WINDOW: Window = Hourly::WINDOW.keep(minutes(180));
    const PLACE: Place = Place::Local;
    type Event = SearchEvent;

    fn at(event: &Recorded<SearchEvent>) -> Timestamp {
        at(event)
    }

    fn keys(event: &Recorded<SearchEvent>) -> Vec<String> {
        user(event)
    }

    fn fold(user: &String, row: Option<Self>, event: &Recorded<SearchEvent>) -> Self {
        let row = row.map(|Self { user, searches }| Hourly { user, searches });
        let Hourly { user, searches } = Hourly::fold(user, row, event);
        Self { user, searches }
    }
}

async fn rows_of_old_windows_are_deleted_and_verified(database: &TestDatabase) {
    let mut searches = Searches::new(2);
    for hour in 0..12 {
        for user in 0..10 {
            let at = hour * 60 * MINUTE + user;
            searches.search(&format!("u{user}"), "car", at, at).await;
        }
    }
    let expected: BTreeMap<_, _> = searches.windows::<KeptHourly>(by_user);
    let least = searches.records.values().map(|records| {
        records.iter().fold(EventClock::default(), |clock, record| {
            clock.after(&KeptHourly::WINDOW, record.at, record.recorded_at)
        })
    });
    let least = kafold_core::window::least_clock(least);
    let before = KeptHourly::WINDOW.expired_before(least).expect("kept for a while");
    let expected: BTreeMap<_, _> =
        expected.into_iter().filter(|((span, _), _)| span.end >= before).collect();
    let projections = worker(&searches, database, 50).with_windows::<KeptHourly>().spawn();
    searches.applied(&projections, "kept_hourly").await;
    let kept = async || stored::<KeptHourly>(database, |row| (row.user, row.searches)).await;
    eventually("old windows are deleted", async || kept().await == expected).await;
    projections.shutdown().await;
    let verified = worker(&searches, database, 50).with_windows::<KeptHourly>();
    let verified = verified.verify("kept_hourly", &|_| ()).await.expect("it is verified");
    assert!(verified.is_equal(), "{verified:?}");
    assert_eq!(verified.rows, expected.len() as i64);
}

async fn verify_notices_a_changed_row_and_a_changed_count(database: &TestDatabase) {
    let mut searches = Searches::new(PARTITIONS);
    searches.random(&mut Dice::new(5), 200).await;
    run_through(&searches, database, 30).await;
    let verify = async || {
        let worker = worker(&searches, database, 30).with_windows::<Trending>();
        let worker = worker.with_sessions::<Visits>();
        let trending = worker.verify("trending", &|_| ()).await.expect("it is verified");
        let visits = worker.verify("visits", &|_| ()).await.expect("it is verified");
        (trending, visits)
    };
    let (trending, visits) = verify().await;
    assert!(trending.is_equal() && visits.is_equal(), "{trending:?} {visits:?}");
    assert_eq!((trending.events, visits.events), (200, 200));
    database.run("UPDATE visits__g1 SET searches = searches + 1").await;
    database
        .run("UPDATE kafold_checkpoint SET late = late + 1 WHERE projection = 'trending'")
        .await;
    let (trending, visits) = verify().await;
    assert!(!trending.is_equal() && trending.differences.is_empty(), "{trending:?}");
    assert!(!visits.is_equal() && !visits.differences.is_empty(), "{visits:?}");
    let late = "SELECT COUNT(*) FROM kafold_late_event WHERE generation = 0";
    assert_eq!(database.number(late).await, 0, "verification leaves nothing behind");
}

async fn another_grace_is_another_definition(database: &TestDatabase) {
    let mut searches = Searches::new(1);
    searches.search("ada", "car", 0, 0).await;
    run_through(&searches, database, 10).await;
    let grace = Duration::from_secs(6 * 3_600);
    let changed = worker(&searches, database, 10).grace(grace).with_windows::<Hourly>().spawn();
    let reason = common::stopped(&changed).await;
    assert!(reason.contains("grace 21600 s") && reason.contains("grace 300 s"), "{reason}");
    assert!(reason.contains("`kafold projections rebuild hourly`"), "{reason}");
    let control = Control::new(database.database.clone());
    let by = By { actor: "test", reason: None };
    control.rebuild("hourly", false, by).await.expect("it may be rebuilt");
    let switched = "SELECT COUNT(*) FROM kafold_projection WHERE live_generation = 2";
    eventually("it is switched", async || database.number(switched).await == 1).await;
    changed.shutdown().await;
    let closed = query::<Hourly>(database).closed_through().await.expect("readable");
    assert_eq!(closed, Some(time(0) - TimeDelta::hours(6)));
}

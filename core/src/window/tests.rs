//! The rules of time, attacked with random histories. The first run of a history is live: it appends clock events. The
//! other runs rebuild from the log that came of it, with other interleavings, sizes of batches and kills. What must hold:
//!
//! - A: rows, late events and sessions are the same in all runs.
//! - B: a closed window or session never changes.
//! - C: what a reactor gets, timers included, is the same in each partition.
//! - D: in a partition whose events are all recorded within the grace no event is late, whatever stamps run ahead.
//! - E: when nothing more comes, every window that ends the grace before the newest clock is closed; of a live stream
//!   every window that ends the grace before now, and every timer fires that is due.
//! - F: in a partition without clock events an event within the grace of the newest credible stamp before it is not
//!   late.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;

use super::*;

const PARTITIONS: usize = 3;
const KEYS: [&str; 2] = ["a", "b"];
const TIMER: i64 = 50;
/// Histories of a test run.
const SEEDS: u64 = 10_000;
/// One unit of the histories' times: with it, the grace of 30 units is [`AHEAD_MIN`].
const UNIT: i64 = 2;
const SIZE: i64 = 60;
const GRACE: i64 = 30;
const GAP: i64 = 40;
const QUIET: i64 = 15;

const fn units(units: i64) -> Duration {
    Duration::from_secs((units * UNIT) as u64)
}

const WINDOW: Window = Window::tumbling(units(SIZE)).grace(units(GRACE));
const SESSIONS: Window = Window::session(units(GAP)).grace(units(GRACE));

fn time(units: i64) -> Timestamp {
    DateTime::from_timestamp(units * UNIT, 0).expect("in range")
}

fn chance(random: &mut Rng, percent: u32) -> bool {
    random.u32(0..100) < percent
}

fn one_of<T: Copy>(random: &mut Rng, all: &[T]) -> T {
    all[random.usize(0..all.len())]
}

/// The kinds of records of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Event(&'static str),
    Clock,
    OtherClock,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    kind: Kind,
    at: Timestamp,
    recorded_at: Timestamp,
}

/// Returns the records of a history with their partitions, in the order of their recording.
fn history(random: &mut Rng) -> Vec<(usize, Record)> {
    let is_historic = chance(random, 30);
    let (mut now, pace) = (1_000, if is_historic { one_of(random, &[100, 1]) } else { 1 });
    let mut busy: Vec<i64> = (0..PARTITIONS).map(|_| one_of(random, &[0, 1, 1, 5])).collect();
    if busy.iter().all(|weight| *weight == 0) {
        busy[0] = 1;
    }
    let mut records = Vec::new();
    for _ in 0..10 + random.i64(0..50) {
        now += if chance(random, 90) { one_of(random, &[1, 3, 10, 25, 80]) } else { 400 };
        let mut drawn = random.i64(0..busy.iter().sum());
        let partition = busy.iter().position(|weight| {
            drawn -= weight;
            drawn < 0
        });
        let honest = if is_historic { -5_000 + (now - 1_000) * pace } else { now }.min(now);
        let delay =
            if chance(random, 85) { random.i64(0..=GRACE) } else { GRACE + 1 + random.i64(0..270) };
        let mut at = honest - delay;
        if chance(random, 4) {
            // The device's clock runs ahead. A stamp between the replayed time and now cannot be told from a good one.
            at = now + one_of(random, &[5, 50, 100_000]);
            if is_historic && at <= now + GRACE {
                at = honest;
            }
        }
        let kind =
            if chance(random, 5) { Kind::OtherClock } else { Kind::Event(one_of(random, &KEYS)) };
        let record = Record { kind, at: time(at), recorded_at: time(now) };
        records.push((partition.expect("one is drawn"), record));
    }
    records
}

type Row = (Span, &'static str);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Handed {
    Event(&'static str, Timestamp),
    Timer(&'static str, Timestamp),
}

/// The part of a run's state that must be the same in all runs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    rows: BTreeMap<Row, u64>,
    late: BTreeMap<Row, u64>,
    sessions: BTreeMap<&'static str, Vec<Session>>,
    late_for_sessions: BTreeMap<(&'static str, Timestamp), u64>,
    future: u64,
    handed: [Vec<Handed>; PARTITIONS],
}

/// Hands on the timers that are due.
fn fire(
    clock: EventClock,
    timers: &mut BTreeMap<&'static str, Timestamp>,
    handed: &mut Vec<Handed>,
) {
    let is_due = |due: &Timestamp| clock.time().is_some_and(|now| *due <= now);
    let mut due: Vec<_> = timers.extract_if(.., |_, due| is_due(due)).collect();
    due.sort_by_key(|(key, due)| (*due, *key));
    handed.extend(due.into_iter().map(|(key, due)| Handed::Timer(key, due)));
}

/// The state of one generation in the database, after the transactions of all its workers.
struct Run {
    random: Rng,
    clocks: [EventClock; PARTITIONS],
    places: [usize; PARTITIONS],
    timers: [BTreeMap<&'static str, Timestamp>; PARTITIONS],
    newest: Option<NewestEvent>,
    outcome: Outcome,
    closed: BTreeSet<Row>,
    closed_sessions: BTreeSet<(&'static str, Session)>,
    has_revised: bool,
}

type Log = [Vec<Record>; PARTITIONS];

impl Run {
    fn new(seed: u64) -> Self {
        Self {
            random: Rng::with_seed(seed),
            clocks: Default::default(),
            places: Default::default(),
            timers: Default::default(),
            newest: None,
            outcome: Outcome::default(),
            closed: BTreeSet::new(),
            closed_sessions: BTreeSet::new(),
            has_revised: false,
        }
    }

    /// Runs one transaction of one partition. Returns `false` if there is nothing to read.
    fn step(&mut self, log: &Log) -> bool {
        let readable: Vec<_> =
            (0..PARTITIONS).filter(|p| self.places[*p] < log[*p].len()).collect();
        if readable.is_empty() {
            return false;
        }
        let partition = one_of(&mut self.random, &readable);
        let left = &log[partition][self.places[partition]..];
        let size = one_of(&mut self.random, &[1_usize, 1, 2, 5, 20]).min(left.len());
        let batch = &left[..size];
        let mut clock = self.clocks[partition];
        let mut timers = self.timers[partition].clone();
        let (mut handed, mut newest, mut future) = (Vec::new(), self.newest, 0);
        let (mut rows, mut late) = (Vec::new(), Vec::new());
        let (mut joins, mut late_joins) = (Vec::new(), Vec::new());
        let least = least_clock(self.clocks);
        let of_batch = batch.iter().filter(|record| record.kind != Kind::OtherClock);
        let of_batch = of_batch.fold(EventClock::default(), |clock, record| {
            clock.after(&WINDOW, record.at, record.recorded_at)
        });
        for Record { kind, at, recorded_at } in batch.iter().copied() {
            if kind == Kind::OtherClock && !mutant::active(Mutant::AnyTimeline) {
                continue;
            }
            let mut before = clock;
            if let Kind::Event(key) = kind {
                if WINDOW.is_future(at, recorded_at) {
                    future += 1;
                    clock = clock.after(&WINDOW, at, recorded_at);
                    continue;
                }
                if mutant::active(Mutant::LateByLeastClock) {
                    before = least;
                }
                if mutant::active(Mutant::ClockOfTheBatch) && before.time().is_some() {
                    before = before.max(of_batch);
                }
                for span in WINDOW.spans(at) {
                    if WINDOW.is_late(span, before) { &mut late } else { &mut rows }
                        .push((span, key));
                }
                let judged = match mutant::active(Mutant::SessionLateByState) {
                    true => {
                        let mut sessions =
                            self.outcome.sessions.get(key).cloned().unwrap_or_default();
                        SESSIONS.join(&mut sessions, at).1.last
                    }
                    false => at,
                };
                let is_late = SESSIONS.is_late_for_sessions(judged, before);
                if is_late { &mut late_joins } else { &mut joins }.push((key, at));
            }
            clock = clock.after(&WINDOW, at, recorded_at);
            let at_once = !mutant::active(Mutant::TimersAtTheEnd);
            if at_once {
                fire(clock, &mut timers, &mut handed);
            }
            let Kind::Event(key) = kind else { continue };
            newest = newest.max(Some(NewestEvent { recorded_at, at }));
            handed.push(Handed::Event(key, at));
            let from = timers.get(key).map_or(at, |due| at.max(*due));
            timers.insert(key, from + TimeDelta::seconds(TIMER * UNIT));
            if at_once {
                // A timer may be due when it is set.
                fire(clock, &mut timers, &mut handed);
            }
        }
        fire(clock, &mut timers, &mut handed);
        if chance(&mut self.random, 10) {
            // Killed before the commit: all of it is done again.
            return true;
        }
        for row in rows {
            self.has_revised |= self.closed.contains(&row);
            *self.outcome.rows.entry(row).or_default() += 1;
        }
        for row in late {
            *self.outcome.late.entry(row).or_default() += 1;
        }
        for (key, at) in joins {
            let (gone, _) = SESSIONS.join(self.outcome.sessions.entry(key).or_default(), at);
            self.has_revised |=
                gone.iter().any(|gone| self.closed_sessions.contains(&(key, *gone)));
        }
        for join in late_joins {
            *self.outcome.late_for_sessions.entry(join).or_default() += 1;
        }
        self.outcome.future += future;
        self.outcome.handed[partition].extend(handed);
        self.clocks[partition] = clock;
        self.places[partition] += size;
        self.timers[partition] = timers;
        self.newest = newest;
        self.close(log);
        true
    }

    fn close(&mut self, log: &Log) {
        let mut clocks = self.clocks.to_vec();
        if mutant::active(Mutant::IdleByTheWall) {
            let mut place = 0;
            clocks.retain(|_| {
                place += 1;
                self.places[place - 1] < log[place - 1].len() || chance(&mut self.random, 70)
            });
            if clocks.is_empty() {
                clocks = self.clocks.to_vec();
            }
        }
        let least = least_clock(clocks);
        let closed = self.outcome.rows.keys().filter(|(span, _)| WINDOW.is_closed(*span, least));
        self.closed.extend(closed);
        for (key, sessions) in &self.outcome.sessions {
            let closed =
                sessions.iter().filter(|session| SESSIONS.is_session_closed(**session, least));
            self.closed_sessions.extend(closed.map(|session| (*key, *session)));
        }
    }

    /// Appends the clock events that are needed.
    fn advance(&self, log: &mut Log, now: Timestamp) -> bool {
        let Some(newest) = self.newest else { return false };
        let is_quiet = |partition: usize| {
            let records = &log[partition];
            let lately = records.iter().rev().take(6).any(|record| {
                matches!(record.kind, Kind::Event(_))
                    && now - record.recorded_at < TimeDelta::seconds(QUIET * UNIT)
            });
            self.places[partition] == records.len() && !lately
        };
        let partitions: Vec<_> = (0..PARTITIONS)
            .map(|partition| PartitionTime {
                clock: self.clocks[partition],
                is_quiet: is_quiet(partition),
            })
            .collect();
        let events = clock_events(&WINDOW, &partitions, newest, self.due(), now);
        let Some((behind, to)) = events else { return false };
        for partition in behind {
            log[partition].push(Record { kind: Kind::Clock, at: to, recorded_at: now });
        }
        true
    }

    /// Returns the earliest moment at which something open is closed or due.
    fn due(&self) -> Option<Timestamp> {
        let rows = self.outcome.rows.keys().filter(|row| !self.closed.contains(row));
        let windows = rows.map(|(span, _)| span.end + WINDOW.grace());
        let sessions = self.outcome.sessions.iter().flat_map(|(key, all)| {
            let open = all.iter().filter(|one| !self.closed_sessions.contains(&(*key, **one)));
            open.map(|session| {
                session.last + SESSIONS.gap() * 2 + SESSIONS.grace() + TimeDelta::microseconds(1)
            })
        });
        let timers = self.timers.iter().flat_map(|timers| timers.values().copied());
        windows.chain(sessions).chain(timers).min()
    }
}

/// Plays one history. Returns the letter of a violated claim.
fn violation(seed: u64) -> Option<&'static str> {
    let random = &mut Rng::with_seed(seed);
    let (todo, mut log) = (history(random), Log::default());
    let mut live = Run::new(seed ^ 0x5eed);
    for (partition, record) in &todo {
        log[*partition].push(*record);
        for _ in 0..random.u32(0..4) {
            live.step(&log);
        }
        if chance(random, 30) {
            live.advance(&mut log, record.recorded_at);
        }
    }
    // Nothing more comes: read to the end, advance, and again until nothing is left to do.
    let now = todo.last()?.1.recorded_at + TimeDelta::seconds(1_000 * UNIT);
    let mut idle = 0;
    while idle < 3 {
        while live.step(&log) {}
        idle += u32::from(!live.advance(&mut log, now));
    }
    for again in 1..4 {
        let mut run = Run::new(seed ^ (again << 40));
        while run.step(&log) {}
        if run.outcome.handed != live.outcome.handed {
            return Some("C");
        }
        if run.outcome != live.outcome {
            return Some("A");
        }
        if run.has_revised {
            return Some("B");
        }
    }
    if live.has_revised {
        return Some("B");
    }
    log.iter().find_map(|records| wrongly_late(records)).or_else(|| never_closed(&live, now))
}

/// Checks D and F on one partition.
fn wrongly_late(records: &[Record]) -> Option<&'static str> {
    let grace = WINDOW.grace();
    let events = || records.iter().filter(|record| matches!(record.kind, Kind::Event(_)));
    let is_within = events().all(|event| event.recorded_at - event.at <= grace);
    let has_clock_events = records.iter().any(|record| record.kind == Kind::Clock);
    let (mut clock, mut credible) = (EventClock::default(), None::<Timestamp>);
    for record in records {
        let Record { kind, at, recorded_at } = *record;
        if kind == Kind::OtherClock && !mutant::active(Mutant::AnyTimeline) {
            continue;
        }
        if matches!(kind, Kind::Event(_)) && !WINDOW.is_future(at, recorded_at) {
            let is_late = WINDOW.spans(at).any(|span| WINDOW.is_late(span, clock));
            if is_late && is_within {
                return Some("D");
            }
            if is_late
                && !has_clock_events
                && credible.is_some_and(|credible| at >= credible - grace)
            {
                return Some("F");
            }
            credible = credible.max(Some(at.min(recorded_at)));
        }
        clock = clock.after(&WINDOW, at, recorded_at);
    }
    None
}

/// Checks E.
fn never_closed(live: &Run, now: Timestamp) -> Option<&'static str> {
    let newest = live.newest?;
    let is_live = newest.recorded_at - newest.at <= WINDOW.grace();
    let through = match is_live {
        true => EventClock::default().after(&WINDOW, now, now),
        false => *live.clocks.iter().max()?,
    };
    let mut rows = live.outcome.rows.keys();
    if rows.any(|row| WINDOW.is_closed(row.0, through) && !live.closed.contains(row)) {
        return Some("E");
    }
    for (key, sessions) in &live.outcome.sessions {
        let is_open = |session: &Session| !live.closed_sessions.contains(&(*key, *session));
        if sessions.iter().any(|one| SESSIONS.is_session_closed(*one, through) && is_open(one)) {
            return Some("E");
        }
    }
    let mut timers = live.timers.iter().flat_map(BTreeMap::values);
    timers.any(|due| through.time().is_some_and(|through| *due <= through)).then_some("E")
}

#[test]
fn no_history_violates_a_rule_of_time() {
    for seed in 0..SEEDS {
        assert_eq!(violation(seed), None, "seed {seed}");
    }
}

#[test]
fn every_wrong_rule_of_time_is_found() {
    for wrong in [
        Mutant::LateByLeastClock,
        Mutant::ClockOfTheBatch,
        Mutant::IdleByTheWall,
        Mutant::VirginExcluded,
        Mutant::FutureUnclamped,
        Mutant::FutureMovesTheClock,
        Mutant::AnyTimeline,
        Mutant::NoWallClock,
        Mutant::TimersAtTheEnd,
        Mutant::SessionOneNeighbour,
        Mutant::SessionClosedAGapEarly,
        Mutant::SessionLateByState,
        Mutant::NeverAdvance,
    ] {
        let found = mutant::with(Some(wrong), || (0..SEEDS).find_map(violation));
        assert!(found.is_some(), "{wrong:?} is not found");
    }
}

#[test]
fn windows_begin_at_multiples_of_their_step() {
    let at = |text: &str| text.parse::<Timestamp>().expect("a time");
    let starts = |window: Window, moment: &str| -> Vec<_> {
        window.spans(at(moment)).map(|span| span.start.to_rfc3339()[..16].to_owned()).collect()
    };
    const HOUR: Duration = Duration::from_secs(3_600);
    const DAY: Duration = Duration::from_secs(86_400);
    let hopping = Window::hopping(HOUR, HOUR / 4).grace(HOUR);
    assert_eq!(
        starts(hopping, "1997-09-16T09:59:59.999999Z"),
        ["1997-09-16T09:00", "1997-09-16T09:15", "1997-09-16T09:30", "1997-09-16T09:45"]
    );
    assert_eq!(starts(hopping, "1997-09-16T10:00:00Z")[0], "1997-09-16T09:15");
    let days = Window::tumbling(DAY);
    assert_eq!(starts(days.grace(HOUR), "1969-12-31T23:59:59Z"), ["1969-12-31T00:00"]);
    let tokyo = days.offset(HOUR * 15).grace(HOUR);
    assert_eq!(starts(tokyo, "2026-01-01T14:59:59Z"), ["2025-12-31T15:00"]);
    assert_eq!(starts(tokyo, "2026-01-01T15:00:00Z"), ["2026-01-01T15:00"]);
    // A step that does not divide the size: two windows or three contain a moment.
    let uneven = Window::hopping(HOUR, Duration::from_secs(1_500)).grace(HOUR);
    assert_eq!(
        starts(uneven, "1970-01-01T00:50:00Z"),
        ["1970-01-01T00:00", "1970-01-01T00:25", "1970-01-01T00:50"]
    );
    assert_eq!(starts(uneven, "1970-01-01T01:10:00Z"), ["1970-01-01T00:25", "1970-01-01T00:50"]);
    assert_eq!(starts(Window::session(HOUR).grace(HOUR), "1970-01-01T01:10:00Z").len(), 0);
}

#[test]
fn an_event_exactly_a_gap_away_joins_both_of_its_neighbours() {
    let mut sessions = Vec::new();
    for at in [0, 2 * GAP, 5 * GAP] {
        SESSIONS.join(&mut sessions, time(at));
    }
    assert_eq!(sessions.len(), 3);
    let (gone, joined) = SESSIONS.join(&mut sessions, time(GAP));
    assert_eq!(gone.len(), 2);
    assert_eq!(joined, Session { first: time(0), last: time(2 * GAP), events: 3 });
    assert_eq!(
        sessions,
        [joined, Session { first: time(5 * GAP), last: time(5 * GAP), events: 1 }]
    );
}

#[test]
fn rows_are_kept_as_long_as_said() {
    let clock = EventClock::at(Some(time(100)));
    assert_eq!(WINDOW.expired_before(clock), None);
    assert_eq!(WINDOW.keep(units(10)).expired_before(clock), Some(time(90 - GRACE)));
    assert_eq!(WINDOW.keep(units(10)).expired_before(EventClock::default()), None);
    assert_eq!(WINDOW.closed_through(clock), Some(time(100 - GRACE)));
}

//! Windows of event time, and the clock that says which events are late.
//!
//! Event time is in the log. The [clock](EventClock) of a partition follows from the records before it in the same
//! partition alone, and so does lateness: a rebuild, another size of batches and another worker find the same events
//! late and close the same windows. A partition without events is moved on by clock events in the log, see
//! [`clock_events`].
//!
//! Times have microseconds, as the columns of timestamps have.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::mutant::{self, Mutant};

/// Most windows that contain one moment.
pub const WINDOWS_OF_A_MOMENT_MAX: i64 = 1_000;
/// An event may be stamped so far after its own recording, if the grace is not longer.
pub const AHEAD_MIN: TimeDelta = TimeDelta::minutes(1);

/// A moment of event time.
pub type Timestamp = DateTime<Utc>;

/// A span of event time from `start` until before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// The first moment.
    pub start: Timestamp,
    /// The first moment after the span.
    pub end: Timestamp,
}

/// Windows without a grace. [`grace`](Self::grace) makes a [`Window`] of them: there is no default, since only the
/// author knows how late events may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "windows need a grace"]
pub struct Ungraced(Shape);

/// The windows of a model, how long they take late events, and how long their rows are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    shape: Shape,
    grace: Micros,
    keep: Option<Micros>,
}

/// A length of time in microseconds, at most 100 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Micros(i64);

impl Micros {
    const fn new(duration: Duration) -> Self {
        const YEARS_100: u128 = 100 * 366 * 86_400 * 1_000_000;
        let micros = duration.as_micros();
        assert!(micros <= YEARS_100, "times of windows are at most 100 years");
        Self(micros as i64)
    }

    const fn delta(self) -> TimeDelta {
        TimeDelta::microseconds(self.0)
    }
}

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0 as f64 / 1e6)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Shape {
    /// A window begins at each `offset + n · step` since 1970.
    Fixed {
        size: Micros,
        step: Micros,
        offset: Micros,
    },
    Session {
        gap: Micros,
    },
}

impl Window {
    /// Windows of one size, one after another. They begin at multiples of the size since 1970 in UTC.
    ///
    /// # Panics
    ///
    /// If the size is zero or longer than 100 years.
    pub const fn tumbling(size: Duration) -> Ungraced {
        Self::hopping(size, size)
    }

    /// Windows of one size, of which one begins at each multiple of the step since 1970 in UTC. An event is in
    /// each window that contains its time.
    ///
    /// # Panics
    ///
    /// If the size or the step is zero or longer than 100 years, the step is longer than the size, or more than
    /// [`WINDOWS_OF_A_MOMENT_MAX`] windows contain one moment.
    pub const fn hopping(size: Duration, step: Duration) -> Ungraced {
        let (size, step) = (Micros::new(size), Micros::new(step));
        assert!(size.0 > 0 && step.0 > 0, "the size and the step of a window are longer than zero");
        assert!(
            step.0 <= size.0,
            "the step of a window is at most its size, or events fall between windows"
        );
        assert!(size.0 / step.0 < WINDOWS_OF_A_MOMENT_MAX, "a moment is in at most 1000 windows");
        Ungraced(Shape::Fixed { size, step, offset: Micros(0) })
    }

    /// Sessions: the events of a key of which each is at most the gap after the one before, the gap included.
    ///
    /// # Panics
    ///
    /// If the gap is zero or longer than 100 years.
    pub const fn session(gap: Duration) -> Ungraced {
        let gap = Micros::new(gap);
        assert!(gap.0 > 0, "the gap of a session is longer than zero");
        Ungraced(Shape::Session { gap })
    }

    /// Has the rows of windows deleted that ended so long before the [moment](Self::closed_through) up to which windows are
    /// closed. Default: rows are kept for ever.
    ///
    /// # Panics
    ///
    /// If the time is longer than 100 years.
    #[must_use]
    pub const fn keep(mut self, keep: Duration) -> Self {
        self.keep = Some(Micros::new(keep));
        self
    }

    /// Sets another grace.
    ///
    /// # Panics
    ///
    /// If the grace is longer than 100 years.
    #[must_use]
    pub const fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = Micros::new(grace);
        self
    }

    /// Returns how long after its end a window takes events.
    pub const fn grace(&self) -> TimeDelta {
        self.grace.delta()
    }

    /// Returns `true` for sessions.
    pub const fn is_session(&self) -> bool {
        matches!(self.shape, Shape::Session { .. })
    }

    /// Returns the window that begins at the moment. A session begins and ends there.
    pub fn span_from(&self, start: Timestamp) -> Span {
        let size = match self.shape {
            Shape::Fixed { size, .. } => size.delta(),
            Shape::Session { .. } => TimeDelta::zero(),
        };
        Span { start, end: start + size }
    }

    /// Returns the windows that contain the moment, earliest first; none for sessions.
    pub fn spans(&self, at: Timestamp) -> impl Iterator<Item = Span> + use<> {
        let (size, step, offset) = match self.shape {
            Shape::Fixed { size, step, offset } => (size.0, step.0, offset.0),
            Shape::Session { .. } => (0, 1, 0),
        };
        let at = at.timestamp_micros();
        let newest = (at - offset).div_euclid(step) * step + offset;
        let count = (newest + size - at - 1).div_euclid(step) + 1;
        (0..count).rev().filter_map(move |back| {
            let start = newest - back * step;
            let moment = DateTime::from_timestamp_micros;
            Some(Span { start: moment(start)?, end: moment(start + size)? })
        })
    }

    /// Returns `true` for an event that is stamped more than the grace, and more than [`AHEAD_MIN`], after its own
    /// recording. Such an event makes no row and moves no clock.
    pub fn is_future(&self, at: Timestamp, recorded_at: Timestamp) -> bool {
        at > recorded_at + self.grace().max(AHEAD_MIN)
    }

    /// Returns `true` if the window takes no more events. `clock` is the clock of the event's own partition before the
    /// event.
    pub fn is_late(&self, span: Span, clock: EventClock) -> bool {
        clock.0.is_some_and(|clock| span.end + self.grace() <= clock)
    }

    /// Returns `true` if no session takes an event of this time any more. `clock` is the clock of the event's own
    /// partition before the event.
    pub fn is_late_for_sessions(&self, at: Timestamp, clock: EventClock) -> bool {
        clock.0.is_some_and(|clock| at + self.gap() + self.grace() < clock)
    }

    /// Returns `true` if the rows of the window never change again. `least` is the [least](least_clock) clock of all
    /// partitions.
    pub fn is_closed(&self, span: Span, least: EventClock) -> bool {
        self.is_late(span, least)
    }

    /// Returns `true` if a session never changes again. An event one gap after its last event may still be in time,
    /// and so join the session, until two gaps and the grace have passed.
    pub fn is_session_closed(&self, session: Session, least: EventClock) -> bool {
        let gaps = if mutant::active(Mutant::SessionClosedAGapEarly) { 1 } else { 2 };
        least.0.is_some_and(|least| session.last + self.gap() * gaps + self.grace() < least)
    }

    /// Adds an event of this time to the sessions of its key, which are in the order of their time. All sessions
    /// within the gap of the event, the gap included, become one. Returns the sessions that are no more, and the
    /// session with the event.
    pub fn join(&self, sessions: &mut Vec<Session>, at: Timestamp) -> (Vec<Session>, Session) {
        let mut joined = Session { first: at, last: at, events: 1 };
        let near = |session: &Session, joined: &Session| {
            session.first - self.gap() <= joined.last && joined.first <= session.last + self.gap()
        };
        let mut gone = Vec::new();
        sessions.retain(|session| {
            let is_enough = !gone.is_empty() && mutant::active(Mutant::SessionOneNeighbour);
            let is_kept = is_enough || !near(session, &joined);
            if !is_kept {
                joined.first = joined.first.min(session.first);
                joined.last = joined.last.max(session.last);
                joined.events += session.events;
                gone.push(*session);
            }
            is_kept
        });
        let place = sessions.partition_point(|session| session.first < joined.first);
        sessions.insert(place, joined);
        (gone, joined)
    }

    /// Returns the least grace with which an event of this time is in time for one of its windows. `clock` is the clock of
    /// the event's own partition before the event; `None` while the partition has none.
    pub fn least_grace(&self, at: Timestamp, clock: EventClock) -> Option<TimeDelta> {
        let clock = clock.0?;
        let grace = match self.spans(at).last() {
            // A window takes events while the clock is before its end and the grace.
            Some(newest) => clock - newest.end + TimeDelta::microseconds(1),
            None => clock - at - self.gap(),
        };
        Some(grace.max(TimeDelta::zero()))
    }

    /// Returns the moment up to which windows are closed: those that end at the moment or before it, and sessions whose
    /// last event is before it. `None` while a partition has no clock.
    pub fn closed_through(&self, least: EventClock) -> Option<Timestamp> {
        least.0?.checked_sub_signed(self.gap() * 2 + self.grace())
    }

    /// Returns the least clock of all partitions with which a window with this end is closed, or a session with its last
    /// event then.
    pub fn closes_at(&self, end: Timestamp) -> Timestamp {
        let after = TimeDelta::microseconds(if self.is_session() { 1 } else { 0 });
        end + self.gap() * 2 + self.grace() + after
    }

    /// Returns the moment before which windows have ended whose rows are not kept any more. `None` if rows are kept
    /// for ever, and while a partition has no clock.
    pub fn expired_before(&self, least: EventClock) -> Option<Timestamp> {
        self.closed_through(least)?.checked_sub_signed(self.keep?.delta())
    }

    /// Returns the gap of sessions; zero for other windows.
    pub const fn gap(&self) -> TimeDelta {
        match self.shape {
            Shape::Session { gap } => gap.delta(),
            Shape::Fixed { .. } => TimeDelta::zero(),
        }
    }
}

impl fmt::Display for Window {
    /// Writes a text stored in the fingerprints of windowed models: a changed text means other rows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shape {
            Shape::Fixed { size, step, .. } if size == step => write!(f, "tumbling {size}")?,
            Shape::Fixed { size, step, .. } => write!(f, "hopping {size} every {step}")?,
            Shape::Session { gap } => write!(f, "session gap {gap}")?,
        }
        if let Shape::Fixed { offset, .. } = self.shape
            && offset.0 > 0
        {
            write!(f, " offset {offset}")?;
        }
        write!(f, ", grace {}", self.grace)?;
        self.keep.map_or(Ok(()), |keep| write!(f, ", keep {keep}"))
    }
}

impl Ungraced {
    /// Has windows begin so long after the multiples of their step: days of another zone, weeks that begin on Monday.
    ///
    /// # Panics
    ///
    /// For sessions, and if the offset is not shorter than the step.
    pub const fn offset(self, by: Duration) -> Self {
        let Shape::Fixed { size, step, .. } = self.0 else {
            panic!("sessions begin with their first event: they have no offset")
        };
        let offset = Micros::new(by);
        assert!(offset.0 < step.0, "the offset of windows is shorter than their step");
        Self(Shape::Fixed { size, step, offset })
    }

    /// Sets how long after its end a window takes events that come late. A window is closed, and its rows are final,
    /// when the clocks of all partitions have passed its end by as much.
    ///
    /// # Panics
    ///
    /// If the grace is longer than 100 years.
    pub const fn grace(self, grace: Duration) -> Window {
        Window { shape: self.0, grace: Micros::new(grace), keep: None }
    }
}

/// The events of one key of which each is at most the gap after the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session {
    /// The time of the earliest event.
    pub first: Timestamp,
    /// The time of the latest event.
    pub last: Timestamp,
    /// The number of events.
    pub events: u64,
}

/// The clock of a partition for one model: the largest time of the events before, each no later than its own recording.
/// Before its first event a partition has no time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventClock(Option<Timestamp>);

impl EventClock {
    /// Returns the clock with this time; `None` is the clock before the first event.
    pub const fn at(time: Option<Timestamp>) -> Self {
        Self(time)
    }

    /// Returns the time.
    pub const fn time(self) -> Option<Timestamp> {
        self.0
    }

    /// Returns the clock after an event, or after a clock event of the model's timeline. An event from the
    /// [future](Window::is_future) moves no clock.
    #[must_use]
    pub fn after(self, window: &Window, at: Timestamp, recorded_at: Timestamp) -> Self {
        let is_future = window.is_future(at, recorded_at);
        if is_future
            && !mutant::active(Mutant::FutureMovesTheClock)
            && !mutant::active(Mutant::FutureUnclamped)
        {
            return self;
        }
        let time = if mutant::active(Mutant::FutureUnclamped) { at } else { at.min(recorded_at) };
        Self(Some(self.0.map_or(time, |clock| clock.max(time))))
    }
}

/// Returns the least of the clocks of all partitions; without time while a partition has none.
pub fn least_clock(clocks: impl IntoIterator<Item = EventClock>) -> EventClock {
    let times = clocks
        .into_iter()
        .filter(|clock| clock.0.is_some() || !mutant::active(Mutant::VirginExcluded));
    // A clock without time is the least.
    times.min().unwrap_or_default()
}

/// The state of a partition for [`clock_events`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionTime {
    /// The clock at the end of the partition, as far as it is read.
    pub clock: EventClock,
    /// `true` if the partition is read to its end and has had no event for the idle time.
    pub is_quiet: bool,
}

/// The newest event of a model, of all partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NewestEvent {
    /// The time of its recording.
    pub recorded_at: Timestamp,
    /// Its own time.
    pub at: Timestamp,
}

/// Returns the clock events to append: the places of quiet partitions, and the time to which all of them are moved. No
/// event is needed while nothing is due by that time: `due` is the earliest moment of the least clock at which a window
/// or a session closes or a timer is due, and `None` while nothing is open.
///
/// The time is the least clock of the partitions that are not quiet. When all are quiet it is `now` if the newest
/// event was live, which means recorded within the grace of its time, and otherwise the newest clock: old events that
/// are imported do not move the clock to the present.
pub fn clock_events(
    window: &Window,
    partitions: &[PartitionTime],
    newest: NewestEvent,
    due: Option<Timestamp>,
    now: Timestamp,
) -> Option<(Vec<usize>, Timestamp)> {
    let due = due.filter(|_| !mutant::active(Mutant::NeverAdvance))?;
    let is_live = newest.recorded_at - newest.at <= window.grace();
    let newest_clock = partitions.iter().filter_map(|partition| partition.clock.0).max()?;
    let active = partitions.iter().filter(|partition| !partition.is_quiet);
    let to = match active.map(|partition| partition.clock).min() {
        // A partition without a clock has something to read first.
        Some(least) => least.0?,
        None if is_live && !mutant::active(Mutant::NoWallClock) => now,
        None => newest_clock,
    };
    if to < due {
        return None;
    }
    let is_behind = |(_, partition): &(usize, &PartitionTime)| {
        partition.is_quiet && partition.clock.0.is_none_or(|clock| clock < to)
    };
    let behind: Vec<_> =
        partitions.iter().enumerate().filter(is_behind).map(|(place, _)| place).collect();
    (!behind.is_empty()).then_some((behind, to))
}

#[cfg(test)]
mod tests;

//! Which events are late: the clock of each partition, event by event in the order of the log.

use std::panic::{AssertUnwindSafe, catch_unwind};

use chrono::DateTime;
use kafold_core::event_set::{EventSet, ReadEvent};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Batch;
use kafold_core::timeline::{self, TimelineEvent};
use kafold_core::window::{EventClock, NewestEvent, Timestamp, Window};
use kafold_core::{Recorded, RecordedEvent};

use super::Windowed;
use super::late::{Kind, LateEvent};
use crate::categories::Sightings;
use crate::clock_step::{ClockOf, ClockSteps, EventCounts, PartitionClock};
use crate::handler::{Fault, panic_text};
use crate::projection;
use crate::rows;

/// A decoded batch.
pub(super) struct DecodedWindows<M: Windowed> {
    items: Vec<Item<M>>,
    sightings: Sightings,
}

enum Item<M: Windowed> {
    Event {
        event: Recorded<M::Event>,
        at: Timestamp,
        /// The keys of the touched rows, each once.
        keys: Vec<M::Key>,
    },
    /// A clock event of the model's timeline.
    Clock { at: Timestamp, recorded_at: Timestamp },
}

/// An event that is in time for at least one of its windows, and a key that it touches there.
pub(crate) struct InTime<'w, M: Windowed> {
    pub(super) key: &'w M::Key,
    pub(super) at: Timestamp,
    /// The clock of the partition before the event.
    pub(super) clock: EventClock,
    pub(super) event: &'w Recorded<M::Event>,
}

/// The events of a round: those in time, those that are late, and the clocks after them.
pub(super) struct Judged<'w, M: Windowed> {
    window: Window,
    pub(super) touches: Vec<InTime<'w, M>>,
    pub(super) late: Vec<LateEvent<'w>>,
    pub(super) steps: ClockSteps,
    pub(super) sightings: Vec<(&'w RecordedEvent, bool)>,
}

impl<'w, M: Windowed> Judged<'w, M> {
    pub(super) fn new(window: Window) -> Self {
        Self {
            window,
            touches: Vec::new(),
            late: Vec::new(),
            steps: ClockSteps::new(),
            sightings: Vec::new(),
        }
    }

    /// Adds the events of a batch, which goes on where the partition's batches before it ended.
    pub(super) fn add(
        &mut self,
        batch: &'w Batch,
        decoded: &'w DecodedWindows<M>,
        clock_of: ClockOf<'_>,
    ) {
        self.sightings.extend(decoded.sightings.events(batch));
        let stored = clock_of(batch.partition);
        let is_in_order = stored.is_some();
        let PartitionClock { clock, late_rows } = stored.unwrap_or_default();
        let mut step = self.steps.remove(&batch.partition).unwrap_or_default();
        if step.clock.time().is_none() {
            step.clock = clock;
        }
        for item in &decoded.items {
            let (event, at, keys) = match item {
                Item::Event { event, at, keys } => (event, *at, keys),
                Item::Clock { at, recorded_at } => {
                    step.clock = step.clock.after(&self.window, *at, *recorded_at);
                    continue;
                }
            };
            let recorded_at = event.metadata.recorded_at;
            let before = if is_in_order { step.clock } else { EventClock::default() };
            step.newest = step.newest.max(Some(NewestEvent { recorded_at, at }));
            step.clock = step.clock.after(&self.window, at, recorded_at);
            let verdict = Verdict::of(&self.window, at, recorded_at, before, keys.is_empty());
            step.counts += verdict.counts();
            if let Some(late) = verdict.late(&self.window, event, at, before) {
                let nth = late_rows.saturating_add(step.counts.late_rows.unsigned_abs());
                self.late.extend((nth <= super::late::ROWS_MAX).then_some(late));
            }
            if verdict.in_time > 0 && !verdict.is_future {
                let touch = |key| InTime { key, at, clock: before, event };
                self.touches.extend(keys.iter().map(touch));
            }
        }
        self.steps.insert(batch.partition, step);
    }
}

/// The judgement of one event.
struct Verdict {
    is_future: bool,
    is_keyless: bool,
    /// Number of windows for which the event is in time.
    in_time: u32,
    /// Number of windows for which the event is late.
    late: u32,
}

impl Verdict {
    fn of(
        window: &Window,
        at: Timestamp,
        recorded_at: Timestamp,
        clock: EventClock,
        is_keyless: bool,
    ) -> Self {
        let is_future = window.is_future(at, recorded_at);
        let (mut in_time, mut late) = (0, 0);
        let mut count = |is_late: bool| if is_late { late += 1 } else { in_time += 1 };
        if window.is_session() {
            count(window.is_late_for_sessions(at, clock));
        } else {
            window.spans(at).for_each(|span| count(window.is_late(span, clock)));
        }
        Self { is_future, is_keyless, in_time, late }
    }

    fn counts(&self) -> EventCounts {
        let mut counts = EventCounts::default();
        match self {
            Self { is_future: true, .. } => (counts.future, counts.late_rows) = (1, 1),
            Self { is_keyless: true, .. } => counts.keyless = 1,
            Self { in_time, late, .. } => {
                counts.late = i64::from(*in_time == 0);
                counts.in_windows = i64::from(*in_time > 0);
                counts.late_windows = i64::from(*late);
                counts.late_rows = i64::from(*late > 0);
            }
        }
        counts
    }
}

impl Verdict {
    /// Returns the row of the table of late events: for an event that is late for a window, and for one from the future.
    fn late<'w, E>(
        &self,
        window: &Window,
        event: &'w Recorded<E>,
        at: Timestamp,
        clock: EventClock,
    ) -> Option<LateEvent<'w>> {
        let kind = match self {
            Self { is_future: true, .. } => Kind::Future,
            Self { is_keyless: true, .. } | Self { late: 0, .. } => return None,
            Self { .. } => Kind::Late,
        };
        let is_out = kind == Kind::Late && self.in_time == 0;
        let grace = if is_out { window.least_grace(at, clock) } else { None };
        let Recorded { stream, version, position, .. } = event;
        let (position, version) = (*position, *version);
        Some(LateEvent { kind, stream, version, position, at, clock, windows: self.late, grace })
    }
}

/// Decodes the events of a batch, up to the first that cannot be read.
pub(super) fn decode<M: Windowed>(batch: &Batch) -> Result<DecodedWindows<M>, Fault> {
    let items = Vec::with_capacity(batch.events.len());
    let mut decoded = DecodedWindows { items, sightings: Sightings::default() };
    for (place, recorded) in batch.events.iter().enumerate() {
        // A panic leaves nothing behind: an event is added whole, as the last thing done.
        let read = catch_unwind(AssertUnwindSafe(|| decode_one(batch, place, &mut decoded)));
        read.unwrap_or_else(|panic| Err(Fault::at(recorded, panic_text(&*panic))))?;
    }
    Ok(decoded)
}

/// Adds the event at a place of the batch, if the model reads it.
fn decode_one<M: Windowed>(
    batch: &Batch,
    place: usize,
    into: &mut DecodedWindows<M>,
) -> Result<(), Fault> {
    let recorded = &batch.events[place];
    if timeline::timeline_of(&recorded.stream).is_some() {
        into.items.extend(clock_event::<M>(recorded)?);
        return Ok(());
    }
    let read = projection::decode::<M::Event>(recorded);
    let read = read.map_err(|unreadable| Fault::unreadable(recorded, &unreadable.error))?;
    if M::Event::LEARNS_CATEGORY && !matches!(read, ReadEvent::PassedBy) {
        into.sightings.add(batch, place, matches!(read, ReadEvent::Event(_)));
    }
    let ReadEvent::Event(event) = read else { return Ok(()) };
    // The columns of the rows and of the clock have microseconds.
    let at = DateTime::from_timestamp_micros(M::at(&event).timestamp_micros());
    let at = at.ok_or_else(|| Fault::at(recorded, "its time is no date"))?;
    let keys = M::keys(&event).into_iter().map(rows::stored_key::<M>);
    let mut keys: Vec<_> =
        keys.collect::<Result<_, _>>().map_err(|invalid| Fault::at(recorded, invalid))?;
    keys.sort_unstable();
    keys.dedup();
    into.items.push(Item::Event { event, at, keys });
    Ok(())
}

/// Reads a clock event; `None` for one of another timeline.
fn clock_event<M: Windowed>(recorded: &RecordedEvent) -> Result<Option<Item<M>>, Fault> {
    let is_ours = timeline::timeline_of(&recorded.stream) == Some(M::TIMELINE);
    if !is_ours && !mutant::active(Mutant::AnyTimeline) {
        return Ok(None);
    }
    let read = projection::decode::<TimelineEvent>(recorded);
    let read = read.map_err(|unreadable| Fault::unreadable(recorded, &unreadable.error))?;
    let ReadEvent::Event(Recorded { event: TimelineEvent::Advanced { to }, metadata, .. }) = read
    else {
        return Ok(None);
    };
    Ok(Some(Item::Clock { at: to, recorded_at: metadata.recorded_at }))
}

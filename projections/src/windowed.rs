//! [`Windowed`]: rows of windows of event time.
//!
//! - `row`: the row of a window, with its columns and its key;
//! - `judge`: the clock of each partition, and which events are late;
//! - `session`: the rows of sessions, which merge;
//! - `late`: the table of late events;
//! - `query`: reads of the rows;
//! - `testing`: the tests of a model, without a database.

mod judge;
mod late;
mod query;
mod row;
mod session;
mod testing;

use std::collections::{BTreeMap, HashSet};
use std::marker::PhantomData;
use std::num::NonZeroUsize;

use async_trait::async_trait;
use kafold_core::mutant::{self, Mutant};
use kafold_core::row::{Merge, Row};
use kafold_core::window::{Timestamp, Window};
use kafold_core::{EventSet, Partition, Recorded, RecordedEvent};

use self::judge::{InTime, Judged, decode};
use self::late::LateEvent;
pub use self::query::{InWindow, OpenOrFinal, WindowQuery};
pub(crate) use self::row::WindowRow;
use self::row::{WindowFold, WindowKey};
pub(crate) use self::session::Sessions;
pub use self::testing::{StreamTest, session_test, stream_test};
use crate::categories::StoredCategories;
use crate::clock_step::{ClockOf, ClockSteps};
use crate::definition::Definition;
use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Handler, Memory, Target, Work};
use crate::memory::RowMemory;
use crate::projection::{Part, ProjectionBatch};
use crate::rows::{self, RoundRows};
use crate::table::Table;
use crate::transaction::Transaction;

/// A row of windows of event time: the events of a window and a key are folded into one row.
///
/// The [time](Self::at) of an event is a value of the event. Windows are [closed](Window::is_closed) by the events that
/// come after them, and later events are late: they are counted and listed, and change no row. Which events are late
/// follows from the log alone, so a rebuild makes the same rows. The table of the rows has the columns `window_start` and
/// `window_end` and those of the row.
///
/// As for a [`ReadModel`](crate::ReadModel), `at`, `keys` and `fold` are pure.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a windowed model",
    label = "not a windowed model",
    note = "a windowed model is its row: `#[derive(Clone, PartialEq, Row)]` on the struct, then `impl Windowed` for it"
)]
pub trait Windowed: Row {
    /// The name of the model and of its view, as for a read model.
    const NAME: &'static str;

    /// Raise it when `at`, `keys` or `fold` now make other rows of the same events.
    const VERSION: u32 = 1;

    /// The windows, with the grace for late events.
    const WINDOW: Window;

    /// The place of the rows: which workers write a row.
    const PLACE: Place;

    /// The name of the model's time in [clock events](kafold_core::timeline). Models of one timeline are moved on
    /// together.
    const TIMELINE: &'static str = Self::NAME;

    /// The events that the model reads, of one aggregate or of several.
    type Event: EventSet;

    /// Returns the time of the event. Times have microseconds.
    fn at(event: &Recorded<Self::Event>) -> Timestamp;

    /// Returns the keys of the rows that the event touches in each of its windows: none, one or several.
    fn keys(event: &Recorded<Self::Event>) -> Vec<Self::Key>;

    /// Returns the row of a window after the event. The returned row has the key `key`. `row` is the row before the
    /// event; `None` when there is none.
    fn fold(key: &Self::Key, row: Option<Self>, event: &Recorded<Self::Event>) -> Self;
}

/// The column of the partition whose events a row of [`Place::Spread`] holds.
pub(crate) const PARTITION: &str = "kafold_partition";

/// The place of the rows of a windowed model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Each key belongs to one stream, as one with the id of the stream does. One worker writes its rows and remembers
    /// them.
    Local,
    /// Events of several partitions touch a row, and rows are added up: each value column has `#[row(sum)]`,
    /// `#[row(min)]` or `#[row(max)]`. Each partition has a row of its own, and the view merges them.
    Spread,
    /// Events of several partitions touch a row, which is written under a lock. The fold must not depend on the order
    /// between partitions.
    Shared,
}

impl Place {
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Spread => "spread",
            Self::Shared => "shared",
        }
    }
}

/// A [`Windowed`] model as the worker runs it. `S` writes the rows of its windows.
pub(crate) struct WindowHandler<M, S> {
    definition: Definition,
    window: Window,
    categories: StoredCategories,
    model: PhantomData<fn() -> (M, S)>,
}

impl<M: Windowed> WindowHandler<M, Fixed> {
    /// Windows that are no sessions.
    pub(crate) fn fixed(window: Window) -> Self {
        const {
            assert!(!M::WINDOW.is_session(), "sessions run by `with_sessions`");
        }
        Self::new(window)
    }
}

impl<M: Windowed + Merge> WindowHandler<M, Sessions> {
    pub(crate) fn sessions(window: Window) -> Self {
        const {
            assert!(M::WINDOW.is_session(), "windows that are no sessions run by `with_windows`");
            assert!(
                !matches!(M::PLACE, Place::Spread),
                "a session has events of several partitions, so its rows are not added up: use Place::Shared, or \
                 Place::Local for keys of one stream"
            );
        }
        Self::new(window)
    }
}

impl<M: Windowed, S> WindowHandler<M, S> {
    fn new(window: Window) -> Self {
        Self {
            definition: Definition::of_windows::<M>(&window),
            window,
            categories: StoredCategories::default(),
            model: PhantomData,
        }
    }

    fn table(&self, generation: Generation) -> Table {
        Table::new(&self.definition, generation).expect("a windowed model has columns")
    }
}

#[async_trait]
impl<M: Windowed, S: WindowRows<M>> Handler for WindowHandler<M, S> {
    fn definition(&self) -> &Definition {
        &self.definition
    }

    async fn setup(
        &self,
        generation: Generation,
        tx: &mut Transaction<'_>,
    ) -> Result<(), ApplyError> {
        Ok(self.table(generation).create(tx).await?)
    }

    fn decode_ahead(&self, part: &Part) {
        part.decoded(decode::<M>);
    }

    fn prepare<'w>(
        &'w self,
        round: &'w ProjectionBatch,
        clock_of: ClockOf<'_>,
    ) -> Result<Box<dyn Work + 'w>, Fault> {
        let mut judged = Judged::<M>::new(self.window);
        for part in round.parts() {
            let decoded = part.decoded(decode::<M>).as_ref().map_err(Fault::clone)?;
            judged.add(part.batch(), decoded, clock_of);
        }
        let Judged { touches, steps, late, sightings, .. } = judged;
        let rows = S::new(self.window, touches);
        Ok(Box::new(WindowWork { handler: self, sightings, rows, steps, late }))
    }

    fn memory(&self, from_start: HashSet<Partition>, rows_max: usize) -> Option<Memory> {
        let rows_max = NonZeroUsize::new(rows_max)?;
        if M::PLACE == Place::Shared || M::WINDOW.is_session() {
            return None;
        }
        Some(Box::new(RowMemory::<WindowRow<M>>::new(from_start, rows_max)))
    }
}

/// A round of one model, decoded and judged.
struct WindowWork<'w, M: Windowed, S: WindowRows<M>> {
    handler: &'w WindowHandler<M, S>,
    /// The first event of each category in each batch, for an enum that declares no category.
    sightings: Vec<(&'w RecordedEvent, bool)>,
    rows: S::Rows<'w>,
    steps: ClockSteps,
    late: Vec<LateEvent<'w>>,
}

#[async_trait]
impl<M: Windowed, S: WindowRows<M>> Work for WindowWork<'_, M, S> {
    async fn apply(
        &self,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<(), ApplyError> {
        if !self.sightings.is_empty() {
            self.handler.categories.store::<M::Event>(target, tx, &self.sightings).await?;
        }
        if target.generation != Generation::VERIFIED {
            late::insert(tx, target, &self.late).await?;
        }
        if S::is_empty(&self.rows) {
            return Ok(());
        }
        let memory = memory.and_then(|memory| memory.downcast_mut::<RowMemory<WindowRow<M>>>());
        let table = self.handler.table(target.generation);
        if M::PLACE == Place::Shared && !mutant::active(Mutant::SharedRowsUnlocked) {
            rows::lock(target, tx).await?;
        }
        S::apply(&self.rows, &table, target, tx, memory).await
    }

    fn clock_steps(&self) -> Option<&ClockSteps> {
        Some(&self.steps)
    }
}

/// The rows of the windows of one kind that a round touches.
#[async_trait]
pub(crate) trait WindowRows<M: Windowed>: Send + Sync + 'static {
    type Rows<'w>: Send + Sync
    where
        M: 'w;

    fn new(window: Window, touches: Vec<InTime<'_, M>>) -> Self::Rows<'_>;

    fn is_empty(rows: &Self::Rows<'_>) -> bool;

    /// Loads the rows, folds the events into them, and writes them.
    async fn apply(
        rows: &Self::Rows<'_>,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut RowMemory<WindowRow<M>>>,
    ) -> Result<(), ApplyError>;

    /// Folds the events into rows in memory, as the database returns the rows.
    fn fold_into(rows: &Self::Rows<'_>, stored: &mut StoredRows<M>) -> Result<(), Fault>;
}

/// The rows of a windowed model in memory, for tests.
pub(crate) type StoredRows<M> = BTreeMap<WindowKey<M>, WindowRow<M>>;

/// Tumbling and hopping windows.
pub(crate) struct Fixed;

#[async_trait]
impl<M: Windowed> WindowRows<M> for Fixed {
    type Rows<'w> = RoundRows<'w, WindowFold<M>, WindowKey<M>>;

    fn new(window: Window, touches: Vec<InTime<'_, M>>) -> Self::Rows<'_> {
        let mut all = Vec::with_capacity(touches.len());
        for InTime { key, at, clock, event } in touches {
            let spans = window.spans(at).filter(|span| !window.is_late(*span, clock));
            let partition = event.position.partition;
            all.extend(
                spans.map(|span| (WindowKey::new(span.start, key.clone(), partition), event)),
            );
        }
        RoundRows::new(all)
    }

    fn is_empty(rows: &Self::Rows<'_>) -> bool {
        rows.is_empty()
    }

    async fn apply(
        rows: &Self::Rows<'_>,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        memory: Option<&mut RowMemory<WindowRow<M>>>,
    ) -> Result<(), ApplyError> {
        rows.apply(table, target, tx, memory).await
    }

    fn fold_into(rows: &Self::Rows<'_>, stored: &mut StoredRows<M>) -> Result<(), Fault> {
        for (key, row) in rows.folded(|key| stored.get(key).cloned())? {
            match row {
                Some(row) => stored.insert(key, row),
                None => stored.remove(&key),
            };
        }
        Ok(())
    }
}

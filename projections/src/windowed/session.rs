//! The rows of sessions: an event joins all sessions of its key within the gap, and their rows merge.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};

use async_trait::async_trait;
use kafold_core::row::{Merge, Row};
use kafold_core::window::{Session, Span, Timestamp, Window};
use kafold_core::{Partition, Recorded};

use super::judge::InTime;
use super::row::{WindowKey, WindowRow};
use super::{StoredRows, WindowRows, Windowed};
use crate::handler::{ApplyError, Fault, Target, panic_text};
use crate::memory::RowMemory;
use crate::rows::fault_at;
use crate::table::{Keys, Table};
use crate::transaction::Transaction;

/// Session windows.
pub(crate) struct Sessions;

/// The sessions of a key by their first moment.
type SessionsOfKey<M> = BTreeMap<Timestamp, WindowRow<M>>;

/// The events of a round, by key, and those of one key in the order of the log.
pub(crate) struct SessionEvents<'w, M: Windowed> {
    window: Window,
    touches: Vec<InTime<'w, M>>,
}

impl<M: Windowed + Merge> SessionEvents<'_, M> {
    /// Loads all sessions that an event may join, by key.
    async fn load(
        &self,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
    ) -> Result<HashMap<M::Key, SessionsOfKey<M>>, ApplyError> {
        let times = self.touches.iter().map(|touch| touch.at);
        let (Some(first), Some(last)) = (times.clone().min(), times.max()) else {
            return Ok(HashMap::new());
        };
        let keys: Vec<_> = self.of_keys().map(|touches| touches[0].key.clone()).collect();
        let gap = self.window.gap();
        let mut sessions: HashMap<M::Key, SessionsOfKey<M>> = HashMap::with_capacity(keys.len());
        let keys = Keys::of(keys.into_iter());
        for values in table.load_sessions(tx, keys, first - gap, last + gap).await? {
            let row = WindowRow::<M>::from_values(values);
            let row = row.map_err(|bad| Fault::somewhere(format!("{}: {bad}", target.name)))?;
            sessions.entry(row.row.key()).or_default().insert(row.span.start, row);
        }
        Ok(sessions)
    }

    fn of_keys(&self) -> impl Iterator<Item = &[InTime<'_, M>]> {
        self.touches.chunk_by(|one, other| one.key == other.key)
    }
}

#[async_trait]
impl<M: Windowed + Merge> WindowRows<M> for Sessions {
    type Rows<'w> = SessionEvents<'w, M>;

    fn new(window: Window, mut touches: Vec<InTime<'_, M>>) -> SessionEvents<'_, M> {
        touches.sort_by(|one, other| one.key.cmp(other.key));
        SessionEvents { window, touches }
    }

    fn is_empty(rows: &SessionEvents<'_, M>) -> bool {
        rows.touches.is_empty()
    }

    async fn apply(
        rows: &SessionEvents<'_, M>,
        table: &Table,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        _: Option<&mut RowMemory<WindowRow<M>>>,
    ) -> Result<(), ApplyError> {
        let mut sessions = rows.load(table, target, tx).await?;
        let (mut written, mut deleted) = (Vec::new(), Keys::none::<WindowKey<M>>());
        for touches in rows.of_keys() {
            let before = sessions.remove(touches[0].key).unwrap_or_default();
            let after = fold(&rows.window, touches, before.clone())?;
            let is_gone = |start: &&Timestamp| !after.contains_key(start);
            for start in before.keys().filter(is_gone) {
                deleted.push(WindowKey::<M>::new(*start, touches[0].key.clone(), Partition(0)));
            }
            let event = touches[touches.len() - 1].event;
            for (start, row) in after {
                if before.get(&start) != Some(&row) {
                    let values = row.into_values().map_err(|invalid| fault_at(event, invalid))?;
                    written.push(values);
                }
            }
        }
        table.delete(tx, deleted).await?;
        Ok(table.upsert(tx, written).await?)
    }

    fn fold_into(rows: &SessionEvents<'_, M>, stored: &mut StoredRows<M>) -> Result<(), Fault> {
        for touches in rows.of_keys() {
            let key = touches[0].key;
            let of_key = |_: &WindowKey<M>, row: &mut WindowRow<M>| row.row.key() == *key;
            let before = stored.extract_if(.., of_key).map(|(_, row)| (row.span.start, row));
            let after = fold(&rows.window, touches, before.collect())?;
            stored.extend(after.into_values().map(|row| (row.key(), row)));
        }
        Ok(())
    }
}

/// Folds the events of one key into its sessions.
fn fold<M: Windowed + Merge>(
    window: &Window,
    touches: &[InTime<'_, M>],
    mut rows: SessionsOfKey<M>,
) -> Result<SessionsOfKey<M>, Fault> {
    let session = |span: Span| Session { first: span.start, last: span.end, events: 0 };
    let mut sessions: Vec<_> = rows.values().map(|row| session(row.span)).collect();
    for touch in touches {
        let (gone, joined) = window.join(&mut sessions, touch.at);
        let gone: Vec<_> = gone.iter().filter_map(|session| rows.remove(&session.first)).collect();
        let row = fold_one(touch.key, gone, touch.event)?;
        let span = Span { start: joined.first, end: joined.last };
        let row = WindowRow { span, partition: Partition(0), row }.normalize();
        let row = row.map_err(|invalid| fault_at(touch.event, invalid))?;
        rows.insert(joined.first, row);
    }
    Ok(rows)
}

/// Merges the rows of the joined sessions and folds the event into the merged row.
fn fold_one<M: Windowed + Merge>(
    key: &M::Key,
    joined: Vec<WindowRow<M>>,
    event: &Recorded<M::Event>,
) -> Result<M, Fault> {
    // The rows are gone after a panic, and with them the whole round.
    let folded = catch_unwind(AssertUnwindSafe(|| {
        let before = joined.into_iter().map(|row| row.row).reduce(Merge::merge);
        M::fold(key, before, event)
    }));
    let row = folded.map_err(|panic| fault_at(event, panic_text(&*panic)))?;
    if row.key() != *key {
        return Err(fault_at(event, "fold gave a row of another key"));
    }
    Ok(row)
}

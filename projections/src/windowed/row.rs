//! The row of a window: the columns of the model's row, and those of the window.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

use kafold_core::row::{
    Column, ColumnKind, ColumnRole, ColumnValue, InvalidValue, Row, RowKey, Value,
};
use kafold_core::window::{Span, Timestamp};
use kafold_core::{Partition, Recorded};

use super::{Place, Windowed};
use crate::checkpoint::int;
use crate::rows::Fold;

/// Most columns of a windowed row, with those of the window.
const COLUMNS_MAX: usize = 128;

pub(super) const START: Column = column("window_start", ColumnKind::Timestamp, ColumnRole::Key);
pub(super) const END: Column = column("window_end", ColumnKind::Timestamp, ColumnRole::Index);
/// The partition whose events a row of [`Place::Spread`] holds.
const PARTITION: Column = column(super::PARTITION, ColumnKind::Integer, ColumnRole::Key);

const fn column(name: &'static str, kind: ColumnKind, role: ColumnRole) -> Column {
    Column { name, kind, nullable: false, role, merge: None }
}

/// A row of a window.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WindowRow<M> {
    pub(crate) span: Span,
    /// For [`Place::Spread`], otherwise 0.
    pub(crate) partition: Partition,
    pub(crate) row: M,
}

/// The key of a row of a window.
pub(crate) struct WindowKey<M: Windowed> {
    start: Timestamp,
    key: M::Key,
    partition: Partition,
    model: PhantomData<fn() -> M>,
}

impl<M: Windowed> WindowKey<M> {
    /// `partition` is the partition of the event, which is a part of the key for [`Place::Spread`] only.
    pub(super) fn new(start: Timestamp, key: M::Key, partition: Partition) -> Self {
        let partition = if is_spread::<M>() { partition } else { Partition(0) };
        Self { start, key, partition, model: PhantomData }
    }

    /// The columns in the order of the primary key. Sessions of a key are next to one another.
    fn parts(&self) -> (Option<&M::Key>, Timestamp, &M::Key, Partition) {
        (M::WINDOW.is_session().then_some(&self.key), self.start, &self.key, self.partition)
    }
}

const fn is_spread<M: Windowed>() -> bool {
    matches!(M::PLACE, Place::Spread)
}

impl<M: Windowed> Clone for WindowKey<M> {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), model: PhantomData, ..*self }
    }
}

impl<M: Windowed> PartialEq for WindowKey<M> {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl<M: Windowed> Eq for WindowKey<M> {}

impl<M: Windowed> PartialOrd for WindowKey<M> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<M: Windowed> Ord for WindowKey<M> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

impl<M: Windowed> Hash for WindowKey<M> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.start, &self.key, self.partition).hash(state);
    }
}

impl<M: Windowed> RowKey for WindowKey<M> {
    const COLUMNS: usize = M::Key::COLUMNS + 1 + is_spread::<M>() as usize;

    fn normalized(self) -> Result<Self, (usize, String)> {
        let after = if M::WINDOW.is_session() { 0 } else { 1 };
        let place = if M::WINDOW.is_session() { M::Key::COLUMNS } else { 0 };
        let start = self.start.normalize().map_err(|reason| (place, reason))?;
        let key = self.key.normalized().map_err(|(nth, reason)| (nth + after, reason))?;
        Ok(Self { start, key, ..self })
    }

    fn append_to(self, columns: &mut [Vec<Value>]) {
        let key_columns = M::Key::COLUMNS;
        let (start, key) = if M::WINDOW.is_session() { (key_columns, 0) } else { (0, 1) };
        columns[start].push(Value::Timestamp(self.start));
        self.key.append_to(&mut columns[key..key + key_columns]);
        if is_spread::<M>() {
            columns[key_columns + 1].push(partition(self.partition));
        }
    }
}

fn partition(partition: Partition) -> Value {
    Value::Integer(int(partition).into())
}

impl<M: Windowed> WindowRow<M> {
    const ALL: &'static [Column; COLUMNS_MAX] = &Self::all();
    const COUNT: usize = M::COLUMNS.len() + 2 + is_spread::<M>() as usize;

    /// The columns of the view, which has none of the partition.
    pub(super) const VIEW_COLUMNS: &'static [Column] = Self::ALL.split_at(M::COLUMNS.len() + 2).0;

    /// The columns in the order of the table. The primary key has its columns in the same order.
    const fn all() -> [Column; COLUMNS_MAX] {
        let mut all = [END; COLUMNS_MAX];
        let mut next = 0;
        if !M::WINDOW.is_session() {
            (all[0], all[1]) = (START, END);
            next = 2;
        }
        let mut left = M::COLUMNS;
        while let [column, rest @ ..] = left {
            all[next] = *column;
            (left, next) = (rest, next + 1);
        }
        if M::WINDOW.is_session() {
            (all[next], all[next + 1]) = (START, END);
        } else if is_spread::<M>() {
            all[next] = PARTITION;
        }
        all
    }
}

impl<M: Windowed> Row for WindowRow<M> {
    type Key = WindowKey<M>;

    const COLUMNS: &'static [Column] = Self::ALL.split_at(Self::COUNT).0;

    fn key(&self) -> WindowKey<M> {
        WindowKey::new(self.span.start, self.row.key(), self.partition)
    }

    fn normalize(self) -> Result<Self, InvalidValue> {
        let named = |column: Column| move |reason| InvalidValue { column: column.name, reason };
        let start = self.span.start.normalize().map_err(named(START))?;
        let end = self.span.end.normalize().map_err(named(END))?;
        Ok(Self { span: Span { start, end }, row: self.row.normalize()?, ..self })
    }

    fn into_values(self) -> Result<Vec<Value>, InvalidValue> {
        let span = [self.span.start, self.span.end].map(Value::Timestamp);
        let mut values = Vec::with_capacity(Self::COUNT);
        if M::WINDOW.is_session() {
            values.extend(self.row.into_values()?);
            values.extend(span);
        } else {
            values.extend(span);
            values.extend(self.row.into_values()?);
        }
        values.extend(is_spread::<M>().then(|| partition(self.partition)));
        Ok(values)
    }

    fn from_values(mut values: Vec<Value>) -> Result<Self, InvalidValue> {
        let (found, expected) = (values.len(), Self::VIEW_COLUMNS.len());
        let is_of_table = is_spread::<M>() && found == Self::COUNT;
        if found != expected && !is_of_table {
            let reason = format!("the row has {expected} columns, found {found} values");
            return Err(InvalidValue { column: START.name, reason });
        }
        let partition = match is_of_table.then(|| values.pop()).flatten() {
            Some(value) => u32::from_value(value)
                .map_err(|reason| InvalidValue { column: PARTITION.name, reason })?,
            None => 0,
        };
        let start = if M::WINDOW.is_session() { M::COLUMNS.len() } else { 0 };
        let mut span = values.splice(start..start + 2, []);
        let mut time = |column: Column| {
            let time = Timestamp::from_value(span.next().unwrap_or(Value::Null));
            time.map_err(|reason| InvalidValue { column: column.name, reason })
        };
        let (start, end) = (time(START)?, time(END)?);
        drop(span);
        let row = M::from_values(values)?;
        Ok(Self { span: Span { start, end }, partition: Partition(partition), row })
    }
}

/// The fold of a [`Windowed`] model in windows that are no sessions.
pub(crate) struct WindowFold<M>(PhantomData<M>);

impl<M: Windowed> Fold for WindowFold<M> {
    type Row = WindowRow<M>;
    type Event = M::Event;

    fn fold(
        key: &WindowKey<M>,
        row: Option<WindowRow<M>>,
        event: &Recorded<M::Event>,
    ) -> Option<WindowRow<M>> {
        let span = M::WINDOW.span_from(key.start);
        let row = M::fold(&key.key, row.map(|before| before.row), event);
        Some(WindowRow { span, partition: key.partition, row })
    }
}

//! What a worker remembers of a read model's rows from one transaction to the next.
//!
//! Only of models whose rows belong to one partition each: whoever moves that partition's checkpoint
//! under its fence is the only one who writes them, so what it committed last is what is there. Whatever
//! else may have changed rows, a transaction that failed included, makes the worker forget all of it.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use kafold_core::{Filter, Partition, Row};
use lru::LruCache;

/// Memory for the keys that were ever written: some eight million of them. When there are more, rows
/// that may be there are read again.
const WRITTEN_BYTES_MAX: usize = 32 << 20;
/// Keys that there is memory for from the first one on.
const WRITTEN_EXPECTED: usize = 1 << 18;

/// See the module.
pub(crate) struct RowMemory<R: Row> {
    /// As they are in the table.
    rows: LruCache<R::Key, R>,
    /// Partitions of which this worker has applied everything.
    from_start: HashSet<Partition>,
    /// The keys of all their rows.
    written: Filter,
}

impl<R: Row> RowMemory<R> {
    /// Of the partitions `from_start` there is no row yet.
    pub(crate) fn new(from_start: HashSet<Partition>, rows_max: NonZeroUsize) -> Self {
        // Grows with what is remembered: one that is made with a limit takes memory for all of it.
        let mut rows = LruCache::unbounded();
        rows.resize(rows_max);
        Self { rows, from_start, written: Filter::of_many(WRITTEN_EXPECTED) }
    }

    /// The row of this key, which events of the partition touch, or that there is none; `None` when
    /// neither is known.
    pub(crate) fn recall(&mut self, partition: Partition, key: &R::Key) -> Option<Option<R>> {
        if self.from_start.contains(&partition) && !self.written.may_hold(key) {
            return Some(None);
        }
        self.rows.get(key).cloned().map(Some)
    }

    /// A row is new. It is kept while there is room: rows that are written once and never again, as
    /// those of an event each, must not push out the others.
    pub(crate) fn inserted(&mut self, key: &R::Key, row: &R) {
        if !self.from_start.is_empty() {
            self.written.add(key);
            if self.written.bytes() > WRITTEN_BYTES_MAX {
                self.from_start.clear();
                self.written = Filter::of_many(WRITTEN_EXPECTED);
            }
        }
        if self.rows.len() < self.rows.cap().get() {
            self.rows.put(key.clone(), row.clone());
        }
    }

    /// A row has changed. The memory of the remembered row is used again.
    pub(crate) fn updated(&mut self, key: &R::Key, row: &R) {
        match self.rows.get_mut(key) {
            Some(remembered) => remembered.clone_from(row),
            None => drop(self.rows.put(key.clone(), row.clone())),
        }
    }

    /// A row is gone.
    pub(crate) fn deleted(&mut self, key: &R::Key) {
        self.rows.pop(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Row)]
    struct Count {
        #[row(key)]
        id: i64,
        count: i64,
    }

    const FIRST: Partition = Partition(0);
    const OTHER: Partition = Partition(1);

    fn memory(rows_max: usize) -> RowMemory<Count> {
        let rows_max = NonZeroUsize::new(rows_max).expect("some");
        RowMemory::new(HashSet::from([FIRST]), rows_max)
    }

    fn count(id: i64, count: i64) -> Count {
        Count { id, count }
    }

    #[test]
    fn a_row_is_recalled_as_it_was_written_last() {
        let mut memory = memory(10);
        assert_eq!(memory.recall(FIRST, &1), Some(None), "nothing was ever written");
        assert_eq!(memory.recall(OTHER, &1), None, "somebody may have written it before");
        memory.inserted(&1, &count(1, 1));
        assert_eq!(memory.recall(FIRST, &1), Some(Some(count(1, 1))));
        memory.updated(&1, &count(1, 2));
        assert_eq!(memory.recall(FIRST, &1), Some(Some(count(1, 2))));
        memory.deleted(&1);
        assert_eq!(memory.recall(FIRST, &1), None, "it is looked up");
    }

    #[test]
    fn no_more_rows_are_remembered_than_may_be_and_new_ones_push_none_out() {
        let mut memory = memory(2);
        (1..=3).for_each(|id| memory.inserted(&id, &count(id, 1)));
        let known = |memory: &mut RowMemory<Count>| {
            (1..=3).filter(|id| memory.recall(FIRST, id).is_some()).collect::<Vec<_>>()
        };
        assert_eq!(known(&mut memory), [1, 2]);
        memory.updated(&3, &count(3, 2));
        assert_eq!(known(&mut memory), [2, 3], "the one that was not used for longest is gone");
    }

    #[test]
    fn when_too_many_keys_were_written_none_is_known_to_be_new() {
        let mut memory = memory(1);
        let keys_max = WRITTEN_BYTES_MAX as i64 / 2;
        let mut written = 0;
        while memory.recall(FIRST, &-1).is_some() {
            assert!(written <= keys_max, "{} bytes are used", memory.written.bytes());
            memory.inserted(&written, &count(written, 1));
            written += 1;
        }
        assert!(written > keys_max / 4, "{written}");
        assert_eq!(memory.written.bytes(), 0);
    }
}

//! What a commands mark says: where in the commands topic, and in the how many-th topic of that name.
//!
//! The marks of a partition never fall. A topic that was deleted begins at offset 0 again, so its marks
//! count from above all of the one before: the lower 48 bits of a mark are an offset, the upper 16 how
//! often the topic was begun anew.

use kafold_core::Offset;

const OFFSET_BITS: u32 = 48;

/// One life of the commands topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Era(u64);

impl Era {
    /// The era that a mark is of.
    pub(crate) fn of(mark: Offset) -> Self {
        Self(mark.0 >> OFFSET_BITS << OFFSET_BITS)
    }

    /// The one after it, if there can be one more.
    pub(crate) fn next(self) -> Option<Self> {
        self.0.checked_add(1 << OFFSET_BITS).map(Self)
    }

    /// The mark of its first offset.
    pub(crate) fn beginning(self) -> Offset {
        Offset(self.0)
    }

    /// The mark of an offset of its topic.
    pub(crate) fn mark(self, offset: Offset) -> Offset {
        self.beginning().plus(offset.0)
    }

    /// The offset of a mark of this era.
    pub(crate) fn offset(self, mark: Offset) -> Offset {
        Offset(mark.0.saturating_sub(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_a_topic_that_was_begun_anew_are_above_all_before() {
        let first = Era::of(Offset(7));
        assert_eq!(first.mark(Offset(7)), Offset(7), "as they always were");
        let second = first.next().expect("the second");
        assert!(second.beginning() > first.mark(Offset((1 << OFFSET_BITS) - 1)));
        let mark = second.mark(Offset(3));
        assert_eq!((Era::of(mark), second.offset(mark)), (second, Offset(3)));
        assert_eq!(Era::of(Offset(u64::MAX)).next(), None);
    }
}

//! Which forwarded commands of a partition are settled, and which answers wait for the log to say so.

use std::collections::{BTreeMap, BTreeSet};

use kafold_core::Offset;

/// Follows the commands of one partition from the first that may not be settled on.
///
/// An answer that the log does not hold by itself, such as a rejection, is given only when an accepted
/// record says that the command is settled: the next owner begins where that record says, and would
/// decide anew whatever lies behind.
#[derive(Debug)]
pub(crate) struct Settlement<A> {
    /// Behind the last command that was taken.
    next: Offset,
    open: BTreeSet<Offset>,
    held: BTreeMap<Offset, A>,
}

impl<A> Settlement<A> {
    pub(crate) fn new(from: Offset) -> Self {
        Self { next: from, open: BTreeSet::new(), held: BTreeMap::new() }
    }

    /// Where the next command to be taken may be.
    pub(crate) fn next(&self) -> Offset {
        self.next
    }

    /// Begins with a command; whatever lies between the last one and it is no command.
    pub(crate) fn take(&mut self, offset: Offset) {
        self.next = self.next.max(offset.plus(1));
        self.open.insert(offset);
    }

    /// Passes over a record that is no command of ours, or that is gone.
    pub(crate) fn pass(&mut self, offset: Offset) {
        self.next = self.next.max(offset.plus(1));
    }

    /// The command's outcome is definite, and its answer is in the log or nobody waits for it.
    pub(crate) fn settle(&mut self, offset: Offset) {
        self.open.remove(&offset);
    }

    /// The command's outcome is definite, and its answer has to wait.
    pub(crate) fn settle_and_hold(&mut self, offset: Offset, answer: A) {
        if self.open.remove(&offset) {
            self.held.insert(offset, answer);
        }
    }

    /// All commands below are settled.
    pub(crate) fn mark(&self) -> Offset {
        self.open.first().copied().unwrap_or(self.next)
    }

    /// Whether an answer waits for the log to say what [`Settlement::mark`] says.
    pub(crate) fn is_awaited(&self) -> bool {
        self.held.first_key_value().is_some_and(|(first, _)| *first < self.mark())
    }

    /// The answers that may be given when the log says that all commands below are settled.
    pub(crate) fn release(&mut self, settled: Offset) -> impl Iterator<Item = A> + use<A> {
        let later = self.held.split_off(&settled);
        std::mem::replace(&mut self.held, later).into_values()
    }

    /// Commands that are not settled.
    pub(crate) fn open(&self) -> usize {
        self.open.len()
    }

    /// Whether no command is open and no answer waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty() && self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released(settlement: &mut Settlement<&'static str>, settled: u64) -> Vec<&'static str> {
        settlement.release(Offset(settled)).collect()
    }

    #[test]
    fn the_mark_stands_at_the_first_command_that_is_not_settled() {
        let mut commands = Settlement::<()>::new(Offset(5));
        assert_eq!(commands.mark(), Offset(5));
        (5..8).for_each(|offset| commands.take(Offset(offset)));
        commands.settle(Offset(6));
        commands.settle(Offset(7));
        assert_eq!((commands.mark(), commands.open()), (Offset(5), 1));
        commands.settle(Offset(5));
        assert_eq!(commands.mark(), Offset(8));
        commands.pass(Offset(8));
        assert_eq!(commands.mark(), Offset(9), "what is no command is settled");
        assert!(commands.is_empty());
    }

    #[test]
    fn a_held_answer_is_given_only_when_the_log_lies_above_its_command() {
        let mut commands = Settlement::new(Offset(0));
        (0..3).for_each(|offset| commands.take(Offset(offset)));
        commands.settle_and_hold(Offset(1), "rejected");
        assert!(!commands.is_awaited(), "command 0 is open: no mark helps yet");
        commands.settle(Offset(0));
        assert_eq!(commands.mark(), Offset(2));
        assert!(commands.is_awaited());
        assert!(released(&mut commands, 1).is_empty(), "the log still says that 1 is open");
        assert_eq!(released(&mut commands, 2), ["rejected"]);
        assert!(released(&mut commands, 9).is_empty(), "given once");
        assert!(!commands.is_empty(), "command 2 is open");
    }

    #[test]
    fn what_was_settled_before_is_not_held_again() {
        let mut commands = Settlement::new(Offset(0));
        commands.take(Offset(0));
        commands.settle(Offset(0));
        commands.settle_and_hold(Offset(0), "late");
        assert!(released(&mut commands, 1).is_empty());
    }
}

//! What one transaction holds and answers, decided without IO.

use std::collections::HashMap;
use std::time::Instant;

use kafold_core::store::{Append, Ticket, View};
use kafold_core::{
    AppendError, Appended, CommandId, ExpectedVersion, Offset, Position, StreamId, Version,
};

use crate::config::{RETRY_AFTER, TICKETS_MAX};
use crate::event::{Known, PARTITION, PlacedEvent, Question, event_bytes};

/// The submissions that appended the last commit of their streams, of this process: what the next
/// commit may be `after`.
///
/// Bounded: entries move through two halves, and the older half is dropped when the newer is full.
#[derive(Default)]
pub(crate) struct Tickets {
    newer: HashMap<StreamId, LastCommit>,
    older: HashMap<StreamId, LastCommit>,
}

/// A submission and the version that it brought its stream to.
type LastCommit = (Ticket, Version);

impl Tickets {
    /// Returns the version of this process's latest commit to the stream, if remembered.
    pub(crate) fn version_of(&self, stream: &StreamId) -> Option<Version> {
        let last = self.newer.get(stream).or_else(|| self.older.get(stream));
        last.map(|(_, version)| *version)
    }

    /// The submission that brought the stream to just this version, if it was one of ours.
    fn at(&self, stream: &StreamId, version: Version) -> Option<Ticket> {
        let last = self.newer.get(stream).or_else(|| self.older.get(stream));
        last.filter(|(_, reached)| *reached == version).map(|(ticket, _)| *ticket)
    }

    /// Remembers what a group that is committed has appended.
    pub(crate) fn remember(
        &mut self,
        last_commits: impl IntoIterator<Item = (StreamId, LastCommit)>,
    ) {
        for (stream, last) in last_commits {
            if self.newer.len() >= TICKETS_MAX / 2 {
                self.older = std::mem::take(&mut self.newer);
            }
            self.newer.insert(stream, last);
        }
    }
}

/// Decides one submission after the other against what the file and the group so far hold. Nothing
/// decided here is true before the transaction is committed.
pub(crate) struct Group<'a> {
    streams: HashMap<&'a StreamId, StreamState>,
    commands: HashMap<(&'a StreamId, CommandId), Appended>,
    /// The offset of the next event.
    next: Offset,
    rows: Vec<PlacedEvent<'a>>,
    event_bytes_max: usize,
    now: Instant,
}

#[derive(Clone, Copy)]
struct StreamState {
    version: Version,
    last: Option<Ticket>,
    /// Whether this group has appended to it.
    touched: bool,
}

impl<'a> Group<'a> {
    /// A group on a file that ends at `end` and says `known` about the questions.
    pub(crate) fn new(
        questions: &[Question<'a>],
        known: &[Known],
        end: Offset,
        tickets: &Tickets,
        event_bytes_max: usize,
        now: Instant,
    ) -> Self {
        let mut streams = HashMap::new();
        let mut commands = HashMap::new();
        for (Question { stream, command, .. }, known) in questions.iter().zip(known) {
            let (version, last) = (known.version, tickets.at(stream, known.version));
            streams.insert(*stream, StreamState { version, last, touched: false });
            if let (Some(command_id), Some(first)) = (command, known.first) {
                commands.insert((*stream, *command_id), first);
            }
        }
        Self { streams, commands, next: end, rows: Vec::new(), event_bytes_max, now }
    }

    /// Decides an append; `begin` says whether its caller still waits for the attempt.
    pub(crate) fn append(
        &mut self,
        append: &'a Append,
        begin: impl FnOnce() -> bool,
    ) -> Result<Appended, AppendError> {
        let command = (&append.stream, append.commit.command_id());
        if let Some(first) = self.commands.get(&command) {
            return Ok(Appended { duplicate: true, ..*first });
        }
        self.check_deadline(append.deadline)?;
        let state = self.check_after(&append.stream, append.after)?;
        check_version(&append.stream, append.expected, state.version)?;
        self.check_sizes(append)?;
        if !begin() {
            return Err(deadline_passed());
        }
        let appended = self.place(append, state.version);
        self.commands.insert(command, appended);
        let state =
            StreamState { version: appended.version, last: Some(append.ticket), touched: true };
        self.streams.insert(&append.stream, state);
        Ok(appended)
    }

    /// Decides a confirm.
    pub(crate) fn confirm(&self, view: &View) -> Result<(), AppendError> {
        self.check_deadline(view.deadline)?;
        let state = self.check_after(&view.stream, view.after)?;
        check_version(&view.stream, ExpectedVersion::Exact(view.version), state.version)
    }

    /// The events to insert, in the order of the log.
    pub(crate) fn rows(&self) -> &[PlacedEvent<'a>] {
        &self.rows
    }

    /// The last submission to each stream that was appended to.
    pub(crate) fn last_commits(&self) -> impl Iterator<Item = (StreamId, LastCommit)> {
        let touched = self.streams.iter().filter(|(_, state)| state.touched);
        touched
            .filter_map(|(stream, state)| Some(((*stream).clone(), (state.last?, state.version))))
    }

    fn place(&mut self, append: &'a Append, before: Version) -> Appended {
        let (stream, command_id) = (&append.stream, append.commit.command_id());
        for (event, index) in append.commit.events().iter().zip(0..) {
            let version = before.plus(index + 1);
            let offset = self.next.plus(index);
            self.rows.push(PlacedEvent::new(stream, version, offset, command_id, event));
        }
        let count = append.commit.count();
        let last = self.next.plus(count - 1);
        self.next = self.next.plus(count);
        Appended {
            version: before.plus(count),
            position: Position { partition: PARTITION, offset: last },
            duplicate: false,
        }
    }

    fn check_deadline(&self, deadline: Option<Instant>) -> Result<(), AppendError> {
        match deadline {
            Some(deadline) if deadline <= self.now => Err(deadline_passed()),
            _ => Ok(()),
        }
    }

    fn check_after(
        &self,
        stream: &StreamId,
        after: Option<Ticket>,
    ) -> Result<StreamState, AppendError> {
        let state = self.streams.get(stream).copied();
        let state = state.expect("every submission's stream is among the questions");
        if after.is_none() || after == state.last {
            return Ok(state);
        }
        Err(AppendError::NotAppended {
            reason: format!("the submission that stream {stream} was to be behind is not its last"),
        })
    }

    fn check_sizes(&self, append: &Append) -> Result<(), AppendError> {
        let sizes = append.commit.events().iter().map(|event| event_bytes(&append.stream, event));
        let (size, limit) = (sizes.max().unwrap_or(0), self.event_bytes_max);
        if size > limit { Err(AppendError::TooLarge { size, limit }) } else { Ok(()) }
    }
}

fn check_version(
    stream: &StreamId,
    expected: ExpectedVersion,
    actual: Version,
) -> Result<(), AppendError> {
    if expected.admits(actual) {
        return Ok(());
    }
    Err(AppendError::Conflict { stream: stream.clone(), expected, actual })
}

/// The answer to whoever stopped waiting before anything of his was written.
pub(crate) fn deadline_passed() -> AppendError {
    AppendError::unavailable(RETRY_AFTER, "the deadline passed before the store came to it")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kafold_core::clock::{Clock, SystemClock};
    use kafold_core::testing::{commit, exact, new_stream};

    use super::*;

    const NO_LIMIT: usize = usize::MAX;

    fn append(stream: &StreamId, version: u64, after: Option<Ticket>) -> Append {
        let (stream, expected, ticket) = (stream.clone(), exact(version), Ticket::next());
        Append { stream, expected, commit: commit(2), ticket, after, deadline: None }
    }

    fn known(version: u64, first: Option<Appended>) -> Known {
        Known { version: Version(version), head: None, first }
    }

    fn question(stream: &StreamId, command: Option<CommandId>) -> Question<'_> {
        Question { stream, command, last: None }
    }

    /// A group on a file where the stream has the version and the log ends at 10.
    fn group<'a>(stream: &'a StreamId, version: u64, tickets: &Tickets) -> Group<'a> {
        let known = known(version, None);
        let now = SystemClock.instant();
        Group::new(&[question(stream, None)], &[known], Offset(10), tickets, NO_LIMIT, now)
    }

    #[test]
    fn offsets_go_on_at_the_end_of_the_log_without_gap() {
        let stream = new_stream();
        let (one, refused, two) =
            (append(&stream, 4, None), append(&stream, 5, None), append(&stream, 6, None));
        let mut group = group(&stream, 4, &Tickets::default());
        let first = group.append(&one, || true).expect("fits");
        assert!(matches!(group.append(&refused, || true), Err(AppendError::Conflict { .. })));
        let second = group.append(&two, || true).expect("fits behind the first");
        assert_eq!((first.position.offset.0, second.position.offset.0), (11, 13));
        let offsets: Vec<_> = group.rows().iter().map(|row| row.offset.0).collect();
        let versions: Vec<_> = group.rows().iter().map(|row| row.version.0).collect();
        assert_eq!((offsets, versions), (vec![10, 11, 12, 13], vec![5, 6, 7, 8]));
    }

    #[test]
    fn a_caller_that_gave_up_has_nothing_written() {
        let stream = new_stream();
        let (given_up, next) = (append(&stream, 0, None), append(&stream, 0, None));
        let mut group = group(&stream, 0, &Tickets::default());
        let answer = group.append(&given_up, || false);
        assert!(matches!(answer, Err(AppendError::Unavailable { .. })), "{answer:?}");
        group.append(&next, || true).expect("the stream is as it was");
        assert_eq!(group.rows().len(), 2);
    }

    #[test]
    fn an_expired_submission_is_not_written_but_a_duplicate_is_answered() {
        let stream = new_stream();
        let now = SystemClock.instant();
        let mut late = append(&stream, 3, None);
        late.deadline = Some(now);
        let position = Position { partition: PARTITION, offset: Offset(7) };
        let first = Appended { version: Version(2), position, duplicate: false };
        for (found, is_ok) in [(Some(first), true), (None, false)] {
            let known = known(3, found);
            let questions = [question(&stream, Some(late.commit.command_id()))];
            let tickets = Tickets::default();
            let mut group = Group::new(&questions, &[known], Offset(10), &tickets, NO_LIMIT, now);
            assert_eq!(group.append(&late, || true).is_ok(), is_ok);
            assert!(group.rows().is_empty());
        }
    }

    #[test]
    fn a_commit_behind_a_ticket_fits_only_where_that_ticket_left_the_stream() {
        let stream = new_stream();
        let ticket = Ticket::next();
        let mut tickets = Tickets::default();
        tickets.remember([(stream.clone(), (ticket, Version(4)))]);
        let behind = append(&stream, 4, Some(ticket));
        group(&stream, 4, &tickets).append(&behind, || true).expect("is directly behind it");

        // Another process has appended since: even a demand of any version is refused.
        let mut overtaken = append(&stream, 0, Some(ticket));
        overtaken.expected = ExpectedVersion::Any;
        let answer = group(&stream, 5, &tickets).append(&overtaken, || true);
        assert!(matches!(answer, Err(AppendError::NotAppended { .. })), "{answer:?}");
        let answer = group(&stream, 4, &Tickets::default()).append(&behind, || true);
        assert!(matches!(answer, Err(AppendError::NotAppended { .. })), "{answer:?}");
    }

    #[test]
    fn an_expired_view_is_not_confirmed() {
        let (stream, tickets) = (new_stream(), Tickets::default());
        let group = group(&stream, 4, &tickets);
        let view = |deadline| View {
            stream: stream.clone(),
            version: Version(4),
            after: None,
            deadline: Some(deadline),
        };
        group.confirm(&view(group.now + Duration::from_secs(1))).expect("is the newest");
        let answer = group.confirm(&view(group.now));
        assert!(matches!(answer, Err(AppendError::Unavailable { .. })), "{answer:?}");
    }

    #[test]
    fn remembered_tickets_are_bounded_and_the_newest_stay() {
        let mut tickets = Tickets::default();
        let newest = new_stream();
        for n in 0..TICKETS_MAX * 2 {
            let stream = StreamId::new("order", &n.to_string()).expect("a stream id");
            tickets.remember([(stream, (Ticket::next(), Version(1)))]);
        }
        tickets.remember([(newest.clone(), (Ticket::next(), Version(1)))]);
        assert!(tickets.newer.len() + tickets.older.len() <= TICKETS_MAX);
        assert!(tickets.at(&newest, Version(1)).is_some());
    }
}

//! What was asked of the writers, and the check of every answer.

use std::hash::{Hash, Hasher};
use std::sync::OnceLock;

use kafold_core::store::{Appended, Ticket};
use kafold_core::{AppendError, CommandId, ExpectedVersion, RecordedEvent, Version};
use uuid::Uuid;

use crate::sim::reference::{Reference, Violation, is_conflict};
use crate::wire::{Body, Record};
use crate::writer::RequestId;

/// Submissions in one history at most.
pub(super) const ATTEMPTS_MAX: usize = 8;

/// All calls of a history so far.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Calls {
    pub(super) attempts: Vec<Attempt>,
    commands: u8,
    confirms: u8,
    open: Vec<Call>,
}

/// One submission; its place among them is in its events' ids.
#[derive(Debug, Clone, Hash)]
pub(super) struct Attempt {
    by: usize,
    pub(super) command: u8,
    pub(super) events: u8,
    pub(super) expected: ExpectedVersion,
    /// Some record of it was handed to the producer.
    produced: bool,
    /// It was answered that it is not in the log, nor ever will be.
    denied: bool,
    accepted: bool,
}

/// A call without an answer.
#[derive(Debug, Clone, Hash)]
struct Call {
    request: RequestId,
    by: usize,
    /// The stream's true version when the call began.
    before: Version,
    /// The view to confirm; `None` for a submission.
    view: Option<Version>,
}

impl Calls {
    /// The commands so far, and how many events each decides.
    pub(super) fn commands(&self) -> impl Iterator<Item = (u8, u8)> {
        (0..self.commands).filter_map(|command| {
            let first = self.attempts.iter().find(|attempt| attempt.command == command)?;
            Some((command, first.events))
        })
    }

    /// A submission begins; its place among the attempts.
    pub(super) fn submit(
        &mut self,
        by: usize,
        command: Option<u8>,
        events: u8,
        expected: ExpectedVersion,
        before: Version,
    ) -> u8 {
        let place = self.attempts.len() as u8;
        let command = command.unwrap_or_else(|| {
            self.commands += 1;
            self.commands - 1
        });
        let (produced, denied, accepted) = (false, false, false);
        self.attempts.push(Attempt { by, command, events, expected, produced, denied, accepted });
        self.open.push(Call { request: RequestId(place.into()), by, before, view: None });
        place
    }

    pub(super) fn confirm(&mut self, by: usize, view: Version, before: Version) -> RequestId {
        let request = RequestId(ATTEMPTS_MAX as u64 + u64::from(self.confirms));
        self.confirms += 1;
        self.open.push(Call { request, by, before, view: Some(view) });
        request
    }

    /// The writer is gone: its callers know nothing.
    pub(super) fn abandon(&mut self, by: usize) {
        self.open.retain(|call| call.by != by);
    }

    pub(super) fn is_waiting(&self, by: usize) -> bool {
        self.open.iter().any(|call| call.by == by)
    }

    pub(super) fn produced(&mut self, record: &Record) {
        if let Body::Event(body) = &record.body {
            self.attempts[attempt_of(&body.event)].produced = true;
        }
    }

    /// A commit of `events` became true of the log.
    pub(super) fn accepted(&mut self, last: &RecordedEvent) -> Result<(), Violation> {
        let place = attempt_of(last);
        let attempt = &mut self.attempts[place];
        attempt.accepted = true;
        let before = Version(last.version.0 - u64::from(attempt.events));
        if attempt.denied {
            return Err(format!("attempt {place} is accepted though that was denied"));
        }
        if !attempt.expected.admits(before) {
            let expected = attempt.expected;
            return Err(format!("attempt {place}, expecting {expected}, is accepted at {before}"));
        }
        Ok(())
    }

    // --- answers -------------------------------------------------------------------------------

    fn close(&mut self, request: RequestId) -> Result<Call, Violation> {
        match self.open.iter().position(|call| call.request == request) {
            Some(place) => Ok(self.open.remove(place)),
            None => Err(format!("{request:?} is answered twice")),
        }
    }

    /// The answer to a submission; `known` is the version that its writer's node reads back.
    pub(super) fn appended(
        &mut self,
        request: RequestId,
        result: &Result<Appended, AppendError>,
        known: Version,
        truth: &Reference,
    ) -> Result<(), Violation> {
        let call = self.close(request)?;
        let place = request.0 as usize;
        let attempt = &self.attempts[place];
        let (before, now) = (call.before, version(truth));
        match result {
            Ok(appended) => check_appended(place, attempt, *appended, known, truth),
            Err(AppendError::Conflict { actual, .. }) => {
                let expected = attempt.expected;
                let wanted = expected.version();
                if !wanted.is_some_and(|wanted| is_conflict(wanted, *actual, before, now)) {
                    return Err(format!(
                        "attempt {place}, expecting {expected}, conflicts with {actual}, was {before} to {now}"
                    ));
                }
                self.deny(place)
            }
            Err(AppendError::NotAppended { .. }) => self.deny(place),
            Err(AppendError::OutcomeUnknown { .. }) => {
                Err(format!("attempt {place} is unknown though it has no deadline"))
            }
            Err(
                AppendError::Unavailable { .. }
                | AppendError::NotOwner { .. }
                | AppendError::TooLarge { .. },
            ) if attempt.produced => Err(format!("attempt {place} is refused and was produced")),
            Err(_) => Ok(()),
        }
    }

    /// The attempt, and what its writer had produced of the same command, never is in the log.
    fn deny(&mut self, place: usize) -> Result<(), Violation> {
        let Attempt { by, command, .. } = self.attempts[place];
        for (other, attempt) in self.attempts.iter_mut().enumerate() {
            let is_copy = attempt.by == by && attempt.command == command && attempt.produced;
            if other != place && !is_copy {
                continue;
            }
            if attempt.accepted {
                return Err(format!("attempt {other} is denied though it is in the log"));
            }
            attempt.denied = true;
        }
        Ok(())
    }

    pub(super) fn confirmed(
        &mut self,
        request: RequestId,
        result: &Result<(), AppendError>,
        truth: &Reference,
    ) -> Result<(), Violation> {
        let call = self.close(request)?;
        let Some(seen) = call.view else { return Err(format!("{request:?} was no confirm")) };
        let (before, now) = (call.before, version(truth));
        let holds = match result {
            Ok(()) => before <= seen && seen <= now,
            Err(AppendError::Conflict { actual, .. }) => is_conflict(seen, *actual, before, now),
            Err(
                AppendError::NotAppended { .. }
                | AppendError::Unavailable { .. }
                | AppendError::NotOwner { .. },
            ) => true,
            Err(AppendError::OutcomeUnknown { .. } | AppendError::TooLarge { .. }) => false,
        };
        match holds {
            true => Ok(()),
            false => Err(format!("view {seen} is answered {result:?}, was {before} to {now}")),
        }
    }
}

fn check_appended(
    place: usize,
    attempt: &Attempt,
    appended: Appended,
    known: Version,
    truth: &Reference,
) -> Result<(), Violation> {
    let Some(accepted) = truth.commits.get(&command_id(attempt.command)) else {
        return Err(format!("attempt {place} is acknowledged and is not in the log"));
    };
    let told = (appended.version, appended.position.offset);
    if told != (accepted.version, accepted.offset) {
        return Err(format!("attempt {place} is at {accepted:?}, told {appended:?}"));
    }
    if !appended.duplicate && !attempt.accepted {
        return Err(format!("attempt {place} is acknowledged as the one that is in the log"));
    }
    match known < appended.version {
        true => Err(format!("attempt {place} is acknowledged and not read back")),
        false => Ok(()),
    }
}

/// The version of the model's one stream.
pub(super) fn version(truth: &Reference) -> Version {
    Version(truth.events.len() as u64)
}

pub(super) fn command_id(command: u8) -> CommandId {
    CommandId(Uuid::from_u128(u128::from(command) + 1))
}

pub(super) fn event_id(attempt: u8, index: u8) -> Uuid {
    Uuid::from_u128(u128::from(attempt) << 8 | u128::from(index))
}

fn attempt_of(event: &RecordedEvent) -> usize {
    (event.metadata.event_id.as_u128() >> 8) as usize
}

/// Tickets are never used twice in a process; those of a history are the same in all of them.
pub(super) fn ticket(attempt: u8) -> Ticket {
    static TICKETS: OnceLock<[Ticket; ATTEMPTS_MAX]> = OnceLock::new();
    TICKETS.get_or_init(|| std::array::from_fn(|_| Ticket::next()))[usize::from(attempt)]
}

/// Feeds what tells one record of the model from another.
pub(super) fn hash_record(record: &Record, into: &mut impl Hasher) {
    (record.stamp.claim, record.stamp.seq).hash(into);
    match &record.body {
        Body::Event(body) => (body.event.metadata.event_id, body.event.version).hash(into),
        Body::Claim(_) => 1.hash(into),
        Body::Barrier => 2.hash(into),
    }
}

//! What is taken, and what is refused before anything is produced.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kafold_core::store::{Append, Owner, View};
use kafold_core::{AppendError, StreamId};

use super::messages::{Output, RequestId};
use super::streams::{Ask, Waiting};
use super::{PartitionWriter, Phase, Turn};
use crate::wire::{check_event, event_size};

/// After which a caller may try again what is answered `Unavailable`.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(500);

impl PartitionWriter {
    pub(super) fn submit(&mut self, request: RequestId, append: Append, turn: &mut Turn<'_>) {
        match self.admit(&append) {
            Ok(bytes) => {
                let (stream, deadline) = (append.stream.clone(), append.deadline);
                let ask = Ask::Append(append);
                self.enqueue(&stream, Waiting { request, ask, deadline, bytes });
            }
            Err(error) => turn.say(Output::Appended { request, result: Err(error) }),
        }
    }

    pub(super) fn confirm(&mut self, request: RequestId, view: View, turn: &mut Turn<'_>) {
        match self.admit_request() {
            Ok(()) => {
                let (stream, deadline) = (view.stream.clone(), view.deadline);
                let ask = Ask::Confirm(view);
                self.enqueue(&stream, Waiting { request, ask, deadline, bytes: 0 });
            }
            Err(error) => turn.say(Output::Confirmed { request, result: Err(error) }),
        }
    }

    /// The bytes of the commit's records, if it can be taken.
    fn admit(&self, append: &Append) -> Result<usize, AppendError> {
        self.admit_request()?;
        let limits = &self.config.limits;
        let mut bytes = 0;
        for event in append.commit.events() {
            check_event(event).map_err(|reason| AppendError::NotAppended { reason })?;
            let size = event_size(&self.config.log, &append.stream, event);
            if size > limits.record_bytes_max {
                return Err(AppendError::TooLarge { size, limit: limits.record_bytes_max });
            }
            bytes += size;
        }
        if bytes > limits.request_bytes_max {
            return Err(AppendError::TooLarge { size: bytes, limit: limits.request_bytes_max });
        }
        if self.request_bytes + bytes > limits.request_bytes_max {
            return Err(self.unavailable("too many bytes wait for the log"));
        }
        if self.unindexed_events >= limits.unindexed_events_max {
            return Err(self.unavailable("the stream index is too far behind the log"));
        }
        Ok(bytes)
    }

    fn admit_request(&self) -> Result<(), AppendError> {
        if let Some(error) = self.refusal() {
            return Err(error);
        }
        // Commits whose callers gave up are still pending.
        if self.requests.max(self.pending.len()) >= self.config.limits.requests_max {
            return Err(self.unavailable("too many requests wait for the log"));
        }
        Ok(())
    }

    /// Why nothing is taken any more; `None` while the partition may still be or become ours.
    pub(super) fn refusal(&self) -> Option<AppendError> {
        let partition = self.config.partition;
        match &self.phase {
            Phase::Superseded { by, .. } => {
                Some(AppendError::NotOwner { partition, owner: Some(Owner::clone(by)) })
            }
            Phase::Unplaced(cause) | Phase::Halted(cause) => Some(AppendError::Unavailable {
                retry_after: RETRY_AFTER,
                cause: Arc::clone(cause),
            }),
            Phase::Released => Some(AppendError::NotOwner { partition, owner: None }),
            _ if self.releasing => Some(AppendError::NotOwner { partition, owner: None }),
            _ => None,
        }
    }

    pub(super) fn unavailable(&self, what: &str) -> AppendError {
        let partition = self.config.partition;
        AppendError::unavailable(RETRY_AFTER, format!("partition {partition}: {what}"))
    }

    fn enqueue(&mut self, id: &StreamId, waiting: Waiting) {
        self.requests += 1;
        self.request_bytes += waiting.bytes;
        self.note_deadline(waiting.deadline);
        self.asked_deadline = super::earlier(self.asked_deadline, waiting.deadline);
        self.streams.entry(id).waiting.push_back(waiting);
        self.ready.push(id.clone());
    }

    pub(super) fn expired(&self) -> AppendError {
        self.unavailable("the deadline passed before anything was written")
    }

    pub(super) fn note_deadline(&mut self, deadline: Option<Instant>) {
        self.earliest_deadline = super::earlier(self.earliest_deadline, deadline);
    }
}

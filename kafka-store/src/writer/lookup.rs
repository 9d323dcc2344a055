//! Loads of streams and look-ups of commands.

use std::sync::Arc;

use kafold_core::store::Appended;
use kafold_core::{AppendError, CommandId, Offset, Position, ReadError, StreamId};

use super::admit::RETRY_AFTER;
use super::messages::StreamHead;
use super::streams::{Ask, Knowledge, NotGapless, Stream, Waiting};
use super::{IntoCause, PartitionWriter, Turn};
use crate::fold::LogDiverged;

impl PartitionWriter {
    /// Whether another load or look-up may begin; else the stream gets its turn later.
    pub(super) fn take_lookup(&mut self, id: &StreamId, stream: &mut Stream) -> bool {
        if self.streams.lookups < self.config.limits.loads_max {
            self.streams.lookups += 1;
            return true;
        }
        if !stream.queued {
            stream.queued = true;
            self.streams.lookup_queue.push_back(id.clone());
        }
        false
    }

    pub(super) fn loaded(
        &mut self,
        id: StreamId,
        head: Result<StreamHead, ReadError>,
        turn: &mut Turn<'_>,
    ) {
        let recent_max = self.config.limits.recent_commands_max;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !matches!(stream.knowledge, Knowledge::Loading(_)) {
            return;
        }
        match head {
            Ok(head) => {
                let learned = self.streams.learn(&id, |stream| stream.loaded(head, recent_max));
                if let Some(Err(broken)) = learned {
                    return self.halt_at(self.reader.fold().next(), id, &broken, turn);
                }
            }
            Err(error) => {
                stream.knowledge = Knowledge::Unknown;
                for waiting in self.streams.take_waiting_of(&id) {
                    self.answer_waiting_one(waiting, &cannot_look(&error), turn);
                }
            }
        }
        self.streams.lookups -= 1;
        self.ready.push(id);
    }

    pub(super) fn found(
        &mut self,
        id: StreamId,
        command_id: CommandId,
        found: Result<Option<Appended>, ReadError>,
        turn: &mut Turn<'_>,
    ) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.finding != Some(command_id) {
            return;
        }
        stream.finding = None;
        let concerns = |waiting: &Waiting| match &waiting.ask {
            Ask::Append(append) => append.commit.command_id() == command_id,
            Ask::Confirm(_) => false,
        };
        let first = stream.waiting.front().is_some_and(concerns);
        match found {
            Ok(None) => stream.not_found = Some(command_id),
            Ok(Some(appended)) if first => {
                if let Some(waiting) = stream.waiting.pop_front() {
                    let result = Ok(Appended { duplicate: true, ..appended });
                    self.answer_append(waiting.request, waiting.bytes, result, turn);
                }
            }
            Err(error) if first => {
                if let Some(waiting) = stream.waiting.pop_front() {
                    self.answer_waiting_one(waiting, &cannot_look(&error), turn);
                }
            }
            // Whoever asked is gone.
            Ok(Some(_)) | Err(_) => {}
        }
        self.streams.lookups -= 1;
        self.ready.push(id);
    }

    pub(super) fn halt_at(
        &mut self,
        offset: Offset,
        stream: StreamId,
        broken: &NotGapless,
        turn: &mut Turn<'_>,
    ) {
        let position = Position { partition: self.config.partition, offset };
        let (actual, found) = (broken.actual, broken.found);
        let diverged = LogDiverged::BrokenStream { position, stream, actual, found };
        self.halt(diverged.into_cause(), turn);
    }
}

fn cannot_look(error: &ReadError) -> AppendError {
    match error {
        ReadError::Unavailable { retry_after, cause } => {
            AppendError::Unavailable { retry_after: *retry_after, cause: Arc::clone(cause) }
        }
        ReadError::Diverged { .. } => AppendError::unavailable(RETRY_AFTER, error.clone()),
    }
}

//! A stream's snapshot and events become a state, and long streams become snapshots.

use std::sync::Arc;

use futures_util::TryStreamExt;

use super::slot::{Proven, RecentCommands, Slot};
use super::{CommandHandler, HandleError, Job, RETRY_AFTER, SNAPSHOT_TIMEOUT};
use crate::aggregate::Aggregate;
use crate::codec;
use crate::event::RecordedEvent;
use crate::ids::{StreamId, Version};
use crate::snapshot::{Snapshot, SnapshotSchema, SnapshotStore};
use crate::store::ReadError;

/// Where snapshots are, and how a state becomes one.
pub(super) struct Snapshots<A> {
    pub(super) store: Arc<dyn SnapshotStore>,
    pub(super) schema: SnapshotSchema<A>,
}

impl<A> Clone for Snapshots<A> {
    fn clone(&self) -> Self {
        Self { store: Arc::clone(&self.store), schema: self.schema }
    }
}

impl<A: Aggregate> CommandHandler<A> {
    /// Loads the stream, or reads what a conflict told of. Without success the slot is empty.
    pub(super) async fn make_current(
        &self,
        slot: &mut Slot<A>,
        stream: &StreamId,
    ) -> Result<(), HandleError<A::Error>> {
        let found = if slot.is_loaded() { "hit" } else { "miss" };
        metrics::counter!("kafold_hot_states_total", "category" => A::CATEGORY, "result" => found)
            .increment(1);
        if slot.is_current() {
            return Ok(());
        }
        let proven = match slot.take_to_read_on() {
            Some(known) => self.read_on(known, stream).await?,
            None => self.read_all(stream).await?,
        };
        slot.set_proven(proven);
        Ok(())
    }

    /// Returns a state that has all events up to a version which is in the log. The index of a stream of
    /// another node is fed behind the write.
    pub(super) async fn state_from(
        &self,
        job: &Job<'_, A>,
        confirmed: Version,
    ) -> Result<(A, Version), HandleError<A::Error>> {
        let slot = self.states.slot(&job.stream);
        for attempt in 1.. {
            let mut slot = slot.lock().await;
            slot.settle();
            slot.moved_to(confirmed);
            self.make_current(&mut slot, &job.stream).await?;
            let state = slot.proven().filter(|(_, version)| *version >= confirmed);
            if let Some((state, version)) = state {
                return Ok((state.clone(), version));
            }
            drop(slot);
            // The wait before the second attempt has no pause.
            if !self.wait(attempt + 1, job).await {
                break;
            }
        }
        let why = format!("version {confirmed} of stream {} is not in the index yet", job.stream);
        Err(ReadError::unavailable(RETRY_AFTER, why).into())
    }

    async fn read_all(&self, stream: &StreamId) -> Result<Proven<A>, HandleError<A::Error>> {
        let begin = match self.load_snapshot(stream).await? {
            Some(saved) => saved,
            None => Proven::empty(self.config.recent_commands_max),
        };
        self.read_on(begin, stream).await
    }

    async fn read_on(
        &self,
        mut proven: Proven<A>,
        stream: &StreamId,
    ) -> Result<Proven<A>, HandleError<A::Error>> {
        let mut events = self.store.read(stream, proven.version);
        while let Some(recorded) = events.try_next().await? {
            self.apply(&mut proven, &recorded)?;
        }
        Ok(proven)
    }

    fn apply(
        &self,
        proven: &mut Proven<A>,
        recorded: &RecordedEvent,
    ) -> Result<(), HandleError<A::Error>> {
        let (next, found) = (proven.version.plus(1), recorded.version);
        if found != next {
            let reason = format!("version {found} was read where {next} belongs");
            let what = format!("stream {}", recorded.stream);
            return Err(ReadError::diverged(what, reason).into());
        }
        let event = codec::decode(&recorded.event_type, &recorded.payload)
            .map_err(|error| HandleError::Codec { stream: recorded.stream.clone(), error })?;
        proven.apply(recorded, &event);
        Ok(())
    }

    /// The saved state, if there is one that today's code can read and that the log confirms.
    async fn load_snapshot(
        &self,
        stream: &StreamId,
    ) -> Result<Option<Proven<A>>, HandleError<A::Error>> {
        let Some(snapshots) = &self.snapshots else { return Ok(None) };
        let snapshot = match snapshots.store.load(stream).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%stream, %error, "no snapshot could be loaded, reading all events");
                None
            }
        };
        let Some(snapshot) = snapshot.filter(|found| found.schema == snapshots.schema.name) else {
            return Ok(None);
        };
        if !self.is_of_this_log(&snapshot).await? {
            tracing::warn!(%stream, "the snapshot is of another log and is ignored");
            return Ok(None);
        }
        match (snapshots.schema.decode)(&snapshot.state) {
            Ok(state) => Ok(Some(self.restore(state, snapshot))),
            Err(error) => {
                tracing::warn!(%stream, %error, "the snapshot's state cannot be read, reading all events");
                Ok(None)
            }
        }
    }

    /// Whether the event that the snapshot ends with is in the log where the snapshot says.
    async fn is_of_this_log(&self, snapshot: &Snapshot) -> Result<bool, HandleError<A::Error>> {
        let anchor = snapshot.recent_commands.last();
        let Some(&(command_id, version, position)) = anchor else { return Ok(false) };
        let Some(before) = version.0.checked_sub(1) else { return Ok(false) };
        let found = self.store.read(&snapshot.stream, Version(before)).try_next().await?;
        Ok(version == snapshot.version
            && found.is_some_and(|event| {
                (event.command_id, event.version, event.position) == (command_id, version, position)
            }))
    }

    fn restore(&self, state: A, snapshot: Snapshot) -> Proven<A> {
        // Whether older commands are missing is not known: the store is asked for them.
        let mut recent = RecentCommands::new(self.config.recent_commands_max, false);
        let last = snapshot.recent_commands.last().map(|(.., position)| *position);
        for (command_id, version, position) in snapshot.recent_commands {
            recent.add(command_id, version, position);
        }
        let version = snapshot.version;
        Proven { state, version, last, recent, saved: version }
    }

    /// The snapshot to be saved now, if the stream has grown enough since the one before. Asked
    /// again only when it has grown as much again, so that a broken snapshot store is not asked for
    /// every command.
    pub(super) fn due_snapshot(&self, job: &Job<'_, A>, slot: &mut Slot<A>) -> Option<Snapshot> {
        let snapshots = self.snapshots.as_ref()?;
        let proven = slot.proven_mut()?;
        if proven.version < proven.saved.plus(self.config.snapshot_every.max(1)) {
            return None;
        }
        proven.saved = proven.version;
        snapshots.of(&job.stream, proven)
    }

    /// Saves a snapshot. It is of use later and of no meaning now: a failure is logged.
    pub(super) async fn save(&self, snapshot: Option<Snapshot>) {
        let (Some(snapshots), Some(snapshot)) = (&self.snapshots, snapshot) else { return };
        let deadline = self.clock.instant() + SNAPSHOT_TIMEOUT;
        let stream = &snapshot.stream;
        match self.within(deadline, snapshots.store.save(&snapshot)).await {
            Some(Ok(())) => {}
            Some(Err(error)) => tracing::warn!(%stream, %error, "the snapshot was not saved"),
            None => tracing::warn!(%stream, "the snapshot was not saved in {SNAPSHOT_TIMEOUT:?}"),
        }
    }
}

impl<A> Snapshots<A> {
    fn of(&self, stream: &StreamId, proven: &Proven<A>) -> Option<Snapshot> {
        match (self.schema.encode)(&proven.state) {
            Ok(state) => Some(Snapshot {
                stream: stream.clone(),
                version: proven.version,
                schema: self.schema.name.to_owned(),
                state,
                recent_commands: proven.recent.iter().copied().collect(),
            }),
            Err(error) => {
                tracing::warn!(%stream, %error, "the state cannot be saved as a snapshot");
                None
            }
        }
    }
}

//! [`EmbeddedSource`], the [`EventSource`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kafold_core::store::{Batch, Cursor, SourceMessage, Subscription};
use kafold_core::{Clock, EventSource, Offset, Partition, ReadError, RecordedEvent, StreamId};
use kafold_migrations::SqliteDatabase;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch};
use uuid::Uuid;

use crate::config::POLL_INTERVAL;
use crate::error::not_read;
use crate::event::{self, PARTITION};
use crate::guard;

/// The remedy for a position of another file.
const REMEDY: &str = "name the file that it was, or build what stores positions (checkpoints, snapshots) \
                      anew from this one with `kafold positions reset --reason TEXT`";

/// The name of a reader, and the identity of its database.
type ReaderName = (String, Option<String>);

/// Reads the log in a SQLite file, in order. Cheap to clone; clones share the names of readers.
///
/// A reader is woken by commits of this process at once and sees those of other processes within
/// 100 ms. Of the readers of one name in this process one has the partition, the others wait.
#[derive(Clone)]
pub struct EmbeddedSource {
    database: SqliteDatabase,
    clock: Arc<dyn Clock>,
    log_id: Arc<str>,
    /// The holder of a name's lock has the partition under the name.
    readers: Arc<Mutex<HashMap<ReaderName, Arc<AsyncMutex<()>>>>>,
}

impl EmbeddedSource {
    /// Opens the log in the file. A file whose `kafold_event` is the index of another log is
    /// [`ReadError::Diverged`].
    pub async fn open(database: SqliteDatabase, clock: Arc<dyn Clock>) -> Result<Self, ReadError> {
        let log_id = check_own_log(&database).await?.into();
        Ok(Self { database, clock, log_id, readers: Arc::default() })
    }

    /// The end of the log: the offset of the next event.
    pub async fn end(&self) -> Result<Offset, ReadError> {
        event::end(self.database.readers()).await.map_err(not_read)
    }

    /// The place of a reader that has seen everything below an offset, which is at most the end.
    pub async fn cursor_at(&self, next: Offset) -> Result<Cursor, ReadError> {
        let Some(before) = next.0.checked_sub(1) else { return Ok(self.beginning()) };
        let found = event::event_id_at(self.database.readers(), Offset(before)).await;
        let anchor = found.map_err(not_read)?.ok_or_else(|| missing(Offset(before)))?;
        Ok(Cursor { next, state: state_behind(&self.log_id, anchor) })
    }

    fn beginning(&self) -> Cursor {
        Cursor { next: Offset(0), state: self.log_id.to_string() }
    }
}

/// The identity of the log in the file, if the file holds a log and not a copy of parts of another.
pub(crate) async fn check_own_log(database: &SqliteDatabase) -> Result<String, ReadError> {
    let query = "SELECT log_id, EXISTS (SELECT 1 FROM kafold_partition) FROM kafold_log";
    let row = sqlx::query_as(query).fetch_optional(database.readers()).await;
    let row: Option<(String, bool)> = row.map_err(not_read)?;
    let Some((log_id, is_index)) = row else {
        return Err(ReadError::diverged(database.url(), guard::reason(guard::NO_LOG_ROW)));
    };
    if is_index {
        return Err(ReadError::diverged(
            database.url(),
            "its events are the index of another log: name another file for this one",
        ));
    }
    Ok(log_id)
}

#[async_trait]
impl EventSource for EmbeddedSource {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let lock = {
            let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(readers.entry((name.to_owned(), database.map(str::to_owned))).or_default())
        };
        Ok(Box::new(EmbeddedSubscription {
            source: self.clone(),
            changes: self.database.changes(),
            batch_events_max: batch_events_max.max(1),
            lock,
            assigned: None,
            place: None,
        }))
    }

    fn partitions(&self) -> u32 {
        1
    }

    fn partition_of(&self, _: &StreamId) -> Partition {
        PARTITION
    }

    async fn end_of(&self, _: Partition) -> Result<Offset, ReadError> {
        self.end().await
    }
}

struct EmbeddedSubscription {
    source: EmbeddedSource,
    changes: watch::Receiver<u64>,
    batch_events_max: usize,
    lock: Arc<AsyncMutex<()>>,
    assigned: Option<OwnedMutexGuard<()>>,
    /// Where the reader is, once the partition has been started.
    place: Option<Cursor>,
}

#[async_trait]
impl Subscription for EmbeddedSubscription {
    async fn next(&mut self) -> Result<SourceMessage, ReadError> {
        if self.assigned.is_none() {
            self.assigned = Some(Arc::clone(&self.lock).lock_owned().await);
            return Ok(SourceMessage::Assigned(vec![PARTITION]));
        }
        let Some(place) = self.place.clone() else {
            // Nothing to tell until it is started, and that takes `&mut self` too.
            return std::future::pending().await;
        };
        loop {
            // Before the look, so that a commit behind it is not missed.
            self.changes.mark_unchanged();
            if let Some(batch) = self.read(&place).await? {
                self.place = Some(batch.next.clone());
                return Ok(SourceMessage::Batch(batch));
            }
            tokio::select! {
                // The sender lives in the database handle that this reader holds.
                _ = self.changes.changed() => {}
                () = self.source.clock.sleep(POLL_INTERVAL) => {}
            }
        }
    }

    async fn start(&mut self, partition: Partition, from: Option<Cursor>) -> Result<(), ReadError> {
        if self.assigned.is_none() || partition != PARTITION {
            return Err(ReadError::diverged(
                format!("partition {partition}"),
                "it is not assigned to this reader",
            ));
        }
        let place = match from {
            Some(cursor) => self.checked(cursor).await?,
            None => self.source.beginning(),
        };
        self.place = Some(place);
        Ok(())
    }

    fn stop(&mut self, _: Partition) {
        self.place = None;
    }
}

impl EmbeddedSubscription {
    /// The next batch, if there is anything to read.
    async fn read(&self, place: &Cursor) -> Result<Option<Batch>, ReadError> {
        let readers = self.source.database.readers();
        let end = event::end(readers).await.map_err(not_read)?;
        if end == place.next {
            return Ok(None);
        }
        check_end(place.next, end)?;
        let events = self.whole_commits(place.next).await?;
        let Some(last) = events.last() else {
            return Err(missing(place.next));
        };
        let next = Cursor {
            next: last.position.offset.plus(1),
            state: state_behind(&self.source.log_id, last.metadata.event_id),
        };
        Ok(Some(Batch {
            partition: PARTITION,
            from: place.next,
            end: end.max(next.next),
            events,
            next,
        }))
    }

    /// Events from an offset on: whole commits, within the batch's limit if one commit is.
    async fn whole_commits(&self, from: Offset) -> Result<Vec<RecordedEvent>, ReadError> {
        let mut wanted = self.batch_events_max;
        loop {
            // One more tells whether the last one ends its commit.
            let limit = i64::try_from(wanted + 1).unwrap_or(i64::MAX);
            let mut events = event::read_log(self.source.database.readers(), from, limit).await?;
            let misplaced = events.iter().zip(from.0..).find(|(e, at)| e.position.offset.0 != *at);
            if let Some((_, at)) = misplaced {
                return Err(missing(Offset(at)));
            }
            let whole = whole_commits(&events, self.batch_events_max, wanted);
            if whole > 0 || events.is_empty() {
                events.truncate(whole);
                return Ok(events);
            }
            wanted *= 4;
        }
    }

    /// The cursor, if it was handed out by this log, in a state that this one continues.
    async fn checked(&self, cursor: Cursor) -> Result<Cursor, ReadError> {
        let Self { source: EmbeddedSource { database, log_id, .. }, .. } = self;
        let diverged = |reason: String| Err(ReadError::diverged(database.url(), reason));
        let (of_log, anchor) = match cursor.state.split_once(' ') {
            Some((of_log, anchor)) => (of_log, Some(anchor)),
            None => (cursor.state.as_str(), None),
        };
        if of_log != &**log_id {
            return diverged(format!(
                "the position is one of another log: the database of the read models belongs to another \
                 file or to a log on Kafka, or the file was recreated; {REMEDY}"
            ));
        }
        let end = event::end(database.readers()).await.map_err(not_read)?;
        check_end(cursor.next, end)?;
        let Some(before) = cursor.next.0.checked_sub(1) else { return Ok(cursor) };
        let found =
            event::event_id_at(database.readers(), Offset(before)).await.map_err(not_read)?;
        let found = found.map(|id| id.to_string());
        if found.as_deref() != anchor {
            return diverged(format!(
                "the reader has seen event {} at offset {before}, the file holds {}: \
                 an older copy of it was put in its place; {REMEDY}",
                anchor.unwrap_or("none"),
                found.as_deref().unwrap_or("none"),
            ));
        }
        Ok(cursor)
    }
}

/// The state of a cursor behind an event: the log, and the event as an anchor in it.
fn state_behind(log_id: &str, anchor: Uuid) -> String {
    format!("{log_id} {anchor}")
}

fn check_end(next: Offset, end: Offset) -> Result<(), ReadError> {
    if next <= end {
        return Ok(());
    }
    Err(ReadError::diverged(
        format!("partition {PARTITION}"),
        format!(
            "the reader stands at {next}, the log ends at {end}: \
             an older copy of the file was put in its place; {REMEDY}"
        ),
    ))
}

fn missing(at: Offset) -> ReadError {
    ReadError::diverged(format!("partition {PARTITION}"), format!("the event at {at} is missing"))
}

/// How many of the events make whole commits and are at most `most`, or one commit if the first is
/// longer; 0 when even that one is not whole. `wanted` events were asked for, and one more.
fn whole_commits(events: &[RecordedEvent], most: usize, wanted: usize) -> usize {
    let ends_commit = |count: &usize| match (&events[count - 1], events.get(*count)) {
        (last, Some(next)) => (last.command_id, &last.stream) != (next.command_id, &next.stream),
        // All that was asked for is here, so the log ended there, and it ends with a commit.
        (_, None) => events.len() <= wanted,
    };
    let within = (1..=most.min(events.len())).rev().find(ends_commit);
    within.or_else(|| (most + 1..=events.len()).find(ends_commit)).unwrap_or(0)
}

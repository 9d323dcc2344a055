//! Detects changes of the log and of the heads by other programs, with digests in the memory of
//! this process.
//!
//! The file stores the number and the digest of its events (`kafold_log`) and a head for each
//! stream (`kafold_stream`). Opening the file compares the two. Afterwards the process keeps the
//! digests of all buckets of streams in memory, and compares the digests with the file at every
//! decision on a stream without a recent commit of this process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kafold_core::digest::{Bucket, BucketDigests, Digest};
use kafold_core::index::{IndexHead, IndexTotal};
use kafold_core::mutant::{self, Mutant};
use kafold_core::{Clock, Offset, ReadError, StreamId, Version};
use kafold_migrations::{SqliteDatabase, begin};
use sqlx::SqliteConnection;

use crate::config::READ_PAGE_EVENTS;
use crate::error::not_read;
use crate::event::{self, Known, PARTITION, PlacedEvent, Question, StreamPage};

/// Least wait between two comparisons of the whole file.
const INTERVAL_MIN: Duration = Duration::from_secs(10);
/// Factor from a comparison's duration to the least wait before the next.
const INTERVAL_FACTOR: u32 = 100;
/// Number of newest events with individually stored digests: 1 MiB. A page read before these events
/// is read again.
const NEWEST_EVENTS_MAX: usize = 65_536;
/// Wait before another check of a damaged file.
const DAMAGED_WAIT: Duration = Duration::from_secs(2);

/// The digests of the log in this process's memory.
pub(crate) struct Guard {
    known: Mutex<KnownLog>,
}

struct KnownLog {
    /// The offset below which `digests` includes all events.
    end: Offset,
    digests: BucketDigests,
    /// The newest of these events, in the order of the log. A page read earlier is compared with
    /// the log at the time of the read.
    newest: VecDeque<(Bucket, Digest)>,
    damage: Option<Damage>,
}

impl KnownLog {
    /// Adds the event at `end`.
    fn push(&mut self, bucket: Bucket, digest: Digest) {
        self.digests.add(bucket, digest);
        self.end = self.end.plus(1);
        if self.newest.len() == NEWEST_EVENTS_MAX {
            self.newest.pop_front();
        }
        self.newest.push_back((bucket, digest));
    }

    /// Returns the digest of a bucket for a log which ended at `end`. Returns `None` for an `end`
    /// too long ago or not reached yet.
    fn bucket_at(&self, end: Offset, bucket: Bucket) -> Option<Digest> {
        let since = usize::try_from(self.end.0.checked_sub(end.0)?).ok()?;
        let first = self.newest.len().checked_sub(since)?;
        let mut digest = self.digests.get(bucket);
        let since = self.newest.range(first..).filter(|(of, _)| *of == bucket);
        since.for_each(|(_, added)| digest ^= *added);
        Some(digest)
    }
}

struct Damage {
    reason: String,
    /// The stream with the damaged rows; `None` for damage of the whole file.
    stream: Option<StreamId>,
}

/// The sums over the tables.
struct FileTotals {
    /// The number and digest of events in `kafold_log`.
    declared: IndexTotal,
    /// The number and digest of events summed over the heads.
    heads: IndexTotal,
    digests: BucketDigests,
    /// Number of rows of events.
    rows: u64,
}

impl Guard {
    /// Compares the tables of the file. Contradicting tables are [`ReadError::Diverged`].
    pub(crate) async fn open(database: &SqliteDatabase) -> Result<Self, ReadError> {
        event::fill_in_digests(database).await.map_err(not_read)?;
        let totals = FileTotals::read(database).await?;
        totals.check(None)?;
        let end = Offset(totals.declared.events);
        let (digests, newest) = (totals.digests, VecDeque::new());
        let known = KnownLog { end, digests, newest, damage: None };
        Ok(Self { known: Mutex::new(known) })
    }

    /// Returns the reason for which no decision may rest on the file, as a sentence with the table
    /// and the remedy; `None` for an undamaged file.
    pub(crate) fn damage(&self) -> Option<String> {
        self.known().damage.as_ref().map(|damage| damage.reason.clone())
    }

    /// Adds a committed group.
    pub(crate) fn appended(&self, rows: &[PlacedEvent<'_>]) {
        let Some(first) = rows.first() else { return };
        let mut known = self.known();
        // Earlier events of another process are read first, and this group with them.
        if known.end == first.offset {
            rows.iter().for_each(|row| known.push(Bucket::of_hash(row.hash), row.digest));
        }
    }

    /// Compares the streams of a transaction with the digests before the decision.
    pub(crate) async fn check_group(
        &self,
        connection: &mut SqliteConnection,
        questions: &[Question<'_>],
        known: &[Known],
        declared_end: Option<Offset>,
        end: Offset,
    ) -> Result<(), ReadError> {
        if mutant::active(Mutant::IndexBelieved) {
            return Ok(());
        }
        let Some(declared_end) = declared_end else {
            return Err(self.damaged(None, NO_LOG_ROW));
        };
        if end != declared_end {
            let what =
                format!("kafold_event ends at offset {end}, and kafold_log says {declared_end}");
            return Err(self.damaged(None, what));
        }
        self.catch_up(connection, end).await?;
        if self.known().end > end {
            let what = format!("kafold_event ends at offset {end}, and was longer before");
            return Err(self.damaged(None, what));
        }
        for (Question { stream, last, .. }, known) in questions.iter().zip(known) {
            let version = known.version;
            let head = match known.head {
                Some(head) => head,
                None if *last == Some(version) => continue,
                // Another process has appended to the stream since, or rows are missing.
                None => event::head(&mut *connection, stream).await.map_err(not_read)?,
            };
            if version != head.version {
                return Err(self.differs_in(stream, version, head.version));
            }
            let has_head = head.version != Version::EMPTY;
            self.check_names(&mut *connection, stream, has_head, head.same_hash).await?;
            if self.known().digests.get(Bucket::of(stream)) != head.bucket {
                return Err(self.damaged(None, beside(stream)));
            }
        }
        Ok(())
    }

    /// Returns the offset below which all events are known.
    pub(crate) fn end(&self) -> Offset {
        self.known().end
    }

    /// Compares the last page of a stream.
    ///
    /// `digest` is the digest of all rows if the stream was read from the beginning. `end` is the
    /// known end of the log before the page was read; the log never ends below `end` again. Returns
    /// `false` if the file has grown since and the page must be read again.
    pub(crate) async fn check_page(
        &self,
        database: &SqliteDatabase,
        stream: &StreamId,
        after: Version,
        page: &StreamPage,
        digest: Option<Digest>,
        end: Offset,
    ) -> Result<bool, ReadError> {
        if mutant::active(Mutant::IndexBelieved) {
            return Ok(true);
        }
        if page.end < end {
            let what = format!("kafold_log ends at offset {}, and ended at {end} before", page.end);
            return Err(self.damaged(None, what));
        }
        let head = page.head.unwrap_or_default();
        let last = page.events.last().map_or(after.min(head.version), |last| last.version);
        if head.version != last {
            return Err(self.differs_in(stream, last, head.version));
        }
        if digest.is_some_and(|digest| digest != head.digest) {
            let what = format!("kafold_event: {stream} is not what kafold_stream says");
            return Err(self.damaged(Some(stream), what));
        }
        let mut connection = database.readers().acquire().await.map_err(not_read)?;
        let has_head = page.head.is_some();
        self.check_names(&mut connection, stream, has_head, page.same_hash).await?;
        self.catch_up(&mut connection, page.end).await?;
        let Some(known) = self.known().bucket_at(page.end, Bucket::of(stream)) else {
            return Ok(false);
        };
        if known == page.bucket { Ok(true) } else { Err(self.damaged(None, beside(stream))) }
    }

    /// Rejects a head under the stream's hash and another name: the stream's head was renamed.
    async fn check_names(
        &self,
        connection: &mut SqliteConnection,
        stream: &StreamId,
        has_head: bool,
        same_hash: u64,
    ) -> Result<(), ReadError> {
        if same_hash == u64::from(has_head)
            || event::heads_collide(connection, stream).await.map_err(not_read)?
        {
            return Ok(());
        }
        let what = format!("kafold_stream: the head of {stream} stands under another name");
        Err(self.damaged(Some(stream), what))
    }

    /// Stores the damage of a stream's row.
    pub(crate) fn note(&self, stream: Option<&StreamId>, error: ReadError) -> ReadError {
        match error {
            ReadError::Diverged { what, cause } => {
                self.damaged(stream, format!("kafold_event: {what}: {cause}"))
            }
            unavailable => unavailable,
        }
    }

    /// Reads the events appended by other processes.
    async fn catch_up(
        &self,
        connection: &mut SqliteConnection,
        end: Offset,
    ) -> Result<(), ReadError> {
        loop {
            let from = self.known().end;
            if from >= end {
                return Ok(());
            }
            let events = event::read_log(&mut *connection, from, READ_PAGE_EVENTS).await;
            let events = events.map_err(|error| self.note(None, error))?;
            let mut known = self.known();
            if known.end != from {
                continue;
            }
            for event in &events {
                let (found, expected) = (event.position.offset, known.end);
                if found != expected {
                    drop(known);
                    let what = format!("kafold_event: offset {expected} is missing");
                    return Err(self.damaged(None, what));
                }
                known.push(Bucket::of(&event.stream), Digest::of(event));
            }
            if events.is_empty() {
                drop(known);
                let what = format!("kafold_event ends at offset {from}, and kafold_log says {end}");
                return Err(self.damaged(None, what));
            }
        }
    }

    /// Compares the whole file periodically. The caller ends the task by aborting.
    pub(crate) async fn watch(&self, database: &SqliteDatabase, clock: &dyn Clock) {
        let mut wait = INTERVAL_MIN;
        loop {
            clock.sleep(wait).await;
            let begun = clock.instant();
            if let Err(error) = self.look_again(database).await {
                tracing::debug!(%error, "the log in the file was looked at");
            }
            let taken = clock.instant().saturating_duration_since(begun);
            wait = match self.damage() {
                Some(_) => DAMAGED_WAIT.max(taken * 10),
                None => INTERVAL_MIN.max(taken * INTERVAL_FACTOR),
            };
        }
    }

    async fn look_again(&self, database: &SqliteDatabase) -> Result<(), ReadError> {
        let totals = FileTotals::read(database).await?;
        let end = Offset(totals.declared.events);
        let mut connection = database.readers().acquire().await.map_err(not_read)?;
        self.catch_up(&mut connection, end).await?;
        drop(connection);
        let checked = {
            let known = self.known();
            if known.end != end {
                // The log has grown; the next comparison follows.
                return Ok(());
            }
            totals.check(Some(&known.digests))
        };
        if let Err(ReadError::Diverged { cause, .. }) = checked {
            return Err(self.damaged(None, cause.to_string()));
        }
        let stream = match &self.known().damage {
            None => return Ok(()),
            Some(damage) => damage.stream.clone(),
        };
        if let Some(stream) = &stream {
            self.check_stream(database, stream).await?;
        }
        self.known().damage.take_if(|damage| damage.stream == stream);
        tracing::info!("the log in the file is whole again");
        Ok(())
    }

    async fn check_stream(
        &self,
        database: &SqliteDatabase,
        stream: &StreamId,
    ) -> Result<(), ReadError> {
        let (mut after, mut digest) = (Version::EMPTY, Digest::default());
        loop {
            let end = self.end();
            let page = event::read_page(database.readers(), stream, after).await?;
            page.events.iter().for_each(|event| digest ^= Digest::of(event));
            match page.events.last() {
                Some(last) if page.more => after = last.version,
                _ => {
                    let checked =
                        self.check_page(database, stream, after, &page, Some(digest), end);
                    return checked.await.map(drop);
                }
            }
        }
    }

    fn differs_in(&self, stream: &StreamId, version: Version, head: Version) -> ReadError {
        let what = format!(
            "kafold_event: {stream} ends with version {version}, and in kafold_stream with {head}"
        );
        self.damaged(Some(stream), what)
    }

    fn damaged(&self, stream: Option<&StreamId>, what: impl Into<String>) -> ReadError {
        let reason = reason(&what.into());
        let mut known = self.known();
        if known.damage.as_ref().is_none_or(|damage| damage.reason != reason) {
            tracing::error!(reason, "the log in the file is damaged");
            known.damage = Some(Damage { reason: reason.clone(), stream: stream.cloned() });
        }
        ReadError::diverged("the log in the file", reason)
    }

    fn known(&self) -> MutexGuard<'_, KnownLog> {
        // No change is interrupted half way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fault of a file without the row of its log.
pub(crate) const NO_LOG_ROW: &str = "kafold_log has no row";

/// Returns the sentence about damage, with the remedy appended if missing.
pub(crate) fn reason(what: &str) -> String {
    const REMEDY: &str = "kafold index rebuild";
    if what.contains(REMEDY) {
        return what.to_owned();
    }
    format!(
        "the log in this file is damaged: {what}; run {REMEDY}, which makes kafold_stream again and tells \
         whether the events are whole; if they are not, restore the file from a copy"
    )
}

fn beside(stream: &StreamId) -> String {
    format!("kafold_stream: the heads beside that of {stream} are not what was written")
}

impl FileTotals {
    /// Reads in one transaction, and so in one snapshot.
    async fn read(database: &SqliteDatabase) -> Result<Self, ReadError> {
        let read = async {
            let mut tx = begin(database.readers(), "BEGIN").await?;
            let declared = event::declared(&mut *tx).await?;
            let rows: i64 =
                sqlx::query_scalar("SELECT count(*) FROM kafold_event").fetch_one(&mut *tx).await?;
            let (heads, digests) = event::heads(&mut tx).await?;
            tx.commit().await?;
            Ok((declared, heads, digests, rows as u64))
        };
        let (declared, heads, digests, rows) = read.await.map_err(not_read)?;
        let declared = declared.ok_or_else(|| {
            ReadError::diverged(format!("partition {PARTITION}"), reason(NO_LOG_ROW))
        })?;
        Ok(Self { declared, heads, digests, rows })
    }

    /// Compares the tables with each other and with the known digests.
    fn check(&self, known: Option<&BucketDigests>) -> Result<(), ReadError> {
        let Self { declared, heads, digests, rows } = self;
        let differs = |what: String| {
            Err(ReadError::diverged(format!("partition {PARTITION}"), reason(&what)))
        };
        if *rows != declared.events {
            let events = declared.events;
            return differs(format!("kafold_event has {rows} events, and kafold_log {events}"));
        }
        if heads.events != declared.events {
            let (found, events) = (heads.events, declared.events);
            return differs(format!("kafold_stream has {found} events, and kafold_log {events}"));
        }
        match known {
            Some(known) if known != digests => {
                differs("kafold_stream is not what was written".into())
            }
            Some(known) if known.total() != declared.digest => {
                differs("the digest of kafold_log is not what was written".into())
            }
            None if heads.digest != declared.digest => {
                differs("kafold_stream has another digest than kafold_log".into())
            }
            _ => Ok(()),
        }
    }
}

/// Compares the events, the heads and the totals of a file's log. Returns the number of events.
/// Contradicting tables are [`ReadError::Diverged`].
pub async fn check_heads(database: &SqliteDatabase) -> Result<u64, ReadError> {
    let totals = FileTotals::read(database).await?;
    totals.check(None)?;
    Ok(totals.declared.events)
}

/// Rebuilds the heads and the totals of a file's log from the events. Returns the number of events.
///
/// Of events, heads and totals two must agree: a file whose events agree with neither is
/// [`ReadError::Diverged`] and stays unchanged.
pub async fn rebuild_heads(database: &SqliteDatabase) -> Result<u64, ReadError> {
    let mut tx = database.write().await.map_err(not_read)?;
    let declared = event::declared(&mut *tx).await.map_err(not_read)?;
    let old_heads = event::heads(&mut tx).await.map_err(not_read)?.0;
    let mut events = IndexTotal::default();
    let mut heads: HashMap<StreamId, IndexHead> = HashMap::new();
    loop {
        let from = Offset(events.events);
        let page = event::read_log(&mut *tx, from, READ_PAGE_EVENTS).await?;
        if page.is_empty() {
            break;
        }
        for event in page {
            let (found, expected) = (event.position.offset, Offset(events.events));
            let head = heads.entry(event.stream.clone()).or_default();
            if found != expected || event.version != head.version.plus(1) {
                let (stream, version) = (&event.stream, event.version);
                return Err(lost(&format!(
                    "version {version} of {stream} at offset {found} follows version {} and offset \
                     {expected} is the next",
                    head.version
                )));
            }
            let digest = Digest::of(&event);
            *head = IndexHead { version: event.version, digest: head.digest };
            head.digest ^= digest;
            events.add(1, digest);
        }
    }
    if declared != Some(events) && events != old_heads {
        return Err(lost(&format!(
            "there are {} events, and kafold_log says {} and kafold_stream {}",
            events.events,
            declared.map_or("nothing".to_owned(), |declared| declared.events.to_string()),
            old_heads.events
        )));
    }
    event::replace_heads(&mut tx, &heads, &events).await.map_err(not_read)?;
    tx.commit().await.map_err(not_read)?;
    Ok(events.events)
}

fn lost(what: &str) -> ReadError {
    let cause = format!("the events are not whole: {what}; restore the file from a copy");
    ReadError::diverged("kafold_event", cause)
}

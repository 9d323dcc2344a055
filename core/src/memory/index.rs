//! A [`StreamIndex`] and a [`SnapshotStore`] in memory.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::digest::{Bucket, BucketDigests, Digest};
use crate::event::RecordedEvent;
use crate::ids::{CommandId, Offset, Partition, StreamId};
use crate::index::{
    Advanced, IndexBatch, IndexCount, IndexHead, IndexHeads, IndexLoad, IndexRead, IndexTotal,
    StreamIndex,
};
use crate::mutant::{self, Mutant};
use crate::snapshot::{Snapshot, SnapshotStore};
use crate::store::{Appended, Cursor, ReadError};

/// The index of a process without a database: it holds every event of the log in memory and is fed
/// from the beginning after every start.
#[derive(Default)]
pub struct MemoryIndex {
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    cursors: HashMap<Partition, Cursor>,
    /// The event of version n at index n − 1.
    streams: HashMap<StreamId, Vec<RecordedEvent>>,
    commands: HashMap<(StreamId, CommandId), Appended>,
    heads: HashMap<StreamId, IndexHead>,
    sums: HashMap<Partition, Sums>,
}

/// The sums over a partition's heads. No other program can change this index, so the sums are also
/// the declared totals.
#[derive(Default)]
struct Sums {
    total: IndexTotal,
    buckets: BucketDigests,
}

impl MemoryIndex {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // `advance` checks everything before it writes anything, so what a panic left is whole.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn position(&self, partition: Partition) -> Offset {
        self.cursors.get(&partition).map_or(Offset(0), |cursor| cursor.next)
    }

    fn advance(&mut self, batch: IndexBatch) -> Result<Advanced, ReadError> {
        let position = self.position(batch.partition);
        if position < batch.from && !mutant::active(Mutant::IndexPlainMaximum) {
            return Ok(Advanced::Behind(self.cursors.get(&batch.partition).cloned()));
        }
        self.check(&batch.events)?;
        batch.events.into_iter().for_each(|event| self.insert(event));
        if batch.to.next > position {
            self.cursors.insert(batch.partition, batch.to);
        }
        Ok(Advanced::Moved)
    }

    /// Nothing contradicts what is here and no stream would get a gap.
    fn check(&self, events: &[RecordedEvent]) -> Result<(), ReadError> {
        let mut versions: HashMap<&StreamId, u64> = HashMap::new();
        for event in events {
            let known = self.streams.get(&event.stream).map_or(&[][..], Vec::as_slice);
            let end = versions.entry(&event.stream).or_insert(known.len() as u64);
            if event.version.0 == *end + 1 {
                *end += 1;
                continue;
            }
            let there = event.version.0.checked_sub(1).and_then(|index| known.get(index as usize));
            if there != Some(event) {
                let what = format!("index of stream {}", event.stream);
                let (version, position) = (event.version, event.position);
                let found = there.map_or("nothing".to_owned(), |other| other.position.to_string());
                let reason = format!("version {version} is at {position}, indexed is {found}");
                return Err(ReadError::diverged(what, reason));
            }
        }
        Ok(())
    }

    fn insert(&mut self, event: RecordedEvent) {
        let known = self.streams.entry(event.stream.clone()).or_default();
        if event.version.0 <= known.len() as u64 {
            return;
        }
        // The events of a commit follow one another: its last one's version and position stay.
        let (version, position) = (event.version, event.position);
        let appended = Appended { version, position, duplicate: false };
        self.commands.insert((event.stream.clone(), event.command_id), appended);
        let digest = Digest::of(&event);
        let head = self.heads.entry(event.stream.clone()).or_default();
        head.version = version;
        head.digest ^= digest;
        let sums = self.sums.entry(position.partition).or_default();
        sums.total.add(1, digest);
        sums.buckets.add(Bucket::of(&event.stream), digest);
        known.push(event);
    }

    fn read(&self, request: &IndexLoad, limit: usize) -> IndexRead {
        let known = self.streams.get(&request.stream).map_or(&[][..], Vec::as_slice);
        let skipped = usize::try_from(request.after.0).unwrap_or(usize::MAX).min(known.len());
        let wanted = &known[skipped..];
        IndexRead {
            position: self.position(request.partition),
            events: wanted[..limit.min(wanted.len())].to_vec(),
            more: wanted.len() > limit,
            head: self.heads.get(&request.stream).copied(),
            bucket: self
                .sums
                .get(&request.partition)
                .map_or_else(Digest::default, |sums| sums.buckets.get(Bucket::of(&request.stream))),
        }
    }
}

#[async_trait]
impl StreamIndex for MemoryIndex {
    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
        Ok(self.tables().cursors.iter().map(|(p, cursor)| (*p, cursor.clone())).collect())
    }

    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
        let mut tables = self.tables();
        batches.into_iter().map(|batch| tables.advance(batch)).collect()
    }

    async fn load(
        &self,
        requests: &[IndexLoad],
        limit: usize,
    ) -> Vec<Result<IndexRead, ReadError>> {
        let tables = self.tables();
        requests.iter().map(|request| Ok(tables.read(request, limit))).collect()
    }

    async fn heads(&self, partition: Partition) -> Result<IndexHeads, ReadError> {
        let tables = self.tables();
        let position = tables.position(partition);
        let Some(Sums { total, buckets }) = tables.sums.get(&partition) else {
            return Ok(IndexHeads { position, ..IndexHeads::default() });
        };
        let buckets = buckets.clone();
        Ok(IndexHeads { position, declared: *total, found: *total, buckets })
    }

    async fn count(&self) -> Result<Vec<IndexCount>, ReadError> {
        let tables = self.tables();
        let count = |(partition, sums): (&Partition, &Sums)| {
            let (rows, heads) = (sums.total, sums.total);
            IndexCount { partition: *partition, rows, heads }
        };
        Ok(tables.sums.iter().map(count).collect())
    }

    async fn find_command(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<(Offset, Option<Appended>), ReadError> {
        let tables = self.tables();
        let found = tables.commands.get(&(stream.clone(), command_id)).copied();
        Ok((tables.position(partition), found))
    }
}

/// Snapshots in memory, one a stream: for tests, and for processes whose snapshots need not outlive
/// them.
#[derive(Default)]
pub struct MemorySnapshots {
    newest: Mutex<HashMap<StreamId, Snapshot>>,
}

impl MemorySnapshots {
    /// Without any snapshot.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets every snapshot, which changes no answer.
    pub fn clear(&self) {
        self.newest().clear();
    }

    fn newest(&self) -> MutexGuard<'_, HashMap<StreamId, Snapshot>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SnapshotStore for MemorySnapshots {
    async fn load(&self, stream: &StreamId) -> Result<Option<Snapshot>, ReadError> {
        Ok(self.newest().get(stream).cloned())
    }

    async fn save(&self, snapshot: &Snapshot) -> Result<(), ReadError> {
        let mut newest = self.newest();
        let is_newer =
            |kept: &Snapshot| kept.schema != snapshot.schema || kept.version < snapshot.version;
        if newest.get(&snapshot.stream).is_none_or(is_newer) {
            newest.insert(snapshot.stream.clone(), snapshot.clone());
        }
        Ok(())
    }
}

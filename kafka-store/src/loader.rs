//! Loads streams: what is in the tail, and before it what the index holds.
//!
//! Loads that come at the same time are gathered into one question to the index.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use kafold_core::clock::within;
use kafold_core::digest::{Bucket, Digest};
use kafold_core::index::{IndexLoad, IndexRead, damaged};
use kafold_core::mutant::{self, Mutant};
use kafold_core::store::Appended;
use kafold_core::{
    Clock, CommandId, Filter, Offset, Partition, ReadError, RecordedEvent, StreamId, StreamIndex,
    Version,
};
use lru::LruCache;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::config::Limits;
use crate::partition::{DamageSite, Shared};
use crate::tail::{MergeError, TailView};
use crate::writer::{CommandOutcome, StreamHead, WriterLimits};

/// Questions to the index at once; loads that come meanwhile are gathered into the next one.
const QUERIES_MAX: usize = 4;
/// Heads of streams kept from reads for the submissions that follow them.
const HEADS_MAX: usize = 10_000;
/// Memory for what is known of one stream's older commands: some 16 000 of them. Those of a longer
/// stream are looked up one by one.
const OLDER_BYTES_MAX: usize = 32 << 10;
/// Longest wait of a load for the check of a newly taken partition's heads.
const CHECK_WAIT: Duration = Duration::from_secs(10);
/// Most reads of one page, when the index advances before its answer is compared.
const COMPARISONS_MAX: u32 = 10;
/// When a caller may try again whom the index could not answer.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Loads streams of all partitions of one process.
pub(crate) struct Loader {
    index: Arc<dyn StreamIndex>,
    partitions: Vec<Arc<Shared>>,
    requests: mpsc::Sender<Request>,
    recent_commands_max: usize,
    heads: Mutex<LruCache<StreamId, KnownHead>>,
    clock: Arc<dyn Clock>,
    runtime: Handle,
}

struct Request {
    load: IndexLoad,
    answer: oneshot::Sender<Result<IndexRead, ReadError>>,
}

/// The head of a stream as a read found it.
#[derive(Clone)]
struct KnownHead {
    head: HeadBuilder,
    /// It leaves out nothing below this offset.
    as_of: Offset,
}

impl Loader {
    /// The loader, and the task that asks the index for it.
    pub(crate) fn new(
        index: Arc<dyn StreamIndex>,
        partitions: Vec<Arc<Shared>>,
        limits: &Limits,
        clock: Arc<dyn Clock>,
    ) -> (Arc<Self>, impl Future<Output = ()> + Send + 'static) {
        let (requests, inbox) = mpsc::channel(limits.queued_loads_max.max(1));
        let asking =
            ask(Arc::clone(&index), inbox, limits.load_requests_max, limits.page_events_max);
        let heads = NonZeroUsize::new(HEADS_MAX).unwrap_or(NonZeroUsize::MIN);
        let loader = Self {
            index,
            partitions,
            requests,
            recent_commands_max: WriterLimits::default().recent_commands_max,
            heads: Mutex::new(LruCache::new(heads)),
            clock,
            runtime: Handle::current(),
        };
        (Arc::new(loader), asking)
    }

    /// The events of a stream above a version.
    pub(crate) fn read(
        self: &Arc<Self>,
        partition: Partition,
        stream: &StreamId,
        after: Version,
    ) -> BoxStream<'static, Result<RecordedEvent, ReadError>> {
        let reading = Reading {
            loader: Arc::clone(self),
            partition,
            stream: stream.clone(),
            next_after: after,
            begun: None,
            head: HeadBuilder::new(after, self.recent_commands_max),
            digest: Digest::default(),
            from_start: after == Version::EMPTY,
            done: false,
        };
        let pages = stream::try_unfold(reading, |mut reading| async move {
            let page = reading.page().await?;
            Ok::<_, ReadError>(page.map(|events| (events, reading)))
        });
        let events = pages.map_ok(|page| {
            stream::iter(page.into_iter().map(|event| Ok(Arc::unwrap_or_clone(event))))
        });
        events.try_flatten().boxed()
    }

    /// What a command of the stream came to: the tail first, the index second.
    pub(crate) async fn find(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<Option<Appended>, ReadError> {
        let (found, start) = {
            let tail = self.shared(partition).tail();
            (tail.find_command(stream, command_id), tail.start())
        };
        if found.is_some() {
            return Ok(found);
        }
        let (position, found) = self.index.find_command(partition, stream, command_id).await?;
        if position < start {
            return Err(self.lost(MergeError::IndexBehind { partition, position, start }));
        }
        Ok(found.map(|appended| Appended { duplicate: true, ..appended }))
    }

    /// [`Loader::find`] for a writer.
    pub(crate) fn spawn_find(
        self: &Arc<Self>,
        partition: Partition,
        stream: StreamId,
        command_id: CommandId,
        found: impl FnOnce(StreamId, Result<Option<Appended>, ReadError>) + Send + 'static,
    ) {
        let loader = Arc::clone(self);
        self.runtime.spawn(async move {
            let result = loader.find(partition, &stream, command_id).await;
            found(stream, result);
        });
    }

    /// The head of a stream for a writer.
    pub(crate) fn spawn_head(
        self: &Arc<Self>,
        partition: Partition,
        stream: StreamId,
        loaded: impl FnOnce(StreamId, Result<StreamHead, ReadError>) + Send + 'static,
    ) {
        if let Some(head) = self.known_head(partition, &stream) {
            return loaded(stream, Ok(head));
        }
        let loader = Arc::clone(self);
        self.runtime.spawn(async move {
            let result = loader.head(partition, &stream).await;
            loaded(stream, result);
        });
    }

    async fn head(
        self: &Arc<Self>,
        partition: Partition,
        stream: &StreamId,
    ) -> Result<StreamHead, ReadError> {
        let mut head = HeadBuilder::new(Version::EMPTY, self.recent_commands_max);
        let mut events = self.read(partition, stream, Version::EMPTY);
        while let Some(event) = events.try_next().await? {
            head.add(&event);
        }
        Ok(head.build())
    }

    /// The head that a read has found, brought up to date from the tail, if that still holds
    /// everything since.
    fn known_head(&self, partition: Partition, stream: &StreamId) -> Option<StreamHead> {
        let KnownHead { mut head, as_of } = self.heads().get(stream)?.clone();
        let view = self.shared(partition).tail().view(stream, head.version);
        if view.start > as_of {
            return None;
        }
        for event in view.events {
            if event.version != head.version.plus(1) {
                return None;
            }
            head.add(&event);
        }
        Some(head.build())
    }

    fn heads(&self) -> std::sync::MutexGuard<'_, LruCache<StreamId, KnownHead>> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream's partition is below the number of them.
    fn shared(&self, partition: Partition) -> &Shared {
        &self.partitions[partition.0 as usize]
    }

    /// What a reader is told. An index that has lost its place is fed again from there, also where nothing
    /// new is appended.
    fn lost(&self, error: MergeError) -> ReadError {
        match error {
            MergeError::IndexBehind { partition, .. } => {
                self.shared(partition).lose_index();
                ReadError::unavailable(RETRY_AFTER, error)
            }
            MergeError::NotGapless { partition, ref stream, .. } => {
                let error = damaged(partition, "kafold_event", &error);
                self.shared(partition).damaged(DamageSite::Stream(stream.clone()), &error);
                error
            }
        }
    }

    /// Waits until the heads of an own partition are verified. Heads of other partitions are read
    /// without a check, since no decision rests on them.
    async fn wait_for_heads(&self, partition: Partition) -> Result<(), ReadError> {
        let shared = self.shared(partition);
        let deadline = self.clock.instant() + CHECK_WAIT;
        loop {
            let mut checked = pin!(shared.checked.notified());
            checked.as_mut().enable();
            if shared.tail().knows_heads() || !shared.is_assigned() {
                return Ok(());
            }
            if let Some(damage) = shared.first_damage() {
                let what = format!("partition {partition}");
                return Err(ReadError::diverged(what, damage.reason));
            }
            let left = deadline.saturating_duration_since(self.clock.instant());
            if within(&*self.clock, left, checked).await.is_none() {
                let cause = format!("the index of partition {partition} is not checked yet");
                return Err(ReadError::unavailable(RETRY_AFTER, cause));
            }
        }
    }

    async fn load(&self, load: IndexLoad) -> Result<IndexRead, ReadError> {
        let (answer, answered) = oneshot::channel();
        if self.requests.try_send(Request { load, answer }).is_err() {
            let waiting = self.requests.max_capacity();
            return Err(ReadError::unavailable(RETRY_AFTER, format!("{waiting} loads wait")));
        }
        let closed = || ReadError::unavailable(RETRY_AFTER, "the store is closed");
        answered.await.unwrap_or_else(|_| Err(closed()))
    }
}

/// Gathers what waits into one question, a few of which may be under way.
async fn ask(
    index: Arc<dyn StreamIndex>,
    mut inbox: mpsc::Receiver<Request>,
    requests_max: usize,
    page_events_max: usize,
) {
    let under_way = Arc::new(Semaphore::new(QUERIES_MAX));
    loop {
        // Never closed.
        let Ok(permit) = Arc::clone(&under_way).acquire_owned().await else { return };
        let mut gathered = Vec::new();
        if inbox.recv_many(&mut gathered, requests_max.max(1)).await == 0 {
            return;
        }
        let index = Arc::clone(&index);
        tokio::spawn(async move {
            let (loads, answers): (Vec<_>, Vec<_>) =
                gathered.into_iter().map(|request| (request.load, request.answer)).unzip();
            let reads = index.load(&loads, page_events_max).await;
            drop(permit);
            for (answer, read) in answers.into_iter().zip(reads) {
                // Who asked may be gone.
                let _ = answer.send(read);
            }
        });
    }
}

/// One stream being read, page by page.
struct Reading {
    loader: Arc<Loader>,
    partition: Partition,
    stream: StreamId,
    /// The version read so far.
    next_after: Version,
    /// The tail as it was before the index was first asked, and what it reached to.
    begun: Option<(TailView, Offset)>,
    head: HeadBuilder,
    /// The digest of the rows read so far.
    digest: Digest,
    /// `true` if the rows begin with the stream's first event.
    from_start: bool,
    done: bool,
}

impl Reading {
    async fn page(&mut self) -> Result<Option<Vec<Arc<RecordedEvent>>>, ReadError> {
        if self.done {
            return Ok(None);
        }
        let (view, as_of) = self.begun.take().unwrap_or_else(|| self.begin());
        let events = match view.events.first() {
            // The tail holds all remaining events.
            Some(first) if first.version == self.next_after.plus(1) => {
                self.done = true;
                view.events.clone()
            }
            _ => self.load_page(&view).await?,
        };
        for event in &events {
            self.head.add(event);
        }
        self.next_after = self.head.version.max(self.next_after);
        if self.done {
            self.remember(as_of);
        } else {
            self.begun = Some((view, as_of));
        }
        Ok(Some(events))
    }

    fn begin(&self) -> (TailView, Offset) {
        let tail = self.loader.shared(self.partition).tail();
        (tail.view(&self.stream, self.next_after), tail.next().next)
    }

    async fn load_page(&mut self, view: &TailView) -> Result<Vec<Arc<RecordedEvent>>, ReadError> {
        let (partition, after) = (self.partition, self.next_after);
        for _ in 0..COMPARISONS_MAX {
            self.loader.wait_for_heads(partition).await?;
            let load = IndexLoad { partition, stream: self.stream.clone(), after };
            let read = match self.loader.load(load).await {
                Err(error @ ReadError::Diverged { .. }) => return Err(self.damaged(error)),
                read => read?,
            };
            let mut digest = self.digest;
            read.events.iter().for_each(|event| digest ^= Digest::of(event));
            // Between two pages of the index the tail adds no events.
            let rows_only = TailView { start: view.start, events: Vec::new() };
            let view = if read.more { &rows_only } else { view };
            if !read.more && read.position >= view.start && !self.is_whole(&read, digest)? {
                continue;
            }
            (self.digest, self.done) = (digest, !read.more);
            let (position, rows) = (read.position, read.events);
            let merged = view.merge(partition, after, position, rows);
            return merged.map_err(|error| self.loader.lost(error));
        }
        if let Some(damage) = self.loader.shared(partition).first_damage() {
            return Err(ReadError::diverged(format!("partition {partition}"), damage.reason));
        }
        let cause = format!(
            "the index of partition {partition} is ahead of what this process has read of the log; if that \
             lasts, its table kafold_partition is damaged: kafold index rebuild --partition {partition}"
        );
        Err(ReadError::unavailable(RETRY_AFTER, cause))
    }

    /// Compares the stream's rows with the stream's head, after the last page, and the head's
    /// bucket with the digest in this process's memory. Returns `false` when the index has advanced
    /// and the page must be read again.
    fn is_whole(&self, read: &IndexRead, digest: Digest) -> Result<bool, ReadError> {
        if mutant::active(Mutant::IndexBelieved) {
            return Ok(true);
        }
        let (partition, stream) = (self.partition, &self.stream);
        let differs = |table, what: String| self.damaged(damaged(partition, table, what));
        let head = read.head.unwrap_or_default();
        // A stream wholly in the tail is read from behind the last version in the index.
        let last =
            read.events.last().map_or(self.next_after.min(head.version), |last| last.version);
        if head.version != last {
            let what =
                format!("{stream} ends with version {last}, and its head says {}", head.version);
            return Err(differs("kafold_event", what));
        }
        if self.from_start && head.digest != digest {
            return Err(differs("kafold_event", format!("{stream} is not what its head says")));
        }
        let tail = self.loader.shared(partition).tail();
        if !tail.knows_heads() {
            return Ok(true);
        }
        let Some(known) = tail.bucket_at(read.position, Bucket::of(stream)) else {
            return Ok(false);
        };
        drop(tail);
        if known != read.bucket {
            let what = format!("the heads beside that of {stream} are not what was written");
            return Err(differs(self.loader.index.heads_table(), what));
        }
        Ok(true)
    }

    fn damaged(&self, error: ReadError) -> ReadError {
        let site = DamageSite::Stream(self.stream.clone());
        self.loader.shared(self.partition).damaged(site, &error);
        error
    }

    fn remember(&self, as_of: Offset) {
        // A read behind the end of the stream has not seen its version.
        if self.head.seen {
            let known = KnownHead { head: self.head.clone(), as_of };
            self.loader.heads().put(self.stream.clone(), known);
        }
    }
}

/// A stream's head, from its events in order.
#[derive(Clone)]
struct HeadBuilder {
    version: Version,
    recent: VecDeque<CommandOutcome>,
    recent_max: usize,
    /// The commands before the recent ones, unless the read began behind some or they are too many.
    older: Option<Filter>,
    /// Whether the version is the stream's, not only what the read began behind.
    seen: bool,
}

impl HeadBuilder {
    fn new(after: Version, recent_max: usize) -> Self {
        let from_start = after == Version::EMPTY;
        Self {
            version: after,
            recent: VecDeque::new(),
            recent_max,
            older: from_start.then(Filter::default),
            seen: from_start,
        }
    }

    fn add(&mut self, event: &RecordedEvent) {
        let (command_id, version, position) = (event.command_id, event.version, event.position);
        let outcome = CommandOutcome { command_id, version, position };
        self.version = version;
        self.seen = true;
        match self.recent.back_mut() {
            Some(last) if last.command_id == command_id => *last = outcome,
            _ => self.recent.push_back(outcome),
        }
        if self.recent.len() > self.recent_max
            && let Some(oldest) = self.recent.pop_front()
        {
            self.older.as_mut().into_iter().for_each(|older| older.add(&oldest.command_id));
            self.older.take_if(|older| older.bytes() > OLDER_BYTES_MAX);
        }
    }

    fn build(self) -> StreamHead {
        StreamHead { version: self.version, recent: self.recent.into(), older: self.older }
    }
}

#[cfg(test)]
mod tests {
    use kafold_core::Position;
    use kafold_core::clock::SystemClock;
    use kafold_core::index::IndexBatch;
    use kafold_core::memory::MemoryIndex;
    use kafold_core::testing::{advance, event};
    use uuid::Uuid;

    use super::*;
    use crate::fold::{Checkpoint, FoldState};
    use crate::tail::Tail;
    use crate::writer::Proven;

    const PARTITION: Partition = Partition(0);

    struct Fixture {
        index: Arc<MemoryIndex>,
        shared: Arc<Shared>,
        loader: Arc<Loader>,
        stream: StreamId,
    }

    /// A log in which event n of the one stream stands at offset n − 1.
    fn fixture() -> Fixture {
        let index = Arc::new(MemoryIndex::new());
        let shared = Arc::new(Shared::new(PARTITION));
        let limits = Limits { page_events_max: 2, ..Limits::default() };
        let clock = Arc::new(SystemClock);
        let (loader, asking) =
            Loader::new(index.clone(), vec![Arc::clone(&shared)], &limits, clock);
        tokio::spawn(asking);
        let stream = StreamId::new("order", "1").expect("valid");
        Fixture { index, shared, loader, stream }
    }

    impl Fixture {
        fn event(&self, version: u64) -> RecordedEvent {
            let new = event(version);
            RecordedEvent {
                stream: self.stream.clone(),
                version: Version(version),
                position: Position { partition: PARTITION, offset: Offset(version - 1) },
                command_id: CommandId(Uuid::from_u128(version.into())),
                event_type: new.event_type,
                payload: new.payload,
                metadata: new.metadata,
            }
        }

        fn prove(&self, version: u64) {
            let next = Checkpoint { next: Offset(version), state: FoldState::default() };
            let events = vec![Arc::new(self.event(version))];
            self.shared.tail().push(Proven { events, next });
        }

        /// Hands the index the events from `from` on, and lets the tail forget them.
        async fn feed(&self, from: u64, to: u64) {
            let batch = IndexBatch {
                partition: PARTITION,
                from: Offset(from - 1),
                to: Checkpoint { next: Offset(to), state: FoldState::default() }.to_cursor(),
                events: (from..=to).map(|version| self.event(version)).collect(),
            };
            advance(&*self.index, batch).await.expect("fits");
            self.shared.tail().drop_below(Offset(to));
        }

        async fn read(&self) -> Result<Vec<u64>, ReadError> {
            let events = self.loader.read(PARTITION, &self.stream, Version::EMPTY);
            events.map_ok(|event| event.version.0).try_collect().await
        }
    }

    #[tokio::test]
    async fn a_stream_is_the_pages_of_the_index_and_then_the_tail() {
        let log = fixture();
        (1..=7).for_each(|version| log.prove(version));
        assert_eq!(log.read().await.expect("all in the tail"), (1..=7).collect::<Vec<_>>());
        log.feed(1, 5).await;
        assert_eq!(log.read().await.expect("in both"), (1..=7).collect::<Vec<_>>());
        log.feed(6, 7).await;
        assert_eq!(log.read().await.expect("all in the index"), (1..=7).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn the_head_of_a_long_stream_tells_which_commands_it_never_had() {
        let log = fixture();
        let longest = 3 * WriterLimits::default().recent_commands_max as u64;
        (1..=longest).for_each(|version| log.prove(version));
        let head = log.loader.head(PARTITION, &log.stream).await.expect("readable");
        let older = head.older.expect("the stream is not too long");
        let command = |number: u64| CommandId(Uuid::from_u128(number.into()));
        let recent: Vec<_> = head.recent.iter().map(|outcome| outcome.command_id).collect();
        let is_known =
            |number| recent.contains(&command(number)) || older.may_hold(&command(number));
        assert!((1..=longest).all(is_known), "a command of the stream is excluded");
        assert!(!(longest + 1..=longest + 20).all(is_known), "nothing is excluded");
    }

    #[tokio::test]
    async fn what_a_head_knows_of_older_commands_is_bounded() {
        let log = fixture();
        let mut head = HeadBuilder::new(Version::EMPTY, 1);
        let mut most = 0;
        for version in 1.. {
            head.add(&log.event(version));
            let Some(older) = &head.older else { break };
            most = most.max(older.bytes());
        }
        assert!((OLDER_BYTES_MAX / 4..=OLDER_BYTES_MAX).contains(&most), "{most} bytes");
    }

    #[tokio::test]
    async fn an_index_below_the_tail_is_refused() {
        let log = fixture();
        (1..=3).for_each(|version| log.prove(version));
        log.shared.tail().drop_below(Offset(2));
        let refused = log.read().await.expect_err("the index has not got 1 and 2");
        assert!(matches!(refused, ReadError::Unavailable { .. }), "{refused}");
        let found = log.loader.find(PARTITION, &log.stream, CommandId(Uuid::nil())).await;
        assert!(matches!(found, Err(ReadError::Unavailable { .. })), "{found:?}");
    }

    #[tokio::test]
    async fn a_load_does_not_wait_for_the_check_of_an_index_known_to_be_damaged() {
        let log = fixture();
        log.feed(1, 3).await;
        let next = Checkpoint { next: Offset(3), state: FoldState::default() };
        *log.shared.tail() = Tail::new(PARTITION, next);
        let clock = SystemClock;
        log.shared.assign(clock.instant(), clock.now());
        log.shared.placed();
        log.shared
            .damaged(DamageSite::Feed, &damaged(PARTITION, "kafold_event", "a row is missing"));
        let refused = log.read().await.expect_err("the index is damaged");
        assert!(matches!(refused, ReadError::Diverged { .. }), "{refused}");
        // Each place is mended by itself.
        log.shared.damaged(DamageSite::Heads, &damaged(PARTITION, "kafold_stream", "it differs"));
        log.shared.mended(&DamageSite::Feed);
        let reason = log.shared.reason().expect("still damaged");
        assert!(reason.contains("kafold_stream"), "{reason}");
        log.shared.mended(&DamageSite::Heads);
        assert!(log.shared.first_damage().is_none());
    }

    #[tokio::test]
    async fn a_head_that_was_read_is_known_while_the_tail_has_what_came_since() {
        let log = fixture();
        (1..=3).for_each(|version| log.prove(version));
        log.feed(1, 3).await;
        assert!(log.loader.known_head(PARTITION, &log.stream).is_none(), "nobody has read it");
        log.read().await.expect("readable");
        log.prove(4);
        let head = log.loader.known_head(PARTITION, &log.stream).expect("was read");
        assert_eq!((head.version, head.recent.len()), (Version(4), 4));
        assert_eq!(head.older, Some(Filter::default()), "all are recent");
        log.feed(4, 4).await;
        assert!(log.loader.known_head(PARTITION, &log.stream).is_none(), "event 4 is not seen");
    }
}

//! Reads partitions of a topic on request, on a thread of its own.
//!
//! Pull: whoever wants records asks for the next ones of a partition and gets them as soon as there
//! are any. What is fetched ahead is bounded, and a partition that nobody asks for is let go. There
//! is no consumer group: partitions are assigned by hand, at explicit offsets.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use kafold_core::{Clock, Offset, Partition};
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};

use crate::client::{Context, Inquirer, Renewal, raw_partition};
use crate::config::{KafkaConfig, Limits};
use crate::wire::{self, Content, LogRecord};

/// How often the thread looks for records that it was not woken for, and serves the client's log
/// lines; librdkafka's wake-ups are known to get lost at times.
const POLL: Duration = Duration::from_millis(50);
/// A partition that nobody asked for in this time is let go.
const IDLE_PARTITION: Duration = Duration::from_secs(5);
/// What a record takes in memory beside its key and value, roughly.
const RECORD_MEMORY_BYTES: usize = 512;
/// Longest question to a broker from this thread: the other partitions' readers wait meanwhile.
const ENDS_TIMEOUT: Duration = Duration::from_secs(2);

/// What a record of a topic is read as.
pub(crate) trait Decode: Sized + Send + 'static {
    /// Reads it. A message that is held would hold its whole fetch buffer: everything is copied.
    fn decode(message: &BorrowedMessage<'_>, partition: Partition, offset: Offset) -> Self;

    /// Its place.
    fn offset(&self) -> Offset;
}

/// Records of one partition, in the order of the topic and without a gap.
#[derive(Debug)]
pub(crate) struct Chunk<T = LogRecord> {
    /// The records from the offset asked for; none if there were none in time.
    pub(crate) records: Vec<T>,
    /// The end of the partition as far as known.
    pub(crate) end: Offset,
}

/// Why a partition could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ReadFailure {
    /// The broker does not answer, or not with records: ask again later.
    #[error("{0}")]
    Unavailable(KafkaError),
    /// The log does not reach to where the read was to begin.
    #[error("the log holds offsets from {start} to {end}")]
    OutOfRange {
        /// The first offset there is.
        start: Offset,
        /// The offset of the next record.
        end: Offset,
    },
    /// The broker gives records from this offset on that fail their checksum.
    #[error("the records from offset {0} on failed their checksum")]
    Corrupt(Offset),
    /// Another request for the same partition came.
    #[error("another read of the partition was asked for")]
    Replaced,
}

impl ReadFailure {
    /// As an error of the client.
    pub(crate) fn into_error(self) -> KafkaError {
        match self {
            Self::Unavailable(error) => error,
            Self::Corrupt(_) => KafkaError::MessageConsumption(RDKafkaErrorCode::BadMessage),
            Self::OutOfRange { .. } | Self::Replaced => {
                KafkaError::MessageConsumption(RDKafkaErrorCode::OffsetOutOfRange)
            }
        }
    }

    /// Records that should be there did not come.
    pub(crate) fn timed_out() -> Self {
        Self::Unavailable(KafkaError::MessageConsumption(RDKafkaErrorCode::RequestTimedOut))
    }
}

/// Called once, on the reader's thread: it must not block.
pub(crate) type Reply<T = LogRecord> = Box<dyn FnOnce(Result<Chunk<T>, ReadFailure>) + Send>;

enum Command<T> {
    Read(Request<T>),
    Forget(Partition),
    /// The client has fetched something.
    Wake,
    Close,
}

struct Request<T> {
    partition: Partition,
    from: Offset,
    wait: Duration,
    reply: Reply<T>,
}

/// The handle to a reader's thread, which ends when the last handle is dropped.
pub(crate) struct Reader<T> {
    commands: Arc<Commands<T>>,
}

/// Reads the events topic.
pub(crate) type LogReader = Reader<LogRecord>;

impl<T> Clone for Reader<T> {
    fn clone(&self) -> Self {
        Self { commands: Arc::clone(&self.commands) }
    }
}

/// The client's wake-ups keep the channel open, so its end has to be told.
struct Commands<T>(Sender<Command<T>>);

impl<T> Drop for Commands<T> {
    fn drop(&mut self) {
        // A thread that is gone needs no end.
        let _ = self.0.send(Command::Close);
    }
}

impl<T: Decode> Reader<T> {
    /// Starts the thread. The client connects when it is first asked. A fetch waits `fetch_wait` for
    /// new records, and a partition that begins to be read meanwhile waits with it.
    pub(crate) fn start(
        config: &KafkaConfig,
        topic: String,
        fetch_wait: Duration,
        inquirer: Arc<Inquirer>,
        clock: Arc<dyn Clock>,
    ) -> KafkaResult<Self> {
        let settings = config.reader(fetch_wait);
        let mut consumer = BaseConsumer::from_config_and_context(&settings, Context::default())?;
        let (commands, inbox) = channel();
        let wake = commands.clone();
        consumer.set_nonempty_callback(move || {
            let _ = wake.send(Command::Wake);
        });
        let reading = Reading {
            consumer,
            settings,
            renewal: Renewal::new(config),
            inquirer,
            topic,
            limits: config.limits.clone(),
            clock,
            partitions: BTreeMap::new(),
        };
        std::thread::Builder::new()
            .name("kafold-reader".into())
            .spawn(move || reading.run(&inbox))
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        Ok(Self { commands: Arc::new(Commands(commands)) })
    }

    /// Asks for the records of a partition from an offset on. The reply comes as soon as there is a
    /// record; at the end of the log, as far as known, it comes after `wait` at the latest. A new
    /// request for a partition replaces the one before, which is told so.
    pub(crate) fn read(&self, partition: Partition, from: Offset, wait: Duration, reply: Reply<T>) {
        // A thread that is gone drops the reply, which its maker notices.
        let _ = self.commands.0.send(Command::Read(Request { partition, from, wait, reply }));
    }

    /// [`LogReader::read`] as a future.
    pub(crate) fn read_async(
        &self,
        partition: Partition,
        from: Offset,
        wait: Duration,
    ) -> impl Future<Output = Result<Chunk<T>, ReadFailure>> + Send + 'static {
        let (send, receive) = tokio::sync::oneshot::channel();
        let reply = move |answer| {
            // Nobody waits any more: the records can be read again.
            let _ = send.send(answer);
        };
        self.read(partition, from, wait, Box::new(reply));
        async move { receive.await.unwrap_or(Err(ReadFailure::Unavailable(KafkaError::Canceled))) }
    }

    /// Stops fetching a partition.
    pub(crate) fn forget(&self, partition: Partition) {
        let _ = self.commands.0.send(Command::Forget(partition));
    }
}

struct Reading<T> {
    consumer: BaseConsumer<Context>,
    settings: ClientConfig,
    renewal: Renewal,
    /// A question on the reader's own connection would wait behind a fetch that waits for records.
    inquirer: Arc<Inquirer>,
    topic: String,
    limits: Limits,
    clock: Arc<dyn Clock>,
    partitions: BTreeMap<Partition, Fetching<T>>,
}

/// Somebody who waits for the next records of a partition.
struct Waiting<T> {
    asked: Instant,
    wait: Duration,
    reply: Reply<T>,
}

/// A record with what it weighs.
struct Fetched<T> {
    bytes: usize,
    record: T,
}

/// A partition that is being fetched.
struct Fetching<T> {
    /// Fetched and not yet handed out; begins at `next`.
    stash: VecDeque<Fetched<T>>,
    stash_bytes: usize,
    next: Offset,
    /// The offset of the record to be fetched next.
    fetched: Offset,
    end: Offset,
    /// Whether the client fetches it: it stops when the stash is full.
    assigned: bool,
    /// The record to be fetched next fails its checksum.
    corrupt: bool,
    request: Option<Waiting<T>>,
    used: Instant,
}

impl<T: Decode> Reading<T> {
    fn run(mut self, inbox: &Receiver<Command<T>>) {
        let mut more = false;
        while self.take_commands(inbox, more) {
            self.renewal.look(self.consumer.client());
            more = self.is_asked() && self.fetch();
            self.answer();
            self.let_go_of_idle();
        }
        // The client is closed here, on its own thread: closing may wait for a broker.
        self.partitions.clear();
        if let Err(error) = self.consumer.unassign() {
            tracing::debug!(%error, "unassign while closing a reader");
        }
    }

    /// Waits for something to do, unless there is; whether to go on.
    fn take_commands(&mut self, inbox: &Receiver<Command<T>>, more: bool) -> bool {
        let wait = if more { Duration::ZERO } else { self.next_deadline().min(POLL) };
        let mut next = match inbox.recv_timeout(wait) {
            Ok(command) => Ok(command),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => Err(TryRecvError::Disconnected),
        };
        loop {
            match next {
                Ok(Command::Read(request)) => self.accept(request),
                Ok(Command::Forget(partition)) => self.drop_partition(partition),
                Ok(Command::Wake) => {}
                Ok(Command::Close) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
            next = inbox.try_recv();
        }
    }

    /// How long until the first who waits for records at the end of the log has waited enough.
    fn next_deadline(&self) -> Duration {
        let now = self.clock.instant();
        let at_end = self.partitions.values().filter(|fetching| fetching.next >= fetching.end);
        let waiting = at_end.filter_map(|fetching| fetching.request.as_ref());
        let left = waiting.map(|waiting| {
            waiting.wait.saturating_sub(now.saturating_duration_since(waiting.asked))
        });
        left.min().unwrap_or(POLL)
    }

    fn accept(&mut self, request: Request<T>) {
        let Request { partition, from, wait, reply } = request;
        let before = self.partitions.get_mut(&partition).and_then(|found| found.request.take());
        if let Some(before) = before {
            (before.reply)(Err(ReadFailure::Replaced));
        }
        let continues = self.partitions.get(&partition).is_some_and(|found| found.next == from);
        if !continues {
            self.drop_partition(partition);
            match self.begin(partition, from) {
                Ok(fetching) => self.partitions.insert(partition, fetching),
                Err(failure) => return reply(Err(failure)),
            };
        }
        let asked = self.clock.instant();
        let Some(fetching) = self.partitions.get_mut(&partition) else { return };
        fetching.used = asked;
        fetching.request = Some(Waiting { asked, wait, reply });
        if !fetching.assigned && fetching.stash.is_empty() && !fetching.corrupt {
            let from = fetching.fetched;
            match assign(&self.consumer, &self.topic, partition, from) {
                Ok(()) => fetching.assigned = true,
                Err(error) => self.fail(partition, &ReadFailure::Unavailable(error)),
            }
        }
        self.answer_one(partition);
    }

    /// Checks that the log reaches to `from`, so that a missing offset is told with the ends.
    fn begin(&mut self, partition: Partition, from: Offset) -> Result<Fetching<T>, ReadFailure> {
        let timeout = self.limits.request_timeout.min(ENDS_TIMEOUT);
        let (start, end) = self
            .inquirer
            .ends_within(&self.topic, partition, timeout)
            .map_err(ReadFailure::Unavailable)?;
        if from < start || from > end {
            return Err(ReadFailure::OutOfRange { start, end });
        }
        let used = self.clock.instant();
        Ok(Fetching {
            stash: VecDeque::new(),
            stash_bytes: 0,
            next: from,
            fetched: from,
            end,
            assigned: false,
            corrupt: false,
            request: None,
            used,
        })
    }

    fn drop_partition(&mut self, partition: Partition) {
        if self.partitions.remove(&partition).is_some_and(|fetching| fetching.assigned) {
            self.unassign(partition);
        }
    }

    fn unassign(&self, partition: Partition) {
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&self.topic, raw_partition(partition));
        if let Err(error) = self.consumer.incremental_unassign(&list) {
            tracing::debug!(%partition, %error, "unassign");
        }
    }

    /// Whether somebody waits for records that are not here yet. Else they stay with the client, which
    /// fetches no more than it has room for; what is taken from it beyond the room here is fetched again.
    fn is_asked(&self) -> bool {
        self.partitions.values().any(|fetching| fetching.request.is_some())
    }

    /// Takes what the client has fetched; whether there may be more.
    fn fetch(&mut self) -> bool {
        for _ in 0..self.limits.read_records_max {
            match self.consumer.poll(Duration::ZERO) {
                None => return false,
                Some(event) => self.take(event.map(|message| convert(&message))),
            }
        }
        true
    }

    fn take(&mut self, event: KafkaResult<(Partition, Fetched<T>)>) {
        match event {
            Ok((partition, record)) => self.stash(partition, record),
            Err(KafkaError::PartitionEOF(raw)) => {
                let partition = Partition(u32::try_from(raw).unwrap_or(u32::MAX));
                if let Some(fetching) = self.partitions.get_mut(&partition) {
                    fetching.end = fetching.end.max(fetching.fetched);
                }
            }
            // It does not say of which partition: all that wait begin again, with a look at the
            // ends of the log, which gives the failure its name.
            Err(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)) => {
                self.begin_again();
            }
            Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BadMessage)) => {
                self.find_corrupt();
            }
            // The client goes on by itself; who waits is told when his time is over.
            Err(error) => tracing::debug!(topic = self.topic, %error, "read"),
        }
    }

    fn begin_again(&mut self) {
        let waiting: Vec<_> =
            self.partitions.iter().filter(|(_, f)| f.stash.is_empty()).map(|(p, _)| *p).collect();
        for partition in waiting {
            let Some(fetching) = self.partitions.remove(&partition) else { continue };
            if fetching.assigned {
                self.unassign(partition);
            }
            if let Some(Waiting { asked, wait, reply }) = fetching.request {
                let waited = self.clock.instant().saturating_duration_since(asked);
                let wait = wait.saturating_sub(waited);
                self.accept(Request { partition, from: fetching.next, wait, reply });
            }
        }
    }

    fn stash(&mut self, partition: Partition, fetched: Fetched<T>) {
        let Some(fetching) = self.partitions.get_mut(&partition) else { return };
        // A record from before the last assignment, or behind corrupt ones.
        let offset = fetched.record.offset();
        if offset < fetching.fetched || fetching.corrupt {
            return;
        }
        fetching.fetched = offset.plus(1);
        fetching.end = fetching.end.max(fetching.fetched);
        fetching.stash_bytes += fetched.bytes;
        fetching.stash.push_back(fetched);
        let full = fetching.stash.len() >= 2 * self.limits.read_records_max
            || fetching.stash_bytes >= 2 * self.limits.read_bytes_max;
        if full {
            fetching.assigned = false;
            self.unassign(partition);
        }
    }

    fn answer(&mut self) {
        let waiting: Vec<_> = self
            .partitions
            .iter()
            .filter(|(_, fetching)| fetching.request.is_some())
            .map(|(partition, _)| *partition)
            .collect();
        for partition in waiting {
            self.answer_one(partition);
        }
    }

    /// Answers a request if there are records, or if its time is over.
    fn answer_one(&mut self, partition: Partition) {
        let now = self.clock.instant();
        let patience = self.limits.request_timeout;
        let Some(fetching) = self.partitions.get_mut(&partition) else { return };
        let Some(Waiting { asked, wait, .. }) = &fetching.request else { return };
        if fetching.stash.is_empty() {
            let at_end = fetching.next >= fetching.end;
            let waited = now.saturating_duration_since(*asked);
            if fetching.corrupt {
                let from = fetching.next;
                return self.fail(partition, &ReadFailure::Corrupt(from));
            }
            if waited < if at_end { *wait } else { patience.max(*wait) } {
                return;
            }
            if !at_end {
                // The broker does not give what it has.
                return self.fail(partition, &ReadFailure::timed_out());
            }
        }
        let (records, bytes) = take_front(&mut fetching.stash, &self.limits);
        fetching.stash_bytes -= bytes;
        fetching.next = records.last().map_or(fetching.next, |last| last.offset().plus(1));
        let chunk = Chunk { end: fetching.end, records };
        if let Some(Waiting { reply, .. }) = fetching.request.take() {
            reply(Ok(chunk));
        }
    }

    /// Records of some partition failed their checksum, and the client goes on behind them, wherever it
    /// takes that to be. It does not say of which partition: every one is looked at.
    fn find_corrupt(&mut self) {
        let fetched = self.partitions.iter().filter(|(_, fetching)| fetching.assigned);
        let fetched: Vec<_> = fetched.map(|(p, fetching)| (*p, fetching.fetched)).collect();
        for (partition, from) in fetched {
            if !self.is_corrupt(partition, from) {
                continue;
            }
            tracing::error!(topic = self.topic, %partition, %from, "records failed their checksum");
            self.unassign(partition);
            if let Some(fetching) = self.partitions.get_mut(&partition) {
                (fetching.assigned, fetching.corrupt) = (false, true);
            }
        }
    }

    /// Whether the record there fails its checksum: a client that reads nothing else knows.
    fn is_corrupt(&self, partition: Partition, from: Offset) -> bool {
        let probe = BaseConsumer::from_config_and_context(&self.settings, Context::default());
        let Ok(probe) = probe else { return false };
        if assign(&probe, &self.topic, partition, from).is_err() {
            return false;
        }
        let deadline = self.clock.instant() + ENDS_TIMEOUT;
        while self.clock.instant() < deadline {
            match probe.poll(POLL) {
                Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BadMessage))) => {
                    return true;
                }
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return false,
                Some(Err(_)) | None => {}
            }
        }
        false
    }

    fn fail(&mut self, partition: Partition, failure: &ReadFailure) {
        let Some(fetching) = self.partitions.remove(&partition) else { return };
        if fetching.assigned {
            self.unassign(partition);
        }
        if let Some(Waiting { reply, .. }) = fetching.request {
            reply(Err(failure.clone()));
        }
    }

    fn let_go_of_idle(&mut self) {
        let now = self.clock.instant();
        // Who waits for the next record may wait longer than that.
        let idle = |fetching: &Fetching<T>| {
            fetching.request.is_none()
                && now.saturating_duration_since(fetching.used) > IDLE_PARTITION
        };
        let idle: Vec<_> =
            self.partitions.iter().filter(|(_, f)| idle(f)).map(|(p, _)| *p).collect();
        for partition in idle {
            self.drop_partition(partition);
        }
    }
}

fn assign(
    consumer: &BaseConsumer<Context>,
    topic: &str,
    partition: Partition,
    from: Offset,
) -> KafkaResult<()> {
    let mut list = TopicPartitionList::with_capacity(1);
    let raw = RawOffset::Offset(i64::try_from(from.0).unwrap_or(i64::MAX));
    list.add_partition_offset(topic, raw_partition(partition), raw)?;
    consumer.incremental_assign(&list)
}

/// The first records within the limits of one read, and their bytes.
fn take_front<T>(stash: &mut VecDeque<Fetched<T>>, limits: &Limits) -> (Vec<T>, usize) {
    let (mut count, mut bytes) = (0, 0);
    for fetched in stash.iter().take(limits.read_records_max) {
        count += 1;
        bytes += fetched.bytes;
        if bytes >= limits.read_bytes_max {
            break;
        }
    }
    (stash.drain(..count).map(|fetched| fetched.record).collect(), bytes)
}

/// A record of the topic, and the bytes it was made from.
fn convert<T: Decode>(message: &BorrowedMessage<'_>) -> (Partition, Fetched<T>) {
    let partition = Partition(u32::try_from(message.partition()).unwrap_or(u32::MAX));
    let offset = Offset(u64::try_from(message.offset()).unwrap_or(u64::MAX));
    let record = T::decode(message, partition, offset);
    let bytes = message.key_len() + message.payload_len() + RECORD_MEMORY_BYTES;
    (partition, Fetched { bytes, record })
}

/// Hands the headers over, if they can be read: the wrapper panics at a name that is not UTF-8. No
/// record of ours has one.
pub(crate) fn with_headers<'m, R>(
    message: &'m BorrowedMessage<'_>,
    read: impl FnOnce(&mut dyn Iterator<Item = (&'m str, Option<&'m [u8]>)>) -> R,
) -> Option<R> {
    catch_unwind(AssertUnwindSafe(|| {
        let headers = message.headers().into_iter().flat_map(Headers::iter);
        read(&mut headers.map(|header| (header.key, header.value)))
    }))
    .ok()
}

impl Decode for LogRecord {
    fn decode(message: &BorrowedMessage<'_>, partition: Partition, offset: Offset) -> Self {
        let (key, value) = (message.key(), message.payload());
        let parsed =
            with_headers(message, |headers| wire::parse(partition, offset, key, headers, value));
        parsed.unwrap_or(Self { offset, content: Content::Foreign })
    }

    fn offset(&self) -> Offset {
        self.offset
    }
}

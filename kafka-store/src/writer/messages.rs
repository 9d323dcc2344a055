//! What goes into a [`PartitionWriter`](super::PartitionWriter) and what comes out of it.

use std::sync::Arc;
use std::time::Duration;

use kafold_core::store::{Append, Appended, Cause, Owner, View};
use kafold_core::{
    AppendError, CommandId, Filter, Offset, Partition, Position, ReadError, RecordedEvent,
    StreamId, Version,
};

use crate::fold::Checkpoint;
use crate::wire::{ClaimId, LogRecord, Record};

/// Names a submission or a confirm until its answer; chosen by the driver, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What a writer is and how much it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterConfig {
    /// The partition.
    pub partition: Partition,
    /// How many partitions the topic has.
    pub partitions: u32,
    /// This process, as its claims tell it.
    pub owner: Owner,
    /// The log's NAME, for the size of records.
    pub log: String,
    /// The limits.
    pub limits: WriterLimits,
}

/// Limits of one partition's writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterLimits {
    /// Largest record in bytes, with everything that [`event_size`](crate::wire::event_size) counts;
    /// a larger one is answered `TooLarge`. The topic's `max.message.bytes`. Default 1 MiB.
    pub record_bytes_max: usize,
    /// Submissions and confirms without an answer, and commits without an outcome; one more is
    /// answered `Unavailable`. Default 16 384.
    pub requests_max: usize,
    /// Bytes of the commits without an answer; more is answered `Unavailable`, and a commit that
    /// alone is larger `TooLarge`. Default 64 MiB.
    pub request_bytes_max: usize,
    /// Proven events that are not yet in the index; beyond it submissions are answered
    /// `Unavailable`. Default 20 000.
    pub unindexed_events_max: usize,
    /// Streams whose versions and recent commands are kept; the least recently used is forgotten and
    /// loaded again when needed. Default 100 000.
    pub streams_max: usize,
    /// Recent commands kept of each stream with what they came to. Default 64.
    pub recent_commands_max: usize,
    /// Bytes, about 2 to 4 a command, to know of the older commands of streams which they were: what
    /// is none of them needs no look-up. Beyond it the streams not used for longest look up each
    /// command, as a stream does that was longer than its recent commands when it was loaded.
    /// Default 8 MiB.
    pub older_commands_bytes_max: usize,
    /// Loads and look-ups in flight; more wait for their turn. Default 256.
    pub loads_max: usize,
    /// Commands remembered that the broker refused for good. Default 1 024.
    pub refused_commands_max: usize,
    /// Shortest time between two barriers. Default 5 ms.
    pub barrier_interval: Duration,
    /// Wait before claiming again, doubled for each attempt without success, half of it random.
    /// Default 50 ms.
    pub claim_backoff: Duration,
    /// The longest such wait. Default 5 s.
    pub claim_backoff_max: Duration,
    /// Wait before a partition that another process claimed is claimed back, doubled each time, half
    /// of it random: longer than the group needs to tell who is to own it. Default 3 s.
    pub yield_backoff: Duration,
    /// The longest such wait; whoever owned for so long begins with the shortest again. Default 30 s.
    pub yield_backoff_max: Duration,
    /// A record without a report for so long is in doubt; longer than the producer itself tries.
    /// Default 330 s.
    pub report_timeout: Duration,
    /// An owner that has nothing in flight for so long begins to read, so that it notices another's
    /// claim. Default 200 ms.
    pub quiet_time: Duration,
    /// How long a read may wait for a record at the end of the log. Default 1 s.
    pub read_wait: Duration,
    /// Wait after a read that failed. Default 250 ms.
    pub read_retry: Duration,
}

impl Default for WriterLimits {
    fn default() -> Self {
        Self {
            record_bytes_max: 1 << 20,
            requests_max: 16_384,
            request_bytes_max: 64 << 20,
            unindexed_events_max: 20_000,
            streams_max: 100_000,
            recent_commands_max: 64,
            older_commands_bytes_max: 8 << 20,
            loads_max: 256,
            refused_commands_max: 1_024,
            barrier_interval: Duration::from_millis(5),
            claim_backoff: Duration::from_millis(50),
            claim_backoff_max: Duration::from_secs(5),
            yield_backoff: Duration::from_secs(3),
            yield_backoff_max: Duration::from_secs(30),
            report_timeout: Duration::from_secs(330),
            quiet_time: Duration::from_millis(200),
            read_wait: Duration::from_secs(1),
            read_retry: Duration::from_millis(250),
        }
    }
}

/// What happened. The time is handed over beside it and never goes backward.
#[derive(Debug, Clone)]
pub enum Input {
    /// Begin: the log's identity has been checked, and the index stands here. Once, and first.
    Start(Checkpoint),
    /// The answer to [`Output::Read`]: the next records, dense, and the log's end as far as known.
    Records {
        /// The records from the offset asked for, maybe none.
        records: Vec<LogRecord>,
        /// The offset behind the last record that the log had; a hint, never trusted.
        end: Offset,
    },
    /// [`Output::Read`] came to nothing; the writer asks again.
    ReadFailed,
    /// A commit to append.
    Submit {
        /// Names the answer.
        request: RequestId,
        /// The commit.
        append: Append,
    },
    /// A view to confirm.
    Confirm {
        /// Names the answer.
        request: RequestId,
        /// The view.
        view: View,
    },
    /// The answer to [`Output::Load`]: index and tail, both looked at after that output.
    Loaded {
        /// The stream.
        stream: StreamId,
        /// What it holds.
        head: Result<StreamHead, ReadError>,
    },
    /// The answer to [`Output::Find`]: tail and index, both looked at after that output.
    Found {
        /// The stream.
        stream: StreamId,
        /// The command.
        command_id: CommandId,
        /// What it came to, `None` if it is not in the stream.
        found: Result<Option<Appended>, ReadError>,
    },
    /// What the producer says about a record of [`Output::Produce`].
    Report {
        /// The claim in the record's stamp.
        claim: ClaimId,
        /// The seq in the record's stamp; 0 for the claim itself.
        seq: u64,
        /// The offset, if the broker told one, or why it failed.
        result: Result<Option<Offset>, ReportFailure>,
    },
    /// A fresh producer is in place and the old one purged, asked for or not. The first one is there
    /// when the writer starts and is not reported.
    ProducerReady,
    /// The index holds everything below this offset.
    Indexed(Offset),
    /// Time has passed: due at [`PartitionWriter::next_wake`](super::PartitionWriter::next_wake).
    Tick,
    /// The stored position is damaged: nothing is accepted until [`Input::Start`], which an operator makes
    /// possible.
    Unplaced(Cause),
    /// The driver found that the log is not ours any more: nothing can go on.
    Halt(Cause),
    /// All forwarded commands below `mark` are settled, found out under this claim: the records from
    /// here on say so. If it is `wanted`, somebody waits until the log says it.
    CommandsMark {
        /// The claim under which they were settled; under another one it is not true any more.
        claim: ClaimId,
        /// The lowest offset of a command that is not settled.
        mark: Offset,
        /// Whether a record is to be produced for it alone, if no other comes.
        wanted: bool,
    },
    /// The partition is to be another's: take nothing new, settle what is pending, then
    /// [`Output::Released`].
    Release,
    /// The partition is another's, and there is no time to settle anything: everybody is answered.
    Abandon,
}

/// Why a record may not have reached the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportFailure {
    /// The producer is beyond repair: a fresh one is needed.
    pub fatal: bool,
    /// The broker refuses this very record and always will, such as for its size.
    pub refused: bool,
    /// The client's words.
    pub reason: String,
}

/// What is to be done, in this order: a [`Output::Proven`] is in the tail before any later answer is
/// given or load begun.
#[derive(Debug, Clone)]
pub enum Output {
    /// Produce this record to the partition, behind all earlier ones; never drop it.
    Produce(Record),
    /// Answer with the records from `from` on as soon as there is one, at the end of the log after
    /// `wait` at the latest. Replaces an earlier read; that one's answer does no harm if it still
    /// comes.
    Read {
        /// The first offset wanted.
        from: Offset,
        /// How long to wait for a record at the end of the log.
        wait: Duration,
    },
    /// Answer with [`Input::Loaded`].
    Load {
        /// The stream.
        stream: StreamId,
    },
    /// Answer with [`Input::Found`].
    Find {
        /// The stream.
        stream: StreamId,
        /// The command.
        command_id: CommandId,
    },
    /// The log has advanced, maybe by a commit: for the tail and the index.
    Proven(Proven),
    /// The answer to [`Input::Submit`].
    Appended {
        /// The request.
        request: RequestId,
        /// Its outcome.
        result: Result<Appended, AppendError>,
    },
    /// The answer to [`Input::Confirm`].
    Confirmed {
        /// The request.
        request: RequestId,
        /// Its outcome.
        result: Result<(), AppendError>,
    },
    /// Make a fresh producer, purge the old one, tell [`Input::ProducerReady`] to all partitions.
    FreshProducer,
    /// The partition is ours from here on.
    Owned {
        /// Under this claim.
        claim: ClaimId,
        /// The lowest offset of a forwarded command that may not be settled.
        commands_mark: Offset,
    },
    /// The log says, under our own claim, that all forwarded commands below are settled.
    CommandsSettled(Offset),
    /// What was in flight is in doubt: a new claim will settle it. For logs and metrics.
    Doubt(String),
    /// Another process has claimed the partition. This one takes nothing for a while and then claims
    /// it back, unless it is released.
    Superseded(Owner),
    /// The partition halts for good: the log contradicts itself.
    Halted(Cause),
    /// Nothing is pending any more after [`Input::Release`] or [`Input::Abandon`].
    Released,
}

/// The log up to `next` is folded and cannot change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proven {
    /// The commit that became visible last, if one did.
    pub events: Vec<Arc<RecordedEvent>>,
    /// Where the index may stand once it holds these events and all before.
    pub next: Checkpoint,
}

/// What a stream holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamHead {
    /// Its version.
    pub version: Version,
    /// Its most recent commands, oldest first.
    pub recent: Vec<CommandOutcome>,
    /// The commands before those; `None` when they are not known.
    pub older: Option<Filter>,
}

/// What a command came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandOutcome {
    /// The command.
    pub command_id: CommandId,
    /// The version of its last event.
    pub version: Version,
    /// Where its last event is.
    pub position: Position,
}

/// Whether a partition takes commands.
#[derive(Debug, Clone)]
pub enum Status {
    /// Reading towards the end of the log; not yet claimed, or in doubt.
    CatchingUp,
    /// The claim is on its way.
    Claiming,
    /// Commands are decided here.
    Owning,
    /// Another process owns the partition, for now.
    Superseded(Owner),
    /// The log contradicts itself.
    Halted(Cause),
    /// Given up for another to take.
    Released,
}

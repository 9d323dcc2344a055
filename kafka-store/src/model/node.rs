//! A writer that runs, and the little of the driver around it that the model needs.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::DateTime;
use kafold_core::store::Owner;
use kafold_core::{Filter, Offset, RecordedEvent, Version};

use super::mixer::Mixer;
use crate::fold::Checkpoint;
use crate::sim::reference::PARTITION;
use crate::wire::ClaimId;
use crate::writer::{
    CommandOutcome, Entropy, Input, Output, PartitionWriter, Status, StreamHead, WriterConfig,
    WriterLimits,
};

pub(super) struct Node {
    place: usize,
    /// Its time, which only stands still: see [`Node::wait`].
    now: Instant,
    pub(super) writer: PartitionWriter,
    /// The events that the writer told as proven: its tail, while the index is empty.
    pub(super) proven: Vec<Arc<RecordedEvent>>,
    /// From where the read goes that it asked for.
    pub(super) read: Option<Offset>,
    /// Its last submission, and the version that it comes to.
    pub(super) last: Option<(u8, Version)>,
    /// Claims made so far.
    pub(super) claims: u64,
    /// The last of them.
    pub(super) claim: Option<ClaimId>,
    fingerprint: u64,
}

/// Time stands still: whatever waits for it is due at once, or never.
fn limits() -> WriterLimits {
    const NEVER: Duration = Duration::from_secs(1 << 20);
    WriterLimits {
        refused_commands_max: 1,
        barrier_interval: Duration::ZERO,
        claim_backoff: Duration::ZERO,
        claim_backoff_max: Duration::ZERO,
        yield_backoff: Duration::ZERO,
        yield_backoff_max: Duration::ZERO,
        report_timeout: NEVER,
        quiet_time: Duration::ZERO,
        read_wait: Duration::ZERO,
        read_retry: Duration::ZERO,
        ..WriterLimits::default()
    }
}

impl Node {
    /// A writer that begins to read the log.
    pub(super) fn start(place: usize, now: Instant) -> Self {
        let owner = Owner {
            name: place.to_string(),
            address: String::new(),
            started_at: DateTime::UNIX_EPOCH,
        };
        let (log, limits) = ("model".into(), limits());
        let config = WriterConfig { partition: PARTITION, partitions: 1, owner, log, limits };
        let mut writer = PartitionWriter::new(config, entropy(place, 0));
        let mut out = Vec::new();
        writer.handle(now, Input::Start(Checkpoint::default()), &mut out);
        let read = out.iter().find_map(|output| match output {
            Output::Read { from, .. } => Some(*from),
            _ => None,
        });
        let mut node = Self {
            place,
            now,
            writer,
            proven: Vec::new(),
            read,
            last: None,
            claims: 0,
            claim: None,
            fingerprint: 0,
        };
        node.settle();
        node
    }

    /// A copy to go on with.
    pub(super) fn fork(&self) -> Self {
        Self {
            place: self.place,
            now: self.now,
            writer: self.writer.fork(entropy(self.place, self.claims)),
            proven: self.proven.clone(),
            read: self.read,
            last: self.last,
            claims: self.claims,
            claim: self.claim,
            fingerprint: 0,
        }
    }

    pub(super) fn handle(&mut self, input: Input, out: &mut Vec<Output>) {
        self.writer.handle(self.now, input, out);
    }

    /// When the writer gives up waiting for a report.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        self.writer.next_wake().filter(|wake| *wake > self.now)
    }

    /// Lets its time pass until then. All that the writer remembers of time is either over then or
    /// begins anew, so that fingerprints need not know the time.
    pub(super) fn wait(&mut self) {
        self.now = self.waits_until().unwrap_or(self.now);
    }

    /// Works out its fingerprint, after which nothing may change any more.
    pub(super) fn settle(&mut self) {
        let mut hasher = Mixer::default();
        self.writer.fingerprint(&mut hasher);
        (self.proven.len(), self.read, self.last, self.claims).hash(&mut hasher);
        self.waits_until().is_some().hash(&mut hasher);
        self.fingerprint = hasher.finish();
    }

    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    pub(super) fn owns(&self) -> bool {
        matches!(self.writer.status(), Status::Owning)
    }

    pub(super) fn is_catching_up(&self) -> bool {
        matches!(self.writer.status(), Status::CatchingUp)
    }

    /// The stream's version as a caller of this node sees it.
    pub(super) fn version(&self) -> Version {
        self.proven.last().map_or(Version::EMPTY, |last| last.version)
    }

    /// The answer to a load.
    pub(super) fn head(&self) -> StreamHead {
        let mut recent: Vec<CommandOutcome> = Vec::new();
        for event in &self.proven {
            let (command_id, version, position) = (event.command_id, event.version, event.position);
            recent.retain(|outcome| outcome.command_id != command_id);
            recent.push(CommandOutcome { command_id, version, position });
        }
        StreamHead { version: self.version(), recent, older: Some(Filter::default()) }
    }
}

/// The nonce of the claim that may come next. Jitter draws from it as well, in vain: nothing waits.
fn entropy(place: usize, claims: u64) -> Entropy {
    let nonce = (place as u64 + 1) * 100 + claims;
    Box::new(move || nonce)
}

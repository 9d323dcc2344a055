//! One test a rule of the protocol, each the shortest history in which the rule matters.

mod appending;
mod claiming;
mod confirming;
mod limits;
mod marks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use kafold_core::clock::SystemClock;
use kafold_core::store::{Append, Appended, Owner, Ticket, View};
use kafold_core::{
    AppendError, Clock, CommandId, Commit, ExpectedVersion, Filter, Metadata, NewEvent, Offset,
    Partition, Position, RecordedEvent, StreamId, Version,
};
use uuid::Uuid;

use super::*;
use crate::wire::{Body, Claim, Content, Epoch, EventBody, Nonce, Record};

const PARTITION: Partition = Partition(0);

/// A writer and the log it writes to; what it produces waits in `produced` until the test decides.
struct Bench {
    writer: PartitionWriter,
    now: Instant,
    log: Vec<LogRecord>,
    produced: Vec<Record>,
    out: Vec<Output>,
    requests: u64,
}

fn config() -> WriterConfig {
    let started_at = DateTime::<Utc>::UNIX_EPOCH + TimeDelta::seconds(1_000);
    WriterConfig {
        partition: PARTITION,
        partitions: 1,
        owner: Owner { name: "us".into(), address: String::new(), started_at },
        log: "test".into(),
        limits: WriterLimits::default(),
    }
}

impl Bench {
    fn new(config: WriterConfig) -> Self {
        let mut entropy = 0;
        let entropy = Box::new(move || {
            entropy += 1;
            entropy
        });
        Self {
            writer: PartitionWriter::new(config, entropy),
            now: SystemClock.instant(),
            log: Vec::new(),
            produced: Vec::new(),
            out: Vec::new(),
            requests: 0,
        }
    }

    /// A writer that owns an empty log: its claim is at 0, so record s belongs at s.
    fn owning() -> Self {
        Self::owning_with(config())
    }

    fn owning_with(config: WriterConfig) -> Self {
        let mut bench = Self::new(config);
        bench.give(Input::Start(Checkpoint::default()));
        bench.catch_up();
        bench.land_all();
        bench.catch_up();
        assert!(matches!(bench.writer.status(), Status::Owning));
        bench
    }

    fn give(&mut self, input: Input) {
        let mut out = Vec::new();
        self.writer.handle(self.now, input, &mut out);
        for output in out {
            match output {
                Output::Produce(record) => self.produced.push(record),
                other => self.out.push(other),
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.give(Input::Tick);
    }

    /// The writer reads all there is.
    fn catch_up(&mut self) {
        let from = self.writer.reader.fold().next().0 as usize;
        let records = self.log[from..].to_vec();
        self.give(Input::Records { records, end: Offset(self.log.len() as u64) });
    }

    fn end(&self) -> Offset {
        Offset(self.log.len() as u64)
    }

    /// A record, by whomever, reaches the log.
    fn land(&mut self, mut record: Record) -> Offset {
        let offset = self.end();
        if let Body::Event(body) = &mut record.body {
            let mut event = RecordedEvent::clone(&body.event);
            event.position = Position { partition: PARTITION, offset };
            body.event = Arc::new(event);
        }
        self.log.push(LogRecord { offset, content: Content::Ours(record) });
        offset
    }

    /// Everything produced reaches the log; no report yet.
    fn land_all(&mut self) -> Vec<(Stamp, Offset)> {
        let produced = std::mem::take(&mut self.produced);
        produced.into_iter().map(|record| (record.stamp, self.land(record))).collect()
    }

    fn report(&mut self, stamp: Stamp, offset: Option<u64>) {
        let result = Ok(offset.map(Offset));
        self.give(Input::Report { claim: stamp.claim, seq: stamp.seq, result });
    }

    fn report_failure(&mut self, stamp: Stamp, change: impl FnOnce(&mut ReportFailure)) {
        let mut failure =
            ReportFailure { fatal: false, refused: false, reason: "timed out".into() };
        change(&mut failure);
        let (claim, seq) = (stamp.claim, stamp.seq);
        self.give(Input::Report { claim, seq, result: Err(failure) });
    }

    /// Everything produced reaches the log and is reported as it should be.
    fn settle(&mut self) {
        for (stamp, offset) in self.land_all() {
            self.report(stamp, Some(offset.0));
        }
    }

    /// Another process claims; its claim is in the log.
    fn other_claims(&mut self, epoch: u32) -> ClaimId {
        let id = ClaimId { epoch: Epoch(epoch), nonce: Nonce(900 + u64::from(epoch)) };
        let claim = Claim {
            owner: "other".into(),
            address: "there".into(),
            partitions: 1,
            started_at: DateTime::UNIX_EPOCH,
        };
        let stamp = Stamp { claim: id, seq: 0, commands_mark: Offset(0) };
        self.land(Record { stamp, body: Body::Claim(claim) });
        id
    }

    /// Another owner appends one event.
    fn other_appends(&mut self, claim: ClaimId, seq: u64, version: u64, command: u128) {
        let commit = commit(command, 1);
        let new = &commit.events()[0];
        let event = RecordedEvent {
            stream: stream(),
            version: Version(version),
            position: Position { partition: PARTITION, offset: Offset(0) },
            command_id: commit.command_id(),
            event_type: Arc::clone(&new.event_type),
            payload: Arc::clone(&new.payload),
            metadata: new.metadata.clone(),
        };
        let body = Body::Event(EventBody { index: 0, count: 1, event: Arc::new(event) });
        let stamp = Stamp { claim, seq, commands_mark: Offset(0) };
        self.land(Record { stamp, body });
    }

    /// The stream is empty, and all that were asked about it are answered so.
    fn load_empty(&mut self) {
        self.load(StreamHead { older: Some(Filter::default()), ..StreamHead::default() });
    }

    fn load(&mut self, head: StreamHead) {
        self.give(Input::Loaded { stream: stream(), head: Ok(head) });
    }

    fn submit(&mut self, expected: ExpectedVersion, command: u128, events: usize) -> RequestId {
        self.submit_with(expected, command, events, |_| ()).0
    }

    fn submit_with(
        &mut self,
        expected: ExpectedVersion,
        command: u128,
        events: usize,
        change: impl FnOnce(&mut Append),
    ) -> (RequestId, Ticket) {
        let request = self.next_request();
        let ticket = Ticket::next();
        let commit = commit(command, events);
        let mut append =
            Append { stream: stream(), expected, commit, ticket, after: None, deadline: None };
        change(&mut append);
        self.give(Input::Submit { request, append });
        (request, ticket)
    }

    fn confirm(&mut self, version: u64, after: Option<Ticket>) -> RequestId {
        let request = self.next_request();
        let view = View { stream: stream(), version: Version(version), after, deadline: None };
        self.give(Input::Confirm { request, view });
        request
    }

    fn next_request(&mut self) -> RequestId {
        self.requests += 1;
        RequestId(self.requests)
    }

    /// The answer to a submission, if there is one.
    fn answer(&self, wanted: RequestId) -> Option<Result<Appended, AppendError>> {
        self.out.iter().find_map(|output| match output {
            Output::Appended { request, result } if *request == wanted => Some(result.clone()),
            _ => None,
        })
    }

    fn confirmed(&self, wanted: RequestId) -> Option<Result<(), AppendError>> {
        self.out.iter().find_map(|output| match output {
            Output::Confirmed { request, result } if *request == wanted => Some(result.clone()),
            _ => None,
        })
    }

    /// `(version, offset, duplicate)` of a submission that was acknowledged.
    fn acknowledged(&self, wanted: RequestId) -> (u64, u64, bool) {
        match self.answer(wanted) {
            Some(Ok(appended)) => {
                (appended.version.0, appended.position.offset.0, appended.duplicate)
            }
            other => panic!("{wanted:?}: {other:?}"),
        }
    }

    fn has(&self, wanted: impl Fn(&Output) -> bool) -> bool {
        self.out.iter().any(wanted)
    }

    /// What was produced and has not reached the log: the kind and seq of each.
    fn kinds(&self) -> Vec<(&'static str, u64)> {
        let kind = |record: &Record| match record.body {
            Body::Claim(_) => "claim",
            Body::Event(_) => "event",
            Body::Barrier => "barrier",
        };
        self.produced.iter().map(|record| (kind(record), record.stamp.seq)).collect()
    }

    /// Waits until the next claim is produced, and reads on as before.
    fn claim_again(&mut self) {
        self.catch_up();
        self.pass(Duration::from_secs(6));
        assert_eq!(self.kinds(), [("claim", 0)], "{:?}", self.out.last());
    }
}

fn stream() -> StreamId {
    "s-1".parse().expect("a stream id")
}

fn exact(version: u64) -> ExpectedVersion {
    ExpectedVersion::Exact(Version(version))
}

fn command(id: u128) -> CommandId {
    CommandId(Uuid::from_u128(id))
}

fn commit(id: u128, events: usize) -> Commit {
    let event = || NewEvent {
        event_type: "s.happened.v1".into(),
        payload: Arc::from(*b"{}"),
        metadata: Metadata {
            event_id: Uuid::from_u128(id),
            recorded_at: DateTime::UNIX_EPOCH,
            correlation_id: None,
            causation_id: None,
            trace_parent: None,
        },
    };
    Commit::new(command(id), (0..events).map(|_| event()).collect()).expect("not empty")
}

/// The conflict's actual version.
fn conflict(result: Option<Result<Appended, AppendError>>) -> u64 {
    match result {
        Some(Err(AppendError::Conflict { actual, .. })) => actual.0,
        other => panic!("no conflict: {other:?}"),
    }
}

fn is_not_owner<T>(result: &Option<Result<T, AppendError>>) -> bool {
    matches!(result, Some(Err(AppendError::NotOwner { .. })))
}

fn is_not_appended<T: std::fmt::Debug>(result: &Option<Result<T, AppendError>>) -> bool {
    matches!(result, Some(Err(AppendError::NotAppended { .. })))
}

fn is_unavailable<T>(result: &Option<Result<T, AppendError>>, words: &str) -> bool {
    match result {
        Some(Err(error @ AppendError::Unavailable { .. })) => error.to_string().contains(words),
        _ => false,
    }
}

//! Joins the writers of all partitions to one producer.
//!
//! Everything that happens comes in on one channel: submissions, delivery reports, records read, loads.
//! A thread works it off, in large portions while much is in flight. While little is, whoever brings a
//! message works it off where they are, so that a command on an idle log changes threads no oftener than
//! a bare produce does. There is no polling on its way; timers are waited for to the moment.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kafold_core::store::{Append, Appended, Outcome, View};
use kafold_core::{AppendError, Clock, CommandId, Offset, Partition, Position, StreamId};
use rdkafka::error::{KafkaError, KafkaResult};
use tokio::sync::oneshot;

use crate::config::KafkaConfig;
use crate::fold::LogDiverged;
use crate::identity::IdentityError;
use crate::loader::Loader;
use crate::partition::{Hold, Reach, Shared, TakeOver};
use crate::producer::{Producer, Report, Sent, Sink, Tag};
use crate::reader::{LogReader, ReadFailure};
use crate::wire::{self, ClaimId, Record};
use crate::writer::{Input, Output, PartitionWriter, ReportFailure, RequestId, Status};

/// When a caller may try again who found the queue full or the broker away.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Before a record is offered again to a producer that was full.
const FULL_RETRY: Duration = Duration::from_millis(1);
/// Handovers of a partition to the producer without all their reports: records that come meanwhile go
/// together with the next one.
const HANDOVERS_MAX: usize = 2;
/// How long they wait for that at most.
const HANDOVER_WAIT_MAX: Duration = Duration::from_millis(5);
/// Before a producer that could not be made is tried again.
const PRODUCER_RETRY: Duration = Duration::from_secs(1);
/// A request waits this long for the first assignment by the consumer group, which takes some seconds
/// after a start. Below the deadline of a command.
const JOIN_PATIENCE: Duration = Duration::from_secs(9);
/// Messages that the thread handles before timers are looked at.
const BURST: usize = 1_024;
/// Messages that somebody else handles at most: they have work of their own.
const BROUGHT_MAX: usize = 16;
/// Records in flight from which on messages are left to the thread: then more come together than one at a
/// time.
const IN_FLIGHT_FEW: usize = 4;

/// Counts how often a partition was assigned: what was asked for in an earlier tenure is not answered
/// into a later one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tenure(pub(crate) u64);

type Answer<T> = oneshot::Sender<Result<T, AppendError>>;

/// What the driver is told.
pub(crate) enum Message {
    Submit {
        partition: Partition,
        append: Append,
        answer: Answer<Appended>,
    },
    Confirm {
        partition: Partition,
        view: View,
        answer: Answer<()>,
    },
    /// The partition is to be ours; the number tells this time from all earlier ones.
    Assign(Partition, Tenure),
    /// The group has assigned partitions to this node, perhaps none.
    Joined,
    /// Takes nothing new for the partition and settles what is pending, then tells.
    Release(Partition, oneshot::Sender<()>),
    /// Answers everybody who waits at the partition, at once.
    Abandon(Partition),
    /// For the writer, from something that was begun in the tenure.
    Input(Partition, Tenure, Input),
    ReadFailed(Partition, Tenure, ReadFailure),
    /// The topic's `max.message.bytes` is now this.
    RecordBytesMax(usize),
    /// Reports lie ready.
    Reports,
    /// End at once.
    Quit,
}

/// The handle to the driver.
#[derive(Clone)]
pub(crate) struct Driver {
    messages: Sender<Message>,
    desk: Arc<Desk>,
    queued: Arc<AtomicUsize>,
    queued_max: usize,
    /// Reports that were not taken: there is a message for the first, and all there are are taken.
    reports: Arc<Mutex<Vec<Report>>>,
    reach: Arc<Reach>,
}

/// Where messages are worked off, by one at a time.
#[derive(Default)]
struct Desk {
    /// `None` before the start and after the end.
    work: Mutex<Option<Work>>,
    /// Messages that were sent and not taken; below 0 for a moment when one is taken before it is counted.
    waiting: AtomicIsize,
    /// Records that a producer was given and that are not reported; only who works changes it.
    in_flight: AtomicUsize,
    thread: OnceLock<Thread>,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Option<Work>> {
        // No panic leaves `serve`.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while another works.
    fn try_lock(&self) -> Option<MutexGuard<'_, Option<Work>>> {
        match self.work.try_lock() {
            Ok(work) => Some(work),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether a message waits that nobody has looked for since it was counted: whoever brought it may
    /// have found the desk taken, and went.
    fn has_more(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting.load(Ordering::SeqCst) > 0
    }

    fn wake_thread(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

impl Driver {
    /// The handle, and what is needed to start it.
    pub(crate) fn new(config: &KafkaConfig, reach: Arc<Reach>) -> (Self, Receiver<Message>) {
        let (messages, inbox) = channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let queued_max = config.limits.queued_submissions_max;
        let (desk, reports) = Default::default();
        (Self { messages, desk, queued, queued_max, reports, reach }, inbox)
    }

    pub(crate) fn submit(&self, partition: Partition, append: Append) -> Outcome<Appended> {
        let command_id = append.commit.command_id();
        let unknown = AppendError::OutcomeUnknown { command_id };
        self.hand_over(unknown, |answer| Message::Submit { partition, append, answer })
    }

    pub(crate) fn confirm(&self, partition: Partition, view: View) -> Outcome<()> {
        let closed = AppendError::unavailable(RETRY_AFTER, "the store is closed");
        self.hand_over(closed, |answer| Message::Confirm { partition, view, answer })
    }

    /// Sends what waits for an answer; `abandoned` is the answer when the driver ends before.
    fn hand_over<T: Send + 'static>(
        &self,
        abandoned: AppendError,
        message: impl FnOnce(Answer<T>) -> Message,
    ) -> Outcome<T> {
        let refuse = |why: String| -> Outcome<T> {
            futures_util::future::ready(Err(AppendError::unavailable(RETRY_AFTER, why))).boxed()
        };
        if let Some(why) = self.reach.down() {
            return refuse(why);
        }
        if self.queued.fetch_add(1, Ordering::AcqRel) >= self.queued_max {
            self.queued.fetch_sub(1, Ordering::AcqRel);
            return refuse(format!("{} submissions wait for the writer", self.queued_max));
        }
        let (answer, outcome) = oneshot::channel();
        if !self.bring(message(answer)) {
            return refuse("the store is closed".into());
        }
        outcome.map(move |answered| answered.unwrap_or(Err(abandoned))).boxed()
    }

    /// Tells the driver something; after its end nobody needs to know. No lock may be held that the
    /// driver takes: those of [`Shared`].
    pub(crate) fn tell(&self, message: Message) {
        self.bring(message);
    }

    /// Sends a message and sees to it that it is handled. `false` after the driver's end.
    fn bring(&self, message: Message) -> bool {
        if self.messages.send(message).is_err() {
            return false;
        }
        self.desk.waiting.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.desk.in_flight.load(Ordering::Relaxed) < IN_FLIGHT_FEW {
            self.work_here();
        } else {
            self.desk.wake_thread();
        }
        true
    }

    /// Works off what waits, unless another does, who then looks for more.
    fn work_here(&self) {
        let Some(mut desk) = self.desk.try_lock() else { return };
        let Some(work) = &mut *desk else { return };
        if !work.go_on(BROUGHT_MAX) {
            *desk = None;
            drop(desk);
            return self.desk.wake_thread();
        }
        let wake = work.next_wake();
        let until = work.thread_until;
        let sooner = wake.is_some_and(|wake| until.is_none_or(|until| wake < until));
        if sooner {
            work.thread_until = wake;
        }
        drop(desk);
        if sooner || self.desk.has_more() {
            self.desk.wake_thread();
        }
    }

    /// The thread: works off what is left to it, and what timers ask for.
    fn serve(&self) {
        loop {
            let mut desk = self.desk.lock();
            let Some(work) = &mut *desk else { return };
            if !work.go_on(BURST) {
                *desk = None;
                return;
            }
            let (now, wake) = (work.parts.clock.instant(), work.next_wake());
            work.thread_until = wake;
            drop(desk);
            if self.desk.has_more() {
                continue;
            }
            match wake {
                None => std::thread::park(),
                Some(wake) => std::thread::park_timeout(wake.saturating_duration_since(now)),
            }
        }
    }

    fn reports(&self) -> MutexGuard<'_, Vec<Report>> {
        // Whole after a panic elsewhere: it is only pushed to and taken.
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Driver {
    fn report(&self, report: Report) {
        let first = {
            let mut reports = self.reports();
            reports.push(report);
            reports.len() == 1
        };
        if first {
            self.tell(Message::Reports);
        }
    }

    fn unreachable(&self) {
        self.reach.suspected.notify_one();
    }
}

/// One partition of the driver's.
pub(crate) struct Slot {
    pub(crate) writer: PartitionWriter,
    pub(crate) shared: Arc<Shared>,
    outgoing: Outgoing,
    /// Since when the log has ended below where the writer reads.
    low_since: Option<Instant>,
    /// `None` while the partition is not ours.
    tenure: Option<Tenure>,
    /// Who waits until everything is settled.
    releasing: Option<oneshot::Sender<()>>,
}

impl Slot {
    pub(crate) fn new(writer: PartitionWriter, shared: Arc<Shared>) -> Self {
        Self {
            writer,
            shared,
            outgoing: Outgoing::default(),
            low_since: None,
            tenure: None,
            releasing: None,
        }
    }
}

/// A partition's records on their way to the producer. While some are in flight the next ones gather:
/// a request with many records costs the broker and us hardly more than one with few, and a record that
/// comes alone does not wait.
#[derive(Default)]
struct Outgoing {
    /// In order; the producer has none of them.
    unsent: VecDeque<Record>,
    /// Since when the first of them waits.
    since: Option<Instant>,
    /// Records that the producer was given, and how many of those were reported.
    sent: u64,
    reported: u64,
    /// `sent` behind each handover that is not reported whole.
    handovers: VecDeque<u64>,
}

impl Outgoing {
    fn push(&mut self, record: Record, now: Instant) {
        self.since.get_or_insert(now);
        self.unsent.push_back(record);
    }

    /// When the next handover is due at the latest.
    fn due(&self) -> Option<Instant> {
        self.since.map(|since| since + HANDOVER_WAIT_MAX)
    }

    fn is_due(&self, now: Instant) -> bool {
        let free = self.handovers.len() < HANDOVERS_MAX;
        self.due().is_some_and(|due| free || due <= now)
    }

    /// The producer has taken so many more.
    fn handed_over(&mut self, records: u64) {
        if records > 0 {
            self.sent += records;
            self.handovers.push_back(self.sent);
        }
        if self.unsent.is_empty() {
            self.since = None;
        }
    }

    fn take_unsent(&mut self) -> VecDeque<Record> {
        self.since = None;
        std::mem::take(&mut self.unsent)
    }

    /// A record that the producer was given has been reported.
    fn reported(&mut self) {
        self.reported += 1;
        while self.handovers.front().is_some_and(|end| *end <= self.reported) {
            self.handovers.pop_front();
        }
    }
}

enum Pending {
    Submit { since: Instant, answer: Answer<Appended> },
    Confirm { since: Instant, answer: Answer<()> },
}

/// What the driver works with.
pub(crate) struct Parts {
    pub(crate) config: KafkaConfig,
    /// The topic's `max.message.bytes`.
    pub(crate) record_bytes_max: usize,
    pub(crate) slots: Vec<Slot>,
    /// Reads what a writer must have read before it may own, without delay.
    pub(crate) reader: LogReader,
    /// Reads behind an idle owner, who wants to know when another has claimed.
    pub(crate) watcher: LogReader,
    pub(crate) loader: Arc<Loader>,
    pub(crate) clock: Arc<dyn Clock>,
}

/// The driver's state.
struct Work {
    parts: Parts,
    driver: Driver,
    inbox: Receiver<Message>,
    /// When the thread looks again by itself.
    thread_until: Option<Instant>,
    producer: Option<Producer>,
    /// The producer had no room for a record.
    full: bool,
    generation: u64,
    producer_retry: Option<Instant>,
    /// `true` after the first assignment by the group, which may be empty.
    has_joined: bool,
    /// Requests from before that, with the times of their arrival. They count as queued.
    early: VecDeque<(Instant, Message)>,
    pending: HashMap<RequestId, Pending>,
    last_request: u64,
    /// Inputs that followed from outputs.
    follow_ups: VecDeque<(Partition, Input)>,
    /// Room for what a writer says, empty between two steps.
    outputs: Vec<Output>,
}

impl Driver {
    /// Starts the thread; the producer connects by itself.
    pub(crate) fn start(&self, inbox: Receiver<Message>, parts: Parts) -> KafkaResult<()> {
        let sink = Arc::new(self.clone());
        let producer = Producer::start(&parts.config, parts.record_bytes_max, 0, sink)?;
        let work = Work {
            parts,
            driver: self.clone(),
            inbox,
            thread_until: None,
            producer: Some(producer),
            full: false,
            generation: 0,
            producer_retry: None,
            has_joined: false,
            early: VecDeque::new(),
            pending: HashMap::new(),
            last_request: 0,
            follow_ups: VecDeque::new(),
            outputs: Vec::new(),
        };
        *self.desk.lock() = Some(work);
        let driver = self.clone();
        let thread = std::thread::Builder::new()
            .name("kafold-driver".into())
            .spawn(move || driver.serve())
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        // Nobody else sets it. It looks once before it first parks.
        let _ = self.desk.thread.set(thread.thread().clone());
        self.desk.wake_thread();
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.driver.reach.close();
    }
}

impl Work {
    /// Handles up to so many messages, then what is due. `false` when that was the end: it was asked
    /// for, or a panic left a state that nobody may go on with.
    fn go_on(&mut self, most: usize) -> bool {
        let gone_on = catch_unwind(AssertUnwindSafe(|| self.take_messages(most)));
        gone_on.unwrap_or_else(|_| {
            tracing::error!("the driver has panicked: the store is closed");
            false
        })
    }

    fn take_messages(&mut self, most: usize) -> bool {
        for _ in 0..most {
            let Ok(message) = self.inbox.try_recv() else { break };
            self.driver.desk.waiting.fetch_sub(1, Ordering::SeqCst);
            match message {
                Message::Quit => return false,
                message => self.handle(message),
            }
        }
        self.tick();
        true
    }

    /// When a timer is due.
    fn next_wake(&self) -> Option<Instant> {
        let slots = self.parts.slots.iter();
        let retry = self.full.then(|| self.parts.clock.instant() + FULL_RETRY);
        let handovers = slots.clone().filter_map(|slot| slot.outgoing.due());
        let handover = handovers.min().filter(|_| self.producer.is_some() && !self.full);
        let timers = slots.filter_map(|slot| slot.writer.next_wake());
        let early = self.early.front().map(|(since, _)| *since + JOIN_PATIENCE);
        timers.chain(retry).chain(handover).chain(self.producer_retry).chain(early).min()
    }

    fn handle(&mut self, message: Message) {
        match message {
            // The owner of the partition is not known yet.
            early @ (Message::Submit { .. } | Message::Confirm { .. }) if !self.has_joined => {
                self.early.push_back((self.parts.clock.instant(), early));
            }
            Message::Submit { partition, append, answer } => {
                self.driver.queued.fetch_sub(1, Ordering::AcqRel);
                if !self.is_ours(partition) {
                    let _ = answer.send(Err(not_owner(partition)));
                    return;
                }
                let since = self.parts.clock.instant();
                let request = self.register(Pending::Submit { since, answer });
                self.input(partition, Input::Submit { request, append });
            }
            Message::Confirm { partition, view, answer } => {
                self.driver.queued.fetch_sub(1, Ordering::AcqRel);
                if !self.is_ours(partition) {
                    let _ = answer.send(Err(not_owner(partition)));
                    return;
                }
                let since = self.parts.clock.instant();
                let request = self.register(Pending::Confirm { since, answer });
                self.input(partition, Input::Confirm { request, view });
            }
            Message::Assign(partition, tenure) => self.assign(partition, tenure),
            Message::Joined => {
                self.has_joined = true;
                let early = std::mem::take(&mut self.early);
                early.into_iter().for_each(|(_, request)| self.handle(request));
            }
            Message::Release(partition, released) => {
                let Some(slot) = self.slot(partition).filter(|slot| slot.tenure.is_some()) else {
                    return;
                };
                slot.releasing = Some(released);
                self.input(partition, Input::Release);
            }
            Message::Abandon(partition) => self.input(partition, Input::Abandon),
            Message::Input(partition, tenure, input) => {
                if !self.is_of(partition, tenure) {
                    return;
                }
                if let Input::Records { records, .. } = &input {
                    self.note_progress(partition, &input);
                    // A partition that is written is read no more until it is quiet again: a fetch that
                    // waits would be answered for every record.
                    if !records.is_empty() {
                        self.stop_watching(partition);
                    }
                }
                self.input(partition, input);
            }
            Message::ReadFailed(partition, tenure, failure) => {
                if self.is_of(partition, tenure) {
                    self.read_failed(partition, &failure);
                }
            }
            Message::RecordBytesMax(bytes) => self.limit_records(bytes),
            Message::Reports => {
                let reports = std::mem::take(&mut *self.driver.reports());
                reports.into_iter().for_each(|report| self.report(report));
            }
            Message::Quit => {}
        }
    }

    /// Takes over a changed `max.message.bytes`. The producer makes batches up to the limit, so it is
    /// replaced.
    fn limit_records(&mut self, bytes: usize) {
        if self.parts.record_bytes_max == bytes {
            return;
        }
        tracing::warn!(
            from = self.parts.record_bytes_max,
            to = bytes,
            "max.message.bytes has changed"
        );
        self.parts.record_bytes_max = bytes;
        self.parts.slots.iter_mut().for_each(|slot| slot.writer.limit_records(bytes));
        self.fresh_producer();
    }

    /// Refuses requests that have waited for the group for too long.
    fn refuse_early(&mut self, now: Instant) {
        while self.early.front().is_some_and(|(since, _)| *since + JOIN_PATIENCE <= now) {
            self.driver.queued.fetch_sub(1, Ordering::AcqRel);
            let cause = "the consumer group has assigned no partition to this node yet";
            let refusal = AppendError::unavailable(RETRY_AFTER, cause);
            // A caller that stopped waiting needs no answer.
            match self.early.pop_front() {
                Some((_, Message::Submit { answer, .. })) => drop(answer.send(Err(refusal))),
                Some((_, Message::Confirm { answer, .. })) => drop(answer.send(Err(refusal))),
                _ => {}
            }
        }
    }

    fn is_ours(&self, partition: Partition) -> bool {
        self.parts.slots.get(partition.0 as usize).is_some_and(|slot| slot.tenure.is_some())
    }

    fn is_of(&self, partition: Partition, tenure: Tenure) -> bool {
        let slot = self.parts.slots.get(partition.0 as usize);
        slot.is_some_and(|slot| slot.tenure == Some(tenure))
    }

    fn assign(&mut self, partition: Partition, tenure: Tenure) {
        let Some(slot) = self.slot(partition) else { return };
        slot.writer.renew();
        slot.tenure = Some(tenure);
        slot.low_since = None;
        slot.releasing = None;
    }

    /// Nothing is pending: whoever waits for that goes on, and the partition is not ours any more.
    fn released(&mut self, partition: Partition) {
        let Some(slot) = self.slot(partition) else { return };
        slot.tenure = None;
        // Records of commits that were given up, if any are left.
        slot.outgoing.take_unsent();
        if let Some(released) = slot.releasing.take() {
            let _ = released.send(());
        }
        self.parts.reader.forget(partition);
        self.parts.watcher.forget(partition);
    }

    fn register(&mut self, pending: Pending) -> RequestId {
        self.last_request += 1;
        let request = RequestId(self.last_request);
        self.pending.insert(request, pending);
        request
    }

    fn report(&mut self, report: Report) {
        let Report { generation, partition, tag, mut result } = report;
        // A report that no record was sent for, as a test makes one, counts nothing down.
        let one_less = |in_flight: usize| in_flight.checked_sub(1);
        let in_flight = &self.driver.desk.in_flight;
        let _ = in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        if generation == self.generation
            && let Some(slot) = self.slot(partition)
        {
            slot.outgoing.reported();
        }
        match &mut result {
            Ok(_) => self.driver.reach.found(),
            Err(failure) => {
                metrics::counter!("kafold_failed_reports_total").increment(1);
                tracing::debug!(%partition, reason = failure.reason, "record failed");
                if let Some(slot) = self.parts.slots.get(partition.0 as usize) {
                    let mut standing = slot.shared.standing();
                    let is_new = standing.trouble.as_ref() != Some(&failure.reason);
                    if is_new && !matches!(standing.status, Status::Owning) {
                        tracing::warn!(%partition, reason = failure.reason, "a record failed");
                    }
                    standing.trouble = Some(failure.reason.clone());
                }
                // The producer that failed has been replaced already.
                failure.fatal &= generation == self.generation;
            }
        }
        let Tag { claim, seq } = tag;
        self.input(partition, Input::Report { claim, seq, result });
    }

    fn note_progress(&mut self, partition: Partition, input: &Input) {
        let (Some(slot), Input::Records { records, end }) = (self.slot(partition), input) else {
            return;
        };
        slot.low_since = None;
        let mut standing = slot.shared.standing();
        standing.end = *end;
        if let Some(last) = records.last() {
            standing.read = last.offset.plus(1);
        }
    }

    fn stop_watching(&mut self, partition: Partition) {
        if self.slot(partition).is_some_and(|slot| slot.writer.is_owning()) {
            self.parts.watcher.forget(partition);
        }
    }

    /// A log that ends too low may be a stale leader's, for a while.
    fn read_failed(&mut self, partition: Partition, failure: &ReadFailure) {
        let now = self.parts.clock.instant();
        let patience = self.parts.config.limits.low_end_patience;
        let topic = self.parts.config.events_topic();
        let Some(slot) = self.slot(partition) else { return };
        let (start, end) = match *failure {
            ReadFailure::OutOfRange { start, end } => (start, end),
            ReadFailure::Corrupt(offset) => {
                let corrupt = LogDiverged::Corrupt(Position { partition, offset });
                return self.input(partition, Input::Halt(Arc::new(corrupt)));
            }
            ReadFailure::Unavailable(_) | ReadFailure::Replaced => {
                slot.shared.standing().trouble = Some(failure.to_string());
                return self.input(partition, Input::ReadFailed);
            }
        };
        let since = *slot.low_since.get_or_insert(now);
        if now.saturating_duration_since(since) < patience {
            return self.input(partition, Input::ReadFailed);
        }
        let stored = slot.shared.standing().read;
        let lost = if start.0 > 0 {
            IdentityError::Trimmed { topic, partition, start }
        } else {
            IdentityError::Truncated { topic, partition, end, stored }
        };
        self.input(partition, Input::Halt(Arc::new(lost)));
    }

    fn slot(&mut self, partition: Partition) -> Option<&mut Slot> {
        self.parts.slots.get_mut(partition.0 as usize)
    }

    /// Gives the writer its input and does what follows from it.
    fn input(&mut self, partition: Partition, input: Input) {
        self.follow_ups.push_back((partition, input));
        self.follow_up();
    }

    fn follow_up(&mut self) {
        while let Some((partition, input)) = self.follow_ups.pop_front() {
            self.step(partition, input);
        }
    }

    fn step(&mut self, partition: Partition, input: Input) {
        let now = self.parts.clock.instant();
        let mut outputs = std::mem::take(&mut self.outputs);
        let Some(slot) = self.slot(partition) else { return };
        let was_owning = slot.writer.is_owning();
        slot.writer.handle(now, input, &mut outputs);
        let still_owning = was_owning && slot.writer.is_owning();
        let may_have_changed = !still_owning && !outputs.is_empty();
        for output in outputs.drain(..) {
            self.output(partition, output, now);
        }
        self.outputs = outputs;
        if may_have_changed && let Some(slot) = self.slot(partition) {
            slot.shared.standing().status = slot.writer.status();
        }
    }

    fn owned(&mut self, partition: Partition, claim: ClaimId, commands_mark: Offset) {
        let (now, at) = (self.parts.clock.instant(), self.parts.clock.now());
        // From here on it reads only to see whether another claims.
        self.parts.reader.forget(partition);
        let Some(slot) = self.slot(partition) else { return };
        let mut standing = slot.shared.standing();
        (standing.trouble, standing.since) = (None, None);
        let took = standing.assigned_at.map(|since| now.saturating_duration_since(since));
        let (epoch, took) = (claim.epoch, took.unwrap_or_default());
        match &mut standing.take_over {
            Some(before) => before.epoch = epoch,
            None => {
                standing.take_over = Some(TakeOver { epoch, since: at, took });
                metrics::histogram!("kafold_take_over_seconds").record(took);
                tracing::info!(%partition, epoch = epoch.0, ?took, "partition owned");
            }
        }
        drop(standing);
        let hold = Hold { claim, resume: commands_mark, settled: commands_mark };
        slot.shared.hold.send_replace(Some(hold));
        self.driver.reach.ownership_changed.notify_one();
        let label = partition.to_string();
        metrics::gauge!("kafold_epoch", "partition" => label.clone()).set(epoch.0);
        metrics::gauge!("kafold_partition_owned", "partition" => label).set(1);
        metrics::counter!("kafold_claims_total").increment(1);
    }

    /// The claim is over; what was found out under it is not true of the next.
    fn not_owned(&mut self, partition: Partition) {
        let at = self.parts.clock.now();
        let Some(slot) = self.slot(partition) else { return };
        if slot.shared.hold.send_replace(None).is_some() {
            slot.shared.standing().since = Some(at);
            metrics::gauge!("kafold_partition_owned", "partition" => partition.to_string()).set(0);
            self.driver.reach.ownership_changed.notify_one();
            self.parts.watcher.forget(partition);
        }
    }

    fn tick(&mut self) {
        let now = self.parts.clock.instant();
        if self.producer_retry.is_some_and(|due| due <= now) {
            self.fresh_producer();
        }
        self.refuse_early(now);
        for index in 0..self.parts.slots.len() {
            let slot = &self.parts.slots[index];
            let partition = slot.shared.partition;
            if self.parts.slots[index].writer.next_wake().is_some_and(|due| due <= now) {
                self.input(partition, Input::Tick);
            }
        }
        self.follow_up();
        // What was refused at once may have led to more.
        self.hand_over(now);
        self.follow_up();
    }

    fn output(&mut self, partition: Partition, output: Output, now: Instant) {
        match output {
            Output::Produce(record) => {
                if let Some(slot) = self.slot(partition) {
                    slot.outgoing.push(record, now);
                }
            }
            Output::Read { from, wait } => self.read(partition, from, wait),
            Output::Load { stream } => self.load(partition, stream),
            Output::Find { stream, command_id } => self.find(partition, stream, command_id),
            Output::Proven(proven) => {
                if let Some(slot) = self.slot(partition) {
                    let is_waited_for = slot.shared.tail().push(proven);
                    if is_waited_for {
                        slot.shared.advanced.notify_one();
                    }
                }
            }
            Output::Appended { request, result } => self.answer_append(request, result, now),
            Output::Confirmed { request, result } => self.answer_confirm(request, result, now),
            Output::FreshProducer => self.fresh_producer(),
            Output::Owned { claim, commands_mark } => self.owned(partition, claim, commands_mark),
            Output::CommandsSettled(mark) => {
                if let Some(slot) = self.slot(partition) {
                    slot.shared.hold.send_modify(|hold| {
                        if let Some(hold) = hold {
                            hold.settled = mark;
                        }
                    });
                }
            }
            Output::Doubt(reason) => {
                self.not_owned(partition);
                metrics::counter!("kafold_doubts_total").increment(1);
                tracing::warn!(%partition, reason, "in doubt: claiming again");
            }
            Output::Superseded(owner) => {
                self.not_owned(partition);
                metrics::counter!("kafold_superseded_total").increment(1);
                tracing::warn!(%partition, "superseded by {owner}");
            }
            Output::Halted(cause) => {
                self.not_owned(partition);
                tracing::error!(%partition, cause = %cause, "partition halted");
            }
            Output::Released => {
                self.not_owned(partition);
                self.released(partition);
            }
        }
    }

    /// Hands the producer what is due of every partition, in order.
    fn hand_over(&mut self, now: Instant) {
        self.full = false;
        let Some(producer) = &self.producer else { return };
        let written_at = self.parts.clock.now();
        for slot in &mut self.parts.slots {
            if !slot.outgoing.is_due(now) {
                continue;
            }
            let partition = slot.shared.partition;
            let mut handed = 0;
            while let Some(record) = slot.outgoing.unsent.front() {
                let encoded = wire::encode(record, &self.parts.config.name, written_at);
                let (claim, seq) = (record.stamp.claim, record.stamp.seq);
                match producer.send(partition, Tag { claim, seq }, &encoded) {
                    Sent::Queued => handed += 1,
                    Sent::Full => {
                        metrics::counter!("kafold_producer_full_total").increment(1);
                        self.full = true;
                        break;
                    }
                    Sent::Failed(failure) => {
                        let report = Input::Report { claim, seq, result: Err(failure) };
                        self.follow_ups.push_back((partition, report));
                    }
                }
                slot.outgoing.unsent.pop_front();
            }
            slot.outgoing.handed_over(handed);
            self.driver.desk.in_flight.fetch_add(handed as usize, Ordering::Relaxed);
        }
    }

    /// Replaces the producer. The old one's reports still come, and say what they say.
    fn fresh_producer(&mut self) {
        if let Some(old) = self.producer.take() {
            old.purge();
        }
        self.generation += 1;
        let sink = Arc::new(self.driver.clone());
        let Parts { config, record_bytes_max, .. } = &self.parts;
        match Producer::start(config, *record_bytes_max, self.generation, sink) {
            Ok(producer) => {
                self.producer = Some(producer);
                self.producer_retry = None;
            }
            Err(error) => {
                tracing::error!(%error, "no fresh producer yet");
                self.producer_retry = Some(self.parts.clock.instant() + PRODUCER_RETRY);
                return;
            }
        }
        tracing::warn!(generation = self.generation, "fresh producer");
        metrics::counter!("kafold_fresh_producers_total").increment(1);
        for slot in &mut self.parts.slots {
            // Records of claims that are over now, like those that were purged.
            let unsent = std::mem::take(&mut slot.outgoing).unsent;
            let partition = slot.shared.partition;
            for record in unsent {
                let (claim, seq) = (record.stamp.claim, record.stamp.seq);
                let result = Err(ReportFailure {
                    fatal: false,
                    refused: false,
                    reason: "the producer was replaced before the record left".into(),
                });
                self.follow_ups.push_back((partition, Input::Report { claim, seq, result }));
            }
            self.follow_ups.push_back((partition, Input::ProducerReady));
        }
    }

    fn read(&mut self, partition: Partition, from: Offset, wait: Duration) {
        let Some(slot) = self.slot(partition) else { return };
        let Some(tenure) = slot.tenure else { return };
        slot.shared.standing().read = from;
        let owning = matches!(slot.writer.status(), Status::Owning);
        let driver = self.driver.clone();
        let reply = move |answer: Result<crate::reader::Chunk, ReadFailure>| match answer {
            Ok(chunk) => {
                let (records, end) = (chunk.records, chunk.end);
                driver.tell(Message::Input(partition, tenure, Input::Records { records, end }));
            }
            // By a later read of the same writer: nobody else has this reader.
            Err(ReadFailure::Replaced) => {}
            Err(failure) => driver.tell(Message::ReadFailed(partition, tenure, failure)),
        };
        let reader = if owning { &self.parts.watcher } else { &self.parts.reader };
        reader.read(partition, from, wait, Box::new(reply));
    }

    fn load(&mut self, partition: Partition, stream: StreamId) {
        let Some(tenure) = self.slot(partition).and_then(|slot| slot.tenure) else { return };
        let driver = self.driver.clone();
        let loaded = move |stream, head| {
            driver.tell(Message::Input(partition, tenure, Input::Loaded { stream, head }));
        };
        self.parts.loader.spawn_head(partition, stream, loaded);
    }

    fn find(&mut self, partition: Partition, stream: StreamId, command_id: CommandId) {
        let Some(tenure) = self.slot(partition).and_then(|slot| slot.tenure) else { return };
        let driver = self.driver.clone();
        let answer = move |stream, found| {
            let input = Input::Found { stream, command_id, found };
            driver.tell(Message::Input(partition, tenure, input));
        };
        self.parts.loader.spawn_find(partition, stream, command_id, answer);
    }

    fn answer_append(
        &mut self,
        request: RequestId,
        result: Result<Appended, AppendError>,
        now: Instant,
    ) {
        let Some(Pending::Submit { since, answer }) = self.pending.remove(&request) else { return };
        let waited = now.saturating_duration_since(since);
        metrics::histogram!("kafold_append_seconds").record(waited);
        let outcome = match &result {
            Ok(appended) if appended.duplicate => "duplicate",
            Ok(_) => "appended",
            Err(error) => error.name(),
        };
        metrics::counter!("kafold_appends_total", "outcome" => outcome).increment(1);
        metrics::gauge!("kafold_pending").set(self.pending.len() as f64);
        // Who stopped waiting has still written.
        let _ = answer.send(result);
    }

    fn answer_confirm(
        &mut self,
        request: RequestId,
        result: Result<(), AppendError>,
        now: Instant,
    ) {
        let Some(Pending::Confirm { since, answer }) = self.pending.remove(&request) else {
            return;
        };
        let waited = now.saturating_duration_since(since);
        metrics::histogram!("kafold_confirm_seconds").record(waited);
        let _ = answer.send(result);
    }
}

fn not_owner(partition: Partition) -> AppendError {
    AppendError::NotOwner { partition, owner: None }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use kafold_core::clock::SystemClock;
    use kafold_core::memory::MemoryIndex;
    use kafold_core::testing::eventually;
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;
    use crate::client::Inquirer;
    use crate::wire::{Body, Stamp};

    /// One without partitions, whose clients find no broker.
    fn start() -> Driver {
        let config: KafkaConfig = "kafka://127.0.0.1:1/nowhere".parse().expect("valid");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let inquirer = Arc::new(Inquirer::new(&config).expect("a client"));
        let reader = || {
            let (inquirer, clock) = (Arc::clone(&inquirer), Arc::clone(&clock));
            LogReader::start(&config, config.events_topic(), Duration::ZERO, inquirer, clock)
                .expect("a reader")
        };
        let index = Arc::new(MemoryIndex::new());
        let (loader, _) = Loader::new(index, Vec::new(), &config.limits, Arc::new(SystemClock));
        let (reader, watcher) = (reader(), reader());
        let (driver, inbox) = Driver::new(&config, Arc::new(Reach::default()));
        let record_bytes_max = 1 << 20;
        let slots = Vec::new();
        let parts = Parts { config, record_bytes_max, slots, reader, watcher, loader, clock };
        driver.start(inbox, parts).expect("started");
        driver
    }

    /// Waits for something that takes no time, on the processor.
    fn spin_until(what: &str, done: impl Fn() -> bool) {
        let deadline = SystemClock.instant() + Duration::from_secs(10);
        for spins in 1_u64.. {
            if done() {
                return;
            }
            // Yields seldom, so that two who wait for each other go on at the same moment.
            match spins % 10_000 {
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
            assert!(SystemClock.instant() < deadline, "{what}: not within 10 s");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_works_every_message_is_handled() {
        let driver = start();
        // Messages are worked off by those who bring them, then left to the thread.
        for in_flight in [0, IN_FLIGHT_FEW] {
            driver.desk.in_flight.store(in_flight, Ordering::Relaxed);
            let arrived = AtomicUsize::new(0);
            let bring = || {
                for number in 1..=20_000 {
                    let (released, waiting) = oneshot::channel();
                    let waiting = RefCell::new(waiting);
                    // Two at the same time and no third, with which a forgotten one would be found.
                    arrived.fetch_add(1, Ordering::SeqCst);
                    spin_until("both", || arrived.load(Ordering::SeqCst) >= 2 * number);
                    // It lets go at once of a partition that it does not have.
                    driver.tell(Message::Release(Partition(0), released));
                    let dropped = || waiting.borrow_mut().try_recv() == Err(TryRecvError::Closed);
                    spin_until("the message is handled", dropped);
                }
            };
            std::thread::scope(|scope| [bring, bring].map(|bring| drop(scope.spawn(bring))));
        }
        assert_eq!(driver.reach.down(), None, "it still runs");
        driver.tell(Message::Quit);
        eventually("nothing is taken any more", async || !driver.bring(Message::Reports)).await;
        assert!(driver.reach.down().is_some(), "it has ended");
    }

    fn push(outgoing: &mut Outgoing, now: Instant) {
        outgoing.push(Record { stamp: Stamp::default(), body: Body::Barrier }, now);
    }

    /// Hands over all that waits, if it is due, and answers how many records that were.
    fn hand_over(outgoing: &mut Outgoing, now: Instant) -> usize {
        if !outgoing.is_due(now) {
            return 0;
        }
        let handed = outgoing.take_unsent().len();
        outgoing.handed_over(handed as u64);
        handed
    }

    #[test]
    fn records_that_come_while_others_are_in_flight_go_together() {
        let (mut outgoing, now) = (Outgoing::default(), SystemClock.instant());
        assert_eq!(hand_over(&mut outgoing, now), 0, "there is nothing");
        for alone in [1, 2] {
            push(&mut outgoing, now);
            assert_eq!(hand_over(&mut outgoing, now), 1, "record {alone} does not wait");
        }
        (0..5).for_each(|_| push(&mut outgoing, now));
        assert_eq!(hand_over(&mut outgoing, now), 0, "two are in flight");
        outgoing.reported();
        assert_eq!(hand_over(&mut outgoing, now), 5, "one of them was reported");
    }

    #[test]
    fn no_record_waits_longer_than_the_limit_whatever_is_reported() {
        let (mut outgoing, now) = (Outgoing::default(), SystemClock.instant());
        for _ in 0..=HANDOVERS_MAX {
            push(&mut outgoing, now);
            hand_over(&mut outgoing, now);
        }
        assert_eq!(outgoing.due(), Some(now + HANDOVER_WAIT_MAX));
        assert_eq!(hand_over(&mut outgoing, now + HANDOVER_WAIT_MAX), 1);
        assert_eq!(outgoing.due(), None, "nothing waits");
    }
}

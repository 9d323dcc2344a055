//! Handles the commands that other nodes send to the partitions that this node owns.
//!
//! The commands of a partition are begun in the order of the topic, those of one stream strictly, and
//! handled side by side: none waits for another's outcome. What is found out under one claim is worth
//! nothing under the next: with the claim everything here begins anew, where the log says.

use std::collections::{BTreeSet, HashMap};
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kafold_core::clock::backoff;
use kafold_core::{
    AppendError, Clock, CommandExecutor, ForwardedCommand, IdGenerator, Offset, Partition, Reply,
    StreamId, trace,
};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tracing::{Instrument, Span};

use super::mark::Era;
use super::outbox::Outbox;
use super::settlement::Settlement;
use super::wire::{self, CommandRecord, ReplyTo};
use crate::config::{KafkaConfig, Limits};
use crate::driver::{Driver, Message, Tenure};
use crate::partition::{Hold, Shared};
use crate::reader::{Chunk, ReadFailure, Reader};
use crate::writer::Input;

/// A read of commands that finds none is asked for again after this.
const READ_WAIT: Duration = Duration::from_secs(60);
/// Between two attempts to read commands while that fails.
const READ_RETRY: Duration = Duration::from_millis(200);
/// Between two attempts to handle a command that cannot be handled just now.
const RETRY_BASE: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// What a caller is told to wait whose command could not be handled.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// When nothing goes on for so long, the log is told which commands are settled: the next owner need
/// not look at them again.
const MARK_INTERVAL: Duration = Duration::from_secs(1);

/// The commands of all partitions of this process.
pub(crate) struct Inboxes {
    topic: String,
    /// Says which node reads a partition.
    group: String,
    reader: Reader<CommandRecord>,
    outbox: Arc<Outbox>,
    driver: Driver,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
    limits: Limits,
    begin_anew: bool,
    /// The executors of each category, oldest first. A command handler keeps its executor, which keeps the
    /// store.
    executors: RwLock<HashMap<&'static str, Vec<Weak<dyn CommandExecutor>>>>,
    /// The categories of commands that came and had no executor, at most [`UNKNOWN_MAX`].
    unknown: Mutex<BTreeSet<String>>,
    /// How far each partition is with its end.
    stages: Vec<watch::Sender<Stage>>,
}

/// Most categories without an executor that are remembered.
const UNKNOWN_MAX: usize = 20;

/// The life of an inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// Nothing more is begun.
    Draining,
    /// Every command that was begun is settled, and the log says so.
    Drained,
}

/// One command that is being handled.
struct Begun {
    offset: Offset,
    command: ForwardedCommand,
    reply_to: Option<ReplyTo>,
}

/// What became of it.
enum Outcome {
    /// It is settled, with this answer.
    Settled(Reply),
    /// A copy is in the topic, behind all others: this one is settled.
    Postponed,
    /// This node does not own the stream, or cannot know what came of it: the next owner finds out.
    Open,
}

impl Outcome {
    /// What a span calls it, unless the command was handled as its domain wants it.
    fn error(&self) -> Option<&'static str> {
        match self {
            Self::Settled(Reply::Unavailable { .. }) => Some("unavailable"),
            Self::Settled(Reply::NotAppended { .. }) => Some("not_appended"),
            Self::Settled(Reply::TooLarge { .. }) => Some("too_large"),
            Self::Settled(Reply::OutcomeUnknown) | Self::Open => Some("unknown"),
            Self::Settled(Reply::Failed { .. }) => Some("failed"),
            Self::Settled(_) => None,
            Self::Postponed => Some("postponed"),
        }
    }
}

/// The commands of one partition under one claim.
struct Inbox<'a> {
    inboxes: &'a Arc<Inboxes>,
    shared: &'a Shared,
    tenure: Tenure,
    hold: Hold,
    era: Era,
    /// By their marks.
    commands: Settlement<(ReplyTo, Reply)>,
    handling: JoinSet<(Begun, Outcome)>,
    /// Who is begun last of each stream, so that the next one comes after.
    turns: HashMap<StreamId, (Offset, oneshot::Receiver<()>)>,
    /// What the writer was told.
    told: (Offset, bool),
    told_at: Instant,
    /// Since when the topic ends below where the log says that it was read to.
    low_since: Option<Instant>,
    /// The mark of where the topic ended when it was first read under this claim: an owner before this
    /// one may have applied what lies below.
    inherited: Option<Offset>,
}

impl Inboxes {
    pub(crate) fn new(
        config: &KafkaConfig,
        reader: Reader<CommandRecord>,
        outbox: Arc<Outbox>,
        driver: Driver,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
        partitions: u32,
    ) -> Self {
        Self {
            topic: config.commands_topic(),
            group: config.owners_group(),
            reader,
            outbox,
            driver,
            clock,
            ids,
            limits: config.limits.clone(),
            begin_anew: config.begin_commands_anew,
            executors: RwLock::default(),
            unknown: Mutex::default(),
            stages: (0..partitions).map(|_| watch::Sender::new(Stage::Drained)).collect(),
        }
    }

    pub(crate) fn serve(&self, category: &'static str, executor: &Arc<dyn CommandExecutor>) {
        let mut executors = self.executors.write().unwrap_or_else(PoisonError::into_inner);
        let of_category = executors.entry(category).or_default();
        of_category.retain(|executor| executor.strong_count() > 0);
        of_category.push(Arc::downgrade(executor));
    }

    /// Returns one sentence for each category whose commands come to this node and are handled by nobody.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        unknown.retain(|category| self.executor(category).is_none());
        let sentence = |category: &String| {
            format!(
                "commands of category {category} come to this node, and no command handler of this process \
                 takes them: make the handler when the process starts"
            )
        };
        unknown.iter().map(sentence).collect()
    }

    /// Remembers that a command had no executor.
    fn note_unknown(&self, category: &str) {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        if unknown.len() < UNKNOWN_MAX && !unknown.contains(category) {
            tracing::warn!(
                category,
                "no command handler of this process takes commands of this category"
            );
            unknown.insert(category.to_owned());
        }
    }

    fn executor(&self, category: &str) -> Option<Arc<dyn CommandExecutor>> {
        let executors = self.executors.read().unwrap_or_else(PoisonError::into_inner);
        executors.get(category)?.iter().rev().find_map(Weak::upgrade)
    }

    fn stage(&self, partition: Partition) -> &watch::Sender<Stage> {
        &self.stages[partition.0 as usize]
    }

    /// Commands of the partition may be handled from now on.
    pub(crate) fn open(&self, partition: Partition) {
        self.stage(partition).send_replace(Stage::Open);
    }

    /// Handles commands whenever the partition is owned, until the task is ended.
    pub(crate) async fn run(self: Arc<Self>, shared: Arc<Shared>, tenure: Tenure) {
        let mut holds = shared.hold.subscribe();
        loop {
            let held = holds.wait_for(Option::is_some).await.map(|held| *held);
            let Ok(Some(hold)) = held else { return };
            let mut inbox = Inbox::new(&self, &shared, tenure, hold);
            inbox.serve(&mut holds).await;
            self.reader.forget(shared.partition);
        }
    }

    /// Begins nothing more, and returns when everything is settled and the log says so.
    pub(crate) async fn drain(&self, partition: Partition, shared: &Shared) {
        let stage = self.stage(partition);
        stage.send_replace(Stage::Draining);
        let (mut stages, mut holds) = (stage.subscribe(), shared.hold.subscribe());
        // Without a claim there is nothing to be settled here.
        tokio::select! {
            _ = stages.wait_for(|stage| *stage == Stage::Drained) => {}
            _ = holds.wait_for(Option::is_none) => {}
        }
    }

    /// Handles one command, again and again while that may help and there is time.
    async fn handle(
        &self,
        partition: Partition,
        command: &ForwardedCommand,
        has_caller: bool,
        is_inherited: bool,
    ) -> Outcome {
        let bound = self.clock.instant() + self.left(command).min(self.limits.forwarded_bound);
        // That it cannot be handled now says nothing of what an owner before has done with it, or an
        // attempt before whose outcome was not known.
        let mut may_have_happened = is_inherited;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let answer = match self.executor(command.stream.category()) {
                Some(executor) => executor.execute(command, bound).await,
                None => {
                    self.note_unknown(command.stream.category());
                    Ok(Reply::unavailable(RETRY_AFTER, "no program here knows the category"))
                }
            };
            let pause = backoff(&*self.ids, attempt, RETRY_BASE, RETRY_MAX);
            match answer {
                Ok(reply) if !reply.is_transient() => return Outcome::Settled(reply),
                Ok(_) if self.clock.instant() + pause < bound => {}
                Ok(_) if has_caller && may_have_happened => {
                    return Outcome::Settled(Reply::OutcomeUnknown);
                }
                Ok(reply) if has_caller || self.left(command).is_zero() => {
                    return Outcome::Settled(reply);
                }
                Ok(_) => {
                    if self.postpone(partition, command).await {
                        return Outcome::Postponed;
                    }
                }
                // A record of it is on its way: its fate is known when that of the record is.
                Err(AppendError::OutcomeUnknown { .. }) => may_have_happened = true,
                Err(_) => return Outcome::Open,
            }
            self.clock.sleep(pause).await;
        }
    }

    /// The time until the command may not be begun any more.
    fn left(&self, command: &ForwardedCommand) -> Duration {
        (command.deadline - self.clock.now()).to_std().unwrap_or_default()
    }

    /// A command that nobody waits for is not lost because it cannot be handled now: a copy goes to
    /// the end of the queue, and what comes behind it is not held up. Whether the copy is there.
    async fn postpone(&self, partition: Partition, command: &ForwardedCommand) -> bool {
        let copy = wire::command(command, None);
        let Ok(delivery) = self.outbox.command(partition, &copy) else { return false };
        // Where an undelivered copy went nobody knows; several do no harm.
        let there = matches!(delivery.await, Ok(Ok(())));
        if there {
            metrics::counter!("kafold_postponed_commands_total").increment(1);
        }
        there
    }
}

impl<'a> Inbox<'a> {
    fn new(inboxes: &'a Arc<Inboxes>, shared: &'a Shared, tenure: Tenure, hold: Hold) -> Self {
        Self {
            inboxes,
            shared,
            tenure,
            hold,
            era: Era::of(hold.resume),
            commands: Settlement::new(hold.resume),
            handling: JoinSet::new(),
            turns: HashMap::new(),
            told: (hold.resume, false),
            told_at: inboxes.clock.instant(),
            low_since: None,
            inherited: None,
        }
    }

    /// Until the claim is over.
    async fn serve(&mut self, holds: &mut watch::Receiver<Option<Hold>>) {
        let inboxes = Arc::clone(self.inboxes);
        let mut stages = inboxes.stage(self.shared.partition).subscribe();
        let mut read = Box::pin(self.read(Duration::ZERO));
        let (mut reading, mut at_rest) = (true, false);
        loop {
            let draining = *stages.borrow_and_update() != Stage::Open;
            if draining && self.is_settled() {
                inboxes.stage(self.shared.partition).send_if_modified(|stage| {
                    std::mem::replace(stage, Stage::Drained) != Stage::Drained
                });
            }
            if !reading && !draining && self.has_room() {
                read = Box::pin(self.read(Duration::ZERO));
                reading = true;
            }
            self.tell_mark(draining || std::mem::take(&mut at_rest));
            let mark_is_due = self.time_until_mark();
            let is_ahead = self.commands.mark() > self.hold.settled;
            tokio::select! {
                biased;
                changed = holds.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    match *holds.borrow_and_update() {
                        Some(hold) if hold.claim == self.hold.claim => self.hold = hold,
                        _ => return,
                    }
                    self.release();
                }
                _ = stages.changed() => {}
                Some(handled) = self.handling.join_next() => {
                    self.take_handled(handled.ok());
                    while let Some(handled) = self.handling.try_join_next() {
                        self.take_handled(handled.ok());
                    }
                }
                chunk = &mut read, if reading && !draining => {
                    reading = false;
                    if let Some(pause) = self.take_read(chunk) {
                        read = Box::pin(self.read(pause));
                        reading = true;
                    }
                }
                () = inboxes.clock.sleep(mark_is_due), if is_ahead => {
                    self.told_at = inboxes.clock.instant();
                    at_rest = true;
                }
            }
        }
    }

    /// Whether everything that was begun is settled, answered, and the log says so.
    fn is_settled(&self) -> bool {
        self.commands.is_empty() && self.hold.settled >= self.commands.mark()
    }

    /// Until the log is told without anybody waiting for it.
    fn time_until_mark(&self) -> Duration {
        (self.told_at + MARK_INTERVAL).saturating_duration_since(self.inboxes.clock.instant())
    }

    fn has_room(&self) -> bool {
        self.commands.open() < self.inboxes.limits.forwarded_commands_max
    }

    fn read(
        &self,
        pause: Duration,
    ) -> impl Future<Output = Result<Chunk<CommandRecord>, ReadFailure>> + use<> {
        let (reader, clock) = (self.inboxes.reader.clone(), Arc::clone(&self.inboxes.clock));
        let (partition, from) = (self.shared.partition, self.era.offset(self.commands.next()));
        async move {
            if !pause.is_zero() {
                clock.sleep(pause).await;
            }
            reader.read_async(partition, from, READ_WAIT).await
        }
    }

    /// Begins what was read; after which pause to read again, if not at once.
    fn take_read(&mut self, read: Result<Chunk<CommandRecord>, ReadFailure>) -> Option<Duration> {
        match read {
            Ok(chunk) => {
                self.low_since = None;
                self.inherited.get_or_insert(self.era.mark(chunk.end));
                self.shared.standing().commands = None;
                chunk.records.into_iter().for_each(|record| self.take(record));
                None
            }
            Err(ReadFailure::OutOfRange { start, .. })
                if self.commands.next() < self.era.mark(start) =>
            {
                // What was deleted is older than any deadline.
                self.commands.pass(self.era.mark(Offset(start.0 - 1)));
                None
            }
            Err(ReadFailure::OutOfRange { end, .. }) => {
                self.take_low_end(end);
                Some(READ_RETRY)
            }
            Err(failure) => {
                let partition = self.shared.partition;
                if let ReadFailure::Corrupt(_) = failure {
                    let topic = &self.inboxes.topic;
                    self.shared.standing().commands = Some(format!(
                        "commands of other nodes are not handled: in topic {topic}, {failure}; let \
                         another replica lead and this broker copy the partition anew"
                    ));
                }
                tracing::debug!(%partition, %failure, "commands cannot be read");
                Some(READ_RETRY)
            }
        }
    }

    /// The topic ends below where the log says that it was read to: a stale leader's, for a while.
    fn take_low_end(&mut self, end: Offset) {
        let now = self.inboxes.clock.instant();
        let since = *self.low_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.inboxes.limits.low_end_patience {
            return;
        }
        let (topic, next) = (&self.inboxes.topic, self.era.offset(self.commands.next()));
        if let Some(era) = self.era.next().filter(|_| self.inboxes.begin_anew) {
            let partition = self.shared.partition;
            tracing::warn!(%partition, topic, %end, before = %next, "commands are begun anew");
            self.era = era;
            // An owner before may have begun it anew, and not come to tell the log.
            self.inherited = None;
            self.low_since = None;
            self.commands.pass(Offset(era.beginning().0 - 1));
            self.shared.standing().commands = None;
            return;
        }
        self.shared.standing().commands = Some(format!(
            "commands of other nodes are not handled: topic {topic} ends at {end}, but the log says \
             that it was read up to {next}: it was truncated or recreated. Restore it; or, when it was \
             deleted and made anew, restart the nodes with ?commands=begin_anew in the URL of the log: \
             what stands in it is then handled from its beginning, and what stood in the old one is \
             left to those who sent it"
        ));
    }

    fn take(&mut self, record: CommandRecord) {
        let offset = self.era.mark(record.offset);
        let (command, reply_to) = match record.content {
            Ok(content) => content,
            Err(reason) => {
                let partition = self.shared.partition;
                let at = record.offset;
                tracing::warn!(%partition, offset = %at, reason, "a record of the commands topic is none");
                metrics::counter!("kafold_foreign_commands_total").increment(1);
                return self.commands.pass(offset);
            }
        };
        self.commands.take(offset);
        let (begun, next) = oneshot::channel();
        let before = self.turns.insert(command.stream.clone(), (offset, next));
        let (inboxes, partition) = (Arc::clone(self.inboxes), self.shared.partition);
        let is_inherited = self.inherited.is_none_or(|end| offset < end);
        let span = self.process_span(&command, record.offset);
        self.handling.spawn(async move {
            if let Some((_, before)) = before {
                // Dropped is as good as used: the one before has begun.
                let _ = before.await;
            }
            let outcome = {
                let handled = inboxes
                    .handle(partition, &command, reply_to.is_some(), is_inherited)
                    .instrument(span.clone());
                let mut handled = Box::pin(AssertUnwindSafe(handled).catch_unwind());
                // Once it was polled it has its place in the stream's queue.
                let first = poll_fn(|context| Poll::Ready(handled.as_mut().poll(context))).await;
                drop(begun);
                match first {
                    Poll::Ready(outcome) => outcome,
                    Poll::Pending => handled.await,
                }
            };
            let outcome = outcome.unwrap_or_else(|_| Outcome::Settled(panicked(&command)));
            if let Some(error) = outcome.error() {
                trace::failed(&span, error);
            }
            (Begun { offset, command, reply_to }, outcome)
        });
    }

    /// Below whoever sent the command: from when it was read to what became of it.
    fn process_span(&self, command: &ForwardedCommand, offset: Offset) -> Span {
        use tracing::field::Empty;
        let Inboxes { topic, group, .. } = &**self.inboxes;
        let span = tracing::info_span!(
            "process",
            otel.name = format!("process {topic}"),
            otel.kind = "consumer",
            messaging.system = "kafka",
            messaging.operation.name = "process",
            messaging.operation.type = "process",
            messaging.destination.name = topic.as_str(),
            messaging.destination.partition.id = %self.shared.partition,
            messaging.consumer.group.name = group.as_str(),
            messaging.kafka.message.key = command.stream.as_str(),
            messaging.kafka.offset = offset.0 as i64,
            error.type = Empty,
            otel.status_code = Empty,
        );
        trace::set_parent(&span, command.trace_parent.as_deref());
        span
    }

    /// `None` is a task that was ended with its claim.
    fn take_handled(&mut self, handled: Option<(Begun, Outcome)>) {
        let Some((Begun { offset, command, reply_to }, outcome)) = handled else { return };
        if self.turns.get(&command.stream).is_some_and(|(last, _)| *last == offset) {
            self.turns.remove(&command.stream);
        }
        match (outcome, reply_to) {
            (Outcome::Open, _) => {}
            (Outcome::Postponed, _) => self.commands.settle(offset),
            // A load that is handled once more changes nothing.
            (Outcome::Settled(reply), Some(to)) if reply.is_in_log() || command.is_load() => {
                self.commands.settle(offset);
                self.answer(to, &reply);
            }
            (Outcome::Settled(reply), Some(to)) => {
                self.commands.settle_and_hold(offset, (to, reply));
            }
            (Outcome::Settled(reply), None) => {
                note_unheard(&command, &reply);
                self.commands.settle(offset);
            }
        }
    }

    /// Gives the answers that waited for the log to say that their commands are settled.
    fn release(&mut self) {
        let released: Vec<_> = self.commands.release(self.hold.settled).collect();
        for (to, reply) in released {
            self.answer(to, &reply);
        }
    }

    fn answer(&self, to: ReplyTo, reply: &Reply) {
        // Numbers, texts and the domain's own JSON always are JSON.
        let json = serde_json::to_vec(reply).unwrap_or_default();
        self.inboxes.outbox.reply(to, json);
    }

    /// Tells the writer which commands are settled, when that has changed.
    fn tell_mark(&mut self, at_rest: bool) {
        let mark = self.commands.mark();
        let wanted = self.commands.is_awaited() || at_rest && mark > self.hold.settled;
        if (mark, wanted) == self.told {
            return;
        }
        self.told = (mark, wanted);
        self.told_at = self.inboxes.clock.instant();
        let input = Input::CommandsMark { claim: self.hold.claim, mark, wanted };
        self.inboxes.driver.tell(Message::Input(self.shared.partition, self.tenure, input));
    }
}

/// Nothing of it was appended, or its events are in the log for whoever asks again.
fn panicked(command: &ForwardedCommand) -> Reply {
    let (stream, command_id) = (&command.stream, command.command_id);
    tracing::error!(%stream, %command_id, "handling a command panicked");
    let what = format!("command {command_id} of stream {stream}");
    Reply::Failed { what, reason: "the owner's program panicked, see its log".into() }
}

/// A command that nobody waits for did not do what was hoped: the log of the service is told.
fn note_unheard(command: &ForwardedCommand, reply: &Reply) {
    let (stream, command_id) = (&command.stream, command.command_id);
    match reply {
        Reply::Handled(_) => {}
        Reply::Rejected { error } => {
            tracing::info!(%stream, %command_id, %error, "a sent command was rejected");
        }
        other => {
            metrics::counter!("kafold_dropped_commands_total").increment(1);
            tracing::warn!(%stream, %command_id, reply = ?other, "a sent command was dropped");
        }
    }
}

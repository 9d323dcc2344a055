//! The command handler: load, decide, append, and again on conflict.
//!
//! - `slot`: what is known of one stream: what is proven to be in the log, and what this handler
//!   has submitted on top of it;
//! - `states`: the bounded cache of slots;
//! - `load`: a stream's events and snapshot become a state;
//! - `forwarding`: commands of streams that another node owns, and commands that others send here;
//! - `config`, `error`: limits, and answers to the caller.
//!
//! The cache is safe because every append demands the version that the decision saw, and every
//! rejection is confirmed by the store before it is answered.
//!
//! Metrics, each with a label `category`:
//!
//! - `kafold_commands_total` by `outcome`: what the callers of this handler got, wherever the
//!   command was decided; `sent` for one that was written down for its owner;
//! - `kafold_forwarded_commands_total` by `outcome`: those of them that were given to the bus, once
//!   for every time;
//! - `kafold_executed_commands_total` by `outcome`: commands that the bus brought here, once for
//!   every time, and none of them above;
//! - `kafold_command_retries_total` by `reason`, `kafold_hot_states_total` by `result` (`hit`,
//!   `miss`), and the histogram `kafold_command_seconds` of commands whose answer a caller waited
//!   for.
//!
//! Every command is a span `command`, on each node that it comes to. It is below the span in which the
//! handler was called, or else below the caller's [`Request::trace_parent`].

mod config;
mod error;
mod forwarding;
mod load;
mod outcome;
mod slot;
mod states;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::SubsecRound;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::Instrument;

pub use self::config::{HandlerConfig, Request};
pub use self::error::HandleError;

use self::forwarding::Forwarding;
use self::load::Snapshots;
use self::outcome::SharedOutcome;
use self::slot::{Pending, Slot};
use self::states::HotStates;
use crate::aggregate::Aggregate;
use crate::clock::{Clock, IdGenerator, backoff, within};
use crate::codec;
use crate::event::{Commit, DomainEvent, Metadata, NewEvent};
use crate::forward::CommandBus;
use crate::ids::{CommandId, ExpectedVersion, Position, StreamId, Version};
use crate::projecting;
use crate::snapshot::SnapshotStore;
use crate::store::{Append, AppendError, Appended, EventStore, Outcome, Ticket, View};
use crate::trace;

/// How long a command that is already in the log may be held up by saving a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(1);
/// A decision that takes as long is warned of.
const DECISION_MAX: Duration = Duration::from_secs(1);
/// What a caller is told to wait when its deadline was too short.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Handles the commands of one kind of aggregate: the only retry loop there is.
///
/// Commands of one stream are decided one after another, each on the state that the one before
/// leaves, but none waits for the one before to be in the log: they are submitted in a row, and
/// when one fails, those that were decided on it are decided again. Cheap to clone; clones share
/// the cache. Use one handler a kind of aggregate and process.
pub struct CommandHandler<A: Aggregate> {
    store: Arc<dyn EventStore>,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
    config: HandlerConfig,
    snapshots: Option<Snapshots<A>>,
    forwarding: Option<Forwarding<A>>,
    states: Arc<HotStates<A>>,
}

/// What a command came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Handled {
    /// The version of the commit's last event; of the stream, when the command changed nothing.
    pub version: Version,
    /// Where that event is: the token for reading one's own write. `None` when the command changed
    /// nothing and the stream has no event.
    pub position: Option<Position>,
    /// Whether the command had been applied before; then version and position are the first ones.
    pub duplicate: bool,
    /// How many events this call appended: 0 when the command changed nothing or was a duplicate.
    pub events: u64,
}

/// One command on its way through the loop.
struct Job<'a, A: Aggregate> {
    stream: StreamId,
    /// `None` for a load, which decides nothing.
    command: Option<&'a A::Command>,
    command_id: CommandId,
    request: Request,
    deadline: Instant,
}

impl<A: Aggregate> Job<'_, A> {
    fn span(&self) -> tracing::Span {
        let span = command_span(&self.stream, self.command_id, false);
        trace::set_parent(&span, self.request.trace_parent.as_deref());
        span
    }

    fn named(&self) -> String {
        format!("command {} of stream {}", self.command_id, self.stream)
    }
}

/// Where a decision left a command; what is in here is waited for without the stream's lock.
enum Step<E> {
    /// It is in the log already.
    Known(Appended),
    /// It is pending already: its outcome is shared.
    Shared(SharedOutcome),
    /// Its events were submitted.
    Submitted { ticket: Ticket, outcome: SharedOutcome, events: u64 },
    /// It is answered without events once the view is confirmed.
    Unconfirmed { confirmed: Outcome<()>, verdict: Verdict<E>, version: Version, last: Last },
}

/// An answer that is only true of the newest state.
enum Verdict<E> {
    Rejected(E),
    Unchanged,
    /// The stream is not at the version that the caller demands.
    OtherVersion,
}

/// The last event of a view.
enum Last {
    Proven(Option<Position>),
    Pending(SharedOutcome),
}

impl<A: Aggregate> Clone for CommandHandler<A> {
    fn clone(&self) -> Self {
        Self {
            store: Arc::clone(&self.store),
            clock: Arc::clone(&self.clock),
            ids: Arc::clone(&self.ids),
            config: self.config.clone(),
            snapshots: self.snapshots.clone(),
            forwarding: self.forwarding.clone(),
            states: Arc::clone(&self.states),
        }
    }
}

impl<A: Aggregate> CommandHandler<A> {
    /// A handler with the machine's clock, random ids and the default limits.
    #[cfg(feature = "tokio")]
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        let (clock, ids) = (crate::clock::SystemClock, crate::clock::RandomIds);
        Self::with_parts(store, Arc::new(clock), Arc::new(ids))
    }

    /// A handler with the given clock and ids and the default limits.
    pub fn with_parts(
        store: Arc<dyn EventStore>,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Self {
        const {
            assert!(
                is_category(A::CATEGORY, <A::Event as DomainEvent>::CATEGORY),
                "#[event(category = …)] of the events is not the CATEGORY of their aggregate"
            );
        }
        let config = HandlerConfig::default();
        let states = Arc::new(HotStates::new(config.hot_states_max));
        Self { store, clock, ids, config, snapshots: None, forwarding: None, states }
    }

    /// The same handler with other limits and an empty cache.
    #[must_use]
    pub fn config(self, config: HandlerConfig) -> Self {
        let states = Arc::new(HotStates::new(config.hot_states_max));
        Self { config, states, ..self }.served_anew()
    }

    /// Gives the bus this handler in place of the one before.
    fn served_anew(mut self) -> Self {
        let Some(forwarding) = self.forwarding.take() else { return self };
        let forwarding = forwarding.serve(self.clone());
        Self { forwarding: Some(forwarding), ..self }
    }

    /// The same handler with an empty cache, loading streams from snapshots and saving one every
    /// [`HandlerConfig::snapshot_every`] events, if the aggregate has a [`SNAPSHOT`](Aggregate::SNAPSHOT).
    /// A snapshot that cannot be read or saved is logged and changes no answer.
    #[must_use]
    pub fn with_snapshots(self, store: Arc<dyn SnapshotStore>) -> Self {
        let states = Arc::new(HotStates::new(self.config.hot_states_max));
        let snapshots = A::SNAPSHOT.map(|schema| Snapshots { store, schema });
        Self { snapshots, states, ..self }.served_anew()
    }

    /// The same handler as one of several nodes: commands of streams that another node owns go
    /// there, and this node handles those that others send it. `None`, as of an embedded log,
    /// changes nothing.
    #[must_use]
    pub fn forwarding(self, bus: Option<Arc<dyn CommandBus>>) -> Self
    where
        A::Command: Serialize + DeserializeOwned,
        A::Error: Serialize + DeserializeOwned,
    {
        let Some(bus) = bus else { return self };
        Self { forwarding: Some(Forwarding::new(bus)), ..self }.served_anew()
    }

    /// Handles a command on the aggregate `id`, whatever its version.
    ///
    /// The command has an id of its own, so a second call is a second command. Use
    /// [`handle_with`](Self::handle_with) and a [`CommandId`] if the caller may repeat the command.
    pub async fn handle(
        &self,
        id: &str,
        command: &A::Command,
    ) -> Result<Handled, HandleError<A::Error>> {
        self.handle_with(id, command, Request::default()).await
    }

    /// Handles a command with options: a command id, a demand on the version, metadata for the events,
    /// or a deadline.
    ///
    /// The command id is checked first: a command that was applied already returns its first result,
    /// whatever it says now.
    pub async fn handle_with(
        &self,
        id: &str,
        command: &A::Command,
        request: impl Into<Request>,
    ) -> Result<Handled, HandleError<A::Error>> {
        let began = self.clock.instant();
        let job = self.job(id, Some(command), request.into(), self.config.deadline)?;
        let span = job.span();
        let result = self.run(&job).instrument(span.clone()).await;
        let outcome = error::outcome_name(&result);
        error::tell_span(&span, outcome, &result);
        metrics::counter!("kafold_commands_total", "category" => A::CATEGORY, "outcome" => outcome)
            .increment(1);
        metrics::histogram!("kafold_command_seconds", "category" => A::CATEGORY)
            .record(self.clock.instant().saturating_duration_since(began).as_secs_f64());
        result
    }

    /// The asynchronous command: it will be handled, and nobody waits for what it comes to.
    ///
    /// With a bus it is written down for the owner of its stream, which may be this node, and
    /// handled in the order in which it was written down, at the latest
    /// [`HandlerConfig::send_deadline`] from now; this call returns when it is written down, within
    /// [`HandlerConfig::deadline`]. Without a bus it is handled before this call returns; a rejection
    /// is logged then, and no error, for nobody waits for it. After any error the command may be
    /// sent again with the same id ([`send_with`](Self::send_with)).
    pub async fn send(&self, id: &str, command: &A::Command) -> Result<(), HandleError<A::Error>> {
        self.send_with(id, command, Request::default()).await
    }

    /// As [`CommandHandler::send`], with a command id, a demand on the version, metadata for the events,
    /// or a deadline, after which the command is not handled any more.
    pub async fn send_with(
        &self,
        id: &str,
        command: &A::Command,
        request: impl Into<Request>,
    ) -> Result<(), HandleError<A::Error>> {
        let request = request.into();
        let Some(forwarding) = &self.forwarding else {
            let answer = self.handle_with(id, command, request).await;
            return forwarding::sent_answer::<A>(id, answer);
        };
        let job = self.job(id, Some(command), request, self.config.send_deadline)?;
        let span = job.span();
        let result = self.send_to_owner(forwarding, &job).instrument(span.clone()).await;
        let outcome = error::sent_name(&result);
        error::tell_span(&span, outcome, &result);
        metrics::counter!("kafold_commands_total", "category" => A::CATEGORY, "outcome" => outcome)
            .increment(1);
        result
    }

    /// Returns the state of the aggregate `id` and the version of its stream. The read is linearizable:
    /// the state has every event that was acknowledged before the call, on any node. An aggregate
    /// without events has its default state and version 0.
    ///
    /// Takes one round trip to the log, and one to the owner of the stream if another node owns it.
    /// That node's state is read from the stream index, up to the version that the owner confirms.
    pub async fn load(&self, id: &str) -> Result<(A, Version), HandleError<A::Error>> {
        let job = self.job(id, None, Request::default(), self.config.deadline)?;
        let span = job.span();
        async {
            let confirmed = match self.run(&job).await {
                // A load has no outcome that could be unknown.
                Err(HandleError::Append(AppendError::OutcomeUnknown { .. })) => {
                    let why = "the node that owns the stream does not answer";
                    return Err(AppendError::unavailable(RETRY_AFTER, why).into());
                }
                confirmed => confirmed?.version,
            };
            self.state_from(&job, confirmed).await
        }
        .instrument(span)
        .await
    }

    /// Returns the store, such as for reading a stream.
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.store
    }

    /// How many streams have a place in the cache, at most [`HandlerConfig::hot_states_max`].
    pub fn hot_states(&self) -> usize {
        self.states.len()
    }

    fn job<'a>(
        &self,
        id: &str,
        command: Option<&'a A::Command>,
        request: Request,
        limit: Duration,
    ) -> Result<Job<'a, A>, HandleError<A::Error>> {
        if let Some(projection) = projecting::current() {
            return Err(HandleError::InProjection { projection });
        }
        let stream = StreamId::new(A::CATEGORY, id)?;
        let deadline = request.deadline.unwrap_or_else(|| self.clock.instant() + limit);
        let command_id = request.command_id.unwrap_or_else(|| CommandId(self.ids.event_id()));
        Ok(Job { stream, command, command_id, request, deadline })
    }

    async fn run(&self, job: &Job<'_, A>) -> Result<Handled, HandleError<A::Error>> {
        match &self.forwarding {
            Some(forwarding) => self.run_anywhere(forwarding, job).await,
            None => self.run_here(job).await,
        }
    }

    /// Decides the command on this node until it is settled.
    async fn run_here(&self, job: &Job<'_, A>) -> Result<Handled, HandleError<A::Error>> {
        let mut attempt = 1;
        loop {
            let failure = match self.attempt(job).await {
                Err(HandleError::Append(failure)) => failure,
                settled => return settled,
            };
            let again = match failure {
                AppendError::Conflict { .. } => "conflict",
                AppendError::NotAppended { .. } => "not_appended",
                _ => return Err(HandleError::Append(failure)),
            };
            let waited = attempt < self.config.attempts_max && self.wait(attempt, job).await;
            if !waited {
                return Err(HandleError::exhausted(job.request.expected, failure));
            }
            count_retry::<A>(again);
            tracing::debug!(attempt, %failure, "deciding again");
            attempt += 1;
        }
    }

    /// Waits before another attempt; `false` when the deadline comes first. The first retry comes
    /// at once: whoever was faster is done already.
    async fn wait(&self, attempt: u32, job: &Job<'_, A>) -> bool {
        let Some(previous) = attempt.checked_sub(1).filter(|previous| *previous > 0) else {
            return true;
        };
        let (base, most) = (self.config.backoff_base, self.config.backoff_max);
        let pause = backoff(&*self.ids, previous, base, most);
        let fits = self.clock.instant() + pause < job.deadline;
        if fits {
            self.clock.sleep(pause).await;
        }
        fits
    }

    /// Decides once and waits for what comes of it.
    async fn attempt(&self, job: &Job<'_, A>) -> Result<Handled, HandleError<A::Error>> {
        let slot = self.states.slot(&job.stream);
        let step = self.within(job.deadline, self.step(&slot, job)).await;
        match step.ok_or_else(too_late)?? {
            Step::Known(first) => Ok(handled(Appended { duplicate: true, ..first }, 0)),
            Step::Shared(outcome) => self.shared(job, outcome).await,
            Step::Submitted { ticket, outcome, events } => {
                let result = outcome.await;
                let mut slot = slot.lock().await;
                slot.settle();
                if let Err(failure) = &result {
                    slot.failed(ticket, failure);
                }
                let due = self.due_snapshot(job, &mut slot);
                drop(slot);
                self.save(due).await;
                Ok(handled(result?, events))
            }
            Step::Unconfirmed { confirmed, verdict, version, last } => {
                if let Err(failure) = confirmed.await {
                    slot.lock().await.unconfirmed(&failure);
                    return Err(failure.into());
                }
                self.answer(job, verdict, version, last).await
            }
        }
    }

    /// Under the stream's lock: knows the command, or decides it and submits what was decided.
    async fn step(
        &self,
        slot: &states::SharedSlot<A>,
        job: &Job<'_, A>,
    ) -> Result<Step<A::Error>, HandleError<A::Error>> {
        let mut slot = slot.lock().await;
        slot.settle();
        slot.make_room(self.config.pending_max).await;
        self.make_current(&mut slot, &job.stream).await?;
        if let Some(known) = slot.find(job.command_id) {
            return Ok(known);
        }
        let now = self.clock.instant();
        if job.deadline <= now {
            return self.find_older(&slot, job).await?.ok_or_else(|| too_late().into());
        }
        let version = slot.version();
        if !job.request.expected.admits(version) {
            return self.other_version(&slot, job).await;
        }
        let decided = match job.command {
            Some(command) => slot.head().decide(command),
            None => Ok(Vec::new()),
        };
        self.check_duration(job, now)?;
        match decided {
            Ok(events) if events.is_empty() => {
                self.unconfirmed(&slot, job, Verdict::Unchanged).await
            }
            Ok(events) => self.submit(&mut slot, job, &events),
            Err(rule) => self.unconfirmed(&slot, job, Verdict::Rejected(rule)).await,
        }
    }

    /// Warns of a decision of [`DECISION_MAX`] or more: the decision blocked a thread of the runtime.
    /// Rejects a decision that outlasted the command's deadline.
    fn check_duration(&self, job: &Job<'_, A>, begun: Instant) -> Result<(), AppendError> {
        let now = self.clock.instant();
        let took = now.saturating_duration_since(begun);
        if took >= DECISION_MAX {
            tracing::warn!(
                stream = %job.stream,
                ?took,
                "`decide` is slow and blocks a thread: let it compute only, and do what waits before the \
                 command"
            );
        }
        if took > Duration::ZERO && job.deadline <= now {
            let why = format!("the deadline passed while `decide` ran, for {took:?}");
            return Err(AppendError::unavailable(RETRY_AFTER, why));
        }
        Ok(())
    }

    /// The demanded version is not the one of the view: at once if the log proves it.
    async fn other_version(
        &self,
        slot: &Slot<A>,
        job: &Job<'_, A>,
    ) -> Result<Step<A::Error>, HandleError<A::Error>> {
        let actual = slot.proven_version();
        if job.request.expected.version() >= Some(actual) {
            return self.unconfirmed(slot, job, Verdict::OtherVersion).await;
        }
        match self.find_older(slot, job).await? {
            Some(known) => Ok(known),
            None => Err(conflict(job, actual)),
        }
    }

    fn submit(
        &self,
        slot: &mut Slot<A>,
        job: &Job<'_, A>,
        events: &[A::Event],
    ) -> Result<Step<A::Error>, HandleError<A::Error>> {
        let here = trace::current();
        let trace_parent = here.as_deref().or(job.request.trace_parent.as_deref());
        let unfit = |error| HandleError::Codec { stream: job.stream.clone(), error };
        let (encoded, events): (Vec<_>, Vec<_>) = events
            .iter()
            .map(|event| self.new_event(event, &job.request, trace_parent))
            .collect::<Result<Vec<_>, _>>()
            .map_err(unfit)?
            .into_iter()
            .unzip();
        let commit = Commit::new(job.command_id, encoded)?;
        // `evolve` runs before the append: a panic refuses the command.
        let head = slot.evolved(&events).map_err(unfit)?;
        let (ticket, count) = (Ticket::next(), commit.count());
        // The order of submission is the order of decision, because the slot is locked.
        let outcome = SharedOutcome::new(self.store.submit(Append {
            stream: job.stream.clone(),
            expected: ExpectedVersion::Exact(slot.version()),
            commit,
            ticket,
            after: slot.last_ticket(),
            deadline: Some(job.deadline),
        }));
        let version = slot.version().plus(count);
        let pending = Pending { ticket, command_id: job.command_id, events, version, outcome };
        let outcome = pending.outcome.clone();
        slot.push(pending, head);
        Ok(Step::Submitted { ticket, outcome, events: count })
    }

    fn new_event(
        &self,
        event: &A::Event,
        request: &Request,
        trace_parent: Option<&str>,
    ) -> Result<(NewEvent, A::Event), codec::CodecError> {
        let metadata = Metadata {
            event_id: self.ids.event_id(),
            // The log keeps microseconds.
            recorded_at: self.clock.now().trunc_subsecs(6),
            correlation_id: request.correlation_id.clone(),
            causation_id: request.causation_id.clone(),
            trace_parent: trace_parent.map(str::to_owned),
        };
        codec::new_event(event, metadata)
    }

    /// An answer without events: unless the command is an old one, the store must say that the view
    /// is the newest.
    async fn unconfirmed(
        &self,
        slot: &Slot<A>,
        job: &Job<'_, A>,
        verdict: Verdict<A::Error>,
    ) -> Result<Step<A::Error>, HandleError<A::Error>> {
        if let Some(known) = self.find_older(slot, job).await? {
            return Ok(known);
        }
        let version = slot.version();
        let confirmed = self.store.confirm(View {
            stream: job.stream.clone(),
            version,
            after: slot.last_ticket(),
            deadline: Some(job.deadline),
        });
        Ok(Step::Unconfirmed { confirmed, verdict, version, last: slot.last() })
    }

    /// Looks for the command beyond the window of recent ones. An append needs no such look, the
    /// store takes it itself; any other answer does.
    async fn find_older(
        &self,
        slot: &Slot<A>,
        job: &Job<'_, A>,
    ) -> Result<Option<Step<A::Error>>, HandleError<A::Error>> {
        if slot.knows_every_command() || job.command.is_none() {
            return Ok(None);
        }
        let found = self.store.find_command(&job.stream, job.command_id).await?;
        Ok(found.map(Step::Known))
    }

    async fn answer(
        &self,
        job: &Job<'_, A>,
        verdict: Verdict<A::Error>,
        version: Version,
        last: Last,
    ) -> Result<Handled, HandleError<A::Error>> {
        match verdict {
            Verdict::Rejected(rule) => Err(HandleError::Rejected(rule)),
            Verdict::OtherVersion => Err(conflict(job, version)),
            Verdict::Unchanged => {
                let position = match last {
                    Last::Proven(position) => position,
                    // Settled: the view that included it was confirmed.
                    Last::Pending(outcome) => Some(outcome.await?.position),
                };
                Ok(Handled { version, position, duplicate: false, events: 0 })
            }
        }
    }

    /// The outcome of a submission with the same command id, which has a deadline of its own.
    async fn shared(
        &self,
        job: &Job<'_, A>,
        outcome: SharedOutcome,
    ) -> Result<Handled, HandleError<A::Error>> {
        let known = self.within(job.deadline, outcome).await;
        let appended = known.ok_or_else(|| unknown(job.command_id))??;
        Ok(handled(Appended { duplicate: true, ..appended }, 0))
    }

    /// `None` if the deadline comes before the work is done; work that is done at once always wins.
    async fn within<T>(&self, deadline: Instant, work: impl Future<Output = T>) -> Option<T> {
        let remaining = deadline.saturating_duration_since(self.clock.instant());
        within(&*self.clock, remaining, work).await
    }
}

/// The span of a command, on either side of the way between two nodes.
fn command_span(stream: &StreamId, command_id: CommandId, is_forwarded: bool) -> tracing::Span {
    use tracing::field::Empty;
    tracing::info_span!(
        "command",
        category = stream.category(),
        %stream,
        %command_id,
        forwarded = is_forwarded.then_some(true),
        outcome = Empty,
        error.type = Empty,
        otel.status_code = Empty,
    )
}

fn handled(appended: Appended, events: u64) -> Handled {
    let Appended { version, position, duplicate } = appended;
    let events = if duplicate { 0 } else { events };
    Handled { version, position: Some(position), duplicate, events }
}

fn conflict<A: Aggregate>(job: &Job<'_, A>, actual: Version) -> HandleError<A::Error> {
    let (stream, expected) = (job.stream.clone(), job.request.expected);
    HandleError::Conflict { stream, expected, actual }
}

fn unknown(command_id: CommandId) -> AppendError {
    AppendError::OutcomeUnknown { command_id }
}

fn count_retry<A: Aggregate>(reason: &'static str) {
    metrics::counter!("kafold_command_retries_total", "category" => A::CATEGORY, "reason" => reason)
        .increment(1);
}

fn too_late() -> AppendError {
    AppendError::unavailable(RETRY_AFTER, "the deadline passed before the command was decided")
}

/// Returns whether an enum of events declares this category, or none.
const fn is_category(category: &str, declared: Option<&str>) -> bool {
    let Some(declared) = declared else { return true };
    let (category, declared) = (category.as_bytes(), declared.as_bytes());
    let mut same = category.len() == declared.len();
    let mut at = 0;
    while same && at < category.len() {
        same = category[at] == declared[at];
        at += 1;
    }
    same
}

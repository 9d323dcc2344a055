//! One projection of a worker: the runner of its live generation, the runner of the next one while it
//! is rebuilt, and the switch from one to the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::desired::{AllDesired, Desired};
use crate::generation::{self, Generation};
use crate::handler::Handler;
use crate::registry::{self, State, Switched};
use crate::retention;
use crate::runner::{Orders, Outcome, Runner};
use crate::status::{ProjectionState, ProjectionStatus, SharedStatus};
use crate::worker::Context;

/// Between two attempts to write down a state, to switch or to drop old tables.
const TICK: Duration = Duration::from_millis(500);

/// How far behind the end of the log a generation is for which a switch is attempted: it can catch up
/// while the live one waits.
pub(crate) const ATTEMPT_LAG_MAX: u64 = 10_000;
/// One that comes as near as this is switched to at once, not at the next attempt: no partition of it is
/// further behind than a switch takes.
const SWITCH_LAG_NEAR: u64 = registry::SWITCH_LAG_MAX.unsigned_abs();

/// Longest wait for the login that owns the views to switch to a complete generation; then the wait is reported.
const FOREIGN_PATIENCE: Duration = Duration::from_secs(30);

/// Time between two deletions of rows of windows that are not kept any more.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(5);

/// Most restarts of runners that panic, within [`PANICS_WITHIN`]. The next panic stops the projection.
const PANICS_MAX: u32 = 3;
const PANICS_WITHIN: Duration = Duration::from_secs(60);

/// A runner under way.
struct Running {
    shutdown: watch::Sender<bool>,
    /// `None` is whatever generation is live.
    generation: Option<Generation>,
}

/// A runner that has stopped by itself, and what it takes to start another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stopped {
    generation: Option<Generation>,
    resumptions: i64,
}

/// Starts and ends the runners of one projection as operators ask.
pub(crate) struct Supervisor {
    handler: Arc<dyn Handler>,
    context: Context,
    status: SharedStatus,
    shutdown: watch::Receiver<bool>,
    all_desired: watch::Receiver<AllDesired>,
    runners: JoinSet<(Option<Generation>, Outcome)>,
    live: Option<Running>,
    live_stopped: Option<Stopped>,
    /// The generation that was live until a switch of which it is not known yet what it led to.
    live_retired: Option<Generation>,
    next: Option<Running>,
    next_stopped: Option<Stopped>,
    /// Why the live generation stopped, while that is not written down.
    untold_stop: Option<String>,
    /// Why the rebuild does not go on, while that is not written down.
    untold_reason: Option<(Generation, String)>,
    /// A complete next generation with views of another login, and the time of the first attempt to switch.
    foreign: Option<(Generation, Instant)>,
    /// Whether there may be tables of generations that are gone.
    has_stale_tables: bool,
    /// The number of panics of runners since the time of the first one.
    panics: Option<(u32, Instant)>,
    /// The time of the last deletion of rows of windows.
    expired_at: Option<Instant>,
}

impl Supervisor {
    pub(crate) fn new(
        handler: Arc<dyn Handler>,
        context: Context,
        status: SharedStatus,
        orders: Orders,
    ) -> Self {
        Self {
            handler,
            context,
            status,
            shutdown: orders.shutdown,
            all_desired: orders.desired,
            runners: JoinSet::new(),
            live: None,
            live_stopped: None,
            live_retired: None,
            next: None,
            next_stopped: None,
            untold_stop: None,
            untold_reason: None,
            foreign: None,
            has_stale_tables: true,
            panics: None,
            expired_at: None,
        }
    }

    /// Runs until it is shut down.
    pub(crate) async fn run(mut self) {
        let mut shutdown = self.shutdown.clone();
        tokio::select! {
            biased;
            _ = shutdown.wait_for(|asked| *asked) => {}
            () = self.supervise() => {}
        }
        for running in self.live.iter().chain(&self.next) {
            running.shutdown.send_replace(true);
        }
        while self.runners.join_next().await.is_some() {}
    }

    async fn supervise(&mut self) {
        let clock = self.context.clock.clone();
        let mut status = self.status.watch();
        loop {
            let desired = self.all_desired.borrow_and_update().get(self.status.name()).cloned();
            self.follow(desired.as_ref());
            if let Some(desired) = &desired {
                self.switch(desired).await;
                self.tell().await;
                self.take_over_state(desired).await;
                self.tidy().await;
                self.expire(desired.live).await;
            }
            let is_behind = next_is_behind(&status.borrow_and_update());
            tokio::select! {
                biased;
                Some(ended) = self.runners.join_next() => {
                    // A runner catches its own panics.
                    if let Ok((generation, outcome)) = ended {
                        self.ended(generation, outcome, desired.as_ref());
                    }
                }
                Ok(()) = self.all_desired.changed() => {}
                // One that never was behind may not be told yet what there is to read.
                Ok(_) = status.wait_for(|status| !next_is_behind(status)), if is_behind => {}
                () = clock.sleep(TICK) => {}
            }
        }
    }

    /// Starts and ends runners.
    fn follow(&mut self, desired: Option<&Desired>) {
        let resumptions = desired.map_or(0, |desired| desired.resumptions);
        if let (Some(next), Some(desired)) = (&self.next, desired) {
            if next.generation == Some(desired.live) {
                // It knows by itself, and so does the former one, if that is still there.
                self.live = self.next.take();
                self.live_stopped = None;
                self.has_stale_tables = true;
            } else if next.generation != desired.next {
                self.end_next();
            }
        }
        let is_resumed = |stopped: &Stopped| stopped.resumptions < resumptions;
        let is_known = |retired: &Generation| {
            desired.is_none_or(|desired| desired.live != *retired || desired.is_reset)
        };
        if self.live.is_none()
            && self.live_stopped.as_ref().is_none_or(is_resumed)
            && self.live_retired.as_ref().is_none_or(is_known)
        {
            (self.live_stopped, self.live_retired) = (None, None);
            self.start_live();
        }
        let Some(desired) = desired else { return };
        if let Some(stopped) = self.next_stopped.take_if(|next| next.generation != desired.next) {
            stopped.generation.inspect(|generation| self.status.abandoned(*generation));
            self.has_stale_tables = true;
        }
        let is_mine = |fingerprint: &String| *fingerprint == self.handler.definition().fingerprint;
        let Some(wanted) = desired.next else { return };
        let by_others = !desired.next_fingerprint.as_ref().is_none_or(is_mine);
        // After a reset the live generation starts as the next generation, at its registration.
        if self.next.is_some() || by_others || desired.is_reset {
            return;
        }
        if self.next_stopped.as_ref().is_none_or(is_resumed) {
            self.next_stopped = None;
            self.start_next(wanted);
        }
    }

    fn start_live(&mut self) {
        let (shutdown, orders) = self.orders();
        let status = self.status.starting();
        let runner = Runner::live(self.handler.clone(), self.context.clone(), status, orders);
        self.live = Some(Running { shutdown, generation: None });
        self.runners.spawn(async { (None, runner.run().await) });
    }

    fn start_next(&mut self, generation: Generation) {
        let (shutdown, orders) = self.orders();
        let status = self.status.building(generation);
        let (handler, context) = (self.handler.clone(), self.context.clone());
        let runner = Runner::next(handler, context, status, orders, generation);
        tracing::info!(projection = self.status.name(), generation = generation.0, "rebuilding");
        self.next = Some(Running { shutdown, generation: Some(generation) });
        self.runners.spawn(async move { (Some(generation), runner.run().await) });
    }

    fn orders(&self) -> (watch::Sender<bool>, Orders) {
        let (sender, shutdown) = watch::channel(false);
        (sender, Orders { shutdown, desired: self.all_desired.clone() })
    }

    fn end_next(&mut self) {
        let Some(next) = self.next.take() else { return };
        next.shutdown.send_replace(true);
        if let Some(generation) = next.generation {
            self.status.abandoned(generation);
        }
        self.has_stale_tables = true;
    }

    fn ended(
        &mut self,
        generation: Option<Generation>,
        outcome: Outcome,
        desired: Option<&Desired>,
    ) {
        let resumptions = desired.map_or(0, |desired| desired.resumptions);
        let is_live = self.live.as_ref().is_some_and(|live| live.generation == generation);
        let is_next = self.next.as_ref().is_some_and(|next| next.generation == generation);
        if matches!(outcome, Outcome::Panicked(_)) && self.runs_again_after_panic() {
            // A runner that is not there is started.
            self.live.take_if(|_| is_live);
            self.next.take_if(|_| is_next && !is_live);
            return;
        }
        let (reason, retired) = match outcome {
            Outcome::Stopped(reason) | Outcome::Panicked(reason) => (Some(reason), None),
            Outcome::Retired(generation) => (None, Some(generation)),
            Outcome::Shutdown => (None, None),
        };
        let stopped = reason.as_ref().map(|_| Stopped { generation, resumptions });
        // Neither: one that another has taken the place of.
        if is_live {
            self.live = None;
            self.live_stopped = stopped;
            self.live_retired = retired;
            self.untold_stop = reason;
            self.context.look.notify_one();
        } else if is_next {
            if stopped.is_none() {
                self.end_next();
            }
            self.next = None;
            self.next_stopped = stopped;
            self.untold_reason = generation.zip(reason);
        }
    }

    /// Counts a panic. Returns `true` for the first [`PANICS_MAX`] panics within [`PANICS_WITHIN`].
    fn runs_again_after_panic(&mut self) -> bool {
        let now = self.context.clock.instant();
        let is_recent = |since: &Instant| now.saturating_duration_since(*since) < PANICS_WITHIN;
        let (count, since) = self.panics.filter(|(_, since)| is_recent(since)).unwrap_or((0, now));
        self.panics = Some((count + 1, since));
        count < PANICS_MAX
    }

    /// Makes the next generation the live one as soon as it has caught up.
    async fn switch(&mut self, desired: &Desired) {
        let Some(next) = self.next.as_ref().and_then(|next| next.generation) else { return };
        let status = self.status.now().next.filter(|status| status.generation == next);
        if desired.is_paused || !status.is_some_and(|status| is_caught_up(&status)) {
            return;
        }
        let Context { database, clock, .. } = &self.context;
        let definition = self.handler.definition();
        let name = &definition.name;
        match registry::switch(database, definition, next, &**clock).await {
            Ok(Switched::Done) => {
                tracing::info!(projection = name, generation = next.0, "switched");
                self.context.look.notify_one();
            }
            Ok(Switched::Parked(streams)) => {
                let reason = format!(
                    "it is complete, but {streams} of its streams are parked: have them retried or \
                     skipped with `kafold parked`, or switch all the same with `kafold projections \
                     rebuild {name} --with-parked`"
                );
                self.report_no_switch(desired, next, reason);
            }
            Ok(Switched::Foreign { view, owner }) => {
                let now = clock.instant();
                let noticed = self.foreign.filter(|(generation, _)| *generation == next);
                let (_, since) = *self.foreign.insert(noticed.unwrap_or((next, now)));
                if now.saturating_duration_since(since) >= FOREIGN_PATIENCE {
                    let reason = format!(
                        "it is complete, but the view {view} belongs to {owner}, and no process that logs \
                         in as {owner} switches to it: start one, or give all views and tables of the read \
                         model to the login of this process (ALTER VIEW {view} OWNER TO …)"
                    );
                    self.report_no_switch(desired, next, reason);
                }
            }
            Ok(Switched::Behind | Switched::Gone) => {}
            Err(error) => match generation::dependents(&error) {
                Some(dependents) => {
                    let reason = format!(
                        "it is complete, but its columns have changed and {dependents}: drop the dependent \
                         objects, and make them again after the switch"
                    );
                    self.report_no_switch(desired, next, reason);
                }
                None => tracing::warn!(projection = name, %error, "cannot switch now"),
            },
        }
    }

    fn report_no_switch(&mut self, desired: &Desired, next: Generation, reason: String) {
        if desired.next_reason.as_ref() != Some(&reason) {
            tracing::warn!(projection = self.handler.definition().name, reason, "no switch");
            self.untold_reason = Some((next, reason));
        }
    }

    /// Writes down why something has stopped; again later when the database is away.
    async fn tell(&mut self) {
        let Context { database, clock, .. } = &self.context;
        let name = self.status.name();
        if let Some(reason) = &self.untold_stop {
            let now = clock.now();
            match registry::set_state(database, name, State::Stopped, Some(reason), now).await {
                Ok(()) => self.untold_stop = None,
                Err(error) => tracing::debug!(name, %error, "cannot write down that it stopped"),
            }
        }
        if let Some((next, reason)) = &self.untold_reason {
            match registry::set_next_reason(database, name, *next, reason).await {
                Ok(()) => self.untold_reason = None,
                Err(error) => tracing::debug!(name, %error, "cannot write down why it waits"),
            }
        }
    }

    /// Stores that the projection runs after another worker has stored that it stopped. The other worker
    /// may be of another version or read another log.
    async fn take_over_state(&mut self, desired: &Desired) {
        let status = self.status.now();
        let goes_on = status.state == ProjectionState::Running && !status.partitions.is_empty();
        if !desired.is_stopped || desired.is_reset || status.generation != desired.live || !goes_on
        {
            return;
        }
        let Context { database, clock, look, .. } = &self.context;
        let name = &status.name;
        match registry::goes_on(database, name, desired.live, clock.now()).await {
            Ok(()) => {
                tracing::info!(name, "another worker stopped, this one goes on");
                look.notify_one();
            }
            Err(error) => tracing::debug!(name, %error, "cannot store that it runs"),
        }
    }

    /// Deletes the rows of windows that are not kept any more.
    async fn expire(&mut self, live: Generation) {
        let definition = self.handler.definition();
        let Context { database, clock, .. } = &self.context;
        let (now, last) = (clock.instant(), self.expired_at);
        let is_due = last.is_none_or(|at| now.saturating_duration_since(at) >= EXPIRE_INTERVAL);
        if definition.window.is_none() || !is_due {
            return;
        }
        self.expired_at = Some(now);
        match retention::expire(database, definition, live).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(projection = definition.name, rows, "old windows deleted"),
            Err(error) => {
                tracing::debug!(projection = definition.name, %error, "old windows are left");
            }
        }
    }

    /// Drops what generations have left that are neither live nor wanted.
    async fn tidy(&mut self) {
        if !self.has_stale_tables {
            return;
        }
        match registry::drop_stale(&self.context.database, self.handler.definition()).await {
            Ok(()) => self.has_stale_tables = false,
            Err(error) => {
                tracing::debug!(projection = self.status.name(), %error, "old tables are left");
            }
        }
    }
}

fn next_is_behind(status: &ProjectionStatus) -> bool {
    let is_behind = |next: &ProjectionStatus| next.lag_records() > SWITCH_LAG_NEAR;
    status.next.as_deref().is_some_and(is_behind)
}

/// Whether it is worth a look at the tables.
fn is_caught_up(status: &ProjectionStatus) -> bool {
    status.state == ProjectionState::Running && status.lag_records() <= ATTEMPT_LAG_MAX
}

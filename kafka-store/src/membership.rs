//! A place in a consumer group, which spreads the partitions of a topic over the nodes of a service.
//!
//! The group is a hint for balance and liveness, never for safety, and nothing is ever read through
//! it: its members are told which partitions are theirs, and read them by hand, from places of our
//! own. Partitions move one by one (cooperative-sticky): what a member keeps, it keeps without a
//! pause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use kafold_core::{Clock, Partition};
use rdkafka::client::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::statistics::Statistics;
use rdkafka::topic_partition_list::{Offset as RawOffset, TopicPartitionList};
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::{mpsc, oneshot};

use crate::client::{Renewal, log};
use crate::config::KafkaConfig;
use crate::guard::{Refusals, shown};
use crate::refusal::code;
use crate::rights::{Resource, Right, Role};

/// How long the thread waits for the group at once; a leave waits as long.
const POLL: Duration = Duration::from_millis(100);
/// The same while somebody settles what is to be given up: the group waits for it.
const POLL_WHILE_SETTLING: Duration = Duration::from_millis(2);
/// What librdkafka calls a member that is neither joining nor losing anything.
const STEADY: &str = "steady";

/// What the group decided.
#[derive(Debug)]
pub(crate) enum Rebalance {
    /// These partitions are ours from now on.
    Assigned(Vec<Partition>),
    /// These partitions are to be another's: the group waits until `settled` is used or dropped.
    Revoked { partitions: Vec<Partition>, settled: oneshot::Sender<()> },
    /// The group was not heard for a session, or gave this member up: these partitions may be another's
    /// by now, or still be ours. What is assigned next says which.
    Lost(Vec<Partition>),
}

/// A member of a group; dropping it leaves the group.
pub(crate) struct Membership {
    leave: Sender<oneshot::Sender<()>>,
    state: Arc<MemberState>,
    group: String,
    /// The time at which the membership was created.
    since: DateTime<Utc>,
}

/// What others want to know of a member.
#[derive(Default)]
struct MemberState {
    /// The group has ever told this member what is its own, be it nothing.
    settled: AtomicBool,
    /// And nothing is about to change.
    steady: AtomicBool,
    /// The group has been refused since the member was last settled.
    denied: AtomicBool,
    /// What the client last complained about.
    complaint: Mutex<Option<KafkaError>>,
    /// The reason for which the member has left the group for a while.
    aside: Mutex<Option<String>>,
}

impl MemberState {
    fn aside(&self) -> MutexGuard<'_, Option<String>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    /// Joins the group which shares the partitions of `topic`. The receiver returns every decision
    /// of the group; the last decision revokes everything. `denials` receives a refusal of the
    /// group. `database` is the identity of the database with the state of the group.
    pub(crate) fn join(
        config: &KafkaConfig,
        group: &str,
        topic: String,
        database: Option<&str>,
        denials: Denials,
        clock: &dyn Clock,
    ) -> KafkaResult<(Self, mpsc::UnboundedReceiver<Rebalance>)> {
        let state = Arc::new(MemberState::default());
        let context = MemberContext { events: Mutex::default(), state: Arc::clone(&state) };
        let consumer =
            BaseConsumer::from_config_and_context(&config.member(group, database), context)?;
        consumer.subscribe(&[&topic])?;
        let (leave, asked) = channel();
        let (told, rebalances) = mpsc::unbounded_channel();
        let member = Member {
            consumer,
            renewal: Renewal::new(config),
            topic,
            told,
            heard: false,
            is_aside: false,
            settling: Vec::new(),
            denials: denials.of_group(config, group),
        };
        std::thread::Builder::new()
            .name("kafold-member".into())
            .spawn(move || member.run(&asked))
            .map_err(|error| KafkaError::ClientCreation(error.to_string()))?;
        let (group, since) = (group.to_owned(), clock.now());
        Ok((Self { leave, state, group, since }, rebalances))
    }

    /// Why it is not known yet what is this member's own, while the group has not told.
    pub(crate) fn unsettled(&self) -> Option<String> {
        if let Some(reason) = &*self.state.aside() {
            return Some(reason.clone());
        }
        if self.state.settled.load(Ordering::Acquire) {
            return None;
        }
        let complaint = self.state.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        let complaint = complaint.as_ref().map_or(String::new(), |error| format!(": {error}"));
        let (group, since) = (&self.group, shown(self.since));
        Some(format!("group {group} has not told since {since} what is to be owned{complaint}"))
    }

    /// Returns the time since which this process has been a member, known to the group or not.
    pub(crate) fn since(&self) -> DateTime<Utc> {
        self.since
    }

    /// Gives up everything and leaves the group until [`Membership::come_back`].
    pub(crate) fn step_aside(&self, reason: String) {
        *self.state.aside() = Some(reason);
    }

    /// Joins the group again.
    pub(crate) fn come_back(&self) {
        *self.state.aside() = None;
    }

    /// Gives up everything and leaves the group; returns when it has left.
    pub(crate) async fn leave(&self) {
        let (told, left) = oneshot::channel();
        // A thread that is gone has left.
        let _ = self.leave.send(told);
        let _ = left.await;
    }
}

/// Receives the refusals of a member's group.
#[derive(Clone)]
pub(crate) struct Denials {
    pub(crate) refusals: Arc<Refusals>,
    /// Members of groups that are no part of this service.
    pub(crate) strangers: Arc<Refusals>,
    /// The role of the process.
    pub(crate) role: Role,
}

impl Denials {
    pub(crate) fn new(role: Role, clock: &Arc<dyn Clock>) -> Self {
        let refusals = || Arc::new(Refusals::new(Arc::clone(clock)));
        Self { refusals: refusals(), strangers: refusals(), role }
    }

    fn of_group(self, config: &KafkaConfig, group: &str) -> GroupDenial {
        let mut rights = self.role.rights(config).into_iter();
        let right = rights.find(|right| match &right.resource {
            Resource::Group(name) => name == group,
            Resource::GroupPrefix(prefix) => group.starts_with(prefix.as_str()),
            _ => false,
        });
        let right = right.unwrap_or_else(|| Right::of_group(group));
        let complaint = right.complaint(config, self.role);
        let (what, by) = (right.to_string(), group.to_owned());
        GroupDenial { refusals: self.refusals, what, by, complaint, is_told: false }
    }
}

/// The refusal of one group.
struct GroupDenial {
    refusals: Arc<Refusals>,
    what: String,
    by: String,
    complaint: String,
    is_told: bool,
}

impl GroupDenial {
    fn follow(&mut self, is_denied: bool) {
        if is_denied {
            self.refusals.raise(&self.what, &self.by, || self.complaint.clone());
        } else if self.is_told {
            self.refusals.clear(&self.what, &self.by);
        }
        self.is_told = is_denied;
    }
}

impl Drop for GroupDenial {
    fn drop(&mut self) {
        self.follow(false);
    }
}

struct Member {
    consumer: BaseConsumer<MemberContext>,
    renewal: Renewal,
    topic: String,
    told: mpsc::UnboundedSender<Rebalance>,
    /// Whether the group has ever decided anything.
    heard: bool,
    /// `true` between [`Membership::step_aside`] and [`Membership::come_back`].
    is_aside: bool,
    /// What is to be given up, and who says when that may be.
    settling: Vec<(Vec<Partition>, oneshot::Receiver<()>)>,
    denials: GroupDenial,
}

impl Member {
    fn run(mut self, leave: &Receiver<oneshot::Sender<()>>) {
        // Who waits until the group is left; nobody, when the membership was dropped.
        let (mut leaving, mut left) = (false, None);
        while !(leaving && self.is_out()) {
            // An error says that no broker answers; the client goes on by itself.
            let wait = if self.settling.is_empty() { POLL } else { POLL_WHILE_SETTLING };
            if let Some(Err(error)) = self.consumer.poll(wait) {
                self.consumer.context().complain(error);
            }
            self.renewal.look(self.consumer.client());
            for event in self.consumer.context().take() {
                self.follow(event);
            }
            self.tell_of_nothing();
            let is_denied = self.consumer.context().state.denied.load(Ordering::Acquire);
            self.denials.follow(is_denied);
            self.give_up_settled();
            if !leaving {
                self.follow_aside();
            }
            match leave.try_recv() {
                Err(TryRecvError::Empty) => continue,
                Ok(waits) => left = Some(waits),
                Err(TryRecvError::Disconnected) => {}
            }
            if !std::mem::replace(&mut leaving, true) {
                self.consumer.unsubscribe();
            }
        }
        // Closing tells the group, and may wait for a broker: on this thread that harms nobody.
        drop(self.consumer);
        drop(left);
    }

    /// Leaves or joins the group as the state says.
    fn follow_aside(&mut self) {
        let is_aside = self.consumer.context().state.aside().is_some();
        if is_aside == self.is_aside {
            return;
        }
        match is_aside {
            true => self.consumer.unsubscribe(),
            false => {
                if let Err(error) = self.consumer.subscribe(&[&self.topic]) {
                    // The next call tries again.
                    tracing::debug!(topic = self.topic, %error, "the group was not joined again");
                    return;
                }
                // Until the group tells, be it nothing.
                self.heard = false;
                self.consumer.context().state.steady.store(false, Ordering::Release);
            }
        }
        self.is_aside = is_aside;
    }

    /// Whether nothing is held or settled any more.
    fn is_out(&self) -> bool {
        self.settling.is_empty() && self.consumer.assignment().is_ok_and(|held| held.count() == 0)
    }

    /// A group with more members than partitions gives some of them nothing, and says nothing.
    fn tell_of_nothing(&mut self) {
        if !self.heard && self.consumer.context().state.steady.load(Ordering::Acquire) {
            self.heard = true;
            let _ = self.told.send(Rebalance::Assigned(Vec::new()));
        }
    }

    fn follow(&mut self, event: Event) {
        self.heard = true;
        match event {
            Event::Assigned(partitions) => {
                if let Err(error) = self.take(&partitions) {
                    tracing::error!(topic = self.topic, %error, "the assignment was not taken");
                    return;
                }
                let _ = self.told.send(Rebalance::Assigned(partitions));
            }
            Event::Lost(partitions) => {
                self.give_up(&partitions);
                // Until the group tells once more, be it nothing.
                self.heard = false;
                self.consumer.context().state.steady.store(false, Ordering::Release);
                let _ = self.told.send(Rebalance::Lost(partitions));
            }
            Event::Revoked(partitions) => {
                let (settled, settling) = oneshot::channel();
                let revoked = Rebalance::Revoked { partitions: partitions.clone(), settled };
                match self.told.send(revoked) {
                    Ok(()) => self.settling.push((partitions, settling)),
                    Err(_) => self.give_up(&partitions),
                }
            }
        }
    }

    /// Accepts the partitions without ever fetching from them.
    fn take(&self, partitions: &[Partition]) -> KafkaResult<()> {
        let mut list = self.list(partitions);
        list.set_all_offsets(RawOffset::End)?;
        self.consumer.incremental_assign(&list)?;
        self.consumer.pause(&list)
    }

    fn give_up_settled(&mut self) {
        let mut open = std::mem::take(&mut self.settling);
        open.retain_mut(|(partitions, settled)| {
            let waits = matches!(settled.try_recv(), Err(oneshot::error::TryRecvError::Empty));
            if !waits {
                self.give_up(partitions);
            }
            waits
        });
        self.settling = open;
    }

    fn give_up(&self, partitions: &[Partition]) {
        if let Err(error) = self.consumer.incremental_unassign(&self.list(partitions)) {
            tracing::debug!(topic = self.topic, %error, "what was revoked is gone already");
        }
    }

    fn list(&self, partitions: &[Partition]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition(&self.topic, crate::client::raw_partition(*partition));
        }
        list
    }
}

enum Event {
    Assigned(Vec<Partition>),
    Revoked(Vec<Partition>),
    Lost(Vec<Partition>),
}

/// Keeps what the group decides until the thread has left the client's callback: only then may it
/// wait for others.
struct MemberContext {
    events: Mutex<Vec<Event>>,
    state: Arc<MemberState>,
}

impl MemberContext {
    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn complain(&self, error: KafkaError) {
        tracing::debug!(%error, "group member");
        if code(&error) == Some(RDKafkaErrorCode::GroupAuthorizationFailed) {
            self.state.denied.store(true, Ordering::Release);
        }
        *self.state.complaint.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

impl ClientContext for MemberContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log(level, facility, message);
    }

    fn stats(&self, statistics: Statistics) {
        let steady = statistics.cgrp.is_some_and(|group| group.join_state == STEADY);
        self.state.steady.store(steady, Ordering::Release);
        self.state.settled.fetch_or(steady, Ordering::AcqRel);
        if steady {
            self.state.denied.store(false, Ordering::Release);
        }
    }

    fn error(&self, error: KafkaError, _: &str) {
        self.complain(error);
    }
}

impl ConsumerContext for MemberContext {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        what: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let of = |raw: i32| Partition(u32::try_from(raw).unwrap_or(u32::MAX));
        let partitions = list.elements().iter().map(|element| of(element.partition())).collect();
        let event = match what {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => Event::Assigned(partitions),
            _ if consumer.assignment_lost() => Event::Lost(partitions),
            _ => Event::Revoked(partitions),
        };
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

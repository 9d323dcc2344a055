//! A bus between two nodes, a clock that a test moves, and counters that it reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use kafold_core::clock::{Clock, RandomIds, SystemClock};
use kafold_core::handler::HandlerConfig;
use kafold_core::{
    AppendError, CommandBus, CommandExecutor, CommandHandler, ForwardedCommand, Reply, StreamId,
};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, SharedString, Unit};
use tokio::sync::watch;

use crate::handler::domain::Accounts;
use crate::handler::scripted::ScriptedStore;

/// What becomes of a command on the wire.
pub(crate) enum Delivery {
    /// It is carried to the other node.
    Carry,
    /// It comes to this and nothing else.
    Answer(Result<Reply, AppendError>),
    /// It is carried to the other node, but the reply is lost.
    LoseReply,
    /// Nobody ever answers.
    Swallow,
}

#[derive(Default)]
struct End {
    is_local: bool,
    /// The category of the commands.
    category: &'static str,
    /// The node at the other end.
    peer: Option<Wire>,
    executor: Option<Arc<dyn CommandExecutor>>,
    deliveries: VecDeque<Delivery>,
    called: Vec<ForwardedCommand>,
    sent: Vec<ForwardedCommand>,
}

/// One node's end of a wire.
#[derive(Clone)]
pub(crate) struct Wire(Arc<Mutex<End>>);

impl Wire {
    /// Returns the two ends of a wire. The node at the first end owns no stream, the other node owns each.
    pub(crate) fn pair(category: &'static str) -> (Self, Self) {
        let end = |is_local, peer| {
            Self(Arc::new(Mutex::new(End { is_local, category, peer, ..End::default() })))
        };
        let far = end(true, None);
        (end(false, Some(far.clone())), far)
    }

    fn end(&self) -> MutexGuard<'_, End> {
        self.0.lock().expect("no test panics under this lock")
    }

    pub(crate) fn set_local(&self, is_local: bool) {
        self.end().is_local = is_local;
    }

    pub(crate) fn on_delivery(&self, deliveries: impl IntoIterator<Item = Delivery>) {
        self.end().deliveries.extend(deliveries);
    }

    pub(crate) fn called(&self) -> Vec<ForwardedCommand> {
        self.end().called.clone()
    }

    pub(crate) fn sent(&self) -> Vec<ForwardedCommand> {
        self.end().sent.clone()
    }

    /// What this node has registered.
    pub(crate) fn executor(&self) -> Arc<dyn CommandExecutor> {
        self.end().executor.clone().expect("the handler has registered")
    }
}

impl CommandBus for Wire {
    fn is_local(&self, _: &StreamId) -> bool {
        self.end().is_local
    }

    fn call(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<Reply, AppendError>> {
        let mut end = self.end();
        end.called.push(command.clone());
        let peer = end.peer.clone();
        let carried = async move {
            let executor = peer.expect("there is another end").executor();
            executor.execute(&command, in_ten_seconds()).await.map(|reply| over_the_wire(&reply))
        };
        match end.deliveries.pop_front().unwrap_or(Delivery::Carry) {
            Delivery::Carry => carried.boxed(),
            Delivery::Answer(answer) => async { answer.map(|reply| over_the_wire(&reply)) }.boxed(),
            Delivery::LoseReply => {
                let command_id = end.called.last().expect("was pushed").command_id;
                let lost = AppendError::OutcomeUnknown { command_id };
                async move { carried.await.and(Err(lost)) }.boxed()
            }
            Delivery::Swallow => std::future::pending().boxed(),
        }
    }

    fn send(&self, command: ForwardedCommand) -> BoxFuture<'static, Result<(), AppendError>> {
        let mut end = self.end();
        end.sent.push(command);
        match end.deliveries.pop_front().unwrap_or(Delivery::Carry) {
            Delivery::Answer(answer) => async { answer.map(drop) }.boxed(),
            Delivery::Swallow => std::future::pending().boxed(),
            Delivery::Carry | Delivery::LoseReply => async { Ok(()) }.boxed(),
        }
    }

    fn serve(&self, category: &'static str, executor: &Arc<dyn CommandExecutor>) {
        let mut end = self.end();
        assert_eq!(category, end.category);
        end.executor = Some(Arc::clone(executor));
    }
}

/// As JSON, like every reply between two processes.
fn over_the_wire(reply: &Reply) -> Reply {
    let json = serde_json::to_string(reply).expect("is JSON");
    serde_json::from_str(&json).expect("was written so")
}

pub(crate) fn in_ten_seconds() -> Instant {
    SystemClock.instant() + Duration::from_secs(10)
}

/// One node of a service.
pub(crate) struct Node {
    pub(crate) store: ScriptedStore,
    pub(crate) wire: Wire,
    pub(crate) accounts: Accounts,
}

/// Two nodes on one log: the first sends its commands to the second, which owns every stream.
pub(crate) fn nodes() -> (Node, Node) {
    nodes_with(HandlerConfig::default(), Arc::new(SystemClock))
}

pub(crate) fn nodes_with(mut config: HandlerConfig, clock: Arc<dyn Clock>) -> (Node, Node) {
    config.backoff_base = Duration::from_millis(1);
    let store = ScriptedStore::default();
    let (near, far) = Wire::pair("account");
    let node = |store: ScriptedStore, wire: Wire, clock| {
        let accounts =
            CommandHandler::with_parts(Arc::new(store.clone()), clock, Arc::new(RandomIds))
                .config(config.clone())
                .forwarding(Some(Arc::new(wire.clone())));
        Node { store, wire, accounts }
    };
    (node(store.beside(), near, Arc::clone(&clock)), node(store, far, clock))
}

/// A clock that stands until it is moved.
pub(crate) struct ManualClock {
    started: Instant,
    passed: watch::Sender<Duration>,
}

impl Default for ManualClock {
    fn default() -> Self {
        Self { started: SystemClock.instant(), passed: watch::Sender::new(Duration::ZERO) }
    }
}

impl ManualClock {
    pub(crate) fn advance(&self, duration: Duration) {
        self.passed.send_modify(|passed| *passed += duration);
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::from_std(*self.passed.borrow()).expect("is short")
    }

    fn instant(&self) -> Instant {
        self.started + *self.passed.borrow()
    }

    async fn sleep(&self, duration: Duration) {
        let mut passed = self.passed.subscribe();
        let until = *passed.borrow() + duration;
        passed.wait_for(|passed| *passed >= until).await.expect("the clock is still there");
    }
}

/// Every counter of a thread, by name and labels.
#[derive(Default)]
pub(crate) struct Counters(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

impl Counters {
    /// The counters of this name, such as `appended=2`.
    pub(crate) fn by_outcome(&self, name: &str) -> Vec<String> {
        let counters = self.0.lock().expect("no test panics under this lock");
        let of_name = counters.iter().filter_map(|(key, count)| {
            let outcome = key.strip_prefix(name)?.strip_prefix(' ')?;
            Some(format!("{outcome}={}", count.load(Ordering::SeqCst)))
        });
        of_name.collect()
    }
}

impl metrics::Recorder for Counters {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let label = |name: &str| {
            let found = key.labels().find(|label| label.key() == name);
            found.map_or("", |label| label.value()).to_owned()
        };
        assert_eq!(label("category"), "account", "{key}");
        let name = format!("{} {}", key.name(), label("outcome"));
        let mut counters = self.0.lock().expect("no test panics under this lock");
        Counter::from_arc(Arc::clone(counters.entry(name).or_default()))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

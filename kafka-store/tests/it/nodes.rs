//! Several nodes on one log: who owns what, and commands that arrive anywhere.

use crate::support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::forward::Node;
use kafold_core::handler::Request;
use kafold_core::index::{Advanced, IndexBatch, IndexCount, IndexHeads, IndexLoad, IndexRead};
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Appended, Cursor, Health};
use kafold_core::testing::{eventually, new_command, read_gapless};
use kafold_core::{
    Aggregate, AppendError, Clock, CommandExecutor, CommandHandler, CommandId, DomainEvent,
    EventSource, EventStore, ExpectedVersion, ForwardedCommand, HandleError, IdGenerator, Offset,
    Partition, ReadError, Reply, StreamId, StreamIndex, Version,
};
use kafold_kafka_store::{KafkaConfig, KafkaStore, OpenError, Operator};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, DomainEvent, Serialize, Deserialize)]
enum TallyEvent {
    #[event("tally.added")]
    Added { amount: u64 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum TallyCommand {
    Add {
        amount: u64,
    },
    /// Takes a second, is counted, and adds one.
    AddCounted,
    /// Takes until it is let go, and adds one.
    AddHeld,
}

#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[error("{sum} and {amount} are more than {LIMIT}")]
struct OverLimit {
    sum: u64,
    amount: u64,
}

const LIMIT: u64 = 1_000;

/// Each for one test.
static COUNTED: AtomicUsize = AtomicUsize::new(0);
static LET_GO: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Clone, Default)]
struct Tally {
    sum: u64,
}

impl Aggregate for Tally {
    const CATEGORY: &'static str = "tally";
    type Command = TallyCommand;
    type Event = TallyEvent;
    type Error = OverLimit;

    #[expect(clippy::disallowed_methods, reason = "what a slow decision does to others is tested")]
    fn decide(&self, command: &TallyCommand) -> Result<Vec<TallyEvent>, OverLimit> {
        let amount = match *command {
            TallyCommand::Add { amount } => amount,
            TallyCommand::AddCounted => {
                COUNTED.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_secs(1));
                1
            }
            TallyCommand::AddHeld => {
                while !LET_GO.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                1
            }
        };
        match self.sum + amount {
            sum if sum > LIMIT => Err(OverLimit { sum: self.sum, amount }),
            _ => Ok(vec![TallyEvent::Added { amount }]),
        }
    }

    fn evolve(&mut self, event: &TallyEvent) {
        let TallyEvent::Added { amount } = event;
        self.sum += amount;
    }
}

/// Sessions that end soon, so that tests do.
const FAST: &str = "librdkafka.session.timeout.ms=1500&librdkafka.heartbeat.interval.ms=200";

fn config(brokers: &str, name: &str, partitions: u32) -> KafkaConfig {
    let options = format!("partitions={partitions}&{FAST}");
    support::config(brokers, &support::new_name(name), &options)
}

struct TestNode {
    store: Arc<KafkaStore>,
    tallies: CommandHandler<Tally>,
}

impl TestNode {
    async fn start(config: &KafkaConfig, index: &Arc<MemoryIndex>, name: &str) -> Self {
        let index: Arc<dyn StreamIndex> = index.clone();
        let store = Arc::new(support::open_with(config.clone(), index, name).await);
        let tallies = CommandHandler::new(store.clone()).forwarding(Some(store.commands()));
        Self { store, tallies }
    }

    fn owned(&self) -> BTreeMap<u32, u32> {
        let this = self.store.nodes().swap_remove(0);
        this.partitions.iter().map(|owned| (owned.partition.0, owned.epoch)).collect()
    }

    async fn add(&self, id: &str, amount: u64, command: CommandId) -> Result<u64, Outcome> {
        let command_of = TallyCommand::Add { amount };
        let handled = self.tallies.handle_with(id, &command_of, command).await?;
        Ok(handled.version.0)
    }

    /// Sends the same command until it is settled.
    async fn add_persistently(&self, id: &str, command: CommandId) -> u64 {
        let deadline = SystemClock.instant() + support::WAIT_MAX;
        loop {
            match self.add(id, 1, command).await {
                Ok(version) => return version,
                Err(error) => assert!(SystemClock.instant() < deadline, "not settled: {error}"),
            }
            support::pause().await;
        }
    }
}

type Outcome = HandleError<OverLimit>;

/// Waits until the nodes together own every partition, and no two the same.
async fn shared(nodes: &[&TestNode], partitions: usize) {
    support::until("every partition has one owner", || {
        let mut owners: BTreeMap<u32, usize> = BTreeMap::new();
        for node in nodes {
            node.owned().into_keys().for_each(|p| *owners.entry(p).or_default() += 1);
            if let Health::NotReady(why) = node.store.health() {
                return Err(why.join("; "));
            }
        }
        let least = nodes.iter().map(|node| node.owned().len()).min().unwrap_or_default();
        let fair = least >= partitions / nodes.len();
        match owners.len() == partitions && owners.values().all(|count| *count == 1) && fair {
            true => Ok(()),
            false => Err(format!("{owners:?}")),
        }
    })
    .await;
}

fn stream(id: &str) -> StreamId {
    StreamId::new(Tally::CATEGORY, id).expect("valid")
}

/// An id whose stream is owned by the first node and not by the second.
fn id_of(owner: &TestNode, other: &TestNode) -> String {
    let owned = |node: &TestNode, id: &str| node.store.commands().is_local(&stream(id));
    let mut ids = (0..10_000).map(|n| format!("s{n}"));
    ids.find(|id| owned(owner, id) && !owned(other, id)).expect("it owns a partition")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_added_takes_only_what_must_move() {
    let Some(brokers) = support::brokers("a_node_that_is_added") else { return };
    let (config, index) = (config(&brokers, "added", 12), Arc::new(MemoryIndex::new()));
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    let three = TestNode::start(&config, &index, "three").await;
    shared(&[&one, &two, &three], 12).await;
    let before = [one.owned(), two.owned(), three.owned()];
    assert!(before.iter().all(|owned| owned.len() == 4), "{before:?}");

    let four = TestNode::start(&config, &index, "four").await;
    shared(&[&one, &two, &three, &four], 12).await;
    for (node, before) in [&one, &two, &three].into_iter().zip(&before) {
        let now = node.owned();
        assert_eq!(now.len(), 3, "{now:?}");
        for (partition, epoch) in now {
            assert_eq!(
                before.get(&partition),
                Some(&epoch),
                "{partition} was kept, and not claimed again"
            );
        }
    }
    support::until("every node knows of all", || {
        let known = |node: &TestNode| {
            let mut names: Vec<_> =
                node.store.nodes().into_iter().map(|Node { owner, .. }| owner.name).collect();
            names.sort();
            names
        };
        let expected = ["four", "one", "three", "two"];
        match [&one, &two, &three, &four].iter().all(|node| known(node) == expected) {
            true => Ok(()),
            false => Err(format!("{:?}", known(&one))),
        }
    })
    .await;
    support::until("every node knows who owns what", || {
        match one.store.nodes().iter().map(|node| node.partitions.len()).sum::<usize>() {
            12 => Ok(()),
            owned => Err(format!("{owned} partitions have an owner")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_answers_as_the_owner_would() {
    let Some(brokers) = support::brokers("any_node_answers") else { return };
    let (config, index) = (config(&brokers, "any", 4), Arc::new(MemoryIndex::new()));
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    shared(&[&one, &two], 4).await;
    let id = id_of(&one, &two);
    let first = new_command();
    assert_eq!(two.add(&id, 5, first).await.expect("forwarded"), 1);
    assert_eq!(one.add(&id, 5, first).await.expect("known"), 1, "the same command here");
    assert_eq!(two.add(&id, 5, first).await.expect("known"), 1, "and there again");
    assert_eq!(one.add(&id, 7, new_command()).await.expect("decided here"), 2);

    let refused = OverLimit { sum: 12, amount: 2_000 };
    for node in [&one, &two] {
        match node.add(&id, 2_000, new_command()).await {
            Err(HandleError::Rejected(error)) => assert_eq!(error, refused),
            other => panic!("{other:?}"),
        }
        let expected = ExpectedVersion::Exact(Version(1));
        let request = Request { expected, ..Request::default() };
        let add = TallyCommand::Add { amount: 1 };
        match node.tallies.handle_with(&id, &add, request).await {
            Err(HandleError::Conflict { expected: told, actual, .. }) => {
                assert_eq!((told, actual), (expected, Version(2)));
            }
            other => panic!("{other:?}"),
        }
    }
    read_gapless(&*one.store, &stream(&id), 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_from_all_nodes_to_one_stream_are_applied_once_each() {
    let Some(brokers) = support::brokers("commands_from_all_nodes") else { return };
    let (config, index) = (config(&brokers, "all", 3), Arc::new(MemoryIndex::new()));
    let one = Arc::new(TestNode::start(&config, &index, "one").await);
    let two = Arc::new(TestNode::start(&config, &index, "two").await);
    shared(&[&one, &two], 3).await;
    let mut adding = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let command = new_command();
        // Each is sent by both nodes at once: two copies, one effect.
        for node in [&one, &two] {
            let node = Arc::clone(node);
            adding.spawn(async move { node.add_persistently("hot", command).await });
        }
    }
    let mut versions = adding.join_all().await;
    versions.sort_unstable();
    let expected: Vec<u64> = (1..=100).flat_map(|version| [version, version]).collect();
    assert_eq!(versions, expected);
    let owner = if one.store.commands().is_local(&stream("hot")) { &one } else { &two };
    read_gapless(&*owner.store, &stream("hot"), 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_command_does_not_hold_up_other_streams() {
    let Some(brokers) = support::brokers("a_slow_command") else { return };
    let (config, index) = (config(&brokers, "slow", 2), Arc::new(MemoryIndex::new()));
    let one = Arc::new(TestNode::start(&config, &index, "one").await);
    let two = Arc::new(TestNode::start(&config, &index, "two").await);
    shared(&[&one, &two], 2).await;
    let slow = id_of(&one, &two);
    // With two partitions, whatever the second node does not own is in the slow one's.
    let other =
        (0..).map(|n| format!("o{n}")).find(|id| !two.store.commands().is_local(&stream(id)));
    let other = other.expect("one of many");
    let slowly = {
        let two = Arc::clone(&two);
        tokio::spawn(async move { two.tallies.handle(&slow, &TallyCommand::AddHeld).await })
    };
    for version in 1..=20 {
        let added = two.add(&other, 1, new_command()).await;
        // Before anything fails: a thread that is held would hold the test for ever.
        LET_GO.fetch_or(added.is_err() || version == 20, Ordering::SeqCst);
        assert_eq!(added.expect("not held up"), version);
    }
    assert_eq!(slowly.await.expect("no panic").expect("handled").version, Version(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_begun_before_a_graceful_stop_is_answered_by_it() {
    let Some(brokers) = support::brokers("what_was_begun") else { return };
    let (config, index) = (config(&brokers, "begun", 2), Arc::new(MemoryIndex::new()));
    let one = TestNode::start(&config, &index, "one").await;
    let two = Arc::new(TestNode::start(&config, &index, "two").await);
    shared(&[&one, &two], 2).await;
    let id = id_of(&one, &two);
    let slowly = {
        let (two, id) = (Arc::clone(&two), id.clone());
        tokio::spawn(async move { two.tallies.handle(&id, &TallyCommand::AddCounted).await })
    };
    support::until("it is begun", || match COUNTED.load(Ordering::SeqCst) {
        0 => Err("not yet".into()),
        _ => Ok(()),
    })
    .await;
    one.store.shutdown().await;
    let handled = slowly.await.expect("no panic").expect("answered");
    assert_eq!(handled.version, Version(1));
    assert_eq!(COUNTED.load(Ordering::SeqCst), 1, "decided once, by the node that had begun it");
    shared(&[&two], 2).await;
    read_gapless(&*two.store, &stream(&id), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sent_command_is_handled_by_whoever_owns_its_stream() {
    let Some(brokers) = support::brokers("a_sent_command") else { return };
    let (config, index) = (config(&brokers, "sent", 2), Arc::new(MemoryIndex::new()));
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    shared(&[&one, &two], 2).await;
    for id in [id_of(&one, &two), id_of(&two, &one)] {
        let command = new_command();
        for _ in 0..2 {
            two.tallies
                .send_with(&id, &TallyCommand::Add { amount: 3 }, command)
                .await
                .expect("written");
        }
        // Nobody hears of the rejection; what comes behind it is handled.
        let too_much = TallyCommand::Add { amount: 5_000 };
        two.tallies.send(&id, &too_much).await.expect("written");
        two.tallies.send(&id, &TallyCommand::Add { amount: 4 }).await.expect("written");
        let owner = if one.store.commands().is_local(&stream(&id)) { &one } else { &two };
        let deadline = SystemClock.instant() + support::WAIT_MAX;
        while owner
            .tallies
            .handle_with(&id, &TallyCommand::Add { amount: 0 }, command)
            .await
            .expect("known")
            .version
            != Version(1)
            || read_all(&owner.store, &id).await < 2
        {
            assert!(SystemClock.instant() < deadline, "not handled");
            support::pause().await;
        }
        assert_eq!(read_all(&owner.store, &id).await, 2, "each once, the rejected one not");
    }
}

async fn read_all(store: &KafkaStore, id: &str) -> usize {
    use futures_util::TryStreamExt;
    let events: Vec<_> =
        store.read(&stream(id), Version::EMPTY).try_collect().await.expect("readable");
    events.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_node_leaves_the_others_take_over_and_nothing_is_lost() {
    let Some(brokers) = support::brokers("when_a_node_leaves") else { return };
    let (config, index) = (config(&brokers, "leave", 6), Arc::new(MemoryIndex::new()));
    let mut nodes = Vec::new();
    for name in ["one", "two", "three"] {
        nodes.push(Arc::new(TestNode::start(&config, &index, name).await));
    }
    shared(&nodes.iter().map(|node| &**node).collect::<Vec<_>>(), 6).await;
    let staying = Arc::clone(&nodes[0]);
    let leaver = nodes.pop().expect("three nodes");
    let adding = {
        let node = Arc::clone(&staying);
        tokio::spawn(async move {
            let mut answered = Vec::new();
            for round in 1..=40 {
                for id in 0..10 {
                    let id = format!("l{id}");
                    let (add, command) = (TallyCommand::Add { amount: 1 }, new_command());
                    // A graceful leave is no error for anybody.
                    let handled = node.tallies.handle_with(&id, &add, command).await;
                    answered.push((id, handled.map(|handled| handled.version.0), round));
                }
            }
            answered
        })
    };
    leaver.store.shutdown().await;
    let answered = adding.await.expect("no panic");
    for (id, version, round) in answered {
        assert_eq!(version.expect("answered"), round, "{id}");
    }
    shared(&[&staying, &nodes[1]], 6).await;
    for id in 0..10 {
        let id = stream(&format!("l{id}"));
        let local = |node: &TestNode| node.store.commands().is_local(&id);
        let owner = nodes.iter().find(|node| local(node)).expect("somebody owns it");
        read_gapless(&*owner.store, &id, 40).await;
    }
}

/// Counts how often each command is executed on a node, and rejects them all.
#[derive(Default)]
struct Rejecting {
    seen: Mutex<BTreeMap<CommandId, usize>>,
}

#[async_trait]
impl CommandExecutor for Rejecting {
    async fn execute(&self, command: &ForwardedCommand, _: Instant) -> Result<Reply, AppendError> {
        *self.seen.lock().expect("no panic").entry(command.command_id).or_default() += 1;
        let error = serde_json::value::to_raw_value("no").expect("JSON");
        Ok(Reply::Rejected { error })
    }
}

fn forwarded(id: &str, deadline: Duration) -> ForwardedCommand {
    ForwardedCommand {
        stream: StreamId::new("spied", id).expect("valid"),
        command_id: new_command(),
        payload: (*b"{}").into(),
        expected: ExpectedVersion::Any,
        correlation_id: None,
        causation_id: None,
        trace_parent: None,
        deadline: SystemClock.now() + deadline,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_never_decided_again_by_the_next_owner() {
    let Some(brokers) = support::brokers("what_was_answered") else { return };
    let config = config(&brokers, "again", 1);
    let index: Arc<MemoryIndex> = Arc::new(MemoryIndex::new());
    let first = TestNode::start(&config, &index, "first").await;
    support::ready(&first.store).await;
    let second = TestNode::start(&config, &index, "second").await;
    let spies = [Arc::new(Rejecting::default()), Arc::new(Rejecting::default())];
    let executors = spies.clone().map(|spy| -> Arc<dyn CommandExecutor> { spy });
    first.store.commands().serve("spied", &executors[0]);
    second.store.commands().serve("spied", &executors[1]);
    let mut answered = Vec::new();
    for id in 0..20 {
        let command = forwarded(&id.to_string(), Duration::from_secs(10));
        answered.push(command.command_id);
        let reply = second.store.commands().call(command).await.expect("an answer");
        assert!(matches!(reply, Reply::Rejected { .. }), "{reply:?}");
    }
    // It does not stop, it is gone: what it knew beside the log is lost.
    drop(first);
    support::until("the second node owns the partition", || match second.owned().len() {
        1 => Ok(()),
        _ => Err(format!("{:?}", second.store.health())),
    })
    .await;
    // A command behind them all: when it is answered, whatever was to be decided again has been.
    let last = forwarded("last", Duration::from_secs(10));
    second.store.commands().call(last).await.expect("an answer");
    let seen = spies[1].seen.lock().expect("no panic").clone();
    assert!(answered.iter().all(|id| !seen.contains_key(id)), "decided twice: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_answered_in_time_whoever_is_slow_before_it() {
    let Some(brokers) = support::brokers("a_command_is_answered_in_time") else { return };
    let mut config = config(&brokers, "bound", 1);
    config.limits.forwarded_bound = Duration::from_millis(400);
    let index = Arc::new(MemoryIndex::new());
    let node = TestNode::start(&config, &index, "one").await;
    support::ready(&node.store).await;
    // Nobody knows the category: it is tried until the bound, then settled. An owner before this one
    // might have known it, but only of what was there before this one came.
    let reply = node.store.commands().call(forwarded("1", Duration::from_secs(20))).await;
    assert!(matches!(reply, Ok(Reply::OutcomeUnknown)), "{reply:?}");
    let reply = node.store.commands().call(forwarded("2", Duration::from_secs(20))).await;
    assert!(matches!(reply, Ok(Reply::Unavailable { .. })), "{reply:?}");
    // What comes behind it is not held up for ever.
    assert_eq!(node.add("a", 1, new_command()).await.expect("handled"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_past_its_deadline_is_not_executed() {
    let Some(brokers) = support::brokers("a_command_past_its_deadline") else { return };
    let config = config(&brokers, "expired", 1);
    let node = TestNode::start(&config, &Arc::new(MemoryIndex::new()), "one").await;
    support::ready(&node.store).await;
    let add = |deadline| ForwardedCommand {
        stream: stream("e"),
        payload: (*br#"{"Add":{"amount":1}}"#).into(),
        ..forwarded("e", deadline)
    };
    let bus = node.store.commands();
    bus.send(add(Duration::ZERO)).await.expect("written down");
    let reply = bus.call(add(Duration::from_secs(20))).await;
    assert!(
        matches!(reply, Ok(Reply::Handled(handled)) if handled.version == Version(1)),
        "{reply:?}"
    );
    assert_eq!(read_all(&node.store, "e").await, 1, "the one before it came too late");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_a_node_are_bounded() {
    let Some(brokers) = support::brokers("calls_of_a_node_are_bounded") else { return };
    let mut config = config(&brokers, "calls", 1);
    config.limits.calls_max = 2;
    config.limits.forwarded_bound = Duration::from_millis(500);
    let node = TestNode::start(&config, &Arc::new(MemoryIndex::new()), "one").await;
    support::ready(&node.store).await;
    let bus = node.store.commands();
    let calls = [
        bus.call(forwarded("1", Duration::from_secs(20))),
        bus.call(forwarded("2", Duration::from_secs(20))),
        bus.call(forwarded("3", Duration::from_secs(20))),
    ];
    let [one, two, three] = calls;
    match three.await {
        Err(AppendError::Unavailable { cause, .. }) => {
            assert!(cause.to_string().contains("2 commands wait"), "{cause}");
        }
        other => panic!("{other:?}"),
    }
    assert!(one.await.is_ok() && two.await.is_ok());
    assert!(bus.call(forwarded("4", Duration::from_secs(20))).await.is_ok(), "there is room again");
    let mut large = forwarded("5", Duration::from_secs(20));
    large.payload = vec![b' '; 2 << 20].into();
    let refused = bus.call(large).await;
    assert!(matches!(refused, Err(AppendError::TooLarge { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_limit_of_commands_is_taken_over() {
    let Some(brokers) = support::brokers("a_changed_limit_of_commands") else { return };
    let mut config = config(&brokers, "climit", 1);
    config.limits.forwarded_bound = Duration::from_millis(500);
    let node = TestNode::start(&config, &Arc::new(MemoryIndex::new()), "one").await;
    support::ready(&node.store).await;
    let bus = node.store.commands();
    let sized = |bytes: usize| {
        // Random digits, which compression leaves large.
        let digits = std::iter::repeat_with(|| format!("{:016x}", RandomIds.random()));
        let payload: String = digits.take(bytes / 16).collect();
        let id = RandomIds.event_id().to_string();
        let mut command = forwarded(&id, Duration::from_secs(20));
        command.payload = format!("\"{payload}\"").into_bytes().into();
        bus.call(command)
    };
    let topic = format!("{}.commands", config.name);
    let limit = async |bytes: &str| {
        let alter =
            AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("max.message.bytes", bytes);
        let altered = support::admin(&brokers).alter_configs([&alter], &AdminOptions::new()).await;
        assert!(altered.expect("altered").iter().all(Result::is_ok));
    };
    assert!(sized(100_000).await.is_ok());
    limit("50000").await;
    eventually("the lower limit is known", async || {
        matches!(sized(100_000).await, Err(AppendError::TooLarge { limit: 50_000, .. }))
    })
    .await;
    // Together they are larger than a record may be.
    let together = futures_util::future::join_all((0..100).map(|_| sized(10_000))).await;
    assert!(together.iter().all(Result::is_ok), "{together:?}");
    limit("2000000").await;
    eventually("the higher limit is known", async || sized(1_500_000).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_that_fight_for_every_partition_lose_and_double_nothing() {
    let Some(brokers) = support::brokers("two_nodes_that_fight") else { return };
    let mut config = support::contender(&config(&brokers, "fight", 2));
    config.limits.yield_backoff = Duration::from_millis(60);
    config.limits.yield_backoff_max = Duration::from_millis(250);
    // No group and no forwarding: each believes in itself and in its own index.
    let open = async |name| {
        let store = support::open_with(config.clone(), Arc::new(MemoryIndex::new()), name).await;
        let store = Arc::new(store);
        (CommandHandler::<Tally>::new(store.clone()), store)
    };
    let (one, two) = (open("one").await, open("two").await);
    let mut adding = tokio::task::JoinSet::new();
    for n in 0..60 {
        let (handlers, id) = ([one.0.clone(), two.0.clone()], format!("f{}", n % 4));
        adding.spawn(async move {
            let (add, command) = (TallyCommand::Add { amount: 1 }, new_command());
            let deadline = SystemClock.instant() + support::WAIT_MAX;
            // A client that asks the two in turn, always with the same id.
            for handler in handlers.iter().cycle() {
                match handler.handle_with(&id, &add, command).await {
                    Ok(handled) => return (id, handled.version.0),
                    Err(HandleError::Rejected(error)) => panic!("stale: {error}"),
                    Err(error) => assert!(SystemClock.instant() < deadline, "not settled: {error}"),
                }
                support::pause().await;
            }
            unreachable!("a cycle does not end")
        });
    }
    let mut versions: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for (id, version) in adding.join_all().await {
        versions.entry(id).or_default().push(version);
    }
    for (id, mut versions) in versions {
        versions.sort_unstable();
        assert_eq!(versions, (1..=15).collect::<Vec<_>>(), "stream {id}");
    }
    drop((one, two));
    let store = support::open(config, "reader").await;
    for id in 0..4 {
        read_gapless(&store, &stream(&format!("f{id}")), 15).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_of_another_partition_count_are_refused() {
    let Some(brokers) = support::brokers("topics_of_another_partition_count") else { return };
    let name = support::new_name("beside");
    support::create_topic(&brokers, &format!("{name}.commands"), 3, &[]).await;
    let config = support::config(&brokers, &name, "partitions=2");
    let open = |config| {
        let index = Arc::new(MemoryIndex::new());
        KafkaStore::open(config, index, support::owner("x"), support::clock(), Arc::new(RandomIds))
    };
    support::until_refused(config, open, &[".commands", "partitions=3", "has 2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_another_format_or_partition_count_is_refused_by_name() {
    let Some(brokers) = support::brokers("a_node_of_another_format") else { return };
    let config = config(&brokers, "other", 1);
    let node = TestNode::start(&config, &Arc::new(MemoryIndex::new()), "one").await;
    support::ready(&node.store).await;
    let announce = |formats: &str, partitions: u32| {
        let json = format!(
            r#"{{"formats":{formats},"log_partitions":{partitions},"leaving":false,
                 "id":"00000000-0000-0000-0000-00000000000f","name":"stranger","address":"there",
                 "started_at":"2026-01-01T00:00:00Z","partitions":[]}}"#
        );
        let mut header = vec![1, 2];
        header.extend([0; 24]);
        support::produce_value(&brokers, &config.replies_topic(), &[("kr", &header)], &json);
    };
    let open = |config| {
        let index = Arc::new(MemoryIndex::new());
        KafkaStore::open(config, index, support::owner("x"), support::clock(), Arc::new(RandomIds))
    };
    announce("[2,1]", 1);
    support::until_refused(config.clone(), open, &["stranger", "formats 2.1", "stop all nodes"])
        .await;
    announce("[1,1]", 5);
    support::until_refused(config.clone(), open, &["stranger", "5 partitions"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commands_topic_made_anew_is_refused_by_name_and_begun_anew_on_demand() {
    let Some(brokers) = support::brokers("a_commands_topic_made_anew") else { return };
    let (mut config, index) = (config(&brokers, "anew", 2), Arc::new(MemoryIndex::new()));
    config.limits.low_end_patience = Duration::from_millis(100);
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    shared(&[&one, &two], 2).await;
    let (of_one, of_two) = (id_of(&one, &two), id_of(&two, &one));
    let applied = new_command();
    for _ in 0..5 {
        two.add(&of_one, 1, new_command()).await.expect("forwarded");
        one.add(&of_two, 1, new_command()).await.expect("forwarded");
    }
    assert_eq!(two.add(&of_one, 1, applied).await.expect("forwarded"), 6);
    one.store.shutdown().await;
    two.store.shutdown().await;
    drop((one, two));

    let topic = config.commands_topic();
    support::delete_topic(&brokers, &topic).await;
    let refusing = TestNode::start(&config, &index, "refusing").await;
    let words = ["are not handled", &topic, "ends at 0", "read up to", "?commands=begin_anew"];
    support::until("the lost commands are told by name", || match refusing.store.health() {
        Health::NotReady(why) if words.iter().all(|word| why.iter().all(|w| w.contains(word))) => {
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .await;
    refusing.store.shutdown().await;
    drop(refusing);

    config.begin_commands_anew = true;
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    shared(&[&one, &two], 2).await;
    let (of_first, owner, other) = match one.store.commands().is_local(&stream(&of_one)) {
        true => (&of_one, &one, &two),
        false => (&of_one, &two, &one),
    };
    other.add_persistently(of_first, new_command()).await;
    assert_eq!(other.add(of_first, 1, applied).await.expect("known"), 6, "applied once");
    let refused = other.add(of_first, 2_000, new_command()).await;
    assert!(matches!(refused, Err(HandleError::Rejected(_))), "{refused:?}");
    read_gapless(&*owner.store, &stream(of_first), 7).await;
    one.store.shutdown().await;
    two.store.shutdown().await;
    drop((one, two));

    // The log knows from now on: no demand is needed any more, and nothing is handled twice.
    config.begin_commands_anew = false;
    let one = TestNode::start(&config, &index, "one").await;
    let two = TestNode::start(&config, &index, "two").await;
    shared(&[&one, &two], 2).await;
    let other = if one.store.commands().is_local(&stream(&of_one)) { &two } else { &one };
    assert_eq!(other.add(&of_one, 1, new_command()).await.expect("forwarded"), 8);
}

/// An index of this process with the identity of a database.
struct InDatabase(MemoryIndex, &'static str);

#[async_trait]
impl StreamIndex for InDatabase {
    fn database(&self) -> Option<&str> {
        Some(self.1)
    }

    async fn cursors(&self) -> Result<Vec<(Partition, Cursor)>, ReadError> {
        self.0.cursors().await
    }

    async fn advance(&self, batches: Vec<IndexBatch>) -> Vec<Result<Advanced, ReadError>> {
        self.0.advance(batches).await
    }

    async fn load(&self, asked: &[IndexLoad], limit: usize) -> Vec<Result<IndexRead, ReadError>> {
        self.0.load(asked, limit).await
    }

    async fn heads(&self, partition: Partition) -> Result<IndexHeads, ReadError> {
        self.0.heads(partition).await
    }

    async fn count(&self) -> Result<Vec<IndexCount>, ReadError> {
        self.0.count().await
    }

    async fn find_command(
        &self,
        partition: Partition,
        stream: &StreamId,
        command_id: CommandId,
    ) -> Result<(Offset, Option<Appended>), ReadError> {
        self.0.find_command(partition, stream, command_id).await
    }
}

async fn open_in(config: &KafkaConfig, database: &'static str) -> Result<KafkaStore, OpenError> {
    let index = Arc::new(InDatabase(MemoryIndex::new(), database));
    let (owner, clock) = (support::owner(database), support::clock());
    KafkaStore::open(config.clone(), index, owner, clock, Arc::new(RandomIds)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_that_join_at_once_with_two_databases_one_gives_up() {
    let Some(brokers) = support::brokers("of_two_nodes_that_join_at_once") else { return };
    let config = config(&brokers, "at-once", 2);
    let (blue, green) = tokio::join!(open_in(&config, "blue"), open_in(&config, "green"));
    let nodes = match (blue, green) {
        (Ok(blue), Ok(green)) => [blue, green],
        // One of the two was a little faster.
        (Ok(one), Err(error)) | (Err(error), Ok(one)) => {
            assert!(error.to_string().contains("writes another database"), "{error}");
            return one.shutdown().await;
        }
        (Err(one), Err(other)) => panic!("{one}; {other}"),
    };
    let refused =
        |node: &KafkaStore| node.refusals().iter().any(|it| it.contains("another database"));
    support::until("one of the two is refused", || {
        let refused = nodes.iter().filter(|node| refused(node)).count();
        let unready = nodes.iter().filter(|node| node.health() != Health::Ready).count();
        if (refused, unready) == (1, 2) { Ok(()) } else { Err(format!("{refused}, {unready}")) }
    })
    .await;
    let (given_up, kept): (Vec<_>, Vec<_>) = nodes.into_iter().partition(refused);
    for node in given_up {
        node.shutdown().await;
    }
    support::ready(&kept[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_another_database_is_refused_until_the_first_one_has_left() {
    let Some(brokers) = support::brokers("a_node_with_another_database") else { return };
    let config = config(&brokers, "databases", 2);
    let blue = open_in(&config, "blue").await.expect("the first node");
    support::ready(&blue).await;
    let also_blue = open_in(&config, "blue").await.expect("the same database");
    let refused = open_in(&config, "green").await.err().map(|error| error.to_string());
    let refused = refused.expect("another database");
    assert!(refused.contains("writes another database"), "{refused}");
    assert_eq!(blue.health(), Health::Ready, "the refused node never joined");
    also_blue.shutdown().await;
    blue.shutdown().await;
    let green = open_in(&config, "green").await.expect("nobody else is up");
    support::ready(&green).await;
    green.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_in_a_group_of_the_log_is_named_until_it_leaves() {
    let Some(brokers) = support::brokers("another_program_in_a_group") else { return };
    let config = config(&brokers, "strangers", 2);
    let store = open_in(&config, "blue").await.expect("opened");
    support::ready(&store).await;
    let subscribed = store.source().subscribe("sales", Some("blue"), 10).await;
    let mut reading = subscribed.expect("subscribed");
    reading.next().await.expect("everything is assigned");
    // It gives up what the group revokes.
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { while reading.next().await.is_ok() {} });
    let operator = Operator::connect(config.clone(), support::clock()).await.expect("connected");
    assert_eq!(operator.strangers(None).await.expect("answers"), Vec::<String>::new());
    let groups = operator.presence().await.expect("answers").groups;
    let groups: Vec<_> = groups.into_iter().map(|(group, _)| group).collect();
    assert_eq!(groups.len(), 2, "{groups:?}");
    for group in &groups {
        let topic = if group.contains(".reader.") {
            config.events_topic()
        } else {
            config.commands_topic()
        };
        let foreign = support::joined(&brokers, group, &topic);
        let named = support::until("it is named", || match store.health() {
            Health::NotReady(reasons) => Ok(reasons.join("; ")),
            Health::Ready => Err("ready".into()),
        });
        let named = named.await;
        assert!(named.contains(group) && named.contains("a stranger at 127.0.0.1"), "{named}");
        let strangers = operator.strangers(None).await.expect("answers");
        assert!(strangers.len() == 1 && strangers[0].contains("a stranger"), "{strangers:?}");
        drop(foreign);
        support::ready(&store).await;
    }
    drop(tasks);
    store.shutdown().await;
}

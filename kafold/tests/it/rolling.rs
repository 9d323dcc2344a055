//! Rolling deployments under load: nodes of a program that is a release ahead, with a new type of event
//! or a new version of one, replace the others in either order. No read model is wrong at the end.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use kafold::clock::{RandomIds, SystemClock};
use kafold::codec::Upcasters;
use kafold::projections::{ProjectionWorker, Query, ReadModel, sqlx};
use kafold::{
    Aggregate, Clock, CommandHandler, CommandId, Database, DomainEvent, IdGenerator, LogOptions,
    Mode, Recorded, Row,
};
use serde::{Deserialize, Serialize};

const STREAMS: u64 = 24;
/// Callers, each with one command under way.
const CALLERS: u64 = 4;
/// Commands that are acknowledged between two steps of a deployment.
const COMMANDS_BETWEEN: u64 = 60;

/// Longest time until a command is acknowledged, over all its attempts.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// Between two attempts.
const COMMAND_RETRY: Duration = Duration::from_millis(20);

/// A release of the program.
trait Release: Clone + Default + Send + Sync + 'static {
    type Event: DomainEvent + Send + Sync + 'static;
    type Sum: ReadModel + Into<Summed>;
    type Total: ReadModel + Into<Summed>;

    fn event(amount: i64) -> Self::Event;

    fn amount(event: &Self::Event) -> i64;
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "tally")]
enum OldEvent {
    #[event("tally.added")]
    Added { amount: i64 },
}

#[derive(Clone, Default)]
struct Old;

impl Release for Old {
    type Event = OldEvent;
    type Sum = OldSum;
    type Total = OldTotal;

    fn event(amount: i64) -> OldEvent {
        OldEvent::Added { amount }
    }

    fn amount(OldEvent::Added { amount }: &OldEvent) -> i64 {
        *amount
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "tally")]
enum NewTypeEvent {
    #[event("tally.added")]
    Added { amount: i64 },
    #[event("tally.removed")]
    Removed { amount: i64 },
}

#[derive(Clone, Default)]
struct NewType;

impl Release for NewType {
    type Event = NewTypeEvent;
    type Sum = NewTypeSum;
    type Total = NewTypeTotal;

    fn event(amount: i64) -> NewTypeEvent {
        match amount < 0 {
            true => NewTypeEvent::Removed { amount: -amount },
            false => NewTypeEvent::Added { amount },
        }
    }

    fn amount(event: &NewTypeEvent) -> i64 {
        match event {
            NewTypeEvent::Added { amount } => *amount,
            NewTypeEvent::Removed { amount } => -amount,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = "tally", upcasters = cents)]
enum NewVersionEvent {
    #[event("tally.added", version = 2)]
    Added { cents: i64 },
}

fn cents() -> Upcasters {
    Upcasters::none().add("tally.added", 1, |json| {
        let amount = json["amount"].as_i64().ok_or("amount is not a number")?;
        Ok(serde_json::json!({ "cents": amount }))
    })
}

#[derive(Clone, Default)]
struct NewVersion;

impl Release for NewVersion {
    type Event = NewVersionEvent;
    type Sum = NewVersionSum;
    type Total = NewVersionTotal;

    fn event(cents: i64) -> NewVersionEvent {
        NewVersionEvent::Added { cents }
    }

    fn amount(NewVersionEvent::Added { cents }: &NewVersionEvent) -> i64 {
        *cents
    }
}

#[derive(Clone, Default)]
struct Tally<R>(PhantomData<R>);

impl<R: Release> Aggregate for Tally<R> {
    const CATEGORY: &'static str = "tally";
    type Command = i64;
    type Event = R::Event;
    type Error = NeverRefused;

    fn decide(&self, amount: &i64) -> Result<Vec<R::Event>, NeverRefused> {
        Ok(vec![R::event(*amount)])
    }

    fn evolve(&mut self, _: &R::Event) {}
}

#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("no rule refuses")]
struct NeverRefused;

type Summed = (String, (i64, i64));

/// Sums of a release: the sum of a stream, or with `shared` that of all streams.
macro_rules! sums {
    ($($model:ident of $release:ty, $name:literal, shared: $shared:literal;)*) => {$(
        #[derive(Debug, Clone, PartialEq, Row)]
        struct $model {
            #[row(key)]
            tally: String,
            events: i64,
            amount: i64,
        }

        impl ReadModel for $model {
            const NAME: &'static str = $name;
            const SHARED: bool = $shared;
            type Event = <$release as Release>::Event;

            fn keys(event: &Recorded<Self::Event>) -> Vec<String> {
                let all = || "all".to_owned();
                vec![if $shared { all() } else { event.stream.to_string() }]
            }

            fn fold(tally: &String, row: Option<Self>, event: &Recorded<Self::Event>) -> Option<Self> {
                let (events, amount) = row.map_or((0, 0), |row| (row.events, row.amount));
                let amount = amount + <$release>::amount(&event.event);
                Some(Self { tally: tally.clone(), events: events + 1, amount })
            }
        }

        impl From<$model> for Summed {
            fn from(row: $model) -> Self {
                (row.tally, (row.events, row.amount))
            }
        }
    )*};
}
sums! {
    OldSum of Old, "sums", shared: false;
    OldTotal of Old, "total", shared: true;
    NewTypeSum of NewType, "sums", shared: false;
    NewTypeTotal of NewType, "total", shared: true;
    NewVersionSum of NewVersion, "sums", shared: false;
    NewVersionTotal of NewVersion, "total", shared: true;
}

/// Sends one command. Returns `false` if the command was not acknowledged.
type Handle = dyn Fn(String, i64, CommandId) -> BoxFuture<'static, bool> + Send + Sync;

struct Node {
    send: Arc<Handle>,
    stop: BoxFuture<'static, ()>,
}

async fn start<R: Release>(url: String, database: Database) -> Node {
    let log = LogOptions::new(url).index(&database).open().await.expect("opened");
    let handler = CommandHandler::<Tally<R>>::new(log.store()).forwarding(log.commands());
    let projections =
        ProjectionWorker::new(log.source(), database).with::<R::Sum>().with::<R::Total>().spawn();
    let send = move |id: String, amount: i64, command: CommandId| {
        let handler = handler.clone();
        async move { handler.handle_with(&id, &amount, command).await.is_ok() }.boxed()
    };
    let stop = async move {
        projections.shutdown().await;
        log.close().await;
    };
    Node { send: Arc::new(send), stop: stop.boxed() }
}

/// The state of the callers.
#[derive(Default)]
struct Load {
    nodes: Mutex<Vec<Arc<Handle>>>,
    /// Events and sum of each stream.
    acknowledged: Mutex<BTreeMap<String, (i64, i64)>>,
    is_over: AtomicBool,
}

impl Load {
    fn count(&self) -> i64 {
        let all = self.acknowledged.lock().expect("no panic");
        all.values().map(|(events, _)| events).sum()
    }

    /// Sends commands, each until it is acknowledged, to whichever nodes there are.
    async fn call(self: Arc<Self>, seed: u64) {
        let mut random = fastrand::Rng::with_seed(seed);
        while !self.is_over.load(Ordering::SeqCst) {
            let id = random.u64(0..STREAMS).to_string();
            let (amount, command) = (random.i64(-50..100), CommandId(RandomIds.event_id()));
            let deadline = SystemClock.instant() + COMMAND_MAX;
            loop {
                let node = random.choice(&*self.nodes.lock().expect("no panic")).cloned();
                let is_done = match node {
                    Some(send) => send(id.clone(), amount, command).await,
                    None => false,
                };
                if is_done {
                    break;
                }
                assert!(SystemClock.instant() < deadline, "no node takes the command");
                SystemClock.sleep(COMMAND_RETRY).await;
            }
            let mut all = self.acknowledged.lock().expect("no panic");
            let (events, sum) = all.entry(format!("tally-{id}")).or_default();
            (*events, *sum) = (*events + 1, *sum + amount);
        }
    }

    async fn more(&self) {
        let until = self.count() + COMMANDS_BETWEEN as i64;
        // A group that rebalances on a busy machine takes no commands for some time.
        within_a_minute("commands are acknowledged", async || self.count() >= until).await;
    }
}

async fn within_a_minute(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = SystemClock.instant() + COMMAND_MAX;
    while !condition().await {
        assert!(SystemClock.instant() < deadline, "{what}: not within {COMMAND_MAX:?}");
        SystemClock.sleep(COMMAND_RETRY).await;
    }
}

/// Replaces two old nodes by two new nodes under load, and compares the read models with the acknowledged
/// commands. With `new_first` a new node starts before an old node stops.
async fn deploy<R: Release>(name: &str, new_first: bool) {
    let variable = |name: &str| std::env::var(name).ok();
    let (Some(kafka), Some(postgres)) =
        (variable("KAFOLD_TEST_KAFKA"), variable("KAFOLD_TEST_POSTGRES"))
    else {
        assert!(variable("KAFOLD_TEST_REQUIRE_ALL").is_none(), "nothing may be skipped");
        return eprintln!("skipped a rolling deployment: no servers (dev/test starts them)");
    };
    let name = format!("{name}_{}", RandomIds.event_id().simple());
    let admin = Database::open(&postgres, Mode::Migrate).await.expect("opened");
    let Database::Postgres(server) = &admin else { panic!("not PostgreSQL") };
    let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
    sqlx::query(create).execute(server.pool()).await.expect("created");
    let (server, _) = postgres.rsplit_once('/').expect("a URL with a database");
    let database = Database::open(&format!("{server}/{name}"), Mode::Migrate).await.expect("new");
    let fast = "librdkafka.session.timeout.ms=1500&librdkafka.heartbeat.interval.ms=200";
    let url = format!("kafka://{kafka}/{}?partitions=4&{fast}", name.replace('_', "-"));

    let load = Arc::new(Load::default());
    let mut callers = tokio::task::JoinSet::new();
    let join = |node: &Node| load.nodes.lock().expect("no panic").push(node.send.clone());
    let mut old = Vec::new();
    for _ in 0..2 {
        let node = start::<Old>(url.clone(), database.clone()).await;
        join(&node);
        old.push(node);
    }
    callers.extend((0..CALLERS).map(|seed| Arc::clone(&load).call(seed)));
    load.more().await;
    let mut new = Vec::new();
    for node in old {
        let leave = async {
            load.nodes.lock().expect("no panic").retain(|send| !Arc::ptr_eq(send, &node.send));
            node.stop.await;
        };
        if new_first {
            new.push(start::<R>(url.clone(), database.clone()).await);
            join(&new[new.len() - 1]);
            load.more().await;
            leave.await;
        } else {
            leave.await;
            new.push(start::<R>(url.clone(), database.clone()).await);
            join(&new[new.len() - 1]);
        }
        load.more().await;
    }
    load.is_over.store(true, Ordering::SeqCst);
    callers.join_all().await;
    let acknowledged = load.acknowledged.lock().expect("no panic").clone();
    let all = acknowledged.values().fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    let sums = Query::<R::Sum>::new(database.clone());
    let total = Query::<R::Total>::new(database.clone());
    within_a_minute("both models are right", async || {
        rows(&sums).await == acknowledged && rows(&total).await.get("all") == Some(&all)
    })
    .await;
    for node in new {
        node.stop.await;
    }
}

async fn rows<M: ReadModel + Into<Summed>>(query: &Query<M>) -> BTreeMap<String, (i64, i64)> {
    let rows = query.all(STREAMS as usize).await.expect("readable").into_iter();
    rows.map(Into::into).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_type_of_event_is_deployed_new_nodes_first() {
    deploy::<NewType>("type_new_first", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_type_of_event_is_deployed_old_nodes_leave_first() {
    deploy::<NewType>("type_old_leaves", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_an_event_is_deployed_new_nodes_first() {
    deploy::<NewVersion>("version_new_first", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_an_event_is_deployed_old_nodes_leave_first() {
    deploy::<NewVersion>("version_old_leaves", false).await;
}

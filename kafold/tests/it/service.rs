//! The handle of [`kafold::open`], on both logs.

use std::time::Duration;

use kafold::handler::HandlerConfig;
use kafold::projections::ReadModel;
use kafold::store::Health;
use kafold::testing::eventually;
use kafold::{
    Aggregate, CommandId, Database, DomainEvent, HandleError, IdGenerator, Kafold, Mode, OpenError,
    Recorded, Row, SnapshotSchema, Version, clock::RandomIds,
};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, DomainEvent)]
#[event(category = Account::CATEGORY)]
enum AccountEvent {
    #[event("account.changed")]
    Changed { cents: i64 },
}

#[derive(Debug, Serialize, Deserialize)]
struct Change {
    cents: i64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("the balance is {balance} cents")]
struct Overdrawn {
    balance: i64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("account.1"));
    type Command = Change;
    type Event = AccountEvent;
    type Error = Overdrawn;

    fn decide(&self, change: &Change) -> Result<Vec<AccountEvent>, Overdrawn> {
        match self.balance + change.cents < 0 {
            true => Err(Overdrawn { balance: self.balance }),
            false => Ok(vec![AccountEvent::Changed { cents: change.cents }]),
        }
    }

    fn evolve(&mut self, AccountEvent::Changed { cents }: &AccountEvent) {
        self.balance += cents;
    }
}

#[derive(Debug, Clone, PartialEq, Row)]
struct Balance {
    #[row(stream)]
    account: String,
    cents: i64,
}

impl ReadModel for Balance {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;

    fn fold(account: &String, row: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
        let AccountEvent::Changed { cents } = event.event;
        let before = row.map_or(0, |row| row.cents);
        Some(Self { account: account.clone(), cents: before + cents })
    }
}

async fn ready(kafold: &Kafold) {
    eventually("it is ready", async || kafold.health() == Health::Ready).await;
}

/// Reads its own writes on each of the nodes, whichever owns the stream.
async fn writes_and_reads(nodes: &[Kafold]) {
    for node in nodes {
        let _running = node.projections().with::<Balance>().spawn();
        // Each node takes the commands of others from the first call on.
        node.handler::<Account>();
    }
    for node in nodes {
        ready(node).await;
    }
    for nth in 0..24 {
        let (one, other) = (&nodes[nth % nodes.len()], &nodes[(nth + 1) % nodes.len()]);
        let id = format!("a{nth}");
        let (accounts, others) = (one.handler::<Account>(), other.handler::<Account>());
        let first = accounts.handle(&id, &Change { cents: 5 }).await.expect("no rule is broken");
        let command_id = CommandId::new();
        for is_repeat in [false, true] {
            let second = others.handle_with(&id, &Change { cents: 2 }, command_id).await;
            let second = second.expect("no rule is broken");
            assert_eq!((second.version, second.duplicate), (first.version.plus(1), is_repeat));
            let row = one.query::<Balance>().after(&second).get(id.as_str()).await;
            assert_eq!(row.expect("readable"), Some(Balance { account: id.clone(), cents: 7 }));
        }
        for handler in [&accounts, &others] {
            let (account, version) = handler.load(&id).await.expect("readable");
            assert_eq!((account.balance, version), (7, Version(2)));
        }
        let refused = others.handle(&id, &Change { cents: -8 }).await;
        let refused = refused.expect_err("the rule is broken");
        assert!(matches!(refused, HandleError::Rejected(Overdrawn { balance: 7 })), "{refused}");
    }
    let unknown = nodes[0].handler::<Account>().load("nobody").await.expect("readable");
    assert_eq!(unknown, (Account::default(), Version::EMPTY));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_on_a_file_needs_its_url_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}", folder.path().join("accounts.db").display());
    let config = HandlerConfig { snapshot_every: 2, ..HandlerConfig::default() };
    let open = async || kafold::open(&url).handler_config(config.clone()).await.expect("opens");
    let kafold = open().await;
    writes_and_reads(std::slice::from_ref(&kafold)).await;
    let handlers = [kafold.handler::<Account>(), kafold.handler::<Account>()];
    assert_eq!(handlers.map(|handler| handler.hot_states()), [25, 25], "one cache");
    kafold.close().await;

    let kafold = open().await;
    let (account, version) = kafold.handler::<Account>().load("a3").await.expect("readable");
    assert_eq!((account.balance, version), (7, Version(2)));
    let row = kafold.query::<Balance>().get("a3").await.expect("readable");
    assert_eq!(row.map(|row| row.cents), Some(7));
    kafold.close().await;
}

/// Returns two nodes on a log and a database of their own; `None` without servers.
async fn two_nodes() -> Option<[Kafold; 2]> {
    let servers =
        std::env::var("KAFOLD_TEST_KAFKA").ok().zip(std::env::var("KAFOLD_TEST_POSTGRES").ok());
    let Some((brokers, postgres)) = servers else {
        assert!(std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none(), "servers are missing");
        eprintln!("skipped: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers");
        return None;
    };
    let name = format!("service{}", RandomIds.event_id().simple());
    let database = crate::damage::database_of_its_own(&postgres, &name).await;
    database.close().await;
    let (place, _) = postgres.rsplit_once('/').expect("a URL");
    let url = format!("kafka://{brokers}/{name}?partitions=4&replication=1");
    let open = |node: &'static str| {
        let opening = kafold::open(&url).database(format!("{place}/{name}")).node_name(node);
        async move { opening.await.expect("opens") }
    };
    Some([open("one").await, open("two").await])
}

async fn both_own_partitions(nodes: &[Kafold; 2]) {
    eventually("both own partitions", async || {
        let nodes = nodes[0].nodes();
        nodes.len() == 2 && nodes.iter().all(|node| !node.partitions.is_empty())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_the_handler_is_not_ready_and_names_the_category() {
    let Some(nodes) = two_nodes().await else { return };
    both_own_partitions(&nodes).await;
    let [one, other] = &nodes;
    let accounts = one.handler::<Account>();
    let sending = (0..24).map(|nth| {
        let accounts = accounts.clone();
        tokio::spawn(async move { accounts.send(&format!("a{nth}"), &Change { cents: 1 }).await })
    });
    for sent in sending.collect::<Vec<_>>() {
        sent.await.expect("no panic").expect("it is written down");
    }
    eventually("the node names the category", async || {
        let Health::NotReady(reasons) = other.health() else { return false };
        reasons.iter().any(|reason| reason.contains("commands of category account come"))
    })
    .await;
    let handler = other.handler::<Account>();
    ready(other).await;
    for nth in 0..24 {
        let id = format!("a{nth}");
        eventually("the command is handled", async || {
            let loaded = handler.load(&id).await;
            loaded.is_ok_and(|(account, _)| account.balance == 1)
        })
        .await;
    }
    for node in nodes {
        node.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_on_kafka_are_the_same_program() {
    let Some(nodes) = two_nodes().await else { return };
    writes_and_reads(&nodes).await;
    both_own_partitions(&nodes).await;
    // With both of them some streams are of the other node.
    writes_more(&nodes).await;
    for node in nodes {
        node.close().await;
    }
}

async fn writes_more(nodes: &[Kafold; 2]) {
    for nth in 0..24 {
        let id = format!("a{nth}");
        let [one, other] = nodes.each_ref().map(Kafold::handler::<Account>);
        other.handle(&id, &Change { cents: 1 }).await.expect("no rule is broken");
        let (account, version) = one.load(&id).await.expect("readable");
        assert_eq!((account.balance, version), (8, Version(3)), "{id}");
    }
}

#[tokio::test]
async fn what_is_forgotten_is_named() {
    let refused = kafold::open("kafka://127.0.0.1:1/accounts").await.expect_err("no database");
    assert!(matches!(refused, OpenError::NoDatabase), "{refused}");
    assert!(refused.to_string().contains(".database("), "{refused}");
    let refused = kafold::open("accounts.db").await.expect_err("is no URL");
    assert!(refused.to_string().contains("sqlite://FILE"), "{refused}");
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}", folder.path().join("accounts.db").display());
    let database = Database::open(&url, Mode::Migrate).await.expect("opens");
    database.close().await;
    // No program runs the model.
    let kafold = kafold::open(&url)
        .projection_config(kafold::projections::ProjectionConfig {
            wait_timeout: Duration::from_millis(200),
            ..Default::default()
        })
        .await
        .expect("opens");
    let handled = kafold.handler::<Account>().handle("a", &Change { cents: 1 }).await;
    let handled = handled.expect("no rule is broken");
    let refused = kafold.query::<Balance>().after(&handled).get("a").await;
    let refused = refused.expect_err("nothing builds the rows");
    assert!(refused.to_string().contains("balances"), "{refused}");
    kafold.close().await;
}

/// An aggregate that was copied, with the category of the original.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Copied;

impl Aggregate for Copied {
    const CATEGORY: &'static str = Account::CATEGORY;
    type Command = Change;
    type Event = AccountEvent;
    type Error = Overdrawn;

    fn decide(&self, _: &Change) -> Result<Vec<AccountEvent>, Overdrawn> {
        Ok(Vec::new())
    }

    fn evolve(&mut self, _: &AccountEvent) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn two_aggregates_of_one_category_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}", folder.path().join("copied.db").display());
    let kafold = kafold::open(url).await.expect("opens");
    let accounts = kafold.handler::<Account>();
    let other = kafold.clone();
    let refused = tokio::spawn(async move { drop(other.handler::<Copied>()) }).await;
    let panic = refused.expect_err("is refused").into_panic();
    let reason = panic.downcast_ref::<String>().expect("a sentence");
    assert!(
        reason.contains("::Copied and ") && reason.contains("category \"account\""),
        "{reason}"
    );
    accounts.handle("a1", &Change { cents: 5 }).await.expect("the first handler goes on");
    kafold.handler::<Account>();
    kafold.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_model_that_is_spawned_twice_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let url = format!("sqlite://{}", folder.path().join("twice.db").display());
    let kafold = kafold::open(url).await.expect("opens");
    let _one = kafold.projections().with::<Balance>().spawn();
    ready(&kafold).await;
    let _other = kafold.projections().with::<Balance>().spawn();
    let Health::NotReady(reasons) = kafold.health() else { panic!("it is ready") };
    let is_named = |reason: &String| reason.contains("balances is spawned twice in this process");
    assert!(reasons.iter().any(is_named), "{reasons:?}");
    kafold.close().await;
}

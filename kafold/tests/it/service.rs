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

struct Balances;

impl ReadModel for Balances {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;
    type Row = Balance;

    fn fold(
        account: &String,
        row: Option<Balance>,
        event: &Recorded<AccountEvent>,
    ) -> Option<Balance> {
        let AccountEvent::Changed { cents } = event.event;
        let before = row.map_or(0, |row| row.cents);
        Some(Balance { account: account.clone(), cents: before + cents })
    }
}

async fn ready(kafold: &Kafold) {
    eventually("it is ready", async || kafold.health() == Health::Ready).await;
}

/// Reads its own writes on each of the nodes, whichever owns the stream.
async fn writes_and_reads(nodes: &[Kafold]) {
    for node in nodes {
        let _running = node.projections().with(Balances).spawn();
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
            let row = one.query::<Balances>().after(&second).get(id.as_str()).await;
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
    let row = kafold.query::<Balances>().get("a3").await.expect("readable");
    assert_eq!(row.map(|row| row.cents), Some(7));
    kafold.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_on_kafka_are_the_same_program() {
    let servers =
        std::env::var("KAFOLD_TEST_KAFKA").ok().zip(std::env::var("KAFOLD_TEST_POSTGRES").ok());
    let Some((brokers, postgres)) = servers else {
        assert!(std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none(), "servers are missing");
        return eprintln!("skipped: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers");
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
    let nodes = [open("one").await, open("two").await];
    writes_and_reads(&nodes).await;
    eventually("both own partitions", async || {
        let nodes = nodes[0].nodes();
        nodes.len() == 2 && nodes.iter().all(|node| !node.partitions.is_empty())
    })
    .await;
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
    let refused = kafold.query::<Balances>().after(&handled).get("a").await;
    let refused = refused.expect_err("nothing builds the rows");
    assert!(refused.to_string().contains("balances"), "{refused}");
    kafold.close().await;
}

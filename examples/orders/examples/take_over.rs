//! How long a node's death is felt: kills the owner of some partitions again and again, and measures
//! the time until each of them acknowledges its next command.
//!
//! ```sh
//! cargo build --release -p orders
//! cargo run --release -p orders --example take_over -- \
//!     --log kafka://$bootstrap/takeover --database $database --kills 100
//! ```
//!
//! The database must be of this log alone. Three replicas run on this machine; each kill is a SIGKILL.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::future::try_join_all;
use kafold::Clock;
use kafold::clock::SystemClock;
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    /// The log, as `orders serve` takes it.
    #[arg(long)]
    log: String,
    /// The database, likewise.
    #[arg(long)]
    database: String,
    /// How often a node is killed.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// The program.
    #[arg(long, default_value = "target/release/orders")]
    program: PathBuf,
    /// The first of three ports.
    #[arg(long, default_value_t = 18_080)]
    port: u16,
}

const NODES: usize = 3;
const WAIT_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

type Failure = Box<dyn Error + Send + Sync>;

struct Cluster {
    args: Args,
    http: reqwest::Client,
    nodes: Vec<Option<Child>>,
    /// Orders that are placed and not paid, by partition.
    orders: BTreeMap<u64, Vec<String>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for mut child in self.nodes.iter_mut().filter_map(Option::take) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let args = Args::parse();
    let kills = args.kills;
    let http = reqwest::Client::builder().no_proxy().timeout(WAIT_MAX).build()?;
    let mut cluster = Cluster { args, http, nodes: Vec::new(), orders: BTreeMap::new() };
    for node in 0..NODES {
        cluster.nodes.push(None);
        cluster.start(node)?;
    }
    cluster.settled().await?;
    cluster.place(kills * 12 * 2).await?;
    let (mut felt, mut ours) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        let (times, take_overs) = cluster.kill(kill % NODES).await?;
        felt.extend(times);
        ours.extend(take_overs);
        if kill % 10 == 9 {
            eprintln!("{} of {kills} kills", kill + 1);
        }
    }
    show("from SIGKILL to the next acknowledged command of a partition", &mut felt);
    show("of it ours: from the group's word to the accepted claim", &mut ours);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "what it measures is its output")]
fn show(what: &str, millis: &mut [u64]) {
    millis.sort_unstable();
    let at = |percent: usize| millis[(millis.len() - 1) * percent / 100];
    println!(
        "{what}: {} times, p10 {} ms, p50 {} ms, p90 {} ms, p99 {} ms, most {} ms",
        millis.len(),
        at(10),
        at(50),
        at(90),
        at(99),
        at(100)
    );
}

impl Cluster {
    fn url(&self, node: usize) -> String {
        format!("http://127.0.0.1:{}", self.args.port + node as u16)
    }

    fn start(&mut self, node: usize) -> Result<(), Failure> {
        let listen = format!("127.0.0.1:{}", self.args.port + node as u16);
        let Args { program, log, database, .. } = &self.args;
        let mut command = Command::new(program);
        command.args(["serve", "--deadline", "60s", "--listen", &listen]);
        command.args(["--log", log, "--database", database]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        self.nodes[node] = Some(child);
        Ok(())
    }

    async fn get(&self, node: usize, path: &str) -> Result<Value, Failure> {
        let answer = self.http.get(format!("{}{path}", self.url(node))).send().await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// The partitions of each node by the view of one of them, with how long each take-over took.
    async fn owned(&self, seen_by: usize, of: usize) -> Result<Vec<(u64, u64)>, Failure> {
        let nodes = self.get(seen_by, "/nodes").await?;
        let url = self.url(of);
        let nodes = nodes["nodes"].as_array().cloned().unwrap_or_default();
        let owned = nodes
            .iter()
            .filter(|node| node["address"] == *url)
            .flat_map(|node| node["partitions"].as_array().cloned().unwrap_or_default());
        let pair =
            |owned: Value| Some((owned["partition"].as_u64()?, owned["take_over_ms"].as_u64()?));
        Ok(owned.filter_map(pair).collect())
    }

    /// Waits until every node is ready and has its share.
    async fn settled(&self) -> Result<(), Failure> {
        let begun = SystemClock.instant();
        loop {
            let mut shares = Vec::new();
            for node in 0..NODES {
                let ready = self.get(node, "/health/ready").await.is_ok();
                let owned = self.owned(node, node).await.unwrap_or_default();
                shares.push(if ready { owned.len() } else { 0 });
            }
            if shares.iter().all(|share| *share >= 12 / NODES) {
                return Ok(());
            }
            if SystemClock.instant() - begun > WAIT_MAX {
                return Err(format!("the partitions are not spread: {shares:?}").into());
            }
            SystemClock.sleep(POLL).await;
        }
    }

    async fn place(&mut self, count: usize) -> Result<(), Failure> {
        let run = SystemClock.now().timestamp_millis();
        let numbers: Vec<_> = (0..count).collect();
        for numbers in numbers.chunks(64) {
            let placing = numbers.iter().map(|number| {
                let order = json!({"order_id": format!("t{run}-{number}"), "customer": "c",
                    "lines": [{"sku": "a", "quantity": 1, "amount_cents": 1}]});
                self.post(number % NODES, "/orders".into(), order)
            });
            for placed in try_join_all(placing).await? {
                let (position, id) = (placed["position"].as_str(), placed["order_id"].as_str());
                let (position, id) = (position.unwrap_or_default(), id.unwrap_or_default());
                let partition = position.split(':').next().unwrap_or_default().parse()?;
                self.orders.entry(partition).or_default().push(id.to_owned());
            }
        }
        Ok(())
    }

    async fn post(&self, node: usize, path: String, body: Value) -> Result<Value, Failure> {
        let url = format!("{}{path}", self.url(node));
        let answer = self.http.post(url).json(&body).send().await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// Kills a node, and starts it again when its partitions go on.
    async fn kill(&mut self, victim: usize) -> Result<(Vec<u64>, Vec<u64>), Failure> {
        let survivors = [(victim + 1) % NODES, (victim + 2) % NODES];
        let lost = self.owned(victim, victim).await?;
        let mut orders = Vec::new();
        for (partition, _) in &lost {
            let left = self.orders.get_mut(partition).and_then(Vec::pop);
            orders.push(left.ok_or("no order is left in a partition")?);
        }
        if let Some(mut child) = self.nodes[victim].take() {
            child.kill()?;
            child.wait()?;
        }
        let struck = SystemClock.instant();
        let felt = try_join_all(orders.iter().zip(survivors.iter().cycle()).map(
            async |(order, node)| -> Result<u64, Failure> {
                let path = format!("/orders/{order}/payment");
                self.post(*node, path, json!({"amount_cents": 1})).await?;
                Ok(millis_since(struck))
            },
        ))
        .await?;
        let mut ours = Vec::new();
        for node in survivors {
            let owned = self.owned(node, node).await?;
            let taken = owned.into_iter().filter(|(p, _)| lost.iter().any(|(l, _)| l == p));
            ours.extend(taken.map(|(_, took)| took));
        }
        self.start(victim)?;
        self.settled().await?;
        Ok((felt, ours))
    }
}

fn millis_since(begun: Instant) -> u64 {
    u64::try_from((SystemClock.instant() - begun).as_millis()).unwrap_or(u64::MAX)
}

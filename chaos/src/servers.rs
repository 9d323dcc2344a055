//! Three real brokers behind proxies and a PostgreSQL, by the scripts in `dev/`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kafold::projections::sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::Failure;
use crate::faults::SMALL_DISK_BROKER;
use crate::proxy::Proxy;

/// Brokers of the campaign.
pub const BROKERS: usize = 3;
/// Partitions of the campaign's log.
pub const PARTITIONS: u32 = 6;
/// The log's name.
pub const LOG: &str = "chaos";
/// Connections of the campaign itself to the database.
const CONNECTIONS_MAX: u32 = 4;

/// What the nodes depend on.
pub struct Servers {
    name: String,
    /// One a broker, in the order of their numbers, which begin with 1.
    pub proxies: Vec<Proxy>,
    /// The brokers' own addresses, past the proxies.
    pub brokers: String,
    /// The database's URL.
    pub database: String,
    /// The campaign's own way to the database.
    pub pool: PgPool,
}

impl Servers {
    /// Starts all of it under names that begin so; one broker keeps its data on the small disk.
    pub async fn start(name: &str, small_disk: Option<&Path>) -> Result<Self, Failure> {
        let mut proxies = Vec::new();
        for _ in 0..BROKERS {
            proxies.push(Proxy::bind().await?);
        }
        let ports: Vec<_> = proxies.iter().map(|proxy| proxy.address.port().to_string()).collect();
        let (kafka, postgres) = (format!("{name}-kafka"), format!("{name}-postgres"));
        let nodes = BROKERS.to_string();
        let advertise = ports.join(",");
        let mut up = vec!["up", "--name", &kafka, "--nodes", &nodes, "--advertise", &advertise];
        let data =
            small_disk.map(|folder| format!("{SMALL_DISK_BROKER}={}/data", folder.display()));
        up.extend(data.iter().flat_map(|data| ["--data", data.as_str()]));
        let brokers = last_line(&run("kafka", &up).await?)?;
        for (proxy, broker) in proxies.iter().zip(brokers.split(',')) {
            proxy.forward_to(broker.parse::<SocketAddr>()?);
        }
        let database = last_line(&run("postgres", &["up", "--name", &postgres]).await?)?;
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS_MAX).connect_lazy(&database)?;
        Ok(Self { name: name.to_owned(), proxies, brokers, database, pool })
    }

    /// The log as the nodes open it: through the proxies.
    pub fn log(&self) -> String {
        let proxies: Vec<_> = self.proxies.iter().map(|proxy| proxy.address.to_string()).collect();
        format!("kafka://{}/{LOG}?partitions={PARTITIONS}&replication={BROKERS}", proxies.join(","))
    }

    /// A command of `dev/kafka` on broker `number`, such as `stop-node`.
    pub async fn broker(&self, command: &str, number: usize, more: &[&str]) -> Result<(), Failure> {
        let (kafka, number) = (format!("{}-kafka", self.name), number.to_string());
        let mut arguments = vec![command, &number, "--name", &kafka];
        arguments.extend(more);
        run("kafka", &arguments).await.map(drop)
    }

    /// A command of `dev/postgres`.
    pub async fn postgres(&self, command: &str, more: &[&str]) -> Result<(), Failure> {
        let postgres = format!("{}-postgres", self.name);
        let mut arguments = vec![command, "--name", &postgres];
        arguments.extend(more);
        run("postgres", &arguments).await.map(drop)
    }

    /// Makes broker `number` the preferred leader of partition `partition` of the events topic, and
    /// has it elected, with Kafka's own tools.
    pub async fn lead(&self, partition: u32, number: usize) -> Result<(), Failure> {
        let others = (1..=BROKERS).filter(|other| *other != number);
        let replicas: Vec<_> = [number].into_iter().chain(others).collect();
        let topic = format!("{LOG}.events");
        let moved = serde_json::json!({"version": 1, "partitions": [
            {"topic": topic, "partition": partition, "replicas": replicas}]});
        let classpath = last_line(&run("kafka", &["classpath"]).await?)?;
        let tool = |class: &'static str| {
            let mut java = Command::new("java");
            java.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", &classpath, class]);
            java.args(["--bootstrap-server", &self.brokers]);
            java.kill_on_drop(true);
            java
        };
        let mut reassign = tool("org.apache.kafka.tools.reassign.ReassignPartitionsCommand");
        reassign.args(["--execute", "--reassignment-json-file", "/dev/stdin"]);
        output(reassign, moved.to_string().as_bytes()).await?;
        let mut elect = tool("org.apache.kafka.tools.LeaderElectionCommand");
        elect.args(["--election-type", "preferred", "--topic", &topic]);
        elect.args(["--partition", &partition.to_string()]);
        output(elect, b"").await.map(drop)
    }
}

/// Stops servers of these names, also those that an earlier campaign left behind, and removes their
/// data.
pub async fn take_down(name: &str) -> Result<(), Failure> {
    run("kafka", &["down", "--name", &format!("{name}-kafka")]).await?;
    run("postgres", &["down", "--name", &format!("{name}-postgres")]).await?;
    Ok(())
}

/// Runs one of the scripts in `dev/` and answers what it printed.
async fn run(script: &str, arguments: &[&str]) -> Result<String, Failure> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../dev")).join(script);
    let mut command = Command::new(path);
    command.args(arguments);
    output(command, b"").await
}

async fn output(mut command: Command, input: &[u8]) -> Result<String, Failure> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input).await?;
    }
    let output = child.wait_with_output().await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let complained = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}: {said}{complained}", output.status).into())
}

fn last_line(text: &str) -> Result<String, Failure> {
    text.lines().last().map(str::to_owned).ok_or_else(|| "a script printed nothing".into())
}

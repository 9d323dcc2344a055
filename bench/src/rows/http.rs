//! R11: the order service over HTTP, against a server that answers from a bare produce. Both are
//! processes of their own; the same client asks them.

use std::process::Stdio;
use std::sync::Arc;

use kafold::IdGenerator;
use kafold::clock::RandomIds;
use reqwest::Client;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

use crate::Failure;
use crate::harness::{Bench, Goal, Sample};
use crate::measure::{Until, closed_loop, until};
use crate::ours::{WAIT_MAX, log_url, make_log};
use crate::servers::remove_log;

const CONNECTIONS: usize = 64;
const GOAL: f64 = 0.7;

/// Place and pay.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let brokers = bench.servers.broker().await?;
    let names = [bench.servers.new_name(), bench.servers.new_name()];
    let scratch = bench.servers.database().await?;
    let here = std::env::current_exe()?;
    let url = log_url(brokers, &names[0]);
    let mut orders = Command::new(here.with_file_name("orders"));
    orders.args(["serve", "--log", &url, "--database", &scratch.url]);
    let ours = Server::start(orders).await?;
    make_log(brokers, &names[1]).await?;
    let mut bare = Command::new(&here);
    bare.args(["serve", "--brokers", brokers, "--log", &names[1]]);
    let bare = Server::start(bare).await?;
    let orders = bench.size.of(200, 1_500, 15_000);
    let figures = [("requests_per_s", Goal::AtLeast(GOAL)), ("p99_us", Goal::Stated)];
    let case = format!("place and pay, {CONNECTIONS} connections");
    let served = async || place_and_pay(&ours, orders).await;
    let produced = async || place_and_pay(&bare, orders).await;
    bench.compare("R11", case, &figures, served, produced).await?;
    drop((ours, bare));
    scratch.remove().await?;
    for name in names {
        remove_log(brokers, &name).await?;
    }
    Ok(())
}

/// A server that ends with this.
struct Server {
    _process: Child,
    url: String,
}

impl Server {
    async fn start(mut command: Command) -> Result<Self, Failure> {
        // Free for the moment; nobody else here looks for one.
        let listen = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.to_string();
        command.args(["--listen", &listen]).stdin(Stdio::null()).stdout(Stdio::null());
        command.env("RUST_LOG", "error").kill_on_drop(true);
        let started = command.spawn();
        let process = started.map_err(|error| format!("{command:?} did not start: {error}"))?;
        let url = format!("http://{listen}");
        let ready = async || {
            let asked = reqwest::get(format!("{url}/health/ready")).await;
            Ok(asked.is_ok_and(|answer| answer.status().is_success()).then_some(()))
        };
        until("the server is ready", WAIT_MAX, ready).await?;
        Ok(Self { _process: process, url })
    }
}

async fn place_and_pay(server: &Server, orders: u64) -> Result<Sample, Failure> {
    let client = Client::builder().pool_max_idle_per_host(CONNECTIONS).tcp_nodelay(true).build()?;
    let (url, run) = (Arc::<str>::from(server.url.as_str()), RandomIds.random());
    let measured = closed_loop(CONNECTIONS, Until::Calls(orders), move |number| {
        let (client, url) = (client.clone(), Arc::clone(&url));
        async move {
            let id = format!("{run:x}-{number}");
            let lines = json!([{ "sku": "a", "quantity": 2, "amount_cents": 2_500 }]);
            let order = json!({ "order_id": id, "customer": "c1", "lines": lines });
            ask(&client, format!("{url}/orders"), &order).await?;
            let payment = json!({ "amount_cents": 2_500 });
            ask(&client, format!("{url}/orders/{id}/payment"), &payment).await
        }
    });
    let measured = measured.await?;
    let mut sample = measured.sample();
    let requests = sample.remove("per_s").map(|orders| 2.0 * orders);
    sample.insert("requests_per_s", requests.unwrap_or_default());
    Ok(sample)
}

async fn ask(client: &Client, url: String, body: &serde_json::Value) -> Result<(), Failure> {
    let answer = client.post(url).json(body).send().await?;
    let status = answer.status();
    // Read whole, so that the connection is used again.
    let said = answer.text().await?;
    if status.is_success() { Ok(()) } else { Err(format!("{status}: {said}").into()) }
}

//! Brokers and a database, by the scripts in `dev/`, or those that are there.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kafold::projections::sqlx::postgres::PgConnection;
use kafold::projections::sqlx::{AssertSqlSafe, Connection, Executor};
use kafold::{Database, Mode};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::Failure;
use crate::baselines::consumer::{From, consumer, each};
use crate::baselines::producer::{Records, Window, settings};
use crate::fill::Fill;
use crate::measure::until;
use crate::proxy::Proxy;

/// Partitions of every log here, as a new log has by default.
pub const PARTITIONS: u32 = 12;

/// Events that new brokers are warmed up with.
const WARM_UP_EVENTS: u64 = 300_000;

/// A broker behind a proxy that counts, and where it keeps its data.
pub struct Counted {
    /// Its address, which is the proxy's.
    pub brokers: String,
    /// Counts what goes to the broker.
    pub proxy: Proxy,
    /// Its data.
    pub data: PathBuf,
}

/// What is measured against; each is started when it is first asked for.
pub struct Servers {
    name: String,
    single: OnceCell<String>,
    three: OnceCell<String>,
    tls: OnceCell<String>,
    counted: OnceCell<Counted>,
    postgres: OnceCell<String>,
    names: AtomicU32,
}

impl Servers {
    /// Servers of our own, under names that begin so.
    pub fn own(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            single: OnceCell::new(),
            three: OnceCell::new(),
            tls: OnceCell::new(),
            counted: OnceCell::new(),
            postgres: OnceCell::new(),
            names: AtomicU32::new(1),
        }
    }

    /// One broker and a database that are there already.
    pub fn given(name: &str, brokers: String, postgres: String) -> Self {
        let (single, postgres) = (OnceCell::new_with(Some(brokers)), Some(postgres));
        Self { single, postgres: OnceCell::new_with(postgres), ..Self::own(name) }
    }

    /// The address of one broker.
    pub async fn broker(&self) -> Result<&str, Failure> {
        Ok(self
            .single
            .get_or_try_init(async || self.start("kafka", &["--nodes", "1"]).await)
            .await?)
    }

    /// The addresses of three brokers that replicate three times.
    pub async fn three_brokers(&self) -> Result<&str, Failure> {
        Ok(self
            .three
            .get_or_try_init(async || self.start("kafka3", &["--nodes", "3"]).await)
            .await?)
    }

    /// The address of one broker that takes nothing but TLS and logins, with the options of a log's URL for both.
    pub async fn tls_broker(&self) -> Result<&str, Failure> {
        let start = async || self.start("kafka-tls", &["--nodes", "1", "--tls"]).await;
        Ok(self.tls.get_or_try_init(start).await?)
    }

    /// Brokers that have been at work for a while: in their first minute the Java machine compiles with
    /// half of both cores.
    async fn start(&self, what: &str, options: &[&str]) -> Result<String, Failure> {
        let cluster = self.named(what);
        let mut brokers = run("kafka", &[&["up", "--name", &cluster], options].concat()).await?;
        if options.contains(&"--tls") {
            let files = repository().join("target/dev").join(cluster).join("tls");
            let files = files.display();
            brokers = format!(
                "{brokers}?tls=true&ca={files}/ca.crt&sasl=scram-sha-512&user=admin\
                 &password=@{files}/passwords/admin"
            );
        }
        let name = self.new_name();
        let (events, streams) = (WARM_UP_EVENTS, WARM_UP_EVENTS / 10);
        Fill { brokers: &brokers, name: &name, events, streams, payload_bytes: 256 }
            .make(None)
            .await?;
        let (asked, topic) = (brokers.clone(), format!("{name}.events"));
        let rest = move || {
            let records = Records::new(&topic, streams, 256)?;
            let window = Window::start(&settings(&asked, "0")?, topic.clone(), 64)?;
            window.run(&records, WARM_UP_EVENTS / 5, 0)?;
            let mut left = WARM_UP_EVENTS;
            each(&consumer(&asked, &topic, From::Beginning)?, |_| {
                left -= 1;
                Ok(if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })
        };
        tokio::task::spawn_blocking(rest).await??;
        remove_log(&brokers, &name).await?;
        Ok(brokers)
    }

    /// One broker to which every byte is counted.
    pub async fn counted_broker(&self) -> Result<&Counted, Failure> {
        let start = async || {
            let proxy = Proxy::bind().await?;
            let (port, name) = (proxy.port.to_string(), self.named("kafka-counted"));
            let up = ["up", "--name", &name, "--nodes", "1", "--advertise", &port];
            proxy.forward_to(run("kafka", &up).await?.parse()?);
            let data = repository().join("target/dev").join(&name).join("n1");
            Ok::<_, Failure>(Counted { brokers: format!("127.0.0.1:{port}"), proxy, data })
        };
        self.counted.get_or_try_init(start).await
    }

    /// A new, empty database in PostgreSQL.
    pub async fn database(&self) -> Result<Scratch, Failure> {
        let start = async || run("postgres", &["up", "--name", &self.named("postgres")]).await;
        let server = self.postgres.get_or_try_init(start).await?;
        let name = self.new_name().replace('-', "_");
        execute(server, format!("CREATE DATABASE {name}")).await?;
        let (base, _) = server.rsplit_once('/').ok_or("the URL names no database")?;
        let url = format!("{base}/{name}");
        let database = Database::open(&url, Mode::Migrate).await?;
        Ok(Scratch { database, url, name, server: server.clone() })
    }

    /// A name that nothing of this run has had.
    pub fn new_name(&self) -> String {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        format!("{}-{}-{number}", self.name, std::process::id())
    }

    /// Ends what was started here and removes its data; also what an earlier run left behind.
    pub async fn down(&self) -> Result<(), Failure> {
        for kafka in ["kafka", "kafka3", "kafka-tls", "kafka-counted"] {
            run("kafka", &["down", "--name", &self.named(kafka)]).await?;
        }
        run("postgres", &["down", "--name", &self.named("postgres")]).await.map(drop)
    }

    fn named(&self, what: &str) -> String {
        format!("{}-{what}", self.name)
    }
}

/// Settings of a client of brokers, which may have the options of [`Servers::tls_broker`] behind their address.
pub fn client(brokers: &str) -> Result<ClientConfig, Failure> {
    let mut settings = ClientConfig::new();
    let (address, options) = brokers.split_once('?').unwrap_or((brokers, ""));
    settings.set("bootstrap.servers", address);
    for (name, value) in options.split('&').filter_map(|option| option.split_once('=')) {
        match (name, value.strip_prefix('@')) {
            ("tls", _) => settings.set("security.protocol", "sasl_ssl"),
            ("ca", _) => settings.set("ssl.ca.location", value),
            ("sasl", _) => settings.set("sasl.mechanism", value.to_uppercase()),
            ("user", _) => settings.set("sasl.username", value),
            ("password", Some(file)) => {
                settings.set("sasl.password", std::fs::read_to_string(file)?.trim_end())
            }
            _ => return Err(format!("no option of a client: {name}").into()),
        };
    }
    Ok(settings)
}

/// How many brokers an address names.
pub fn node_count(brokers: &str) -> usize {
    brokers.split(',').count()
}

/// How long the server's vacuum may keep a database from being dropped.
const DROP_WAIT_MAX: Duration = Duration::from_secs(120);

/// A database of its own.
pub struct Scratch {
    /// Open, with the toolkit's tables.
    pub database: Database,
    /// Its URL.
    pub url: String,
    name: String,
    server: String,
}

impl Scratch {
    /// Removes it.
    pub async fn remove(self) -> Result<(), Failure> {
        self.database.close().await;
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        // The server's own vacuum may be in it, and cannot be forced out.
        let mut refused = None;
        let dropped = async || {
            let result = execute(&self.server, drop.clone()).await;
            Ok(result.map_err(|failure| refused = Some(failure)).ok())
        };
        let done = until("a database is dropped", DROP_WAIT_MAX, dropped).await;
        done.map_err(|late| match refused {
            Some(failure) => format!("{late}: {failure}").into(),
            None => late,
        })
    }
}

async fn execute(server: &str, sql: String) -> Result<(), Failure> {
    let mut connection = PgConnection::connect(server).await?;
    // The name in it is ours.
    connection.execute(AssertSqlSafe(sql)).await?;
    Ok(connection.close().await?)
}

/// Removes the topics of a log.
pub async fn remove_log(brokers: &str, name: &str) -> Result<(), Failure> {
    let admin: AdminClient<DefaultClientContext> = client(brokers)?.create()?;
    let topics = ["events", "commands", "replies"].map(|topic| format!("{name}.{topic}"));
    let topics: Vec<_> = topics.iter().map(String::as_str).collect();
    // One that was never made is no failure.
    admin.delete_topics(&topics, &AdminOptions::new()).await.map(drop)?;
    Ok(())
}

/// The folder of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs one of the scripts in `dev/` and answers the last line it printed.
async fn run(script: &str, arguments: &[&str]) -> Result<String, Failure> {
    let mut command = Command::new(repository().join("dev").join(script));
    let output = command.args(arguments).stdin(Stdio::null()).output().await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let complained = String::from_utf8_lossy(&output.stderr);
        return Err(format!("dev/{script} {arguments:?}: {said}{complained}").into());
    }
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

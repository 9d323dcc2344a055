//! The built program as its users meet it: started as a process, spoken to over HTTP.
#![allow(dead_code, unused_macros, unused_imports, reason = "each test program uses its own part")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use kafold::projections::sqlx::{AssertSqlSafe, Connection, PgConnection, query};
use serde_json::{Value, json};
use tempfile::TempDir;

#[cfg(feature = "otlp")]
pub(crate) mod collector;

/// Longest wait for anything here; reached only when something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `probe` returns a value; panics with `what` after the limit.
#[expect(clippy::disallowed_methods, reason = "the one place that waits for another process")]
pub(crate) fn wait_at_most<T>(
    limit: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begun.elapsed() < limit, "gave up waiting: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until `probe` returns a value, at most [`PATIENCE`].
pub(crate) fn wait_for<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    wait_at_most(PATIENCE, what, probe)
}

/// How long `work` took.
#[expect(clippy::disallowed_methods, reason = "the one stopwatch of these tests")]
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let result = work();
    (result, begun.elapsed())
}

/// A log and a database of a test's own.
pub(crate) struct Stack {
    pub(crate) folder: Arc<TempDir>,
    /// What the program is told.
    pub(crate) args: Vec<String>,
}

impl Stack {
    /// The default: one file.
    pub(crate) fn embedded() -> Self {
        Self { folder: Arc::new(TempDir::new().expect("a folder")), args: Vec::new() }
    }

    /// Kafka and PostgreSQL, when both are there.
    pub(crate) fn kafka_and_postgres() -> Option<Self> {
        static TOLD: Once = Once::new();
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let (Some(kafka), Some(postgres)) =
            (variable("KAFOLD_TEST_KAFKA"), variable("KAFOLD_TEST_POSTGRES"))
        else {
            let all = variable("KAFOLD_TEST_REQUIRE_ALL").is_some();
            assert!(!all, "KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers");
            TOLD.call_once(|| {
                // To the stream itself: what a passing test prints is not shown.
                let said = writeln!(
                    std::io::stderr(),
                    "skipped on Kafka and PostgreSQL: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES \
                     name no servers (dev/test starts them)"
                );
                said.expect("standard error is open");
            });
            return None;
        };
        let folder = Arc::new(TempDir::new().expect("a folder"));
        let name = unique_name();
        let log = format!("kafka://{kafka}/{name}?partitions=3&replication=1");
        let database = create_database(&postgres, &name);
        let args = ["--log".into(), log, "--database".into(), database];
        Some(Self { folder, args: args.into() })
    }

    /// The same, with the database reached through a proxy.
    pub(crate) fn with_database_proxy(mut self) -> (Self, Proxy) {
        let url = self.args.last_mut().expect("the database's URL");
        let (scheme, rest) = url.split_once('@').expect("a URL with a user");
        let (server, name) = rest.split_once('/').expect("a URL with a database");
        let proxy = Proxy::to(server.to_owned());
        *url = format!("{scheme}@{}/{name}", proxy.address);
        (self, proxy)
    }

    /// Starts the service and waits until it is ready.
    pub(crate) fn serve(&self) -> Service {
        let service = self.start(&[]);
        service.wait_ready();
        service
    }

    /// Starts the service and waits until it listens.
    pub(crate) fn start(&self, more: &[&str]) -> Service {
        self.start_with(more, &[])
    }

    /// The same with these variables in its environment.
    pub(crate) fn start_with(&self, more: &[&str], environment: &[(&str, &str)]) -> Service {
        let args = self.args.iter().map(String::as_str).chain(more.iter().copied());
        Service::start(&self.folder, &args.collect::<Vec<_>>(), environment)
    }

    /// What its topics begin with; `None` where it has none.
    pub(crate) fn log_name(&self) -> Option<&str> {
        let (_, url) = self.args.get(1)?.split_once("kafka://")?;
        url.split('?').next()?.split('/').nth(1)
    }
}

/// A TCP connection to a server that can be cut and mended.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<Line>>,
}

#[derive(Default)]
struct Line {
    is_cut: bool,
    connections: Vec<TcpStream>,
}

impl Proxy {
    /// Forwards to `server` until the process ends.
    pub(crate) fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(Line::default()));
        let line = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a connection");
                let mut line = line.lock().expect("no panic holds it");
                if line.is_cut {
                    continue;
                }
                let Ok(upstream) = TcpStream::connect(&server) else { continue };
                for (from, to) in [(&client, &upstream), (&upstream, &client)] {
                    let mut from = from.try_clone().expect("a handle");
                    let mut to = to.try_clone().expect("a handle");
                    thread::spawn(move || {
                        drop(std::io::copy(&mut from, &mut to));
                        drop(to.shutdown(Shutdown::Both));
                    });
                }
                line.connections.extend([client, upstream]);
            }
        });
        Self { address, state }
    }

    /// Ends every connection and takes no new one.
    pub(crate) fn cut(&self) {
        let mut line = self.state.lock().expect("no panic holds it");
        line.is_cut = true;
        for connection in line.connections.drain(..) {
            drop(connection.shutdown(Shutdown::Both));
        }
    }

    /// Takes connections again.
    pub(crate) fn mend(&self) {
        self.state.lock().expect("no panic holds it").is_cut = false;
    }
}

/// A name that no other test of any run has; PostgreSQL's and Kafka's rules fit it.
pub(crate) fn unique_name() -> String {
    use kafold::IdGenerator;
    format!("orders_test_{:016x}", kafold::clock::RandomIds.random())
}

/// Runs a statement on PostgreSQL.
pub(crate) fn execute(database: &str, statement: String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut connection = PgConnection::connect(database).await.expect("connect to PostgreSQL");
        query(AssertSqlSafe(statement)).execute(&mut connection).await.expect("executed");
    });
}

fn create_database(server: &str, name: &str) -> String {
    execute(server, format!("CREATE DATABASE {name}"));
    let (server, _) = server.rsplit_once('/').expect("the URL names a database");
    format!("{server}/{name}")
}

/// The program with these arguments, not started yet, without any setting of the environment.
pub(crate) fn orders(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orders"));
    command.current_dir(folder).args(args).stdin(Stdio::null());
    let is_ours = |name: &str| {
        let exact = ["KAFOLD_LOG", "KAFOLD_DATABASE", "KAFOLD_LISTEN", "ORDERS_URL", "RUST_LOG"];
        exact.contains(&name) || name.starts_with("OTEL_")
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(is_ours)) {
        command.env_remove(name);
    }
    command
}

/// Runs the program to its end.
pub(crate) fn run(folder: &Path, args: &[&str]) -> Output {
    orders(folder, args).output().expect("the program starts")
}

/// A running `orders serve`; killed when it is dropped.
pub(crate) struct Service {
    child: Child,
    pub(crate) address: SocketAddr,
    log: PathBuf,
    /// The files of the service, which the test's `Stack` may not outlive.
    _folder: Arc<TempDir>,
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Service {
    fn start(folder: &Arc<TempDir>, args: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_as("serve", folder, args, environment)
    }

    /// Starts a listening command of the program.
    pub(crate) fn start_as(
        command: &str,
        folder: &Arc<TempDir>,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let log = folder.path().join(format!("{}.log", unique_name()));
        let output = File::create(folder.path().join("stdout")).expect("a file");
        let any_port = ["--listen", "127.0.0.1:0"];
        let listen = if args.contains(&"--listen") { &[][..] } else { &any_port[..] };
        let child = orders(folder.path(), &[&[command], listen, args].concat())
            .env("RUST_LOG", "info,orders=debug,kafold_axum=debug")
            .envs(environment.iter().copied())
            .stdout(output)
            .stderr(File::create(&log).expect("a file"))
            .spawn()
            .expect("the program starts");
        // Made before the wait: should that fail, dropping it ends the process.
        let address = ([0, 0, 0, 0], 0).into();
        let mut service = Self { child, address, log, _folder: Arc::clone(folder) };
        service.address = wait_for("the service listens", || {
            let text = service.log();
            let ended = service.child.try_wait().expect("a child");
            assert!(ended.is_none(), "the service ended: {text}");
            let (_, rest) = text.split_once("address=")?;
            let (address, _) = rest.split_once(' ')?;
            address.parse().ok()
        });
        service
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("the log")
    }

    pub(crate) fn wait_ready(&self) {
        wait_for("the service is ready", || {
            (self.get("/health/ready").status == 200).then_some(())
        });
    }

    /// Returns the number of open files and connections of the process.
    pub(crate) fn descriptors(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        open.expect("the process is there").count()
    }

    /// Sends it a signal, such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let (signal, pid) = (format!("-{name}"), self.child.id().to_string());
        let sent = Command::new("kill").args([signal, pid]).status().expect("kill starts");
        assert!(sent.success(), "the service is gone: {}", self.log());
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        wait_for("the service ends", || self.child.try_wait().expect("a child"))
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("a running child");
        self.child.wait().expect("a child");
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.request("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_with(path, &[], body)
    }

    pub(crate) fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        self.request("POST", path, &all, body.to_string().as_bytes())
    }

    /// Places an order of one line and answers its reply.
    pub(crate) fn place(&self, order_id: &str, amount_cents: i64) -> Reply {
        let placed = self.post("/orders", &order(order_id, amount_cents));
        assert_eq!(placed.status, 201, "{placed:?}");
        placed
    }

    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Reply {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len());
        self.send(&[head.as_bytes(), body].concat())
    }

    /// Sends these bytes to the letter. A connection that breaks answers status 0.
    pub(crate) fn send(&self, bytes: &[u8]) -> Reply {
        Reply::of(exchange(self.address, bytes))
    }
}

/// Posts to whoever listens there.
pub(crate) fn post(
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> Reply {
    let body = body.to_string();
    let mut head = format!("POST {path} HTTP/1.1\r\nhost: {address}\r\n");
    for (name, value) in headers.iter().chain([&("content-type", "application/json")]) {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len());
    Reply::of(exchange(address, format!("{head}{body}").as_bytes()))
}

/// An address that is free now, with a port that no outgoing connection is given by chance.
pub(crate) fn free_address() -> String {
    use kafold::IdGenerator;
    wait_for("a free port", || {
        let port = 10_000 + kafold::clock::RandomIds.random() % 20_000;
        let address = format!("127.0.0.1:{port}");
        TcpListener::bind(&address).is_ok().then_some(address)
    })
}

/// An order of one line.
pub(crate) fn order(order_id: &str, amount_cents: i64) -> Value {
    json!({"order_id": order_id, "customer": "c1",
           "lines": [{"sku": "a", "quantity": 2, "amount_cents": amount_cents}]})
}

fn exchange(address: SocketAddr, bytes: &[u8]) -> std::io::Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    drop(stream.shutdown(Shutdown::Both));
    Reply::parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| std::io::Error::other("the connection was closed without an answer"))
}

/// What the service answered.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) text: String,
}

impl Reply {
    /// A connection that breaks answers status 0.
    fn of(answer: std::io::Result<Self>) -> Self {
        answer.unwrap_or_else(|error| Self {
            status: 0,
            headers: Vec::new(),
            text: error.to_string(),
        })
    }

    fn parse(answer: &str) -> Option<Self> {
        let (head, text) = answer.split_once("\r\n\r\n")?;
        let mut lines = head.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let header = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_ascii_lowercase(), value.to_owned()))
        };
        Some(Self { status, headers: lines.filter_map(header).collect(), text: text.to_owned() })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The position that a command answered.
    pub(crate) fn position(&self) -> String {
        self.json()["position"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
    }

    /// Demands a well-formed problem of this status, whose type has this name.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, name: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let problem = self.json();
        assert_eq!(problem["type"], format!("/problems/{name}"), "{self:?}");
        assert_eq!(problem["status"], status, "{self:?}");
        for member in ["title", "detail"] {
            assert!(problem[member].as_str().is_some_and(|text| text.len() > 3), "{self:?}");
        }
        assert_eq!(self.header("retry-after").is_some(), status == 503, "{self:?}");
    }
}

/// Runs each claim on either kind of log.
macro_rules! on_each_log {
    ($($claim:ident),* $(,)?) => {
        mod embedded {
            $(#[test]
            fn $claim() {
                super::$claim(&crate::support::Stack::embedded());
            })*
        }
        mod kafka_and_postgres {
            $(#[test]
            fn $claim() {
                if let Some(stack) = crate::support::Stack::kafka_and_postgres() {
                    super::$claim(&stack);
                }
            })*
        }
    };
}
pub(crate) use on_each_log;

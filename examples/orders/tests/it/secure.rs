//! The whole service where broker and database take only TLS, logins and exact rights.

use crate::support;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kafold::projections::sqlx::{AssertSqlSafe, Connection, PgConnection, query_as, raw_sql};
use serde_json::Value;
use support::{Service, free_address, orders, run, unique_name, wait_at_most, wait_for};
use tempfile::TempDir;

const PURCHASES: usize = 10_000;
/// Longest duration of the import: 20 000 commands, each to be appended and projected by four processes on two cores.
const IMPORT_MAX: Duration = Duration::from_secs(240);
const CUSTOMERS: usize = 2_000;
const PASSWORD: &str = "kafold";
/// The roles that `acl print` and `grants print` know, but for the owner.
const ROLES: [&str; 4] = ["service", "worker", "reader", "doctor"];

/// A log on the broker with TLS, and a PostgreSQL server with TLS of the test's own.
struct Secured {
    folder: Arc<TempDir>,
    log: String,
    brokers: String,
    files: PathBuf,
    server: String,
    /// The URL of the database for its owner.
    owner: String,
}

impl Secured {
    fn up() -> Option<Self> {
        let variable = |name: &str| std::env::var(name).ok();
        let Some(brokers) = variable("KAFOLD_TEST_KAFKA_TLS") else {
            assert!(
                variable("KAFOLD_TEST_REQUIRE_ALL").is_none(),
                "KAFOLD_TEST_KAFKA_TLS names no broker, and nothing may be skipped"
            );
            eprintln!("skipped: KAFOLD_TEST_KAFKA_TLS names no broker (dev/test starts one)");
            return None;
        };
        let files =
            variable("KAFOLD_TEST_KAFKA_TLS_FILES").expect("the folder of the cluster's files");
        let folder = Arc::new(TempDir::new().expect("a folder"));
        let mut secured = Self {
            folder,
            log: unique_name(),
            brokers,
            files: files.into(),
            server: format!("orders-secure-{}", std::process::id()),
            owner: String::new(),
        };
        let password = secured.folder.path().join("password");
        fs::write(&password, PASSWORD).expect("a file");
        fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).expect("its mode");
        secured.owner = secured.dev("postgres", &["up", "--name", &secured.server, "--tls"]);
        Some(secured)
    }

    /// Runs a script of `dev/`; returns the last line of its output.
    fn dev(&self, script: &str, arguments: &[&str]) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dev").join(script);
        let output = Command::new(path).args(arguments).output().expect("the script runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script} {arguments:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned()
    }

    /// `--log` and `--database` for a role that logs in on both servers.
    fn as_role(&self, role: &str) -> [String; 4] {
        let (brokers, log, files) = (&self.brokers, &self.log, self.files.display());
        let log = format!(
            "kafka://{brokers}/{log}?partitions=3&replication=1&tls=true&ca={files}/ca.crt\
             &sasl=scram-sha-512&user={role}&password=@{files}/passwords/{role}"
        );
        let database = if role == "admin" {
            self.owner.clone()
        } else {
            let (_, place) = self.owner.split_once('@').expect("a URL with a user");
            let password = self.folder.path().join("password");
            format!("postgres://kafold_{role}@{place}&password=@{}", password.display())
        };
        ["--log".into(), log, "--database".into(), database]
    }

    /// Runs `orders admin COMMAND` as a role.
    fn admin(&self, role: &str, command: &[&str]) -> Output {
        let urls = self.as_role(role);
        let urls: Vec<_> = urls.iter().map(String::as_str).collect();
        run(self.folder.path(), &[&["admin"], command, &urls[..]].concat())
    }

    #[track_caller]
    fn succeeds(&self, role: &str, command: &[&str]) -> String {
        let output = self.admin(role, command);
        let (text, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{command:?} as {role}: {text}{errors}");
        text
    }

    /// Executes statements as the owner.
    fn sql(&self, statements: &str) {
        blocking(async {
            let mut connection = PgConnection::connect(&self.owner).await.expect("connects");
            let statements = AssertSqlSafe(statements.to_owned());
            raw_sql(statements).execute(&mut connection).await.expect("is executed");
        });
    }

    /// Returns the number of sessions of a role, and how many of these are encrypted.
    fn sessions(&self, role: &str) -> (i64, i64) {
        let (_, place) = self.owner.split_once('@').expect("a URL with a user");
        let url = format!("postgres://kafold_{role}:{PASSWORD}@{place}");
        let sql = "SELECT count(*), count(*) FILTER (WHERE ssl) \
                   FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = current_user";
        blocking(async {
            let mut connection = PgConnection::connect(&url).await.expect("connects");
            query_as(sql).fetch_one(&mut connection).await.expect("is counted")
        })
    }

    /// Gives each role the rights that are printed for it, on the broker and in the database.
    fn grant(&self) {
        for role in ROLES {
            self.sql(&format!("CREATE ROLE kafold_{role} LOGIN PASSWORD '{PASSWORD}'"));
        }
        let cluster = self.files.parent().and_then(Path::file_name).expect("the cluster's folder");
        let cluster = cluster.to_str().expect("UTF-8");
        thread::scope(|scope| {
            for role in ROLES {
                scope.spawn(move || {
                    let principal = format!("User:{role}");
                    let command = ["acl", "print", "--role", role, "--principal", &principal];
                    for line in self.succeeds("admin", &command).lines() {
                        let words: Vec<_> = line.split(' ').collect();
                        let ["kafka-acls.sh", "--bootstrap-server", _, rest @ ..] = &words[..]
                        else {
                            assert!(line.starts_with('#'), "{line}");
                            continue;
                        };
                        self.dev("kafka", &[&["acl", "--name", cluster], rest].concat());
                    }
                });
            }
        });
        for role in ROLES {
            self.sql(&self.succeeds("admin", &["grants", "print", "--role", role]));
        }
    }

    fn start(&self, command: &str, role: &str, address: &str) -> Service {
        let urls = self.as_role(role);
        let mut arguments: Vec<_> = urls.iter().map(String::as_str).collect();
        arguments.extend(["--listen", address]);
        Service::start_as(command, &self.folder, &arguments, &[])
    }
}

impl Drop for Secured {
    fn drop(&mut self) {
        self.dev("postgres", &["down", "--name", &self.server]);
    }
}

fn blocking<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn placed(node: &Service) -> i64 {
    node.get("/reports/sales?by=day").json()["total"]["orders"].as_i64().unwrap_or(0)
}

#[test]
fn three_nodes_import_rebuild_and_verify_over_tls_under_the_printed_rights() {
    let Some(place) = Secured::up() else { return };
    place.succeeds("admin", &["topic", "create"]);
    place.succeeds("admin", &["migrate"]);
    place.grant();

    let addresses = [free_address(), free_address(), free_address()];
    let mut nodes: Vec<_> =
        addresses.iter().map(|address| place.start("serve", "service", address)).collect();
    nodes.iter().for_each(Service::wait_ready);
    let worker = place.start("work", "worker", &free_address());
    worker.wait_ready();

    let mut purchases = String::new();
    for nth in 0..PURCHASES {
        let (customer, quantity) = (nth % CUSTOMERS + 1, nth % 5 + 1);
        let (month, day) = (nth % 12 + 1, nth % 28 + 1);
        writeln!(purchases, "{customer:05} 1997{month:02}{day:02} {quantity} {quantity}1.77")
            .expect("memory");
    }
    fs::write(place.folder.path().join("purchases.txt"), purchases).expect("a file");
    let urls: Vec<_> = nodes.iter().map(Service::url).collect();
    let import = ["import", "purchases.txt", "--url", &urls.join(",")];
    let log = fs::File::create(place.folder.path().join("import.log")).expect("a file");
    let mut importing = orders(place.folder.path(), &import)
        .stdout(log.try_clone().expect("a handle"))
        .stderr(log)
        .spawn()
        .expect("the program starts");
    wait_for("some orders are in", || (placed(&nodes[1]) >= 1_000).then_some(()));
    nodes.remove(0).kill();
    let restarted = place.start("serve", "service", &addresses[0]);
    nodes.insert(0, restarted);
    let status =
        wait_at_most(IMPORT_MAX, "the import ends", || importing.try_wait().expect("a child"));
    let said = fs::read_to_string(place.folder.path().join("import.log")).expect("a log");
    assert!(status.success() && said.contains("reports what the file has"), "{said}");

    let rebuild = ["projections", "rebuild", "--all", "--wait", "--reason", "a test"];
    place.succeeds("admin", &rebuild);
    // It copies read models, which takes the owner's rights.
    let verified = place.succeeds("admin", &["verify"]);
    assert_eq!(verified.matches("no difference").count(), 7, "{verified}");
    for node in nodes.iter().chain([&worker]) {
        node.wait_ready();
    }
    for (role, least) in [("service", 4), ("worker", 2)] {
        let (all, encrypted) = place.sessions(role);
        assert!(all >= least && all == encrypted, "{role}: {encrypted} of {all} are encrypted");
    }

    for command in [
        &["status"][..],
        &["stream", "show", "order-cdnow-1"],
        &["events", "tail", "--from-beginning"],
    ] {
        place.succeeds("reader", command);
    }
    for command in [&["topic", "check"][..], &["doctor"], &["doctor", "--as", "doctor"]] {
        place.succeeds("doctor", command);
    }
    for role in ROLES {
        place.succeeds(role, &["doctor", "--as", role]);
    }
    let doctor: Value =
        serde_json::from_str(&place.succeeds("doctor", &["doctor", "--json"])).expect("JSON");
    assert!(doctor.to_string().contains("TLSv1.3"), "{doctor}");
}

//! Transport, secrets and rights on a TLS server started by this program.

use std::path::Path;
use std::time::Duration;

use kafold_core::Clock;
use kafold_core::clock::SystemClock;
use kafold_migrations::sqlx::{self, AssertSqlSafe, Connection, PgConnection};
use kafold_migrations::{Database, DatabaseError, Mode, rights, rights::Role};

use super::{dev, open, refusal, server};

/// Deadline for the notice of a change on the server, and of its end.
const NOTICED_WITHIN: Duration = Duration::from_secs(15);

/// A server of `dev/postgres up --tls`, removed at the end of the test.
struct TlsServer {
    name: String,
    /// The URL with `?sslmode=verify-full&sslrootcert=…`.
    url: String,
}

impl TlsServer {
    fn up() -> Self {
        let name = format!("migrations-tls-{}", std::process::id());
        let mut server = Self { name, url: String::new() };
        server.url = server.dev(&["up", "--tls"]);
        server
    }

    /// Runs `dev/postgres`. Returns the last line of its output.
    fn dev(&self, arguments: &[&str]) -> String {
        dev("postgres", &self.name, arguments)
    }

    /// Returns the URL of a database with other parameters.
    fn with(&self, database: &str, parameters: &str) -> String {
        let (place, _) = self.url.split_once("/kafold?").expect("a URL with parameters");
        format!("{place}/{database}?{parameters}")
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        self.dev(&["down"]);
    }
}

pub(super) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let clock = SystemClock;
    let deadline = clock.instant() + NOTICED_WITHIN;
    while !is_so().await {
        assert!(clock.instant() < deadline, "not within {NOTICED_WITHIN:?}: {what}");
        clock.sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_tls_is_spoken_to_as_the_url_says_or_refused_by_cause() {
    let test = "a_server_with_tls_is_spoken_to_as_the_url_says_or_refused_by_cause";
    let Some(plain) = server(test) else { return };
    let own = TlsServer::up();
    let authorities = own.url.rsplit_once("sslrootcert=").expect("it is named").1.to_owned();
    sessions_are_encrypted(&own, &authorities).await;
    wrong_servers_and_logins_are_refused(&own, &authorities, &plain).await;
    what_changes_while_it_runs_is_noticed(&own, &authorities).await;
    each_right_that_is_missing_is_named(&own).await;
}

async fn sessions_are_encrypted(own: &TlsServer, authorities: &str) {
    let verified = format!("sslmode=verify-full&sslrootcert={authorities}");
    for parameters in ["", "sslmode=prefer", "sslmode=allow", "sslmode=require", &verified] {
        let database = open(&own.with("kafold", parameters)).await;
        let sql = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let found: (bool, Option<String>) =
            sqlx::query_as(sql).fetch_one(database.pool()).await.expect("reads");
        assert_eq!(found, (true, Some("TLSv1.3".to_owned())), "{parameters:?}");
    }
    let database = open(&own.url).await;
    let shown = database.server_tls().await.expect("looks").expect("offers TLS");
    assert_eq!(shown.protocol, "TLSv1.3");
    assert!(shown.subject.contains("kafold test server"), "{shown:?}");
    assert!(shown.issuer.contains("kafold test authority"), "{shown:?}");
    let days = (shown.not_after as i64 - SystemClock.now().timestamp()) / 86_400;
    assert!((363..=366).contains(&days), "{days}");
}

async fn wrong_servers_and_logins_are_refused(own: &TlsServer, authorities: &str, plain: &str) {
    let check = async |url: &str, expected: &str| {
        let refused = refusal(url).await;
        assert!(refused.contains(expected), "{expected:?} is not in: {refused}");
    };
    let verified = format!("sslmode=verify-full&sslrootcert={authorities}");
    let other = format!(
        "sslmode=verify-full&sslrootcert={}",
        authorities.replace("ca.crt", "other-ca.crt")
    );
    check(&own.with("kafold", &other), "signed by no authority that is trusted here").await;
    check(&own.with("kafold", "sslmode=verify-full"), "sslrootcert=FILE").await;
    check(&own.with("kafold", "sslmode=disable"), "the server refuses clear text").await;
    check(&own.with("kafold", "sslmode=verify-full&sslrootcert=/no/ca"), "/no/ca of sslrootcert")
        .await;
    check(&own.with("no_such", &verified), "create the database").await;
    let password = own.with("kafold", &verified).replace("kafold:kafold@", "kafold:secret@");
    check(&password, "check user and password").await;
    let user = own.with("kafold", &verified).replace("kafold:kafold@", "nobody:secret@");
    check(&user, "check user and password").await;
    check(&format!("{plain}?sslmode=require"), "the server offers no TLS").await;
    check(&format!("{plain}?sslmode=verify-full"), "the server offers no TLS").await;

    // An address of this machine outside the names of loopback.
    let remote = |url: &str| url.replace("@127.0.0.1:", "@0.0.0.0:");
    check(&remote(plain), "the server offers no TLS").await;
    check(&remote(&format!("{plain}?sslmode=disable")), "allow_unsafe=clear_text").await;
    check(&remote(&own.with("kafold", "")), "signed by no authority").await;
    check(&remote(&own.with("kafold", "sslmode=require")), "allow_unsafe=unverified_tls").await;
    check(&remote(&own.url), "is not for the host name in the URL").await;
    open(&remote(&own.with("kafold", "sslmode=require&allow_unsafe=unverified_tls"))).await;
    open(&remote(&format!("{plain}?allow_unsafe=clear_text"))).await;

    own.dev(&["start", "--certificate", "other-host"]);
    check(&own.url, "but for other-host.example").await;
    own.dev(&["start", "--certificate", "expired"]);
    check(&own.url, "the server's certificate has expired; renew it").await;
    own.dev(&["start", "--certificate", "good"]);
}

async fn what_changes_while_it_runs_is_noticed(own: &TlsServer, authorities: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("password");
    private(&file, "kafold\n");
    let parameters = format!("sslrootcert={authorities}&password=@{}", file.display());
    let url = own.with("kafold", &parameters).replace("kafold:kafold@", "kafold@");
    let database = Database::open(&url, Mode::Migrate).await.expect("opens");
    assert!(!format!("{database:?}").contains("kafold\""), "{database:?}");
    database.require(Role::Service).await.expect("it owns the tables");
    let complains = async |of: &str| {
        eventually(of, async || database.complaint().is_some_and(|text| text.contains(of))).await;
    };
    let is_mended =
        async || eventually("no complaint", async || database.complaint().is_none()).await;

    own.dev(&["start", "--certificate", "expired"]);
    complains("has expired").await;
    own.dev(&["start", "--certificate", "good"]);
    is_mended().await;

    let mut admin = PgConnection::connect(&own.url).await.expect("connects");
    let sql = "ALTER ROLE kafold PASSWORD 'rotated'";
    sqlx::raw_sql(sql).execute(&mut admin).await.expect("changes");
    complains("check user and password").await;
    private(&file, "rotated\n");
    is_mended().await;
    // The pool makes new connections with the changed password too.
    let Database::Postgres(postgres) = &database else { unreachable!("a PostgreSQL URL") };
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE usename = 'kafold' AND pid <> pg_backend_pid()";
    sqlx::raw_sql(sql).execute(&mut admin).await.expect("ends");
    eventually("the pool connects", async || {
        sqlx::query("SELECT 1").execute(postgres.pool()).await.is_ok()
    })
    .await;
    set_mode(&file, 0o644);
    complains("readable_secret").await;
    private(&file, "kafold");
    let sql = "ALTER ROLE kafold PASSWORD 'kafold'";
    sqlx::raw_sql(sql).execute(&mut admin).await.expect("changes");
    is_mended().await;
    database.close().await;
}

async fn each_right_that_is_missing_is_named(own: &TlsServer) {
    let mut admin = PgConnection::connect(&own.url).await.expect("connects");
    let run = async |connection: &mut PgConnection, sql: &str| {
        let ran = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await;
        ran.unwrap_or_else(|error| panic!("{sql}: {error}"));
    };
    run(&mut admin, "CREATE DATABASE grants").await;
    let (_, parameters) = own.url.split_once('?').expect("parameters");
    let owner = own.with("grants", parameters);
    // Only granted rights are in effect: the owner's tables, and no rights for PUBLIC.
    open(&owner).await;
    let mut owner = PgConnection::connect(&owner).await.expect("connects");
    run(&mut owner, "REVOKE ALL ON SCHEMA public FROM PUBLIC").await;
    for role in Role::ALL {
        let login = role.default_login();
        run(&mut owner, &format!("CREATE ROLE {login} LOGIN PASSWORD 'kafold'")).await;
        run(&mut owner, &format!("GRANT {login} TO kafold")).await;
    }
    for role in [Role::Service, Role::Worker, Role::Reader, Role::Doctor] {
        let login = role.default_login();
        let url =
            own.with("grants", parameters).replace("kafold:kafold@", &format!("{login}:kafold@"));
        let lines = rights::grants(role, &login);
        for line in &lines {
            run(&mut owner, line).await;
        }
        let database = open(&url).await;
        assert_eq!(database.missing_rights(role, None).await.expect("reads"), [""; 0]);
        for line in lines.iter().filter(|line| line.starts_with("GRANT")) {
            run(&mut owner, &line.replace("GRANT", "REVOKE").replace(" TO ", " FROM ")).await;
            let missing = rights::missing(&mut owner, role, Some(&login)).await.expect("reads");
            assert_eq!(missing, std::slice::from_ref(line));
            // The login queries its own missing rights, even without USAGE on the schema.
            let missing = database.missing_rights(role, None).await.expect("reads");
            assert_eq!(missing, std::slice::from_ref(line));
            run(&mut owner, line).await;
        }
        for kept in ["kafold_event SET version = 1", "kafold_audit SET actor = ''"] {
            let sql = format!("UPDATE {kept}");
            let denied = sqlx::raw_sql(AssertSqlSafe(sql)).execute(database.pool()).await;
            let denied = denied.expect_err("denied");
            assert_eq!(denied.as_database_error().and_then(|e| e.code()).as_deref(), Some("42501"));
        }
    }
    a_right_is_missed_at_the_start_and_while_it_runs(own, parameters, &mut owner).await;
}

async fn a_right_is_missed_at_the_start_and_while_it_runs(
    own: &TlsServer,
    parameters: &str,
    owner: &mut PgConnection,
) {
    let url = own.with("grants", parameters).replace("kafold:kafold@", "kafold_service:kafold@");
    let database = Database::open(&url, Mode::Migrate).await.expect("the tables are current");
    database.require(Role::Service).await.expect("has all rights");
    let sql = "REVOKE INSERT ON kafold_event FROM kafold_service";
    sqlx::raw_sql(sql).execute(&mut *owner).await.expect("revokes");
    let line = "GRANT INSERT ON kafold_event TO kafold_service;";
    let refused = database.require(Role::Service).await.expect_err("lacks a right");
    assert!(matches!(refused, DatabaseError::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains(line), "{refused}");
    eventually("it complains", async || {
        database.complaint().is_some_and(|complaint| complaint.contains(line))
    })
    .await;
    sqlx::raw_sql(line).execute(&mut *owner).await.expect("grants");
    eventually("it complains no more", async || database.complaint().is_none()).await;
    database.close().await;
}

fn private(file: &Path, content: &str) {
    std::fs::write(file, content).expect("writes");
    set_mode(file, 0o600);
}

fn set_mode(file: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).expect("sets the mode");
}

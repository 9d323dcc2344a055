//! The guide for authors: every block of Rust in it is code of this crate, and every block of shell commands runs.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use kafold::projections::sqlx::{AssertSqlSafe, Connection, PgConnection, query};

mod changed;
#[expect(clippy::print_stdout, reason = "a first program prints what it has done")]
mod first;
mod long;
mod streams;

/// Most lines of the first program of the guide, blank lines left out.
const FIRST_LINES_MAX: usize = 65;

/// Runs blocks as an author would. `cargo run` is the built example in the background, until it is ready; the
/// template of `kafold new` is compiled as the example itself, so `cargo test` has been run.
const SHELL: &str = r#"
set -euo pipefail
pids=()
stop() { for pid in "${pids[@]}"; do kill "$pid"; done; wait; pids=(); }
trap stop EXIT
cargo() {
  [ "$1" = run ] || return 0
  "$ACCOUNTS" >>"$FOLDER/service.log" 2>&1 &
  pids+=($!)
  for _ in {1..600}; do
    if command curl -fs "http://$KAFOLD_LISTEN/health/ready" >/dev/null; then return 0; fi
    kill -0 $! && sleep 0.1 || break
  done
  cat "$FOLDER/service.log"
  return 1
}
curl() { command curl -sS --fail-with-body "$@"; echo; }
kafold() { "$KAFOLD" "$@"; }
docker() { stop; }
cd "$FOLDER"
"#;

fn chapters() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guide");
    let mut chapters: Vec<_> = fs::read_dir(folder)
        .expect("the guide")
        .map(|entry| entry.expect("a chapter").path())
        .map(|path| {
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            (name, fs::read_to_string(path).expect("readable"))
        })
        .collect();
    chapters.sort();
    assert_eq!(chapters.len(), 9, "a README and eight chapters");
    chapters
}

/// Returns the blocks of a language in a document.
fn blocks<'t>(text: &'t str, language: &str) -> Vec<&'t str> {
    let fence = format!("```{language}\n");
    let parts = text.split(&fence).skip(1);
    parts.map(|rest| rest.split("```").next().expect("a block has an end")).collect()
}

/// Returns code without blanks, and without commas before a closing bracket.
fn squeezed(code: &str) -> String {
    let squeezed: String = code.replace("pub(crate) ", "").split_whitespace().collect();
    squeezed.replace(",}", "}").replace(",)", ")").replace(",]", "]")
}

#[test]
fn every_block_of_rust_is_compiled_and_run() {
    let sources = [
        include_str!("../../src/main.rs"),
        include_str!("changed.rs"),
        include_str!("first.rs"),
        include_str!("long.rs"),
        include_str!("streams.rs"),
    ];
    let sources = sources.map(squeezed);
    let readme = ("README.md".to_owned(), include_str!("../../../../README.md").to_owned());
    let mut count = 0;
    for (chapter, text) in chapters().into_iter().chain([readme]) {
        for block in blocks(&text, "rust").into_iter().chain(blocks(&text, "rs")) {
            let block_squeezed = squeezed(block);
            let is_code = sources.iter().any(|source| source.contains(&block_squeezed));
            assert!(is_code, "{chapter}: no source has\n{block}");
            count += 1;
        }
    }
    assert!(count >= 9, "{count}");
}

#[test]
fn the_first_program_is_short_and_runs() {
    let (_, text) = chapters().swap_remove(0);
    let program = blocks(&text, "rust")[0];
    let lines = program.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= FIRST_LINES_MAX, "{lines} lines");
    let folder = tempfile::tempdir().expect("a folder");
    env::set_current_dir(folder.path()).expect("a folder");
    first::main().expect("it runs");
    assert!(folder.path().join("accounts.db").is_file());
}

#[test]
fn every_shell_command_runs() {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let servers = variable("KAFOLD_TEST_KAFKA").zip(variable("KAFOLD_TEST_POSTGRES"));
    let must = variable("KAFOLD_TEST_REQUIRE_ALL").is_some();
    assert!(
        servers.is_some() || !must,
        "KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers"
    );
    let accounts = PathBuf::from(env!("CARGO_BIN_EXE_accounts"));
    let kafold = accounts.with_file_name("kafold");
    if !kafold.is_file() && !must {
        eprintln!("skipped: build the program kafold first, cargo build -p kafold-cli");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let free = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let (one, other) = (free().expect("a port").port(), free().expect("a port").port());
    let mut script = SHELL.to_owned();
    for (chapter, text) in chapters() {
        if servers.is_none() && chapter.as_str() >= "4" && chapter != "README.md" {
            eprintln!("skipped on Kafka and PostgreSQL: {chapter}");
            continue;
        }
        for block in blocks(&text, "sh") {
            script.push_str(&format!("echo '--- {chapter}'\n{block}"));
        }
    }
    script = script.replace("127.0.0.1:8080", &format!("127.0.0.1:{one}"));
    script = script.replace("127.0.0.1:8081", &format!("127.0.0.1:{other}"));
    if let Some((kafka, postgres)) = servers {
        let name = format!("guide_{}_{one}", std::process::id());
        let log = format!("'kafka://{kafka}/{name}?replication=1&partitions=3'");
        let database = create_database(&postgres, &name);
        script = script.replace("kafka://localhost:9092/shop", &log);
        let documented = "postgres://accounts:accounts@localhost:5432/accounts";
        script = script.replace(documented, &database);
    }
    let ended = Command::new("bash")
        .args(["-c", &script])
        .env_remove("KAFOLD_LOG")
        .env_remove("KAFOLD_DATABASE")
        .env("KAFOLD_LISTEN", format!("127.0.0.1:{one}"))
        .env("FOLDER", folder.path())
        .env("ACCOUNTS", accounts)
        .env("KAFOLD", kafold)
        .output()
        .expect("bash");
    let (said, failed) =
        (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{said}\n{failed}\n{script}");
    assert!(said.contains(r#"{"account":"ada","cents":500}"#), "{said}");
}

#[tokio::main]
async fn create_database(server: &str, name: &str) -> String {
    let mut connection = PgConnection::connect(server).await.expect("PostgreSQL");
    let create = query(AssertSqlSafe(format!("CREATE DATABASE {name}")));
    create.execute(&mut connection).await.expect("created");
    let (server, _) = server.rsplit_once('/').expect("the URL names a database");
    format!("{server}/{name}")
}

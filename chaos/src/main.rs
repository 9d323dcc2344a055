//! `dev/chaos`: a fault campaign, and the checker for its histories.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use kafold_chaos::campaign::RunArgs;
use kafold_chaos::history::Line;
use kafold_chaos::node::NodeArgs;
use kafold_chaos::{Failure, campaign, checker, node, report};
use tracing_subscriber::EnvFilter;

/// Breaks real brokers, a real database and three nodes of a service, and checks that every promise
/// is kept.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Run a campaign.
    Run(RunArgs),
    /// Check a history again.
    Check {
        /// A `history.jsonl`.
        history: PathBuf,
    },
    /// A node of the service under test: commands in, answers out, a JSON line each.
    #[command(hide = true)]
    Node(NodeArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = Command::parse();
    // The raw reader's client calls every end of a partition an error.
    let quiet = if matches!(command, Command::Node(_)) { "info" } else { "info,rdkafka=off" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(quiet));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let ended = match command {
        Command::Run(args) => campaign::run(args).await,
        Command::Check { history } => check(&history),
        Command::Node(args) => node::run(args).await.map(|()| true),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kafold-chaos: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(history: &Path) -> Result<bool, Failure> {
    let file = File::open(history).map_err(|error| format!("{}: {error}", history.display()))?;
    let mut lines: Vec<Line> = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = serde_json::from_str(&line?);
        lines.push(line.map_err(|error| format!("line {}: {error}", number + 1))?);
    }
    let verdict = checker::check(&lines);
    report::print(&verdict, &lines);
    Ok(verdict.anomalies.is_empty())
}

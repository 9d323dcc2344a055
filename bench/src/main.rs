//! `dev/bench`: the benchmarks.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kafold_bench::Failure;
use kafold_bench::baselines::server;
use kafold_bench::harness::{Bench, Size};
use kafold_bench::rows::memory::{self, Kept};
use kafold_bench::rows::{self, ROWS};
use kafold_bench::servers::{Servers, repository};
use tracing_subscriber::EnvFilter;

/// Events are allocated on one thread and freed on another all the time, which the allocator of the C
/// library pays dearly for; librdkafka shares this one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// kafold against careful baselines; each row of docs/performance.md, or those that are named.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Small sizes and few pairs: minutes for all rows together.
    #[arg(long)]
    quick: bool,
    /// Names of the servers begin so.
    #[arg(long, default_value = "bench")]
    name: String,
    /// Rows, such as R1; all of them by default.
    rows: Vec<String>,
}

/// Parts of benchmarks that are processes of their own.
#[derive(Subcommand)]
enum Part {
    /// The baseline of R11.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        brokers: String,
        #[arg(long)]
        log: String,
        #[arg(long)]
        listen: String,
    },
    /// Either side of R12.
    #[command(hide = true)]
    Memory { kept: Kept, streams: u64 },
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let ended = match arguments.part {
        Some(Part::Serve { brokers, log, listen }) => server::serve(&brokers, &log, &listen).await,
        Some(Part::Memory { kept, streams }) => tell_memory(kept, streams).await,
        None => run(arguments).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("kafold-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "what the benchmark asked for")]
async fn tell_memory(kept: Kept, streams: u64) -> Result<(), Failure> {
    println!("{}", memory::measure(kept, streams).await?);
    Ok(())
}

async fn run(arguments: Arguments) -> Result<(), Failure> {
    let named = |row: &str| arguments.rows.iter().any(|named| named.eq_ignore_ascii_case(row));
    let unknown = arguments
        .rows
        .iter()
        .find(|named| !ROWS.iter().any(|(row, _)| row.eq_ignore_ascii_case(named)));
    if let Some(unknown) = unknown {
        return Err(format!("there is no row {unknown}; rows are R1 to R14").into());
    }
    let size = if arguments.quick { Size::Quick } else { Size::Full };
    // Only curves of the whole sizes are worth keeping.
    let kept = (size == Size::Full).then(|| repository().join("docs/performance"));
    let folder = repository().join("target/bench");
    let bench = Bench::new(size, Servers::own(&arguments.name), &folder, kept);
    bench.servers.down().await?;
    let mut failed = Ok(());
    for (row, what) in ROWS {
        if !arguments.rows.is_empty() && !named(row) {
            continue;
        }
        eprintln!("{row}: {what}");
        if let Err(failure) = rows::run(&bench, row).await {
            eprintln!("{row}: {failure}");
            failed = Err(format!("{row} could not be measured").into());
        }
    }
    bench.servers.down().await?;
    failed
}

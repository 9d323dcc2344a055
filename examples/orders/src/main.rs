//! An order service on kafold: commands and queries over HTTP, and an import of real purchases.
//!
//! - [`order`]: the aggregate, whole: events, commands, rules, state;
//! - [`read_models`] and [`sales_by_sku`]: what is read, folded by kafold and by hand;
//! - [`service`]: both joined to a log and a database;
//! - [`http`]: the outside surface;
//! - [`serve`]: the options and the start; [`work`]: a process with projections only;
//! - [`import`]: a client that feeds the service a file;
//! - `admin`: the operator's commands of kafold, with the code of this domain.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kafold_cli::{Admin, AdminArgs, PrintableStderr, printable};

use import::ImportArgs;
use logging::LogFormat;
use order::Order;
use serve::{ServeArgs, ServeError};
use work::WorkArgs;

mod http;
mod import;
mod logging;
mod order;
mod read_models;
mod sales_by_sku;
mod serve;
mod service;
mod work;

/// Events are allocated on one thread and freed on another all the time, which the allocator of the C
/// library pays dearly for; librdkafka shares this one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes orders over HTTP and reports on them.
///
/// Without any argument it serves on http://127.0.0.1:8080 and keeps everything in the file orders.db
/// of the working directory; nothing else is needed.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

const EXAMPLES: &str = "\
Examples:
  orders
  orders serve --log kafka://localhost:9092/orders --database postgres://me@localhost/orders
  orders import cdnow_master.txt --url http://127.0.0.1:8080
  orders admin stream show order-17

Exit code: 0 ended as asked, 1 failed, 2 wrong usage, 130 interrupted.
RUST_LOG sets what is logged, such as RUST_LOG=debug or RUST_LOG=info,kafold_axum=debug.
OTEL_EXPORTER_OTLP_ENDPOINT names a collector for the spans, if built with --features otlp.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the service; the same as no subcommand at all.
    Serve(ServeArgs),
    /// Runs the projections only, without the right to write the log.
    Work(WorkArgs),
    /// Feeds a file of purchases to a running service; again, and nothing changes.
    Import(ImportArgs),
    /// Looks at the log and the read models, and keeps them well.
    ///
    /// The same commands as those of the program kafold; here the states of orders are shown too.
    Admin(AdminArgs),
}

fn main() -> ExitCode {
    let cli: Cli = kafold_cli::parse();
    let ended = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(args) => logged(args.stack.log_format, serve::run(args)),
        Command::Work(args) => logged(args.stack.log_format, work::run(args)),
        Command::Import(args) => logging::start("warn", LogFormat::Text)
            .map_err(|error| failed(2, &error))
            .and_then(|()| run(import::run(args)).map_err(|e| failed(e.exit_code(), &e))),
        Command::Admin(args) => match logging::start("error", LogFormat::Text) {
            Ok(()) => {
                let admin = Admin::new("orders admin")
                    .default_log(serve::LOG_DEFAULT)
                    .projections(service::projections);
                Err(run(admin.aggregate::<Order>().run(args)))
            }
            Err(error) => Err(failed(2, &error)),
        },
    };
    ended.map_or_else(|code| code, |()| ExitCode::SUCCESS)
}

/// Runs a service with its log lines, and exports its spans at the end.
fn logged(
    format: LogFormat,
    service: impl Future<Output = Result<(), ServeError>>,
) -> Result<(), ExitCode> {
    let spans = logging::start_with_spans("info", format).map_err(|error| failed(2, &error))?;
    let ended = run(async {
        let ended = service.await;
        spans.flush().await;
        ended
    });
    ended.map_err(|error| failed(error.exit_code(), &error))
}

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("the operating system gives threads and an event queue");
    let result = runtime.block_on(work);
    // What still runs, runs on behalf of nobody: everything that matters was awaited.
    runtime.shutdown_background();
    result
}

fn failed(code: u8, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    let line = format!("orders: {}", kafold_axum::chain(error));
    // With a closed standard error there is no place left for the report.
    drop(writeln!(PrintableStderr::new(), "{line}"));
    ExitCode::from(code)
}

/// To standard output, for people and scripts; the log goes to standard error.
fn say(text: &str) {
    // A closed pipe is the reader's choice, not a failure.
    drop(writeln!(std::io::stdout(), "{}", printable(text)));
}

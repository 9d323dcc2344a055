//! The binary `kafold`: the commands of [`Admin`], completions and man pages.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::EnvFilter;

use crate::admin::{Admin, finish};
use crate::arguments::parse;
use crate::commands::Command;
use crate::error::Error;
use crate::new::{self, NewArgs};
use crate::options::Options;
use crate::output::{Output, PrintableStderr};

const PROGRAM: &str = "kafold";

/// Looks at event logs and read models made with kafold, and keeps them well.
///
/// Which log and which database is said by --log and --database after any subcommand, or by the
/// environment. A service has the same commands in its own program, with states decoded.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: ProgramCommand,
}

const AFTER_HELP: &str = "\
Examples:
  kafold status --log kafka://localhost:9092/orders --database postgres://me@localhost/orders
  kafold stream show order-17 --log sqlite://orders.db
  kafold events tail --category order --follow --json

Exit code: 0 all is well, 1 failed or something is wrong, 2 wrong usage, 130 interrupted.
RUST_LOG sets what is logged on standard error, such as RUST_LOG=debug.";

#[derive(Debug, Subcommand)]
enum ProgramCommand {
    #[command(flatten)]
    Admin(Command),
    /// Makes a service from a template: a domain, a read model, HTTP and tests in one file.
    New(NewArgs),
    /// Prints the completions of a shell, such as: kafold completions bash > /etc/bash_completion.d/kafold
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Prints the man page, or writes that of every subcommand into a folder.
    Man {
        /// An existing folder for the pages.
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
}

/// The program `kafold`, from its arguments to its exit code.
pub fn main() -> ExitCode {
    let Cli { options, command } = parse();
    let mut out = Output::new(options.json);
    if let Err(error) = start_logging() {
        return finish(PROGRAM, &mut out, Err(error));
    }
    match command {
        ProgramCommand::Admin(command) => {
            let admin = Admin::new(PROGRAM);
            block_on(admin.run(crate::AdminArgs { options, command }))
        }
        ProgramCommand::New(args) => {
            let made = new::run(&args, &mut out);
            finish(PROGRAM, &mut out, made)
        }
        ProgramCommand::Completions { shell } => {
            let printed = completions(&mut out, shell);
            finish(PROGRAM, &mut out, printed)
        }
        ProgramCommand::Man { out: folder } => {
            let printed = man(&mut out, folder.as_deref());
            finish(PROGRAM, &mut out, printed)
        }
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("the operating system gives threads and an event queue");
    let result = runtime.block_on(work);
    // A question to a broker that does not answer may still wait: nobody wants its answer.
    runtime.shutdown_background();
    result
}

/// Commands tell what is wrong themselves; the log is for those who ask for it.
fn start_logging() -> Result<(), Error> {
    let filter = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let filter = EnvFilter::try_new(filter.as_deref().unwrap_or("error"));
    let filter = filter
        .map_err(|error| Error::usage(format!("RUST_LOG: {error}; such as info or debug")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(PrintableStderr::new)
        .init();
    Ok(())
}

fn completions(out: &mut Output, shell: Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    match out.json {
        true => out.document(&serde_json::json!({
            "shell": shell.to_string(),
            "script": String::from_utf8_lossy(&script),
        })),
        false => out.raw(&script),
    }
}

fn man(out: &mut Output, folder: Option<&Path>) -> Result<(), Error> {
    if let Some(folder) = folder {
        let failed = |error: std::io::Error| {
            Error::failed(format!(
                "cannot write man pages into {}: {error}; name a folder that exists and is writable",
                folder.display()
            ))
        };
        clap_mangen::generate_to(Cli::command(), folder).map_err(failed)?;
        return match out.json {
            true => out.document(&serde_json::json!({ "folder": folder })),
            false => out.line(&format!("man pages are in {}", folder.display())),
        };
    }
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
    rendered.map_err(|error| Error::failed(format!("the man page cannot be made: {error}")))?;
    match out.json {
        true => out.document(&serde_json::json!({ "page": String::from_utf8_lossy(&page) })),
        false => out.raw(&page),
    }
}

//! The commands as a service mounts them.

use std::fmt::Debug;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use kafold::clock::SystemClock;
use kafold::projections::ProjectionWorker;
use kafold::{Aggregate, Clock, Database, EventSource};

use crate::commands::{self, Command};
use crate::domain::Domain;
use crate::error::Error;
use crate::options::Options;
use crate::output::{Output, PrintableStderr};

/// The operator's commands, with what a service adds to them.
///
/// `aggregate` adds the code that decodes and folds a category: `stream show` then shows states.
/// `projections` adds the code that folds the log into read models: `verify` then folds them again.
#[derive(Debug)]
pub struct Admin {
    program: &'static str,
    default_log: Option<&'static str>,
    domain: Domain,
}

/// A command and what it looks at.
#[derive(Debug, Clone, clap::Args)]
pub struct AdminArgs {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What a command works with.
pub(crate) struct Context {
    pub(crate) options: Options,
    pub(crate) domain: Domain,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) out: Output,
}

impl Admin {
    /// The commands as they are called from a shell, such as `orders admin`, for messages.
    pub fn new(program: &'static str) -> Self {
        Self { program, default_log: None, domain: Domain::default() }
    }

    /// The log when neither `--log` nor `KAFOLD_LOG` names one; without it that is wrong usage.
    pub fn default_log(mut self, url: &'static str) -> Self {
        self.default_log = Some(url);
        self
    }

    /// Shows the states of this aggregate's streams, as its `Debug` writes them.
    pub fn aggregate<A: Aggregate + Debug>(mut self) -> Self {
        self.domain.add::<A>();
        self
    }

    /// Folds the read models of this worker again, to verify them. It is only made, never started.
    pub fn projections(
        mut self,
        worker: fn(Arc<dyn EventSource>, Database) -> ProjectionWorker,
    ) -> Self {
        self.domain.worker = Some(worker);
        self
    }

    /// Runs the command to its end, or until Ctrl-C; the exit code is the program's.
    pub async fn run(self, args: AdminArgs) -> ExitCode {
        let AdminArgs { options, command } = args;
        let program = self.program;
        let mut context = self.context(options);
        for warning in context.options.warnings() {
            drop(writeln!(std::io::stderr(), "{program}: {warning}"));
        }
        let ended = interruptible(commands::run(command, &mut context)).await;
        finish(program, &mut context.out, ended)
    }

    pub(crate) fn context(self, mut options: Options) -> Context {
        options.default_log(self.default_log);
        let out = Output::new(options.json);
        Context { options, domain: self.domain, clock: Arc::new(SystemClock), out }
    }
}

/// The work, or [`Error::Interrupted`] at Ctrl-C: whatever runs then reads only, or is safe to be cut.
async fn interruptible(work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::select! {
        biased;
        // Without a handler Ctrl-C ends the process anyway.
        Ok(()) = tokio::signal::ctrl_c() => Err(Error::Interrupted),
        ended = work => ended,
    }
}

/// Says why it ended and gives the exit code.
pub(crate) fn finish(program: &str, out: &mut Output, ended: Result<(), Error>) -> ExitCode {
    let ended = ended.and_then(|()| out.flush()).err();
    let Some(error) = ended else { return ExitCode::SUCCESS };
    // What was printed until then is kept; a failure to print it is not the first one.
    drop(out.flush());
    if let Error::Usage(reason) | Error::Failed(reason) = &error {
        // Nobody is left to be told when standard error is closed.
        drop(writeln!(PrintableStderr::new(), "{program}: {reason}"));
    }
    ExitCode::from(error.exit_code())
}

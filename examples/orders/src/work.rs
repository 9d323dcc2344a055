//! `orders work`: projections only, without the right to write the log.

use async_trait::async_trait;
use kafold::clock::SystemClock;
use kafold::forward::Node;
use kafold::projections::Projections;
use kafold::rights::Role;
use kafold::store::Health;
use kafold::{Database, LogOptions, LogReader, Mode, OpenError};
use kafold_axum::{Backend, Open, Service};
use utoipa_axum::router::OpenApiRouter;

use crate::serve::{ServeError, StackArgs};
use crate::{say, service};

/// The log, the read models and the HTTP address.
///
/// Any number of workers share the projections with each other and with services. A worker takes no
/// command, claims no partition of the log and needs no right to write the log: kafold acl print
/// --role worker, kafold grants print --role worker.
///
/// HTTP has /health/live, /health/ready and /metrics, in clear text.
#[derive(Debug, clap::Args)]
#[command(mut_arg("listen", |listen| listen.default_value("127.0.0.1:8081")))]
#[command(mut_arg("log", |log| log.help(EXISTING_LOG).long_help(EXISTING_LOG)))]
pub(crate) struct WorkArgs {
    #[command(flatten)]
    pub(crate) stack: StackArgs,
}

const EXISTING_LOG: &str =
    "The existing event log: sqlite://FILE, or kafka://HOST:PORT,HOST:PORT/NAME";

/// Projections on an open log and database.
#[derive(Clone)]
pub(crate) struct Worker {
    log: LogReader,
    database: Database,
    projections: Projections,
}

/// Runs projections until a signal asks to stop.
pub(crate) async fn run(args: WorkArgs) -> Result<(), ServeError> {
    let stack = args.stack;
    let log = stack.log.split('?').next().unwrap_or_default().to_owned();
    let service = stack.listener(Service::new("orders work", OpenApiRouter::new()))?;
    let service = service.on_ready(move |address| {
        say(&format!(
            "orders works on the projections of {log}; see http://{address}/health/ready"
        ));
    });
    Ok(service.run(stack, |_| ()).await?)
}

impl Open for StackArgs {
    type Backend = Worker;

    async fn open(&self, _: &str) -> Result<Worker, OpenError> {
        let log = LogOptions::new(&self.log).open_reader().await?;
        let database = match &self.database {
            Some(url) => Database::open(url, Mode::Migrate).await?,
            None => log.database().cloned().ok_or(OpenError::NoDatabase)?,
        };
        database.require(Role::Worker).await?;
        let projections = service::projections(log.source(), database.clone()).spawn();
        Ok(Worker { log, database, projections })
    }
}

#[async_trait]
impl Backend for Worker {
    async fn health(&self) -> Health {
        let database = kafold::check_database(&self.database, &SystemClock).await;
        self.log.health().and(self.projections.health()).and(database)
    }

    fn refusals(&self) -> Vec<String> {
        self.log.refusals()
    }

    fn measure(&self) {
        // The lag is measured when the health is read.
        self.projections.health();
    }

    fn nodes(&self) -> Option<(Vec<Node>, u32)> {
        None
    }

    async fn close(&self) {
        self.projections.shutdown().await;
        self.database.clone().close().await;
    }
}

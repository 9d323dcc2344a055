//! `orders work`: projections only, without the right to write the log.

use kafold_axum::Service;
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
    Ok(service.run(stack.opening().reader(), |kafold| service::start_projections(&kafold)).await?)
}

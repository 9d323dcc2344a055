//! `orders work`: projections only, without the right to write the log.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use kafold::clock::{RandomIds, SystemClock, backoff};
use kafold::projections::{Projections, Query};
use kafold::rights::Role;
use kafold::store::Health;
use kafold::{Clock, Database, DatabaseError, IdGenerator, LogOptions, LogReader, Mode};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::http::problem::{Problem, RETRY_SOON, chain};
use crate::http::server;
use crate::logging::{LogFormat, Spans};
use crate::read_models::OrderDetails;
use crate::say;
use crate::serve::{
    DRAIN_GRACE, LOG_DEFAULT, OPEN_BACKOFF_BASE, OPEN_BACKOFF_MAX, SETTLE_TIMEOUT, ServeError,
    Signals, Unsafe, check_listener, database_url, install_metrics, log_url, refused, upkeep,
};
use crate::service::{database_complaint, projections};

/// The log, the read models and the HTTP address.
///
/// Any number of workers share the projections with each other and with services. A worker takes no
/// command, claims no partition of the log and needs no right to write the log: kafold acl print
/// --role worker, kafold grants print --role worker.
///
/// HTTP has /health/live, /health/ready and /metrics, in clear text.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkArgs {
    /// The existing event log: sqlite://FILE, or kafka://HOST:PORT,HOST:PORT/NAME.
    #[arg(long, value_name = "URL", env = "KAFOLD_LOG", hide_env_values = true, default_value = LOG_DEFAULT, value_parser = log_url)]
    log: String,
    /// The read models: sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/NAME.
    ///
    /// Default: the log's own file, for a log in a file.
    #[arg(long, value_name = "URL", env = "KAFOLD_DATABASE", hide_env_values = true, value_parser = database_url)]
    database: Option<String>,
    /// The address for HTTP; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", env = "KAFOLD_LISTEN", default_value = "127.0.0.1:8081")]
    listen: SocketAddr,
    /// A proxy stands in front of the address and checks the rights of callers.
    ///
    /// Without this option an address other than loopback is refused.
    #[arg(long, env = "KAFOLD_BEHIND_PROXY")]
    behind_proxy: bool,
    /// Allows unsafe settings by name; each start warns of every allowed setting.
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    allow_unsafe: Vec<Unsafe>,
    /// The format of log lines, on standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// The state shared by all requests.
struct App {
    clock: Arc<dyn Clock>,
    metrics: PrometheusHandle,
    /// Set once log and database are open.
    worker: OnceLock<Worker>,
    /// The reason for which the start waits.
    starting: Mutex<String>,
}

/// Projections on an open log and database.
struct Worker {
    log: LogReader,
    database: Database,
    projections: Projections,
    orders: Query<OrderDetails>,
}

/// Runs projections until a signal asks to stop.
pub(crate) async fn run(args: WorkArgs, spans: Spans) -> Result<(), ServeError> {
    if args.log.starts_with("kafka://") && args.database.is_none() {
        return Err(ServeError::NoDatabase);
    }
    check_listener(args.listen, args.behind_proxy, &args.allow_unsafe)?;
    let stop = Signals::new()?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let metrics = install_metrics()?;
    tokio::spawn(upkeep(metrics.clone(), clock.clone()));
    let listen_error = |error| ServeError::Listen { address: args.listen, error };
    let listener = TcpListener::bind(args.listen).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;

    let starting = Mutex::new("the worker is starting".to_owned());
    let app = Arc::new(App { clock: clock.clone(), metrics, worker: OnceLock::new(), starting });
    let (drain, drained) = oneshot::channel::<()>();
    // A dropped sender requests a stop as well.
    let stopped = async move { drop(drained.await) };
    let connections_max = server::connections_max();
    let server =
        server::serve(listener, router(app.clone()), clock.clone(), connections_max, stopped);
    let mut server = tokio::spawn(server);
    tracing::info!(%address, log = args.log.split('?').next(), "listening");

    let worker = tokio::select! {
        biased;
        () = stop.asked(1) => return Ok(()),
        opened = open(&args, &app) => opened?,
    };
    let worker = app.worker.get_or_init(|| worker);
    let log = args.log.split('?').next().unwrap_or_default();
    say(&format!("orders works on the projections of {log}; see http://{address}/health/ready"));

    tokio::select! {
        biased;
        () = stop.asked(1) => {}
        error = refused(&*clock, || worker.log.refusals()) => return Err(error),
        _ = &mut server => return Err(ServeError::Http),
    }
    tracing::info!("stopping: finishing the transactions under way; a second signal ends at once");
    drop(drain);
    let ending = async {
        let settling = async {
            worker.projections.shutdown().await;
            worker.database.clone().close().await;
        };
        let settled = tokio::select! {
            biased;
            () = settling => Ok(()),
            () = clock.sleep(SETTLE_TIMEOUT) => Err(ServeError::NotSettled),
        };
        tokio::select! {
            biased;
            _ = &mut server => {}
            () = clock.sleep(DRAIN_GRACE) => server.abort(),
        }
        spans.flush().await;
        settled
    };
    tokio::select! {
        biased;
        ended = ending => {
            tracing::info!("stopped");
            ended
        }
        () = stop.asked(2) => Ok(()),
    }
}

/// Opens database and log. While either is down, logs the reason and waits.
async fn open(args: &WorkArgs, app: &App) -> Result<Worker, ServeError> {
    let ids: Arc<dyn IdGenerator> = Arc::new(RandomIds);
    for attempt in 1.. {
        let reason = match try_open(args, &app.clock).await {
            Ok((log, database)) => {
                let projections = projections(log.source(), database.clone())
                    .clock(app.clock.clone(), ids)
                    .spawn();
                let orders = Query::new(database.clone());
                return Ok(Worker { log, database, projections, orders });
            }
            Err(ServeError::Log(error)) if error.is_transient() => {
                format!("the log is not there yet: {}", chain(&error))
            }
            Err(ServeError::Database(error @ DatabaseError::Unavailable { .. })) => {
                format!("the database is not there yet: {}", chain(&error))
            }
            Err(error) => return Err(error),
        };
        tracing::warn!(attempt, "{reason}; waiting for it");
        reason.clone_into(&mut app.starting.lock().unwrap_or_else(PoisonError::into_inner));
        app.clock.sleep(backoff(&*ids, attempt, OPEN_BACKOFF_BASE, OPEN_BACKOFF_MAX)).await;
    }
    unreachable!("the loop has no end of its own")
}

async fn try_open(
    args: &WorkArgs,
    clock: &Arc<dyn Clock>,
) -> Result<(LogReader, Database), ServeError> {
    let options = LogOptions::new(&args.log).clock(clock.clone(), Arc::new(RandomIds));
    let log = options.open_reader().await.map_err(ServeError::Log)?;
    let database = match &args.database {
        Some(url) => Database::open(url, Mode::Migrate).await.map_err(ServeError::Database)?,
        None => log.database().cloned().ok_or(ServeError::NoDatabase)?,
    };
    database.require(Role::Worker).await.map_err(ServeError::Database)?;
    Ok((log, database))
}

impl App {
    fn worker(&self) -> Result<&Worker, Problem> {
        self.worker.get().ok_or_else(|| {
            let reason = self.starting.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Problem::unavailable("unavailable", RETRY_SOON, reason)
        })
    }
}

impl Worker {
    async fn complaints(&self, clock: &dyn Clock) -> Vec<String> {
        let health = [self.log.health(), self.projections.health()].into_iter();
        let mut complaints: Vec<_> = health
            .flat_map(|health| match health {
                Health::Ready => Vec::new(),
                Health::NotReady(reasons) => reasons,
            })
            .collect();
        complaints.extend(database_complaint(&self.orders, self.database.url(), clock).await);
        complaints
    }
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(measured))
        .with_state(app)
}

async fn live() -> Json<Value> {
    Json(json!({"status": "live", "service": "orders work"}))
}

async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, Problem> {
    let reasons = app.worker()?.complaints(&*app.clock).await;
    if reasons.is_empty() {
        return Ok(Json(json!({"status": "ready"})));
    }
    let problem = Problem::unavailable("not-ready", RETRY_SOON, reasons.join("; "));
    Err(problem.with_reasons(reasons))
}

async fn measured(State(app): State<Arc<App>>) -> impl IntoResponse {
    if let Ok(worker) = app.worker() {
        // Reading the health measures the lag.
        worker.projections.health();
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}

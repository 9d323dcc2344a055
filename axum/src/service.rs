//! [`Service`]: start, waiting for what is down, graceful stop.

use std::fmt;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::get;
use kafold::clock::backoff;
use kafold::{Clock, Kafold, OpenError};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::{oneshot, watch};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::PartialSchema;
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{DEADLINE_DEFAULT, Http, Shared};
use crate::backend::{Backend, Open};
use crate::bearer::{self, BearerToken, BearerTokenError};
use crate::problem::{Problem, chain};
use crate::{health, observe, server};

/// Waits of the start before it tries again to reach what is down.
const OPEN_BACKOFF_BASE: Duration = Duration::from_millis(200);
const OPEN_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Time of requests under way after the signal to stop, beyond their own deadline.
const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// Time of log and projections to settle, after that.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Time after the start in which a refusal of the brokers, such as a missing right, ends the program.
const FIRST_REFUSALS: Duration = Duration::from_secs(8);
const REFUSALS_POLL: Duration = Duration::from_millis(200);
/// Interval in which measurements are folded into histograms, which bounds their memory.
const METRICS_UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Bounds of the buckets of every duration, in seconds.
const SECONDS_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// A service over HTTP, with the routes of its author and these common routes:
///
/// | route | |
/// |---|---|
/// | `GET /` | the list of routes |
/// | `GET /openapi.json` | the OpenAPI document |
/// | `GET /health/live` | the process answers |
/// | `GET /health/ready` | commands are taken and read models follow; otherwise every reason why not |
/// | `GET /metrics` | Prometheus text |
/// | `GET /nodes` | the nodes of the service, and the partitions of each |
///
/// A route of the author must not be one of these: the start panics. The list and the document have the routes
/// of an [`OpenApiRouter`] only.
///
/// HTTP is in clear text, so an address other than loopback is refused, unless a proxy in front ends TLS and
/// checks the rights of callers. Limits: 4096 connections (at the limit the connection with the longest wait for a
/// request makes room), 10 s for a request head and for a body, 60 s for a connection without a request and for
/// a client that does not read its answer, heads of 128 KiB, bodies of 1 MiB, 1024 requests under way.
#[must_use = "serves nothing until it runs"]
pub struct Service<S = Kafold> {
    name: String,
    routes: OpenApiRouter<Http<S>>,
    index: String,
    address: SocketAddr,
    deadline: Duration,
    behind_proxy: bool,
    token: Option<Arc<BearerToken>>,
    ready: Box<dyn FnOnce(SocketAddr) + Send>,
}

/// The reason for which a service ended without a request to stop. `Debug` writes the sentence of `Display`, so that
/// `async fn main() -> Result<(), ServeError>` prints it.
#[derive(thiserror::Error)]
pub enum ServeError {
    /// Another program listens at the address, or the address is not one of this machine.
    #[error(
        "cannot listen on {address}: {error}; stop what listens there, or choose another address (--listen, KAFOLD_LISTEN)"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        error: std::io::Error,
    },
    /// `KAFOLD_LISTEN` is not an address.
    #[error("KAFOLD_LISTEN: {0} is not an address such as 127.0.0.1:8080")]
    NoAddress(String),
    /// `KAFOLD_BEHIND_PROXY` is neither true nor false.
    #[error("KAFOLD_BEHIND_PROXY: {0} is neither true nor false")]
    NoFlag(String),
    /// The address is reached by others, in clear text.
    #[error(
        "{0} can be reached by others, and HTTP has neither TLS nor rights here: put a proxy in front and set \
         KAFOLD_BEHIND_PROXY=true, or listen on 127.0.0.1"
    )]
    OpenListener(SocketAddr),
    /// `KAFOLD_BEARER_TOKEN` does not name a token.
    #[error("KAFOLD_BEARER_TOKEN: {0}")]
    Token(#[from] BearerTokenError),
    /// Log or database cannot be opened, and waiting does not help.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The brokers refuse the service, such as for a missing right.
    #[error("the log cannot be used: {0}")]
    Refused(String),
    /// Another recorder of metrics is installed.
    #[error("the metrics recorder: {0}")]
    Metrics(#[from] BuildError),
    /// The HTTP server ended by itself.
    #[error("the HTTP server ended by itself")]
    Http,
    /// The process cannot watch for signals.
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
    /// The stop took too long.
    #[error(
        "log and projections did not settle within {SETTLE_TIMEOUT:?} and were given up; what was acknowledged is kept"
    )]
    NotSettled,
}

impl fmt::Debug for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(self))
    }
}

impl<S: Clone + Send + Sync + 'static> Service<S> {
    /// Returns a service with these routes: an [`OpenApiRouter`], or a [`Router`] whose routes are not in the
    /// OpenAPI document. `name` is shown in `/health/live`.
    pub fn new(name: impl Into<String>, routes: impl Into<OpenApiRouter<Http<S>>>) -> Self {
        let (name, routes) = (name.into(), routes.into());
        Self {
            index: index_of(&name, routes.get_openapi()),
            ready: Box::new({
                let name = name.clone();
                move |address| say(&format!("{name} serves on http://{address}"))
            }),
            name,
            routes,
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            deadline: DEADLINE_DEFAULT,
            behind_proxy: false,
            token: None,
        }
    }

    /// Sets the address for HTTP; port 0 takes a free port. Default: `127.0.0.1:8080`.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    /// Sets the address of the variable `KAFOLD_LISTEN`, the token of the variable `KAFOLD_BEARER_TOKEN`
    /// (`@FILE` or `$NAME`), and [`behind_proxy`](Self::behind_proxy) for `KAFOLD_BEHIND_PROXY=true`, if they are
    /// set.
    pub fn from_env(mut self) -> Result<Self, ServeError> {
        // A value that is not UTF-8 is refused like any other wrong value.
        let variable =
            |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        if let Some(address) = variable("KAFOLD_LISTEN") {
            self.address = address.parse().map_err(|_| ServeError::NoAddress(address))?;
        }
        if let Some(source) = variable("KAFOLD_BEARER_TOKEN") {
            self.token = Some(Arc::new(BearerToken::read(&source, false)?));
        }
        match variable("KAFOLD_BEHIND_PROXY").as_deref() {
            None | Some("false") => {}
            Some("true") => self.behind_proxy = true,
            Some(other) => return Err(ServeError::NoFlag(other.to_owned())),
        }
        Ok(self)
    }

    /// Allows an address other than loopback: a proxy in front ends TLS and checks the rights of callers.
    pub fn behind_proxy(mut self, is_behind_proxy: bool) -> Self {
        self.behind_proxy = is_behind_proxy;
        self
    }

    /// Sets the time within which every request is answered. Default: 10 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets the token that requests must have. Health and the list of routes stay open. Default: none.
    pub fn bearer_token(mut self, token: Option<BearerToken>) -> Self {
        self.token = token.map(Arc::new);
        self
    }

    /// Sets the text of `GET /`. Default: the routes of the OpenAPI document.
    pub fn index(mut self, index: impl Into<String>) -> Self {
        self.index = index.into();
        self
    }

    /// Sets a function that runs once log and database are open. Default: prints the address.
    pub fn on_ready(mut self, ready: impl FnOnce(SocketAddr) + Send + 'static) -> Self {
        self.ready = Box::new(ready);
        self
    }

    /// Serves until SIGINT or SIGTERM. Then requests under way are answered, what is pending is settled, and log
    /// and database are closed; a second signal ends at once.
    ///
    /// Listens at once. While log or database are down, requests are answered 503 with the reason, and the
    /// start tries again. `start` makes the state of the routes, such as with
    /// `kafold.projections().with::<Balance>().spawn()`.
    pub async fn run<O: Open>(
        self,
        open: O,
        start: impl FnOnce(O::Backend) -> S,
    ) -> Result<(), ServeError> {
        if !self.address.ip().to_canonical().is_loopback() && !self.behind_proxy {
            return Err(ServeError::OpenListener(self.address));
        }
        let stop = Signals::new()?;
        let metrics = install_metrics()?;
        let http = Http::<S>::new(self.name.clone(), self.deadline, Some(metrics.clone()));
        let shared = Arc::clone(&http.shared);
        let clock = Arc::clone(&shared.clock);
        tokio::spawn(upkeep(metrics, clock.clone()));
        let listen_error = |error| ServeError::Listen { address: self.address, error };
        let listener = server::listen(self.address).map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let Self { deadline, ready, .. } = self;
        let router = router(self.name, self.routes, self.index, self.token, http.clone());
        let (drain, drained) = oneshot::channel::<()>();
        // A dropped sender requests a stop as well.
        let stopped = async move { drop(drained.await) };
        let connections_max = server::connections_max();
        let mut server =
            tokio::spawn(server::serve(listener, router, clock.clone(), connections_max, stopped));
        tracing::info!(%address, service = shared.name, "listening");

        let backend = tokio::select! {
            biased;
            () = stop.asked(1) => return Ok(()),
            opened = opened(&open, address, &shared) => opened?,
        };
        let watched: Arc<dyn Backend> = Arc::new(backend.clone());
        http.open(start(backend));
        // Ready is told last.
        shared.open(Arc::clone(&watched));
        ready(address);

        tokio::select! {
            biased;
            () = stop.asked(1) => {}
            refusals = refused(&*clock, &*watched) => return Err(ServeError::Refused(refusals)),
            _ = &mut server => return Err(ServeError::Http),
        }
        tracing::info!("stopping: finishing the requests under way; a second signal ends at once");
        drop(drain);
        let ending = async {
            tokio::select! {
                biased;
                _ = &mut server => {}
                () = clock.sleep(deadline + DRAIN_GRACE) => {
                    tracing::warn!("some connections did not end in time and are cut");
                    server.abort();
                }
            }
            tokio::select! {
                biased;
                () = watched.close() => Ok(()),
                () = clock.sleep(SETTLE_TIMEOUT) => Err(ServeError::NotSettled),
            }
        };
        tokio::select! {
            biased;
            ended = ending => {
                tracing::info!("stopped");
                ended
            }
            // Nothing acknowledged is lost: it is as if the process had been killed.
            () = stop.asked(2) => Ok(()),
        }
    }
}

/// Opens log and database. While one of them is down, shows the reason and waits.
async fn opened<O: Open>(
    open: &O,
    address: SocketAddr,
    shared: &Shared,
) -> Result<O::Backend, ServeError> {
    let url = format!("http://{address}");
    for attempt in 1.. {
        let reason = match open.open(&url).await {
            Ok(backend) => return Ok(backend),
            Err(error) if error.is_transient() => chain(&error),
            Err(error) => return Err(error.into()),
        };
        tracing::warn!(attempt, "{reason}; waiting for it");
        shared.waits_for(&reason);
        let pause = backoff(&*shared.ids, attempt, OPEN_BACKOFF_BASE, OPEN_BACKOFF_MAX);
        shared.clock.sleep(pause).await;
    }
    unreachable!("the loop has no end of its own")
}

/// Returns the brokers' refusals of a process within [`FIRST_REFUSALS`] of the start, and pends for
/// ever afterwards: a running process reports not ready instead.
async fn refused(clock: &dyn Clock, backend: &dyn Backend) -> String {
    let deadline = clock.instant() + FIRST_REFUSALS;
    while clock.instant() < deadline {
        clock.sleep(REFUSALS_POLL).await;
        let refusals = backend.refusals();
        if !refusals.is_empty() {
            return refusals.join("; ");
        }
    }
    std::future::pending().await
}

/// Returns the routes of the author and the common ones, with their layers.
fn router<S: Clone + Send + Sync + 'static>(
    name: String,
    routes: OpenApiRouter<Http<S>>,
    index: String,
    token: Option<Arc<BearerToken>>,
    http: Http<S>,
) -> Router {
    let shared = Arc::clone(&http.shared);
    let common = OpenApiRouter::with_openapi(document(name))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .routes(routes!(health::nodes))
        .with_state(Arc::clone(&shared));
    let (router, document) = common.merge(routes.with_state(http)).split_for_parts();
    let document = document.to_json().expect("an OpenAPI document is JSON");
    let json = [(header::CONTENT_TYPE, "application/json")];
    let router = router
        .route("/", get(move || async move { (PAGE_HEADERS, index) }))
        .route("/openapi.json", get(move || async move { (json, document) }))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(no_route);
    let router = match token {
        Some(token) => router.layer(from_fn_with_state(token, bearer::check)),
        None => router,
    };
    router
        .layer(CatchPanicLayer::custom(observe::panicked))
        .layer(from_fn_with_state(shared, observe::around))
}

fn document(name: String) -> OpenApi {
    let components = ComponentsBuilder::new().schema("Problem", Problem::schema()).build();
    OpenApiBuilder::new()
        .info(InfoBuilder::new().title(name).version(env!("CARGO_PKG_VERSION")).build())
        .components(Some(components))
        .build()
}

/// Returns the list of routes.
fn index_of(name: &str, document: &OpenApi) -> String {
    let mut lines = vec![name.to_owned()];
    for (path, item) in &document.paths.paths {
        let methods = [
            ("GET", &item.get),
            ("POST", &item.post),
            ("PUT", &item.put),
            ("PATCH", &item.patch),
            ("DELETE", &item.delete),
        ];
        let used = methods.into_iter().filter(|(_, operation)| operation.is_some());
        lines.extend(used.map(|(method, _)| format!("{method:<6} {path}")));
    }
    if document.paths.paths.is_empty() {
        lines.push("(the routes of the service itself have no OpenAPI document)".to_owned());
    }
    let common = ["/openapi.json", "/health/live", "/health/ready", "/metrics", "/nodes"];
    lines.extend(common.map(|path| format!("GET    {path}")));
    lines.join("\n") + "\n"
}

/// Headers for a page in a browser: a fixed content type, no scripts, no framing.
const PAGE_HEADERS: [(HeaderName, &str); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

async fn no_route() -> impl IntoResponse {
    let detail = "there is nothing at this path; GET / lists what there is";
    Problem::new(StatusCode::NOT_FOUND, "no-route", detail)
}

async fn method_not_allowed() -> impl IntoResponse {
    let detail = "this path takes another method, see the header allow; GET / lists all";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}

/// SIGINT and SIGTERM.
struct Signals(watch::Receiver<u32>);

impl Signals {
    fn new() -> Result<Self, ServeError> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
        let (count, counted) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                count.send_modify(|count| *count += 1);
            }
        });
        Ok(Self(counted))
    }

    /// Returns after this number of signals.
    async fn asked(&self, times: u32) {
        let mut counted = self.0.clone();
        // The sender lives as long as the process.
        drop(counted.wait_for(|count| *count >= times).await);
    }
}

fn install_metrics() -> Result<PrometheusHandle, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS_BUCKETS)?
        .install_recorder()
}

async fn upkeep(metrics: PrometheusHandle, clock: Arc<dyn Clock>) {
    loop {
        clock.sleep(METRICS_UPKEEP_INTERVAL).await;
        metrics.run_upkeep();
    }
}

fn say(text: &str) {
    // A closed pipe is the reader's choice, not a failure.
    drop(writeln!(std::io::stdout(), "{text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_others_reach_is_refused() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
            let service = Service::<()>::new("s", Router::new());
            let service = service.listen(address.parse().expect("an address"));
            let ended = service.run(kafold::open("sqlite://no/such/folder/s.db"), |_| ()).await;
            assert!(matches!(ended, Err(ServeError::OpenListener(_))), "{address}: {ended:?}");
        }
    }
}

//! The service over HTTP: routes, and what all of them share.
//!
//! - [`commands`]: everything that changes an order;
//! - [`queries`]: the read models and the stream of an order;
//! - [`health`]: liveness, readiness, metrics;
//! - [`extract`] and [`problem`]: what comes in, and errors going out;
//! - [`observe`]: logs, metrics and spans of every request; [`bearer`]: the bearer token of
//!   requests;
//! - [`server`]: connections and their limits.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use kafold::{Clock, IdGenerator};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;

use crate::service::Service;
use bearer::BearerToken;
use problem::{Problem, RETRY_SOON};

pub(crate) mod bearer;
mod commands;
mod extract;
mod health;
mod observe;
pub(crate) mod problem;
mod queries;
pub(crate) mod server;

/// Most requests under way; one more is answered 503 at once. A request whose body has not arrived
/// is not under way, so half-sent bodies keep no client out.
const REQUESTS_MAX: usize = 1024;
/// Most bodies above [`extract::SMALL_BODY_BYTES_MAX`] in memory; one more is answered 503.
const LARGE_BODIES_MAX: usize = 256;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// A request is answered within it.
    pub(crate) deadline: Duration,
    /// How long `?after=` waits at most.
    pub(crate) wait: Duration,
}

impl Limits {
    /// How long `?after=` waits unless the deadline is shorter.
    const WAIT: Duration = Duration::from_secs(5);

    pub(crate) fn new(deadline: Duration) -> Self {
        let mut limits = Self { deadline, wait: Self::WAIT };
        limits.wait = limits.wait.min(limits.work());
        limits
    }

    /// What a command may take: the deadline less what the answer needs.
    pub(crate) fn work(&self) -> Duration {
        self.deadline - (self.deadline / 10).min(Duration::from_millis(500))
    }
}

/// What every request can reach.
pub(crate) struct App {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ids: Arc<dyn IdGenerator>,
    pub(crate) limits: Limits,
    pub(crate) metrics: PrometheusHandle,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) large_bodies: Semaphore,
    /// There once log and database have been opened.
    service: OnceLock<Arc<Service>>,
    /// What the start waits for.
    starting: Mutex<String>,
}

impl App {
    pub(crate) fn new(
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
        limits: Limits,
        metrics: PrometheusHandle,
    ) -> Self {
        Self {
            clock,
            ids,
            limits,
            metrics,
            permits: Arc::new(Semaphore::new(REQUESTS_MAX)),
            large_bodies: Semaphore::new(LARGE_BODIES_MAX),
            service: OnceLock::new(),
            starting: Mutex::new("the service is starting".to_owned()),
        }
    }

    /// Log and database are open: requests are served from now on.
    pub(crate) fn open(&self, service: Arc<Service>) {
        // Opened once; a second call would keep the first.
        self.service.get_or_init(|| service);
    }

    /// Tells what the start waits for.
    pub(crate) fn waits_for(&self, reason: &str) {
        reason.clone_into(&mut self.starting.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The service, or why it is not there yet.
    pub(crate) fn service(&self) -> Result<&Arc<Service>, Problem> {
        self.service.get().ok_or_else(|| {
            let reason = self.starting.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Problem::unavailable("unavailable", RETRY_SOON, reason)
        })
    }
}

/// Returns the routes of the service. With a bearer token all routes except health and the list of
/// endpoints require the token.
pub(crate) fn router(app: Arc<App>, token: Option<Arc<BearerToken>>) -> Router {
    let router = Router::new()
        .route("/", get(index))
        .route("/orders", post(commands::place))
        .route("/orders/{id}", get(queries::order))
        .route("/orders/{id}/payment", post(commands::pay))
        .route("/orders/{id}/shipment", post(commands::ship))
        .route("/orders/{id}/cancellation", post(commands::cancel))
        .route("/orders/{id}/events", get(queries::events))
        .route("/customers/{id}/orders", get(queries::customer_orders))
        .route("/reports/sales", get(queries::sales))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(health::metrics))
        .route("/nodes", get(health::nodes))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(no_route);
    let router = match token {
        Some(token) => router.layer(from_fn_with_state(token, bearer::check)),
        None => router,
    };
    router
        .layer(CatchPanicLayer::custom(observe::panicked))
        .layer(from_fn_with_state(app.clone(), observe::around))
        .with_state(app)
}

/// Every endpoint, for whoever opens the service in a browser.
const INDEX: &str = "\
POST /orders                     {\"customer\",\"lines\":[{\"sku\",\"quantity\",\"amount_cents\"}]}, optional: \"order_id\", \"placed_at\"
POST /orders/{id}/payment        {\"amount_cents\"}
POST /orders/{id}/shipment       {\"carrier\",\"tracking\"}
POST /orders/{id}/cancellation   {\"reason\"}
     headers: Idempotency-Key: UUID, If-Match: \"VERSION\"
GET  /orders/{id}
GET  /orders/{id}/events
GET  /customers/{id}/orders
GET  /reports/sales?by=day|sku|customer
     ?after=POSITION waits until a read model has seen the position that a command answered
GET  /health/live  /health/ready  /metrics
GET  /nodes    which node owns which partition, since when
";

/// Headers for a page in a browser: a fixed content type, no scripts, no framing.
const PAGE_HEADERS: [(HeaderName, &str); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

async fn index() -> impl IntoResponse {
    (PAGE_HEADERS, INDEX)
}

async fn no_route() -> Problem {
    let detail = "there is nothing at this path; GET / lists what there is";
    Problem::new(StatusCode::NOT_FOUND, "no-route", detail)
}

async fn method_not_allowed() -> Problem {
    let detail = "this path takes another method, see the header allow; GET / lists all";
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}

//! [`Http`]: the state of all routes, before and after the service is open.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use kafold::clock::{RandomIds, SystemClock};
use kafold::{Clock, CommandId, IdGenerator, Kafold};
use lru::LruCache;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;

use crate::backend::Backend;
use crate::problem::{Problem, RETRY_SOON};

/// Most requests under way; one more is answered 503 at once. A request whose body has not arrived
/// is not under way, so half-sent bodies keep no client out.
pub const REQUESTS_MAX: usize = 1024;
/// Most bodies above 16 KiB in memory; one more is answered 503.
pub const LARGE_BODIES_MAX: usize = 256;
/// Most idempotency keys whose streams this process remembers. The log knows older keys, stream by stream.
pub const RECENT_KEYS_MAX: NonZeroUsize = NonZeroUsize::new(100_000).expect("is not zero");
/// Longest wait of `?after=` unless the deadline is shorter.
pub const WAIT_MAX: Duration = Duration::from_secs(5);
/// Time of a request without another deadline.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(10);

/// The times that a request may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// A request is answered within this time.
    pub(crate) deadline: Duration,
    /// `?after=` waits at most this time.
    pub(crate) wait: Duration,
}

impl Limits {
    pub(crate) fn new(deadline: Duration) -> Self {
        let mut limits = Self { deadline, wait: WAIT_MAX };
        limits.wait = limits.wait.min(limits.work());
        limits
    }

    /// Returns the time of a command: the deadline less the time of the answer.
    pub(crate) fn work(&self) -> Duration {
        self.deadline - (self.deadline / 10).min(Duration::from_millis(500))
    }
}

/// The state of the routes of a service: `S`, which a handler gets by [`Opened`] once log and database are
/// open, and what the extractors of this crate share. Cheap to clone.
///
/// `S` is [`Kafold`] or a type of the author that is cheap to clone.
pub struct Http<S = Kafold> {
    pub(crate) shared: Arc<Shared>,
    service: Arc<OnceLock<S>>,
}

impl<S> Clone for Http<S> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), service: Arc::clone(&self.service) }
    }
}

/// The state that does not depend on the type of the service.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ids: Arc<dyn IdGenerator>,
    pub(crate) limits: Limits,
    pub(crate) metrics: Option<PrometheusHandle>,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) large_bodies: Semaphore,
    keys: Mutex<LruCache<CommandId, UseOfKey>>,
    backend: OnceLock<Arc<dyn Backend>>,
    /// The reason for which the start waits.
    starting: Mutex<String>,
}

/// The id of the stream for which an idempotency key was used, when it is known. A request with the key holds
/// the lock, so that two requests with one key cannot write two streams.
pub(crate) type UseOfKey = Arc<tokio::sync::Mutex<Option<String>>>;

impl<S> Http<S> {
    pub(crate) fn new(name: String, deadline: Duration, metrics: Option<PrometheusHandle>) -> Self {
        let starting = Mutex::new(format!("{name} is starting"));
        let shared = Shared {
            name,
            clock: Arc::new(SystemClock),
            ids: Arc::new(RandomIds),
            limits: Limits::new(deadline),
            metrics,
            permits: Arc::new(Semaphore::new(REQUESTS_MAX)),
            large_bodies: Semaphore::new(LARGE_BODIES_MAX),
            keys: Mutex::new(LruCache::new(RECENT_KEYS_MAX)),
            backend: OnceLock::new(),
            starting,
        };
        Self { shared: Arc::new(shared), service: Arc::default() }
    }

    /// Returns the state of an open service, for the tests of a router:
    /// `routes().with_state(Http::opened(kafold))`. [`Service::run`](crate::Service::run) makes the state
    /// of a running service.
    pub fn opened(service: S) -> Self {
        let http = Self::new("service".to_owned(), DEADLINE_DEFAULT, None);
        http.open(service);
        http
    }

    /// Requests reach the service from now on.
    pub(crate) fn open(&self, service: S) {
        // Opened once; a second call would keep the first.
        self.service.get_or_init(|| service);
    }

    /// Returns the service, or the reason for which it is not open yet.
    pub fn service(&self) -> Result<&S, Problem> {
        self.service.get().ok_or_else(|| self.shared.not_open())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Shared {
    /// Sets the backend of health, metrics and nodes.
    pub(crate) fn open(&self, backend: Arc<dyn Backend>) {
        self.backend.get_or_init(|| backend);
    }

    pub(crate) fn backend(&self) -> Result<&Arc<dyn Backend>, Problem> {
        self.backend.get().ok_or_else(|| self.not_open())
    }

    /// Sets the reason for which the start waits.
    pub(crate) fn waits_for(&self, reason: &str) {
        reason.clone_into(&mut self.starting.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns the remembered use of a key, of the last [`RECENT_KEYS_MAX`] keys.
    pub(crate) fn use_of_key(&self, key: CommandId) -> UseOfKey {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get_or_insert(key, UseOfKey::default).clone()
    }

    fn not_open(&self) -> Problem {
        let reason = self.starting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Problem::unavailable("unavailable", RETRY_SOON, reason)
    }
}

/// Extracts the open service; answers 503 with the reason while it is not open yet.
#[derive(Debug, Clone)]
pub struct Opened<S = Kafold>(pub S);

impl<S: Clone + Send + Sync + 'static> FromRequestParts<Http<S>> for Opened<S> {
    type Rejection = Problem;

    async fn from_request_parts(_: &mut Parts, http: &Http<S>) -> Result<Self, Problem> {
        http.service().cloned().map(Self)
    }
}

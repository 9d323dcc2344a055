//! The HTTP/1.1 server: connections within limits, whatever is sent on them and however slowly.
//!
//! `axum::serve` has no limit on the time of a request head nor on connections. This module has nothing of
//! orders: it serves any [`Router`].
//!
//! A connection is in one [`Phase`] at a time, and each phase has a time limit: the reader of its bytes sees
//! a head begin, the service sees it end and the answer leave. Bodies are the handlers' own: they read them
//! within [`BODY_TIMEOUT`]. A part of a head that comes in one packet behind a whole request is not seen to
//! begin: the idle limit applies to it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use axum::serve::Listener;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use kafold::Clock;
use kafold::clock::within;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::ServiceExt;

/// Connections at most. One more ends the connection that has waited longest for a request, so that idle and
/// half-sent ones do not keep others out; while all have requests under way it waits for the first to end.
pub(crate) const CONNECTIONS_MAX: usize = 4096;
/// A request head arrives within this time of its first byte, or the connection ends.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A request body arrives within this time, or is answered 408.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a request, new or kept alive, ends after this time.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client takes its answer within this time, or the connection ends.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest request head, in bytes; a longer one is answered 431. Bounds the memory of half-sent heads.
pub(crate) const HEAD_BYTES_MAX: usize = 128 * 1024;
/// While every connection has a request under way, one is looked for this often that has ended its own.
const EVICT_INTERVAL: Duration = Duration::from_millis(100);
/// Descriptors left to everything but connections: the log, the database, brokers, files.
const DESCRIPTORS_RESERVED: u64 = 512;

/// Raises the limit of open files as far as connections need it; returns how many connections there may be.
pub(crate) fn connections_max() -> usize {
    let wanted = CONNECTIONS_MAX as u64 + DESCRIPTORS_RESERVED;
    let limit = rlimit::increase_nofile_limit(wanted).unwrap_or(wanted);
    let connections = limit.saturating_sub(DESCRIPTORS_RESERVED).max(1) as usize;
    if connections < CONNECTIONS_MAX {
        tracing::warn!(
            connections,
            "the limit of open files ({limit}) allows fewer than {CONNECTIONS_MAX} connections: raise it, \
             such as by ulimit -n or LimitNOFILE="
        );
    }
    connections.min(CONNECTIONS_MAX)
}

/// Serves until `stop` is ready, then ends connections without a request and waits for the others.
pub(crate) async fn serve(
    mut listener: TcpListener,
    router: Router,
    clock: Arc<dyn Clock>,
    connections_max: usize,
    stop: impl Future<Output = ()>,
) {
    let connections = Connections::new(connections_max);
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = async {
            // Errors of a single connection, and of a lack of descriptors, are waited out.
            let (stream, _): (TcpStream, SocketAddr) = Listener::accept(&mut listener).await;
            (stream, connections.admit(&*clock).await)
        };
        let (stream, slot) = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = accepted => accepted,
        };
        // Answers are small and waited for. Without the option they are only slower.
        drop(stream.set_nodelay(true));
        tokio::spawn(serve_one(stream, slot, router.clone(), clock.clone(), graceful.watcher()));
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn serve_one(
    stream: TcpStream,
    slot: Slot,
    router: Router,
    clock: Arc<dyn Clock>,
    watcher: Watcher,
) {
    let connection = &slot.connection;
    let service = service_fn(|request| answer(connection.clone(), router.clone(), request));
    let io = Observed { stream, connection: connection.clone() };
    let served = http1::Builder::new()
        // The phases have their own time limits.
        .header_read_timeout(None)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(io), service);
    tokio::select! {
        biased;
        // A connection that breaks is the client's choice.
        served = watcher.watch(served) => drop(served),
        () = connection.overdue(&*clock) => {}
    }
}

async fn answer(
    connection: Arc<Connection>,
    router: Router,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    if !connection.begin() {
        // It was just chosen to make room: nothing is begun on it.
        let mut refused = Response::new(Body::empty());
        *refused.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        return Ok(refused);
    }
    let response = router.oneshot(request).await?;
    connection.phase.send_replace(Phase::Answering);
    let sent = Sent(connection);
    Ok(response.map(|body| {
        // The body is dropped once its last byte was handed to the system.
        Body::new(body.map_err(move |error| {
            let _held_until_the_end = &sent;
            error
        }))
    }))
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing of a request has come, since this moment of [`Connections`]'s count.
    Idle { since: u64 },
    /// A part of a head has come; the connection has waited since this moment.
    Head { since: u64 },
    /// A request is under way.
    Busy,
    /// The answer is being sent.
    Answering,
    /// It makes room for another.
    Evicted,
}

impl Phase {
    fn time_max(self) -> Option<Duration> {
        match self {
            Self::Idle { .. } => Some(IDLE_TIMEOUT),
            Self::Head { .. } => Some(HEAD_TIMEOUT),
            // Whoever answers has a deadline.
            Self::Busy => None,
            Self::Answering => Some(ANSWER_TIMEOUT),
            Self::Evicted => Some(Duration::ZERO),
        }
    }

    /// Since when it has no request, if it has none.
    fn waiting_since(self) -> Option<u64> {
        match self {
            Self::Idle { since } | Self::Head { since } => Some(since),
            Self::Busy | Self::Answering | Self::Evicted => None,
        }
    }
}

/// One connection's phase.
struct Connection {
    phase: watch::Sender<Phase>,
    /// Counts up: the order of events, shared by all connections.
    moments: Arc<AtomicU64>,
}

impl Connection {
    /// Returns when a phase has lasted too long.
    async fn overdue(&self, clock: &dyn Clock) {
        let mut phase = self.phase.subscribe();
        loop {
            let now = *phase.borrow_and_update();
            let Some(time_max) = now.time_max() else {
                drop(phase.changed().await);
                continue;
            };
            tokio::select! {
                biased;
                changed = phase.changed() => drop(changed),
                () = clock.sleep(time_max) => return,
            }
        }
    }

    /// The first byte of a head has come.
    fn read(&self) {
        self.phase.send_if_modified(|phase| {
            let Phase::Idle { since } = *phase else { return false };
            *phase = Phase::Head { since };
            true
        });
    }

    /// A head is complete; `false` when the connection was evicted.
    fn begin(&self) -> bool {
        self.phase.send_if_modified(|phase| {
            let is_admitted = *phase != Phase::Evicted;
            if is_admitted {
                *phase = Phase::Busy;
            }
            is_admitted
        })
    }

    /// Ends the connection, unless a request has come on it since it was seen in this phase.
    fn evict(&self, seen: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let still_waits = phase.waiting_since() == seen.waiting_since();
            if still_waits {
                *phase = Phase::Evicted;
            }
            still_waits
        })
    }
}

/// An answer that is being sent: the connection is idle once it is dropped.
struct Sent(Arc<Connection>);

impl Drop for Sent {
    fn drop(&mut self) {
        let since = self.0.moments.fetch_add(1, Ordering::Relaxed);
        self.0.phase.send_replace(Phase::Idle { since });
    }
}

/// All connections.
struct Connections {
    slots: Arc<Semaphore>,
    open: Arc<Mutex<BTreeMap<u64, Arc<Connection>>>>,
    moments: Arc<AtomicU64>,
}

/// A place among [`Connections`], free again when it is dropped.
struct Slot {
    number: u64,
    connection: Arc<Connection>,
    open: Arc<Mutex<BTreeMap<u64, Arc<Connection>>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connections {
    fn new(most: usize) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(most)),
            open: Arc::default(),
            moments: Arc::default(),
        }
    }

    /// A slot for one more connection, made free when there is none.
    async fn admit(&self, clock: &dyn Clock) -> Slot {
        let permit = loop {
            if self.slots.available_permits() == 0 {
                self.evict_longest_waiting();
            }
            let permit = Arc::clone(&self.slots).acquire_owned();
            if let Some(permit) = within(clock, EVICT_INTERVAL, permit).await {
                break permit.expect("the semaphore is never closed");
            }
        };
        let number = self.moments.fetch_add(1, Ordering::Relaxed);
        let (phase, _) = watch::channel(Phase::Idle { since: number });
        let connection = Arc::new(Connection { phase, moments: Arc::clone(&self.moments) });
        locked(&self.open).insert(number, Arc::clone(&connection));
        Slot { number, connection, open: Arc::clone(&self.open), _permit: permit }
    }

    fn evict_longest_waiting(&self) {
        let open = locked(&self.open);
        let waiting = open.values().filter_map(|connection| {
            let phase = *connection.phase.borrow();
            Some((phase.waiting_since()?, phase, connection))
        });
        // One whose request has just come stays: then the new one waits for the next slot.
        if let Some((_, phase, connection)) = waiting.min_by_key(|(since, ..)| *since) {
            connection.evict(phase);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        locked(&self.open).remove(&self.number);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A stream that tells its connection when bytes come.
struct Observed {
    stream: TcpStream,
    connection: Arc<Connection>,
}

impl AsyncRead for Observed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.connection.read();
        }
        read
    }
}

impl AsyncWrite for Observed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

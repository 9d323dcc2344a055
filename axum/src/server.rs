//! An HTTP/1.1 server with limits on connections, against every hostile or slow client.
//!
//! `axum::serve` limits neither the time of a request head nor the number of connections. This
//! module serves any [`Router`].
//!
//! A connection is in one [`Phase`] at a time, and each phase has a time limit. The reader of the
//! connection detects the beginning of a head, and the service detects the end of the head and of
//! the answer. Handlers read bodies themselves, within [`BODY_TIMEOUT`]. The beginning of a head in
//! the same packet as the previous request is not detected; the idle limit applies to such a head.

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
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::ServiceExt;

/// Most connections. At the limit a new connection ends the connections with the longest waits for a
/// request, so idle and half-sent connections keep no client out. While all connections have
/// requests under way, the new connection waits for the first to end.
pub(crate) const CONNECTIONS_MAX: usize = 4096;
/// A request head must arrive within this time of its first byte; otherwise the connection ends.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A request body must arrive within this time; otherwise the answer is 408.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a request, new or kept alive, ends after this time.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A client must read its answer within this time; otherwise the connection ends.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest request head, in bytes; a longer head is answered 431. Bounds the memory of half-sent
/// heads.
pub(crate) const HEAD_BYTES_MAX: usize = 128 * 1024;
/// While every connection has a request under way, the interval of the search for an idle
/// connection.
const EVICT_INTERVAL: Duration = Duration::from_millis(100);
/// Connections evicted at a time: connections above the limit come in bursts.
const EVICTIONS: usize = 16;
/// Most connections in the queue of the listener, if net.core.somaxconn allows as many.
const BACKLOG_MAX: u32 = 4096;
/// Descriptors reserved for the log, the database, brokers and files.
const DESCRIPTORS_RESERVED: u64 = 512;

/// Listens with a queue for a burst of connections: a client rejected by a full queue retries a
/// second later.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A restarted service reuses the address of the previous process.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG_MAX)
}

/// Raises the limit of open files as far as connections need. Returns the allowed number of
/// connections.
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

/// Serves until `stop` completes, then ends connections without a request and waits for the
/// remaining connections.
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
            // `accept` retries after errors of a single connection and a lack of descriptors.
            let (stream, _): (TcpStream, SocketAddr) = Listener::accept(&mut listener).await;
            (stream, connections.admit(&*clock).await)
        };
        let (stream, slot) = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = accepted => accepted,
        };
        // Clients wait for small answers, which Nagle's algorithm would delay. A failure only costs
        // time.
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
        // A broken connection is the client's choice.
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
        // The connection was just evicted for a new connection, so the request is refused.
        let mut refused = Response::new(Body::empty());
        *refused.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        refused.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        return Ok(refused);
    }
    let response = router.oneshot(request).await?;
    connection.phase.send_replace(Phase::Answering);
    let sent = Sent(connection);
    Ok(response.map(|body| {
        // hyper drops the body after handing the last byte to the system.
        Body::new(body.map_err(move |error| {
            let _held_until_the_end = &sent;
            error
        }))
    }))
}

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No byte of a request has arrived since this moment of [`Connections`]'s counter.
    Idle { since: u64 },
    /// A part of a head has arrived; the connection has waited since this moment.
    Head { since: u64 },
    /// A request is under way.
    Busy,
    /// The answer is being sent.
    Answering,
    /// The connection ends in favour of a new connection.
    Evicted,
}

impl Phase {
    fn time_max(self) -> Option<Duration> {
        match self {
            Self::Idle { .. } => Some(IDLE_TIMEOUT),
            Self::Head { .. } => Some(HEAD_TIMEOUT),
            // The handler of the request has a deadline.
            Self::Busy => None,
            Self::Answering => Some(ANSWER_TIMEOUT),
            Self::Evicted => Some(Duration::ZERO),
        }
    }

    /// Returns the moment since which the connection waits for a request; `None` during a request.
    fn waiting_since(self) -> Option<u64> {
        match self {
            Self::Idle { since } | Self::Head { since } => Some(since),
            Self::Busy | Self::Answering | Self::Evicted => None,
        }
    }
}

/// The phase of one connection.
struct Connection {
    phase: watch::Sender<Phase>,
    /// A counter for the order of events, shared by all connections.
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

    /// Marks the arrival of the first byte of a head.
    fn read(&self) {
        self.phase.send_if_modified(|phase| {
            let Phase::Idle { since } = *phase else { return false };
            *phase = Phase::Head { since };
            true
        });
    }

    /// Marks a complete head. Returns `false` for an evicted connection.
    fn begin(&self) -> bool {
        self.phase.send_if_modified(|phase| {
            let is_admitted = *phase != Phase::Evicted;
            if is_admitted {
                *phase = Phase::Busy;
            }
            is_admitted
        })
    }

    /// Evicts the connection, unless a request has arrived since the phase was read. Returns `true`
    /// after an eviction.
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

/// An answer being sent: the connection becomes idle when this value is dropped.
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

/// A place among [`Connections`], released on drop.
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

    /// Returns a slot for a new connection, after an eviction if none is free.
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
        let mut waiting: Vec<_> = open
            .values()
            .filter_map(|connection| {
                let phase = *connection.phase.borrow();
                Some((phase.waiting_since()?, phase, connection))
            })
            .collect();
        waiting.sort_unstable_by_key(|(since, ..)| *since);
        // A connection whose request has just arrived stays.
        waiting.iter().take(EVICTIONS).for_each(|(_, phase, connection)| {
            connection.evict(*phase);
        });
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

/// A stream which notifies its connection of received bytes.
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

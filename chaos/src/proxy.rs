//! A TCP proxy in front of a broker that breaks connections in every way a network does.
//!
//! It forwards requests whole, by Kafka's length prefix, so that it can take one produce request out
//! of the stream and deliver it later.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kafold::Clock;
use kafold::clock::SystemClock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

/// Chunks between the two ends of a connection that are on their way.
const CHUNKS_MAX: usize = 1_024;
/// Largest request that is taken for one; a broker's own limit is 100 MiB.
const REQUEST_BYTES_MAX: usize = 100 << 20;
const CHUNK_BYTES: usize = 64 << 10;
const API_PRODUCE: i16 = 0;

/// What the line is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// As if there were no proxy.
    Good,
    /// Every connection is closed, and each new one at once.
    Cut,
    /// Connections stay open and nothing comes through: not from clients, not to them, or neither.
    HalfOpen {
        /// What clients send.
        requests: bool,
        /// What the broker answers.
        replies: bool,
    },
    /// Everything takes longer by this.
    Delayed(Duration),
    /// So many bytes a second come through, in both directions together on each connection.
    Dripping(u64),
}

/// The proxy of one broker.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// Where clients connect.
    pub address: SocketAddr,
    line: watch::Sender<Line>,
    held: Arc<Mutex<Hold>>,
    upstream: watch::Sender<Option<SocketAddr>>,
}

/// The next produce request is taken out for so long.
#[derive(Debug, Default)]
struct Hold {
    wanted: Option<Duration>,
    taken: u64,
}

impl Proxy {
    /// Listens on a free port. Nothing is forwarded before [`Proxy::forward_to`].
    pub async fn bind() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (line, _) = watch::channel(Line::Good);
        let (upstream, _) = watch::channel(None);
        let proxy = Self { address, line, held: Arc::default(), upstream };
        tokio::spawn(proxy.clone().accept(listener));
        Ok(proxy)
    }

    /// Where the broker is.
    pub fn forward_to(&self, broker: SocketAddr) {
        self.upstream.send_replace(Some(broker));
    }

    /// Changes the line, for connections that are open as well.
    pub fn set(&self, line: Line) {
        self.line.send_replace(line);
    }

    /// Takes the next produce request out of its connection, which is closed to the client, and gives
    /// it to the broker after `time`.
    pub fn hold_next(&self, time: Duration) {
        self.hold().wanted = Some(time);
    }

    /// Gives up holding, if no request came. How many were held in all.
    pub fn release(&self) -> u64 {
        let mut hold = self.hold();
        hold.wanted = None;
        hold.taken
    }

    fn hold(&self) -> std::sync::MutexGuard<'_, Hold> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn accept(self, listener: TcpListener) {
        loop {
            let Ok((client, _)) = listener.accept().await else { continue };
            let upstream = *self.upstream.borrow();
            let (Some(broker), true) = (upstream, *self.line.borrow() != Line::Cut) else {
                continue;
            };
            let proxy = self.clone();
            tokio::spawn(async move {
                // A connection that breaks is what it is here for.
                drop(proxy.connect(client, broker).await);
            });
        }
    }

    async fn connect(self, client: TcpStream, broker: SocketAddr) -> std::io::Result<()> {
        let broker = TcpStream::connect(broker).await?;
        client.set_nodelay(true)?;
        broker.set_nodelay(true)?;
        let (from_client, to_client) = client.into_split();
        let (from_broker, to_broker) = broker.into_split();
        let mut line = self.line.subscribe();
        // A sender lives as long as the proxy.
        let cut = async { drop(line.wait_for(|line| *line == Line::Cut).await) };
        let requests = self.clone().requests(from_client, to_broker);
        let replies = self.replies(from_broker, to_client);
        tokio::select! {
            ended = requests => match ended? {
                // The broker still gets what was taken out, though the client is gone.
                Some(held) => held.deliver().await,
                None => Ok(()),
            },
            ended = replies => ended,
            () = cut => Ok(()),
        }
    }

    /// Whole requests, one after another; the one that is to be held ends it.
    async fn requests(
        self,
        mut client: OwnedReadHalf,
        broker: OwnedWriteHalf,
    ) -> std::io::Result<Option<Held>> {
        let (queue, queued) = mpsc::channel(CHUNKS_MAX);
        let forwarding = tokio::spawn(forward(self.line.subscribe(), true, queued, broker));
        loop {
            let mut length = [0; 4];
            client.read_exact(&mut length).await?;
            let bytes = u32::from_be_bytes(length) as usize;
            if !(2..=REQUEST_BYTES_MAX).contains(&bytes) {
                return Err(std::io::Error::other("this is no request"));
            }
            let mut request = vec![0; 4 + bytes];
            request[..4].copy_from_slice(&length);
            client.read_exact(&mut request[4..]).await?;
            if i16::from_be_bytes([request[4], request[5]]) == API_PRODUCE
                && let Some(time) = self.take_hold()
            {
                drop(queue);
                let broker = forwarding.await.map_err(std::io::Error::other)??;
                return Ok(Some(Held { time, request, broker }));
            }
            if queue.send((SystemClock.instant(), request)).await.is_err() {
                return Ok(None);
            }
        }
    }

    fn take_hold(&self) -> Option<Duration> {
        let mut hold = self.hold();
        let time = hold.wanted.take()?;
        hold.taken += 1;
        Some(time)
    }

    async fn replies(
        &self,
        mut broker: OwnedReadHalf,
        client: OwnedWriteHalf,
    ) -> std::io::Result<()> {
        let (queue, queued) = mpsc::channel(CHUNKS_MAX);
        let forwarding = forward(self.line.subscribe(), false, queued, client);
        let reading = async {
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let bytes = broker.read(&mut chunk).await?;
                chunk.truncate(bytes);
                if bytes == 0 || queue.send((SystemClock.instant(), chunk)).await.is_err() {
                    return Ok(());
                }
            }
        };
        tokio::select! {
            ended = reading => ended,
            ended = forwarding => ended.map(drop),
        }
    }
}

/// A produce request that was taken out.
struct Held {
    time: Duration,
    request: Vec<u8>,
    broker: OwnedWriteHalf,
}

impl Held {
    async fn deliver(mut self) -> std::io::Result<()> {
        SystemClock.sleep(self.time).await;
        self.broker.write_all(&self.request).await?;
        // The broker reads no request whose connection is gone: leave it time.
        SystemClock.sleep(Duration::from_secs(1)).await;
        Ok(())
    }
}

type Chunk = (Instant, Vec<u8>);

/// Writes what comes, as the line allows.
async fn forward(
    mut line: watch::Receiver<Line>,
    is_request: bool,
    mut queued: mpsc::Receiver<Chunk>,
    mut to: OwnedWriteHalf,
) -> std::io::Result<OwnedWriteHalf> {
    while let Some((came, chunk)) = queued.recv().await {
        let swallows = |line: &Line| match line {
            Line::HalfOpen { requests, replies } => {
                if is_request {
                    *requests
                } else {
                    *replies
                }
            }
            _ => false,
        };
        // The senders live as long as the proxy.
        drop(line.wait_for(|line| !swallows(line)).await);
        let now = *line.borrow();
        match now {
            Line::Delayed(time) => {
                let due = came + time;
                SystemClock.sleep(due.saturating_duration_since(SystemClock.instant())).await;
                to.write_all(&chunk).await?;
            }
            Line::Dripping(bytes_a_second) => {
                drip(&mut line, bytes_a_second, &chunk, &mut to).await?;
            }
            Line::Good | Line::Cut | Line::HalfOpen { .. } => to.write_all(&chunk).await?,
        }
    }
    Ok(to)
}

/// A tenth of a second's bytes at a time, while the line drips.
async fn drip(
    line: &mut watch::Receiver<Line>,
    bytes_a_second: u64,
    chunk: &[u8],
    to: &mut OwnedWriteHalf,
) -> std::io::Result<()> {
    let step = (bytes_a_second / 10).max(1) as usize;
    let mut rest = chunk;
    while !rest.is_empty() && matches!(*line.borrow(), Line::Dripping(_)) {
        let (now, later) = rest.split_at(step.min(rest.len()));
        to.write_all(now).await?;
        rest = later;
        SystemClock.sleep(Duration::from_millis(100)).await;
    }
    to.write_all(rest).await
}

#[cfg(test)]
mod tests;

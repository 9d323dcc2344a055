//! A TCP proxy that counts bytes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::Failure;

const BUFFER_BYTES: usize = 64 * 1024;

/// Listens at once, and forwards from the moment it is told whereto.
pub struct Proxy {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    target: watch::Sender<Option<SocketAddr>>,
    upstream: Arc<AtomicU64>,
}

impl Proxy {
    /// On a free port.
    pub async fn bind() -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (target, told) = watch::channel(None);
        let upstream = Arc::new(AtomicU64::new(0));
        tokio::spawn(serve(listener, told, Arc::clone(&upstream)));
        Ok(Self { port, target, upstream })
    }

    /// Where everything goes.
    pub fn forward_to(&self, target: SocketAddr) {
        self.target.send_replace(Some(target));
    }

    /// Bytes that clients have sent so far.
    pub fn upstream_bytes(&self) -> u64 {
        self.upstream.load(Ordering::Relaxed)
    }
}

async fn serve(
    listener: TcpListener,
    mut told: watch::Receiver<Option<SocketAddr>>,
    upstream: Arc<AtomicU64>,
) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(target) = told.wait_for(Option::is_some).await.map(|target| *target) else { return };
        let Some(target) = target else { return };
        let Ok(server) = TcpStream::connect(target).await else { continue };
        // Small requests are waited for.
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::spawn(copy(from_client, to_server, Some(Arc::clone(&upstream))));
        tokio::spawn(copy(from_server, to_client, None));
    }
}

/// Until one side ends.
async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, counter: Option<Arc<AtomicU64>>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
        if let Some(counter) = &counter {
            counter.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

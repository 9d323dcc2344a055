use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;
use kafold::clock::within;

/// Longest wait for what must come; and the time in which nothing must.
const PATIENCE: Duration = Duration::from_secs(20);
const QUIET: Duration = Duration::from_millis(300);

const FETCH: [u8; 8] = [0, 0, 0, 4, 0, 1, 7, 7];
const PRODUCE: [u8; 8] = [0, 0, 0, 4, 0, 0, 9, 9];

/// Tells every request that it gets, and answers with its bytes.
async fn broker() -> (SocketAddr, mpsc::UnboundedReceiver<[u8; 8]>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut request = [0; 8];
                while client.read_exact(&mut request).await.is_ok() {
                    // Not every test wants to know.
                    tell.send(request).ok();
                    // A client that is gone wants no answer.
                    drop(client.write_all(&request).await);
                }
            });
        }
    });
    (address, told)
}

async fn client() -> (Proxy, TcpStream, mpsc::UnboundedReceiver<[u8; 8]>) {
    let (address, told) = broker().await;
    let proxy = Proxy::bind().await.expect("a port");
    proxy.forward_to(address);
    let mut client = TcpStream::connect(proxy.address).await.expect("it listens");
    assert!(answers(&mut client, FETCH).await, "the line is good");
    (proxy, client, told)
}

/// Whether the request is answered; `false` when the connection is closed.
async fn answers(client: &mut TcpStream, request: [u8; 8]) -> bool {
    // A closed connection shows when it is read from.
    drop(client.write_all(&request).await);
    let mut answer = [0; 8];
    let read = within(&SystemClock, PATIENCE, client.read_exact(&mut answer)).await;
    read.expect("an answer, or the end").is_ok_and(|_| answer == request)
}

#[tokio::test]
async fn a_line_that_is_cut_closes_connections_and_takes_none() {
    let (proxy, mut client, _) = client().await;
    proxy.set(Line::Cut);
    assert!(!answers(&mut client, FETCH).await);
    let mut again = TcpStream::connect(proxy.address).await.expect("it listens");
    assert!(!answers(&mut again, FETCH).await);
    proxy.set(Line::Good);
    let mut again = TcpStream::connect(proxy.address).await.expect("it listens");
    assert!(answers(&mut again, FETCH).await);
}

#[tokio::test]
async fn on_a_half_open_line_requests_arrive_and_answers_do_not() {
    let (proxy, mut client, mut told) = client().await;
    told.recv().await.expect("the first one");
    proxy.set(Line::HalfOpen { requests: false, replies: true });
    client.write_all(&FETCH).await.expect("it is open");
    assert_eq!(told.recv().await, Some(FETCH), "the broker has it");
    let mut answer = [0; 8];
    let silence = within(&SystemClock, QUIET, client.read_exact(&mut answer)).await;
    assert!(silence.is_none(), "{silence:?}");
    proxy.set(Line::Good);
    client.read_exact(&mut answer).await.expect("late, and not lost");
    assert_eq!(answer, FETCH);
}

#[tokio::test]
async fn a_request_that_is_held_arrives_after_its_client_is_gone() {
    let (proxy, mut client, mut told) = client().await;
    told.recv().await.expect("the first one");
    proxy.hold_next(QUIET);
    assert!(answers(&mut client, FETCH).await, "only a produce request is held");
    told.recv().await.expect("the second one");
    let begun = SystemClock.instant();
    assert!(!answers(&mut client, PRODUCE).await, "the connection is closed");
    let late = within(&SystemClock, PATIENCE, told.recv()).await;
    assert_eq!(late.expect("it arrives"), Some(PRODUCE));
    assert!(SystemClock.instant() - begun >= QUIET);
    assert_eq!(proxy.release(), 1);
}

#[tokio::test]
async fn a_slow_line_takes_its_time_and_loses_nothing() {
    let (proxy, mut client, _) = client().await;
    for line in [Line::Delayed(QUIET), Line::Dripping(40)] {
        proxy.set(line);
        let begun = SystemClock.instant();
        assert!(answers(&mut client, FETCH).await);
        let took = SystemClock.instant() - begun;
        assert!(took >= Duration::from_millis(200), "{line:?} took {took:?}");
    }
}

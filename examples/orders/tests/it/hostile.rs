//! What nobody should send: every request of the corpus is answered by a problem that is the client's, and
//! changes nothing.

use crate::support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use support::{Service, Stack, on_each_log, timed, wait_for};

on_each_log!(no_request_of_the_corpus_harms_the_service);

const CORPUS: &str = include_str!("../corpus/requests.txt");

fn no_request_of_the_corpus_harms_the_service(stack: &Stack) {
    // Two of them do not send what they say they will, and are waited for.
    let service = stack.start(&["--deadline", "5s"]);
    service.wait_ready();
    let placed = ["kept", "end"].map(|id| service.place(id, 700).position());
    let report = format!("/reports/sales?by=customer&after={}", placed.join(","));
    let state = |service: &Service| {
        ["/orders/kept/events", "/orders/end/events", &report].map(|path| service.get(path).text)
    };
    let before = state(&service);
    let mut wrong = Vec::new();
    for (line, case) in CORPUS.lines().enumerate() {
        if case.is_empty() || case.starts_with('#') {
            continue;
        }
        let (request, verdict) = case.rsplit_once(" => ").expect(case);
        let reply = service.send(&bytes_of(request).unwrap_or_else(|| panic!("{case}")));
        let is_as_said = match verdict.split_once(' ') {
            Some((status, name)) => {
                reply.status.to_string() == status
                    && reply.header("content-type") == Some("application/problem+json")
                    && reply.json()["type"] == format!("/problems/{name}")
            }
            None => reply.status.to_string() == verdict,
        };
        if !is_as_said {
            wrong.push(format!("{}: {case:.200}\nis answered {reply:.300?}", line + 1));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(service.get("/health/ready").status, 200, "{}", service.log());
    assert_eq!(state(&service), before, "something was changed");
    assert!(!service.log().contains("ERROR"), "{}", service.log());
}

/// Deadline for the end of half-sent requests.
const HALF_SENT_MAX: Duration = Duration::from_secs(15);
/// Number of half-sent heads: above the limit of connections.
const HALF_SENT: usize = 5_000;
/// Number of half-sent bodies: above the limit of requests under way.
const HALF_SENT_BODIES: usize = 1_100;

#[test]
fn half_sent_requests_end_in_time_and_keep_nobody_out() {
    rlimit::increase_nofile_limit((HALF_SENT + HALF_SENT_BODIES) as u64 + 1_000)
        .expect("a limit of open files");
    let service = Stack::embedded().serve();
    let before = service.descriptors();
    let half = |text: &str| {
        let mut stream = TcpStream::connect(service.address).expect("a connection");
        stream.write_all(text.as_bytes()).expect("half a request");
        stream
    };
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let mut half_sent: Vec<_> = (0..HALF_SENT).map(|_| half(head)).collect();
    let ((), took) = timed(|| {
        let bodies = (0..HALF_SENT_BODIES)
            .map(|_| half(&format!("{head}content-length: 1000\r\n\r\n{{\"customer\"")));
        half_sent.extend(bodies);
        // A head without an end, one byte at a time.
        let mut trickle = half("GET / HTTP/1.1\r\nx: ");
        trickle.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");

        let mut answered: Vec<_> = (0..21)
            .map(|_| {
                let (reply, took) = timed(|| service.get("/health/live"));
                assert_eq!(reply.status, 200, "{reply:?}");
                took
            })
            .collect();
        answered.sort();
        assert!(answered[10] < Duration::from_millis(100), "{answered:?}");
        assert!(service.descriptors() < before + 4_096 + 10, "more connections than the limit");
        assert_eq!(service.place("meanwhile", 700).status, 201);

        while trickle.write_all(b"x").is_ok() {
            match trickle.read(&mut [0; 1024]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
        for stream in &mut half_sent {
            stream.set_read_timeout(Some(HALF_SENT_MAX)).expect("a timeout");
            // A body is answered 408 first, a head has no answer; both connections end.
            let mut answer = Vec::new();
            if let Err(error) = stream.read_to_end(&mut answer) {
                assert_eq!(
                    error.kind(),
                    ErrorKind::ConnectionReset,
                    "a half-sent request stays open"
                );
            }
        }
    });
    assert!(took < HALF_SENT_MAX, "{took:?}");
    wait_for("descriptors come back", || (service.descriptors() < before + 20).then_some(()));
    assert_eq!(service.place("after", 700).status, 201);
}

#[test]
fn a_connection_is_kept_for_the_next_request_and_closed_when_none_comes() {
    let service = Stack::embedded().serve();
    let mut stream = TcpStream::connect(service.address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(12))).expect("a timeout");
    let ask = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut answer = [0; 1024];
    stream.write_all(ask).expect("a request");
    assert!(stream.read(&mut answer).expect("an answer") > 0);
    // Waits longer than the limit of a head, which does not apply to an idle connection.
    let waited = stream.read(&mut answer).expect_err("nothing comes");
    assert_eq!(waited.kind(), ErrorKind::WouldBlock);
    stream.write_all(ask).expect("a request");
    assert!(stream.read(&mut answer).expect("an answer") > 0);
}

/// The request to the letter.
fn bytes_of(case: &str) -> Option<Vec<u8>> {
    let mut parts = case.split(" | ");
    let mut head = unescape(parts.next()?)?;
    head.extend(b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    let mut body = Vec::new();
    let mut has_length = false;
    for part in parts {
        match part.strip_prefix('=') {
            Some(text) => body = unescape(text)?,
            None if part == "json" => head.extend(b"content-type: application/json\r\n"),
            None => {
                has_length |=
                    part.starts_with("content-length") || part.starts_with("transfer-enc");
                head.extend([unescape(part)?, b"\r\n".to_vec()].concat());
            }
        }
    }
    if !has_length {
        head.extend(format!("content-length: {}\r\n", body.len()).into_bytes());
    }
    Some([head, b"\r\n".to_vec(), body].concat())
}

/// `\xHH` is a byte, `\_` a space, `*N{TEXT}` the text N times.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let repetition = rest.strip_prefix('*').and_then(|r| r.split_once('{'));
        let repetition = repetition.and_then(|(count, r)| Some((count.parse().ok()?, r)));
        if let Some(hex) = rest.strip_prefix("\\x") {
            bytes.push(u8::from_str_radix(hex.get(..2)?, 16).ok()?);
            rest = &hex[2..];
        } else if let Some(after) = rest.strip_prefix("\\_") {
            bytes.push(b' ');
            rest = after;
        } else if let Some((count, after)) = repetition {
            let (repeated, after) = after.split_once('}')?;
            bytes.extend(unescape(repeated)?.repeat(count));
            rest = after;
        } else {
            bytes.extend(first.to_string().into_bytes());
            rest = &rest[first.len_utf8()..];
        }
    }
    Some(bytes)
}

//! What nobody should send: every request of the corpus is answered by a problem that is the client's, and
//! changes nothing.

mod support;

use support::{Service, Stack, on_each_log};

on_each_log!(no_request_of_the_corpus_harms_the_service);

const CORPUS: &str = include_str!("corpus/requests.txt");

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

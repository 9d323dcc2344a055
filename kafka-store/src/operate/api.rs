//! Which requests a broker understands, asked over a connection of its own: the client library knows
//! and does not tell.

use std::io::{self, Read, Write};

/// `DescribeCluster`, which came with Kafka 2.8.
const DESCRIBE_CLUSTER: i16 = 60;
const FETCH: i16 = 1;
/// Longest answer that is read: there are fewer than a hundred kinds of requests, six bytes each.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// What a broker understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokerApi {
    /// Kinds of requests.
    pub kinds: usize,
    /// The highest version of `Fetch`, by which releases can be told apart.
    pub fetch_max: i16,
    /// Whether it is of Kafka 2.8 or newer, as the store needs it.
    pub is_new_enough: bool,
}

/// Sends `ApiVersions` and returns the requests the broker supports. Needs no login.
pub(crate) fn ask<S: Read + Write + ?Sized>(stream: &mut S) -> io::Result<BrokerApi> {
    // `ApiVersions` of version 0 has no body.
    parse(&call(stream, 18, 0, &[])?).ok_or_else(invalid)
}

/// Requests the metadata of no topic. A broker with a required login closes the connection.
pub(crate) fn ask_topics<S: Read + Write + ?Sized>(stream: &mut S) -> io::Result<()> {
    // `Metadata` of version 1 with an empty array of topics.
    call(stream, 3, 1, &[0, 0, 0, 0]).map(drop)
}

/// Sends a request of key, version, correlation id, client name and body. Returns the response.
fn call<S: Read + Write + ?Sized>(
    stream: &mut S,
    key: i16,
    version: i16,
    body: &[u8],
) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    request.extend(key.to_be_bytes());
    request.extend(version.to_be_bytes());
    request.extend([0, 0, 0, 1, 0, 6]);
    request.extend(b"kafold");
    request.extend(body);
    let mut framed = u32::try_from(request.len()).unwrap_or(0).to_be_bytes().to_vec();
    framed.append(&mut request);
    stream.write_all(&framed)?;
    stream.flush()?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = usize::try_from(i32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > ANSWER_BYTES_MAX {
        return Err(invalid());
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it does not answer as a broker does")
}

/// The answer: correlation id, error code, and an array of key, lowest and highest version.
fn parse(answer: &[u8]) -> Option<BrokerApi> {
    let number = |bytes: &[u8]| Some(i16::from_be_bytes(bytes.try_into().ok()?));
    let error = number(answer.get(4..6)?)?;
    let kinds = i32::from_be_bytes(answer.get(6..10)?.try_into().ok()?);
    let kinds = usize::try_from(kinds).ok()?;
    let entries = answer.get(10..10 + kinds.checked_mul(6)?)?.chunks_exact(6);
    let highest = |wanted: i16| {
        let mut found = entries.clone().filter(|entry| number(&entry[..2]) == Some(wanted));
        found.next().and_then(|entry| number(&entry[4..]))
    };
    let fetch_max = highest(FETCH).filter(|_| error == 0)?;
    Some(BrokerApi { kinds, fetch_max, is_new_enough: highest(DESCRIBE_CLUSTER).is_some() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_a_broken_one_is_none() {
        let of = |entries: &[[i16; 3]]| {
            let mut answer = vec![0, 0, 0, 1, 0, 0];
            answer.extend_from_slice(&(entries.len() as i32).to_be_bytes());
            let numbers = entries.iter().flatten().flat_map(|number| number.to_be_bytes());
            answer.extend(numbers);
            answer
        };
        let new = of(&[[0, 3, 11], [FETCH, 4, 17], [DESCRIBE_CLUSTER, 0, 1]]);
        let api = BrokerApi { kinds: 3, fetch_max: 17, is_new_enough: true };
        assert_eq!(parse(&new), Some(api));
        let old = parse(&of(&[[FETCH, 0, 11]])).expect("an answer");
        assert!(!old.is_new_enough);
        assert_eq!(parse(&of(&[[0, 3, 11]])), None);
        for cut in 0..new.len() {
            assert_eq!(parse(&new[..cut]), None, "cut at {cut}");
        }
    }
}

//! Connections to a broker outside the client library, for facts the library does not report: the
//! cause of a failed connection, the broker's certificate, and the supported requests.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use rdkafka::ClientConfig;

use crate::operate::api;
use crate::refusal::Refusal;
use crate::transport::{is_encrypted, logs_in};

/// Timeout of each step of an examination; short, because the broker was reachable a moment ago.
const STEP_TIMEOUT: Duration = Duration::from_secs(1);
/// Most brokers examined: brokers usually share one fault.
const EXAMINED_MAX: usize = 3;

/// The TLS version and certificate of the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The TLS version, such as `TLSv1.3`.
    pub protocol: String,
    /// The host names and addresses in the certificate.
    pub names: Vec<String>,
    /// The authority which signed the certificate.
    pub issuer: String,
    /// Whole days before the certificate expires.
    pub days_left: i32,
}

/// An open connection to a broker.
pub(crate) trait Stream: Read + Write {
    /// Returns the TLS facts of the other end; `None` in clear text.
    fn peer(&self) -> Option<Peer>;
}

impl Stream for TcpStream {
    fn peer(&self) -> Option<Peer> {
        None
    }
}

/// The reason for a failed connection.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An error which may pass.
    Io(io::Error),
    /// A fault of the broker's or the client's certificate.
    Refused(Refusal),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Io(error) => error,
            Failure::Refused(refusal) => {
                Self::other(format!("{}; {}", refusal.cause, refusal.remedy))
            }
        }
    }
}

/// Connects with the settings of a client and verifies TLS, without a login. Blocks; each step
/// takes at most `timeout`.
pub(crate) fn connect(
    client: &ClientConfig,
    address: &str,
    timeout: Duration,
) -> Result<Box<dyn Stream>, Failure> {
    let stream = connect_tcp(address, timeout)?;
    match is_encrypted(client) {
        true => tls::start(client, address, stream, true),
        false => Ok(Box::new(stream)),
    }
}

/// Returns `true` for an elapsed timeout of a step. The kind differs by the operating system.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn connect_tcp(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let unknown = || io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    let address = address.to_socket_addrs()?.next().ok_or_else(unknown)?;
    let stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

/// Returns the cause for which running brokers do not answer clients with these settings, or `None`
/// if the cause may pass. Blocks for some seconds at most.
pub(crate) fn examine(client: &ClientConfig, first: Option<&str>) -> Option<Refusal> {
    let brokers = client.get("bootstrap.servers").unwrap_or_default().split(',');
    let others = brokers.filter(|broker| Some(*broker) != first);
    first.into_iter().chain(others).take(EXAMINED_MAX).find_map(|at| examine_one(client, at))
}

fn examine_one(client: &ClientConfig, address: &str) -> Option<Refusal> {
    let mut stream = match connect(client, address, STEP_TIMEOUT) {
        Ok(stream) => stream,
        Err(Failure::Refused(refusal)) => return Some(refusal),
        Err(Failure::Io(_)) => return takes_clear_text(client, address),
    };
    match api::ask(&mut *stream) {
        Ok(_) if logs_in(client) => None,
        Ok(_) => wants_login(&mut *stream, address),
        Err(error) if is_encrypted(client) => refuses_certificate(client, address, &error),
        Err(error) => match takes_tls(client, address) {
            // A slow server has not shown its protocol.
            Err(Failure::Io(slow)) if is_timeout(&slow) => None,
            Err(_) => is_no_broker(address, &error),
            Ok(refusal) => Some(refusal),
        },
    }
}

/// Detects a server of another protocol, such as a database or a web server.
fn is_no_broker(address: &str, error: &io::Error) -> Option<Refusal> {
    (error.kind() == io::ErrorKind::InvalidData).then(|| {
        Refusal::new(
            format!("{address} does not answer as a Kafka broker does"),
            "give HOST:PORT of a broker in the URL",
        )
    })
}

/// Detects a clear-text broker behind a client with TLS.
fn takes_clear_text(client: &ClientConfig, address: &str) -> Option<Refusal> {
    if !is_encrypted(client) {
        return None;
    }
    let mut stream = connect_tcp(address, STEP_TIMEOUT).ok()?;
    api::ask(&mut stream).ok()?;
    Some(Refusal::new(
        format!("{address} takes clear text only, and this client begins with TLS"),
        "connect to the port of the broker's TLS listener, or remove tls=true",
    ))
}

/// Detects a TLS broker behind a client in clear text.
fn takes_tls(client: &ClientConfig, address: &str) -> Result<Refusal, Failure> {
    let stream = connect_tcp(address, STEP_TIMEOUT)?;
    // No data is sent, so the certificate is not verified.
    tls::start(client, address, stream, false)?;
    Ok(Refusal::new(
        format!("{address} takes TLS only, and this client sends clear text"),
        "add ?tls=true&ca=FILE to the URL",
    ))
}

/// Detects a broker which closes the connection after the handshake because of the client's
/// certificate.
fn refuses_certificate(client: &ClientConfig, address: &str, error: &io::Error) -> Option<Refusal> {
    let words = error.to_string();
    if !crate::refusal::wants_certificate(&words) {
        return None;
    }
    let has_one = ["ssl.certificate.location", "ssl.certificate.pem", "ssl.keystore.location"];
    let has_one = has_one.iter().any(|key| client.get(key).is_some());
    Some(match has_one {
        false => Refusal::new(
            format!("{address} wants a certificate of the client, and there is none ({words})"),
            "add ?cert=FILE&key=FILE to the URL",
        ),
        true => Refusal::new(
            format!("{address} does not accept the certificate of the client ({words})"),
            "set cert= and key= to a certificate that the broker's authority signed and that is not \
             expired",
        ),
    })
}

/// Detects a required login: such a broker closes the connection at the first request besides
/// `ApiVersions`.
fn wants_login(stream: &mut dyn Stream, address: &str) -> Option<Refusal> {
    let error = api::ask_topics(stream).err()?;
    let ended = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
    ended.contains(&error.kind()).then(|| {
        Refusal::new(
            format!("{address} wants a login, and this client has none"),
            "add ?sasl=scram-sha-512&user=NAME&password=@FILE to the URL",
        )
    })
}

#[cfg(feature = "tls")]
mod tls {
    use std::io;
    use std::net::TcpStream;
    use std::sync::{Arc, Mutex, PoisonError};

    use openssl::asn1::Asn1Time;
    use openssl::error::ErrorStack;
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use openssl::ssl::{
        ConnectConfiguration, HandshakeError, SslConnector, SslMethod, SslStream, SslVerifyMode,
    };
    use openssl::x509::store::X509StoreBuilder;
    use openssl::x509::{X509, X509NameRef, X509Ref};
    use rdkafka::ClientConfig;

    use super::{Failure, Peer, Stream};
    use crate::refusal::Refusal;

    // OpenSSL's verification results, for which the openssl crate has no names.
    const NOT_YET_VALID: i32 = 9;
    const EXPIRED: i32 = 10;
    const HOST_MISMATCH: i32 = 62;
    const ADDRESS_MISMATCH: i32 = 64;

    /// The first error of the verification.
    struct Fault {
        code: i32,
        words: &'static str,
        /// `true` for the broker's own certificate, `false` for an authority's certificate.
        is_leaf: bool,
        certificate: Option<X509>,
    }

    impl Stream for SslStream<TcpStream> {
        fn peer(&self) -> Option<Peer> {
            let certificate = self.ssl().peer_certificate()?;
            let today = Asn1Time::days_from_now(0).ok()?;
            Some(Peer {
                protocol: self.ssl().version_str().to_owned(),
                names: names(&certificate),
                issuer: common_name(certificate.issuer_name()),
                days_left: today.diff(certificate.not_after()).map_or(0, |left| left.days),
            })
        }
    }

    /// Performs the handshake with the TLS library of librdkafka, so both reach the same result.
    pub(super) fn start(
        client: &ClientConfig,
        address: &str,
        stream: TcpStream,
        is_verified: bool,
    ) -> Result<Box<dyn Stream>, Failure> {
        let fault = Arc::new(Mutex::new(None));
        let settings = configure(client, is_verified, &fault).map_err(|error| {
            Failure::Refused(Refusal::new(
                format!("a file of TLS cannot be used ({error})"),
                "check the files of ca=, cert= and key=",
            ))
        })?;
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        match settings.connect(host.trim_matches(['[', ']']), stream) {
            Ok(stream) => Ok(Box::new(stream)),
            Err(HandshakeError::SetupFailure(error)) => Err(Failure::Io(error.into())),
            Err(HandshakeError::Failure(broken) | HandshakeError::WouldBlock(broken)) => {
                let fault = fault.lock().unwrap_or_else(PoisonError::into_inner).take();
                let error = broken.into_error();
                Err(match fault {
                    Some(fault) => Failure::Refused(refusal(&fault, address, host)),
                    None => Failure::Io(error.into_io_error().unwrap_or_else(io::Error::other)),
                })
            }
        }
    }

    fn configure(
        client: &ClientConfig,
        is_verified: bool,
        fault: &Arc<Mutex<Option<Fault>>>,
    ) -> Result<ConnectConfiguration, ErrorStack> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        let location = client.get("ssl.ca.location").filter(|location| *location != "probe");
        if let Some(location) = location {
            // A named file replaces the authorities of the system.
            builder.set_cert_store(X509StoreBuilder::new()?.build());
            match std::path::Path::new(location).is_dir() {
                true => builder.load_verify_locations(None, Some(location.as_ref()))?,
                false => builder.set_ca_file(location)?,
            }
        }
        if let Some(pem) = client.get("ssl.ca.pem") {
            let mut store = X509StoreBuilder::new()?;
            for authority in X509::stack_from_pem(pem.as_bytes())? {
                store.add_cert(authority)?;
            }
            builder.set_cert_store(store.build());
        }
        if let (Some(certificate), Some(key)) =
            (client.get("ssl.certificate.location"), client.get("ssl.key.location"))
        {
            builder.set_certificate_chain_file(certificate)?;
            let password = client.get("ssl.key.password").unwrap_or_default();
            let key = std::fs::read(key).unwrap_or_default();
            let key = PKey::private_key_from_pem_passphrase(&key, password.as_bytes())?;
            builder.set_private_key(&key)?;
        }
        let says_no = |key: &str, no: &[&str]| {
            client.get(key).is_some_and(|value| no.contains(&value.to_ascii_lowercase().as_str()))
        };
        let verifies =
            !says_no("enable.ssl.certificate.verification", &["false", "f", "0", "no", "n"]);
        if !is_verified || !verifies {
            builder.set_verify(SslVerifyMode::NONE);
        } else {
            let fault = Arc::clone(fault);
            builder.set_verify_callback(SslVerifyMode::PEER, move |is_valid, context| {
                let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
                if !is_valid && fault.is_none() {
                    *fault = Some(Fault {
                        code: context.error().as_raw(),
                        words: context.error().error_string(),
                        is_leaf: context.error_depth() == 0,
                        certificate: context.current_cert().map(ToOwned::to_owned),
                    });
                }
                is_valid
            });
        }
        let names_host = !says_no("ssl.endpoint.identification.algorithm", &["none"]);
        Ok(builder.build().configure()?.verify_hostname(names_host && is_verified))
    }

    fn refusal(fault: &Fault, address: &str, host: &str) -> Refusal {
        let words = fault.words;
        let certificate = fault.certificate.as_deref();
        let whose = match (fault.is_leaf, certificate) {
            (false, Some(authority)) => format!(
                "the certificate of the authority {:?} of {address}",
                common_name(authority.subject_name())
            ),
            _ => format!("the certificate of {address}"),
        };
        match fault.code {
            EXPIRED => {
                let until = certificate.map(|found| found.not_after().to_string());
                Refusal::new(
                    format!("{whose} expired on {} ({words})", until.unwrap_or_default()),
                    "give the broker a new certificate, and see that this machine's clock is right",
                )
            }
            NOT_YET_VALID => {
                let from = certificate.map(|found| found.not_before().to_string());
                Refusal::new(
                    format!("{whose} is not valid before {} ({words})", from.unwrap_or_default()),
                    "see that this machine's clock is right",
                )
            }
            HOST_MISMATCH | ADDRESS_MISMATCH => {
                let names = certificate.map(names).unwrap_or_default().join(", ");
                Refusal::new(
                    format!("{whose} is for {names} and not for {host} ({words})"),
                    "connect by a name that the certificate has, or give the broker one for this \
                     name",
                )
            }
            _ => {
                let issuer = certificate.map(|found| common_name(found.issuer_name()));
                Refusal::new(
                    format!(
                        "the certificate of {address} is signed by {:?}, an authority that is not \
                         trusted here ({words})",
                        issuer.unwrap_or_default()
                    ),
                    "set ca= to the file of the authority that signed it",
                )
            }
        }
    }

    /// Returns the host names and addresses in a certificate.
    fn names(certificate: &X509Ref) -> Vec<String> {
        let mut names = Vec::new();
        for name in certificate.subject_alt_names().iter().flatten() {
            let address = name.ipaddress().and_then(|bytes| match bytes.len() {
                4 => {
                    <[u8; 4]>::try_from(bytes).ok().map(|ip| std::net::IpAddr::from(ip).to_string())
                }
                _ => <[u8; 16]>::try_from(bytes)
                    .ok()
                    .map(|ip| std::net::IpAddr::from(ip).to_string()),
            });
            names.extend(name.dnsname().map(str::to_owned).or(address));
        }
        if names.is_empty() {
            names.push(common_name(certificate.subject_name()));
        }
        names
    }

    fn common_name(name: &X509NameRef) -> String {
        let entry = name.entries_by_nid(Nid::COMMONNAME).next();
        let text = entry.and_then(|entry| entry.data().to_string().ok());
        text.unwrap_or_else(|| "no name".to_owned())
    }
}

/// A build without TLS: librdkafka rejects such settings before any connection.
#[cfg(not(feature = "tls"))]
mod tls {
    use std::net::TcpStream;

    use rdkafka::ClientConfig;

    use super::{Failure, Stream};

    pub(super) fn start(
        _: &ClientConfig,
        _: &str,
        _: TcpStream,
        _: bool,
    ) -> Result<Box<dyn Stream>, Failure> {
        Err(Failure::Io(std::io::Error::other("this program was built without TLS")))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_server_of_another_protocol_is_no_broker() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let serving = std::thread::spawn(move || {
            // The request of Kafka, and the handshake of TLS.
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().expect("a connection");
                let _ = stream.read(&mut [0; 512]).expect("a request");
                stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("an answer");
            }
        });
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &address);
        let refusal = examine(&client, None).expect("not a broker");
        assert!(refusal.cause.contains("does not answer as a Kafka broker does"), "{refusal:?}");
        serving.join().expect("no panic");
    }

    #[test]
    #[cfg(feature = "tls")]
    fn a_slow_handshake_shows_no_other_protocol() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let _ = stream.read(&mut [0; 512]).expect("a request");
            // The alert that a TLS server sends to a client in clear text.
            stream.write_all(&[21, 3, 3, 0, 2, 2, 80]).expect("an answer");
            let (mut slow, _) = listener.accept().expect("a second connection");
            // Blocks until the client closes the connection.
            while slow.read(&mut [0; 512]).is_ok_and(|length| length > 0) {}
        });
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &address);
        assert!(examine(&client, None).is_none());
        serving.join().expect("no panic");
    }
}

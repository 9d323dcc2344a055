//! Reads the certificate of a PostgreSQL server by a TLS handshake of our own, because neither the
//! driver nor PostgreSQL's views return the certificate.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, ProtocolVersion};
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// Timeout of the connection attempt, and of each read and write.
const TIMEOUT: Duration = Duration::from_secs(3);
/// PostgreSQL's `SSLRequest` message: the length and the request code.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// The TLS version and the certificate a server presents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// The version of TLS, such as `TLSv1.3`.
    pub protocol: String,
    /// The certificate's subject.
    pub subject: String,
    /// The subject of the authority which signed the certificate.
    pub issuer: String,
    /// The end of the certificate's validity, in seconds since 1970.
    pub not_after: u64,
}

/// Requests TLS of a server and returns the presented certificate, trusted or not. Returns `None`
/// when the server offers no TLS. Blocks.
pub(crate) fn look(host: &str, port: u16) -> io::Result<Option<ServerTls>> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let mut addresses = (host, port).to_socket_addrs()?;
    let address = addresses.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.write_all(&SSL_REQUEST)?;
    let mut answer = [0];
    socket.read_exact(&mut answer)?;
    if answer != *b"S" {
        return Ok(None);
    }
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let config = config().map_err(io::Error::other)?;
    let mut session = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    while session.is_handshaking() {
        session.complete_io(&mut socket)?;
    }
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let shown = shown.ok_or_else(|| io::Error::other("the server shows no certificate"))?;
    let certificate = Certificate::from_der(shown).map_err(io::Error::other)?.tbs_certificate;
    let protocol = match session.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3".to_owned(),
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2".to_owned(),
        other => format!("{other:?}"),
    };
    Ok(Some(ServerTls {
        protocol,
        subject: certificate.subject.to_string(),
        issuer: certificate.issuer.to_string(),
        not_after: certificate.validity.not_after.to_unix_duration().as_secs(),
    }))
}

fn config() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions()?.dangerous();
    Ok(builder.with_custom_certificate_verifier(Arc::new(Any(provider))).with_no_client_auth())
}

/// Accepts every certificate: the connection is closed after the handshake and carries no data.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

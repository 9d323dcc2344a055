//! Connections to brokers: TLS, login, and the files and secrets of both.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use kafold_core::secret::shown_path;
use rdkafka::ClientConfig;
use secrecy::ExposeSecret;

use crate::error::ConfigError;
use crate::secret::{self, Password};

/// The name by which `allow_unsafe` accepts connections in clear text to other machines.
pub(crate) const CLEAR_TEXT: &str = "clear_text";
/// The name by which `allow_unsafe` accepts unverified certificates.
pub(crate) const UNVERIFIED_TLS: &str = "unverified_tls";
/// Unsafe connections to brokers which `allow_unsafe` can accept.
pub(crate) const UNSAFE_TRANSPORT: [&str; 3] = [CLEAR_TEXT, UNVERIFIED_TLS, secret::READABLE];

/// Files of TLS. The broker's certificate and host name are verified, unless
/// `allow_unsafe=unverified_tls` accepts a librdkafka setting to the contrary.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// The trusted authorities (PEM); by default the authorities of the system.
    pub authorities: Option<PathBuf>,
    /// The client's certificate and private key (PEM), for brokers with client authentication.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// A login by SASL.
#[derive(Debug, Clone)]
pub struct Login {
    /// The SASL mechanism.
    pub mechanism: Mechanism,
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: Password,
}

/// A SASL mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// PLAIN: sends the password to the broker.
    Plain,
    /// SCRAM with SHA-256.
    ScramSha256,
    /// SCRAM with SHA-512.
    ScramSha512,
}

impl Mechanism {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// The URL's options for connections to brokers, as written.
#[derive(Default)]
pub(crate) struct Options {
    tls: Option<bool>,
    authorities: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    mechanism: Option<Mechanism>,
    user: Option<String>,
    /// The password, still percent-encoded.
    password: Option<String>,
}

impl Options {
    /// Stores an option of this group and returns `true`, or returns `false` for any other option.
    /// `raw` is still percent-encoded.
    pub(crate) fn set(&mut self, key: &str, value: &str, raw: &str) -> Result<bool, ConfigError> {
        let invalid = |expected: &str| ConfigError::Value {
            option: key.to_owned(),
            expected: expected.to_owned(),
        };
        let file = || match value {
            "" => Err(invalid("the path of a file")),
            path => Ok(Some(PathBuf::from(path))),
        };
        match key {
            "tls" => {
                let is_on = value.parse().map_err(|_| invalid("true or false"))?;
                self.tls = Some(is_on);
            }
            "ca" => self.authorities = file()?,
            "cert" => self.certificate = file()?,
            "key" => self.key = file()?,
            "sasl" => {
                self.mechanism = Some(match value.to_ascii_lowercase().as_str() {
                    "plain" => Mechanism::Plain,
                    "scram-sha-256" => Mechanism::ScramSha256,
                    "scram-sha-512" => Mechanism::ScramSha512,
                    _ => return Err(invalid("scram-sha-512, scram-sha-256 or plain")),
                });
            }
            "user" if value.is_empty() => return Err(invalid("the name of a user")),
            "user" => self.user = Some(value.to_owned()),
            "password" => self.password = Some(raw.to_owned()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Joins the options. Rejects an option without a required second option.
    pub(crate) fn finish(
        self,
        allow_unsafe: &BTreeSet<String>,
    ) -> Result<(Option<Tls>, Option<Login>), ConfigError> {
        let may_be_readable = allow_unsafe.contains(secret::READABLE);
        let tls = self.tls == Some(true);
        for (option, is_given) in [
            ("ca", self.authorities.is_some()),
            ("cert", self.certificate.is_some()),
            ("key", self.key.is_some()),
        ] {
            if is_given && !tls {
                return Err(ConfigError::Needs { option, needed: "tls=true" });
            }
        }
        let login = match (self.mechanism, self.user, self.password) {
            (None, None, None) => None,
            (None, Some(_), _) => return Err(needs("user", "sasl=scram-sha-512")),
            (None, None, Some(_)) => return Err(needs("password", "sasl=scram-sha-512")),
            (Some(_), None, _) => return Err(needs("sasl", "user=NAME")),
            (Some(_), Some(_), None) => return Err(needs("sasl", "password=@FILE")),
            (Some(mechanism), Some(user), Some(password)) => {
                let password = Password::parse(&password, may_be_readable)?;
                Some(Login { mechanism, user, password })
            }
        };
        let certificate = match (self.certificate, self.key) {
            (None, None) => None,
            (Some(_), None) => return Err(needs("cert", "key=FILE")),
            (None, Some(_)) => return Err(needs("key", "cert=FILE")),
            (Some(certificate), Some(key)) => {
                check_file("cert", &certificate, CERTIFICATE)?;
                check_file("key", &key, KEY)?;
                if !may_be_readable {
                    secret::check_mode(&key).map_err(|problem| refused("key", problem))?;
                }
                Some((certificate, key))
            }
        };
        if let Some(authorities) = &self.authorities {
            check_file("ca", authorities, CERTIFICATE)?;
        }
        let tls = tls.then_some(Tls { authorities: self.authorities, certificate });
        Ok((tls, login))
    }
}

fn needs(option: &'static str, needed: &'static str) -> ConfigError {
    ConfigError::Needs { option, needed }
}

fn refused(option: &str, problem: String) -> ConfigError {
    ConfigError::Secret { option: option.to_owned(), problem }
}

/// The marker of a certificate and of a private key in a PEM file, each with a name for errors.
const CERTIFICATE: (&str, &str) = ("CERTIFICATE-----", "certificate");
const KEY: (&str, &str) = ("PRIVATE KEY-----", "private key");

/// Checks a file before librdkafka does: librdkafka's error names only the setting, not the file.
fn check_file(option: &str, path: &Path, (mark, what): (&str, &str)) -> Result<(), ConfigError> {
    let shown = shown_path(path);
    let problem = match std::fs::read(path) {
        Ok(bytes) if String::from_utf8_lossy(&bytes).contains(mark) => return Ok(()),
        Ok(_) => format!("names {shown}, which holds no {what}; name a PEM file"),
        Err(error) => format!("names {shown}, which cannot be read: {error}; name a PEM file"),
    };
    Err(refused(option, problem))
}

/// Writes TLS and login into the settings of a client. Reads the secrets again.
pub(crate) fn apply(tls: Option<&Tls>, login: Option<&Login>, config: &mut ClientConfig) {
    if tls.is_none() && login.is_none() {
        return;
    }
    let logs_in = login.is_some() || mechanism(config).is_some();
    let protocol = match (tls.is_some(), logs_in) {
        (true, true) => "sasl_ssl",
        (true, false) => "ssl",
        (false, _) => "sasl_plaintext",
    };
    config.set("security.protocol", protocol);
    if let Some(authorities) = tls.and_then(|tls| tls.authorities.as_ref()) {
        config.set("ssl.ca.location", authorities.to_string_lossy());
    }
    if let Some((certificate, key)) = tls.and_then(|tls| tls.certificate.as_ref()) {
        config.set("ssl.certificate.location", certificate.to_string_lossy());
        config.set("ssl.key.location", key.to_string_lossy());
    }
    if let Some(login) = login {
        config.set("sasl.mechanism", login.mechanism.name());
        config.set("sasl.username", &login.user);
        config.set("sasl.password", login.password.read().expose_secret());
    }
}

fn mechanism(config: &ClientConfig) -> Option<&str> {
    config.get("sasl.mechanism").or_else(|| config.get("sasl.mechanisms"))
}

/// Returns `true` if a client with these settings encrypts.
pub(crate) fn is_encrypted(config: &ClientConfig) -> bool {
    let protocol = config.get("security.protocol").unwrap_or_default();
    protocol.to_ascii_lowercase().ends_with("ssl")
}

/// Returns `true` if a client with these settings logs in.
pub(crate) fn logs_in(config: &ClientConfig) -> bool {
    let protocol = config.get("security.protocol").unwrap_or_default();
    protocol.to_ascii_lowercase().starts_with("sasl")
}

/// Returns a hash over the files and secrets of the settings. An existing client never reads a file
/// again, so a changed hash requires a new client.
pub(crate) fn fingerprint(config: &ClientConfig) -> u64 {
    let mut hasher = DefaultHasher::new();
    config.get("sasl.password").hash(&mut hasher);
    for file in
        ["ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.keystore.location"]
    {
        let contents = config.get(file).map(|path| std::fs::read(path).ok());
        contents.hash(&mut hasher);
    }
    hasher.finish()
}

//! Transport security of a session with a PostgreSQL server: maps the `sslmode` of a URL to the
//! driver's mode, by the server's location and the exceptions in the URL.
//!
//! On this machine, over loopback or a Unix socket, clear text is accepted when the server offers
//! no TLS. To any other machine a session is encrypted, and the server's certificate and host name
//! are checked, unless `allow_unsafe` in the URL names the exception.

use std::net::IpAddr;

use sqlx::postgres::PgSslMode;

/// The `sslmode` of a URL, under PostgreSQL's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    const NAMED: [(&str, Self); 6] = [
        ("disable", Self::Disable),
        ("allow", Self::Allow),
        ("prefer", Self::Prefer),
        ("require", Self::Require),
        ("verify-ca", Self::VerifyCa),
        ("verify-full", Self::VerifyFull),
    ];

    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::NAMED.iter().find(|(name, _)| *name == text).map(|(_, mode)| *mode)
    }

    /// Returns all names, separated by commas.
    pub(crate) fn names() -> String {
        Self::NAMED.map(|(name, _)| name).join(", ")
    }
}

/// The exceptions in the `allow_unsafe` of a URL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// A session to another machine may be in clear text.
    pub(crate) clear_text: bool,
    /// A server on another machine may present any certificate.
    pub(crate) unverified_tls: bool,
    /// Other users may have read access to a secret's file.
    pub(crate) readable_secret: bool,
}

impl Allowed {
    pub(crate) const NAMES: [&str; 3] = ["clear_text", "unverified_tls", "readable_secret"];

    /// Parses names separated by commas. Returns `None` for an unknown name.
    pub(crate) fn parse(list: &str) -> Option<Self> {
        let mut allowed = Self::default();
        for name in list.split(',') {
            match name.trim() {
                "clear_text" => allowed.clear_text = true,
                "unverified_tls" => allowed.unverified_tls = true,
                "readable_secret" => allowed.readable_secret = true,
                _ => return None,
            }
        }
        Some(allowed)
    }
}

/// The decision on a session's transport security.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decided {
    /// The mode is safe for the server's location.
    Safe(Mode),
    /// The mode is unsafe and allowed by the URL; each start logs the warning.
    Unsafe(Mode, &'static str),
    /// The mode is unsafe and not allowed: the end of the error's sentence, and the remedy.
    Refused(&'static str, &'static str),
}

/// The driver's mode, as a comparable type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Clear text.
    Disable,
    /// Encrypted where the server offers TLS.
    Prefer,
    /// Encrypted, with any certificate.
    Require,
    /// Encrypted, with a certificate of a trusted authority for any host.
    VerifyCa,
    /// Encrypted, with a certificate of a trusted authority for this host.
    VerifyFull,
}

impl From<Mode> for PgSslMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Disable => Self::Disable,
            Mode::Prefer => Self::Prefer,
            Mode::Require => Self::Require,
            Mode::VerifyCa => Self::VerifyCa,
            Mode::VerifyFull => Self::VerifyFull,
        }
    }
}

const CLEAR_TEXT: &str =
    "allow_unsafe=clear_text: passwords and events may cross the network in clear text";
const UNVERIFIED: &str =
    "allow_unsafe=unverified_tls: whoever is between here and the server can read and change all";

/// Decides the mode of a session.
///
/// The inputs are the URL's `sslmode`, the location of the server, the presence of a named
/// authority (`sslrootcert`), and the exceptions in the URL.
pub(crate) fn decide(
    asked: Option<SslMode>,
    is_local: bool,
    has_authorities: bool,
    allowed: Allowed,
) -> Decided {
    match asked {
        Some(SslMode::VerifyFull) => Decided::Safe(Mode::VerifyFull),
        None | Some(SslMode::Prefer | SslMode::Allow) => match () {
            () if has_authorities => Decided::Safe(Mode::VerifyFull),
            () if is_local => Decided::Safe(Mode::Prefer),
            () if allowed.clear_text => Decided::Unsafe(Mode::Prefer, CLEAR_TEXT),
            () if allowed.unverified_tls => Decided::Unsafe(Mode::Require, UNVERIFIED),
            () => Decided::Safe(Mode::VerifyFull),
        },
        // PostgreSQL's own clients treat `require` with an authority as `verify-ca`.
        Some(SslMode::Require) if has_authorities => Decided::Safe(Mode::VerifyCa),
        Some(SslMode::Require) if is_local => Decided::Safe(Mode::Require),
        Some(SslMode::Require) if allowed.unverified_tls => {
            Decided::Unsafe(Mode::Require, UNVERIFIED)
        }
        Some(SslMode::Require) => Decided::Refused(
            "has sslmode=require, which encrypts without checking who the server is",
            "give sslmode=verify-full, with sslrootcert=FILE if its authority is not one of the \
             system's, or say allow_unsafe=unverified_tls",
        ),
        Some(SslMode::VerifyCa) if has_authorities || is_local => Decided::Safe(Mode::VerifyCa),
        Some(SslMode::VerifyCa) if allowed.unverified_tls => {
            Decided::Unsafe(Mode::VerifyCa, UNVERIFIED)
        }
        Some(SslMode::VerifyCa) => Decided::Refused(
            "has sslmode=verify-ca without sslrootcert, which accepts every host that has a public \
             certificate",
            "give sslmode=verify-full or sslrootcert=FILE, or say allow_unsafe=unverified_tls",
        ),
        Some(SslMode::Disable) if is_local => Decided::Safe(Mode::Disable),
        Some(SslMode::Disable) if allowed.clear_text => Decided::Unsafe(Mode::Disable, CLEAR_TEXT),
        Some(SslMode::Disable) => Decided::Refused(
            "has sslmode=disable for a server that is not on this machine",
            "give sslmode=verify-full, or say allow_unsafe=clear_text",
        ),
    }
}

/// Returns `true` for a loopback address or the name `localhost`. No name server is queried.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.map_or_else(
        |_| host.eq_ignore_ascii_case("localhost"),
        |address| address.to_canonical().is_loopback(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Allowed =
        Allowed { clear_text: false, unverified_tls: false, readable_secret: false };

    #[test]
    fn off_this_machine_a_session_is_encrypted_and_verified_unless_allowed() {
        let clear_text = Allowed { clear_text: true, ..NOTHING };
        let unverified_tls = Allowed { unverified_tls: true, ..NOTHING };
        for asked in [None, Some(SslMode::Prefer), Some(SslMode::Allow)] {
            let decide = |allowed| decide(asked, false, false, allowed);
            assert_eq!(decide(NOTHING), Decided::Safe(Mode::VerifyFull));
            assert_eq!(decide(clear_text), Decided::Unsafe(Mode::Prefer, CLEAR_TEXT));
            assert_eq!(decide(unverified_tls), Decided::Unsafe(Mode::Require, UNVERIFIED));
        }
        for (asked, needed, mode) in [
            (SslMode::Disable, clear_text, Mode::Disable),
            (SslMode::Require, unverified_tls, Mode::Require),
            (SslMode::VerifyCa, unverified_tls, Mode::VerifyCa),
        ] {
            let decide = |allowed| decide(Some(asked), false, false, allowed);
            assert!(matches!(decide(NOTHING), Decided::Refused(..)), "{asked:?}");
            assert!(matches!(decide(needed), Decided::Unsafe(found, _) if found == mode));
        }
    }

    #[test]
    fn on_this_machine_clear_text_is_for_servers_without_tls() {
        let decide = |asked| decide(asked, true, false, NOTHING);
        for asked in [None, Some(SslMode::Prefer), Some(SslMode::Allow)] {
            assert_eq!(decide(asked), Decided::Safe(Mode::Prefer));
        }
        assert_eq!(decide(Some(SslMode::Disable)), Decided::Safe(Mode::Disable));
        assert_eq!(decide(Some(SslMode::Require)), Decided::Safe(Mode::Require));
    }

    #[test]
    fn authorities_that_are_named_are_used() {
        for is_local in [true, false] {
            let decide = |asked| decide(asked, is_local, true, NOTHING);
            assert_eq!(decide(None), Decided::Safe(Mode::VerifyFull));
            assert_eq!(decide(Some(SslMode::Require)), Decided::Safe(Mode::VerifyCa));
            assert_eq!(decide(Some(SslMode::VerifyCa)), Decided::Safe(Mode::VerifyCa));
        }
    }

    #[test]
    fn loopback_is_known_by_name() {
        for local in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "::1", "[::1]"] {
            assert!(is_loopback(local), "{local}");
        }
        for remote in ["0.0.0.0", "10.0.0.1", "localhost.example", "db", "", "::2"] {
            assert!(!is_loopback(remote), "{remote}");
        }
        assert!(is_loopback("::ffff:127.0.0.1"));
    }
}

//! What is worth waiting for, and what is refused for good.

use std::io;

use rustls::{AlertDescription, CertificateError};
use sqlx::error::DatabaseError as _;
use sqlx::migrate::MigrateError;
use sqlx::sqlite::SqliteError;

/// Why a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It does not answer now: wait and try again.
    #[error("{url} is unavailable: {cause}")]
    Unavailable {
        /// The URL without password.
        url: String,
        /// What the database or the system said.
        #[source]
        cause: sqlx::Error,
    },
    /// It will not work until someone changes something.
    #[error("{what}; {remedy}")]
    Refused {
        /// What is wrong, with the URL without password.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// A newer version of kafold has been here.
    #[error(
        "the tables in {url} are of schema {found}, this program knows only {known}: \
         use the newer kafold version that made them"
    )]
    NewerSchema {
        /// The URL without password.
        url: String,
        /// Highest migration in the database.
        found: i64,
        /// Highest migration of this program.
        known: i64,
    },
    /// The toolkit's tables are not there, or older than this program needs.
    #[error(
        "{url} has no current kafold tables (schema {found}, needed {known}): \
         start the service once, or run its `migrate`"
    )]
    NotMigrated {
        /// The URL without password.
        url: String,
        /// Highest migration in the database, 0 if none.
        found: i64,
        /// Highest migration of this program.
        known: i64,
    },
}

impl DatabaseError {
    pub(crate) fn refused(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), remedy: remedy.into() }
    }

    /// The error of a migration, as that of the statement beneath where there is one.
    pub(crate) fn of_migration(
        error: MigrateError,
        of: impl FnOnce(sqlx::Error) -> Self,
        url: &str,
    ) -> Self {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => of(error),
            other => Self::refused(format!("{url}: {other}"), "use another database"),
        }
    }
}

/// A failure which lasts until an operator changes the server, the role's rights or the settings of
/// this program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct Refusal {
    /// The cause, without any secret.
    pub what: String,
    /// The remedy, as an imperative.
    pub remedy: String,
}

/// Returns cause and remedy of an error which waiting does not cure and the statement did not
/// cause: an untrusted certificate, a wrong password, a missing right. Returns `None` for all other
/// errors.
///
/// A caller retries the refused work without a limit, because an operator may remove the cause at
/// any time.
pub fn refusal(error: &sqlx::Error) -> Option<Refusal> {
    let refused = |what: String, remedy: &str| Some(Refusal { what, remedy: remedy.to_owned() });
    match error {
        sqlx::Error::Io(cause) if is_unknown_host(cause) => {
            refused(format!("the host is not known: {cause}"), "check the host name in the URL")
        }
        sqlx::Error::Io(cause) => {
            let tls = cause.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
            tls.and_then(of_tls)
        }
        sqlx::Error::Tls(cause) => match cause.downcast_ref::<rustls::Error>().and_then(of_tls) {
            Some(refusal) => Some(refusal),
            None if cause.to_string().contains("does not support TLS") => refused(
                "the server offers no TLS".to_owned(),
                "turn on ssl in its postgresql.conf, or give sslmode=disable to go without, which \
                 off this machine also needs allow_unsafe=clear_text",
            ),
            None => refused(
                format!("TLS cannot be set up: {cause}"),
                "check the files of sslrootcert, sslcert and sslkey, and the host name",
            ),
        },
        sqlx::Error::Configuration(cause) => {
            refused(format!("the connection cannot be set up: {cause}"), "check the URL")
        }
        sqlx::Error::Database(error) if error.try_downcast_ref::<SqliteError>().is_none() => {
            of_postgres(&error.code().unwrap_or_default(), error.message())
        }
        _ => None,
    }
}

/// The remedy for a connection pooler that does not keep a session for each connection.
pub(crate) const POOLER_REMEDY: &str = "name the server itself in the URL, or a pool in session mode \
                                        (PgBouncer: pool_mode=session)";

/// Returns whether a message of PgBouncer names a cause that stays until the pooler's configuration
/// changes. Other messages, such as that of a full pool, have the same code 08P01.
fn is_refusal_of_pooler(message: &str) -> bool {
    ["unsupported startup parameter", "not allowed in statement pooling mode"]
        .iter()
        .any(|refusal| message.contains(refusal))
}

fn of_postgres(code: &str, message: &str) -> Option<Refusal> {
    let remedy = match code {
        "08P01" if is_refusal_of_pooler(message) => POOLER_REMEDY,
        "08P01" if message.contains("no such database") || message.contains("does not exist") => {
            "name a database that the pooler and the server have"
        }
        "08P01" if message.contains("authentication failed") => {
            "check the user and the password in the URL and in the pooler's configuration"
        }
        // A statement was prepared in another session.
        "26000" | "42P05" => POOLER_REMEDY,
        "28000" if message.contains("no encryption") => {
            "give sslmode=verify-full instead of sslmode=disable: the server refuses clear text"
        }
        "28P01" | "28000" => "check user and password in the URL, and the server's pg_hba.conf",
        "3D000" => "create the database, or name another one in the URL",
        "42501" if message.contains("must be owner") => {
            "run `kafold migrate` as the role that owns the tables"
        }
        "42501" if message.contains("for schema") => {
            "grant the login what `kafold grants print` prints for its role, such as GRANT CREATE, \
             USAGE ON SCHEMA public"
        }
        "42501" => "grant the login what `kafold grants print` prints for its role",
        // PostgreSQL leaves a schema without USAGE out of the search path, so its tables seem
        // missing.
        "42P01" if names_own_table(message) => {
            "grant the login USAGE on the schema, or make the tables with `kafold migrate`"
        }
        "3F000" => {
            "grant the login USAGE and CREATE on the schema, or create the schema that its \
             search_path names"
        }
        _ => return None,
    };
    Some(Refusal { what: message.to_owned(), remedy: remedy.to_owned() })
}

/// Returns `true` for a relation of the toolkit, which is invisible to a login without rights on
/// the schema. A missing table of a read model is not a question of rights.
fn names_own_table(message: &str) -> bool {
    message.contains("\"kafold_")
}

fn of_tls(error: &rustls::Error) -> Option<Refusal> {
    let (what, remedy) = match error {
        rustls::Error::InvalidCertificate(cause) => return Some(of_certificate(cause)),
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired | AlertDescription::NoCertificate => (
                "the server wants a certificate of its client".to_owned(),
                "give sslcert=FILE and sslkey=FILE in the URL",
            ),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied => (
                format!("the server refuses this client's certificate: {alert:?}"),
                "give a certificate that the server trusts with sslcert=FILE and sslkey=FILE",
            ),
            AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => (
                format!("the server's TLS is not the client's: {alert:?}"),
                "let the server offer TLS 1.2 or 1.3 with common ciphers",
            ),
            _ => return None,
        },
        rustls::Error::PeerIncompatible(cause) => (
            format!("the server's TLS is not the client's: {cause:?}"),
            "let the server offer TLS 1.2 or 1.3 with common ciphers",
        ),
        _ => return None,
    };
    Some(Refusal { what, remedy: remedy.to_owned() })
}

fn of_certificate(error: &CertificateError) -> Refusal {
    let (what, remedy) = match error {
        CertificateError::UnknownIssuer => (
            "the server's certificate is signed by no authority that is trusted here".to_owned(),
            "name the file of its authority with sslrootcert=FILE in the URL, or add the authority \
             to the system's",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let names = match error {
                CertificateError::NotValidForNameContext { presented, .. } => {
                    // Each is the Debug text of a name, such as DnsName("db.example").
                    let name = |text: &String| text.split('"').nth(1).unwrap_or(text).to_owned();
                    let names: Vec<_> = presented.iter().map(name).collect();
                    format!(", but for {}", names.join(", "))
                }
                _ => String::new(),
            };
            (
                format!("the server's certificate is not for the host name in the URL{names}"),
                "connect by a name that the certificate has, or give the server a certificate for \
                 this one",
            )
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            ("the server's certificate has expired".to_owned(), "renew it on the server")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
            "the server's certificate is not valid yet".to_owned(),
            "set the clocks of both machines, or give the server another certificate",
        ),
        other => (
            format!("the server's certificate is not acceptable: {other}"),
            "give the server a certificate of version 3 with its host name, signed by an authority",
        ),
    };
    Refusal { what, remedy: remedy.to_owned() }
}

/// Whether the same work may succeed later without anyone changing it: the connection is lost, the
/// server stops, starts or is full, a lock was not to be had, another transaction was in the way, or
/// a prepared statement is older than the view it reads.
///
/// An error that is not transient is the fault of the statement or of its values.
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        // A name server may be unreachable for a while too.
        sqlx::Error::Io(cause) => refusal(error).is_none() || is_unknown_host(cause),
        sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => {
            if let Some(error) = error.try_downcast_ref::<SqliteError>() {
                return SqliteCode::of(error).is_transient();
            }
            let code = error.code().unwrap_or_default();
            is_transient_postgres(&code, error.message())
        }
        _ => false,
    }
}

fn is_transient_postgres(code: &str, message: &str) -> bool {
    match code {
        // Shutting down, crashed, starting up, the database was dropped or the session idle too long.
        "57P01" | "57P02" | "57P03" | "57P05" => true,
        // Serialization failure, deadlock, no lock in time, cancelled by a timeout, read-only after a
        // failover until the pool has connected to the primary again.
        "40001" | "40P01" | "55P03" | "57014" | "25006" | "25P03" => true,
        // A view was replaced under a prepared statement: the driver prepares it anew.
        "0A000" => message.contains("cached plan"),
        // Connections; resources (disk full, too many connections); the server's own IO.
        _ => ["08", "53", "58"].iter().any(|class| code.starts_with(class)),
    }
}

/// SQLite's primary result codes that are told apart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SqliteCode(i32);

impl SqliteCode {
    pub(crate) const PERM: Self = Self(3);
    pub(crate) const BUSY: Self = Self(5);
    pub(crate) const LOCKED: Self = Self(6);
    pub(crate) const NOMEM: Self = Self(7);
    pub(crate) const READONLY: Self = Self(8);
    pub(crate) const IOERR: Self = Self(10);
    pub(crate) const CORRUPT: Self = Self(11);
    pub(crate) const FULL: Self = Self(13);
    pub(crate) const CANTOPEN: Self = Self(14);
    pub(crate) const PROTOCOL: Self = Self(15);
    pub(crate) const NOTADB: Self = Self(26);

    pub(crate) fn of(error: &SqliteError) -> Self {
        // The driver hands the extended code out as text; its low byte is the primary one.
        let extended = error.code().and_then(|code| code.parse::<i32>().ok());
        Self(extended.map_or(0, |code| code & 0xff))
    }

    /// The code of an error that SQLite gave, if it did.
    pub(crate) fn of_error(error: &sqlx::Error) -> Option<Self> {
        let error = error.as_database_error()?;
        error.try_downcast_ref::<SqliteError>().map(Self::of)
    }

    /// Locks, and what an operator sets right without touching the program: space, rights, the disk.
    fn is_transient(self) -> bool {
        [
            Self::BUSY,
            Self::LOCKED,
            Self::NOMEM,
            Self::READONLY,
            Self::IOERR,
            Self::FULL,
            Self::CANTOPEN,
            Self::PROTOCOL,
        ]
        .contains(&self)
    }
}

/// Whether a host name could not be resolved. The system gives it no error kind of its own.
pub(crate) fn is_unknown_host(error: &io::Error) -> bool {
    error.to_string().contains("failed to lookup address information")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_certificate_fault_has_a_sentence_of_its_own() {
        let io = |cause: CertificateError| {
            let tls = rustls::Error::InvalidCertificate(cause);
            sqlx::Error::Io(io::Error::new(io::ErrorKind::InvalidData, tls))
        };
        let sentences: std::collections::BTreeSet<_> = [
            CertificateError::UnknownIssuer,
            CertificateError::NotValidForName,
            CertificateError::Expired,
            CertificateError::NotValidYet,
            CertificateError::BadSignature,
        ]
        .map(|cause| {
            let error = io(cause);
            assert!(!is_transient(&error), "{error}");
            refusal(&error).expect("is refused").to_string()
        })
        .into();
        assert_eq!(sentences.len(), 5, "{sentences:#?}");
        let cut = sqlx::Error::Io(io::ErrorKind::UnexpectedEof.into());
        assert!(refusal(&cut).is_none() && is_transient(&cut));
    }

    #[test]
    fn rights_and_logins_are_refused_and_the_fault_of_a_statement_is_not() {
        for code in ["28P01", "28000", "3D000", "42501", "3F000"] {
            assert!(of_postgres(code, "m").is_some(), "{code}");
        }
        for code in ["23505", "42601", "42P01", "22003", "0A000", "57P01"] {
            assert!(of_postgres(code, "relation \"mine\" does not exist").is_none(), "{code}");
        }
        let hidden = of_postgres("42P01", "relation \"kafold_event\" does not exist");
        assert!(hidden.expect("refused").to_string().contains("USAGE"));
    }

    #[test]
    fn what_the_server_gets_over_is_transient_and_bad_statements_are_not() {
        for code in ["57P01", "57P03", "53300", "40001", "40P01", "08006", "55P03", "53100"] {
            assert!(is_transient_postgres(code, ""), "{code}");
        }
        for code in ["23505", "42601", "42P01", "22003", "0A000", "42501"] {
            assert!(!is_transient_postgres(code, ""), "{code}");
        }
        assert!(is_transient_postgres("0A000", "cached plan must not change result type"));
    }
}

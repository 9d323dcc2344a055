//! Database URLs, split by hand: general URL parsers make the file of `sqlite://orders.db` a host.

use std::fmt;
use std::path::PathBuf;

use kafold_core::secret::SecretSource;

use crate::error::DatabaseError;
use crate::transport::{Allowed, SslMode};

/// Where a URL points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A PostgreSQL server.
    Postgres(PostgresUrl),
    /// A SQLite file, as written: relative to the working directory unless it begins with `/`.
    Sqlite(PathBuf),
}

/// A PostgreSQL server's URL. `Debug` shows the URL without the password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PostgresUrl {
    /// The URL for output, without the password.
    pub(crate) shown: String,
    /// The URL for the driver, without the parameters stored in the fields below.
    pub(crate) driver: String,
    /// The parameter `password`.
    pub(crate) password: Option<SecretSource>,
    /// `true` if a password is written in the URL itself.
    pub(crate) has_literal_password: bool,
    /// The parameter `sslmode`.
    pub(crate) ssl_mode: Option<SslMode>,
    /// The files of the parameters `sslrootcert`, `sslcert` and `sslkey`, read by the driver.
    pub(crate) files: Vec<(&'static str, PathBuf)>,
    /// The parameter `allow_unsafe`.
    pub(crate) allowed: Allowed,
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PostgresUrl").field(&self.shown).finish()
    }
}

const REMEDY: &str = "give sqlite://FILE or postgres://USER@HOST:PORT/DATABASE?password=@FILE";

/// Parameters accepted by the driver and safe to show.
const SHOWN: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "application_name",
    "allow_unsafe",
];
/// Parameters which are accepted and never shown.
const HIDDEN: &[&str] = &["password", "options"];
/// The beginning of the parameters `options[NAME]`.
const OPTION: &str = "options[";

/// Parses a database URL. An error never contains a possible password.
pub(crate) fn parse(url: &str) -> Result<Target, DatabaseError> {
    let refused = |what: String| Err(DatabaseError::refused(what, REMEDY));
    let shown = shown(url);
    let Some((scheme, rest)) = url.split_once("://") else {
        return refused(format!("{shown:?} is not a database URL"));
    };
    match scheme {
        "postgres" | "postgresql" => postgres(scheme, rest, &shown).map(Target::Postgres),
        "sqlite" if rest.is_empty() || rest.ends_with('/') => {
            refused(format!("{shown:?} names no file"))
        }
        "sqlite" if rest == ":memory:" => {
            refused(format!("{shown:?}: a database in memory would lose what it acknowledged"))
        }
        "sqlite" if rest.contains(['?', '\0']) => {
            refused(format!("{shown:?}: a SQLite URL takes no options"))
        }
        "sqlite" => Ok(Target::Sqlite(PathBuf::from(rest))),
        _ => refused(format!("the database URL {shown:?} has an unknown scheme")),
    }
}

fn postgres(scheme: &str, rest: &str, shown: &str) -> Result<PostgresUrl, DatabaseError> {
    let refused = |what: &str, remedy: &str| {
        Err(DatabaseError::refused(format!("the database URL {shown:?} {what}"), remedy))
    };
    if rest.contains('#') {
        return refused("has a '#'", "write it as %23, or give ?password=@FILE");
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let name = place.rsplit_once('@').map_or(place, |(_, place)| place);
    if name.contains(['&', ';', '=']) {
        // The part behind the host, which may hold a password, is not shown.
        let what = "the database URL has '&', ';' or '=' before its parameters";
        return Err(DatabaseError::refused(
            what,
            "parameters begin with '?' and are joined by '&'",
        ));
    }
    let login = place.rsplit_once('@').map_or("", |(login, _)| login);
    let mut url = PostgresUrl {
        shown: shown.to_owned(),
        driver: format!("{scheme}://{place}"),
        password: None,
        has_literal_password: login.contains(':'),
        ssl_mode: None,
        files: Vec::new(),
        allowed: Allowed::default(),
    };
    let mut driver = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let known = parameter.split_once('=').filter(|(name, _)| is_known(name));
        let Some((name, value)) = known else {
            let remedy = format!("known are {}, {}", SHOWN.join(", "), HIDDEN.join(", "));
            return refused(&unknown(parameter), &remedy);
        };
        match name {
            "password" => {
                let source = decoded(value).map(|value| SecretSource::parse(&value));
                let source = match source {
                    Some(Ok(source)) => source,
                    Some(Err(error)) => {
                        return refused(&format!("has a wrong password: {error}"), REMEDY);
                    }
                    None => return refused("has a password that is not UTF-8", REMEDY),
                };
                url.has_literal_password |= matches!(source, SecretSource::Literal(_));
                url.password = Some(source);
            }
            "allow_unsafe" => match Allowed::parse(&decoded(value).unwrap_or_default()) {
                Some(allowed) => url.allowed = allowed,
                None => {
                    let remedy = format!("give a list of {}", Allowed::NAMES.join(", "));
                    return refused("has an unknown name in allow_unsafe", &remedy);
                }
            },
            "sslmode" | "ssl-mode" => match SslMode::parse(value) {
                Some(mode) => url.ssl_mode = Some(mode),
                None => {
                    let remedy = format!("give one of {}", SslMode::names());
                    return refused("has an unknown sslmode", &remedy);
                }
            },
            _ => {
                let file = file_of(name).zip(decoded(value));
                url.files.extend(file.map(|(name, file)| (name, PathBuf::from(file))));
                driver.push(parameter);
            }
        }
    }
    if !driver.is_empty() {
        url.driver = format!("{}?{}", url.driver, driver.join("&"));
    }
    Ok(url)
}

/// Returns the usual name of a parameter for a file.
fn file_of(name: &str) -> Option<&'static str> {
    match name {
        "sslrootcert" | "ssl-root-cert" | "ssl-ca" => Some("sslrootcert"),
        "sslcert" | "ssl-cert" => Some("sslcert"),
        "sslkey" | "ssl-key" => Some("sslkey"),
        _ => None,
    }
}

/// Names an unknown parameter, unless the text may be part of a password.
fn unknown(parameter: &str) -> String {
    match parameter.split_once('=') {
        Some((name, _)) if name.chars().all(|c| c.is_ascii_lowercase() || "._-".contains(c)) => {
            format!("has the unknown parameter {name}")
        }
        _ => "has an unknown parameter".to_owned(),
    }
}

fn is_known(name: &str) -> bool {
    SHOWN.contains(&name) || HIDDEN.contains(&name) || name.starts_with(OPTION)
}

/// Decodes `%XX`. Returns `None` when the result is not UTF-8.
fn decoded(value: &str) -> Option<String> {
    let decoded = percent_encoding::percent_decode_str(value);
    decoded.decode_utf8().ok().map(Into::into)
}

/// Returns the URL for output: without the password, and with the known parameters without secrets
/// only.
pub(crate) fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        // Whatever this is, the part before an '@' may hold a password.
        let rest = url.rsplit_once('@').map_or(url, |(_, rest)| rest);
        return rest.split('?').next().unwrap_or_default().to_owned();
    };
    if scheme == "sqlite" {
        return url.split('?').next().unwrap_or_default().to_owned();
    }
    // A password without percent-encoding may contain any of ":/?#@". Unless the whole query is
    // well-formed, the last '@' ends the password.
    let (place, query) = match rest.split_once('?') {
        Some((place, query)) if !rest.contains('#') && query.split('&').all(is_well_formed) => {
            (place, query)
        }
        _ => (rest, ""),
    };
    let (user, place) = match place.rsplit_once('@') {
        Some((login, place)) => (login.split([':', '/', '?', '#']).next(), place),
        None => (None, place),
    };
    let place = place.split(['?', '#']).next().unwrap_or_default();
    let (host, database) =
        place.split_once('/').map_or((place, None), |(host, name)| (host, Some(name)));
    let mut shown = format!("{scheme}://");
    if let Some(user) = user {
        shown += &format!("{user}@");
    }
    match host.rsplit_once(':') {
        // Text behind a ':' which is no port may be a password.
        Some((name, port)) if !port.bytes().all(|b| b.is_ascii_digit()) && !host.ends_with(']') => {
            shown += name.split(':').next().unwrap_or_default();
        }
        _ => {
            shown += host;
            shown += &database.map(|name| format!("/{name}")).unwrap_or_default();
        }
    }
    let open = |parameter: &&str| match parameter.split_once('=') {
        Some(("sslmode" | "ssl-mode", value)) => SslMode::parse(value).is_some(),
        Some(("allow_unsafe", value)) => Allowed::parse(value).is_some(),
        Some((name, _)) => SHOWN.contains(&name),
        None => false,
    };
    let open: Vec<_> = query.split('&').filter(open).collect();
    if open.is_empty() { shown } else { format!("{shown}?{}", open.join("&")) }
}

fn is_well_formed(parameter: &str) -> bool {
    match parameter.split_once('=') {
        // A leading '@' marks a file and does not end a login.
        Some(("password", value)) => !value.trim_start_matches('@').contains('@'),
        Some((name, value)) => is_known(name) && !value.contains('@'),
        None => parameter.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_url_of_the_corpus_gets_its_verdict_and_none_tells_a_password() {
        let cases = include_str!("corpus/urls.txt").lines();
        for case in cases.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let [json, verdict, expected] =
                case.split(" => ").collect::<Vec<_>>().try_into().expect(case);
            let text = |json: &str| json.trim_matches('"').replace("\\u0000", "\0");
            let url = text(json);
            let found = match parse(&url) {
                Ok(Target::Postgres(parsed)) => {
                    assert!(!format!("{parsed:?}").contains("secret"), "{parsed:?}");
                    "postgres".to_owned()
                }
                Ok(Target::Sqlite(file)) => format!("sqlite {}", file.display()),
                Err(refused) => {
                    assert!(!refused.to_string().contains("secret"), "{refused}");
                    refused.to_string()
                }
            };
            assert!(found.contains(verdict), "{case}\nis {found}");
            assert_eq!(shown(&url), text(expected), "{case}");
        }
        // Wherever such a character comes into the password, it is not told.
        for odd in [":", "/", "?", "#", "@", "%", "&", "=", "\0", "é"] {
            let url = format!("postgres://u:x{odd}secret{odd}x@h/d?port=1");
            assert!(!shown(&url).contains("secret"), "{url}: {}", shown(&url));
            assert!(shown(&url).starts_with("postgres://u@h/d"), "{url}: {}", shown(&url));
        }
    }

    #[test]
    fn a_shown_url_has_no_password() {
        let check = |url: &str, expected: &str| assert_eq!(shown(url), expected);
        check("postgres://u:secret@h:1/d", "postgres://u@h:1/d");
        check("postgres://u:se/cr@et@h/d", "postgres://u@h/d");
        check(
            "postgres://h/d?user=u&password=secret&sslmode=disable",
            "postgres://h/d?user=u&sslmode=disable",
        );
        check("postgres://h/d?password=secret", "postgres://h/d");
        check("postgres://u@h/d?password=@/run/x&port=1", "postgres://u@h/d?port=1");
        check("postgres://u@[::1]:1/d?password=$NAME", "postgres://u@[::1]:1/d");
        check("postgres://u:secret?port=1", "postgres://u?port=1");
        check("u:secret@h/d", "h/d");
        check("sqlite:///a/b@c.db", "sqlite:///a/b@c.db");
    }

    #[test]
    fn the_driver_gets_neither_the_password_nor_what_it_does_not_know() {
        let url = "postgres://u@h/d?port=1&password=%40%2Frun%2Fx&sslmode=require\
                   &allow_unsafe=clear_text,unverified_tls&options[a]=b";
        let Ok(Target::Postgres(parsed)) = parse(url) else { panic!("a PostgreSQL URL") };
        assert_eq!(parsed.driver, "postgres://u@h/d?port=1&options[a]=b");
        assert_eq!(parsed.password, Some(SecretSource::File("/run/x".into())));
        assert_eq!(parsed.ssl_mode, Some(SslMode::Require));
        assert!(!parsed.has_literal_password);
        assert!(parsed.allowed.clear_text && parsed.allowed.unverified_tls);
        for literal in ["postgres://u:secret@h/d", "postgres://u@h/d?password=secret"] {
            let Ok(Target::Postgres(parsed)) = parse(literal) else { panic!("{literal}") };
            assert!(parsed.has_literal_password, "{literal}");
        }
    }

    #[test]
    fn sqlite_files_are_relative_unless_they_begin_with_a_slash() {
        let file = |url: &str| parse(url).ok();
        assert_eq!(file("sqlite://orders.db"), Some(Target::Sqlite("orders.db".into())));
        assert_eq!(file("sqlite://data/orders.db"), Some(Target::Sqlite("data/orders.db".into())));
        assert_eq!(file("sqlite:///var/o.db"), Some(Target::Sqlite("/var/o.db".into())));
    }

    #[test]
    fn a_url_of_nothing_known_is_refused_with_the_forms_that_are() {
        for bad in [
            "",
            "orders.db",
            "sqlite:orders.db",
            "sqlite://",
            "sqlite://folder/",
            "mysql://h/d",
            "sqlite://:memory:",
            "sqlite://a.db?mode=ro",
        ] {
            let refused = parse(bad).expect_err("no database").to_string();
            assert!(refused.contains("sqlite://FILE"), "{bad:?}: {refused}");
        }
    }

    #[test]
    fn a_mistyped_parameter_is_refused_without_its_value() {
        let check = |parameter: &str, expected: &str| {
            let url = format!("postgres://u@h/d?{parameter}");
            let refused = parse(&url).expect_err(parameter).to_string();
            assert!(refused.contains(expected) && !refused.contains("canary"), "{refused}");
        };
        check("passwort=canary", "unknown parameter passwort;");
        check("canary", "an unknown parameter;");
        check("CANARY=canary", "an unknown parameter;");
        check("password=x&canary", "an unknown parameter;");
        check("sslmode=canary", "unknown sslmode; give one of disable");
        check("allow_unsafe=canary", "unknown name in allow_unsafe; give a list of clear_text");
        check("password=$canary!", "no variable's name follows");
        check("password=", "the secret is empty");
        check("password=canary#canary", "has a '#'");
        check("ssl_mode=canary", "unknown parameter ssl_mode");
    }
}

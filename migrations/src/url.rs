//! Database URLs, split by hand: general URL parsers make the file of `sqlite://orders.db` a host.

use std::path::PathBuf;

use crate::error::DatabaseError;

/// Where a URL points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A PostgreSQL server: the URL goes to the driver as it is.
    Postgres,
    /// A SQLite file, as written: relative to the working directory unless it begins with `/`.
    Sqlite(PathBuf),
}

const REMEDY: &str = "give sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/DATABASE";

/// What the URL points at.
pub(crate) fn parse(url: &str) -> Result<Target, DatabaseError> {
    let refused = |what: String| Err(DatabaseError::refused(what, REMEDY));
    let Some((scheme, rest)) = url.split_once("://") else {
        return refused(format!("{:?} is not a database URL", shown(url)));
    };
    match scheme {
        "postgres" | "postgresql" => Ok(Target::Postgres),
        "sqlite" if rest.is_empty() || rest.ends_with('/') => {
            refused(format!("{url:?} names no file"))
        }
        "sqlite" if rest == ":memory:" => {
            refused(format!("{url:?}: a database in memory would lose what it acknowledged"))
        }
        "sqlite" if rest.contains(['?', '\0']) => {
            refused(format!("{url:?}: a SQLite URL takes no options"))
        }
        "sqlite" => Ok(Target::Sqlite(PathBuf::from(rest))),
        other => refused(format!("database URL {:?} has the unknown scheme {other:?}", shown(url))),
    }
}

/// The URL as it may be shown: without password.
pub(crate) fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        // Whatever this is, the part before an '@' may hold a password.
        return url.rsplit_once('@').map_or(url, |(_, rest)| rest).to_owned();
    };
    if scheme == "sqlite" {
        return url.to_owned();
    }
    // A password that was not percent-encoded may hold any of ":/?#@": the very last '@' ends it.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((login, rest)) => (login.split([':', '/', '?', '#']).next(), rest),
        None => (None, rest),
    };
    let (place, query) = rest.split_once('?').map_or((rest, None), |(place, q)| (place, Some(q)));
    let place = user.map_or_else(|| place.to_owned(), |user| format!("{user}@{place}"));
    // The driver decodes names too.
    let open = |option: &&str| {
        let name = option.split('=').next().unwrap_or_default();
        !name.contains("password") && !name.contains('%')
    };
    let options: Vec<_> = query.into_iter().flat_map(|q| q.split('&')).filter(open).collect();
    match options.is_empty() {
        true => format!("{scheme}://{place}"),
        false => format!("{scheme}://{place}?{}", options.join("&")),
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
                Ok(Target::Postgres) => "postgres".to_owned(),
                Ok(Target::Sqlite(file)) => format!("sqlite {}", file.display()),
                Err(refused) => refused.to_string(),
            };
            assert!(found.contains(verdict), "{case}\nis {found}");
            assert_eq!(shown(&url), text(expected), "{case}");
        }
        // Wherever such a character comes into the password, it is not told.
        for odd in [":", "/", "?", "#", "@", "%", "&", "=", "\0", "é"] {
            let url = format!("postgres://u:x{odd}secret{odd}x@h/d?a=b");
            assert_eq!(shown(&url), "postgres://u@h/d?a=b");
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
        check("u:secret@h/d", "h/d");
        check("sqlite:///a/b@c.db", "sqlite:///a/b@c.db");
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
}

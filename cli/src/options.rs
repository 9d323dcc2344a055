//! Which log and which database a command is about.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use kafold::kafka::KafkaConfig;
use kafold::{Database, Mode, shown_url};

use crate::error::Error;

/// How long a broker may take to answer one question: an operator waits for it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an end of a partition that is too low is looked at again before it is believed.
const LOW_END_PATIENCE: Duration = Duration::from_secs(2);

/// Options accepted before and after any subcommand. The URLs are strings, as in a service's own
/// options, because clap merges options of one name.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Options {
    /// The event log: sqlite://FILE, or kafka://HOST:PORT,HOST:PORT/NAME (one broker or several).
    ///
    /// ?tls=true&ca=FILE encrypts, and sasl=scram-sha-512&user=NAME&password=@FILE logs in (@FILE: from
    /// a file, $NAME: from the environment); any option of librdkafka goes as ?librdkafka.KEY=VALUE.
    #[arg(long, value_name = "URL", env = "KAFOLD_LOG", hide_env_values = true, global = true)]
    log: Option<String>,
    /// The database of stream index and read models: sqlite://FILE or
    /// postgres://USER:PASSWORD@HOST:PORT/NAME.
    ///
    /// Default: the log's own file, when the log is one.
    #[arg(
        long,
        value_name = "URL",
        env = "KAFOLD_DATABASE",
        hide_env_values = true,
        global = true
    )]
    database: Option<String>,
    /// Prints one JSON document instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// Shows only the host and path of URLs, which may contain a password.
impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |url: &Option<String>| url.as_deref().map(shown_url);
        f.debug_struct("Options")
            .field("log", &shown(&self.log))
            .field("database", &shown(&self.database))
            .field("json", &self.json)
            .finish()
    }
}

/// A log by its URL.
#[derive(Debug, Clone)]
pub(crate) enum LogUrl {
    /// The URL.
    Sqlite(String),
    /// What the URL says.
    Kafka(Box<KafkaConfig>),
}

impl Options {
    /// The log when none is named.
    pub(crate) fn default_log(&mut self, url: Option<&str>) {
        self.log = self.log.take().or_else(|| url.map(str::to_owned));
    }

    /// Returns warnings of unsafe settings accepted by the log's URL. An invalid URL is reported
    /// elsewhere.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let config = self.log.as_ref().and_then(|url| url.parse::<KafkaConfig>().ok());
        config.map(|config| config.warnings()).unwrap_or_default()
    }

    /// The log, which the command cannot do without.
    pub(crate) fn log(&self) -> Result<LogUrl, Error> {
        self.maybe_log()?.ok_or_else(|| {
            Error::usage(
                "no log is named: add --log kafka://HOST:PORT/NAME or --log sqlite://FILE, or set \
                 KAFOLD_LOG",
            )
        })
    }

    /// The log, if one is named.
    pub(crate) fn maybe_log(&self) -> Result<Option<LogUrl>, Error> {
        let Some(url) = &self.log else { return Ok(None) };
        match url.split_once("://") {
            Some(("sqlite", file)) if !file.is_empty() => Ok(Some(LogUrl::Sqlite(url.clone()))),
            Some(("kafka", _)) => {
                let config = url.parse::<KafkaConfig>();
                let mut config = config.map_err(|error| Error::usage(error.to_string()))?;
                config.limits.request_timeout = REQUEST_TIMEOUT;
                config.limits.low_end_patience = LOW_END_PATIENCE;
                Ok(Some(LogUrl::Kafka(Box::new(config))))
            }
            _ => Err(Error::usage(format!(
                "{} is not the URL of a log: write sqlite://FILE or \
                 kafka://HOST:PORT[,HOST:PORT]/NAME",
                shown_url(url)
            ))),
        }
    }

    /// Demands that a log or a database is named, and that both are URLs.
    pub(crate) fn check_any(&self) -> Result<(), Error> {
        let log = self.maybe_log()?.is_some();
        let database = self.maybe_database_url()?.is_some();
        if log || database {
            return Ok(());
        }
        Err(Error::usage(
            "neither log nor database is named: add --log kafka://HOST:PORT/NAME or --log \
             sqlite://FILE, and --database postgres://…, or set KAFOLD_LOG and KAFOLD_DATABASE",
        ))
    }

    /// The URL of the database, which the command cannot do without.
    pub(crate) fn database_url(&self) -> Result<String, Error> {
        self.maybe_database_url()?.ok_or_else(|| {
            Error::usage(
                "no database is named: add --database postgres://… or --database sqlite://FILE, or \
                 set KAFOLD_DATABASE",
            )
        })
    }

    /// The URL of the database, if one is named; else the log's own file, if it is one.
    pub(crate) fn maybe_database_url(&self) -> Result<Option<String>, Error> {
        let Some(url) = &self.database else {
            return Ok(match self.maybe_log()? {
                Some(LogUrl::Sqlite(url)) => Some(url),
                Some(LogUrl::Kafka(_)) | None => None,
            });
        };
        match url.split_once("://") {
            Some(("sqlite" | "postgres" | "postgresql", rest)) if !rest.is_empty() => {
                Ok(Some(url.clone()))
            }
            _ => Err(Error::usage(format!(
                "{} is not the URL of a database: write sqlite://FILE or \
                 postgres://USER:PASSWORD@HOST:PORT/NAME",
                shown_url(url)
            ))),
        }
    }

    /// The database, which the command cannot do without, with tables that are current.
    pub(crate) async fn database(&self) -> Result<Database, Error> {
        Ok(Database::open(&self.database_url()?, Mode::Check).await?)
    }

    /// The database, if one is named, with tables that are current.
    pub(crate) async fn maybe_database(&self) -> Result<Option<Database>, Error> {
        let Some(url) = self.maybe_database_url()? else { return Ok(None) };
        Ok(Some(Database::open(&url, Mode::Check).await?))
    }
}

impl LogUrl {
    /// For people: without options, which may hold a password.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::Sqlite(url) => url.clone(),
            Self::Kafka(config) => format!("kafka://{}/{}", config.brokers, config.name),
        }
    }
}

/// Parses a time: so long ago, or a date and time with its zone.
pub(crate) fn time_of(
    option: &str,
    text: &str,
    now: DateTime<Utc>,
) -> Result<DateTime<Utc>, Error> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let ago = units.into_iter().find_map(|(unit, seconds)| {
        let number: i64 = text.strip_suffix(unit)?.parse().ok().filter(|number| *number >= 0)?;
        now.checked_sub_signed(TimeDelta::try_seconds(number.checked_mul(seconds)?)?)
    });
    let written = || DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc());
    ago.or_else(written).ok_or_else(|| {
        Error::usage(format!(
            "{option} {text:?} is no time: write 30s, 10m, 2h or 1d for so long ago, or \
             2024-10-04T12:30:00Z"
        ))
    })
}

//! `orders serve` and `orders work`: their options, and how the service starts.

use std::net::SocketAddr;
use std::time::Duration;

use kafold::clock::RandomIds;
use kafold::{IdGenerator, Opening, shown_url};
use kafold_axum::{BearerToken, BearerTokenError, Service};

use crate::http::{INDEX, routes};
use crate::logging::LogFormat;
use crate::{say, service};

/// The log without `--log`: a file of the working directory.
pub(crate) const LOG_DEFAULT: &str = "sqlite://orders.db";

/// Where events are kept, where read models are, where to listen.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) stack: StackArgs,
    /// The token required by commands and queries as 'authorization: Bearer TOKEN': @FILE or $NAME,
    /// a variable.
    ///
    /// /health and the list of endpoints at / stay open.
    #[arg(long, value_name = "@FILE|$NAME", env = "KAFOLD_BEARER_TOKEN", hide_env_values = true)]
    bearer_token: Option<String>,
    /// Every request is answered within this time, such as 10s or 500ms; 100ms to 5 minutes.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = deadline)]
    deadline: Duration,
}

/// Log, database and HTTP address, of a service and of a worker.
#[derive(Debug, clap::Args)]
pub(crate) struct StackArgs {
    /// The event log: sqlite://FILE, or kafka://HOST:PORT,HOST:PORT/NAME (one broker or several).
    ///
    /// A file is created when absent, its folder is not. On Kafka the topics NAME.events,
    /// NAME.commands and NAME.replies are created when absent, with
    /// ?partitions=N&replication=R (default 12, and 3 or as many as there are brokers).
    /// ?tls=true&ca=FILE encrypts, and sasl=scram-sha-512&user=NAME&password=@FILE logs in (@FILE: from
    /// a file, $NAME: from the environment); any option of librdkafka goes as ?librdkafka.KEY=VALUE.
    #[arg(long, value_name = "URL", env = "KAFOLD_LOG", hide_env_values = true, default_value = LOG_DEFAULT, value_parser = log_url)]
    pub(crate) log: String,
    /// The read models: sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/NAME.
    ///
    /// Default: the log's own file, when the log is one.
    #[arg(long, value_name = "URL", env = "KAFOLD_DATABASE", hide_env_values = true, value_parser = database_url)]
    pub(crate) database: Option<String>,
    /// The address for HTTP; port 0 takes a free port.
    ///
    /// HTTP is in clear text and open to every client with access to the address: the service
    /// belongs behind a proxy that ends TLS and checks the rights of callers. So an address other
    /// than loopback requires --behind-proxy.
    ///
    /// Limits: 4096 connections (at the limit the connection with the longest wait for a request
    /// makes room); 10 s for a request head and for a request body; 60 s for a connection without a
    /// request and for a client which does not read its answer; heads of 128 KiB, bodies of 1 MiB,
    /// 1024 requests under way.
    #[arg(long, value_name = "ADDR", env = "KAFOLD_LISTEN", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A proxy stands in front of the address, ends TLS and checks the rights of callers.
    ///
    /// Without this option an address other than loopback is refused.
    #[arg(long, env = "KAFOLD_BEHIND_PROXY")]
    behind_proxy: bool,
    /// Allows unsafe settings by name; each start warns of every allowed setting.
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    allow_unsafe: Vec<Unsafe>,
    /// How log lines look, on standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// Settings refused unless allowed by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Unsafe {
    /// Listening on an address other than loopback, without a proxy in front.
    OpenListener,
    /// A token in a file with read access for other users of this machine.
    ReadableSecret,
}

/// The reason for which `serve` or `work` ended without a request to stop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(
        "a log on Kafka needs a database for its read models: add --database postgres://… or --database sqlite://FILE"
    )]
    NoDatabase,
    #[error(
        "{0} can be reached by others, and HTTP has neither TLS nor rights here: put a proxy in front and say \
         --behind-proxy, listen on 127.0.0.1, or allow it with --allow-unsafe open_listener"
    )]
    OpenListener(SocketAddr),
    #[error("--bearer-token: {0}")]
    Token(BearerTokenError),
    #[error("--bearer-token: {0}, or allow it with --allow-unsafe readable_secret")]
    ReadableToken(BearerTokenError),
    #[error(transparent)]
    Service(#[from] kafold_axum::ServeError),
}

impl ServeError {
    /// Returns the exit code of the program.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoDatabase | Self::OpenListener(_) => 2,
            Self::Token(_) | Self::ReadableToken(_) => 2,
            Self::Service(_) => 1,
        }
    }
}

impl StackArgs {
    /// Returns the options of log and database.
    pub(crate) fn opening(&self) -> Opening {
        let opening = kafold::open(&self.log);
        match &self.database {
            Some(database) => opening.database(database),
            None => opening,
        }
    }

    /// Sets the address of a service. Rejects an address that others reach, unless it is allowed.
    pub(crate) fn listener<S>(&self, service: Service<S>) -> Result<Service<S>, ServeError>
    where
        S: Clone + Send + Sync + 'static,
    {
        if self.log.starts_with("kafka://") && self.database.is_none() {
            return Err(ServeError::NoDatabase);
        }
        if !self.listen.ip().to_canonical().is_loopback() && !self.behind_proxy {
            if !self.allow_unsafe.contains(&Unsafe::OpenListener) {
                return Err(ServeError::OpenListener(self.listen));
            }
            tracing::warn!(listen = %self.listen, "open_listener is allowed: whoever reaches the address is served, in clear text");
        }
        tracing::info!(log = shown_url(&self.log), "starting");
        // Checked above.
        Ok(service.listen(self.listen).behind_proxy(true))
    }
}

/// Serves until a signal asks to stop.
pub(crate) async fn run(args: ServeArgs) -> Result<(), ServeError> {
    let ServeArgs { stack, bearer_token, deadline } = args;
    let service = stack.listener(Service::new("orders", routes()))?;
    let allow_readable = stack.allow_unsafe.contains(&Unsafe::ReadableSecret);
    if allow_readable && bearer_token.is_some() {
        tracing::warn!("readable_secret is allowed: others on this machine may read the token");
    }
    let token = bearer_token.map(|source| BearerToken::read(&source, allow_readable));
    let opening = stack.opening();
    let service = service
        .bearer_token(token.transpose().map_err(|error| match error {
            BearerTokenError::Readable(_) => ServeError::ReadableToken(error),
            error => ServeError::Token(error),
        })?)
        .deadline(deadline)
        .index(INDEX)
        .on_ready(move |address| say(&welcome(address, &stack.log)));
    Ok(service.run(opening, service::Service::start).await?)
}

pub(crate) fn log_url(text: &str) -> Result<String, String> {
    let is_known = text.starts_with("sqlite://") || text.starts_with("kafka://");
    let expected = "write sqlite://FILE or kafka://HOST:PORT[,HOST:PORT]/NAME";
    if is_known { Ok(text.to_owned()) } else { Err(expected.to_owned()) }
}

pub(crate) fn database_url(text: &str) -> Result<String, String> {
    let known = ["sqlite://", "postgres://", "postgresql://"];
    let is_known = known.iter().any(|scheme| text.starts_with(scheme));
    let expected = "write sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/NAME";
    if is_known { Ok(text.to_owned()) } else { Err(expected.to_owned()) }
}

fn deadline(text: &str) -> Result<Duration, String> {
    let (digits, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(digits), _) => (digits, 1),
        (None, Some(digits)) => (digits, 1000),
        (None, None) => (text, 1000),
    };
    let millis = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_ms));
    match millis {
        Some(millis @ 100..=300_000) => Ok(Duration::from_millis(millis)),
        _ => Err("write a time from 100ms to 300s, such as 10s".to_owned()),
    }
}

/// Returns lines for a shell to try next.
fn welcome(address: SocketAddr, log: &str) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => format!("127.0.0.1:{}", address.port()),
        _ => address.to_string(),
    };
    let url = format!("http://{host}");
    let log = shown_url(log);
    // A new one at every start, so that the lines work again.
    let order = format!("try-{:08x}", RandomIds.random() as u32);
    let json = "-H 'content-type: application/json'";
    format!(
        "orders serves on {url}, its log is {log}. Try in another terminal:

  curl -i {url}/orders {json} \\
    -d '{{\"order_id\":\"{order}\",\"customer\":\"c1\",\"lines\":[{{\"sku\":\"a\",\"quantity\":2,\"amount_cents\":2500}}]}}'
  curl -i {url}/orders/{order}/payment {json} -d '{{\"amount_cents\":2500}}'
  curl {url}/orders/{order}
  curl {url}/orders/{order}/events
  curl '{url}/reports/sales?by=day'
  curl {url}/health/ready

GET {url}/ lists every endpoint; orders import FILE feeds it purchases; orders --help tells more."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_has_a_unit_and_bounds() {
        for (text, millis) in [("10s", 10_000), ("10", 10_000), ("500ms", 500), ("300s", 300_000)] {
            assert_eq!(deadline(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "s", "ms", "0", "99ms", "301", "1.5s", "-1s", "10m"] {
            assert!(deadline(bad).is_err(), "{bad}");
        }
    }
}

//! `orders serve`: start, waiting for what is down, graceful stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kafold::clock::{RandomIds, SystemClock, backoff};
use kafold::{
    Clock, Database, DatabaseError, IdGenerator, Log, LogOptions, Mode, OpenError, shown_url,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::oneshot;

use crate::http::bearer::{BearerToken, BearerTokenError};
use crate::http::problem::chain;
use crate::http::{App, Limits, router, server};
use crate::logging::{LogFormat, Spans};
use crate::say;
use crate::service::Service;

/// Where events are kept when nothing is said: in a file of the working directory.
pub(crate) const LOG_DEFAULT: &str = "sqlite://orders.db";
/// How long the start waits before it tries again to reach what is down.
pub(crate) const OPEN_BACKOFF_BASE: Duration = Duration::from_millis(200);
pub(crate) const OPEN_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How long requests under way may take after the signal to stop, beyond their own deadline.
pub(crate) const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// How long log and projections may take to settle, after that.
pub(crate) const SETTLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Time after the start in which a refusal of the brokers, such as a missing right, ends the
/// program.
const FIRST_REFUSALS: Duration = Duration::from_secs(8);
const REFUSALS_POLL: Duration = Duration::from_millis(200);
/// How often measurements are folded into histograms, which bounds their memory.
const METRICS_UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Bounds of the buckets of every duration, in seconds.
const SECONDS_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Where events are kept, where read models are, where to listen.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// The event log: sqlite://FILE, or kafka://HOST:PORT,HOST:PORT/NAME (one broker or several).
    ///
    /// A file is created when absent, its folder is not. On Kafka the topics NAME.events,
    /// NAME.commands and NAME.replies are created when absent, with
    /// ?partitions=N&replication=R (default 12, and 3 or as many as there are brokers).
    /// ?tls=true&ca=FILE encrypts, and sasl=scram-sha-512&user=NAME&password=@FILE logs in (@FILE: from
    /// a file, $NAME: from the environment); any option of librdkafka goes as ?librdkafka.KEY=VALUE.
    #[arg(long, value_name = "URL", env = "KAFOLD_LOG", hide_env_values = true, default_value = LOG_DEFAULT, value_parser = log_url)]
    log: String,
    /// The read models: sqlite://FILE or postgres://USER:PASSWORD@HOST:PORT/NAME.
    ///
    /// Default: the log's own file, when the log is one.
    #[arg(long, value_name = "URL", env = "KAFOLD_DATABASE", hide_env_values = true, value_parser = database_url)]
    database: Option<String>,
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
    /// The token required by commands and queries as 'authorization: Bearer TOKEN': @FILE or $NAME,
    /// a variable.
    ///
    /// /health and the list of endpoints at / stay open.
    #[arg(long, value_name = "@FILE|$NAME", env = "KAFOLD_BEARER_TOKEN", hide_env_values = true)]
    bearer_token: Option<String>,
    /// Allows unsafe settings by name; each start warns of every allowed setting.
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    allow_unsafe: Vec<Unsafe>,
    /// Every request is answered within this time, such as 10s or 500ms; 100ms to 5 minutes.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = deadline)]
    deadline: Duration,
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

impl ServeArgs {
    fn token(&self) -> Result<Option<Arc<BearerToken>>, ServeError> {
        let Some(source) = &self.bearer_token else { return Ok(None) };
        let allow_readable = self.allow_unsafe.contains(&Unsafe::ReadableSecret);
        if allow_readable {
            tracing::warn!("readable_secret is allowed: others on this machine may read the token");
        }
        let token = BearerToken::read(source, allow_readable).map_err(ServeError::Token)?;
        Ok(Some(Arc::new(token)))
    }
}

/// Rejects an address other than loopback without a proxy, unless allowed by name.
pub(crate) fn check_listener(
    address: SocketAddr,
    behind_proxy: bool,
    allowed: &[Unsafe],
) -> Result<(), ServeError> {
    if address.ip().to_canonical().is_loopback() || behind_proxy {
        return Ok(());
    }
    if !allowed.contains(&Unsafe::OpenListener) {
        return Err(ServeError::OpenListener(address));
    }
    tracing::warn!(listen = %address, "open_listener is allowed: whoever reaches the address is served, in clear text");
    Ok(())
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

/// Why the service ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(
        "a log on Kafka needs a database for its read models: add --database postgres://… or --database sqlite://FILE"
    )]
    NoDatabase,
    #[error(
        "cannot listen on {address}: {error}; stop what listens there, or choose another address with --listen"
    )]
    Listen { address: SocketAddr, error: std::io::Error },
    #[error(
        "{0} can be reached by others, and HTTP has neither TLS nor rights here: put a proxy in front and say \
         --behind-proxy, listen on 127.0.0.1, or allow it with --allow-unsafe open_listener"
    )]
    OpenListener(SocketAddr),
    #[error("--bearer-token: {0}")]
    Token(BearerTokenError),
    #[error("the log cannot be used: {0}")]
    Log(OpenError),
    #[error("the log cannot be used: {0}")]
    Refused(String),
    #[error("the database cannot be used: {0}")]
    Database(DatabaseError),
    #[error("the metrics recorder: {0}")]
    Metrics(#[from] BuildError),
    #[error("the HTTP server ended by itself")]
    Http,
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
    #[error(
        "log and projections did not settle within {SETTLE_TIMEOUT:?} and were given up; what was acknowledged is kept"
    )]
    NotSettled,
}

impl ServeError {
    /// As the program ends with it.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoDatabase | Self::OpenListener(_) | Self::Token(_) => 2,
            _ => 1,
        }
    }
}

/// Serves until a signal asks to stop.
pub(crate) async fn run(args: ServeArgs, spans: Spans) -> Result<(), ServeError> {
    if args.log.starts_with("kafka://") && args.database.is_none() {
        return Err(ServeError::NoDatabase);
    }
    check_listener(args.listen, args.behind_proxy, &args.allow_unsafe)?;
    let token = args.token()?;
    let stop = Signals::new()?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let ids: Arc<dyn IdGenerator> = Arc::new(RandomIds);
    let metrics = install_metrics()?;
    tokio::spawn(upkeep(metrics.clone(), clock.clone()));
    let listen_error = |error| ServeError::Listen { address: args.listen, error };
    let listener = server::listen(args.listen).map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;

    let limits = Limits::new(args.deadline);
    let app = Arc::new(App::new(clock.clone(), ids.clone(), limits, metrics));
    let (drain, drained) = oneshot::channel::<()>();
    // A dropped sender requests a stop as well.
    let stopped = async move { drop(drained.await) };
    let server = server::serve(
        listener,
        router(app.clone(), token),
        clock.clone(),
        server::connections_max(),
        stopped,
    );
    let mut server = tokio::spawn(server);
    tracing::info!(%address, log = shown_url(&args.log), "listening");

    let opened = tokio::select! {
        biased;
        () = stop.asked(1) => None,
        opened = open(&args, address, &app, &clock, &ids) => Some(opened?),
    };
    let Some((log, service)) = opened else { return Ok(()) };
    app.open(service.clone());
    say(&welcome(address, &args, &ids));

    tokio::select! {
        biased;
        () = stop.asked(1) => {}
        error = refused(&*clock, || log.refusals()) => return Err(error),
        _ = &mut server => return Err(ServeError::Http),
    }
    tracing::info!("stopping: finishing the requests under way; a second signal ends at once");
    drop(drain);
    let ending = async {
        tokio::select! {
            biased;
            _ = &mut server => {}
            () = clock.sleep(args.deadline + DRAIN_GRACE) => {
                tracing::warn!("some connections did not end in time and are cut");
                server.abort();
            }
        }
        let settling = settle(log, &service);
        let settled = tokio::select! {
            biased;
            () = settling => Ok(()),
            () = clock.sleep(SETTLE_TIMEOUT) => Err(ServeError::NotSettled),
        };
        spans.flush().await;
        settled
    };
    tokio::select! {
        biased;
        ended = ending => {
            tracing::info!("stopped");
            ended
        }
        // Nothing acknowledged is lost: it is as if the process had been killed.
        () = stop.asked(2) => Ok(()),
    }
}

/// Returns the brokers' refusal of a process within [`FIRST_REFUSALS`] of the start, and pends for
/// ever afterwards: a running process reports not ready instead.
pub(crate) async fn refused(clock: &dyn Clock, refusals: impl Fn() -> Vec<String>) -> ServeError {
    let deadline = clock.instant() + FIRST_REFUSALS;
    while clock.instant() < deadline {
        clock.sleep(REFUSALS_POLL).await;
        let refusals = refusals();
        if !refusals.is_empty() {
            return ServeError::Refused(refusals.join("; "));
        }
    }
    std::future::pending().await
}

async fn settle(log: Log, service: &Service) {
    log.close().await;
    service.projections.shutdown().await;
    service.database.clone().close().await;
}

/// Opens database and log; while one of them is down, says so and waits.
async fn open(
    args: &ServeArgs,
    address: SocketAddr,
    app: &App,
    clock: &Arc<dyn Clock>,
    ids: &Arc<dyn IdGenerator>,
) -> Result<(Log, Arc<Service>), ServeError> {
    for attempt in 1.. {
        let reason = match try_open(args, address, clock, ids).await {
            Ok((log, database)) => {
                let service = Service::start(&log, database, clock.clone(), ids.clone());
                return Ok((log, Arc::new(service)));
            }
            Err(ServeError::Log(error)) if error.is_transient() => {
                format!("the log is not there yet: {}", chain(&error))
            }
            Err(ServeError::Database(error @ DatabaseError::Unavailable { .. })) => {
                format!("the database is not there yet: {}", chain(&error))
            }
            Err(error) => return Err(error),
        };
        tracing::warn!(attempt, "{reason}; waiting for it");
        app.waits_for(&reason);
        clock.sleep(backoff(&**ids, attempt, OPEN_BACKOFF_BASE, OPEN_BACKOFF_MAX)).await;
    }
    unreachable!("the loop has no end of its own")
}

async fn try_open(
    args: &ServeArgs,
    address: SocketAddr,
    clock: &Arc<dyn Clock>,
    ids: &Arc<dyn IdGenerator>,
) -> Result<(Log, Database), ServeError> {
    let database = match &args.database {
        Some(url) => Some(Database::open(url, Mode::Migrate).await.map_err(ServeError::Database)?),
        None => None,
    };
    let mut options = LogOptions::new(&args.log)
        .address(format!("http://{address}"))
        .clock(clock.clone(), ids.clone());
    if let Some(database) = &database {
        options = options.index(database);
    }
    let log = options.open().await.map_err(ServeError::Log)?;
    let database = database.or_else(|| log.database().cloned()).ok_or(ServeError::NoDatabase)?;
    Ok((log, database))
}

/// SIGINT and SIGTERM.
pub(crate) struct Signals(tokio::sync::watch::Receiver<u32>);

impl Signals {
    pub(crate) fn new() -> Result<Self, ServeError> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
        let (count, counted) = tokio::sync::watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                count.send_modify(|count| *count += 1);
            }
        });
        Ok(Self(counted))
    }

    /// Returns once that many signals have come.
    pub(crate) async fn asked(&self, times: u32) {
        let mut counted = self.0.clone();
        // The sender lives as long as the process.
        drop(counted.wait_for(|count| *count >= times).await);
    }
}

pub(crate) fn install_metrics() -> Result<PrometheusHandle, BuildError> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS_BUCKETS)?
        .install_recorder()
}

pub(crate) async fn upkeep(metrics: PrometheusHandle, clock: Arc<dyn Clock>) {
    loop {
        clock.sleep(METRICS_UPKEEP_INTERVAL).await;
        metrics.run_upkeep();
    }
}

/// What to try next, as lines for a shell.
fn welcome(address: SocketAddr, args: &ServeArgs, ids: &Arc<dyn IdGenerator>) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => format!("127.0.0.1:{}", address.port()),
        _ => address.to_string(),
    };
    let url = format!("http://{host}");
    let log = shown_url(&args.log);
    // A new one at every start, so that the lines work again.
    let order = format!("try-{:08x}", ids.random() as u32);
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

//! The import's side of HTTP: commands that are sent until they are answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kafold::clock::backoff;
use kafold::{Clock, CommandId, IdGenerator, Position};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use serde_json::Value;

use kafold_axum::chain;

/// One attempt takes at most this long: more than the service's own deadline.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request is tried again while the service does not take it, such as in a restart.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a report may take to follow the last command.
const REPORT_PATIENCE: Duration = Duration::from_secs(600);
const BACKOFF_BASE: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(
        "cannot reach the service at {url}: {cause}; start it with 'orders serve', or name another \
         one with --url"
    )]
    Unreachable { url: String, cause: String },
    #[error("{url} answers, but not as an order service ({answer}); name another one with --url")]
    NotTheService { url: String, answer: String },
    #[error("the service did not take it for {patience:?}, at last: {last}")]
    OutOfPatience { patience: Duration, last: String },
    #[error("the service refused it with {status}: {detail}")]
    Refused { status: u16, detail: String },
    #[error("an answer of the service cannot be read: {0}")]
    Unreadable(String),
}

/// What a command answers.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Answer {
    pub(super) position: Position,
}

/// A connection pool to the nodes of one service.
pub(super) struct Client {
    http: reqwest::Client,
    /// Never none.
    nodes: Vec<Url>,
    turn: AtomicUsize,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
}

impl Client {
    /// Checks that an order service answers at one of the URLs at least, whether or not it is ready,
    /// and nothing else at any.
    pub(super) async fn connect(
        nodes: Vec<Url>,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn IdGenerator>,
    ) -> Result<Self, ClientError> {
        let http = reqwest::Client::builder()
            .timeout(ATTEMPT_TIMEOUT)
            // The service is named to the letter; a proxy for the web is not meant.
            .no_proxy()
            .build()
            .map_err(|error| ClientError::Unreachable {
                url: shown(&nodes),
                cause: chain(&error),
            })?;
        let client = Self { http, nodes, turn: AtomicUsize::new(0), clock, ids };
        let mut unreachable = Vec::new();
        for node in &client.nodes {
            if let Err(cause) = client.greet(node).await? {
                unreachable.push(cause);
            }
        }
        if unreachable.len() == client.nodes.len() {
            let cause = unreachable.pop().unwrap_or_default();
            return Err(ClientError::Unreachable { url: shown(&client.nodes), cause });
        }
        Ok(client)
    }

    /// Why the node cannot be reached, if so.
    async fn greet(&self, node: &Url) -> Result<Result<(), String>, ClientError> {
        let response = match self.http.get(at(node, "health/live")).send().await {
            Ok(response) => response,
            Err(error) => return Ok(Err(chain(&error.without_url()))),
        };
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        if body["service"] == "orders" {
            return Ok(Ok(()));
        }
        let answer = format!("status {status}");
        Err(ClientError::NotTheService { url: node.to_string(), answer })
    }

    /// Sends a command until it is answered; safe because its id makes it apply at most once.
    pub(super) async fn command(
        &self,
        path: &str,
        id: CommandId,
        body: &Value,
    ) -> Result<Answer, ClientError> {
        let request = |node: &Url| {
            self.http.post(at(node, path)).header("idempotency-key", id.to_string()).json(body)
        };
        let response = self.persist(request, PATIENCE, |_| false).await?;
        response.json().await.map_err(|error| ClientError::Unreadable(chain(&error.without_url())))
    }

    /// Queries until there is an answer; a wait that ended before the read model had followed (504)
    /// counts as none.
    pub(super) async fn query(&self, path: &str) -> Result<Value, ClientError> {
        let request = |node: &Url| self.http.get(at(node, path));
        let is_behind = |status| status == StatusCode::GATEWAY_TIMEOUT;
        let response = self.persist(request, REPORT_PATIENCE, is_behind).await?;
        response.json().await.map_err(|error| ClientError::Unreadable(chain(&error.without_url())))
    }

    async fn persist(
        &self,
        request: impl Fn(&Url) -> reqwest::RequestBuilder,
        patience: Duration,
        also_retried: impl Fn(StatusCode) -> bool,
    ) -> Result<Response, ClientError> {
        let mut failing_since: Option<Instant> = None;
        for attempt in 1.. {
            let (last, wait) = match request(self.next_node()).send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let is_passing = status == StatusCode::SERVICE_UNAVAILABLE
                        || status == StatusCode::BAD_GATEWAY
                        || also_retried(status);
                    let wait = retry_after(&response);
                    let detail = detail(response).await;
                    if !is_passing {
                        return Err(ClientError::Refused { status: status.as_u16(), detail });
                    }
                    (format!("{status}: {detail}"), wait)
                }
                Err(error) => (chain(&error.without_url()), Duration::ZERO),
            };
            let now = self.clock.instant();
            let since = *failing_since.get_or_insert(now);
            if now.saturating_duration_since(since) > patience {
                return Err(ClientError::OutOfPatience { patience, last });
            }
            tracing::debug!(attempt, last, "trying again");
            let pause = backoff(&*self.ids, attempt, BACKOFF_BASE, BACKOFF_MAX);
            self.clock.sleep(pause.max(wait.min(BACKOFF_MAX))).await;
        }
        unreachable!("the loop has no end of its own")
    }

    /// The nodes in turn: who was refused by one asks the next.
    fn next_node(&self) -> &Url {
        &self.nodes[self.turn.fetch_add(1, Ordering::Relaxed) % self.nodes.len()]
    }
}

fn at(node: &Url, path: &str) -> String {
    format!("{}/{path}", node.as_str().trim_end_matches('/'))
}

fn shown(nodes: &[Url]) -> String {
    nodes.iter().map(Url::as_str).collect::<Vec<_>>().join(", ")
}

fn retry_after(response: &Response) -> Duration {
    let text = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
    Duration::from_secs(text.and_then(|text| text.parse().ok()).unwrap_or(0))
}

async fn detail(response: Response) -> String {
    let text = response.text().await.unwrap_or_default();
    let problem: Value = serde_json::from_str(&text).unwrap_or_default();
    match problem["detail"].as_str() {
        Some(detail) => detail.to_owned(),
        None => text.chars().take(200).collect(),
    }
}

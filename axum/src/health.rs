//! Liveness, readiness, metrics, nodes: the routes that every service has.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use kafold::store::Health;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};

use crate::app::Shared;
use crate::openapi::{Internal, NotReady};
use crate::problem::{Problem, RETRY_SOON};

/// The process answers.
#[utoipa::path(get, path = "/health/live", tag = "health", responses((status = OK, description = "the process answers", body = Value), Internal))]
pub(crate) async fn live(State(app): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({"status": "live", "service": app.name}))
}

/// The service takes commands and its read models follow; otherwise every reason why not.
#[utoipa::path(get, path = "/health/ready", tag = "health", responses((status = OK, description = "ready", body = Value), NotReady))]
pub(crate) async fn ready(State(app): State<Arc<Shared>>) -> Result<Json<Value>, Problem> {
    let Health::NotReady(reasons) = app.backend()?.health().await else {
        return Ok(Json(json!({"status": "ready"})));
    };
    let problem = Problem::unavailable("not-ready", RETRY_SOON, reasons.join("; "));
    Err(problem.with_reasons(reasons))
}

/// The nodes of the service, this one first, and which partitions of the log each owns.
#[utoipa::path(get, path = "/nodes", tag = "health", responses((status = OK, description = "the nodes", body = Value), NotReady))]
pub(crate) async fn nodes(State(app): State<Arc<Shared>>) -> Result<Json<Value>, Problem> {
    let nodes = app.backend()?.nodes();
    let (nodes, partitions) =
        nodes.ok_or_else(|| Problem::unknown("this process is no node of the log"))?;
    let owned: BTreeSet<_> =
        nodes.iter().flat_map(|node| &node.partitions).map(|owned| owned.partition.0).collect();
    let unowned: Vec<_> = (0..partitions).filter(|p| !owned.contains(p)).collect();
    let this = nodes.first().map(|node| node.id);
    Ok(Json(json!({
        "self": this, "partitions": partitions, "nodes": nodes, "unowned": unowned
    })))
}

/// Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = OK, description = "the metrics", body = String), NotReady))]
pub(crate) async fn metrics(State(app): State<Arc<Shared>>) -> impl IntoResponse {
    if let Ok(backend) = app.backend() {
        backend.measure();
    }
    let text = app.metrics.as_ref().map(PrometheusHandle::render).unwrap_or_default();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

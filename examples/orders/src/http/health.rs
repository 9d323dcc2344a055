//! Liveness, readiness, metrics.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::App;
use super::problem::{Problem, RETRY_SOON};

/// The process answers.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "live", "service": "orders"}))
}

/// It takes commands and its read models follow; else every reason why not.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, Problem> {
    let reasons = app.service()?.complaints().await;
    if reasons.is_empty() {
        return Ok(Json(json!({"status": "ready"})));
    }
    let problem = Problem::unavailable("not-ready", RETRY_SOON, reasons.join("; "));
    Err(problem.with_reasons(reasons))
}

/// The nodes of the service, this one first, and which partitions of the log each owns.
pub(super) async fn nodes(State(app): State<Arc<App>>) -> Result<Json<Value>, Problem> {
    let log = &app.service()?.log;
    let nodes = log.nodes();
    let owned: BTreeSet<_> =
        nodes.iter().flat_map(|node| &node.partitions).map(|owned| owned.partition.0).collect();
    let unowned: Vec<_> = (0..log.partitions()).filter(|p| !owned.contains(p)).collect();
    let this = nodes.first().map(|node| node.id);
    Ok(Json(json!({
        "self": this, "partitions": log.partitions(), "nodes": nodes, "unowned": unowned
    })))
}

/// Prometheus text.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    if let Ok(service) = app.service() {
        // The lag is measured when it is asked for.
        service.projections.health();
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}

//! An HTTP server that takes the requests of the order service and answers when a record is produced:
//! nothing is decided, nothing is read.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use kafold::StreamId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::Failure;
use crate::baselines::producer::Events;

#[derive(Serialize, Deserialize)]
struct Line {
    sku: String,
    quantity: i64,
    amount_cents: i64,
}

#[derive(Deserialize)]
struct Place {
    order_id: String,
    customer: String,
    lines: Vec<Line>,
}

#[derive(Deserialize)]
struct Pay {
    amount_cents: i64,
}

type Answer = Result<(StatusCode, Json<Value>), (StatusCode, String)>;

/// Serves for ever, producing to the events topic of a log that is there.
pub async fn serve(brokers: &str, log: &str, listen: &str) -> Result<(), Failure> {
    let router = Router::new()
        .route("/orders", post(place))
        .route("/orders/{id}/payment", post(pay))
        .route("/health/ready", get(async || "ready"))
        .with_state(Arc::new(Events::start(brokers, log)?));
    let listener = TcpListener::bind(listen).await?.tap_io(|connection| {
        // As the order service does.
        drop(connection.set_nodelay(true));
    });
    Ok(axum::serve(listener, router).await?)
}

async fn place(State(producer): State<Arc<Events>>, Json(order): Json<Place>) -> Answer {
    let Place { order_id, customer, lines } = order;
    let placed_at = "2024-02-29T12:00:00Z";
    let event = json!({ "customer": customer, "lines": lines, "placed_at": placed_at });
    produced(&producer, &order_id, StatusCode::CREATED, 1, &event).await
}

async fn pay(
    State(producer): State<Arc<Events>>,
    Path(id): Path<String>,
    Json(pay): Json<Pay>,
) -> Answer {
    let event = json!({ "customer": "c1", "amount_cents": pay.amount_cents });
    produced(&producer, &id, StatusCode::OK, 2, &event).await
}

async fn produced(
    producer: &Events,
    id: &str,
    code: StatusCode,
    version: u64,
    event: &Value,
) -> Answer {
    let failed = |error: Failure| (StatusCode::SERVICE_UNAVAILABLE, error.to_string());
    let stream = StreamId::new("order", id).map_err(|error| failed(error.into()))?;
    let payload = serde_json::to_vec(event).map_err(|error| failed(error.into()))?;
    let (partition, offset) = producer.produce(&stream, &payload).await.map_err(failed)?;
    let position = format!("{partition}:{offset}");
    let answer = json!({ "order_id": id, "version": version, "position": position });
    Ok((code, Json(answer)))
}

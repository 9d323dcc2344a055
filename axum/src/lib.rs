//! HTTP for services on kafold, with axum.
//!
//! [`Service`] serves the routes of an author beside those that every service has, waits for what is down,
//! and stops gracefully. Extractors do what every command and query over HTTP needs:
//!
//! - [`Opened`]: the open service, or 503 with the reason;
//! - [`Call`]: a command by `Idempotency-Key` and `If-Match`, which returns [`Done`];
//! - [`After`]: read your own writes by `?after=POSITION`;
//! - [`Body`], [`Id`], [`Query`]: JSON, path and query string; a mistake is named by its place;
//! - [`Problem`]: errors as RFC 9457 has them, from the errors of kafold and from the [`Rule`]s of a domain.
//!
//! ```no_run
//! # use kafold::{Aggregate, CommandHandler};
//! # use kafold_axum::{Call, Body, Done, Http, Id, Opened, Problem, Rule, ServeError, Service};
//! # use axum::{Router, routing::post};
//! # fn of<Account: Aggregate<Error: Rule, Command: serde::Serialize + serde::de::DeserializeOwned + Clone>>(
//! # ) -> Router<Http> where Account::Error: serde::Serialize + serde::de::DeserializeOwned {
//! async fn change<Account>(
//!     Opened(kafold): Opened,
//!     Id(id): Id,
//!     call: Call,
//!     Body(command): Body<Account::Command>,
//! ) -> Result<Done, Problem>
//! # where Account: Aggregate<Error: Rule>,
//! #     Account::Command: serde::Serialize + serde::de::DeserializeOwned,
//! #     Account::Error: serde::Serialize + serde::de::DeserializeOwned,
//! {
//!     call.handle(&kafold.handler::<Account>(), &id, &command).await
//! }
//! # Router::new().route("/accounts/{id}", post(change::<Account>)) }
//! # async fn example(routes: Router<Http>) -> Result<(), ServeError> {
//! Service::new("accounts", routes).run(kafold::open("sqlite://accounts.db"), |kafold| kafold).await
//! # }
//! ```

mod app;
mod backend;
mod bearer;
mod command;
mod extract;
mod fresh;
mod health;
mod observe;
mod openapi;
mod problem;
mod server;
mod service;

pub use app::{
    DEADLINE_DEFAULT, Http, LARGE_BODIES_MAX, Opened, RECENT_KEYS_MAX, REQUESTS_MAX, WAIT_MAX,
};
pub use backend::{Backend, Open};
pub use bearer::{BearerToken, BearerTokenError};
pub use command::{Call, Done};
pub use extract::{BODY_BYTES_MAX, Body, Id, Query};
pub use fresh::{After, Applied, NoQuery};
pub use openapi::{CommandProblems, QueryProblems};
pub use problem::{Problem, Rule, chain};
pub use service::{ServeError, Service};

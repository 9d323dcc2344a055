//! [`After`]: read your own writes over HTTP, by the position that a command answered.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::{IntoResponseParts, ResponseParts};
use kafold::projections::{ProjectionState, ReadModel, WaitError};
use kafold::{Kafold, OpenedLog, Position};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::app::{Http, Shared};
use crate::command::ascii;
use crate::extract::query;
use crate::problem::{Problem, RETRY_SOON};

/// Up to where an answer is complete, as a list for `?after=`.
const APPLIED: HeaderName = HeaderName::from_static("kafold-applied");
/// Most positions in one `?after=`: more than any log has partitions.
const POSITIONS_MAX: usize = 10_000;

/// Extracts `?after=POSITION[,POSITION]`, and the rest of the query string as `Q`. A query with a position
/// waits until the read model has applied it, at most [`WAIT_MAX`](crate::WAIT_MAX).
#[derive(Debug)]
pub struct After<Q = NoQuery> {
    /// The parameters other than `after`.
    pub query: Q,
    positions: Vec<Position>,
    shared: Arc<Shared>,
}

/// A query string without parameters; any parameter is answered 400.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoQuery {}

#[derive(Deserialize)]
struct OnlyAfter {
    after: Option<String>,
}

impl<S, Q> FromRequestParts<Http<S>> for After<Q>
where
    S: Send + Sync,
    Q: DeserializeOwned,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, http: &Http<S>) -> Result<Self, Problem> {
        if parts.uri.query().is_none() {
            let (query, shared) = (query(&parts.uri)?, Arc::clone(&http.shared));
            return Ok(Self { query, positions: Vec::new(), shared });
        }
        let OnlyAfter { after } = query(&parts.uri)?;
        let pairs: Vec<(String, String)> = query(&parts.uri)?;
        let others: Vec<_> = pairs.into_iter().filter(|(name, _)| name != "after").collect();
        let others = serde_urlencoded::to_string(others).expect("pairs of texts");
        let others = Uri::try_from(format!("/?{others}")).expect("an encoded query string");
        Ok(Self {
            query: query(&others).map_err(|problem| problem.with_detail(with_after))?,
            positions: after.as_deref().map(positions).transpose()?.unwrap_or_default(),
            shared: Arc::clone(&http.shared),
        })
    }
}

/// Adds `after` to the known parameters that serde lists for an unknown one.
fn with_after(detail: &str) -> String {
    match detail.split_once(", expected ") {
        Some((unknown, known)) if detail.contains("unknown field") => {
            let known = known.replace("one of ", "").replace(" or ", ", ");
            format!("{unknown}, expected {known} or `after`")
        }
        _ => detail.replace(", there are no fields", ", expected `after`"),
    }
}

impl<Q> After<Q> {
    /// Waits for the positions, and returns up to where rows of the model that are read now are complete.
    pub async fn wait<M: ReadModel>(
        &self,
        kafold: &Kafold<impl OpenedLog>,
    ) -> Result<Applied, Problem> {
        self.wait_for(kafold, M::NAME).await
    }

    /// As [`wait`](Self::wait), for a projection by name.
    pub async fn wait_for(
        &self,
        kafold: &Kafold<impl OpenedLog>,
        projection: &str,
    ) -> Result<Applied, Problem> {
        let Shared { clock, limits, .. } = &*self.shared;
        let begun = clock.instant();
        for &position in &self.positions {
            check_partition(kafold, position)?;
            let waited = clock.instant().saturating_duration_since(begun);
            let left = limits.wait.saturating_sub(waited);
            let applied = kafold.wait_for_position(projection, position, left).await;
            applied.map_err(|error| wait_problem(kafold, projection, &error))?;
        }
        Ok(Applied(kafold.applied(projection).await?))
    }
}

/// Up to where an answer is complete: the response header `kafold-applied`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied(pub Vec<Position>);

impl IntoResponseParts for Applied {
    type Error = std::convert::Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Self::Error> {
        let applied = self.0.iter().map(ToString::to_string).collect::<Vec<_>>();
        parts.headers_mut().insert(APPLIED, ascii(&applied.join(",")));
        Ok(parts)
    }
}

fn check_partition(kafold: &Kafold<impl OpenedLog>, after: Position) -> Result<(), Problem> {
    let count = kafold.log().partitions();
    if after.partition.0 < count {
        return Ok(());
    }
    Err(Problem::malformed(format!(
        "after: {after} is in no partition of this log, it has {count}; take the position that a \
         command of this service answered"
    )))
}

fn wait_problem(kafold: &Kafold<impl OpenedLog>, projection: &str, error: &WaitError) -> Problem {
    let state = kafold.projection(projection).map(|status| status.state);
    match (error, state) {
        (WaitError::Timeout { .. }, Some(ProjectionState::Waiting(reason))) => {
            let detail = format!("the read model {projection} waits: {reason}");
            Problem::unavailable("unavailable", RETRY_SOON, detail)
        }
        (WaitError::Timeout { .. }, _) => {
            let detail = format!("{error}: try again, or ask without ?after for what there is");
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "not-applied-yet", detail)
        }
        (WaitError::Stopped { .. } | WaitError::UnknownProjection(_), _) => {
            Problem::unavailable("projection-stopped", RETRY_SOON, error.to_string())
        }
    }
}

/// Parses the positions of `?after=`: one, or several separated by commas.
fn positions(text: &str) -> Result<Vec<Position>, Problem> {
    if text.split(',').count() > POSITIONS_MAX {
        return Err(Problem::malformed(format!("after takes at most {POSITIONS_MAX} positions")));
    }
    let parse = |part: &str| {
        part.parse().map_err(|error| {
            Problem::malformed(format!(
                "after: {error}; it takes the position that a command answered"
            ))
        })
    };
    text.split(',').map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_that_is_unknown_lists_after_among_the_known() {
        let known = |expected: &str| with_after(&format!("unknown field `x`, {expected}"));
        assert_eq!(known("there are no fields"), "unknown field `x`, expected `after`");
        assert_eq!(known("expected `by`"), "unknown field `x`, expected `by` or `after`");
        let three = "unknown field `x`, expected `a`, `b` or `after`";
        assert_eq!(known("expected `a` or `b`"), three);
        assert_eq!(with_after("duplicate field `by`"), "duplicate field `by`");
    }

    #[test]
    fn positions_are_a_list_without_holes() {
        let count = |text: &str| positions(text).map(|list| list.len()).ok();
        assert_eq!(count("0:1"), Some(1));
        assert_eq!(count("0:1,3:1042"), Some(2));
        for bad in ["", ",", "0:1,", "x", "0:1 ,1:1", "-1:0"] {
            assert_eq!(count(bad), None, "{bad}");
        }
    }
}

//! The parts of an OpenAPI document that are the same for every service: headers, `?after=`, problems.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{Content, KnownFormat, Ref, RefOr, Required, Response, ResponseBuilder};
use utoipa::{IntoParams, IntoResponses};

use crate::command::Call;
use crate::fresh::{After, NoQuery};
use crate::problem::PROBLEM_JSON;

type Responses = BTreeMap<String, RefOr<Response>>;

/// The problems of a command, for `responses(…)` of `#[utoipa::path]`.
#[derive(Debug)]
pub struct CommandProblems;

/// The problems of a query, for `responses(…)` of `#[utoipa::path]`.
#[derive(Debug)]
pub struct QueryProblems;

/// The problem of a service that is not ready, or has too much to do.
#[derive(Debug)]
pub(crate) struct NotReady;

/// The problem of a handler that panicked.
#[derive(Debug)]
pub(crate) struct Internal;

impl IntoResponses for CommandProblems {
    fn responses() -> Responses {
        problems(&[
            (StatusCode::BAD_REQUEST, "path, header or body cannot be read"),
            (StatusCode::UNAUTHORIZED, "the bearer token is missing or wrong"),
            (StatusCode::NOT_FOUND, "there is no such aggregate"),
            (StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"),
            (StatusCode::CONFLICT, "it exists already, or others changed it at the same time"),
            (StatusCode::PRECONDITION_FAILED, "it is not at the version of if-match"),
            (StatusCode::PAYLOAD_TOO_LARGE, "the body or its event is too large"),
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body is not JSON"),
            (StatusCode::UNPROCESSABLE_ENTITY, "a rule refuses, or the idempotency key was used"),
            (StatusCode::INTERNAL_SERVER_ERROR, "the service failed"),
            (StatusCode::SERVICE_UNAVAILABLE, "not now: send it again after retry-after"),
        ])
    }
}

impl IntoResponses for QueryProblems {
    fn responses() -> Responses {
        problems(&[
            (StatusCode::BAD_REQUEST, "path or query string cannot be read"),
            (StatusCode::UNAUTHORIZED, "the bearer token is missing or wrong"),
            (StatusCode::NOT_FOUND, "there is no such thing"),
            (StatusCode::UNPROCESSABLE_ENTITY, "the answer would have too many rows"),
            (StatusCode::INTERNAL_SERVER_ERROR, "the service failed"),
            (StatusCode::SERVICE_UNAVAILABLE, "not now: try again after retry-after"),
            (StatusCode::GATEWAY_TIMEOUT, "no answer in time, or ?after= is not applied yet"),
        ])
    }
}

impl IntoResponses for NotReady {
    fn responses() -> Responses {
        problems(&[
            (StatusCode::UNAUTHORIZED, "the bearer token is missing or wrong"),
            (StatusCode::INTERNAL_SERVER_ERROR, "the service failed"),
            (StatusCode::SERVICE_UNAVAILABLE, "not ready, with every reason"),
            (StatusCode::GATEWAY_TIMEOUT, "no answer in time"),
        ])
    }
}

impl IntoResponses for Internal {
    fn responses() -> Responses {
        problems(&[(StatusCode::INTERNAL_SERVER_ERROR, "the service failed")])
    }
}

fn problems(all: &[(StatusCode, &str)]) -> Responses {
    let response = |description: &str| {
        let content = Content::new(Some(Ref::from_schema_name("Problem")));
        ResponseBuilder::new().description(description).content(PROBLEM_JSON, content).build()
    };
    let entry = |(status, description): &(StatusCode, &str)| {
        (status.as_u16().to_string(), RefOr::T(response(description)))
    };
    all.iter().map(entry).collect()
}

/// `Idempotency-Key` and `If-Match`.
impl IntoParams for Call {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let uuid = SchemaFormat::KnownFormat(KnownFormat::Uuid);
        let key = "A UUID of the client: the request is applied at most once, and a repeated request \
                   returns the first result";
        let version =
            "The version of an ETag in quotes, or *: the command is refused at another version";
        vec![
            parameter("Idempotency-Key", ParameterIn::Header, key, Some(uuid), None),
            parameter(
                "If-Match",
                ParameterIn::Header,
                version,
                None,
                Some(r#"^(\*|(W/)?"[0-9]{1,15}")$"#),
            ),
        ]
    }
}

/// `after`, and the parameters of `Q`.
impl<Q: IntoParams> IntoParams for After<Q> {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let after = "Positions that commands answered, separated by commas: waits until the read model \
                     has applied them";
        let pattern = Some("^[0-9]{1,9}:[0-9]{1,18}(,[0-9]{1,9}:[0-9]{1,18})*$");
        let mut all = vec![parameter("after", ParameterIn::Query, after, None, pattern)];
        all.extend(Q::into_params(|| Some(ParameterIn::Query)));
        all
    }
}

impl IntoParams for NoQuery {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        Vec::new()
    }
}

fn parameter(
    name: &str,
    place: ParameterIn,
    description: &str,
    format: Option<SchemaFormat>,
    pattern: Option<&str>,
) -> Parameter {
    let schema = ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::String))
        .format(format)
        .pattern(pattern)
        .build();
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
        .build()
}

//! HTTP: parse, authenticate, convert; decides nothing.
//!
//! ARM paths are matched case-insensitively, which route tables cannot; so one function splits the path and each resource's
//! file matches the rest. Long work answers 202 with the operation's address, as recorded from the service.

mod alert_settings;
mod body;
mod convert;
mod error;
mod exports;
mod filter;
mod fuzz;
mod identity;
mod item_extras;
mod items;
mod jobs;
mod limits;
mod networks;
mod recovery_plans;
mod resources;
mod v1;
mod vault_health;
mod vault_services;
mod vaults;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::any,
};
use hyper::{
    Method, StatusCode,
    body::Body as _,
    header::{self, HeaderValue},
    http::request::Parts,
};
use mainstay_api::arm;
use mainstay_control::{
    Control, ControlError,
    app::{Requester, Role, VaultRecord},
    db::{AuditRecord, asking_once},
};
use mainstay_model::JobId;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::{
    Authority,
    token_key::TokenKey,
    vaults::{HostedVault, Vaults},
};
use error::ApiError;
pub(crate) use fuzz::fuzz;
pub(crate) use limits::Limit;
pub use v1::document_text;

/// Largest request body; the largest real one is a few KiB.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Requests for access tokens of one address in a minute; a token lasts an hour.
pub(crate) const TOKEN_REQUESTS_MAX: u32 = 120;

/// What handlers work with.
pub(crate) struct Api {
    pub(crate) vaults: Arc<Vaults>,
    /// Keeps who may sign in, and what they did.
    pub(crate) directory: Arc<Control>,
    /// The tenant in which everybody signs in, which is also the only subscription.
    pub(crate) tenant: String,
    pub(crate) authority: Arc<Authority>,
    /// `https://HOST:PORT` as clients that send no Host header are told.
    pub(crate) base_url: String,
    /// Address that agents are told.
    pub(crate) agent_endpoint: String,
    /// How long a request's body may take.
    pub(crate) request_timeout: Duration,
    pub(crate) shutdown_timeout: Duration,
    /// SHA-256 of the authority's certificate, part of registration keys.
    pub(crate) metrics: metrics_exporter_prometheus::PrometheusHandle,
    /// Signs access tokens.
    pub(crate) token_key: TokenKey,
    /// Names under which clients reach the server.
    pub(crate) names: Vec<String>,
    pub(crate) failed_sign_ins: Limit,
    pub(crate) token_requests: Limit,
}

/// The address that a request came from, which the listener adds to it.
#[derive(Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// The routes.
pub(crate) fn router(api: Arc<Api>) -> Router {
    Router::new().fallback(any(handle)).with_state(api)
}

/// A request as handlers see it.
struct Call {
    api: Arc<Api>,
    /// The vault that the request is about; the server's first, if about none.
    vault: Arc<VaultRecord>,
    control: Arc<Control>,
    method: Method,
    /// Segments of the path below the vault (or below `/api/v1`), as sent, percent-decoded.
    segments: Vec<String>,
    /// Pairs of the query, percent-decoded; names in lower case.
    query: Vec<(String, String)>,
    body: Vec<u8>,
    who: Requester,
    /// `https://HOST` as the client knows the server.
    base_url: String,
    /// The client's `api-version`.
    api_version: String,
}

impl Call {
    /// The segments in lower case, for matching.
    fn path(&self) -> Vec<String> {
        self.segments.iter().map(|segment| segment.to_lowercase()).collect()
    }

    fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// A value of the query. OData's own names begin with `$`, which some clients leave out.
    fn query(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(found, _)| found.trim_start_matches('$') == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// What the listing is limited to.
    fn filter(&self) -> Result<Option<filter::Filter>, ApiError> {
        self.query("filter").map(filter::parse).transpose()
    }

    /// The address of the next page of this listing.
    fn next_page(&self, token: &str) -> String {
        let path: Vec<String> =
            self.segments.iter().map(|segment| mainstay_api::encode_segment(segment)).collect();
        let query: String = self
            .query
            .iter()
            .filter(|(name, _)| !matches!(name.trim_start_matches('$'), "skiptoken" | "api-version"))
            .map(|(name, value)| format!("&{name}={}", mainstay_api::encode_segment(value)))
            .collect();
        format!(
            "{}{}/{}?api-version={}{query}&$skipToken={token}",
            self.base_url,
            self.vault.id(),
            path.join("/"),
            self.api_version
        )
    }

    /// Reads the body, whose fields a table describes; `null` and an empty body are an empty object.
    fn body<T: DeserializeOwned>(&self, fields: &[body::Field]) -> Result<T, ApiError> {
        body::read(&self.body, fields)
    }

    /// `properties` of the body; without a body, those of an empty one.
    fn properties<T: DeserializeOwned + Default>(&self, fields: &[body::Field]) -> Result<T, ApiError> {
        #[derive(serde::Deserialize)]
        struct MaybeProperties<T> {
            #[serde(default = "Option::default")]
            properties: Option<T>,
        }
        Ok(self.body::<MaybeProperties<T>>(fields)?.properties.unwrap_or_default())
    }

    /// The answer to work that has become a job.
    fn accepted(&self, job: JobId, resource: &str) -> Response {
        let operation = format!(
            "{}{}/replicationOperationStatus/{}?api-version={}",
            self.base_url,
            self.vault.id(),
            job,
            self.api_version
        );
        let location =
            format!("{}{resource}/operationresults/{job}?api-version={}", self.base_url, self.api_version);
        Response::builder()
            .status(StatusCode::ACCEPTED)
            .header("Azure-AsyncOperation", operation)
            .header(header::LOCATION, location)
            .header(header::RETRY_AFTER, "1")
            .header("x-ms-request-id", job.to_string())
            .body(Body::empty())
            .unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
    }
}

fn json(value: &impl serde::Serialize) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(value).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

fn list<T: serde::Serialize>(value: Vec<T>) -> Result<Response, ApiError> {
    json(&arm::List { value, next_link: None })
}

/// A page of a listing; see [`Call::next_page`].
fn page<T: serde::Serialize>(value: Vec<T>, next_link: Option<String>) -> Result<Response, ApiError> {
    json(&arm::List { value, next_link })
}

/// Items of a page whose length the client does not ask for.
const PAGE_LENGTH: usize = 100;

async fn handle(State(api): State<Arc<Api>>, request: Request) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    // A task of its own: a client that goes away must not stop a change half-way, between a job that is written and its start.
    let mut response = match tokio::spawn(asking_once(dispatch(api, request))).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => error.into_response(),
        Err(error) => ApiError::internal(format!("the request was not carried out: {error}")).into_response(),
    };
    // What of a slow answer is the server's (W3C Server Timing), in milliseconds.
    let timing = format!("total;dur={:.3}", began.elapsed().as_secs_f64() * 1000.0);
    if let Ok(timing) = HeaderValue::from_str(&timing) {
        response.headers_mut().insert("server-timing", timing);
    }
    let status = response.status();
    metrics::counter!("mainstay_http_requests", "method" => method.to_string(), "status" => status.as_u16().to_string())
        .increment(1);
    tracing::debug!(%method, path, status = status.as_u16(), "request");
    response
}

async fn dispatch(api: Arc<Api>, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let segments: Vec<String> = parts
        .uri
        .path()
        .split('/')
        .filter(|segment| !segment.is_empty())
        .map(decode)
        .collect::<Option<_>>()
        .ok_or_else(|| {
            ApiError::bad_request("InvalidPath", "the path is not valid percent-encoded UTF-8", "")
        })?;
    let lower: Vec<String> = segments.iter().map(|segment| segment.to_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    // Living and ready are the same: the listener opens when everything is up.
    if let ["healthz" | "readyz"] = lower.as_slice() {
        return Ok("ok\n".into_response());
    }
    let Some(&Peer(peer)) = parts.extensions.get() else {
        return Err(ApiError::internal("the request's address is not known".to_owned()));
    };
    if let Some(route) = identity::route(&parts.method, &lower) {
        let body = read_body(&api, body, identity::BODY_BYTES_MAX).await?;
        return identity::answer(&api, route, &parts, &lower, &body, peer).await;
    }
    if let ([exports::PATH, name], &Method::GET) = (lower.as_slice(), &parts.method) {
        let query = parse_query(parts.uri.query().unwrap_or_default()).unwrap_or_default();
        return exports::download(&api, name, &query).await;
    }
    let body = read_body(&api, body, BODY_BYTES_MAX).await?;
    if let ["api", "v1", rest @ ..] = lower.as_slice()
        && let Some(answer) = v1::dispatch_open(&api, &parts.method, rest, &body).await
    {
        return match answer {
            Err(error) if error.is_unauthenticated() => Err(refuse(&api, "", &parts, peer, error).await),
            answer => answer,
        };
    }
    let role_wanted = required_role(&parts.method, &lower);
    let Some(token) = bearer(&parts.headers) else {
        // Clients ask like this to learn how to sign in; whoever wants to change something is written down.
        let error = ApiError::unauthenticated();
        return Err(match parts.method {
            Method::GET => error,
            _ => refuse(&api, "", &parts, peer, error).await,
        });
    };
    let signed_in = match identity::sign_in(&api, token).await? {
        Ok(signed_in) => signed_in,
        Err(unknown) => {
            return Err(refuse(&api, &unknown.who, &parts, peer, ApiError::unauthenticated()).await);
        }
    };
    let is_allowed = signed_in.role >= role_wanted;
    if parts.method != Method::GET {
        audit(&api, &signed_in.name, parts.method.as_str(), parts.uri.path(), peer, is_allowed).await?;
    }
    if !is_allowed {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "AuthorizationFailed",
            format!("'{}' has the role {:?}; this needs {role_wanted:?}", signed_in.name, signed_in.role),
            "Use a token or a service principal with that role.",
        ));
    }
    let host = parts.headers.get(header::HOST).and_then(|value| value.to_str().ok());
    let base_url = host.map_or_else(|| api.base_url.clone(), |host| format!("https://{host}"));
    let query = parse_query(parts.uri.query().unwrap_or_default()).ok_or_else(|| {
        ApiError::bad_request("InvalidQuery", "the query is not valid percent-encoded UTF-8", "")
    })?;
    let api_version = query.iter().find(|(name, _)| name == "api-version");
    // It comes back in addresses: nothing but what a version consists of.
    let api_version = api_version
        .map(|(_, version)| version.as_str())
        .filter(|version| version.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')))
        .unwrap_or(arm::API_VERSION)
        .to_owned();
    let is_vault_itself = matches!(vault_path(&lower), Some((.., [])));
    let asked = vault_asked_for(&api, &lower, &query)?;
    let vault = match &asked {
        // To be made, or gone already.
        None if is_vault_itself => api.vaults.first(),
        None => return Err(ControlError::not_found("vault", lower[VAULT_PLACE]).into()),
        Some(vault) => vault,
    };
    let mut call = Call {
        vault: vault.record(),
        control: vault.control.clone(),
        api: api.clone(),
        method: parts.method,
        segments,
        query,
        body: body.to_vec(),
        who: Requester(signed_in.name),
        base_url,
        api_version,
    };
    if is_vault_itself {
        return vaults::vault(&call, asked.as_deref()).await;
    }
    // A vault is not deleted before requests in it have been answered.
    let Some(_in_use) = vault.in_use().await else {
        return Err(ControlError::not_found("vault", call.vault.name.as_str()).into());
    };
    if let Some((.., below)) = vault_path(&lower) {
        call.segments.drain(..=VAULT_PLACE);
        if let ([.., "operationresults", name], &Method::GET) = (below, &call.method) {
            call.segments.truncate(call.segments.len() - 2);
            let resource = format!("{}/{}", call.vault.id(), call.segments.join("/"));
            let job = jobs::find(&call, name).await?;
            if !job.has_ended() {
                return Ok(call.accepted(job.id(), &resource));
            }
            // The result is the resource as it is now; where it is gone there is no content.
            return match vault_dispatch(&call).await {
                Err(error) if error.is_not_found() => Ok(StatusCode::NO_CONTENT.into_response()),
                answer => answer,
            };
        }
        return vault_dispatch(&call).await;
    }
    match lower.as_slice() {
        ["metrics"] => Ok(call.api.metrics.render().into_response()),
        ["api", "v1", ..] => {
            call.segments.drain(..2);
            v1::dispatch(&call).await
        }
        path => match vault_services::above_vault(&call, path) {
            Some(answer) => answer,
            None => vaults::dispatch(&call, path),
        },
    }
}

/// Where in a path below a vault the vault's name is.
const VAULT_PLACE: usize = 7;

/// Subscription, resource group and name in the path of a vault, as segments in lower case, and what is below it.
fn vault_path<'a>(path: &'a [&'a str]) -> Option<(&'a str, &'a str, &'a str, &'a [&'a str])> {
    match path {
        [
            "subscriptions",
            subscription,
            "resourcegroups",
            group,
            "providers",
            "microsoft.recoveryservices",
            "vaults",
            vault,
            below @ ..,
        ] => Some((subscription, group, vault, below)),
        _ => None,
    }
}

/// The vault that a request is about, if there is one of that name; the server's first, if it names none.
fn vault_asked_for(
    api: &Api,
    path: &[&str],
    query: &[(String, String)],
) -> Result<Option<Arc<HostedVault>>, ApiError> {
    if let Some((subscription, group, name, _)) = vault_path(path) {
        let is_ours = api.tenant.eq_ignore_ascii_case(subscription);
        return Ok(api.vaults.find(group, name).filter(|_| is_ours));
    }
    match query.iter().find(|(name, value)| name == v1::VAULT_PARAMETER && !value.is_empty()) {
        Some((_, name)) if path.starts_with(&["api", "v1"]) => Ok(Some(api.vaults.find_named(name)?)),
        _ => Ok(Some(api.vaults.first().clone())),
    }
}

async fn vault_dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    match path.first().map(String::as_str) {
        Some("replicationjobs" | "replicationoperationstatus" | "replicationevents") => {
            jobs::dispatch(call).await
        }
        Some("replicationvaulthealth") => {
            let rest: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
            vault_health::dispatch(call, &rest).await
        }
        Some("replicationrecoveryplans") => recovery_plans::dispatch(call).await,
        Some("replicationalertsettings") => {
            let rest: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
            alert_settings::dispatch(call, &rest).await
        }
        Some(
            "replicationvaultsettings"
            | "replicationsupportedoperatingsystems"
            | "usages"
            | "replicationusages"
            | "certificates"
            | "extendedinformation",
        ) => {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            vault_services::dispatch(call, &path).await
        }
        Some("replicationprotecteditems") => items::list_all(call).await,
        Some("replicationfabrics")
            if path.get(4).is_some_and(|segment| segment == "replicationprotecteditems") =>
        {
            items::dispatch(call).await
        }
        _ => resources::dispatch(call).await,
    }
}

/// Reading needs a Reader, failing over and back an Operator, everything else a Contributor.
fn required_role(method: &Method, path: &[&str]) -> Role {
    if let ["api", "v1", rest @ ..] = path {
        return v1::required_role(method, rest);
    }
    // An export holds nothing that a Reader could not list, and a question about a name changes nothing.
    let asks =
        path.ends_with(&["replicationjobs", "export"]) || path.last() == Some(&"checknameavailability");
    if method == Method::GET || (method == Method::POST && asks) {
        return Role::Reader;
    }
    let verbs = [
        "testfailover",
        "testfailovercleanup",
        "plannedfailover",
        "unplannedfailover",
        "failovercommit",
        "failovercancel",
        "applyrecoverypoint",
        "reprotect",
        "repairreplication",
        "resolvehealtherrors",
        "refreshprovider",
        "cancel",
        "resume",
        "restart",
    ];
    if method == Method::POST && path.last().is_some_and(|last| verbs.contains(last)) {
        return Role::Operator;
    }
    Role::Contributor
}

async fn read_body(api: &Api, body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the request body is larger than {bytes_max} bytes, or broke off");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLarge", message, "Send a smaller one.")
    };
    // What is announced need not be waited for.
    if body.size_hint().lower() > bytes_max as u64 {
        return Err(too_large());
    }
    let body = tokio::time::timeout(api.request_timeout, to_bytes(body, bytes_max)).await.map_err(|_| {
        let message = format!("the request body took longer than {} s", api.request_timeout.as_secs());
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message, "Try again.")
    })?;
    body.map_err(|_| too_large())
}

/// Writes a failed sign-in down and says what to answer: `answer`, unless there were too many. Good tokens are never held up
/// by bad ones from their address: others may share it, and 256 bits are not guessed; what is limited is what failures cost.
async fn refuse(api: &Api, who: &str, parts: &Parts, peer: IpAddr, answer: ApiError) -> ApiError {
    if let Err(seconds) = api.failed_sign_ins.attempt(peer, api.directory.clock.now_ms()) {
        return ApiError::too_many_failures(seconds);
    }
    let path: String = parts.uri.path().chars().take(AUDITED_PATH_CHARACTERS_MAX).collect();
    match audit(api, who, parts.method.as_str(), &path, peer, false).await {
        Ok(()) => answer,
        Err(error) => error,
    }
}

/// What is kept of a path that somebody unknown asked for.
const AUDITED_PATH_CHARACTERS_MAX: usize = 512;

async fn audit(
    api: &Api,
    who: &str,
    action: &str,
    path: &str,
    peer: IpAddr,
    is_allowed: bool,
) -> Result<(), ApiError> {
    let record = AuditRecord {
        id: Uuid::now_v7().to_string(),
        time_ms: api.directory.clock.now_ms(),
        who: who.to_owned(),
        from: peer.to_canonical().to_string(),
        action: action.to_owned(),
        target: path.to_owned(),
        is_allowed,
    };
    let mut transaction = api.directory.db.begin().await.map_err(ControlError::from)?;
    transaction.add_audit(&record).await.map_err(ControlError::from)?;
    transaction.commit().await.map_err(ControlError::from)?;
    Ok(())
}

fn bearer(headers: &hyper::HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Pairs of a query, with names in lower case.
fn parse_query(query: &str) -> Option<Vec<(String, String)>> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(name)?.to_lowercase(), decode(&value.replace('+', " "))?))
        })
        .collect()
}

fn decode(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes().iter();
    while let Some(byte) = rest.next() {
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let hex = [*rest.next()?, *rest.next()?];
        bytes.push(u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_undone_or_refused() {
        assert_eq!(decode("Microsoft%20Azure").as_deref(), Some("Microsoft Azure"));
        assert_eq!(decode("%4"), None);
        assert_eq!(decode("%zz"), None);
        assert_eq!(decode("%ff"), None);
        let query = parse_query("api-version=1&$Filter=a%20eq+'b'&x").unwrap();
        let expected = [("api-version", "1"), ("$filter", "a eq 'b'"), ("x", "")];
        assert_eq!(query, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(parse_query("a=%f"), None);
    }

    #[test]
    fn operators_fail_over_and_only_contributors_configure() {
        assert_eq!(required_role(&Method::GET, &["metrics"]), Role::Reader);
        assert_eq!(required_role(&Method::POST, &["x", "unplannedfailover"]), Role::Operator);
        assert_eq!(required_role(&Method::POST, &["x", "remove"]), Role::Contributor);
        assert_eq!(required_role(&Method::GET, &["api", "v1", "serviceprincipals"]), Role::Contributor);
        assert_eq!(required_role(&Method::POST, &["api", "v1", "tokens"]), Role::Contributor);
        assert_eq!(required_role(&Method::GET, &["api", "v1", "tokens"]), Role::Reader);
        assert_eq!(required_role(&Method::PUT, &["x", "cancel"]), Role::Contributor);
        assert_eq!(required_role(&Method::POST, &["replicationjobs", "export"]), Role::Reader);
    }
}

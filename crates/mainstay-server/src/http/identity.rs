//! Signing in as Azure's own clients do: OAuth 2.0 client credentials (RFC 6749, 4.4), and what tells clients where and
//! how. Nothing here asks for a token, so everything here is bounded: bodies, attempts, answers.

use std::net::IpAddr;

use axum::response::{IntoResponse as _, Response};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::{HeaderMap, Method, StatusCode, header, http::request::Parts};
use mainstay_control::{
    ControlError,
    app::{Role, ServicePrincipalRecord},
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Api, audit, decode, error::ApiError, parse_query};
use crate::token_key::Claims;

/// Largest request for a token.
pub(super) const BODY_BYTES_MAX: usize = 16 << 10;
/// How long an access token is valid, as in Azure.
const TOKEN_SECONDS: i64 = 3600;
/// Whom tokens are meant for when a client asks for nothing else.
const AUDIENCE: &str = "https://management.azure.com";
/// How clients name the resource manager that this server is: by the present and by the former name of Azure's.
const AUDIENCES: [&str; 2] = [AUDIENCE, "https://management.core.windows.net"];
/// Longest audience that a client can ask for.
const AUDIENCE_BYTES_MAX: usize = 256;
/// What clients add to the scopes of people who sign in; it changes nothing for programs.
const SCOPES_WITHOUT_MEANING: &[&str] = &["openid", "profile", "offline_access"];
/// From this version the endpoints are answered as a list of clouds, …
const ENDPOINTS_LISTED_FROM: &str = "2019";
/// … and from this as one object again.
const ENDPOINTS_LISTED_BEFORE: &str = "2022";

/// The two generations of Microsoft's endpoints, which differ in their paths and in details of the answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// What is here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Token(Version),
    Configuration(Version),
    Keys,
    Instances,
    Endpoints,
}

/// Finds what a path (in lower case) means here.
pub(super) fn route(method: &Method, path: &[&str]) -> Option<Route> {
    let route = match path {
        [_, "oauth2", "v2.0", "token"] => Route::Token(Version::V2),
        [_, "oauth2", "token"] => Route::Token(Version::V1),
        [_, "v2.0", ".well-known", "openid-configuration"] => Route::Configuration(Version::V2),
        [_, ".well-known", "openid-configuration"] => Route::Configuration(Version::V1),
        [_, "discovery", "v2.0", "keys"] | [_, "discovery", "keys"] => Route::Keys,
        ["common", "discovery", "instance"] => Route::Instances,
        ["metadata", "endpoints"] => Route::Endpoints,
        _ => return None,
    };
    let expected = if matches!(route, Route::Token(_)) { Method::POST } else { Method::GET };
    (*method == expected).then_some(route)
}

/// Answers a request without a token.
pub(super) async fn answer(
    api: &Api,
    route: Route,
    parts: &Parts,
    path: &[&str],
    body: &[u8],
    peer: IpAddr,
) -> Result<Response, ApiError> {
    let tenant = path.first().copied().unwrap_or_default();
    let is_ours = matches!(tenant, "common" | "organizations") || api.tenant.eq_ignore_ascii_case(tenant);
    if !is_ours && route != Route::Endpoints {
        let code = if matches!(route, Route::Token(_)) { "invalid_request" } else { "invalid_tenant" };
        let description = format!(
            "there is no tenant '{tenant}' here; use '{}', which `mainstay principal list --json` shows",
            api.tenant
        );
        return Ok(Refusal::new(code, description).into_response());
    }
    let base = base_url(api, &parts.headers);
    let value = match route {
        Route::Token(version) => {
            return match token(api, version, parts, body, peer, &base).await? {
                Ok(response) => Ok(response),
                Err(refusal) => Ok(refusal.into_response()),
            };
        }
        Route::Configuration(version) => configuration(api, version, &base),
        Route::Keys => json!({ "keys": [api.token_key.public()] }),
        Route::Instances => instances(api, &base),
        Route::Endpoints => endpoints(api, &base, parts.uri.query().unwrap_or_default())?,
    };
    super::json(&value)
}

/// The server's address as the client knows it, if that is one of its names: a token's issuer must not be what a client
/// made up.
fn base_url(api: &Api, headers: &HeaderMap) -> String {
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok());
    host.filter(|host| is_own_host(api, host))
        .map_or_else(|| api.base_url.clone(), |host| format!("https://{}", host.to_lowercase()))
}

/// Whether `NAME` or `NAME:PORT` names this server. The port may be another where it is forwarded.
fn is_own_host(api: &Api, host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    api.names.iter().any(|known| known.eq_ignore_ascii_case(name))
}

fn issuer(api: &Api, version: Version, base: &str) -> String {
    match version {
        Version::V1 => format!("{base}/{}", api.tenant),
        Version::V2 => format!("{base}/{}/v2.0", api.tenant),
    }
}

fn is_own_issuer(api: &Api, issuer: &str) -> bool {
    let issuer = issuer.strip_suffix("/v2.0").unwrap_or(issuer);
    let Some((base, tenant)) = issuer.rsplit_once('/') else { return false };
    let is_own_base =
        base == api.base_url || base.strip_prefix("https://").is_some_and(|host| is_own_host(api, host));
    is_own_base && tenant == api.tenant
}

/// Whether a token was asked for to be shown here, and not to somebody else who could show it here in turn.
fn is_own_audience(api: &Api, audience: &str) -> bool {
    let audience = audience.trim_end_matches('/');
    AUDIENCES.contains(&audience)
        || audience == api.base_url
        || audience.strip_prefix("https://").is_some_and(|host| is_own_host(api, host))
}

/// Who a request comes from.
pub(super) struct SignedIn {
    /// For the audit trail and jobs.
    pub(super) name: String,
    /// What it may do now.
    pub(super) role: Role,
}

/// How the audit trail and jobs name a service principal.
fn display_name(principal: &ServicePrincipalRecord) -> String {
    format!("{} ({})", principal.name, principal.client_id)
}

/// Why a bearer token is not accepted, as far as that is known.
pub(super) struct Unknown {
    /// Whose it says it is, if it is one of our own.
    pub(super) who: String,
}

/// Finds who a bearer token belongs to: a token of ours, or an access token of a service principal that is still there.
pub(super) async fn sign_in(api: &Api, bearer: &str) -> Result<Result<SignedIn, Unknown>, ApiError> {
    // Secrets of tokens are base64url, in which there are no dots.
    if !bearer.contains('.') {
        let token = api.directory.authenticate(bearer).await?;
        return Ok(token
            .map(|token| SignedIn { name: token.label, role: token.role })
            .ok_or_else(|| Unknown { who: String::new() }));
    }
    let Some(claims) = api.token_key.verify(bearer) else {
        return Ok(Err(Unknown { who: String::new() }));
    };
    let now = api.directory.clock.now_ms().div_euclid(1000);
    let is_valid = claims.nbf <= now
        && now < claims.exp
        && claims.tid == api.tenant
        && is_own_audience(api, &claims.aud)
        && is_own_issuer(api, &claims.iss);
    let principal = match Uuid::parse_str(&claims.appid) {
        Ok(client_id) if is_valid => api.directory.valid_service_principal(client_id).await?,
        _ => None,
    };
    Ok(principal
        .map(|principal| SignedIn { name: display_name(&principal), role: principal.role })
        .ok_or(Unknown { who: claims.appid }))
}

/// An error as OAuth 2.0 answers it (RFC 6749, 5.2).
struct Refusal {
    status: StatusCode,
    error: &'static str,
    description: String,
    retry_after: Option<i64>,
}

impl Refusal {
    fn new(error: &'static str, description: impl Into<String>) -> Self {
        let status =
            if error == "invalid_client" { StatusCode::UNAUTHORIZED } else { StatusCode::BAD_REQUEST };
        Self { status, error, description: description.into(), retry_after: None }
    }

    fn too_many(seconds: i64) -> Self {
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            error: "temporarily_unavailable",
            description: format!("too many requests from this address; try again in {seconds} s"),
            retry_after: Some(seconds),
        }
    }

    fn into_response(self) -> Response {
        let body = json!({ "error": self.error, "error_description": self.description });
        let mut response = (self.status, axum::Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = header::HeaderValue::from_static("Basic realm=\"mainstay\"");
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// What a client asks for.
struct TokenRequest {
    client_id: String,
    secret: String,
    audience: String,
}

fn read_request(headers: &HeaderMap, body: &[u8]) -> Result<TokenRequest, Refusal> {
    let invalid = |description: &str| Refusal::new("invalid_request", description);
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_form = content_type
        .and_then(|value| value.split(';').next())
        .is_some_and(|value| value.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded"));
    if !is_form {
        return Err(invalid("the body must be application/x-www-form-urlencoded"));
    }
    let fields = std::str::from_utf8(body).ok().and_then(parse_query);
    let fields = fields.ok_or_else(|| invalid("the form is not valid percent-encoded UTF-8"))?;
    let field = |name: &str| {
        let mut values = fields.iter().filter(|(found, value)| found == name && !value.is_empty());
        let value = values.next().map(|(_, value)| value.as_str());
        match values.next() {
            Some(_) => Err(Refusal::new("invalid_request", format!("'{name}' is given more than once"))),
            None => Ok(value),
        }
    };
    match field("grant_type")? {
        Some("client_credentials") => {}
        Some(other) => {
            let description = format!("'{other}' is not offered; use client_credentials");
            return Err(Refusal::new("unsupported_grant_type", description));
        }
        None => return Err(invalid("grant_type is missing; use client_credentials")),
    }
    let (client_id, secret) = match (basic(headers)?, field("client_id")?, field("client_secret")?) {
        (Some(_), _, Some(_)) => {
            return Err(invalid("the client's secret is given twice: in the header and in the form"));
        }
        (Some((id, secret)), stated, None) => {
            if stated.is_some_and(|stated| !stated.eq_ignore_ascii_case(&id)) {
                return Err(invalid("the client id in the header is not the one in the form"));
            }
            (id, secret)
        }
        (None, Some(id), Some(secret)) => (id.to_owned(), secret.to_owned()),
        (None, None, _) => return Err(invalid("client_id is missing")),
        (None, Some(_), None) => {
            return Err(invalid("client_secret is missing; certificates and assertions are not offered"));
        }
    };
    let audience = audience(field("scope")?, field("resource")?)?;
    Ok(TokenRequest { client_id, secret, audience })
}

/// Client id and secret of HTTP Basic; each is form-encoded within it (RFC 6749, 2.3.1).
fn basic(headers: &HeaderMap) -> Result<Option<(String, String)>, Refusal> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    let pair = || {
        let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (id, secret) = text.split_once(':')?;
        Some((decode(&id.replace('+', " "))?, decode(&secret.replace('+', " "))?))
    };
    let unreadable = "the Authorization header is not HTTP Basic with a client id and a secret";
    pair().map(Some).ok_or_else(|| Refusal::new("invalid_request", unreadable))
}

/// Whom the token is to be meant for: a scope is `RESOURCE/.default` for programs, as what they may do is not theirs to
/// choose.
fn audience(scope: Option<&str>, resource: Option<&str>) -> Result<String, Refusal> {
    let invalid = |description: String| Refusal::new("invalid_scope", description);
    let audience = match (scope, resource) {
        (None, None) => AUDIENCE,
        (None, Some(resource)) => resource,
        (Some(scope), _) => {
            let mut scopes =
                scope.split_ascii_whitespace().filter(|scope| !SCOPES_WITHOUT_MEANING.contains(scope));
            match (scopes.next().map(|scope| scope.strip_suffix("/.default")), scopes.next()) {
                (Some(Some(resource)), None) => resource,
                (None, _) => AUDIENCE,
                _ => {
                    let description =
                        format!("a program's scope is one resource and '/.default'; use {AUDIENCE}/.default");
                    return Err(invalid(description));
                }
            }
        }
    };
    let is_good = !audience.is_empty()
        && audience.len() <= AUDIENCE_BYTES_MAX
        && audience.bytes().all(|c| c.is_ascii_graphic() && !matches!(c, b'"' | b'\\'));
    if is_good {
        return Ok(audience.to_owned());
    }
    Err(invalid(format!("a resource is an address of at most {AUDIENCE_BYTES_MAX} characters")))
}

async fn token(
    api: &Api,
    version: Version,
    parts: &Parts,
    body: &[u8],
    peer: IpAddr,
    base: &str,
) -> Result<Result<Response, Refusal>, ApiError> {
    let now_ms = api.directory.clock.now_ms();
    if let Err(seconds) = api.token_requests.attempt(peer, now_ms) {
        return Ok(Err(Refusal::too_many(seconds)));
    }
    let request = match read_request(&parts.headers, body) {
        Ok(request) => request,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let client_id = Uuid::parse_str(&request.client_id).ok();
    let principal = match client_id {
        Some(id) => api.directory.authenticate_service_principal(id, &request.secret).await?,
        None => None,
    };
    let target = parts.uri.path();
    let Some(principal) = principal else {
        if let Err(seconds) = api.failed_sign_ins.attempt(peer, now_ms) {
            return Ok(Err(Refusal::too_many(seconds)));
        }
        // What is not an id could be anything, a secret put into the wrong field too: it is not written down.
        let who = client_id.map(|id| id.to_string()).unwrap_or_default();
        audit(api, &who, "sign in", target, peer, false).await?;
        let description = "the client id is not known, or its secret is wrong or has expired; `mainstay principal list` \
                           shows who can sign in";
        return Ok(Err(Refusal::new("invalid_client", description)));
    };
    let who = display_name(&principal);
    audit(api, &who, "sign in", target, peer, true).await?;
    let now = now_ms.div_euclid(1000);
    let id = principal.client_id.to_string();
    let claims = Claims {
        iss: issuer(api, version, base),
        aud: request.audience,
        sub: id.clone(),
        appid: id.clone(),
        oid: id,
        tid: api.tenant.clone(),
        roles: vec![format!("{:?}", principal.role)],
        iat: now,
        nbf: now,
        exp: now + TOKEN_SECONDS,
        ver: if version == Version::V1 { "1.0" } else { "2.0" }.to_owned(),
    };
    let token = api.token_key.sign(&claims);
    let token = token.ok_or_else(|| {
        ControlError::Conflict("the access token cannot be signed now; try again".to_owned())
    })?;
    // The first generation answers numbers as text, and says what it was asked for.
    let answer = match version {
        Version::V1 => json!({
            "token_type": "Bearer",
            "expires_in": TOKEN_SECONDS.to_string(),
            "ext_expires_in": TOKEN_SECONDS.to_string(),
            "expires_on": claims.exp.to_string(),
            "not_before": claims.nbf.to_string(),
            "resource": claims.aud,
            "access_token": token,
        }),
        Version::V2 => json!({
            "token_type": "Bearer",
            "expires_in": TOKEN_SECONDS,
            "ext_expires_in": TOKEN_SECONDS,
            "access_token": token,
        }),
    };
    Ok(Ok(([(header::CACHE_CONTROL, "no-store")], axum::Json(answer)).into_response()))
}

/// OpenID Connect Discovery. There is nothing at the address for people, but clients refuse a document without it.
fn configuration(api: &Api, version: Version, base: &str) -> Value {
    let tenant = format!("{base}/{}", api.tenant);
    let path = if version == Version::V1 { "" } else { "/v2.0" };
    json!({
        "issuer": issuer(api, version, base),
        "authorization_endpoint": format!("{tenant}/oauth2{path}/authorize"),
        "token_endpoint": format!("{tenant}/oauth2{path}/token"),
        "token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic"],
        "jwks_uri": format!("{tenant}/discovery{path}/keys"),
        "grant_types_supported": ["client_credentials"],
        "response_types_supported": ["token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
        "claims_supported": ["iss", "aud", "sub", "appid", "oid", "tid", "roles", "iat", "nbf", "exp", "ver"],
        "tenant_region_scope": null,
        "cloud_instance_name": host_of(base),
    })
}

/// The instances that Microsoft's library asks for: this server is the only one it knows.
fn instances(api: &Api, base: &str) -> Value {
    let host = host_of(base);
    json!({
        "api-version": "1.1",
        "tenant_discovery_endpoint":
            format!("{base}/{}/v2.0/.well-known/openid-configuration", api.tenant),
        "metadata": [{ "preferred_network": host, "preferred_cache": host, "aliases": [host] }],
    })
}

fn host_of(base: &str) -> &str {
    base.strip_prefix("https://").unwrap_or(base)
}

/// What a client needs to know of a cloud: where its resources are and where to sign in. The names before the blank line are
/// those of the versions until 2018, which Azure Stack answers and the command line's registration of clouds reads.
fn endpoints(api: &Api, base: &str, query: &str) -> Result<Value, ApiError> {
    let query = parse_query(query).ok_or_else(|| {
        ApiError::bad_request("InvalidQuery", "the query is not valid percent-encoded UTF-8", "")
    })?;
    let version =
        query.iter().find(|(name, _)| name == "api-version").map_or("", |(_, value)| value.as_str());
    let cloud = json!({
        "galleryEndpoint": base,
        "graphEndpoint": base,
        "portalEndpoint": base,
        "authentication": {
            "loginEndpoint": base,
            "audiences": [AUDIENCE],
            "tenant": api.tenant,
            "identityProvider": "AAD",
        },

        "name": "Mainstay",
        "portal": base,
        "resourceManager": base,
        "graph": base,
        "graphAudience": base,
        "suffixes": {},
    });
    let is_listed = (ENDPOINTS_LISTED_FROM..ENDPOINTS_LISTED_BEFORE).contains(&version);
    Ok(if is_listed { json!([cloud]) } else { cloud })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_names_one_resource() {
        let audience = |scope, resource| audience(scope, resource).map_err(|refusal| refusal.error);
        assert_eq!(audience(None, None).as_deref(), Ok(AUDIENCE));
        let scope = Some("https://management.azure.com/.default openid profile");
        assert_eq!(audience(scope, None).as_deref(), Ok(AUDIENCE));
        let scope = Some("https://management.core.windows.net//.default");
        assert_eq!(audience(scope, None).as_deref(), Ok("https://management.core.windows.net/"));
        assert_eq!(audience(None, Some("https://127.0.0.1:8443")).as_deref(), Ok("https://127.0.0.1:8443"));
        let long = "x".repeat(300);
        for scope in ["user.read", "a/.default b/.default", "/.default"] {
            assert_eq!(audience(Some(scope), None), Err("invalid_scope"), "{scope}");
        }
        assert_eq!(audience(None, Some(&long)), Err("invalid_scope"));
    }
}

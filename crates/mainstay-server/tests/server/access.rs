//! Access for Azure's own clients, over the wire: service principals, access tokens, what tells clients where to sign in.

use std::sync::Arc;

use crate::support::Server;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use mainstay_api::{
    arm,
    v1::{ServicePrincipal, ServicePrincipalRequest},
};
use mainstay_control::{ManualClock, SystemClock};
use reqwest::{Response, StatusCode, header};
use serde_json::Value;

const HOUR_MS: i64 = 3_600_000;
const PRINCIPALS: &str = "/api/v1/servicePrincipals";
const SCOPE: &str = "https://management.azure.com/.default";

impl Server {
    async fn principal(&self, role: &str, days: Option<u32>) -> ServicePrincipal {
        let request = ServicePrincipalRequest { name: "script".to_owned(), role: role.to_owned(), days };
        self.administrator.post(PRINCIPALS, &request).await.unwrap()
    }

    async fn ask(&self, path: &str, fields: &[(&str, &str)]) -> Response {
        let form: Vec<String> = fields
            .iter()
            .map(|(name, value)| format!("{name}={}", mainstay_api::encode_segment(value)))
            .collect();
        self.http
            .post(format!("{}/{path}", self.url))
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form.join("&"))
            .send()
            .await
            .unwrap()
    }

    async fn sign_in(&self, principal: &ServicePrincipal) -> Response {
        let secret = principal.secret.as_deref().unwrap();
        let path = format!("{}/oauth2/v2.0/token", self.tenant);
        let fields = [
            ("grant_type", "client_credentials"),
            ("client_id", principal.client_id.as_str()),
            ("client_secret", secret),
            ("scope", SCOPE),
        ];
        self.ask(&path, &fields).await
    }

    async fn token(&self, principal: &ServicePrincipal) -> String {
        let response = self.sign_in(principal).await;
        assert_eq!(response.status(), StatusCode::OK);
        let answer: Value = response.json().await.unwrap();
        answer["access_token"].as_str().unwrap().to_owned()
    }

    async fn status(&self, token: &str) -> u16 {
        match self.client(token).get::<Value>("/subscriptions").await {
            Ok(_) => 200,
            Err(error) => error.status().unwrap_or_else(|| panic!("{error}")),
        }
    }

    async fn get(&self, path: &str) -> Value {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.json().await.unwrap()
    }

    async fn audit(&self) -> Vec<Value> {
        let list: arm::List<Value> = self.administrator.get("/api/v1/audit").await.unwrap();
        list.value
    }
}

async fn refused(response: Response, status: StatusCode, error: &str) {
    assert_eq!(response.status(), status, "{error}");
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"], error);
    assert!(body["error_description"].as_str().is_some_and(|text| !text.is_empty()));
}

fn claims(token: &str) -> Value {
    let claims = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
}

#[tokio::test]
async fn a_program_signs_in_and_does_what_its_role_allows() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let reader = server.principal("Reader", None).await;
    let response = server.sign_in(&reader).await;
    assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
    let answer: Value = response.json().await.unwrap();
    assert_eq!(answer["token_type"], "Bearer");
    assert_eq!((&answer["expires_in"], &answer["ext_expires_in"]), (&3600.into(), &3600.into()));
    let token = answer["access_token"].as_str().unwrap();
    let said = claims(token);
    assert_eq!(said["iss"], format!("{}/{}/v2.0", server.url, server.tenant));
    assert_eq!(said["aud"], "https://management.azure.com");
    for name in ["sub", "appid", "oid"] {
        assert_eq!(said[name], reader.client_id);
    }
    assert_eq!((&said["tid"], &said["roles"][0]), (&server.tenant.as_str().into(), &"Reader".into()));
    assert_eq!(said["exp"].as_i64().unwrap() - said["iat"].as_i64().unwrap(), 3600);

    assert_eq!(server.status(token).await, 200);
    // A reader neither configures nor sees who else can sign in.
    let as_reader = server.client(token);
    let refusal = as_reader.get::<Value>(PRINCIPALS).await.unwrap_err();
    assert_eq!(refusal.status(), Some(403));
    assert!(refusal.to_string().contains(&format!("script ({})", reader.client_id)), "{refusal}");
    let request = ServicePrincipalRequest { name: "x".into(), role: "Contributor".into(), days: None };
    assert_eq!(as_reader.post::<Value>(PRINCIPALS, &request).await.unwrap_err().status(), Some(403));
    let contributor = server.principal("Contributor", Some(1)).await;
    let as_contributor = server.client(&server.token(&contributor).await);
    let listed: arm::List<ServicePrincipal> = as_contributor.get(PRINCIPALS).await.unwrap();
    assert_eq!(listed.value.len(), 2);
    assert!(listed.value.iter().all(|principal| principal.secret.is_none()));

    // Every operation says who did it and from where.
    let audit = server.audit().await;
    let denied = audit.iter().find(|record| record["is_allowed"] == false).unwrap();
    assert_eq!(denied["who"], format!("script ({})", reader.client_id));
    assert_eq!((&denied["from"], &denied["action"]), (&"127.0.0.1".into(), &"POST".into()));
    assert!(audit.iter().any(|record| record["action"] == "sign in" && record["is_allowed"] == true));
    server.running.stop().await;
}

#[tokio::test]
async fn both_generations_of_endpoints_and_http_basic_work() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let principal = server.principal("Operator", None).await;
    let (id, secret) = (principal.client_id.as_str(), principal.secret.as_deref().unwrap());
    let fields = [
        ("grant_type", "client_credentials"),
        ("client_id", id),
        ("client_secret", secret),
        ("resource", "https://management.core.windows.net/"),
    ];
    let answer: Value = server.ask("common/oauth2/token", &fields).await.json().await.unwrap();
    assert_eq!((&answer["expires_in"], &answer["token_type"]), (&"3600".into(), &"Bearer".into()));
    assert_eq!(answer["resource"], "https://management.core.windows.net/");
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(claims(token)["iss"], format!("{}/{}", server.url, server.tenant));
    assert_eq!(claims(token)["aud"], "https://management.core.windows.net/");
    assert_eq!(server.status(token).await, 200);

    let url = format!("{}/organizations/oauth2/v2.0/token", server.url);
    let basic = format!("Basic {}", STANDARD.encode(format!("{id}:{secret}")));
    let request = server.http.post(url).header(header::AUTHORIZATION, basic);
    let request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
    let response = request.body("grant_type=client_credentials").send().await.unwrap();
    let answer: Value = response.json().await.unwrap();
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(claims(token)["aud"], "https://management.azure.com");
    assert_eq!(server.status(token).await, 200);
    server.running.stop().await;
}

#[tokio::test]
async fn a_token_for_somebody_else_opens_nothing_here() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let principal = server.principal("Contributor", None).await;
    let (id, secret) = (principal.client_id.as_str(), principal.secret.as_deref().unwrap());
    let token = async |resource: &str| {
        let fields = [
            ("grant_type", "client_credentials"),
            ("client_id", id),
            ("client_secret", secret),
            ("resource", resource),
        ];
        let answer: Value = server.ask("common/oauth2/token", &fields).await.json().await.unwrap();
        answer["access_token"].as_str().unwrap().to_owned()
    };
    assert_eq!(server.status(&token(&server.url).await).await, 200);
    for elsewhere in ["https://graph.microsoft.com", "https://management.azure.com.example.org", "x"] {
        assert_eq!(server.status(&token(elsewhere).await).await, 401, "{elsewhere}");
    }
    server.running.stop().await;
}

#[tokio::test]
async fn whoever_wants_to_change_something_without_a_token_is_written_down() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let url = |path: &str| format!("{}{}", server.url, server.at(path));
    let put = server.http.put(url("replicationFabrics/x")).body("{}").send().await.unwrap();
    assert_eq!(put.status(), StatusCode::UNAUTHORIZED);
    let get = server.http.get(url("replicationFabrics/x")).send().await.unwrap();
    assert_eq!(get.status(), StatusCode::UNAUTHORIZED);
    let audit = server.audit().await;
    let refused: Vec<_> = audit.iter().filter(|record| record["is_allowed"] == false).collect();
    assert_eq!(refused.len(), 1, "{audit:?}");
    assert_eq!((&refused[0]["who"], &refused[0]["action"]), (&"".into(), &"PUT".into()));
    assert!(refused[0]["target"].as_str().unwrap().ends_with("/replicationFabrics/x"));
    server.running.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_request_for_a_token_is_said_in_oauths_words() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let principal = server.principal("Reader", None).await;
    let (id, secret) = (principal.client_id.as_str(), principal.secret.as_deref().unwrap());
    let path = format!("{}/oauth2/v2.0/token", server.tenant);
    let grant = ("grant_type", "client_credentials");
    let (id, secret) = (("client_id", id), ("client_secret", secret));
    let bad = StatusCode::BAD_REQUEST;
    let wrong = server.ask(&path, &[grant, id, ("client_secret", "wrong")]).await;
    assert!(wrong.headers().contains_key(header::WWW_AUTHENTICATE));
    refused(wrong, StatusCode::UNAUTHORIZED, "invalid_client").await;
    let unknown = [grant, ("client_id", "11111111-2222-3333-4444-555555555555"), secret];
    refused(server.ask(&path, &unknown).await, StatusCode::UNAUTHORIZED, "invalid_client").await;
    let password = [("grant_type", "password"), id, secret];
    refused(server.ask(&path, &password).await, bad, "unsupported_grant_type").await;
    refused(server.ask(&path, &[id, secret]).await, bad, "invalid_request").await;
    refused(server.ask(&path, &[grant, id]).await, bad, "invalid_request").await;
    refused(server.ask(&path, &[grant, id, id, secret]).await, bad, "invalid_request").await;
    let scope = ("scope", "User.Read");
    refused(server.ask(&path, &[grant, id, secret, scope]).await, bad, "invalid_scope").await;
    let elsewhere = "11111111-2222-3333-4444-555555555555/oauth2/v2.0/token";
    refused(server.ask(elsewhere, &[grant, id, secret]).await, bad, "invalid_request").await;
    let url = format!("{}/{path}", server.url);
    let json = server.http.post(&url).header(header::CONTENT_TYPE, "application/json").body("{}");
    refused(json.send().await.unwrap(), bad, "invalid_request").await;
    let large = server.ask(&path, &[("grant_type", &"x".repeat(20_000))]).await;
    assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);

    // A host that registers with a wrong key fails to sign in, too.
    let request =
        serde_json::json!({ "secret": "wrong", "host": "h", "version": "1", "certificateRequest": "" });
    let register = server.client("").post::<Value>("/api/v1/register", &request).await.unwrap_err();
    assert_eq!(register.status(), Some(401));

    let failed: Vec<Value> =
        server.audit().await.into_iter().filter(|record| record["is_allowed"] == false).collect();
    assert_eq!(failed.len(), 3);
    assert!(failed.iter().all(|record| record["from"] == "127.0.0.1"));
    assert!(failed.iter().any(|record| record["target"] == "/api/v1/register"));
    assert!(failed.iter().any(|record| record["who"] == principal.client_id));
    server.running.stop().await;
}

#[tokio::test]
async fn an_access_token_ends_with_its_hour_and_with_its_principal() {
    let clock = Arc::new(ManualClock::default());
    let server = Server::start(clock.clone()).await;
    let lasting = server.principal("Reader", None).await;
    let ending = server.principal("Reader", Some(1)).await;
    let token = server.token(&lasting).await;
    clock.advance_ms(HOUR_MS - 1);
    assert_eq!(server.status(&token).await, 200);
    clock.advance_ms(1);
    assert_eq!(server.status(&token).await, 401);

    clock.advance_ms(22 * HOUR_MS + HOUR_MS / 2);
    let last = server.token(&ending).await;
    assert_eq!(server.status(&last).await, 200);
    // The token would last for another half an hour; whom it was given to does not.
    clock.advance_ms(HOUR_MS / 2);
    assert_eq!(server.status(&last).await, 401);
    refused(server.sign_in(&ending).await, StatusCode::UNAUTHORIZED, "invalid_client").await;

    let token = server.token(&lasting).await;
    assert_eq!(server.status(&token).await, 200);
    server.administrator.delete(&format!("{PRINCIPALS}/{}", lasting.client_id)).await.unwrap();
    assert_eq!(server.status(&token).await, 401);
    refused(server.sign_in(&lasting).await, StatusCode::UNAUTHORIZED, "invalid_client").await;
    let audit = server.audit().await;
    let refusal = |record: &&Value| record["is_allowed"] == false && record["target"] == "/subscriptions";
    let told = audit.iter().find(refusal).unwrap();
    assert_eq!((&told["who"], &told["from"]), (&lasting.client_id.as_str().into(), &"127.0.0.1".into()));
    server.running.stop().await;
}

#[tokio::test]
async fn a_token_that_was_changed_or_that_another_server_signed_is_refused() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let other = Server::start(Arc::new(SystemClock)).await;
    let token = server.token(&server.principal("Reader", None).await).await;
    let foreign = other.token(&other.principal("Contributor", None).await).await;
    assert_eq!(server.status(&foreign).await, 401);
    let parts: Vec<&str> = token.split('.').collect();
    let mut raised = claims(&token);
    raised["exp"] = 9_999_999_999_i64.into();
    let raised = URL_SAFE_NO_PAD.encode(raised.to_string());
    assert_eq!(server.status(&format!("{}.{raised}.{}", parts[0], parts[2])).await, 401);
    assert_eq!(server.status(&format!("{}.{}.", parts[0], parts[1])).await, 401);
    assert_eq!(server.status(&token).await, 200);
    server.running.stop().await;
    other.running.stop().await;
}

#[tokio::test]
async fn clients_are_told_where_to_sign_in_without_a_token() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let (url, tenant) = (&server.url, &server.tenant);
    let newer = server.get(&format!("/{tenant}/v2.0/.well-known/openid-configuration")).await;
    assert_eq!(newer["issuer"], format!("{url}/{tenant}/v2.0"));
    assert_eq!(newer["token_endpoint"], format!("{url}/{tenant}/oauth2/v2.0/token"));
    assert_eq!(newer["jwks_uri"], format!("{url}/{tenant}/discovery/v2.0/keys"));
    let older = server.get("/common/.well-known/openid-configuration").await;
    assert_eq!(older["issuer"], format!("{url}/{tenant}"));
    assert_eq!(older["token_endpoint"], format!("{url}/{tenant}/oauth2/token"));
    let keys = server.get(&format!("/{tenant}/discovery/v2.0/keys")).await;
    let token = server.token(&server.principal("Reader", None).await).await;
    let header: Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(keys["keys"][0]["kid"], header["kid"]);
    assert!(keys["keys"][0].get("d").is_none(), "the private key is not told");
    let instances = server.get("/common/discovery/instance?api-version=1.1").await;
    let configuration = format!("{url}/{tenant}/v2.0/.well-known/openid-configuration");
    assert_eq!(instances["tenant_discovery_endpoint"], configuration);
    let endpoints = server.get("/metadata/endpoints?api-version=2015-01-01").await;
    assert_eq!(endpoints["authentication"]["loginEndpoint"], url.as_str());
    assert_eq!(endpoints["resourceManager"], url.as_str());
    let clouds = server.get("/metadata/endpoints?api-version=2019-05-01").await;
    assert_eq!(clouds[0]["authentication"]["audiences"][0], "https://management.azure.com");

    // A name that is not the server's own does not come back in addresses.
    let request = server.http.get(format!("{url}/common/v2.0/.well-known/openid-configuration"));
    let answer: Value =
        request.header(header::HOST, "evil.example").send().await.unwrap().json().await.unwrap();
    let port = server.running.api_address.port();
    assert_eq!(answer["issuer"], format!("https://localhost:{port}/{tenant}/v2.0"));
    let elsewhere =
        format!("{url}/11111111-2222-3333-4444-555555555555/v2.0/.well-known/openid-configuration");
    refused(server.http.get(elsewhere).send().await.unwrap(), StatusCode::BAD_REQUEST, "invalid_tenant")
        .await;
    server.running.stop().await;
}

#[tokio::test]
async fn an_address_that_fails_too_often_waits_and_good_tokens_of_it_do_not() {
    let clock = Arc::new(ManualClock::default());
    let server = Server::start(clock.clone()).await;
    let principal = server.principal("Reader", None).await;
    let token = server.token(&principal).await;
    for _ in 0..20 {
        assert_eq!(server.status("wrong").await, 401);
    }
    let url = format!("{}/subscriptions", server.url);
    let response = server.http.get(&url).bearer_auth("wrong").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()[header::RETRY_AFTER], "60");
    assert_eq!(server.status(&token).await, 200);
    let failed = server.audit().await.into_iter().filter(|record| record["is_allowed"] == false).count();
    assert_eq!(failed, 20);

    // One token was asked for above.
    for _ in 1..120 {
        assert_eq!(server.ask("common/oauth2/token", &[]).await.status(), StatusCode::BAD_REQUEST);
    }
    let response = server.sign_in(&principal).await;
    assert_eq!(response.headers()[header::RETRY_AFTER], "60");
    refused(response, StatusCode::TOO_MANY_REQUESTS, "temporarily_unavailable").await;
    clock.advance_ms(60_000);
    assert_eq!(server.sign_in(&principal).await.status(), StatusCode::OK);
    assert_eq!(server.status("wrong").await, 401);
    server.running.stop().await;
}

/// Checks the server's certificate as Python does by itself since 3.13, so that other versions look as closely.
const STRICT_CLIENT: &str = "
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
context.verify_flags |= ssl.VERIFY_X509_STRICT
with socket.create_connection(('127.0.0.1', int(sys.argv[2]))) as plain:
    with context.wrap_socket(plain, server_hostname='127.0.0.1') as secured:
        print(secured.version())
";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_checks_certificates_strictly_trusts_the_server() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let authority = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&authority, &server.authority_pem).unwrap();
    let connected = tokio::process::Command::new("python3")
        .args(["-c", STRICT_CLIENT])
        .arg(authority.path())
        .arg(server.running.api_address.port().to_string())
        .output()
        .await
        .unwrap();
    let (said, wrong) =
        (String::from_utf8_lossy(&connected.stdout), String::from_utf8_lossy(&connected.stderr));
    assert!(connected.status.success() && said.starts_with("TLS"), "{said}{wrong}");
}

//! Who may do what, asked of every operation there is: those of the official OpenAPI files and those of the server's own document,
//! so that none can be forgotten. And names that want to be paths.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::support::Server;
use mainstay_api::v1::{ServicePrincipal, ServicePrincipalRequest, Token, TokenRequest};
use mainstay_control::{Control, ManualClock, db::JobCondition};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const OFFICIAL: &str = "../mainstay-cli/tests/clients/openapi/specification";
/// Operations that the documents have at least: without them nothing would be tested.
const OPERATIONS_MIN: usize = 150;
const PATIENCE: Duration = Duration::from_secs(60);

/// What an Operator may do beside reading: fail over and back, and what belongs to it.
const OPERATORS: [&str; 14] = [
    "testFailover",
    "testFailoverCleanup",
    "plannedFailover",
    "unplannedFailover",
    "failoverCommit",
    "failoverCancel",
    "applyRecoveryPoint",
    "reProtect",
    "repairReplication",
    "resolveHealthErrors",
    "refreshProvider",
    "cancel",
    "resume",
    "restart",
];
/// Questions that are asked with POST.
const QUESTIONS: [&str; 2] = ["replicationJobs/export", "checkNameAvailability"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Needs {
    Nothing,
    Reader,
    Operator,
    Contributor,
}

struct Operation {
    method: String,
    path: String,
}

impl Operation {
    fn needs(&self) -> Needs {
        let Self { method, path } = self;
        let ends = |ends: &[&str]| {
            ends.iter().any(|end| path.to_lowercase().ends_with(&format!("/{}", end.to_lowercase())))
        };
        match (method.as_str(), path.strip_prefix("/api/v1/")) {
            (_, Some("openapi.json" | "register")) => Needs::Nothing,
            // Who can sign in is nobody else's business.
            ("GET", Some("servicePrincipals")) => Needs::Contributor,
            ("GET", _) => Needs::Reader,
            ("POST", Some(_)) if ends(&["scrub"]) => Needs::Operator,
            (_, Some(_)) => Needs::Contributor,
            ("POST", None) if ends(&QUESTIONS) => Needs::Reader,
            ("POST", None) if ends(&OPERATORS) => Needs::Operator,
            _ => Needs::Contributor,
        }
    }
}

fn collect(document: &Value, server: &Server, found: &mut Vec<Operation>) {
    for (path, methods) in document["paths"].as_object().into_iter().flatten() {
        let segments = path.split('/').map(|segment| match segment {
            "{subscriptionId}" => server.tenant.as_str(),
            "{resourceGroupName}" => server.vault.resource_group.as_str(),
            "{resourceName}" | "{vaultName}" => server.vault.name.as_str(),
            _ if segment.starts_with('{') => "absent",
            _ => segment,
        });
        let path = segments.collect::<Vec<_>>().join("/");
        for method in methods.as_object().unwrap().keys() {
            if ["get", "put", "post", "patch", "delete"].contains(&method.as_str()) {
                found.push(Operation { method: method.to_uppercase(), path: path.clone() });
            }
        }
    }
}

fn official(directory: &Path, server: &Server, found: &mut Vec<Operation>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            official(&path, server, found);
        } else if path.extension().is_some_and(|extension| extension == "json") {
            let document: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            collect(&document, server, found);
        }
    }
}

async fn operations(server: &Server) -> Vec<Operation> {
    let mut found = Vec::new();
    official(&Path::new(env!("CARGO_MANIFEST_DIR")).join(OFFICIAL), server, &mut found);
    let official = found.len();
    assert!(official >= OPERATIONS_MIN, "{official} operations in the official files");
    let own: Value = server.administrator.get("/api/v1/openapi.json").await.unwrap();
    collect(&own, server, &mut found);
    assert!(found.len() >= official + 13, "the server's own document has operations");
    found
}

impl Server {
    async fn as_whom(&self, token: Option<&str>, operation: &Operation) -> (u16, String) {
        let method = reqwest::Method::from_bytes(operation.method.as_bytes()).unwrap();
        let mut request = self.http.request(method, format!("{}{}", self.url, operation.path));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if operation.method != "GET" {
            request = request.header("content-type", "application/json").body("{}");
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn token_of(&self, role: &str, days: Option<u32>) -> Token {
        let request = TokenRequest { label: role.to_owned(), role: role.to_owned(), days };
        self.administrator.post("/api/v1/tokens", &request).await.unwrap()
    }

    /// An access token for a new service principal.
    async fn access_token(&self, role: &str) -> (ServicePrincipal, String) {
        let request = ServicePrincipalRequest { name: role.to_owned(), role: role.to_owned(), days: None };
        let principal: ServicePrincipal =
            self.administrator.post("/api/v1/servicePrincipals", &request).await.unwrap();
        let form = format!(
            "grant_type=client_credentials&client_id={}&client_secret={}",
            principal.client_id,
            mainstay_api::encode_segment(principal.secret.as_deref().unwrap())
        );
        let request = self.http.post(format!("{}/common/oauth2/v2.0/token", self.url));
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form);
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        (principal, answer["access_token"].as_str().unwrap().to_owned())
    }
}

async fn start() -> (Server, Arc<ManualClock>, Arc<Control>) {
    let clock = Arc::new(ManualClock::default());
    let server =
        Server::start_with(clock.clone(), |config| config.failed_sign_ins_per_minute = u32::MAX).await;
    let control = server.records().await;
    (server, clock, control)
}

/// What operations change, in one text.
async fn state(control: &Control) -> String {
    format!(
        "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
        control.vault().await.unwrap(),
        control.hosted_vaults().await.unwrap(),
        control.fabrics().await.unwrap(),
        control.policies().await.unwrap(),
        control.recovery_plans().await.unwrap(),
        control.providers().await.unwrap(),
        control.alert_setting().await.unwrap(),
        control.tokens().await.unwrap(),
        control.service_principals().await.unwrap(),
        control.db.count_jobs(&JobCondition::All(Vec::new())).await.unwrap(),
    )
}

/// The same text with one character changed to another that could stand there.
fn bent(token: &str, at: usize) -> String {
    let mut bytes = token.as_bytes().to_vec();
    bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
    String::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_good_token_every_operation_is_refused_and_changes_nothing() {
    let (server, clock, control) = start().await;
    let expiring = server.token_of("Contributor", Some(1)).await.secret.unwrap();
    let revoked = server.token_of("Contributor", None).await;
    server.administrator.delete(&format!("/api/v1/tokens/{}", revoked.digest)).await.unwrap();
    let (_, access) = server.access_token("Contributor").await;
    clock.advance_ms(24 * 3_600_000);
    let (_, fresh) = server.access_token("Contributor").await;
    let good = server.token.as_str();
    let signature = fresh.rfind('.').unwrap();
    let credentials = [
        None,
        Some(String::new()),
        Some("wrong".to_owned()),
        Some(good[..good.len() - 1].to_owned()),
        Some(good[1..].to_owned()),
        Some(format!("{good}A")),
        Some(bent(good, 0)),
        Some(expiring),
        revoked.secret,
        // The digest is what is stored: it opens nothing.
        Some(revoked.digest),
        Some(access),
        Some(bent(&fresh, signature + 5)),
        Some(fresh[..signature].to_owned()),
        Some(format!("{}.", &fresh[..signature])),
    ];
    let before = state(&control).await;
    let operations = operations(&server).await;
    let mut asked = 0;
    for operation in operations.iter().filter(|operation| operation.needs() != Needs::Nothing) {
        for credential in &credentials {
            let (status, text) = server.as_whom(credential.as_deref(), operation).await;
            let what = format!("{} {} with {credential:?}: {text}", operation.method, operation.path);
            assert_eq!(status, 401, "{what}");
            asked += 1;
        }
    }
    assert!(asked > OPERATIONS_MIN * credentials.len());
    assert_eq!(before, state(&control).await);
    // The two that they were made from are good.
    for token in [good, &fresh] {
        let listed: Value = server.client(token).get("/subscriptions").await.unwrap();
        assert_eq!(listed["value"].as_array().unwrap().len(), 1);
    }
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_needs_its_role() {
    let (server, _, control) = start().await;
    let operations = operations(&server).await;
    let before = state(&control).await;
    let mut tokens = Vec::new();
    for (role, has) in [("Reader", Needs::Reader), ("Operator", Needs::Operator)] {
        tokens.push((server.token_of(role, None).await.secret.unwrap(), has));
        tokens.push((server.access_token(role).await.1, has));
    }
    let made = state(&control).await;
    assert_ne!(before, made);
    let mut counts = [0; 3];
    for operation in &operations {
        let needs = operation.needs();
        for (token, has) in &tokens {
            let (status, text) = server.as_whom(Some(token), operation).await;
            let what = format!("{} {} as {has:?}: {status} {text}", operation.method, operation.path);
            if needs > *has {
                assert_eq!(status, 403, "{what}");
                assert!(text.contains("AuthorizationFailed"), "{what}");
            } else if needs != Needs::Nothing {
                assert!(status != 401 && status != 403 && status < 500, "{what}");
            }
        }
        if needs != Needs::Nothing {
            counts[needs as usize - 1] += 1;
        }
    }
    assert!(counts.iter().all(|count| *count > 10), "operations by role: {counts:?}");
    // Nothing of what was refused was done. An Operator's operations had nothing to do it to; exports leave jobs.
    let strip = |state: &str| state.rsplit_once(' ').unwrap().0.to_owned();
    assert_eq!(strip(&made), strip(&state(&control).await));
    // A Contributor may do everything.
    for operation in operations.iter().filter(|operation| operation.needs() != Needs::Nothing) {
        let (status, text) = server.as_whom(Some(&server.token), operation).await;
        let what = format!("{} {}: {status} {text}", operation.method, operation.path);
        assert!(status != 401 && status != 403 && status < 500, "{what}");
    }
    server.running.stop().await;
}

/// Asks with a target as it is: clients would tidy it up first.
async fn raw(server: &Server, method: &str, target: &str, body: &str) -> (u16, String) {
    let mut stream = server.connect().await;
    let request = format!(
        "{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        server.token,
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut said = Vec::new();
    if let Err(error) = stream.read_to_end(&mut said).await {
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
    }
    let said = String::from_utf8(said).unwrap();
    let status = said.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("{method} {target}: {said}")), said)
}

/// Every file and directory below a directory.
fn files(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        found.insert(path.display().to_string());
        if path.is_dir() {
            files(&path, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_want_to_be_paths_are_refused() {
    let (server, _, control) = start().await;
    let home = json!({ "properties": {} }).to_string();
    let (status, text) = raw(&server, "PUT", &server.at("replicationFabrics/home"), &home).await;
    assert_eq!(status, 202, "{text}");
    // A moment later the catalogue has its document of the fabric, which none of the names has made.
    let deadline = Instant::now() + PATIENCE;
    while !server.config.data_dir.join("store/v1/catalogue/resources").exists() {
        assert!(Instant::now() < deadline, "the catalogue does not come to know the fabric");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let parent = server.config.data_dir.parent().unwrap().to_owned();
    let mut files_before = BTreeSet::new();
    files(&parent, &mut files_before);
    let before = state(&control).await;

    let long = "a".repeat(300);
    let names = [
        "..",
        ".",
        "%2e%2e",
        "%2E",
        "..%2f..%2fx",
        "%2fetc%2fpasswd",
        "a%2fb",
        "a%5cb",
        "..%5cx",
        "%00",
        "a%00b",
        "a%0ab",
        "a%0d%0ax:%20y",
        "%1b%5b2J",
        "%20",
        "%c3%a4",
        "%e2%80%ae",
        "%f0%9f%98%80",
        ".hidden",
        "-rf",
        "a'b",
        "a%3bb",
        "%24%28id%29",
        long.as_str(),
    ];
    let policy =
        json!({ "properties": { "providerSpecificInput": { "instanceType": "HyperVReplicaAzure" } } });
    let vaults = server.vault.id().rsplit_once('/').unwrap().0.to_owned();
    let creations = [
        (format!("{vaults}/"), json!({ "location": "mainstay" })),
        (server.at("replicationFabrics/"), json!({ "properties": {} })),
        (server.at("replicationPolicies/"), policy),
        (
            server.at("replicationRecoveryPlans/"),
            json!({ "properties": {
                "primaryFabricId": server.at("replicationFabrics/home"),
                "recoveryFabricId": server.at("replicationFabrics/home"),
                "groups": [],
            } }),
        ),
        (
            server.at("replicationFabrics/home/replicationRecoveryServicesProviders/"),
            json!({ "properties": {
                "machineName": "x", "authenticationIdentityInput": {}, "resourceAccessIdentityInput": {},
            } }),
        ),
        (server.at("replicationAlertSettings/"), json!({ "properties": {} })),
        (server.at("replicationVaultSettings/"), json!({ "properties": {} })),
    ];
    for (at, body) in &creations {
        for name in &names {
            let (status, text) = raw(&server, "PUT", &format!("{at}{name}"), &body.to_string()).await;
            assert!((400..500).contains(&status), "PUT {at}{name}: {text}");
            // What was asked for does not come back as a line of the answer's head.
            let head = text.split("\r\n\r\n").next().unwrap();
            assert!(!head.contains("\nx: y"), "{head}");
        }
    }
    for name in &names {
        let (status, text) = raw(&server, "GET", &format!("/jobExports/{name}?sig=x"), "").await;
        assert!((400..500).contains(&status), "{text}");
        let (status, text) =
            raw(&server, "POST", &format!("/api/v1/fabrics/{name}/registrationKeys"), "{}").await;
        assert!((400..500).contains(&status), "{text}");
    }
    assert_eq!(before, state(&control).await);
    let mut files_after = BTreeSet::new();
    files(&parent, &mut files_after);
    // The directories in which vaults lie are made with the first attempt, and hold none.
    let data = server.config.data_dir.display();
    let places = [format!("{data}/store/vaults"), format!("{data}/vaults")];
    files_after.retain(|path| !places.contains(path));
    assert_eq!(files_before, files_after);
    server.running.stop().await;
}

//! Asks our server what the az command line once asked Site Recovery, step by step, and compares the answers: status, headers,
//! and the shape of the bodies down to the words of the API. What differs must be listed, with its reason, in
//! `differences.json`; what is listed must differ.

mod compare;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use mainstay_agent::{HostOptions, HostSite, Identity, RegistrationKey, ServerLink, records::Records};
use mainstay_api::{Client, Connection, v1};
use mainstay_control::{Clock as _, ManualClock, SystemClock};
use mainstay_model::VmId;
use mainstay_provider::{Hypervisor as _, Site};
use mainstay_server::{Running, ServerConfig, initialize, run};
use mainstay_sim::{Oracle, SimHypervisor};
use reqwest::{Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The version that the recorded client asked for.
const API_VERSION: &str = "2022-08-01";
/// How long anything that is waited for may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const VM: VmId = VmId(Uuid::from_u128(0x4000_8000_0000_0000_0001));
const DISK: &str = "vda";
const DISK_BYTES: u64 = 64 * 4096;

/// A request and what was answered.
#[derive(Deserialize)]
struct Step {
    method: String,
    /// Path with names in braces.
    path: String,
    #[serde(default)]
    request: Option<Value>,
    status: u16,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    /// Null where there was none.
    #[serde(default)]
    body: Value,
}

impl Step {
    fn is_of_operation(&self) -> bool {
        self.path.ends_with("/{operation}")
    }
}

/// Differences that have one reason.
#[derive(Deserialize)]
struct Known {
    reason: String,
    differences: BTreeSet<String>,
}

/// A host: a simulated hypervisor with a real agent.
pub(crate) struct Host {
    stop: CancellationToken,
    agent: tokio::task::JoinHandle<()>,
}

struct Rig {
    _dir: tempfile::TempDir,
    running: Running,
    url: String,
    token: String,
    http: reqwest::Client,
    client: Client,
    hosts: Vec<Host>,
    /// What stands for the names in braces.
    names: BTreeMap<&'static str, String>,
}

impl Rig {
    /// Two sites, and at the first one a VM that runs.
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = ServerConfig {
            data_dir: dir.path().join("server"),
            listen: anywhere,
            agent_listen: anywhere,
            store_reserve_mib: 0,
            ..ServerConfig::default()
        };
        let made = initialize(&config, "group", "vault").await.unwrap();
        let running = run(&config).await.unwrap();
        let url = format!("https://127.0.0.1:{}", running.api_address.port());
        let token = made.token.unwrap().0;
        let authority = reqwest::Certificate::from_pem(made.authority_pem.as_bytes()).unwrap();
        let connection =
            Connection { url: url.clone(), authority_pem: made.authority_pem, token: token.clone() };
        let client = Client::new(&connection).unwrap();
        let http = reqwest::Client::builder().tls_certs_only([authority]).build().unwrap();
        let clock = Arc::new(ManualClock::default());
        clock.advance_ms(SystemClock.now_ms());
        let oracle = Arc::new(Oracle::new(clock));
        let vault = made.vault.id();
        let mut hosts = Vec::new();
        for site in ["home", "recovery"] {
            let fabric = format!("{vault}/replicationFabrics/{site}");
            client.begin(Method::PUT, &fabric, Some(&json!({ "properties": {} }))).await.unwrap();
            let path = format!("/api/v1/fabrics/{site}/registrationKeys");
            let key: v1::RegistrationKey = client.post(&path, &json!({})).await.unwrap();
            let hypervisor = SimHypervisor::new(site, oracle.clone());
            if site == "home" {
                hypervisor.add_vm(VM, "vm1", &[(DISK, DISK_BYTES)]);
                hypervisor.start(VM).await.unwrap();
            }
            hosts.push(Host::start(&dir.path().join(site), site, &key.key, hypervisor).await);
        }
        let container: Value = client
            .get(&format!("{vault}/replicationFabrics/home/replicationProtectionContainers"))
            .await
            .unwrap();
        let container = container["value"][0]["name"].as_str().unwrap().to_owned();
        let names = BTreeMap::from([
            ("subscription", made.vault.subscription),
            ("group", made.vault.resource_group),
            ("vault", made.vault.name),
            ("location", made.vault.location),
            ("policy", "policy".to_owned()),
            ("fabric", "home".to_owned()),
            ("container", container),
            ("mapping", "mapping".to_owned()),
            ("vm", VM.to_string()),
            ("vmName", "vm1".to_owned()),
            ("item", "item".to_owned()),
            ("plan", "plan".to_owned()),
            ("disk", DISK.to_owned()),
            ("network", "lan".to_owned()),
            ("subnet", "subnet".to_owned()),
            ("storage", "storage".to_owned()),
            // After everything.
            ("page", "ffffffff-ffff-ffff-ffff-ffffffffffff.~".to_owned()),
        ]);
        let rig = Self { _dir: dir, running, url, token, http, client, hosts, names };
        rig.discover(&vault).await;
        rig
    }

    /// Has the server read the hosts, as soon as they are connected.
    async fn discover(&self, vault: &str) {
        let list = format!("{vault}/replicationRecoveryServicesProviders");
        until("the hosts are connected", async || {
            let hosts: Value = self.client.get(&list).await.unwrap();
            let hosts = hosts["value"].as_array().unwrap();
            hosts.iter().all(|host| host["properties"]["connectionStatus"] == "Connected").then_some(())
        })
        .await;
        let hosts: Value = self.client.get(&list).await.unwrap();
        for host in hosts["value"].as_array().unwrap() {
            let path = format!("{}/refreshProvider", host["id"].as_str().unwrap());
            self.client.begin(Method::POST, &path, None::<&()>).await.unwrap();
        }
    }

    /// Fills names in.
    fn filled(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (name, value) in &self.names {
            text = text.replace(&format!("{{{name}}}"), value);
        }
        text
    }

    fn filled_in(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.filled(text).into(),
            Value::Array(parts) => parts.iter().map(|part| self.filled_in(part)).collect(),
            Value::Object(parts) => {
                parts.iter().map(|(key, part)| (key.clone(), self.filled_in(part))).collect()
            }
            other => other.clone(),
        }
    }

    async fn ask(&self, step: &Step) -> reqwest::Response {
        let path = self.filled(&step.path);
        let separator = if path.contains('?') { '&' } else { '?' };
        let method: Method = step.method.parse().unwrap();
        let url = format!("{}{path}{separator}api-version={API_VERSION}", self.url);
        let mut request = self.http.request(method, url).bearer_auth(&self.token);
        if let Some(body) = &step.request {
            request = request.json(&self.filled_in(body));
        }
        request.send().await.unwrap()
    }

    /// The item's protection state.
    async fn protection_state(&self) -> String {
        let item = "/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.RecoveryServices/vaults/{vault}/replicationFabrics/{fabric}/replicationProtectionContainers/{container}/replicationProtectedItems/{item}";
        let item: Value = self.client.get(&self.filled(item)).await.unwrap();
        item["properties"]["protectionState"].as_str().unwrap().to_owned()
    }

    async fn stop(self) {
        for host in self.hosts {
            host.stop().await;
        }
        self.running.stop().await;
    }
}

impl Host {
    async fn start(dir: &Path, name: &str, key: &str, hypervisor: SimHypervisor) -> Self {
        Self::register(dir, name, key).await;
        Self::run(dir, hypervisor).await
    }

    pub(crate) async fn register(dir: &Path, name: &str, key: &str) {
        let key = RegistrationKey::parse(key).unwrap();
        mainstay_agent::register(&dir.join("data"), &key, name, "replay").await.unwrap();
    }

    /// The agent of a registered host.
    pub(crate) async fn run(dir: &Path, hypervisor: SimHypervisor) -> Self {
        let (data_dir, run_dir) = (dir.join("data"), dir.join("run"));
        std::fs::create_dir_all(&run_dir).unwrap();
        let identity = Identity::load(&data_dir).unwrap();
        let link = ServerLink::new(&identity, &identity.endpoint).unwrap();
        let records = Records::open(&data_dir).unwrap();
        let options =
            HostOptions { boot: "first".to_owned(), run_dir, capture_time_max: Duration::from_secs(60) };
        let site = HostSite::new(Arc::new(hypervisor), Arc::new(link.clone()), records, options);
        site.recover().await.unwrap();
        let stop = CancellationToken::new();
        let serving: Arc<dyn Site> = Arc::new(site.clone());
        let agent = tokio::spawn({
            let stop = stop.clone();
            async move {
                mainstay_agent::run(link, serving, stop).await;
                site.stop().await;
            }
        });
        Self { stop, agent }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.agent.await.unwrap();
    }
}

/// Waits until something is there.
pub(crate) async fn until<T>(what: &str, probe: impl AsyncFn() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/replay").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_answers_as_site_recovery_did() {
    let steps: Vec<Step> = read("recording.json");
    let mut rig = Rig::start().await;
    let mut found = BTreeSet::new();
    let mut begun = String::new();
    for (index, step) in steps.iter().enumerate() {
        let below = step.path.split("{vault}").nth(1).unwrap_or(&step.path);
        let mut name = format!("{} {below}", step.method);
        if step.method != "GET" {
            begun.clone_from(&name);
        } else if step.is_of_operation() {
            name = format!("operation of {begun}");
        }
        for difference in take(&mut rig, step, steps.get(index + 1)).await {
            found.insert(format!("{name} {difference}"));
        }
    }
    rig.stop().await;

    let known: Vec<Known> = read("differences.json");
    assert!(known.iter().all(|known| !known.reason.is_empty()), "a reason is missing");
    let listed: BTreeSet<String> = known.into_iter().flat_map(|known| known.differences).collect();
    let unlisted: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(
        unlisted.is_empty() && gone.is_empty(),
        "not listed in differences.json: {unlisted:#?}\nlisted, but the same: {gone:#?}"
    );
}

/// Takes a step and tells what differs.
async fn take(rig: &mut Rig, step: &Step, next: Option<&Step>) -> Vec<String> {
    if step.is_of_operation() && !rig.names.contains_key("operation") {
        // What was refused has no operation; that is told where it was refused.
        return Vec::new();
    }
    let is_end = step.body["status"] == "=Succeeded";
    if step.path.ends_with("/{item}") && step.method == "GET" {
        // The recorded VM had long been protected.
        until("the item is protected", async || (rig.protection_state().await == "Protected").then_some(()))
            .await;
    }
    let response = if step.is_of_operation() && is_end {
        until("the operation has ended", async || {
            let response = rig.ask(step).await;
            let status = response.status();
            let body: Value = response.json().await.unwrap();
            (body["status"] != "InProgress").then_some((status, header::HeaderMap::new(), body))
        })
        .await
    } else {
        let response = rig.ask(step).await;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.bytes().await.unwrap();
        let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
        (status, headers, body)
    };
    let (status, headers, body) = response;
    if step.method != "GET" {
        rig.names.remove("operation");
    }
    if status != StatusCode::from_u16(step.status).unwrap() {
        return vec![format!("status: recorded {}, here {}", step.status, status.as_u16())];
    }
    let mut differences = Vec::new();
    for (name, form) in &step.headers {
        let Some(value) = headers.get(name).and_then(|value| value.to_str().ok()) else {
            differences.push(format!("header {name}: missing"));
            continue;
        };
        let below = value.strip_prefix(rig.url.as_str()).unwrap_or(value);
        let (path, query) = below.split_once('?').unwrap_or((below, ""));
        let operation = path.rsplit('/').next().unwrap().to_owned();
        rig.names.insert("operation", operation);
        if !rig.filled(form).eq_ignore_ascii_case(path) || query != format!("api-version={API_VERSION}") {
            differences.push(format!("header {name}: another form"));
        }
    }
    // What was still under way there may have ended here.
    let expected = match next {
        Some(next) if step.is_of_operation() && !is_end && body["status"] == "Succeeded" => &next.body,
        _ => &step.body,
    };
    compare::shapes("", expected, &body, &mut differences);
    differences
}

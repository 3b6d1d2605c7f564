//! A server in the test's process, reached over the wire, and a vault with something in it.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use mainstay_api::{Client, Connection};
use mainstay_control::{
    Clock, Control,
    app::{ProviderRecord, Requester, VaultRecord},
    db::{Db, DiskRecord, ItemRecord, TargetRecord},
};
use mainstay_model::{ItemId, ItemState, Phase, ProviderId, ReplicationPolicy, VmId};
use mainstay_provider::{
    Acceleration, Discovery, Disk, DiskFormat, Firmware, HostFacts, Inventory, MacPolicy, Network,
    NetworkKind, Nic, NicPlan, PowerState, VirtualMachine,
};
use mainstay_server::{Running, ServerConfig, initialize, run_with_clock};
use mainstay_store::{Store, StoreOptions, local_storage};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use uuid::Uuid;

/// A server with its first administrator.
pub(crate) struct Server {
    _dir: tempfile::TempDir,
    clock: Arc<dyn Clock>,
    pub(crate) config: ServerConfig,
    pub(crate) running: Running,
    pub(crate) url: String,
    pub(crate) vault: VaultRecord,
    pub(crate) tenant: String,
    pub(crate) authority_pem: String,
    pub(crate) http: reqwest::Client,
    pub(crate) token: String,
    pub(crate) administrator: Client,
}

impl Server {
    pub(crate) async fn start(clock: Arc<dyn Clock>) -> Self {
        Self::start_with(clock, |_| {}).await
    }

    pub(crate) async fn start_with(clock: Arc<dyn Clock>, configure: impl FnOnce(&mut ServerConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut config = ServerConfig {
            data_dir: dir.path().join("server"),
            listen: anywhere,
            agent_listen: anywhere,
            ..ServerConfig::default()
        };
        configure(&mut config);
        let made = initialize(&config, "group", "vault").await.unwrap();
        let running = run_with_clock(&config, clock.clone()).await.unwrap();
        let url = format!("https://127.0.0.1:{}", running.api_address.port());
        let token = made.token.unwrap().0;
        let authority_pem = made.authority_pem;
        let administrator = client(&url, &authority_pem, &token);
        let authority = reqwest::Certificate::from_pem(authority_pem.as_bytes()).unwrap();
        let http = reqwest::Client::builder().tls_certs_only([authority]).build().unwrap();
        let tenant = made.vault.subscription.clone();
        Self {
            _dir: dir,
            clock,
            config,
            running,
            url,
            vault: made.vault,
            tenant,
            authority_pem,
            http,
            token,
            administrator,
        }
    }

    /// Stops the server, does something to what it left, and starts it again, elsewhere.
    pub(crate) async fn restart(self, between: impl AsyncFnOnce()) -> Self {
        self.running.stop().await;
        between().await;
        let running = run_with_clock(&self.config, self.clock.clone()).await.unwrap();
        let url = format!("https://127.0.0.1:{}", running.api_address.port());
        let administrator = client(&url, &self.authority_pem, &self.token);
        Self { running, url, administrator, ..self }
    }

    pub(crate) fn client(&self, token: &str) -> Client {
        client(&self.url, &self.authority_pem, token)
    }

    /// Address of something below the vault.
    pub(crate) fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.vault.id())
    }

    /// The control plane's records, read and written beside the server.
    pub(crate) async fn records(&self) -> Arc<Control> {
        let db = Db::open(&self.database()).await.unwrap();
        let dir = self.config.data_dir.join("records");
        let store = Store::open(local_storage(&dir).unwrap(), StoreOptions::default());
        Control::new(db, Arc::new(store), self.clock.clone())
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.config.data_dir.join("mainstay.db")
    }

    /// A connection to the API with nothing said on it yet.
    pub(crate) async fn connect(&self) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority_pem.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.running.api_address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// Sends a body as it is, and answers status and text.
    pub(crate) async fn send(&self, method: &str, path: &str, body: Option<Vec<u8>>) -> (u16, String) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }
}

fn client(url: &str, authority_pem: &str, token: &str) -> Client {
    let connection =
        Connection { url: url.to_owned(), authority_pem: authority_pem.to_owned(), token: token.to_owned() };
    Client::new(&connection).unwrap()
}

/// MAC address of the VM's only adapter.
pub(crate) const MAC: &str = "52:54:00:00:00:01";

/// Two fabrics with a host each that is away, a policy, a mapping, and a VM that is protected.
pub(crate) struct Seed {
    pub(crate) home: ProviderId,
    pub(crate) recovery: ProviderId,
    pub(crate) container: String,
    pub(crate) item: ItemRecord,
    /// A VM that is not protected.
    pub(crate) other_vm: VmId,
}

/// Puts it into a server's database.
pub(crate) async fn seed(control: &Arc<Control>) -> Seed {
    let by = || Requester("test".to_owned());
    for fabric in ["home", "away"] {
        control.create_fabric(fabric, by()).await.unwrap();
    }
    let policy = ReplicationPolicy {
        copy_frequency_seconds: 300,
        retention_hours: 24,
        app_consistent_frequency_hours: 0,
        bytes_per_second_max: None,
    };
    control.put_policy("policy", policy, by()).await.unwrap();
    control.put_container_mapping("home", "mapping", "policy", Some("away"), by()).await.unwrap();
    let (vm, other_vm) = (VmId(Uuid::new_v4()), VmId(Uuid::new_v4()));
    let home = host(control, "home", vec![machine(vm, "vm1"), machine(other_vm, "vm2")]).await;
    let recovery = host(control, "away", Vec::new()).await;
    let item = ItemRecord {
        id: ItemId(Uuid::new_v4()),
        name: "vm1".to_owned(),
        vm_name: "vm1".to_owned(),
        fabric: "home".to_owned(),
        primary_provider: home,
        recovery_fabric: "away".to_owned(),
        recovery_provider: recovery,
        vm,
        autostart: false,
        former_home: None,
        given_up: Vec::new(),
        policy: "policy".to_owned(),
        state: ItemState { phase: Phase::Protected, ..ItemState::new() },
        disks: vec![DiskRecord {
            key: "vda".to_owned(),
            size_bytes: 1 << 30,
            format: "Qcow2".to_owned(),
            is_os_disk: true,
            is_included: true,
        }],
        target: TargetRecord {
            name: "vm1".to_owned(),
            nics: vec![NicPlan {
                mac: MAC.to_owned(),
                network: None,
                mac_policy: MacPolicy::Keep,
                address: None,
            }],
            ..TargetRecord::default()
        },
        recovery_vm: None,
        test_vm: None,
        failover: None,
        stand_downs: Vec::new(),
        old_copy: None,
        not_started: None,
        scrub: mainstay_control::db::ScrubRecord::default(),
        replication: mainstay_control::db::ReplicationRecord::default(),
        created_ms: 0,
        last_failover_ms: None,
        last_test_failover_ms: None,
        resolved_errors: Vec::new(),
        version: 1,
    };
    put_item(control, &item).await;
    let container = control.fabric("home").await.unwrap().container();
    Seed { home, recovery, container, item, other_vm }
}

/// Puts an item back as it was.
pub(crate) async fn put_item(control: &Arc<Control>, item: &ItemRecord) {
    let mut transaction = control.db.begin().await.unwrap();
    transaction.remove_item(item.id).await.unwrap();
    transaction.insert_item(item).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn host(control: &Arc<Control>, fabric: &str, vms: Vec<VirtualMachine>) -> ProviderId {
    let network = |name: &str, kind| Network { name: name.to_owned(), kind };
    let id = ProviderId(Uuid::new_v4());
    let record = ProviderRecord {
        id,
        name: format!("{fabric}-host"),
        fabric: fabric.to_owned(),
        registered_ms: 0,
        last_seen_ms: 0,
        version: "1".to_owned(),
        discovery: Some(Discovery {
            host: HostFacts {
                name: format!("{fabric}-host"),
                hypervisor: "test".to_owned(),
                manager: "test".to_owned(),
                acceleration: Acceleration::Software,
                capabilities: Vec::new(),
                processors: 2,
                memory_bytes: 4 << 30,
                free_bytes: 1 << 40,
                findings: Vec::new(),
            },
            inventory: Inventory {
                vms,
                networks: vec![
                    network("lan", NetworkKind::Production),
                    network("island", NetworkKind::Isolated),
                ],
            },
            waiting: Vec::new(),
            generations: Vec::new(),
        }),
        discovered_ms: Some(0),
        public_key: None,
        has_connected: true,
    };
    let mut transaction = control.db.begin().await.unwrap();
    transaction.put_resource(&record).await.unwrap();
    transaction.commit().await.unwrap();
    id
}

fn machine(id: VmId, name: &str) -> VirtualMachine {
    VirtualMachine {
        id,
        name: name.to_owned(),
        power: PowerState::Running,
        firmware: Firmware::Bios,
        vcpus: 1,
        memory_bytes: 1 << 30,
        has_tpm: false,
        has_guest_agent: false,
        autostart: false,
        disks: vec![Disk {
            key: "vda".to_owned(),
            path: "/vda".to_owned(),
            format: DiskFormat::Qcow2,
            size_bytes: 1 << 30,
            is_os_disk: true,
            is_replicable: true,
        }],
        nics: vec![Nic { mac: MAC.to_owned(), network: "lan".to_owned(), addresses: Vec::new() }],
        findings: Vec::new(),
    }
}

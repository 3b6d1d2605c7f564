//! A whole lab: two sites, a server, an agent at each site, guests at home; real processes, as one would install them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use mainstay_api::{
    Client,
    arm::{List, ProtectableItemProperties, ProviderProperties, Resource},
    v1::Vault,
};
use nix::sys::{
    signal::Signal,
    statfs::{TMPFS_MAGIC, statfs},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::process::Command;
use uuid::Uuid;

use crate::{
    DiskImage, GuestImages, LabFile, LabSite, LabVm, LedgerVm, NotThere, Process, Site,
    guest::Fill,
    ledger::{self, Ledger},
};

/// The site where guests are made and protected.
pub const HOME: &str = "home";
/// The site where they are recovered.
pub const RECOVERY: &str = "recovery";

/// Where labs are made unless somebody chooses a place: the directory for temporary files, or the one for large ones where that is in
/// memory and nobody has chosen it (as on Debian 13), for disks have no place there, and nothing there can be made durable.
pub fn scratch_dir() -> PathBuf {
    let (usual, large) = (std::env::temp_dir(), Path::new("/var/tmp"));
    let is_in_memory = statfs(&usual).is_ok_and(|about| about.filesystem_type() == TMPFS_MAGIC);
    if is_in_memory && std::env::var_os("TMPDIR").is_none() && large.is_dir() {
        large.to_owned()
    } else {
        usual
    }
}

/// How long a component may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// What a lab is made with.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// How many guests.
    pub vms: usize,
    /// Size of each of a guest's two disks.
    pub disk_mib: u64,
    /// The format of the disks.
    pub format: DiskImage,
    /// Whether the agents reach the server through relays, so that the network of a site can be cut or made slow.
    pub has_relays: bool,
    /// Where the protected site's relay finds the server: across a line ([`crate::Wan`]), or else on this machine.
    pub far_server: Option<Ipv4Addr>,
    /// More words for the guests' kernel command line.
    pub guest_options: String,
    /// The `mainstay` binary.
    pub program: PathBuf,
    /// Kernel and initramfs of the guests.
    pub images: GuestImages,
}

impl LabOptions {
    /// A lab that has no guests yet and whose agents reach the server without relays.
    pub fn without_guests(program: PathBuf) -> Result<Self> {
        Ok(Self {
            vms: 0,
            disk_mib: 64,
            format: DiskImage::Qcow2,
            has_relays: false,
            far_server: None,
            guest_options: String::new(),
            program,
            images: GuestImages::find()?,
        })
    }
}

/// A lab in its directory.
pub struct Lab {
    dir: PathBuf,
    file: LabFile,
    home: Site,
    recovery: Site,
}

/// Whether the parts of a lab live.
#[derive(Clone, Debug, Serialize)]
pub struct LabStatus {
    /// The server.
    pub server: bool,
    /// Per site: agent, hypervisor, network to the server, VMs with their state.
    pub sites: Vec<SiteStatus>,
}

/// Whether the parts of a site live.
#[derive(Clone, Debug, Serialize)]
pub struct SiteStatus {
    /// The site.
    pub name: String,
    /// Its agent.
    pub agent: bool,
    /// Its libvirt daemon.
    pub hypervisor: bool,
    /// Its network to the server.
    pub link: bool,
    /// Its VMs: name and state.
    pub vms: Vec<(String, String)>,
}

/// The file that says that a directory is a lab's.
const MARK: &str = ".mainstay-lab";

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// The multicast group that stands for a site's production network: one port per site, from the free ones.
fn network(port: u16) -> String {
    format!("230.77.83.1:{port}")
}

impl Lab {
    /// Takes a directory for a lab: one that does not exist yet, or is empty, because all of it goes when the lab is taken down.
    pub fn claim(dir: &Path) -> Result<()> {
        if dir.join(MARK).exists() {
            bail!(
                "there is a lab in {} already; see `mainstay lab status`, or take it down first",
                dir.display()
            );
        }
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        if fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?.next().is_some() {
            bail!("{} is not empty; a lab wants a directory of its own, which goes with it", dir.display());
        }
        write(&dir.join(MARK), "A lab of Mainstay's: `mainstay lab down` removes this directory.\n")
    }

    /// Makes a lab and starts all of it.
    pub async fn up(dir: &Path, options: &LabOptions) -> Result<Self> {
        Self::claim(dir)?;
        Self::build(dir, options).await
    }

    /// Makes a lab in a directory that was [claimed](Self::claim) for it.
    pub async fn build(dir: &Path, options: &LabOptions) -> Result<Self> {
        let dir = dir.canonicalize()?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let (home, recovery) = (Site::open(&dir, HOME).await?, Site::open(&dir, RECOVERY).await?);
        let images = install(&dir, options)?;
        let ports = [free_port()?, free_port()?];
        // Others see it only where a line leads to it, and that is in a network of its own.
        let address = if options.far_server.is_some() { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST };
        let server_config = format!(
            "data_dir = {:?}\nlisten = \"127.0.0.1:{}\"\nagent_listen = \"{address}:{}\"\nnames = [\"127.0.0.1\", \"localhost\"]\n",
            dir.join("server"),
            ports[0],
            ports[1]
        );
        write(&dir.join("server.toml"), &server_config)?;
        let output = Command::new(program(&dir))
            .args(["server", "init", "--json", "--vault", "lab", "--resource-group", "lab", "--config"])
            .arg(dir.join("server.toml"))
            .output()
            .await?;
        if !output.status.success() {
            bail!("the server could not be initialised: {}", String::from_utf8_lossy(&output.stderr));
        }
        let made: Value = serde_json::from_slice(&output.stdout)?;
        let text = |key: &str| made.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let file = LabFile {
            url: format!("https://127.0.0.1:{}", ports[0]),
            ca_file: PathBuf::from(text("ca_file")),
            token: text("token"),
            subscription: text("subscription"),
            resource_group: text("resource_group"),
            vault: text("vault"),
            server_pid: 0,
            sites: Vec::new(),
            vms: Vec::new(),
        };
        let mut lab = Self { dir, file, home, recovery };
        lab.start_server().await?;
        for name in [HOME, RECOVERY] {
            let server = options.far_server.filter(|_| name == HOME).unwrap_or(Ipv4Addr::LOCALHOST);
            let relay_to = options.has_relays.then(|| SocketAddr::from((server, ports[1])));
            lab.add_site(name, relay_to).await?;
        }
        for number in 1..=options.vms {
            lab.add_vm(&format!("vm{number}"), options, &images).await?;
        }
        lab.file.write(&lab.dir)?;
        lab.discover().await?;
        lab.file.write(&lab.dir)?;
        Ok(lab)
    }

    /// Opens a lab that was made before.
    pub async fn open(dir: &Path) -> Result<Self> {
        let file = LabFile::read(dir)?;
        let dir = dir.canonicalize()?;
        let (home, recovery) = (Site::open(&dir, HOME).await?, Site::open(&dir, RECOVERY).await?);
        Ok(Self { dir, file, home, recovery })
    }

    /// What is written down.
    pub fn file(&self) -> &LabFile {
        &self.file
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A site.
    pub fn site(&self, name: &str) -> Result<&Site> {
        match name {
            HOME => Ok(&self.home),
            RECOVERY => Ok(&self.recovery),
            other => Err(NotThere::site(other, &format!("{HOME}, {RECOVERY}")).into()),
        }
    }

    pub(crate) fn home(&self) -> &Site {
        &self.home
    }

    pub(crate) fn recovery(&self) -> &Site {
        &self.recovery
    }

    /// A client of the lab's server.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::new(&self.file.connection()?)?)
    }

    /// Path of the vault's resources.
    pub fn vault_path(&self) -> String {
        Vault {
            subscription: self.file.subscription.clone(),
            resource_group: self.file.resource_group.clone(),
            name: self.file.vault.clone(),
            version: String::new(),
        }
        .path()
    }

    /// `relay_to`: the site has a relay, and this is where it leads to.
    async fn add_site(&mut self, name: &str, relay_to: Option<SocketAddr>) -> Result<()> {
        self.site(name)?.start().await?;
        let client = self.client()?;
        let path = format!("{}/replicationFabrics/{name}", self.vault_path());
        client.begin(reqwest::Method::PUT, &path, Some(&json!({ "properties": {} }))).await?;
        let site = self.site(name)?;
        let link_port = if relay_to.is_some() { Some(free_port()?) } else { None };
        // Empty: what registration answers.
        let server = link_port.map(|port| format!("127.0.0.1:{port}")).unwrap_or_default();
        let network = network(free_port()?);
        let data_dir = self.dir.join(name).join("agent");
        fs::create_dir_all(&data_dir)?;
        site.account().give(&data_dir)?;
        let config = format!(
            "data_dir = {data_dir:?}\nvm_dir = {0:?}\nrun_dir = {0:?}\nlibvirt_uri = {1:?}\nserver = {server:?}\nnetworks = [\"mcast:{network}\"]\nboot_id_file = {2:?}\n",
            site.driver_directory_short(),
            site.uri(),
            self.boot_id_file(name),
        );
        write(&self.agent_config(name), &config)?;
        self.note_boot(name)?;
        if let (Some(port), Some(to)) = (link_port, relay_to) {
            write(&self.link_port(name), &port.to_string())?;
            write(&self.link_to(name), &to.to_string())?;
        }
        self.register(name).await?;
        let libvirt_uri = site.uri().to_owned();
        self.file.sites.push(LabSite {
            name: name.to_owned(),
            fabric: name.to_owned(),
            libvirt_uri,
            agent_pid: 0,
            network: format!("mcast:{network}"),
        });
        if relay_to.is_some() {
            self.connect(name, None).await?;
        }
        self.start_agent(name).await?;
        self.wait_connected(name).await
    }

    /// Registers the agent of a site, for the first time or again.
    pub async fn register(&self, name: &str) -> Result<()> {
        let path = format!("/api/v1/fabrics/{name}/registrationKeys");
        let key: mainstay_api::v1::RegistrationKey = self.client()?.post(&path, &json!({})).await?;
        let output = self
            .site(name)?
            .account()
            .command(&program(&self.dir).to_string_lossy())
            .args(["agent", "register", "--name", name, "--config"])
            .arg(self.agent_config(name))
            .env("MAINSTAY_REGISTRATION_KEY", key.key)
            .output()
            .await?;
        if !output.status.success() {
            bail!(
                "the agent of site {name} could not be registered: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// The server lets in with another token than before.
    pub fn set_token(&mut self, token: &str) -> Result<()> {
        token.clone_into(&mut self.file.token);
        self.file.write(&self.dir)
    }

    fn agent_config(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("agent.toml")
    }

    /// The group of a site's production network, as a guest's network is given.
    pub fn network(&self, site: &str) -> Result<String> {
        let network = &self.file.site(site)?.network;
        Ok(network.strip_prefix("mcast:").unwrap_or(network).to_owned())
    }

    async fn add_vm(&mut self, name: &str, options: &LabOptions, images: &GuestImages) -> Result<()> {
        let vm = LedgerVm {
            disks: vec![options.format; 2],
            disk_mib: options.disk_mib,
            options: options.guest_options.clone(),
            network: Some(self.network(HOME)?),
            ..LedgerVm::new(name)
        };
        self.boot(&vm, images, &|_, _| Ok(())).await
    }

    /// Makes one more guest at home, of whatever kind, starts it and has the server find it. `fill` as in
    /// [`LedgerVm::create_with`].
    pub async fn add(&mut self, vm: &LedgerVm, fill: Fill<'_>) -> Result<()> {
        let images = GuestImages::in_directory(&self.dir.join("guest"))?;
        self.boot(vm, &images, fill).await?;
        self.discover().await?;
        self.file.write(&self.dir)
    }

    async fn boot(&mut self, vm: &LedgerVm, images: &GuestImages, fill: Fill<'_>) -> Result<()> {
        vm.create_with(&self.home, images, fill).await?;
        self.home.libvirt().start(vm.id, false).await?;
        self.file.vms.push(LabVm {
            name: vm.name.clone(),
            site: HOME.to_owned(),
            protectable_item_id: vm.id.to_string(),
        });
        Ok(())
    }

    /// Has the server read the sites anew, and writes the guests' ARM ids down.
    async fn discover(&mut self) -> Result<()> {
        let client = self.client()?;
        let providers: List<Resource<ProviderProperties>> =
            client.get(&format!("{}/replicationRecoveryServicesProviders", self.vault_path())).await?;
        for provider in providers.value {
            let path = format!("{}/refreshProvider", provider.id);
            client.begin(reqwest::Method::POST, &path, None::<&()>).await?;
        }
        let containers: List<Resource<Value>> = client
            .get(&format!("{}/replicationFabrics/{HOME}/replicationProtectionContainers", self.vault_path()))
            .await?;
        for container in containers.value {
            let found: Vec<Resource<ProtectableItemProperties>> =
                client.list(&format!("{}/replicationProtectableItems", container.id)).await?;
            for vm in &mut self.file.vms {
                if let Some(found) = found.iter().find(|found| found.properties.friendly_name == vm.name) {
                    vm.protectable_item_id.clone_from(&found.id);
                }
            }
        }
        Ok(())
    }

    fn server(&self) -> Process {
        Process::new(&self.dir, "server")
    }

    fn agent(&self, site: &str) -> Process {
        Process::new(&self.dir, &format!("agent-{site}"))
    }

    fn link(&self, site: &str) -> Process {
        Process::new(&self.dir, &format!("link-{site}"))
    }

    async fn start_server(&mut self) -> Result<()> {
        let mut command = Command::new(program(&self.dir));
        command.args(["server", "run", "--config"]).arg(self.dir.join("server.toml"));
        self.file.server_pid = self.server().start(command)?;
        let client = self.client()?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            match client.get::<Vault>("/api/v1/vault").await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline || self.server().pid().is_none() => {
                    bail!("the server is not ready: {error}\n{}", self.server().log_tail());
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    async fn start_agent(&mut self, name: &str) -> Result<()> {
        let site = self.site(name)?;
        let mut command = site.account().command(&program(&self.dir).to_string_lossy());
        command.args(["agent", "run", "--config"]).arg(self.agent_config(name));
        let pid = self.agent(name).start(command)?;
        if let Some(site) = self.file.sites.iter_mut().find(|site| site.name == name) {
            site.agent_pid = pid;
        }
        Ok(())
    }

    /// Waits until a site's agent is connected to the server.
    pub async fn wait_connected(&self, name: &str) -> Result<()> {
        let client = self.client()?;
        let path =
            format!("{}/replicationFabrics/{name}/replicationRecoveryServicesProviders", self.vault_path());
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let providers: List<Resource<ProviderProperties>> = client.get(&path).await?;
            if providers.value.iter().any(|provider| provider.properties.connection_status == "Connected") {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the agent of site {name} does not connect:\n{}", self.agent(name).log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Cuts the network between a site and the server.
    pub async fn cut(&self, site: &str) -> Result<()> {
        self.site(site)?;
        if !self.link_port(site).exists() {
            bail!("site {site} has no relay between its agent and the server; the lab was made without them");
        }
        self.link(site).end(Signal::SIGKILL).await
    }

    fn link_port(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("link-port")
    }

    fn link_to(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("link-to")
    }

    /// Brings the network between a site and the server back, at full speed.
    pub async fn heal(&self, site: &str) -> Result<()> {
        self.site(site)?;
        match fs::remove_file(self.slow_mark(site)) {
            Ok(()) => self.cut(site).await?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        self.connect(site, None).await
    }

    /// Says that the network of a site is slow.
    fn slow_mark(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("link-slow")
    }

    /// Makes the network between a site and the server slow, until it is healed. Connections break at the change.
    pub async fn slow(&self, site: &str, bytes_per_second: u64) -> Result<()> {
        self.cut(site).await?;
        write(&self.slow_mark(site), &bytes_per_second.to_string())?;
        self.connect(site, Some(bytes_per_second)).await
    }

    async fn connect(&self, site: &str, bytes_per_second: Option<u64>) -> Result<()> {
        let port = fs::read_to_string(self.link_port(site))
            .with_context(|| format!("the port of the relay of site {site}"))?;
        let to = fs::read_to_string(self.link_to(site))
            .with_context(|| format!("where the relay of site {site} leads to"))?;
        let mut command = Command::new(program(&self.dir));
        command.args(["lab", "link", "--listen", &format!("127.0.0.1:{}", port.trim()), "--to", to.trim()]);
        if let Some(bytes) = bytes_per_second {
            command.args(["--bytes-per-second", &bytes.to_string()]);
        }
        self.link(site).start(command)?;
        let address: SocketAddr = format!("127.0.0.1:{}", port.trim()).parse()?;
        let deadline = Instant::now() + READY_TIMEOUT;
        while tokio::net::TcpStream::connect(address).await.is_err() {
            if Instant::now() > deadline {
                bail!("the network of site {site} does not come up:\n{}", self.link(site).log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Breaks a component on purpose, or mends it.
    pub async fn act(&mut self, action: LabAction, component: &str) -> Result<()> {
        match component.split_once(':') {
            None if component == "server" => self.act_on_process(action, None).await?,
            Some(("agent", site)) => {
                self.site(site)?;
                self.act_on_process(action, Some(site)).await?;
            }
            Some(("hypervisor", site)) => {
                let site = self.site(site)?;
                match action {
                    LabAction::Kill => site.kill().await?,
                    LabAction::Stop => site.stop().await?,
                    LabAction::Start => site.start().await?,
                    LabAction::Pause => site.signal(Signal::SIGSTOP)?,
                    LabAction::Resume => site.signal(Signal::SIGCONT)?,
                }
            }
            Some(("host", site)) => self.act_on_host(action, site).await?,
            Some(("vm", name)) => self.act_on_vm(action, name).await?,
            _ => bail!(
                "'{component}' is not a component; there are: server, host:SITE, agent:SITE, hypervisor:SITE, vm:NAME[@SITE]"
            ),
        }
        self.note_pids();
        self.file.write(&self.dir)
    }

    async fn act_on_process(&mut self, action: LabAction, site: Option<&str>) -> Result<()> {
        let process = site.map_or_else(|| self.server(), |site| self.agent(site));
        match action {
            LabAction::Kill => process.end(Signal::SIGKILL).await,
            LabAction::Stop => process.end(Signal::SIGTERM).await,
            LabAction::Pause => process.signal(Signal::SIGSTOP),
            LabAction::Resume => process.signal(Signal::SIGCONT),
            LabAction::Start => match site {
                None => self.start_server().await,
                Some(site) => self.start_agent(site).await,
            },
        }
    }

    /// A host's power: without it agent, hypervisor and VMs are gone at once. Its start is a boot.
    async fn act_on_host(&mut self, action: LabAction, site: &str) -> Result<()> {
        match action {
            LabAction::Kill => {
                self.agent(site).end(Signal::SIGKILL).await?;
                self.site(site)?.lose_power().await
            }
            LabAction::Start => {
                self.note_boot(site)?;
                self.site(site)?.start().await?;
                self.start_agent(site).await
            }
            LabAction::Stop | LabAction::Pause | LabAction::Resume => {
                bail!("a host can be killed (its power is cut) and started (it boots)")
            }
        }
    }

    fn boot_id_file(&self, site: &str) -> PathBuf {
        self.dir.join(site).join("boot-id")
    }

    /// The site's host has booted.
    fn note_boot(&self, site: &str) -> Result<()> {
        write(&self.boot_id_file(site), &Uuid::new_v4().to_string())
    }

    async fn act_on_vm(&self, action: LabAction, name: &str) -> Result<()> {
        let (site, vm) = match name.split_once('@') {
            Some((name, site)) => {
                let site = self.site(site)?;
                (site, self.vm_at(site, name).await?)
            }
            None => self.vm(name, LedgerCopy::Active).await?,
        };
        let libvirt = site.libvirt();
        match action {
            LabAction::Kill => site.kill_vm(vm).await?,
            LabAction::Stop => libvirt.press_power_button(vm).await?,
            LabAction::Start => libvirt.start(vm, false).await?,
            LabAction::Pause => libvirt.suspend(vm).await?,
            LabAction::Resume => libvirt.resume(vm).await?,
        }
        Ok(())
    }

    /// Asks a guest's ledger, as soon as the guest answers.
    pub async fn ledger(&self, name: &str, copy: LedgerCopy, timeout: Duration) -> Result<Ledger> {
        let deadline = Instant::now() + timeout;
        loop {
            let asked = async {
                let (site, vm) = self.vm(name, copy).await?;
                ledger::query(site, vm).await
            };
            match asked.await {
                Ok(found) => return Ok(found),
                // No waiting brings it.
                Err(error) if error.is::<NotThere>() => return Err(error),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("the ledger of '{name}' does not answer")));
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    fn note_pids(&mut self) {
        self.file.server_pid = self.server().pid().unwrap_or(0);
        let pids: Vec<_> =
            self.file.sites.iter().map(|site| self.agent(&site.name).pid().unwrap_or(0)).collect();
        for (site, pid) in self.file.sites.iter_mut().zip(pids) {
            site.agent_pid = pid;
        }
    }

    /// Whether the parts live.
    pub async fn status(&self) -> Result<LabStatus> {
        let mut sites = Vec::new();
        for site in [&self.home, &self.recovery] {
            let hypervisor = site.is_alive();
            let mut vms = Vec::new();
            if hypervisor {
                for vm in site.libvirt().domains().await? {
                    let state = site.libvirt().state(vm).await?.power;
                    vms.push((site.libvirt().name(vm).await?, format!("{state:?}")));
                }
            }
            sites.push(SiteStatus {
                name: site.name().to_owned(),
                agent: self.agent(site.name()).pid().is_some(),
                hypervisor,
                link: self.link(site.name()).pid().is_some(),
                vms,
            });
        }
        Ok(LabStatus { server: self.server().pid().is_some(), sites })
    }

    /// Ends everything and removes the lab's directory. Works on a lab in any state.
    pub async fn down(dir: &Path) -> Result<()> {
        let dir = dir.canonicalize().with_context(|| format!("there is no {}", dir.display()))?;
        if !dir.join(MARK).exists() {
            bail!("{} is not a lab's directory; nothing was removed", dir.display());
        }
        for name in ["server", "agent-home", "agent-recovery", "link-home", "link-recovery"] {
            let process = Process::new(&dir, name);
            let signal = if name.starts_with("link") { Signal::SIGKILL } else { Signal::SIGTERM };
            process.end(signal).await?;
        }
        for name in [HOME, RECOVERY] {
            let site = Site::open(&dir, name).await?;
            site.power_off().await?;
            site.forget()?;
        }
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))
    }
}

/// What can be done to a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabAction {
    /// As a crash would end it.
    Kill,
    /// In an orderly way.
    Stop,
    /// Start it (again).
    Start,
    /// Freeze it.
    Pause,
    /// Thaw it.
    Resume,
}

/// Which copy of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerCopy {
    /// The one in production.
    Active,
    /// The one of a test failover.
    Test,
}

fn program(dir: &Path) -> PathBuf {
    dir.join("bin/mainstay")
}

/// Puts the binary and the guest's images where the lab's account can read them.
fn install(dir: &Path, options: &LabOptions) -> Result<GuestImages> {
    fs::create_dir_all(dir.join("bin"))?;
    fs::copy(&options.program, program(dir))
        .with_context(|| format!("copy {}", options.program.display()))?;
    fs::set_permissions(program(dir), fs::Permissions::from_mode(0o755))?;
    options.images.install(&dir.join("guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_made_for_a_lab_is_removed_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mine = dir.path().join("mine");
        fs::create_dir_all(mine.join(HOME)).unwrap();
        fs::write(mine.join("server.toml"), "precious").unwrap();
        assert!(Lab::claim(&mine).unwrap_err().to_string().contains("not empty"));
        assert!(Lab::down(&mine).await.unwrap_err().to_string().contains("nothing was removed"));
        assert!(mine.join("server.toml").exists() && !mine.join(MARK).exists());

        let lab = dir.path().join("new/lab");
        Lab::claim(&lab).unwrap();
        assert!(Lab::claim(&lab).unwrap_err().to_string().contains("there is a lab"));
        // Also one that was never built.
        Lab::down(&lab).await.unwrap();
        assert!(!lab.exists());
    }
}

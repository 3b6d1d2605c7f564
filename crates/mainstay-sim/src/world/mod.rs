//! Two sites, a server and what a test does to them.

mod calm;
mod check;
mod network;
mod process;
mod rot;
mod snapshot;
mod verbs;
mod wire;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mainstay_control::{
    Control, ManualClock,
    app::{HostRegistration, ProviderRecord},
    db::ItemRecord,
    jobs::Faults,
};
use mainstay_model::{Phase, ProviderId, ReplicationPolicy, VmId};
use mainstay_provider::PowerState;
use mainstay_store::VaultKey;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    Oracle, SimHypervisor, SimStorage,
    files::Watch,
    turns::{self, Process},
};
use network::Network;
use process::{Server, start_agent, start_server, wait_until_closed};

pub use calm::Shipped;
pub use rot::Legible;
pub use snapshot::Snapshot;
pub use verbs::JobEnd;
use verbs::by;
pub use wire::Direction;

/// The disks of every simulated VM: one of whole blocks, and one whose last block is a piece.
pub(crate) const DISKS: [(&str, u64); 2] = [("vda", 64 * 4096), ("vdb", 16 * 4096 + 512)];
/// How long anything that is waited for may take, by the clock of the runtimes.
const WAIT_MAX: Duration = Duration::from_secs(600);
/// How often a condition is looked at when nothing says that it may have changed: a few of the steps that anything takes.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Where the clock begins.
const CLOCK_START_MS: i64 = crate::chance::BEGIN_MS.cast_signed();

/// How a world begins.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Names of the VMs at home; all run.
    pub vms: Vec<String>,
    /// Whether trackers die whenever a VM stops.
    pub volatile_trackers: bool,
    /// Whether the protected site has a second host, without VMs.
    pub has_spare: bool,
    /// Whether the store is encrypted.
    pub is_encrypted: bool,
    /// Of what the world draws itself: what a crash leaves of the storage, and when its trouble strikes.
    pub seed: u64,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self {
            vms: vec!["web".to_owned()],
            volatile_trackers: false,
            has_spare: false,
            is_encrypted: false,
            seed: 0,
        }
    }
}

/// Which host; `true` is home, `false` the recovery site's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The protected site's first.
    Home,
    /// The protected site's second, where there is one.
    Spare,
    /// The recovery site's.
    Recovery,
}

impl From<bool> for Place {
    fn from(is_home: bool) -> Self {
        if is_home { Self::Home } else { Self::Recovery }
    }
}

/// What a server's machine held at a moment.
pub struct ServerSnapshot(BTreeMap<object_store::path::Path, bytes::Bytes>);

/// A host with its agent.
pub struct Host {
    /// Its identifier at the server.
    pub provider: ProviderId,
    /// What is on it, whether its agent lives or not.
    pub hypervisor: SimHypervisor,
    /// The agent's records.
    pub data_dir: PathBuf,
    /// The agent's sockets.
    pub run_dir: PathBuf,
    /// How often the host was booted again.
    boots: u32,
    agent: Option<Process>,
}

/// Everything.
pub struct World {
    /// The protected site.
    pub home: Host,
    /// A second host of the protected site.
    pub spare: Option<Host>,
    /// The recovery site.
    pub recovery: Host,
    /// The time of server and hosts.
    pub clock: Arc<ManualClock>,
    /// What every disk held at every capture.
    pub oracle: Arc<Oracle>,
    /// What the server's store writes into.
    pub storage: SimStorage,
    /// What the store is encrypted with, as text.
    vault_key: Option<String>,
    network: Arc<Network>,
    server: Option<Server>,
    faults: Mutex<Option<Arc<dyn Faults>>>,
    /// What of the files of agents and server is durable.
    files: Arc<Watch>,
    // Last, so that it is removed when nothing writes into it any more.
    dir: TempDir,
}

/// Identifier of a VM at home by its name.
pub(crate) fn vm_named(name: &str) -> VmId {
    let mut bytes = [0x40; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    VmId(Uuid::from_bytes(bytes))
}

/// A directory in memory where there is one: what a power cut leaves of it is drawn.
fn make_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    // Nobody else's: a name that is taken would have another one drawn, which only some runs of a seed would do.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let prefix = format!("sim-{}-{}-", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    match memory.is_dir() {
        true => builder.tempdir_in(memory),
        false => builder.tempdir(),
    }
    .expect("a directory")
}

fn remove_files(dir: &Path) {
    if dir.exists() {
        std::fs::remove_dir_all(dir).expect("a directory is removed");
    }
}

/// Copies a database that is closed: the file and its log.
fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).into_iter().flatten() {
        let entry = entry.expect("a directory is read");
        // The index of the log is made anew.
        if !entry.file_name().to_string_lossy().ends_with("-shm") {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a file is copied");
        }
    }
}

impl World {
    /// A world in which nothing is protected yet.
    pub async fn new(options: WorldOptions) -> Self {
        let dir = make_dir();
        let files = Arc::new(Watch::begin(dir.path()));
        let clock = Arc::new(ManualClock::default());
        clock.advance_ms(CLOCK_START_MS);
        let oracle = Arc::new(Oracle::new(clock.clone()));
        let storage = SimStorage::new(options.seed);
        let network = Network::new(options.seed);
        let database = dir.path().join("database");
        std::fs::create_dir_all(&database).expect("a directory");
        files.note_all(&database).expect("a directory is read");
        let vault_key =
            options.is_encrypted.then(|| VaultKey::generate().expect("random bytes for a key").to_text());
        let server =
            start_server(database.join("db"), storage.clone(), clock.clone(), vault_key.clone()).await;
        let control = server.control.clone();
        let has_spare = options.has_spare;
        let setup = server.process.handle().spawn(async move { set_up(&control, has_spare).await });
        let (home, recovery, spare) = setup.await.expect("the server is set up");
        network.set_server(Some((server.process.handle().clone(), server.control.clone())));
        let host = async |name: &str, provider: ProviderId| {
            let hypervisor = SimHypervisor::new(name, oracle.clone());
            let (data_dir, run_dir) = (dir.path().join(name).join("data"), dir.path().join(name).join("run"));
            for directory in [&data_dir, &run_dir] {
                std::fs::create_dir_all(directory).expect("a directory");
            }
            files.note_all(&data_dir).expect("a directory is read");
            Host { provider, hypervisor, data_dir, run_dir, boots: 0, agent: None }
        };
        let home = host("home", home).await;
        let recovery = host("recovery", recovery).await;
        let spare = match spare {
            Some(spare) => Some(host("spare", spare).await),
            None => None,
        };
        for name in &options.vms {
            home.hypervisor.add_vm(vm_named(name), name, &DISKS);
        }
        if options.volatile_trackers {
            home.hypervisor.make_trackers_volatile();
            recovery.hypervisor.make_trackers_volatile();
        }
        let mut world = Self {
            home,
            spare,
            recovery,
            clock,
            oracle,
            storage,
            vault_key,
            network,
            server: Some(server),
            dir,
            files,
            faults: Mutex::default(),
        };
        for name in &options.vms {
            mainstay_provider::Hypervisor::start(&world.home.hypervisor, vm_named(name))
                .await
                .expect("the VM starts");
        }
        world.start_agents().await;
        world
    }

    async fn start_agents(&mut self) {
        for host in [&mut self.home, &mut self.recovery].into_iter().chain(&mut self.spare) {
            if host.agent.is_none() {
                host.agent = Some(start_agent(&self.network, host).await);
            }
        }
        let hosts: Vec<_> = self.hosts().map(|host| host.provider).collect();
        self.until("all agents are connected", async |world| {
            hosts.iter().all(|host| world.control().sites.is_connected(*host))
        })
        .await;
        for host in hosts {
            // Fails when the agent has been cut off in the same moment; what needs it says so.
            let refreshed = self.ask(async move |control| control.refresh_provider(host).await).await;
            if let Err(error) = refreshed {
                tracing::debug!(%error, "a host could not be read");
            }
        }
    }

    /// All hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        [&self.home, &self.recovery].into_iter().chain(&self.spare)
    }

    /// The host at which an item is at home.
    pub fn home_of(&self, item: &ItemRecord) -> &Host {
        self.spare.as_ref().filter(|spare| spare.provider == item.primary_provider).unwrap_or(&self.home)
    }

    /// The copy of an item's VM at a host that must not run. A VM that moved to another host behind our back is none while it is
    /// at home there.
    pub fn old_copy(&self, item: &ItemRecord, host: &Host) -> Option<VmId> {
        let is_known = host.provider == item.primary_provider || host.provider == item.recovery_provider;
        let is_away = item.state.phase.active_location() == mainstay_model::Location::Recovery;
        match is_known {
            true => item.inactive_vm_at(host.provider),
            false => (is_away || item.given_up.contains(&host.provider)).then_some(item.vm),
        }
    }

    /// The control plane that runs now. Must not be kept across [`World::restart_server`].
    pub fn control(&self) -> &Arc<Control> {
        &self.server.as_ref().expect("the server runs").control
    }

    /// Does something within the server's process.
    pub async fn ask<R: Send + 'static, F: Future<Output = R> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Control>) -> F,
    ) -> R {
        let server = self.server.as_ref().expect("the server runs");
        server.process.handle().spawn(work(server.control.clone())).await.expect("the server answers")
    }

    /// Installs faults in the job engine, of this server's process and of those that follow it.
    pub fn set_faults(&self, faults: Option<Arc<dyn Faults>>) {
        self.control().engine.set_faults(faults.clone());
        *self.faults.lock().expect("no test panics here") = faults;
    }

    /// Kills the server and starts it over the same database and storage.
    pub async fn restart_server(&mut self) {
        self.restart_server_after(|_, _| {}).await;
    }

    /// Kills the server, keeps a copy of its database in the place of an earlier one, and starts it again.
    pub async fn back_up_database(&mut self) {
        self.restart_server_after(|database, backup| {
            remove_files(backup);
            copy_files(database, backup);
        })
        .await;
    }

    /// As a snapshot of the server's machine does: keeps copies of its database and of its store.
    pub async fn take_server_snapshot(&mut self) -> ServerSnapshot {
        self.back_up_database().await;
        ServerSnapshot(self.storage.copy())
    }

    /// Sets the server's machine back to the snapshot that was taken last.
    pub async fn revert_server(&mut self, snapshot: &ServerSnapshot) {
        let storage = self.storage.clone();
        self.restart_server_after(|database, backup| {
            remove_files(database);
            copy_files(backup, database);
            storage.replace(&snapshot.0);
        })
        .await;
    }

    /// The server's database is lost and replaced by the copy that was kept, or by an empty one when none was.
    pub async fn restore_database(&mut self) {
        self.lose_database_after(copy_files).await;
    }

    /// The server's database is lost.
    pub async fn lose_database(&mut self) {
        self.lose_database_after(|_, _| {}).await;
    }

    async fn lose_database_after(&mut self, replace: impl FnOnce(&Path, &Path)) {
        // What was asked for a moment ago may be lost with the database, what has been begun may not: where the storage takes it,
        // the catalogue has it before.
        if self.storage.end_trouble() {
            self.ask(|control| async move { control.reconcile_catalogue().await })
                .await
                .expect("the catalogue is written");
        }
        let files = self.files.clone();
        self.restart_server_after(|database, backup| {
            remove_files(database);
            std::fs::create_dir_all(database).expect("a directory");
            replace(backup, database);
            files.note_all(database).expect("a database is read");
        })
        .await;
    }

    /// Cuts the power of the server's machine: of its database is left what was synced, and some of what came later.
    pub async fn cut_server_power(&mut self) {
        let files = self.files.clone();
        let left =
            files.after_power_cut(&self.dir.path().join("database"), &mut |below| turns::draw(0..below));
        let left = left.expect("a database is read");
        self.restart_server_after(|database, _| {
            files.replace(database, &left).expect("a database is replaced");
        })
        .await;
    }

    async fn restart_server_after(&mut self, meanwhile: impl FnOnce(&Path, &Path)) {
        self.network.set_server(None);
        let Server { process, control } = self.server.take().expect("the server runs");
        drop(control);
        process.kill().await;
        self.storage.crash();
        let database = self.dir.path().join("database");
        wait_until_closed(&database);
        meanwhile(&database, &self.dir.path().join("backup"));
        let (storage, clock, vault_key) = (self.storage.clone(), self.clock.clone(), self.vault_key.clone());
        let server = start_server(database.join("db"), storage, clock, vault_key).await;
        self.network.set_server(Some((server.process.handle().clone(), server.control.clone())));
        self.server = Some(server);
        let faults = self.faults.lock().expect("no test panics here").clone();
        self.control().engine.set_faults(faults);
        self.ask(|control| async move { control.resume_jobs().await }).await.expect("jobs go on");
    }

    /// The server's database.
    pub fn database(&self) -> PathBuf {
        self.dir.path().join("database").join("db")
    }

    /// A host; panics where there is none.
    pub fn host(&self, at: Place) -> &Host {
        match at {
            Place::Home => &self.home,
            Place::Recovery => &self.recovery,
            Place::Spare => self.spare.as_ref().expect("the world has a spare host"),
        }
    }

    fn host_mut(&mut self, at: Place) -> &mut Host {
        match at {
            Place::Home => &mut self.home,
            Place::Recovery => &mut self.recovery,
            Place::Spare => self.spare.as_mut().expect("the world has a spare host"),
        }
    }

    /// Kills an agent and starts it over the same host and data directory.
    pub async fn restart_agent(&mut self, at: impl Into<Place>) {
        let network = self.network.clone();
        let host = self.host_mut(at.into());
        if let Some(agent) = host.agent.take() {
            agent.kill().await;
        }
        host.agent = Some(start_agent(&network, host).await);
    }

    /// Cuts a host's power and boots it again: VMs, agent and all that the agent had not synced are gone, and the hypervisor starts
    /// what it is told to start, before anybody can be asked.
    pub async fn reboot(&mut self, at: impl Into<Place>) {
        let (files, network) = (self.files.clone(), self.network.clone());
        let host = self.host_mut(at.into());
        let left = files.after_power_cut(&host.data_dir, &mut |below| turns::draw(0..below));
        let left = left.expect("an agent's files are read");
        if let Some(agent) = host.agent.take() {
            agent.kill().await;
        }
        files.replace(&host.data_dir, &left).expect("an agent's files are replaced");
        remove_files(&host.run_dir);
        std::fs::create_dir_all(&host.run_dir).expect("a directory");
        host.boots += 1;
        host.hypervisor.reboot().await;
        host.agent = Some(start_agent(&network, host).await);
    }

    /// Cuts a site off.
    pub fn cut(&self, at: impl Into<Place>) {
        self.network.cut(self.host(at.into()).provider);
    }

    /// Cuts a site off in one direction: what is on its way waits.
    pub fn stall(&self, at: impl Into<Place>, direction: Direction) {
        self.network.stall(self.host(at.into()).provider, direction);
    }

    /// Makes everything between a site and the server late.
    pub fn slow_down(&self, at: impl Into<Place>) {
        self.network.slow_down(self.host(at.into()).provider);
    }

    /// Breaks a site's connection within the next message in a direction.
    pub fn break_off(&self, at: impl Into<Place>, direction: Direction) {
        self.network.break_off(self.host(at.into()).provider, direction);
    }

    /// Connects a site again, in good weather.
    pub fn mend(&self, at: impl Into<Place>) {
        self.network.mend(self.host(at.into()).provider);
    }

    /// Connects all hosts again.
    pub fn mend_all(&self) {
        self.hosts().for_each(|host| self.network.mend(host.provider));
    }

    /// Breaks a site's connections for a moment.
    pub fn hiccup(&self, at: impl Into<Place>) {
        self.network.hiccup(self.host(at.into()).provider);
    }

    /// The item of a VM.
    pub async fn item(&self, name: &str) -> Option<ItemRecord> {
        let items =
            self.ask(|control| async move { control.db.items().await }).await.expect("items are read");
        items.iter().find(|item| item.name == name).map(|item| ItemRecord::clone(item))
    }

    /// The phase of a VM's item.
    pub async fn phase(&self, name: &str) -> Option<Phase> {
        self.item(name).await.map(|item| item.state.phase)
    }

    /// The host and VM that run the item's workload now, by the item's phase.
    pub async fn active(&self, name: &str) -> (&Host, VmId) {
        match self.item(name).await {
            Some(item) if item.state.phase.active_location() == mainstay_model::Location::Recovery => {
                // While another recovery point is being chosen there is none.
                (&self.recovery, item.recovery_vm.map_or(item.vm, |copy| copy.vm))
            }
            Some(item) => (self.home_of(&item), item.vm),
            None => {
                let vm = vm_named(name);
                let spare = self.spare.as_ref().filter(|spare| spare.hypervisor.view(vm).is_some());
                (spare.unwrap_or(&self.home), vm)
            }
        }
    }

    /// The VM at home of that name, whether it is protected or not.
    pub fn home_vm(&self, name: &str) -> VmId {
        vm_named(name)
    }

    /// The guest writes blocks wherever it runs; answers whether it runs and has them.
    pub async fn write(&self, name: &str, blocks: &[(&str, u64, u8)]) -> bool {
        let (host, vm) = self.active(name).await;
        if host.hypervisor.view(vm).is_none_or(|view| view.power != PowerState::Running) {
            return false;
        }
        blocks.iter().all(|(disk, block, fill)| host.hypervisor.guest_write(vm, disk, *block, *fill).is_ok())
    }

    /// Waits until a condition holds.
    pub async fn until(&self, what: &str, condition: impl AsyncFn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + WAIT_MAX;
        loop {
            let changed = self.control().changed.notified();
            if condition(self).await {
                return;
            }
            if tokio::time::Instant::now() > deadline {
                let (items, jobs) = self
                    .ask(|control| async move { (control.db.items().await, control.db.open_jobs().await) })
                    .await;
                panic!(
                    "waited in vain until {what}; open jobs {jobs:#?}; items {items:#?}; home {:?}; recovery {:?}",
                    self.home.hypervisor.summary(),
                    self.recovery.hypervisor.summary()
                );
            }
            // Most conditions follow from the control plane's changes, the others are seen a little later.
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }
}

async fn register(control: &Control, secret: &str, name: &str) -> ProviderRecord {
    let host = HostRegistration { name, version: "sim", public_key: None };
    control.register_host(secret, host).await.expect("a host")
}

async fn set_up(control: &Arc<Control>, has_spare: bool) -> (ProviderId, ProviderId, Option<ProviderId>) {
    let policy = ReplicationPolicy {
        copy_frequency_seconds: 5,
        retention_hours: 24,
        app_consistent_frequency_hours: 0,
        bytes_per_second_max: None,
    };
    let mut providers = Vec::new();
    for fabric in ["home", "recovery"] {
        control.create_fabric(fabric, by()).await.expect("a fabric");
        let (_, secret) = control.create_registration_key(fabric).await.expect("a key");
        let host = register(control, &secret.0, fabric).await;
        providers.push(host.id);
    }
    control.put_policy("policy", policy, by()).await.expect("a policy");
    control
        .put_container_mapping("home", "mapping", "policy", Some("recovery"), by())
        .await
        .expect("a mapping");
    let spare = if has_spare {
        let (_, secret) = control.create_registration_key("home").await.expect("a key");
        Some(register(control, &secret.0, "spare").await.id)
    } else {
        None
    };
    (providers[0], providers[1], spare)
}

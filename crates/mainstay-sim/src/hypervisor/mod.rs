//! A host in memory: what an agent finds when it starts, and what outlives it.

mod administrator;
mod capture;
mod faults;
mod machine;
mod recovery;
mod staging;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use mainstay_block::BLOCK_BYTES;
use mainstay_model::VmId;
use mainstay_provider::{
    Acceleration, Capability, Capture, CaptureRequest, Disk, DiskFormat, ErrorKind, Firmware, GuestAddress,
    HostFacts, Hydration, Hypervisor, Inventory, Network, NetworkKind, PowerState, RecoveryVmSpec,
    ShutdownOutcome, SiteError, Staging, StagingSpec, TrackerId, VirtualMachine, VmDefinition, WhenOff,
};

use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};

use crate::Oracle;
use faults::FaultPlan;
use machine::{BOOT_BLOCK, Machine, MachineDisk, SHUTDOWN_BLOCK, Shape, mark};

pub use faults::HostFault;

/// The tracker that is always there.
const CREATION_TRACKER: &str = "creation";

fn failed(error: impl std::fmt::Display) -> SiteError {
    SiteError::new(ErrorKind::Failed, error.to_string())
}

/// A simulated host. Clones are the same host.
#[derive(Clone)]
pub struct SimHypervisor {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    oracle: Arc<Oracle>,
    faults: FaultPlan,
    state: Mutex<State>,
    /// How far the host's clock is ahead of the server's, in milliseconds.
    clock_offset_ms: AtomicI64,
    /// VMs that the agent has started, and when in the order of [`moment`].
    started: Mutex<Vec<(u64, VmId)>>,
}

/// Counts up with every start by an agent, and every look.
static MOMENTS: AtomicU64 = AtomicU64::new(0);

/// This moment in the order of agents' starts.
pub fn moment() -> u64 {
    MOMENTS.fetch_add(1, Ordering::SeqCst)
}

#[derive(Default)]
pub(crate) struct State {
    vms: BTreeMap<VmId, Machine>,
    openings: u64,
    /// Whether a VM's trackers die with every stop, as those of raw disks do.
    trackers_are_volatile: bool,
    /// Whether guests ignore the power button.
    guests_refuse: bool,
    /// How many starts are ended as soon as they are done.
    starts_ended: u32,
    /// Why the host cannot run recovery VMs; empty = it can.
    confinement: String,
    /// How often the sizes of a VM's disks will not be told.
    sizes_withheld: usize,
}

impl State {
    fn machine(&mut self, vm: VmId) -> Result<&mut Machine, SiteError> {
        self.vms
            .get_mut(&vm)
            .ok_or_else(|| SiteError::new(ErrorKind::NotFound, format!("there is no VM {vm}")))
    }

    fn describe(&mut self, vm: VmId) -> Result<VirtualMachine, SiteError> {
        let mut machine = self.machine(vm)?.describe(vm);
        if let Some(left) = self.sizes_withheld.checked_sub(1) {
            self.sizes_withheld = left;
            machine.disks.iter_mut().for_each(|disk| disk.size_bytes = 0);
        }
        Ok(machine)
    }

    fn next_opening(&mut self) -> u64 {
        self.openings += 1;
        self.openings
    }

    fn stop(&mut self, vm: VmId) -> Result<(), SiteError> {
        let volatile = self.trackers_are_volatile;
        let machine = self.machine(vm)?;
        machine.power = PowerState::Off;
        machine.end_captures();
        if volatile {
            machine.trackers.clear();
        }
        Ok(())
    }
}

/// A VM as a test sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmView {
    /// Its identifier.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub power: PowerState,
    /// Whether a recovery VM, and then whether a test copy.
    pub recovery: Option<bool>,
    /// Whether the host starts it.
    pub autostart: bool,
    /// Trackers of ours.
    pub trackers: usize,
    /// Open captures.
    pub captures: usize,
    /// Whether changes are staged over its disks.
    pub is_staged: bool,
    /// What its disks held when it was first started since it was made, or since something was merged into them; by their keys.
    pub started_from: Option<Arc<BTreeMap<String, Vec<u8>>>>,
}

/// Zeroes what a guest writes when it boots and is shut down.
pub(crate) fn forget_boots(disks: &mut [Vec<u8>]) {
    let Some(disk) = disks.first_mut() else { return };
    for (block, _) in [BOOT_BLOCK, SHUTDOWN_BLOCK] {
        disk[(block * BLOCK_BYTES) as usize..((block + 1) * BLOCK_BYTES) as usize].fill(0);
    }
}

/// Fills from which on a block's content cannot be compressed.
const NOISE: u8 = 0x60;

/// What the guest writes into a block. Two blocks of one fill differ, so that a block in the wrong place is noticed.
fn content(block: u64, fill: u8) -> Vec<u8> {
    let mut data = vec![fill; BLOCK_BYTES as usize];
    if fill >= NOISE {
        StdRng::seed_from_u64(block << 8 | u64::from(fill)).fill_bytes(&mut data);
    }
    if fill != 0 {
        data[..8].copy_from_slice(&block.to_le_bytes());
    }
    data
}

// What a test does to a host.
impl SimHypervisor {
    /// A host without VMs.
    pub fn new(name: &str, oracle: Arc<Oracle>) -> Self {
        let inner = Inner {
            name: name.to_owned(),
            oracle,
            faults: FaultPlan::default(),
            state: Mutex::default(),
            clock_offset_ms: AtomicI64::new(0),
            started: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn oracle(&self) -> &Oracle {
        &self.inner.oracle
    }

    fn clock_offset_ms(&self) -> i64 {
        self.inner.clock_offset_ms.load(Ordering::SeqCst)
    }

    /// Sets the host's clock, relative to the server's.
    pub fn set_clock_offset_ms(&self, offset_ms: i64) {
        self.inner.clock_offset_ms.store(offset_ms, Ordering::SeqCst);
    }

    /// Adds a VM that is off, with zeroed disks.
    pub fn add_vm(&self, id: VmId, name: &str, disks: &[(&str, u64)]) {
        let machine = Machine {
            name: name.to_owned(),
            power: PowerState::Off,
            autostart: true,
            shape: Shape {
                vcpus: 2,
                memory_bytes: 1 << 30,
                nics: vec![("52:54:00:00:00:01".to_owned(), "lan".to_owned())],
                boots: 0,
            },
            recovery: None,
            disks: disks.iter().map(|(key, size)| MachineDisk::new(key, vec![0; *size as usize])).collect(),
            detached: Vec::new(),
            trackers: HashMap::new(),
            captures: HashMap::new(),
            are_captures_stale: false,
            staging: None,
            is_made: false,
            started_from: None,
            addresses: Vec::new(),
        };
        self.lock().vms.insert(id, machine);
    }

    /// The next `times` calls of a method of the trait go wrong.
    pub fn inject(&self, method: &'static str, fault: HostFault, times: usize) {
        self.inner.faults.add(method, fault, times);
    }

    /// How many faults of a method have not happened yet.
    pub fn faults_left(&self, method: &str) -> usize {
        self.inner.faults.left(method)
    }

    /// Forgets all faults that have not happened yet.
    pub fn clear_faults(&self) {
        self.inner.faults.clear();
    }

    /// Waits until a call hangs that was injected to.
    pub async fn wait_for_hang(&self) {
        self.inner.faults.wait_for_hang().await;
    }

    /// The next `times` descriptions of a VM say nothing of its disks' sizes, as where an image is away.
    pub fn withhold_sizes(&self, times: usize) {
        self.lock().sizes_withheld = times;
    }

    /// From now on trackers die whenever a VM stops.
    pub fn make_trackers_volatile(&self) {
        self.lock().trackers_are_volatile = true;
    }

    /// Whether guests ignore the power button from now on.
    pub fn let_guests_refuse(&self, refuse: bool) {
        self.lock().guests_refuse = refuse;
    }

    /// The next `times` VMs that are started are off again at once: libvirt's daemon, killed while it starts a VM, ends it at its
    /// own next start.
    pub fn end_starts(&self, times: u32) {
        self.lock().starts_ended = times;
    }

    /// Why the host says from now on that it cannot run recovery VMs; empty = it can.
    pub fn confine(&self, reason: &str) {
        reason.clone_into(&mut self.lock().confinement);
    }

    /// The guest writes a block; refused when it does not run.
    pub fn guest_write(&self, vm: VmId, key: &str, block: u64, fill: u8) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        if machine.power != PowerState::Running {
            return Err(SiteError::new(ErrorKind::Refused, format!("'{}' does not run", machine.name)));
        }
        let disk = machine.disk(key)?;
        if block * BLOCK_BYTES >= machine.disks[disk].size() {
            return Err(SiteError::new(ErrorKind::Refused, format!("block {block} lies outside {key}")));
        }
        machine.write_block(disk, block, &content(block, fill));
        Ok(())
    }

    /// Somebody with access to the host writes to a disk.
    pub fn tamper(&self, vm: VmId, key: &str, block: u64, fill: u8) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        let disk = machine.disk(key)?;
        // Behind the back of every tracker.
        let trackers = std::mem::take(&mut machine.trackers);
        machine.write_block(disk, block, &mark(fill));
        machine.trackers = trackers;
        Ok(())
    }

    /// The process that runs the VM is killed: it is off and its trackers are lost.
    pub fn crash_vm(&self, vm: VmId) -> Result<(), SiteError> {
        let mut state = self.lock();
        state.stop(vm)?;
        state.machine(vm)?.trackers.clear();
        Ok(())
    }

    /// The power fails and comes back: every VM has crashed, and those with autostart run again.
    pub(crate) async fn reboot(&self) {
        let vms: Vec<_> = self.views().into_iter().map(|view| (view.id, view.autostart)).collect();
        for (vm, autostart) in vms {
            self.crash_vm(vm).expect("the VM is there");
            if autostart && let Err(error) = self.start_with(vm, None).await {
                tracing::debug!(%vm, %error, "autostart failed");
            }
        }
    }

    /// The VM is gone, with its disks.
    pub fn destroy_vm(&self, vm: VmId) {
        self.lock().vms.remove(&vm);
    }

    /// Loses the VM's trackers.
    pub fn lose_trackers(&self, vm: VmId) -> Result<(), SiteError> {
        self.lock().machine(vm)?.trackers.clear();
        Ok(())
    }

    /// What the VM's disks hold, without what is staged.
    pub async fn disks(&self, vm: VmId) -> Result<Vec<Vec<u8>>, SiteError> {
        let bases = self.bases(vm).await?;
        Ok(self.lock().machine(vm)?.contents(bases))
    }

    /// As [`Self::disks`], by their keys.
    pub async fn disks_by_key(&self, vm: VmId) -> Result<BTreeMap<String, Vec<u8>>, SiteError> {
        let contents = self.disks(vm).await?;
        let mut state = self.lock();
        let keys = state.machine(vm)?.disks.iter().map(|disk| disk.key.clone());
        Ok(keys.zip(contents).collect())
    }

    /// What a recovery VM's disks held when it was made.
    pub async fn created_from(&self, vm: VmId) -> Result<Vec<Vec<u8>>, SiteError> {
        let mut bases = self.bases(vm).await?;
        for (base, disk) in bases.iter_mut().zip(&self.lock().machine(vm)?.disks) {
            base.truncate(disk.exported as usize);
        }
        Ok(bases)
    }

    /// All VMs.
    pub fn views(&self) -> Vec<VmView> {
        let view = |(id, machine): (&VmId, &Machine)| VmView {
            id: *id,
            name: machine.name.clone(),
            power: machine.power,
            recovery: machine.recovery.map(|mark| mark.is_test),
            autostart: machine.autostart,
            trackers: machine.trackers.len(),
            captures: machine.captures.len(),
            is_staged: machine.staging.is_some(),
            started_from: machine.started_from.clone(),
        };
        self.lock().vms.iter().map(view).collect()
    }

    /// One VM.
    pub fn view(&self, vm: VmId) -> Option<VmView> {
        self.views().into_iter().find(|view| view.id == vm)
    }

    /// Names, power states and open captures, for a message.
    pub(crate) fn summary(&self) -> Vec<(String, PowerState, usize)> {
        self.views().into_iter().map(|view| (view.name, view.power, view.captures)).collect()
    }

    /// Whether the agent has started a VM since a moment.
    pub fn has_started(&self, vm: VmId, since: u64) -> bool {
        let started = self.inner.started.lock().unwrap_or_else(PoisonError::into_inner);
        started.iter().any(|(at, started)| *at > since && *started == vm)
    }

    async fn start_for_agent(&self, vm: VmId, tracker: Option<&TrackerId>) -> Result<(), SiteError> {
        let was_off = self.lock().machine(vm)?.power == PowerState::Off;
        self.start_with(vm, tracker).await?;
        let mut state = self.lock();
        if was_off && state.starts_ended > 0 {
            state.starts_ended -= 1;
            state.stop(vm)?;
        }
        drop(state);
        if was_off {
            self.inner.started.lock().unwrap_or_else(PoisonError::into_inner).push((moment(), vm));
        }
        Ok(())
    }

    async fn start_with(&self, vm: VmId, tracker: Option<&TrackerId>) -> Result<(), SiteError> {
        if self.lock().machine(vm)?.power == PowerState::Off {
            // Booting reads the disks: without them it does not get far.
            let content = self.disks_by_key(vm).await?;
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            if machine.staging.is_some() {
                return Err(SiteError::new(ErrorKind::Refused, format!("'{}' is staged", machine.name)));
            }
            if machine.has_capture() {
                return Err(SiteError::new(ErrorKind::Busy, "a capture of the VM is open"));
            }
            if machine.power == PowerState::Off {
                if let Some(tracker) = tracker {
                    machine.set_tracker(tracker);
                }
                machine.started_from.get_or_insert_with(|| Arc::new(content));
                machine.power = PowerState::Running;
                machine.shape.boots += 1;
                machine.write_block(0, BOOT_BLOCK.0, &mark(BOOT_BLOCK.1));
            }
        }
        self.lock().machine(vm)?.power = PowerState::Running;
        Ok(())
    }
}

impl Machine {
    fn describe(&self, id: VmId) -> VirtualMachine {
        let disk = |(index, disk): (usize, &MachineDisk)| Disk {
            key: disk.key.clone(),
            path: format!("/sim/{id}/{}", disk.key),
            format: DiskFormat::Qcow2,
            size_bytes: disk.size(),
            is_os_disk: index == 0,
            is_replicable: true,
        };
        VirtualMachine {
            id,
            name: self.name.clone(),
            power: self.power,
            firmware: Firmware::Bios,
            vcpus: self.shape.vcpus,
            memory_bytes: self.shape.memory_bytes,
            has_tpm: false,
            has_guest_agent: true,
            autostart: self.autostart,
            disks: self.disks.iter().enumerate().map(disk).collect(),
            nics: self.shape.nics(),
            findings: Vec::new(),
        }
    }
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    async fn host(&self) -> Result<HostFacts, SiteError> {
        let facts = async {
            let confinement = self.lock().confinement.clone();
            Ok(HostFacts {
                name: self.inner.name.clone(),
                hypervisor: "Simulation".to_owned(),
                manager: "Simulation".to_owned(),
                acceleration: Acceleration::Software,
                capabilities: vec![Capability {
                    name: "InstantRecovery".to_owned(),
                    is_available: confinement.is_empty(),
                    reason: confinement,
                }],
                processors: 4,
                memory_bytes: 8 << 30,
                free_bytes: 1 << 40,
                findings: Vec::new(),
            })
        };
        self.inner.faults.around("host", facts).await
    }

    async fn inventory(&self) -> Result<Inventory, SiteError> {
        let read = async {
            let network = |name: &str, kind| Network { name: name.to_owned(), kind };
            Ok(Inventory {
                vms: self.lock().vms.iter().map(|(id, machine)| machine.describe(*id)).collect(),
                networks: vec![
                    network("lan", NetworkKind::Production),
                    network("island", NetworkKind::Isolated),
                ],
            })
        };
        self.inner.faults.around("inventory", read).await
    }

    async fn vm(&self, vm: VmId) -> Result<VirtualMachine, SiteError> {
        self.inner.faults.around("vm", async { self.lock().describe(vm) }).await
    }

    async fn disks(&self, vm: VmId) -> Result<Vec<Disk>, SiteError> {
        self.inner.faults.around("disks", async { Ok(self.lock().describe(vm)?.disks) }).await
    }

    async fn definition(&self, vm: VmId) -> Result<VmDefinition, SiteError> {
        let read = async {
            let shape = serde_json::to_vec(&self.lock().machine(vm)?.shape).map_err(failed)?;
            Ok(VmDefinition(shape))
        };
        self.inner.faults.around("definition", read).await
    }

    async fn power(&self, vm: VmId) -> Result<PowerState, SiteError> {
        self.inner.faults.around("power", async { Ok(self.lock().machine(vm)?.power) }).await
    }

    async fn start(&self, vm: VmId) -> Result<(), SiteError> {
        self.inner.faults.around("start", self.start_for_agent(vm, None)).await
    }

    async fn start_tracked(&self, vm: VmId, _: &[String], tracker: &TrackerId) -> Result<(), SiteError> {
        self.inner.faults.around("start_tracked", self.start_for_agent(vm, Some(tracker))).await
    }

    async fn shut_down(&self, vm: VmId, _: Duration) -> Result<ShutdownOutcome, SiteError> {
        let stop = async {
            let mut state = self.lock();
            let refuses = state.guests_refuse;
            let machine = state.machine(vm)?;
            if machine.power == PowerState::Off {
                return Ok(ShutdownOutcome::Off);
            }
            if machine.has_capture() {
                return Err(SiteError::new(ErrorKind::Busy, "a capture of the VM is open"));
            }
            if refuses {
                return Ok(ShutdownOutcome::Refused);
            }
            machine.write_block(0, SHUTDOWN_BLOCK.0, &mark(SHUTDOWN_BLOCK.1));
            state.stop(vm)?;
            Ok(ShutdownOutcome::Off)
        };
        self.inner.faults.around("shut_down", stop).await
    }

    async fn power_off(&self, vm: VmId) -> Result<(), SiteError> {
        self.inner.faults.around("power_off", async { self.lock().stop(vm) }).await
    }

    async fn set_autostart(&self, vm: VmId, is_on: bool) -> Result<(), SiteError> {
        let set = async {
            self.lock().machine(vm)?.autostart = is_on;
            Ok(())
        };
        self.inner.faults.around("set_autostart", set).await
    }

    async fn begin_capture(&self, vm: VmId, request: CaptureRequest) -> Result<Box<dyn Capture>, SiteError> {
        self.inner.faults.around("begin_capture", self.take_capture(vm, request)).await
    }

    async fn confirm_tracker(&self, vm: VmId, tracker: &TrackerId) -> Result<(), SiteError> {
        let confirm = async {
            self.lock().machine(vm)?.trackers.retain(|present, _| present == tracker);
            Ok(())
        };
        self.inner.faults.around("confirm_tracker", confirm).await
    }

    async fn abandon_stale_captures(&self) -> Result<Vec<VmId>, SiteError> {
        let abandon = async {
            let mut state = self.lock();
            let mut concerned = Vec::new();
            for (id, machine) in &mut state.vms {
                if !machine.captures.is_empty() {
                    machine.end_captures();
                    concerned.push(*id);
                }
            }
            Ok(concerned)
        };
        let abandoned = self.inner.faults.around("abandon_stale_captures", abandon).await;
        if abandoned.is_err() {
            self.lock().vms.values_mut().for_each(|machine| machine.are_captures_stale = true);
        }
        abandoned
    }

    async fn remove_trackers(&self, vm: VmId) -> Result<(), SiteError> {
        let remove = async {
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            machine.trackers.clear();
            machine.end_captures();
            Ok(())
        };
        self.inner.faults.around("remove_trackers", remove).await
    }

    async fn create_recovery_vm(&self, spec: &RecoveryVmSpec) -> Result<(), SiteError> {
        self.inner.faults.around("create_recovery_vm", async { self.make_recovery_vm(spec) }).await
    }

    async fn hydrate(&self, vm: VmId, when_off: WhenOff) -> Result<Hydration, SiteError> {
        self.inner.faults.around("hydrate", self.hydrate_some(vm, when_off)).await
    }

    async fn remove_recovery_vm(&self, vm: VmId) -> Result<(), SiteError> {
        self.inner.faults.around("remove_recovery_vm", async { self.drop_recovery_vm(vm) }).await
    }

    fn creation_tracker(&self) -> TrackerId {
        TrackerId(CREATION_TRACKER.to_owned())
    }

    async fn open_staging(&self, spec: &StagingSpec) -> Result<Box<dyn Staging>, SiteError> {
        self.inner.faults.around("open_staging", async { self.stage(spec) }).await
    }

    async fn commit_staging(&self, vm: VmId) -> Result<(), SiteError> {
        self.inner.faults.around("commit_staging", async { self.merge(vm) }).await
    }

    async fn remove_home_vm(&self, vm: VmId) -> Result<(), SiteError> {
        let remove = async {
            let mut state = self.lock();
            if state.vms.get(&vm).is_some_and(|machine| machine.is_made) {
                state.vms.remove(&vm);
            }
            Ok(())
        };
        self.inner.faults.around("remove_home_vm", remove).await
    }

    async fn discard_staging(&self, vm: VmId) -> Result<bool, SiteError> {
        let discard = async {
            self.lock().machine(vm)?.staging = None;
            Ok(false)
        };
        self.inner.faults.around("discard_staging", discard).await
    }

    async fn restore_state(&self, vm: VmId, definition: &VmDefinition) -> Result<(), SiteError> {
        let restore = async {
            let shape: Shape = serde_json::from_slice(&definition.0).map_err(failed)?;
            self.lock().machine(vm)?.shape.boots = shape.boots;
            Ok(())
        };
        self.inner.faults.around("restore_state", restore).await
    }

    async fn create_home_vm(
        &self,
        vm: VmId,
        definition: &VmDefinition,
        spec: &StagingSpec,
    ) -> Result<(), SiteError> {
        let create = async {
            let shape: Shape = serde_json::from_slice(&definition.0).map_err(failed)?;
            let disks: Vec<_> = spec.disks.iter().map(|disk| (disk.key.as_str(), disk.size_bytes)).collect();
            if self.view(vm).is_none() {
                self.add_vm(vm, &format!("home-{vm}"), &disks);
                self.lock().machine(vm)?.is_made = true;
            }
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            machine.shape = shape;
            machine.autostart = false;
            Ok(())
        };
        self.inner.faults.around("create_home_vm", create).await
    }

    async fn guest_addresses(&self, vm: VmId) -> Result<Vec<GuestAddress>, SiteError> {
        let read = async {
            let mut state = self.lock();
            let address = |(mac, address): &(String, String)| GuestAddress {
                mac: mac.clone(),
                address: address.clone(),
            };
            Ok(state.machine(vm)?.addresses.iter().map(address).collect())
        };
        self.inner.faults.around("guest_addresses", read).await
    }

    async fn set_guest_address(&self, vm: VmId, mac: &str, address: &str) -> Result<(), SiteError> {
        let set = async {
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            machine.addresses.retain(|(present, _)| present != mac);
            machine.addresses.push((mac.to_owned(), address.to_owned()));
            Ok(())
        };
        self.inner.faults.around("set_guest_address", set).await
    }

    async fn console(&self, vm: VmId) -> Result<String, SiteError> {
        Ok(format!("sim console {vm}"))
    }
}

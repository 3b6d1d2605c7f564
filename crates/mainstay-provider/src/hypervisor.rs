//! What an agent needs of the host beneath it.

use std::time::Duration;

use async_trait::async_trait;
use mainstay_model::VmId;
use serde::{Deserialize, Serialize};

use crate::{
    Capture, CaptureRequest, Disk, GuestAddress, HostFacts, Hydration, Inventory, PowerState, RecoveryVmSpec,
    SiteError, Staging, StagingSpec, TrackerId, VirtualMachine, VmDefinition, WhenOff,
};

/// How a graceful shutdown ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownOutcome {
    /// The VM is off.
    Off,
    /// The guest did not stop in time; it still runs.
    Refused,
}

/// A host that runs VMs.
///
/// Every method may be called again after an error, a time-out or a crash of the caller and then
/// carries on to the same end: creating what exists already and removing what is gone succeed.
/// VMs are named by [`VmId`] alone; a rename by the administrator changes nothing. Nothing that other
/// people own (their snapshots, checkpoints, backup jobs, files) is ever changed.
///
/// When a future is dropped or an error of kind `TimedOut` or `Unavailable` is returned, the request
/// may have been carried out. Implementations: `mainstay_kvm::KvmHost`, the simulated hypervisor.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// Facts about the host, read afresh.
    async fn host(&self) -> Result<HostFacts, SiteError>;

    /// All VMs and networks of the host.
    async fn inventory(&self) -> Result<Inventory, SiteError>;

    /// One VM, or an error of kind `NotFound`.
    async fn vm(&self, vm: VmId) -> Result<VirtualMachine, SiteError>;

    /// The disks of one VM, as in [`Hypervisor::vm`], without a question to its guest: each capture asks for them, and must neither
    /// wait for a guest that hangs nor take the time of one that works.
    async fn disks(&self, vm: VmId) -> Result<Vec<Disk>, SiteError>;

    /// The VM's definition for a recovery point.
    async fn definition(&self, vm: VmId) -> Result<VmDefinition, SiteError>;

    // Power.

    /// Whether the VM runs; `NotFound` if it does not exist.
    async fn power(&self, vm: VmId) -> Result<PowerState, SiteError>;

    /// Starts the VM, or resumes it if it is paused.
    async fn start(&self, vm: VmId) -> Result<(), SiteError>;

    /// Starts a VM that is off, with `tracker` set on `disks` before its first instruction (start paused, set,
    /// resume), so that no write escapes. A VM that is not off, or has the tracker already, is only resumed.
    async fn start_tracked(&self, vm: VmId, disks: &[String], tracker: &TrackerId) -> Result<(), SiteError>;

    /// Asks the guest to stop and waits at most `timeout`. Open captures of the VM must be closed first.
    async fn shut_down(&self, vm: VmId, timeout: Duration) -> Result<ShutdownOutcome, SiteError>;

    /// Stops the VM as a power cut would.
    async fn power_off(&self, vm: VmId) -> Result<(), SiteError>;

    // Protection at the source.

    /// Whether the host starts the VM by itself at boot.
    async fn set_autostart(&self, vm: VmId, is_on: bool) -> Result<(), SiteError>;

    /// Takes a capture. Errors: `Busy` if somebody else's backup or snapshot runs, `NoSpace` if there is
    /// no room for scratch. Works with the VM running, paused or off. After an error no capture is open: there is
    /// nobody who could close it.
    async fn begin_capture(&self, vm: VmId, request: CaptureRequest) -> Result<Box<dyn Capture>, SiteError>;

    /// `tracker` is the one to tell changes from: removes all other trackers of ours on the VM.
    async fn confirm_tracker(&self, vm: VmId, tracker: &TrackerId) -> Result<(), SiteError>;

    /// Ends captures that a previous run of the agent left open and thaws what it left frozen. Called
    /// at start, before anything else; returns the VMs that were concerned. After an error the driver pursues what is left,
    /// and a capture that is begun meanwhile ends the one before it: nobody calls again.
    async fn abandon_stale_captures(&self) -> Result<Vec<VmId>, SiteError>;

    /// Removes every trace of ours from the VM: trackers, exports, run files.
    async fn remove_trackers(&self, vm: VmId) -> Result<(), SiteError>;

    // Recovery VMs.

    /// Makes a VM from a recovery point without starting it: images and definition. If it exists
    /// already with this id, it is left as it is.
    async fn create_recovery_vm(&self, spec: &RecoveryVmSpec) -> Result<(), SiteError>;

    /// Starts copying the VM's disks out of the store (or goes on) and says how far it is. Called again and
    /// again until complete.
    async fn hydrate(&self, vm: VmId, when_off: WhenOff) -> Result<Hydration, SiteError>;

    /// Removes a recovery VM: domain, disks, overlays. Refuses a VM that `create_recovery_vm` did not
    /// make.
    async fn remove_recovery_vm(&self, vm: VmId) -> Result<(), SiteError>;

    /// The tracker that tells what was written to a recovery VM since it was created. It is always there.
    fn creation_tracker(&self) -> TrackerId;

    // Staging at home.

    /// Opens (or goes on with) the staging area of a VM that is off and prevents its start where the host
    /// allows that. Errors: `Refused` if the VM runs or has snapshots of the administrator's.
    async fn open_staging(&self, spec: &StagingSpec) -> Result<Box<dyn Staging>, SiteError>;

    /// Merges what was staged into the home disks and removes the staging area. Repeatable after any
    /// crash, and without effect if there is none.
    async fn commit_staging(&self, vm: VmId) -> Result<(), SiteError>;

    /// Removes the staging area; the home disks are as they were. A merge that had begun is ended instead, because half of
    /// one is the state of no moment: answers whether that was so.
    async fn discard_staging(&self, vm: VmId) -> Result<bool, SiteError>;

    /// Puts what a definition holds besides the description (firmware variables, TPM state) into a VM that is off, in place
    /// of its own; the description stays as the administrator made it.
    async fn restore_state(&self, vm: VmId, definition: &VmDefinition) -> Result<(), SiteError>;

    /// Defines a home VM that no longer exists, with empty disks, from a recovery point's definition;
    /// [`Hypervisor::open_staging`] then fills them.
    async fn create_home_vm(
        &self,
        vm: VmId,
        definition: &VmDefinition,
        spec: &StagingSpec,
    ) -> Result<(), SiteError>;

    /// Removes a VM that [`Hypervisor::create_home_vm`] made and into which nothing was merged yet, with its disks. Any other
    /// VM is left as it is.
    async fn remove_home_vm(&self, vm: VmId) -> Result<(), SiteError>;

    // The guest.

    /// Addresses as the guest itself reports them.
    async fn guest_addresses(&self, vm: VmId) -> Result<Vec<GuestAddress>, SiteError>;

    /// Gives an adapter of a running guest an address (`ADDRESS/PREFIX`); an address in use is `Refused`.
    async fn set_guest_address(&self, vm: VmId, mac: &str, address: &str) -> Result<(), SiteError>;

    /// How an administrator reaches the VM's console from this host: a command line.
    async fn console(&self, vm: VmId) -> Result<String, SiteError>;
}

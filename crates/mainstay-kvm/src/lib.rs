//! The KVM driver: libvirt and QEMU as protected site and as recovery site.
//!
//! [`KvmHost`] implements [`mainstay_provider::Hypervisor`] for one libvirt daemon, of the system or of a user.
//! In reading order: `capture` (what changed, and a view of it), `recovery` (a VM from a recovery point),
//! `staging` (the way back), `inventory`, `power`, `guest`; beneath them `xml`, `nodes`, `bitmaps`,
//! `qemu_nbd`, `files` and [`libvirt`]. Nothing outside of this crate knows libvirt's or QEMU's words.
//!
//! What survives what: the records in `files` survive everything; trackers on qcow2 survive a clean end of QEMU;
//! trackers on raw disks live as long as QEMU. A tracker that is gone is never an error, only a reason to compare.

mod bitmaps;
mod capture;
mod command;
mod definition;
mod error;
mod files;
mod guest;
mod host;
mod inventory;
pub mod libvirt;
mod nodes;
mod power;
mod probe;
mod qemu_nbd;
mod recovery;
mod staging;
mod xml;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mainstay_model::VmId;
use mainstay_provider::{
    Capture, CaptureRequest, Disk, GuestAddress, HostFacts, Hydration, Hypervisor, Inventory, PowerState,
    RecoveryVmSpec, ShutdownOutcome, SiteError, Staging, StagingSpec, TrackerId, VirtualMachine,
    VmDefinition, WhenOff,
};

use error::While as _;
use host::Host;
pub use host::KvmOptions;
pub use inventory::{INSTANT_RECOVERY_UNAVAILABLE, missing_programs};
pub use probe::hardware_acceleration;
pub use xml::{RecoveryMark, recovery_mark};

/// A host that runs VMs with libvirt and QEMU.
#[derive(Clone, Debug)]
pub struct KvmHost {
    host: Arc<Host>,
}

impl KvmHost {
    /// A driver for the daemon that the options name. It need not run yet.
    pub fn open(options: KvmOptions) -> Result<Self, SiteError> {
        Ok(Self { host: Arc::new(Host::open(options)?) })
    }

    /// The connection to libvirt.
    pub fn libvirt(&self) -> &libvirt::Libvirt {
        &self.host.libvirt
    }
}

#[async_trait]
impl Hypervisor for KvmHost {
    async fn host(&self) -> Result<HostFacts, SiteError> {
        inventory::facts(&self.host).await
    }

    async fn inventory(&self) -> Result<Inventory, SiteError> {
        inventory::inventory(&self.host).await
    }

    async fn vm(&self, vm: VmId) -> Result<VirtualMachine, SiteError> {
        inventory::machine(&self.host, vm, guest::AGENT_TIMEOUT).await
    }

    async fn disks(&self, vm: VmId) -> Result<Vec<Disk>, SiteError> {
        let domain = self.host.domain(vm, libvirt::XmlKind::Live).await?;
        Ok(inventory::disks(&self.host, &domain).await)
    }

    async fn definition(&self, vm: VmId) -> Result<VmDefinition, SiteError> {
        definition::read(&self.host, vm).await
    }

    async fn power(&self, vm: VmId) -> Result<PowerState, SiteError> {
        self.host.power(vm).await
    }

    async fn start(&self, vm: VmId) -> Result<(), SiteError> {
        power::start(&self.host, vm).await
    }

    async fn start_tracked(&self, vm: VmId, disks: &[String], tracker: &TrackerId) -> Result<(), SiteError> {
        power::start_tracked(&self.host, vm, disks, tracker).await
    }

    async fn shut_down(&self, vm: VmId, timeout: Duration) -> Result<ShutdownOutcome, SiteError> {
        power::shut_down(&self.host, vm, timeout).await
    }

    async fn power_off(&self, vm: VmId) -> Result<(), SiteError> {
        power::power_off(&self.host, vm).await
    }

    async fn set_autostart(&self, vm: VmId, is_on: bool) -> Result<(), SiteError> {
        self.host.libvirt.set_autostart(vm, is_on).await.doing("changing whether the VM starts with the host")
    }

    async fn begin_capture(&self, vm: VmId, request: CaptureRequest) -> Result<Box<dyn Capture>, SiteError> {
        capture::begin(&self.host, vm, &request).await
    }

    async fn confirm_tracker(&self, vm: VmId, tracker: &TrackerId) -> Result<(), SiteError> {
        let _lock = self.host.lock(vm).await;
        bitmaps::sweep(&self.host, vm, Some(&tracker.0)).await
    }

    async fn abandon_stale_captures(&self) -> Result<Vec<VmId>, SiteError> {
        capture::abandon_all(&self.host).await
    }

    async fn remove_trackers(&self, vm: VmId) -> Result<(), SiteError> {
        let _lock = self.host.lock(vm).await;
        if !self.host.has_capture(vm) {
            capture::abandon(&self.host, vm).await?;
        }
        bitmaps::sweep(&self.host, vm, None).await
    }

    async fn create_recovery_vm(&self, spec: &RecoveryVmSpec) -> Result<(), SiteError> {
        recovery::create(&self.host, spec).await
    }

    async fn hydrate(&self, vm: VmId, when_off: WhenOff) -> Result<Hydration, SiteError> {
        recovery::hydrate(&self.host, vm, when_off).await
    }

    async fn remove_recovery_vm(&self, vm: VmId) -> Result<(), SiteError> {
        recovery::remove(&self.host, vm).await
    }

    fn creation_tracker(&self) -> TrackerId {
        TrackerId(capture::CREATION_TRACKER.to_owned())
    }

    async fn open_staging(&self, spec: &StagingSpec) -> Result<Box<dyn Staging>, SiteError> {
        staging::open(&self.host, spec).await
    }

    async fn commit_staging(&self, vm: VmId) -> Result<(), SiteError> {
        staging::commit(&self.host, vm).await
    }

    async fn remove_home_vm(&self, vm: VmId) -> Result<(), SiteError> {
        staging::remove_home(&self.host, vm).await
    }

    async fn discard_staging(&self, vm: VmId) -> Result<bool, SiteError> {
        staging::discard(&self.host, vm).await
    }

    async fn restore_state(&self, vm: VmId, definition: &VmDefinition) -> Result<(), SiteError> {
        definition::restore_state(&self.host, vm, definition).await
    }

    async fn create_home_vm(
        &self,
        vm: VmId,
        definition: &VmDefinition,
        spec: &StagingSpec,
    ) -> Result<(), SiteError> {
        staging::create_home(&self.host, vm, definition, spec).await
    }

    async fn guest_addresses(&self, vm: VmId) -> Result<Vec<GuestAddress>, SiteError> {
        guest::addresses(&self.host, vm).await
    }

    async fn set_guest_address(&self, vm: VmId, mac: &str, address: &str) -> Result<(), SiteError> {
        guest::set_address(&self.host, vm, mac, address).await
    }

    async fn console(&self, vm: VmId) -> Result<String, SiteError> {
        let name = self.host.libvirt.name(vm).await?;
        let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
        Ok(format!("virsh --connect {} console {}", quoted(self.host.libvirt.uri()), quoted(&name)))
    }
}

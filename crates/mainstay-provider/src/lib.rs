//! The contract between Mainstay and the places where VMs run.
//!
//! Two traits, one for each side of the wire between server and agent:
//!
//! * [`Hypervisor`] is what an agent needs of the host beneath it: inventory, captures, power,
//!   recovery VMs, staging. `mainstay-kvm` implements it; so does the simulated hypervisor here.
//! * [`Site`] is what the control plane asks of a registered host: whole, repeatable operations.
//!   An agent implements it over its `Hypervisor`; the server's proxy forwards it to the agent.

mod capture;
mod channel;
mod error;
mod host;
mod hypervisor;
mod recovery;
mod site;
mod vm;

pub use capture::{Capture, CaptureLimits, CaptureRequest, CapturedDisk, Changed, Consistency, TrackerId};
pub use channel::{RemoteSite, serve_site};
pub use error::{ErrorKind, SiteError};
pub use host::{Acceleration, Capability, HostFacts, Inventory, Network, NetworkKind};
pub use hypervisor::{Hypervisor, ShutdownOutcome};
pub use recovery::{
    Hydration, MacPolicy, NicPlan, RecoveryDisk, RecoveryVmSpec, Staging, StagingDisk, StagingSpec,
    VmDefinition, WhenOff,
};
pub use site::{
    AnswerWaiting, ApplyAddresses, CommitHome, CreateRecoveryVm, DiscardHome, Discover, Discovery,
    DiskProgress, Examination, Examine, HomePrepared, Hydrate, NoProgress, Operation, PowerOffVm,
    PrepareHome, Progress, ProgressSink, Protect, ReadConsole, ReadPower, RemoveRecoveryVm, Replicate,
    Replicated, ShutDownVm, Site, SiteOperation, StageHome, Staged, StandDown, StartVm, StoodDown, Unprotect,
    Verified, VerifyHome, call,
};
pub use vm::{
    Disk, DiskFormat, Finding, FindingSeverity, Firmware, GuestAddress, Nic, PowerState, VirtualMachine,
};

//! What a host is and has.

use serde::{Deserialize, Serialize};

use crate::vm::{Finding, VirtualMachine};

/// Facts about a host, read afresh on every call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The host's name.
    pub name: String,
    /// What runs the VMs, with version: `QEMU 10.0.2`.
    pub hypervisor: String,
    /// What manages them, with version: `libvirt 11.3.0`.
    pub manager: String,
    /// How guest code is executed.
    pub acceleration: Acceleration,
    /// What this host can do, each stated with its reason when it cannot.
    pub capabilities: Vec<Capability>,
    /// Its processors; 0 = not known (agents from before this was told).
    #[serde(default)]
    pub processors: u32,
    /// Its memory in bytes; 0 = not known.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Free bytes where recovery VMs and scratch files go.
    pub free_bytes: u64,
    /// What the host lacks.
    pub findings: Vec<Finding>,
}

/// How guest code is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Acceleration {
    /// By the processor, and a probe guest has run.
    Hardware,
    /// In software (TCG): correct but slow.
    Software,
}

/// One thing a host can or cannot do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Stable name: `InstantRecovery`, `StaticAddress`, `StartPrevention`.
    pub name: String,
    /// Whether it is available.
    pub is_available: bool,
    /// Why not, or with which limit.
    pub reason: String,
}

/// A network that VMs of this host can be attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The name under which VMs refer to it.
    pub name: String,
    /// What it reaches.
    pub kind: NetworkKind,
}

/// What a network reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkKind {
    /// Other machines.
    Production,
    /// Nothing but its own members.
    Isolated,
}

/// Everything discovered on a host at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Its VMs, recovery VMs of ours included.
    pub vms: Vec<VirtualMachine>,
    /// Its networks.
    pub networks: Vec<Network>,
}

//! The whole system in one process: two simulated hosts, their agents, the control plane and its store, with faults.
//!
//! * [`SimHypervisor`] is a host as it is without any agent: its VMs and what was made durable on it.
//! * [`World`] puts two of them, their agents and a server together. Agents and server run in runtimes of their own, so
//!   that ending one of them is a crash: whatever it was doing stops at its next await.
//! * [`simulate`] runs a test in which everything takes turns on one thread, in an order and at times that follow from a seed.
//! * [`SimStorage`] is the object storage of the server, and what a crash leaves of it.
//! * [`Oracle`] knows the bytes of every disk at the moment of every capture; [`World::check`] compares.
//!
//! Nothing here goes into a release.

mod chance;
mod files;
mod hypervisor;
mod oracle;
mod storage;
mod trace;
mod turns;
mod world;

pub use hypervisor::{HostFault, SimHypervisor, VmView, moment};
pub use oracle::Oracle;
pub use storage::{SimStorage, StorageTrouble};
pub use trace::{Digest, note};
pub use turns::{simulate, simulate_traced};
pub use world::{
    Direction, Host, JobEnd, Legible, Place, ServerSnapshot, Shipped, Snapshot, World, WorldOptions,
};

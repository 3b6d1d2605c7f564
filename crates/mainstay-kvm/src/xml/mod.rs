//! libvirt's descriptions of domains: reading what matters, and rewriting without losing the rest.

mod disks;
#[cfg(test)]
mod hostile_tests;
mod nics;
mod read;
mod rewrite;
mod tree;

pub(crate) use disks::{DiskSource, drop_backing_store};
pub(crate) use nics::{NicRules, planned_mac};
pub(crate) use read::{AgentChannel, Domain, DomainDisk};
pub use read::{RecoveryMark, recovery_mark};
pub(crate) use rewrite::{Adaptation, adapt};

/// The namespace of what we write into a domain's metadata.
pub(crate) const NAMESPACE: &str = "https://mainstay.dev/xml/domain/1";

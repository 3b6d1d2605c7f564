//! The KVM driver.
pub mod libvirt;

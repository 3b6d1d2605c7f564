//! The KVM driver.
pub mod libvirt;
mod probe;
pub use probe::hardware_acceleration;

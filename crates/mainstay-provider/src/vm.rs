//! What a VM looks like to Mainstay, whatever the hypervisor.

use mainstay_model::VmId;
use serde::{Deserialize, Serialize};

/// A VM as discovered on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualMachine {
    /// The hypervisor's identifier; survives renames.
    pub id: VmId,
    /// The name as shown by the hypervisor now.
    pub name: String,
    /// Whether it runs.
    pub power: PowerState,
    /// How it boots.
    pub firmware: Firmware,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Whether it has a virtual TPM, whose state belongs to a recovery point.
    pub has_tpm: bool,
    /// Whether it has a guest agent channel (not: whether the agent answers).
    pub has_guest_agent: bool,
    /// Whether the hypervisor starts it by itself when the host boots.
    pub autostart: bool,
    /// Disks in bus order; the first one the firmware boots from is marked.
    pub disks: Vec<Disk>,
    /// Network adapters in bus order.
    pub nics: Vec<Nic>,
    /// Why it cannot be protected, or what to know before it is.
    pub findings: Vec<Finding>,
}

impl VirtualMachine {
    /// Why a disk cannot be replicated; `None` if it can be, or if nobody said.
    pub fn obstacle(&self, disk: &Disk) -> Option<&Finding> {
        let names_it = |finding: &&Finding| {
            let mut words =
                finding.message.split(|c: char| c.is_whitespace() || matches!(c, ',' | ':' | ';' | '\''));
            finding.code.starts_with("Disk") && words.any(|word| word == disk.key)
        };
        if disk.is_replicable { None } else { self.findings.iter().find(names_it) }
    }
}

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PowerState {
    /// Executing guest code.
    Running,
    /// Stopped in memory, by a person or by an I/O error.
    Paused,
    /// Not in memory.
    Off,
}

/// How a VM boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Firmware {
    /// Legacy BIOS, or a kernel given directly.
    Bios,
    /// UEFI, whose variables belong to a recovery point.
    Uefi,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The disk's name within the VM, stable while it is attached (`vda`).
    pub key: String,
    /// The file or device that holds it on the host.
    pub path: String,
    /// The image format.
    pub format: DiskFormat,
    /// Virtual size in bytes; 0 where the host cannot tell it (its image is away, or the VM died while it was asked).
    pub size_bytes: u64,
    /// Whether the firmware boots from it (or it is the first disk).
    pub is_os_disk: bool,
    /// Whether it can be replicated; if not, a finding whose code begins with `Disk` and whose message names the disk by its
    /// key says why, as [`VirtualMachine::obstacle`] expects it.
    pub is_replicable: bool,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DiskFormat {
    /// Bytes as they are: a file, a logical volume, a block device.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
    /// Something this driver cannot replicate.
    Other,
}

/// A network adapter of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// MAC address, lower case with colons; identifies the adapter.
    pub mac: String,
    /// Name of the network it is attached to, as in [`crate::Network::name`]; empty if none.
    pub network: String,
    /// Addresses the guest agent reported, `ADDRESS/PREFIX`; empty if unknown.
    pub addresses: Vec<String>,
}

/// An address of a guest, read from the guest itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// MAC address of the adapter.
    pub mac: String,
    /// The address and prefix length, `10.0.0.7/24`.
    pub address: String,
}

/// Something an administrator should know about a VM or a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable name of the finding, `DiskFormatUnsupported`.
    pub code: String,
    /// Whether it stands in the way.
    pub severity: FindingSeverity,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// Whether a finding stands in the way of protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FindingSeverity {
    /// Good to know.
    Information,
    /// Works, with a limit.
    Warning,
    /// Cannot be protected as it is.
    Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finding_about_a_disk_is_found_by_its_name() {
        let disk = |key: &str, is_replicable| Disk {
            key: key.to_owned(),
            path: String::new(),
            format: DiskFormat::Raw,
            size_bytes: 1,
            is_os_disk: false,
            is_replicable,
        };
        let finding = |code: &str, message: &str| Finding {
            code: code.to_owned(),
            severity: FindingSeverity::Warning,
            message: message.to_owned(),
            remedy: String::new(),
        };
        let vm = VirtualMachine {
            id: VmId(uuid::Uuid::nil()),
            name: "web".to_owned(),
            power: PowerState::Off,
            firmware: Firmware::Bios,
            vcpus: 1,
            memory_bytes: 1,
            has_tpm: false,
            has_guest_agent: false,
            autostart: false,
            disks: Vec::new(),
            nics: Vec::new(),
            findings: vec![
                finding("GuestAgentMissing", "nothing about vdb"),
                finding("DiskShared", "disk vdba is shared"),
                finding("DiskEncrypted", "disk vdb is encrypted"),
            ],
        };
        let code = |disk: &Disk| vm.obstacle(disk).map(|finding| finding.code.clone());
        assert_eq!(code(&disk("vdb", false)).as_deref(), Some("DiskEncrypted"));
        assert_eq!(code(&disk("vdba", false)).as_deref(), Some("DiskShared"));
        assert_eq!((code(&disk("vdb", true)), code(&disk("vdc", false))), (None, None));
    }
}

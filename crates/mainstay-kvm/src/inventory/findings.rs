//! What an administrator should know before a VM is protected.

use mainstay_provider::{Finding, FindingSeverity, PowerState, SiteError};

use crate::host::Host;
use crate::xml::{Domain, DomainDisk};

/// Why a disk cannot be replicated: a code and a reason.
pub(super) fn obstacle(disk: &DomainDisk) -> Option<(&'static str, String)> {
    let key = &disk.key;
    if disk.kind == "lun" {
        return Some((
            "DiskPassedThrough",
            format!("disk {key} is a SCSI device passed through to the guest"),
        ));
    }
    if !matches!(disk.kind.as_str(), "file" | "block") {
        return Some((
            "DiskSourceUnsupported",
            format!("disk {key} comes from a source of type {}", disk.kind),
        ));
    }
    if !matches!(disk.format.as_str(), "raw" | "qcow2") {
        return Some(("DiskFormatUnsupported", format!("disk {key} has the format {}", disk.format)));
    }
    if disk.is_shared {
        return Some(("DiskShared", format!("disk {key} is shared with other VMs")));
    }
    if disk.is_encrypted {
        return Some(("DiskEncrypted", format!("disk {key} is encrypted by QEMU")));
    }
    if disk.is_read_only {
        return Some(("DiskReadOnly", format!("disk {key} is read-only")));
    }
    None
}

/// All findings of a VM.
pub(super) async fn of_machine(
    host: &Host,
    domain: &Domain,
    power: PowerState,
) -> Result<Vec<Finding>, SiteError> {
    let mut findings = Vec::new();
    let mut add = |code: &str, severity, message: String, remedy: &str| {
        findings.push(Finding { code: code.to_owned(), severity, message, remedy: remedy.to_owned() });
    };
    use FindingSeverity::{Error, Information, Warning};
    for disk in &domain.disks {
        if let Some((code, message)) = obstacle(disk) {
            let remedy = "Move the disk to a file or a volume in raw or qcow2 format, or leave it out.";
            add(code, Warning, message, remedy);
        } else if disk.path.as_ref().is_some_and(|path| !std::path::Path::new(path).exists()) {
            let message = format!("the image of disk {} is missing", disk.key);
            add("DiskMissing", Error, message, "Restore it, or remove the disk from the VM.");
        } else if disk.format == "raw" {
            let message =
                format!("disk {} is raw: changes are tracked only as long as the VM runs", disk.key);
            add(
                "DiskTrackingVolatile",
                Information,
                message,
                "Nothing to do: after a restart the disk is compared.",
            );
        }
    }
    if !domain.disks.iter().any(|disk| obstacle(disk).is_none()) {
        let message = "the VM has no disk that can be replicated".to_owned();
        add("NoReplicableDisk", Error, message, "Give it a disk in raw or qcow2 format.");
    }
    if domain.has_passthrough {
        let message = "the VM uses devices of the host, which a recovery VM will not have".to_owned();
        add("HostDevice", Warning, message, "Make sure that the guest boots without them.");
    }
    if domain.agent.is_none() {
        let message = "the VM has no guest agent channel: recovery points are crash-consistent".to_owned();
        add(
            "GuestAgentMissing",
            Warning,
            message,
            "Add the channel and install qemu-guest-agent in the guest.",
        );
    } else if power == PowerState::Running && !host.libvirt.is_agent_there(domain).await {
        let message = "the guest agent does not answer: recovery points are crash-consistent".to_owned();
        add("GuestAgentSilent", Warning, message, "Start qemu-guest-agent in the guest.");
    }
    if host.libvirt.snapshots(domain.id).await? > 0 {
        let message =
            "the VM has snapshots; reverting to an internal one fails while changes are tracked".to_owned();
        add(
            "SnapshotsPresent",
            Warning,
            message,
            "Delete the snapshots, or disable protection before a revert.",
        );
    }
    if host.libvirt.has_managed_save(domain.id).await? {
        let message = "the VM's memory lies in a managed save".to_owned();
        add("ManagedSave", Error, message, "Start the VM, or remove the saved state.");
    }
    Ok(findings)
}

//! Facts about the host itself.

use std::path::Path;

use mainstay_provider::{Acceleration, Capability, Finding, FindingSeverity, HostFacts, SiteError};
use nix::sys::statvfs::statvfs;

use crate::error::failed;
use crate::host::Host;
use crate::probe::hardware_acceleration;

/// Reads everything afresh; only the probe guest runs once.
pub(crate) async fn facts(host: &Host) -> Result<HostFacts, SiteError> {
    let (libvirt, qemu) = host.libvirt.versions().await?;
    let mut findings = Vec::new();
    let acceleration = match hardware_acceleration().await {
        Ok(()) => Acceleration::Hardware,
        Err(reason) => {
            findings.push(Finding {
                code: "NoHardwareAcceleration".to_owned(),
                severity: FindingSeverity::Warning,
                message: format!("guests run in software, slowly: {reason}"),
                remedy: "Enable virtualisation in the firmware, or nested virtualisation beneath.".to_owned(),
            });
            Acceleration::Software
        }
    };
    let is_enabled = Path::new("/sys/kernel/security/apparmor").exists();
    let confinement = app_armor_limit(host.capabilities().await?, &libvirt, is_enabled);
    let capability = |name: &str, limit: Option<&str>| Capability {
        name: name.to_owned(),
        is_available: limit.is_none(),
        reason: limit.unwrap_or_default().to_owned(),
    };
    let capabilities = vec![
        capability("InstantRecovery", confinement),
        capability("StartPrevention", None),
        capability("StaticAddress", None),
        capability("ApplicationConsistency", None),
    ];
    let space =
        statvfs(host.files.directory()).map_err(|error| failed(format!("asking for free space: {error}")))?;
    Ok(HostFacts {
        name: host.libvirt.hostname().await?,
        hypervisor: format!("QEMU {qemu}"),
        manager: format!("libvirt {libvirt}"),
        acceleration,
        capabilities,
        free_bytes: space.blocks_available() * space.fragment_size(),
        findings,
    })
}

/// AppArmor's profiles deny QEMU to write to a backing file, which is what filling a recovery VM's disks is.
fn app_armor_limit(capabilities: &str, libvirt: &str, is_enabled: bool) -> Option<&'static str> {
    let confines = is_enabled && capabilities.contains("<model>apparmor</model>");
    let mut numbers = libvirt.split('.').filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (confines && version < (12, 1)).then_some(
        "AppArmor confines QEMU, and before libvirt 12.1 it denies writing to backing files: set \
         security_driver = \"none\" in /etc/libvirt/qemu.conf, or update libvirt",
    )
}

/// The machine types that QEMU knows on this host.
pub(crate) async fn machines(host: &Host) -> Result<Vec<String>, SiteError> {
    let document = roxmltree::Document::parse(host.capabilities().await?);
    let document = document.map_err(|error| failed(format!("reading libvirt's capabilities: {error}")))?;
    let machines = document.descendants().filter(|node| node.has_tag_name("machine"));
    Ok(machines.filter_map(|node| node.text()).map(|text| text.trim().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn app_armor_limits_only_where_it_confines_and_libvirt_is_old() {
        let confined = "<host><secmodel><model>apparmor</model><doi>0</doi></secmodel></host>";
        let limit = |capabilities, libvirt, is_enabled| app_armor_limit(capabilities, libvirt, is_enabled);
        assert!(limit(confined, "11.3.0", true).is_some_and(|reason| reason.contains("security_driver")));
        assert!(limit(confined, "12.0.9", true).is_some());
        assert_eq!(limit(confined, "12.1.0", true), None);
        assert_eq!(limit(confined, "13.0.0", true), None);
        assert_eq!(limit(confined, "11.3.0", false), None);
        assert_eq!(limit("<model>dac</model>", "11.3.0", true), None);
    }
}

//! Facts about the host itself.

use std::path::Path;

use mainstay_provider::{Acceleration, Capability, Finding, FindingSeverity, HostFacts, SiteError};
use nix::sys::statvfs::statvfs;

use super::lacks::{Account, Seen, findings, look, missing_programs, version};
use crate::error::failed;
use crate::host::Host;
use crate::probe::hardware_acceleration;

/// Reads everything afresh; only the probe guest runs once.
pub(crate) async fn facts(host: &Host) -> Result<HostFacts, SiteError> {
    let (libvirt, qemu) = host.libvirt.versions().await?;
    let mut lacks = missing_programs();
    let acceleration = match hardware_acceleration().await {
        Ok(()) => Acceleration::Hardware,
        Err(reason) => {
            lacks.push(Finding {
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
    let free_bytes = space.blocks_available() * space.fragment_size();
    let account = host.owner().await?.map(Account::of);
    let run_dir = host.options.socket_directory.as_deref().filter(|path| *path != host.files.directory());
    lacks.extend(findings(&Seen {
        libvirt: &libvirt,
        qemu: &qemu,
        confinement,
        free_bytes,
        vm_dir: look(host.files.directory(), account.as_ref()),
        run_dir: run_dir.map(|path| look(path, account.as_ref())),
    }));
    let (processors, memory_bytes) = capacity(host.capabilities().await?)?;
    Ok(HostFacts {
        name: host.libvirt.hostname().await?,
        hypervisor: format!("QEMU {qemu}"),
        manager: format!("libvirt {libvirt}"),
        acceleration,
        capabilities,
        processors,
        memory_bytes,
        free_bytes,
        findings: lacks,
    })
}

/// AppArmor's profiles deny QEMU to write to a backing file, which is what filling a recovery VM's disks is.
fn app_armor_limit(capabilities: &str, libvirt: &str, is_enabled: bool) -> Option<&'static str> {
    let confines = is_enabled && capabilities.contains("<model>apparmor</model>");
    (confines && version(libvirt) < (12, 1)).then_some(
        "AppArmor confines QEMU, and before libvirt 12.1 it denies writing to backing files: set \
         security_driver = \"none\" in /etc/libvirt/qemu.conf, or update libvirt",
    )
}

/// Processors and memory in bytes, summed over the nodes of the host's memory; 0 where libvirt does not tell.
fn capacity(capabilities: &str) -> Result<(u32, u64), SiteError> {
    let document = roxmltree::Document::parse(capabilities);
    let document = document.map_err(|error| failed(format!("reading libvirt's capabilities: {error}")))?;
    let cells = document.descendants().filter(|node| node.has_tag_name("cell"));
    let mut capacity = (0_u32, 0_u64);
    for part in cells.flat_map(|cell| cell.children()) {
        if part.has_tag_name("cpus") {
            let count = part.attribute("num").and_then(|count| count.parse().ok()).unwrap_or(0);
            capacity.0 = capacity.0.saturating_add(count);
        }
        if part.has_tag_name("memory") && part.attribute("unit") == Some("KiB") {
            let kibibytes = part.text().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
            capacity.1 = capacity.1.saturating_add(kibibytes.saturating_mul(1024));
        }
    }
    Ok(capacity)
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
    fn the_capacity_is_summed_over_all_nodes() {
        let cell = "<cell id='0'><memory unit='KiB'>2048</memory><cpus num='2'><cpu id='0'/></cpus></cell>";
        let xml = format!(
            "<capabilities><host><topology><cells num='2'>{cell}{cell}</cells></topology></host></capabilities>"
        );
        assert_eq!(capacity(&xml).unwrap(), (4, 4 << 20));
        assert_eq!(capacity("<capabilities/>").unwrap(), (0, 0));
        assert!(capacity("<").is_err());
    }

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

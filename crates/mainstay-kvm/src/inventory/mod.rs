//! What a host has: VMs, networks, and what is to know about them.

mod facts;
mod findings;
mod lacks;

use std::time::Duration;

use futures::StreamExt as _;
use mainstay_model::VmId;
use mainstay_provider::{
    Disk, DiskFormat, ErrorKind, Firmware, Inventory, Network, NetworkKind, Nic, PowerState, SiteError,
    VirtualMachine,
};

use crate::error::failed;
use crate::guest;
use crate::host::Host;
use crate::libvirt::XmlKind;
use crate::nodes::Nodes;
use crate::xml::{Domain, DomainDisk};
pub(crate) use facts::{facts, machines};
pub use lacks::{INSTANT_RECOVERY_UNAVAILABLE, missing_programs};

/// VMs that are looked at together. libvirt answers in a millisecond, but one VM's disks may be slow.
const VMS_AT_ONCE: usize = 8;

/// How long each guest may take to tell its addresses when all are asked; a hung one costs no more.
const GUEST_ANSWER_MAX: Duration = Duration::from_secs(2);

/// Everything on the host.
pub(crate) async fn inventory(host: &Host) -> Result<Inventory, SiteError> {
    let ids = host.libvirt.domains().await?;
    let mut machines = futures::stream::iter(ids)
        .map(|id| machine(host, id, GUEST_ANSWER_MAX))
        .buffer_unordered(VMS_AT_ONCE);
    let mut vms = Vec::new();
    while let Some(machine) = machines.next().await {
        match machine {
            Ok(vm) => vms.push(vm),
            // Removed since it was listed.
            Err(error) if error.kind == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    let mut networks = networks(host).await?;
    for nic in vms.iter().flat_map(|vm| &vm.nics) {
        let is_known = nic.network.is_empty() || networks.iter().any(|network| network.name == nic.network);
        if !is_known {
            networks.push(Network { name: nic.network.clone(), kind: NetworkKind::Production });
        }
    }
    Ok(Inventory { vms, networks })
}

/// The networks of the host, without looking at its VMs.
pub(crate) async fn networks(host: &Host) -> Result<Vec<Network>, SiteError> {
    let mut networks = host.options.networks.clone();
    for (name, xml) in host.libvirt.networks().await? {
        let document = roxmltree::Document::parse(&xml);
        let document = document.map_err(|error| failed(format!("reading network {name}: {error}")))?;
        // Without `<forward>` a network reaches nothing but its members and the host.
        let forwards = document.root_element().children().any(|node| node.has_tag_name("forward"));
        let kind = if forwards { NetworkKind::Production } else { NetworkKind::Isolated };
        networks.push(Network { name, kind });
    }
    Ok(networks)
}

/// One VM. Its guest is asked for its addresses if an agent has opened its channel, and has so long to answer.
pub(crate) async fn machine(
    host: &Host,
    id: VmId,
    guest_answer_max: Duration,
) -> Result<VirtualMachine, SiteError> {
    let domain = host.domain(id, XmlKind::Live).await?;
    let power = host.power(id).await?;
    let disks = disks(host, &domain).await;
    let addresses = if power == PowerState::Running && host.libvirt.is_agent_there(&domain).await {
        guest::addresses_within(host, id, guest_answer_max).await.unwrap_or_default()
    } else {
        Vec::new()
    };
    let addresses_of = |mac: &str| {
        let own = addresses.iter().filter(|address| address.mac == mac);
        own.map(|address| address.address.clone()).collect()
    };
    let nics = domain.nics.iter().map(|nic| Nic {
        mac: nic.mac.clone(),
        network: nic.network.clone(),
        addresses: addresses_of(&nic.mac),
    });
    let nics = nics.collect();
    let findings = findings::of_machine(host, &domain, power).await?;
    Ok(VirtualMachine {
        id,
        power,
        firmware: if domain.is_uefi { Firmware::Uefi } else { Firmware::Bios },
        vcpus: domain.vcpus,
        memory_bytes: domain.memory_bytes,
        has_tpm: domain.has_tpm,
        has_guest_agent: domain.agent.is_some(),
        autostart: host.libvirt.autostart(id).await?,
        disks,
        nics,
        findings,
        name: domain.name,
    })
}

/// The disks of a VM.
pub(crate) async fn disks(host: &Host, domain: &Domain) -> Vec<Disk> {
    let mut disks = Vec::new();
    let os_key = os_disk(domain).map(|disk| &disk.key);
    // Of a VM in memory, all sizes are known by one question to QEMU; libvirt would ask it three for each disk.
    let is_live = domain.disks.iter().any(|disk| disk.index.is_some());
    let nodes = if is_live { Nodes::query(&host.libvirt, domain.id).await.map(Some) } else { Ok(None) };
    for disk in &domain.disks {
        disks.push(Disk {
            key: disk.key.clone(),
            path: disk.path.clone().unwrap_or_default(),
            format: format_of(disk),
            size_bytes: size_of(host, domain, disk, &nodes).await.unwrap_or_else(|error| {
                tracing::debug!(vm = %domain.id, disk = disk.key, %error, "the size of a disk is not known");
                0
            }),
            is_os_disk: os_key == Some(&disk.key),
            is_replicable: findings::obstacle(disk).is_none(),
        });
    }
    disks
}

/// The virtual size of a disk. `nodes`: what QEMU has said, if the VM is in memory.
async fn size_of(
    host: &Host,
    domain: &Domain,
    disk: &DomainDisk,
    nodes: &Result<Option<Nodes>, SiteError>,
) -> Result<u64, SiteError> {
    let node = match nodes {
        Ok(nodes) => nodes.as_ref().and_then(|nodes| nodes.top_of(disk).ok()),
        // Each question more to one that hangs would take as long again.
        Err(error) if matches!(error.kind, ErrorKind::TimedOut | ErrorKind::Busy) => {
            return Err(error.clone());
        }
        Err(_) => None,
    };
    match node {
        Some(node) => Ok(node.size_bytes),
        // It is off, was started or stopped just now, or the disk was plugged in just now.
        None => Ok(host.libvirt.disk_bytes(domain.id, &disk.key).await?),
    }
}

fn os_disk(domain: &Domain) -> Option<&DomainDisk> {
    let first =
        domain.disks.iter().filter(|disk| disk.boot_order.is_some()).min_by_key(|disk| disk.boot_order);
    first.or_else(|| domain.disks.first())
}

fn format_of(disk: &DomainDisk) -> DiskFormat {
    match disk.format.as_str() {
        "raw" => DiskFormat::Raw,
        "qcow2" => DiskFormat::Qcow2,
        _ => DiskFormat::Other,
    }
}

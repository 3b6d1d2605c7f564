//! Making a recovery VM: images first, then the definition, each step harmless to repeat.

use std::path::Path;

use mainstay_block::durable::sync_parent;
use mainstay_model::VmId;
use mainstay_provider::{NetworkKind, RecoveryDisk, RecoveryVmSpec, SiteError};
use sha2::{Digest as _, Sha256};

use super::{RecoveryRecord, middle_path, read_record, record_path, reserve, top_path};
use crate::command::{argument, run};
use crate::definition::Definition;
use crate::error::{While as _, refused};
use crate::files::{Owner, check_disk_key, give, write_record};
use crate::host::Host;
use crate::inventory::{machines, networks};
use crate::libvirt::XmlKind;
use crate::probe::hardware_acceleration;
use crate::xml::{Adaptation, DiskSource, NicRules, RecoveryMark, adapt};

/// Makes the VM unless it is there.
pub(crate) async fn create(host: &Host, spec: &RecoveryVmSpec) -> Result<(), SiteError> {
    spec.disks.iter().try_for_each(|disk| check_disk_key(&disk.key))?;
    let _lock = host.lock(spec.vm).await;
    if host.exists(spec.vm).await? {
        let domain = host.domain(spec.vm, XmlKind::Inactive).await?;
        return match domain.recovery {
            Some(mark) if mark.item == spec.item => Ok(()),
            _ => Err(refused(
                format!("the identifier {} belongs to VM {}, which is not this item's", spec.vm, domain.name),
                "Choose another identifier for the recovery VM.",
            )),
        };
    }
    if host.libvirt.find_by_name(&spec.name).await?.is_some() {
        return Err(refused(
            format!("this host has a VM named {} already", spec.name),
            "Rename it, or choose another name for the recovery VM.",
        ));
    }
    let definition = Definition::decode(&spec.definition)?;
    let own_network = prepare_network(host, spec).await?;
    let reservations = reserve::needed(&host.libvirt, spec.vm, &spec.nics).await?;
    let directory = host.files.recovery(spec.vm);
    host.make_directory(&directory).await?;
    let owner = host.owner().await?;
    let record = match read_record(host, spec.vm)? {
        Some(record) => record,
        None => RecoveryRecord {
            disks: spec.disks.clone(),
            own_network: own_network.clone(),
            reservations,
            hydrated: std::collections::BTreeSet::new(),
            is_held: false,
        },
    };
    // Written first: what it names is removed with the VM.
    write_record(&record_path(host, spec.vm), &record)?;
    reserve::make(&host.libvirt, &record.reservations).await?;
    let mut disks = Vec::new();
    for disk in &spec.disks {
        disks.push(make_images(&directory, disk, owner).await?);
    }
    grant_sockets(host, spec.vm).await?;
    let nvram = definition.write_nvram(&directory, owner)?;
    let tpm = definition.write_tpm(&directory, owner).await?;
    let isolated = if spec.is_test { own_network.as_deref() } else { None };
    let adaptation = Adaptation {
        id: spec.vm,
        name: &spec.name,
        mark: Some(RecoveryMark { item: spec.item, is_test: spec.is_test }),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        disks: &disks,
        nics: Some(NicRules { vm: spec.vm, plans: &spec.nics, isolated }),
        has_hardware: hardware_acceleration().await.is_ok(),
        machines: &machines(host).await?,
        nvram,
        tpm,
    };
    let xml = adapt(&definition.xml, &adaptation)?;
    host.libvirt.define(xml).await.doing("defining the recovery VM")?;
    Ok(())
}

/// Makes the images of a disk and answers how they hang together.
async fn make_images(
    directory: &Path,
    disk: &RecoveryDisk,
    owner: Option<Owner>,
) -> Result<DiskSource, SiteError> {
    let (top, middle) = (top_path(directory, &disk.key), middle_path(directory, &disk.key));
    let socket = argument(&disk.nbd_socket)?;
    // Only a note in the image: the VM's definition says the same with a delay for reconnecting.
    let beneath = format!("nbd+unix:///{}?socket={socket}", disk.nbd_export);
    let subclusters = "cluster_size=128k,extended_l2=on";
    make_overlay(&middle, "cluster_size=64k", "raw", &beneath, disk.size_bytes, owner).await?;
    make_overlay(&top, subclusters, "qcow2", argument(&middle)?, disk.size_bytes, owner).await?;
    Ok(DiskSource::Recovery {
        key: disk.key.clone(),
        top,
        middle,
        socket: disk.nbd_socket.clone(),
        export: disk.nbd_export.clone(),
    })
}

/// Makes an overlay unless it is there: half an image never has the name.
pub(crate) async fn make_overlay(
    path: &Path,
    options: &str,
    backing_format: &str,
    backing: &str,
    size_bytes: u64,
    owner: Option<Owner>,
) -> Result<(), SiteError> {
    if path.exists() {
        return Ok(());
    }
    let new_path = path.with_extension("new");
    crate::files::remove_file(&new_path)?;
    let (target, size) = (argument(&new_path)?, size_bytes.to_string());
    let arguments = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-o",
        options,
        "-F",
        backing_format,
        "-b",
        backing,
        target,
        &size,
    ];
    run("qemu-img", &arguments).await?;
    give(&new_path, owner)?;
    std::fs::File::open(&new_path)?.sync_all()?;
    std::fs::rename(&new_path, path).doing("naming an overlay")?;
    sync_parent(path).doing("naming an overlay")
}

/// Lets QEMU connect to the recovery point's sockets. They are made by another account and made anew whenever
/// their server starts, so this is done before every use.
pub(crate) async fn grant_sockets(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let Some(record) = read_record(host, vm)? else { return Ok(()) };
    let owner = host.owner().await?;
    for disk in record.disks.iter().filter(|disk| !record.hydrated.contains(&disk.key)) {
        if disk.nbd_socket.exists() {
            give(&disk.nbd_socket, owner)?;
        }
    }
    Ok(())
}

/// Checks where a test copy goes, and makes an isolated network when it needs one. Answers its name.
async fn prepare_network(host: &Host, spec: &RecoveryVmSpec) -> Result<Option<String>, SiteError> {
    if !spec.is_test {
        return Ok(None);
    }
    let known = networks(host).await?;
    for name in spec.nics.iter().filter_map(|nic| nic.network.as_deref()) {
        let is_isolated =
            known.iter().any(|network| network.name == name && network.kind == NetworkKind::Isolated);
        if !is_isolated {
            return Err(refused(
                format!("a test copy must not be attached to {name}, which is not an isolated network"),
                "Choose an isolated network, or none: the test copy then gets one of its own.",
            ));
        }
    }
    if spec.nics.iter().all(|nic| nic.network.is_some()) {
        return Ok(None);
    }
    if !has_network_driver(host).await? {
        return Ok(Some(own_group(spec.vm)));
    }
    let short: String = spec.vm.0.simple().to_string().chars().take(8).collect();
    let name = format!("mainstay-{short}");
    if !known.iter().any(|network| network.name == name) {
        // Interface names end at 15 characters.
        let xml =
            format!("<network><name>{name}</name><bridge name='ms{short}' stp='off' delay='0'/></network>");
        host.libvirt.create_network(xml).await.doing("making an isolated network")?;
    }
    Ok(Some(name))
}

/// Networks that libvirt makes need its privileged daemon.
async fn has_network_driver(host: &Host) -> Result<bool, SiteError> {
    Ok(host.libvirt.uri().starts_with("qemu:///system"))
}

/// A multicast group for one VM alone: QEMU's way to a network without privileges.
fn own_group(vm: VmId) -> String {
    let digest = Sha256::digest(vm.0.as_bytes());
    let port = 20_000 + u16::from_be_bytes([digest[3], digest[4]]) % 20_000;
    // 239/8 is for private use.
    format!("mcast:239.{}.{}.{}:{port}", digest[0], digest[1], digest[2])
}

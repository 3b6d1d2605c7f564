//! Setting and removing dirty bitmaps: the trackers of a VM.

use std::path::Path;

use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError};
use serde_json::json;

use crate::command::{argument, image_bitmaps, run};
use crate::error::{While as _, busy};
use crate::host::{Host, disk_path};
use crate::libvirt::XmlKind;
use crate::nodes::{Node, Nodes, PREFIX};
use crate::xml::DomainDisk;

/// What a dirty bit stands for: the block of the replica.
const GRANULARITY_BYTES: u64 = 4096;
/// Above this size a bit stands for 64 KiB: qcow2 stores bitmaps of at most 512 MiB, which is 16 TiB of 4 KiB.
const FINE_BYTES_MAX: u64 = 16 << 40;
/// Trackers that may pile up while no capture is confirmed; each costs memory and a little time per write.
const TRACKERS_MAX: usize = 8;

pub(crate) fn granularity(size_bytes: u64) -> u64 {
    if size_bytes > FINE_BYTES_MAX { 65536 } else { GRANULARITY_BYTES }
}

/// Sets a tracker on all nodes; those that have it already keep it. One after the other: it need only be there before the
/// moment from which it is wanted, and QEMU stops all disks of the guest for a transaction (`qmp_transaction` drains them), not
/// for a command of this kind.
pub(crate) async fn set_live(host: &Host, vm: VmId, nodes: &[&Node], tracker: &str) -> Result<(), SiteError> {
    for node in nodes.iter().filter(|node| node.bitmap(tracker).is_none()) {
        let arguments = json!({
            "node": node.name, "name": tracker, "granularity": granularity(node.size_bytes),
            "persistent": node.keeps_bitmaps,
        });
        host.libvirt.qmp(vm, "block-dirty-bitmap-add", arguments).await?;
    }
    Ok(())
}

/// Sets a tracker in the image of a VM that is off, which notes writes from the next start on.
pub(crate) async fn set_offline(disk: &DomainDisk, tracker: &str) -> Result<(), SiteError> {
    if disk.format != "qcow2" {
        return Ok(());
    }
    let path = disk_path(disk)?;
    if image_bitmaps(&path).await?.iter().any(|(name, _)| name == tracker) {
        return Ok(());
    }
    let size = crate::command::image_info(&path, "qcow2").await?["virtual-size"].as_u64().unwrap_or(0);
    let granularity = granularity(size).to_string();
    let path = argument(&path)?;
    run("qemu-img", &["bitmap", "--add", "-g", &granularity, "-f", "qcow2", path, tracker]).await.map(drop)
}

/// Bounds what failed captures leave behind: the oldest trackers go, but never `keep`.
pub(crate) async fn trim_live(host: &Host, vm: VmId, nodes: &Nodes, keep: &[&str]) {
    for node in nodes.iter() {
        let ours = node.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(PREFIX));
        // QEMU lists the newest first.
        for bitmap in ours.skip(TRACKERS_MAX).filter(|bitmap| !keep.contains(&bitmap.name.as_str())) {
            if let Err(error) = remove_live(host, vm, &node.name, &bitmap.name).await {
                tracing::debug!(%vm, %error, "an old tracker stays");
            }
        }
    }
}

async fn remove_live(host: &Host, vm: VmId, node: &str, bitmap: &str) -> Result<(), SiteError> {
    let arguments = json!({"node": node, "name": bitmap});
    host.libvirt.qmp(vm, "block-dirty-bitmap-remove", arguments).await.map(drop)
}

/// Removes all trackers of ours but one.
pub(crate) async fn sweep(host: &Host, vm: VmId, keep: Option<&str>) -> Result<(), SiteError> {
    if host.power(vm).await? == PowerState::Off {
        sweep_offline(host, vm, keep).await
    } else {
        sweep_live(host, vm, keep).await
    }
}

async fn sweep_live(host: &Host, vm: VmId, keep: Option<&str>) -> Result<(), SiteError> {
    let nodes = Nodes::query(&host.libvirt, vm).await?;
    let mut first_error = Ok(());
    // Those of an image beneath a snapshot go when it is the top one again; they may be needed until then.
    for node in nodes.iter().filter(|node| node.is_writable) {
        for bitmap in &node.bitmaps {
            if !bitmap.name.starts_with(PREFIX) || Some(bitmap.name.as_str()) == keep {
                continue;
            }
            let removed = remove_live(host, vm, &node.name, &bitmap.name).await;
            // The others go all the same.
            if first_error.is_ok() {
                first_error = removed.doing("removing a tracker");
            }
        }
    }
    first_error
}

async fn sweep_offline(host: &Host, vm: VmId, keep: Option<&str>) -> Result<(), SiteError> {
    if host.has_capture(vm) {
        return Err(busy("a capture of the VM is open", "It ends by itself; try again."));
    }
    for disk in host.domain(vm, XmlKind::Inactive).await?.disks {
        if disk.format != "qcow2" {
            continue;
        }
        let path = disk_path(&disk)?;
        if Path::new(&path).exists() {
            sweep_image(&path, keep).await?;
        }
    }
    Ok(())
}

async fn sweep_image(path: &Path, keep: Option<&str>) -> Result<(), SiteError> {
    for (name, _) in image_bitmaps(path).await? {
        if Some(name.as_str()) != keep {
            run("qemu-img", &["bitmap", "--remove", "-f", "qcow2", argument(path)?, &name]).await?;
        }
    }
    Ok(())
}

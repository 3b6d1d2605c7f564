//! Copying a recovery VM's disks out of the store, into the middle images, while the guest runs (or is held).
//!
//! Streaming into the *middle* image leaves the top image's allocation alone, which is the map of what changed since
//! the failover. libvirt does not know of the job and does not mind it. When a disk is done, QEMU has let go of the
//! NBD export, and the definition no longer names it, the disk counts as hydrated, in this order and on disk.

use mainstay_model::VmId;
use mainstay_provider::{Hydration, PowerState, SiteError, WhenOff};
use serde_json::{Value, json};

use super::{RecoveryRecord, middle_path, read_record, record_path};
use crate::error::{While as _, failed, not_found};
use crate::files::write_record;
use crate::host::Host;
use crate::libvirt::XmlKind;
use crate::nodes::{Node, Nodes};
use crate::xml::{Domain, DomainDisk, drop_backing_store};

/// One step: starts what is not started, finishes what is finished, and says how far it is.
pub(crate) async fn hydrate(host: &Host, vm: VmId, when_off: WhenOff) -> Result<Hydration, SiteError> {
    let _lock = host.lock(vm).await;
    let no_record = || not_found(format!("VM {vm} is not a recovery VM of this host"));
    let mut record = read_record(host, vm)?.ok_or_else(no_record)?;
    let is_needed = record.hydrated.len() < record.disks.len();
    if when_off == WhenOff::Hold && is_needed && host.power(vm).await? == PowerState::Off {
        // Written down first: whoever finds the VM paused knows that nobody wanted it to run.
        record.is_held = true;
        write_record(&record_path(host, vm), &record)?;
        super::grant_sockets(host, vm).await?;
        host.libvirt.start(vm, true).await.doing("holding the recovery VM in memory")?;
    }
    let progress = if when_off == WhenOff::Release {
        Hydration { bytes_done: 0, bytes_total: 0, is_complete: !is_needed }
    } else {
        go_on(host, vm, &mut record).await?
    };
    if record.is_held && (progress.is_complete || when_off == WhenOff::Release) {
        // One that runs was let run by somebody, who wants it.
        if host.power(vm).await? == PowerState::Paused {
            host.libvirt.destroy(vm).await.doing("ending the hold of the recovery VM")?;
        }
        record.is_held = false;
        write_record(&record_path(host, vm), &record)?;
    }
    Ok(progress)
}

async fn go_on(host: &Host, vm: VmId, record: &mut RecoveryRecord) -> Result<Hydration, SiteError> {
    let mut progress = Hydration { bytes_done: 0, bytes_total: 0, is_complete: false };
    let is_running = host.power(vm).await? != PowerState::Off;
    if is_running && record.hydrated.len() < record.disks.len() {
        super::grant_sockets(host, vm).await?;
    }
    let domain = host.domain(vm, XmlKind::Live).await?;
    for disk in record.disks.clone() {
        progress.bytes_total += disk.size_bytes;
        if record.hydrated.contains(&disk.key) {
            progress.bytes_done += disk.size_bytes;
        } else if is_running {
            let done = step(host, vm, &domain, record, &disk.key).await?;
            progress.bytes_done += done.unwrap_or(disk.size_bytes).min(disk.size_bytes);
        }
    }
    progress.is_complete = record.hydrated.len() == record.disks.len();
    Ok(progress)
}

/// A disk's step; answers the bytes copied, or `None` when it is hydrated.
async fn step(
    host: &Host,
    vm: VmId,
    domain: &Domain,
    record: &mut RecoveryRecord,
    key: &str,
) -> Result<Option<u64>, SiteError> {
    let disk = crate::host::find_disk(domain, key)?;
    let id = format!("ms-hydrate-{key}");
    let jobs = host.libvirt.qmp(vm, "query-jobs", Value::Null).await?;
    let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id.as_str()));
    if let Some(job) = job {
        if job["status"] == "paused" {
            // Stopped by an error: the store was away, or the disk full. It is tried again at each step.
            if let Err(error) = host.libvirt.qmp(vm, "block-job-resume", json!({"device": id})).await {
                tracing::debug!(%vm, disk = key, %error, "copying a disk cannot be resumed yet");
            }
        }
        return Ok(Some(job["current-progress"].as_u64().unwrap_or(0)));
    }
    let nodes = Nodes::query(&host.libvirt, vm).await?;
    let middle = middle_node(&nodes, disk)?;
    if is_streamed(host, vm, key).await? {
        finish(host, vm, disk, &nodes, &middle.name, record).await?;
        return Ok(None);
    }
    // The job must dismiss itself: one that is concluded and not dismissed keeps a filter node without a child, and
    // `query-named-block-nodes`, which libvirt asks all the time, then crashes QEMU (seen with 10.0.2). A job
    // that is gone has ended well if the image has no backing file any more; else it begins anew.
    let speed = host.options.hydration_bytes_per_second.unwrap_or(0);
    let arguments = json!({"device": middle.name, "job-id": id, "on-error": "stop", "speed": speed});
    host.libvirt.qmp(vm, "block-stream", arguments).await.doing("starting to copy a disk")?;
    Ok(Some(0))
}

/// Whether the middle image needs nothing beneath it any more, also across a crash in between.
async fn is_streamed(host: &Host, vm: VmId, key: &str) -> Result<bool, SiteError> {
    let path = middle_path(&host.files.recovery(vm), key);
    let info = crate::command::image_info(&path, "qcow2").await?;
    Ok(info["backing-filename"].is_null())
}

/// The node of the middle image, by libvirt's index. Never by file name: the top image's description contains it too,
/// and streaming the wrong node would erase the map of changes.
fn middle_node<'a>(nodes: &'a Nodes, disk: &DomainDisk) -> Result<&'a Node, SiteError> {
    let unknown = || failed(format!("QEMU has no middle image for disk {}", disk.key));
    let image = disk.backing.first().filter(|image| image.kind == "file").ok_or_else(unknown)?;
    nodes.by_index(image.index.ok_or_else(unknown)?).ok_or_else(unknown)
}

async fn finish(
    host: &Host,
    vm: VmId,
    disk: &DomainDisk,
    nodes: &Nodes,
    middle: &str,
    record: &mut RecoveryRecord,
) -> Result<(), SiteError> {
    // The store may forget the recovery point once we say so: until then every byte must be on disk.
    let flush = json!({"command-line": format!("qemu-io {middle} \"flush\"")});
    host.libvirt.qmp(vm, "human-monitor-command", flush).await.doing("flushing a copied disk")?;
    let path = middle_path(&host.files.recovery(vm), &disk.key);
    tokio::task::spawn_blocking(move || std::fs::File::open(path)?.sync_all())
        .await
        .map_err(|error| failed(format!("flushing a copied disk: {error}")))?
        .doing("flushing a copied disk")?;
    for image in disk.backing.iter().filter(|image| image.kind == "network") {
        let Some(index) = image.index else { continue };
        for kind in ["format", "storage"] {
            let name = format!("libvirt-{index}-{kind}");
            if nodes.has(&name) {
                // Refused as long as something uses it, and then the store must not be let go of.
                host.libvirt.qmp(vm, "blockdev-del", json!({"node-name": name})).await.or_else(gone)?;
            }
        }
    }
    let xml = host.libvirt.xml(vm, XmlKind::Inactive).await?;
    host.libvirt.define(drop_backing_store(&xml, &disk.key)?).await.doing("redefining the recovery VM")?;
    record.hydrated.insert(disk.key.clone());
    write_record(&record_path(host, vm), record)
}

/// A node without a monitor reference went with the last that used it.
fn gone(error: SiteError) -> Result<Value, SiteError> {
    let is_gone = error.message.contains("Failed to find node") || error.message.contains("Cannot find");
    if is_gone { Ok(Value::Null) } else { Err(error) }
}

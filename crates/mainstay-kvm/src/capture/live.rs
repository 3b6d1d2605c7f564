//! Capturing a VM that is in memory, the same way for qcow2 and raw disks:
//!
//! 1. the new tracker is set on all disks, just before the moment of the capture;
//! 2. libvirt's pull-mode backup of all disks makes the view;
//! 3. the old tracker is merged into a copy that no longer changes, and the copy is exported on libvirt's NBD
//!    server. (QEMU does not export a bitmap that still notes writes, and the old one must go on doing so: should
//!    this capture be abandoned, the next one starts from it.)
//!
//! The map is read after the moment of the capture, so it may name blocks written just after it: a superset.

use std::path::Path;
use std::sync::Arc;

use mainstay_model::VmId;
use mainstay_nbd::{Client, ClientOptions, Endpoint};
use mainstay_provider::{
    CaptureLimits, CaptureRequest, CapturedDisk, Changed, Consistency, ErrorKind, PowerState, SiteError,
};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::device::{CaptureDevice, GivenUp};
use super::map::{self, DEPTH_CONTEXT, MapSource, bitmap_context};
use super::stale::MAP_SUFFIX;
use super::{CREATION_TRACKER, CaptureRecord, Opened, freeze, now_ms, watchdog};
use crate::bitmaps::{granularity, set_live, trim_live};
use crate::error::{While as _, busy, failed, refused};
use crate::host::{Host, find_disk};
use crate::libvirt::XmlKind;
use crate::nodes::{Node, Nodes};
use crate::recovery::is_overlay;
use crate::xml::DomainDisk;

/// What watches an open capture.
pub(crate) struct Keeper {
    /// A watchdog that outlived its capture would end the next one.
    stop: DropGuard,
    watchdog: JoinHandle<()>,
}

impl Keeper {
    /// Ends the watching; the view is ended by the caller.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        // It may have failed, but then there is nobody left to watch anyway.
        let _ = self.watchdog.await;
    }
}

/// A disk to capture, and where its changes are found.
struct Plan<'a> {
    disk: &'a DomainDisk,
    node: &'a Node,
    source: MapSource,
}

/// An error if a job runs that is not ours. (One of ours without a record cannot be: records come first.)
pub(crate) async fn refuse_foreign_job(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let job = host.libvirt.job(vm).await.map_err(|error| match error.is_of_phantom_job() {
        true => refused(
            "libvirt takes a backup of the VM for running that does not exist: its daemon died when one was begun",
            "Stop libvirt's daemon, run `mainstay agent mend-libvirt`, and start the daemon again; the VM goes on meanwhile, and replication then goes on by itself. docs/guides/install.md says how the daemon does that at each start. A failover does not need it.",
        ),
        false => error.into(),
    })?;
    match job.operation {
        None => Ok(()),
        Some(_) if super::stale::is_ours(host, vm, &host.files.run()).await? => {
            host.libvirt.abort_job(vm).await?;
            super::wait_until_idle(host, vm).await
        }
        Some(_) => Err(busy(
            "another job runs on the VM (a backup, a snapshot, a migration)",
            "Nothing to do: it is tried again when the job has ended.",
        )),
    }
}

/// Takes the capture.
pub(crate) async fn begin(
    host: &Arc<Host>,
    vm: VmId,
    request: &CaptureRequest,
    record: &CaptureRecord,
    tracker: &str,
    power: PowerState,
) -> Result<Opened, SiteError> {
    let domain = host.domain(vm, XmlKind::Live).await?;
    let nodes = Nodes::query(&host.libvirt, vm).await?;
    let since = request.since.as_ref().map(|tracker| tracker.0.as_str());
    let mut plans = Vec::new();
    for key in &request.disks {
        let disk = find_disk(&domain, key)?;
        let node = nodes.top_of(disk)?;
        let beneath: Vec<_> = nodes.beneath(disk).collect();
        let source = MapSource::choose_live(since, node, &beneath, is_overlay(host, vm, disk));
        plans.push(Plan { disk, node, source });
    }
    let limits = within_space(request.limits, &record.run)?;
    trim_live(host, vm, &nodes, &[tracker, since.unwrap_or(CREATION_TRACKER)]).await;

    let socket = record.run.join("nbd");
    let (mut consistency, mut note) = (Consistency::Crash, String::new());
    if let Some(timeout) = request.freeze_timeout {
        if power != PowerState::Running {
            note = "the VM is paused".to_owned();
        } else {
            match freeze::freeze(host, vm, &domain, timeout).await {
                Ok(()) => consistency = Consistency::Application,
                Err(error) => note = error.message,
            }
        }
    }
    let viewed = view(host, vm, &plans, &domain.disks, &socket, tracker).await;
    let taken_at_ms = now_ms();
    freeze::release(host, vm).await;
    viewed?;

    let given_up = GivenUp::default();
    let stop = CancellationToken::new();
    let watch =
        watchdog::watch(Arc::clone(host), vm, record.run.clone(), limits, given_up.clone(), stop.clone());
    let keeper = Keeper { stop: stop.drop_guard(), watchdog: tokio::spawn(watch) };
    match open_disks(host, vm, &plans, &socket, tracker, &given_up).await {
        Ok(disks) => {
            Ok(Opened { disks, taken_at_ms, consistency, note, keeper: super::Keeper::Live(keeper) })
        }
        Err(error) => {
            keeper.stop().await;
            Err(error)
        }
    }
}

/// Scratch space below which no capture is begun: what a busy guest overwrites between two looks of the watchdog.
const SCRATCH_BYTES_MIN: u64 = 32 << 20;

/// Limits the scratch space to three quarters of what is free: the watchdog looks once a second, and a guest whose
/// scratch files cannot grow is paused.
fn within_space(limits: CaptureLimits, directory: &Path) -> Result<CaptureLimits, SiteError> {
    let space = nix::sys::statvfs::statvfs(directory)
        .map_err(|error| failed(format!("asking for free space in {}: {error}", directory.display())))?;
    let free = space.blocks_available() * space.fragment_size();
    let room = free / 4 * 3;
    if room < SCRATCH_BYTES_MIN.min(limits.scratch_bytes_max) {
        return Err(SiteError::new(
            ErrorKind::NoSpace,
            format!(
                "there is no room for a capture's scratch files: {free} bytes are free in {}",
                directory.display()
            ),
        )
        .with_remedy("Make space there, on the protected host; replication then goes on by itself."));
    }
    Ok(CaptureLimits { scratch_bytes_max: limits.scratch_bytes_max.min(room), ..limits })
}

/// Sets the tracker and begins the backup.
async fn view(
    host: &Host,
    vm: VmId,
    plans: &[Plan<'_>],
    all_disks: &[DomainDisk],
    socket: &Path,
    tracker: &str,
) -> Result<(), SiteError> {
    let nodes: Vec<&Node> = plans.iter().map(|plan| plan.node).collect();
    set_live(host, vm, &nodes, tracker).await.doing("setting a tracker")?;
    let xml = backup_xml(plans, all_disks, socket)?;
    host.libvirt.backup_begin(vm, xml).await.map_err(|error| {
        let mut error = SiteError::from(error);
        if error.message.contains("already in active block job") {
            error.kind = ErrorKind::Busy;
        }
        error.message = format!("beginning a capture: {}", error.message);
        error
    })
}

/// The description of the backup. Every disk is listed: for one that is not, libvirt makes its own choice.
fn backup_xml(plans: &[Plan<'_>], all_disks: &[DomainDisk], socket: &Path) -> Result<String, SiteError> {
    let run = socket.parent().ok_or_else(|| failed("the socket has no directory"))?;
    let mut disks = String::new();
    for disk in all_disks {
        let Some(plan) = plans.iter().find(|plan| plan.disk.key == disk.key) else {
            disks.push_str(&format!("<disk name='{}' backup='no'/>", escape(&disk.key)));
            continue;
        };
        let key = escape(&plan.disk.key);
        let scratch = escape(&run.join(format!("{}.scratch", plan.disk.key)).display().to_string());
        disks.push_str(&format!(
            "<disk name='{key}' backup='yes' type='file'><driver type='qcow2'/><scratch file='{scratch}'/></disk>"
        ));
    }
    Ok(format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>{disks}</disks></domainbackup>",
        escape(&socket.display().to_string())
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;").replace('"', "&quot;")
}

/// Reads the maps and connects to the data.
async fn open_disks(
    host: &Host,
    vm: VmId,
    plans: &[Plan<'_>],
    socket: &Path,
    tracker: &str,
    given_up: &GivenUp,
) -> Result<Vec<CapturedDisk>, SiteError> {
    copy_bitmaps(host, vm, plans, tracker).await.doing("freezing the old tracker")?;
    let mut disks = Vec::new();
    for plan in plans {
        let key = &plan.disk.key;
        let endpoint = Endpoint::Unix(socket.to_owned());
        let client = Client::connect(&endpoint, &ClientOptions::new(key.as_str())).await;
        let client = client.map_err(|error| failed(format!("opening disk {key} of the capture: {error}")))?;
        let changed = read_map(host, vm, plan, socket, tracker).await?;
        let device = Arc::new(CaptureDevice::new(client, given_up.clone()));
        disks.push(CapturedDisk { key: key.clone(), device, changed });
    }
    Ok(disks)
}

/// Copies the old trackers into bitmaps that note nothing. Each holds all that was noted before the capture's moment, and
/// perhaps some that came after it, so they need not be of one moment (see [`set_live`] for what a transaction would cost).
async fn copy_bitmaps(host: &Host, vm: VmId, plans: &[Plan<'_>], tracker: &str) -> Result<(), SiteError> {
    let copy = format!("{tracker}{MAP_SUFFIX}");
    for plan in plans {
        let MapSource::Bitmap { name, beneath } = &plan.source else { continue };
        let node = &plan.node.name;
        let others = beneath.iter().map(|node| json!({"node": node, "name": name}));
        let bitmaps: Vec<_> = std::iter::once(json!(name)).chain(others).collect();
        let add = json!({
            "node": node, "name": copy, "granularity": granularity(plan.node.size_bytes),
            "persistent": false, "disabled": true,
        });
        host.libvirt.qmp(vm, "block-dirty-bitmap-add", add).await?;
        let merge = json!({"node": node, "target": copy, "bitmaps": bitmaps});
        host.libvirt.qmp(vm, "block-dirty-bitmap-merge", merge).await?;
    }
    Ok(())
}

/// Exports a disk's map beside its data and reads it. The export ends with the capture.
async fn read_map(
    host: &Host,
    vm: VmId,
    plan: &Plan<'_>,
    socket: &Path,
    tracker: &str,
) -> Result<Changed, SiteError> {
    let copy = format!("{tracker}{MAP_SUFFIX}");
    let name = format!("{}-map", plan.disk.key);
    let mut export = json!({
        "type": "nbd", "id": format!("ms-map-{}", plan.disk.key), "node-name": plan.node.name, "name": name,
    });
    let context = match &plan.source {
        MapSource::None(reason) => return Ok(Changed::Unknown { reason: reason.clone() }),
        MapSource::Bitmap { .. } => {
            export["bitmaps"] = json!([copy]);
            bitmap_context(&copy)
        }
        MapSource::Depth => {
            export["allocation-depth"] = json!(true);
            DEPTH_CONTEXT.to_owned()
        }
    };
    host.libvirt.qmp(vm, "block-export-add", export).await.doing("exporting what changed")?;
    let options = ClientOptions::new(name).with_context(&context);
    let client = Client::connect(&Endpoint::Unix(socket.to_owned()), &options).await;
    let client = client.map_err(|error| failed(format!("reading what changed: {error}")))?;
    map::read(&client, &context).await
}

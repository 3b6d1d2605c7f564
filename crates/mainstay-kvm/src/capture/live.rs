//! Capturing a VM that is in memory, the same way for qcow2 and raw disks:
//!
//! 1. the new tracker is set on all disks, just before the moment of the capture;
//! 2. libvirt's pull-mode backup of all disks makes the view;
//! 3. the old tracker is exported on libvirt's NBD server and read. It goes on noting writes: should this capture be
//!    abandoned, the next one starts from it.
//!
//! The map is read after the moment of the capture, so it may name blocks written just after it: a superset.
//!
//! Each command holds up QEMU's main loop, and with it what the guest writes. So there are as few as can be: the scratch images are
//! made before ([`super::scratch`]), and old trackers are copied only where they are in several images, or QEMU refuses to export them.

use std::path::Path;
use std::sync::Arc;

use mainstay_model::VmId;
use mainstay_nbd::{Client, ClientOptions, Endpoint};
use mainstay_provider::{
    CaptureLimits, CaptureRequest, CapturedDisk, Changed, Consistency, ErrorKind, PowerState, SiteError,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::device::{CaptureDevice, GivenUp};
use super::map::{self, DEPTH_CONTEXT, MapSource, bitmap_context};
use super::{CREATION_TRACKER, CaptureRecord, Opened, freeze, now_ms, scratch, watchdog};
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
    for plan in &plans {
        let image = scratch::path(&record.run, &plan.disk.key);
        scratch::make(host, &image, plan.node.size_bytes).await.doing("making a capture's scratch images")?;
    }
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
        let scratch = escape(&scratch::path(run, &plan.disk.key).display().to_string());
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
    // With the scratch images of the view.
    let nodes = Nodes::query(&host.libvirt, vm).await?;
    let run = socket.parent().ok_or_else(|| failed("the socket has no directory"))?;
    let mut maps = Vec::new();
    for plan in plans {
        let scratch = nodes.of_image(&scratch::path(run, &plan.disk.key));
        maps.push(export_map(host, vm, plan, scratch, tracker).await?);
    }
    // All at once: the sooner the view can be closed again, the fewer writes of the guest wait for it.
    let endpoint = &Endpoint::Unix(socket.to_owned());
    let disks = plans.iter().zip(maps).map(async |(plan, map)| {
        let key = &plan.disk.key;
        let options = ClientOptions::new(key.as_str());
        let client = async {
            let client = Client::connect(endpoint, &options).await;
            client.map_err(|error| failed(format!("opening disk {key} of the capture: {error}")))
        };
        let changed = async {
            match map {
                Ok(map) => map.read(endpoint).await,
                Err(reason) => Ok(Changed::Unknown { reason }),
            }
        };
        let (client, changed) = tokio::try_join!(client, changed)?;
        let device = Arc::new(CaptureDevice::new(client, given_up.clone()));
        Ok(CapturedDisk { key: key.clone(), device, changed })
    });
    futures::future::try_join_all(disks).await
}

/// A map on libvirt's NBD server. It ends with the capture.
struct ExportedMap {
    export: String,
    context: String,
}

impl ExportedMap {
    async fn read(self, endpoint: &Endpoint) -> Result<Changed, SiteError> {
        // Nothing but the map: what is allocated on the whole disk takes QEMU long to say.
        let options =
            ClientOptions { contexts: vec![self.context.clone()], ..ClientOptions::new(self.export) };
        let client = Client::connect(endpoint, &options).await;
        let client = client.map_err(|error| failed(format!("reading what changed: {error}")))?;
        map::read(&client, &self.context).await
    }
}

/// Exports a disk's map beside its data; or says why there is none.
async fn export_map(
    host: &Host,
    vm: VmId,
    plan: &Plan<'_>,
    scratch: Option<&Node>,
    tracker: &str,
) -> Result<Result<ExportedMap, String>, SiteError> {
    let key = &plan.disk.key;
    let map = |context| ExportedMap { export: format!("{key}-map"), context };
    let export = async |node: &Node, what: Value| {
        let mut export = json!({
            "type": "nbd", "id": format!("ms-map-{key}"), "node-name": node.name, "name": format!("{key}-map"),
        });
        if let (Some(export), Value::Object(what)) = (export.as_object_mut(), what) {
            export.extend(what);
        }
        host.libvirt.qmp(vm, "block-export-add", export).await.doing("exporting what changed")
    };
    match &plan.source {
        MapSource::None(reason) => Ok(Err(reason.clone())),
        MapSource::Bitmap { name, beneath } => {
            // A read-only export may not have a bitmap that notes writes, because its readers may rely on its bits; a writable
            // one may. The disk itself cannot be exported so, its guest writes to it. But the scratch image lies upon it, and
            // QEMU finds the bitmap from there. Nobody writes to this export.
            if let Some(scratch) = scratch.filter(|_| beneath.is_empty()) {
                match export(scratch, json!({"writable": true, "bitmaps": [name]})).await {
                    Ok(_) => return Ok(Ok(map(bitmap_context(name)))),
                    // Tried with QEMU 10; what an older one refuses, it takes as a copy.
                    Err(error) if error.kind != ErrorKind::Failed => return Err(error),
                    Err(error) => tracing::debug!(%vm, %error, "a tracker is copied to be read"),
                }
            }
            let copy = copy_bitmaps(host, vm, plan, name, beneath, tracker).await;
            let copy = copy.doing("freezing the old tracker")?;
            export(plan.node, json!({"bitmaps": [copy]})).await?;
            Ok(Ok(map(bitmap_context(&copy))))
        }
        MapSource::Depth => {
            export(plan.node, json!({"allocation-depth": true})).await?;
            Ok(Ok(map(DEPTH_CONTEXT.to_owned())))
        }
    }
}

/// Merges the old tracker with those beneath it into a bitmap that notes nothing; answers its name. The sweep
/// takes it with the old one. It holds all that was noted before the capture's moment, and perhaps some that came after it, so the disks' need not be of one
/// moment (see [`set_live`] for what a transaction would cost).
async fn copy_bitmaps(
    host: &Host,
    vm: VmId,
    plan: &Plan<'_>,
    name: &str,
    beneath: &[String],
    tracker: &str,
) -> Result<String, SiteError> {
    let copy = format!("{tracker}-map");
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
    Ok(copy)
}

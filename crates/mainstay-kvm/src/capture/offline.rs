//! Capturing a VM that is off: its images, read-only, through `qemu-nbd`. The open images keep QEMU from starting the
//! VM meanwhile, so the age limit holds here as well.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_model::VmId;
use mainstay_provider::{CaptureRequest, CapturedDisk, Changed, Consistency, SiteError};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::device::{CaptureDevice, GivenUp};
use super::map::{self, DEPTH_CONTEXT, MapSource, bitmap_context};
use super::{CaptureRecord, Opened, now_ms};
use crate::bitmaps::set_offline;
use crate::command::{image_bitmaps, image_chain};
use crate::error::failed;
use crate::host::{Host, disk_path, find_disk};
use crate::libvirt::XmlKind;
use crate::qemu_nbd::{QemuNbd, Serving};
use crate::recovery::is_overlay;

/// The servers of an open capture, and the clock that ends them.
pub(crate) struct Keeper {
    /// Servers that outlived their capture would keep the VM from starting.
    stop: DropGuard,
    servers: JoinHandle<Result<(), SiteError>>,
}

impl Keeper {
    fn start(servers: Vec<QemuNbd>, age_max: Duration, given_up: GivenUp) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let servers = tokio::spawn(async move {
            if tokio::time::timeout(age_max, stopped.cancelled()).await.is_err() {
                let reason = format!("the capture was open for more than {} s", age_max.as_secs());
                given_up.because(std::io::ErrorKind::TimedOut, reason);
            }
            let mut result = Ok(());
            for server in servers {
                result = result.and(server.end().await);
            }
            result
        });
        Self { stop: stop.drop_guard(), servers }
    }

    /// Ends the servers.
    pub(crate) async fn stop(self) -> Result<(), SiteError> {
        drop(self.stop);
        self.servers.await.map_err(|error| failed(format!("ending a capture: {error}")))?
    }
}

/// Takes the capture.
pub(crate) async fn begin(
    host: &Arc<Host>,
    vm: VmId,
    request: &CaptureRequest,
    record: &CaptureRecord,
    tracker: &str,
) -> Result<Opened, SiteError> {
    if host.libvirt.has_managed_save(vm).await? {
        return Err(crate::error::refused(
            "the VM's memory lies in a managed save: its disks alone are not the VM",
            "Start the VM, or discard the saved state with `virsh managedsave-remove`.",
        ));
    }
    let domain = host.domain(vm, XmlKind::Inactive).await?;
    let since = request.since.as_ref().map(|tracker| tracker.0.as_str());
    let given_up = GivenUp::default();
    let (mut servers, mut disks) = (Vec::new(), Vec::new());
    for (index, key) in request.disks.iter().enumerate() {
        let disk = find_disk(&domain, key)?;
        let path = disk_path(disk)?;
        let bitmaps = if disk.format == "qcow2" { image_bitmaps(&path).await? } else { Vec::new() };
        let mut source = MapSource::choose(since, &bitmaps, is_overlay(host, vm, disk));
        if let MapSource::Bitmap { name, .. } = &source
            && !is_overlay(host, vm, disk)
            && is_beneath_too(&path, name).await?
        {
            source = MapSource::None(format!(
                "a snapshot has left part of the tracker {name} in the image beneath"
            ));
        }
        // Without a tracker the next capture compares hashes; that is no reason to fail this one.
        if let Err(error) = set_offline(disk, tracker).await {
            tracing::warn!(%vm, disk = key, %error, "no tracker can be set in an image");
        }
        let (bitmap, depth) = match &source {
            MapSource::Bitmap { name, .. } => (Some(name.clone()), false),
            MapSource::Depth => (None, true),
            MapSource::None(_) => (None, false),
        };
        let context = bitmap.as_deref().map(bitmap_context).or(depth.then(|| DEPTH_CONTEXT.to_owned()));
        let serving = Serving { format: disk.format.clone(), is_writable: false, bitmap, depth };
        let server = QemuNbd::start(&path, &record.run.join(format!("{index}.sock")), &serving).await?;
        let contexts: Vec<String> = context.iter().cloned().collect();
        let client = server.connect(&contexts).await;
        let client = client.map_err(|error| failed(format!("opening disk {key}: {error}")))?;
        let changed = match (context, source) {
            (Some(context), _) => map::read(&client, &context).await?,
            (None, MapSource::None(reason)) => Changed::Unknown { reason },
            (None, _) => Changed::Unknown { reason: "the tracker has no map".to_owned() },
        };
        let device = Arc::new(CaptureDevice::new(client, given_up.clone()));
        disks.push(CapturedDisk { key: key.clone(), device, changed });
        servers.push(server);
    }
    let keeper = Keeper::start(servers, request.limits.age_max, given_up);
    let note = if request.freeze_timeout.is_some() { "the VM is off".to_owned() } else { String::new() };
    Ok(Opened {
        disks,
        taken_at_ms: now_ms(),
        // Nothing runs, so nothing can be in the middle of anything; whether the guest ended cleanly, nobody knows.
        consistency: Consistency::Crash,
        note,
        keeper: super::Keeper::Offline(keeper),
    })
}

/// Whether an image beneath has a bitmap of this name too: see [`MapSource::choose_live`]. The maps of several images are not
/// put together here; hashes tell what differs.
async fn is_beneath_too(path: &Path, bitmap: &str) -> Result<bool, SiteError> {
    let chain = image_chain(path).await?;
    let has = |image: &Value| {
        let list = image["format-specific"]["data"]["bitmaps"].as_array();
        list.is_some_and(|list| list.iter().any(|found| found["name"] == bitmap))
    };
    Ok(chain.iter().skip(1).any(has))
}

//! Staging at home: the changes made at the recovery site gather in overlays over the home disks.
//!
//! Until the merge the home disks are bit-identical to what they were; the merge (`qemu-img commit`, offline) can be
//! repeated after any crash, because the overlays are kept until all of it is done. Paths and definition of the VM
//! stay as the administrator made them.

mod home;
mod merge;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use async_trait::async_trait;
use mainstay_block::BlockDevice;
use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError, Staging, StagingSpec};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::command::{argument, image_info, run};
use crate::error::{While as _, busy, failed, refused};
use crate::files::{Identity, check_disk_key, write_record};
use crate::host::{Host, disk_path, find_disk};
use crate::libvirt::XmlKind;
use crate::qemu_nbd::{QemuNbd, Serving, end_strays};
use crate::recovery::make_overlay;

pub(crate) use home::{create_home, remove_home};
pub(crate) use merge::{commit, discard};

/// What is remembered of a staging area, in `record.json` of its directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StagingRecord {
    disks: Vec<StagedDisk>,
    /// The merge has begun: from here on the home disks are changed, by us.
    is_merging: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StagedDisk {
    key: String,
    home: PathBuf,
    format: String,
    overlay: PathBuf,
    /// The home disk as it was when the staging began.
    identity: Identity,
}

fn record_path(host: &Host, vm: VmId) -> PathBuf {
    host.files.staging(vm).join("record.json")
}

/// Not in the staging area's own directory, whose name is too long for a socket.
fn socket_path(host: &Host, vm: VmId, index: usize) -> PathBuf {
    host.files.run().join(format!("{}-{index}", vm.0.simple()))
}

fn read_record(host: &Host, vm: VmId) -> Result<Option<StagingRecord>, SiteError> {
    crate::files::read_record(&record_path(host, vm))
}

struct KvmStaging {
    disks: Vec<StagedDisk>,
    servers: Vec<QemuNbd>,
    devices: Vec<Arc<dyn BlockDevice>>,
}

/// Opens the staging area, or goes on with it.
pub(crate) async fn open(host: &Arc<Host>, spec: &StagingSpec) -> Result<Box<dyn Staging>, SiteError> {
    let _lock = host.lock(spec.vm).await;
    check_home(host, spec.vm).await?;
    let directory = host.files.staging(spec.vm);
    mainstay_block::durable::create_directory(&directory).doing("making a staging area")?;
    end_strays(&directory).await?;
    let record = match read_record(host, spec.vm)? {
        Some(record) if record.is_merging => {
            return Err(refused(
                "the staged changes are being merged into the home disks",
                "Complete the failback first.",
            ));
        }
        Some(record) => record,
        None => {
            let record = describe(host, spec, &directory).await?;
            write_record(&record_path(host, spec.vm), &record)?;
            record
        }
    };
    prevent_start(host, spec.vm, &record)?;
    let (mut servers, mut devices) = (Vec::new(), Vec::<Arc<dyn BlockDevice>>::new());
    let mut disks = Vec::new();
    for (index, wanted) in spec.disks.iter().enumerate() {
        let staged = record.disks.iter().find(|disk| disk.key == wanted.key).ok_or_else(|| {
            refused(
                format!("disk {} is not part of the staging area that was begun", wanted.key),
                "Discard the staging area and begin again.",
            )
        })?;
        let home = argument(&staged.home)?;
        let options = "cluster_size=128k,extended_l2=on";
        make_overlay(&staged.overlay, options, &staged.format, home, wanted.size_bytes, None).await?;
        grow_overlay(&staged.overlay, wanted.size_bytes).await?;
        let serving = Serving { format: "qcow2".to_owned(), is_writable: true, ..Serving::default() };
        let socket = socket_path(host, spec.vm, index);
        let server = QemuNbd::start(&staged.overlay, &socket, &serving).await?;
        let client = server
            .connect(&[])
            .await
            .map_err(|error| failed(format!("opening the staging area: {error}")))?;
        devices.push(Arc::new(client));
        servers.push(server);
        disks.push(staged.clone());
    }
    Ok(Box::new(KvmStaging { disks, servers, devices }))
}

/// An overlay that was begun when the disk was smaller becomes as large as the disk is now.
async fn grow_overlay(overlay: &Path, size_bytes: u64) -> Result<(), SiteError> {
    let present = image_info(overlay, "qcow2").await?["virtual-size"].as_u64().unwrap_or(size_bytes);
    if present < size_bytes {
        let size = size_bytes.to_string();
        run("qemu-img", &["resize", "-q", "-f", "qcow2", argument(overlay)?, &size]).await?;
    }
    Ok(())
}

/// The home VM must be off, and nobody else may build on its disks.
async fn check_home(host: &Host, vm: VmId) -> Result<(), SiteError> {
    if host.power(vm).await? != PowerState::Off {
        return Err(refused("the home VM runs", "Shut it down; its disks are about to be replaced."));
    }
    if host.libvirt.snapshots(vm).await? > 0 {
        return Err(refused(
            "the home VM has snapshots, which a changed disk would break",
            "Delete its snapshots.",
        ));
    }
    if host.libvirt.has_managed_save(vm).await? {
        return Err(refused(
            "the home VM has a managed save, which does not belong to the new disks",
            "Remove it with `virsh managedsave-remove`.",
        ));
    }
    Ok(())
}

async fn describe(host: &Host, spec: &StagingSpec, directory: &Path) -> Result<StagingRecord, SiteError> {
    let domain = host.domain(spec.vm, XmlKind::Inactive).await?;
    let mut disks = Vec::new();
    for wanted in &spec.disks {
        check_disk_key(&wanted.key)?;
        let disk = find_disk(&domain, &wanted.key)?;
        let size = host.libvirt.disk_bytes(spec.vm, &wanted.key).await?;
        if size > wanted.size_bytes {
            return Err(refused(
                format!(
                    "home disk {} has {size} bytes and cannot shrink to {}",
                    wanted.key, wanted.size_bytes
                ),
                "Fail back to another VM, or to a disk of the same size.",
            ));
        }
        let home = disk_path(disk)?;
        disks.push(StagedDisk {
            key: wanted.key.clone(),
            identity: Identity::of(&home)?,
            home,
            format: disk.format.clone(),
            overlay: directory.join(format!("{}.qcow2", wanted.key)),
        });
    }
    Ok(StagingRecord { disks, is_merging: false })
}

/// Takes the lock that QEMU takes before it writes to an image. QEMU does not lock a raw image beneath an overlay, so
/// without this the home VM could be started and ruin what is staged. The lock ends with this process.
fn prevent_start(host: &Host, vm: VmId, record: &StagingRecord) -> Result<(), SiteError> {
    /// QEMU's byte for "somebody must not see writes by others" (`RAW_LOCK_SHARED_BASE` + write).
    const NOBODY_WRITES: i64 = 201;
    let mut staged = host.staged.lock().unwrap_or_else(PoisonError::into_inner);
    if staged.contains_key(&vm) {
        return Ok(());
    }
    let mut locks = Vec::new();
    for disk in &record.disks {
        let file = File::open(&disk.home).doing(&format!("opening home disk {}", disk.key))?;
        let range = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: NOBODY_WRITES,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&range)).map_err(|error| {
            busy(format!("home disk {} is in use: {error}", disk.key), "Stop whatever writes to it.")
        })?;
        locks.push(file);
    }
    staged.insert(vm, locks);
    Ok(())
}

fn allow_start(host: &Host, vm: VmId) {
    host.staged.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
}

#[async_trait]
impl Staging for KvmStaging {
    fn devices(&self) -> &[Arc<dyn BlockDevice>] {
        &self.devices
    }

    async fn is_base_changed(&self) -> Result<bool, SiteError> {
        for disk in &self.disks {
            if Identity::of(&disk.home)? != disk.identity {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn close(self: Box<Self>) -> Result<(), SiteError> {
        let Self { servers, devices, .. } = *self;
        drop(devices);
        let mut result = Ok(());
        for server in servers {
            result = result.and(server.end().await);
        }
        result
    }
}

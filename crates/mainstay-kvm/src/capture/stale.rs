//! Ending what is left of a capture: after closing it, after a failure, and after the agent died.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, SiteError};
use serde_json::{Value, json};

use super::{CaptureRecord, OpenMark, end, freeze, scratch};
use crate::error::{While as _, busy};
use crate::files::{read_record, remove_directory, remove_file};
use crate::host::Host;
use crate::libvirt::NO_DOMAIN_BACKUP;
use crate::nodes::Nodes;
use crate::qemu_nbd::end_strays;

/// How long the end of a job may take. libvirt learns of it by an event, and its one thread for events may first spend 30 s on
/// each guest that began to use its agent's channel meanwhile (see `libvirt::channel`).
const IDLE_TIMEOUT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(5);

/// Ends the capture of which there is a record. Trackers stay.
pub(crate) async fn abandon(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let path = host.files.capture_record(vm);
    let Some(record) = read_record::<CaptureRecord>(&path)? else { return Ok(()) };
    match host.libvirt.state(vm).await.map_err(SiteError::from) {
        Ok(state) if state.power != mainstay_provider::PowerState::Off => {
            if is_ours(host, vm, &record.run).await? {
                host.libvirt.abort_job(vm).await.doing("ending a capture")?;
                wait_until_idle(host, vm).await?;
                scratch::remove_all(&record.run)?;
                if host.libvirt.state(vm).await?.is_paused_by_io_error {
                    host.libvirt.resume(vm).await.doing("resuming a guest that a capture paused")?;
                }
            } else if !has_job(host, vm).await? {
                end_orphans(host, vm, &record.run).await?;
            }
        }
        Ok(_) => {}
        Err(error) if error.kind == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    end_strays(&record.run).await?;
    remove_directory(&record.run)?;
    remove_file(&path)
}

/// Ends the captures that an agent before us left open; answers the VMs concerned.
pub(crate) async fn abandon_all(host: &Arc<Host>) -> Result<Vec<VmId>, SiteError> {
    let mut vms = freeze::release_all(host).await?;
    let mut first_error = Ok(());
    for vm in host.files.captured_vms()? {
        let _lock = host.lock(vm).await;
        if !host.note_capture(vm) {
            continue;
        }
        let open = OpenMark { host: Arc::clone(host), vm };
        let ended = end(open).await.doing(&format!("cleaning up after a capture of VM {vm}"));
        // The others are ended all the same.
        if first_error.is_ok() {
            first_error = ended;
        }
        if !vms.contains(&vm) {
            vms.push(vm);
        }
    }
    first_error.map(|()| vms)
}

/// Whether a backup job runs and is ours: only then does it serve on a socket in a directory of ours. libvirt knows it without asking
/// QEMU.
pub(crate) async fn is_ours(host: &Host, vm: VmId, run: &Path) -> Result<bool, SiteError> {
    match host.libvirt.backup_xml(vm).await {
        Ok(xml) => Ok(xml.contains(&format!("{}/", run.display()))),
        // No job, or one of another kind.
        Err(error) if error.code == NO_DOMAIN_BACKUP => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits until no job runs on the VM.
pub(crate) async fn wait_until_idle(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let deadline = Instant::now() + IDLE_TIMEOUT;
    // For as long as a backup runs, QEMU is asked for each answer of libvirt about its job, and its guest waits meanwhile.
    while is_ours(host, vm, &host.files.run()).await? || has_job(host, vm).await? {
        if Instant::now() > deadline {
            return Err(busy("a job of the VM does not end", "See `virsh domjobinfo`."));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Ends what QEMU still does for a capture that libvirt has forgotten: its daemon died when the capture was begun. Otherwise each
/// write of the guest would go on being copied into the scratch file, and libvirt would begin no other backup.
async fn end_orphans(host: &Host, vm: VmId, run: &Path) -> Result<(), SiteError> {
    let nodes = Nodes::query(&host.libvirt, vm).await?;
    if !nodes.iter().any(|node| node.file.starts_with(run)) {
        return Ok(());
    }
    tracing::warn!(%vm, "QEMU works on a capture that libvirt has forgotten; it is ended");
    for job in backups(host, vm).await? {
        host.libvirt.qmp(vm, "block-job-cancel", json!({"device": job, "force": true})).await?;
    }
    let deadline = Instant::now() + IDLE_TIMEOUT;
    while !backups(host, vm).await?.is_empty() {
        if Instant::now() > deadline {
            return Err(busy(
                "a backup of which libvirt does not know does not end",
                "Nothing to do: it is tried again.",
            ));
        }
        tokio::time::sleep(POLL).await;
    }
    // Refused if the daemon died before it was started.
    if let Err(error) = host.libvirt.qmp(vm, "nbd-server-stop", Value::Null).await {
        tracing::debug!(%vm, %error, "QEMU has no NBD server to stop");
    }
    Ok(())
}

/// The backups that QEMU carries out, whoever wanted them.
async fn backups(host: &Host, vm: VmId) -> Result<Vec<Value>, SiteError> {
    let jobs = host.libvirt.qmp(vm, "query-block-jobs", Value::Null).await?;
    let backups = jobs.as_array().into_iter().flatten().filter(|job| job["type"] == "backup");
    Ok(backups.map(|job| job["device"].clone()).collect())
}

/// Whether a job runs on the VM. One that exists only in libvirt's memory does not.
async fn has_job(host: &Host, vm: VmId) -> Result<bool, SiteError> {
    match host.libvirt.job(vm).await {
        Ok(job) => Ok(job.operation.is_some()),
        Err(error) if error.is_of_phantom_job() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

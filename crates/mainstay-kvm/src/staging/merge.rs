//! Ending a staging area: into the home disks, or away.

use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError};

use super::home::made_path;
use super::{allow_start, read_record, record_path, socket_path};
use crate::command::{argument, run};
use crate::error::{While as _, failed, refused};
use crate::files::{Identity, remove_directory, remove_file, write_record};
use crate::host::Host;
use crate::qemu_nbd::end_strays;

/// Merges what was staged, and removes the staging area.
pub(crate) async fn commit(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    merge(host, vm).await
}

async fn merge(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let Some(mut record) = read_record(host, vm)? else { return end_merge(host, vm) };
    if host.power(vm).await? != PowerState::Off {
        return Err(refused("the home VM runs", "Shut it down before its disks are replaced."));
    }
    end_strays(&host.files.staging(vm)).await?;
    if !record.is_merging {
        for disk in &record.disks {
            if Identity::of(&disk.home)? != disk.identity {
                return Err(refused(
                    format!("home disk {} was changed by somebody since the staging began", disk.key),
                    "Begin the failback again: the difference is then found by comparing.",
                ));
            }
        }
        record.is_merging = true;
        write_record(&record_path(host, vm), &record)?;
    }
    // QEMU's own lock takes over from here.
    allow_start(host, vm);
    for disk in &record.disks {
        if disk.overlay.exists() {
            // `-d` leaves the overlay as it is, so that this can be done again.
            run("qemu-img", &["commit", "-q", "-d", "-f", "qcow2", argument(&disk.overlay)?])
                .await
                .doing(&format!("merging disk {}", disk.key))?;
        }
        let home = disk.home.clone();
        tokio::task::spawn_blocking(move || std::fs::File::open(home)?.sync_all())
            .await
            .map_err(|error| failed(format!("flushing a home disk: {error}")))?
            .doing("flushing a home disk")?;
    }
    end_merge(host, vm)
}

fn end_merge(host: &Host, vm: VmId) -> Result<(), SiteError> {
    // From now on a VM that was made for the failback is the administrator's.
    remove_file(&made_path(host, vm))?;
    clear(host, vm)
}

/// Removes the staging area; a merge that had begun is ended instead. Answers whether that was so.
pub(crate) async fn discard(host: &Host, vm: VmId) -> Result<bool, SiteError> {
    let _lock = host.lock(vm).await;
    if read_record(host, vm)?.is_some_and(|record| record.is_merging) {
        merge(host, vm).await?;
        return Ok(true);
    }
    end_strays(&host.files.staging(vm)).await?;
    clear(host, vm)?;
    Ok(false)
}

fn clear(host: &Host, vm: VmId) -> Result<(), SiteError> {
    allow_start(host, vm);
    let disks = read_record(host, vm)?.map_or(0, |record| record.disks.len());
    for index in 0..disks {
        remove_file(&socket_path(host, vm, index))?;
    }
    remove_directory(&host.files.staging(vm))
}

//! Recovery VMs: see [`create`] for how one is made and [`hydrate`] for how it becomes independent.
//!
//! Each disk is a chain: *top*, where the guest writes, over *middle*, which is filled from the recovery point's NBD
//! export beneath it. The top image has subclusters of 4 KiB, so what it holds is what changed since the failover:
//! a change map that no crash can lose.

mod create;
mod hydrate;
mod remove;
mod reserve;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mainstay_model::VmId;
use mainstay_provider::{RecoveryDisk, SiteError};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::xml::DomainDisk;

pub(crate) use create::{create, grant_sockets, make_overlay};
pub(crate) use hydrate::hydrate;
pub(crate) use remove::remove;
pub(crate) use reserve::Reservation;

/// What is remembered of a recovery VM, in `record.json` of its directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RecoveryRecord {
    pub(crate) disks: Vec<RecoveryDisk>,
    /// A network that was made for this VM alone.
    pub(crate) own_network: Option<String>,
    /// Addresses that networks hand out to this VM.
    #[serde(default)]
    pub(crate) reservations: Vec<Reservation>,
    /// Keys of the disks that no longer need the recovery point.
    pub(crate) hydrated: BTreeSet<String>,
    /// Whether the VM, which was off, was brought into memory only for its disks to be copied.
    #[serde(default)]
    pub(crate) is_held: bool,
}

fn record_path(host: &Host, vm: VmId) -> PathBuf {
    host.files.recovery(vm).join("record.json")
}

pub(crate) fn read_record(host: &Host, vm: VmId) -> Result<Option<RecoveryRecord>, SiteError> {
    crate::files::read_record(&record_path(host, vm))
}

fn top_path(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("{key}-top.qcow2"))
}

fn middle_path(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("{key}-middle.qcow2"))
}

/// Whether a disk is the top image of a recovery VM, so that its allocation tells what changed.
pub(crate) fn is_overlay(host: &Host, vm: VmId, disk: &DomainDisk) -> bool {
    let top = top_path(&host.files.recovery(vm), &disk.key);
    disk.path.as_deref().is_some_and(|path| Path::new(path) == top)
}

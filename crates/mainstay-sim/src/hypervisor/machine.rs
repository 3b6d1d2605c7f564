//! A simulated VM: what is durable on its host.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use mainstay_block::{BLOCK_BYTES, blocks_of};
use mainstay_model::{CaptureId, ItemId};
use mainstay_provider::{ErrorKind, Nic, PowerState, SiteError, TrackerId};
use serde::{Deserialize, Serialize};

/// What a definition says; written as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) vcpus: u32,
    pub(super) memory_bytes: u64,
    /// MAC address and network.
    pub(super) nics: Vec<(String, String)>,
    /// What the firmware keeps: how often the VM was started from being off.
    pub(super) boots: u64,
}

impl Shape {
    pub(super) fn nics(&self) -> Vec<Nic> {
        let nic = |(mac, network): &(String, String)| Nic {
            mac: mac.clone(),
            network: network.clone(),
            addresses: Vec::new(),
        };
        self.nics.iter().map(nic).collect()
    }
}

/// Whose recovery VM it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecoveryMark {
    pub(super) item: ItemId,
    pub(super) is_test: bool,
}

pub(super) struct Machine {
    pub(super) name: String,
    pub(super) power: PowerState,
    pub(super) autostart: bool,
    pub(super) shape: Shape,
    pub(super) recovery: Option<RecoveryMark>,
    pub(super) disks: Vec<MachineDisk>,
    /// Disks that the administrator has taken away.
    pub(super) detached: Vec<MachineDisk>,
    /// Blocks written since each tracker was set, per disk.
    pub(super) trackers: HashMap<TrackerId, Vec<BTreeSet<u64>>>,
    /// Open captures; false once the capture's view is gone.
    pub(super) captures: HashMap<CaptureId, Arc<AtomicBool>>,
    /// Whether they are an earlier agent's, and their end is pursued.
    pub(super) are_captures_stale: bool,
    pub(super) staging: Option<StagingArea>,
    /// Whether it was made for a failback that has not filled it yet.
    pub(super) is_made: bool,
    /// What its disks held when it was last started from being off.
    pub(super) started_from: Option<Arc<BTreeMap<String, Vec<u8>>>>,
    pub(super) addresses: Vec<(String, String)>,
}

/// A disk. A home VM writes into `base`; a recovery VM into `overlay`, over a base that is the recovery point's.
pub(super) struct MachineDisk {
    pub(super) key: String,
    pub(super) base: Vec<u8>,
    /// Blocks of the base that are in the store only.
    pub(super) missing: BTreeSet<u64>,
    /// Socket and export that the missing blocks are read from.
    pub(super) source: Option<(PathBuf, String)>,
    /// Bytes of that export; the disk may have grown since.
    pub(super) exported: u64,
    pub(super) overlay: BTreeMap<u64, Vec<u8>>,
    /// Counts writes, by whomever.
    pub(super) version: u64,
}

/// Changes staged over the disks of a home VM that is off.
pub(super) struct StagingArea {
    pub(super) item: ItemId,
    /// Size and staged blocks per disk, in the order of the spec, with the disk's index.
    pub(super) disks: Vec<StagedDisk>,
    /// Handles of an older opening write no more.
    pub(super) opening: u64,
}

pub(super) struct StagedDisk {
    pub(super) disk: usize,
    pub(super) size_bytes: u64,
    pub(super) blocks: BTreeMap<u64, Vec<u8>>,
    pub(super) base_version: u64,
}

pub(super) fn block_range(block: u64, size: u64) -> std::ops::Range<usize> {
    let start = block * BLOCK_BYTES;
    start as usize..(start + BLOCK_BYTES).min(size) as usize
}

pub(super) fn apply_blocks(bytes: &mut [u8], blocks: &BTreeMap<u64, Vec<u8>>) {
    let size = bytes.len() as u64;
    for (block, data) in blocks {
        let range = block_range(*block, size);
        // The last block was a piece if the disk has grown since.
        let length = range.len().min(data.len());
        bytes[range.start..range.start + length].copy_from_slice(&data[..length]);
    }
}

impl MachineDisk {
    pub(super) fn new(key: &str, base: Vec<u8>) -> Self {
        Self {
            key: key.to_owned(),
            exported: base.len() as u64,
            base,
            missing: BTreeSet::new(),
            source: None,
            overlay: BTreeMap::new(),
            version: 0,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.base.len() as u64
    }
}

impl Machine {
    pub(super) fn disk(&self, key: &str) -> Result<usize, SiteError> {
        self.disks.iter().position(|disk| disk.key == key).ok_or_else(|| {
            SiteError::new(ErrorKind::NotFound, format!("'{}' has no disk '{key}'", self.name))
        })
    }

    /// Writes whole blocks, as the guest or a merge does.
    pub(super) fn write_block(&mut self, disk: usize, block: u64, data: &[u8]) {
        let is_recovery = self.recovery.is_some();
        let target = &mut self.disks[disk];
        let range = block_range(block, target.size());
        // A piece at the end of a disk that has grown since it was staged is followed by zeros.
        let mut data = data.to_vec();
        data.resize(range.len(), 0);
        if is_recovery {
            target.overlay.insert(block, data);
        } else {
            target.base[range].copy_from_slice(&data);
        }
        target.version += 1;
        for dirty in self.trackers.values_mut() {
            dirty[disk].insert(block);
        }
    }

    pub(super) fn set_tracker(&mut self, tracker: &TrackerId) {
        let disks = self.disks.len();
        self.trackers.entry(tracker.clone()).or_insert_with(|| vec![BTreeSet::new(); disks]);
    }

    /// The process that ran the VM is gone, and with it every open view.
    pub(super) fn end_captures(&mut self) {
        self.are_captures_stale = false;
        for (_, is_alive) in self.captures.drain() {
            is_alive.store(false, Ordering::SeqCst);
        }
    }

    /// Whether somebody has a capture open. What an earlier agent left, and what could not be ended then, has ended meanwhile.
    pub(super) fn has_capture(&mut self) -> bool {
        if self.are_captures_stale {
            self.end_captures();
        }
        !self.captures.is_empty()
    }

    pub(super) fn all_blocks(&self, disk: usize) -> u64 {
        blocks_of(self.disks[disk].size())
    }
}

/// What the guest writes when it boots, and as its last act when it is shut down in an orderly way.
pub(super) const BOOT_BLOCK: (u64, u8) = (1, 0xB0);
pub(super) const SHUTDOWN_BLOCK: (u64, u8) = (2, 0x5D);

pub(super) fn mark(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK_BYTES as usize]
}

//! What every disk held at the moment of every capture.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mainstay_block::BLOCK_BYTES;
use mainstay_control::{Clock, ManualClock};
use mainstay_model::VmId;

/// The bytes of all disks of a VM.
pub(crate) type Disks = Vec<Vec<u8>>;

/// A capture.
struct Captured {
    vm: VmId,
    /// Counts captures up.
    sequence: usize,
    disks: Arc<Disks>,
    /// By the server's clock, which the host's may differ from.
    captured_ms: i64,
}

/// Remembers captures by their moment, which no two captures share.
pub struct Oracle {
    clock: Arc<ManualClock>,
    captures: Mutex<BTreeMap<i64, Captured>>,
}

impl Oracle {
    /// An oracle that has seen nothing.
    pub fn new(clock: Arc<ManualClock>) -> Self {
        Self { clock, captures: Mutex::default() }
    }

    fn captures(&self) -> MutexGuard<'_, BTreeMap<i64, Captured>> {
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a capture and answers its moment: now by the host's clock, or the next millisecond that no other capture has.
    pub(crate) fn record(&self, vm: VmId, disks: Disks, clock_offset_ms: i64) -> (i64, Arc<Disks>) {
        let mut captures = self.captures();
        let captured_ms = self.clock.now_ms();
        let mut taken_at_ms = captured_ms + clock_offset_ms;
        while captures.contains_key(&taken_at_ms) {
            taken_at_ms += 1;
        }
        let disks = Arc::new(disks);
        let sequence = captures.len();
        captures.insert(taken_at_ms, Captured { vm, sequence, disks: disks.clone(), captured_ms });
        (taken_at_ms, disks)
    }

    /// What the disks held at the moment of a capture.
    pub fn disks_at(&self, taken_at_ms: i64) -> Option<Arc<Vec<Vec<u8>>>> {
        self.captures().get(&taken_at_ms).map(|captured| captured.disks.clone())
    }

    /// When a capture was taken, by the server's clock.
    pub fn captured_ms(&self, taken_at_ms: i64) -> Option<i64> {
        self.captures().get(&taken_at_ms).map(|captured| captured.captured_ms)
    }

    /// Bytes of the blocks in which each capture of a VM differs from the one before, from that of this moment on, and the number of
    /// captures after it.
    pub fn bytes_since(&self, vm: VmId, since_ms: i64) -> Option<(u64, u64)> {
        let moments = {
            let captures = self.captures();
            let since = captures.get(&since_ms)?.sequence;
            let later =
                captures.iter().filter(|(_, captured)| captured.vm == vm && captured.sequence >= since);
            let mut later: Vec<_> = later.map(|(moment, captured)| (captured.sequence, *moment)).collect();
            later.sort_unstable();
            later
        };
        let mut bytes = 0;
        for pair in moments.windows(2) {
            bytes += self.bytes_between(pair[0].1, pair[1].1)?;
        }
        Some((bytes, moments.len() as u64 - 1))
    }

    /// Bytes of the blocks in which a capture differs from an earlier one of the same disks.
    pub fn bytes_between(&self, before_ms: i64, after_ms: i64) -> Option<u64> {
        let (before, after) = (self.disks_at(before_ms)?, self.disks_at(after_ms)?);
        let block = |disk: &[u8], index: usize| {
            let start = (index * BLOCK_BYTES as usize).min(disk.len());
            let mut block = disk[start..(start + BLOCK_BYTES as usize).min(disk.len())].to_vec();
            block.resize(BLOCK_BYTES as usize, 0);
            block
        };
        let mut bytes = 0;
        for (before, after) in before.iter().zip(after.iter()) {
            let blocks = after.len().div_ceil(BLOCK_BYTES as usize);
            let differing = (0..blocks).filter(|index| block(before, *index) != block(after, *index)).count();
            bytes += differing as u64 * BLOCK_BYTES;
        }
        Some(bytes)
    }
}

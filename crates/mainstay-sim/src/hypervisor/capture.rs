//! Captures: a copy of all disks at one moment, and what changed since a tracker.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use mainstay_block::{BLOCK_BYTES, BlockDevice, BlockError, Extent, ExtentKind, check_range, is_zero};
use mainstay_model::{CaptureId, VmId};
use mainstay_provider::{
    Capture, CaptureRequest, CapturedDisk, Changed, Consistency, ErrorKind, PowerState, SiteError, TrackerId,
};

use super::{SimHypervisor, machine::Machine};

struct SimCapture {
    host: SimHypervisor,
    vm: VmId,
    id: CaptureId,
    taken_at_ms: i64,
    consistency: Consistency,
    disks: Vec<CapturedDisk>,
    tracker: TrackerId,
}

/// One disk as it was; fails once the capture's process is gone.
struct View {
    disks: Arc<Vec<Vec<u8>>>,
    index: usize,
    is_alive: Arc<AtomicBool>,
}

impl View {
    fn bytes(&self, offset: u64, length: u64) -> Result<&[u8], BlockError> {
        let bytes = &self.disks[self.index];
        check_range(offset, length, bytes.len() as u64)?;
        if !self.is_alive.load(Ordering::SeqCst) {
            return Err(std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the capture has ended").into());
        }
        Ok(&bytes[offset as usize..(offset + length) as usize])
    }
}

#[async_trait]
impl BlockDevice for View {
    fn size(&self) -> u64 {
        self.disks[self.index].len() as u64
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        // Other work gets its turn, as with a real device.
        tokio::task::yield_now().await;
        self.bytes(offset, length).map(Bytes::copy_from_slice)
    }

    async fn write(&self, _: u64, _: Bytes) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    async fn write_zeroes(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        let bytes = self.bytes(offset, length)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(offset + length);
            let kind = match is_zero(&bytes[(at - offset) as usize..(end - offset) as usize]) {
                true => ExtentKind::Zero,
                false => ExtentKind::Data,
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += end - at,
                _ => extents.push(Extent { offset: at, length: end - at, kind }),
            }
            at = end;
        }
        Ok(extents)
    }
}

impl SimHypervisor {
    pub(super) async fn take_capture(
        &self,
        vm: VmId,
        request: CaptureRequest,
    ) -> Result<Box<dyn Capture>, SiteError> {
        // A base never changes, so it may be read before the moment of the capture.
        let bases = self.bases(vm).await?;
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        if machine.has_capture() {
            return Err(SiteError::new(ErrorKind::Busy, format!("a capture of VM {vm} is open")));
        }
        let indices = request.disks.iter().map(|key| machine.disk(key)).collect::<Result<Vec<_>, _>>()?;
        let all = machine.contents(bases);
        let changed: Vec<_> = indices.iter().map(|index| machine.changed(*index, &request.since)).collect();
        let tracker = TrackerId(format!("capture-{}", request.capture));
        machine.set_tracker(&tracker);
        let is_alive = Arc::new(AtomicBool::new(true));
        machine.captures.insert(request.capture, is_alive.clone());
        let consistency = match (request.freeze_timeout, machine.power) {
            (Some(_), PowerState::Running) => Consistency::Application,
            _ => Consistency::Crash,
        };
        let (taken_at_ms, disks) = self.oracle().record(
            vm,
            indices.iter().map(|index| all[*index].clone()).collect(),
            self.clock_offset_ms(),
        );
        let disks = request
            .disks
            .iter()
            .zip(changed)
            .enumerate()
            .map(|(index, (key, changed))| CapturedDisk {
                key: key.clone(),
                device: Arc::new(View { disks: disks.clone(), index, is_alive: is_alive.clone() }),
                changed,
            })
            .collect();
        Ok(Box::new(SimCapture {
            host: self.clone(),
            vm,
            id: request.capture,
            taken_at_ms,
            consistency,
            disks,
            tracker,
        }))
    }
}

impl Machine {
    fn changed(&self, disk: usize, since: &Option<TrackerId>) -> Changed {
        let blocks = match since {
            Some(since) => match self.trackers.get(since) {
                Some(dirty) => dirty[disk].clone(),
                // Everything ever written to a recovery VM is a superset of what any tracker would tell.
                None if self.recovery.is_some() => self.disks[disk].overlay.keys().copied().collect(),
                None => return Changed::Unknown { reason: format!("the tracker {since} is not there") },
            },
            None => return Changed::Unknown { reason: "no tracker was asked for".to_owned() },
        };
        Changed::Since(ranges(&blocks, self.disks[disk].size()))
    }
}

fn ranges(blocks: &BTreeSet<u64>, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for block in blocks {
        let (start, end) = (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(size));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[async_trait]
impl Capture for SimCapture {
    fn taken_at_ms(&self) -> i64 {
        self.taken_at_ms
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn note(&self) -> &str {
        ""
    }

    fn disks(&self) -> &[CapturedDisk] {
        &self.disks
    }

    fn tracker(&self) -> &TrackerId {
        &self.tracker
    }

    async fn close(self: Box<Self>) -> Result<(), SiteError> {
        if let Ok(machine) = self.host.lock().machine(self.vm)
            && let Some(is_alive) = machine.captures.remove(&self.id)
        {
            is_alive.store(false, Ordering::SeqCst);
        }
        Ok(())
    }
}

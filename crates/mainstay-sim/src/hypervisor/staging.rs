//! Staging over the disks of a home VM. What was flushed is the host's; what was not dies with the agent.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use mainstay_block::{BLOCK_BYTES, BlockDevice, BlockError, Extent, ExtentKind, blocks_of, check_range};
use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, PowerState, SiteError, Staging, StagingSpec};

use super::{
    SimHypervisor,
    machine::{StagedDisk, StagingArea, apply_blocks, block_range},
};

struct SimStaging {
    host: SimHypervisor,
    vm: VmId,
    devices: Vec<Arc<dyn BlockDevice>>,
}

struct StagedDevice {
    host: SimHypervisor,
    vm: VmId,
    index: usize,
    size_bytes: u64,
    opening: u64,
    /// Written and not flushed.
    pending: Mutex<BTreeMap<u64, Vec<u8>>>,
}

fn gone() -> BlockError {
    std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the staging area is not this handle's any more")
        .into()
}

impl StagedDevice {
    fn pending(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_area<R>(&self, work: impl FnOnce(&mut StagedDisk, &[u8]) -> R) -> Result<R, BlockError> {
        let mut state = self.host.lock();
        let machine = state.machine(self.vm).map_err(|_| gone())?;
        let area = machine.staging.as_mut().filter(|area| area.opening == self.opening).ok_or_else(gone)?;
        let staged = &mut area.disks[self.index];
        let disk = staged.disk;
        Ok(work(staged, &machine.disks[disk].base))
    }

    fn content(&self) -> Result<Vec<u8>, BlockError> {
        let pending = self.pending().clone();
        self.with_area(|staged, base| {
            let mut bytes = base.to_vec();
            bytes.resize(staged.size_bytes as usize, 0);
            apply_blocks(&mut bytes, &staged.blocks);
            apply_blocks(&mut bytes, &pending);
            bytes
        })
    }
}

#[async_trait]
impl BlockDevice for StagedDevice {
    fn size(&self) -> u64 {
        self.size_bytes
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.size_bytes)?;
        let bytes = self.content()?;
        Ok(Bytes::copy_from_slice(&bytes[offset as usize..(offset + length) as usize]))
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        check_range(offset, data.len() as u64, self.size_bytes)?;
        tokio::task::yield_now().await;
        let mut bytes = self.content()?;
        bytes[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        let end = blocks_of(offset + data.len() as u64);
        let mut pending = self.pending();
        for block in offset / BLOCK_BYTES..end {
            pending.insert(block, bytes[block_range(block, self.size_bytes)].to_vec());
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(offset, length, self.size_bytes)?;
        self.write(offset, Bytes::from(vec![0; length as usize])).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        let pending = std::mem::take(&mut *self.pending());
        self.with_area(|staged, _| staged.blocks.extend(pending))
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        check_range(offset, length, self.size_bytes)?;
        Ok(if length == 0 { Vec::new() } else { vec![Extent { offset, length, kind: ExtentKind::Data }] })
    }
}

#[async_trait]
impl Staging for SimStaging {
    fn devices(&self) -> &[Arc<dyn BlockDevice>] {
        &self.devices
    }

    async fn is_base_changed(&self) -> Result<bool, SiteError> {
        let mut state = self.host.lock();
        let machine = state.machine(self.vm)?;
        let Some(area) = &machine.staging else { return Ok(true) };
        Ok(area.disks.iter().any(|staged| machine.disks[staged.disk].version != staged.base_version))
    }

    async fn close(self: Box<Self>) -> Result<(), SiteError> {
        Ok(())
    }
}

impl SimHypervisor {
    pub(super) fn stage(&self, spec: &StagingSpec) -> Result<Box<dyn Staging>, SiteError> {
        let mut state = self.lock();
        let opening = state.next_opening();
        let machine = state.machine(spec.vm)?;
        if machine.power != PowerState::Off {
            return Err(SiteError::new(ErrorKind::Refused, format!("'{}' is not off", machine.name)));
        }
        if machine.staging.is_none() {
            let mut disks = Vec::new();
            for disk in &spec.disks {
                let index = machine.disk(&disk.key)?;
                disks.push(StagedDisk {
                    disk: index,
                    size_bytes: disk.size_bytes.max(machine.disks[index].size()),
                    blocks: BTreeMap::new(),
                    base_version: machine.disks[index].version,
                });
            }
            machine.staging = Some(StagingArea { item: spec.item, disks, opening });
        }
        let Some(area) = machine.staging.as_mut().filter(|area| area.item == spec.item) else {
            return Err(SiteError::new(ErrorKind::Refused, "the VM is staged for another item"));
        };
        area.opening = opening;
        for wanted in &spec.disks {
            let of_key = |staged: &&mut StagedDisk| machine.disks[staged.disk].key == wanted.key;
            if let Some(staged) = area.disks.iter_mut().find(of_key) {
                staged.size_bytes = staged.size_bytes.max(wanted.size_bytes);
            }
        }
        let device = |(index, staged): (usize, &StagedDisk)| -> Arc<dyn BlockDevice> {
            Arc::new(StagedDevice {
                host: self.clone(),
                vm: spec.vm,
                index,
                size_bytes: staged.size_bytes,
                opening,
                pending: Mutex::default(),
            })
        };
        let devices = area.disks.iter().enumerate().map(device).collect();
        Ok(Box::new(SimStaging { host: self.clone(), vm: spec.vm, devices }))
    }

    pub(super) fn merge(&self, vm: VmId) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        if machine.staging.is_some() && machine.power != PowerState::Off {
            return Err(SiteError::new(ErrorKind::Refused, format!("'{}' is not off", machine.name)));
        }
        machine.is_made = false;
        let Some(area) = machine.staging.take() else { return Ok(()) };
        machine.started_from = None;
        for staged in area.disks {
            machine.disks[staged.disk].base.resize(staged.size_bytes as usize, 0);
            for (block, data) in staged.blocks {
                machine.write_block(staged.disk, block, &data);
            }
        }
        Ok(())
    }
}

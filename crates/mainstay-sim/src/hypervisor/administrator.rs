//! What the administrator of a host does to its VMs behind our back.

use mainstay_block::blocks_of;
use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, SiteError};

use super::{
    SimHypervisor,
    machine::{Machine, MachineDisk},
};

impl Machine {
    /// Refuses what a hypervisor refuses while a backup of the VM runs, or while its disks are staged over.
    fn check_free(&self) -> Result<(), SiteError> {
        if self.captures.is_empty() && self.staging.is_none() {
            return Ok(());
        }
        Err(SiteError::new(ErrorKind::Busy, format!("the disks of '{}' are in use", self.name)))
    }
}

impl SimHypervisor {
    /// Starts a VM by hand.
    pub async fn start_by_hand(&self, vm: VmId) -> Result<(), SiteError> {
        self.start_with(vm, None).await
    }

    /// Gives a VM another name.
    pub fn rename_vm(&self, vm: VmId, name: &str) -> Result<(), SiteError> {
        name.clone_into(&mut self.lock().machine(vm)?.name);
        Ok(())
    }

    /// Makes a disk larger. What is new reads as zeros, and no tracker tells of it.
    pub fn grow_disk(&self, vm: VmId, key: &str, by_bytes: u64) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        machine.check_free()?;
        let index = machine.disk(key)?;
        let disk = &mut machine.disks[index];
        let size = disk.base.len() + by_bytes as usize;
        disk.base.resize(size, 0);
        disk.version += 1;
        Ok(())
    }

    /// Makes a disk smaller; what trackers have of what is gone goes, too.
    pub fn shrink_disk(&self, vm: VmId, key: &str, by_bytes: u64) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        machine.check_free()?;
        let index = machine.disk(key)?;
        let disk = &mut machine.disks[index];
        disk.base.truncate(disk.base.len().saturating_sub(by_bytes as usize));
        disk.version += 1;
        let blocks = blocks_of(disk.size());
        for dirty in machine.trackers.values_mut() {
            dirty[index].retain(|block| *block < blocks);
        }
        Ok(())
    }

    /// Gives a VM an empty disk.
    pub fn add_disk(&self, vm: VmId, key: &str, size_bytes: u64) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        machine.check_free()?;
        if machine.disk(key).is_ok() || machine.detached.iter().any(|disk| disk.key == key) {
            return Err(SiteError::new(ErrorKind::Refused, format!("'{}' has a disk '{key}'", machine.name)));
        }
        machine.disks.push(MachineDisk::new(key, vec![0; size_bytes as usize]));
        for dirty in machine.trackers.values_mut() {
            dirty.push(std::collections::BTreeSet::new());
        }
        Ok(())
    }

    /// Takes a disk away from a VM; its trackers are lost.
    pub fn detach_disk(&self, vm: VmId, key: &str) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        machine.check_free()?;
        let index = machine.disk(key)?;
        let disk = machine.disks.remove(index);
        machine.detached.push(disk);
        machine.trackers.clear();
        Ok(())
    }

    /// Gives a VM back the disks that were taken from it.
    pub fn attach_disks(&self, vm: VmId) -> Result<(), SiteError> {
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        if machine.detached.is_empty() {
            return Ok(());
        }
        machine.check_free()?;
        let detached = std::mem::take(&mut machine.detached);
        machine.disks.extend(detached);
        machine.trackers.clear();
        Ok(())
    }
}

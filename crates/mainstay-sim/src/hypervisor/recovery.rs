//! Recovery VMs: disks that read through NBD from the store until they are hydrated.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mainstay_block::{BlockDevice as _, blocks_of};
use mainstay_model::VmId;
use mainstay_nbd::{Client, ClientOptions, Endpoint};
use mainstay_provider::{
    ErrorKind, Hydration, MacPolicy, PowerState, RecoveryDisk, RecoveryVmSpec, SiteError, WhenOff,
};

use super::{
    SimHypervisor, failed,
    machine::{Machine, MachineDisk, RecoveryMark, Shape, apply_blocks, block_range},
};

/// Blocks copied by one call of `hydrate`: few, so that hydration takes several.
const HYDRATE_BLOCKS: usize = 24;
/// How long a guest waits for a disk whose server is away before the caller hears of it.
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// How often it looks.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

async fn read_export(socket: &std::path::Path, export: &str, size: u64) -> Result<Vec<u8>, SiteError> {
    let attempt = async {
        let endpoint = Endpoint::Unix(socket.to_owned());
        let client = Client::connect(&endpoint, &ClientOptions::new(export)).await.map_err(failed)?;
        if client.size() != size {
            return Err(failed(format!("export {export} has {} bytes instead of {size}", client.size())));
        }
        Ok(client.read(0, size).await.map_err(failed)?.to_vec())
    };
    attempt.await
}

impl Machine {
    /// The disks as the guest sees them, given complete bases.
    pub(super) fn contents(&self, mut bases: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        for (disk, base) in self.disks.iter().zip(&mut bases) {
            if self.recovery.is_none() {
                base.clone_from(&disk.base);
            }
            apply_blocks(base, &disk.overlay);
        }
        bases
    }
}

impl SimHypervisor {
    /// The disks beneath what a recovery VM wrote; for a home VM its disks. Reads as QEMU does: again and again while
    /// the server of a disk is away.
    pub(super) async fn bases(&self, vm: VmId) -> Result<Vec<Vec<u8>>, SiteError> {
        let deadline = tokio::time::Instant::now() + RECONNECT_MAX;
        loop {
            // Looked at anew each time: hydration may have ended in between, and the server with it.
            match self.read_bases(vm).await {
                Err(error) if error.kind == ErrorKind::NotFound => return Err(error),
                Err(error) if tokio::time::Instant::now() > deadline => {
                    return Err(SiteError::new(ErrorKind::Unavailable, format!("NBD: {error}")));
                }
                Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
                done => return done,
            }
        }
    }

    async fn read_bases(&self, vm: VmId) -> Result<Vec<Vec<u8>>, SiteError> {
        let disks: Vec<_> = {
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            let disk = |disk: &MachineDisk| {
                (disk.base.clone(), disk.missing.clone(), disk.source.clone(), disk.exported)
            };
            machine.disks.iter().map(disk).collect()
        };
        let mut bases = Vec::new();
        for (mut base, missing, source, exported) in disks {
            if let Some((socket, export)) = source.filter(|_| !missing.is_empty()) {
                let theirs = read_export(&socket, &export, exported).await?;
                for block in missing {
                    let range = block_range(block, exported);
                    base[range.clone()].copy_from_slice(&theirs[range]);
                }
            }
            bases.push(base);
        }
        Ok(bases)
    }

    pub(super) fn make_recovery_vm(&self, spec: &RecoveryVmSpec) -> Result<(), SiteError> {
        let shape: Shape = serde_json::from_slice(&spec.definition.0).map_err(failed)?;
        let mut state = self.lock();
        if state.vms.contains_key(&spec.vm) {
            return Ok(());
        }
        if state.vms.values().any(|machine| machine.name == spec.name) {
            return Err(SiteError::new(ErrorKind::Refused, format!("there is a VM '{}' already", spec.name)));
        }
        let disk = |disk: &RecoveryDisk| MachineDisk {
            missing: (0..blocks_of(disk.size_bytes)).collect(),
            source: Some((disk.nbd_socket.clone(), disk.nbd_export.clone())),
            ..MachineDisk::new(&disk.key, vec![0; disk.size_bytes as usize])
        };
        let nics = spec
            .nics
            .iter()
            .map(|plan| {
                let mac = match plan.mac_policy {
                    MacPolicy::Keep => plan.mac.clone(),
                    MacPolicy::Generate => format!("52:54:00:{:.8}", spec.vm),
                };
                (mac, plan.network.clone().unwrap_or_default())
            })
            .collect();
        let machine = Machine {
            name: spec.name.clone(),
            power: PowerState::Off,
            autostart: false,
            shape: Shape {
                vcpus: spec.vcpus.unwrap_or(shape.vcpus),
                memory_bytes: spec.memory_bytes.unwrap_or(shape.memory_bytes),
                nics,
                boots: shape.boots,
            },
            recovery: Some(RecoveryMark { item: spec.item, is_test: spec.is_test }),
            disks: spec.disks.iter().map(disk).collect(),
            detached: Vec::new(),
            trackers: std::collections::HashMap::new(),
            captures: std::collections::HashMap::new(),
            are_captures_stale: false,
            staging: None,
            is_made: false,
            started_from: None,
            addresses: Vec::new(),
        };
        state.vms.insert(spec.vm, machine);
        Ok(())
    }

    /// Copies a bounded piece of each disk.
    pub(super) async fn hydrate_some(&self, vm: VmId, when_off: WhenOff) -> Result<Hydration, SiteError> {
        let is_in_memory = {
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            if machine.recovery.is_none() {
                return Err(SiteError::new(ErrorKind::NotFound, format!("VM {vm} is not a recovery VM")));
            }
            machine.power != PowerState::Off || when_off == WhenOff::Hold
        };
        if is_in_memory && when_off != WhenOff::Release {
            let bases = self.bases(vm).await?;
            let mut state = self.lock();
            let machine = state.machine(vm)?;
            for (disk, base) in machine.disks.iter_mut().zip(bases) {
                let piece: BTreeSet<u64> = disk.missing.iter().copied().take(HYDRATE_BLOCKS).collect();
                let blocks: BTreeMap<u64, Vec<u8>> = piece
                    .iter()
                    .map(|block| (*block, base[block_range(*block, base.len() as u64)].to_vec()))
                    .collect();
                apply_blocks(&mut disk.base, &blocks);
                disk.missing.retain(|block| !piece.contains(block));
            }
        }
        let mut state = self.lock();
        let machine = state.machine(vm)?;
        let total: u64 = (0..machine.disks.len()).map(|disk| machine.all_blocks(disk)).sum();
        let missing: u64 = machine.disks.iter().map(|disk| disk.missing.len() as u64).sum();
        Ok(Hydration {
            bytes_done: (total - missing) * mainstay_block::BLOCK_BYTES,
            bytes_total: total * mainstay_block::BLOCK_BYTES,
            is_complete: missing == 0,
        })
    }

    pub(super) fn drop_recovery_vm(&self, vm: VmId) -> Result<(), SiteError> {
        let mut state = self.lock();
        match state.vms.get_mut(&vm) {
            None => Ok(()),
            Some(machine) if machine.recovery.is_none() => {
                Err(SiteError::new(ErrorKind::Refused, format!("VM {vm} is not a recovery VM")))
            }
            Some(machine) => {
                machine.end_captures();
                state.vms.remove(&vm);
                Ok(())
            }
        }
    }
}

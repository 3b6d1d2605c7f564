//! The recovery side: VMs that run out of the store until they own their disks.

use std::{collections::hash_map::Entry, sync::Arc};

use mainstay_block::hash_table::Fill;
use mainstay_model::{ItemId, VmId};
use mainstay_nbd::{Exports, Server};
use mainstay_provider::{
    ApplyAddresses, CreateRecoveryVm, ErrorKind, GuestAddress, Hydrate, Hydration, RecoveryDisk,
    RecoveryVmSpec, SiteError,
};
use mainstay_replication::{Mount, MountOptions};
use tokio_util::sync::CancellationToken;

use super::{Inner, SET_BACK, check_generation, data_error};
use crate::records::{Base, ItemFile, RecoveryVmFile};

/// A recovery point that is served to a VM.
pub(super) struct Served {
    server: Server,
    stop: CancellationToken,
}

impl Inner {
    /// The socket that a VM's disks are served on; short, and the same after a restart of the agent.
    fn socket(&self, vm: VmId) -> std::path::PathBuf {
        let name = vm.0.simple().to_string();
        self.options.run_dir.join(format!("{}.nbd", &name[..16]))
    }

    /// Serves a recovery VM's disks out of the store. Waits for the server for as long as it is away.
    pub(super) async fn serve(&self, record: &RecoveryVmFile) -> Result<(), SiteError> {
        if self.served.lock().await.contains_key(&record.vm) {
            return Ok(());
        }
        let stop = CancellationToken::new();
        let mount = Mount::open(
            self.server.clone(),
            record.item.0,
            record.point.0,
            &MountOptions::default(),
            stop.clone(),
        )
        .await
        .map_err(|error| data_error(&error))?;
        let exports = Exports::new();
        for (index, (key, _)) in record.disks.iter().enumerate() {
            let disk = u16::try_from(index).ok().and_then(|index| mount.disk(index)).ok_or_else(|| {
                SiteError::new(
                    ErrorKind::NotFound,
                    format!("recovery point {} has no disk '{key}'", record.point),
                )
            })?;
            exports.insert(key.clone(), Arc::new(disk), true);
        }
        let mut served = self.served.lock().await;
        // The server may have been away for long: by now the VM may be gone, or own its disks.
        let is_needed = self.records.recovery_vm(record.vm)?.is_some_and(|record| !record.is_hydrated);
        if let Entry::Vacant(entry) = served.entry(record.vm)
            && is_needed
        {
            let server = Server::bind_unix(&self.socket(record.vm), exports)?;
            entry.insert(Served { server, stop });
        }
        Ok(())
    }

    /// Serves a VM's disks no more, now or later: its record must say before that nobody needs them.
    pub(super) async fn stop_serving(&self, vm: VmId) -> Result<(), SiteError> {
        let mut all = self.served.lock().await;
        if let Some(served) = all.remove(&vm) {
            // Cancelled first: a server that is away must not hold up the end of its readers.
            served.stop.cancel();
            served.server.shutdown().await;
        }
        // A run of the agent that was killed leaves its sockets behind.
        match std::fs::remove_file(self.socket(vm)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub(super) async fn create_recovery_vm(&self, order: CreateRecoveryVm) -> Result<(), SiteError> {
        let present = self.records.item(order.item)?;
        if let Some(present) = &present {
            check_generation(present, order.generation)?;
            // Whoever removes a recovery VM forgets it. A server that was set back does not know of this one.
            if !order.is_test && present.vm != order.vm {
                let message =
                    format!("VM {} is the item's copy of generation {}", present.vm, present.generation);
                return Err(SiteError::new(ErrorKind::Fenced, message).with_remedy(SET_BACK));
            }
        }
        let record = RecoveryVmFile {
            vm: order.vm,
            item: order.item,
            point: order.point,
            disks: order.disks.clone(),
            is_test: order.is_test,
            is_hydrated: false,
        };
        let known = self.records.recovery_vm(order.vm)?;
        if known.as_ref().is_none_or(|known| !known.is_hydrated) {
            self.records.put_recovery_vm(&record)?;
            self.serve(&record).await?;
        }
        let socket = self.socket(order.vm);
        let spec = RecoveryVmSpec {
            vm: order.vm,
            item: order.item,
            name: order.name,
            is_test: order.is_test,
            definition: order.definition,
            disks: order
                .disks
                .iter()
                .map(|(key, size_bytes)| RecoveryDisk {
                    key: key.clone(),
                    size_bytes: *size_bytes,
                    nbd_socket: socket.clone(),
                    nbd_export: key.clone(),
                })
                .collect(),
            vcpus: order.vcpus,
            memory_bytes: order.memory_bytes,
            nics: order.nics,
        };
        self.hypervisor.create_recovery_vm(&spec).await?;
        if order.is_test || present.is_some_and(|present| present.vm == order.vm) {
            return Ok(());
        }
        // What the VM writes from now on is told from the point that it was made from.
        let item = ItemFile {
            item: order.item,
            vm: order.vm,
            disks: order.disks.iter().map(|(key, _)| key.clone()).collect(),
            generation: order.generation,
            base: Some(Base::new(order.point, Some(self.hypervisor.creation_tracker()))),
            pending: None,
            // Recovery VMs are never started by the host itself: their disks may have to be served first.
            autostart_before: Some(order.autostart),
            is_waiting: false,
            staging: None,
        };
        // Nothing is known block by block here, and nothing needs to be: the overlay tells exactly what was written.
        let sizes: Vec<_> = order.disks.iter().map(|(_, size)| *size).collect();
        self.records.put_item(&item)?;
        for table in self.created_tables(&item, &sizes, Fill::Unknown)? {
            let session = uuid::Uuid::new_v4();
            table
                .prepare(session)
                .and_then(|()| table.commit(session, order.point.0))
                .map_err(|error| super::tables::table_error(&error))?;
        }
        Ok(())
    }

    pub(super) async fn hydrate(&self, order: &Hydrate) -> Result<Hydration, SiteError> {
        let vm = order.vm;
        let hydration = self.hypervisor.hydrate(vm, order.when_off).await?;
        if hydration.is_complete
            && let Some(mut record) = self.records.recovery_vm(vm)?
            && !record.is_hydrated
        {
            record.is_hydrated = true;
            self.records.put_recovery_vm(&record)?;
            self.stop_serving(vm).await?;
        }
        Ok(hydration)
    }

    pub(super) async fn remove_recovery_vm(&self, item: ItemId, vm: VmId) -> Result<(), SiteError> {
        match self.hypervisor.remove_recovery_vm(vm).await {
            Err(error) if error.kind == ErrorKind::NotFound => {}
            result => result?,
        }
        self.records.remove_recovery_vm(vm)?;
        self.stop_serving(vm).await?;
        if self.records.item(item)?.is_some_and(|record| record.vm == vm) {
            self.records.remove_item(item)?;
        }
        Ok(())
    }

    pub(super) async fn apply_addresses(
        &self,
        order: &ApplyAddresses,
    ) -> Result<Vec<GuestAddress>, SiteError> {
        for nic in &order.nics {
            if let Some(address) = &nic.address {
                self.hypervisor.set_guest_address(order.vm, &nic.mac, address).await?;
            }
        }
        let addresses = self.hypervisor.guest_addresses(order.vm).await?;
        for nic in &order.nics {
            if let Some(wanted) = &nic.address
                && !addresses.iter().any(|have| have.address == *wanted)
            {
                return Err(SiteError::new(
                    ErrorKind::Failed,
                    format!(
                        "the guest does not report address {wanted} after it was set on adapter {}",
                        nic.mac
                    ),
                )
                .with_remedy("Set the address from within the guest."));
            }
        }
        Ok(addresses)
    }
}

//! The side that runs the VM: protection and power. Captures and their transfer: [`super::transfer`].

use mainstay_model::{ItemId, VmId};
use mainstay_provider::{
    AnswerWaiting, ErrorKind, PowerState, Protect, SiteError, StandDown, StoodDown, TrackerId, Unprotect,
};
use uuid::Uuid;

use super::{Inner, check_generation};
use crate::records::ItemFile;

impl Inner {
    pub(super) async fn protect(&self, order: Protect) -> Result<(), SiteError> {
        let vm = self.hypervisor.vm(order.vm).await?;
        if let Some(missing) = order.disks.iter().find(|key| !vm.disks.iter().any(|disk| disk.key == **key)) {
            return Err(SiteError::new(
                ErrorKind::NotFound,
                format!("'{}' has no disk '{missing}'", vm.name),
            ));
        }
        let present = self.records.item(order.item)?;
        if let Some(present) = &present {
            check_generation(present, order.generation)?;
        }
        let present = present.filter(|present| present.vm == order.vm);
        let autostart_before =
            present.as_ref().and_then(|present| present.autostart_before).or(Some(vm.autostart));
        let record = ItemFile {
            item: order.item,
            vm: order.vm,
            disks: order.disks,
            generation: order.generation,
            base: present.as_ref().and_then(|present| present.base.clone()),
            pending: present.and_then(|present| present.pending),
            autostart_before,
            is_waiting: false,
            staging: None,
        };
        // Written before the change, so that Unprotect always knows what to put back.
        self.records.put_item(&record)?;
        self.hypervisor.set_autostart(order.vm, false).await
    }

    pub(super) async fn unprotect(&self, order: &Unprotect) -> Result<(), SiteError> {
        let item = order.item;
        // A recovery VM that owns its disks is the administrator's from now on; one that does not is still served.
        for record in self.records.recovery_vms()? {
            if record.item == item && record.is_hydrated {
                self.records.remove_recovery_vm(record.vm)?;
            }
        }
        let Some(record) = self.records.item(item)? else { return Ok(()) };
        if record.staging.is_some() {
            self.discard_home(item, record.vm).await?;
        }
        let gone = |result: Result<(), SiteError>| match result {
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            result => result,
        };
        gone(self.hypervisor.remove_trackers(record.vm).await)?;
        let is_active = order.is_active && order.generation >= record.generation;
        if let Some(autostart) = record.autostart_before.filter(|_| is_active) {
            gone(self.hypervisor.set_autostart(record.vm, autostart).await)?;
        }
        Ok(self.records.remove_item(item)?)
    }

    pub(super) async fn start_vm(&self, item: ItemId, vm: VmId) -> Result<(), SiteError> {
        let record = self.records.item(item)?.filter(|record| record.vm == vm);
        let Some(mut record) = record else { return self.hypervisor.start(vm).await };
        if record.staging.is_some() {
            return Err(SiteError::new(
                ErrorKind::Refused,
                format!("VM {vm} has a staging area of a failback over its disks"),
            )
            .with_remedy("Complete or cancel the failback first."));
        }
        let Some(base) = record.base.as_mut().filter(|base| base.tracker.is_none()) else {
            return self.hypervisor.start(vm).await;
        };
        if self.hypervisor.power(vm).await? != PowerState::Off {
            return self.hypervisor.start(vm).await;
        }
        // The disks equal the base. Written down first: if the start fails in between, the tracker is missing, which
        // the next capture notices and compares everything.
        let tracker = TrackerId(format!("start-{}", Uuid::now_v7()));
        base.tracker = Some(tracker.clone());
        self.records.put_item(&record)?;
        self.hypervisor.start_tracked(vm, &record.disks, &tracker).await
    }

    /// After a boot of the host: libvirt would have started these VMs long before anybody could be asked, which is why the
    /// agent has taken that over. Now the server must say whether they are still the active copies.
    pub(super) fn note_boot(&self) -> Result<(), SiteError> {
        let boot = &self.options.boot;
        let before = self.records.boot()?;
        if before.as_ref() == Some(boot) {
            return Ok(());
        }
        // The first run of the agent on this host follows no boot that it missed.
        for mut record in self.records.items()?.into_iter().filter(|_| before.is_some()) {
            if record.autostart_before == Some(true) && record.staging.is_none() {
                record.is_waiting = true;
                self.records.put_item(&record)?;
            }
        }
        Ok(self.records.put_boot(boot)?)
    }

    pub(super) async fn answer_waiting(&self, order: &AnswerWaiting) -> Result<(), SiteError> {
        let Some(record) = self.records.item(order.item)?.filter(|record| record.is_waiting) else {
            return Ok(());
        };
        check_generation(&record, order.generation)?;
        if order.may_start {
            if let Some(recovery) = self.records.recovery_vm(record.vm)?.filter(|vm| !vm.is_hydrated) {
                self.serve(&recovery).await?;
            }
            self.start_vm(order.item, record.vm).await?;
        }
        // Read again: the start has written to it.
        let mut record = self.record(order.item)?;
        record.is_waiting = false;
        Ok(self.records.put_item(&record)?)
    }

    pub(super) async fn stand_down(&self, order: &StandDown) -> Result<StoodDown, SiteError> {
        // Its records may be lost, or the copy be one that was left here.
        let Some(mut record) = self.records.item(order.item)? else {
            return match order.vm.filter(|_| order.stop_vm) {
                Some(vm) => self.stop_old_copy(vm).await,
                None => Ok(StoodDown::default()),
            };
        };
        if order.generation < record.generation {
            tracing::warn!(item = %order.item, generation = %order.generation, "an overtaken order to stand down");
            return Ok(StoodDown { is_overtaken: true, ..StoodDown::default() });
        }
        if order.generation > record.generation || record.is_waiting {
            record.generation = record.generation.max(order.generation);
            record.is_waiting = false;
            self.records.put_item(&record)?;
        }
        if !order.stop_vm {
            return Ok(StoodDown::default());
        }
        self.stop_old_copy(record.vm).await
    }

    async fn stop_old_copy(&self, vm: VmId) -> Result<StoodDown, SiteError> {
        match self.hypervisor.power(vm).await {
            Ok(PowerState::Off) => Ok(StoodDown::default()),
            Ok(_) => {
                self.hypervisor.power_off(vm).await?;
                Ok(StoodDown { was_stopped: true, ..StoodDown::default() })
            }
            Err(error) if error.kind == ErrorKind::NotFound => Ok(StoodDown::default()),
            Err(error) => Err(error),
        }
    }
}

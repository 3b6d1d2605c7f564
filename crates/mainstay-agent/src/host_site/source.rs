//! The side that runs the VM: protection, captures and their transfer, power.

use std::{ops::Range, sync::Arc, time::Duration};

use mainstay_model::{CaptureId, ItemId, PointId, VmId};
use mainstay_provider::{
    Capture, CaptureLimits, CaptureRequest, Changed, Consistency, ErrorKind, PowerState, Protect, Replicate,
    Replicated, SiteError, StandDown, StoodDown, TrackerId,
};
use mainstay_replication::{SendDisk, SendJob, SendOptions, SendProgress, replicate};
use mainstay_store::PointMeta;
use tokio::sync::watch;
use uuid::Uuid;

use super::{Inner, Work, check_generation, data_error};
use crate::records::{Base, ItemFile};

/// How long the guest may stay frozen: longer, and applications time out.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Scratch space of a capture over all disks; beyond it the capture ends and the cycle is tried again.
const SCRATCH_BYTES_MAX: u64 = 16 << 30;
/// Age of a capture at most. An initial replication of a large disk needs hours.
const CAPTURE_AGE_MAX: Duration = Duration::from_secs(12 * 3600);

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
            pending_tracker: present.and_then(|present| present.pending_tracker),
            autostart_before,
            staging: None,
        };
        // Written before the change, so that Unprotect always knows what to put back.
        self.records.put_item(&record)?;
        self.hypervisor.set_autostart(order.vm, false).await
    }

    pub(super) async fn unprotect(&self, item: ItemId) -> Result<(), SiteError> {
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
        if let Some(autostart) = record.autostart_before {
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

    pub(super) async fn stand_down(&self, order: &StandDown) -> Result<StoodDown, SiteError> {
        let Some(mut record) = self.records.item(order.item)? else {
            return Ok(StoodDown { was_stopped: false });
        };
        if order.generation > record.generation {
            record.generation = order.generation;
            self.records.put_item(&record)?;
        }
        if !order.stop_vm {
            return Ok(StoodDown { was_stopped: false });
        }
        match self.hypervisor.power(record.vm).await {
            Ok(PowerState::Off) => Ok(StoodDown { was_stopped: false }),
            Ok(_) => {
                self.hypervisor.power_off(record.vm).await?;
                Ok(StoodDown { was_stopped: true })
            }
            Err(error) if error.kind == ErrorKind::NotFound => Ok(StoodDown { was_stopped: false }),
            Err(error) => Err(error),
        }
    }

    /// One cycle: capture, compare, ship, commit. Whatever ends it early, the guest is unburdened before this returns.
    pub(super) async fn replicate(&self, order: &Replicate, work: &Work) -> Result<Replicated, SiteError> {
        let mut record = self.record(order.item)?;
        check_generation(&record, order.generation)?;
        record.generation = order.generation;
        self.records.put_item(&record)?;

        // Sizes are read from the VM: a disk may have grown since the last cycle.
        let vm = self.hypervisor.vm(record.vm).await?;
        let size = |key: &String| {
            vm.disks.iter().find(|disk| disk.key == *key).map(|disk| disk.size_bytes).ok_or_else(|| {
                SiteError::new(ErrorKind::NotFound, format!("'{}' no longer has disk '{key}'", vm.name))
                    .with_remedy(
                        "Attach the disk again, or disable replication and enable it without the disk.",
                    )
            })
        };
        let sizes = record.disks.iter().map(size).collect::<Result<Vec<_>, _>>()?;
        let (tables, are_known) = self.tables_at(&record, &sizes, order.parent, work).await?;
        self.settle_tracker(&mut record, order.parent)?;

        let base = record.base.as_ref().filter(|base| Some(base.point) == order.parent);
        let since = base.and_then(|base| base.tracker.clone()).filter(|_| are_known && !order.compare_all);
        work.report("Taking a capture", 0, 0, 0);
        let request = CaptureRequest {
            capture: CaptureId(Uuid::now_v7()),
            disks: record.disks.clone(),
            since: since.clone(),
            freeze_timeout: order.application_consistent.then_some(FREEZE_TIMEOUT),
            limits: CaptureLimits { scratch_bytes_max: SCRATCH_BYTES_MAX, age_max: CAPTURE_AGE_MAX },
        };
        let definition = self.hypervisor.definition(record.vm).await?;
        let capture = self.hypervisor.begin_capture(record.vm, request).await?;
        let result = self.ship(order, &mut record, &*capture, tables, definition.0, work).await;
        let consistency = capture.consistency();
        let (taken_at_ms, note, tracker) =
            (capture.taken_at_ms(), capture.note().to_owned(), capture.tracker().clone());
        let unknown = capture.disks().iter().find_map(|disk| match &disk.changed {
            Changed::Unknown { reason } => Some(reason.clone()),
            Changed::Since(_) => None,
        });
        // Closed whatever the outcome; a failure to close is worse than a failure to ship, because the guest pays for it.
        let closed = capture.close().await;
        let (point, bytes_changed, bytes_moved) = result?;
        closed?;

        record.base = Some(Base { point, tracker: Some(tracker.clone()) });
        record.pending_tracker = None;
        self.records.put_item(&record)?;
        // Old trackers cost memory, not correctness; the next cycle tries again.
        if let Err(error) = self.hypervisor.confirm_tracker(record.vm, &tracker).await {
            tracing::warn!(item = %record.item, %error, "old trackers could not be removed");
        }
        let resynchronized = match (order.parent, order.compare_all, &since) {
            // Everything is new in an initial replication.
            (None, _, _) => None,
            (_, true, _) => Some("it was asked for".to_owned()),
            (_, false, None) => Some("the changes since the last recovery point were not known".to_owned()),
            (_, false, Some(_)) => unknown,
        };
        Ok(Replicated { point, taken_at_ms, consistency, note, bytes_changed, bytes_moved, resynchronized })
    }

    /// After a crash in the middle of a cycle: the server says that the transfer became the parent, so its tracker counts.
    fn settle_tracker(&self, record: &mut ItemFile, parent: Option<PointId>) -> Result<(), SiteError> {
        let Some(tracker) = record.pending_tracker.take() else { return Ok(()) };
        if let Some(parent) = parent
            && record.base.as_ref().map(|base| base.point) != Some(parent)
        {
            record.base = Some(Base { point: parent, tracker: Some(tracker) });
        }
        Ok(self.records.put_item(record)?)
    }

    async fn ship(
        &self,
        order: &Replicate,
        record: &mut ItemFile,
        capture: &dyn Capture,
        tables: Vec<Arc<mainstay_block::hash_table::HashTable>>,
        definition: Vec<u8>,
        work: &Work,
    ) -> Result<(PointId, u64, u64), SiteError> {
        record.pending_tracker = Some(capture.tracker().clone());
        self.records.put_item(record)?;
        let disks = capture
            .disks()
            .iter()
            .zip(tables)
            .enumerate()
            .map(|(index, (disk, table))| SendDisk {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                key: disk.key.clone(),
                device: disk.device.clone(),
                ranges: ranges(&disk.changed, disk.device.size()),
                table,
            })
            .collect();
        let job = SendJob {
            replica: order.item.0,
            session: order.session.0,
            generation: order.generation.0,
            parent: order.parent.map(|point| point.0),
            fork: false,
            disks,
            meta: PointMeta {
                time_ms: capture.taken_at_ms().unsigned_abs(),
                consistency: match capture.consistency() {
                    Consistency::Crash => mainstay_store::Consistency::Crash,
                    Consistency::Application => mainstay_store::Consistency::App,
                },
                definition: Some(definition.into()),
            },
        };
        let options = SendOptions { bytes_per_second: order.bytes_per_second_max, ..SendOptions::default() };
        let (sending, mut sent) = watch::channel(SendProgress::default());
        let transfer = replicate(&*self.server, &job, &options, &sending, &work.cancel);
        tokio::pin!(transfer);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut transfer => break outcome,
                Ok(()) = sent.changed() => {
                    let progress = sent.borrow_and_update().clone();
                    let total = progress.disks.iter().map(|disk| disk.total_bytes).sum();
                    let done = progress.disks.iter().map(|disk| disk.examined_bytes).sum();
                    work.report("Replicating changes", done, total, progress.frame_bytes);
                }
            }
        };
        let outcome = outcome.map_err(|error| data_error(&error))?;
        let changed = sent.borrow().disks.iter().map(|disk| disk.changed_bytes + disk.zeroed_bytes).sum();
        Ok((PointId(outcome.point), changed, outcome.traffic.sent() + outcome.traffic.received()))
    }
}

/// The ranges to look at: what the tracker says, or everything.
fn ranges(changed: &Changed, size: u64) -> Vec<Range<u64>> {
    match changed {
        Changed::Since(ranges) => ranges.clone(),
        Changed::Unknown { .. } => std::iter::once(0..size).filter(|range| !range.is_empty()).collect(),
    }
}

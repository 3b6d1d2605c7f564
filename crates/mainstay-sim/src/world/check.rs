//! What must be true whenever a world has settled.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use mainstay_block::BLOCK_BYTES;
use mainstay_control::db::ItemRecord;
use mainstay_model::{Location, Operation, Phase, VmId};
use mainstay_provider::PowerState;

use super::{Host, World, vm_named};

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn runs(host: &Host, vm: VmId) -> bool {
    host.hypervisor.view(vm).is_some_and(|view| view.power == PowerState::Running)
}

/// Whether a disk holds what another one holds, and nothing behind it.
fn is_grown(disk: &[u8], from: &[u8]) -> bool {
    disk.strip_prefix(from).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
}

/// Blocks in which two disks differ, and what each begins with there.
fn differing(disk: &[u8], from: &[u8]) -> Vec<(usize, Option<u8>, Option<u8>)> {
    let blocks = disk.len().max(from.len()).div_ceil(BLOCK_BYTES as usize);
    let at = |disk: &[u8], block: usize| -> Vec<u8> {
        disk.chunks(BLOCK_BYTES as usize).nth(block).unwrap_or_default().to_vec()
    };
    let pairs = (0..blocks).map(|block| (block, at(disk, block), at(from, block)));
    let differ = pairs.filter(|(_, disk, from)| disk != from);
    differ.map(|(block, disk, from)| (block, disk.first().copied(), from.first().copied())).collect()
}

impl World {
    /// Checks every invariant; the world must have settled.
    pub async fn check(&self) {
        let items =
            self.ask(|control| async move { control.db.items().await }).await.expect("items are read");
        for item in items.iter() {
            self.check_points(item).await;
            self.check_copies(item).await;
        }
        // A cycle may have begun since the world settled; its capture ends with it.
        self.until("no capture is open", async |world| world.open_captures() == 0).await;
        self.check_traces(&items);
    }

    pub(super) fn open_captures(&self) -> usize {
        self.hosts().flat_map(|host| host.hypervisor.views()).map(|view| view.captures).sum()
    }

    /// Checks that a VM which has just failed back was started from what its recovery VM held.
    pub async fn check_failback(&self, name: &str) {
        let item = self.item(name).await.expect("the VM is protected");
        let copy = item.recovery_vm.expect("the recovery VM is kept until the commit");
        let recovered = self.recovery.hypervisor.disks_by_key(copy.vm).await.expect("a recovery VM is read");
        let home = self.home_of(&item).hypervisor.view(item.vm).expect("the home VM");
        let home = home.started_from.expect("the home VM was started");
        for (key, recovered) in recovered {
            // A disk that had grown after the recovery point stays as large as it was, and so does one at home that somebody makes
            // larger at the recovery site once it has come home.
            assert!(
                is_grown(&home[&key], &recovered) || is_grown(&recovered, &home[&key]),
                "'{name}' lost something of {key} on its way home: {:?}",
                differing(&home[&key], &recovered)
            );
        }
    }

    /// Checks that a VM which has just failed over as planned was started from what its home VM holds.
    pub async fn check_planned_failover(&self, name: &str) {
        let item = self.item(name).await.expect("the VM is protected");
        let copy = item.recovery_vm.expect("a recovery VM");
        let home = self.home_of(&item).hypervisor.disks_by_key(item.vm).await.expect("the home VM is read");
        let recovered = self.recovery.hypervisor.view(copy.vm).expect("the recovery VM");
        let recovered = recovered.started_from.expect("the recovery VM was started");
        let included: BTreeSet<_> =
            item.disks.iter().filter(|disk| disk.is_included).map(|disk| &disk.key).collect();
        assert_eq!(recovered.keys().collect::<BTreeSet<_>>(), included, "the disks of '{name}'");
        for (key, recovered) in &*recovered {
            // The copy that is off may have been given more room since, and the other one before it was started.
            assert!(
                is_grown(&home[key], recovered) || is_grown(recovered, &home[key]),
                "'{name}' lost something of {key} in a planned failover: {:?}",
                differing(&home[key], recovered)
            );
        }
    }

    /// Checks that a VM which was moved as planned, and not to another recovery point since, came up with what it had.
    pub async fn check_move(&self, name: &str) {
        let item = self.item(name).await.expect("the VM is protected");
        match (item.state.phase, item.recovery_vm) {
            (Phase::PlannedFailoverCommitPending, Some(copy)) => {
                let points = self.ask(move |control| async move { control.store.points(item.id.0).await });
                let points = points.await.expect("the points are listed");
                if points
                    .iter()
                    .max_by_key(|point| point.sequence)
                    .is_some_and(|newest| newest.id == copy.point.0)
                {
                    self.check_planned_failover(name).await;
                }
            }
            (Phase::FailbackCommitPending, Some(_)) => self.check_failback(name).await,
            _ => {}
        }
    }

    /// Every recovery point reads back as the oracle remembers it.
    async fn check_points(&self, item: &ItemRecord) {
        for (taken_at_ms, disks) in self.read_points(item.id).await {
            let expected = self.oracle.disks_at(taken_at_ms).expect("every point comes from a capture");
            assert!(*expected == disks, "the point of {taken_at_ms} of '{}' differs", item.name);
        }
        if let Some(copy) = item.recovery_vm.or(item.test_vm) {
            let base = self.recovery.hypervisor.created_from(copy.vm).await.expect("a recovery VM is read");
            let expected = self.oracle.disks_at(copy.taken_at_ms).expect("every point comes from a capture");
            assert!(*expected == base, "the recovery VM of '{}' was not made from its point", item.name);
        }
    }

    /// Never two active copies, and the right one.
    async fn check_copies(&self, item: &ItemRecord) {
        let homes = [Some(&self.home), self.spare.as_ref()];
        let running = homes.into_iter().flatten().filter(|home| runs(home, item.vm)).count()
            + usize::from(item.recovery_vm.is_some_and(|copy| runs(&self.recovery, copy.vm)));
        if item.stand_downs.is_empty() {
            assert!(running <= 1, "'{}' runs {running} times: {item:#?}", item.name);
        }
        let is_failing_back =
            item.state.running.is_some_and(|running| running.operation == Operation::Failback);
        let staged = self.home_of(item).hypervisor.view(item.vm).is_some_and(|view| view.is_staged);
        assert!(!staged || is_failing_back, "'{}' is staged without a failback", item.name);
        if item.state.phase.active_location() == Location::Recovery {
            assert!(item.recovery_vm.is_some(), "'{}' has no recovery VM: {item:#?}", item.name);
        }
    }

    /// Nothing of ours is anywhere that no item accounts for.
    fn check_traces(&self, items: &[Arc<ItemRecord>]) {
        let copies: BTreeSet<_> = items
            .iter()
            .flat_map(|item| item.recovery_vm.into_iter().chain(item.test_vm))
            .map(|copy| copy.vm)
            .collect();
        for view in self.recovery.hypervisor.views() {
            assert!(
                copies.contains(&view.id) || !self.is_expected_gone(&view.name, items),
                "a recovery VM is left over: {} {:?}",
                view.name,
                view.recovery
            );
        }
        let expected: BTreeSet<_> = copies.iter().map(ToString::to_string).collect();
        let records = names(&self.recovery.data_dir.join("recovery"));
        // Without the extension: a record is being replaced while a VM is hydrated.
        let known = |name: &String| expected.contains(name.split('.').next().unwrap_or_default());
        assert!(records.iter().all(known), "records are left over: {records:?}, expected {expected:?}");
        let expected: BTreeSet<_> =
            copies.iter().map(|vm| format!("{}.nbd", &vm.0.simple().to_string()[..16])).collect();
        let sockets = names(&self.recovery.run_dir);
        assert!(sockets.is_subset(&expected), "sockets are left over: {sockets:?}, expected {expected:?}");
        let known: BTreeSet<_> = items.iter().map(|item| item.id.to_string()).collect();
        for host in self.hosts() {
            let records = names(&host.data_dir.join("items"));
            assert!(records.is_subset(&known), "an agent keeps records {records:?}, items are {known:?}");
        }
        let homes = [Some(&self.home), self.spare.as_ref()].into_iter().flatten();
        for view in homes.flat_map(|host| host.hypervisor.views()) {
            if items.iter().any(|item| vm_named(&item.name) == view.id) {
                assert!(!view.autostart, "the host would start '{}' by itself", view.name);
            } else {
                assert_eq!(view.trackers, 0, "trackers are left on '{}'", view.name);
                assert!(!view.is_staged, "'{}' is staged", view.name);
            }
        }
    }

    /// A recovery VM that its item left behind on purpose: protection was disabled while it was the active one.
    fn is_expected_gone(&self, name: &str, items: &[Arc<ItemRecord>]) -> bool {
        items.iter().any(|item| name.starts_with(&item.target.name)) || name.ends_with("-test")
    }
}

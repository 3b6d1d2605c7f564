//! What is on the hosts, read now and then.

use std::{collections::HashMap, sync::Arc};

use futures::future::join_all;
use mainstay_model::{Health, ItemId, Phase, ProviderId, VmId};
use mainstay_provider::{AnswerWaiting, Discovery, Disk, NoProgress, PowerState, VirtualMachine, call};

use super::ANSWER_MAX;
use crate::{
    Control, ControlError,
    app::ProviderRecord,
    db::{DiskRecord, ItemRecord},
    sites::answer_within,
};

/// How old a discovery may be: new VMs show within this time.
const DISCOVERY_AGE_MAX_MS: i64 = 30_000;

impl Control {
    pub(super) async fn reconcile_inventory(self: Arc<Self>) -> Result<(), ControlError> {
        let (now_ms, providers) = (self.clock.now_ms(), self.providers().await?);
        // Side by side: one that hangs holds up itself.
        let looks = providers.iter().map(|provider| self.look_at(provider, now_ms));
        join_all(looks).await.into_iter().collect()
    }

    async fn look_at(&self, provider: &ProviderRecord, now_ms: i64) -> Result<(), ControlError> {
        // One of the future was read before the clock was set back.
        let is_fresh = provider
            .discovered_ms
            .is_some_and(|discovered_ms| (0..DISCOVERY_AGE_MAX_MS).contains(&(now_ms - discovered_ms)));
        if !self.sites.is_connected(provider.id) {
            return Ok(());
        }
        let has_arrived = self.sites.take_arrival(provider.id);
        if is_fresh && !has_arrived {
            return Ok(());
        }
        match answer_within(ANSWER_MAX, "the question what is on it", self.refresh_provider(provider.id))
            .await
        {
            Ok(discovery) => self.answer_waiting(provider.id, &discovery.waiting, has_arrived).await,
            Err(error) => {
                tracing::debug!(host = provider.name, %error, "a host could not be read now");
                Ok(())
            }
        }
    }

    /// The host has booted and asks whether VMs that it would have started are still the active copies. What fails is tried
    /// again at the next discovery and told once a connection.
    async fn answer_waiting(
        &self,
        provider: ProviderId,
        waiting: &[ItemId],
        has_arrived: bool,
    ) -> Result<(), ControlError> {
        for id in waiting {
            let Some(item) = self.db.item(*id).await? else { continue };
            // What a job is about to decide is answered after it.
            if item.state.running.is_some_and(|running| !running.operation.lets_replication_run()) {
                continue;
            }
            let may_start = item.active_provider() == provider;
            // One of the two is older, and starting it makes it the one that is replicated.
            let elsewhere = if may_start { self.host_that_runs(&item, provider).await? } else { None };
            let answered = match elsewhere {
                Some(other) => Err(format!("it runs on '{other}'")),
                None => {
                    let answer = AnswerWaiting { item: *id, generation: item.state.generation, may_start };
                    let site = self.sites.get(provider)?;
                    let answered = call(&*site, answer, &NoProgress);
                    let answered =
                        answer_within(ANSWER_MAX, "the word whether a VM may start", answered).await;
                    answered.map_err(|error| error.to_string())
                }
            };
            let (code, severity, what) = match &answered {
                Ok(()) if may_start => {
                    ("StartedAfterBoot", Health::Normal, "was started after its host's boot".to_owned())
                }
                Ok(()) => (
                    "NotStartedAfterBoot",
                    Health::Warning,
                    "was not started after its host's boot: another copy is the active one".to_owned(),
                ),
                Err(why) => {
                    tracing::warn!(item = %id, why, "a VM was not started after its host's boot");
                    let what = format!("was not started after its host's boot: {why}");
                    ("StartAfterBootFailed", Health::Critical, what)
                }
            };
            if answered.is_ok() || has_arrived {
                let text = format!("'{}' {what}", item.vm_name);
                self.record_event(self.item_event(&item, code, severity, text)).await?;
            }
            self.note_not_started(&item, answered.err().map(|why| (provider, why))).await?;
        }
        // Whom its administrator has started, or whose host has lost its records, does not wait any more.
        for item in self.db.items().await?.iter() {
            if item.not_started.as_ref().is_some_and(|(host, _)| *host == provider)
                && !waiting.contains(&item.id)
            {
                self.note_not_started(item, None).await?;
            }
        }
        Ok(())
    }

    async fn note_not_started(
        &self,
        item: &ItemRecord,
        why: Option<(ProviderId, String)>,
    ) -> Result<(), ControlError> {
        if item.not_started == why {
            return Ok(());
        }
        self.change_item(item.id, |item| {
            item.not_started = why;
            Ok(())
        })
        .await
        .map(drop)
    }

    /// Another host of the protected site that runs the home VM, as far as is known.
    async fn host_that_runs(
        &self,
        item: &ItemRecord,
        provider: ProviderId,
    ) -> Result<Option<String>, ControlError> {
        let runs = |host: &ProviderRecord| {
            let vms = host.discovery.iter().flat_map(|discovery| &discovery.inventory.vms);
            vms.into_iter().any(|vm| vm.id == item.vm && vm.power == PowerState::Running)
        };
        let providers = self.providers().await?;
        let other = providers.iter().find(|host| {
            host.id != provider
                && host.fabric.eq_ignore_ascii_case(&item.fabric)
                && self.sites.is_connected(host.id)
                && runs(host)
        });
        Ok(other.map(|host| host.name.clone()))
    }

    /// A VM that its administrator renamed, or whose disks grew, stays the same item; people see what it is now, and hear of a disk
    /// that nobody replicates.
    pub(crate) async fn note_changes(
        &self,
        provider: ProviderId,
        discovery: &Discovery,
    ) -> Result<(), ControlError> {
        let vms: HashMap<VmId, &VirtualMachine> =
            discovery.inventory.vms.iter().map(|vm| (vm.id, vm)).collect();
        for item in self.db.items().await?.iter() {
            // Another host may have a copy that was left there.
            let at = |host: ProviderId, vm: VmId| vms.get(&vm).copied().filter(|_| host == provider);
            let home = at(item.primary_provider, item.vm);
            let name = home.map_or(&item.vm_name, |vm| &vm.name);
            let active = at(item.active_provider(), item.active_vm().unwrap_or(item.vm));
            let disks = as_now(item, active);
            if *name == item.vm_name && disks == item.disks {
                continue;
            }
            let is_new = |disk: &&DiskRecord| !item.disks.iter().any(|known| known.key == disk.key);
            for disk in disks.iter().filter(is_new) {
                let text = format!(
                    "'{name}' has a new disk '{}', which is not replicated. To have it replicated, disable the protection of the VM \
                     and enable it again.",
                    disk.key
                );
                self.record_event(self.item_event(item, "DiskAdded", Health::Warning, text)).await?;
            }
            if *name != item.vm_name {
                tracing::info!(item = %item.id, from = item.vm_name, to = name, "a VM was renamed");
            }
            self.change_item(item.id, |item| {
                item.vm_name.clone_from(name);
                // From what is there now: the job that protects the VM may have decided meanwhile which disks these are.
                item.disks = as_now(item, active);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

/// The disks of an item as its VM has them now: while it is protected at home also those that are not replicated.
fn as_now(item: &ItemRecord, vm: Option<&VirtualMachine>) -> Vec<DiskRecord> {
    let mut disks = with_sizes(&item.disks, vm);
    // Elsewhere, and while a job decides which disks these are, it may have others.
    if let Some(vm) = vm.filter(|_| item.state.phase == Phase::Protected && item.state.running.is_none()) {
        let is_there = |record: &DiskRecord| vm.disks.iter().any(|disk| disk.key == record.key);
        disks.retain(|record| record.is_included || is_there(record));
        let is_known = |disk: &&Disk| item.disks.iter().any(|record| record.key == disk.key);
        disks.extend(vm.disks.iter().filter(|disk| !is_known(disk)).map(|disk| DiskRecord::of(disk, false)));
    }
    disks
}

/// The disks with the sizes that a VM has now. What is not known (a disk that is away) stays.
fn with_sizes(disks: &[DiskRecord], vm: Option<&VirtualMachine>) -> Vec<DiskRecord> {
    let size = |key: &str| {
        let disk = vm?.disks.iter().find(|disk| disk.key == key)?;
        (disk.size_bytes > 0).then_some(disk.size_bytes)
    };
    let resized = |disk: &DiskRecord| DiskRecord {
        size_bytes: size(&disk.key).unwrap_or(disk.size_bytes),
        ..disk.clone()
    };
    disks.iter().map(resized).collect()
}

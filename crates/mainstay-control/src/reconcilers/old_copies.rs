//! Copies of a VM that run although another copy is the active one: somebody, or something, has started them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use mainstay_model::{Health, ItemId, Location, ProviderId, VmId};
use mainstay_provider::{Discovery, NoProgress, PowerState, ReadPower, call};
use serde::{Deserialize, Serialize};

use crate::{
    Control, ControlError,
    app::ProviderRecord,
    db::{ItemRecord, StandDownRecord},
    sites::answer_within,
};

/// What becomes of a running copy that is not the active one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OldCopies {
    /// It is stopped, as after a failover: two that answer to one name and address do more harm than one that is off.
    #[default]
    Stop,
    /// It runs on, and the item's health says so.
    Report,
}

/// How long the host of the active VM may take to say whether it runs.
const HOME_ANSWER_MAX: Duration = Duration::from_secs(5);

impl ItemRecord {
    /// The copy at a host that must not run. After a failover that is so at every host of the protected site: the VM may have been
    /// moved there before. At home it is so where home was before: elsewhere nobody knows which of two is the old one.
    fn old_copy_at(&self, host: &ProviderRecord) -> Option<VmId> {
        if host.id == self.primary_provider || host.id == self.recovery_provider {
            return self.inactive_vm_at(host.id);
        }
        let is_old = match self.state.phase.active_location() {
            Location::Recovery => host.fabric.eq_ignore_ascii_case(&self.fabric),
            Location::Primary => self.given_up.contains(&host.id),
        };
        is_old.then_some(self.vm)
    }

    /// Whether the copy at a host is one that must not run, and no job is about to change that.
    pub(super) fn may_stop_old_copy(&self, host: &ProviderRecord) -> bool {
        self.state.running.is_none() && self.old_copy_at(host).is_some()
    }

    /// Whether a VM that runs at a host where home was before may have been moved back there.
    pub(super) fn may_have_moved_to(&self, host: ProviderId) -> bool {
        self.state.phase.active_location() == Location::Primary && self.given_up.contains(&host)
    }
}

impl Control {
    /// Looks for copies that must not run on a host. Only items that are now as they were before the host was read
    /// (`before`) count: of others the answer may tell of another time.
    pub(crate) async fn note_old_copies(
        &self,
        provider: ProviderId,
        discovery: &Discovery,
        before: &[Arc<ItemRecord>],
    ) -> Result<(), ControlError> {
        let before: HashMap<ItemId, &Arc<ItemRecord>> = before.iter().map(|item| (item.id, item)).collect();
        let host = self.provider(provider).await?;
        for item in self.db.items().await?.iter() {
            let is_same = before.get(&item.id).is_some_and(|before| before.state == item.state);
            let is_ordered = item.stand_downs.iter().any(|order| order.provider == provider);
            if !is_same || item.state.running.is_some() || is_ordered {
                continue;
            }
            let vm = item.old_copy_at(&host);
            // A copy that is held in memory while it is copied out of the store is paused, and does not run.
            let mut runs = discovery
                .inventory
                .vms
                .iter()
                .any(|found| Some(found.id) == vm && found.power == PowerState::Running);
            if runs && item.may_have_moved_to(provider) {
                match self.is_home_running(item).await {
                    Some(is_home_running) => runs = is_home_running,
                    // Looked at again with the next inventory.
                    None => continue,
                }
            }
            match (self.old_copies.get().copied().unwrap_or_default(), vm) {
                (OldCopies::Stop, Some(vm)) if runs => {
                    let generation = item.state.generation;
                    tracing::warn!(item = %item.id, %vm, "a copy runs that is not the active one");
                    self.change_item(item.id, |item| {
                        item.order_stand_down(StandDownRecord {
                            provider,
                            vm,
                            generation,
                            is_final: false,
                            was_found_running: true,
                        });
                        Ok(())
                    })
                    .await?;
                }
                // One is enough to make the item's health critical.
                (OldCopies::Report, _) if runs && item.old_copy.is_none() => {
                    self.note_reported(item, provider, true).await?;
                }
                (OldCopies::Report, _) if !runs && item.old_copy == Some(provider) => {
                    self.note_reported(item, provider, false).await?;
                }
                // Left from when copies were only reported.
                (OldCopies::Stop, _) if item.old_copy == Some(provider) => {
                    self.note_reported(item, provider, false).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the home VM runs; `None` = its host does not say so.
    pub(super) async fn is_home_running(&self, item: &ItemRecord) -> Option<bool> {
        let site = self.sites.get(item.primary_provider).ok()?;
        let read = call(&*site, ReadPower { vm: item.vm }, &NoProgress);
        Some(
            answer_within(HOME_ANSWER_MAX, "the question whether a VM runs", read).await.ok()?
                == PowerState::Running,
        )
    }

    async fn note_reported(
        &self,
        item: &ItemRecord,
        provider: ProviderId,
        runs: bool,
    ) -> Result<(), ControlError> {
        let host = self.provider(provider).await?.name;
        let (code, severity, text) = match runs {
            true => {
                ("OldCopyRuns", Health::Critical, "runs although it is not the active one; it was left alone")
            }
            false => ("OldCopyOff", Health::Normal, "does not run any more"),
        };
        let text = format!("the copy of '{}' on '{host}' {text}", item.vm_name);
        // Told before it is noted: a crash in between has it told again.
        self.record_event(self.item_event(item, code, severity, text)).await?;
        self.change_item(item.id, |item| {
            item.old_copy = runs.then_some(provider);
            Ok(())
        })
        .await
        .map(drop)
    }

    /// An order to stop a copy that was found running was carried out.
    pub(super) async fn note_stopped(
        &self,
        item: &ItemRecord,
        provider: ProviderId,
        was_stopped: bool,
    ) -> Result<(), ControlError> {
        // It was off again by then, or the host knows of a later state than this server.
        if !was_stopped {
            return Ok(());
        }
        let host = self.provider(provider).await?.name;
        let text = format!(
            "a copy of '{}' that is not the active one was found running on '{host}' and was stopped",
            item.vm_name
        );
        self.record_event(self.item_event(item, "OldCopyStopped", Health::Warning, text)).await?;
        Ok(())
    }
}

//! Copies of a VM that run although another copy is the active one: somebody, or something, has started them.

use std::{collections::HashMap, sync::Arc};

use mainstay_model::{Health, ItemId, Location, ProviderId};
use mainstay_provider::{Discovery, NoProgress, PowerOffVm, PowerState, ReadPower, SiteError, call};
use serde::{Deserialize, Serialize};

use super::{ANSWER_MAX, within};
use crate::{
    Control, ControlError,
    app::ProviderRecord,
    db::{ItemRecord, StandDownRecord},
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

impl ItemRecord {
    /// Whether the copy at a host is one that must not run, and no job is about to change that.
    pub(super) fn may_stop_old_copy(&self, provider: ProviderId) -> bool {
        self.state.running.is_none() && self.inactive_vm_at(provider).is_some()
    }

    /// Whether a host of the protected site is none that the item knows: a VM of the same identity is there because it has been
    /// moved, or was left there when it failed back to another host.
    pub(super) fn is_strange(&self, host: &ProviderRecord) -> bool {
        host.id != self.primary_provider
            && host.id != self.recovery_provider
            && host.fabric.eq_ignore_ascii_case(&self.fabric)
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
            if !is_same || item.state.running.is_some() || !item.stand_downs.is_empty() {
                continue;
            }
            let is_strange = item.is_strange(&host);
            let vm = if is_strange { Some(item.vm) } else { item.inactive_vm_at(provider) };
            // A copy that is held in memory while it is copied out of the store is paused, and does not run.
            let is_running = discovery
                .inventory
                .vms
                .iter()
                .any(|found| Some(found.id) == vm && found.power == PowerState::Running);
            let runs = is_running && (!is_strange || self.runs_twice(item, provider).await);
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
                (OldCopies::Report, _) if runs != (item.old_copy == Some(provider)) => {
                    self.note_reported(item, provider, runs).await?;
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

    /// Whether a VM that runs at a strange host runs a second time there: the active copy is a recovery VM, or was seen running
    /// between two looks at this one. One that is being moved to another host runs at one of them at a time.
    pub(super) async fn runs_twice(&self, item: &ItemRecord, stranger: ProviderId) -> bool {
        if item.state.phase.active_location() == Location::Recovery {
            return true;
        }
        let is_running = async |provider| {
            let Ok(site) = self.sites.get(provider) else { return false };
            // What cannot be read now is looked at again with the next inventory.
            let power = within(ANSWER_MAX, call(&*site, ReadPower { vm: item.vm }, &NoProgress)).await;
            power.is_ok_and(|power| power == PowerState::Running)
        };
        is_running(item.primary_provider).await && is_running(stranger).await
    }

    /// Stops a copy at a strange host; answers whether it was one.
    pub(super) async fn stop_stranger(
        &self,
        item: &ItemRecord,
        order: StandDownRecord,
    ) -> Result<bool, SiteError> {
        // The item may have changed since, or the VM have been moved back.
        if item.state.running.is_some() || !self.runs_twice(item, order.provider).await {
            return Ok(false);
        }
        let site = self.sites.get(order.provider)?;
        within(ANSWER_MAX, call(&*site, PowerOffVm { vm: order.vm }, &NoProgress)).await?;
        Ok(true)
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

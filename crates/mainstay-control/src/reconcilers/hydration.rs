//! Recovery VMs come to own their disks: copied out of the store while they run, after which the store lets go.

use std::sync::Arc;

use mainstay_provider::{Hydrate, NoProgress, WhenOff, call};

use crate::{Control, ControlError, db::VmCopy};

impl Control {
    pub(super) async fn reconcile_hydration(self: Arc<Self>) -> Result<(), ControlError> {
        for item in self.db.items().await?.iter() {
            let Some(copy) = item.recovery_vm.filter(|copy| !copy.is_hydrated) else { continue };
            // While a job works on the item, the VM is the job's.
            if item.state.running.is_some()
                || item.state.phase.active_location() != mainstay_model::Location::Recovery
            {
                continue;
            }
            let Ok(site) = self.sites.get(item.recovery_provider) else { continue };
            let hydrate = Hydrate { item: item.id, vm: copy.vm, when_off: WhenOff::Wait };
            let hydration = match call(&*site, hydrate, &NoProgress).await {
                Ok(hydration) => hydration,
                Err(error) => {
                    tracing::debug!(item = %item.id, %error, "hydration does not go on now");
                    continue;
                }
            };
            let after = VmCopy {
                is_hydrated: hydration.is_complete,
                bytes_done: hydration.bytes_done,
                bytes_total: hydration.bytes_total,
                ..copy
            };
            if after != copy {
                self.change_item(item.id, |item| {
                    if let Some(present) = item.recovery_vm.as_mut().filter(|present| present.vm == copy.vm) {
                        *present = after;
                    }
                    Ok(())
                })
                .await?;
            }
            if hydration.is_complete {
                self.release_point(item.id, copy.vm).await?;
                tracing::info!(item = %item.id, vm = %copy.vm, "a recovery VM no longer needs the store");
            }
        }
        Ok(())
    }
}

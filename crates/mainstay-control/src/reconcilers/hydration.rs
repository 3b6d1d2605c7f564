//! Recovery VMs come to own their disks: copied out of the store while they run, after which the store lets go.

use std::sync::Arc;

use futures::future::join_all;
use mainstay_provider::{Hydrate, NoProgress, WhenOff, call};

use super::ANSWER_MAX;
use crate::{
    Control, ControlError,
    db::{ItemRecord, VmCopy},
    sites::answer_within,
};

impl Control {
    pub(super) async fn reconcile_hydration(self: Arc<Self>) -> Result<(), ControlError> {
        let items = self.db.items().await?;
        let copies = items.iter().filter_map(|item| {
            let copy = item.recovery_vm.filter(|copy| !copy.is_hydrated)?;
            // While a job works on the item, the VM is the job's.
            let is_ours = item.state.running.is_none()
                && item.state.phase.active_location() == mainstay_model::Location::Recovery;
            is_ours.then(|| self.hydrate(item, copy))
        });
        // Side by side: one VM that hangs holds up itself.
        join_all(copies).await.into_iter().collect()
    }

    async fn hydrate(&self, item: &ItemRecord, copy: VmCopy) -> Result<(), ControlError> {
        let Ok(site) = self.sites.get(item.recovery_provider) else { return Ok(()) };
        let hydrate = Hydrate {
            item: item.id,
            generation: item.state.generation,
            vm: copy.vm,
            when_off: WhenOff::Wait,
        };
        let hydration = match answer_within(
            ANSWER_MAX,
            "the order to copy a recovery VM out of the store",
            call(&*site, hydrate, &NoProgress),
        )
        .await
        {
            Ok(hydration) => hydration,
            Err(error) => {
                tracing::debug!(item = %item.id, %error, "hydration does not go on now");
                return Ok(());
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
        Ok(())
    }
}

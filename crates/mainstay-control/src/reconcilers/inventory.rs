//! What is on the hosts, read now and then.

use std::sync::Arc;

use crate::{Control, ControlError};

/// How old a discovery may be: new VMs show within this time.
const DISCOVERY_AGE_MAX_MS: i64 = 30_000;

impl Control {
    pub(super) async fn reconcile_inventory(self: Arc<Self>) -> Result<(), ControlError> {
        let now_ms = self.clock.now_ms();
        for provider in self.providers().await? {
            let is_fresh = provider
                .discovered_ms
                .is_some_and(|discovered_ms| now_ms - discovered_ms < DISCOVERY_AGE_MAX_MS);
            if is_fresh || !self.sites.is_connected(provider.id) {
                continue;
            }
            match self.refresh_provider(provider.id).await {
                Ok(discovery) => self.note_renames(&provider.fabric, &discovery).await?,
                Err(error) => tracing::debug!(host = provider.name, %error, "a host could not be read now"),
            }
        }
        Ok(())
    }

    /// A VM renamed by its administrator stays the same item; people see the new name.
    async fn note_renames(
        &self,
        fabric: &str,
        discovery: &mainstay_provider::Discovery,
    ) -> Result<(), ControlError> {
        for item in self.db.items().await? {
            let renamed = discovery.inventory.vms.iter().find(|vm| {
                vm.id == item.vm && vm.name != item.vm_name && item.fabric.eq_ignore_ascii_case(fabric)
            });
            if let Some(vm) = renamed {
                tracing::info!(item = %item.id, from = item.vm_name, to = vm.name, "a VM was renamed");
                let name = vm.name.clone();
                self.change_item(item.id, |item| {
                    item.vm_name = name;
                    Ok(())
                })
                .await?;
            }
        }
        Ok(())
    }
}

//! A change of an item's health is an event.

use std::sync::{Arc, PoisonError};

use mainstay_model::Health;

use crate::{Control, ControlError};

impl Control {
    pub(super) async fn reconcile_health(self: Arc<Self>) -> Result<(), ControlError> {
        let policies = self.policies_by_name().await?;
        for item in self.db.items().await?.iter() {
            // Thousands of items must not hold up whoever waits for this thread.
            tokio::task::consume_budget().await;
            let Some(policy) = policies.get(&item.policy.to_lowercase()) else { continue };
            let (health, errors, rpo) = self.item_health_under(item, policy);
            if let Some(rpo) = rpo {
                let vault = self.vault_name.get().cloned().unwrap_or_default();
                metrics::gauge!("mainstay_item_rpo_seconds", "vault" => vault, "item" => item.name.clone())
                    .set(rpo as f64);
            }
            let before =
                self.health_told.lock().unwrap_or_else(PoisonError::into_inner).insert(item.id, health);
            if before.unwrap_or(Health::Normal) == health {
                continue;
            }
            let text = match errors.iter().max_by_key(|error| error.level) {
                Some(worst) => format!("the health of '{}' is {health:?}: {}", item.vm_name, worst.message),
                None => format!("the health of '{}' is Normal again", item.vm_name),
            };
            self.record_event(self.item_event(item, "HealthChanged", health, text)).await?;
        }
        Ok(())
    }
}

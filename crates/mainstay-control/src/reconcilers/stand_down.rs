//! The side that is no longer active learns it, now or when it comes back, and what was done about it is told.

use std::sync::Arc;

use mainstay_model::Health;
use mainstay_provider::{NoProgress, StandDown, call};

use crate::{Control, ControlError};

impl Control {
    pub(super) async fn reconcile_stand_down(self: Arc<Self>) -> Result<(), ControlError> {
        for item in self.db.items().await? {
            let Some(order) = item.stand_down else { continue };
            // Until the failover's job has ended it may still be undone, and the old side be the active one again.
            if item.state.running.is_some() {
                continue;
            }
            let Ok(site) = self.sites.get(order.provider) else { continue };
            let operation = StandDown { item: item.id, generation: order.generation, stop_vm: true };
            let answer = match call(&*site, operation, &NoProgress).await {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::warn!(item = %item.id, %error, "the former active side has not stood down yet");
                    continue;
                }
            };
            self.change_item(item.id, |item| {
                item.stand_down = item.stand_down.filter(|present| *present != order);
                Ok(())
            })
            .await?;
            let (severity, done) = if answer.was_stopped {
                (Health::Warning, "its running VM was stopped")
            } else {
                (Health::Normal, "its VM was off")
            };
            let text = format!(
                "the protected site of '{}' knows that it is no longer the active one; {done}",
                item.vm_name
            );
            self.record_event(self.item_event(&item, "SourceStoodDown", severity, text)).await?;
        }
        Ok(())
    }
}

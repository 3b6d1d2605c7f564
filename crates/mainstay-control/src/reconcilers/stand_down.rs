//! The side that is no longer active learns it, now or when it comes back, and what was done about it is told.

use std::sync::Arc;

use futures::future::join_all;
use mainstay_model::Health;
use mainstay_provider::{NoProgress, SiteError, StandDown, Unprotect, call};

use super::ANSWER_MAX;
use crate::{
    Control, ControlError,
    db::{ItemRecord, StandDownRecord},
    sites::answer_within,
};

impl Control {
    pub(super) async fn reconcile_stand_down(self: Arc<Self>) -> Result<(), ControlError> {
        let (control, items) = (&*self, self.db.items().await?);
        // Until the failover's job has ended it may still be undone, and the old side be the active one again.
        let free = items.iter().filter(|item| item.state.running.is_none());
        let orders =
            free.flat_map(|item| item.stand_downs.iter().map(move |order| control.stand_down(item, *order)));
        // Side by side: a host that hangs must not keep others from standing down.
        join_all(orders).await.into_iter().collect()
    }

    async fn stand_down(&self, item: &ItemRecord, order: StandDownRecord) -> Result<(), ControlError> {
        let Ok(site) = self.sites.get(order.provider) else { return Ok(()) };
        if order.was_found_running {
            let host = self.provider(order.provider).await?;
            // The VM runs once if it was moved there. What is not known is found again with the next inventory.
            let has_moved = item.may_have_moved_to(host.id) && self.is_home_running(item).await != Some(true);
            if has_moved || !item.may_stop_old_copy(&host) {
                return self.end_stand_down(item, order).await;
            }
        }
        let operation =
            StandDown { item: item.id, generation: order.generation, stop_vm: true, vm: Some(order.vm) };
        let stood = async {
            let answer = call(&*site, operation, &NoProgress).await?;
            if order.is_final && !answer.is_overtaken {
                call(
                    &*site,
                    Unprotect { item: item.id, generation: order.generation, is_active: false },
                    &NoProgress,
                )
                .await?;
            }
            Ok::<_, SiteError>(answer)
        };
        let answer = match answer_within(ANSWER_MAX, "the order to stand down", stood).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(item = %item.id, %error, "the former active side has not stood down yet");
                return Ok(());
            }
        };
        if answer.is_overtaken {
            // It has become the active side again since, and learnt that; or this server was set back, and does not know it.
            if self.item(item.id).await?.state.generation == order.generation {
                let text = format!(
                    "a host of '{}' knows of a later failover than this server: the server was set back",
                    item.vm_name
                );
                self.record_event(self.item_event(item, "ServerSetBack", Health::Critical, text)).await?;
            }
            return self.end_stand_down(item, order).await;
        }
        // Told before it is done with: after a crash in between the order is given again, and nothing goes untold.
        if order.was_found_running {
            self.note_stopped(item, order.provider, answer.was_stopped).await?;
            return self.end_stand_down(item, order).await;
        }
        let (severity, done) = if answer.was_stopped {
            (Health::Warning, "its running VM was stopped")
        } else {
            (Health::Normal, "its VM was off")
        };
        let side = if order.is_final { "former home host" } else { "protected site" };
        let text =
            format!("the {side} of '{}' knows that it is no longer the active one; {done}", item.vm_name);
        self.record_event(self.item_event(item, "SourceStoodDown", severity, text)).await?;
        self.end_stand_down(item, order).await
    }

    async fn end_stand_down(&self, item: &ItemRecord, order: StandDownRecord) -> Result<(), ControlError> {
        self.change_item(item.id, |item| {
            item.stand_downs.retain(|present| *present != order);
            Ok(())
        })
        .await
        .map(drop)
    }
}

//! Resynchronization: every block is compared by hash, what differs is shipped.

use async_trait::async_trait;

use super::replicate;
use crate::{
    db::JobError,
    jobs::{Done, Patience, SILENCE_MAX, Step, StepAction, StepContext},
};

pub(super) fn steps() -> Vec<Step> {
    vec![Step::new("ResynchronizeTask", "VmResynchronize", "Resynchronize the virtual machine", Compare)]
}

struct Compare;

#[async_trait]
impl StepAction for Compare {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let _pause = step.control.cycles.pause(item.id);
        step.control.cycles.stop(item.id).await;
        let replicated = replicate(step, &item, Patience::OUTAGE, SILENCE_MAX, true).await?;
        Ok(Done::with(&replicated)?.changing(move |item| {
            item.replication.last_point = Some(replicated.point);
            item.replication.last_point_ms = Some(replicated.taken_at_ms);
            item.replication.failures = 0;
            item.replication.last_error = None;
            item.replication.not_before_ms = None;
        }))
    }
}

//! Reverse replication after a failback: from home to the recovery site again, with what changed since only.

use async_trait::async_trait;
use mainstay_provider::{Protect, Replicated};

use super::replicate;
use crate::{
    ControlError,
    db::JobError,
    jobs::{Done, Patience, SILENCE_MAX, Step, StepAction, StepContext, Undone},
};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "CreateProtectionTargetTask",
            "CreateProtectionTarget",
            "Identifying the replication target",
            IdentifyTarget,
        ),
        Step::new("EnableProtectionTask", "EnableProtection", "Enable replication", EnableReplication),
        Step::new(
            "StartInitialReplicationTask",
            "VmStartInitialReplication",
            "Starting initial replication",
            ReplicateChanges,
        ),
    ]
}

struct IdentifyTarget;

#[async_trait]
impl StepAction for IdentifyTarget {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        if step.control.head(item.id).await?.is_none() {
            return Err(JobError::new(
                "NoCommonState",
                format!("the store holds nothing of '{}' any more", item.vm_name),
                "Disable replication and enable it again; everything is then copied anew.",
            ));
        }
        step.check_store().await?;
        Ok(Done::default())
    }
}

struct EnableReplication;

#[async_trait]
impl StepAction for EnableReplication {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let generation = item.state.generation.next();
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        let protect = Protect { item: item.id, vm: item.vm, disks: item.included_disks(), generation };
        step.call(item.primary_provider, protect, Patience::RESTART).await?;
        Ok(Done::default().fencing())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let generation = item.state.generation.next();
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        Ok(Undone { fences: true, change: None })
    }
}

/// The first delta is part of the job, so that the job's end means: replicated again.
struct ReplicateChanges;

#[async_trait]
impl StepAction for ReplicateChanges {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let replicated: Replicated = replicate(step, &item, Patience::OUTAGE, SILENCE_MAX, false).await?;
        let (point, taken_at_ms) = (replicated.point, replicated.taken_at_ms);
        Ok(Done::with(&replicated)?.changing(move |item| {
            item.replication = crate::db::ReplicationRecord {
                last_point: Some(point),
                last_point_ms: Some(taken_at_ms),
                initial_percent: 100,
                bytes_changed: replicated.bytes_changed,
                bytes_moved: replicated.bytes_moved,
                ..crate::db::ReplicationRecord::default()
            };
        }))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        // A point that was reached stays in the store as what the next delta builds on, and leaves the catalogue.
        let item = step.item_id();
        let points = step.control.store.points(item.0).await.map_err(ControlError::from)?;
        let reached: Vec<_> = points.iter().map(|point| point.id).collect();
        step.control.store.delete_points(item.0, &reached).await.map_err(ControlError::from)?;
        Ok(Undone::default())
    }
}

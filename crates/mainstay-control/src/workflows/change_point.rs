//! Change recovery point: another point instead of the one that was failed over to. What was written at the recovery
//! site since the failover is discarded, as the request says.

use async_trait::async_trait;
use mainstay_model::PointId;
use mainstay_provider::{Discover, PowerOffVm, RemoveRecoveryVm};
use serde::{Deserialize, Serialize};

use super::{
    failover::{FailoverParams, StartRecoveryVm, create_recovery_vm},
    points::point_time_ms,
    vm_of_job,
};
use crate::{
    db::{FailoverRecord, JobError, VmCopy},
    jobs::{Done, Patience, Step, StepAction, StepContext},
};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "ChangePitPreflightChecksTask",
            CHECK,
            "Prerequisites check for changing the recovery point",
            CheckPrerequisites,
        ),
        Step::new(
            "RemoveFailedOverVmTask",
            "VmRemoveForChangePit",
            "Remove the failed-over virtual machine",
            RemovePresent,
        )
        .point_of_no_return(),
        Step::new("ChangePitTask", "VmChangePit", "Change the recovery point", CreateOther),
        Step::new(
            "StartVmOnSecondary",
            "VmFoStartVmOnSecondary",
            "Start the replica virtual machine",
            StartRecoveryVm,
        ),
    ]
}

const CHECK: &str = "VmChangePitPrerequisitesCheck";

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Chosen {
    point: PointId,
    taken_at_ms: i64,
}

struct CheckPrerequisites;

#[async_trait]
impl StepAction for CheckPrerequisites {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        let point = step.control.choose_point(&item, params.point).await?;
        let read = Discover {};
        step.call(item.recovery_provider, read, Patience::RECONNECT).await.map_err(|error| {
            JobError::new(
                "SiteUnavailable",
                format!("the recovery site of '{}' does not answer: {error}", item.vm_name),
                "Nothing was changed. Try again when its agent is back.",
            )
        })?;
        // Opened before anything is removed: a point that cannot be booted must not cost the one that runs.
        step.control.point_contents(item.id, PointId(point.id)).await?;
        Done::with(&Chosen { point: PointId(point.id), taken_at_ms: point_time_ms(&point) })
    }
}

struct RemovePresent;

#[async_trait]
impl StepAction for RemovePresent {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let Some(copy) = item.recovery_vm else { return Ok(Done::skipped()) };
        step.call(item.recovery_provider, PowerOffVm { vm: copy.vm }, Patience::OUTAGE).await?;
        let remove = RemoveRecoveryVm { item: item.id, vm: copy.vm };
        step.call(item.recovery_provider, remove, Patience::OUTAGE).await?;
        step.control.release_point(item.id, copy.vm).await?;
        Ok(Done::default().changing(|item| item.recovery_vm = None))
    }
}

struct CreateOther;

#[async_trait]
impl StepAction for CreateOther {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let chosen: Chosen = step.expect_output(CHECK)?;
        create_recovery_vm(step, &item, chosen.point, item.state.generation).await?;
        let vm = vm_of_job(item.id, step.job.id);
        let now_ms = step.control.clock.now_ms();
        let requested_ms = step.job.created_ms;
        Ok(Done::default().changing(move |item| {
            item.recovery_vm = Some(VmCopy {
                vm,
                point: chosen.point,
                taken_at_ms: chosen.taken_at_ms,
                is_hydrated: false,
                bytes_done: 0,
                bytes_total: 0,
            });
            let first = item.failover.take().unwrap_or_default();
            let failed_over_ms = if first.requested_ms > 0 { first.requested_ms } else { requested_ms };
            item.failover = Some(FailoverRecord {
                loss_seconds: (failed_over_ms - chosen.taken_at_ms).max(0).div_euclid(1000) + 1,
                loss_bytes: None,
                requested_ms,
                started_ms: Some(now_ms),
            });
        }))
    }
}

//! Change recovery point: another point instead of the one that was failed over to. What was written at the recovery
//! site since the failover is discarded, as the request says.

use async_trait::async_trait;
use jiff::Timestamp;
use mainstay_model::{Health, PointId};
use mainstay_provider::Discover;
use serde::{Deserialize, Serialize};

use super::{
    failover::{FailoverParams, StartRecoveryVm, create_recovery_vm, loss_bytes},
    points::point_time_ms,
    power::remove,
    vm_of_job,
};
use crate::{
    ControlError,
    db::{FailoverRecord, ItemRecord, JobError, VmCopy},
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
    /// The moment of the point that ran before; absent if there was none, and in the logs of older versions.
    #[serde(default)]
    former_ms: Option<i64>,
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
        Done::with(&Chosen {
            point: PointId(point.id),
            taken_at_ms: point_time_ms(&point),
            former_ms: item.recovery_vm.map(|copy| copy.taken_at_ms),
        })
    }
}

struct RemovePresent;

#[async_trait]
impl StepAction for RemovePresent {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let chosen: Chosen = step.expect_output(CHECK)?;
        let Some(copy) = item.recovery_vm else { return Ok(Done::skipped()) };
        remove(step, &item, copy.vm, Patience::OUTAGE).await?;
        step.control.release_point(item.id, copy.vm).await?;
        let warning = discarded(&item, &chosen);
        let event = step.control.item_event(&item, DISCARDED, Health::Warning, warning.message.clone());
        step.control.record_event(event).await.map_err(ControlError::from)?;
        Ok(Done::default().warning(warning).changing(|item| item.recovery_vm = None))
    }
}

/// Code of the event, and of the task's note.
const DISCARDED: &str = "WritesDiscarded";

/// What the change costs: it was asked for, and still nobody should have to work out afterwards what is gone.
fn discarded(item: &ItemRecord, chosen: &Chosen) -> JobError {
    let moved_ms = chosen.former_ms.map(|former_ms| chosen.taken_at_ms - former_ms);
    // Rounded away from zero: two points within a second are two.
    let seconds = moved_ms.map(|moved_ms| moved_ms.unsigned_abs().div_ceil(1000));
    let whereto = match (moved_ms, seconds) {
        (Some(0), _) => "begins anew at".to_owned(),
        (Some(moved_ms), Some(seconds)) if moved_ms < 0 => format!("goes back {seconds} s, to"),
        (Some(_), Some(seconds)) => format!("goes forward {seconds} s, to"),
        _ => "goes to".to_owned(),
    };
    // Never out of range: points have times of the clock. If one had not, the sentence without it is still true.
    let time = Timestamp::from_millisecond(chosen.taken_at_ms)
        .map_or_else(|_| "-".to_owned(), |time| time.to_string());
    JobError::new(
        DISCARDED,
        format!(
            "'{}' {whereto} the recovery point of {time} ({}); all that it wrote at the recovery site since its failover is \
             discarded",
            item.vm_name, chosen.point
        ),
        "Until the commit any other recovery point can be chosen the same way.",
    )
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
            let loss_seconds = (failed_over_ms - chosen.taken_at_ms).max(0).div_euclid(1000) + 1;
            item.failover = Some(FailoverRecord {
                loss_seconds,
                loss_bytes: loss_bytes(item, loss_seconds),
                requested_ms,
                started_ms: Some(now_ms),
            });
        }))
    }
}

//! Commit: of a failover (the recovery points go) and of a failback (the recovery VM goes).

use async_trait::async_trait;
use mainstay_model::Location;
use mainstay_provider::{PowerState, ReadPower, Unprotect};

use super::power::remove;
use crate::{
    ControlError,
    db::{ItemRecord, JobError, StandDownRecord},
    jobs::{Done, Patience, Step, StepAction, StepContext},
};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "CommitPreflightChecksTask",
            "VmCommitPrerequisitesCheck",
            "Prerequisite check",
            CheckPrerequisites,
        ),
        Step::new("CommitTask", "VmCommit", "Commit", Commit).point_of_no_return(),
    ]
}

struct CheckPrerequisites;

#[async_trait]
impl StepAction for CheckPrerequisites {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let Some(vm) = item.active_vm() else {
            return Err(JobError::new("NoRecoveryVm", "the item has no recovery VM", "Please report this."));
        };
        // What is committed must exist: afterwards there is nothing else. Whether it runs is the administrator's affair.
        let power = step.call(item.active_provider(), ReadPower { vm }, Patience::RESTART).await?;
        let done = Done::default();
        if power == PowerState::Running {
            return Ok(done);
        }
        Ok(done.warning(JobError::new(
            "VmNotRunning",
            format!("'{}' is {power:?}", item.vm_name),
            "Start it when it is wanted.",
        )))
    }
}

struct Commit;

#[async_trait]
impl StepAction for Commit {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        match item.state.phase.active_location() {
            Location::Recovery => commit_failover(step, &item).await,
            Location::Primary => commit_failback(step, &item).await,
        }
    }
}

/// All recovery points leave the catalogue. The one that runs stays in the store, unseen: the recovery VM may still
/// read it, and what changes from now on is told from it.
async fn commit_failover(step: &StepContext<'_>, item: &ItemRecord) -> Result<Done, JobError> {
    let Some(copy) = item.recovery_vm else { return Ok(Done::skipped()) };
    let store = &step.control.store;
    store.set_head(item.id.0, copy.point.0, item.state.generation.0).await.map_err(ControlError::from)?;
    let points = store.points(item.id.0).await.map_err(ControlError::from)?;
    let gone: Vec<_> = points.iter().map(|point| point.id).collect();
    store.delete_points(item.id.0, &gone).await.map_err(ControlError::from)?;
    Ok(Done::with(&gone.len())?.changing(|item| {
        item.replication.last_point = None;
        item.replication.last_point_ms = None;
        item.replication.last_app_point_ms = None;
    }))
}

/// The recovery VM and its disks go; the home VM equals the store's newest point plus what it wrote since its start.
async fn commit_failback(step: &StepContext<'_>, item: &ItemRecord) -> Result<Done, JobError> {
    if let Some(copy) = item.recovery_vm {
        remove(step, item, copy.vm, Patience::OUTAGE).await?;
    }
    let unprotect = Unprotect { item: item.id, generation: item.state.generation, is_active: false };
    step.call(item.recovery_provider, unprotect, Patience::OUTAGE).await?;
    for holder in item.recovery_vm.map(|copy| copy.vm).into_iter().chain([item.vm]) {
        step.control.release_point(item.id, holder).await?;
    }
    Ok(Done::default().changing(|item| {
        item.recovery_vm = None;
        item.failover = None;
        item.withdraw_stand_down(item.primary_provider);
        item.given_up.retain(|host| *host != item.primary_provider);
        // A home that was given up learns it when it can be reached, and not before: it may be lost for good.
        if let Some(provider) = item.former_home.take() {
            let (vm, generation) = (item.vm, item.state.generation);
            item.given_up.retain(|host| *host != provider);
            item.given_up.push(provider);
            item.order_stand_down(StandDownRecord {
                provider,
                vm,
                generation,
                is_final: true,
                was_found_running: false,
            });
        }
    }))
}

//! Disable replication: the VM that is active stays as it is; everything of ours goes.

use async_trait::async_trait;
use mainstay_model::Location;
use mainstay_provider::{Hydrate, SiteError, Unprotect, WhenOff};
use serde::{Deserialize, Serialize};

use super::power::remove;
use crate::{
    db::JobError,
    jobs::{Done, Patience, Step, StepAction, StepContext, Undone},
};

/// How thorough to be.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct DisableParams {
    /// Do not wait for sites that are away; what is left there must be removed by hand.
    pub(crate) force: bool,
}

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "DisableProtectionPreflightChecksTask",
            "DisableProtectionPrerequisitesCheck",
            "Prerequisites check for disabling protection",
            LetGo,
        ),
        Step::new("DisableProtectionTask", "DisableProtection", "Disable replication", RemoveTraces)
            .point_of_no_return(),
        Step::new("CleanupStorageTask", "VmCleanupStorage", "Remove the recovery points", RemoveReplica),
    ]
}

/// A recovery VM that is active must have all its bytes before the store loses them.
struct LetGo;

#[async_trait]
impl StepAction for LetGo {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        if item.state.phase.active_location() == Location::Primary {
            return Ok(Done::skipped());
        }
        let Some(copy) = item.recovery_vm else { return Ok(Done::skipped()) };
        loop {
            let hydrate = Hydrate {
                item: item.id,
                generation: item.state.generation,
                vm: copy.vm,
                when_off: WhenOff::Hold,
            };
            let hydration = step.call(item.recovery_provider, hydrate, Patience::RESTART).await?;
            if hydration.is_complete {
                return Ok(Done::default().changing(|item| {
                    if let Some(copy) = &mut item.recovery_vm {
                        copy.is_hydrated = true;
                    }
                }));
            }
            mainstay_provider::ProgressSink::report(
                step,
                mainstay_provider::Progress {
                    phase: "Copying the recovery VM's disks out of the store".to_owned(),
                    bytes_done: hydration.bytes_done,
                    bytes_total: hydration.bytes_total,
                    ..mainstay_provider::Progress::default()
                },
            );
            tokio::time::sleep(HYDRATION_POLL).await;
        }
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        if let Some(copy) = item.recovery_vm.filter(|copy| !copy.is_hydrated) {
            let release = Hydrate {
                item: item.id,
                generation: item.state.generation,
                vm: copy.vm,
                when_off: WhenOff::Release,
            };
            step.call(item.recovery_provider, release, Patience::OUTAGE).await?;
        }
        Ok(Undone::default())
    }
}

/// How often an unfinished hydration is looked at.
const HYDRATION_POLL: std::time::Duration = std::time::Duration::from_millis(500);

struct RemoveTraces;

#[async_trait]
impl StepAction for RemoveTraces {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let DisableParams { force } = step.params()?;
        step.control.cycles.stop(item.id).await;
        let patience = if force { Patience::NONE } else { Patience::OUTAGE };
        let mut done = Done::default();
        let mut forgive = |result: Result<(), SiteError>| match result {
            Err(error) if force => {
                let warning =
                    JobError::new("LeftBehind", error.message, "Remove what is left at that site by hand.");
                done.warnings.push(warning.as_warning());
                Ok(())
            }
            result => result,
        };
        let active = item.state.phase.active_location();
        let generation = item.state.generation;
        let unprotect = |location| Unprotect { item: item.id, generation, is_active: active == location };
        forgive(step.call(item.primary_provider, unprotect(Location::Primary), patience).await)?;
        if let Some(former) = item.former_home {
            let unprotect = Unprotect { item: item.id, generation, is_active: false };
            forgive(step.call(former, unprotect, patience).await)?;
        }
        let obsolete = match active {
            // The stopped remains of a failback that was never committed.
            Location::Primary => item.recovery_vm,
            Location::Recovery => None,
        };
        for copy in item.test_vm.into_iter().chain(obsolete) {
            forgive(remove(step, &item, copy.vm, patience).await)?;
        }
        forgive(step.call(item.recovery_provider, unprotect(Location::Recovery), patience).await)?;
        if active == Location::Recovery {
            let warning = JobError::new(
                "OldCopyRemains",
                format!(
                    "the old copy of '{}' stays at home, off, and is not started with its host",
                    item.vm_name
                ),
                "Remove it when it is not needed; do not start it beside the one that runs at the recovery site.",
            );
            done.warnings.push(warning.as_warning());
        }
        Ok(done)
    }
}

struct RemoveReplica;

#[async_trait]
impl StepAction for RemoveReplica {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        step.control.delete_replica(step.item_id()).await?;
        Ok(Done::default())
    }
}

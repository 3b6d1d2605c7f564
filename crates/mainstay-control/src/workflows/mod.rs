//! The steps of every job, one file per operation. Task names are Site Recovery's, from recorded jobs; where the
//! record is silent the name is ours and says what the step does.

mod change_point;
mod commit;
mod disable;
mod enable;
mod failback;
mod failover;
mod points;
mod power;
mod recovery_plan;
mod resynchronize;
mod reverse;
mod script;
mod test_failover;
mod update;

use std::time::Duration;

use mainstay_model::{Ending, ItemId, JobId, Operation, Phase, RecoveryPlan, SessionId};
use mainstay_provider::{ErrorKind, Replicate, Replicated, SiteError};
use mainstay_store::StoreError;
use uuid::Uuid;

use crate::{
    ControlError,
    db::ItemRecord,
    jobs::{Patience, Retry, Step, StepContext},
    reconcilers::note_replicated,
};

pub(crate) use disable::DisableParams;
pub use failback::{FailbackParams, SHUTDOWN_TIMEOUT};
pub use failover::FailoverParams;
pub(crate) use points::point_time_ms;
pub use points::{PointChoice, pick_point};
pub(crate) use recovery_plan::Standing;
pub use recovery_plan::child_job;
pub(crate) use script::check_script;
pub use test_failover::TestFailoverParams;
pub use update::UpdateParams;

/// The steps of an operation's workflow: of an item, or of a plan.
pub(crate) fn steps(operation: Operation, plan: Option<&RecoveryPlan>) -> Vec<Step> {
    if let Some(plan) = plan {
        return recovery_plan::steps(plan, operation);
    }
    match operation {
        Operation::EnableProtection => enable::steps(),
        Operation::FinalizeProtection => enable::finalize_steps(),
        Operation::TestFailover => test_failover::steps(),
        Operation::TestFailoverCleanup => test_failover::cleanup_steps(),
        Operation::UnplannedFailover => failover::unplanned_steps(),
        Operation::PlannedFailover => failover::planned_steps(),
        Operation::ChangeRecoveryPoint => change_point::steps(),
        Operation::Commit => commit::steps(),
        Operation::Failback => failback::steps(),
        Operation::ReverseReplicate => reverse::steps(),
        Operation::Resynchronize => resynchronize::steps(),
        Operation::UpdateProperties => update::steps(),
        Operation::DisableProtection => disable::steps(),
    }
}

/// What an operation's end leaves in the item beyond its state.
pub(crate) fn note_ending(item: &mut ItemRecord, operation: Operation, ending: Ending, now_ms: i64) {
    if ending != Ending::Succeeded {
        return;
    }
    match operation {
        Operation::UnplannedFailover | Operation::PlannedFailover | Operation::Failback => {
            item.last_failover_ms = Some(now_ms);
        }
        Operation::TestFailoverCleanup => item.last_test_failover_ms = Some(now_ms),
        _ => {}
    }
}

/// Ships what changed at the side that is active now as a new point on top of the store's head, within a job.
async fn replicate(
    step: &StepContext<'_>,
    item: &ItemRecord,
    patience: Patience,
    silence_max: Duration,
    compare_all: bool,
) -> Result<Replicated, SiteError> {
    let provider = item.active_provider();
    let mut retry = Retry::new(patience);
    loop {
        // A transfer whose answer was lost may have become a point: each try is a session of its own, on top of the
        // head of its moment.
        // Read anew: a scrub may have found something since the job began.
        let scrub = step.control.item(item.id).await.map_err(|error| transfer_error(&error))?.scrub;
        let parent = step.control.parent_of_next(item).await.map_err(|error| transfer_error(&error))?;
        let operation = Replicate {
            item: item.id,
            generation: item.state.generation,
            session: SessionId(Uuid::now_v7()),
            parent,
            resend: scrub.resend.clone(),
            application_consistent: false,
            compare_all,
            bytes_per_second_max: None,
        };
        match step.call_once(provider, operation, silence_max).await {
            Err(error) if retry.pause(&error).await => {}
            Err(error) => return Err(error),
            Ok(replicated) => {
                let noted = step.control.change_item(item.id, |item| {
                    note_replicated(item, &scrub, &replicated);
                    Ok(())
                });
                noted.await.map_err(|error| transfer_error(&error))?;
                return Ok(replicated);
            }
        }
    }
}

/// What the store's or the database's trouble means to a transfer that cannot begin: it passes, or somebody must do something.
pub(crate) fn transfer_error(error: &ControlError) -> SiteError {
    let (kind, remedy) = match error {
        ControlError::Store(StoreError::Damaged { .. }) => (
            ErrorKind::Failed,
            "Restore the object from a backup of the store, or disable replication and enable it again.",
        ),
        ControlError::Store(StoreError::NoAccess { .. }) => {
            (ErrorKind::Failed, "Let the server write to its store again; nothing else need be done.")
        }
        ControlError::Store(StoreError::Full) => (ErrorKind::NoSpace, "Make room at the recovery site."),
        _ => (ErrorKind::Busy, ""),
    };
    SiteError::new(kind, error.to_string()).with_remedy(remedy)
}

/// A VM identifier that belongs to a job: asking again gives the same, so that a step that creates the VM can be
/// repeated, and undone, without having been written down.
fn vm_of_job(item: ItemId, job: JobId) -> mainstay_model::VmId {
    let mixed = (item.0.as_u128() ^ job.0.as_u128().rotate_left(64)).to_be_bytes();
    mainstay_model::VmId(uuid::Builder::from_random_bytes(mixed).into_uuid())
}

/// Whether the item's recovery points can be chosen in this phase; in the others what is left in the store is only what the
/// next delta builds on.
pub(crate) fn shows_points(phase: Phase) -> bool {
    phase.is_replicating()
        || matches!(phase, Phase::UnplannedFailoverCommitPending | Phase::PlannedFailoverCommitPending)
}

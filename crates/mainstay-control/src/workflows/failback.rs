//! Failback: a planned failover from the recovery site home, with the changes only.
//!
//! Changes made at the recovery site become points on top of the one that was failed over to; home fetches the
//! difference into a staging area over its old disks. Until the staging area is merged the old disks are as they
//! were, and after it they equal the recovery VM's last state: cancelling is harmless at every step.

use std::time::Duration;

use async_trait::async_trait;
use mainstay_model::{Generation, Health, ItemId, PointId, ProviderId, VmId};
use mainstay_provider::{
    CommitHome, DiscardHome, ErrorKind, HomePrepared, PowerState, PrepareHome, ReadPower, ShutDownVm,
    ShutdownOutcome, StageHome, Staged, VerifyHome, VmDefinition,
};
use serde::{Deserialize, Serialize};

use super::{
    power::{power_off, start, start_again},
    replicate,
};
use crate::{
    ControlError,
    db::{ItemRecord, JobError, VmCopy},
    jobs::{Done, ItemChange, Patience, SILENCE_MAX, Step, StepAction, StepContext, Undone},
};

/// What a failback is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailbackParams {
    /// Synchronise while the VM runs and then wait for a person (`ForDownTime`); else fetch everything while it is
    /// stopped (`ForSynchronization`).
    pub synchronize_before: bool,
    /// Make the home VM if it does not exist.
    pub create_vm: bool,
    /// Another host of the protected site to return to.
    pub host: Option<ProviderId>,
    /// How long the guest may take to stop, in milliseconds.
    pub shutdown_timeout_ms: u64,
}

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "PrepareVmOnPremForFailbackTask",
            PREPARE,
            "Preparing the on-premises virtual machine",
            PrepareHomeVm,
        ),
        Step::new("DataSyncTask", SYNCHRONIZE, "Data synchronization", Synchronize),
        Step::new(
            "WaitForUserInputForFailbackTask",
            "WaitForUserInputForFailback",
            "Waiting for user input",
            WaitForCompletion,
        ),
        Step::new(
            "ShutdownVmOnSecondary",
            "VmShutdownVmOnSecondary",
            "Shut down the virtual machine",
            ShutDownRecoveryVm,
        ),
        Step::new("FailbackTask", FAILBACK, "Start failover", BringHome),
        Step::new(
            "StartVmOnPrimary",
            "VmFoStartVmOnPrimary",
            "Start the on-premises virtual machine",
            StartHomeVm,
        ),
    ]
}

const PREPARE: &str = "PrepareVmOnPremForFailback";
const SYNCHRONIZE: &str = "VmDataSync";
const FAILBACK: &str = "VmFailback";

/// Rounds of synchronisation while the VM runs: each ships what changed during the one before, so that the last delta,
/// which costs downtime, is short. More rounds do not shorten it when the VM writes as fast as the link carries.
const SYNCHRONIZE_ROUNDS_MAX: usize = 4;
/// A delta below which another round is not worth it: a second or so on a slow link.
const SYNCHRONIZE_ENOUGH_BYTES: u64 = 8 << 20;

fn recovery_vm(item: &ItemRecord) -> Result<VmCopy, JobError> {
    item.recovery_vm.ok_or_else(|| {
        JobError::new("NoRecoveryVm", "the item has no recovery VM to fail back from", "Please report this.")
    })
}

struct PrepareHomeVm;

#[derive(Serialize, Deserialize)]
struct Prepared {
    home: HomePrepared,
    /// The item's home before this failback.
    former: ProviderId,
    /// The item's generation before this failback; `None` in jobs of earlier versions. A database that was lost in the middle
    /// of it comes back with the generation that the job had reached.
    #[serde(default)]
    generation: Option<Generation>,
}

/// What a home VM is made of. The point that was failed over to has the definition that was written at home; it is
/// held from now on, because synchronising replaces it as the head. Without it, the newest state must do.
async fn home_contents(
    step: &StepContext<'_>,
    item: &ItemRecord,
    copy: VmCopy,
) -> Result<(VmDefinition, Vec<(String, u64)>), JobError> {
    let control = step.control;
    if control.has_point(item.id, copy.point).await? {
        control.hold_point(item.id, copy.point, copy.vm).await?;
        return control.point_contents(item.id, copy.point).await;
    }
    let head = control.head(item.id).await?.unwrap_or(copy.point);
    control.point_contents(item.id, head).await
}

#[async_trait]
impl StepAction for PrepareHomeVm {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailbackParams = step.params()?;
        let copy = recovery_vm(&item)?;
        let home = params.host.unwrap_or(item.primary_provider);
        let (definition, disks) = home_contents(step, &item, copy).await?;
        let prepare = PrepareHome {
            item: item.id,
            vm: item.vm,
            generation: item.state.generation,
            disks,
            create_from: params.create_vm.then_some(definition),
        };
        let prepared = step.call(home, prepare, Patience::RESTART).await.map_err(|error| {
            let hint = "Use --create-vm to make it anew, or --host to return to another host.";
            match error.kind {
                ErrorKind::NotFound if !params.create_vm => {
                    JobError::new("HomeVmNotFound", error.message, hint)
                }
                _ => error.into(),
            }
        })?;
        let (former, is_start_prevented) = (item.primary_provider, prepared.is_start_prevented);
        let generation = Some(item.state.generation);
        let done = Done::with(&Prepared { home: prepared, former, generation })?;
        let done = if is_start_prevented {
            done
        } else {
            done.warning(JobError::new(
                "StartNotPrevented",
                "this host cannot prevent that somebody starts the home VM meanwhile; it would be noticed",
                "Do not start the home VM until the failback is complete.",
            ))
        };
        Ok(done.changing(move |item| {
            item.primary_provider = home;
            if home != former {
                item.former_home = Some(former);
            }
        }))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let params: FailbackParams = step.params()?;
        // The host that this job prepared, whether or not the item already says so.
        let home = params.host.unwrap_or(item.primary_provider);
        step.call(
            home,
            DiscardHome { item: item.id, generation: item.state.generation, vm: item.vm },
            Patience::OUTAGE,
        )
        .await?;
        step.control.release_point(item.id, head_holder(&item)).await?;
        let prepared: Option<Prepared> = step.output(PREPARE)?;
        Ok(Undone {
            change: prepared.map(|prepared| -> ItemChange {
                Box::new(move |item| {
                    item.primary_provider = prepared.former;
                    item.former_home = None;
                })
            }),
            ..Undone::default()
        })
    }
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Moved {
    /// Bytes of blocks that differed.
    bytes_changed: u64,
    /// Bytes that went home over the data connection.
    bytes_moved: u64,
    /// Bytes that went from the recovery VM into the store.
    bytes_captured: u64,
    /// The point that home equals.
    point: Option<PointId>,
}

impl Moved {
    fn add(&mut self, staged: &Staged) {
        self.bytes_changed += staged.bytes_changed;
        self.bytes_moved += staged.bytes_moved;
    }
}

/// Holds the head while a synchronisation builds on it: the item's own name, because no VM stands for it.
fn head_holder(item: &ItemRecord) -> VmId {
    VmId(item.id.0)
}

/// Captures the recovery VM and stages the result at home; answers the point that home now equals.
///
/// Home can be told only the difference from a point that the store still has. The home VM's pin holds the point
/// that home is known to equal. If this was interrupted before, home may equal the present head instead: that is held
/// too before a new head replaces it.
async fn synchronize_once(
    step: &StepContext<'_>,
    item: &ItemRecord,
    full: bool,
    moved: &mut Moved,
) -> Result<(PointId, u64), JobError> {
    let control = step.control;
    if let Some(head) = control.head(item.id).await? {
        control.hold_point(item.id, head, head_holder(item)).await?;
    }
    let replicated = replicate(step, item, Patience::OUTAGE, SILENCE_MAX, false).await?;
    moved.bytes_captured += replicated.bytes_moved;
    let (_, disks) = control.point_contents(item.id, replicated.point).await?;
    // Nothing to fail over to: it leaves the catalogue at once, with those whose answer was lost, and stays as the head
    // that the next delta builds on.
    let points = control.store.points(item.id.0).await.map_err(ControlError::from)?;
    let points: Vec<_> = points.iter().map(|point| point.id).collect();
    control.store.delete_points(item.id.0, &points).await.map_err(ControlError::from)?;
    let stage = StageHome {
        item: item.id,
        generation: item.state.generation,
        vm: item.vm,
        to: replicated.point,
        disks,
        full,
    };
    let staged = step.call(item.primary_provider, stage, Patience::OUTAGE).await?;
    moved.add(&staged);
    moved.point = Some(replicated.point);
    control.hold_point(item.id, replicated.point, item.vm).await?;
    control.release_point(item.id, head_holder(item)).await?;
    Ok((replicated.point, staged.bytes_changed))
}

struct Synchronize;

#[async_trait]
impl StepAction for Synchronize {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let params: FailbackParams = step.params()?;
        if !params.synchronize_before {
            return Ok(Done::skipped());
        }
        let item = step.item().await?;
        let mut moved = Moved::default();
        for _ in 0..SYNCHRONIZE_ROUNDS_MAX {
            let (_, bytes) = synchronize_once(step, &item, false, &mut moved).await?;
            if bytes <= SYNCHRONIZE_ENOUGH_BYTES {
                break;
            }
        }
        Done::with(&moved)
    }
}

struct WaitForCompletion;

#[async_trait]
impl StepAction for WaitForCompletion {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let params: FailbackParams = step.params()?;
        Ok(if params.synchronize_before { Done::waiting() } else { Done::skipped() })
    }
}

struct ShutDownRecoveryVm;

#[async_trait]
impl StepAction for ShutDownRecoveryVm {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailbackParams = step.params()?;
        let copy = recovery_vm(&item)?;
        if step.call(item.recovery_provider, ReadPower { vm: copy.vm }, Patience::RESTART).await?
            == PowerState::Off
        {
            return Ok(Done::default());
        }
        step.check_store().await?;
        let shutdown = ShutDownVm {
            item: item.id,
            generation: item.state.generation,
            vm: copy.vm,
            timeout_ms: params.shutdown_timeout_ms,
        };
        match step.call(item.recovery_provider, shutdown, Patience::RESTART).await? {
            ShutdownOutcome::Off => Ok(Done::default()),
            ShutdownOutcome::Refused => Err(JobError::new(
                "ShutdownRefused",
                format!(
                    "'{}' did not shut down within {} s",
                    item.vm_name,
                    params.shutdown_timeout_ms / 1000
                ),
                "Shut it down from within the guest, then start the failback again.",
            )),
        }
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let copy = recovery_vm(&item)?;
        start_again(step, &item, item.recovery_provider, copy.vm).await?;
        Ok(Undone::default())
    }
}

#[derive(Serialize, Deserialize)]
struct BroughtHome {
    point: PointId,
    moved: Moved,
    bytes_compared: u64,
}

/// A run of this step that was interrupted after it had shut the recovery side out has proved home equal to the head,
/// which nobody can replace any more.
async fn point_of_interrupted_run(
    step: &StepContext<'_>,
    item: ItemId,
    generation_before: Generation,
) -> Result<Option<PointId>, JobError> {
    let replica = step.control.store.replica(item.0).await.map_err(ControlError::from)?;
    Ok(replica.head.filter(|_| replica.generation > generation_before.0).map(PointId))
}

struct BringHome;

#[async_trait]
impl StepAction for BringHome {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailbackParams = step.params()?;
        let Prepared { home: prepared, generation: before, .. } = step.expect_output(PREPARE)?;
        let before = before.unwrap_or(item.state.generation);
        let mut moved = Moved::default();
        let full = !params.synchronize_before || prepared.was_created;
        let generation = item.state.generation.next();
        let point = match point_of_interrupted_run(step, item.id, before).await? {
            Some(point) => point,
            None => synchronize_once(step, &item, full, &mut moved).await?.0,
        };
        let verify = VerifyHome { item: item.id, generation, vm: item.vm, to: point };
        let verified = step.call(item.primary_provider, verify, Patience::OUTAGE).await?;
        if verified.bytes_different > 0 {
            return Err(JobError::new(
                "HomeDiffers",
                format!(
                    "{} of {} bytes at home differ from the recovery VM's last state",
                    verified.bytes_different, verified.bytes_compared
                ),
                "The failback was undone and the VM runs at the recovery site. Check the home host's storage, then try again.",
            ));
        }
        // The recovery side writes no more: what home is about to become is final.
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        let (definition, _) = step.control.point_contents(item.id, point).await?;
        let commit = CommitHome { item: item.id, vm: item.vm, generation, to: point, definition };
        step.call(item.primary_provider, commit, Patience::OUTAGE).await?;
        let output = BroughtHome { point, moved, bytes_compared: verified.bytes_compared };
        Ok(Done::with(&output)?.fencing())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        // Home may be merged or not; both are whole states that the next failback starts from. The recovery side
        // writes again, in a generation of its own.
        let generation = item.state.generation.next();
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        Ok(Undone { fences: true, ..Undone::default() })
    }
}

struct StartHomeVm;

#[async_trait]
impl StepAction for StartHomeVm {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        start(step, &item, item.primary_provider, item.vm, Patience::OUTAGE).await?;
        let event = step.control.item_event(
            &item,
            "FailbackComplete",
            Health::Normal,
            format!("'{}' runs at home again; commit when it has been checked", item.vm_name),
        );
        step.control.record_event(event).await.map_err(ControlError::from)?;
        Ok(Done::default())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        power_off(step, &item, item.primary_provider, item.vm, Patience::OUTAGE).await?;
        Ok(Undone::default())
    }
}

/// How long a guest may take to stop when the request does not say: as long as a busy database needs.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(120);

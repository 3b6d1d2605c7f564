//! Failover (unplanned) and planned failover to the recovery site.
//!
//! Both end with the VM running from a recovery point and the old side fenced. They differ in what they demand
//! of the source: a planned failover loses nothing or does not happen; an unplanned one happens.

use std::time::Duration;

use async_trait::async_trait;
use mainstay_model::{Generation, Health, PointId};
use mainstay_provider::{
    ApplyAddresses, CreateRecoveryVm, Discover, Discovery, ErrorKind, HostFacts, PowerState, ReadPower,
    RemoveRecoveryVm, ShutDownVm, ShutdownOutcome,
};
use serde::{Deserialize, Serialize};

use super::{
    points::{PointChoice, point_time_ms},
    power::{start, start_again},
    replicate, vm_of_job,
};
use crate::{
    ControlError,
    db::{FailoverRecord, ItemRecord, JobError, StandDownRecord, VmCopy},
    jobs::{Done, Patience, SILENCE_MAX, Step, StepAction, StepContext, Undone},
    sites::answer_within,
};

/// What a failover is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailoverParams {
    /// The recovery point.
    pub point: PointChoice,
    /// Stop the source first (always so in a planned failover).
    pub shutdown_source: bool,
    /// How long the guest may take to stop, in milliseconds.
    pub shutdown_timeout_ms: u64,
}

pub(super) fn unplanned_steps() -> Vec<Step> {
    vec![
        Step::new(
            "UnplannedFailoverPreflightChecksTask",
            "VmUfoPrerequisitesCheck",
            "Prerequisites check for failover",
            CheckPrerequisites { is_planned: false },
        ),
        Step::new(
            "ShutdownVmOnPrimaryForUFO",
            SHUTDOWN,
            "Shut down the virtual machine",
            ShutDownSource { is_planned: false },
        ),
        Step::new(
            "PrepareForUnPlannedFailoverTask",
            "VmPrepareForUnPlannedFailover",
            "Synchronizing the latest changes",
            SynchronizeLatest { is_planned: false },
        ),
        Step::new("FailoverTask", FAILOVER, "Start failover", FailOver),
        Step::new(
            "StartVmOnSecondary",
            "VmFoStartVmOnSecondary",
            "Start the replica virtual machine",
            StartRecoveryVm,
        ),
    ]
}

pub(super) fn planned_steps() -> Vec<Step> {
    vec![
        Step::new(
            "PlannedFailoverPreflightChecksTask",
            "VmPfoPrerequisitesCheck",
            "Prerequisites check for planned failover",
            CheckPrerequisites { is_planned: true },
        ),
        Step::new(
            "ShutdownVmOnPrimary",
            SHUTDOWN,
            "Shut down the virtual machine",
            ShutDownSource { is_planned: true },
        ),
        Step::new(
            "PrepareForFailoverTask",
            "VmPrepareForFailover",
            "Preparing for failover",
            SynchronizeLatest { is_planned: true },
        ),
        Step::new("FailoverTask", FAILOVER, "Start failover", FailOver),
        Step::new(
            "StartVmOnSecondary",
            "VmFoStartVmOnSecondary",
            "Start the replica virtual machine",
            StartRecoveryVm,
        ),
    ]
}

const SHUTDOWN: &str = "VmShutdownVmOnPrimary";
const FAILOVER: &str = "VmFailover";

struct CheckPrerequisites {
    is_planned: bool,
}

#[async_trait]
impl StepAction for CheckPrerequisites {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        step.check_store().await?;
        // Says early that the chosen point does not exist; the choice itself is made after the last delta.
        step.control.choose_point(&item, params.point).await?;
        if self.is_planned {
            let read = ReadPower { vm: item.vm };
            step.call(item.primary_provider, read, Patience::RECONNECT).await.map_err(|error| {
                JobError::new(
                    "SiteUnavailable",
                    format!("the protected site of '{}' does not answer: {error}", item.vm_name),
                    "A planned failover needs both sites. If the site is lost, use the (unplanned) failover.",
                )
            })?;
        }
        check_target(step, &item).await?;
        let patience = patience_with_source(step);
        let read = step.call(item.primary_provider, ReadPower { vm: item.vm }, patience);
        let was_running = match tokio::time::timeout(POWER_ANSWER_MAX + patience.0, read).await {
            Ok(Ok(power)) => Some(power != PowerState::Off),
            Ok(Err(_)) | Err(_) => None,
        };
        Done::with(&Checked { was_running })
    }
}

/// An unplanned failover does not wait for a site that may be burning; only when the server itself has been away, the
/// site's agent is given the time to come back.
fn patience_with_source(step: &StepContext<'_>) -> Patience {
    if step.is_resumed() { Patience::RECONNECT } else { Patience::NONE }
}

/// What a living agent needs to tell whether a VM runs is a few milliseconds; a failover does not wait for a dead one.
const POWER_ANSWER_MAX: Duration = Duration::from_secs(2);

#[derive(Serialize, Deserialize)]
struct Checked {
    /// Whether the source ran when the job began; `None` = it could not be asked.
    was_running: Option<bool>,
}

/// Checks that name and addresses are free at the recovery site.
pub(super) async fn check_target(step: &StepContext<'_>, item: &ItemRecord) -> Result<(), JobError> {
    let target = step.call(item.recovery_provider, Discover {}, Patience::RESTART).await?;
    check_host(&target.host)?;
    check_generation(&target, item)?;
    let own = item.recovery_vm.map(|copy| copy.vm);
    let others = || {
        target
            .inventory
            .vms
            .iter()
            .filter(|vm| Some(vm.id) != own && vm.id != vm_of_job(item.id, step.job.id))
    };
    if let Some(other) = others().find(|vm| vm.name == item.target.name) {
        return Err(JobError::new(
            "NameInUse",
            format!("the recovery site has a VM '{}' already ({})", item.target.name, other.id),
            "Change the target name in the item's compute settings, or rename that VM.",
        ));
    }
    for nic in step.control.planned_nics(item).await? {
        if let Some(network) = &nic.network
            && !target.inventory.networks.iter().any(|known| known.name == *network)
        {
            return Err(JobError::new(
                "NetworkNotFound",
                format!("the recovery site has no network '{network}' for adapter {}", nic.mac),
                "Change the network in the item's network settings.",
            ));
        }
        let Some(address) = &nic.address else { continue };
        let bare = address.split('/').next().unwrap_or(address);
        let holder = others().find(|vm| {
            vm.power == PowerState::Running
                && vm
                    .nics
                    .iter()
                    .flat_map(|nic| &nic.addresses)
                    .any(|used| used.split('/').next() == Some(bare))
        });
        if let Some(other) = holder {
            return Err(JobError::new(
                "AddressInUse",
                format!("address {bare} is taken by VM '{}' at the recovery site", other.name),
                "Change the address in the item's network settings, or free it.",
            ));
        }
    }
    Ok(())
}

/// Checks that a host has not heard of a failover that this server knows nothing of.
fn check_generation(host: &Discovery, item: &ItemRecord) -> Result<(), JobError> {
    let known = host.generations.iter().find(|(id, _)| *id == item.id).map(|(_, generation)| *generation);
    match known.filter(|known| *known > item.state.generation) {
        Some(known) => Err(JobError::new(
            "ServerSetBack",
            format!(
                "host '{}' knows of a later failover of '{}' than this server (generation {known}, here {})",
                host.host.name, item.vm_name, item.state.generation
            ),
            "The server and its store were set back to an earlier state. Nothing was changed; see docs/runbooks/lost-server.md.",
        )),
        None => Ok(()),
    }
}

/// Checks that recovery VMs can run on a host; one that does not say (an agent from before) is taken at its word later.
pub(super) fn check_host(host: &HostFacts) -> Result<(), JobError> {
    let instant = host.capabilities.iter().find(|capability| capability.name == "InstantRecovery");
    match instant {
        Some(instant) if !instant.is_available => Err(JobError::new(
            "InstantRecoveryUnavailable",
            format!("the recovery host '{}' cannot run recovery VMs: {}", host.name, instant.reason),
            "Put that right on the host; `mainstay agent doctor` there says whether it is.",
        )),
        _ => Ok(()),
    }
}

#[derive(Serialize, Deserialize)]
struct ShutDown {
    /// Whether it is known to be off.
    is_off: bool,
    /// Whether its host did not answer.
    #[serde(default)]
    is_silent: bool,
}

struct ShutDownSource {
    is_planned: bool,
}

#[async_trait]
impl StepAction for ShutDownSource {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        if !params.shutdown_source {
            return Ok(Done::skipped());
        }
        let patience = if self.is_planned { Patience::RESTART } else { patience_with_source(step) };
        let answer_max = AGENT_ANSWER_MAX + patience.0;
        let shutdown = async {
            let read = step.call(item.primary_provider, ReadPower { vm: item.vm }, patience);
            if answer_within(answer_max, "the question whether the VM runs", read).await? == PowerState::Off {
                return Ok(ShutdownOutcome::Off);
            }
            let shutdown = ShutDownVm {
                item: item.id,
                generation: item.state.generation,
                vm: item.vm,
                timeout_ms: params.shutdown_timeout_ms,
            };
            let shutdown = step.call(item.primary_provider, shutdown, patience);
            // The agent watches the guest's time-out; this one is for a host that does not answer.
            let limit = Duration::from_millis(params.shutdown_timeout_ms) + answer_max;
            answer_within(limit, "the shutdown", shutdown).await
        };
        let outcome = shutdown.await;
        let failed_by = |kind| outcome.as_ref().is_err_and(|error| error.kind == kind);
        let (is_silent, is_fenced) = (failed_by(ErrorKind::TimedOut), failed_by(ErrorKind::Fenced));
        let why = match outcome {
            Ok(ShutdownOutcome::Off) => return Done::with(&ShutDown { is_off: true, is_silent }),
            Ok(ShutdownOutcome::Refused) => JobError::new(
                "ShutdownRefused",
                format!(
                    "'{}' did not shut down within {} s",
                    item.vm_name,
                    params.shutdown_timeout_ms / 1000
                ),
                "Shut it down from within the guest, then try again.",
            ),
            Err(error) => error.into(),
        };
        // A host that knows a newer generation knows of a failover that this server does not: it was set back.
        if self.is_planned || is_fenced {
            return Err(why);
        }
        Ok(Done::with(&ShutDown { is_off: false, is_silent })?.warning(why))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        let checked: Option<Checked> = match step.output("VmUfoPrerequisitesCheck")? {
            Some(checked) => Some(checked),
            None => step.output("VmPfoPrerequisitesCheck")?,
        };
        // Only what ran is started again; a VM that was off by the administrator's will stays off.
        if params.shutdown_source && checked.and_then(|checked| checked.was_running) == Some(true) {
            start_again(step, &item, item.primary_provider, item.vm).await?;
        }
        Ok(Undone::default())
    }
}

/// What an agent may take to answer on top of the guest's own time.
const AGENT_ANSWER_MAX: Duration = Duration::from_secs(30);

struct SynchronizeLatest {
    is_planned: bool,
}

#[derive(Serialize, Deserialize)]
struct Synchronized {
    point: PointId,
    bytes_changed: u64,
    bytes_moved: u64,
}

#[async_trait]
impl StepAction for SynchronizeLatest {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        let is_wanted = params.shutdown_source && (self.is_planned || params.point == PointChoice::Latest);
        if !is_wanted {
            return Ok(Done::skipped());
        }
        if !self.is_planned && step.output::<ShutDown>(SHUTDOWN)?.is_some_and(|shutdown| shutdown.is_silent) {
            let warning = JobError::new(
                "SourceSilent",
                "the last changes were not asked for, because the host did not answer before",
                "What they may be is told below; change to another recovery point, or go on.",
            );
            return Ok(Done::skipped().warning(warning));
        }
        // The cycle that may be under way would hold the item's lock at the agent.
        step.control.cycles.stop(item.id).await;
        let patience = if self.is_planned { Patience::OUTAGE } else { patience_with_source(step) };
        // Nobody waits for a dying source to say what it has when the VM can run without.
        let silence_max = if self.is_planned { SILENCE_MAX } else { AGENT_ANSWER_MAX * 2 };
        match replicate(step, &item, patience, silence_max, false).await {
            Ok(replicated) => {
                let synchronized = Synchronized {
                    point: replicated.point,
                    bytes_changed: replicated.bytes_changed,
                    bytes_moved: replicated.bytes_moved,
                };
                Ok(Done::with(&synchronized)?.changing(move |item| {
                    item.replication.last_point = Some(replicated.point);
                    item.replication.last_point_ms = Some(replicated.taken_at_ms);
                    item.replication.bytes_changed += replicated.bytes_changed;
                    item.replication.bytes_moved += replicated.bytes_moved;
                }))
            }
            Err(error) if self.is_planned || error.kind == ErrorKind::Fenced => Err(error.into()),
            Err(error) => Ok(Done::skipped().warning(error.into())),
        }
    }
}

struct FailOver;

#[async_trait]
impl StepAction for FailOver {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: FailoverParams = step.params()?;
        step.control.cycles.stop(item.id).await;
        let generation = item.state.generation.next();
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        let point = step.control.choose_point(&item, params.point).await?;
        let point_id = PointId(point.id);
        // What home knows: the failback tells from it what is different there.
        if let Some(head) = step.control.head(item.id).await? {
            step.control.hold_point(item.id, head, item.vm).await?;
        }
        create_recovery_vm(step, &item, point_id, generation).await?;

        let is_off = step.output::<ShutDown>(SHUTDOWN)?.is_some_and(|shutdown| shutdown.is_off);
        let synchronized = step
            .output::<Synchronized>("VmPrepareForFailover")?
            .or(step.output("VmPrepareForUnPlannedFailover")?);
        let is_lossless = is_off && synchronized.is_some_and(|synchronized| synchronized.point == point_id);
        let now_ms = step.control.clock.now_ms();
        let loss_seconds = if is_lossless {
            0
        } else {
            (step.job.created_ms - point_time_ms(&point)).max(0).div_euclid(1000) + 1
        };
        let loss_bytes = if is_lossless { Some(0) } else { loss_bytes(&item, loss_seconds) };
        let record = FailoverRecord {
            loss_seconds,
            loss_bytes,
            requested_ms: step.job.created_ms,
            started_ms: Some(now_ms),
        };
        let mut done = Done::with(&record)?.fencing();
        if !is_lossless {
            let warning = loss_warning(&item, &record);
            let description = warning.message.clone();
            let event = step.control.item_event(&item, "DataMayBeLost", Health::Warning, description);
            step.control.record_event(event).await.map_err(ControlError::from)?;
            done = done.warning(warning);
        }
        let (vm, taken_at_ms) = (vm_of_job(item.id, step.job.id), point_time_ms(&point));
        Ok(done.changing(move |item| {
            item.recovery_vm = Some(VmCopy {
                vm,
                point: point_id,
                taken_at_ms,
                is_hydrated: false,
                bytes_done: 0,
                bytes_total: 0,
            });
            item.failover = Some(record);
            let (provider, vm) = (item.primary_provider, item.vm);
            item.order_stand_down(StandDownRecord {
                provider,
                vm,
                generation,
                is_final: false,
                was_found_running: false,
            });
        }))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let vm = vm_of_job(item.id, step.job.id);
        // The source writes again, in a generation of its own. It is that in which the VM was made, where that was not noted.
        let generation = item.state.generation.next();
        step.control.store.raise_generation(item.id.0, generation.0).await.map_err(ControlError::from)?;
        let remove = RemoveRecoveryVm { item: item.id, generation, vm };
        step.call(item.recovery_provider, remove, Patience::OUTAGE).await?;
        step.control.release_point(item.id, vm).await?;
        step.control.release_point(item.id, item.vm).await?;
        Ok(Undone {
            fences: true,
            change: Some(Box::new(|item| {
                item.recovery_vm = None;
                item.failover = None;
                item.withdraw_stand_down(item.primary_provider);
            })),
        })
    }
}

/// What may be lost, from the recent rate of change; `None` when there is no rate yet.
pub(super) fn loss_bytes(item: &ItemRecord, loss_seconds: i64) -> Option<u64> {
    let rate = item.replication.bytes_per_second;
    (rate > 0).then(|| rate.saturating_mul(loss_seconds.unsigned_abs()))
}

fn loss_warning(item: &ItemRecord, record: &FailoverRecord) -> JobError {
    let bytes = match record.loss_bytes {
        Some(bytes) => format!("about {bytes} bytes at the recent rate of change"),
        None => "an unknown number of bytes".to_owned(),
    };
    JobError::new(
        "DataMayBeLost",
        format!(
            "'{}' runs from a recovery point {} s older than the request: {bytes} may be lost",
            item.vm_name, record.loss_seconds
        ),
        "If the protected site is back, its disks still hold what was written last.",
    )
}

/// Makes the recovery VM of a job from a point.
pub(super) async fn create_recovery_vm(
    step: &StepContext<'_>,
    item: &ItemRecord,
    point: PointId,
    generation: Generation,
) -> Result<(), JobError> {
    let (definition, disks) = step.control.point_contents(item.id, point).await?;
    step.control.hold_point(item.id, point, vm_of_job(item.id, step.job.id)).await?;
    let create = CreateRecoveryVm {
        item: item.id,
        generation,
        vm: vm_of_job(item.id, step.job.id),
        point,
        name: item.target.name.clone(),
        is_test: false,
        definition,
        disks,
        vcpus: item.target.vcpus,
        memory_bytes: item.target.memory_bytes,
        nics: step.control.planned_nics(item).await?,
        autostart: item.autostart,
    };
    step.call(item.recovery_provider, create, Patience::OUTAGE).await?;
    Ok(())
}

pub(super) struct StartRecoveryVm;

#[async_trait]
impl StepAction for StartRecoveryVm {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let vm = vm_of_job(item.id, step.job.id);
        start(step, &item, item.recovery_provider, vm, Patience::OUTAGE).await?;
        let mut planned = step.control.planned_nics(&item).await?;
        planned.retain(|nic| nic.address.is_some());
        if planned.is_empty() {
            return Ok(Done::default());
        }
        // The VM runs; an address that cannot be set is told, it does not undo the failover.
        match step.call(item.recovery_provider, ApplyAddresses { vm, nics: planned }, Patience::RESTART).await
        {
            Ok(addresses) => Done::with(&addresses),
            Err(error) => Ok(Done::default().warning(error.into())),
        }
    }
}

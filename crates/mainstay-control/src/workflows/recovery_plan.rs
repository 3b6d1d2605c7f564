//! The jobs of recovery plans: what each task does. The machines' own work is in jobs of their own, whose identifiers follow
//! from the plan's job and the item, so that a task can be repeated and finds what it has begun.
//!
//! A planned failover stops at the first group that is not complete; an unplanned one goes on with what is left, and says at
//! its end what is missing. Cancelling a plan's job cancels its machines' jobs that are under way; machines that have failed over
//! stay so.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use mainstay_model::{
    Ending, ItemId, JobId, Location, Operation, Phase, RecoveryPlan, StepState, TestFailoverState,
    recovery_plan::{self, ActionKind, Direction, FailoverKind, Place, PlanAction, PlanTask, Side},
};
use mainstay_provider::{PowerState, Progress, ProgressSink as _, ReadPower, ShutDownVm, ShutdownOutcome};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{FailbackParams, FailoverParams, power::start_again, script};
use crate::{
    Control, ControlError,
    db::{ItemRecord, JobError, JobRecord, JobState},
    jobs::{Done, JobRequest, Patience, Step, StepAction, StepContext, Undone},
};

/// How often machines' jobs are looked at when nothing is heard of them.
const POLL: Duration = Duration::from_millis(500);
const CHECK: &str = "RpSrsPrerequisitesCheck";
/// The error that names machines whose part is not done; the last task looks for it.
const INCOMPLETE: &str = "MachinesMissing";

/// The job that carries out a plan's work on one of its machines.
pub fn child_job(plan_job: JobId, item: ItemId) -> JobId {
    let mixed = (plan_job.0.as_u128() ^ item.0.as_u128().rotate_left(32)).to_be_bytes();
    JobId(uuid::Builder::from_random_bytes(mixed).into_uuid())
}

/// How a machine stands to what a plan is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It can be done.
    Ready,
    /// It has been done; a plan that is carried out again passes it over.
    Done(&'static str),
    /// It cannot be done now, and why.
    Impossible(String),
}

impl Standing {
    pub(crate) fn of(item: &ItemRecord, operation: Operation) -> Self {
        let state = &item.state;
        if state.allowed_operations().contains(&operation) {
            return Self::Ready;
        }
        if let Some(running) = state.running {
            return Self::Impossible(format!("{:?} is under way (job {})", running.operation, running.job));
        }
        let location = state.phase.active_location();
        let is_committable = matches!(
            state.phase,
            Phase::UnplannedFailoverCommitPending
                | Phase::PlannedFailoverCommitPending
                | Phase::FailbackCommitPending
        );
        let is_testing = state.test_failover == TestFailoverState::WaitingForCleanup;
        match operation {
            Operation::TestFailover if is_testing => Self::Done("it has a test copy already"),
            Operation::TestFailoverCleanup if !is_testing => Self::Done("it has no test copy"),
            Operation::UnplannedFailover | Operation::PlannedFailover if location == Location::Recovery => {
                Self::Done("it runs at the recovery site already")
            }
            Operation::Failback if location == Location::Primary => Self::Done("it runs at home already"),
            Operation::Commit if !is_committable => Self::Done("it has nothing to commit"),
            Operation::ReverseReplicate if state.phase == Phase::Protected => {
                Self::Done("it is replicated already")
            }
            _ => Self::Impossible(format!("{operation:?} is not possible in state {:?}", state.phase)),
        }
    }
}

pub(super) fn steps(plan: &RecoveryPlan, operation: Operation) -> Vec<Step> {
    recovery_plan::tasks(plan, operation).into_iter().map(|task| step(plan, operation, task)).collect()
}

fn step(plan: &RecoveryPlan, operation: Operation, task: PlanTask) -> Step {
    let count = plan.items().count();
    match task {
        PlanTask::Check => Step::new(
            "RpSrsPrerequisitesCheckTask",
            CHECK,
            "Prerequisites check for the recovery plan",
            Check,
        ),
        PlanTask::ShutDownAll => Step::new(
            "ShutdownAllActionGroup",
            "ShutdownAllActionGroup",
            format!("All groups shutdown ({count})"),
            ShutDownAll,
        ),
        PlanTask::SynchronizeAll => Step::new(
            "DataSyncAllActionGroup",
            "DataSyncAllActionGroup",
            "Data synchronization",
            SynchronizeAll,
        ),
        PlanTask::WaitForUser => Step::new(
            "WaitForUserInputForFailback",
            "WaitForUserInputForFailback",
            "Waiting for user input",
            WaitForUser,
        ),
        PlanTask::Action(place, side, index) => {
            let name = action_step(place, side, index);
            let title =
                plan.action(place, side, index).map_or_else(String::new, |action| action.name.clone());
            Step::new(name.clone(), name, title, Act { place, side, index })
        }
        PlanTask::Group(index) => {
            let count = plan.groups.get(index).map_or(0, |group| group.items.len());
            let name = format!("Group{}", index + 1);
            let title = format!("Group {}: Start ({count})", index + 1);
            Step::new(name.clone(), name, title, Run { group: Some(index) })
        }
        PlanTask::All => Step::new(
            "AllMachines",
            "AllMachines",
            format!("{} ({count})", mainstay_model::projection::friendly_name(operation)),
            Run { group: None },
        ),
        PlanTask::Finish => {
            Step::new("EndRecoveryPlanTask", "EndRecoveryPlan", "Finalizing the recovery plan", Finish)
        }
    }
}

fn place_name(place: Place) -> String {
    match place {
        Place::Shutdown => "Shutdown".to_owned(),
        Place::Failover => "Failover".to_owned(),
        Place::Group(index) => format!("Group{}", index + 1),
    }
}

fn action_step(place: Place, side: Side, index: usize) -> String {
    format!("{}{side:?}Action{}", place_name(place), index + 1)
}

fn plan_of<'a>(step: &'a StepContext<'_>) -> Result<&'a RecoveryPlan, JobError> {
    step.job
        .plan
        .as_deref()
        .ok_or_else(|| JobError::new("InternalError", "the job has no plan", "Please report this."))
}

/// What the check found out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Checked {
    /// Machines that take part; whether each runs at home, where that is known and of interest.
    ready: BTreeMap<ItemId, Option<bool>>,
    /// Machines that do not, and why; an unplanned failover goes on without them.
    missing: Vec<String>,
}

struct Check;

#[async_trait]
impl StepAction for Check {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let operation = step.job.operation;
        let mut checked = Checked::default();
        let mut notes = Vec::new();
        for id in plan_of(step)?.items() {
            let Some(item) = step.control.db.item(id).await.map_err(ControlError::from)? else {
                notes.push(format!("machine {id} is no longer replicated"));
                continue;
            };
            match Standing::of(&item, operation) {
                Standing::Ready => {
                    let was_running = if operation == Operation::PlannedFailover {
                        let read = ReadPower { vm: item.vm };
                        let power = step.call(item.primary_provider, read, Patience::RECONNECT).await;
                        let power = power.map_err(|error| {
                            JobError::new(
                                "SiteUnavailable",
                                format!("the protected site of '{}' does not answer: {error}", item.vm_name),
                                "A planned failover needs both sites. If the site is lost, use the (unplanned) failover.",
                            )
                        })?;
                        Some(power != PowerState::Off)
                    } else {
                        None
                    };
                    checked.ready.insert(id, was_running);
                }
                Standing::Done(why) => notes.push(format!("'{}' is passed over: {why}", item.vm_name)),
                Standing::Impossible(why) => checked.missing.push(format!("'{}': {why}", item.vm_name)),
            }
        }
        let impossible = |what: String| {
            JobError::new(
                "MachinesNotReady",
                what,
                "Bring the machines into a state that allows it, or take them out of the plan.",
            )
        };
        if !checked.missing.is_empty() && operation != Operation::UnplannedFailover {
            return Err(impossible(format!(
                "not all machines can take part: {}",
                checked.missing.join("; ")
            )));
        }
        if checked.ready.is_empty() {
            let all: Vec<_> = checked.missing.iter().chain(&notes).cloned().collect();
            return Err(impossible(format!("no machine can take part: {}", all.join("; "))));
        }
        let mut done = Done::with(&checked)?;
        for text in notes {
            done = done.warning(JobError::new("MachinePassedOver", text, ""));
        }
        for text in checked.missing {
            done = done.warning(impossible(text));
        }
        Ok(done)
    }
}

/// Shuts all machines down at home, the last group first, so that who depends stops before what it depends on.
struct ShutDownAll;

#[async_trait]
impl StepAction for ShutDownAll {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let checked: Checked = step.expect_output(CHECK)?;
        let params: FailoverParams = step.params()?;
        for group in plan_of(step)?.groups.iter().rev() {
            let members = group.items.iter().filter(|item| checked.ready.get(*item) == Some(&Some(true)));
            let stopped =
                join_all(members.map(|item| shut_down(step, *item, params.shutdown_timeout_ms))).await;
            stopped.into_iter().collect::<Result<(), JobError>>()?;
        }
        Ok(Done::default())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let checked: Checked = step.expect_output(CHECK)?;
        for (id, was_running) in checked.ready {
            let Some(item) = step.control.db.item(id).await.map_err(ControlError::from)? else { continue };
            // What has failed over stays there; what was off by somebody's will stays off.
            if was_running == Some(true) && item.state.phase == Phase::Protected {
                start_again(step, &item, item.primary_provider, item.vm).await?;
            }
        }
        Ok(Undone::default())
    }
}

async fn shut_down(step: &StepContext<'_>, item: ItemId, timeout_ms: u64) -> Result<(), JobError> {
    let item = step.control.item(item).await?;
    if item.state.phase != Phase::Protected {
        // Begun again after a restart: it has failed over meanwhile.
        return Ok(());
    }
    let shutdown = ShutDownVm { item: item.id, generation: item.state.generation, vm: item.vm, timeout_ms };
    match step.call(item.primary_provider, shutdown, Patience::RESTART).await? {
        ShutdownOutcome::Off => Ok(()),
        ShutdownOutcome::Refused => Err(JobError::new(
            "ShutdownRefused",
            format!("'{}' did not shut down within {} s", item.vm_name, timeout_ms / 1000),
            "Shut it down from within the guest, then try again.",
        )),
    }
}

/// The machines of a group, or all, that take part.
fn members(plan: &RecoveryPlan, checked: &Checked, group: Option<usize>) -> Vec<ItemId> {
    let groups =
        plan.groups.iter().enumerate().filter(|(index, _)| group.is_none_or(|group| group == *index));
    groups
        .flat_map(|(_, group)| group.items.iter().copied())
        .filter(|item| checked.ready.contains_key(item))
        .collect()
}

/// Starts the jobs of machines that have none yet, and where it has not been done; those that cannot be started are told with
/// the reason.
async fn start(step: &StepContext<'_>, items: &[ItemId]) -> Result<Vec<String>, JobError> {
    let mut refused = Vec::new();
    for item in items {
        let request = JobRequest {
            operation: step.job.operation,
            params: step.job.params.clone(),
            requested_by: step.job.requested_by.clone(),
        };
        match step.control.start_job_whole(child_job(step.job.id, *item), *item, request).await {
            Ok(_) => {}
            Err(error @ ControlError::Db(_)) => return Err(error.into()),
            Err(error) => {
                let record = step.control.db.item(*item).await.map_err(ControlError::from)?;
                let standing = record.as_ref().map(|item| Standing::of(item, step.job.operation));
                // By somebody else, or by a job that was lost with the database.
                if !matches!(standing, Some(Standing::Done(_))) {
                    let name = record.map_or_else(|| item.to_string(), |item| item.vm_name.clone());
                    refused.push(format!("'{name}': {error}"));
                }
            }
        }
    }
    Ok(refused)
}

/// The machines' jobs, as they are now.
async fn children(control: &Control, job: JobId, items: &[ItemId]) -> Result<Vec<JobRecord>, JobError> {
    let mut found = Vec::new();
    for item in items {
        found.extend(control.db.job(child_job(job, *item)).await.map_err(ControlError::from)?);
    }
    Ok(found)
}

fn has_ended(job: &JobRecord) -> bool {
    matches!(job.state, JobState::Ended(_))
}

/// Why a machine's job did not succeed.
fn failure(job: &JobRecord) -> Option<String> {
    let word = match job.state {
        JobState::Ended(Ending::Succeeded) => return None,
        JobState::Ended(Ending::Failed) => "failed",
        JobState::Ended(Ending::Cancelled) => "was cancelled",
        JobState::Ended(Ending::Stuck) => "is stuck",
        _ => "has not ended",
    };
    let errors = job.steps.iter().flat_map(|step| &step.errors).filter(|error| !error.is_warning);
    let why: Vec<_> = errors.map(|error| error.message.as_str()).collect();
    let why = if why.is_empty() { String::new() } else { format!(": {}", why.join("; ")) };
    Some(format!("'{}' {word} (job {}){why}", job.vm_name, job.id))
}

/// Waits until `is_enough` holds for each of the machines' jobs.
async fn wait(
    step: &StepContext<'_>,
    items: &[ItemId],
    is_enough: impl Fn(&JobRecord) -> bool + Send,
) -> Result<Vec<JobRecord>, JobError> {
    loop {
        let changed = step.control.changed.notified();
        let jobs = children(step.control, step.job.id, items).await?;
        let done = jobs.iter().filter(|job| is_enough(job)).count();
        step.report(Progress { phase: format!("{done} of {} machines", items.len()), ..Progress::default() });
        if done == jobs.len() {
            return Ok(jobs);
        }
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

/// Cancels the machines' jobs that are under way, and waits for their ends.
async fn cancel_children(step: &StepContext<'_>, items: &[ItemId]) -> Result<(), JobError> {
    step.control.wait_until_started().await;
    for job in children(step.control, step.job.id, items).await? {
        if !has_ended(&job) && !job.is_cancel_requested {
            // Beyond its point of no return it is completed.
            if let Err(error) = step.control.cancel_job(job.id).await {
                tracing::info!(job = %job.id, %error, "a machine's job of a recovery plan is not cancelled");
            }
        }
    }
    wait(step, items, has_ended).await?;
    Ok(())
}

/// Begins the failback of all machines while they run; each waits for its completion.
struct SynchronizeAll;

#[async_trait]
impl StepAction for SynchronizeAll {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let params: FailbackParams = step.params()?;
        if !params.synchronize_before {
            return Ok(Done::skipped());
        }
        let items = members(plan_of(step)?, &step.expect_output(CHECK)?, None);
        let mut missing = start(step, &items).await?;
        let is_ready = |job: &JobRecord| has_ended(job) || job.state == JobState::Suspended;
        let jobs = wait(step, &items, is_ready).await?;
        missing.extend(jobs.iter().filter(|job| has_ended(job)).filter_map(failure));
        if missing.is_empty() { Ok(Done::default()) } else { Err(incomplete(&missing)) }
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let checked: Checked = step.expect_output(CHECK)?;
        cancel_children(step, &members(plan_of(step)?, &checked, None)).await?;
        Ok(Undone::default())
    }
}

/// The downtime begins when somebody says so.
struct WaitForUser;

#[async_trait]
impl StepAction for WaitForUser {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let params: FailbackParams = step.params()?;
        Ok(if params.synchronize_before { Done::waiting() } else { Done::skipped() })
    }
}

/// Carries the operation out on the machines of a group, all at the same time.
struct Run {
    group: Option<usize>,
}

#[async_trait]
impl StepAction for Run {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let items = members(plan_of(step)?, &step.expect_output(CHECK)?, self.group);
        if items.is_empty() {
            return Ok(Done::skipped());
        }
        let mut missing = start(step, &items).await?;
        loop {
            let is_still = |job: &JobRecord| has_ended(job) || job.state == JobState::Suspended;
            let jobs = wait(step, &items, is_still).await?;
            let suspended: Vec<_> = jobs.iter().filter(|job| !has_ended(job)).collect();
            if suspended.is_empty() {
                missing.extend(jobs.iter().filter_map(failure));
                break;
            }
            for job in suspended {
                // Somebody may have completed it by hand in this moment.
                if let Err(error) = step.control.resume_job(job.id).await {
                    tracing::info!(job = %job.id, %error, "a machine's job of a recovery plan goes on by itself");
                }
            }
        }
        if missing.is_empty() {
            return Ok(Done::default());
        }
        if step.job.operation == Operation::UnplannedFailover {
            return Ok(Done::default().warning(incomplete(&missing)));
        }
        Err(incomplete(&missing))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let checked: Checked = step.expect_output(CHECK)?;
        cancel_children(step, &members(plan_of(step)?, &checked, self.group)).await?;
        Ok(Undone::default())
    }
}

fn incomplete(missing: &[String]) -> JobError {
    JobError::new(
        INCOMPLETE,
        missing.join("; "),
        "See the machines' own jobs. Carried out again, the plan passes over what has been done.",
    )
}

/// A manual or script action.
struct Act {
    place: Place,
    side: Side,
    index: usize,
}

#[async_trait]
impl StepAction for Act {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let plan = plan_of(step)?;
        let Some(action) = plan.action(self.place, self.side, self.index) else { return Ok(Done::skipped()) };
        match &action.kind {
            ActionKind::Manual { .. } => Ok(Done::waiting()),
            ActionKind::Script { path, timeout_seconds, is_primary } => {
                let path = script::check_script(step.control, path)?;
                let context = self.context(step, action, *is_primary).await?;
                let timeout = Duration::from_secs(u64::from(*timeout_seconds));
                let output = script::run(path, &context, timeout).await?;
                Done::with(&json!({ "output": output }))
            }
        }
    }
}

impl Act {
    /// What a script is told on its standard input.
    async fn context(
        &self,
        step: &StepContext<'_>,
        action: &PlanAction,
        is_primary: bool,
    ) -> Result<Value, JobError> {
        let kind = recovery_plan::kind_of(step.job.operation);
        let (kind, direction) = kind.unwrap_or((FailoverKind::PlannedFailover, Direction::PrimaryToRecovery));
        let attempts = step.job.steps.get(step.index).map_or(1, |entry| entry.attempts);
        let mut machines = Vec::new();
        for (index, group) in plan_of(step)?.groups.iter().enumerate() {
            for id in &group.items {
                let Some(item) = step.control.db.item(*id).await.map_err(ControlError::from)? else {
                    continue;
                };
                machines.push(json!({
                    "name": item.vm_name,
                    "itemId": item.id,
                    "itemName": item.name,
                    "groupId": place_name(Place::Group(index)),
                    "fabric": item.fabric,
                    "recoveryFabric": item.recovery_fabric,
                    "vmId": item.vm,
                    "recoveryVmId": item.recovery_vm.as_ref().map(|copy| copy.vm),
                    "recoveryVmName": item.target.name,
                    "testVmId": item.test_vm.as_ref().map(|copy| copy.vm),
                    "recoveryPointId": item.recovery_vm.as_ref().or(item.test_vm.as_ref()).map(|copy| copy.point),
                    "activeLocation": format!("{:?}", item.state.phase.active_location()),
                }));
            }
        }
        Ok(json!({
            "version": 1,
            "recoveryPlanName": step.job.item_name,
            "jobId": step.job.id,
            "actionName": action.name,
            "failoverType": format!("{kind:?}"),
            "failoverDirection": format!("{direction:?}"),
            "groupId": place_name(self.place),
            "side": format!("{:?}", self.side),
            "fabricLocation": if is_primary { "Primary" } else { "Recovery" },
            "attempt": attempts,
            "machines": machines,
        }))
    }
}

/// Says what is missing.
struct Finish;

#[async_trait]
impl StepAction for Finish {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let checked: Checked = step.expect_output(CHECK)?;
        let mut missing = checked.missing.clone();
        let warned = step.job.steps.iter().filter(|entry| entry.state == StepState::Succeeded);
        let of_groups = warned.flat_map(|entry| &entry.errors).filter(|error| error.code == INCOMPLETE);
        missing.extend(of_groups.map(|error| error.message.clone()));
        if missing.is_empty() { Ok(Done::default()) } else { Err(incomplete(&missing)) }
    }
}

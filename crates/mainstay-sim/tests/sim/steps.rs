//! Six questions to every step of every workflow: what if it is done twice, fails, the process dies, the database is lost
//! with it, the hosts are away for a moment, or somebody cancels?

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use mainstay_control::{
    db::{JobRecord, JobState},
    jobs::{Fault, Faults, job_log},
};
use mainstay_model::{Ending, JobId, Operation, Phase, StepState};
use mainstay_provider::{ErrorKind, PowerState};
use mainstay_sim::{HostFault, SimHypervisor, Snapshot, World, WorldOptions, simulate};

use crate::{
    support::{METHODS, log},
    workflows::{VM, Workflow, finish_journey},
};

/// One fault at one step or undo, once.
struct Once {
    operation: Operation,
    step: usize,
    fault: Fault,
    /// The step fails whose failure brings the undo about.
    failing: Option<usize>,
    has_struck: AtomicBool,
}

impl Faults for Once {
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        if job.operation != self.operation {
            return Fault::None;
        }
        if !is_undo && self.failing == Some(step) {
            return Fault::FailAfter;
        }
        let is_it = step == self.step && is_undo == self.failing.is_some();
        if is_it && !self.has_struck.swap(true, Ordering::SeqCst) { self.fault } else { Fault::None }
    }
}

fn install(world: &World, workflow: Workflow, step: usize, fault: Fault) -> Arc<Once> {
    install_undo(world, workflow, None, step, fault)
}

fn install_undo(
    world: &World,
    workflow: Workflow,
    failing: Option<usize>,
    step: usize,
    fault: Fault,
) -> Arc<Once> {
    let operation = workflow.operation();
    let once = Once { operation, step, fault, failing, has_struck: AtomicBool::new(false) };
    let once = Arc::new(once);
    world.set_faults(Some(once.clone()));
    once
}

/// The process dies after a step, and perhaps once more after the next one; what takes the job up then is cancelled at once, or
/// is not.
struct Deaths {
    operation: Operation,
    step: usize,
    wanted: usize,
    is_cancelled: bool,
    so_far: AtomicUsize,
}

impl Deaths {
    fn install(
        world: &World,
        workflow: Workflow,
        step: usize,
        wanted: usize,
        is_cancelled: bool,
    ) -> Arc<Self> {
        let operation = workflow.operation();
        let deaths = Arc::new(Self { operation, step, wanted, is_cancelled, so_far: AtomicUsize::new(0) });
        world.set_faults(Some(deaths.clone()));
        deaths
    }

    /// Completes a job up to where the process has died so often.
    async fn reach(&self, world: &World, job: JobId, count: usize) {
        drive_until_over(world, job).await;
        assert_eq!(self.so_far.load(Ordering::SeqCst), count, "the job ended: {}", world.tell(job).await);
    }
}

impl Faults for Deaths {
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        if job.operation != self.operation || is_undo {
            return Fault::None;
        }
        let so_far = self.so_far.load(Ordering::SeqCst);
        if so_far < self.wanted {
            if step < self.step + so_far {
                return Fault::None;
            }
            self.so_far.store(so_far + 1, Ordering::SeqCst);
            return Fault::StopAfter;
        }
        if self.is_cancelled { Fault::CancelBefore } else { Fault::None }
    }
}

/// What becomes of a job that is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disturbance {
    Fault(Fault),
    /// The database is lost with the step, and the job cancelled afterwards.
    DatabaseLost,
    /// A copy of the database from after the step takes its place after the next one, and the job is cancelled then.
    DatabaseRestored,
}

/// Both hosts are away for a moment when a step begins.
struct Away {
    operation: Operation,
    step: usize,
    hosts: Vec<SimHypervisor>,
}

impl Faults for Away {
    fn fault(&self, job: &JobRecord, step: usize, _: bool) -> Fault {
        if job.operation == self.operation && step == self.step {
            for (host, method) in self.hosts.iter().flat_map(|host| METHODS.map(|method| (host, method))) {
                host.inject(method, HostFault::Fail(ErrorKind::Unavailable), 2);
            }
        }
        Fault::None
    }
}

async fn world_before(workflow: Workflow) -> World {
    let world = World::new(WorldOptions::default()).await;
    workflow.prepare(&world).await;
    world
}

async fn resume(world: &World, job: JobId) {
    // Refused when it was cancelled in the same moment.
    if let Err(error) = world.ask(|control| async move { control.resume_job(job).await }).await {
        tracing::debug!(%error, "not resumed");
    }
}

/// Completes a job up to where its run stops without having ended.
async fn drive_until_stopped(world: &World, job: JobId, once: &Once) {
    drive_until_over(world, job).await;
    assert!(once.has_struck.load(Ordering::SeqCst), "the job ended: {}", world.tell(job).await);
}

async fn settle_and_check(world: &World) {
    world.settle().await;
    world.check().await;
    let phase = world.phase(VM).await;
    if phase == Some(Phase::FailbackCommitPending) && world.item(VM).await.unwrap().state.running.is_none() {
        world.check_failback(VM).await;
    }
    if phase == Some(Phase::PlannedFailoverCommitPending) {
        world.check_planned_failover(VM).await;
    }
}

async fn undisturbed(workflow: Workflow) -> (Snapshot, usize, Option<usize>) {
    let world = world_before(workflow).await;
    let job = workflow.begin(&world).await;
    assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
    settle_and_check(&world).await;
    let point_of_no_return = job_log(&job).steps.iter().position(|(plan, _)| plan.is_point_of_no_return);
    let snapshot = world.snapshot(VM).await;
    finish_journey(&world, VM, 0).await;
    (snapshot, job.steps.len(), point_of_no_return)
}

/// (a) The step is done twice.
async fn repeat(workflow: Workflow, step: usize, expected: &Snapshot) {
    let world = world_before(workflow).await;
    install(&world, workflow, step, Fault::Repeat);
    let job = workflow.begin(&world).await;
    assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
    settle_and_check(&world).await;
    assert_eq!(world.snapshot(VM).await, *expected, "{workflow:?}: step {step} was done twice");
    finish_journey(&world, VM, 0).await;
}

/// No job fails by that, wherever it meets it.
async fn be_away(workflow: Workflow, step: usize) {
    let world = world_before(workflow).await;
    let hosts: Vec<_> = world.hosts().map(|host| host.hypervisor.clone()).collect();
    world.set_faults(Some(Arc::new(Away { operation: workflow.operation(), step, hosts })));
    let job = workflow.begin(&world).await;
    let ending = world.complete(job.id).await;
    assert_eq!(ending, Ending::Succeeded, "{workflow:?}, step {step}: {}", world.tell(job.id).await);
    world.hosts().for_each(|host| host.hypervisor.clear_faults());
    settle_and_check(&world).await;
    world.set_faults(None);
    finish_journey(&world, VM, 0).await;
}

/// (c) The process dies after the step and before that was written down.
async fn kill(workflow: Workflow, step: usize, expected: &Snapshot) {
    let mut world = world_before(workflow).await;
    let once = install(&world, workflow, step, Fault::StopAfter);
    let job = workflow.begin(&world).await;
    drive_until_stopped(&world, job.id, &once).await;
    world.restart_server().await;
    assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
    settle_and_check(&world).await;
    assert_eq!(world.snapshot(VM).await, *expected, "{workflow:?}: killed after step {step}");
    finish_journey(&world, VM, 0).await;
}

/// Begins the workflow and loses the database when a step is done.
async fn begin_and_lose(world: &mut World, workflow: Workflow, step: usize, is_cancelled: bool) -> JobRecord {
    let deaths = Deaths::install(world, workflow, step, 1, is_cancelled);
    let job = workflow.begin(world).await;
    deaths.reach(world, job.id, 1).await;
    world.lose_database().await;
    job
}

/// Begins the workflow, and when the next step is done restores the database of the step before.
async fn begin_and_restore(world: &mut World, workflow: Workflow, step: usize) -> JobRecord {
    let deaths = Deaths::install(world, workflow, step, 2, true);
    let job = workflow.begin(world).await;
    deaths.reach(world, job.id, 1).await;
    world.back_up_database().await;
    deaths.reach(world, job.id, 2).await;
    world.restore_database().await;
    job
}

/// (e) The process dies after the step, and the database is lost with it: the store's catalogue knows the job.
async fn lose(workflow: Workflow, step: usize, expected: &Snapshot) {
    let mut world = world_before(workflow).await;
    let job = begin_and_lose(&mut world, workflow, step, false).await;
    // An item that was removed is not in the catalogue any more, and neither is its job.
    if world.item(VM).await.is_some() {
        assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
    }
    settle_and_check(&world).await;
    let snapshot = world.snapshot(VM).await;
    let what = format!("{workflow:?}: lost the database after step {step}");
    assert_eq!((snapshot.phase, snapshot.vcpus), (expected.phase, expected.vcpus), "{what}");
    // A new database takes a recovery point at once.
    if !expected.phase.is_some_and(Phase::is_replicating) {
        assert_eq!(snapshot, *expected, "{what}");
    }
    finish_journey(&world, VM, 0).await;
}

/// (b) and (d) beyond the point of no return: stuck and then completed; refused.
async fn beyond_return(workflow: Workflow, step: usize, fault: Fault, expected: &Snapshot) {
    let world = world_before(workflow).await;
    install(&world, workflow, step, fault);
    let job = workflow.begin(&world).await;
    let ending = world.complete(job.id).await;
    if fault == Fault::FailAfter {
        assert_eq!(ending, Ending::Stuck);
        let id = job.id;
        world.ask(move |control| async move { control.restart_job(id).await }).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
    } else {
        assert_eq!(ending, Ending::Succeeded, "{}", world.tell(job.id).await);
    }
    settle_and_check(&world).await;
    assert_eq!(world.snapshot(VM).await, *expected, "{workflow:?}: {fault:?} at step {step}");
    finish_journey(&world, VM, 0).await;
}

/// (b), (d) and (e): the job is undone and the item is what it was.
async fn undone(world: &mut World, workflow: Workflow, step: usize, disturbance: Disturbance) {
    let what = format!("{workflow:?}: {disturbance:?} at step {step}");
    let before = world.phase(VM).await;
    let (host, vm) = world.active(VM).await;
    let power_before = host.hypervisor.view(vm).unwrap().power;
    let mut held_before = world.held().await;
    let job = match disturbance {
        Disturbance::Fault(fault) => {
            install(world, workflow, step, fault);
            workflow.begin(world).await
        }
        Disturbance::DatabaseLost => begin_and_lose(world, workflow, step, true).await,
        Disturbance::DatabaseRestored => begin_and_restore(world, workflow, step).await,
    };
    let ending = world.complete(job.id).await;
    let is_failed = disturbance == Disturbance::Fault(Fault::FailAfter);
    let expected = if is_failed { Ending::Failed } else { Ending::Cancelled };
    assert_eq!(ending, expected, "{what}: {}", world.tell(job.id).await);
    world.set_faults(None);
    settle_and_check(world).await;
    // What nobody asked for, Mainstay begins again by itself.
    let phase = if workflow == Workflow::Finalize { Some(Phase::Protected) } else { before };
    assert_eq!(world.phase(VM).await, phase, "{what}");
    let (host, vm) = world.active(VM).await;
    let power = host.hypervisor.view(vm).unwrap().power;
    assert_eq!(power, power_before, "{what}: the active VM");
    let merge = job.steps.iter().position(|step| step.name == "VmFailback");
    let last = if disturbance == Disturbance::DatabaseRestored { step + 1 } else { step };
    let mut held = world.held().await;
    if merge.is_some_and(|merge| last >= merge) {
        // What came home has been merged into its disks; the copy, which runs on, is as it was.
        for held in [&mut held_before, &mut held] {
            held.retain(|name, _| name.starts_with("recovery/"));
        }
    }
    assert!(held == held_before, "{what}: disks were changed, of {:?}", held.keys());
    if power == PowerState::Running {
        world.write(VM, &[("vda", 30, step as u8 + 1)]).await;
    }
    if phase.is_some_and(Phase::is_replicating) && workflow != Workflow::FailoverOfDeadSource {
        world.cycle(VM).await;
        world.check().await;
    }
}

/// The last step that can be undone fails, and the undo of an earlier one is done twice, fails, or is interrupted.
async fn undo_disturbed(world: &mut World, workflow: Workflow, failing: usize, step: usize, fault: Fault) {
    let what = format!("{workflow:?}: {fault:?} at the undo of step {step}");
    let before = world.phase(VM).await;
    let (host, vm) = world.active(VM).await;
    let power_before = host.hypervisor.view(vm).unwrap().power;
    let once = install_undo(world, workflow, Some(failing), step, fault);
    let job = workflow.begin(world).await;
    if fault == Fault::StopAfter {
        drive_until_over(world, job.id).await;
        world.restart_server().await;
    }
    let mut ending = world.complete(job.id).await;
    if ending == Ending::Stuck {
        assert_eq!(fault, Fault::FailAfter, "{what}: {}", world.tell(job.id).await);
        let id = job.id;
        world.ask(move |control| async move { control.restart_job(id).await }).await.unwrap();
        ending = world.complete(job.id).await;
    }
    assert_eq!(ending, Ending::Failed, "{what}: {}", world.tell(job.id).await);
    drop(once);
    world.set_faults(None);
    settle_and_check(world).await;
    assert_eq!(world.phase(VM).await, before, "{what}");
    let (host, vm) = world.active(VM).await;
    assert_eq!(host.hypervisor.view(vm).unwrap().power, power_before, "{what}: the active VM");
}

/// Whether a job's run has stopped, ended or not. One that nobody asked for may be written down and not launched yet.
async fn is_over(world: &World, job: JobId) -> bool {
    let record = world.job(job).await;
    let has_begun = matches!(record.state, JobState::Ended(_))
        || record.steps.iter().any(|step| step.state != StepState::NotStarted);
    has_begun && !world.control().engine.is_active(job)
}

/// Completes a job up to where its run stops, ended or not.
async fn drive_until_over(world: &World, job: JobId) {
    loop {
        world
            .until("the job has stopped", async |world| {
                world.job(job).await.state == JobState::Suspended || is_over(world, job).await
            })
            .await;
        if is_over(world, job).await {
            return;
        }
        resume(world, job).await;
    }
}

async fn six_questions(workflow: Workflow) {
    log();
    let (expected, steps, point_of_no_return) = undisturbed(workflow).await;
    for step in 0..steps {
        repeat(workflow, step, &expected).await;
        kill(workflow, step, &expected).await;
        lose(workflow, step, &expected).await;
        be_away(workflow, step).await;
    }
    let first_final = point_of_no_return.unwrap_or(steps);
    for step in first_final..steps {
        for fault in [Fault::FailAfter, Fault::Cancel] {
            beyond_return(workflow, step, fault, &expected).await;
        }
    }
    // All in one world: what is undone leaves a world in which everything can be done again.
    let mut world = world_before(workflow).await;
    for step in 0..first_final {
        let faults = [Fault::FailAfter, Fault::Cancel, Fault::CancelBefore].map(Disturbance::Fault);
        for disturbance in
            faults.into_iter().chain([Disturbance::DatabaseLost, Disturbance::DatabaseRestored])
        {
            // After the last step that can be undone there is no next one to be undone.
            if disturbance == Disturbance::DatabaseRestored && step + 1 == first_final {
                continue;
            }
            if workflow == Workflow::Finalize {
                world = world_before(workflow).await;
            }
            undone(&mut world, workflow, step, disturbance).await;
        }
    }
    if workflow != Workflow::Finalize {
        for step in 0..first_final {
            for fault in [Fault::Repeat, Fault::FailAfter, Fault::StopAfter] {
                undo_disturbed(&mut world, workflow, first_final - 1, step, fault).await;
            }
        }
    }
    if let Some(step) = point_of_no_return {
        undone(&mut world, workflow, step, Disturbance::Fault(Fault::CancelBefore)).await;
    }
    if workflow != Workflow::Finalize {
        let job = workflow.begin(&world).await;
        assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
        settle_and_check(&world).await;
    }
    finish_journey(&world, VM, 0).await;
}

macro_rules! six_questions {
    ($($name:ident: $workflow:ident,)*) => {
        $(
            #[test]
            fn $name() {
                simulate(|| six_questions(Workflow::$workflow));
            }
        )*
    };
}

six_questions! {
    enable: Enable,
    finalize: Finalize,
    test_failover: TestFailover,
    test_failover_cleanup: TestFailoverCleanup,
    failover_with_shutdown: FailoverWithShutdown,
    failover_without_shutdown: FailoverWithoutShutdown,
    failover_of_dead_source: FailoverOfDeadSource,
    planned_failover: PlannedFailover,
    change_point: ChangePoint,
    commit_failover: CommitFailover,
    failback_synchronized_before: FailbackSynchronizedBefore,
    failback_synchronized_during: FailbackSynchronizedDuring,
    commit_failback: CommitFailback,
    reverse_replicate: ReverseReplicate,
    resynchronize: Resynchronize,
    update_properties: UpdateProperties,
    disable_protected: DisableProtected,
    disable_failed_over: DisableFailedOver,
}

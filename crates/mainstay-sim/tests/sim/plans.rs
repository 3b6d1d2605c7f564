//! Recovery plans: groups in order, machines of a group together, people and scripts in between.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mainstay_control::{
    Control, ControlError,
    app::Requester,
    db::JobRecord,
    jobs::{Fault, Faults},
    workflows::{FailbackParams, FailoverParams, PointChoice, TestFailoverParams, child_job},
};
use mainstay_model::{
    Ending, JobId, Operation, Phase, RecoveryPlan,
    recovery_plan::{ActionKind, Direction, FailoverKind, PlanAction, PlanGroup},
};
use mainstay_provider::PowerState;
use mainstay_sim::{JobEnd, World, WorldOptions, simulate};

use crate::support::log;

const VMS: [&str; 3] = ["db", "web1", "web2"];

fn by() -> Requester {
    Requester("test".to_owned())
}

fn action(name: &str, kind: ActionKind) -> PlanAction {
    PlanAction {
        name: name.to_owned(),
        failovers: vec![
            FailoverKind::TestFailover,
            FailoverKind::PlannedFailover,
            FailoverKind::UnplannedFailover,
        ],
        directions: vec![Direction::PrimaryToRecovery, Direction::RecoveryToPrimary],
        kind,
    }
}

fn manual(name: &str) -> PlanAction {
    action(name, ActionKind::Manual { instructions: "Say so.".to_owned() })
}

/// A world with three protected VMs, each with something to lose, and a plan: `db`, then both `web`.
async fn world_with_plan(change: impl FnOnce(&mut RecoveryPlan)) -> World {
    log();
    let vms = VMS.map(str::to_owned).to_vec();
    let world = World::new(WorldOptions { vms, ..WorldOptions::default() }).await;
    let mut ids = Vec::new();
    for vm in VMS {
        world.write(vm, &[("vda", 5, 1), ("vdb", 3, 2)]).await;
        world.protect(vm).await;
        world.write(vm, &[("vda", 6, 3)]).await;
        ids.push(world.item(vm).await.unwrap().id);
    }
    let group = |items: &[_]| PlanGroup { items: items.to_vec(), ..PlanGroup::default() };
    let mut plan =
        RecoveryPlan { groups: vec![group(&ids[..1]), group(&ids[1..])], ..RecoveryPlan::default() };
    change(&mut plan);
    put(&world, plan).await.unwrap();
    world
}

/// Makes or changes the plan.
pub(crate) async fn put(world: &World, plan: RecoveryPlan) -> Result<(), ControlError> {
    let put = |control: Arc<Control>| async move {
        control.put_recovery_plan("shop", "home", "recovery", plan, by()).await
    };
    world.ask(put).await.map(drop)
}

/// Begins to carry the plan out, with the usual parameters.
pub(crate) async fn begin(world: &World, operation: Operation) -> Result<JobRecord, ControlError> {
    let failover =
        FailoverParams { point: PointChoice::Latest, shutdown_source: true, shutdown_timeout_ms: 1_000 };
    let params = match operation {
        Operation::TestFailover => {
            serde_json::to_value(TestFailoverParams { point: PointChoice::LatestProcessed, network: None })
        }
        Operation::PlannedFailover | Operation::UnplannedFailover => serde_json::to_value(failover),
        Operation::Failback => serde_json::to_value(FailbackParams {
            synchronize_before: true,
            create_vm: true,
            host: None,
            shutdown_timeout_ms: 1_000,
        }),
        _ => Ok(serde_json::Value::Null),
    };
    let params = params.unwrap();
    world
        .ask(|control| async move { control.start_recovery_plan("shop", operation, params, by()).await })
        .await
}

/// Carries an operation out to its good end; answers how often it waited for a person.
async fn run(world: &World, operation: Operation) -> usize {
    let job = begin(world, operation).await.unwrap();
    let mut waited = 0;
    while world.end(job.id).await == JobEnd::Suspended {
        waited += 1;
        world.ask(|control| async move { control.resume_job(job.id).await }).await.unwrap();
    }
    let end = world.end(job.id).await;
    assert_eq!(end, JobEnd::Ended(Ending::Succeeded), "{operation:?}: {}", world.tell(job.id).await);
    check_order(world, job.id).await;
    world.settle().await;
    world.check().await;
    waited
}

async fn children(world: &World, job: JobId) -> Vec<JobRecord> {
    let mut found = Vec::new();
    let job = world.job(job).await;
    for item in job.plan.as_deref().unwrap().items() {
        let id = child_job(job.id, item);
        found.extend(world.ask(|control| async move { control.db.job(id).await }).await.unwrap());
    }
    found
}

/// The first group was through before the second began, if the operation knows groups.
async fn check_order(world: &World, job: JobId) {
    let plan_job = world.job(job).await;
    let began =
        |name: &str| plan_job.steps.iter().find(|step| step.name == name).and_then(|step| step.started_ms);
    if let (Some(_), Some(second)) = (began("Group1"), began("Group2")) {
        let children = children(world, job).await;
        assert!(children[0].ended_ms.unwrap() <= second);
    }
}

async fn phases(world: &World) -> Vec<Phase> {
    let mut found = Vec::new();
    for vm in VMS {
        found.push(world.phase(vm).await.unwrap());
    }
    found
}

#[test]
fn a_plan_goes_there_and_back_again() {
    simulate(|| async {
        let world = world_with_plan(|plan| {
            plan.groups[1].actions.start.push(manual("check the database"));
            let mut only_tests = manual("look at the tests");
            only_tests.failovers = vec![FailoverKind::TestFailover];
            plan.failover.end.push(only_tests);
        })
        .await;
        assert_eq!(run(&world, Operation::TestFailover).await, 2);
        assert_eq!(run(&world, Operation::TestFailoverCleanup).await, 0);
        assert_eq!(run(&world, Operation::PlannedFailover).await, 1);
        assert_eq!(phases(&world).await, [Phase::PlannedFailoverCommitPending; 3]);
        for vm in VMS {
            world.check_planned_failover(vm).await;
        }
        // It is where it shall be: there is nothing to do.
        assert!(matches!(
            begin(&world, Operation::PlannedFailover).await,
            Err(ControlError::NotAllowed { .. })
        ));
        run(&world, Operation::Commit).await;
        for vm in VMS {
            world.write(vm, &[("vda", 8, 9)]).await;
        }
        // Once for the downtime, once for the action.
        assert_eq!(run(&world, Operation::Failback).await, 2);
        for vm in VMS {
            world.check_failback(vm).await;
        }
        run(&world, Operation::Commit).await;
        run(&world, Operation::ReverseReplicate).await;
        assert_eq!(phases(&world).await, [Phase::Protected; 3]);
    });
}

#[test]
fn machines_are_shut_down_from_the_last_group_to_the_first_and_start_again_if_one_refuses() {
    simulate(|| async {
        let world = world_with_plan(|_| {}).await;
        world.home.hypervisor.let_guests_refuse(true);
        let job = begin(&world, Operation::PlannedFailover).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Failed));
        assert!(world.tell(job.id).await.contains("did not shut down"));
        world.home.hypervisor.let_guests_refuse(false);
        world.settle().await;
        world.check().await;
        assert_eq!(phases(&world).await, [Phase::Protected; 3]);
        assert!(children(&world, job.id).await.is_empty());
        for vm in VMS {
            let (host, id) = world.active(vm).await;
            assert_eq!(host.hypervisor.view(id).unwrap().power, PowerState::Running, "{vm}");
        }
        run(&world, Operation::PlannedFailover).await;
    });
}

/// One machine's failover fails at its last step.
struct FailChild(String, AtomicBool);

impl Faults for FailChild {
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        let is_it = job.plan.is_none() && job.vm_name == self.0 && step + 1 == job.steps.len() && !is_undo;
        let is_failover = matches!(job.operation, Operation::UnplannedFailover | Operation::PlannedFailover);
        if is_it && is_failover && !self.1.swap(true, Ordering::SeqCst) {
            Fault::FailAfter
        } else {
            Fault::None
        }
    }
}

#[test]
fn a_planned_failover_stops_at_a_failure_and_an_unplanned_one_goes_on() {
    simulate(|| async {
        for operation in [Operation::PlannedFailover, Operation::UnplannedFailover] {
            let world = world_with_plan(|_| {}).await;
            world.set_faults(Some(Arc::new(FailChild("db".to_owned(), AtomicBool::new(false)))));
            let job = begin(&world, operation).await.unwrap();
            assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Failed), "{operation:?}");
            let told = world.tell(job.id).await;
            assert!(told.contains("'db' failed"), "{told}");
            world.settle().await;
            world.check().await;
            let moved = phases(&world).await.iter().filter(|phase| **phase != Phase::Protected).count();
            assert_eq!(moved, if operation == Operation::PlannedFailover { 0 } else { 2 }, "{told}");
            for vm in VMS {
                let (host, id) = world.active(vm).await;
                assert_eq!(
                    host.hypervisor.view(id).unwrap().power,
                    PowerState::Running,
                    "{operation:?} {vm}"
                );
            }
            // Carried out again it does what is missing.
            run(&world, operation).await;
            assert!(phases(&world).await.iter().all(|phase| *phase != Phase::Protected));
        }
    });
}

#[test]
fn cancelling_stops_what_is_under_way_and_begins_nothing_more() {
    simulate(|| async {
        let world = world_with_plan(|plan| plan.groups[1].actions.start.push(manual("wait"))).await;
        let job = begin(&world, Operation::PlannedFailover).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Suspended);
        let cancel =
            async || world.ask(|control| async move { control.cancel_recovery_plan("shop").await }).await;
        cancel().await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Cancelled));
        assert!(matches!(cancel().await, Err(ControlError::NotAllowed { .. })));
        world.settle().await;
        world.check().await;
        // What has failed over stays; what was only shut down runs again.
        assert_eq!(phases(&world).await[0], Phase::PlannedFailoverCommitPending);
        assert_eq!(phases(&world).await[1..], [Phase::Protected; 2]);
        for vm in VMS {
            let (host, id) = world.active(vm).await;
            assert_eq!(host.hypervisor.view(id).unwrap().power, PowerState::Running, "{vm}");
        }
    });
}

#[test]
fn scripts_are_told_what_happens_and_only_allowed_ones_run() {
    simulate(|| async {
        let directory = tempfile::tempdir().unwrap();
        let context = directory.path().join("context.json");
        let script = directory.path().join("dns");
        std::fs::write(&script, format!("#!/bin/sh\ncat > {}\necho updated\n", context.display())).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let world = world_with_plan(|_| {}).await;
        let ids = world.ask(|control| async move { control.db.items().await }).await.unwrap();
        let plan = |path: &str| {
            let kind = ActionKind::Script { path: path.to_owned(), timeout_seconds: 60, is_primary: false };
            let mut group =
                PlanGroup { items: ids.iter().map(|item| item.id).collect(), ..PlanGroup::default() };
            group.actions.end.push(action("update names", kind));
            RecoveryPlan { groups: vec![group], ..RecoveryPlan::default() }
        };
        let put = async |path: &str| {
            let plan = plan(path);
            let put = world.ask(|control| async move {
                control.put_recovery_plan("shop", "home", "recovery", plan, by()).await
            });
            put.await.map_err(|error| error.to_string())
        };
        assert!(put("dns").await.unwrap_err().contains("runs no scripts"));
        world.control().scripts.set(directory.path().to_owned()).unwrap();
        assert!(put("other").await.unwrap_err().contains("there is no script"));
        put("dns").await.unwrap();
        assert_eq!(run(&world, Operation::UnplannedFailover).await, 0);
        let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&context).unwrap()).unwrap();
        assert_eq!(told["recoveryPlanName"], "shop");
        assert_eq!(
            (&told["failoverType"], &told["failoverDirection"]),
            (&"UnplannedFailover".into(), &"PrimaryToRecovery".into())
        );
        let machines = told["machines"].as_array().unwrap();
        assert_eq!(machines.len(), 3);
        assert!(
        machines
            .iter()
            .all(|machine| machine["activeLocation"] == "Recovery" && machine["recoveryVmId"].is_string())
    );
        // The right to run it may be gone when its turn comes: the plan says so, and where it stands.
        run(&world, Operation::Commit).await;
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o777)).unwrap();
        let job = begin(&world, Operation::Failback).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Failed);
        assert!(world.tell(job.id).await.contains("anybody may write"), "{}", world.tell(job.id).await);
        assert_eq!(phases(&world).await, [Phase::FailbackCommitPending; 3]);
    });
}

/// One fault at one step of the plan's own job.
struct Once(usize, Fault, AtomicBool);

impl Faults for Once {
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        let is_it = job.plan.is_some() && step == self.0 && !is_undo;
        if is_it && !self.2.swap(true, Ordering::SeqCst) { self.1 } else { Fault::None }
    }
}

#[test]
fn every_step_of_a_plan_can_be_repeated_fail_be_cancelled_and_survive_a_crash_and_the_loss_of_the_database() {
    simulate(|| async {
        let crashes = [(Fault::StopAfter, false), (Fault::StopAfter, true)];
        let others = [Fault::Repeat, Fault::FailAfter, Fault::Cancel, Fault::CancelBefore];
        for (fault, is_database_lost) in crashes.into_iter().chain(others.map(|fault| (fault, false))) {
            for operation in [Operation::PlannedFailover, Operation::UnplannedFailover] {
                for step in 0.. {
                    let mut world = world_with_plan(|_| {}).await;
                    let once = Arc::new(Once(step, fault, AtomicBool::new(false)));
                    world.set_faults(Some(once.clone()));
                    let job = begin(&world, operation).await.unwrap();
                    if step >= job.steps.len() {
                        break;
                    }
                    if fault == Fault::StopAfter {
                        world
                            .until("the server stops", async |world| {
                                once.2.load(Ordering::SeqCst) && !world.control().engine.is_active(job.id)
                            })
                            .await;
                        match is_database_lost {
                            true => world.lose_database().await,
                            false => world.restart_server().await,
                        }
                    }
                    let ending = world.complete(job.id).await;
                    let told = format!("{operation:?} {fault:?} at {step}: {}", world.tell(job.id).await);
                    match fault {
                        Fault::Repeat | Fault::StopAfter => assert_eq!(ending, Ending::Succeeded, "{told}"),
                        Fault::FailAfter => assert_eq!(ending, Ending::Failed, "{told}"),
                        _ => assert_eq!(ending, Ending::Cancelled, "{told}"),
                    }
                    world.settle().await;
                    world.check().await;
                    world.set_faults(None);
                    for vm in VMS {
                        let (host, id) = world.active(vm).await;
                        assert_eq!(
                            host.hypervisor.view(id).unwrap().power,
                            PowerState::Running,
                            "{told} {vm}"
                        );
                    }
                    // Whatever happened, it can be completed.
                    if phases(&world).await.contains(&Phase::Protected) {
                        run(&world, operation).await;
                    }
                    assert!(!phases(&world).await.contains(&Phase::Protected), "{told}");
                }
            }
        }
    });
}

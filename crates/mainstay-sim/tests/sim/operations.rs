//! Mapped networks, failovers that somebody cancels, and those that a host is not fit for.

use std::sync::Arc;

use mainstay_control::{
    ControlError,
    app::Requester,
    db::TargetRecord,
    workflows::{PointChoice, TestFailoverParams},
};
use mainstay_model::{Ending, Operation, Phase, PointId};
use mainstay_provider::{Hypervisor as _, PowerState};
use mainstay_sim::{HostFault, JobEnd, World, WorldOptions, simulate};
use tokio::sync::Semaphore;

use crate::{support::log, workflows::VM};

fn by() -> Requester {
    Requester("test".to_owned())
}

/// Maps the network that the VM is attached to at home.
async fn map(world: &World, recovery_network: &'static str) {
    world
        .until("both sites' networks are known", async |world| {
            let names = |fabric| {
                world.ask(move |control| async move { control.network_names(fabric).await.unwrap() })
            };
            !names("home").await.is_empty() && !names("recovery").await.is_empty()
        })
        .await;
    let recovery = (Some("recovery"), recovery_network);
    world
        .ask(move |control| async move {
            control.put_network_mapping("home", "lan", "map", recovery, by()).await.unwrap();
        })
        .await;
}

/// The networks of the recovery VM's adapters.
async fn networks(world: &World) -> Vec<String> {
    let copy = world.item(VM).await.unwrap().recovery_vm.unwrap().vm;
    let vm = world.recovery.hypervisor.vm(copy).await.unwrap();
    vm.nics.into_iter().map(|nic| nic.network).collect()
}

#[test]
fn a_vm_is_recovered_in_the_network_that_its_own_is_mapped_to() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        map(&world, "island").await;
        world.protect(VM).await;
        assert_eq!(world.item(VM).await.unwrap().target.nics[0].network.as_deref(), Some("island"));
        world.run(VM, Operation::UnplannedFailover).await;
        assert_eq!(networks(&world).await, ["island"]);
        world.check().await;
    });
}

#[test]
fn a_mapping_counts_where_no_network_was_chosen_and_only_there() {
    simulate(|| async {
        log();
        for chosen in [None, Some("lan")] {
            let world = World::new(WorldOptions::default()).await;
            world.protect(VM).await;
            let item = world.item(VM).await.unwrap();
            assert_eq!(item.target.nics[0].network.as_deref(), Some("lan"));
            let mut target = item.target.clone();
            target.nics[0].network = chosen.map(str::to_owned);
            let job =
                world
                    .ask(move |control| async move {
                        control.update_item_target(&item, target, by()).await.unwrap()
                    })
                    .await;
            assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
            map(&world, "island").await;
            world.run(VM, Operation::PlannedFailover).await;
            assert_eq!(networks(&world).await, [chosen.unwrap_or("island")]);
            world.check().await;
        }
    });
}

/// Tests on the item's network, on another, and on none.
#[test]
fn a_test_copy_is_attached_to_what_the_item_says_unless_the_request_says_something_else() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let item = world.item(VM).await.unwrap();
        let target = TargetRecord { test_network: Some("island".to_owned()), ..item.target };
        world.update_target(VM, target).await;
        for (asked, used) in [(None, "island"), (Some("lan"), "lan"), (Some(""), "")] {
            let item = world.item(VM).await.unwrap();
            let params =
                TestFailoverParams { point: PointChoice::LatestProcessed, network: asked.map(str::to_owned) };
            let job = world
                .ask(move |control| async move { control.test_failover(&item, params, by()).await })
                .await
                .unwrap();
            assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
            let copy = world.item(VM).await.unwrap().test_vm.unwrap().vm;
            let vm = world.recovery.hypervisor.vm(copy).await.unwrap();
            assert!(vm.nics.iter().all(|nic| nic.network == used), "{asked:?}: {:?}", vm.nics);
            world.run(VM, Operation::TestFailoverCleanup).await;
        }
        world.check().await;
    });
}

/// How far, which way, and that what was written is gone: in the task and as an event.
#[test]
fn another_recovery_point_comes_with_what_it_costs() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.write(VM, &[("vda", 6, 4)]).await;
        world.cycle(VM).await;
        world.run(VM, Operation::UnplannedFailover).await;
        let item = world.item(VM).await.unwrap();
        let latest = item.recovery_vm.unwrap();
        let points = world.ask(|control| async move { control.recovery_points(&item).await }).await.unwrap();
        let first_ms = i64::try_from(points[0].time_ms).unwrap();
        let seconds = (latest.taken_at_ms - first_ms).unsigned_abs().div_ceil(1000);
        assert!(seconds > 0);
        for (point, way) in [
            (PointId(points[0].id), format!("goes back {seconds} s, to")),
            (PointId(points[0].id), "begins anew at".to_owned()),
            (latest.point, format!("goes forward {seconds} s, to")),
        ] {
            let job = world.change_point(VM, PointChoice::Point(point)).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Succeeded);
            let job = world.job(job.id).await;
            let note = job.steps.iter().flat_map(|step| &step.errors).next().unwrap();
            assert!(note.is_warning && note.code == "WritesDiscarded", "{note:?}");
            assert!(note.message.contains(&way) && note.message.contains(&point.to_string()), "{note:?}");
            assert!(note.message.contains("since its failover is discarded"), "{note:?}");
            let events =
                world.ask(|control| async move { control.db.events_after(None, 1000).await }).await.unwrap();
            assert!(events.iter().any(|event| event.code == note.code && event.description == note.message));
            world.settle().await;
        }
        world.check().await;
    });
}

#[test]
fn a_failover_is_cancelled_while_it_runs_and_not_when_it_is_done() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let gate = Arc::new(Semaphore::new(0));
        world.home.hypervisor.inject("shut_down", HostFault::Hang(gate.clone()), 1);
        let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
        world.home.hypervisor.wait_for_hang().await;
        let item = world.item(VM).await.unwrap();
        let cancelled =
            world.ask(move |control| async move { control.cancel_failover(&item).await }).await.unwrap();
        assert_eq!(cancelled.id, job.id);
        gate.add_permits(1);
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Cancelled));
        assert_eq!(world.phase(VM).await, Some(Phase::Protected));
        world.check().await;

        world.run(VM, Operation::UnplannedFailover).await;
        let item = world.item(VM).await.unwrap();
        let refused =
            world.ask(move |control| async move { control.cancel_failover(&item).await }).await.unwrap_err();
        let ControlError::NotAllowed { reason, allowed } = refused else { panic!("{refused}") };
        assert!(reason.contains("no failover"), "{reason}");
        assert!(allowed.contains(&Operation::Commit) && allowed.contains(&Operation::ChangeRecoveryPoint));
        world.check().await;
    });
}

#[test]
fn nothing_is_begun_where_recovery_vms_cannot_run() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.recovery.hypervisor.confine("AppArmor confines QEMU");
        let home_vm = world.home_vm(VM);
        for operation in [Operation::TestFailover, Operation::PlannedFailover, Operation::UnplannedFailover] {
            let job = world.begin(VM, operation).await.unwrap();
            assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Failed), "{operation:?}");
            let job = world.job(job.id).await;
            let error = job.steps[0].errors.last().expect("the check says why");
            assert_eq!(error.code, "InstantRecoveryUnavailable");
            assert!(error.message.contains("AppArmor confines QEMU"), "{error:?}");
            assert_eq!(world.phase(VM).await, Some(Phase::Protected));
            assert_eq!(world.home.hypervisor.view(home_vm).unwrap().power, PowerState::Running);
            world.check().await;
        }
        world.recovery.hypervisor.confine("");
        world.run(VM, Operation::UnplannedFailover).await;
        world.check().await;
    });
}

/// A description of a VM has its guest's addresses in it, so that whoever asks for one waits for the guest's agent.
#[test]
fn a_guest_that_answers_nobody_holds_up_no_cycle() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let never = Arc::new(Semaphore::new(0));
        world.home.hypervisor.inject("vm", HostFault::Hang(never), 100);
        world.write(VM, &[("vda", 3, 1)]).await;
        world.cycle(VM).await;
        world.check().await;
    });
}

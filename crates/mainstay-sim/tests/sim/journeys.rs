//! The tutorial's journey, and what happens on the way.

use std::sync::Arc;

use mainstay_model::{Ending, Operation, Phase};
use mainstay_provider::{ErrorKind, PowerState};
use mainstay_sim::{HostFault, JobEnd, World, WorldOptions, simulate};
use tokio::sync::Semaphore;

use crate::{
    support::{codes, log, pass},
    workflows::{VM, Workflow, finish_journey},
};

#[test]
fn the_tutorials_journey_loses_nothing() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.write(VM, &[("vda", 5, 1), ("vda", 60, 2), ("vdb", 16, 3)]).await;
        world.protect(VM).await;
        world.check().await;
        world.write(VM, &[("vda", 6, 4), ("vdb", 0, 5)]).await;
        world.cycle(VM).await;
        world.check().await;
        for operation in [Operation::TestFailover, Operation::TestFailoverCleanup] {
            world.run(VM, operation).await;
            world.check().await;
        }
        world.write(VM, &[("vda", 7, 6)]).await;
        world.run(VM, Operation::PlannedFailover).await;
        world.check().await;
        let copy = world.item(VM).await.unwrap().recovery_vm.unwrap().vm;
        let home_vm = world.item(VM).await.unwrap().vm;
        let home = world.home.hypervisor.disks_by_key(home_vm).await.unwrap();
        assert!(
            world.recovery.hypervisor.view(copy).unwrap().started_from.as_deref() == Some(&home),
            "nothing was lost"
        );

        world.write(VM, &[("vda", 7, 7), ("vdb", 16, 8)]).await;
        world.run(VM, Operation::Commit).await;
        world.check().await;
        world.write(VM, &[("vda", 8, 9)]).await;
        world.run(VM, Operation::Failback).await;
        world.check().await;
        assert_eq!(world.phase(VM).await, Some(Phase::FailbackCommitPending));
        let recovered = world.recovery.hypervisor.disks_by_key(copy).await.unwrap();
        let view = world.home.hypervisor.view(home_vm).unwrap();
        assert!(view.started_from.as_deref() == Some(&recovered), "home is what the recovery VM was");
        assert_eq!(view.power, PowerState::Running);

        world.write(VM, &[("vda", 9, 10)]).await;
        world.run(VM, Operation::Commit).await;
        world.check().await;
        world.write(VM, &[("vda", 10, 11)]).await;
        world.run(VM, Operation::ReverseReplicate).await;
        world.check().await;
        assert_eq!(world.phase(VM).await, Some(Phase::Protected));
        world.write(VM, &[("vda", 11, 12)]).await;
        world.cycle(VM).await;
        world.check().await;
        world.run(VM, Operation::DisableProtection).await;
        world.check().await;
        assert_eq!(world.phase(VM).await, None);
    });
}

/// Kills an agent while a call of its hypervisor is under way, and again after one was carried out and before anybody
/// heard of it. The job goes on with the agent's next run.
async fn kill_agent_within(workflow: Workflow, is_home: bool, methods: &[&'static str]) {
    log();
    for method in methods {
        for fault in [HostFault::Hang(Arc::new(Semaphore::new(0))), HostFault::HangAfter] {
            let mut world = World::new(WorldOptions::default()).await;
            workflow.prepare(&world).await;
            let host = if is_home { &world.home } else { &world.recovery };
            let hypervisor = host.hypervisor.clone();
            hypervisor.inject(method, fault, 1);
            let job = workflow.begin(&world).await;
            let complete = async {
                hypervisor.wait_for_hang().await;
            };
            // The call may come after a person was asked to go on.
            tokio::select! {
                () = complete => {}
                ending = world.complete(job.id) => panic!("{method} was not called: {ending:?}"),
            }
            world.restart_agent(is_home).await;
            let ending = world.complete(job.id).await;
            assert_eq!(ending, Ending::Succeeded, "{method}: {}", world.tell(job.id).await);
            world.settle().await;
            world.check().await;
            if workflow.operation() == Operation::Failback {
                world.check_failback(VM).await;
            }
            finish_journey(&world, VM, 0).await;
        }
    }
}

#[test]
fn home_agents_may_die_within_a_failback() {
    simulate(|| async {
        let methods = ["open_staging", "begin_capture", "commit_staging", "remove_trackers", "start_tracked"];
        kill_agent_within(Workflow::FailbackSynchronizedBefore, true, &methods).await;
    });
}

#[test]
fn recovery_agents_may_die_within_a_failback() {
    simulate(|| async {
        let methods = ["begin_capture", "confirm_tracker", "shut_down"];
        kill_agent_within(Workflow::FailbackSynchronizedBefore, false, &methods).await;
    });
}

#[test]
fn agents_may_die_within_a_planned_failover() {
    simulate(|| async {
        kill_agent_within(
            Workflow::PlannedFailover,
            true,
            &["begin_capture", "confirm_tracker", "shut_down"],
        )
        .await;
        kill_agent_within(Workflow::PlannedFailover, false, &["create_recovery_vm", "start"]).await;
    });
}

#[test]
fn agents_may_die_within_a_commit() {
    simulate(|| async {
        kill_agent_within(Workflow::CommitFailback, false, &["power_off", "remove_recovery_vm"]).await;
    });
}

#[test]
fn a_home_disk_that_somebody_changed_stops_the_failback() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        Workflow::FailbackSynchronizedBefore.prepare(&world).await;
        let job = world.fail_back(VM, true).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Suspended);
        let vm = world.item(VM).await.unwrap().vm;
        world.home.hypervisor.tamper(vm, "vda", 40, 77).unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Failed);
        assert!(world.tell(job.id).await.contains("were changed while"), "{}", world.tell(job.id).await);
        world.settle().await;
        world.check().await;
        // What was changed is found by comparing, and overwritten.
        finish_journey(&world, VM, 1).await;
    });
}

#[test]
fn a_home_vm_that_is_gone_is_made_anew() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        Workflow::FailbackSynchronizedBefore.prepare(&world).await;
        let vm = world.item(VM).await.unwrap().vm;
        world.home.hypervisor.destroy_vm(vm);
        world.run(VM, Operation::Failback).await;
        world.check_failback(VM).await;
        finish_journey(&world, VM, 1).await;
    });
}

/// libvirt would start a VM before any agent could ask: while it is protected only the agent starts it, and only when the
/// server says that it is the active copy.
#[test]
fn after_a_boot_only_the_active_copy_is_started() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let vm = world.item(VM).await.unwrap().vm;
        world.reboot(true).await;
        world.until("home runs again", async |world| world.write(VM, &[("vda", 9, 1)]).await).await;
        world.cycle(VM).await;
        world.check().await;

        world.cut(true);
        let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Succeeded);
        world.run(VM, Operation::Commit).await;
        world.reboot(true).await;
        world.reboot(false).await;
        world
            .until("the recovery VM runs again", async |world| world.write(VM, &[("vda", 9, 2)]).await)
            .await;
        assert_eq!(world.home.hypervisor.view(vm).unwrap().power, PowerState::Off);
        world.mend(true);
        world.settle().await;
        world.check().await;
        assert_eq!(world.home.hypervisor.view(vm).unwrap().power, PowerState::Off);
        let events =
            world.ask(|control| async move { control.db.events_after(None, 1000).await }).await.unwrap();
        let started = events.iter().filter(|event| event.code == "StartedAfterBoot").count();
        assert_eq!(started, 2, "{events:#?}");

        // Nobody is asked again about the boot of then.
        world.run(VM, Operation::Failback).await;
        world.run(VM, Operation::Commit).await;
        world.run(VM, Operation::ReverseReplicate).await;
        world.run(VM, Operation::DisableProtection).await;
        world.check().await;
        assert!(world.home.hypervisor.view(vm).unwrap().autostart, "as it was before protection");
    });
}

/// Home is lost with its host. The VM returns to another one; cancelled at first, which leaves nothing there.
#[test]
fn a_vm_returns_to_another_host() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions { has_spare: true, ..WorldOptions::default() }).await;
        world.protect(VM).await;
        let item = world.item(VM).await.unwrap();
        let (home, spare) = (world.home.provider, world.spare.as_ref().unwrap().provider);
        world.cut(true);
        let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Succeeded);
        world.run(VM, Operation::Commit).await;
        world.write(VM, &[("vda", 11, 7)]).await;

        let job = world.fail_back_to(VM, true, Some(spare)).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Suspended);
        assert_eq!(world.item(VM).await.unwrap().primary_provider, spare);
        world.ask(move |control| async move { control.cancel_job(job.id).await }).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Cancelled));
        let cancelled = world.item(VM).await.unwrap();
        assert_eq!((cancelled.primary_provider, cancelled.former_home), (home, None));
        assert!(world.spare.as_ref().unwrap().hypervisor.views().is_empty(), "the VM made for it is gone");
        world.check().await;

        let job = world.fail_back_to(VM, true, Some(spare)).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Succeeded);
        world.check_failback(VM).await;
        world.run(VM, Operation::Commit).await;
        assert!(!world.home.hypervisor.view(item.vm).unwrap().autostart);
        // The old host is back, with a copy that runs still: it was only cut off.
        assert_eq!(world.home.hypervisor.view(item.vm).unwrap().power, PowerState::Running);
        world.mend(true);
        world
            .until("the old host has let go", async |world| {
                world.item(VM).await.is_some_and(|item| item.stand_downs.is_empty())
            })
            .await;
        let old = world.home.hypervisor.view(item.vm).unwrap();
        assert_eq!((old.power, old.autostart, old.trackers), (PowerState::Off, false, 0));
        world.run(VM, Operation::ReverseReplicate).await;
        world.write(VM, &[("vda", 12, 8)]).await;
        // Somebody starts what was left on the old host: it is stopped, whichever copy is the active one.
        let stopped = async |world: &World, times: usize| {
            world.home.hypervisor.start_by_hand(item.vm).await.unwrap();
            world.until_old_copies_are_off(VM).await;
            let told = async |world: &World| {
                codes(world).await.iter().filter(|code| *code == "OldCopyStopped").count() == times
            };
            world.until("it is told that the copy was stopped", told).await;
            let (host, vm) = world.active(VM).await;
            assert_eq!(host.hypervisor.view(vm).unwrap().power, PowerState::Running);
        };
        stopped(&world, 1).await;
        // Moved back there live it runs once, and is left alone.
        let spare = &world.spare.as_ref().unwrap().hypervisor;
        spare.crash_vm(item.vm).unwrap();
        world.home.hypervisor.start_by_hand(item.vm).await.unwrap();
        for _ in 0..3 {
            world.ask(move |control| async move { control.refresh_provider(home).await }).await.unwrap();
            world.settle().await;
            assert_eq!(world.home.hypervisor.view(item.vm).unwrap().power, PowerState::Running);
        }
        world.home.hypervisor.crash_vm(item.vm).unwrap();
        spare.start_by_hand(item.vm).await.unwrap();
        world.cycle(VM).await;
        world.run(VM, Operation::PlannedFailover).await;
        stopped(&world, 2).await;
        world.run(VM, Operation::Commit).await;
        world.check().await;
    });
}

/// A VM that was moved live to another host of its site, behind our back, runs once: it is left alone, until it fails over.
#[test]
fn a_vm_that_moved_to_another_host_is_not_taken_for_an_old_copy() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions { has_spare: true, ..WorldOptions::default() }).await;
        world.protect(VM).await;
        let (vm, spare) = (world.home_vm(VM), world.spare.as_ref().unwrap());
        world.home.hypervisor.destroy_vm(vm);
        spare.hypervisor.add_vm(vm, VM, &[("vda", 64 * 4096), ("vdb", 16 * 4096 + 512)]);
        spare.hypervisor.start_by_hand(vm).await.unwrap();
        let look = async || {
            let host = spare.provider;
            world.ask(move |control| async move { control.refresh_provider(host).await }).await.unwrap();
            world.settle().await;
            spare.hypervisor.view(vm).unwrap().power
        };
        for _ in 0..3 {
            assert_eq!(look().await, PowerState::Running);
        }
        // Its former host is lost, and has not been told yet.
        world.cut(true);
        let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
        assert_eq!(world.complete(job.id).await, Ending::Succeeded);
        let host = spare.provider;
        world.ask(move |control| async move { control.refresh_provider(host).await }).await.unwrap();
        let is_off = async |_: &World| spare.hypervisor.view(vm).unwrap().power == PowerState::Off;
        world.until("the copy is off", is_off).await;
        assert!(!world.item(VM).await.unwrap().stand_downs.is_empty(), "it is the other host that was told");
    });
}

/// What runs twice at home is stopped only where home was before: of two others nobody knows which one is the older. Nor is a VM
/// started after a boot that runs elsewhere.
#[test]
fn the_active_copy_is_not_taken_for_an_old_one() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions { has_spare: true, ..WorldOptions::default() }).await;
        world.protect(VM).await;
        let vm = world.home_vm(VM);
        let spare = world.spare.as_ref().unwrap();
        spare.hypervisor.add_vm(vm, VM, &[("vda", 64 * 4096), ("vdb", 16 * 4096 + 512)]);
        spare.hypervisor.start_by_hand(vm).await.unwrap();
        let host = spare.provider;
        for _ in 0..3 {
            world.ask(move |control| async move { control.refresh_provider(host).await }).await.unwrap();
            world.settle().await;
            assert_eq!(world.spare.as_ref().unwrap().hypervisor.view(vm).unwrap().power, PowerState::Running);
        }
        world.reboot(true).await;
        let told = async |world: &World| codes(world).await.iter().any(|code| code == "StartAfterBootFailed");
        world.until("it is told that the VM runs elsewhere", told).await;
        assert_eq!(world.home.hypervisor.view(vm).unwrap().power, PowerState::Off);
        world.spare.as_ref().unwrap().hypervisor.crash_vm(vm).unwrap();
        world.ask(move |control| async move { control.refresh_provider(host).await }).await.unwrap();
        world.clock.advance_ms(31_000);
        world.control().changed.notify_waiters();
        let runs = async |world: &World| world.home.hypervisor.view(vm).unwrap().power == PowerState::Running;
        world.until("the VM is started once it runs nowhere else", runs).await;
    });
}

/// Its network may come up later than its host, or never.
#[test]
fn the_health_says_that_a_vm_is_off_since_its_hosts_boot() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.home.hypervisor.inject("start", HostFault::Fail(ErrorKind::Failed), 100);
        world.reboot(true).await;
        let says_so = async |world: &World| {
            pass(world, 31_000).await;
            let errors = world
                .ask(|control| async move {
                    let item = control.db.items().await.unwrap()[0].clone();
                    control.item_health(&item).await.unwrap().1
                })
                .await;
            let mut errors = errors.iter().filter(|error| error.code == "StartAfterBootFailed");
            errors.any(|error| error.message.contains("an injected fault"))
        };
        world.until("its health says so", says_so).await;
        // Not after a failover, whatever its old host could not do.
        world.cut(true);
        world.run(VM, Operation::UnplannedFailover).await;
        assert!(!says_so(&world).await);
        world.home.hypervisor.clear_faults();
        world.mend(true);
        let is_forgotten = async |world: &World| world.item(VM).await.unwrap().not_started.is_none();
        world.until("the old host has been answered", is_forgotten).await;
        let home = world.home_vm(VM);
        assert_eq!(world.home.hypervisor.view(home).unwrap().power, PowerState::Off);
        world.settle().await;
        world.check().await;
    });
}

#[test]
fn a_vm_that_its_administrator_starts_after_a_boot_is_well_again() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.home.hypervisor.inject("start", HostFault::Fail(ErrorKind::Failed), 100);
        world.reboot(true).await;
        let is_noted = async |world: &World, is: bool| {
            pass(world, 31_000).await;
            world.item(VM).await.unwrap().not_started.is_some() == is
        };
        world.until("it is noted", async |world| is_noted(world, true).await).await;
        world.home.hypervisor.start_by_hand(world.home_vm(VM)).await.unwrap();
        world.home.hypervisor.clear_faults();
        world.until("it is well", async |world| is_noted(world, false).await).await;
        world.settle().await;
        world.check().await;
    });
}

/// The recovery VM is off and its disks are still in the store, which is about to forget them.
#[test]
fn disabling_waits_for_the_disks_of_a_vm_that_is_off() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.recovery.hypervisor.inject("hydrate", HostFault::Fail(ErrorKind::Failed), 1_000);
        world.run(VM, Operation::UnplannedFailover).await;
        let item = world.item(VM).await.unwrap();
        let copy = item.recovery_vm.unwrap().vm;
        let expected = world.recovery.hypervisor.disks(copy).await.unwrap();
        world.recovery.hypervisor.crash_vm(copy).unwrap();
        world.recovery.hypervisor.clear_faults();
        world.run(VM, Operation::DisableProtection).await;
        world.check().await;
        assert!(
            world.recovery.hypervisor.disks(copy).await.unwrap() == expected,
            "all bytes are there without a store"
        );
        let home = world.home.hypervisor.view(item.vm).unwrap();
        assert!(!home.autostart, "the old copy must not come up beside the active one");
        assert!(world.recovery.hypervisor.view(copy).unwrap().autostart, "as it was at home");
    });
}

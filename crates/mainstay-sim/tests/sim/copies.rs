//! Copies that somebody starts although another one is active.

use std::sync::Arc;

use mainstay_control::reconcilers::OldCopies;
use mainstay_model::{Ending, Generation, Health, Operation, ProviderId, VmId};
use mainstay_provider::{
    CommitHome, CreateRecoveryVm, DiscardHome, ErrorKind, Hydrate, Hypervisor as _, NoProgress, PowerOffVm,
    PowerState, RemoveRecoveryVm, ShutDownVm, SiteOperation, StageHome, StandDown, StartVm, StoodDown,
    VerifyHome, VmDefinition, WhenOff, call,
};
use mainstay_replication::{Access, RefusalKind, SessionKind};
use mainstay_sim::{Host, HostFault, World, WorldOptions, moment, simulate};
use tokio::sync::Semaphore;

use crate::{
    support::{codes, log, pass},
    workflows::VM,
};

async fn started(world: &World, host: &Host) {
    let vm = world.item(VM).await.unwrap().inactive_vm_at(host.provider).unwrap();
    host.hypervisor.start_by_hand(vm).await.unwrap();
}

/// It is told a moment after the copy was stopped, how often that happened.
async fn until_told(world: &World, times: usize) {
    let told = async |world: &World| {
        codes(world).await.iter().filter(|code| *code == "OldCopyStopped").count() == times
    };
    world.until("it is told that a copy was stopped", told).await;
}

#[test]
fn a_copy_that_is_not_the_active_one_is_stopped_on_either_side() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.run(VM, Operation::UnplannedFailover).await;
        started(&world, &world.home).await;
        world.until_old_copies_are_off(VM).await;
        world.check().await;
        until_told(&world, 1).await;
        world.run(VM, Operation::Commit).await;
        world.run(VM, Operation::Failback).await;
        started(&world, &world.recovery).await;
        world.until_old_copies_are_off(VM).await;
        world.check().await;
        until_told(&world, 2).await;
        // The active one was not mistaken for it.
        let (host, vm) = world.active(VM).await;
        assert_eq!(host.hypervisor.view(vm).unwrap().power, PowerState::Running);
        world.run(VM, Operation::Commit).await;
        world.check().await;
    });
}

/// A host whose agent has lost its records knows nothing of the item. Its VM is stopped after a failover all the same.
#[test]
fn a_host_that_has_lost_its_records_stops_its_old_copy() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.cut(true);
        world.run(VM, Operation::UnplannedFailover).await;
        std::fs::remove_dir_all(world.home.data_dir.join("items")).unwrap();
        world.restart_agent(true).await;
        world.mend(true);
        world.until_old_copies_are_off(VM).await;
        let told = async |world: &World| codes(world).await.iter().any(|code| code == "SourceStoodDown");
        world.until("it is told that the old copy was stopped", told).await;
        started(&world, &world.home).await;
        world.until_old_copies_are_off(VM).await;
        until_told(&world, 1).await;
        let (host, vm) = world.active(VM).await;
        assert_eq!(host.hypervisor.view(vm).unwrap().power, PowerState::Running);
    });
}

#[test]
fn where_copies_are_reported_they_run_on() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.control().old_copies.set(OldCopies::Report).unwrap();
        world.protect(VM).await;
        world.run(VM, Operation::UnplannedFailover).await;
        started(&world, &world.home).await;
        let health = async || {
            world
                .ask(|control| async move {
                    let item = control.db.items().await.unwrap()[0].clone();
                    control.item_health(&item).await.unwrap()
                })
                .await
        };
        let reported = async |is_running: bool| {
            world.clock.advance_ms(31_000);
            world.control().changed.notify_waiters();
            let noted = async |world: &World| world.item(VM).await.unwrap().old_copy.is_some() == is_running;
            world.until("the copy was reported", noted).await;
        };
        reported(true).await;
        let (level, errors, _) = health().await;
        assert_eq!((level, errors[0].code.as_str()), (Health::Critical, "OldCopyRuns"));
        let vm = world.home_vm(VM);
        assert_eq!(world.home.hypervisor.view(vm).unwrap().power, PowerState::Running);
        world.home.hypervisor.power_off(vm).await.unwrap();
        reported(false).await;
        assert_eq!(health().await.0, Health::Normal);
        let codes = codes(&world).await;
        for code in ["OldCopyRuns", "OldCopyOff"] {
            assert!(codes.iter().any(|found| found == code), "{codes:?}");
        }
    });
}

/// What a host says of its generation lets it write no more than what it is: the active side, in a generation that there was.
#[test]
fn recovery_points_come_from_the_active_side_alone_whatever_a_host_says() {
    simulate(|| async {
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let (home, recovery) = (world.home.provider, world.recovery.provider);
        let stranger = ProviderId(uuid::Uuid::from_u128(7));
        let may = async |who: ProviderId, kind: SessionKind| {
            let access = Access { replica: world.item(VM).await.unwrap().id.0, kind };
            world.ask(move |control| async move { control.authorize(who, access).await }).await
        };
        let write = |generation| SessionKind::Replicate { generation };
        for operation in [None, Some(Operation::UnplannedFailover), Some(Operation::Commit)] {
            if let Some(operation) = operation {
                world.run(VM, operation).await;
            }
            let item = world.item(VM).await.unwrap();
            let (active, other) = if operation.is_none() { (home, recovery) } else { (recovery, home) };
            let current = item.state.generation.0;
            let fenced = Err(RefusalKind::Fenced { current });
            assert_eq!(may(active, write(current)).await, Ok(()), "{operation:?}");
            for ahead in [current + 1, u64::MAX] {
                assert_eq!(may(active, write(ahead)).await, fenced, "{operation:?}");
            }
            for claimed in [0, current.saturating_sub(1), current, current + 1, u64::MAX] {
                assert_eq!(may(other, write(claimed)).await, fenced, "{operation:?}");
                assert_eq!(
                    may(stranger, write(claimed)).await,
                    Err(RefusalKind::NotAuthorized),
                    "{operation:?}"
                );
            }
            for kind in [SessionKind::Mount, SessionKind::Fetch, SessionKind::Outcome] {
                assert_eq!(
                    (may(home, kind).await, may(recovery, kind).await),
                    (Ok(()), Ok(())),
                    "{operation:?}"
                );
                assert_eq!(may(stranger, kind).await, Err(RefusalKind::NotAuthorized), "{operation:?}");
            }
        }
    });
}

/// The recovery VM runs on, and nothing has started the old copy at home since then.
fn check_copies_as_they_were(world: &World, copy: VmId, since: u64) {
    let home = world.home_vm(VM);
    assert_eq!(world.recovery.hypervisor.view(copy).unwrap().power, PowerState::Running);
    assert_eq!(world.home.hypervisor.view(home).unwrap().power, PowerState::Off);
    assert!(!world.home.hypervisor.has_started(home, since), "an old copy was started");
}

/// What the server's machine knew before a failover is all that it knows after its snapshot was taken back: neither its database
/// nor its store have heard of the failover, and only the hosts know better.
#[test]
fn a_server_that_is_set_back_together_with_its_store_starts_and_removes_nothing() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.write(VM, &[("vda", 5, 1)]).await;
        world.cycle(VM).await;
        let snapshot = world.take_server_snapshot().await;
        let since = moment();
        world.run(VM, Operation::UnplannedFailover).await;
        world.write(VM, &[("vda", 6, 2)]).await;
        let copy = world.active(VM).await.1;
        world.revert_server(&snapshot).await;
        let is_told = async |world: &World| {
            pass(world, 5_000).await;
            let error = world.item(VM).await.unwrap().replication.last_error;
            error.is_some_and(|error| error.code == "Fenced" && error.remedy.contains("set back"))
        };
        world.until("it is told that the hosts know better", is_told).await;
        // Nor does the name of the VM that it does not know stand in the way.
        let mut target = world.item(VM).await.unwrap().target;
        target.name = "another".to_owned();
        world.update_target(VM, target).await;
        // Whatever is asked of it, and however often, ends by what a host says; also where home cannot say anything.
        let operations = [Operation::PlannedFailover, Operation::UnplannedFailover, Operation::Resynchronize];
        let answered = operations.into_iter().chain(operations).map(|operation| (operation, false));
        for (operation, is_cut) in answered.chain([(Operation::UnplannedFailover, true)]) {
            if is_cut {
                world.cut(true);
            }
            let job = world.begin(VM, operation).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Failed, "{operation:?}");
            let told = world.tell(job.id).await;
            assert!(told.contains("generation 2"), "{operation:?}: {told}");
            world.mend(true);
            assert_eq!(world.item(VM).await.unwrap().state.generation, Generation(1));
        }
        check_copies_as_they_were(&world, copy, since);
    });
}

/// Set back into the middle of a planned failover that went well, the server goes on with it, finds that it cannot, and would
/// start the source again.
#[test]
fn a_server_that_is_set_back_into_a_failover_does_not_start_the_source_again() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let gate = Arc::new(Semaphore::new(0));
        world.home.hypervisor.inject("shut_down", HostFault::Hang(gate.clone()), 1);
        let job = world.begin(VM, Operation::PlannedFailover).await.unwrap();
        world.home.hypervisor.wait_for_hang().await;
        let snapshot = world.take_server_snapshot().await;
        gate.add_permits(1);
        assert_eq!(world.complete(job.id).await, Ending::Succeeded);
        world.settle().await;
        world.write(VM, &[("vda", 6, 2)]).await;
        let (copy, since) = (world.active(VM).await.1, moment());
        world.revert_server(&snapshot).await;
        assert_eq!(world.complete(job.id).await, Ending::Failed, "{}", world.tell(job.id).await);
        let told = world.tell(job.id).await;
        assert!(told.contains("was overtaken by generation"), "{told}");
        assert!(codes(&world).await.iter().any(|code| code == "ServerSetBack"));
        check_copies_as_they_were(&world, copy, since);
    });
}

#[test]
fn a_host_refuses_orders_of_a_generation_that_was_overtaken() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let (item, before) =
            (world.item(VM).await.unwrap().id, world.item(VM).await.unwrap().state.generation);
        world.run(VM, Operation::UnplannedFailover).await;
        let (vm, point) =
            (world.active(VM).await.1, world.item(VM).await.unwrap().recovery_vm.unwrap().point);
        let create = |vm, generation| CreateRecoveryVm {
            item,
            generation,
            vm,
            point,
            name: "another".to_owned(),
            is_test: false,
            definition: VmDefinition(Vec::new()),
            disks: Vec::new(),
            vcpus: None,
            memory_bytes: None,
            nics: Vec::new(),
            autostart: false,
        };
        let generation = before;
        let orders: Vec<SiteOperation> = vec![
            StartVm { item, generation, vm }.into(),
            PowerOffVm { item: Some(item), generation, vm }.into(),
            ShutDownVm { item, generation, vm, timeout_ms: 1 }.into(),
            RemoveRecoveryVm { item, generation, vm }.into(),
            Hydrate { item, generation, vm, when_off: WhenOff::Wait }.into(),
            StageHome { item, generation, vm, to: point, disks: Vec::new(), full: true }.into(),
            VerifyHome { item, generation, vm, to: point }.into(),
            CommitHome { item, vm, generation, to: point, definition: VmDefinition(Vec::new()) }.into(),
            DiscardHome { item, generation, vm }.into(),
            create(vm, generation).into(),
            // A second recovery VM beside the one that the host has, in whatever generation.
            create(VmId(uuid::Uuid::from_u128(9)), generation.next()).into(),
            create(VmId(uuid::Uuid::from_u128(9)), generation.next().next()).into(),
        ];
        let recovery = world.recovery.provider;
        for order in orders {
            let said = format!("{order:?}");
            let answer = world
                .ask(move |control| async move {
                    control.sites.get(recovery).unwrap().perform(order, &NoProgress).await
                })
                .await;
            assert_eq!(answer.unwrap_err().kind, ErrorKind::Fenced, "{said}");
        }
        // One to stand down is no refusal, but an answer: whoever gave it must not go on as if it had been obeyed.
        let order = StandDown { item, generation, stop_vm: true, vm: Some(vm) };
        let answer = world
            .ask(move |control| async move {
                call(&*control.sites.get(recovery).unwrap(), order, &NoProgress).await
            })
            .await;
        assert_eq!(answer, Ok(StoodDown { was_stopped: false, is_overtaken: true }));
        assert_eq!(world.recovery.hypervisor.view(vm).unwrap().power, PowerState::Running);
        world.settle().await;
        world.check().await;
    });
}

/// The VM has come home since, so that only home knows better. It runs, and goes on running.
#[test]
fn a_server_that_is_set_back_to_before_a_failback_stops_nothing_at_home() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let snapshot = world.take_server_snapshot().await;
        for operation in [
            Operation::UnplannedFailover,
            Operation::Commit,
            Operation::Failback,
            Operation::Commit,
            Operation::ReverseReplicate,
        ] {
            world.run(VM, operation).await;
        }
        world.revert_server(&snapshot).await;
        for operation in [Operation::UnplannedFailover, Operation::PlannedFailover] {
            let job = world.begin(VM, operation).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Failed, "{operation:?}");
            let told = world.tell(job.id).await;
            assert!(told.contains("was overtaken by generation"), "{operation:?}: {told}");
        }
        let home = world.home.hypervisor.view(world.home_vm(VM)).unwrap();
        assert_eq!(home.power, PowerState::Running);
        assert_eq!(world.recovery.hypervisor.views().len(), 0, "a recovery VM was made");
        // Replication could be disabled, and enabled anew.
        world.run(VM, Operation::DisableProtection).await;
        world.protect(VM).await;
        world.check().await;
    });
}

/// The VM has come back to a host that was to let go of it. What the server still has of that order is older than the return.
#[test]
fn a_server_that_is_set_back_to_before_a_return_leaves_the_host_its_records() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions { has_spare: true, ..WorldOptions::default() }).await;
        world.protect(VM).await;
        let (home, spare) = (world.home.provider, world.spare.as_ref().unwrap().provider);
        let return_to = async |world: &World, host| {
            let job = world.fail_back_to(VM, true, Some(host)).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
            world.run(VM, Operation::Commit).await;
        };
        world.cut(true);
        world.run(VM, Operation::UnplannedFailover).await;
        world.run(VM, Operation::Commit).await;
        return_to(&world, spare).await;
        let ordered = world.item(VM).await.unwrap().stand_downs;
        assert!(ordered.iter().any(|order| order.provider == home && order.is_final), "{ordered:?}");
        let snapshot = world.take_server_snapshot().await;
        world.mend(true);
        let has_let_go = async |world: &World| world.item(VM).await.unwrap().stand_downs.is_empty();
        world.until("the old host has let go", has_let_go).await;
        for operation in [Operation::ReverseReplicate, Operation::PlannedFailover, Operation::Commit] {
            world.run(VM, operation).await;
        }
        return_to(&world, home).await;
        let vm = world.active(VM).await.1;
        let items = world.home.data_dir.join("items");
        let records = || std::fs::read_dir(&items).unwrap().count();
        assert_eq!(records(), 1);
        world.revert_server(&snapshot).await;
        let is_told = async |world: &World| codes(world).await.iter().any(|code| code == "ServerSetBack");
        world.until("it is told that the server was set back", is_told).await;
        world.until("the order is done with", has_let_go).await;
        assert_eq!(records(), 1, "the host has lost the record of the VM that lives there");
        assert_eq!(world.home.hypervisor.view(vm).unwrap().power, PowerState::Running);
    });
}

/// It knows of a failover that this server does not, at whichever step it says so: what follows would be a second one.
#[test]
fn an_unplanned_failover_ends_where_its_source_knows_of_a_later_one() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        for method in ["shut_down", "begin_capture"] {
            world.home.hypervisor.inject(method, HostFault::Fail(ErrorKind::Fenced), 1);
            let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Failed, "{method}");
            let told = world.tell(job.id).await;
            assert!(told.contains(&format!("{method}: an injected fault")), "{told}");
            let (host, vm) = world.active(VM).await;
            assert_eq!(host.provider, world.home.provider, "{method}");
            assert_eq!(host.hypervisor.view(vm).unwrap().power, PowerState::Running, "{method}");
            assert!(world.recovery.hypervisor.views().is_empty(), "{method}: a recovery VM was made");
            world.settle().await;
            world.check().await;
        }
    });
}

//! Disks that grow while their VM is protected.

use mainstay_control::workflows::{FailoverParams, PointChoice};
use mainstay_model::{Ending, Operation};
use mainstay_sim::{World, WorldOptions, simulate};

use crate::{
    support::{codes, log},
    workflows::VM,
};

/// Sectors, and no whole blocks: the last block of the disk, which is a piece, grows with it.
const GROWTH_BYTES: u64 = 9 * 512;

async fn grow(world: &World) {
    let (host, vm) = world.active(VM).await;
    let grown = async |_: &World| host.hypervisor.grow_disk(vm, "vdb", GROWTH_BYTES).is_ok();
    // Refused while it is captured.
    world.until("the disk has grown", grown).await;
}

#[test]
fn a_disk_grows_on_either_side_and_nothing_is_lost_on_the_way() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.write(VM, &[("vdb", 16, 1)]).await;
        world.protect(VM).await;
        grow(&world).await;
        world.cycle(VM).await;
        world.check().await;
        world.write(VM, &[("vdb", 17, 2)]).await;
        world.cycle(VM).await;
        world.check().await;
        world.run(VM, Operation::PlannedFailover).await;
        world.check().await;
        world.check_planned_failover(VM).await;
        world.run(VM, Operation::Commit).await;
        grow(&world).await;
        world.write(VM, &[("vdb", 18, 3), ("vda", 5, 4)]).await;
        world.run(VM, Operation::Failback).await;
        world.check().await;
        world.check_failback(VM).await;
        world.run(VM, Operation::Commit).await;
        world.run(VM, Operation::ReverseReplicate).await;
        world.write(VM, &[("vdb", 18, 5)]).await;
        world.cycle(VM).await;
        world.check().await;
    });
}

/// A disk that is added is told of once and listed, as long as it is there; what is replicated stays the same.
#[test]
fn a_disk_that_is_added_is_told_of() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let (home, vm) = (&world.home.hypervisor, world.home_vm(VM));
        home.add_disk(vm, "vdc", 8 * 4096).unwrap();
        let refresh = async || {
            let host = world.home.provider;
            world.ask(move |control| async move { control.refresh_provider(host).await }).await.unwrap();
            let disks = world.item(VM).await.unwrap().disks;
            disks.into_iter().map(|disk| (disk.key, disk.is_included)).collect::<Vec<_>>()
        };
        let listed = |disks: &[(&str, bool)]| {
            disks.iter().map(|(key, is)| ((*key).to_owned(), *is)).collect::<Vec<_>>()
        };
        for _ in 0..2 {
            assert_eq!(refresh().await, listed(&[("vda", true), ("vdb", true), ("vdc", false)]));
        }
        assert_eq!(codes(&world).await.iter().filter(|code| *code == "DiskAdded").count(), 1);
        world.write(VM, &[("vda", 5, 4)]).await;
        world.cycle(VM).await;
        world.check().await;
        home.detach_disk(vm, "vdc").unwrap();
        assert_eq!(refresh().await, listed(&[("vda", true), ("vdb", true)]));
        world.run(VM, Operation::PlannedFailover).await;
        world.check_planned_failover(VM).await;
    });
}

/// What was behind the new end is gone for good: it does not come back when the disk grows again.
#[test]
fn a_disk_shrinks_and_what_was_behind_its_end_stays_gone() {
    simulate(|| async {
        log();
        for grows_again in [false, true] {
            let world = World::new(WorldOptions::default()).await;
            assert!(world.write(VM, &[("vdb", 15, 1), ("vdb", 12, 2)]).await);
            world.protect(VM).await;
            let (home, vm) = (&world.home.hypervisor, world.home_vm(VM));
            let blocks = 5;
            home.shrink_disk(vm, "vdb", blocks * 4096).unwrap();
            world.cycle(VM).await;
            world.check().await;
            if grows_again {
                home.grow_disk(vm, "vdb", blocks * 4096).unwrap();
                world.cycle(VM).await;
                world.check().await;
            }
            world.run(VM, Operation::PlannedFailover).await;
            world.check_planned_failover(VM).await;
            world.run(VM, Operation::Commit).await;
            world.write(VM, &[("vdb", 3, 4), ("vda", 5, 4)]).await;
            world.run(VM, Operation::Failback).await;
            world.check_failback(VM).await;
            world.check().await;
        }
    });
}

/// Home is larger than the point that was failed over to, and holds something behind it: in the replica, and not yet in it.
#[test]
fn a_disk_that_has_grown_since_the_recovery_point_comes_home() {
    simulate(|| async {
        log();
        for (synchronize_before, is_replicated) in [(true, true), (true, false), (false, true)] {
            let world = World::new(WorldOptions::default()).await;
            world.write(VM, &[("vdb", 16, 1)]).await;
            world.protect(VM).await;
            let before = world.item(VM).await.unwrap().replication.last_point.unwrap();
            grow(&world).await;
            assert!(world.write(VM, &[("vdb", 17, 2), ("vdb", 2, 3)]).await, "the disk has a block more");
            if is_replicated {
                world.cycle(VM).await;
            }
            let point = PointChoice::Point(before);
            let params = FailoverParams { point, shutdown_source: false, shutdown_timeout_ms: 1_000 };
            let job = world.fail_over(VM, params).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Succeeded);
            world.settle().await;
            world.run(VM, Operation::Commit).await;
            world.write(VM, &[("vdb", 3, 4), ("vda", 5, 4)]).await;
            let job = world.fail_back(VM, synchronize_before).await.unwrap();
            assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{}", world.tell(job.id).await);
            world.settle().await;
            world.check().await;
            world.check_failback(VM).await;
            world.run(VM, Operation::Commit).await;
            world.run(VM, Operation::ReverseReplicate).await;
            // What was there before must not be taken for replicated.
            assert!(world.write(VM, &[("vdb", 17, 2)]).await, "the disk has kept its size");
            world.cycle(VM).await;
            world.check().await;
        }
    });
}

/// A VM that dies while it is described has disks of which nothing is known, not disks without a byte.
#[test]
fn sizes_that_are_not_known_for_a_moment_cost_a_moment() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.write(VM, &[("vda", 16, 1)]).await;
        world.protect(VM).await;
        let mut operations = [Operation::PlannedFailover, Operation::Failback].into_iter();
        for block in [3, 4] {
            world.write(VM, &[("vda", block, 2)]).await;
            for host in [&world.home, &world.recovery] {
                host.hypervisor.withhold_sizes(1);
            }
            world.run(VM, operations.next().unwrap()).await;
            world.check().await;
            world.run(VM, Operation::Commit).await;
        }
    });
}

//! Disks that grow while their VM is protected.

use mainstay_model::Operation;
use mainstay_sim::{World, WorldOptions};

use crate::{support::log, workflows::VM};

/// Sectors, and no whole blocks: the last block of the disk, which is a piece, grows with it.
const GROWTH_BYTES: u64 = 9 * 512;

async fn grow(world: &World) {
    let (host, vm) = world.active(VM).await;
    let grown = async |_: &World| host.hypervisor.grow_disk(vm, "vdb", GROWTH_BYTES).is_ok();
    // Refused while it is captured.
    world.until("the disk has grown", grown).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_disk_grows_on_either_side_and_nothing_is_lost_on_the_way() {
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
}

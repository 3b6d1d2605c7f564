//! The tutorial's journey, and what happens on the way.

use mainstay_model::{Operation, Phase};
use mainstay_provider::PowerState;
use mainstay_sim::{World, WorldOptions};

use crate::support::log;

const VM: &str = "web";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_tutorials_journey_loses_nothing() {
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
    let home = world.home.hypervisor.disks(home_vm).await.unwrap();
    assert!(world.recovery.hypervisor.view(copy).unwrap().started_from == Some(home), "nothing was lost");

    world.write(VM, &[("vda", 7, 7), ("vdb", 16, 8)]).await;
    world.run(VM, Operation::Commit).await;
    world.check().await;
    world.write(VM, &[("vda", 8, 9)]).await;
    world.run(VM, Operation::Failback).await;
    world.check().await;
    assert_eq!(world.phase(VM).await, Some(Phase::FailbackCommitPending));
    let recovered = world.recovery.hypervisor.disks(copy).await.unwrap();
    let view = world.home.hypervisor.view(home_vm).unwrap();
    assert!(view.started_from == Some(recovered), "home is what the recovery VM was");
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
}

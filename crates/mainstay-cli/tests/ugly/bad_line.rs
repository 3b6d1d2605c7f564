//! The journey over a long, bad line between the sites, which is cut now and then.

use std::time::Duration;

use anyhow::{Result, ensure};
use mainstay_lab::{Badness, FAR, HOME, RECOVERY, Wan};

use crate::support::{World, eventually};

/// A round trip of 150 ms, on which one packet of twenty is lost in each direction.
const BADNESS: Badness = Badness { delay: Duration::from_millis(75), loss_percent: 5, seed: 1 };

#[test]
fn the_journey_over_a_bad_line_loses_nothing() {
    if !mainstay_lab::can_make_a_wan() {
        println!("left out: /dev/net/tun cannot be opened here, so no line can be made");
        return;
    }
    mainstay_lab::run_in_own_network("bad_line::the_journey_over_a_bad_line").unwrap();
}

/// Cuts the line in the middle of a transfer, and brings it back.
async fn cut_a_transfer(world: &World) -> Result<()> {
    eventually("a transfer is under way", async || {
        let cycle = world.status("vm1").await?.cycle;
        ensure!(cycle.as_ref().is_some_and(|cycle| cycle.bytes_moved > 0), "it is {cycle:?}");
        Ok(())
    })
    .await?;
    world.lab.cut(HOME).await?;
    world.lab.heal(HOME).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs within the_journey_over_a_bad_line_loses_nothing"]
async fn the_journey_over_a_bad_line() -> Result<()> {
    let wan = Wan::open(BADNESS)?;
    let mut world = World::up_with("bad-line", Some(FAR)).await?;
    let mut vm = world.guest("vm1", "ledger.rate=10")?;
    vm.disk_mib = 64;
    world.protect(&vm).await?;
    for _ in 0..3 {
        cut_a_transfer(&world).await?;
        world.wait_point("vm1").await?;
    }
    world.wait_item("vm1", "is well", |item| item["replicationHealth"] == "Normal").await?;

    let before = world.whole("vm1", HOME).await?;
    world.cli(&["planned-failover", "vm1", "--direction", "PrimaryToRecovery"]).expect(0);
    let moved = world.whole("vm1", RECOVERY).await?;
    ensure!(moved.last >= before.acknowledged, "{before:?}, {moved:?}");
    world.cli(&["commit", "vm1"]).expect(0);

    world.bring_home("vm1").await?;

    let (passed, lost) = wan.packets();
    ensure!(lost > 0 && lost * 10 < passed, "{lost} packets were lost, {passed} passed");
    world.proved()
}

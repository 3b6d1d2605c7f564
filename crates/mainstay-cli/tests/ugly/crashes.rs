//! QEMU, agents and daemons die: nothing is transferred that is there already, and the guest does not notice.

use anyhow::{Result, ensure};
use mainstay_lab::{DiskImage, HOME, LabAction};

use crate::support::{World, eventually};

const MIB: u64 = 1 << 20;
/// Incompressible bytes that are replicated before anything breaks: a full copy moves them again.
const CONTENT_MIB: u64 = 24;
/// What is under way when the agent dies.
const DELTA_MIB: u64 = 8;

/// Waits until a transfer is in its middle.
async fn wait_for_transfer(world: &World, bytes: u64) -> Result<()> {
    eventually("a transfer is under way", async || {
        let cycle = world.status("vm1").await?.cycle;
        ensure!(cycle.as_ref().is_some_and(|cycle| cycle.bytes_moved >= bytes), "it is {cycle:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_only_the_difference_is_transferred() -> Result<()> {
    let mut world = World::up("crashes").await?;
    let mut vm = world.guest("vm1", "ledger.rate=20")?;
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.disk_mib = 128;
    world.protect(&vm).await?;
    world.write_random("vm1", "content", CONTENT_MIB).await?;
    world.wait_point("vm1").await?;
    // A point is listed a moment before what it moved is counted.
    let moved = eventually("what was written is counted", async || {
        let moved = world.status("vm1").await?.bytes_moved;
        ensure!(moved > CONTENT_MIB * MIB, "{moved} bytes were moved");
        Ok(moved)
    })
    .await?;

    // Kill -9 of QEMU: the bitmaps are gone with it, and the hashes tell what differs.
    let told_before = world.events("Resynchronized")?.len();
    world.lab_cli(&["kill", "vm:vm1"]).expect(0);
    eventually("the VM starts", async || {
        ensure!(world.lab_cli(&["start", "vm:vm1"]).code == 0);
        Ok(())
    })
    .await?;
    world.wait_event("Resynchronized", "the tracker").await?;
    world.wait_point("vm1").await?;
    let after = world.status("vm1").await?.bytes_moved;
    assert!(after - moved < CONTENT_MIB * MIB / 2, "{} bytes were moved after the crash", after - moved);
    assert!(world.events("Resynchronized")?.len() > told_before);
    world.whole("vm1", HOME).await?;

    agents_and_daemons_die(&mut world).await?;
    world.proved()
}

async fn agents_and_daemons_die(world: &mut World) -> Result<()> {
    let told = world.events("Resynchronized")?.len();
    for (round, victims) in [
        vec![(LabAction::Stop, "agent:home")],
        vec![(LabAction::Kill, "agent:home")],
        vec![(LabAction::Kill, "agent:home"), (LabAction::Kill, "hypervisor:home")],
    ]
    .into_iter()
    .enumerate()
    {
        let before = world.status("vm1").await?.bytes_moved;
        world.lab.slow(HOME, MIB).await?;
        world.lab.wait_connected(HOME).await?;
        world.write_random("vm1", &format!("delta{round}"), DELTA_MIB).await?;
        wait_for_transfer(world, 2 * MIB).await?;
        for (action, victim) in &victims {
            world.lab.act(*action, victim).await?;
        }
        // VMs need neither.
        world.writes_on("vm1").await?;
        world.lab.heal(HOME).await?;
        // The agent first: it must not depend on libvirt being there already.
        for (_, victim) in &victims {
            world.lab.act(LabAction::Start, victim).await?;
        }
        world.lab.wait_connected(HOME).await?;
        world.wait_point("vm1").await?;
        let moved = world.status("vm1").await?.bytes_moved - before;
        // Once the change and what the ledger wrote meanwhile; not the content, and not the change twice over.
        assert!(moved >= DELTA_MIB * MIB, "round {round}: only {moved} bytes were moved");
        assert!(moved < DELTA_MIB * MIB * 2, "round {round}: {moved} bytes were moved");
        world.wait_item("vm1", "is well", |item| item["replicationHealth"] == "Normal").await?;
        world.whole("vm1", HOME).await?;
    }
    assert_eq!(world.events("Resynchronized")?.len(), told, "trackers did not survive the agent");
    Ok(())
}

//! A hypervisor that answers nothing: its daemon is stopped, its VMs run on.

use anyhow::{Result, ensure};
use mainstay_lab::{LabAction, RECOVERY};

use crate::support::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hypervisor_that_hangs_at_home_keeps_nobody_from_recovering() -> Result<()> {
    let mut world = World::up("hang").await?;
    let vm = world.guest("vm1", "ledger.rate=20")?;
    world.protect(&vm).await?;
    world.lab.act(LabAction::Pause, "hypervisor:home").await?;

    // What concerns the recovery site alone goes on.
    world.cli(&["test-failover", "vm1"]).expect(0);
    world.cli(&["cleanup-test-failover", "vm1"]).expect(0);
    // A failover does without what hangs, asks it once, and says what may be lost.
    let told = world.cli(&["failover", "vm1", "--shutdown-source"]).expect(0);
    told.says("the question whether the VM runs").says("the last changes were not asked for");
    world.wait_event("DataMayBeLost", "may be lost").await?;
    let state = world.virsh(RECOVERY, &["domstate", "vm1"])?;
    ensure!(state.trim() == "running", "the recovery VM is {state}");

    // Back, it hears that its VM is not the active copy any more.
    world.lab.act(LabAction::Resume, "hypervisor:home").await?;
    world.wait_event("SourceStoodDown", "its running VM was stopped").await?;
    world.until_off("vm1").await?;
    world.whole("vm1", RECOVERY).await?;
    world.cli(&["commit", "vm1"]).expect(0);
    world.bring_home("vm1").await?;
    world.proved()
}

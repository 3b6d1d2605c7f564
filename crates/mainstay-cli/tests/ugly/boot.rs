//! Hosts lose their power and boot again.

use anyhow::{Result, ensure};
use mainstay_lab::{HOME, LabAction, RECOVERY};

use crate::support::{World, eventually};

/// libvirt would start the VM before anybody could ask. The agent does instead, once the server has said which copy is the
/// active one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_boot_the_agent_starts_the_active_copy_alone() -> Result<()> {
    let mut world = World::up("boot").await?;
    let vm = world.guest("vm1", "ledger.rate=20")?;
    world.add(&vm).await?;
    world.virsh(HOME, &["autostart", "vm1"])?;
    world.protect_added(&vm).await?;
    let facts = world.virsh(HOME, &["dominfo", "vm1"])?;
    ensure!(facts.lines().any(|line| line.starts_with("Autostart:") && line.ends_with("disable")), "{facts}");

    world.lab.act(LabAction::Kill, "host:home").await?;
    world.lab.act(LabAction::Start, "host:home").await?;
    world.wait_event("StartedAfterBoot", "'vm1' was started").await?;
    world.whole("vm1", HOME).await?;
    world.wait_point("vm1").await?;

    // The recovery VM's disks may still be in the store: they are served again before it is started.
    world.cli(&["failover", "vm1", "--shutdown-source"]).expect(0);
    let seen = world.whole("vm1", RECOVERY).await?.last;
    world.lab.act(LabAction::Kill, "host:recovery").await?;
    world.lab.act(LabAction::Start, "host:recovery").await?;
    eventually("the recovery VM was started after its host's boot", async || {
        let events = world.events("StartedAfterBoot")?;
        ensure!(events.len() == 2, "there are {events:?}");
        Ok(())
    })
    .await?;
    let ledger = world.whole("vm1", RECOVERY).await?;
    ensure!(ledger.last >= seen, "{ledger:?} has less than {seen}");

    world.lab.act(LabAction::Kill, "host:home").await?;
    world.lab.act(LabAction::Start, "host:home").await?;
    world.wait_event("NotStartedAfterBoot", "another copy is the active one").await?;
    let state = world.virsh(HOME, &["domstate", "vm1"])?;
    ensure!(state.trim() == "shut off", "it is {state}");

    // Home again, where the host starts it as before when it is not protected any more.
    world.cli(&["commit", "vm1"]).expect(0);
    world
        .cli(&["planned-failover", "vm1", "--direction", "RecoveryToPrimary", "--sync", "during-failover"])
        .expect(0);
    world.cli(&["commit", "vm1"]).expect(0);
    world.whole("vm1", HOME).await?;
    world.cli(&["disable", "vm1"]).expect(0);
    let facts = world.virsh(HOME, &["dominfo", "vm1"])?;
    ensure!(facts.lines().any(|line| line.starts_with("Autostart:") && line.ends_with("enable")), "{facts}");
    world.proved()
}

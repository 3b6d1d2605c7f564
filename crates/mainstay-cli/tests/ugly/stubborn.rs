//! A guest that will not shut down.

use anyhow::Result;
use mainstay_lab::{HOME, LabAction, RECOVERY};

use crate::support::World;

/// Long enough for a guest that wants to: it then takes two or three seconds.
const SHUTDOWN_SECONDS: u32 = 12;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_refuses_to_stop_is_moved_only_by_force() -> Result<()> {
    let mut world = World::up("stubborn").await?;
    let config = world.lab.dir().join("server.toml");
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, format!("{text}shutdown_timeout_seconds = {SHUTDOWN_SECONDS}\n"))?;
    world.lab.act(LabAction::Stop, "server").await?;
    world.lab.act(LabAction::Start, "server").await?;
    for site in [HOME, RECOVERY] {
        world.lab.wait_connected(site).await?;
    }
    let vm = world.guest("vm1", "ledger.stubborn=1")?;
    world.protect(&vm).await?;

    // A planned failover loses nothing or does not happen: it is undone, and the VM runs and replicates.
    let refusal = format!("did not shut down within {SHUTDOWN_SECONDS} s");
    world.cli(&["planned-failover", "vm1", "--direction", "PrimaryToRecovery"]).expect(1).says(&refusal);
    let item = world.wait_item("vm1", "is as before", |item| item["protectionState"] == "Protected").await?;
    assert_eq!(item["activeLocation"], "Primary");
    world.writes_on("vm1").await?;
    world.wait_point("vm1").await?;
    world.whole("vm1", HOME).await?;
    assert!(world.virsh(RECOVERY, &["list", "--all", "--name"])?.trim().is_empty(), "a copy is left");

    // A failover happens: it warns, and the old VM is stopped.
    world.cli(&["failover", "vm1", "--shutdown-source"]).expect(0).says(&refusal);
    world.whole("vm1", RECOVERY).await?;
    world.wait_event("DataMayBeLost", "may be lost").await?;
    world.wait_event("SourceStoodDown", "its running VM was stopped").await?;
    world.until_off("vm1").await?;
    world.proved()
}

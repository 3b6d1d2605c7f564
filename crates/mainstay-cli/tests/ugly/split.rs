//! Two copies of one VM, or two of one agent's memory: what is older writes nothing and starts nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use mainstay_lab::{HOME, LabAction, LedgerCopy, RECOVERY};

use crate::support::{World, eventually};

const MIB: u64 = 1 << 20;

/// What a snapshot of the agent's host would bring back.
async fn copy_of_agent(world: &mut World, to: &str) -> Result<PathBuf> {
    world.lab.act(LabAction::Pause, "agent:home").await?;
    let copy = world.lab.dir().join(to);
    copy_all(&agent(world), &copy)?;
    world.lab.act(LabAction::Resume, "agent:home").await?;
    Ok(copy)
}

async fn restore_agent(world: &mut World, copy: &Path) -> Result<()> {
    world.lab.act(LabAction::Kill, "agent:home").await?;
    std::fs::remove_dir_all(agent(world))?;
    copy_all(copy, &agent(world))?;
    world.lab.act(LabAction::Start, "agent:home").await?;
    world.lab.wait_connected(HOME).await
}

fn agent(world: &World) -> PathBuf {
    world.lab.dir().join(HOME).join("agent")
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to).status()?;
    ensure!(status.success(), "{} could not be copied", from.display());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_older_writes_nothing_and_starts_nothing() -> Result<()> {
    let mut world = World::up("split").await?;
    let vm = world.guest("vm1", "ledger.rate=20 ledger.churn_kib=64")?;
    world.protect(&vm).await?;

    // The agent's host is set back by some cycles: its tables tell of a point that is not the newest one any more.
    let earlier = copy_of_agent(&mut world, "agent-earlier").await?;
    world.write_random("vm1", "a", 4).await?;
    world.wait_point("vm1").await?;
    restore_agent(&mut world, &earlier).await?;
    world.write_random("vm1", "b", 2).await?;
    let digests = world.in_guest("vm1", LedgerCopy::Active, "md5sum /ledger1/a /ledger1/b").await?;
    world.wait_point("vm1").await?;
    world.wait_item("vm1", "is well", |item| item["replicationHealth"] == "Normal").await?;
    world.cli(&["test-failover", "vm1"]).expect(0);
    let ledger = world.lab.ledger("vm1", LedgerCopy::Test, crate::support::PATIENCE).await?;
    ensure!(ledger.is_whole(), "{ledger:?}");
    let recovered = world.in_guest("vm1", LedgerCopy::Test, "md5sum /ledger1/a /ledger1/b").await?;
    assert_eq!(recovered, digests, "the recovery point is not what the disks were");
    world.cli(&["cleanup-test-failover", "vm1"]).expect(0);

    // The agent is stopped in the middle of a transfer, and knows nothing of the failover.
    let before = copy_of_agent(&mut world, "agent-before").await?;
    world.lab.slow(HOME, MIB).await?;
    world.lab.wait_connected(HOME).await?;
    world.write_random("vm1", "c", 8).await?;
    eventually("a transfer is under way", async || {
        let cycle = world.status("vm1").await?.cycle;
        ensure!(cycle.as_ref().is_some_and(|cycle| cycle.bytes_moved > MIB), "it is {cycle:?}");
        Ok(())
    })
    .await?;
    world.lab.act(LabAction::Pause, "agent:home").await?;
    world.cli(&["failover", "vm1", "--no-shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    let points = world.points("vm1")?;
    world.lab.act(LabAction::Resume, "agent:home").await?;
    world.lab.heal(HOME).await?;
    world.wait_event("SourceStoodDown", "its running VM was stopped").await?;
    world.until_off("vm1").await?;
    let known = |point: &String| points.contains(point);
    ensure!(world.points("vm1")?.iter().all(known), "the agent that was stopped has brought a point about");

    // Set back to before the failover, it believes that its VM is the active copy.
    restore_agent(&mut world, &before).await?;
    world.lab.wait_connected(HOME).await?;
    let moved = world.whole("vm1", RECOVERY).await?;
    world.until_off("vm1").await?;
    ensure!(world.points("vm1")?.iter().all(known), "the agent that was set back has brought a point about");
    // Nor when somebody starts the old VM there.
    world.virsh(HOME, &["start", "vm1"])?;
    world.wait_event("OldCopyStopped", "found running").await?;
    world.until_off("vm1").await?;
    let now = world.whole("vm1", RECOVERY).await?;
    ensure!(now.last >= moved.last, "{now:?} has less than {moved:?}");

    // Home is compared with what it really holds, not with what the agent remembers.
    world.cli(&["commit", "vm1"]).expect(0);
    world.bring_home("vm1").await?;
    world.proved()
}

//! A recovery site that takes nothing more, because it is full or read-only: replication stops and says so, the guest does not
//! notice, and what is there still protects.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, Mounted, RECOVERY};

use crate::support::{World, eventually};

const MIB: u64 = 1 << 20;
/// What the server's file system has in this test.
const SPACE_BYTES: u64 = 128 * MIB;
/// What the server is told to leave free.
const RESERVE_MIB: u64 = 24;

#[test]
fn a_full_recovery_site_stops_replication_and_harms_nobody() {
    mainstay_lab::run_in_own_mounts("space::the_recovery_site_is_full").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs within a_full_recovery_site_stops_replication_and_harms_nobody"]
async fn the_recovery_site_is_full() -> Result<()> {
    let mut world = World::up("space").await?;
    let mounted = give_server_a_small_file_system(&mut world, "server").await?;
    let data = world.lab.dir().join("server");
    let vm = world.guest("vm1", "ledger.rate=20 ledger.churn_kib=256")?;
    world.protect(&vm).await?;

    // Somebody fills the file system, which by default holds the database too.
    let ballast = data.join("ballast");
    mounted.fill(&ballast, (RESERVE_MIB - 2) * MIB)?;
    let item = world.wait_item("vm1", "is critical", |item| item["replicationHealth"] == "Critical").await?;
    let errors = item["healthErrors"].as_array().context("a list")?;
    let error = errors.iter().find(|error| error["errorCode"] == "NoSpace").context("a NoSpace error")?;
    assert!(error["errorMessage"].as_str().is_some_and(|text| text.contains("no space left")), "{error}");
    assert!(error["possibleCauses"].as_str().is_some_and(|text| text.contains("full")), "{error}");
    assert!(error["recommendedAction"].as_str().is_some_and(|text| text.contains("Make space")), "{error}");
    let event = world.wait_event("ReplicationFailed", "no space left").await?;
    assert_eq!(event["severity"], "Critical");

    // The guest is not harmed: it runs, it writes, and no capture stays open.
    let before = world.points("vm1")?;
    world.writes_on("vm1").await?;
    world.whole("vm1", HOME).await?;
    assert!(mounted.free_bytes()? >= (RESERVE_MIB - 16) * MIB, "the reserve is used up");

    // Space again: replication goes on by itself.
    std::fs::remove_file(&ballast)?;
    world.wait_event("ReplicationRecovered", "goes on").await?;
    eventually("a recovery point after the outage", async || {
        ensure!(world.points("vm1")?.iter().any(|point| !before.contains(point)));
        Ok(())
    })
    .await?;
    world.wait_item("vm1", "is well again", |item| item["replicationHealth"] == "Normal").await?;

    // A full site can still be failed over to: what is there protects, and the server writes its jobs down.
    mounted.fill(&ballast, (RESERVE_MIB - 2) * MIB)?;
    world.wait_item("vm1", "is critical again", |item| item["replicationHealth"] == "Critical").await?;
    world.cli(&["failover", "vm1", "--no-shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    drop(mounted);
    world.proved()
}

#[test]
fn a_read_only_store_stops_replication_and_harms_nobody() {
    mainstay_lab::run_in_own_mounts("space::the_store_is_read_only").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs within a_read_only_store_stops_replication_and_harms_nobody"]
async fn the_store_is_read_only() -> Result<()> {
    let mut world = World::up("read-only").await?;
    let mounted = give_server_a_small_file_system(&mut world, "server/store").await?;
    let vm = world.guest("vm1", "ledger.rate=20 ledger.churn_kib=64")?;
    world.protect(&vm).await?;
    world.wait_point("vm1").await?;

    // Whoever writes to it has it open: only then can it be done.
    eventually("the file system is read-only", async || mounted.set_read_only(true)).await?;
    let item = world.wait_item("vm1", "is not well", |item| item["replicationHealth"] != "Normal").await?;
    let errors = item["healthErrors"].to_string();
    assert!(errors.to_lowercase().contains("read-only"), "{errors}");
    world.writes_on("vm1").await?;
    world.whole("vm1", HOME).await?;
    let points = world.points("vm1")?;

    // A failover must write down in the store that the source is shut out. It cannot, and says so before it does anything.
    for shutdown in ["--no-shutdown-source", "--shutdown-source"] {
        let told = world.cli(&["failover", "vm1", shutdown]).expect(1);
        assert!(told.err.to_lowercase().contains("read-only"), "{}", told.err);
        world.wait_item("vm1", "is as before", |item| item["protectionState"] == "Protected").await?;
    }
    world.writes_on("vm1").await?;

    mounted.set_read_only(false)?;
    eventually("a recovery point after the outage", async || {
        ensure!(world.points("vm1")?.iter().any(|point| !points.contains(point)));
        Ok(())
    })
    .await?;
    world.wait_item("vm1", "is well again", |item| item["replicationHealth"] == "Normal").await?;
    world.cli(&["failover", "vm1", "--no-shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    drop(mounted);
    world.proved()
}

/// Moves a directory of the server's (`server`: store and database) to a file system of its own.
async fn give_server_a_small_file_system(world: &mut World, directory: &str) -> Result<Mounted> {
    world.lab.act(LabAction::Stop, "server").await?;
    let data = world.lab.dir().join(directory);
    let aside = world.lab.dir().join("server-before");
    std::fs::rename(&data, &aside)?;
    std::fs::create_dir(&data)?;
    let mounted = Mounted::tmpfs(&data, SPACE_BYTES)?;
    let copied = Command::new("cp").arg("-a").arg(aside.join(".")).arg(&data).status()?;
    ensure!(copied.success(), "the server's data could not be copied");
    let config = world.lab.dir().join("server.toml");
    let text = std::fs::read_to_string(&config)?;
    std::fs::write(&config, format!("{text}store_reserve_mib = {RESERVE_MIB}\n"))?;
    world.lab.act(LabAction::Start, "server").await?;
    for site in [HOME, RECOVERY] {
        world.lab.wait_connected(site).await?;
    }
    Ok(mounted)
}

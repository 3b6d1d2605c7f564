//! What the operator's verbs promise beyond the journey: disks left out, several VMs at once, points by their kind, sizes and addresses
//! at the recovery site, jobs that are watched and cancelled, and a home VM that has to be made anew.

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LedgerCopy, RECOVERY};
use serde_json::Value;

use crate::support::{PATIENCE, World, eventually};

/// The job that a command without waiting answers.
fn job(world: &World, command: &[&str]) -> Result<String> {
    let job = world.cli(&[command, &["--no-wait", "--json"]].concat()).expect(0).json()?;
    Ok(job["name"].as_str().context("a job's name")?.to_owned())
}

fn shows(world: &World, command: &[&str], text: &str) {
    let told = world.cli(command).expect(0);
    assert!(told.out.contains(text), "no '{text}' in:\n{}", told.out);
}

/// Points of an item: id and kind, newest first.
fn points(world: &World, vm: &str) -> Result<Vec<(String, String)>> {
    let points = world.cli(&["recovery-points", vm, "--json"]).expect(0).json()?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let points = points.as_array().context("a list")?.iter();
    Ok(points.map(|point| (text(&point["name"]), text(&point["properties"]["recoveryPointType"]))).collect())
}

/// The devices of a VM's disks.
fn disks(world: &World, site: &str, vm: &str) -> Result<Vec<String>> {
    let listed = world.virsh(site, &["domblklist", vm])?;
    Ok(listed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_vms_fail_over_at_once_and_one_comes_home_to_a_vm_made_for_it() -> Result<()> {
    let mut world = World::up("outcomes").await?;
    for name in ["vm1", "vm2"] {
        let guest = world.guest(name, "ledger.rate=5")?;
        world.add(&guest).await?;
    }
    let values = ["--copy-frequency", "5", "--retention", "24", "--app-consistent-frequency", "1"];
    world.cli(&[&["policy", "create", "hourly"], &values[..]].concat()).expect(0);
    // One of them without a disk, and one followed from the first byte on.
    world.cli(&["protect", "vm2", "--policy", "hourly", "--exclude-disk", "vdb"]).expect(0);
    let protection = job(&world, &["protect", "vm1", "--policy", "hourly"])?;
    world.cli(&["job", "watch", &protection]).expect(0);
    for vm in ["vm1", "vm2"] {
        world.wait_item(vm, "is protected", |item| item["protectionState"] == "Protected").await?;
    }
    shows(&world, &["item", "show", "vm2"], "excluded");
    application_consistent(&world).await?;
    compared(&world)?;

    // Processors, memory and MAC address are as was asked for.
    let network = world.lab.file().site(RECOVERY)?.network.clone();
    let settings = ["--size", "2x256", "--network", &network, "--mac-policy", "generate"];
    world.cli(&[&["item", "set", "vm1"], &settings[..]].concat()).expect(0);
    let mac_at_home = mac(&world, HOME, "vm1")?;
    cancelled(&world).await?;

    let jobs = ["vm1", "vm2"].map(|vm| job(&world, &["failover", vm, "--shutdown-source"]));
    for job in jobs {
        world.cli(&["job", "watch", &job?]).expect(0);
    }
    for vm in ["vm1", "vm2"] {
        world.whole(vm, RECOVERY).await?;
    }
    ensure!(disks(&world, RECOVERY, "vm1")? == ["vda", "vdb"]);
    ensure!(disks(&world, RECOVERY, "vm2")? == ["vda"], "the excluded disk was recovered");
    let info = world.virsh(RECOVERY, &["dominfo", "vm1"])?;
    ensure!(info.contains("CPU(s):         2") && info.contains("262144 KiB"), "{info}");
    let mac = mac(&world, RECOVERY, "vm1")?;
    ensure!(mac != mac_at_home, "the MAC address {mac} is the one of home");
    shows(&world, &["console", "vm1"], "virsh");

    // Another moment, and back to what was there.
    let older = points(&world, "vm1")?.get(1).context("another recovery point")?.0.clone();
    world.cli(&["change-recovery-point", "vm1", "--recovery-point", &older]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    for vm in ["vm1", "vm2"] {
        world.cli(&["commit", vm]).expect(0);
    }
    world.cli(&["change-recovery-point", "vm1", "--recovery-point", &older]).expect(3).says("Allowed now");
    world.cli(&["complete-failover", "vm1"]).expect(3);
    home_made_anew(&world).await?;
    // What was left out is at home as it was: it has not seen what the other disk has.
    world.cli(&["planned-failover", "vm2", "--direction", "RecoveryToPrimary"]).expect(6);
    let away = world.whole("vm2", RECOVERY).await?;
    world.cli(&["complete-failover", "vm2"]).expect(0);
    let home = world.lab.ledger("vm2", LedgerCopy::Active, PATIENCE).await?;
    ensure!(home.site == HOME && home.last >= away.acknowledged, "{away:?}, {home:?}");
    ensure!(home.corrupt == 0 && home.gaps == 0 && !home.disks_agree, "{home:?}");
    ensure!(disks(&world, HOME, "vm2")? == ["vda", "vdb"]);
    world.cli(&["commit", "vm2"]).expect(0);
    world.proved()
}

/// A rehearsal of the newest point for which applications took part, which is not the newest of all.
async fn application_consistent(world: &World) -> Result<()> {
    let wanted = eventually("a point for which applications took part, and later ones", async || {
        let points = points(world, "vm1")?;
        let found = points.iter().position(|(_, kind)| kind == "AppConsistent");
        let found = found.filter(|index| *index > 0).with_context(|| format!("there are {points:?}"))?;
        Ok(points[found].0.clone())
    })
    .await?;
    let rehearsal = job(world, &["test-failover", "vm1", "--recovery-point", "latest-app-consistent"])?;
    world.cli(&["job", "watch", &rehearsal]).expect(0);
    let ledger = world.lab.ledger("vm1", LedgerCopy::Test, PATIENCE).await?;
    ensure!(ledger.is_whole(), "{ledger:?}");
    let status: Value = world.lab.client()?.get(&format!("/api/v1/jobs/{rehearsal}")).await?;
    ensure!(status.to_string().contains(&wanted), "the copy is not of {wanted}: {status}");
    world.cli(&["cleanup-test-failover", "vm1", "--notes", "the books are in order"]).expect(0);
    Ok(())
}

/// All hashes are compared; that nothing is sent that is there is looked at by the kills.
fn compared(world: &World) -> Result<()> {
    world.cli(&["resync", "vm1"]).expect(0);
    let jobs = world.cli(&["job", "list", "--json"]).expect(0).json()?;
    let newest = jobs[0]["name"].as_str().context("a job")?;
    shows(world, &["job", "show", newest], "Succeeded");
    Ok(())
}

/// A planned failover whose target does not answer is cancelled, and the VM goes on as if nothing had been asked.
async fn cancelled(world: &World) -> Result<()> {
    world.lab_cli(&["pause", "agent:recovery"]).expect(0);
    let failover = job(world, &["planned-failover", "vm1", "--direction", "PrimaryToRecovery"])?;
    eventually("the job works on the VM", async || {
        let item = world.item("vm1")?;
        ensure!(item["currentScenario"]["scenarioName"] != "None", "{item}");
        Ok(())
    })
    .await?;
    world.cli(&["job", "cancel", &failover]).expect(0);
    world.lab_cli(&["resume", "agent:recovery"]).expect(0);
    // A job that did not come to its end is not a success.
    world.cli(&["job", "watch", &failover]).expect(1);
    world.cli(&["job", "restart", &failover]).expect(3);
    world.cli(&["job", "resume", &failover]).expect(3);
    world.lab.wait_connected(RECOVERY).await?;
    world.whole("vm1", HOME).await?;
    assert!(world.lab_cli(&["status"]).expect(0).out.contains("agent:recovery"));
    Ok(())
}

/// The home VM is gone with its disks; a failback makes it anew.
async fn home_made_anew(world: &World) -> Result<()> {
    let at_home = disks_of(world, HOME, "vm1")?;
    world.virsh(HOME, &["undefine", "vm1"])?;
    for disk in at_home {
        std::fs::remove_file(disk)?;
    }
    let home = ["planned-failover", "vm1", "--direction", "RecoveryToPrimary", "--sync", "during-failover"];
    world.cli(&home).expect(1).says("--create-vm");
    world.whole("vm1", RECOVERY).await?;
    let before = world.whole("vm1", RECOVERY).await?;
    world.cli(&[&home[..], &["--create-vm"]].concat()).expect(0);
    let after = world.whole("vm1", HOME).await?;
    ensure!(after.last >= before.acknowledged, "{before:?}, {after:?}");
    world.cli(&["commit", "vm1"]).expect(0);
    world.cli(&["reverse-replicate", "vm1"]).expect(0);
    world.wait_point("vm1").await
}

/// The files of a VM's disks.
fn disks_of(world: &World, site: &str, vm: &str) -> Result<Vec<String>> {
    let listed = world.virsh(site, &["domblklist", vm])?;
    Ok(listed.lines().filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect())
}

fn mac(world: &World, site: &str, vm: &str) -> Result<String> {
    let listed = world.virsh(site, &["domiflist", vm])?;
    Ok(listed.split_whitespace().last().context("an adapter")?.to_owned())
}

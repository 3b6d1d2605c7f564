//! A site is lost: everything at home dies at once and the network with it.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, RECOVERY, Segment};
use serde_json::Value;

use crate::support::World;

/// All messages that a job's tasks carry.
fn messages(job: &Value) -> Vec<String> {
    let tasks = job["properties"]["tasks"].as_array().cloned().unwrap_or_default();
    let of_task = |task: &Value| task["errors"].as_array().cloned().unwrap_or_default();
    let text = |error: Value| error["serviceErrorDetails"]["message"].as_str().unwrap_or_default().to_owned();
    tasks.iter().flat_map(of_task).map(text).collect()
}

/// `… N s older than the request: about M bytes …`
fn loss(text: &str) -> Option<(u64, u64)> {
    let seconds = text.split(" s older than the request: about ").next()?.rsplit(' ').next()?.parse().ok()?;
    let bytes = text.split("older than the request: about ").nth(1)?.split(' ').next()?.parse().ok()?;
    Some((seconds, bytes))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_site_is_failed_over_and_stands_down_when_it_comes_back() -> Result<()> {
    let mut world = World::up("disaster").await?;
    let vm = world.guest("vm1", "ledger.ip=10.77.0.5/24 ledger.rate=20 ledger.churn_kib=64")?;
    world.protect(&vm).await?;
    // The rate of change is known from two points on.
    world.wait_point("vm1").await?;

    // The address that the VM shall have at the recovery site is taken there, by a machine that nobody knows.
    let network = world.lab.file().site(RECOVERY)?.network.clone();
    let segment = Segment::join(&network)?;
    segment.hold_address(Ipv4Addr::new(10, 77, 0, 9), [0x52, 0x54, 0, 0x77, 0, 9]);
    let settings = ["--target-name", "web-dr", "--network", &network, "--ip", "10.77.0.9/24"];
    world.cli(&[&["item", "set", "vm1"], &settings[..]].concat()).expect(0);

    world.lab.site(HOME)?.lose_power().await?;
    world.lab.act(LabAction::Kill, "agent:home").await?;
    world.lab.cut(HOME).await?;
    let told = world.cli(&["failover", "vm1", "--shutdown-source"]).expect(0);
    ensure!(loss(&told.err).is_some(), "nothing is said about what may be lost: {}", told.err);
    let told = told.says("10.77.0.9 is in use");
    drop(told);
    let jobs = world.cli(&["job", "list", "--json"]).expect(0).json()?;
    let jobs = jobs.as_array().context("a list")?;
    let failover = jobs.iter().find(|job| job["properties"]["scenarioName"] == "UnplannedFailover");
    let failover = failover.with_context(|| format!("no failover in {jobs:?}"))?;
    let name = failover["name"].as_str().context("a name")?;
    let job = world.cli(&["job", "show", name, "--json"]).expect(0).json()?;
    let texts = messages(&job);
    let (seconds, bytes) =
        texts.iter().find_map(|text| loss(text)).with_context(|| format!("no loss in {texts:?}"))?;
    assert!((1..600).contains(&seconds) && bytes > 0, "{seconds} s, {bytes} bytes");
    assert!(texts.iter().any(|text| text.contains("10.77.0.9 is in use")), "{texts:?}");
    let event = world.wait_event("DataMayBeLost", "may be lost").await?;
    assert_eq!(loss(event["description"].as_str().context("text")?), Some((seconds, bytes)), "{event}");

    // The guest is found by its own name and by the one that it has there.
    for name in ["vm1", "web-dr"] {
        let ledger = world.ledger_by(name)?;
        assert_eq!((&ledger["site"], &ledger["gaps"]), (&Value::from(RECOVERY), &Value::from(0)), "{ledger}");
    }
    world.whole("vm1", RECOVERY).await?;

    // The host is back, and its administrator starts the old VM before anybody can tell it otherwise.
    world.lab.act(LabAction::Start, "hypervisor:home").await?;
    world.virsh(HOME, &["start", "vm1"])?;
    world.lab.heal(HOME).await?;
    world.lab.act(LabAction::Start, "agent:home").await?;
    world.wait_event("SourceStoodDown", "its running VM was stopped").await?;
    world.until_off("vm1").await?;
    // Nor does the host start it by itself.
    let facts = world.virsh(HOME, &["dominfo", "vm1"])?;
    ensure!(facts.lines().any(|line| line.starts_with("Autostart:") && line.ends_with("disable")), "{facts}");
    world.whole("web-dr", RECOVERY).await?;
    world.proved()
}

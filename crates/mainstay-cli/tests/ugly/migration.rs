//! A protected VM that somebody moves live to another host, which shares its disks, and back.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LedgerCopy, Site, ledger};

use crate::support::{World, eventually, virsh};

/// A host that shares the home host's disks, and has no agent.
struct OtherHost(Site);

impl OtherHost {
    async fn start(lab: &Path) -> Result<Self> {
        let site = Site::open(lab, "other").await?;
        // libvirt refuses to move a VM to the host on which it is, and knows hosts by their ids.
        let settings = "host_uuid = \"5f1c3b52-8c0e-4b0d-9a55-3e6d1f0a7c21\"\n";
        std::fs::write(lab.join("other/conf/libvirt/libvirtd.conf"), settings)?;
        site.start().await?;
        Ok(Self(site))
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        // The lab does not know of it, and takes down what it knows.
        self.0.cut_power();
    }
}

/// Moves the VM; while a capture is open, or a job of somebody's, libvirt refuses.
async fn migrate(from: &Site, to: &Site) -> Result<()> {
    let how = ["--live", "--unsafe", "--persistent", "--undefinesource", "--migrateuri", "tcp://127.0.0.1"];
    let arguments = [&["migrate", "vm1", to.uri()], &how[..]].concat();
    eventually("the VM moves", async || virsh(from, &arguments).map(drop)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_moves_to_another_host_and_back_goes_on_with_its_changes() -> Result<()> {
    let mut world = World::up("migration").await?;
    // Slow: what it changes all the while shall be far less than what it has.
    let vm = world.guest("vm1", "ledger.rate=2")?;
    world.protect(&vm).await?;
    world.write_content("vm1").await?;
    let before = world.status("vm1").await?.bytes_moved;
    let known = world.points("vm1")?;
    let (home, id) = world.lab.vm("vm1", LedgerCopy::Active).await?;
    let other = OtherHost::start(world.lab.dir()).await?;

    migrate(home, &other.0).await?;
    // Nobody replicates it there, and that is said.
    world.wait_item("vm1", "is missed", |item| item["replicationHealth"] == "Critical").await?;
    let errors = world.item("vm1")?["healthErrors"].to_string();
    ensure!(errors.contains("NotFound"), "{errors}");
    world.writes_on("vm1").await?;
    let script = "echo away > /ledger0/note; sync";
    ledger::run_in_guest(&other.0, id, "/bin/sh", &["-c", script]).await?;
    let points = world.points("vm1")?;
    ensure!(known.iter().all(|point| points.contains(point)), "recovery points went away");

    migrate(&other.0, home).await?;
    world.wait_point("vm1").await?;
    world.arrived("vm1", "away", before).await?;
    world.whole("vm1", HOME).await.context("back at home")?;
    // While its directory is still there, by which its daemon is found.
    drop(other);
    world.proved()
}

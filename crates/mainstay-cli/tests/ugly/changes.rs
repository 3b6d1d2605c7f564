//! What administrators do to a VM while it is protected: they back it up, let its disks grow and rename it.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use mainstay_lab::{DiskImage, HOME, LedgerCopy, RECOVERY};

use crate::support::{World, eventually};

const MIB: u64 = 1 << 20;

/// Grows a disk of a running VM. While a capture is open the hypervisor refuses that.
async fn grow(world: &World, site: &str, vm: &str, disk: &str, mib: u64) -> Result<()> {
    eventually("the disk grows", async || {
        world.virsh(site, &["blockresize", vm, disk, &format!("{}KiB", mib * 1024)]).map(drop)
    })
    .await?;
    eventually("the guest sees it", async || {
        let size =
            world.in_guest(vm, LedgerCopy::Active, &format!("blockdev --getsize64 /dev/{disk}")).await?;
        ensure!(size.parse::<u64>()? == mib * MIB, "it sees {size} bytes");
        Ok(())
    })
    .await
}

/// Fills the last MiB of a disk, behind its file system, with random bytes; answers their digest.
async fn fill_end(world: &World, vm: &str, disk: &str, mib: u64) -> Result<String> {
    let script = format!("dd if=/dev/urandom of=/dev/{disk} bs=1M seek={} count=1 conv=fsync 2>&1", mib - 1);
    world.in_guest(vm, LedgerCopy::Active, &script).await?;
    end_of(world, vm, disk, mib).await
}

async fn end_of(world: &World, vm: &str, disk: &str, mib: u64) -> Result<String> {
    let size = world.in_guest(vm, LedgerCopy::Active, &format!("blockdev --getsize64 /dev/{disk}")).await?;
    ensure!(size.parse::<u64>()? == mib * MIB, "{disk} has {size} bytes");
    // Not from the cache of a boot before.
    let script = format!(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{disk} bs=1M skip={} count=1 2>/dev/null | md5sum",
        mib - 1
    );
    world.in_guest(vm, LedgerCopy::Active, &script).await
}

/// Begins a backup as any other tool does: in pull mode it stays open until somebody ends it.
fn foreign_backup(world: &World) -> Result<PathBuf> {
    let site = world.lab.site(HOME)?;
    let dir = world.lab.dir().join("foreign");
    std::fs::create_dir_all(&dir)?;
    site.account().give(&dir)?;
    let xml = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/nbd'/><disks>\
         <disk name='vda' backup='yes' type='file'><driver type='qcow2'/><scratch file='{0}/vda.scratch'/></disk>\
         <disk name='vdb' backup='no'/></disks></domainbackup>",
        dir.display()
    );
    let path = dir.join("backup.xml");
    std::fs::write(&path, xml)?;
    Ok(path)
}

/// A disk is plugged in: that is told, and changes nothing of what is replicated.
async fn disk_added(world: &World) -> Result<()> {
    let image = world.lab.dir().join("foreign").join("added.qcow2");
    let status =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("8M").status()?;
    ensure!(status.success(), "{} could not be made", image.display());
    world.lab.site(HOME)?.account().give(&image)?;
    let image = image.to_string_lossy().into_owned();
    eventually("the disk is plugged in", async || {
        world.virsh(HOME, &["attach-disk", "vm1", &image, "vdc", "--subdriver", "qcow2", "--live"]).map(drop)
    })
    .await?;
    world.cli(&["host", "refresh", "home"]).expect(0);
    world.wait_event("DiskAdded", "a new disk 'vdc', which is not replicated").await?;
    let disks = world.status("vm1").await?.disks;
    let replicated: Vec<_> = disks.iter().map(|disk| (disk.key.as_str(), disk.is_replicated)).collect();
    assert_eq!(replicated, [("vda", true), ("vdb", true), ("vdc", false)]);
    world.wait_point("vm1").await?;
    eventually("the disk is taken out", async || {
        world.virsh(HOME, &["detach-disk", "vm1", "vdc", "--live"]).map(drop)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_protected_vm_is_backed_up_grown_renamed_and_comes_home() -> Result<()> {
    let mut world = World::up("changes").await?;
    let mut vm = world.guest("vm1", "ledger.ip=10.77.0.5/24 ledger.rate=5")?;
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    world.protect(&vm).await?;
    world.write_content("vm1").await?;
    others_are_left_alone(&world).await?;
    snapshotted(&world).await?;
    defined_anew(&world).await?;

    // Both disks grow, and what is written there arrives.
    for disk in ["vda", "vdb"] {
        grow(&world, HOME, "vm1", disk, 96).await?;
    }
    let ends = [fill_end(&world, "vm1", "vda", 96).await?, fill_end(&world, "vm1", "vdb", 96).await?];
    world.wait_point("vm1").await?;
    world.cli(&["host", "refresh", "home"]).expect(0);
    let item = world.item("vm1")?;
    for disk in item["providerSpecificDetails"]["azureVmDiskDetails"].as_array().context("disks")? {
        assert_eq!(disk["maxSizeMB"], "96", "{disk}");
    }

    disk_added(&world).await?;
    renamed(&world).await?;

    // It is failed over with its new size, to a name and an address of their own.
    let network = world.lab.file().site(RECOVERY)?.network.clone();
    let settings = ["--target-name", "shop-dr", "--network", &network, "--ip", "10.77.0.8/24"];
    world.cli(&[&["item", "set", "vm1"], &settings[..]].concat()).expect(0);
    world.cli(&["planned-failover", "vm1", "--direction", "PrimaryToRecovery"]).expect(0);
    world.whole("shop-dr", RECOVERY).await?;
    for (disk, end) in ["vda", "vdb"].into_iter().zip(&ends) {
        assert_eq!(&end_of(&world, "shop-dr", disk, 96).await?, end, "{disk} at the recovery site");
    }
    let addresses = world.in_guest("shop-dr", LedgerCopy::Active, "ip -4 -o addr show dev eth0").await?;
    assert!(addresses.contains("10.77.0.8/24") && !addresses.contains("10.77.0.5"), "{addresses}");

    // There it grows once more.
    grow(&world, RECOVERY, "shop-dr", "vda", 112).await?;
    let end = fill_end(&world, "shop-dr", "vda", 112).await?;
    world.cli(&["commit", "vm1"]).expect(0);

    // Home is refused as long as a snapshot of somebody's lies over its disks.
    let disks = ["--disk-only", "--diskspec", "vda,snapshot=external", "--diskspec", "vdb,snapshot=no"];
    world.virsh(HOME, &[&["snapshot-create-as", "shop", "theirs"], &disks[..]].concat())?;
    let home = ["planned-failover", "vm1", "--direction", "RecoveryToPrimary"];
    world.cli(&home).expect(1).says("has snapshots");
    let snapshots = world.virsh(HOME, &["snapshot-list", "shop", "--name"])?;
    assert_eq!(snapshots.trim(), "theirs", "the snapshot was touched");
    world.whole("vm1", RECOVERY).await?;
    world.virsh(HOME, &["snapshot-delete", "shop", "theirs"])?;

    world.cli(&home).expect(6);
    let before = world.whole("vm1", RECOVERY).await?;
    world.cli(&["complete-failover", "vm1"]).expect(0);
    let after = world.whole("shop", HOME).await?;
    assert!(after.last >= before.acknowledged, "{before:?}, {after:?}");
    assert_eq!(end_of(&world, "shop", "vda", 112).await?, end, "what was written to the grown disk");
    assert_eq!(end_of(&world, "shop", "vdb", 96).await?, ends[1]);
    world.cli(&["commit", "vm1"]).expect(0);
    world.cli(&["reverse-replicate", "vm1"]).expect(0);
    world.wait_point("vm1").await?;
    world.proved()
}

/// Somebody else's backup job is waited for, somebody else's checkpoint does not matter, and neither is touched.
async fn others_are_left_alone(world: &World) -> Result<()> {
    let xml = foreign_backup(world)?;
    let path = xml.to_str().context("a path")?;
    // One of our own captures may be open just then.
    eventually("somebody's backup begins", async || {
        world.virsh(HOME, &["backup-begin", "vm1", path]).map(drop)
    })
    .await?;
    let theirs = world.virsh(HOME, &["backup-dumpxml", "vm1"])?;
    let item = world.wait_item("vm1", "waits", |item| item["replicationHealth"] == "Warning").await?;
    let errors = item["healthErrors"].as_array().context("a list")?;
    let error = errors.iter().find(|error| error["errorCode"] == "Busy");
    let error = error.with_context(|| format!("no Busy in {errors:?}"))?;
    assert!(error["errorMessage"].as_str().is_some_and(|text| text.contains("another job")), "{error}");
    world.wait_event("ReplicationFailed", "another job").await?;
    world.writes_on("vm1").await?;
    assert_eq!(world.virsh(HOME, &["backup-dumpxml", "vm1"])?, theirs, "the backup was touched");
    let known = world.points("vm1")?;
    world.virsh(HOME, &["domjobabort", "vm1"])?;
    eventually("replication goes on", async || {
        ensure!(world.points("vm1")?.iter().any(|point| !known.contains(point)));
        Ok(())
    })
    .await?;
    world.wait_item("vm1", "is well", |item| item["replicationHealth"] == "Normal").await?;

    let disks = ["--diskspec", "vda,checkpoint=bitmap", "--diskspec", "vdb,checkpoint=no"];
    eventually("somebody makes a checkpoint", async || {
        world.virsh(HOME, &[&["checkpoint-create-as", "vm1", "theirs"], &disks[..]].concat()).map(drop)
    })
    .await?;
    world.wait_point("vm1").await?;
    let checkpoints = world.virsh(HOME, &["checkpoint-list", "vm1", "--name"])?;
    assert_eq!(checkpoints.trim(), "theirs", "the checkpoint was touched");
    eventually("somebody removes the checkpoint", async || {
        world.virsh(HOME, &["checkpoint-delete", "vm1", "theirs"]).map(drop)
    })
    .await
}

/// Somebody takes a snapshot while the VM runs, and merges it again, as backup tools do.
async fn snapshotted(world: &World) -> Result<()> {
    world.in_guest("vm1", LedgerCopy::Active, "echo before > /ledger0/note; sync").await?;
    let before = world.status("vm1").await?.bytes_moved;
    let disks = ["--diskspec", "vda,snapshot=external", "--diskspec", "vdb,snapshot=no"];
    // Refused while a capture of ours is open.
    eventually("somebody takes a snapshot", async || {
        let arguments = ["snapshot-create-as", "vm1", "nightly", "--disk-only", "--no-metadata"];
        world.virsh(HOME, &[&arguments[..], &disks[..]].concat()).map(drop)
    })
    .await?;
    world.wait_point("vm1").await?;
    world.in_guest("vm1", LedgerCopy::Active, "echo meanwhile > /ledger0/note; sync").await?;
    world.wait_point("vm1").await?;
    eventually("somebody merges the snapshot", async || {
        world.virsh(HOME, &["blockcommit", "vm1", "vda", "--active", "--pivot", "--wait"]).map(drop)
    })
    .await?;
    world.in_guest("vm1", LedgerCopy::Active, "echo after > /ledger0/note; sync").await?;
    world.wait_point("vm1").await?;
    world.arrived("vm1", "after", before).await
}

/// The VM's definition is removed while it runs, and comes back.
async fn defined_anew(world: &World) -> Result<()> {
    let xml = world.lab.dir().join("vm1.xml");
    std::fs::write(&xml, world.virsh(HOME, &["dumpxml", "vm1", "--inactive", "--security-info"])?)?;
    let before = world.status("vm1").await?.bytes_moved;
    eventually("the definition is removed", async || {
        world.virsh(HOME, &["undefine", "vm1", "--checkpoints-metadata"]).map(drop)
    })
    .await?;
    // It runs on, until it is shut down, and is replicated.
    world.writes_on("vm1").await?;
    world.wait_point("vm1").await?;
    world.virsh(HOME, &["define", xml.to_str().context("a path")?])?;
    world.in_guest("vm1", LedgerCopy::Active, "echo anew > /ledger0/note; sync").await?;
    world.wait_point("vm1").await?;
    world.arrived("vm1", "anew", before).await
}

/// The VM is shut down, renamed and started again by its administrator; it stays the same item.
async fn renamed(world: &World) -> Result<()> {
    world.virsh(HOME, &["shutdown", "vm1"])?;
    eventually("the VM is off", async || match world.virsh(HOME, &["domstate", "vm1"])?.trim() {
        "shut off" => Ok(()),
        state => bail!("it is {state}"),
    })
    .await?;
    // A capture of a VM that is off holds its images, which does not hinder a new name.
    eventually("the new name", async || world.virsh(HOME, &["domrename", "vm1", "shop"]).map(drop)).await?;
    world.wait_point("vm1").await?;
    eventually("the VM starts", async || world.virsh(HOME, &["start", "shop"]).map(drop)).await?;
    world.cli(&["host", "refresh", "home"]).expect(0);
    let item = world.item("vm1")?;
    assert_eq!((&item["friendlyName"], &item["protectionState"]), (&"shop".into(), &"Protected".into()));
    world.wait_point("vm1").await?;
    // The item's name is still the old one; both names, and the item's id, lead to the VM.
    let id = world.cli(&["item", "show", "shop", "--json"]).expect(0).json()?["id"].clone();
    for name in ["vm1", "shop", id.as_str().context("an id")?] {
        let ledger = world.ledger_by(name)?;
        assert_eq!(ledger["site"], HOME, "{ledger}");
    }
    Ok(())
}
